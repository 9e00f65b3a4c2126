"""The reference client of The Update Framework, made to survive power cuts and wrong clocks."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from tuf.api.exceptions import ExpiredMetadataError, RepositoryError
from tuf.api.metadata import Metadata, Root, Timestamp
from tuf.ngclient import Updater

from filterpress import files
from filterpress.release.names import ISSUED


class DurableUpdater(Updater):
    """Updater whose metadata is on the disk when it says so, and whose time does not go back.

    The reference time is the later of the clock and of when the newest verified timestamp was
    issued. That one is kept with the timestamp and nowhere else: when the timestamp's key is
    replaced after a theft, what the thief said about the time goes with it.
    """

    @property
    def reference_time(self) -> datetime:
        """What time it is at least."""
        return self._trusted_set.reference_time

    def _persist_file(self, filename: str, data: bytes) -> None:
        # Flash memory wears: what has not changed is not written again.
        path = Path(filename)
        if not path.is_file() or path.read_bytes() != data:
            files.write(path, data)

    def _update_root_symlink(self) -> None:
        # A copy: the link of the base class is absent for a moment whenever it is renewed.
        version = self._trusted_set.root.version
        history = Path(self._dir, "root_history", f"{version}.root.json")
        self._persist_file(f"{self._dir}/root.json", history.read_bytes())

    def _load_timestamp(self) -> None:
        self._not_before(self._last_issued())
        super()._load_timestamp()
        self._not_before(issue_time(self._trusted_set.timestamp))
        if self._trusted_set.root.is_expired(self.reference_time):
            raise ExpiredMetadataError("root.json is expired")

    def _not_before(self, seconds: int) -> None:
        time = datetime.fromtimestamp(seconds, UTC)
        self._trusted_set.reference_time = max(self.reference_time, time)

    def _last_issued(self) -> int:
        try:
            data = self._load_local_metadata(Timestamp.type)
            return issue_time(verified_timestamp(data, self._trusted_set.root))
        except (OSError, RepositoryError):
            return 0


def verified_timestamp(data: bytes, root: Root) -> Timestamp:
    """Read a timestamp that may have expired.

    Args:
        data: The timestamp, as signed.
        root: Who may sign it.

    Returns:
        The timestamp.

    Raises:
        RepositoryError: It is none, or not signed by whom the root names.
    """
    metadata = Metadata[Timestamp].from_bytes(data)
    if not isinstance(metadata.signed, Timestamp):
        raise RepositoryError(f"expected timestamp, got {metadata.signed.type}")
    root.verify_delegate(Timestamp.type, metadata.signed_bytes, metadata.signatures)
    return metadata.signed


def issue_time(timestamp: Timestamp) -> int:
    """Say when a timestamp was issued.

    Args:
        timestamp: Verified.

    Returns:
        Seconds since 1970; 0 if it does not say.

    Raises:
        RepositoryError: It names no whole number of seconds, or a time after it expires.
    """
    issued = timestamp.unrecognized_fields.get(ISSUED, 0)
    if type(issued) is not int or not 0 <= issued <= timestamp.expires.timestamp():
        raise RepositoryError(f"the timestamp was issued at {issued!r}, which cannot be")
    return issued


def last_issue(folder: Path) -> int:
    """Say when the newest timestamp that a client verified was issued.

    Args:
        folder: Of the client's metadata.

    Returns:
        Seconds since 1970; 0 if there is none.
    """
    try:
        root = Metadata[Root].from_bytes((folder / "root.json").read_bytes()).signed
        return issue_time(verified_timestamp((folder / "timestamp.json").read_bytes(), root))
    except (OSError, RepositoryError):
        return 0
