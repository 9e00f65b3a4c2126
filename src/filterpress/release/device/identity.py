"""Who a vehicle is: its name, where its releases come from, and the key that signs its reports."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root

from filterpress import files
from filterpress.errors import ReleaseError
from filterpress.release.device.slots import NAMES
from filterpress.release.names import ANY, DEVELOPMENT, is_segment

ROOT = "root.json"
_DEVICE = "device.json"
_KEY = "device.pem"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who a vehicle is.

    Attributes:
        store: Where releases come from; see `filterpress.release.device.source.open_source`.
        hardware: Which releases fit it.
        channel: Which of them it follows.
        device_id: Random, so that shares of a fleet are true; not the number of the vehicle.
        cohorts: Groups that it belongs to.
    """

    store: str
    hardware: str = ANY
    channel: str = "stable"
    device_id: str = ""
    cohorts: tuple[str, ...] = ()


def create(home: Path, identity: Identity, root: bytes, *, development: bool = False) -> Identity:
    """Make the folder of a vehicle, whole or not at all.

    Args:
        home: Folder to make.
        identity: Who it is; an empty ``device_id`` is drawn.
        root: The root that it will trust, as signed, got by a way that is trusted.
        development: Whether a root for development will do. Anybody may hold its keys.

    Returns:
        Who it is, with its id.

    Raises:
        ValueError: A name is not one.
        ReleaseError: The root cannot be used.
        PackageError: There is something in the folder.
        OSError: It cannot be written.
    """
    for field in ("hardware", "channel"):
        if not is_segment(getattr(identity, field)):
            raise ValueError(
                f"{field} must be letters, digits, '.', '_' and '-', not starting with '.', got "
                f"{getattr(identity, field)!r}"
            )
    _check_root(root, development)
    known = asdict(identity) | {"device_id": identity.device_id or uuid.uuid4().hex}
    key = Ed25519PrivateKey.generate()
    with files.new_directory(home, mode=0o700) as growing:
        (growing / _KEY).touch(mode=0o600)  # private from its first moment
        (growing / _KEY).write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        (growing / ROOT).write_bytes(root)
        (growing / _DEVICE).write_text(json.dumps({"schema": 1, **known}), encoding="utf-8")
        for folder in ("metadata/root_history", "staging", *(f"slots/{name}" for name in NAMES)):
            (growing / folder).mkdir(parents=True)
    return load(home)


def load(home: Path) -> Identity:
    """Read who a vehicle is.

    Args:
        home: Its folder.

    Returns:
        Who it is.

    Raises:
        ReleaseError: The folder is not that of a vehicle.
    """
    try:
        found = json.loads((home / _DEVICE).read_bytes())
        del found["schema"]
        return Identity(**{**found, "cohorts": tuple(found["cohorts"])})
    except FileNotFoundError as error:
        raise ReleaseError(
            f"{home} is not the folder of a vehicle: make it with filterpress-device init"
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ReleaseError(f"{home / _DEVICE} is damaged: {error}") from error


def sign(home: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """Sign a report with the key of the vehicle.

    Args:
        home: Folder of the vehicle.
        report: JSON values.

    Returns:
        ``signed``, the report; ``public_key`` and ``signature``, in hexadecimal. What is signed is
        the report as JSON in UTF-8 with sorted keys and no white space.

    Raises:
        ReleaseError: The key is lost or damaged.
    """
    try:
        key = load_pem_private_key((home / _KEY).read_bytes(), None)
    except (OSError, ValueError) as error:
        raise ReleaseError(f"{home / _KEY} is lost or damaged: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ReleaseError(f"{home / _KEY} must be an Ed25519 key")
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    signature = key.sign(canonical(report))
    return {"signed": dict(report), "public_key": public.hex(), "signature": signature.hex()}


def canonical(report: Mapping[str, Any]) -> bytes:
    """Write a report the one way that is signed.

    Example:
        >>> canonical({"b": 1, "a": "ü"}).decode()
        '{"a":"ü","b":1}'
    """
    text = json.dumps(dict(report), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode()


def _check_root(root: bytes, development: bool) -> None:
    try:
        metadata = Metadata[Root].from_bytes(root)
        if not isinstance(metadata.signed, Root):
            raise RepositoryError(f"it is {metadata.signed.type} metadata")
        metadata.signed.verify_delegate(Root.type, metadata.signed_bytes, metadata.signatures)
    except RepositoryError as error:
        reason = str(error).partition("\n")[0][:200]
        raise ReleaseError(f"root must be signed root metadata: {reason}") from error
    if metadata.signed.unrecognized_fields.get(DEVELOPMENT) and not development:
        raise ReleaseError(
            "root is for development: anybody may hold its keys; to try things out, say "
            "--development"
        )
