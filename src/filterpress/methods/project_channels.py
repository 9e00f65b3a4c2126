r"""Project the input channels of each layer on the few directions that its outputs need.

A layer becomes a 1x1 convolution to ``r`` channels and the layer itself on these, grouped when
groups of filters live in different subspaces; both are rounded to steps, each weight making up for
the errors of those before (see `rounding`). Ranks, groups and steps of the whole network come from
one allocator, so that the encoded file meets the budget at the least damage to the network's
outputs; a layer that gains nothing from a projection is only rounded. Fixed widths and codebooks
can stand beside these options, and are seldom chosen: entropy-coded, they take no fewer bytes.

A projection costs ``G r I + O r T`` weights instead of ``O I T``, and as many multiply-accumulates
a position. It costs nothing where no nonlinearity lies between a layer and those that make its
inputs, as in the linear bottlenecks of MobileNetV2: there it is folded into these (see `folding`),
and a projection after an earlier one takes its place. Does not help 1x1 convolutions that are
nearly square and of full rank, nor grouped and depthwise ones. More than one group rarely wins at
equal bytes.

Reference:
    The claimed loop's reduction of the channel dimension. Zhang et al., "Accelerating Very Deep
    Convolutional Networks for Classification and Detection", 2015, for projections fitted on
    activations; here on the inputs' side, weighted by what the outputs are worth, and with the
    second half solved again for the rounded first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from filterpress import statistics
from filterpress.allocation import Allocation, Option, Rates, options
from filterpress.compensation import refit_projected
from filterpress.fitting import Attempt, Goal, fingerprint, fit_budget
from filterpress.folding import (
    LinearChannels,
    fold_,
    fold_options,
    linear_channels,
    spreads_of,
)
from filterpress.levels import choose, fit_levels, level_option, quantize_to_
from filterpress.methods import Outcome
from filterpress.progress import progress
from filterpress.representations import ChannelOrder, Layer, Projected, like
from filterpress.rounding import quantize_compensated_
from filterpress.statistics import Moments
from filterpress.subspaces import blocks_of, channel_moments
from filterpress.surgery import layers, plain

LEVELS = {  # kinds of them that stand beside steps
    "steps": (),
    "widths": ("symmetric",),
    "codebooks": ("codebook",),
    "all": ("symmetric", "codebook"),
}


class Source(NamedTuple):
    """A plain network, and what is known of it."""

    network: nn.Module
    images: Tensor
    moments: Mapping[str, Moments]
    linear: list[LinearChannels]
    spreads: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    """How `project_channels` chooses.

    Attributes:
        images: Calibration images; fewer where they are large.
        max_groups: Largest number of groups of filters with a projection of their own.
        levels: What else layers may be rounded to: steps (nothing but multiples of steps that the
            allocator chooses), widths (integers of 1 to 8 bits, too), codebooks (of 2 to 256
            numbers, too), or all.
        max_shrink: Largest factor by which one pass may shrink the file; statistics are local, and
            a long way is better gone in several passes. 0 sets no limit.
    """

    images: int = 1024
    max_groups: int = 4
    levels: str = "steps"
    max_shrink: float = 0.0

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"images must be at least 1, got {self.images}")
        if self.max_groups < 1:
            raise ValueError(f"max_groups must be at least 1, got {self.max_groups}")
        if self.levels not in LEVELS:
            raise ValueError(f"levels must be one of {tuple(LEVELS)}, got {self.levels!r}")
        if self.max_shrink != 0 and not 1 < self.max_shrink < math.inf:
            raise ValueError(f"max_shrink must be 0 or above 1, got {self.max_shrink}")


def project_channels(
    model: nn.Module,
    images: Tensor,
    config: ProjectionConfig,
    *,
    goal: Goal,
    seed: int = 0,
) -> Outcome:
    """Project and quantise the layers of a network until its file meets a budget.

    Args:
        model: Network to shrink.
        images: ``(N, C, H, W)`` normalised calibration images.
        config: How to choose.
        goal: What its file shall meet.
        seed: Seed of the statistics.

    Returns:
        The network with quantised, partly projected layers; the number of layers ``projected`` and
        of those whose projection was ``folded`` into others, the ``distortion`` and the bytes
        predicted, and ``theta``. Where no allocation meets the budget, the smallest.

    Raises:
        ModelError: Every allocation found is one to avoid.
    """
    network = statistics.plain_for(model, images)
    moments = statistics.measure(network, images, seed=seed)
    linear = linear_channels(network, images[:2])
    source = Source(network, images, moments, linear, spreads_of(network, linear, images))
    rates = _rates(source, config, seed)
    if config.max_shrink:
        least = math.ceil(goal.size(model) / config.max_shrink)
        goal = goal._replace(max_bytes=max(goal.max_bytes, least))
    return _outcome(fit_budget(rates, lambda allocation: apply(source, allocation), goal))


def _rates(source: Source, config: ProjectionConfig, seed: int) -> Rates:
    """List what every layer, and every group of layers between nonlinearities, can become."""
    used = {n: layer for n, layer in layers(source.network).items() if n in source.moments}
    candidates = {}
    with progress("reduce", len(used) + len(source.linear)) as advance:
        for name, layer in used.items():
            groups, moments = config.max_groups, source.moments[name]
            candidates[name] = options(layer, moments, max_groups=groups, seed=seed)
            for kind, bits in product(LEVELS[config.levels], range(1, 9)):
                levels = fit_levels(layer.weight.detach(), moments, kind, bits, seed=seed)
                candidates[name].append(level_option(layer, levels, moments, "compensated"))
            advance()
        folds = []
        for channels in source.linear:
            folds.append(fold_options(source.network, channels, source.moments, seed=seed))
            advance()
    return Rates(candidates, folds)


def _outcome(found: Attempt) -> Outcome:
    allocation = found.allocation
    changed = {
        name: {
            "rank": float(option.rank),
            "groups": float(option.groups),
            "n_bytes": round(sum(allocation.n_bytes[name]), 1),
            "distortion": allocation.damage[name],
        }
        | ({"bits": float(option.bits)} if option.bits else {})
        for name, option in allocation.chosen.items()
    }
    folded = sum(option.folded for option in allocation.chosen.values())
    projected = sum(option.rank > 0 for option in allocation.chosen.values()) - folded
    notes: dict[str, float | str] = {
        "projected": float(projected),
        "folded": float(folded),
        "distortion": allocation.total_damage,
        "theta": allocation.theta,
        "expected_bytes": round(found.expected),
        "allocation": fingerprint(allocation),
    }
    return Outcome(found.model, notes, changed)


def apply(source: Source, allocation: Allocation) -> nn.Module:
    """Give every layer the form that was chosen for it, and measure batch-norm again."""
    result = plain(source.network)
    seen = dict(source.moments)
    for channels in source.linear:
        if allocation.chosen[channels.names[0]].folded:
            seen |= fold(result, channels, source, allocation.chosen[channels.names[0]])
    statistics.note_offsets_(result, source.images)  # of batch-norm that is new
    for name, option in allocation.chosen.items():
        layer = layers(result)[name]
        if option.levels is not None:
            places = choose(layer, option.levels, seen[name], "compensated")
            quantize_to_(layer, option.levels, places, seen[name])
        elif option.rank and not option.folded:
            result.set_submodule(name, project(layer, option, seen[name], allocation.theta))
        else:
            quantize_compensated_(layer, seen[name], allocation.theta)
    statistics.recalibrate_(result, source.images)
    return result


def fold(
    network: nn.Module, channels: LinearChannels, source: Source, option: Option
) -> dict[str, Moments]:
    """Project the channels between layers without a nonlinearity.

    Args:
        network: Copy of the source's network, changed in place.
        channels: The channels to project.
        source: The network the statistics are of.
        option: Rank and subspaces.

    Returns:
        The statistics of these layers as they are now.
    """
    if option.subspaces is None:
        raise ValueError("option must have a rank to project to, got a layer that stays as it is")
    basis = option.subspaces.bases[0, : option.rank]
    energies = option.subspaces.energies[0, : option.rank]
    readers, seen = {}, {}
    for member in channels.group.producers:
        seen[member.name] = Moments(source.moments[member.name].inputs, torch.diag(energies)[None])
    for member in channels.group.consumers:
        weight, moments = layers(source.network)[member.name].weight, source.moments[member.name]
        readers[member.name], second = refit_projected(weight.detach(), basis, moments, 1)
        seen[member.name] = Moments(second, moments.outputs)
    fold_(network, channels, basis, readers, source.spreads)
    return seen


def project(layer: Layer, option: Option, moments: Moments, theta: float) -> Projected:
    """Split one layer into a projection and what is left of it, both quantised.

    Args:
        layer: Plain layer, ungrouped.
        option: Rank and subspaces.
        moments: The layer's statistics.
        theta: Cost of rounding a weight.

    Returns:
        The projected layer; its second half is the least-squares fit to the rounded first.
    """
    if option.subspaces is None:
        raise ValueError("option must have a rank to project to, got a layer that stays as it is")
    weight, order = layer.weight.detach(), option.subspaces.order
    rows = option.subspaces.bases[:, : option.rank].flatten(0, 1)  # (G r, I)
    energies = option.subspaces.energies[:, : option.rank].flatten()
    first, last = _halves(layer, len(rows), option.groups)
    with torch.no_grad():
        first.weight.copy_(rows.view_as(first.weight))
    second = channel_moments(weight, moments).second
    quantize_compensated_(first, Moments(second[None], torch.diag(energies)[None]), theta)
    rounded = first.weight.detach().flatten(1)
    rest, second = refit_projected(weight[order], rounded, moments, option.groups)
    with torch.no_grad():
        last.weight.copy_(rest.view_as(last.weight))
        if layer.bias is not None and last.bias is not None:
            last.bias.copy_(layer.bias[order])
    outputs = blocks_of(moments.outputs[0], order, option.groups)
    quantize_compensated_(last, Moments(second, outputs), theta)
    back = ChannelOrder(order.argsort()) if option.groups > 1 else None
    return Projected(first, last, back)


def _halves(layer: Layer, width: int, groups: int) -> tuple[Layer, Layer]:
    """Make the two halves of a projected layer, without weights yet."""
    last = like(layer, width, len(layer.weight), groups)
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, width, bias=False), last
    first = nn.Conv2d(layer.in_channels, width, 1, bias=False)
    if isinstance(last, nn.Conv2d) and (last.kernel_size, last.padding) == ((1, 1), (0, 0)):
        # skip first, project afterwards: the pixels between are never needed
        first.stride, last.stride = layer.stride, (1, 1)
    return first, last
