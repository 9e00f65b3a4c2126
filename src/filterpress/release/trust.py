"""What a store says, once it is verified.

Nothing that a store holds is believed because it is there. A publisher walks from the root that it
trusts to the lists of files before it signs anything on top. A reader believes nothing expired
either, and leaves the walk to the reference client.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tuf.api.exceptions import (
    DownloadError,
    DownloadHTTPError,
    ExpiredMetadataError,
    RepositoryError,
)
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.ngclient import FetcherInterface, Updater

from filterpress.errors import ReleaseError
from filterpress.release.names import payload_name
from filterpress.release.store import Store

RELEASE, ROLLOUT = "release", "rollout"
DELEGATED = {RELEASE: "models/*/*/*", ROLLOUT: "channels/*/*.json"}
TIMESTAMP = "metadata/timestamp.json"

Part = TypeVar("Part", Root, Timestamp, Snapshot, Targets)


@dataclass(frozen=True, kw_only=True)
class State:
    """What a store says now: its verified metadata, for a publisher to build on.

    Attributes:
        root: Which keys may sign what.
        targets: To whom the lists of files are delegated.
        delegated: The lists, by role; of version 0 and empty where none was ever signed.
        snapshot: Which lists are current.
        timestamp: Which snapshot is.
        generation: That of the timestamp; 0 if nothing was ever published, and then all but the
            root and the targets are empty and of version 0.
    """

    root: Root
    targets: Targets
    delegated: dict[str, Targets]
    snapshot: Snapshot
    timestamp: Timestamp
    generation: int


def read_state(store: Store, root: Root, first: bytes | None = None) -> State:
    """Verify what a store says, whether it has expired or not.

    Args:
        store: Where to read.
        root: The root that holds; see `newest_root`.
        first: The signed targets that a store begins with; used only if it is empty.

    Returns:
        The state.

    Raises:
        RepositoryError: Something is missing, altered or not signed by whom the root names.
        ReleaseError: The store is empty and has nothing to begin with, or cannot be read.
    """
    # Before all else, so that the generation is never newer than what is read below.
    found = store.read(TIMESTAMP)
    if found is None:
        if first is None:
            raise ReleaseError("the store is empty: publish a root and its targets to it first")
        timestamp, snapshot, generation = Timestamp(), Snapshot(), 0
        timestamp.version = snapshot.version = 0
        targets = verified(first, Targets, root)
    else:
        timestamp, generation = verified(found[0], Timestamp, root), found[1]
        snapshot = _read_listed(store, Snapshot, timestamp.snapshot_meta, root)
        targets = _read_listed(store, Targets, snapshot.meta.get("targets.json"), root)
    delegated = {role: _read_delegated(store, role, snapshot, targets) for role in DELEGATED}
    return State(
        root=root,
        targets=targets,
        delegated=delegated,
        snapshot=snapshot,
        timestamp=timestamp,
        generation=generation,
    )


class Reader:
    """Reads a store as a vehicle does: nothing that is altered, expired or unsigned.

    Args:
        store: Where to read.
        root: The trusted root, as signed.
        folder: Where to keep what was verified; see `open_reader`.
    """

    def __init__(self, store: Store, root: bytes, folder: str) -> None:
        self._store = store
        self._folder = Path(folder)
        self._client = Updater(folder, "metadata/", fetcher=_StoreFetcher(store), bootstrap=root)
        self._client.refresh()

    def find(self, target: str) -> TargetFile | None:
        """Return what is signed about a file, by the role that may sign it; None if nothing is."""
        return self._client.get_targetinfo(target)

    def list(self, role: str) -> dict[str, TargetFile]:
        """Return what a delegated role signed, by path."""
        # The client has no call that lists files, but this is where it keeps what it verified.
        self.find(DELEGATED[role].replace("*", "-"))
        found = Metadata[Targets].from_file(f"{self._folder}/{role}.json").signed.targets
        return {path: info for path, info in found.items() if self.find(path) == info}

    def signed(self) -> dict[str, Root | Timestamp | Snapshot | Targets]:
        """Return the verified metadata of all roles that have been read, by role."""
        files = sorted(self._folder.glob("*.json"))
        return {file.stem: Metadata[Any].from_file(str(file)).signed for file in files}

    def read(self, info: TargetFile) -> bytes:
        """Return the bytes of a file, as signed.

        Raises:
            ReleaseError: They are not there.
            RepositoryError: They are others.
        """
        found = self._store.read(payload_name(info))
        if found is None:
            raise ReleaseError(f"the store lists {info.path} but has lost the file")
        info.verify_length_and_hashes(found[0])
        return found[0]


@contextmanager
def open_reader(store: Store, root: bytes) -> Iterator[Reader]:
    """Verify what a store says as a vehicle has to.

    Args:
        store: Where to read.
        root: The trusted root, as signed.

    Raises:
        RepositoryError: Something is altered, expired or not signed by whom the root names.
        DownloadError: Something is missing.
        ReleaseError: The store cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        yield Reader(store, root, folder)


@contextmanager
def reported(store: str) -> Iterator[None]:
    """Say in one line of the project's own why a store is not believed.

    Args:
        store: Its address.

    Raises:
        ReleaseError: Instead of what the reference client and the system raise.
    """
    try:
        yield
    except ExpiredMetadataError as error:
        raise ReleaseError(
            f"{store} is out of date: {error}; its publisher must renew it"
        ) from error
    except (RepositoryError, DownloadError) as error:
        # The first line: some of these messages go on to quote the whole metadata.
        reason = str(error).partition("\n")[0][:200]
        raise ReleaseError(f"{store} holds nothing that can be trusted: {reason}") from error
    except OSError as error:
        raise ReleaseError(f"cannot verify {store} here: {error.strerror}") from error


def trusted_root(data: bytes) -> Root:
    """Read a root that is trusted because of where it came from.

    Args:
        data: The root, as signed.

    Returns:
        The root.

    Raises:
        RepositoryError: It is no root, or not signed by its own keys.
    """
    root = Metadata[Root].from_bytes(data).signed
    if not isinstance(root, Root):
        raise RepositoryError(f"the trusted root is {root.type} metadata")
    return verified(data, Root, root)


def newest_root(store: Store, root: Root) -> Root:
    """Return the newest root of a store, which must not have expired.

    Args:
        store: Where to read.
        root: A root that is trusted already.

    Raises:
        RepositoryError: A root is out of turn or not signed by enough, or the newest has expired.
    """
    newest = roots_from(store, root)[-1]
    if newest.is_expired():
        raise ExpiredMetadataError("root.json is expired")
    return newest


def roots_from(store: Store, root: Root) -> list[Root]:
    """Follow the roots of a store, each signed by the one before and by itself.

    Args:
        store: Where to read.
        root: A root that is trusted already.

    Returns:
        The roots, oldest first, beginning with the given one.

    Raises:
        RepositoryError: A root is out of turn or not signed by enough.
    """
    roots = [root]
    while found := store.read(f"metadata/{roots[-1].version + 1}.root.json"):
        roots.append(successor(found[0], roots[-1]))
    return roots


def _read_listed(
    store: Store, kind: type[Part], meta: MetaFile | None, by: Root | Targets, role: str = ""
) -> Part:
    role = role or kind.type
    if meta is None:
        raise RepositoryError(f"no {role} is listed")
    name = f"metadata/{meta.version}.{role}.json"
    found = store.read(name)
    if found is None:
        raise RepositoryError(f"{name} is missing")
    meta.verify_length_and_hashes(found[0])
    part = verified(found[0], kind, by, role)
    if part.version != meta.version:
        raise RepositoryError(f"{name} holds version {part.version}")
    return part


def _read_delegated(store: Store, role: str, snapshot: Snapshot, delegator: Targets) -> Targets:
    listed = snapshot.meta.get(f"{role}.json")
    if listed is None:
        empty = Targets()
        empty.version = 0
        return empty
    return _read_listed(store, Targets, listed, delegator, role)


def verified(data: bytes, kind: type[Part], by: Root | Targets, role: str = "") -> Part:
    """Read metadata that enough keys have signed.

    Args:
        data: The metadata, as signed.
        kind: What it must be.
        by: Who names the keys.
        role: Whose keys; empty for those of the kind.

    Raises:
        RepositoryError: It is something else, or not signed by enough.
    """
    metadata = Metadata[Part].from_bytes(data)
    if not isinstance(metadata.signed, kind):
        raise RepositoryError(f"expected {kind.type}, got {metadata.signed.type}")
    try:
        by.verify_delegate(role or kind.type, metadata.signed_bytes, metadata.signatures)
    except ValueError as error:
        raise RepositoryError(f"nobody may sign {role or kind.type}: {error}") from error
    return metadata.signed


def successor(data: bytes, root: Root) -> Root:
    """Read the root that follows another: signed by its keys and by those it names itself.

    Args:
        data: The new root, as signed.
        root: The root before.

    Raises:
        RepositoryError: It does not follow.
    """
    new = verified(data, Root, verified(data, Root, root))
    if new.version != root.version + 1:
        raise RepositoryError(f"root version {new.version} stands for {root.version + 1}")
    return new


class _StoreFetcher(FetcherInterface):
    """Lets the reference client read from a store; its URLs are names."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def _fetch(self, url: str) -> Iterator[bytes]:
        found = self._store.read(url)
        if found is None:
            raise DownloadHTTPError(f"{url} is missing", 404)
        yield found[0]
