"""The vehicle: which release it runs, how it takes a new one, and how it goes back.

``check → download → verify → decode → inactive slot → trial → boot → good | bad``
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tuf.api.exceptions import (
    DownloadError,
    DownloadLengthMismatchError,
    RepositoryError,
    SlowRetrievalError,
)

from filterpress.errors import BitstreamError, ReleaseError
from filterpress.release.device import identity, state, trial
from filterpress.release.device.client import last_issue
from filterpress.release.device.offer import Offer, find_offer, obtain, open_client
from filterpress.release.device.slots import NAMES, Manifest, Slot
from filterpress.release.device.source import Limits, Source, open_source
from filterpress.release.device.state import State, Trial

_log = logging.getLogger(__name__)

_TRIES = 3
_SPARE_BYTES = 2**20

Examiner = Callable[[Path, Mapping[str, Any]], trial.Verdict]


class Outcome(StrEnum):
    """What an update came to."""

    STAGED = "staged"
    CURRENT = "current"
    WAITING = "waiting"
    KNOWN_BAD = "known bad"
    TRIAL_PENDING = "trial pending"


class Model(NamedTuple):
    """What a vehicle runs.

    Attributes:
        slot: Its name.
        path: ONNX file.
        manifest: What is known about it.
    """

    slot: str
    path: Path
    manifest: Manifest


class BusyError(ReleaseError):
    """Another process is at work in the folder of the vehicle."""


class RefusedError(ReleaseError):
    """What was offered is altered, old, too much or too slow: malice or damage."""


class Vehicle:
    """One vehicle and its folder.

    Attributes:
        home: The folder.
    """

    def __init__(
        self, home: Path, *, limits: Limits | None = None, examine: Examiner = trial.run
    ) -> None:
        self.home = home
        self._limits = limits or Limits()
        self._examine = examine

    @cached_property
    def identity(self) -> identity.Identity:
        """Who the vehicle is; what it runs does not depend on it."""
        return identity.load(self.home)

    def update(self, source: str | None = None) -> Outcome:
        """Fetch what the channel says and put it into the inactive slot, to be tried at next boot.

        Args:
            source: Where to read instead of the vehicle's store, such as an offline bundle.

        Returns:
            What it came to.

        Raises:
            RefusedError: What was offered cannot be trusted. The vehicle stays on its version.
            ReleaseError: It cannot be reached or installed. The vehicle stays on its version.
        """
        with self._alone():
            known = self._state()
            try:
                outcome = self._update(known, source or self.identity.store)
            except (RepositoryError, DownloadLengthMismatchError, SlowRetrievalError) as error:
                refused = RefusedError(f"refused: {_first_line(error)}")
                self._note(str(refused), attack=True)
                raise refused from error
            except (DownloadError, OSError, ReleaseError) as error:
                failed = ReleaseError(f"no update: {_first_line(error)}")
                self._note(str(failed), attack=False)
                raise failed from error
            if outcome in {Outcome.CURRENT, Outcome.WAITING}:
                self._note("", attack=False)
            return outcome

    def boot(self) -> Model | None:
        """Try a new release if there is one, and say what to run.

        While an update is at work elsewhere nothing is tried: what runs is what ran before.

        Returns:
            The newest release that has passed its trial and is intact; None if there is none.
        """
        try:
            with self._alone():
                known = self._state()
                with contextlib.suppress(OSError):
                    # A disk that cannot be written to: no trial, but the vehicle drives.
                    self._settle(known)
                return self._running(self._state())
        except BusyError:
            return self._running(self._state())

    def status(self) -> dict[str, Any]:
        """Say what runs and what happened last, signed by the vehicle.

        Returns:
            A report; see `identity.sign`.

        Raises:
            ReleaseError: The key of the vehicle is lost or damaged.
        """
        known = self._state()
        running = self._running(known)
        manifest = running.manifest if running else None
        return identity.sign(
            self.home,
            {
                "device_id": self.identity.device_id,
                "hardware": self.identity.hardware,
                "channel": self.identity.channel,
                "target": manifest.target if manifest else "",
                "sha256": manifest.sha256 if manifest else "",
                "release_counter": known.release_counter,
                "slot": running.slot if running else "",
                "trial": known.trial.sha256 if known.trial else "",
                "bad": list(known.bad),
                "time": max(int(time.time()), last_issue(self.home / "metadata")),
                "attack": known.attack,
                "error": known.error,
            },
        )

    # Update

    def _update(self, known: State, address: str) -> Outcome:
        with contextlib.closing(open_source(address, self._limits)) as source:
            return self._update_from(source, known)

    def _update_from(self, source: Source, known: State) -> Outcome:
        client = open_client(self.home, source, self._limits)
        client.refresh()
        me = self.identity
        offer = find_offer(client, source, self.home, me, known.release_counter, self._limits)
        rollout = offer.channel.rollout
        if known.trial:
            if known.trial.sha256 == offer.sha256 and not rollout.halted:
                return Outcome.TRIAL_PENDING
            # Halted, recalled or followed by another before the vehicle came to try it.
            known = replace(known, trial=None)
            self._save(known)
        if offer.sha256 in known.bad:
            return Outcome.KNOWN_BAD
        if self._has(offer, known):
            return Outcome.CURRENT
        if not rollout.includes(me.device_id, me.cohorts, client.reference_time):
            return Outcome.WAITING
        if shutil.disk_usage(self.home).free < offer.info.length + _SPARE_BYTES:
            raise OSError(errno.ENOSPC, "not enough space for the download")
        part = obtain(offer, client, source, self.home, self._released(), self._limits)
        return self._stage(known, offer, part)

    def _has(self, offer: Offer, known: State) -> bool:
        """Say whether the release runs already; its counter may have grown."""
        running = self._running(known)
        if running is None or running.manifest.sha256 != offer.sha256:
            return False
        counter, target = offer.channel.release_counter, offer.channel.target
        if running.manifest.release_counter < counter:
            renewed = replace(running.manifest, release_counter=counter, target=target)
            self._slot(running.slot).vouch(renewed)
        if known.release_counter < counter:
            self._save(replace(known, release_counter=counter))
        return True

    def _stage(self, known: State, offer: Offer, part: Path) -> Outcome:
        from filterpress.codec.graph import to_onnx  # here: it compiles, and a boot needs it not

        try:
            model = to_onnx(part.read_bytes())
        except MemoryError as error:
            # Perhaps the vehicle was busy: not the fault of the release.
            raise ReleaseError("there is not enough memory to decode the release") from error
        except BitstreamError as error:
            self._save(replace(known, bad=known.with_bad(offer.sha256)))
            raise ReleaseError(f"the release cannot be decoded: {error}") from error
        running = self._running(known)
        name = next(name for name in NAMES if not running or name != running.slot)
        slot = self._slot(name)
        slot.clear()
        slot.fill(part, model, offer.manifest(model))
        pending = Trial(slot=name, sha256=offer.sha256, tries=_TRIES)
        self._save(replace(known, trial=pending, error="", attack=False))  # the commit point
        return Outcome.STAGED

    def _released(self) -> list[bytes]:
        """Return the encoded files that are there."""
        return [data for name in NAMES if (data := self._slot(name).released()) is not None]

    # Boot

    def _settle(self, known: State) -> None:
        """Try what is to be tried: afterwards it is good, bad, or to be tried again."""
        pending = known.trial
        if not pending:
            return
        slot = self._slot(pending.slot)
        manifest = slot.intact()
        if not manifest or manifest.sha256 != pending.sha256:
            # Not the fault of the release: it may be fetched again.
            self._save(replace(known, trial=None, error="the new slot was damaged"))
            return
        verdict = trial.Verdict("no trial of it ended well", final=True)
        if pending.tries > 0:
            # Before the trial: whatever it does to the vehicle, it was counted.
            known = replace(known, trial=replace(pending, tries=pending.tries - 1))
            self._save(known)
            verdict = self._examine(slot.model, manifest.health)
        if not verdict.reason:
            slot.prove(manifest)
            counter = max(known.release_counter, manifest.release_counter)
            good = replace(known, good=pending.slot, release_counter=counter)
            self._save(replace(good, trial=None, error="", attack=False))
            return
        reason = f"release {manifest.release_counter} failed its trial: {verdict.reason}"
        _log.warning("%s", reason)
        if verdict.final:
            known = replace(known, trial=None, bad=known.with_bad(pending.sha256))
        self._save(replace(known, error=reason))

    def _running(self, known: State) -> Model | None:
        """Return what runs: the good slot, or the other one if that has rotted."""
        names = sorted(NAMES, key=lambda name: name != known.good)
        for name in names:
            slot = self._slot(name)
            manifest = slot.intact()
            if manifest and manifest.proven:
                if name != known.good:
                    _log.warning("slot %s is damaged: running slot %s", known.good, name)
                return Model(name, slot.model, manifest)
        return None

    # State

    def _state(self) -> State:
        return state.read(self.home / "state.json") or self._rebuilt()

    def _rebuilt(self) -> State:
        """Return the state that the manifests of the slots speak of."""
        proven = {
            name: manifest
            for name in NAMES
            if (manifest := self._slot(name).manifest()) and manifest.proven
        }
        newest = sorted(proven, key=lambda name: proven[name].release_counter)[-1:]
        counter = max((manifest.release_counter for manifest in proven.values()), default=0)
        good = newest[0] if newest else None
        return State(good=good, release_counter=counter, software=state.versions())

    def _save(self, new: State) -> None:
        state.write(self.home / "state.json", new)

    def _note(self, error: str, *, attack: bool) -> None:
        """Remember what went wrong, if the disk lets us; flash memory wears, so only news."""
        known = self._state()
        if (known.error, known.attack) != (error, attack):
            with contextlib.suppress(OSError):
                self._save(replace(known, error=error, attack=attack))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        # The folder itself is locked: that takes no file, so a disk that cannot be written to does.
        folder = os.open(self.home, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BusyError(f"{self.home} is being updated by another process") from error
            yield
        finally:
            os.close(folder)

    def _slot(self, name: str) -> Slot:
        return Slot(self.home / "slots" / name)


def _first_line(error: Exception) -> str:
    """Say what went wrong; some messages of the client go on to quote the whole metadata."""
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return (reason or type(error).__name__).partition("\n")[0][:200]
