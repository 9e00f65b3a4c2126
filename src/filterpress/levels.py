"""The levels that the weights of a layer can be rounded to: what they cost, and rounding to them.

A layer's levels are a uniform grid for each row, or a codebook for all (see `grids`). As an option
of the allocator they stand beside steps that follow from ``theta``, and beside projections: the
bytes are the order-0 entropy of the nearest levels, the damage that of rounding to them, less what
making up for errors saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from filterpress.allocation import BIAS_BITS, LEFT, STEP_BITS, Allocation, Option
from filterpress.grids import Grid, Levels, best_grid, codebook, range_grid
from filterpress.learned_rounding import round_learned_to
from filterpress.representations import Layer, share_levels_
from filterpress.rounding import quantize_at_, round_compensated_to, round_nearest_to
from filterpress.statistics import Moments, recalibrate_
from filterpress.surgery import layers, plain

LEVEL_BITS = 16.0  # of a codebook in the file


def fit_levels(
    weight: Tensor,
    moments: Moments,
    kind: str,
    bits: int,
    *,
    per: str = "channel",
    fit: str = "outputs",
    seed: int = 0,
) -> Levels:
    """Choose the levels for a layer's weights.

    Args:
        weight: ``(O, ...)``.
        moments: The layer's statistics.
        kind: symmetric, asymmetric or codebook.
        bits: Their number, as a power of two.
        per: channel or tensor: what has a grid of its own; a codebook is for the whole layer.
        fit: range (levels span the weights), weights or outputs (levels of least error of these).
        seed: Seed of a codebook.
    """
    rows = weight.flatten(1)
    importance = moments.importance if fit == "outputs" else torch.ones_like(rows)
    if kind == "codebook":
        return Levels(kind, bits, codebook(rows, importance, 2**bits, seed=seed))
    whole, symmetric = per == "tensor", kind == "symmetric"
    seen = rows.reshape(1, -1) if whole else rows
    if fit == "range":
        grid = range_grid(seen, bits, symmetric=symmetric)
    else:
        grid = best_grid(seen, importance.reshape(seen.shape), bits, symmetric=symmetric)
    if whole:
        n = len(rows)
        grid = Grid(grid.step.expand(n), grid.low.expand(n), grid.high.expand(n), grid.spacing)
    return Levels(kind, bits, grid)


def level_option(layer: Layer, levels: Levels, moments: Moments, rounding: str) -> Option:
    """Estimate what a layer costs and damages when rounded to levels.

    Args:
        layer: Plain layer.
        levels: Its levels.
        moments: Its statistics.
        rounding: As for `choose`.
    """
    weight = layer.weight.detach()
    table = levels.table(len(weight))
    places = round_nearest_to(weight, table)
    delta = table.gather(1, places) - weight.flatten(1)
    damage = 0.5 * float((moments.importance * delta.square()).sum())
    if isinstance(levels.values, Grid):
        places = places + (levels.values.low / levels.values.spacing).long()[:, None]
    counts = (places - places.min()).flatten().bincount().double()
    entropy = torch.special.entr(counts / counts.sum()).sum() / math.log(2)
    side = len(weight) * (STEP_BITS + BIAS_BITS)
    if isinstance(levels.values, Tensor):
        side += LEVEL_BITS * len(levels.values)
    n_bytes = (float(entropy) * weight.numel() + side) / 8
    left = 1.0 if rounding == "nearest" else LEFT
    return Option(0, None, (), left * damage, n_bytes=n_bytes, levels=levels)


def choose(layer: Layer, levels: Levels, moments: Moments, rounding: str) -> Tensor:
    """Choose a level for each weight.

    Args:
        layer: Plain layer.
        levels: Its levels.
        moments: Its statistics.
        rounding: nearest, compensated (see `rounding`) or learned (see `learned_rounding`).

    Returns:
        ``(O, d)`` places among the levels of each row.
    """
    weight = layer.weight.detach()
    table = levels.table(len(weight))
    if rounding == "nearest":
        return round_nearest_to(weight, table)
    way = round_learned_to if rounding == "learned" else round_compensated_to
    return way(weight, table, moments)


def quantize_to_(layer: Layer, levels: Levels, places: Tensor, moments: Moments) -> None:
    """Make a plain layer compute with levels, and correct its bias.

    Args:
        layer: Plain layer, changed in place.
        levels: Its levels.
        places: ``(O, d)`` of each weight among those of its row.
        moments: Its statistics, with the mean of the inputs.
    """
    before = layer.weight.detach().clone()
    if isinstance(levels.values, Grid):
        integers = levels.values.low[:, None] + levels.values.spacing * places
        quantize_at_(layer, integers, *levels.values)
    else:
        share_levels_(layer, levels.values, places.view_as(before))
    correct_bias_(layer, before, moments)


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


def rounder(
    network: nn.Module, images: Tensor, moments: Mapping[str, Moments], rounding: str
) -> Callable[[Allocation], nn.Module]:
    """Return what rounds a copy of a network to the levels of an allocation.

    It corrects biases and measures batch-norm again, and chooses the levels of weights once for
    each form of a layer.

    Args:
        network: A plain network.
        images: ``(N, C, H, W)`` calibration images.
        moments: Its layers' statistics.
        rounding: As for `choose`.
    """
    known: dict[tuple[object, ...], Tensor] = {}

    def build(allocation: Allocation) -> nn.Module:
        result = plain(network)
        for name, option in allocation.chosen.items():
            if option.levels is None:
                raise ValueError(f"allocation must have levels for every layer, got none of {name}")
            layer, key = layers(result)[name], (name, *option.form)
            if key not in known:
                known[key] = choose(layer, option.levels, moments[name], rounding)
            quantize_to_(layer, option.levels, known[key], moments[name])
        recalibrate_(result, images)
        return result

    return build
