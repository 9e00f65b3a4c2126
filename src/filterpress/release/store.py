"""Where releases are kept: a directory or a bucket, behind two kinds of write.

A name is either *created* once and never changes, or *replaced* by whoever saw its last state.
Everything a reader needs is created first; the one name that is replaced, last, is what makes a
release visible. A writer that dies on the way leaves names that nobody points at.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from filterpress import buckets, files
from filterpress.errors import ReleaseError

_LOCK = ".lock"


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
    bucket = buckets.open_bucket("store", uri, ReleaseError)
    if bucket is None:
        return DirectoryStore(Path(uri))
    from filterpress.release.bucket import BucketStore

    return BucketStore(bucket)


class DirectoryStore:
    """A store in a directory, on a file system with locks and atomic rename.

    Writers take turns. What a killed one leaves is a hidden file that no reader asks for.

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
            files.write(self.path / name, data)

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
            files.make_directory(self.path)
            with (self.path / _LOCK).open("wb") as lock:
                # The kernel gives the lock back when a writer dies.
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise ReleaseError(f"cannot write {self.path / name}: {error.strerror}") from error
