"""Root and targets of a ceremony, between its folder and a store.

To exchange an online key without a moment in which readers fail: add the new key and publish, sign
with the new key, then drop the old key and publish. Where a key is stolen there is no time for
that: drop it, and publishing signs anew at once what only it has signed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from filterpress import files
from filterpress.errors import ReleaseError
from filterpress.release.ceremony import Json, path_of, refuse_existing, status, versions
from filterpress.release.keys import Keys, read
from filterpress.release.store import Store, open_store
from filterpress.release.transaction import (
    Draft,
    check_keys,
    commit,
    create_or_refuse,
    insist,
    open_for_signing,
    signed_by,
)
from filterpress.release.trust import (
    State,
    read_state,
    reported,
    roots_from,
    successor,
    trusted_root,
    verified,
)


def begin(folder: Path, *, store: str, root: bytes) -> Json:
    """Copy what a store says now, verified, into a folder, to change it there.

    Args:
        folder: Folder to make.
        store: Directory or ``gs://bucket/prefix``.
        root: The trusted root, as signed.

    Returns:
        As for `status`.

    Raises:
        ReleaseError: The store cannot be read or trusted, or the folder holds something.
    """
    refuse_existing(folder)
    opened = open_store(store)
    with reported(store):
        roots = roots_from(opened, trusted_root(root))
        targets = read_state(opened, roots[-1]).targets
    files.write(folder / f"{roots[0].version}.root.json", root)
    for name in (
        *(f"{later.version}.root.json" for later in roots[1:]),
        f"{targets.version}.targets.json",
    ):
        files.write(folder / name, _bytes_of(opened, name))
    return status(folder)


def publish(folder: Path, *, store: str, keys: Path) -> Json:
    """Publish the newest root and targets, and sign anew what their keys no longer cover.

    Args:
        folder: As `new` or `begin` made it; signed by enough.
        store: Directory or ``gs://bucket/prefix``; may be empty.
        keys: Folder of keys: ``root.json``, any version that is trusted already, and
            ``signers.json`` with keys of ``snapshot`` and ``timestamp`` at least.

    Returns:
        As for `status`.

    Raises:
        ReleaseError: Signatures or keys are missing, or the store cannot be used or trusted.
    """
    opened, signing = open_for_signing(store, keys)

    def change() -> None:
        old = roots_from(opened, trusted_root(signing.root))
        roots = _roots_after(folder, old[-1])
        targets = read(path_of(folder, Targets.type, versions(folder, Targets.type)[-1]))
        state = _state_under_any(opened, [*old, *roots], targets)
        root = [*old, *roots][-1]
        coming = verified(targets, Targets, root)
        fresh = state.generation == 0 or coming.version > state.targets.version
        state = replace(state, root=root, targets=coming if fresh else state.targets)
        draft = Draft(opened, state)
        uncovered = _uncovered(opened, state, fresh)
        if not (roots or fresh or uncovered):
            return
        for role in uncovered:
            draft.sign_again(role)
        draft.renew()
        check_keys(state, draft.due(signing)[0], signing)
        create_or_refuse(opened, f"metadata/{coming.version}.targets.json", targets)
        _upload_roots(opened, folder, signing)
        commit(opened, draft, signing, targets if fresh else None)

    insist(store, change)
    return status(folder)


def _roots_after(folder: Path, root: Root) -> list[Root]:
    roots: list[Root] = []
    for version in versions(folder, Root.type):
        if version > root.version:
            data = read(path_of(folder, Root.type, version))
            roots.append(successor(data, roots[-1] if roots else root))
    return roots


def _state_under_any(store: Store, roots: Sequence[Root], first: bytes) -> State:
    """Read what the newest root covers, or if it drops a key that signed the store, one before."""
    for root in reversed(roots):
        try:
            return read_state(store, root, first)
        except RepositoryError as error:
            reason = error
    raise reason


def _uncovered(store: Store, state: State, fresh: bool) -> set[str]:
    """Return the roles whose metadata in the store the coming keys do not cover."""
    if state.generation == 0:
        return set()
    names = {
        role: f"{part.version}.{role}.json"
        for role, part in state.delegated.items()
        if part.version
    }
    names[Snapshot.type] = f"{state.snapshot.version}.snapshot.json"
    names[Timestamp.type] = "timestamp.json"
    if not fresh:
        names[Targets.type] = f"{state.targets.version}.targets.json"
    return {role for role, name in names.items() if not _is_covered(store, role, name, state)}


def _is_covered(store: Store, role: str, name: str, state: State) -> bool:
    metadata = Metadata[Any].from_bytes(_bytes_of(store, name))
    by = signed_by(role, state)
    return bool(by.get_verification_result(role, metadata.signed_bytes, metadata.signatures))


def _bytes_of(store: Store, name: str) -> bytes:
    found = store.read(f"metadata/{name}")
    if found is None:
        raise RepositoryError(f"{name} is missing")
    return found[0]


def _upload_roots(store: Store, folder: Path, keys: Keys) -> None:
    trusted = trusted_root(keys.root).version
    for version in versions(folder, Root.type):
        data = read(path_of(folder, Root.type, version))
        if version == trusted and data != keys.root:
            raise ReleaseError(f"{folder} holds another root {version} than {keys.folder}")
        create_or_refuse(store, f"metadata/{version}.root.json", data)
