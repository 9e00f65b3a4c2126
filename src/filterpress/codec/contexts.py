"""The contexts of the coder: the levels that choose them, and the probabilities they begin with.

No context starts empty: the decisions on a magnitude begin with the probabilities of a logistic
distribution of the expected magnitude m, where a share of ``2 / (1 + 2**((2 n - 1) / m))`` is n or
more. Short tensors are then coded with what is known of weights in general.

A *level* is a magnitude in 1/32 on a scale of quarter octaves. Contexts belong to the beginnings of
levels, for what lies between two of them is coded with both. They depend on the unit in which
magnitudes are counted, so where that doubles, one level begins with two *nodes*.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from filterpress.codec import arithmetic
from filterpress.codec.arithmetic import FRACTION_BITS, PROBABILITY_BITS, compiled
from filterpress.codec.quantizer import two_to_the

LEVELS, FLAGS, PREFIX = 100, 15, 20
"""How many levels, contexts of "is it greater?" for each, and contexts of an Exp-Golomb length."""

_FIRST_SHIFTED = 22  # level from which on the unit is more than 1
SHIFT_OF = np.array([max(n - _FIRST_SHIFTED + 4, 0) // 4 for n in range(LEVELS)], np.int64)
"""Of each level, the binary logarithm of its unit."""

NODE_OF = np.arange(LEVELS) + SHIFT_OF
"""Of each level, the node it begins with in its unit; the next node is its end in that unit."""

NODES = int(NODE_OF[-1]) + 2
_AGREEMENTS = 5
MAGNITUDE = 0
UPPER_HALF = MAGNITUDE + _AGREEMENTS * NODES * FLAGS
SIGN = UPPER_HALF + NODES * FLAGS
LENGTH = SIGN + 4
ZERO_ROW = LENGTH + PREFIX
ZERO_COLUMN = ZERO_ROW + 5
_N_CONTEXTS = ZERO_COLUMN + 5

LEVEL_SCALE = 5
"""Levels are of magnitudes in 1/32."""

UNIT_BITS = LEVEL_SCALE + FRACTION_BITS
"""Expected magnitudes are in 2**-13, to tell `FRACTION_BITS` of the way through the least level."""

_PRIOR_COUNT = 32  # observations that the initial probabilities are worth
_LEAST_LEVEL = 10  # that tails begin with: where weights are rare, some are large all the same
_TABLE_BITS = 12


def find_level(magnitude: int) -> int:
    """Return the level of a magnitude in 1/32: itself if small, then in quarter octaves."""
    if magnitude < 4:
        return magnitude
    octave = magnitude.bit_length() - 1
    return 4 * (octave - 1) + (magnitude >> (octave - 2) & 3)


_LEVEL_OF = np.array([find_level(n) for n in range(1 << _TABLE_BITS)], np.int64)


def _beginning(level: int) -> int:
    """Return the least magnitude of a level in 1/32."""
    return level if level < 4 else (4 + level % 4) << (level // 4 - 1)


MIDDLES = np.array(
    [(_beginning(n) + _beginning(n + 1)) << (FRACTION_BITS - 1) for n in range(LEVELS)], np.int64
)
"""Of each level, the magnitude in its middle, in 2**-13."""


@compiled
def level_of(magnitude: int) -> int:
    """Return what `find_level` does for magnitudes up to 2**26, by a table."""
    if magnitude < 1 << _TABLE_BITS:
        return int(_LEVEL_OF[magnitude])
    if magnitude < 1 << 2 * _TABLE_BITS - 4:
        return int(_LEVEL_OF[magnitude >> 8]) + 32
    return int(_LEVEL_OF[magnitude >> 16]) + 64


def fresh_contexts() -> NDArray[np.int32]:
    """Return contexts as they are before anything is coded."""
    return _first_contexts().copy()


@cache
def _first_contexts() -> NDArray[np.int32]:
    half = 1 << (PROBABILITY_BITS - 1)
    ones, counts = np.full(_N_CONTEXTS, half, np.int64), np.zeros(_N_CONTEXTS, np.int64)
    counts[:SIGN] = _PRIOR_COUNT
    above, upper = np.array([_shares(level, shift) for level, shift in _nodes()]).transpose(1, 2, 0)
    ones[:UPPER_HALF] = np.tile(above.reshape(-1), _AGREEMENTS)
    ones[UPPER_HALF:SIGN] = upper.reshape(-1)
    return arithmetic.new_contexts(ones, counts)


def _nodes() -> list[tuple[int, int]]:
    """Return the level and the shift of each node."""
    own = list(enumerate(SHIFT_OF.tolist()))
    ends = [(level + 1, shift) for level, shift in own]
    return sorted({*own, *ends})


def _shares(level: int, shift: int) -> tuple[list[int], list[int]]:
    """Return, for each number of units, the shares of what is more, and in its upper half."""

    def unit(share: int, whole: int) -> int:
        limit = 1 << (PROBABILITY_BITS - 9)
        scaled = (share << PROBABILITY_BITS) // max(whole, 1)
        return min(max(scaled, limit), (1 << PROBABILITY_BITS) - limit)

    wide = max(level, _LEAST_LEVEL)
    starts = [1 + (n << shift) for n in range(FLAGS + 1)]
    tails = [_tail(start, wide) for start in starts]
    halves = [_tail(start + (1 << shift >> 1), wide) for start in starts[:-1]]
    above = [unit(_tail(1, level), 1 << 60)] + [unit(m, n) for n, m in pairwise(tails[:-1])]
    upper = [unit(h - m, n - m) for h, (n, m) in zip(halves, pairwise(tails), strict=True)]
    return above, upper


def _tail(n: int, level: int) -> int:
    """Return the share of magnitudes from ``n`` on in 2**-60, if a logistic level is expected."""
    exponent = ((2 * n - 1) << (LEVEL_SCALE + 8)) // max(_beginning(level), 1)
    power = two_to_the(exponent & 255, 8) << (exponent >> 8)  # in 2**-52
    return (2 << (60 + 52)) // ((1 << 52) + power)
