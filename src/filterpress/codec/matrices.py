"""Tensors as matrices, and what is said of them before they are coded.

A matrix has one row for each index of axis 0 (a filter) and one column for each weight of a filter.
The columns of one kernel are a channel.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from filterpress.codec.contexts import LEVEL_SCALE, find_level
from filterpress.codec.integers import UNLIMITED

LEAST_TRUST, MOST_TRUST = 2, 9
"""Bounds of the trusts of a `Summary`."""

_BLOCK = 2**20  # magnitudes whose squares are summed in 64 bits


class Matrix(NamedTuple):
    """A tensor as rows of filters and columns of weights, and which of both are all zero.

    Attributes:
        values: int32, (rows, columns).
        zero_rows: uint8, (rows,), 1 for an all-zero row.
        zero_columns: uint8, (columns,).
        column_sums: int64, (columns,), of the magnitudes of the rows before. Taken by numpy, which
            takes no memory for zeros until they are touched.
        channel_sums: int64, (channels,), the same for each kernel's columns together.
        taps: Columns of one kernel.
        width: Columns of one row of a kernel.
    """

    values: NDArray[np.int32]
    zero_rows: NDArray[np.uint8]
    zero_columns: NDArray[np.uint8]
    column_sums: NDArray[np.int64]
    channel_sums: NDArray[np.int64]
    taps: int
    width: int


class Summary(NamedTuple):
    """What is said of the integers of a tensor before they are coded.

    Each trust is the binary logarithm of how many weights it takes to believe as much in what they
    say as in what is expected without them.

    Attributes:
        largest: Magnitude, 0 to 14; 15 stands for any larger one, too.
        level: Of the mean magnitude of the weights that are not skipped.
        row_trust: Of the strength of rows.
        channel_trust: Of the strength of channels.
        column_trust: Of the strength of columns in their channel.
    """

    largest: int
    level: int
    row_trust: int
    channel_trust: int
    column_trust: int


NOTHING = Summary(0, 0, 0, 0, 0)
"""The summary of zeros."""


def as_matrix(integers: NDArray[np.int32]) -> Matrix:
    """View a tensor as (filters, weights), as one row if a filter is one weight."""
    values = integers if integers.size else np.zeros(1, np.int32)
    rows = len(values) if values.ndim > 1 else 1
    values = values.reshape(1 if rows == values.size else rows, -1)
    zero_rows, zero_columns = (np.zeros(n, np.uint8) for n in values.shape)
    taps, width = prod(integers.shape[2:]), integers.shape[-1] if integers.ndim > 2 else 1
    column_sums = np.zeros(values.shape[1], np.int64)
    channel_sums = np.zeros(-(-values.shape[1] // max(taps, 1)), np.int64)
    sums = column_sums, channel_sums
    return Matrix(values, zero_rows, zero_columns, *sums, max(taps, 1), max(width, 1))


def zeros_of(values: NDArray[np.int32]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return 1 for every all-zero row, and 1 for every all-zero column."""
    return (
        np.array(~values.any(axis=1), np.uint8),
        np.array(~values.any(axis=0), np.uint8),
    )


def summarise(matrix: Matrix) -> Summary:
    """Return what is said of a matrix whose zero rows and columns are known."""
    magnitudes = np.abs(matrix.values)
    largest, total = int(magnitudes.max()), int(magnitudes.sum(dtype=np.int64))
    if not largest:
        return NOTHING
    n_rows, n_columns = (int(np.sum(flags == 0)) for flags in matrix[1:3])
    mean = (total << LEVEL_SCALE) // max(n_rows * n_columns, 1)
    trusts = (MOST_TRUST,) * 3 if len(magnitudes) == 1 else _find_trusts(matrix, magnitudes, total)
    return Summary(min(largest, UNLIMITED), find_level(mean), *trusts)


def _find_trusts(matrix: Matrix, magnitudes: NDArray[np.int32], total: int) -> tuple[int, int, int]:
    """Return the trusts of rows, channels and columns."""
    used = matrix.zero_columns == 0
    rows = magnitudes.sum(axis=1, dtype=np.int64)[matrix.zero_rows == 0]
    columns = magnitudes.sum(axis=0, dtype=np.int64)
    first = np.arange(0, columns.size, matrix.taps)
    channels = np.add.reduceat(columns, first)
    widths = np.add.reduceat(used, first, dtype=np.int64)
    n_columns = int(widths.sum())
    flat, n_weights = magnitudes.reshape(-1), rows.size * n_columns
    blocks = (flat[at : at + _BLOCK] for at in range(0, flat.size, _BLOCK))
    squares = sum(int(np.einsum("i,i", block, block, dtype=np.int64)) for block in blocks)
    variance = n_weights * squares - total**2

    def trust(sums: NDArray[np.int64], expected: NDArray[np.int64], n_means: int = 1) -> int:
        return _find_trust(sums, expected, n_means, n_weights // max(sums.size, 1), variance)

    row = trust(rows, np.full_like(rows, (total << 8) // max(rows.size, 1)))
    of_column = (total << 8) // max(n_columns, 1)
    if matrix.taps == 1:
        return row, MOST_TRUST, trust(columns[used], np.full_like(columns[used], of_column))
    some = widths > 0
    channel = trust(channels[some], widths[some] * of_column)
    expected = np.repeat((channels << 8) // np.maximum(widths, 1), matrix.taps)[: columns.size]
    return row, channel, trust(columns[used], expected[used], int(some.sum()))


def _find_trust(
    sums: NDArray[np.int64],
    expected: NDArray[np.int64],
    n_means: int,
    in_group: int,
    variance: int,
) -> int:
    """Say how many weights of a group it takes to believe their mean as much as the expected one.

    That is the variance of magnitudes within groups over that of the means of groups. Absolute
    deviations cannot overflow where squares could; 11/7 of their square is about the variance.

    Args:
        sums: (groups,), of the magnitudes of each group.
        expected: (groups,), what was to be expected, in 2**-8.
        n_means: How many means that was taken from.
        in_group: Weights in each group.
        variance: Of a magnitude, times the square of the number of weights.

    Returns:
        The binary logarithm, 2 to 9.
    """
    deviation = int(np.abs((sums << 8) - expected).sum())
    chance = 7 * (sums.size - n_means) * variance << 16
    excess = 11 * deviation**2 * in_group * sums.size - chance
    if excess <= 0:
        return MOST_TRUST
    ratio = 3 * chance * in_group // (2 * excess)
    return min(max(ratio.bit_length() - 1, LEAST_TRUST), MOST_TRUST)
