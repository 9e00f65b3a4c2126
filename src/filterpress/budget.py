"""Thresholds, and the one function that decides what happens next.

A run has two thresholds: the size of the encoded file, in bytes, and the accuracy, a fraction.
Users write them absolutely or against the trained network (``12x``, ``-0.5pp``); `parse_size` and
`parse_accuracy` turn what was written into the absolute number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Decision = Literal["publish", "retrain", "next", "give-up", "too-big"]

SMALLEST = "smallest"  # in place of a size: the smallest file that keeps the floor
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_ACCURACY = re.compile(r"([+-]?)(\d+(?:\.\d+)?)\s*(pp)?")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The thresholds of a run and how often it may try.

    Attributes:
        max_bytes: Largest encoded file, in bytes.
        min_accuracy: Smallest accuracy on the validation set, in [0, 1].
        max_rounds: Rounds of cluster, reduce and retrain.
        max_retrains: Retrains in a round.
    """

    max_bytes: int
    min_accuracy: float
    max_rounds: int = 3
    max_retrains: int = 3

    def __post_init__(self) -> None:
        if self.max_bytes <= 0:
            raise ValueError(f"max_bytes must be positive, got {self.max_bytes}")
        if not 0 <= self.min_accuracy <= 1:
            raise ValueError(f"min_accuracy must be in [0, 1], got {self.min_accuracy}")
        if self.max_rounds < 1:
            raise ValueError(f"max_rounds must be at least 1, got {self.max_rounds}")
        if self.max_retrains < 0:
            raise ValueError(f"max_retrains must be at least 0, got {self.max_retrains}")


def parse_size(text: str | int, baseline_bytes: int) -> int:
    """Turn a written size into bytes.

    Args:
        text: Bytes (``300000``), a decimal or binary unit (``300KB``, ``300KiB``), or a ratio of
            the float32 weights (``12x``).
        baseline_bytes: Bytes of the float32 weights, for a ratio.

    Returns:
        The size in whole bytes, rounded down, at least 1.

    Raises:
        ValueError: The text is none of these, or the size is not positive.

    Example:
        >>> parse_size("12x", 120_000), parse_size("300KiB", 0), parse_size("1.5KB", 0)
        (10000, 307200, 1500)
    """
    rule = "max_size must be bytes, like 300KB, 300KiB or 12x, or smallest"
    match = _SIZE.fullmatch(str(text).strip())
    if not match:
        raise ValueError(f"{rule}, got {text!r}")
    number, unit = float(match[1]), match[2].upper()
    if number <= 0:
        raise ValueError(f"{rule}, and positive, got {text!r}")
    if unit == "X":
        return max(1, int(baseline_bytes / number))
    if unit not in _UNITS:
        raise ValueError(f"{rule}, got {text!r}")
    return max(1, int(number * _UNITS[unit]))


def check_spelling(max_size: str, min_accuracy: str) -> None:
    """Refuse thresholds that are not written as such, before there is a network to take them of.

    Args:
        max_size: As for `parse_size`, or `SMALLEST`.
        min_accuracy: As for `parse_accuracy`.

    Raises:
        ValueError: One of them breaks its rule.
    """
    if max_size != SMALLEST:
        parse_size(max_size, baseline_bytes=10**9)
    parse_accuracy(min_accuracy, baseline=1.0)


def parse_accuracy(text: str | float, baseline: float) -> float:
    """Turn a written accuracy floor into a fraction.

    Args:
        text: A fraction (``0.92``) or percentage points against the baseline (``-0.5pp``).
        baseline: Accuracy of the trained network, in [0, 1].

    Returns:
        The floor, in [0, 1].

    Raises:
        ValueError: The text is neither, or the floor lies outside [0, 1] or above the baseline.

    Example:
        >>> parse_accuracy("0.92", 0.95), round(parse_accuracy("-0.5pp", 0.95), 4)
        (0.92, 0.945)
    """
    rule = "min_accuracy must be a fraction like 0.92 or points below the trained model like -0.5pp"
    match = _ACCURACY.fullmatch(str(text).strip())
    if not match or (match[1] and not match[3]):
        raise ValueError(f"{rule}, got {text!r}")
    number = float(match[1] + match[2])
    floor = baseline + number / 100 if match[3] else number
    if not 0 <= floor <= 1:
        raise ValueError(f"{rule}, in [0, 1], got {text!r}")
    if floor > baseline:
        raise ValueError(
            f"min_accuracy must not be above the trained model's {baseline:.4f}, got {text!r}"
        )
    return floor


def decide(budget: Budget, *, n_bytes: int, accuracy: float, round: int, retrains: int) -> Decision:
    """Say what a run does next with the network it has.

    Args:
        budget: Thresholds and bounds.
        n_bytes: Size of the encoded file.
        accuracy: Validation accuracy of the decoded file.
        round: Number of this round, from 1.
        retrains: Retrains already done in this round.

    Returns:
        ``publish`` when both thresholds hold; ``too-big`` when the file is over the budget, which
        retraining cannot mend; otherwise ``retrain`` while the round has retrains left, ``next``
        while there are rounds left, then ``give-up``. Without retrains there is nothing that a
        further round could start from: the first one decides.

    Example:
        >>> b = Budget(max_bytes=100, min_accuracy=0.9, max_rounds=2, max_retrains=1)
        >>> decide(b, n_bytes=90, accuracy=0.8, round=1, retrains=0)
        'retrain'
        >>> decide(b, n_bytes=90, accuracy=0.8, round=1, retrains=1)
        'next'
    """
    if n_bytes > budget.max_bytes:
        return "too-big"
    if accuracy >= budget.min_accuracy:
        return "publish"
    if retrains < budget.max_retrains:
        return "retrain"
    return "next" if budget.max_retrains > 0 and round < budget.max_rounds else "give-up"
