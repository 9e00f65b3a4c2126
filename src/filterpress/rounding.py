r"""Round weights so that later ones make up for the errors of earlier ones.

With steps :math:`\Delta_o` the damage of rounding a filter ``w`` to integers ``q`` is
:math:`\tfrac12 g (w - q\Delta) A (w - q\Delta)^\top`. One column after the other is rounded, and
what it errs is taken off the columns to come, by least squares: with the Cholesky factor ``U`` of
:math:`A^{-1} = U^\top U` the error :math:`e = (w_i - q_i\Delta) / U_{ii}` costs
:math:`\tfrac12 g e^2` and leaves :math:`w_{j>i} - e U_{ij}` to round.

With steps that follow from `allocation`, each integer is the one of least damage + slope * bits, of
the nearest one, the one below it in magnitude, and zero. A weight that learns on is rounded with a
dead zone, which is what that choice comes to on average: without it, training would move a part of
the weights back to the integers that were not worth their bits. Where a row has a few levels to
choose from, it is the nearest of these.

Reference:
    Frantar et al., "GPTQ", ICLR 2023, algorithm 1; the choice by rate and distortion as in
    DeepCABAC (see `codec`), here with the error fed back and the static code lengths of the tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from filterpress.allocation import SLOPE, steps_of
from filterpress.representations import MAX_INTEGER, Layer, quantize_
from filterpress.statistics import Moments

DAMPING = 1e-3  # of the mean power, added to second moments: calibration images are few
COLUMNS = 128  # rounded at a time, before the others are corrected
BITS_COUNT = 0.5  # of what a bit is worth to the allocator; more leaves too little to retrain
INSIDE = 0.49  # steps from the middle of an integer's cell to where rounding surely gives it
DEAD_ZONE = 0.2  # steps by which cells lie farther from zero than their integers
ENOUGH = 1e-5  # share of a row's damage below which no move is worth it
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
    units = round_compensated(weight, steps, moments, theta)
    middle, half = units + DEAD_ZONE * units.sign(), INSIDE + DEAD_ZONE * (units == 0)
    nearby = torch.clamp(weight.flatten(1) / steps[:, None], middle - half, middle + half)
    with torch.no_grad():
        layer.weight.copy_((nearby * steps[:, None]).view_as(weight))
    quantize_(layer, steps, dead_zone=DEAD_ZONE)


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
    rows = seen_rows(weight, moments)
    groups = len(rows)
    gain, scale = moments.gain.view(groups, -1), steps.view(groups, -1)
    lengths = code_lengths(torch.round(rows / scale[..., None]))
    price = torch.as_tensor(lengths * (BITS_COUNT * SLOPE * theta / 8))

    def round_block(block: Tensor, errors: Tensor, factor: Tensor) -> None:
        _round_columns(
            *(t.numpy() for t in (block, errors, factor)),
            *(t.contiguous().numpy() for t in (scale, 0.5 * gain, price)),
        )

    return _fed_back(rows, moments, round_block)


def round_compensated_to(weight: Tensor, levels: Tensor, moments: Moments) -> Tensor:
    """Round a weight to the levels of its rows, whatever the bits.

    Args:
        weight: ``(O, I/groups, kh, kw)`` or ``(O, I)``.
        levels: ``(O, K)`` ascending.
        moments: Statistics of the layer.

    Returns:
        ``(O, d)`` places in the row of levels.
    """
    rows = seen_rows(weight, moments)
    table = levels.view(*rows.shape[:2], -1).contiguous()

    def round_block(block: Tensor, errors: Tensor, factor: Tensor) -> None:
        _round_columns_to(*(t.numpy() for t in (block, errors, factor, table)))

    return _fed_back(rows, moments, round_block).long()


def round_nearest_to(weight: Tensor, levels: Tensor) -> Tensor:
    """Return the places ``(O, d)`` of the levels ``(O, K)`` nearest to a weight ``(O, ...)``."""
    middles = (levels[:, 1:] + levels[:, :-1]) / 2
    return torch.searchsorted(middles.contiguous(), weight.flatten(1))


def descend(weight: Tensor, levels: Tensor, moments: Moments, places: Tensor) -> Tensor:
    """Move one weight of each row at a time to a level beside its own, until no move helps.

    Args:
        weight: ``(O, I/groups, kh, kw)`` or ``(O, I)``.
        levels: ``(O, K)`` ascending.
        moments: Statistics of the layer.
        places: ``(O, d)`` of the weights to begin with, in the row of levels.

    Returns:
        ``(O, d)`` places; no row damages more than before.

    Reference:
        Coordinate descent as in Behdin et al., "QuantEase", 2023, but the best move of a row first.
    """
    rows = seen_rows(weight, moments)
    table = levels.view(*rows.shape[:2], -1).contiguous()
    found = places.view(rows.shape).clone()
    errors = table.gather(2, found) - rows
    pull = errors @ moments.inputs
    enough = -ENOUGH * (pull * errors).sum(dim=2).clamp(min=0)
    _move_one_by_one(*(t.numpy() for t in (found, pull, enough, table, moments.inputs)))
    return found.flatten(0, 1)


def seen_rows(weight: Tensor, moments: Moments) -> Tensor:
    """View a weight as rows ``(G, O/G, d)``, zero where inputs are: these need no weight."""
    groups, d = len(moments.inputs), moments.inputs.shape[-1]
    seen = moments.inputs.diagonal(dim1=1, dim2=2) > 0
    return weight.flatten(1).view(groups, -1, d) * seen[:, None]


def _fed_back(
    rows: Tensor, moments: Moments, round_block: Callable[[Tensor, Tensor, Tensor], None]
) -> Tensor:
    """Round block after block of columns, and take the errors of each off the others.

    Args:
        rows: ``(G, R, d)`` weights.
        moments: Statistics of the layer.
        round_block: Rounds columns ``(G, R, B)`` in place and fills in errors of their shape, given
            the block ``(G, B, B)`` of the factor.

    Returns:
        ``(G R, d)`` what the columns were rounded to.
    """
    factor = _inverse_factor(moments.inputs)
    left, units = rows.clone(), torch.empty_like(rows)
    d = rows.shape[-1]
    for start in range(0, d, COLUMNS):
        now, then = slice(start, start + COLUMNS), slice(start + COLUMNS, d)
        block = left[..., now].contiguous()
        errors = torch.empty_like(block)
        round_block(block, errors, factor[:, now, now].contiguous())
        units[..., now] = block
        left[..., then] -= errors @ factor[:, now, then]
    return units.view(-1, d)


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


def _inverse_factor(second: Tensor) -> Tensor:
    """Return upper triangular ``U`` with ``U^T U`` the inverse of second moments ``(G, d, d)``."""
    power = second.diagonal(dim1=1, dim2=2)
    ridge = DAMPING * power.mean(dim=1) + 1e-5 * power.amax(dim=1) + 1e-24
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
def _round_columns(
    rows: NDArray[np.float32],
    errors: NDArray[np.float32],
    factor: NDArray[np.float32],
    steps: NDArray[np.float32],
    gain: NDArray[np.float32],
    price: NDArray[np.float32],
) -> None:
    """Round the columns of a block, one after the other, in place.

    Args:
        rows: (G, R, B) weights; become integers.
        errors: (G, R, B) filled with the errors to feed back.
        factor: (G, B, B) of `_inverse_factor`.
        steps: (G, R).
        gain: (G, R) damage of a squared error.
        price: (LARGEST + 1,) damage that the bits of a magnitude are worth.
    """
    last = price.size - 1
    n_columns = rows.shape[2]
    for group in range(rows.shape[0]):
        for row in range(rows.shape[1]):
            step = steps[group, row]
            for i in range(n_columns):
                pivot = factor[group, i, i]
                value = rows[group, row, i]
                size = abs(value) / step
                weight = gain[group, row] * (step / pivot) ** 2
                nearest = int(np.rint(size))
                best, least = 0, weight * size**2 + price[0]
                for candidate in range(max(nearest - 1, 1), nearest + 1):
                    cost = weight * (size - candidate) ** 2 + price[min(candidate, last)]
                    if cost < least:
                        best, least = candidate, cost
                unit = best if value > 0 else -best
                error = (value - unit * step) / pivot
                rows[group, row, i] = unit
                errors[group, row, i] = error
                for j in range(i + 1, n_columns):
                    rows[group, row, j] -= error * factor[group, i, j]


@njit(cache=True)
def _round_columns_to(
    rows: NDArray[np.float32],
    errors: NDArray[np.float32],
    factor: NDArray[np.float32],
    levels: NDArray[np.float32],
) -> None:
    """Round the columns of a block to the nearest levels, one after the other, in place.

    Args:
        rows: (G, R, B) weights; become places in the row of levels.
        errors: (G, R, B) filled with the errors to feed back.
        factor: (G, B, B) of `_inverse_factor`.
        levels: (G, R, K) ascending.
    """
    n_columns, last = rows.shape[2], levels.shape[2] - 1
    for group in range(rows.shape[0]):
        for row in range(rows.shape[1]):
            table = levels[group, row]
            for i in range(n_columns):
                value = rows[group, row, i]
                place = np.searchsorted(table, value)
                if place > last or (place > 0 and value - table[place - 1] <= table[place] - value):
                    place -= 1
                error = (value - table[place]) / factor[group, i, i]
                rows[group, row, i] = place
                errors[group, row, i] = error
                for j in range(i + 1, n_columns):
                    rows[group, row, j] -= error * factor[group, i, j]


@njit(cache=True)
def _move_one_by_one(
    places: NDArray[np.int64],
    pull: NDArray[np.float32],
    enough: NDArray[np.float32],
    levels: NDArray[np.float32],
    second: NDArray[np.float32],
) -> None:
    """Make the best move of each row again and again, in place.

    Args:
        places: (G, R, d) of the weights in the row of levels.
        pull: (G, R, d) half the slope of the damage by each weight; follows the moves.
        enough: (G, R) change of the damage, negative, above which no move is made.
        levels: (G, R, K) ascending.
        second: (G, d, d).
    """
    n_columns, n_levels = places.shape[2], levels.shape[2]
    for group in range(places.shape[0]):
        for row in range(places.shape[1]):
            table = levels[group, row]
            for _ in range(n_columns):
                least, column, there = enough[group, row], -1, 0
                for i in range(n_columns):
                    here = places[group, row, i]
                    for beside in range(max(here - 1, 0), min(here + 2, n_levels)):
                        move = table[beside] - table[here]
                        change = move * (2 * pull[group, row, i] + move * second[group, i, i])
                        if change < least:
                            least, column, there = change, i, beside
                if column < 0:
                    break
                move = table[there] - table[places[group, row, column]]
                places[group, row, column] = there
                for i in range(n_columns):
                    pull[group, row, i] += move * second[group, column, i]
