"""What a channel says: the fields of ``channels/<hardware>/<channel>.json``, as in ADR 0019."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from filterpress.errors import ReleaseError
from filterpress.release.names import SCHEMA, is_segment

Json = dict[str, Any]

STABLE = "stable"
ALL = 100.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """What a vehicle checks before it trusts a network.

    Attributes:
        seed: Of the images that it makes.
        count: Number of images, at least 1.
        atol: How far each output may be from that of the publisher.
        max_ms: Longest median time of one image, in milliseconds; 0 for no bound.
        max_mb: Most memory of the process that tries it, in MB; 0 for no bound.

    Raises:
        ValueError: A bound is one that no network could keep.
    """

    seed: int = 0
    count: int = 4
    atol: float = 1e-3
    max_ms: int = 0
    max_mb: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count!r}")
        for name in ("atol", "max_ms", "max_mb"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and from 0, got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class Channel:
    """What a channel says.

    Attributes:
        path: Of the channel in the store's signed list.
        content: Its fields.
        changed: Whether the call that returned this changed it.
    """

    path: str
    content: Json
    changed: bool


def parts_of(channel: str) -> tuple[str, str]:
    """Take a channel as it is written apart, into the kind of vehicle and its name.

    Raises:
        ValueError: It is not written as one.

    Example:
        >>> parts_of("truck/stable")
        ('truck', 'stable')
    """
    hardware, _, name = channel.partition("/")
    if not (hardware and name):
        raise ValueError(
            f"channel must be a kind of vehicle and a name, such as any/stable, got {channel!r}"
        )
    return hardware, name


def path_of(hardware: str, channel: str) -> str:
    """Return the path of a channel in a store.

    Raises:
        ValueError: A name cannot be part of a path.

    Example:
        >>> path_of("any", "stable")
        'channels/any/stable.json'
    """
    for name, value in (("hardware", hardware), ("channel", channel)):
        if not is_segment(value):
            raise ValueError(
                f"{name} must be letters, digits, '.', '_' and '-', not '.' first, got {value!r}"
            )
    return f"channels/{hardware}/{channel}.json"


def parse(path: str, data: bytes) -> Json:
    """Read the fields of a channel.

    Raises:
        ReleaseError: They are not those of this version.
    """
    try:
        content = json.loads(data)
    except ValueError as error:
        raise ReleaseError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ReleaseError(f"{path} must have the schema {SCHEMA}: update filterpress")
    return content


def terms(percent: float, cohorts: Sequence[str], not_before: str) -> Json:
    """Return who takes part from when, as a channel says it.

    Args:
        percent: Share of the vehicles, 0 to 100.
        cohorts: Names of groups that take part whatever the share is.
        not_before: A time with its zone as RFC 3339 writes it, or nothing.

    Raises:
        ValueError: An argument is outside these bounds.

    Example:
        >>> terms(12.5, ["test"], "")
        {'percent_bp': 1250, 'cohorts': ['test'], 'not_before': '', 'halted': False}
    """
    return {
        "percent_bp": basis_points(percent),
        "cohorts": _checked_cohorts(cohorts),
        "not_before": _checked_time(not_before),
        "halted": False,
    }


def basis_points(percent: float) -> int:
    """Return a share in hundredths of a per cent.

    Raises:
        ValueError: It is not from 0 to 100.

    Example:
        >>> basis_points(12.5)
        1250
    """
    if not 0 <= percent <= ALL:
        raise ValueError(f"percent must be from 0 to 100, got {percent!r}")
    return round(percent * 100)


def _checked_cohorts(cohorts: Sequence[str]) -> list[str]:
    if isinstance(cohorts, str) or not all(map(is_segment, cohorts)):
        raise ValueError(f"cohorts must be names of letters, digits, '_' and '-', got {cohorts!r}")
    return list(cohorts)


def _checked_time(text: str) -> str:
    try:
        known = not text or datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"not_before must be a time such as 2027-01-31T06:00:00Z, got {text!r}")
    return text
