"""Buckets of Google Cloud Storage, or of an emulator: what everything that uses one shares.

The client finds its own credentials; with ``STORAGE_EMULATOR_HOST`` set it needs none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from filterpress.errors import FilterpressError

if TYPE_CHECKING:
    from google.cloud import storage

_ADDRESS = re.compile(r"gs://([^/]+)(.*)")


def open_bucket(name: str, uri: str, error: type[FilterpressError]) -> Bucket | None:
    """Open the bucket at an address that may be one of a directory.

    Args:
        name: Name of the setting that holds the address.
        uri: Path of a directory, or ``gs://bucket/prefix``.
        error: What the bucket raises.

    Returns:
        The bucket, None for a directory. Nothing is read or written yet.

    Raises:
        ValueError: The address is neither.
        FilterpressError: Of the kind given: there is no way to reach buckets from here.

    Example:
        >>> open_bucket("store", "s3://bucket/models", FilterpressError)
        Traceback (most recent call last):
        ValueError: store must be a directory or gs://bucket/prefix, got 's3://bucket/models'
    """
    if uri and "://" not in uri:
        return None
    found = _ADDRESS.fullmatch(uri)
    if not found:
        raise ValueError(f"{name} must be a directory or gs://bucket/prefix, got {uri!r}")
    try:
        # Optional, and slow to import: only those who name a bucket pay for it.
        import google.cloud.storage  # noqa: F401  is it there?
    except ImportError as missing:
        raise error(
            f"{uri} needs google-cloud-storage: pip install 'filterpress[publish]'"
        ) from missing
    return Bucket(found[1], found[2].strip("/"), error)


class Bucket:
    """A prefix of a bucket, whose faults are errors of one line.

    Attributes:
        uri: The address, ``gs://bucket/prefix``.
    """

    def __init__(self, bucket: str, prefix: str, error: type[FilterpressError]) -> None:
        self.uri = f"gs://{bucket}/{prefix}".rstrip("/")
        self._name = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._error = error

    @cached_property
    def _bucket(self) -> storage.Bucket:
        return client().bucket(self._name)

    def blob(self, name: str) -> storage.Blob:
        """Return the object of a name, which need not exist."""
        return self._bucket.blob(self._prefix + name)

    def find(self, name: str) -> storage.Blob | None:
        """Return the object of a name with what the bucket knows of it, None if there is none."""
        return self._bucket.get_blob(self._prefix + name)

    def blobs(self) -> Iterator[tuple[str, storage.Blob]]:
        """Yield each name with its object."""
        for blob in self._bucket.list_blobs(prefix=self._prefix):
            yield blob.name.removeprefix(self._prefix), blob

    @contextmanager
    def reported(self, verb: str, name: str) -> Iterator[None]:
        """Turn what goes wrong in the block into one line.

        Args:
            verb: What the block does, read or write.
            name: The object it does it to.

        Raises:
            FilterpressError: Of the kind that the bucket was opened with.
        """
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import GoogleAuthError
        from google.cloud.storage.exceptions import DataCorruption

        try:
            yield
        except (GoogleAPIError, GoogleAuthError, DataCorruption, OSError) as error:
            reason = str(getattr(error, "message", "") or error or type(error).__name__)
            first = reason.strip().splitlines()[0].rstrip(":")
            raise self._error(f"cannot {verb} {self.uri}/{name}: {first}") from error


def is_emulated() -> bool:
    """Say whether buckets are those of an emulator."""
    return bool(os.environ.get("STORAGE_EMULATOR_HOST"))


def client() -> storage.Client:
    """Make a client of the buckets, or of their emulator."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    if is_emulated():
        anonymous = AnonymousCredentials()  # type: ignore[no-untyped-call]
        return storage.Client(project="emulator", credentials=anonymous)
    return storage.Client()
