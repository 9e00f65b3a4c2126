"""Turn tensors of integers into binary decisions, each in a context that predicts it.

A tensor is coded as a matrix: one row for each index of axis 0 (a filter), one column for each
weight of a filter. All-zero rows and columns (filters, input channels, kernel taps) are named
first and then skipped. Every other integer becomes

1. is it zero?
2. its sign, coded as "does the sign differ from the predicted one?";
3. is its magnitude greater than 1, 2, …, 8?
4. the rest, as an Exp-Golomb code: adaptive prefix, two adaptive bits, then even bits.

The contexts come from what both sides know already. *Activity*, in half octaves, is how large the
magnitude should be: the running means of this row and of this column, and the neighbours to the
left, above in the kernel, and in the filter before. The *prediction* of the sign is that of the
plane through the neighbours in the kernel: filters are smooth. Whether the sign followed the
prediction then tells how large the magnitude will be.

Reference:
    S. Wiedemann et al., "DeepCABAC: A universal compression algorithm for deep neural networks",
    2020, https://arxiv.org/abs/1907.11900. The decisions are those of section III-A; the contexts
    are richer there than "were the two previous weights zero".
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from filterpress.codec import arithmetic
from filterpress.codec.arithmetic import Coder, code_bit, code_even_bit, compiled, past_end
from filterpress.codec.quantizer import MAX_EXPONENT, MAX_MAGNITUDE, MIN_EXPONENT
from filterpress.errors import BitstreamError

_LEVELS, _FLAGS, _PREFIX = 16, 8, 20
_AGREEMENTS, _PREFIX_CLASSES = 5, 4
_SIGNIFICANT = 0
_SIGN = _SIGNIFICANT + _LEVELS
_GREATER = _SIGN + _LEVELS
_LENGTH = _GREATER + _AGREEMENTS * _LEVELS * _FLAGS
_TOP_BIT = _LENGTH + _PREFIX_CLASSES * _PREFIX
_NEXT_BIT = _TOP_BIT + _PREFIX + 1
_ZERO_ROW = _NEXT_BIT + 2 * (_PREFIX + 1)
_ZERO_COLUMN = _ZERO_ROW + 5
_N_CONTEXTS = _ZERO_COLUMN + 5

_EXPONENT_BITS = 13
_UNIT_BITS = 8  # running means are in 1/256
_MEAN_RATES = np.array([(1 << 16) // min(n + 2, 64) for n in range(64)], np.int64)
_MAX_ACTIVITY = 256
_SAMPLE, _SAMPLE_ROWS = 2**16, 8  # least weights and rows of a sample that estimate_bits codes


def _half_octaves() -> NDArray[np.int64]:
    steps = [0, 0] + [2 * (n.bit_length() - 1) - 1 + (n >> (n.bit_length() - 2) & 1)
                      for n in range(2, _MAX_ACTIVITY + 1)]  # fmt: skip
    return np.minimum(np.array(steps, np.int64), _LEVELS - 1)


_LEVEL_OF = _half_octaves()


class _Matrix(NamedTuple):
    """A tensor as rows of filters and columns of weights, and which of both are all zero.

    Attributes:
        values: int32, (rows, columns).
        zero_rows: uint8, (rows,), 1 for an all-zero row.
        zero_columns: uint8, (columns,).
        column_means: int64, (columns,), running means of the magnitudes, 0 at first. Taken by
            numpy, which takes no memory for zeros until they are touched.
        taps: Columns of one kernel.
        width: Columns of one row of a kernel.
    """

    values: NDArray[np.int32]
    zero_rows: NDArray[np.uint8]
    zero_columns: NDArray[np.uint8]
    column_means: NDArray[np.int64]
    taps: int
    width: int


def encode_tensor(integers: NDArray[np.int32], exponents: NDArray[np.int32]) -> bytes:
    """Code the integers of a tensor and the exponents of its steps.

    Args:
        integers: int32 of any shape, within ±2**20.
        exponents: int32 of shape () or (integers.shape[0],), on the grid of `quantizer.snap`.

    Returns:
        The bytes, to be read back with the same two shapes.
    """
    matrix = _as_matrix(np.require(integers, np.int32, ["C", "W"]))
    matrix.zero_rows[:], matrix.zero_columns[:] = _zeros_of(matrix.values)
    return _encode_matrix(matrix, np.array(exponents, np.int64).reshape(-1))


def _encode_matrix(matrix: _Matrix, steps: NDArray[np.int64]) -> bytes:
    capacity = 2 * matrix.values.size + 4 * steps.size + 64
    while True:
        coder = arithmetic.new_encoder(capacity)
        matrix.column_means[:] = 0
        contexts = arithmetic.new_contexts(2 * _N_CONTEXTS)
        _code_tensor(coder, contexts, steps, matrix)
        data, capacity = arithmetic.finish(coder)
        if len(data) == capacity:
            return data


def decode_tensor(
    data: bytes, shape: tuple[int, ...], n_exponents: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Read back what `encode_tensor` coded.

    Args:
        data: Exactly the bytes of one tensor.
        shape: Of the integers. Memory is taken for it.
        n_exponents: How many steps.

    Returns:
        The integers, of ``shape``, and the exponents, of shape (n_exponents,).

    Raises:
        BitstreamError: The data is not what `encode_tensor` gives for any tensor of this shape.
    """
    integers = np.zeros(shape, np.int32)
    matrix = _as_matrix(integers)
    steps = np.zeros(n_exponents, np.int64)
    coder = arithmetic.new_decoder(data)
    contexts = arithmetic.new_contexts(2 * _N_CONTEXTS)
    if not _code_tensor(coder, contexts, steps, matrix) or not arithmetic.ends_well(coder):
        raise BitstreamError(f"the coded data of a tensor of shape {shape} is damaged")
    said = matrix.zero_rows, matrix.zero_columns
    unseen = not integers.size and matrix.values.any()
    if unseen or not all(map(np.array_equal, said, _zeros_of(matrix.values))):
        raise BitstreamError(f"a tensor of shape {shape} is not coded in the one way allowed")
    return integers, steps.astype(np.int32)


def estimate_bits(integers: NDArray[np.int32]) -> float:
    """Say about how many bits `encode_tensor` will spend on the integers of a tensor.

    Small tensors are coded. Of large ones every n-th row is, and the others are assumed to stand
    to these as the entropies of two-sided geometric distributions with their mean magnitudes.

    Args:
        integers: int32 of any shape, within ±2**20.

    Returns:
        Bits, within about 3 % for tensors of some thousand weights.

    Example:
        >>> 15_000 < estimate_bits(np.tile(np.arange(-3, 4, dtype=np.int32), (100, 100))) < 250_000
        True
    """
    integers = np.require(integers, np.int32, ["C", "W"])
    values = _as_matrix(integers).values
    stride = max(1, min(values.size // _SAMPLE, len(values) // _SAMPLE_ROWS))
    matrix = _as_matrix(integers[stride // 2 :: stride].copy() if stride > 1 else integers)
    matrix.zero_rows[:] = _zeros_of(matrix.values)[0]
    matrix.zero_columns[:] = zero_columns = _zeros_of(values)[1]
    bits = 8.0 * len(_encode_matrix(matrix, np.zeros(1, np.int64))) - _EXPONENT_BITS
    if stride == 1:
        return max(bits, 0.0)
    naming = _flag_bits(zero_columns)
    expected = values.shape[1] * _geometric_entropy(np.abs(values).mean(axis=1))
    ratio = max(float(expected.sum() / expected[stride // 2 :: stride].sum()), 1.0)
    return max(bits - naming, 0.0) * ratio + naming


def _flag_bits(flags: NDArray[np.uint8]) -> float:
    """Return the entropy of flags, by how many are set."""
    ratios = np.array([flags.mean(), 1 - flags.mean()])
    return float(-flags.size * np.sum(ratios * np.log2(np.maximum(ratios, 1e-9))))


def _geometric_entropy(mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return bits of integers that get rarer by a factor a step, by their mean magnitude."""
    mean = np.maximum(mean, 1e-9)
    factor = mean / (np.sqrt(1 + mean**2) + 1)
    return np.asarray(np.log2((1 + factor) / (1 - factor)) - mean * np.log2(factor))


def _as_matrix(integers: NDArray[np.int32]) -> _Matrix:
    """View a tensor as (filters, weights), as one row if a filter is one weight."""
    values = integers if integers.size else np.zeros(1, np.int32)
    rows = len(values) if values.ndim > 1 else 1
    values = values.reshape(1 if rows == values.size else rows, -1)
    zero_rows, zero_columns = (np.zeros(n, np.uint8) for n in values.shape)
    taps, width = prod(integers.shape[2:]), integers.shape[-1] if integers.ndim > 2 else 1
    column_means = np.zeros(values.shape[1], np.int64)
    return _Matrix(values, zero_rows, zero_columns, column_means, max(taps, 1), max(width, 1))


def _zeros_of(values: NDArray[np.int32]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return 1 for every all-zero row, and 1 for every all-zero column."""
    return (
        np.array(~values.any(axis=1), np.uint8),
        np.array(~values.any(axis=0), np.uint8),
    )


@compiled
def _code_tensor(
    coder: Coder,
    contexts: NDArray[np.int64],
    exponents: NDArray[np.int64],
    matrix: _Matrix,
) -> bool:
    """Code a tensor in either direction; return whether what was read makes sense."""
    if not _code_exponents(coder, contexts[_N_CONTEXTS:], exponents):
        return False
    if not code_even_bit(coder, 1 - matrix.zero_rows.min()):
        matrix.zero_rows[:] = 1
        matrix.zero_columns[:] = 1
        return True
    return (
        _code_zeros(coder, contexts, _ZERO_ROW, matrix.zero_rows, 1)
        and _code_zeros(coder, contexts, _ZERO_COLUMN, matrix.zero_columns, matrix.taps)
        and _code_matrix(coder, contexts, matrix)
    )


@compiled
def _code_exponents(
    coder: Coder, contexts: NDArray[np.int64], exponents: NDArray[np.int64]
) -> bool:
    """Code the first exponent in 13 bits, the others less the mean of those before."""
    total = 0
    for n in range(exponents.size):
        if n == 0:
            value = exponents[0] - MIN_EXPONENT
            for i in range(_EXPONENT_BITS - 1, -1, -1):
                bit = code_even_bit(coder, (value >> i) & 1)
                value = (value & ~(1 << i)) | (bit << i)
            exponents[0] = value + MIN_EXPONENT
        else:
            mean = total // n
            exponents[n] = mean + _code_integer(
                coder, contexts, _LEVELS // 2, 0, exponents[n] - mean
            )
        if exponents[n] < MIN_EXPONENT or exponents[n] > MAX_EXPONENT or past_end(coder):
            return False
        total += exponents[n]
    return True


@compiled
def _code_zeros(
    coder: Coder, contexts: NDArray[np.int64], base: int, zeros: NDArray[np.uint8], period: int
) -> bool:
    """Code which rows or columns are zero: if any, then each by those 1 and a period before.

    Returns:
        Whether this is how an encoder says it: some are zero, or none is said to be, and not all.
    """
    if not code_bit(coder, contexts, base, zeros.max()):
        return True
    for i in range(zeros.size):
        before = zeros[i - 1] if i else 0
        earlier = zeros[i - period] if i >= period else 0
        zeros[i] = code_bit(coder, contexts, base + 1 + before + 2 * earlier, zeros[i])
        if past_end(coder):
            return False
    return bool(zeros.min() != zeros.max())


@compiled
def _code_matrix(coder: Coder, contexts: NDArray[np.int64], matrix: _Matrix) -> bool:
    """Code the rows and columns that are not zero, in reading order."""
    values, width, column_means = matrix.values, matrix.width, matrix.column_means
    row_start = 0
    for row in range(values.shape[0]):
        if matrix.zero_rows[row]:
            continue
        row_mean = row_start
        rate = _MEAN_RATES[min(row, 63)]
        for column in range(values.shape[1]):
            if matrix.zero_columns[column]:
                continue
            tap = column % matrix.taps
            left = int(values[row, column - 1]) if tap % width else 0
            above = int(values[row, column - width]) if tap >= width else 0
            corner = int(values[row, column - width - 1]) if tap >= width and tap % width else 0
            before = int(values[row - 1, column]) if row else 0
            near = 64 * (abs(left) + abs(above)) + 32 * abs(before)
            activity = (near + row_mean + column_means[column]) >> 5
            level = _LEVEL_OF[min(activity, _MAX_ACTIVITY)]
            value = _code_integer(
                coder, contexts, level, 2 * (left + above) - corner, values[row, column]
            )
            if past_end(coder) or abs(value) > MAX_MAGNITUDE:
                return False
            values[row, column] = value
            magnitude = abs(value) << _UNIT_BITS
            column_means[column] += ((magnitude - column_means[column]) * rate) >> 16
            row_mean += ((magnitude - row_mean) * _MEAN_RATES[min(column, 63)]) >> 16
        row_start = row_mean
    return True


@compiled
def _code_integer(
    coder: Coder, contexts: NDArray[np.int64], level: int, prediction: int, value: int
) -> int:
    """Write ``value``, or read and return one, where this activity and prediction hold."""
    magnitude = abs(value)
    if not code_bit(coder, contexts, _SIGNIFICANT + level, 1 if magnitude else 0):
        return 0
    strength = _LEVEL_OF[min(abs(prediction), _MAX_ACTIVITY)]
    flip = 1 if prediction < 0 else 0
    differs = code_bit(coder, contexts, _SIGN + strength, (1 if value < 0 else 0) ^ flip)
    agreement = 0 if strength < 3 else 1 + differs + (2 if strength >= 7 else 0)
    base = _GREATER + (agreement * _LEVELS + level) * _FLAGS
    found = 1
    while found <= _FLAGS and code_bit(
        coder, contexts, base + found - 1, 1 if magnitude > found else 0
    ):
        found += 1
    if found > _FLAGS:
        found += _code_exp_golomb(coder, contexts, level >> 2, magnitude - found)
    return -found if differs ^ flip else found


@compiled
def _code_exp_golomb(
    coder: Coder, contexts: NDArray[np.int64], prefix_class: int, value: int
) -> int:
    """Write ``value``, or read and return one: the length of value + 1, then its bits."""
    bits = value + 1
    base = _LENGTH + prefix_class * _PREFIX
    length = 0
    while length < _PREFIX and code_bit(
        coder, contexts, base + length, 1 if bits >> (length + 1) else 0
    ):
        length += 1
    found = 1
    for i in range(length - 1, -1, -1):
        bit = (bits >> i) & 1
        if i == length - 1:
            bit = code_bit(coder, contexts, _TOP_BIT + length, bit)
        elif i == length - 2:
            bit = code_bit(coder, contexts, _NEXT_BIT + 2 * length + (found & 1), bit)
        else:
            bit = code_even_bit(coder, bit)
        found = 2 * found + bit
    return found - 1
