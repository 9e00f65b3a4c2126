"""Releases in a Google Cloud Storage bucket, or in an emulator of one.

The client finds its own credentials; with ``STORAGE_EMULATOR_HOST`` set it needs none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

from google.api_core.exceptions import GoogleAPIError, NotFound, PreconditionFailed
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import GoogleAuthError
from google.cloud import storage
from google.cloud.storage.exceptions import DataCorruption

from filterpress.errors import ReleaseError
from filterpress.release.store import ConflictError, is_emulated

_IMMUTABLE = "public, max-age=31536000, immutable"
# Without this, anything between the bucket and a reader may serve an old release for an hour.
_NO_STORE = "no-store"


class BucketStore:
    """A store under a prefix of a bucket; every upload has a precondition and a checksum.

    Attributes:
        uri: The address, ``gs://bucket/prefix``.
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        self.uri = f"gs://{bucket}/{prefix}".rstrip("/")
        self._name = bucket
        self._prefix = f"{prefix}/" if prefix else ""

    @cached_property
    def _bucket(self) -> storage.Bucket:
        return _client().bucket(self._name)

    def create(self, name: str, data: bytes) -> None:
        """Write a name that will never change; see `Store`."""
        self._upload(name, data, 0, _IMMUTABLE)

    def replace(self, name: str, data: bytes, generation: int) -> None:
        """Write a name that changes, if nobody changed it since it was read; see `Store`."""
        self._upload(name, data, generation, _NO_STORE)

    def read(self, name: str) -> tuple[bytes, int] | None:
        """Read a name; see `Store`."""
        with self._reported("read", name):
            while blob := self._bucket.get_blob(self._prefix + name):
                try:
                    return blob.download_as_bytes(), blob.generation
                except NotFound:
                    continue  # replaced since get_blob: this generation is gone
        return None

    def _upload(self, name: str, data: bytes, generation: int, cache_control: str) -> None:
        with self._reported("write", name):
            blob = self._bucket.blob(self._prefix + name)
            blob.cache_control = cache_control
            try:
                blob.upload_from_string(
                    data,
                    content_type="application/octet-stream",
                    if_generation_match=generation,
                    checksum="crc32c",
                )
            except PreconditionFailed as error:
                # When a response is lost the client sends again, and meets its own first upload.
                found = self.read(name)
                if found is None or found[0] != data:
                    raise ConflictError(f"{self.uri}/{name} was written by someone else") from error

    @contextmanager
    def _reported(self, verb: str, name: str) -> Iterator[None]:
        try:
            yield
        except (GoogleAPIError, GoogleAuthError, DataCorruption, OSError) as error:
            reason = str(getattr(error, "message", "") or error or type(error).__name__)
            raise ReleaseError(
                f"cannot {verb} {self.uri}/{name}: {reason.splitlines()[0]}"
            ) from error


def _client() -> storage.Client:
    if is_emulated():
        anonymous = AnonymousCredentials()  # type: ignore[no-untyped-call]
        return storage.Client(project="emulator", credentials=anonymous)
    return storage.Client()
