"""Where releases are kept: a directory or a bucket, behind two kinds of write.

A name is either *created* once and never changes, or *replaced* by whoever saw its last state.
Everything a reader needs is created first; the one name that is replaced, last, is what makes a
release visible. A writer that dies on the way leaves names that nobody points at.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from filterpress.errors import ReleaseError

_BUCKET = re.compile(r"gs://([^/]+)(.*)")
_LOCK = ".lock"
_INCOMING = ".incoming"


class ConflictError(ReleaseError):
    """Another writer was first."""


class Store(Protocol):
    """A flat set of named byte strings, safe for many writers and readers at once."""

    def create(self, name: str, data: bytes) -> None:
        """Write a name that will never change.

        Args:
            name: Segments of letters, digits, ``.``, ``_`` and ``-``, joined by ``/``.
            data: What readers will see: all of it, or no such name.

        Raises:
            ConflictError: The name exists with other bytes. The same bytes are fine.
            ReleaseError: The store cannot be written.
        """

    def replace(self, name: str, data: bytes, generation: int) -> None:
        """Write a name that changes, if nobody changed it since it was read.

        Args:
            name: As for ``create``.
            data: What readers will see instead of the old bytes.
            generation: What ``read`` gave with the old bytes; 0 if there was no such name.

        Raises:
            ConflictError: The name has changed, and not to these bytes.
            ReleaseError: The store cannot be written.
        """

    def read(self, name: str) -> tuple[bytes, int] | None:
        """Read a name.

        Args:
            name: As for ``create``.

        Returns:
            The bytes and their generation, or None if there is no such name.

        Raises:
            ReleaseError: The store cannot be read.
        """


def open_store(uri: str) -> Store:
    """Open a directory or a bucket.

    Args:
        uri: Path of a directory, which need not exist yet, or ``gs://bucket/prefix``.

    Returns:
        The store. Nothing is written until something is created in it.

    Raises:
        ValueError: The address is neither.
        ReleaseError: There is no way to reach buckets from here.

    Example:
        >>> open_store("s3://bucket/models")
        Traceback (most recent call last):
        ValueError: store must be a directory or gs://bucket/prefix, got 's3://bucket/models'
    """
    if uri and "://" not in uri:
        return DirectoryStore(Path(uri))
    bucket = _BUCKET.fullmatch(uri)
    if not bucket:
        raise ValueError(f"store must be a directory or gs://bucket/prefix, got {uri!r}")
    try:
        # Optional, and slow to import: only those who name a bucket pay for it.
        from filterpress.release.bucket import BucketStore
    except ImportError as error:
        raise ReleaseError(
            f"{uri} needs google-cloud-storage: pip install 'filterpress[publish]'"
        ) from error
    return BucketStore(bucket[1], bucket[2].strip("/"))


class DirectoryStore:
    """A store in a directory, on a file system with locks and atomic rename.

    Writers take turns. The one whose turn it is writes to one file beside the others, and renames
    it when it has reached the disk; what a killed writer leaves there, the next one overwrites.

    Attributes:
        path: The directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, name: str, data: bytes) -> None:
        """Write a name that will never change; see `Store`."""
        self.replace(name, data, 0)

    def replace(self, name: str, data: bytes, generation: int) -> None:
        """Write a name that changes, if nobody changed it since it was read; see `Store`."""
        with self._turn_to_write(name):
            found = self.read(name)
            if found and found[0] == data:
                return
            if (found[1] if found else 0) != generation:
                raise ConflictError(f"{self.path / name} was written by someone else")
            self._write(self.path / name, data)

    def read(self, name: str) -> tuple[bytes, int] | None:
        """Read a name; see `Store`. The generation is a digest, so it needs no place of its own."""
        path = self.path / name
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ReleaseError(f"cannot read {path}: {error.strerror}") from error
        return data, int.from_bytes(hashlib.sha256(data).digest()[:8])

    @contextmanager
    def _turn_to_write(self, name: str) -> Iterator[None]:
        try:
            make_directory(self.path)
            with (self.path / _LOCK).open("wb") as lock:
                # The kernel gives the lock back when a writer dies.
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise ReleaseError(f"cannot write {self.path / name}: {error.strerror}") from error

    def _write(self, path: Path, data: bytes) -> None:
        incoming = self.path / _INCOMING
        make_directory(path.parent)
        try:
            write_durably(incoming, data)
            incoming.replace(path)
        except OSError:
            incoming.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def make_directory(path: Path) -> None:
    """Make a directory and its parents, so that they outlive a power cut.

    Args:
        path: The directory; may exist.

    Raises:
        OSError: It cannot be made.
    """
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def write_durably(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file and wait until the disk has it.

    Args:
        path: The file; what it held is lost.
        data: All it will hold.
        mode: Permissions of a file that is new, before the process's mask.

    Raises:
        OSError: It cannot be written, or not wholly.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the disk knows the names in a directory.

    Args:
        path: The directory.

    Raises:
        OSError: It cannot be opened or synchronised.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
