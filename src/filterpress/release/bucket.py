"""Releases in a Google Cloud Storage bucket, or in an emulator of one."""

from __future__ import annotations

from google.api_core.exceptions import NotFound, PreconditionFailed

from filterpress.buckets import Bucket
from filterpress.release.store import ConflictError

_IMMUTABLE = "public, max-age=31536000, immutable"
# Without this, anything between the bucket and a reader may serve an old release for an hour.
_NO_STORE = "no-store"


class BucketStore:
    """A store under a prefix of a bucket; every upload has a precondition and a checksum.

    Attributes:
        uri: The address, ``gs://bucket/prefix``.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.uri = bucket.uri
        self._bucket = bucket

    def create(self, name: str, data: bytes) -> None:
        """Write a name that will never change; see `Store`."""
        self._upload(name, data, 0, _IMMUTABLE)

    def replace(self, name: str, data: bytes, generation: int) -> None:
        """Write a name that changes, if nobody changed it since it was read; see `Store`."""
        self._upload(name, data, generation, _NO_STORE)

    def read(self, name: str) -> tuple[bytes, int] | None:
        """Read a name; see `Store`."""
        with self._bucket.reported("read", name):
            while blob := self._bucket.find(name):
                try:
                    return blob.download_as_bytes(), blob.generation
                except NotFound:
                    continue  # replaced since it was found: this generation is gone
        return None

    def _upload(self, name: str, data: bytes, generation: int, cache_control: str) -> None:
        with self._bucket.reported("write", name):
            blob = self._bucket.blob(name)
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
