"""What the store offers a vehicle: found, verified, and fetched with as few bytes as will do."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuf.api.exceptions import DownloadError, LengthOrHashMismatchError, RepositoryError
from tuf.api.metadata import TargetFile

from filterpress import files
from filterpress.errors import BitstreamError, ReleaseError
from filterpress.release.device import channel
from filterpress.release.device.channel import Channel
from filterpress.release.device.client import DurableUpdater
from filterpress.release.device.download import download
from filterpress.release.device.identity import ROOT, Identity
from filterpress.release.device.slots import Manifest
from filterpress.release.device.source import Limits, MetadataFetcher, Source
from filterpress.release.names import ANY, COUNTER, HARDWARE, MAX_CHANNEL

_log = logging.getLogger(__name__)

_MAX_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A release that a channel names and that fits the vehicle.

    Attributes:
        channel: What the channel says.
        info: What is signed about the encoded file.
    """

    channel: Channel
    info: TargetFile

    @property
    def sha256(self) -> str:
        """Digest of the encoded file."""
        return self.channel.sha256

    def manifest(self, model: bytes) -> Manifest:
        """Return what vouches for the release in a slot.

        Args:
            model: The ONNX model made of the encoded file.

        Returns:
            The manifest; nothing is proven yet.
        """
        return Manifest(
            sha256=self.sha256,
            model_sha256=hashlib.sha256(model).hexdigest(),
            release_counter=self.channel.release_counter,
            target=self.channel.target,
            health=self.channel.health,
        )


def open_client(home: Path, source: Source, limits: Limits) -> DurableUpdater:
    """Return the client of a vehicle, which trusts the root that the vehicle was set up with.

    Args:
        home: Folder of the vehicle.
        source: Where to read.
        limits: For each file of metadata.

    Returns:
        The client, to be refreshed.

    Raises:
        ReleaseError: The root is lost.
        RepositoryError: The root is damaged.
        OSError: The folder cannot be written.
    """
    try:
        root = (home / ROOT).read_bytes()
    except FileNotFoundError as error:
        raise ReleaseError(f"{home / ROOT} is lost: without it nothing can be trusted") from error
    return DurableUpdater(
        str(home / "metadata"),
        "metadata/",
        fetcher=MetadataFetcher(source, limits),
        bootstrap=root,
    )


def find_offer(
    client: DurableUpdater, source: Source, home: Path, me: Identity, counter: int, limits: Limits
) -> Offer:
    """Find the release that a vehicle's channel names.

    Args:
        client: Refreshed.
        source: Where to read the channel file, unless the vehicle has it already.
        home: Folder of the vehicle.
        me: Who it is.
        counter: Lower release counters are refused.
        limits: For the download.

    Returns:
        The release.

    Raises:
        RepositoryError: The channel and what is signed about its release disagree, the release is
            for other hardware, or older than what the vehicle had.
        DownloadError: The channel cannot be had.
        ReleaseError: There is no such channel.
        OSError: The folder cannot be written.
    """
    name = f"channels/{me.hardware}/{me.channel}.json"
    listed = client.get_targetinfo(name)
    if listed is None:
        raise ReleaseError(f"the store has no {name}")
    if listed.length > MAX_CHANNEL:
        raise RepositoryError(f"{name} has {listed.length} bytes")
    kept = home / "channel.json"
    if not _holds(kept, listed):
        part = _part(home, listed)
        download(source, listed, part, limits)
        part.replace(kept)
        files.sync(home)
    found = channel.parse(kept.read_bytes(), me.hardware, me.channel)
    if found.release_counter < counter:
        raise RepositoryError(f"release {found.release_counter} is older than {counter}")
    info = client.get_targetinfo(found.target)
    if info is None:
        raise RepositoryError(f"nobody who may release signed {found.target}")
    _check_agreement(found, info, me.hardware)
    return Offer(channel=found, info=info)


def obtain(
    offer: Offer,
    client: DurableUpdater,
    source: Source,
    home: Path,
    at_hand: Sequence[bytes],
    limits: Limits,
) -> Path:
    """Put the encoded file of a release into the staging folder.

    Args:
        offer: The release.
        client: Refreshed; it knows what is signed about deltas.
        source: Where to read.
        home: Folder of the vehicle.
        at_hand: Encoded files that the vehicle has: the release itself, or what a delta changes.
        limits: For the downloads.

    Returns:
        The file, on the disk and verified.

    Raises:
        DownloadError: It cannot be had.
        LengthOrHashMismatchError: What came is not what was signed.
        OSError: The folder cannot be written.
    """
    part = _part(home, offer.info)
    if not _holds(part, offer.info):
        deltas = [
            (old, offer.channel.deltas[digest])
            for old in at_hand
            if (digest := hashlib.sha256(old).hexdigest()) in offer.channel.deltas
        ]
        listed = [(old, info) for old, path in deltas for info in _listed(client, path)]
        _tidy(home, {part, *(_part(home, info) for _, info in listed)})
        made = _at_hand(offer, at_hand) or _patched(offer, listed, source, home, limits)
        if made is None:
            download(source, offer.info, part, limits)
        else:
            files.write(part, made)
    _tidy(home, {part})
    return part


def _check_agreement(found: Channel, info: TargetFile, hardware: str) -> None:
    custom = info.custom or {}
    signed = (custom.get(COUNTER), info.hashes.get("sha256"), info.length)
    if signed != (found.release_counter, found.sha256, found.n_bytes):
        raise RepositoryError(f"the channel and the release disagree about {found.target}")
    if not {ANY, hardware} & {*custom.get(HARDWARE, [])}:
        raise RepositoryError(f"{found.target} is not for {hardware}")
    if info.length > _MAX_BYTES:
        raise RepositoryError(f"{found.target} has {info.length} bytes")


def _listed(client: DurableUpdater, path: str) -> Iterator[TargetFile]:
    """Yield what is signed about a delta, if anything is."""
    try:
        info = client.get_targetinfo(path)
    except (DownloadError, RepositoryError) as error:
        _log.warning("no delta: %s", error)
        return
    if info is not None and "sha256" in info.hashes:
        yield info


def _at_hand(offer: Offer, at_hand: Sequence[bytes]) -> bytes | None:
    return next((old for old in at_hand if _is(offer.info, old)), None)


def _patched(
    offer: Offer,
    deltas: Sequence[tuple[bytes, TargetFile]],
    source: Source,
    home: Path,
    limits: Limits,
) -> bytes | None:
    """Make the release from an old file and a delta; None if that fails, in whatever way."""
    from filterpress.codec import apply_delta  # here: it compiles, and most polls need it not

    for old, info in deltas:
        if info.length >= offer.info.length:
            continue
        try:
            part = _part(home, info)
            download(source, info, part, limits)
            new = apply_delta(old, part.read_bytes())
            if _is(offer.info, new):
                return new
            raise BitstreamError("it makes another file than the signed one")
        except (DownloadError, RepositoryError, BitstreamError, MemoryError) as error:
            _log.warning("the delta does not help, fetching the whole file: %s", error)
    return None


def _part(home: Path, info: TargetFile) -> Path:
    return home / "staging" / f"{info.hashes['sha256']}.part"


def _tidy(home: Path, keep: Collection[Path]) -> None:
    """Remove downloads that nobody needs any more, so that they stay away after a power cut."""
    folder = home / "staging"
    for path in set(folder.iterdir()) - set(keep):
        path.unlink()
        files.sync(folder)


def _holds(path: Path, info: TargetFile) -> bool:
    try:
        return _is(info, path.read_bytes())
    except FileNotFoundError:
        return False


def _is(info: TargetFile, data: bytes) -> bool:
    try:
        info.verify_length_and_hashes(data)
    except LengthOrHashMismatchError:
        return False
    return True
