"""What a store says, once it is verified.

Nothing that a store holds is believed because it is there. A publisher walks from the root that it
trusts to the list of targets before it signs anything on top, and renews what has expired on the
way. A reader believes nothing expired either, and leaves the walk to the reference client.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from tuf.api.exceptions import DownloadHTTPError, ExpiredMetadataError, RepositoryError
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

from filterpress.release.store import Store

TARGETS = "targets.json"
TIMESTAMP = "metadata/timestamp.json"

Part = TypeVar("Part", Root, Timestamp, Snapshot, Targets)


@dataclass(frozen=True, kw_only=True)
class State:
    """What a store says now: its verified metadata, for a publisher to build on.

    Attributes:
        root: Which keys may sign what.
        targets: The files.
        snapshot: Which list of files is current.
        timestamp: Which snapshot is.
        generation: That of the timestamp; 0 if nothing was ever published, and then the other
            three are empty and of version 0.
    """

    root: Root
    targets: Targets
    snapshot: Snapshot
    timestamp: Timestamp
    generation: int

    def is_expired(self) -> bool:
        """Say whether readers would refuse what is there."""
        return any(p.is_expired() for p in (self.targets, self.snapshot, self.timestamp))


def read_state(store: Store, trusted: Root) -> State:
    """Verify what a store says, whether it has expired or not.

    Args:
        store: Where to read.
        trusted: A root that is trusted already; the store may hold its successors.

    Returns:
        The state.

    Raises:
        RepositoryError: Something is missing, altered or not signed by whom the root names, or the
            root has expired.
        ReleaseError: The store cannot be read.
    """
    root = _newest_root(store, trusted)
    # Before all else, so that the generation is never newer than what is read below.
    found = store.read(TIMESTAMP)
    if found is None:
        targets, snapshot, timestamp = Targets(), Snapshot(), Timestamp()
        targets.version = snapshot.version = timestamp.version = 0
    else:
        timestamp = _verified(found[0], Timestamp, root)
        snapshot = _read_listed(store, Snapshot, timestamp.snapshot_meta, root)
        targets = _read_listed(store, Targets, snapshot.meta.get(TARGETS), root)
    return State(
        root=root,
        targets=targets,
        snapshot=snapshot,
        timestamp=timestamp,
        generation=found[1] if found else 0,
    )


def read_targets(store: Store, root: bytes) -> Mapping[str, TargetFile]:
    """Verify what a store says as a reader has to, and return its files.

    Args:
        store: Where to read.
        root: The trusted root, as signed.

    Returns:
        What is signed about each file, by its path.

    Raises:
        RepositoryError: Something is altered, expired or not signed by whom the root names.
        DownloadError: Something is missing.
        ReleaseError: The store cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        client = Updater(folder, "metadata/", fetcher=_StoreFetcher(store), bootstrap=root)
        client.refresh()
        # The client has no call that lists targets, but this is where it keeps what it verified.
        return Metadata[Targets].from_file(f"{folder}/{TARGETS}").signed.targets


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
    return _verified(data, Root, root)


def _newest_root(store: Store, root: Root) -> Root:
    while found := store.read(f"metadata/{root.version + 1}.root.json"):
        new = _verified(found[0], Root, _verified(found[0], Root, root))
        if new.version != root.version + 1:
            raise RepositoryError(f"root version {new.version} stands for {root.version + 1}")
        root = new
    if root.is_expired():
        raise ExpiredMetadataError("root.json is expired")
    return root


def _read_listed(store: Store, kind: type[Part], meta: MetaFile | None, root: Root) -> Part:
    if meta is None:
        raise RepositoryError(f"no {kind.type} is listed")
    name = f"metadata/{meta.version}.{kind.type}.json"
    found = store.read(name)
    if found is None:
        raise RepositoryError(f"{name} is missing")
    meta.verify_length_and_hashes(found[0])
    part = _verified(found[0], kind, root)
    if part.version != meta.version:
        raise RepositoryError(f"{name} holds version {part.version}")
    return part


def _verified(data: bytes, kind: type[Part], root: Root) -> Part:
    metadata = Metadata[Part].from_bytes(data)
    if not isinstance(metadata.signed, kind):
        raise RepositoryError(f"expected {kind.type}, got {metadata.signed.type}")
    root.verify_delegate(kind.type, metadata.signed_bytes, metadata.signatures)
    return metadata.signed


class _StoreFetcher(FetcherInterface):
    """Lets the reference client read from a store; its URLs are names."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def _fetch(self, url: str) -> Iterator[bytes]:
        found = self._store.read(url)
        if found is None:
            raise DownloadHTTPError(f"{url} is missing", 404)
        yield found[0]
