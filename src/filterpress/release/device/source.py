"""Where a vehicle reads from: a store over HTTP, a directory, or an offline bundle.

Nothing that is read here is trusted, nor is whoever sends it: he may send too much, too slowly, or
without end. A name is that of a file in the store, such as ``metadata/timestamp.json``.
"""

from __future__ import annotations

import contextlib
import re
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, cast

import urllib3
from tuf.api.exceptions import (
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    SlowRetrievalError,
)
from tuf.ngclient import FetcherInterface
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.response import HTTPResponse

from filterpress.errors import ReleaseError
from filterpress.release.names import MAX_METADATA

_CHUNK = 2**16
_RANGE = re.compile(r"bytes (\d+)-")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a vehicle is patient.

    Attributes:
        silence_s: For a connection, for the whole head of an answer, and between two bytes.
        metadata_s: For one file of metadata, to its end.
        grace_s: While a download may be slower than `bytes_per_s`.
        bytes_per_s: The least mean rate of a download after that.
    """

    silence_s: float = 10
    metadata_s: float = 60
    grace_s: float = 20
    bytes_per_s: float = 1024


class Source(Protocol):
    """Somewhere to read from, one file after another."""

    def read(self, name: str, start: int = 0) -> tuple[int, Iterator[bytes]]:
        """Read a file.

        Args:
            name: Of the file.
            start: Position to begin at, if the source can.

        Returns:
            The position of the first byte, 0 or ``start``, and the bytes in pieces.

        Raises:
            DownloadError: The file cannot be read; also while the pieces are taken.
        """

    def close(self) -> None:
        """Let go of connections and files."""


def open_source(address: str, limits: Limits) -> Source:
    """Open a source.

    Args:
        address: URL of a store (http or https), path of a directory with the files of a store, or
            path of an uncompressed tar file of them.
        limits: For what comes over a network.

    Returns:
        The source.

    Raises:
        ValueError: The address is none of these.
        ReleaseError: There is no such directory or file.
    """
    if re.match("https?://", address):
        return HttpSource(address.rstrip("/") + "/", limits)
    if "://" in address:
        raise ValueError(f"store must be http(s)://..., a directory or a tar file, got {address!r}")
    path = Path(address)
    if path.is_dir():
        return DirectorySource(path)
    if path.is_file():
        return BundleSource(path)
    raise ReleaseError(f"{address} is neither a directory nor a tar file")


@contextlib.contextmanager
def _cut_off(connection: HTTPConnection) -> Iterator[None]:
    """Cut a connection that is busy for too long; a timeout would start anew with each byte."""

    def cut() -> None:
        with contextlib.suppress(OSError):
            # Of the socket, not of the TLS session on it: another thread is using that.
            socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)

    timer = threading.Timer(cast(float, connection.timeout), cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _HttpConnection(HTTPConnection):
    def getresponse(self) -> HTTPResponse:  # type: ignore[override]  # as urllib3 has it
        """Return the answer once its head is complete."""
        with _cut_off(self):
            return super().getresponse()


class _HttpsConnection(HTTPSConnection):
    def getresponse(self) -> HTTPResponse:  # type: ignore[override]  # as urllib3 has it
        """Return the answer once its head is complete."""
        with _cut_off(self):
            return super().getresponse()


class _HttpPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _HttpConnection


class _HttpsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _HttpsConnection


class HttpSource:
    """Files below a URL. Redirects and encodings of the content are refused."""

    def __init__(self, base: str, limits: Limits) -> None:
        self._base = base
        self._pools = urllib3.PoolManager(
            retries=False, timeout=urllib3.Timeout(limits.silence_s), num_pools=2
        )
        self._pools.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}
        self._answer: urllib3.BaseHTTPResponse | None = None

    def close(self) -> None:
        """Close what is open."""
        self._hang_up()
        self._pools.clear()

    def _hang_up(self) -> None:
        """Do without the rest of the last answer, if there is one."""
        if self._answer:
            self._answer.close()

    def read(self, name: str, start: int = 0) -> tuple[int, Iterator[bytes]]:
        """Read a file; see `Source`."""
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        self._hang_up()
        with _reported(name):
            self._answer = self._pools.request(
                "GET", self._base + name, headers=headers, preload_content=False
            )
        return _first_position(name, start, self._answer), _body(name, self._answer)


def _first_position(name: str, start: int, response: urllib3.BaseHTTPResponse) -> int:
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise DownloadError(f"{name} comes encoded as {encoding}")
    if response.status == 200:
        return 0
    found = _RANGE.match(response.headers.get("Content-Range", ""))
    if response.status == 206 and found and int(found[1]) == start:
        return start
    raise DownloadHTTPError(f"{name}: HTTP status {response.status}", response.status)


def _body(name: str, response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    with _reported(name):
        # What has arrived; `stream` would wait for a whole piece, however slowly it comes.
        while chunk := response.read1(_CHUNK, decode_content=False):
            yield chunk


@contextlib.contextmanager
def _reported(name: str) -> Iterator[None]:
    try:
        yield
    except urllib3.exceptions.TimeoutError as error:
        raise SlowRetrievalError(f"{name}: {error}") from error
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise DownloadError(f"{name}: {error}") from error


class DirectorySource:
    """Files in a directory."""

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()

    def close(self) -> None:
        """Nothing stays open."""

    def read(self, name: str, start: int = 0) -> tuple[int, Iterator[bytes]]:
        """Read a file; see `Source`. What lies outside the directory is not there."""
        path = (self._path / name).resolve()
        if not path.is_relative_to(self._path) or not path.is_file():
            raise DownloadHTTPError(f"{path} is missing", 404)
        try:
            return start, _pieces(name, path.open("rb"), start)
        except OSError as error:
            raise DownloadError(f"{path}: {error.strerror}") from error


class BundleSource:
    """Files in a tar file, read where they lie: nothing is unpacked."""

    def __init__(self, path: Path) -> None:
        try:
            self._tar = tarfile.open(path, "r:")  # noqa: SIM115 (open as long as this is)
            self._members = {m.name.removeprefix("./"): m for m in self._tar if m.isfile()}
        except (tarfile.TarError, ValueError, OSError) as error:
            raise ReleaseError(f"{path} must be an uncompressed tar file: {error}") from error

    def close(self) -> None:
        """Close the tar file."""
        self._tar.close()

    def read(self, name: str, start: int = 0) -> tuple[int, Iterator[bytes]]:
        """Read a file; see `Source`."""
        member = self._members.get(name)
        file = self._tar.extractfile(member) if member else None
        if file is None:
            raise DownloadHTTPError(f"the bundle has no {name}", 404)
        return start, _pieces(name, file, start)


def _pieces(name: str, file: IO[bytes], start: int) -> Iterator[bytes]:
    with file:
        try:
            file.seek(start)
            while chunk := file.read(_CHUNK):
                yield chunk
        except (OSError, tarfile.TarError) as error:
            raise DownloadError(f"{name}: {error}") from error


class MetadataFetcher(FetcherInterface):
    """Lets the reference client read from a source, for so long and no longer."""

    def __init__(self, source: Source, limits: Limits) -> None:
        self._source = source
        self._limits = limits

    def _fetch(self, url: str) -> Iterator[bytes]:
        end = time.monotonic() + self._limits.metadata_s
        _, chunks = self._source.read(url)
        return _until(end, url, chunks)

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Download a file of metadata into memory.

        The base class goes by way of a temporary file; not every vehicle has a place for those.
        """
        most, data = min(max_length, MAX_METADATA), b""
        for chunk in self.fetch(url):
            data += chunk
            if len(data) > most:
                raise DownloadLengthMismatchError(f"{url}: a body exceeding {most} bytes")
        return data


def _until(end: float, name: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        if time.monotonic() > end:
            raise SlowRetrievalError(f"{name} takes too long")
        yield chunk
