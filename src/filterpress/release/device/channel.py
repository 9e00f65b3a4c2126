"""What a channel says: which release vehicles of one kind shall run, and which of them already."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tuf.api.exceptions import RepositoryError

from filterpress.release.names import COUNTER, MODEL, SCHEMA

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Which vehicles take part.

    Attributes:
        salt: Text that makes each rollout begin with other vehicles.
        percent_bp: Share of the fleet, in hundredths of a percent.
        cohorts: Groups whose vehicles all take part.
        not_before: When it begins; None for now.
        halted: Whether nobody takes part any more.
    """

    salt: str
    percent_bp: int
    cohorts: tuple[str, ...]
    not_before: datetime | None
    halted: bool

    def includes(self, device_id: str, cohorts: tuple[str, ...], now: datetime) -> bool:
        """Say whether a vehicle takes part.

        Args:
            device_id: Of the vehicle, random.
            cohorts: Groups that the vehicle belongs to.
            now: Reference time.

        Returns:
            Whether it does. With the same salt, who takes part at one share does at any greater.
        """
        if self.halted or (self.not_before and now < self.not_before):
            return False
        digest = hashlib.sha256(f"{self.salt}:{device_id}".encode()).digest()
        drawn = int.from_bytes(digest[:8]) % 10000
        return bool({*cohorts} & {*self.cohorts}) or drawn < self.percent_bp


@dataclass(frozen=True, kw_only=True)
class Channel:
    """What a channel says.

    Attributes:
        release_counter: Grows with every release of the store.
        target: Path of the encoded file.
        sha256: Its digest, in hexadecimal.
        n_bytes: Its length.
        deltas: Path of the delta from the file with the digest.
        rollout: Which vehicles take part.
        health: What a trial checks; see `filterpress.release.device.trial`.
    """

    release_counter: int
    target: str
    sha256: str
    n_bytes: int
    deltas: Mapping[str, str]
    rollout: Rollout
    health: Mapping[str, Any]


def parse(data: bytes, hardware: str, channel: str) -> Channel:
    """Read a channel file.

    Args:
        data: JSON, its signature verified.
        hardware: The channel must be for this hardware.
        channel: The channel must have this name.

    Returns:
        What it says.

    Raises:
        RepositoryError: It is not a channel file, or that of others.
    """
    try:
        found = json.loads(data)
        if found["schema"] != SCHEMA:
            raise ValueError(f"schema {found['schema']!r} is unknown")
        if (found["hardware"], found["channel"]) != (hardware, channel):
            raise ValueError(f"it is {found['hardware']}/{found['channel']}")
        return Channel(
            release_counter=_natural(found[COUNTER]),
            target=_matching(MODEL, found["target"]),
            sha256=_matching(_SHA256, found["sha256"]),
            n_bytes=_natural(found["n_bytes"]),
            deltas={
                _matching(_SHA256, delta["from_sha256"]): _matching(MODEL, delta["target"])
                for delta in found["deltas"]
            },
            rollout=_rollout(found["rollout"]),
            health=dict(found["health"]),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RepositoryError(f"the channel {hardware}/{channel} is unusable: {error}") from error


def _rollout(found: Mapping[str, Any]) -> Rollout:
    return Rollout(
        salt=str(found["salt"]),
        percent_bp=_natural(found["percent_bp"]),
        cohorts=tuple(map(str, found["cohorts"])),
        not_before=_moment(found["not_before"]),
        halted=found["halted"] is not False,
    )


def _moment(text: str) -> datetime | None:
    if not text:
        return None
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text} has no time zone")
    return moment


def _natural(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a whole number from 0")
    return value


def _matching(pattern: re.Pattern[str], text: str) -> str:
    if not pattern.fullmatch(text):
        raise ValueError(f"{text!r} is not of the form {pattern.pattern}")
    return text
