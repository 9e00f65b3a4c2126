"""The folder of keys that a publisher signs with.

It holds the trusted root, ``root.json``, and one private key for each role, ``<role>.pem``. The
root says which keys may sign what; readers are given it once, by a way that they trust, and check
everything else against it. The key of the root itself signs nothing else: `load_keys` does not read
it, and it is best kept elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner, Signer
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp
from tuf.api.serialization.json import JSONSerializer

from filterpress import files
from filterpress.errors import PackageError, ReleaseError

_log = logging.getLogger(__name__)

TRUSTED_ROOT = "root.json"
_ONLINE_ROLES = (Targets.type, Snapshot.type, Timestamp.type)
_ROOT_LIFE = timedelta(days=365)
_DEVELOPMENT = "x-filterpress-development"


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What a publisher signs with, and what its readers trust.

    Attributes:
        root: The trusted root, as signed.
        signers: One signer for each of ``targets``, ``snapshot`` and ``timestamp``.
    """

    root: bytes
    signers: Mapping[str, Signer]


def create_keys(folder: Path) -> None:
    """Make the keys and the root of a new publisher, unencrypted, for their owner's eyes only.

    Keep the folder out of the store and out of version control, and move ``root.pem`` to a place
    that is not on line: whoever holds the other three can publish until the root is replaced.

    Args:
        folder: Folder to make: ``root.json`` and four Ed25519 keys as PEM files, which a signer of
            securesystemslib also reads by ``file2:<path>``.

    Raises:
        ReleaseError: There is something already, or the folder cannot be written.
    """
    if not _create(folder, development=False):
        raise ReleaseError(f"{folder} exists already: keys are never overwritten")


def load_keys(folder: Path, *, development: bool) -> Keys:
    """Load the keys of a publisher, or make development keys if there are none.

    Args:
        folder: As `create_keys` makes it; needs no ``root.pem``.
        development: Whether keys that nobody asked for will do. They are made when there are none;
            publishers that start at once make one set and agree on it.

    Returns:
        The keys. Whether the root stands by them shows when they sign.

    Raises:
        ReleaseError: The keys are missing, damaged or not fit for the purpose.
    """
    if not (folder / TRUSTED_ROOT).exists():
        if not development:
            raise ReleaseError(f"{folder} holds no keys: make them once with create_keys")
        _create(folder, development=True)
    keys = Keys(
        root=_read(folder / TRUSTED_ROOT),
        signers={role: _signer(folder / f"{role}.pem") for role in _ONLINE_ROLES},
    )
    if _are_for_development(folder / TRUSTED_ROOT, keys.root):
        if not development:
            raise ReleaseError(f"{folder} holds development keys: make real ones with create_keys")
        _log.warning("signing with development keys from %s: not fit for vehicles", folder)
    return keys


def _create(folder: Path, *, development: bool) -> bool:
    """Make the whole folder or nothing; False if there is something already."""
    try:
        with files.new_directory(folder, mode=0o700) as growing:
            for name, data in _new_files(development).items():
                (growing / name).touch(mode=0o600)  # private from its first moment
                (growing / name).write_bytes(data)
    except PackageError:
        return False
    except OSError as error:
        raise ReleaseError(f"cannot write keys to {folder}: {error.strerror}") from error
    return True


def _new_files(development: bool) -> dict[str, bytes]:
    fields = {_DEVELOPMENT: True} if development else None
    root = Root(expires=datetime.now(UTC) + _ROOT_LIFE, unrecognized_fields=fields)
    signers = {role: CryptoSigner.generate_ed25519() for role in (Root.type, *_ONLINE_ROLES)}
    for role, signer in signers.items():
        root.add_key(signer.public_key, role)
    signed = Metadata(root)
    signed.sign(signers[Root.type])
    files = {f"{role}.pem": signer.private_bytes for role, signer in signers.items()}
    return {TRUSTED_ROOT: signed.to_bytes(JSONSerializer(compact=True)), **files}


def _signer(path: Path) -> Signer:
    try:
        return CryptoSigner(load_pem_private_key(_read(path), None))
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ReleaseError(f"{path} must be an unencrypted private key in PEM: {error}") from error


def _are_for_development(path: Path, root: bytes) -> bool:
    try:
        return _DEVELOPMENT in Metadata[Root].from_bytes(root).signed.unrecognized_fields
    except RepositoryError as error:
        raise ReleaseError(f"{path} must be signed root metadata: {error}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ReleaseError(f"cannot read {path}: {error.strerror}") from error
