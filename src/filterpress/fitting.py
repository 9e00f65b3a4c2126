"""Allocate, build and encode a network until its real file meets a budget.

The allocator knows what the weights take in the file, nearly; graph, header, biases and constants
come on top. What one file has more than was allocated is left free in the next.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import nn

from filterpress.allocation import Allocation, Option, Rates
from filterpress.errors import ModelError

log = logging.getLogger(__name__)

LARGEST_THETA = math.exp(60.0)  # at which bytes alone count
ATTEMPTS = 8  # sizes tried until the real one meets the budget
CLOSE = 0.985  # a file this close below the budget is good enough


class Goal(NamedTuple):
    """What a method makes a network smaller for."""

    max_bytes: int  # largest encoded file
    size: Callable[[nn.Module], int]  # bytes of the encoded file of a network
    avoid: frozenset[str] = frozenset()  # allocations, by `fingerprint`, that have failed before

    def is_met(self, network: nn.Module) -> bool:
        """Tell whether a network can stay as it is: its file fits, and none has failed."""
        return not self.avoid and self.size(network) <= self.max_bytes


class Attempt(NamedTuple):
    """A network that was built and encoded."""

    n_bytes: int  # of the file
    expected: float  # bytes, before it was built
    model: nn.Module
    allocation: Allocation


def fit_budget(rates: Rates, build: Callable[[Allocation], nn.Module], goal: Goal) -> Attempt:
    """Build networks from allocations until the file of one meets a budget.

    Args:
        rates: What every layer can become.
        build: Makes the network of an allocation.
        goal: What its file shall meet.

    Returns:
        The largest file found within the budget; where there is none, the smallest file.

    Raises:
        ModelError: Every allocation found is one to avoid.
    """
    max_bytes, size, avoid = goal
    target, beside = float(max_bytes), 0.0
    best: Attempt | None = None
    tried: list[tuple[object, ...]] = []
    for _ in range(ATTEMPTS):
        allocation = _spend(rates, target)
        if _name(allocation) in tried:
            # The target lies between two options of a layer: spend the rest on finer steps.
            allocation = _spend(rates, target, allocation.chosen)
        spent = allocation.total_bytes
        if fingerprint(allocation) in avoid:
            target = 0.95 * min(target, spent)  # the budget may not bind
            continue
        if _name(allocation) in tried:
            break  # nothing else will come
        tried.append(_name(allocation))
        new = _attempt(allocation, build, size, spent + beside)
        log.info("theta %.3g: %d bytes of %d", allocation.theta, new.n_bytes, max_bytes)
        log.debug("expected: %.0f bytes", new.expected)
        best = _better(best, new, max_bytes)
        if CLOSE * max_bytes <= new.n_bytes <= max_bytes:
            break
        beside = new.n_bytes - spent  # what the model of sizes leaves out
        target = max(max_bytes - beside, 0.5 * target)
        if new.n_bytes > max_bytes:
            target = min(target, (1 - 1e-6) * spent)  # of whole widths, much may be left unspent
    if best is None:
        raise ModelError("every allocation for this budget has failed before: change max_size")
    least = rates.allocate(LARGEST_THETA)
    unseen = _name(least) not in tried and fingerprint(least) not in avoid
    if best.n_bytes > max_bytes and unseen:
        expected = least.total_bytes + beside
        best = _better(best, _attempt(least, build, size, expected), max_bytes)
    return best


def _spend(rates: Rates, target: float, kept: Mapping[str, Option] | None = None) -> Allocation:
    """Allocate as many bytes as a target has, or a few less."""
    theta = meet(lambda t: rates.allocate(t, kept).total_bytes, target)
    return rates.allocate(theta, kept)


def meet(spend: Callable[[float], float], target: float) -> float:
    """Find the smallest ``theta`` at which no more than ``target`` bytes are spent.

    Args:
        spend: Function of ``theta`` that returns bytes, falling.
        target: Bytes, positive.

    Returns:
        ``theta``, to within 0.1 %; `LARGEST_THETA` where even that spends too much.
    """
    low, high = -math.log(LARGEST_THETA), math.log(LARGEST_THETA)
    for _ in range(40):
        middle = (low + high) / 2
        if spend(math.exp(middle)) > target:
            low = middle
        else:
            high = middle
        if high - low < 1e-3:
            break
    return math.exp(high)


def _name(allocation: Allocation) -> tuple[object, ...]:
    return allocation.forms, allocation.scale


def _attempt(
    allocation: Allocation,
    build: Callable[[Allocation], nn.Module],
    size: Callable[[nn.Module], int],
    expected: float,
) -> Attempt:
    model = build(allocation)
    return Attempt(size(model), expected, model, allocation)


def _better(best: Attempt | None, new: Attempt, max_bytes: int) -> Attempt:
    """Prefer the largest file within the budget, else the smallest one."""
    if best is None:
        return new
    fits = [attempt for attempt in (best, new) if attempt.n_bytes <= max_bytes]
    return max(fits, key=_bytes) if fits else min(best, new, key=_bytes)


def _bytes(attempt: Attempt) -> int:
    return attempt.n_bytes


def fingerprint(allocation: Allocation) -> str:
    """Name an allocation by what it does to each layer, steps to a tenth of an octave."""
    octaves = round(math.log2(allocation.scale) * 5)
    return hashlib.sha256(repr((allocation.forms, octaves)).encode()).hexdigest()[:16]
