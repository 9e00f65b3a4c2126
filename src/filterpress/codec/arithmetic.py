"""Adaptive binary arithmetic coder in integer arithmetic.

One function, `code_bit`, serves both directions: an encoder writes the bit it is given, a decoder
ignores that argument and returns the bit it reads. Code that turns values into bits is therefore
written once and cannot disagree with itself.

The coder is a range coder with byte-wise renormalisation: 32-bit range, carries propagated into
the bytes already written. The probability of a bit is the mean of two estimates, one that adapts
fast and one that adapts slowly; both start with the steps of a plain average, 1/2, 1/3, 1/4, …, so
that short streams learn quickly.

numba does not check bounds. Every access here is to an index that is bounded by construction:
reads past the end give zeros, writes past the end are counted and dropped, and contexts are
computed from clipped values.

Reference:
    G. N. N. Martin, "Range encoding", 1979; D. Marpe et al., "Context-based adaptive binary
    arithmetic coding in the H.264/AVC video compression standard", 2003. The probabilities are
    multiplied, not looked up, and have two speeds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

_Function = TypeVar("_Function", bound=Callable[..., Any])

FAST_LIMIT, SLOW_LIMIT = 64, 400
"""Observations over which the two estimates of a probability average."""

END_BYTES = 4
"""Bytes that a decoder looks ahead, and so the most that may lie past the end of its data."""

_TOP, _BOTTOM = 1 << 32, 1 << 24
_ONE, _HALF, _MARGIN = 1 << 16, 1 << 15, 32
_VALUE, _RANGE, _POSITION, _DECODING = range(4)
_FAST, _SLOW, _COUNT = range(3)


def _rates(limit: int) -> NDArray[np.int64]:
    return np.array([_ONE // min(n + 2, limit) for n in range(SLOW_LIMIT)], np.int64)


_FAST_RATES, _SLOW_RATES = _rates(FAST_LIMIT), _rates(SLOW_LIMIT)


def compiled(function: _Function) -> _Function:
    """Compile with numba, once per machine, and keep the type that the source declares.

    numba's cache knows the file of a function, not the files of those it calls: delete
    ``__pycache__`` after an edit here, or `binarisation` goes on with the code of before.
    """
    return cast(_Function, njit(cache=True)(function))


class Coder(NamedTuple):
    """State of one direction of the coder.

    Attributes:
        state: int64: the low end of the interval (encoder) or the offset of the data in it
            (decoder); the range; the position in ``data``; 1 when decoding.
        data: uint8, the bytes written or read. ``position`` counts on past its end.
    """

    state: NDArray[np.int64]
    data: NDArray[np.uint8]


def new_contexts(n_contexts: int) -> NDArray[np.int64]:
    """Return untrained contexts: (n_contexts, 3) of two probabilities of a one and a count."""
    contexts = np.full((n_contexts, 3), _HALF, np.int64)
    contexts[:, _COUNT] = 0
    return contexts


def new_encoder(capacity: int) -> Coder:
    """Return an encoder that keeps at most ``capacity`` bytes."""
    state = np.array([0, _TOP, 0, 0], np.int64)
    return Coder(state, np.zeros(capacity, np.uint8))


def new_decoder(data: bytes) -> Coder:
    """Return a decoder of what `finish` returned."""
    head = int.from_bytes(data[:END_BYTES].ljust(END_BYTES, b"\0"), "big")
    state = np.array([head, _TOP, END_BYTES, 1], np.int64)
    return Coder(state, np.frombuffer(bytearray(data), np.uint8))


@compiled
def code_bit(coder: Coder, contexts: NDArray[np.int64], index: int, bit: int) -> int:
    """Write ``bit``, or read and return one, with the probability of a context, which adapts."""
    one = (contexts[index, _FAST] + contexts[index, _SLOW]) >> 1
    bit = _divide(coder, (coder.state[_RANGE] * (_ONE - one)) >> 16, bit)
    count = contexts[index, _COUNT]
    target = _ONE - _MARGIN if bit else _MARGIN
    contexts[index, _FAST] += ((target - contexts[index, _FAST]) * _FAST_RATES[count]) >> 16
    contexts[index, _SLOW] += ((target - contexts[index, _SLOW]) * _SLOW_RATES[count]) >> 16
    contexts[index, _COUNT] = min(count + 1, SLOW_LIMIT - 1)
    return bit


@compiled
def code_even_bit(coder: Coder, bit: int) -> int:
    """Write ``bit``, or read and return one, at a cost of exactly one bit."""
    return _divide(coder, coder.state[_RANGE] >> 1, bit)


@compiled
def past_end(coder: Coder) -> bool:
    """Say whether a decoder has read more than its data can have held."""
    state = coder.state
    return bool(state[_DECODING] == 1 and state[_POSITION] > coder.data.size + END_BYTES)


@compiled
def _divide(coder: Coder, bound: int, bit: int) -> int:
    """Narrow the interval: zero is its first ``bound`` values, one the rest."""
    state = coder.state
    if state[_DECODING]:
        bit = 1 if state[_VALUE] >= bound else 0
        if bit:
            state[_VALUE] -= bound
    elif bit:
        state[_VALUE] += bound
    state[_RANGE] = state[_RANGE] - bound if bit else bound
    while state[_RANGE] < _BOTTOM:
        state[_RANGE] <<= 8
        if state[_DECODING]:
            state[_VALUE] = (state[_VALUE] << 8) | _next_byte(coder)
        else:
            _shift_out(coder)
    return bit


@compiled
def _next_byte(coder: Coder) -> int:
    position = coder.state[_POSITION]
    coder.state[_POSITION] = position + 1
    return int(coder.data[position]) if position < coder.data.size else 0


@compiled
def _shift_out(coder: Coder) -> None:
    """Move the top byte of the low end to the data, with the carry above it, if any."""
    state, data = coder.state, coder.data
    position = state[_POSITION]
    if state[_VALUE] >= _TOP:
        state[_VALUE] -= _TOP
        at = min(position, data.size) - 1
        while at >= 0 and data[at] == 255:
            data[at] = 0
            at -= 1
        if at >= 0:
            data[at] += 1
    if position < data.size:
        data[position] = state[_VALUE] >> 24
    state[_VALUE] = (state[_VALUE] & (_BOTTOM - 1)) << 8
    state[_POSITION] = position + 1


def finish(coder: Coder) -> tuple[bytes, int]:
    """End an encoder with the fewest bytes that decode to what was written.

    Returns:
        The bytes, and how many there would be with room for all: more than were returned when the
        capacity was too small, and the bytes are then useless.
    """
    low, width = int(coder.state[_VALUE]), int(coder.state[_RANGE])
    value, n_bytes = _shortest_in(low, width)
    coder.state[_VALUE] = value
    for _ in range(n_bytes):
        _shift_out(coder)
    if not n_bytes and value >= _TOP:  # only the carry is left to write
        _shift_out(coder)
        coder.state[_POSITION] -= 1
    position = int(coder.state[_POSITION])
    return coder.data[:position].tobytes(), position


def ends_well(coder: Coder) -> bool:
    """Say whether a decoder's data ends exactly as `finish` would have ended it."""
    offset, width, position = (int(x) for x in coder.state[:3])
    at = position - END_BYTES
    tail = coder.data[at:position].tobytes()
    window = int.from_bytes(tail.ljust(END_BYTES, b"\0"), "big")
    low = (window - offset) % _TOP
    value, n_bytes = _shortest_in(low, width)
    return coder.data.size - at == n_bytes and value % _TOP == window


def _shortest_in(low: int, width: int) -> tuple[int, int]:
    """Return a value in ``[low, low + width)`` of the fewest leading bytes, and how many."""
    for n_bytes in range(END_BYTES):
        mask = (_TOP - 1) >> (8 * n_bytes)
        value = (low + mask) & ~mask
        if value < low + width:
            return value, n_bytes
    return low, END_BYTES
