"""Who may sign what: drawn up and signed off line, one holder of a key after the other.

A folder holds every version, ``1.root.json``, ``2.root.json``, ``1.targets.json``, and no private
key. It travels between the holders, each of whom adds a signature; a version with enough of them is
never changed again, and the next change begins the next version. Nothing here needs a network; see
`filterpress.release.roots` for what does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import Key, SSlibKey
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp
from tuf.api.serialization.json import JSONSerializer

from filterpress import files
from filterpress.errors import ReleaseError
from filterpress.release.keys import LIFE, delegations, open_signer, read
from filterpress.release.trust import DELEGATED

ROLES = (Root.type, Targets.type, *DELEGATED, Snapshot.type, Timestamp.type)
_KINDS = (Root.type, Targets.type)

Json = dict[str, Any]


def new(folder: Path, keys: Mapping[str, Sequence[Path]], thresholds: Mapping[str, int]) -> Json:
    """Draw up the first root and targets, for their holders to sign.

    Args:
        folder: Folder to make.
        keys: Files of the public keys of each role: PEM, or JSON as securesystemslib writes it.
        thresholds: How many keys of a role must sign; 1 for a role that is missing.

    Returns:
        As for `status`.

    Raises:
        ValueError: A role has too few keys, or there is no such role.
        ReleaseError: A key cannot be read, or the folder holds something.
    """
    for role in {*keys, *thresholds} - set(ROLES):
        raise ValueError(f"role must be one of {', '.join(ROLES)}, got {role!r}")
    known = {role: [public_key(path) for path in keys.get(role, ())] for role in ROLES}
    for role in ROLES:
        _check_threshold(role, len(known[role]), thresholds.get(role, 1))
    refuse_existing(folder)
    root = Root(expires=_end_of(Root.type))
    for role in root.roles:
        for key in known[role]:
            root.add_key(key, role)
        root.roles[role].threshold = thresholds.get(role, 1)
    targets = Targets(
        expires=_end_of(Targets.type), delegations=delegations(known, dict(thresholds))
    )
    _write(folder, Metadata(root))
    _write(folder, Metadata(targets))
    return status(folder)


def add_key(folder: Path, role: str, public: Path) -> Json:
    """Let one more key sign for a role, in the next version.

    Args:
        folder: As `new` or `begin` made it.
        role: The role.
        public: File of the public key, as for `new`.

    Returns:
        As for `status`.

    Raises:
        ValueError: There is no such role.
        ReleaseError: The key or the folder cannot be read.
    """
    key = public_key(public)
    return _change(folder, role, lambda by: by.add_key(key, role))


def drop_key(folder: Path, role: str, keyid: str) -> Json:
    """Let a key no longer sign for a role, from the next version on.

    Args:
        folder: As `new` or `begin` made it.
        role: The role.
        keyid: The key, as `status` writes it.

    Returns:
        As for `status`.

    Raises:
        ValueError: The role has no such key, or too few others.
        ReleaseError: The folder cannot be read.
    """

    def drop(by: Root | Targets) -> None:
        by.revoke_key(keyid, role)
        left = by.get_delegated_role(role)
        _check_threshold(role, len(left.keyids), left.threshold)

    return _change(folder, role, drop)


def renew(folder: Path) -> Json:
    """Begin a next version of root and targets that only lives longer.

    Args:
        folder: As `new` or `begin` made it.

    Returns:
        As for `status`.

    Raises:
        ReleaseError: The folder cannot be read.
    """
    for kind in _KINDS:
        _edit(folder, kind)
    return status(folder)


def sign(folder: Path, uri: str) -> Json:
    """Add the signature of one key to what is not signed by enough.

    Args:
        folder: As `new` or `begin` made it.
        uri: Where the private key is: ``file2:PATH``, ``hsm:``, ``gcpkms:...`` and others.

    Returns:
        As for `status`.

    Raises:
        ReleaseError: The key cannot be opened, or none of the open versions wants it.
    """
    signed, reason = False, "all is signed by enough keys"
    for kind in _KINDS:
        metadata = _newest(folder, kind)
        if not _missing(folder, metadata):
            continue
        for key in _wanted(folder, metadata):
            try:
                signer = open_signer(uri, key, Path.cwd())
                signature = signer.sign(metadata.signed_bytes)
                key.verify_signature(signature, metadata.signed_bytes)
            except (ReleaseError, UnverifiedSignatureError) as error:
                if isinstance(error.__cause__, OSError):
                    raise
                reason = "it is none of the keys whose signatures are missing"
                continue
            metadata.signatures[key.keyid] = signature
            _write(folder, metadata)
            signed = True
            break
    if not signed:
        raise ReleaseError(f"{uri} signs nothing in {folder}: {reason}")
    return status(folder)


def status(folder: Path) -> Json:
    """Say what the newest versions are, who may sign what, and which signatures are missing.

    Args:
        folder: As `new` or `begin` made it.

    Returns:
        For ``root`` and ``targets`` the ``version``, ``expires``, and how many signatures are
        ``missing``; for each role in ``keys`` the identifiers of its keys and the ``threshold``.

    Raises:
        ReleaseError: The folder cannot be read.
    """
    root, targets = _newest(folder, Root.type), _newest(folder, Targets.type)
    held = {}
    for role in ROLES:
        by = (targets if role in DELEGATED else root).signed.get_delegated_role(role)
        held[role] = {"threshold": by.threshold, "keys": list(by.keyids)}
    parts = {
        metadata.signed.type: {
            "version": metadata.signed.version,
            "expires": metadata.signed.expires.isoformat(),
            "missing": _missing(folder, metadata),
        }
        for metadata in (root, targets)
    }
    return {**parts, "keys": held}


def public_key(path: Path) -> Key:
    """Read a public key.

    Args:
        path: A file of PEM, or of JSON as securesystemslib writes it, which names the scheme too.

    Raises:
        ReleaseError: It is no public key.
    """
    data = read(path)
    try:
        if data.lstrip().startswith(b"{"):
            fields = json.loads(data)
            return Key.from_dict(fields.pop("keyid"), fields)
        return SSlibKey.from_crypto(load_pem_public_key(data))
    except (ValueError, KeyError, TypeError, UnsupportedAlgorithm) as error:
        raise ReleaseError(f"{path} must be a public key in PEM or JSON: {error}") from error


# The folder


def refuse_existing(folder: Path) -> None:
    """Refuse to begin in a folder that holds something.

    Raises:
        ReleaseError: It does.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ReleaseError(f"{folder} holds something: name another folder")


def path_of(folder: Path, kind: str, version: int) -> Path:
    """Return the file of a version."""
    return folder / f"{version}.{kind}.json"


def versions(folder: Path, kind: str) -> list[int]:
    """Return the versions in a folder, oldest first.

    Raises:
        ReleaseError: There are none.
    """
    names = [path.name.partition(".")[0] for path in folder.glob(f"*.{kind}.json")]
    versions = sorted(int(name) for name in names if name.isdecimal())
    if not versions:
        raise ReleaseError(f"{folder} must hold the root and the targets of a ceremony, got none")
    return versions


def _load(folder: Path, kind: str, version: int) -> Metadata[Any]:
    path = path_of(folder, kind, version)
    try:
        metadata = Metadata[Any].from_bytes(read(path))
    except RepositoryError as error:
        raise ReleaseError(f"{path} must be signed metadata: {error}") from error
    if metadata.signed.type != kind or metadata.signed.version != version:
        raise ReleaseError(f"{path} must be version {version} of the {kind}")
    return metadata


def _newest(folder: Path, kind: str) -> Metadata[Any]:
    return _load(folder, kind, versions(folder, kind)[-1])


def _write(folder: Path, metadata: Metadata[Any]) -> None:
    path = path_of(folder, metadata.signed.type, metadata.signed.version)
    try:
        files.write(path, metadata.to_bytes(JSONSerializer(compact=True)))
    except OSError as error:
        raise ReleaseError(f"cannot write {path}: {error.strerror}") from error


def _change(folder: Path, role: str, edit: Callable[[Any], None]) -> Json:
    if role not in ROLES:
        raise ValueError(f"role must be one of {', '.join(ROLES)}, got {role!r}")
    _edit(folder, Targets.type if role in DELEGATED else Root.type, edit)
    return status(folder)


def _edit(folder: Path, kind: str, edit: Callable[[Any], None] | None = None) -> None:
    """Change the open version, or begin the next; either way it has to be signed by all again."""
    metadata = _newest(folder, kind)
    if not _missing(folder, metadata):
        metadata.signed.version += 1
    if edit:
        edit(metadata.signed)
    metadata.signed.expires = _end_of(kind)
    metadata.signatures.clear()
    _write(folder, metadata)


def _end_of(kind: str) -> datetime:
    return (datetime.now(UTC) + LIFE[kind]).replace(microsecond=0)


# Signatures


def _signed_under(folder: Path, metadata: Metadata[Any]) -> list[Root]:
    """Return the roots that must accept metadata: a root follows the one before, and itself."""
    if metadata.signed.type == Targets.type:
        return [_newest(folder, Root.type).signed]
    before = metadata.signed.version - 1
    known = versions(folder, Root.type)
    earlier = [_load(folder, Root.type, before).signed] if before in known else []
    return [*earlier, metadata.signed]


def _missing(folder: Path, metadata: Metadata[Any]) -> int:
    """Return how many signatures are missing, for the root that wants most."""
    results = [
        by.get_verification_result(metadata.signed.type, metadata.signed_bytes, metadata.signatures)
        for by in _signed_under(folder, metadata)
    ]
    return max(max(0, result.threshold - len(result.signed)) for result in results)


def _wanted(folder: Path, metadata: Metadata[Any]) -> list[Key]:
    """Return the keys whose signature counts and is not there yet."""
    wanted = {
        keyid: by.get_key(keyid)
        for by in _signed_under(folder, metadata)
        for keyid in by.get_delegated_role(metadata.signed.type).keyids
    }
    return [key for keyid, key in wanted.items() if keyid not in metadata.signatures]


def _check_threshold(role: str, n_keys: int, threshold: int) -> None:
    if not 1 <= threshold <= n_keys:
        raise ValueError(
            f"threshold of {role} must be from 1 to its number of keys, {n_keys}, got {threshold}"
        )
