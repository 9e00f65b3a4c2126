"""Turn tensors of integers into binary decisions, each in a context that predicts it.

A tensor is coded as a matrix: one row for each index of axis 0 (a filter), one column for each
weight of a filter. All-zero rows and columns (filters, input channels, kernel taps) are named
first and then skipped. Every other integer becomes

1. is it zero?
2. its sign, coded as "does the sign differ from the predicted one?";
3. is its magnitude greater than 1, 2, …, 14 units?
4. beyond that, an Exp-Golomb code;
5. where in its unit it lies: one adaptive bit, then even bits.

The unit is a power of two near half of the magnitude that is expected, so that wide integers take
no more decisions than narrow ones. The contexts come from what both sides know already. The
*level*, in quarter octaves, is the expected magnitude: a weighted mean of running means along the
row, the column and the kernel, and of the neighbours in the kernel, in the filter before and in the
input channel before. The *prediction* of the sign is that of the plane through the neighbours in
the kernel: filters are smooth. Whether the sign followed the prediction then tells how large the
magnitude will be.

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
from filterpress.codec.arithmetic import Coder, code_bit, code_even_bits, compiled, past_end
from filterpress.codec.contexts import (
    LEVEL_SCALE,
    LEVELS,
    MIDDLES,
    UNIT_BITS,
    ZERO_COLUMN,
    ZERO_ROW,
    find_level,
    fresh_contexts,
)
from filterpress.codec.integers import UNLIMITED, code_integer
from filterpress.codec.quantizer import MAX_EXPONENT, MAX_MAGNITUDE, MIN_EXPONENT
from filterpress.errors import BitstreamError

_EXPONENT_BITS, _LARGEST_BITS, _LEVEL_BITS = 13, 4, 7
_EXPONENT_LEVEL = 34  # of the difference of a step from the mean
_ROW, _COLUMN, _KERNEL, _TENSOR, _NEAR, _FAR = 12, 9, 3, 3, 3, 2  # weights, in 1/32
_LIMIT = 400
_RATES = np.array([(1 << 20) // max(n, 1) for n in range(_LIMIT + 1)], np.int64)
_SAMPLE, _SAMPLE_ROWS = 2**16, 8  # least weights and rows of a sample that estimate_bits codes


class _Matrix(NamedTuple):
    """A tensor as rows of filters and columns of weights, and which of both are all zero.

    Attributes:
        values: int32, (rows, columns).
        zero_rows: uint8, (rows,), 1 for an all-zero row.
        zero_columns: uint8, (columns,).
        column_means: int64, (columns,), running means of the magnitudes less that of the tensor.
            Taken by numpy, which takes no memory for zeros until they are touched.
        kernel_means: int64, (taps,), the same for each place in the kernel.
        width: Columns of one row of a kernel.
    """

    values: NDArray[np.int32]
    zero_rows: NDArray[np.uint8]
    zero_columns: NDArray[np.uint8]
    column_means: NDArray[np.int64]
    kernel_means: NDArray[np.int64]
    width: int


class _Summary(NamedTuple):
    """What is said of the integers of a tensor before they are coded.

    Attributes:
        largest: Magnitude, 0 to 14; 15 stands for any larger one, too.
        level: Of the mean magnitude of the weights that are not skipped.
    """

    largest: int
    level: int


def encode_tensor(integers: NDArray[np.int32], exponents: NDArray[np.int32]) -> bytes:
    """Code the integers of a tensor and the exponents of its steps.

    Args:
        integers: int32 of any shape, within ±2**20.
        exponents: int32 of shape () or (integers.shape[0],), on the grid of `quantizer.snap`.

    Returns:
        The bytes, to be read back with the same two shapes.
    """
    weights = _as_matrix(np.require(integers, np.int32, ["C", "W"]))
    weights.zero_rows[:], weights.zero_columns[:] = _zeros_of(weights.values)
    return _encode_matrix(weights, np.array(exponents, np.int32).reshape(-1))


def _encode_matrix(weights: _Matrix, exponents: NDArray[np.int32]) -> bytes:
    mean, summary = _mean_exponent(exponents), _summarise(weights)
    capacity = 2 * weights.values.size + 4 * exponents.size + 64
    while True:
        coder = arithmetic.new_encoder(capacity)
        steps = _as_matrix(exponents - np.int32(mean))
        weights.column_means[:] = 0
        weights.kernel_means[:] = 0
        coder, _, _ = _code_tensor(
            coder, fresh_contexts(), steps, mean - MIN_EXPONENT, weights, summary
        )
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
    weights, steps = _as_matrix(integers), _as_matrix(np.zeros(n_exponents, np.int32))
    coder = arithmetic.new_decoder(data)
    coder, mean, summary = _code_tensor(coder, fresh_contexts(), steps, 0, weights, _Summary(0, 0))
    if summary.level < 0 or not arithmetic.ends_well(coder):
        raise BitstreamError(f"the coded data of a tensor of shape {shape} is damaged")
    exponents = steps.values[0, :n_exponents] + np.int32(mean + MIN_EXPONENT)
    in_range = np.all((exponents >= MIN_EXPONENT) & (exponents <= MAX_EXPONENT))
    said = weights.zero_rows, weights.zero_columns
    named = all(map(np.array_equal, said, _zeros_of(weights.values)))
    unseen = not integers.size and weights.values.any()
    means = mean + MIN_EXPONENT == _mean_exponent(exponents) and summary == _summarise(weights)
    if unseen or not (in_range and named and means):
        raise BitstreamError(f"a tensor of shape {shape} is not coded in the one way allowed")
    return integers, exponents


def estimate_bits(integers: NDArray[np.int32]) -> float:
    """Say about how many bits `encode_tensor` will spend on the integers of a tensor.

    Small tensors are coded. Of large ones every n-th row is. The others are assumed to stand to
    the later half of these, whose contexts are trained, as the entropies of two-sided geometric
    distributions with their mean magnitudes.

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
    zero_columns = _zeros_of(values)[1]
    stride = max(1, min(values.size // _SAMPLE, len(values) // _SAMPLE_ROWS))
    if stride == 1:
        return _coded_bits(integers, zero_columns)
    sample = integers[stride // 2 :: stride]
    bits = _coded_bits(sample, zero_columns)
    expected = values.shape[1] * _geometric_entropy(np.abs(values).mean(axis=1))
    of_sample, late = expected[stride // 2 :: stride], slice(len(sample) // 2, None)
    late_bits = bits - _coded_bits(sample[: len(sample) // 2], zero_columns)
    rate = np.clip(late_bits / max(of_sample[late].sum(), 1.0), 0.5, 1.5)
    return bits + float(rate * (expected.sum() - of_sample.sum()))


def _coded_bits(integers: NDArray[np.int32], zero_columns: NDArray[np.uint8]) -> float:
    """Return the bits of a part of the rows of a tensor."""
    matrix = _as_matrix(integers.copy())
    matrix.zero_rows[:] = _zeros_of(matrix.values)[0]
    matrix.zero_columns[:] = zero_columns
    n_bits = 8.0 * len(_encode_matrix(matrix, np.zeros(1, np.int32)))
    return max(n_bits - _EXPONENT_BITS, 0.0)


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
    kernel_means = np.zeros(max(taps, 1), np.int64)
    return _Matrix(values, zero_rows, zero_columns, column_means, kernel_means, max(width, 1))


def _mean_exponent(exponents: NDArray[np.int32]) -> int:
    return int(exponents.sum(dtype=np.int64)) // exponents.size if exponents.size else MIN_EXPONENT


def _summarise(matrix: _Matrix) -> _Summary:
    n_rows, n_columns = (int(np.sum(flags == 0)) for flags in matrix[1:3])
    magnitudes = np.abs(matrix.values)
    total = int(magnitudes.sum(dtype=np.int64))
    mean = (total << LEVEL_SCALE) // max(n_rows * n_columns, 1)
    return _Summary(min(int(magnitudes.max()), UNLIMITED), find_level(mean))


def _zeros_of(values: NDArray[np.int32]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return 1 for every all-zero row, and 1 for every all-zero column."""
    return (
        np.array(~values.any(axis=1), np.uint8),
        np.array(~values.any(axis=0), np.uint8),
    )


@compiled
def _code_tensor(
    coder: Coder,
    fresh: NDArray[np.int32],
    steps: _Matrix,
    mean: int,
    weights: _Matrix,
    summary: _Summary,
) -> tuple[Coder, int, _Summary]:
    """Code a tensor in either direction.

    Args:
        coder: The direction.
        fresh: The contexts to begin with.
        steps: The exponents of the steps as one row, less their mean.
        mean: Of the exponents, less the least possible one.
        weights: The integers.
        summary: Of the integers.

    Returns:
        The mean and the summary, the level of the latter -1 if what was read makes no sense.
    """
    largest, level = summary
    good = True
    coder, mean = code_even_bits(coder, _EXPONENT_BITS, mean)
    if steps.values.size > 1:
        coder, good = _code_matrix(coder, fresh.copy(), steps, _Summary(UNLIMITED, _EXPONENT_LEVEL))
    coder, largest = code_even_bits(coder, _LARGEST_BITS, largest)
    if not good or not largest:
        weights.zero_rows[:] = 1
        weights.zero_columns[:] = 1
        return coder, mean, _Summary(0, 0 if good else -1)
    coder, level = code_even_bits(coder, _LEVEL_BITS, level)
    contexts, taps = fresh.copy(), weights.kernel_means.size
    coder, good = _code_zeros(coder, contexts, ZERO_ROW, weights.zero_rows, 1)
    if good:
        coder, good = _code_zeros(coder, contexts, ZERO_COLUMN, weights.zero_columns, taps)
    if good and level < LEVELS:
        coder, good = _code_matrix(coder, contexts, weights, _Summary(largest, level))
    return coder, mean, _Summary(largest, level if good and level < LEVELS else -1)


@compiled
def _code_zeros(
    coder: Coder, contexts: NDArray[np.int32], base: int, zeros: NDArray[np.uint8], period: int
) -> tuple[Coder, bool]:
    """Code which rows or columns are zero: if any, then each by those 1 and a period before.

    Returns:
        Whether this is how an encoder says it: some are zero, or none is said to be, and not all.
    """
    coder, some = code_bit(coder, contexts, base, zeros.max())
    if not some:
        return coder, True
    for i in range(zeros.size):
        before = zeros[i - 1] if i else 0
        earlier = zeros[i - period] if i >= period else 0
        context = base + 1 + before + 2 * earlier
        coder, zeros[i] = code_bit(coder, contexts, context, zeros[i])
        if past_end(coder):
            return coder, False
    return coder, bool(zeros.min() != zeros.max())


@compiled
def _code_matrix(
    coder: Coder, contexts: NDArray[np.int32], matrix: _Matrix, summary: _Summary
) -> tuple[Coder, bool]:
    """Code the rows and columns that are not zero, in reading order."""
    values, column_means, kernel_means = matrix.values, matrix.column_means, matrix.kernel_means
    taps, width = kernel_means.size, matrix.width
    largest, start = summary.largest, MIDDLES[summary.level]
    tensor_mean, n_weights, n_kernels = start, 0, 0
    for row in range(values.shape[0]):
        if matrix.zero_rows[row]:
            continue
        row_mean, tap, x = tensor_mean, taps - 1, width - 1
        for column in range(values.shape[1]):
            tap = tap + 1 if tap + 1 < taps else 0
            x = x + 1 if x + 1 < width else 0
            n_kernels += 1 if tap == 0 else 0
            if matrix.zero_columns[column]:
                continue
            left = int(values[row, column - 1]) if x else 0
            above = int(values[row, column - width]) if tap >= width else 0
            corner = int(values[row, column - width - 1]) if x and tap >= width else 0
            before = abs(int(values[row - 1, column])) << UNIT_BITS if row else row_mean
            back = int(values[row, column - taps]) if column >= taps else 0
            near = (abs(left) << UNIT_BITS if x else row_mean) + (
                abs(above) << UNIT_BITS if tap >= width else row_mean
            )
            far = before + (abs(back) << UNIT_BITS if column >= taps else row_mean)
            expected = (
                _ROW * row_mean
                + _COLUMN * (start + column_means[column])
                + _KERNEL * (start + kernel_means[tap])
                + _TENSOR * tensor_mean
                + (_NEAR * near + _FAR * far >> 1)
            ) >> UNIT_BITS
            coder, value = code_integer(
                coder,
                contexts,
                largest,
                expected,
                2 * (left + above) - corner,
                values[row, column],
            )
            if past_end(coder) or abs(value) > MAX_MAGNITUDE:
                return coder, False
            values[row, column] = value
            magnitude = abs(value) << UNIT_BITS
            n_weights += 1
            row_mean = _moved(row_mean, magnitude, column + 10)
            tensor_mean = _moved(tensor_mean, magnitude, n_weights + 16)
            change = magnitude - start
            column_means[column] = _moved(column_means[column], change, min(row + 6, 64))
            kernel_means[tap] = _moved(kernel_means[tap], change, n_kernels + 4)
    return coder, True


@compiled
def _moved(mean: int, value: int, n: int) -> int:
    """Return a running mean after its n-th value, or after many if n is over the limit."""
    return mean + ((value - mean) * int(_RATES[min(n, _LIMIT)]) >> 20)
