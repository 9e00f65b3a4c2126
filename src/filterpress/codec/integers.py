"""One integer as binary decisions, each in a context that depends on what is expected of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from filterpress.codec.arithmetic import (
    FRACTION_BITS,
    Coder,
    code_bit,
    code_bit_between,
    code_even_bits,
    compiled,
    inlined,
)
from filterpress.codec.contexts import (
    FLAGS,
    LENGTH,
    MAGNITUDE,
    NODE_OF,
    NODES,
    PREFIX,
    SHIFT_OF,
    SIGN,
    UNIT_BITS,
    UPPER_HALF,
    level_of,
)

UNLIMITED = 15
"""The largest magnitude of a tensor that stands for any larger one, too."""


@inlined
def code_integer(
    coder: Coder,
    contexts: NDArray[np.int32],
    largest: int,
    expected: int,
    prediction: int,
    value: int,
) -> tuple[Coder, int]:
    """Write ``value``, or read and return one, of this expected magnitude in 2**-13."""
    level = level_of(expected >> FRACTION_BITS)
    fraction = (expected >> max(level // 4 - 1, 0)) & ((1 << FRACTION_BITS) - 1)
    base = MAGNITUDE + NODE_OF[level]
    magnitude = abs(value)
    some = 1 if magnitude else 0
    coder, some = code_bit_between(coder, contexts, base, fraction, some)
    if some:
        strength, known = 0, abs(prediction) << UNIT_BITS
        while strength < 3 and known > expected << strength:
            strength += 1
        flip = 1 if prediction < 0 else 0
        coder, differs = code_bit(coder, contexts, SIGN + strength, (1 if value < 0 else 0) ^ flip)
        if strength:
            base += (1 + differs + (2 if strength > 1 else 0)) * FLAGS * NODES
        coder, magnitude = _code_magnitude(
            coder, contexts, largest, level, fraction, base, magnitude
        )
        value = -magnitude if differs ^ flip else magnitude
    else:
        value = 0
    return coder, value


@inlined
def _code_magnitude(
    coder: Coder,
    contexts: NDArray[np.int32],
    largest: int,
    level: int,
    fraction: int,
    base: int,
    magnitude: int,
) -> tuple[Coder, int]:
    """Write a magnitude over 0, or read and return one: its units, then where in the last."""
    shift = SHIFT_OF[level]
    rest = magnitude - 1
    units, more, found = rest >> shift, 1, 0
    limit = FLAGS - 1 if largest == UNLIMITED else (largest - 1) >> shift
    while found < limit and more:
        more = 1 if units > found else 0
        coder, more = code_bit_between(coder, contexts, base + (1 + found) * NODES, fraction, more)
        found += more
    flag = found
    if found == FLAGS - 1:
        coder, found = _code_exp_golomb(coder, contexts, units - found)
        found += FLAGS - 1
    if shift:
        low = rest & ((1 << shift) - 1)
        context = UPPER_HALF + flag * NODES + NODE_OF[level]
        upper = low >> (shift - 1)
        coder, upper = code_bit_between(coder, contexts, context, fraction, upper)
        coder, low = code_even_bits(coder, shift - 1, low & ((1 << shift - 1) - 1))
        found = (2 * found + upper << shift - 1) + low
    return coder, found + 1


@compiled
def _code_exp_golomb(coder: Coder, contexts: NDArray[np.int32], value: int) -> tuple[Coder, int]:
    """Write ``value``, or read and return one: the length of value + 1, then its bits."""
    length, more = 0, 1
    while length < PREFIX and more:
        coder, more = code_bit(
            coder, contexts, LENGTH + length, 1 if (value + 1) >> (length + 1) else 0
        )
        length += more
    coder, rest = code_even_bits(coder, length, (value + 1) & ((1 << length) - 1))
    return coder, (1 << length) + rest - 1
