"""Downloads that go on where they stopped, on the same day or after a power cut."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tuf.api.exceptions import (
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    LengthOrHashMismatchError,
    SlowRetrievalError,
)
from tuf.api.metadata import TargetFile

from filterpress.release.device.source import Limits, Source
from filterpress.release.names import payload_name

_TRIES = 16


def download(source: Source, info: TargetFile, part: Path, limits: Limits) -> None:
    """Download a file until it is whole, or until a try brings nothing more.

    Args:
        source: Where it is.
        info: What is signed about it.
        part: File to write to; what it holds already is taken for the beginning. It is named after
            the digest, never after a name that the store chose.
        limits: The least rate.

    Raises:
        DownloadError: It cannot be had; what came is kept for the next time.
        LengthOrHashMismatchError: It is not what was signed; nothing is kept.
        OSError: It cannot be written.
    """
    for _ in range(_TRIES):
        before = _size(part)
        try:
            _append(source, info, part, limits)
        except DownloadLengthMismatchError:
            part.unlink()
            raise
        except (DownloadHTTPError, SlowRetrievalError):
            raise
        except DownloadError:
            if _size(part) <= before:
                raise
        if _size(part) < info.length:
            if _size(part) <= before:
                raise DownloadError(f"{info.path} ends after {_size(part)} of {info.length} bytes")
            continue
        try:
            with part.open("rb") as file:
                info.verify_length_and_hashes(file)
        except LengthOrHashMismatchError:
            part.unlink()
            if before:
                continue  # perhaps only what was there before was wrong
            raise
        return
    raise DownloadError(f"{info.path} comes in too many pieces")


def _append(source: Source, info: TargetFile, part: Path, limits: Limits) -> None:
    """Add to a file what a source has of its rest."""
    position = _size(part)
    if position >= info.length:
        return
    try:
        first, chunks = source.read(payload_name(info), position)
    except DownloadHTTPError as error:
        if error.status_code != 416:
            raise
        part.unlink(missing_ok=True)
        raise DownloadError(f"{info.path}: the source has less than was there") from error
    began, received = time.monotonic(), 0
    with part.open("ab" if first else "wb") as file:
        try:
            for chunk in chunks:
                received += len(chunk)
                if first + received > info.length:
                    raise DownloadLengthMismatchError(f"{info.path} is longer than was signed")
                file.write(chunk)
                seconds = time.monotonic() - began
                if seconds > limits.grace_s and received < seconds * limits.bytes_per_s:
                    raise SlowRetrievalError(f"{info.path} comes too slowly")
        finally:
            file.flush()
            os.fsync(file.fileno())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
