r"""Round each layer's weights to a few levels, of a width that is given or chosen for each layer.

The levels are integers times a step, for each output channel or for a whole layer, or a codebook
of any ``2**bits`` numbers. The step spans the range of the weights, or is searched for the least
error, of the weights or of the outputs; each weight takes the nearest level, or one that makes up
for the errors of others. Biases take over the mean error that is left.

A weight costs ``bits`` or, entropy-coded, less, besides 6 bits a step or 16 bits a level; the
multiply-accumulates stay. With ``bits = 0`` the allocator chooses widths under the byte budget; any
other width is taken as it is, and the file is as large as it comes out. Codebooks pay where weights
are many and bits few: their levels travel with each layer, and batch-norm after a convolution is
not folded into one. A single bit needs retraining. Since the coder writes rare integers with more
bits, many levels over the whole range can cost less than few over a part of it.

Reference:
    Nagel et al., "A White Paper on Neural Network Quantization", 2021, for grids, ranges and bias
    correction; Han et al., "Deep Compression", ICLR 2016, for codebooks; see `grids`, `rounding`
    and `learned_rounding`. All is measured on the network as it was: layers are quantised
    independently of one another, and batch-norm is measured again in the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from filterpress import statistics
from filterpress.allocation import BIAS_BITS, STEP_BITS, Allocation, Option, Rates
from filterpress.fitting import fingerprint, fit_budget
from filterpress.grids import Grid, best_grid, codebook, range_grid
from filterpress.learned_rounding import round_learned_to
from filterpress.methods import Outcome
from filterpress.progress import progress
from filterpress.representations import Layer, share_levels_
from filterpress.rounding import quantize_at_, round_compensated_to, round_nearest_to
from filterpress.statistics import Moments
from filterpress.surgery import layers, plain

LEVEL_BITS = 16.0  # of a codebook in the file
CHOICES = {
    "grid": ("symmetric", "asymmetric", "codebook"),
    "per": ("channel", "tensor"),
    "fit": ("range", "weights", "outputs"),
    "rounding": ("nearest", "compensated", "learned"),
}


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How `quantize_weights` chooses levels and rounds to them.

    Attributes:
        images: Calibration images.
        bits: Width of each weight before it is entropy-coded, 1 to 8; 0 chooses one for each layer,
            so that the file meets the budget.
        grid: symmetric (as many integers below zero as above), asymmetric (zero anywhere among the
            integers), or codebook (levels anywhere).
        per: channel or tensor: what has a step, or a codebook, of its own.
        fit: range (levels span the weights), weights or outputs (levels of least error of these).
        rounding: nearest, compensated (errors are fed back to later weights), or learned (up or
            down, all weights at once; slow for wide layers).
    """

    images: int = 1024
    bits: int = 0
    grid: str = "symmetric"
    per: str = "channel"
    fit: str = "outputs"
    rounding: str = "compensated"

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"images must be at least 1, got {self.images}")
        if not 0 <= self.bits <= 8:
            raise ValueError(f"bits must be in 1..8, or 0 to choose them, got {self.bits}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if self.grid == "asymmetric" and self.bits == 1:
            raise ValueError("bits must be 2 or more for an asymmetric grid, got 1")
        if self.grid == "codebook" and self.per != "tensor":
            raise ValueError(f"per must be tensor for a codebook, got {self.per}")
        if self.grid == "codebook" and self.fit == "range":
            raise ValueError("fit must be weights or outputs for a codebook, got range")

    @property
    def widths(self) -> range:
        """The widths a layer can take."""
        if self.bits:
            return range(self.bits, self.bits + 1)
        return range(2 if self.grid == "asymmetric" else 1, 9)


class Rounded(NamedTuple):
    """What the weights of a layer are rounded to."""

    grid: Grid | Tensor  # a uniform one, or the levels (K,) of a codebook
    places: Tensor  # (O, d) of each weight among the levels of its row


def quantize_weights(
    model: nn.Module,
    images: Tensor,
    config: QuantizationConfig,
    *,
    max_bytes: int,
    size: Callable[[nn.Module], int],
    avoid: frozenset[str] = frozenset(),
    seed: int = 0,
) -> Outcome:
    """Quantise the weights of a network.

    Args:
        model: Network to shrink.
        images: ``(N, C, H, W)`` normalised calibration images.
        config: How to quantise.
        max_bytes: Largest encoded file, where widths are chosen.
        size: Size of the encoded file of a network.
        avoid: Widths, by `fitting.fingerprint`, that have failed before; not of those that are
            given.
        seed: Seed of the statistics and of codebooks.

    Returns:
        The network with quantised layers; the mean number of ``bits`` a weight before entropy
        coding, the ``distortion`` predicted for rounding to the nearest level, and the
        ``allocation``. Where no widths meet the budget, the smallest.

    Raises:
        ModelError: All widths found are to avoid.
    """
    network = statistics.plain_for(model, images)
    moments = statistics.measure(network, images, seed=seed)
    used = {name: layer for name, layer in layers(network).items() if name in moments}

    @cache
    def grid_of(name: str, bits: int) -> Grid | Tensor:
        return fit_levels(used[name].weight.detach(), moments[name], config, bits, seed=seed)

    @cache
    def rounded(name: str, bits: int) -> Rounded:
        grid = grid_of(name, bits)
        return Rounded(grid, choose(used[name], grid, moments[name], config.rounding))

    candidates = {}
    with progress("reduce", len(used)) as advance:
        for name, layer in used.items():
            candidates[name] = [
                option(layer, grid_of(name, bits), moments[name], bits) for bits in config.widths
            ]
            advance()
    rates = Rates(candidates)

    def build(allocation: Allocation) -> nn.Module:
        chosen = {name: rounded(name, o.bits) for name, o in allocation.chosen.items()}
        return apply(network, images, chosen, moments)

    if config.bits:
        allocation = rates.allocate(1.0)
        return _outcome(build(allocation), allocation, used)
    best = fit_budget(rates, build, size, max_bytes=max_bytes, avoid=avoid)
    return _outcome(best.model, best.allocation, used)


def _outcome(model: nn.Module, allocation: Allocation, used: Mapping[str, Layer]) -> Outcome:
    counts = {name: layer.weight.numel() for name, layer in used.items()}
    total = sum(counts[name] * option.bits for name, option in allocation.chosen.items())
    changed = {
        name: {"bits": float(option.bits), "n_bytes": round(option.n_bytes, 1)}
        for name, option in allocation.chosen.items()
    }
    notes: dict[str, float | str] = {
        "bits": total / sum(counts.values()),
        "distortion": allocation.damage,
        "allocation": fingerprint(allocation),
    }
    return Outcome(model, notes, changed)


def fit_levels(
    weight: Tensor, moments: Moments, config: QuantizationConfig, bits: int, *, seed: int = 0
) -> Grid | Tensor:
    """Choose the levels for a layer's weights.

    Args:
        weight: ``(O, ...)``.
        moments: The layer's statistics.
        config: Which levels.
        bits: Their number, as a power of two.
        seed: Seed of a codebook.

    Returns:
        A grid with a row for each output channel, or the levels ``(K,)`` of a codebook.
    """
    rows = weight.flatten(1)
    importance = moments.importance if config.fit == "outputs" else torch.ones_like(rows)
    if config.grid == "codebook":
        return codebook(rows, importance, bits, seed=seed)
    whole = config.per == "tensor"
    seen = rows.reshape(1, -1) if whole else rows
    symmetric = config.grid == "symmetric"
    if config.fit == "range":
        grid = range_grid(seen, bits, symmetric=symmetric)
    else:
        grid = best_grid(seen, importance.reshape(seen.shape), bits, symmetric=symmetric)
    if whole:
        n = len(rows)
        return Grid(grid.step.expand(n), grid.low.expand(n), grid.high.expand(n), grid.spacing)
    return grid


def table_of(grid: Grid | Tensor, n_rows: int) -> Tensor:
    """Return the levels ``(O, K)`` of each row."""
    return grid.levels if isinstance(grid, Grid) else grid.expand(n_rows, -1)


def option(layer: Layer, grid: Grid | Tensor, moments: Moments, bits: int) -> Option:
    """Estimate what a layer costs and damages when rounded to the nearest levels."""
    weight = layer.weight.detach()
    table = table_of(grid, len(weight))
    places = round_nearest_to(weight, table)
    delta = table.gather(1, places) - weight.flatten(1)
    damage = 0.5 * float((moments.importance * delta.square()).sum())
    if isinstance(grid, Grid):
        places = places + (grid.low / grid.spacing).long()[:, None]
    counts = (places - places.min()).flatten().bincount().double()
    entropy = torch.special.entr(counts / counts.sum()).sum() / math.log(2)
    side = len(weight) * (STEP_BITS + BIAS_BITS)
    if isinstance(grid, Tensor):
        side += LEVEL_BITS * len(grid)
    n_bytes = (float(entropy) * weight.numel() + side) / 8
    return Option(0, None, (), damage, n_bytes=n_bytes, bits=bits)


def choose(layer: Layer, grid: Grid | Tensor, moments: Moments, rounding: str) -> Tensor:
    """Choose a level for each weight.

    Args:
        layer: Plain layer.
        grid: Its levels.
        moments: Its statistics.
        rounding: Which way; see `QuantizationConfig`.

    Returns:
        ``(O, d)`` places among the levels of each row.
    """
    weight = layer.weight.detach()
    table = table_of(grid, len(weight))
    if rounding == "nearest":
        return round_nearest_to(weight, table)
    way = round_learned_to if rounding == "learned" else round_compensated_to
    return way(weight, table, moments)


def apply(
    network: nn.Module,
    images: Tensor,
    chosen: Mapping[str, Rounded],
    moments: Mapping[str, Moments],
) -> nn.Module:
    """Quantise a copy of a plain network, correct biases and measure batch-norm again."""
    result = plain(network)
    for name, (grid, places) in chosen.items():
        layer = layers(result)[name]
        before = layer.weight.detach().clone()
        if isinstance(grid, Grid):
            integers = grid.low[:, None] + grid.spacing * places
            quantize_at_(layer, integers, *grid)
        else:
            share_levels_(layer, grid, places.view_as(before))
        correct_bias_(layer, before, moments[name])
    statistics.recalibrate_(result, images)
    return result


def correct_bias_(layer: Layer, before: Tensor, moments: Moments) -> None:
    """Let a layer's bias make up for the mean error of its outputs.

    Args:
        layer: Quantised layer, changed in place; nothing to do if it has no bias.
        before: ``(O, ...)`` the weight it had.
        moments: Its statistics, with the mean of the inputs.
    """
    if layer.bias is None:
        return
    error = (before - layer.weight.detach()).flatten(1)
    groups = len(moments.mean)
    rows = error.view(groups, len(error) // groups, -1)
    with torch.no_grad():
        layer.bias += torch.einsum("grd,gd->gr", rows, moments.mean).flatten()
