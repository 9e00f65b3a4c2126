"""Signed releases: a repository of The Update Framework in a store.

A release is one file. What is signed about it says more than its bytes: that the role ``release``
vouches for it, which list of files is current (``snapshot``), and until when that may be believed
(``timestamp``). Which vehicles shall run it is another matter, with another key: see
`filterpress.release.rollout`.

Reference:
    The Update Framework specification 1.0, with consistent snapshots and delegated targets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tuf.api.metadata import TargetFile

from filterpress.codec.graph import to_onnx
from filterpress.errors import ReleaseError
from filterpress.release.listing import add_release, counter_of, deltas_to, small_delta
from filterpress.release.names import ANY, COUNTER, HARDWARE, MODEL, is_segment
from filterpress.release.store import open_store
from filterpress.release.transaction import Draft, transact
from filterpress.release.trust import RELEASE, open_reader, reported

_OURS = (COUNTER, HARDWARE)


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
        deltas: Bytes of each delta that makes the file, by the digest of the file it starts from.
        created: Whether the call that returned this issued the release.
    """

    store: str
    target: str
    sha256: str
    n_bytes: int
    version: int
    custom: Mapping[str, Any]
    deltas: Mapping[str, int]
    created: bool


def publish(
    file: bytes,
    *,
    target: str,
    custom: Mapping[str, Any],
    store: str,
    keys: Path,
    hardware: Sequence[str] = (ANY,),
    n_deltas: int = 3,
    then: Callable[[Draft, str], object] | None = None,
) -> Release:
    """Sign a file and make it the store's newest release, with deltas from those before it.

    Readers see the release wholly or not at all, whenever this is interrupted; calling it again
    finishes the work. A file that is published already is left as it is. The first publication
    into an empty directory makes development keys if there are none.

    Args:
        file: The bytes to release.
        target: Path to release them under, ``models/<name>/<version>/<file>``, such as
            ``models/demo/0123456789abcdef/model.fpk``. It stands for these bytes for ever.
        custom: What else to sign about the file: JSON without fractions, because a signature needs
            one way to write each number. ``release_counter`` and ``hardware_ids`` are added.
        store: Directory or ``gs://bucket/prefix``.
        keys: Folder of keys, not inside the store; see `create_keys`.
        hardware: Kinds of vehicle that the file is made for; ``any`` for all.
        n_deltas: From how many earlier releases of the same name to publish a delta, besides those
            that channels name; 0 for none. One is published where it has less than 0.7 of the
            bytes of the file.
        then: What else to change in the same step, given the target, such as to let a channel name
            it: `filterpress.release.rollout.naming`.

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
        ...     given = {"target": "models/m/1/file", "custom": {}, "store": store, "keys": keys}
        ...     one, again = publish(b"weights", **given), publish(b"weights", **given)
        ...     file = fetch(store, "models/m/1/file", root=(keys / "root.json").read_bytes())
        >>> one.version, one.created, again.version, again.created, file
        (1, True, 1, False, b'weights')
    """
    check_target(target)
    _check_custom(custom)
    _check_hardware(hardware)
    change = cache(small_delta)  # a publisher that has to try again has them already

    def edit(draft: Draft) -> Release:
        listed = draft.listed(RELEASE).get(target)
        new = listed is None
        if listed is None:
            signed = {**custom, HARDWARE: list(hardware)}
            listed = add_release(draft, target, file, signed, n_deltas, change)
        elif TargetFile.from_data(target, file, ["sha256"]).hashes != listed.hashes:
            raise ReleaseError(
                f"{target} is released already with sha256 {listed.hashes['sha256']}: "
                "choose another target for another file"
            )
        if then:
            then(draft, target)
        return _release(store, draft.listed(RELEASE), listed, created=new)

    return transact(store, keys, edit)


def publish_network(
    file: bytes,
    *,
    name: str,
    custom: Mapping[str, Any],
    store: str,
    keys: Path,
    hardware: Sequence[str] = (ANY,),
    then: Callable[[Draft, str], object] | None = None,
) -> Release:
    """Release an encoded file under its name and digest, so that a retry issues nothing new.

    Args:
        file: An encoded file.
        name: Name of the network.
        custom: As for `publish`.
        store: As for `publish`.
        keys: As for `publish`.
        hardware: As for `publish`.
        then: As for `publish`.

    Returns:
        The release, ``models/<name>/<first 16 of its digest>/model.fpk``.

    Raises:
        ValueError: As for `publish`, and for a name that cannot be part of a path.
        BitstreamError: The file holds no network.
        ReleaseError: As for `publish`.
    """
    if not is_segment(name):
        raise ValueError(
            f"name must be letters, digits, '.', '_' and '-', not '.' first, got {name!r}"
        )
    to_onnx(file)  # a release is for ever: not one that no vehicle can decode
    digest = hashlib.sha256(file).hexdigest()
    return publish(
        file,
        target=f"models/{name}/{digest[:16]}/model.fpk",
        custom=custom,
        store=store,
        keys=keys,
        hardware=hardware,
        then=then,
    )


def refresh(*, store: str, keys: Path) -> None:
    """Renew the timestamp, and what else nears its end, with the keys that are at hand.

    Args:
        store: Directory or ``gs://bucket/prefix``; something was published to it before.
        keys: Folder of keys; those of the timestamp and the snapshot are enough.

    Raises:
        ReleaseError: The store is empty, or it or the keys cannot be used or trusted.
    """

    def edit(draft: Draft) -> None:
        if draft.state.generation == 0:
            # Not begun here: whoever mistypes an address must not believe that all is well.
            raise ReleaseError(f"{store} is empty: there is nothing to refresh")
        draft.renew()

    transact(store, keys, edit)


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
    check_target(target)
    with reported(store), open_reader(open_store(store), root) as reader:
        info = reader.find(target)
        if info is None:
            raise ReleaseError(f"{store} has no release {target}")
        return reader.read(info)


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
    with reported(store), open_reader(open_store(store), root) as reader:
        listed = reader.list(RELEASE)
    if not listed:
        raise ReleaseError(f"{store} has no releases")
    return _release(store, listed, max(listed.values(), key=counter_of), created=False)


def check_target(target: str) -> None:
    """Refuse a path under which nothing can be released.

    Raises:
        ValueError: It is not ``models/<name>/<version>/<file>``.
    """
    if not MODEL.fullmatch(target):
        raise ValueError(
            "target must be models/NAME/VERSION/FILE, of letters, digits, '.', '_' and '-' that do "
            f"not start with '.', got {target!r}"
        )


def _check_custom(custom: Mapping[str, Any]) -> None:
    for name in _OURS:
        if name in custom:
            raise ValueError(f"custom must leave {name} to publish, got {custom[name]!r}")
    pending: list[tuple[str, Any]] = [("custom", dict(custom))]
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            pending += [(f"{name}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            pending += [(name, inner) for inner in value]
        elif not isinstance(value, str | int | None):
            raise ValueError(f"{name} must be JSON without fractions, got {value!r}")


def _check_hardware(hardware: Sequence[str]) -> None:
    if isinstance(hardware, str) or not hardware or not all(map(is_segment, hardware)):
        raise ValueError(
            "hardware must be names of letters, digits, '.', '_' and '-' that do not start with "
            f"'.', got {hardware!r}"
        )


def _release(
    store: str, listed: Mapping[str, TargetFile], info: TargetFile, *, created: bool
) -> Release:
    return Release(
        store=store,
        target=info.path,
        sha256=info.hashes["sha256"],
        n_bytes=info.length,
        version=counter_of(info),
        custom=info.custom or {},
        deltas={digest: delta.length for digest, delta in deltas_to(listed, info).items()},
        created=created,
    )
