"""What is to be done elsewhere: a stage, the files that it reads, and its settings."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filterpress.errors import DataError

if TYPE_CHECKING:
    from filterpress.scratch import Scratch

STAGES = ("train", "retrain")
OUT, ERROR = "out", "error"  # what the machines leave in scratch, under the name of the work


@dataclass(frozen=True)
class Work:
    """A stage with its arguments, but for the package that it writes.

    Attributes:
        stage: Name of the stage.
        inputs: Packages and files that it reads, by parameter.
        settings: Its other arguments.
        training: Name of the training by its content, under which its checkpoint lies in scratch.
    """

    stage: str
    inputs: Mapping[str, Path]
    settings: Mapping[str, Any]
    training: str

    def name(self, **more: Any) -> str:
        """Name the work by its content: the same for whoever tries it again.

        Args:
            more: What else makes it another work, such as the image.
        """
        whole = json.dumps([self.training, more], sort_keys=True)
        return f"filterpress-{self.stage}-{hashlib.sha256(whole.encode()).hexdigest()[:16]}"

    def put(self, scratch: Scratch, name: str) -> str:
        """Bring the inputs to scratch.

        Args:
            scratch: The place.
            name: Of this work there.

        Returns:
            The work as text, for `fetch`.
        """
        files = {}
        for parameter, path in self.inputs.items():
            files[parameter] = "" if path.is_dir() else path.name
            with _as_folder(path) as folder:
                scratch.put(f"{name}/{parameter}", folder)
        text = json.dumps([self.stage, files, dict(self.settings)])
        return text.replace("$", "\\u0024")  # Kubernetes takes $(NAME) for a variable

    def forget(self, scratch: Scratch, name: str) -> None:
        """Remove what machines left in scratch of this work."""
        for part in (OUT, ERROR):
            scratch.delete(f"{name}/{part}")

    def clear(self, scratch: Scratch, name: str) -> None:
        """Remove all that lies in scratch of this work."""
        self.forget(scratch, name)
        for part in self.inputs:
            scratch.delete(f"{name}/{part}")


def fetch(text: str, scratch: Scratch, name: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """Read a work, and bring its inputs here.

    Args:
        text: What `Work.put` returned.
        scratch: The place.
        name: Of the work there.
        folder: For the inputs.

    Returns:
        Name of the stage, and its arguments but for the package that it writes.

    Raises:
        DataError: The inputs are not in scratch.
    """
    stage, files, settings = json.loads(text)
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {STAGES}, got {stage!r}")
    for parameter in files:
        if not scratch.get(f"{name}/{parameter}", folder / parameter):
            raise DataError(f"{scratch.uri} has no {name}/{parameter}: it was removed meanwhile")
    return stage, settings | {p: folder / p / file for p, file in files.items()}


@contextmanager
def _as_folder(path: Path) -> Iterator[Path]:
    """Give a folder as it is, and a file in a folder of its own."""
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, folder)
        yield Path(folder)
