r"""Round weights so that later ones make up for the errors of earlier ones.

The damage of rounding weights ``W`` to ``Q`` is :math:`\tfrac12 \operatorname{tr}(G E A E^\top)`
with :math:`E = W - Q` (see `statistics`). The weights are rounded row by row and column by column,
and what one errs is taken off those to come, by least squares: with the Cholesky factors
:math:`A^{-1} = U^\top U` and :math:`G^{-1} = V^\top V` the error
:math:`e = (w_{oi} - q_{oi}) / (V_{oo} U_{ii})` costs :math:`\tfrac12 e^2` and leaves
:math:`w_{pj} - e V_{op} U_{ij}` to round. Since what is best for a weight depends on those after
it, a few ways through each row are followed, and the best of them is taken at its end.

With steps that follow from `allocation`, the cost of an integer is its damage + slope * bits. A
weight that learns on is rounded with a dead zone, which is what that choice comes to on average:
without it, training would move a part of the weights back to the integers that were not worth their
bits. Where a row has a few levels to choose from, bits do not count.

Reference:
    Frantar et al., "GPTQ", ICLR 2023, algorithm 1, for the inputs' side, and Tseng et al.,
    "Model-Preserving Adaptive Rounding", 2025, for both; the choice by rate and distortion as in
    DeepCABAC (see `codec`), here with the static code lengths of the tensor; the M-algorithm of
    Anderson and Mohan, "Sequential Coding Algorithms", 1984, for the ways that are followed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from filterpress.allocation import SLOPE, steps_of
from filterpress.representations import MAX_INTEGER, Layer, quantize_
from filterpress.statistics import Moments

DAMPING = 1e-3  # of the mean power, added to second moments: calibration images are few
OUTPUT_DAMPING = 0.3  # as for the inputs'; derivatives are drawn, and few images have large ones
SURVIVORS = 4  # ways through a row that are followed
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
    middle = integers + dead_zone * integers.sign()
    half = INSIDE * spacing + dead_zone * (integers == 0)
    floor, ceiling = middle - half, middle + half
    if low is not None:
        floor = floor.masked_fill(integers == low[:, None], -torch.inf)
    if high is not None:
        ceiling = ceiling.masked_fill(integers == high[:, None], torch.inf)
    units = (layer.weight.detach().flatten(1) / step[:, None]).clamp(floor, ceiling)
    with torch.no_grad():
        layer.weight.copy_((units * step[:, None]).view_as(layer.weight))
    quantize_(layer, step, low, high, spacing, dead_zone)


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
    rows = seen_rows(weight, moments).contiguous()
    table = levels.view(*rows.shape[:2], -1).contiguous()
    factor = _inverse_factor(moments.inputs, DAMPING).mT.contiguous()
    across = _inverse_factor(moments.outputs, OUTPUT_DAMPING).contiguous()
    places = torch.zeros(rows.shape, dtype=torch.long)
    for group in range(len(rows)):
        _search_rows(
            rows[group].numpy(),
            factor[group].numpy(),
            across[group].numpy(),
            table[group].numpy(),
            price.numpy(),
            places[group].numpy(),
            SURVIVORS,
        )
    return places.flatten(0, 1)


def code_lengths(integers: Tensor) -> Tensor:
    """Return the bits ``(LARGEST + 1,)`` of each magnitude, sign included, by how often it occurs.

    Magnitudes that are rare or absent have the length that halving with each step gives them.
    """
    magnitudes = integers.abs().clamp(max=LARGEST).long().flatten()
    counts = torch.bincount(magnitudes, minlength=LARGEST + 1).double()
    falling = 0.5 ** torch.arange(LARGEST + 1, dtype=torch.float64)
    share = counts / counts.sum() + 0.02 * falling + 1e-9
    bits = -(share / share.sum()).log2()
    bits[1:] += 1
    return bits.float()


def _inverse_factor(second: Tensor, damping: float) -> Tensor:
    """Return upper triangular ``U`` with ``U^T U`` the inverse of second moments ``(G, d, d)``."""
    power = second.diagonal(dim1=1, dim2=2)
    ridge = damping * power.mean(dim=1) + 1e-5 * power.amax(dim=1) + 1e-24
    failed = torch.ones(len(second), dtype=torch.bool)
    while failed.any():
        safe = second + torch.diag_embed(ridge[:, None].expand_as(power))
        # with rows and columns in reverse order, the factor of the inverse is an inverse
        hopeless = not bool(torch.isfinite(ridge).all())
        lower, info = torch.linalg.cholesky_ex(safe.flip(1, 2), check_errors=hopeless)
        failed = info > 0  # single precision has left directions with less than no power
        ridge = torch.where(failed, 10 * ridge, ridge)
    upper = lower.flip(1, 2)
    identity = torch.eye(second.shape[-1], dtype=second.dtype).expand_as(second)
    factor: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return factor


@njit(cache=True)
def _search_rows(
    rows: NDArray[np.float32],
    factor: NDArray[np.float32],
    across: NDArray[np.float32],
    levels: NDArray[np.float32],
    price: NDArray[np.float32],
    places: NDArray[np.int64],
    n_ways: int,
) -> None:
    """Find the levels of least damage and price.

    Args:
        rows: (R, d) weights; changed.
        factor: (d, d) of `_inverse_factor`, of the inputs, transposed.
        across: (R, R) of `_inverse_factor`, of the outputs.
        levels: (R, K) ascending.
        price: (K,).
        places: (R, d), filled.
        n_ways: At least 1.
    """
    n_rows, d = rows.shape
    for row in range(n_rows):
        own = across[row, row]
        _search_row(rows[row], factor, own, levels[row], price, places[row], n_ways)
        for later in range(row + 1, n_rows):
            share = across[row, later] / own
            for i in range(d):
                rows[later, i] -= share * (rows[row, i] - levels[row, places[row, i]])


@njit(cache=True)
def _search_row(
    row: NDArray[np.float32],
    factor: NDArray[np.float32],
    own: float,
    levels: NDArray[np.float32],
    price: NDArray[np.float32],
    places: NDArray[np.int64],
    n_ways: int,
) -> None:
    """Find the levels of one row: each way goes on to the levels beside its value, and to zero."""
    zero = np.abs(levels).argmin()
    costs, n_alive = np.zeros(n_ways), 1
    errors = np.zeros((2, n_ways, row.size), np.float32)  # of the ways so far, and of those to come
    parents, picks = np.zeros((2, row.size, n_ways), np.int64)
    best = np.zeros((n_ways, 4))  # cost, parent, place and error of the ways to come
    for i in range(row.size):
        now, then = errors[i % 2], errors[1 - i % 2]
        best[:, 0] = np.inf
        for way in range(n_alive):
            value = row[i] - _dot(now[way], factor[i], i)
            above = np.searchsorted(levels, value)
            below = max(above - 1, 0)
            above = min(above, levels.size - 1)
            for k, place in enumerate((below, above, zero)):
                if (k == 1 and above == below) or (k == 2 and below <= zero <= above):
                    continue
                error = (value - levels[place]) / factor[i, i]
                cost = costs[way] + 0.5 * (error / own) ** 2 + price[place]
                _insert(best, cost, way, place, error)
        n_alive = int((best[:, 0] < np.inf).sum())
        for way in range(n_alive):
            parent = int(best[way, 1])
            costs[way], parents[i, way], picks[i, way] = best[way, 0], parent, int(best[way, 2])
            then[way, :i] = now[parent, :i]
            then[way, i] = best[way, 3]
    way = 0
    for i in range(row.size - 1, -1, -1):
        places[i] = picks[i, way]
        way = parents[i, way]


@njit(cache=True)
def _insert(
    best: NDArray[np.float64], cost: float, parent: float, place: float, error: float
) -> None:
    """Put an entry in its place among those sorted by cost; the last one goes."""
    slot = len(best) - 1
    if cost >= best[slot, 0]:
        return
    while slot > 0 and best[slot - 1, 0] > cost:
        best[slot] = best[slot - 1]
        slot -= 1
    best[slot, 0], best[slot, 1], best[slot, 2], best[slot, 3] = cost, parent, place, error


@njit(cache=True, fastmath={"reassoc", "contract"})
def _dot(left: NDArray[np.float32], right: NDArray[np.float32], n: int) -> np.float32:
    """Return the product of the first n entries, vectorised."""
    total = np.float32(0)
    for j in range(n):
        total += left[j] * right[j]
    return total
