"""What a store holds, read as a vehicle reads it, and as a bundle for one without a network."""

from __future__ import annotations

import io
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import TargetFile

from filterpress import files
from filterpress.errors import ReleaseError
from filterpress.release.channel import STABLE, Json, parse, path_of
from filterpress.release.listing import counter_of
from filterpress.release.names import ANY, COUNTER, HARDWARE
from filterpress.release.store import Store, open_store
from filterpress.release.trust import RELEASE, ROLLOUT, Reader, open_reader, reported, trusted_root

_NEAR = timedelta(hours=6)  # refresh runs more often, or should


def verify(store: str, *, root: bytes) -> Json:
    """Read every signed file of a store, and say what there is and when it ends.

    Args:
        store: Directory or ``gs://bucket/prefix``.
        root: The trusted root, as signed.

    Returns:
        ``roles`` (version, expires, days left), ``releases``, ``channels``, and ``problems``, one
        line each: files that are lost or altered, channels that no vehicle would follow, and
        metadata that ends within six hours.

    Raises:
        ReleaseError: The metadata cannot be read, or is altered, expired or unsigned.
    """
    with reported(store), open_reader(open_store(store), root) as reader:
        releases, channels = reader.list(RELEASE), reader.list(ROLLOUT)
        rows = [_release_row(info) for info in sorted(releases.values(), key=counter_of)]
        problems, found = [], []
        for info in releases.values():
            try:
                _read(reader, info)
            except ReleaseError as error:
                problems.append(str(error))
        for path, info in sorted(channels.items()):
            try:
                content = parse(path, _read(reader, info))
            except ReleaseError as error:
                problems.append(str(error))
                continue
            found.append(_channel_row(path, content))
            problems += _channel_problems(path, content, releases)
        signed = reader.signed()
        roles = [
            {
                "role": role,
                "version": part.version,
                "expires": part.expires.isoformat(),
                "days_left": round((part.expires - datetime.now(UTC)).total_seconds() / 86400, 1),
            }
            for role, part in signed.items()
        ]
        problems += [
            f"the {role} ends {part.expires.isoformat()}: renew it"
            for role, part in signed.items()
            if part.expires < datetime.now(UTC) + _NEAR
        ]
    return {"roles": roles, "releases": rows, "channels": found, "problems": problems}


def bundle(
    out: Path, *, store: str, root: bytes, hardware: str = ANY, channel: str = STABLE
) -> Json:
    """Write all that a vehicle without a network needs of one channel.

    Args:
        out: Tar file to write; unpacked it is a store. It must not exist.
        store: Directory or ``gs://bucket/prefix``.
        root: The trusted root, as signed.
        hardware: Kind of vehicle that the channel is for.
        channel: Name of the channel.

    Returns:
        ``bundle``, ``n_bytes``, ``names`` of what is in it, ``target``, and ``expires``, when the
        first of its metadata ends.

    Raises:
        ValueError: There is a file already.
        ReleaseError: The channel or its file is missing, altered, expired or unsigned.
    """
    if out.exists():
        raise ValueError(f"out must be a file that does not exist yet, got {out}")
    path, kept = path_of(hardware, channel), _Recorder(open_store(store))
    with reported(store), open_reader(kept, root) as reader:
        info = reader.find(path)
        if info is None:
            raise ReleaseError(f"{store} has no channel {hardware}/{channel}")
        content = parse(path, reader.read(info))
        model = reader.find(content["target"])
        if model is None:
            raise ReleaseError(f"{path} names {content['target']}, which nobody released")
        reader.read(model)
        expires = min(part.expires for part in reader.signed().values())
    # A vehicle may trust an older root than the one given here.
    for version in range(1, trusted_root(root).version + 1):
        kept.read(f"metadata/{version}.root.json")
    try:
        files.write(out, _tar(kept.found))
    except OSError as error:
        raise ReleaseError(f"cannot write {out}: {error.strerror}") from error
    return {
        "bundle": str(out),
        "n_bytes": out.stat().st_size,
        "names": sorted(kept.found),
        "target": model.path,
        "expires": expires.isoformat(),
    }


class _Recorder:
    """A store that remembers what was read of it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.found: dict[str, bytes] = {}

    def read(self, name: str) -> tuple[bytes, int] | None:
        found = self._store.read(name)
        if found:
            self.found[name] = found[0]
        return found

    def create(self, name: str, data: bytes) -> None:
        self._store.create(name, data)

    def replace(self, name: str, data: bytes, generation: int) -> None:
        self._store.replace(name, data, generation)


def _tar(contents: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in sorted(contents.items()):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _release_row(info: TargetFile) -> Json:
    custom: dict[str, Any] = info.custom or {}
    return {
        "target": info.path,
        "release_counter": custom.get(COUNTER),
        "n_bytes": info.length,
        "sha256": info.hashes["sha256"],
        "hardware": ", ".join(custom.get(HARDWARE, [])),
    }


def _channel_row(path: str, content: Json) -> Json:
    rollout = content["rollout"]
    return {
        "channel": path,
        "release_counter": content[COUNTER],
        "target": content["target"],
        "percent": rollout["percent_bp"] / 100,
        "cohorts": ", ".join(rollout["cohorts"]),
        "not_before": rollout["not_before"],
        "halted": rollout["halted"],
    }


def _read(reader: Reader, info: TargetFile) -> bytes:
    try:
        return reader.read(info)
    except ReleaseError as error:
        raise ReleaseError(f"{info.path} is lost") from error
    except RepositoryError as error:
        raise ReleaseError(f"{info.path} is altered") from error


def _channel_problems(path: str, content: Json, releases: dict[str, TargetFile]) -> list[str]:
    """Say why vehicles would not follow a channel."""
    named = releases.get(content["target"])
    if named is None:
        return [f"{path} names {content['target']}, which nobody released"]
    made_for = (named.custom or {}).get(HARDWARE, [])
    found = {
        f"{path} says release {content[COUNTER]}, its target {counter_of(named)}": (
            counter_of(named) != content[COUNTER]
        ),
        f"{path} names other bytes than its target": named.hashes["sha256"] != content["sha256"],
        f"{path} names a release for {', '.join(made_for)}": (
            not {ANY, content["hardware"]} & {*made_for}
        ),
    }
    lost = [delta["target"] for delta in content["deltas"] if delta["target"] not in releases]
    return [
        *(line for line, is_so in found.items() if is_so),
        *(f"{path} names {target}, which nobody released" for target in lost),
    ]
