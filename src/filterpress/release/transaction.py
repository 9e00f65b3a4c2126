"""One change to a store, made whole or not at all, by one publisher among many.

The files come first, then the lists that name them, then the snapshot, and ``timestamp.json`` last.
Only the last replaces anything: whoever reads on the way reads the state before, and two publishers
cannot undo one another's work. Whoever is second reads again and tries again.
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.serialization.json import JSONSerializer

from filterpress.buckets import is_emulated
from filterpress.errors import ReleaseError
from filterpress.release.cluster import turn
from filterpress.release.keys import LIFE, Keys, load_keys
from filterpress.release.names import ISSUED, MAX_METADATA, payload_name
from filterpress.release.store import ConflictError, DirectoryStore, Store, open_store
from filterpress.release.trust import (
    DELEGATED,
    TIMESTAMP,
    Part,
    State,
    newest_root,
    read_state,
    reported,
    trusted_root,
)

_log = logging.getLogger(__name__)

T = TypeVar("T")
_TRIES = 20
_ROOT_WARNING = timedelta(days=30)
_MAX_BEHIND = 300  # seconds: clocks differ a little
# What is renewed at all is renewed when this share of its life is left.
_SHARE_LEFT = 1 / 4


class Draft:
    """A state of a store with what a publisher changes in it; nothing is written yet.

    Args:
        store: Where the state was read.
        state: What the store says.

    Attributes:
        state: What the store will say.
        afterwards: What to do when it says so, given its address.
    """

    def __init__(self, store: Store, state: State) -> None:
        self.state = state
        self.afterwards: list[Callable[[str], None]] = []
        self._store = store
        self._files: dict[str, bytes] = {}
        self._changed: set[str] = set()
        self._renewing = False

    @property
    def files(self) -> Mapping[str, bytes]:
        """Names and bytes of the files to create."""
        return self._files

    def listed(self, role: str) -> dict[str, TargetFile]:
        """Return what a role has signed of the files that it may sign, by path."""
        delegations = self.state.targets.delegations
        allowed = (delegations.roles or {}).get(role) if delegations else None
        found = self.state.delegated[role].targets
        return {path: f for path, f in found.items() if allowed and allowed.is_delegated_path(path)}

    def add(self, role: str, path: str, data: bytes, custom: Mapping[str, Any]) -> TargetFile:
        """List a file.

        Args:
            role: Who signs it.
            path: Its path, one that the role may sign.
            data: Its bytes.
            custom: What else to sign about it: JSON without fractions.

        Returns:
            What will be signed about it.
        """
        info = TargetFile.from_data(path, data, ["sha256"])
        if custom:
            info.unrecognized_fields["custom"] = dict(custom)
        self.state.delegated[role].targets[path] = info
        self._files[payload_name(info)] = data
        self._changed.add(role)
        return info

    def drop(self, role: str, path: str) -> None:
        """List a file no longer; it stays in the store."""
        del self.state.delegated[role].targets[path]
        self._changed.add(role)

    def read(self, info: TargetFile) -> bytes:
        """Return the bytes of a listed file.

        Raises:
            ReleaseError: They are not there.
            RepositoryError: They are others.
        """
        name = payload_name(info)
        data = self._files.get(name)
        if data is None:
            found = self._store.read(name)
            if found is None:
                raise ReleaseError(f"the store lists {info.path} but has lost the file")
            data = found[0]
        info.verify_length_and_hashes(data)
        return data

    def renew(self) -> None:
        """Issue a new timestamp, and all else of which less than a quarter of its life is left."""
        self._renewing = True

    def sign_again(self, role: str) -> None:
        """Sign what a role signs anew though nothing in it changed."""
        self._changed.add(role)

    def due(self, keys: Keys) -> tuple[set[str], set[str]]:
        """Say which roles must be signed anew: with these keys, and by somebody else.

        The latter did not change, but their time ends, and their keys are not at hand.
        """
        ending = self._ending() - self._changed
        others = {role for role in ending if not keys.can_sign(role, signed_by(role, self.state))}
        return self._changed | ending - others, others

    def is_stale(self) -> bool:
        """Say whether there is anything to sign though no list of files changed."""
        state = self.state
        return self._renewing or any(
            part.version == 0 or part.is_expired() for part in (state.snapshot, state.timestamp)
        )

    def needs_snapshot(self) -> bool:
        """Say whether the snapshot must be signed anew though no list of files changed."""
        return self._is_due(Snapshot.type, self.state.snapshot)

    def _ending(self) -> set[str]:
        parts = {**self.state.delegated, Targets.type: self.state.targets}
        return {role for role, part in parts.items() if self._is_due(role, part)}

    def _is_due(self, role: str, part: Part) -> bool:
        left = LIFE[role] * _SHARE_LEFT if self._renewing else timedelta(0)
        return part.version == 0 or part.expires <= datetime.now(UTC) + left


def transact(store: str, keys: Path, edit: Callable[[Draft], T]) -> T:
    """Change a store, again from the start whenever another publisher was first.

    Args:
        store: Directory or ``gs://bucket/prefix``.
        keys: Folder of keys, not inside the store.
        edit: Changes the draft; called once for each try, so it does nothing else.

    Returns:
        What ``edit`` returned when its change took hold.

    Raises:
        ValueError: The store or the place of the keys cannot be used.
        ReleaseError: The store or the keys cannot be used or trusted.
    """
    opened, signing = open_for_signing(store, keys)

    def change() -> tuple[T, Draft]:
        root = newest_root(opened, trusted_root(signing.root))
        state = read_state(opened, root, signing.first_targets)
        _check_clock(state.timestamp)
        draft = Draft(opened, state)
        result = edit(draft)
        commit(opened, draft, signing)
        return result, draft

    result, draft = insist(store, change)
    _warn_of_root(draft.state.root)
    for tell in draft.afterwards:
        tell(store)
    return result


def insist(store: str, change: Callable[[], T]) -> T:
    """Do what may meet another publisher, again from the start whenever that one was first.

    Args:
        store: Its address.
        change: Reads the store, and changes it in one commit.

    Returns:
        What ``change`` returned when it took hold.

    Raises:
        ReleaseError: Others were first each time, or the store cannot be trusted.
    """
    for attempt in range(_TRIES):
        try:
            with turn(store), reported(store):
                return change()
        except ConflictError:
            # Publishers that met once would meet again if they all waited for the same time.
            time.sleep(random.uniform(0, 0.02 * 2 ** min(attempt, 6)))
    raise ReleaseError(f"{store} is busy: {_TRIES} times another publisher was first; try again")


def open_for_signing(store: str, keys: Path) -> tuple[Store, Keys]:
    """Open a store and the keys to change it with.

    Raises:
        ValueError: The store or the place of the keys cannot be used.
        ReleaseError: The keys are missing, or for development only and the store is a real one.
    """
    opened = open_store(store)
    if isinstance(opened, DirectoryStore) and keys.resolve().is_relative_to(opened.path.resolve()):
        raise ValueError(f"keys must lie outside the store {store}, got {keys}")
    trial = isinstance(opened, DirectoryStore) or is_emulated()
    return opened, load_keys(keys, development=trial)


def commit(store: Store, draft: Draft, keys: Keys, new_targets: bytes | None = None) -> None:
    """Sign a draft and write it, the one name that readers start from last.

    Args:
        store: Where to write.
        draft: What to write; nothing is written if it changes nothing and nothing has expired.
        keys: What to sign with.
        new_targets: Signed targets to write as they are, already those of the draft.

    Raises:
        ConflictError: Another publisher was first.
        ReleaseError: The store cannot be written, or no key is at hand.
        RepositoryError: There are too few keys for a role.
    """
    state, (due, others) = draft.state, draft.due(keys)
    if not (due or new_targets or draft.is_stale()):
        return
    check_keys(state, due, keys)
    for role in sorted(others):
        _log.warning("%s is due, and %s has no key to sign it: others must", role, keys.folder)
    if state.generation == 0 and new_targets is None:
        create_or_refuse(store, f"metadata/{state.root.version}.root.json", keys.root)
        new_targets = keys.first_targets
    for name, data in draft.files.items():
        create_or_refuse(store, name, data)
    listed = state.snapshot.meta
    for role in sorted(due & DELEGATED.keys()):
        listed[f"{role}.json"] = _issue(store, role, state.delegated[role], state, keys)
    if new_targets is not None:
        create_or_refuse(store, f"metadata/{state.targets.version}.targets.json", new_targets)
        listed["targets.json"] = _meta(state.targets.version, new_targets)
    elif Targets.type in due:
        listed["targets.json"] = _issue(store, Targets.type, state.targets, state, keys)
    if due or new_targets is not None or draft.needs_snapshot():
        issued = _issue(store, Snapshot.type, state.snapshot, state, keys)
        state.timestamp.snapshot_meta = issued
    state.timestamp.version += 1
    state.timestamp.unrecognized_fields[ISSUED] = int(time.time())
    # The commit point. The generation was read before all that the new metadata builds on.
    signed = _signed(Timestamp.type, state.timestamp, state, keys)
    store.replace(TIMESTAMP, signed, state.generation)


def check_keys(state: State, due: set[str], keys: Keys) -> None:
    """Refuse to begin what cannot be signed to the end.

    Args:
        state: Says whose keys a role has.
        due: Roles to sign, beside snapshot and timestamp.
        keys: What is at hand.

    Raises:
        ReleaseError: There are too few keys at hand.
    """
    for role in sorted({*due, Snapshot.type, Timestamp.type}):
        by = signed_by(role, state)
        n_keys, threshold = len(keys.signers(role, by)), by.get_delegated_role(role).threshold
        if n_keys < threshold:
            raise ReleaseError(
                f"{role} takes {threshold} signatures: {keys.folder} has keys for {n_keys}"
            )


def create_or_refuse(store: Store, name: str, data: bytes) -> None:
    """Create what no other publisher can have created with other bytes.

    Raises:
        ReleaseError: It holds other bytes, or cannot be written.
    """
    try:
        store.create(name, data)
    except ConflictError as error:
        raise ReleaseError(f"{name} holds other bytes: other keys, or damage") from error


def _issue(store: Store, role: str, part: Part, state: State, keys: Keys) -> MetaFile:
    """Create the next free version; a publisher at work, or one that died, may hold some."""
    while True:
        part.version += 1
        data = _signed(role, part, state, keys)
        try:
            store.create(f"metadata/{part.version}.{role}.json", data)
        except ConflictError:
            continue
        return _meta(part.version, data)


def _signed(role: str, part: Part, state: State, keys: Keys) -> bytes:
    part.expires = (datetime.now(UTC) + keys.life(role)).replace(microsecond=0)
    metadata = Metadata(part)
    by = signed_by(role, state)
    for signer in keys.signers(role, by):
        try:
            metadata.sign(signer, append=True)
        except UnsignedMetadataError as error:
            reason = str(error.__cause__ or error).partition("\n")[0][:200]
            raise ReleaseError(f"the key of {role} did not sign: {reason}") from error
    # Never upload what a reader will refuse.
    by.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    data = metadata.to_bytes(JSONSerializer(compact=True))
    if len(data) > MAX_METADATA:
        raise ReleaseError(
            f"the list of {role} would have {len(data)} bytes, and a vehicle reads {MAX_METADATA}: "
            "begin another store, or sign less about each file"
        )
    return data


def signed_by(role: str, state: State) -> Root | Targets:
    """Return who names the keys of a role."""
    return state.targets if role in DELEGATED else state.root


def _meta(version: int, data: bytes) -> MetaFile:
    return MetaFile(version, len(data), {"sha256": hashlib.sha256(data).hexdigest()})


def _check_clock(timestamp: Timestamp) -> None:
    """Refuse to sign what readers, who know what time it is at least, would take for expired."""
    issued = timestamp.unrecognized_fields.get(ISSUED)
    behind = issued - int(time.time()) if isinstance(issued, int) else 0
    if behind > _MAX_BEHIND:
        raise ReleaseError(
            f"the clock of this machine is {behind // 60} minutes behind the last publisher's: set "
            "it right, or if that one was ahead, exchange the key of the timestamp"
        )


def _warn_of_root(root: Root) -> None:
    left = root.expires - datetime.now(UTC)
    if left < _ROOT_WARNING:
        _log.warning("the root expires in %d days: sign a new one before", left.days)
