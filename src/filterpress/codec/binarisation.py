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
no more decisions than narrow ones. What is expected comes from what both sides know already: the
strength of the row times the strength of the column, as far as the weights before tell them, with a
little of the neighbours in the kernel, in the filter before and in the input channel before. How
far a few weights are believed is said once for a tensor: the better, the more its rows, channels
and columns differ by more than chance. Around the expected magnitude, on a scale of quarter
octaves, lie the two contexts that code a decision together.

The *prediction* of the sign is that of the plane through the neighbours in the kernel: filters are
smooth. Whether the sign followed the prediction then tells how large the magnitude will be.

Reference:
    S. Wiedemann et al., "DeepCABAC: A universal compression algorithm for deep neural networks",
    2020, https://arxiv.org/abs/1907.11900. The decisions are those of section III-A; the contexts
    are richer here than "were the two previous weights zero". The strengths are shrunk to their
    mean as in C. Morris, "Parametric empirical Bayes inference", 1983.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from filterpress.codec import arithmetic
from filterpress.codec.arithmetic import (
    Coder,
    code_bit,
    code_even_bits,
    compiled,
    inlined,
    past_end,
)
from filterpress.codec.contexts import (
    LEVELS,
    MIDDLES,
    UNIT_BITS,
    ZERO_COLUMN,
    ZERO_ROW,
    fresh_contexts,
)
from filterpress.codec.integers import UNLIMITED, code_integer
from filterpress.codec.matrices import (
    LEAST_TRUST,
    MOST_TRUST,
    NOTHING,
    Matrix,
    Summary,
    as_matrix,
    summarise,
    zeros_of,
)
from filterpress.codec.quantizer import MAX_EXPONENT, MAX_MAGNITUDE, MIN_EXPONENT
from filterpress.errors import BitstreamError

_EXPONENT_BITS, _LARGEST_BITS, _LEVEL_BITS = 13, 4, 7
_EXPONENT_LEVEL, _STEP_TRUST = 34, 4  # of the differences of steps from their mean
_TRUST_BITS = 3
_PLAIN = 60  # sixty-fourths of what is expected; the four neighbours have the others
_RATIO_BITS, _MOST_RATIO, _MOST_SUM = 12, 1 << 28, 1 << 46
_MOST_EXPECTED = MAX_MAGNITUDE << UNIT_BITS
_SAMPLE, _SAMPLE_ROWS = 2**16, 8  # least weights and rows of a sample that estimate_bits codes


_OF_STEPS = Summary(UNLIMITED, _EXPONENT_LEVEL, *(_STEP_TRUST,) * 3)


def encode_tensor(integers: NDArray[np.int32], exponents: NDArray[np.int32]) -> bytes:
    """Code the integers of a tensor and the exponents of its steps.

    Args:
        integers: int32 of any shape, within ±2**20.
        exponents: int32 of shape () or (integers.shape[0],), on the grid of `quantizer.snap`.

    Returns:
        The bytes, to be read back with the same two shapes.
    """
    weights = as_matrix(np.require(integers, np.int32, ["C", "W"]))
    weights.zero_rows[:], weights.zero_columns[:] = zeros_of(weights.values)
    return _encode_matrix(weights, np.array(exponents, np.int32).reshape(-1))


def _encode_matrix(weights: Matrix, exponents: NDArray[np.int32]) -> bytes:
    mean, summary = _mean_exponent(exponents), summarise(weights)
    capacity = 2 * weights.values.size + 4 * exponents.size + 64
    while True:
        coder = arithmetic.new_encoder(capacity)
        steps = as_matrix(exponents - np.int32(mean))
        weights.column_sums[:] = 0
        weights.channel_sums[:] = 0
        fresh = fresh_contexts(), fresh_contexts()
        coder, _, _ = _code_tensor(coder, fresh, steps, mean - MIN_EXPONENT, weights, summary)
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
    weights, steps = as_matrix(integers), as_matrix(np.zeros(n_exponents, np.int32))
    coder = arithmetic.new_decoder(data)
    fresh = fresh_contexts(), fresh_contexts()
    coder, mean, summary = _code_tensor(coder, fresh, steps, 0, weights, NOTHING)
    if summary.level < 0 or not arithmetic.ends_well(coder):
        raise BitstreamError(f"the coded data of a tensor of shape {shape} is damaged")
    exponents = steps.values[0, :n_exponents] + np.int32(mean + MIN_EXPONENT)
    in_range = np.all((exponents >= MIN_EXPONENT) & (exponents <= MAX_EXPONENT))
    said = weights.zero_rows, weights.zero_columns
    named = all(map(np.array_equal, said, zeros_of(weights.values)))
    unseen = not integers.size and weights.values.any()
    means = mean + MIN_EXPONENT == _mean_exponent(exponents) and summary == summarise(weights)
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
    values = as_matrix(integers).values
    zero_columns = zeros_of(values)[1]
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
    matrix = as_matrix(integers.copy())
    matrix.zero_rows[:] = zeros_of(matrix.values)[0]
    matrix.zero_columns[:] = zero_columns
    n_bits = 8.0 * len(_encode_matrix(matrix, np.zeros(1, np.int32)))
    return max(n_bits - _EXPONENT_BITS, 0.0)


def _geometric_entropy(mean: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return bits of integers that get rarer by a factor a step, by their mean magnitude."""
    mean = np.maximum(mean, 1e-9)
    factor = mean / (np.sqrt(1 + mean**2) + 1)
    return np.asarray(np.log2((1 + factor) / (1 - factor)) - mean * np.log2(factor))


def _mean_exponent(exponents: NDArray[np.int32]) -> int:
    return int(exponents.sum(dtype=np.int64)) // exponents.size if exponents.size else MIN_EXPONENT


@compiled
def _code_tensor(
    coder: Coder,
    fresh: tuple[NDArray[np.int32], NDArray[np.int32]],
    steps: Matrix,
    mean: int,
    weights: Matrix,
    summary: Summary,
) -> tuple[Coder, int, Summary]:
    """Code a tensor in either direction.

    Args:
        coder: The direction.
        fresh: The contexts to begin with, of the steps and of the integers.
        steps: The exponents of the steps as one row, less their mean.
        mean: Of the exponents, less the least possible one.
        weights: The integers.
        summary: Of the integers.

    Returns:
        The mean and the summary, the level of the latter -1 if what was read makes no sense.
    """
    largest, level = summary.largest, summary.level
    good = True
    coder, mean = code_even_bits(coder, _EXPONENT_BITS, mean)
    if steps.values.size > 1:
        coder, good = _code_matrix(coder, fresh[0], steps, _OF_STEPS)
    coder, largest = code_even_bits(coder, _LARGEST_BITS, largest)
    if not good or not largest:
        weights.zero_rows[:] = 1
        weights.zero_columns[:] = 1
        return coder, mean, Summary(0, 0 if good else -1, 0, 0, 0)
    coder, level = code_even_bits(coder, _LEVEL_BITS, level)
    row, channel, column = MOST_TRUST, MOST_TRUST, MOST_TRUST
    if weights.values.shape[0] > 1:
        coder, row = _code_trust(coder, summary.row_trust)
        coder, column = _code_trust(coder, summary.column_trust)
        if weights.taps > 1:
            coder, channel = _code_trust(coder, summary.channel_trust)
    contexts = fresh[1]
    coder, good = _code_zeros(coder, contexts, ZERO_ROW, weights.zero_rows, 1)
    if good:
        coder, good = _code_zeros(coder, contexts, ZERO_COLUMN, weights.zero_columns, weights.taps)
    summary = Summary(largest, level, row, channel, column)
    if good and level < LEVELS:
        coder, good = _code_matrix(coder, contexts, weights, summary)
    if good and level < LEVELS:
        return coder, mean, summary
    return coder, mean, Summary(largest, -1, row, channel, column)


@inlined
def _code_trust(coder: Coder, trust: int) -> tuple[Coder, int]:
    coder, above = code_even_bits(coder, _TRUST_BITS, trust - LEAST_TRUST)
    return coder, above + LEAST_TRUST


@compiled
def _code_zeros(
    coder: Coder, contexts: NDArray[np.int32], base: int, zeros: NDArray[np.uint8], period: int
) -> tuple[Coder, bool]:
    """Code which rows or columns are zero: if any, then each by those 1 and a period before.

    Returns:
        Whether this is how an encoder says it: some are zero, or none is said to be, and not all.
    """
    some = 1 if _count_used(zeros, 0, zeros.size) < zeros.size else 0
    coder, some = code_bit(coder, contexts, base, some)
    if not some:
        return coder, True
    for i in range(zeros.size):
        before = zeros[i - 1] if i else 0
        earlier = zeros[i - period] if i >= period else 0
        context = base + 1 + before + 2 * earlier
        coder, zeros[i] = code_bit(coder, contexts, context, zeros[i])
        if past_end(coder):
            return coder, False
    return coder, 0 < _count_used(zeros, 0, zeros.size) < zeros.size


@compiled
def _code_matrix(
    coder: Coder, contexts: NDArray[np.int32], matrix: Matrix, summary: Summary
) -> tuple[Coder, bool]:
    """Code the rows and columns that are not zero, in reading order."""
    values, taps, width = matrix.values, matrix.taps, matrix.width
    column_sums, channel_sums = matrix.column_sums, matrix.channel_sums
    largest, mean, n_rows = summary.largest, MIDDLES[summary.level], 0
    prior = mean << summary.row_trust
    for row in range(values.shape[0]):
        if matrix.zero_rows[row]:
            continue
        seen, foreseen, channel, tap, x = prior, prior, -1, taps - 1, width - 1
        of_channel = mean
        for column in range(values.shape[1]):
            tap = tap + 1 if tap + 1 < taps else 0
            x = x + 1 if x + 1 < width else 0
            if tap == 0:
                channel += 1
                if taps > 1:
                    n = n_rows * _count_used(matrix.zero_columns, column, taps)
                    of_channel = _shrunk(channel_sums[channel], n, mean, summary.channel_trust)
            if matrix.zero_columns[column]:
                continue
            of_column = _shrunk(column_sums[column], n_rows, of_channel, summary.column_trust)
            ratio = min((seen << _RATIO_BITS) // foreseen, _MOST_RATIO)
            plain = (ratio * of_column) >> _RATIO_BITS
            expected, prediction = _look_around(values, row, column, taps, width, tap, x, plain)
            value = values[row, column]
            coder, value = code_integer(coder, contexts, largest, expected, prediction, value)
            if past_end(coder) or abs(value) > MAX_MAGNITUDE:
                return coder, False
            values[row, column] = value
            magnitude = abs(value)
            seen = min(seen + (magnitude << UNIT_BITS), _MOST_SUM)
            foreseen = min(foreseen + of_column, _MOST_SUM)
            column_sums[column] = min(column_sums[column] + magnitude, _MOST_SUM)
            if taps > 1:
                channel_sums[channel] = min(channel_sums[channel] + magnitude, _MOST_SUM)
        n_rows += 1
    return coder, True


@inlined
def _look_around(
    values: NDArray[np.int32],
    row: int,
    column: int,
    taps: int,
    width: int,
    tap: int,
    x: int,
    plain: int,
) -> tuple[int, int]:
    """Return the magnitude and the sign to expect, given the magnitude by strengths alone."""
    left = int(values[row, column - 1]) if x else 0
    above = int(values[row, column - width]) if tap >= width else 0
    corner = int(values[row, column - width - 1]) if x and tap >= width else 0
    before = abs(int(values[row - 1, column])) << UNIT_BITS if row else plain
    back = abs(int(values[row, column - taps])) << UNIT_BITS if column >= taps else plain
    near = (abs(left) << UNIT_BITS if x else plain) + (
        abs(above) << UNIT_BITS if tap >= width else plain
    )
    expected = min((_PLAIN * plain + near + before + back) >> 6, _MOST_EXPECTED)
    return expected, 2 * (left + above) - corner


@inlined
def _shrunk(total: int, n: int, prior: int, trust: int) -> int:
    """Return the mean of n magnitudes, and of 2**trust more as they were expected."""
    return ((prior << trust) + (total << UNIT_BITS)) // ((1 << trust) + n)


@inlined
def _count_used(flags: NDArray[np.uint8], start: int, n: int) -> int:
    count = 0
    for i in range(start, min(start + n, flags.size)):
        count += 1 - flags[i]
    return count
