r"""Round weights so that later ones make up for the errors of earlier ones.

The damage of rounding weights ``W`` to ``Q`` is :math:`\tfrac12 \operatorname{tr}(G E A E^\top)`
with :math:`E = W - Q` (see `statistics`). With the factors :math:`A = U U^\top` and
:math:`G = V V^\top`, upper triangular, it is half the sum of squares of :math:`V^\top E U`, where
an entry depends on the errors in its row and above, in its column and to the left. In turn each
weight takes a level that makes its entry small, and so makes up for the errors before it. What
these put there is a product of matrices, but for those of the same tile of weights.

With steps that follow from `allocation`, the cost of an integer is its damage + slope * bits. A
weight that learns on is rounded with a dead zone, which is what that choice comes to on average:
without it, training would move a part of the weights back to the integers that were not worth their
bits. Where a row has a few levels to choose from, bits do not count.

Reference:
    Frantar et al., "GPTQ", ICLR 2023, algorithm 1, for the inputs' side, and Tseng et al.,
    "Model-Preserving Adaptive Rounding", 2025, for both; the choice by rate and distortion as in
    DeepCABAC (see `codec`), here with the static code lengths of the tensor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from filterpress.allocation import SLOPE, steps_of
from filterpress.forms import MAX_INTEGER
from filterpress.representations import Layer, quantize_
from filterpress.statistics import Moments

DAMPING = 1e-3  # of the mean power, added to second moments: calibration images are few
OUTPUT_DAMPING = 0.3  # as for the inputs'; derivatives are drawn, and few images have large ones
TILE = 128  # rows and columns
BITS_COUNT = 0.4  # of what a bit is worth to the allocator; more leaves too little to retrain
INSIDE = 0.49  # steps from the middle of an integer's cell to where rounding surely gives it
DEAD_ZONE = 0.2  # steps by which cells lie farther from zero than their integers
LARGEST = 255  # integers above have the code length of this one


def quantize_compensated_(layer: Layer, moments: Moments, theta: float) -> None:
    """Make a plain layer compute with integers, chosen for the layer's outputs.

    Args:
        layer: Plain layer, changed in place: it learns with the weights it had, moved into the cell
            of their integer where another one than the nearest was chosen.
        moments: Its statistics.
        theta: Cost of rounding a weight, which gives the steps; see `allocation`.
    """
    weight = layer.weight.detach()
    steps = steps_of(weight, moments, theta)
    steps = torch.maximum(steps, weight.flatten(1).abs().amax(dim=1) / MAX_INTEGER)
    integers = round_compensated(weight, steps, moments, theta)
    quantize_at_(layer, integers, steps, dead_zone=DEAD_ZONE)


def quantize_at_(
    layer: Layer,
    integers: Tensor,
    step: Tensor,
    low: Tensor | None = None,
    high: Tensor | None = None,
    spacing: int = 1,
    dead_zone: float = 0.0,
) -> None:
    """Make a plain layer compute with the integers chosen for it.

    It learns with the weights it had, moved into the cell of their integer where another one than
    the nearest was chosen.

    Args:
        layer: Plain layer, changed in place.
        integers: ``(O, d)``.
        step: ``(O,)``; it and the rest as for `representations.quantize_`.
        low: ``(O,)``.
        high: ``(O,)``.
        spacing: Of the integers.
        dead_zone: In steps.
    """
    floor, ceiling = cells(integers, spacing, dead_zone)
    if low is not None:
        floor = floor.masked_fill(integers == low[:, None], -torch.inf)
    if high is not None:
        ceiling = ceiling.masked_fill(integers == high[:, None], torch.inf)
    units = (layer.weight.detach().flatten(1) / step[:, None]).clamp(floor, ceiling)
    with torch.no_grad():
        layer.weight.copy_((units * step[:, None]).view_as(layer.weight))
    quantize_(layer, step, low, high, spacing, dead_zone)


def cells(integers: Tensor, spacing: int, dead_zone: float) -> tuple[Tensor, Tensor]:
    """Return bounds between which values, in steps, are surely rounded to given integers."""
    middle = integers + dead_zone * integers.sign()
    half = INSIDE * spacing + dead_zone * (integers == 0)
    return middle - half, middle + half


def round_compensated(weight: Tensor, steps: Tensor, moments: Moments, theta: float) -> Tensor:
    """Round a weight to multiples of steps.

    Args:
        weight: ``(O, I/groups, kh, kw)`` or ``(O, I)``.
        steps: ``(O,)`` positive.
        moments: Statistics of the layer.
        theta: Cost of rounding a weight.

    Returns:
        ``(O, d)`` integers, as floats.
    """
    units = seen_rows(weight, moments).flatten(0, 1) / steps[:, None]
    largest = max(1, math.ceil(float(units.abs().max())))
    integers = torch.arange(-largest, largest + 1.0)
    lengths = code_lengths(units.round())[integers.abs().clamp(max=LARGEST).long()]
    price = lengths * (BITS_COUNT * SLOPE * theta / 8)
    return _search(weight, integers * steps[:, None], moments, price) - float(largest)


def round_compensated_to(weight: Tensor, levels: Tensor, moments: Moments) -> Tensor:
    """Round a weight to the levels of its rows, whatever the bits.

    Args:
        weight: ``(O, I/groups, kh, kw)`` or ``(O, I)``.
        levels: ``(O, K)`` ascending.
        moments: Statistics of the layer.

    Returns:
        ``(O, d)`` places in the row of levels.
    """
    return _search(weight, levels, moments, torch.zeros(levels.shape[1]))


def round_nearest_to(weight: Tensor, levels: Tensor) -> Tensor:
    """Return the places ``(O, d)`` of the levels ``(O, K)`` nearest to a weight ``(O, ...)``."""
    middles = (levels[:, 1:] + levels[:, :-1]) / 2
    return torch.searchsorted(middles.contiguous(), weight.flatten(1))


def seen_rows(weight: Tensor, moments: Moments) -> Tensor:
    """View a weight as rows ``(G, O/G, d)``, zero where inputs are: these need no weight."""
    groups, d = len(moments.inputs), moments.inputs.shape[-1]
    seen = moments.inputs.diagonal(dim1=1, dim2=2) > 0
    return weight.flatten(1).view(groups, -1, d) * seen[:, None]


def _search(weight: Tensor, levels: Tensor, moments: Moments, price: Tensor) -> Tensor:
    """Choose the level of every weight, row by row and column by column.

    Args:
        weight: ``(O, I/groups, kh, kw)`` or ``(O, I)``.
        levels: ``(O, K)`` ascending.
        moments: Statistics of the layer.
        price: ``(K,)`` damage that the bits of a level are worth.

    Returns:
        ``(O, d)`` places in the row of levels.
    """
    rows = seen_rows(weight, moments)  # (G, O/G, d)
    table = levels.view(*rows.shape[:2], -1)
    along, across = factorise(moments.inputs, DAMPING), factorise(moments.outputs, OUTPUT_DAMPING)
    errors, entries = torch.zeros_like(rows), torch.zeros_like(rows)
    places = torch.zeros(rows.shape, dtype=torch.long)
    for columns in _tiles(rows.shape[2]):
        for some in _tiles(rows.shape[1]):
            above, left = slice(some.start), slice(columns.start)
            places[:, some, columns], errors[:, some, columns], entries[:, some, columns] = _tile(
                rows[:, some, columns],
                errors[:, some, left] @ along.unit[:, left, columns],
                across.unit[:, above, some].mT @ entries[:, above, columns],
                along.unit[:, columns, columns].mT,
                across.unit[:, some, some],
                along.power[:, columns],
                across.power[:, some],
                table[:, some],
                price,
            )
    return places.flatten(0, 1)


def _tiles(n: int) -> list[slice]:
    return [slice(start, min(start + TILE, n)) for start in range(0, n, TILE)]


def _tile(*args: Tensor) -> list[Tensor]:
    """Call `_choose` with tensors."""
    found = _choose(*(np.ascontiguousarray(arg.numpy()) for arg in args))
    return [torch.from_numpy(array) for array in found]


def code_lengths(integers: Tensor) -> Tensor:
    """Return the bits ``(LARGEST + 1,)`` of each magnitude, sign included, by how often it occurs.

    Magnitudes that are rare or absent have the length that halving with each step gives them.
    """
    magnitudes = integers.abs().clamp(max=LARGEST).long().flatten()
    counts = torch.bincount(magnitudes, minlength=LARGEST + 1).double()
    falling = 0.5 ** torch.arange(LARGEST + 1, dtype=torch.float64, device=counts.device)
    share = counts / counts.sum() + 0.02 * falling + 1e-9
    bits = -(share / share.sum()).log2()
    bits[1:] += 1
    return bits.float()


class Factor(NamedTuple):
    """Second moments ``unit @ diag(power) @ unit.T``."""

    unit: Tensor  # (G, d, d) upper triangular, ones on its diagonal
    power: Tensor  # (G, d)


def factorise(second: Tensor, damping: float) -> Factor:
    """Factor second moments ``(G, d, d)``."""
    power = second.diagonal(dim1=1, dim2=2)
    ridge = damping * power.mean(dim=1) + 1e-5 * power.amax(dim=1) + 1e-24
    failed = torch.ones(len(second), dtype=torch.bool)
    while failed.any():
        safe = second + torch.diag_embed(ridge[:, None].expand_as(power))
        # a lower triangular factor, with rows and columns in reverse order, is an upper one
        hopeless = not bool(torch.isfinite(ridge).all())
        lower, info = torch.linalg.cholesky_ex(safe.flip(1, 2), check_errors=hopeless)
        failed = info > 0  # single precision has left directions with less than no power
        ridge = torch.where(failed, 10 * ridge, ridge)
    upper = lower.flip(1, 2)
    scale = upper.diagonal(dim1=1, dim2=2)
    return Factor(upper / scale[:, None], scale.square())


@njit(cache=True)
def _choose(
    weights: NDArray[np.float32],
    left: NDArray[np.float32],
    above: NDArray[np.float32],
    along: NDArray[np.float32],
    across: NDArray[np.float32],
    column_power: NDArray[np.float32],
    row_power: NDArray[np.float32],
    levels: NDArray[np.float32],
    price: NDArray[np.float32],
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """Choose the levels of least damage and price in one tile of each group.

    Args:
        weights: (G, R, C).
        left: (G, R, C) what errors to the left of the tile add to the weights.
        above: (G, R, C) what those above it add; changed.
        along: (G, C, C) the tile's part of `Factor.unit` of the inputs, transposed.
        across: (G, R, R) the same of the outputs, not transposed.
        column_power: (G, C) `Factor.power` of the inputs.
        row_power: (G, R) the same of the outputs.
        levels: (G, R, K) ascending.
        price: (K,).

    Returns:
        All (G, R, C): places of levels, errors, and errors with what those to the left add.
    """
    places = np.zeros(weights.shape, np.int64)
    errors, entries = np.zeros_like(weights), np.zeros_like(weights)
    for group, row in np.ndindex(weights.shape[:2]):
        error, entry, table = errors[group, row], entries[group, row], levels[group, row]
        zero = np.abs(table).argmin()
        for i in range(error.size):
            weight = weights[group, row, i]
            reached = weight + left[group, row, i] + _dot(error, along[group, i], i)
            value = reached + above[group, row, i]
            worth = 0.5 * row_power[group, row] * column_power[group, i]
            upper = np.searchsorted(table, value)
            best, least = zero, np.inf
            if weight != 0:  # else it has been pruned, and makes up for nothing
                for place in (max(upper - 1, 0), min(upper, table.size - 1), zero):
                    cost = worth * (value - table[place]) ** 2 + price[place]
                    if cost < least:
                        best, least = place, cost
            places[group, row, i] = best
            error[i], entry[i] = weight - table[best], reached - table[best]
        for later in range(row + 1, weights.shape[1]):
            _add(above[group, later], entry, across[group, row, later])
    return places, errors, entries


@njit(cache=True)
def _add(total: NDArray[np.float32], row: NDArray[np.float32], factor: np.float32) -> None:
    """Add a multiple of a row, in place."""
    for j in range(row.size):
        total[j] += factor * row[j]


@njit(cache=True, fastmath={"reassoc", "contract"})
def _dot(left: NDArray[np.float32], right: NDArray[np.float32], n: int) -> np.float32:
    """Return the product of the first n entries, vectorised."""
    total = np.float32(0)
    for j in range(n):
        total += left[j] * right[j]
    return total
