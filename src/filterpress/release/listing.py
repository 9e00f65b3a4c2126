"""The signed list of releases: how one is added, with deltas, and which deltas leave the list.

Each vehicle fetches the list anew with each change, so it names no delta that none will ask for.
The files stay: a name in a store is created once and never changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import TargetFile

from filterpress.codec import make_delta
from filterpress.errors import BitstreamError, ReleaseError
from filterpress.release.channel import Json, parse
from filterpress.release.names import COUNTER, HARDWARE
from filterpress.release.transaction import Draft
from filterpress.release.trust import RELEASE, ROLLOUT

_log = logging.getLogger(__name__)

_OLD_DIGEST = "from_sha256"
_MAX_DELTA = 0.7  # of the bytes of the whole file: a vehicle may have to fetch both


def add_release(
    draft: Draft,
    target: str,
    file: bytes,
    custom: Mapping[str, Any],
    n_deltas: int,
    change: Callable[[bytes, bytes], bytes | None],
) -> TargetFile:
    """List a release with deltas that make it, and no longer the deltas that are of no more use.

    Of use are those that a channel names, and those to the newest release of each network and kind
    of vehicle, which a channel is about to name. It is judged by what holds before: what a channel
    leaves in this very step another one may take up in the next.

    Args:
        draft: Holds the releases and the channels.
        target: Path of the release.
        file: Its bytes.
        custom: What else to sign about it, less its counter.
        n_deltas: From how many earlier files of the same name to publish a delta, besides those
            that channels name, which is what vehicles run; 0 for none at all.
        change: Makes a delta of two files, or None where it does not pay.

    Returns:
        What will be signed about the release.
    """
    channels = _channels(draft)
    for path in _useless(draft, channels):
        draft.drop(RELEASE, path)
    new = draft.add(RELEASE, target, file, {**custom, COUNTER: next_counter(draft)})
    running = {content["sha256"] for content in channels or ()}
    _add_deltas(draft, new, file, n_deltas, running, change)
    return new


def next_counter(draft: Draft) -> int:
    """Return the counter of the next release of a store."""
    return 1 + max(map(counter_of, draft.listed(RELEASE).values()), default=0)


def counter_of(info: TargetFile) -> int:
    """Return the counter of a release; 0 for a delta, which is none."""
    return int((info.custom or {}).get(COUNTER, 0))


def deltas_to(listed: Mapping[str, TargetFile], info: TargetFile) -> dict[str, TargetFile]:
    """Return the deltas that make a file, by the digest of the file they start from."""
    folder = model_folder(info)
    return {
        delta.custom[_OLD_DIGEST]: delta
        for path, delta in listed.items()
        if _is_delta(delta) and _folder(path) == folder
    }


def model_folder(info: TargetFile) -> str:
    """Return the folder of the deltas of a file: that of its name and digest."""
    return f"{_name(info)}/{info.hashes['sha256'][:16]}"


def small_delta(old: bytes, new: bytes) -> bytes | None:
    """Make the delta between two files, if it is much smaller than the new one."""
    try:
        delta = make_delta(old, new)
    except BitstreamError as error:
        _log.info("no delta: %s", error)
        return None
    return delta if len(delta) < _MAX_DELTA * len(new) else None


def _channels(draft: Draft) -> list[Json] | None:
    """Read what all channels say; None if that of one cannot be read."""
    found = []
    for path, info in draft.listed(ROLLOUT).items():
        try:
            content = parse(path, draft.read(info))
            found.append({"sha256": content["sha256"], "deltas": [*content["deltas"]]})
        except (ReleaseError, RepositoryError, LookupError, TypeError) as error:
            _log.warning("no delta leaves the list of releases: %s cannot be read: %s", path, error)
            return None
    return found


def _useless(draft: Draft, channels: list[Json] | None) -> list[str]:
    """Return the deltas that no channel names, less those to the newest releases."""
    if channels is None:
        return []
    listed = draft.listed(RELEASE)
    newest: dict[tuple[str, str], str] = {}
    for info in sorted(listed.values(), key=counter_of):
        for kind in (info.custom or {}).get(HARDWARE, ()):
            newest[_name(info), kind] = model_folder(info)
    named = {delta["target"] for content in channels for delta in content["deltas"]}
    return [
        path
        for path, info in listed.items()
        if _is_delta(info) and path not in named and _folder(path) not in newest.values()
    ]


def _add_deltas(
    draft: Draft,
    new: TargetFile,
    file: bytes,
    count: int,
    running: set[str],
    change: Callable[[bytes, bytes], bytes | None],
) -> None:
    """Add deltas that make a file from the last other ones of its name, and from those running.

    A delta is left out where it does not pay.
    """
    listed = draft.listed(RELEASE)
    others: dict[str, TargetFile] = {}
    for info in sorted(listed.values(), key=counter_of, reverse=True):
        if counter_of(info) and _name(info) == _name(new) and info.hashes != new.hashes:
            others.setdefault(info.hashes["sha256"], info)
    for place, (digest, old) in enumerate(others.items()):
        if count == 0 or (place >= count and digest not in running):
            continue
        path = f"{model_folder(new)}/from-{digest[:16]}.fpd"
        if path in listed:
            continue
        try:
            before = draft.read(old)
        except (ReleaseError, RepositoryError) as error:
            # What is lost of an old release must not keep a new one back.
            _log.warning("no delta from release %d: %s", counter_of(old), error)
            continue
        if (delta := change(before, file)) is not None:
            draft.add(RELEASE, path, delta, {_OLD_DIGEST: digest})


def _is_delta(info: TargetFile) -> bool:
    return not counter_of(info) and _OLD_DIGEST in (info.custom or {})


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _name(info: TargetFile) -> str:
    """Return the first two parts of a path: what all releases of one network share."""
    return "/".join(info.path.split("/")[:2])
