"""Signed releases: a repository of The Update Framework in a store.

A release is one file. What is signed about it says more than its bytes: which files there are
(``targets``), which list of them is current (``snapshot``), and until when that may be believed
(``timestamp``). They are uploaded in that order, the file first and ``timestamp.json`` last, and
only the last replaces anything: whoever reads on the way reads the release before, and two
publishers cannot undo one another's work.

Reference:
    The Update Framework specification 1.0, with consistent snapshots.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tuf.api.exceptions import DownloadError, ExpiredMetadataError, RepositoryError
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from filterpress.errors import ReleaseError
from filterpress.release.keys import Keys, load_keys
from filterpress.release.store import ConflictError, DirectoryStore, Store, open_store
from filterpress.release.trust import (
    TARGETS,
    TIMESTAMP,
    Part,
    State,
    read_state,
    read_targets,
    trusted_root,
)

_COUNTER = "release_counter"
_SEGMENT = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
_TARGET = re.compile(f"{_SEGMENT}(/{_SEGMENT})*")
# Nothing renews the timestamp between two publications, so it lives as long as a store may rest.
_LIFE = {
    Targets.type: timedelta(days=365),
    Snapshot.type: timedelta(days=90),
    Timestamp.type: timedelta(days=90),
}
_TRIES = 20


@dataclass(frozen=True, kw_only=True)
class Release:
    """A file that a store vouches for.

    Attributes:
        store: Directory or ``gs://bucket/prefix``.
        target: Path of the file in the store's signed list.
        sha256: Digest of the file, in hexadecimal.
        n_bytes: Length of the file.
        version: Number of the release in its store; it only ever grows.
        custom: What else the publisher signed about the file.
        created: Whether the call that returned this issued the release.
    """

    store: str
    target: str
    sha256: str
    n_bytes: int
    version: int
    custom: Mapping[str, Any]
    created: bool


def publish(
    file: bytes, *, target: str, custom: Mapping[str, Any], store: str, keys: Path
) -> Release:
    """Sign a file and make it the store's newest release.

    Readers see the release wholly or not at all, whenever this is interrupted; calling it again
    finishes the work. A file that is published already is left as it is. The first publication
    into an empty directory makes development keys if there are none.

    Args:
        file: The bytes to release.
        target: Path to release them under, such as ``models/demo/0123456789abcdef/model.fpk``. It
            stands for these bytes for ever.
        custom: What else to sign about the file: JSON without fractions, because a signature needs
            one way to write each number. ``release_counter`` is added.
        store: Directory or ``gs://bucket/prefix``.
        keys: Folder of keys, not inside the store; see `create_keys`.

    Returns:
        The release; ``created`` is False if the same file was there before.

    Raises:
        ValueError: The target, the custom fields or the place of the keys cannot be used.
        ReleaseError: The store or the keys cannot be used or trusted, or the target stands for
            another file.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     store, keys = f"{folder}/store", Path(folder) / "keys"
        ...     one = publish(b"weights", target="m/1", custom={}, store=store, keys=keys)
        ...     again = publish(b"weights", target="m/1", custom={}, store=store, keys=keys)
        ...     file = fetch(store, "m/1", root=(keys / "root.json").read_bytes())
        >>> one.version, one.created, again.version, again.created, file
        (1, True, 1, False, b'weights')
    """
    _check_target(target)
    _check_custom(custom)
    opened = open_store(store)
    if isinstance(opened, DirectoryStore) and keys.resolve().is_relative_to(opened.path.resolve()):
        raise ValueError(f"keys must lie outside the store {store}, got {keys}")
    trial = isinstance(opened, DirectoryStore) or "STORAGE_EMULATOR_HOST" in os.environ
    signing = load_keys(keys, development=trial)
    for attempt in range(_TRIES):
        try:
            with _reported(store):
                info, created = _publish_once(opened, signing, file, target, custom)
        except ConflictError:
            # Publishers that met once would meet again if they all waited for the same time.
            time.sleep(random.uniform(0, 0.02 * 2 ** min(attempt, 6)))
        else:
            return _release(store, info, created=created)
    raise ReleaseError(f"{store} is busy: {_TRIES} times another publisher was first; try again")


def fetch(store: str, target: str, *, root: bytes) -> bytes:
    """Download a released file and verify all that is signed about it.

    Args:
        store: Directory or ``gs://bucket/prefix``.
        target: Path of the file in the store's signed list.
        root: The trusted root, ``root.json`` of the publisher's keys, got by a way that is trusted.

    Returns:
        The bytes that were published under the target.

    Raises:
        ValueError: The target is not a path.
        ReleaseError: The file is not there, or something is unsigned, altered or expired.
    """
    _check_target(target)
    opened = open_store(store)
    with _reported(store):
        info = read_targets(opened, root).get(target)
        if info is None:
            raise ReleaseError(f"{store} has no release {target}")
        found = opened.read(_payload_name(info))
        if found is None:
            raise ReleaseError(f"{store} lists {target} but has lost the file")
        info.verify_length_and_hashes(found[0])
        return found[0]


def latest(store: str, *, root: bytes) -> Release:
    """Say which release is the newest, from verified metadata.

    Args:
        store: Directory or ``gs://bucket/prefix``.
        root: As for `fetch`.

    Returns:
        The release with the greatest version.

    Raises:
        ReleaseError: There is none, or something is unsigned, altered or expired.
    """
    with _reported(store):
        targets = read_targets(open_store(store), root)
    if not targets:
        raise ReleaseError(f"{store} has no releases")
    return _release(store, max(targets.values(), key=_version), created=False)


def _check_target(target: str) -> None:
    if not _TARGET.fullmatch(target):
        raise ValueError(
            "target must be segments of letters, digits, '.', '_' and '-' that do not start with "
            f"'.', joined by '/', got {target!r}"
        )


def _check_custom(custom: Mapping[str, Any]) -> None:
    if _COUNTER in custom:
        raise ValueError(f"custom must leave {_COUNTER} to publish, got {custom[_COUNTER]!r}")
    pending: list[tuple[str, Any]] = [("custom", dict(custom))]
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            pending += [(f"{name}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            pending += [(name, inner) for inner in value]
        elif not isinstance(value, str | int | None):
            raise ValueError(f"{name} must be JSON without fractions, got {value!r}")


def _version(info: TargetFile) -> int:
    return int((info.custom or {}).get(_COUNTER, 0))


def _release(store: str, info: TargetFile, *, created: bool) -> Release:
    return Release(
        store=store,
        target=info.path,
        sha256=info.hashes["sha256"],
        n_bytes=info.length,
        version=_version(info),
        custom=info.custom or {},
        created=created,
    )


def _payload_name(info: TargetFile) -> str:
    return f"targets/{info.get_prefixed_paths()[0]}"


@contextmanager
def _reported(store: str) -> Iterator[None]:
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


# Publishing


def _publish_once(
    store: Store, keys: Keys, file: bytes, target: str, custom: Mapping[str, Any]
) -> tuple[TargetFile, bool]:
    trusted = trusted_root(keys.root)
    state = read_state(store, trusted)
    _check_keys(keys, state.root)
    new = TargetFile.from_data(target, file, ["sha256"])
    listed = state.targets.targets.get(target)
    if listed and listed.hashes != new.hashes:
        raise ReleaseError(
            f"{target} is released already with sha256 {listed.hashes['sha256']}: "
            "choose another target for another file"
        )
    if listed and not state.is_expired():
        return listed, False
    if not listed:
        counter = 1 + max(map(_version, state.targets.targets.values()), default=0)
        new.unrecognized_fields["custom"] = {**custom, _COUNTER: counter}
        state.targets.targets[target] = new
        if not state.generation:
            _create_or_refuse(store, f"metadata/{trusted.version}.root.json", keys.root)
        _create_or_refuse(store, _payload_name(new), file)
    _commit(store, state, keys)
    return listed or new, not listed


def _check_keys(keys: Keys, root: Root) -> None:
    for role, signer in keys.signers.items():
        if signer.public_key.keyid not in root.roles[role].keyids:
            raise ReleaseError(f"the root does not allow the key {role}.pem to sign {role}")


def _create_or_refuse(store: Store, name: str, data: bytes) -> None:
    """Create what no other publisher can have created with other bytes."""
    try:
        store.create(name, data)
    except ConflictError as error:
        raise ReleaseError(f"{name} holds other bytes: other keys, or damage") from error


def _commit(store: Store, state: State, keys: Keys) -> None:
    state.snapshot.meta[TARGETS] = _issue(store, state.targets, state.root, keys)
    state.timestamp.snapshot_meta = _issue(store, state.snapshot, state.root, keys)
    state.timestamp.version += 1
    # The commit point. The generation was read before all that the new metadata builds on.
    store.replace(TIMESTAMP, _signed(state.timestamp, state.root, keys), state.generation)


def _issue(store: Store, part: Part, root: Root, keys: Keys) -> MetaFile:
    """Create the next free version; a publisher at work, or one that died, may hold some."""
    while True:
        part.version += 1
        data = _signed(part, root, keys)
        try:
            store.create(f"metadata/{part.version}.{part.type}.json", data)
        except ConflictError:
            continue
        return MetaFile(part.version, len(data), {"sha256": hashlib.sha256(data).hexdigest()})


def _signed(part: Part, root: Root, keys: Keys) -> bytes:
    part.expires = datetime.now(UTC) + _LIFE[part.type]
    metadata = Metadata(part)
    metadata.sign(keys.signers[part.type])
    # Never upload what a reader will refuse.
    root.verify_delegate(part.type, metadata.signed_bytes, metadata.signatures)
    return metadata.to_bytes(JSONSerializer(compact=True))
