"""Channels: which vehicles shall run which release.

A channel is a signed file that any vehicle reads and judges for itself: no server knows the fleet.
It is signed by a role of its own, ``rollout``, that cannot release anything: a channel only names
what the role ``release`` has signed.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from tuf.api.metadata import TargetFile

from filterpress.codec.graph import to_onnx
from filterpress.errors import ModelError, ReleaseError
from filterpress.release import golden
from filterpress.release.channel import (
    ALL,
    STABLE,
    Channel,
    Check,
    Json,
    basis_points,
    parse,
    path_of,
    terms,
)
from filterpress.release.cluster import mirror
from filterpress.release.listing import (
    add_release,
    counter_of,
    deltas_to,
    model_folder,
    next_counter,
    small_delta,
)
from filterpress.release.names import ANY, COUNTER, HARDWARE, MAX_CHANNEL, SCHEMA
from filterpress.release.store import open_store
from filterpress.release.transaction import Draft, transact
from filterpress.release.trust import RELEASE, ROLLOUT, open_reader, reported

_log = logging.getLogger(__name__)


def publish(target: str, *, store: str, keys: Path, **named: Any) -> Channel:
    """Let a channel name a release.

    A channel that names it already is left as it is, with the share it has been ramped to; so is
    one that names a later release. A channel that is halted stays so, until `resume`.

    Args:
        target: Path of a release in the store.
        store: Directory or ``gs://bucket/prefix``.
        keys: Folder of keys; those of ``rollout``, ``snapshot`` and ``timestamp`` are enough.
        named: As for `naming`.

    Returns:
        The channel.

    Raises:
        ValueError: As for `naming`.
        BitstreamError: As for `naming`.
        ModelError: As for `naming`.
        ReleaseError: As for `naming`, or the store or the keys cannot be used or trusted.
    """
    name = naming(**named)
    return transact(store, keys, lambda draft: name(draft, target))


def naming(
    *,
    hardware: str = ANY,
    channel: str = STABLE,
    percent: float = ALL,
    cohorts: Sequence[str] = (),
    not_before: str = "",
    check: Check | None = None,
    run: str = "",
) -> Callable[[Draft, str], Channel]:
    """Prepare a channel to name a release, in a step that may change more than the channel.

    Args:
        hardware: Kind of vehicle that the channel is for.
        channel: Name of the channel.
        percent: Share of the vehicles that take part, 0 to 100 in hundredths.
        cohorts: Vehicles of these groups take part whatever the share is.
        not_before: When to begin, such as 2027-01-31T06:00:00Z; empty for now.
        check: What vehicles check before they trust it; the defaults of `Check` without it.
        run: What made the release, for the record.

    Returns:
        What lets the channel of a draft name the release with a path, and returns the channel. It
        raises `BitstreamError` if the release holds no network, `ModelError` if that does not run
        or answers with numbers that are not finite, and `ReleaseError` if there is no such release
        for this hardware, or its answers take more than a channel may have.

    Raises:
        ValueError: An argument is outside these bounds.
    """
    path = path_of(hardware, channel)
    rollout = terms(percent, cohorts, not_before)
    health = _health(check or Check())
    warn = cache(_log.warning)  # once, however often a publisher has to try again

    def name(draft: Draft, target: str) -> Channel:
        info = draft.listed(RELEASE).get(target)
        if info is None or not counter_of(info):
            raise ReleaseError(f"the store has no release {target}")
        _check_made_for(info, hardware)
        before = _read(draft, path)
        if before and before[COUNTER] > counter_of(info):
            warn("%s names release %s already: left so", path, before[COUNTER])
            return _told(draft, "Publish", path, before, changed=False)
        halted = bool(before and before["rollout"]["halted"])
        if halted:
            warn("%s stays halted: resume lets release %s go", path, counter_of(info))
        if before and before[COUNTER] == counter_of(info):
            _log.info("%s names release %s already: left so", path, counter_of(info))
            return _told(draft, "Publish", path, before, changed=False)
        names = {"hardware": hardware, "channel": channel, "run": run}
        share = rollout | {"halted": halted}
        return _write(draft, "Publish", path, _content(draft, info, names, share, health))

    return name


def ramp(
    percent: float,
    *,
    store: str,
    keys: Path,
    hardware: str = ANY,
    channel: str = STABLE,
) -> Channel:
    """Change the share of the vehicles that take part; those that did before still do.

    Args:
        percent: New share, 0 to 100 in hundredths. A smaller one calls nobody back.
        store: Directory or ``gs://bucket/prefix``.
        keys: Folder of keys; those of ``rollout``, ``snapshot`` and ``timestamp`` are enough.
        hardware: Kind of vehicle that the channel is for.
        channel: Name of the channel.

    Returns:
        The channel.

    Raises:
        ValueError: The share is outside these bounds.
        ReleaseError: There is no such channel, or the store or the keys cannot be used or trusted.
    """
    change = {"percent_bp": basis_points(percent)}
    return _change("Ramp", change, path_of(hardware, channel), store, keys)


def halt(*, store: str, keys: Path, hardware: str = ANY, channel: str = STABLE) -> Channel:
    """Stop a channel: until `resume`, no further vehicle takes its release, nor any later one.

    Args:
        store: As for `ramp`.
        keys: As for `ramp`.
        hardware: As for `ramp`.
        channel: As for `ramp`.

    Returns:
        The channel.

    Raises:
        ReleaseError: As for `ramp`.
    """
    return _change("Halt", {"halted": True}, path_of(hardware, channel), store, keys)


def resume(*, store: str, keys: Path, hardware: str = ANY, channel: str = STABLE) -> Channel:
    """Let a halted channel go on at the share it had.

    Args:
        store: As for `ramp`.
        keys: As for `ramp`.
        hardware: As for `ramp`.
        channel: As for `ramp`.

    Returns:
        The channel.

    Raises:
        ReleaseError: As for `ramp`.
    """
    return _change("Resume", {"halted": False}, path_of(hardware, channel), store, keys)


def recall(
    to: int,
    *,
    store: str,
    keys: Path,
    hardware: str = ANY,
    channel: str = STABLE,
    percent: float = ALL,
    n_deltas: int = 3,
    max_ms: int | None = None,
    max_mb: int | None = None,
) -> Channel:
    """Send vehicles back to the bytes of an earlier release, under a higher counter.

    Counters never fall, on no vehicle: the old bytes are released once more, and the channel names
    them, in one step. What vehicles check, and the cohorts, stay as they are; a halt ends.

    Args:
        to: Counter of the release to go back to.
        store: Directory or ``gs://bucket/prefix``.
        keys: Folder of keys; those of ``release`` and ``rollout`` are both needed.
        hardware: Kind of vehicle that the channel is for.
        channel: Name of the channel.
        percent: Share of the vehicles that go back at once.
        n_deltas: As for `filterpress.release.publish`.
        max_ms: As for `Check`; None for that of the channel, which may be what was wrong.
        max_mb: As for `max_ms`.

    Returns:
        The channel; it is left as it is if it names these bytes already.

    Raises:
        ValueError: The share or a bound is outside its bounds.
        ReleaseError: There is no such channel or release, or the store or the keys cannot be used
            or trusted.
    """
    path, percent_bp = path_of(hardware, channel), basis_points(percent)
    given = {"max_ms": max_ms, "max_mb": max_mb}
    bounds = {name: bound for name, bound in given.items() if bound is not None}
    change = cache(small_delta)  # a publisher that has to try again has them already

    def edit(draft: Draft) -> Channel:
        before = _read_known(draft, path, store)
        listed = draft.listed(RELEASE)
        old = next((info for info in listed.values() if counter_of(info) == to), None)
        if old is None:
            raise ReleaseError(f"{store} has no release with the counter {to}")
        _check_made_for(old, hardware)
        if before["sha256"] == old.hashes["sha256"]:
            return _told(draft, "Recall", path, before, changed=False)
        file = draft.read(old)
        target = f"{model_folder(old)}-{next_counter(draft)}/{Path(old.path).name}"
        new = add_release(draft, target, file, old.custom or {}, n_deltas, change)
        rollout = {**before["rollout"], "percent_bp": percent_bp, "not_before": "", "halted": False}
        health = _health(replace(_check_of(before), **bounds))
        names = before | {"run": f"recall to release {to}"}
        return _write(draft, "Recall", path, _content(draft, new, names, rollout, health))

    return transact(store, keys, edit)


def read(store: str, *, root: bytes, hardware: str = ANY, channel: str = STABLE) -> Channel:
    """Read a channel as a vehicle does.

    Args:
        store: Directory or ``gs://bucket/prefix``.
        root: The trusted root, as signed.
        hardware: Kind of vehicle that the channel is for.
        channel: Name of the channel.

    Returns:
        The channel.

    Raises:
        ReleaseError: There is none, or something is unsigned, altered or expired.
    """
    path = path_of(hardware, channel)
    with reported(store), open_reader(open_store(store), root) as reader:
        info = reader.find(path)
        if info is None:
            raise ReleaseError(f"{store} has no channel {hardware}/{channel}")
        return Channel(path=path, content=parse(path, reader.read(info)), changed=False)


def _change(action: str, change: Json, path: str, store: str, keys: Path) -> Channel:
    def edit(draft: Draft) -> Channel:
        before = _read_known(draft, path, store)
        rollout = before["rollout"] | change
        if rollout == before["rollout"]:
            return _told(draft, action, path, before, changed=False)
        return _write(draft, action, path, before | {"rollout": rollout})

    return transact(store, keys, edit)


def _content(
    draft: Draft,
    info: TargetFile,
    names: Mapping[str, Any],
    rollout: Json,
    health: Callable[[bytes], Json],
) -> Json:
    deltas = deltas_to(draft.listed(RELEASE), info)
    return {
        "schema": SCHEMA,
        "name": info.path.split("/")[1],
        "hardware": names["hardware"],
        "channel": names["channel"],
        "release_counter": counter_of(info),
        "target": info.path,
        "sha256": info.hashes["sha256"],
        "n_bytes": info.length,
        "deltas": [{"from_sha256": old, "target": delta.path} for old, delta in deltas.items()],
        # A salt of its own for each release, so that not the same drivers are always first.
        "rollout": {**rollout, "salt": secrets.token_hex(8)},
        "health": health(draft.read(info)),
        "run": names["run"],
    }


def _check_made_for(info: TargetFile, hardware: str) -> None:
    made_for = (info.custom or {}).get(HARDWARE, [])
    if not {ANY, hardware} & set(made_for):
        raise ReleaseError(f"{info.path} is made for {', '.join(made_for)}, not for {hardware}")


def _health(check: Check) -> Callable[[bytes], Json]:
    @cache
    def outputs(file: bytes) -> list[list[float]]:
        model = to_onnx(file)
        try:
            found = golden.outputs(model, check.seed, check.count)
        except Exception as error:  # whatever the runtime raises, the network does not run
            raise ModelError(f"the network must run, got {str(error)[:200]}") from error
        if not np.isfinite(found).all():
            raise ModelError("the network must answer with finite numbers: no vehicle would run it")
        return found

    return lambda file: {**asdict(check), "outputs": outputs(file)}


def _check_of(content: Json) -> Check:
    return Check(**{name: value for name, value in content["health"].items() if name != "outputs"})


def _read(draft: Draft, path: str) -> Json | None:
    info = draft.listed(ROLLOUT).get(path)
    return parse(path, draft.read(info)) if info else None


def _read_known(draft: Draft, path: str, store: str) -> Json:
    content = _read(draft, path)
    if content is None:
        raise ReleaseError(f"{store} has no channel {path}: publish a release to it first")
    return content


def _write(draft: Draft, action: str, path: str, content: Json) -> Channel:
    data = json.dumps(content, separators=(",", ":")).encode()
    if len(data) > MAX_CHANNEL:
        raise ReleaseError(
            f"{path} would have {len(data)} bytes, and a vehicle reads {MAX_CHANNEL}: let it check "
            "fewer images"
        )
    draft.add(ROLLOUT, path, data, {})
    return _told(draft, action, path, content, changed=True)


def _told(draft: Draft, action: str, path: str, content: Json, *, changed: bool) -> Channel:
    """Return a channel that the cluster is told of once the store says so."""
    channel = Channel(path=path, content=content, changed=changed)
    draft.afterwards.append(partial(mirror, action, channel))
    return channel
