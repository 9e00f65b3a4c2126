"""A slot: a folder with one release, decoded, and a manifest that vouches for both files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filterpress import files

NAMES = ("a", "b")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is in a slot.

    Attributes:
        sha256: Digest of the encoded file.
        model_sha256: Digest of the ONNX model made of it.
        release_counter: Of the release.
        target: Its path in the store.
        health: What its trial checks.
        proven: Whether it has passed its trial here.
    """

    sha256: str
    model_sha256: str
    release_counter: int
    target: str
    health: Mapping[str, Any]
    proven: bool = False


class Slot:
    """A folder with one release.

    Attributes:
        encoded: The file as it was released; deltas start from it.
        model: The ONNX model, which is what runs.
    """

    def __init__(self, folder: Path) -> None:
        self.encoded = folder / "model.fpk"
        self.model = folder / "model.onnx"
        self._manifest = folder / "manifest.json"

    def manifest(self) -> Manifest | None:
        """Return what is in the slot, or None if it is empty, half written or damaged."""
        try:
            return Manifest(**json.loads(self._manifest.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def intact(self) -> Manifest | None:
        """Return the manifest if the model is what it says, to the bit."""
        manifest = self.manifest()
        if manifest and _digest(self.model) == manifest.model_sha256:
            return manifest
        return None

    def released(self) -> bytes | None:
        """Return the encoded file, if there is one; whoever uses it looks at its digest."""
        try:
            return self.encoded.read_bytes()
        except OSError:
            return None

    def clear(self) -> None:
        """Empty the slot, its manifest first, so that what is half gone vouches for nothing.

        Raises:
            OSError: It cannot be emptied.
        """
        for path in (self._manifest, self.model, self.encoded):
            path.unlink(missing_ok=True)
            files.sync(path.parent)

    def fill(self, staged: Path, model: bytes, manifest: Manifest) -> None:
        """Put a release into an empty slot, its manifest last.

        Args:
            staged: The encoded file, on the disk and verified; it is moved here.
            model: The ONNX model made of it.
            manifest: What vouches for both.

        Raises:
            OSError: It cannot be written.
        """
        staged.replace(self.encoded)
        files.sync(self.encoded.parent)
        files.write(self.model, model)
        self.vouch(manifest)

    def vouch(self, manifest: Manifest) -> None:
        """Replace the manifest.

        Args:
            manifest: The new one.

        Raises:
            OSError: It cannot be written; the old one stands.
        """
        files.write(self._manifest, json.dumps(asdict(manifest)).encode())

    def prove(self, manifest: Manifest) -> None:
        """Note that the release has passed its trial.

        Args:
            manifest: What the slot holds.

        Raises:
            OSError: It cannot be written.
        """
        self.vouch(replace(manifest, proven=True))


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
