"""The folder of keys that a publisher signs with.

It holds the trusted root, ``root.json``, and ``signers.json``, which says for each role where its
private keys are: a URI of securesystemslib (``file2:``, ``gcpkms:``, ``hsm:`` and others) and the
identifier of the key. Keys that are files lie beside them. The root says which keys may sign what;
readers are given it once, by a way that they trust, and check everything else against it. The key
of the root itself signs nothing else: nothing here reads it, and it is best kept elsewhere.
"""

from __future__ import annotations

import getpass
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography.exceptions import UnsupportedAlgorithm
from securesystemslib.exceptions import Error as SigningError
from securesystemslib.exceptions import KeyMismatchError
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, CryptoSigner, Key, Signer
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    Root,
    Snapshot,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from filterpress import files
from filterpress.errors import PackageError, ReleaseError
from filterpress.release.names import DEVELOPMENT
from filterpress.release.trust import DELEGATED, RELEASE, ROLLOUT

_log = logging.getLogger(__name__)

TRUSTED_ROOT = "root.json"
FIRST_TARGETS = "targets.json"
SIGNERS = "signers.json"
_SIGNING_ROLES = (Targets.type, RELEASE, ROLLOUT, Snapshot.type, Timestamp.type)
LIFE = {
    Root.type: timedelta(days=365),
    Targets.type: timedelta(days=365),
    RELEASE: timedelta(days=90),
    ROLLOUT: timedelta(days=30),
    Snapshot.type: timedelta(days=7),
    Timestamp.type: timedelta(days=1),
}
# Nobody renews what development keys signed, so it lives as long as a trial may rest.
_DEVELOPMENT_LIFE = timedelta(days=90)


class KeyPlace(NamedTuple):
    """Where a private key is, and which public key belongs to it."""

    uri: str
    keyid: str


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What a publisher signs with, and what its readers trust.

    Attributes:
        folder: Where they were found; relative paths of ``file2:`` start from it.
        root: The trusted root, as signed.
        first_targets: The signed targets that an empty store begins with, if there are any.
        places: Where the keys of each role are. A role that is missing is signed by others.
        development: Whether the root says that they are for trying things out.
    """

    folder: Path
    root: bytes
    first_targets: bytes | None
    places: Mapping[str, tuple[KeyPlace, ...]]
    development: bool
    _opened: dict[KeyPlace, Signer] = field(default_factory=dict, compare=False)

    def can_sign(self, role: str, by: Root | Targets) -> bool:
        """Say whether as many keys are at hand as it takes to sign a role."""
        try:
            return len(self.signers(role, by)) >= by.get_delegated_role(role).threshold
        except ReleaseError:
            return False

    def signers(self, role: str, by: Root | Targets) -> list[Signer]:
        """Open the keys that may sign a role.

        Args:
            role: The role.
            by: Who names its keys: the root, or the targets for a delegated role.

        Returns:
            A signer for each key at hand, in any scheme; whether they are enough is not checked.

        Raises:
            ReleaseError: There is none, or one cannot be opened.
        """
        allowed = self._allowed(role, by)
        if not allowed:
            raise ReleaseError(
                f"{self.folder / SIGNERS} must name a key that may sign {role}, got "
                f"{[place.uri for place in self.places.get(role, ())] or 'none'}"
            )
        for place in allowed:
            if place not in self._opened:
                key = by.get_key(place.keyid)
                self._opened[place] = open_signer(place.uri, key, self.folder)
        return [self._opened[place] for place in allowed]

    def life(self, role: str) -> timedelta:
        """Return how long the metadata of a role is good for."""
        return max(LIFE[role], _DEVELOPMENT_LIFE) if self.development else LIFE[role]

    def _allowed(self, role: str, by: Root | Targets) -> list[KeyPlace]:
        try:
            keyids = by.get_delegated_role(role).keyids
        except ValueError as error:
            raise RepositoryError(f"nobody may sign {role}: {error}") from error
        return [place for place in self.places.get(role, ()) if place.keyid in keyids]


def create_keys(folder: Path) -> None:
    """Make the keys and the root of a new publisher, unencrypted, for their owner's eyes only.

    Keep the folder out of the store and out of version control, and move ``root.pem`` and
    ``targets.pem`` to a place that is not on line: whoever holds the others can publish until the
    root or the targets are replaced.

    Args:
        folder: Folder to make: ``root.json`` and ``targets.json``, ``signers.json``, and six
            Ed25519 keys as PEM files.

    Raises:
        ReleaseError: There is something already, or the folder cannot be written.
    """
    if not _create(folder, development=False):
        raise ReleaseError(f"{folder} exists already: keys are never overwritten")


def load_keys(folder: Path, *, development: bool) -> Keys:
    """Load what a publisher signs with, or make development keys if there are none.

    Args:
        folder: As `create_keys` makes it; needs no ``root.pem``.
        development: Whether keys that nobody asked for will do. They are made when there are none;
            publishers that start at once make one set and agree on it.

    Returns:
        The keys. They are opened when they sign, and only then does it show whether they can.

    Raises:
        ReleaseError: The keys are missing, damaged or not fit for the purpose.
    """
    path = folder / TRUSTED_ROOT
    if not path.exists():
        if not development:
            raise ReleaseError(f"{folder} holds no keys: make them once with release init")
        _create(folder, development=True)
    root = read(path)
    flagged = _is_for_development(path, root)
    if flagged and not development:
        raise ReleaseError(f"{folder} holds development keys: make real ones with release init")
    if flagged:
        _log.warning("signing with development keys from %s: not fit for vehicles", folder)
    first = folder / FIRST_TARGETS
    return Keys(
        folder=folder,
        root=root,
        first_targets=read(first) if first.exists() else None,
        places=_places(folder / SIGNERS),
        development=flagged,
    )


def keys_for(store: str, keys: str) -> Path:
    """Return the folder of keys to use for a store.

    Args:
        store: Directory or ``gs://bucket/prefix``.
        keys: The folder; empty for the folder ``keys`` beside a local store.

    Raises:
        ValueError: A bucket needs a folder that is named.

    Example:
        >>> keys_for("gs://bucket/ota", "/etc/keys")
        PosixPath('/etc/keys')
    """
    if keys:
        return Path(keys)
    if store.startswith("gs://"):
        raise ValueError(f"keys must name the folder of signing keys for {store}, got none")
    return Path(store).resolve().parent / "keys"


def open_signer(uri: str, key: Key, folder: Path) -> Signer:
    """Open a private key.

    Args:
        uri: Where it is, as securesystemslib writes it.
        key: The public key, which says the scheme.
        folder: Where a relative path of ``file2:`` starts.

    Returns:
        What signs with it. A secret that it needs, such as a PIN, is asked for on the terminal.

    Raises:
        ReleaseError: It is not there, is another key, or cannot be used.
    """
    scheme, _, path = uri.partition(":")
    if scheme not in SIGNER_FOR_URI_SCHEME:
        raise ReleaseError(f"no kind of key is called {uri!r}: name one of {_SCHEMES}")
    at = f"file2:{(folder / path).resolve()}" if scheme == "file2" else uri
    try:
        return Signer.from_priv_key_uri(at, key, getpass.getpass)
    except OSError as error:
        reason = "No such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise ReleaseError(f"cannot read the key {uri} of {folder}: {reason}") from error
    except KeyMismatchError as error:
        raise ReleaseError(f"{uri} of {folder} is not the key {key.keyid}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm, SigningError) as error:
        raise ReleaseError(
            f"{uri} must be an unencrypted private key in PEM, or what its kind takes: {error}"
        ) from error


def read(path: Path) -> bytes:
    """Read a file of the folder of keys.

    Raises:
        ReleaseError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ReleaseError(f"cannot read {path}: {error.strerror}") from error


def delegations(keys: Mapping[str, list[Key]], thresholds: Mapping[str, int]) -> Delegations:
    """Say who may sign which files.

    Args:
        keys: The public keys of each delegated role.
        thresholds: How many of them must sign; 1 for a role that is missing.

    Returns:
        What the targets sign.
    """
    roles = {
        role: DelegatedRole(
            role, [key.keyid for key in keys[role]], thresholds.get(role, 1), True, paths=[paths]
        )
        for role, paths in DELEGATED.items()
    }
    known = {key.keyid: key for role in DELEGATED for key in keys[role]}
    return Delegations(known, roles)


_SCHEMES = ", ".join(f"{scheme}:" for scheme in sorted(SIGNER_FOR_URI_SCHEME))


def _places(path: Path) -> dict[str, tuple[KeyPlace, ...]]:
    try:
        listed = json.loads(read(path))
        return {
            role: tuple(KeyPlace(place["uri"], place["keyid"]) for place in places)
            for role, places in listed.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ReleaseError(f"{path} must list uri and keyid of the keys of each role") from error


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
    signers = {role: CryptoSigner.generate_ed25519() for role in (Root.type, *_SIGNING_ROLES)}
    now = datetime.now(UTC)
    fields = {DEVELOPMENT: True} if development else None
    root = Root(expires=now + LIFE[Root.type], unrecognized_fields=fields)
    for role in root.roles:
        root.add_key(signers[role].public_key, role)
    delegated = delegations({role: [signers[role].public_key] for role in DELEGATED}, {})
    targets = Targets(expires=now + LIFE[Targets.type], delegations=delegated)
    places = {
        role: [{"uri": f"file2:{role}.pem", "keyid": signers[role].public_key.keyid}]
        for role in _SIGNING_ROLES
    }
    compact = JSONSerializer(compact=True)
    made = {f"{role}.pem": signer.private_bytes for role, signer in signers.items()}
    for name, metadata in ((TRUSTED_ROOT, Metadata(root)), (FIRST_TARGETS, Metadata(targets))):
        metadata.sign(signers[metadata.signed.type])
        made[name] = metadata.to_bytes(compact)
    return made | {SIGNERS: json.dumps(places, indent=1).encode() + b"\n"}


def _is_for_development(path: Path, root: bytes) -> bool:
    try:
        return DEVELOPMENT in Metadata[Root].from_bytes(root).signed.unrecognized_fields
    except RepositoryError as error:
        raise ReleaseError(f"{path} must be signed root metadata: {error}") from error
