r"""Choose the levels that the weights of a layer are rounded to.

Integers from ``low`` to ``high`` times a step are a uniform grid; its step comes from the range of
the weights, or from a search for the least error. With the importance :math:`h` of each weight,
and the integers :math:`q` that a step gives, the best step for these integers is
:math:`\langle w, q\rangle_h / \langle q, q\rangle_h`; the search tries shares of the range, each
refined by this. A codebook has levels anywhere, found by k-means.

Reference:
    Nagel et al., "A White Paper on Neural Network Quantization", 2021, section 3.1 for ranges by
    minimal error; Han et al., "Deep Compression", ICLR 2016, for codebooks, here weighted by what
    the weights are worth and seeded by k-means++.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from filterpress.clustering import cluster_means
from filterpress.forms import Quantized

SHARES = [k / 40 for k in range(48, 3, -1)]  # of the range of the weights
POINTS = 4096  # of a histogram of weights; k-means needs no more


class Grid(NamedTuple):
    """A uniform grid for each row of a weight."""

    step: Tensor  # (O,) positive
    low: Tensor  # (O,) smallest integer
    high: Tensor  # (O,) largest integer
    spacing: int  # of the integers: 2 for odd ones

    @property
    def n_levels(self) -> int:
        """Number of weights that a row can have."""
        return int((self.high - self.low)[0]) // self.spacing + 1

    @property
    def levels(self) -> Tensor:
        """The weights ``(O, K)`` it can make, ascending; the rows have equally many."""
        places = self.spacing * torch.arange(self.n_levels)
        return (self.low[:, None] + places) * self.step[:, None]

    def rounded(self, rows: Tensor) -> Tensor:
        """Return the nearest integers to weights ``(O, d)``."""
        form = Quantized(*self)
        return form.integers(form.right_inverse(rows))


class Levels(NamedTuple):
    """The levels of a layer's weights."""

    kind: str  # symmetric, asymmetric or codebook
    bits: int  # there are 2**bits, or fewer
    values: Grid | Tensor  # a grid, or the levels (K,) of a codebook

    @property
    def n_levels(self) -> int:
        """Number of levels that a row can have."""
        return self.values.n_levels if isinstance(self.values, Grid) else len(self.values)

    def table(self, n_rows: int) -> Tensor:
        """Return the levels ``(O, K)`` of each row."""
        if isinstance(self.values, Grid):
            return self.values.levels
        return self.values.expand(n_rows, -1)


def range_grid(rows: Tensor, bits: int, *, symmetric: bool) -> Grid:
    """Return the grid that reaches from the smallest to the largest weight of each row.

    Args:
        rows: ``(O, d)`` weights.
        bits: 1 to 8; 2 to 8 for a grid that is not symmetric.
        symmetric: Whether the integers are as many below zero as above: one less than
            ``2**bits``, or -1 and 1 for a single bit, half the range from zero. Else they are
            ``2**bits``, of which 0 is one.
    """
    n_steps = 2**bits - 1
    if symmetric:
        largest = rows.abs().amax(dim=1)
        high = torch.full_like(largest, max(1, n_steps // 2))
        step = _positive(largest / (high if bits > 1 else 2))
        return Grid(step, -high, high, 2 if bits == 1 else 1)
    top, bottom = rows.amax(dim=1).clamp(min=0), rows.amin(dim=1).clamp(max=0)
    step = _positive((top - bottom) / n_steps)
    low = torch.round(bottom / step).clamp(-n_steps, 0)
    return Grid(step, low, low + n_steps, 1)


def best_grid(rows: Tensor, importance: Tensor, bits: int, *, symmetric: bool) -> Grid:
    """Search the grid of least weighted error for each row.

    Args:
        rows: ``(O, d)`` weights.
        importance: ``(O, d)`` cost of a squared error of each, not negative; in a row of zeros all
            weights count the same.
        bits: As for `range_grid`.
        symmetric: As for `range_grid`.
    """
    importance = torch.where(importance.any(dim=1, keepdim=True), importance, 1)
    widest = range_grid(rows, bits, symmetric=symmetric)
    best, least = widest, torch.full_like(widest.step, torch.inf)
    for share in SHARES:
        for shift in (0,) if symmetric else (0, -1, 1):
            low = widest.low if symmetric else (widest.low + shift).clamp(1 - 2**bits, 0)
            high = low + (widest.high - widest.low)
            tried = Grid(share * widest.step, low, high, widest.spacing)
            integers = tried.rounded(rows)
            power = (importance * integers.square()).sum(dim=1)
            fitted = (importance * rows * integers).sum(dim=1) / power
            step = torch.where(fitted > 0, fitted, tried.step)  # not so without integers
            error = (importance * (rows - integers * step[:, None]).square()).sum(dim=1)
            better = error < least
            least = torch.where(better, error, least)
            best = Grid(
                torch.where(better, step, best.step),
                torch.where(better, low, best.low),
                torch.where(better, high, best.high),
                widest.spacing,
            )
    return best


def codebook(weight: Tensor, importance: Tensor, n_levels: int, *, seed: int = 0) -> Tensor:
    """Find the levels of least weighted error.

    Weights that are exactly zero have been pruned: they have one of the levels, zero.

    Args:
        weight: Any shape.
        importance: Of the same shape, cost of a squared error of each weight, not negative; if all
            are zero, all weights count the same.
        n_levels: Largest number of levels, at least 1, and 2 where only some weights are zero.
        seed: Seed of the first levels.

    Returns:
        ``(K,)`` different levels, ascending.
    """
    values, worth = unpruned(weight, importance)
    zero = values.new_zeros(int((weight == 0).any()))
    if len(values) == 0:
        return zero.float()
    if len(values) > POINTS:
        low, high = values.aminmax()
        bins = ((values - low) / (high - low).clamp(min=1e-300) * (POINTS - 1)).round().long()
        mass = worth.new_zeros(POINTS).index_add(0, bins, worth)
        totals = worth.new_zeros(POINTS).index_add(0, bins, worth * values)
        values, worth = totals[mass > 0] / mass[mass > 0], mass[mass > 0]
    k = min(n_levels - len(zero), len(np.unique(values)))
    levels = cluster_means(values, k, weight=worth, seed=seed)
    return torch.from_numpy(np.unique(torch.cat([zero, levels]).float()))


def unpruned(weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights that are not zero and matter, and how much they do, both ``(n,)``.

    Args:
        weight: Any shape.
        importance: Of the same shape, not negative; where it is zero for all that are not pruned,
            they count the same.
    """
    values, worth = weight.flatten().double(), importance.flatten().double()
    values, worth = values[values != 0], worth[values != 0]
    if not worth.any():
        worth = torch.ones_like(worth)
    return values[worth > 0], worth[worth > 0]


def _positive(step: Tensor) -> Tensor:
    """Replace the steps of rows of zeros, which any step suits."""
    return torch.where(step > 0, step, 1.0)
