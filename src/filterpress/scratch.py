"""Where work in progress is kept: a directory or a bucket, whose names are replaced whole.

Unlike a store of releases it is nobody's source of truth: a name has one writer and needs no lock,
and what is there may be lost without harm, except for the time it took.
"""

from __future__ import annotations

import tarfile
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO

from filterpress import buckets, files
from filterpress.buckets import Bucket
from filterpress.errors import ScratchError

_IN_MEMORY = 8 * 2**20  # bytes of an upload at a time; the client's own default is 100 MiB


def open_scratch(uri: str) -> Scratch:
    """Open a directory or a bucket.

    Args:
        uri: Path of a directory, which need not exist yet, or ``gs://bucket/prefix``.

    Returns:
        The place. Nothing is written until something is written to it.

    Raises:
        ValueError: The address is neither.
        ScratchError: There is no way to reach buckets from here.

    Example:
        >>> open_scratch("s3://bucket/runs")
        Traceback (most recent call last):
        ValueError: scratch must be a directory or gs://bucket/prefix, got 's3://bucket/runs'
    """
    bucket = buckets.open_bucket("scratch", uri, ScratchError)
    return BucketScratch(bucket) if bucket else DirectoryScratch(Path(uri))


class DamagedError(ScratchError):
    """What lies under a name is not what was put there."""


class Scratch(ABC):
    """A flat set of named byte strings and directories.

    Names are segments of letters, digits, ``.``, ``_`` and ``-``, joined by ``/``. A killed writer
    leaves what was there before, never a part of what should have been.

    Attributes:
        uri: The address.
    """

    uri: str

    def write(self, name: str, data: bytes) -> None:
        """Write a name, whatever it held.

        Args:
            name: The name.
            data: All it will hold.

        Raises:
            ScratchError: The place cannot be written.
        """
        with self._writing(name) as file:
            file.write(data)

    def read(self, name: str) -> bytes | None:
        """Read a name.

        Args:
            name: The name.

        Returns:
            The bytes, None if there is no such name.

        Raises:
            ScratchError: The place cannot be read.
        """
        with self._reading(name) as file:
            return file.read() if file else None

    def put(self, name: str, folder: Path) -> None:
        """Write a directory to a name, whatever it held, as one archive.

        Args:
            name: The name.
            folder: The directory; links in it must not lead out of it.

        Raises:
            ScratchError: The directory cannot be read, or the place cannot be written.
        """
        with self._writing(name) as file, tarfile.open(fileobj=file, mode="w") as archive:
            archive.add(folder, arcname=".")

    def get(self, name: str, folder: Path) -> bool:
        """Read the directory of a name.

        Args:
            name: The name.
            folder: Where it shall be, all at once; must not exist, or be empty.

        Returns:
            False if there is no such name; then nothing is written.

        Raises:
            PackageError: There is something in ``folder`` already.
            DamagedError: The name holds no directory.
            ScratchError: The place cannot be read.
        """
        with self._reading(name) as file:
            if not file:
                return False
            try:
                with (
                    files.new_directory(folder) as draft,
                    tarfile.open(fileobj=file, mode="r:") as archive,
                ):
                    archive.extractall(draft, filter="data")
            except tarfile.TarError as error:
                raise DamagedError(f"{self.uri}/{name} is no archive: {error}") from error
        return True

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a name, if there is one.

        Args:
            name: The name.

        Raises:
            ScratchError: The place cannot be written.
        """

    @abstractmethod
    def newest(self, ending: str) -> str | None:
        """Find the name written last among those with an ending.

        Args:
            ending: Last segments of the name.

        Returns:
            The name, None if there is none.

        Raises:
            ScratchError: The place cannot be read.
        """

    @abstractmethod
    def _writing(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Give a file that becomes what the name holds when the block ends well."""

    @abstractmethod
    def _reading(self, name: str) -> AbstractContextManager[IO[bytes] | None]:
        """Give what the name holds, None if there is no such name."""


class DirectoryScratch(Scratch):
    """A place in a directory, on a file system with atomic rename."""

    def __init__(self, path: Path) -> None:
        self.uri = str(path)
        self._path = path

    def delete(self, name: str) -> None:
        """Remove a name, if there is one; see `Scratch`."""
        with self._reported("delete", name):
            (self._path / name).unlink(missing_ok=True)

    def newest(self, ending: str) -> str | None:
        """Find the name written last among those with an ending; see `Scratch`."""
        with self._reported("read", "."):
            found = [(path.stat().st_mtime_ns, path) for path in self._path.rglob(ending)]
        return max(found)[1].relative_to(self._path).as_posix() if found else None

    @contextmanager
    def _writing(self, name: str) -> Iterator[IO[bytes]]:
        with self._reported("write", name), files.new_file(self._path / name) as file:
            yield file

    @contextmanager
    def _reading(self, name: str) -> Iterator[IO[bytes] | None]:
        with self._reported("read", name):
            found: AbstractContextManager[IO[bytes] | None]
            try:
                found = (self._path / name).open("rb")
            except FileNotFoundError:
                found = nullcontext()
            with found as file:
                yield file

    @contextmanager
    def _reported(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise ScratchError(f"cannot {verb} {self._path / name}: {reason}") from error


class BucketScratch(Scratch):
    """A place under a prefix of a bucket; every upload and download has a checksum."""

    def __init__(self, bucket: Bucket) -> None:
        self.uri = bucket.uri
        self._bucket = bucket

    def delete(self, name: str) -> None:
        """Remove a name, if there is one; see `Scratch`."""
        from google.api_core.exceptions import NotFound

        with self._bucket.reported("delete", name), suppress(NotFound):
            self._bucket.blob(name).delete()

    def newest(self, ending: str) -> str | None:
        """Find the name written last among those with an ending; see `Scratch`."""
        with self._bucket.reported("read", ""):
            found = [
                (blob.updated, name)
                for name, blob in self._bucket.blobs()
                if f"/{name}".endswith(f"/{ending}")
            ]
        return max(found)[1] if found else None

    @contextmanager
    def _writing(self, name: str) -> Iterator[IO[bytes]]:
        with self._bucket.reported("write", name), tempfile.TemporaryFile() as file:
            yield file
            blob = self._bucket.blob(name)
            blob.chunk_size = _IN_MEMORY
            blob.upload_from_file(
                file,
                size=file.tell(),
                rewind=True,
                content_type="application/octet-stream",
                checksum="crc32c",
            )

    @contextmanager
    def _reading(self, name: str) -> Iterator[IO[bytes] | None]:
        from google.api_core.exceptions import NotFound

        with self._bucket.reported("read", name), tempfile.TemporaryFile() as file:
            try:
                self._bucket.blob(name).download_to_file(file, checksum="crc32c")
            except NotFound:
                found = None
            else:
                found = file
                file.seek(0)
            yield found
