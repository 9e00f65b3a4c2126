"""Adaptive binary arithmetic coder in integer arithmetic.

One function, `code_bit`, serves both directions: an encoder writes the bit it is given, a decoder
ignores that argument and returns the bit it reads. Code that turns values into bits is therefore
written once and cannot disagree with itself.

The coder is a range coder with byte-wise renormalisation: 32-bit range, carries propagated into
the bytes already written. The probability of a bit is the share of ones so far in its context, and
from some hundred bits on one that forgets.

A coder is a tuple that every step replaces, and every step is inlined: its numbers then stay in
registers, which makes the coder four times as fast as one that keeps them in an array.

numba does not check bounds. Every access here is to an index that is bounded by construction:
reads past the end give zeros, writes past the end are counted and dropped, and contexts are
computed from clipped values.

Reference:
    G. N. N. Martin, "Range encoding", 1979; D. Marpe et al., "Context-based adaptive binary
    arithmetic coding in the H.264/AVC video compression standard", 2003. The probabilities are
    multiplied, not looked up, and start as plain averages, so that short streams learn quickly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

_Function = TypeVar("_Function", bound=Callable[..., Any])

LIMIT = 600
"""Observations over which a probability averages."""

PROBABILITY_BITS = 24
"""Probabilities are in units of 2**-24."""

FRACTION_BITS = 8
"""Places between two contexts are in units of 2**-8."""

END_BYTES = 4
"""Bytes that a decoder looks ahead, and so the most that may lie past the end of its data."""

_TOP, _BOTTOM = 1 << 32, 1 << 24
_ONE, _MARGIN, _RATE_BITS = 1 << PROBABILITY_BITS, 1 << 12, 16
_RATES = np.array([(1 << _RATE_BITS) // (n + 2) for n in range(LIMIT - 1)], np.int64)
_ONES, _COUNT = range(2)


def compiled(function: _Function) -> _Function:
    """Compile with numba, once per machine, and keep the type that the source declares.

    References to arrays are not counted (``_nrt``), which would take more than half of the time:
    what is compiled makes no arrays, and returns none but those that its caller holds.

    numba's cache knows the file of a function, not the files of what it calls and reads: delete
    ``__pycache__`` after an edit here, in `contexts` or in `integers`, or `binarisation` goes on
    with the code of before.
    """
    options: dict[str, Any] = {"cache": True, "_nrt": False}  # numba's types lack the latter
    return cast(_Function, njit(**options)(function))


def inlined(function: _Function) -> _Function:
    """Compile into whatever calls the function."""
    return cast(_Function, njit(inline="always")(function))


class Coder(NamedTuple):
    """State of one direction of the coder.

    Attributes:
        low: The low end of the interval (encoder) or the offset of the data in it (decoder).
        width: The size of the interval.
        position: In ``data``. It counts on past its end.
        decoding: The direction.
        data: uint8, the bytes written or read.
    """

    low: int
    width: int
    position: int
    decoding: bool
    data: NDArray[np.uint8]


def new_contexts(ones: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return contexts: (n, 2) of the probability of a one and a count.

    Args:
        ones: (n,), probabilities of a one to begin with, in 2**-24.
        counts: (n,), how many observations each of them is worth.
    """
    return np.stack([ones, counts], axis=1).astype(np.int32)


def new_encoder(capacity: int) -> Coder:
    """Return an encoder that keeps at most ``capacity`` bytes."""
    return Coder(0, _TOP, 0, False, np.zeros(capacity, np.uint8))


def new_decoder(data: bytes) -> Coder:
    """Return a decoder of what `finish` returned."""
    head = int.from_bytes(data[:END_BYTES].ljust(END_BYTES, b"\0"), "big")
    return Coder(head, _TOP, END_BYTES, True, np.frombuffer(bytearray(data), np.uint8))


@inlined
def code_bit(coder: Coder, contexts: NDArray[np.int32], index: int, bit: int) -> tuple[Coder, int]:
    """Write ``bit``, or read and return one, with the probability of a context, which adapts."""
    coder, bit = _divide(coder, _share_of_zeros(coder, int(contexts[index, _ONES])), bit)
    _adapt(contexts, index, bit)
    return coder, bit


@inlined
def code_bit_between(
    coder: Coder, contexts: NDArray[np.int32], index: int, fraction: int, bit: int
) -> tuple[Coder, int]:
    """Do what `code_bit` does between a context and the next, of which the nearer adapts.

    Args:
        coder: The direction.
        contexts: Of `new_contexts`.
        index: Of the first context.
        fraction: Of the way from the first to the second, below 2**`FRACTION_BITS`.
        bit: To write.
    """
    near, far = int(contexts[index, _ONES]), int(contexts[index + 1, _ONES])
    ones = near + ((far - near) * fraction >> FRACTION_BITS)
    coder, bit = _divide(coder, _share_of_zeros(coder, ones), bit)
    _adapt(contexts, index + (fraction >> (FRACTION_BITS - 1)), bit)
    return coder, bit


@inlined
def _share_of_zeros(coder: Coder, ones: int) -> int:
    return (coder.width * (_ONE - ones)) >> PROBABILITY_BITS


@inlined
def _adapt(contexts: NDArray[np.int32], index: int, bit: int) -> None:
    """Move the probability of a context towards the bit that was coded."""
    ones, count = int(contexts[index, _ONES]), contexts[index, _COUNT]
    target = _ONE - _MARGIN if bit else _MARGIN
    contexts[index, _ONES] = ones + (((target - ones) * _RATES[count]) >> _RATE_BITS)
    contexts[index, _COUNT] = min(count + 1, LIMIT - 2)


@inlined
def code_even_bits(coder: Coder, n_bits: int, value: int) -> tuple[Coder, int]:
    """Write a number of ``n_bits`` bits, at most 20, or read and return one, each as likely."""
    part, last = coder.width >> n_bits, (1 << n_bits) - 1
    if coder.decoding:
        value = min(coder.low // part, last)
    width = coder.width - last * part if value == last else part
    low = coder.low - value * part if coder.decoding else coder.low + value * part
    return _renormalise(Coder(low, width, coder.position, coder.decoding, coder.data)), value


@inlined
def past_end(coder: Coder) -> bool:
    """Say whether a decoder has read more than its data can have held."""
    return coder.decoding and coder.position > coder.data.size + END_BYTES


@inlined
def _divide(coder: Coder, zeros: int, bit: int) -> tuple[Coder, int]:
    """Narrow the interval: zero is its first ``zeros`` values, one the rest."""
    low, width = coder.low, coder.width
    if coder.decoding:
        bit = 1 if low >= zeros else 0
    if bit:
        low = low - zeros if coder.decoding else low + zeros
        width -= zeros
    else:
        width = zeros
    return _renormalise(Coder(low, width, coder.position, coder.decoding, coder.data)), bit


@inlined
def _renormalise(coder: Coder) -> Coder:
    """Read or write bytes until the interval is wide again."""
    low, width, position, decoding, data = coder
    while width < _BOTTOM:
        width <<= 8
        if decoding:
            low = (low << 8) | (int(data[position]) if position < data.size else 0)
        else:
            low = _shift_out(low, position, data)
        position += 1
    return Coder(low, width, position, decoding, data)


@compiled
def _shift_out(low: int, position: int, data: NDArray[np.uint8]) -> int:
    """Move the top byte of the low end to the data, with the carry above it, if any."""
    if low >= _TOP:
        at = min(position, data.size) - 1
        while at >= 0 and data[at] == 255:
            data[at] = 0
            at -= 1
        if at >= 0:
            data[at] += 1
    if position < data.size:
        data[position] = (low >> 24) & 255
    return (low & (_BOTTOM - 1)) << 8


def finish(coder: Coder) -> tuple[bytes, int]:
    """End an encoder with the fewest bytes that decode to what was written.

    Returns:
        The bytes, and how many there would be with room for all: more than were returned when the
        capacity was too small, and the bytes are then useless.
    """
    low, n_bytes = _shortest_in(coder.low, coder.width)
    for n in range(n_bytes):
        low = _shift_out(low, coder.position + n, coder.data)
    if low >= _TOP:  # only the carry is left to write
        _shift_out(low, coder.position, coder.data)
    position = coder.position + n_bytes
    return coder.data[:position].tobytes(), position


def ends_well(coder: Coder) -> bool:
    """Say whether a decoder's data ends exactly as `finish` would have ended it."""
    at = coder.position - END_BYTES
    tail = coder.data[at : coder.position].tobytes()
    window = int.from_bytes(tail.ljust(END_BYTES, b"\0"), "big")
    value, n_bytes = _shortest_in((window - coder.low) % _TOP, coder.width)
    return coder.data.size - at == n_bytes and value % _TOP == window


def _shortest_in(low: int, width: int) -> tuple[int, int]:
    """Return a value in ``[low, low + width)`` of the fewest leading bytes, and how many."""
    for n_bytes in range(END_BYTES):
        mask = (_TOP - 1) >> (8 * n_bytes)
        value = (low + mask) & ~mask
        if value < low + width:
            return value, n_bytes
    return low, END_BYTES
