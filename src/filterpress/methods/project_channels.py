r"""Project the input channels of each layer on the few directions that its outputs need.

A layer becomes a 1x1 convolution to ``r`` channels and the layer itself on these, grouped when
groups of filters live in different subspaces; both are rounded to steps, each weight making up for
the errors of those before (see `rounding`). Ranks, groups and steps of the whole network come from
one allocator, so that the encoded file meets the budget at the least damage to the network's
outputs; a layer that gains nothing from a projection is only rounded. Fixed widths and codebooks
can stand beside these options, and are seldom chosen: entropy-coded, they take no fewer bytes. So
can the chains of other methods (see `chains`).

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
from dataclasses import dataclass
from itertools import product

from torch import Tensor, nn

from filterpress.allocation import Rates, options
from filterpress.building import Source, build, measured, told
from filterpress.chains import CUTS, chain_options, kinds_of
from filterpress.fitting import Attempt, Goal, fit_budget
from filterpress.folding import fold_options, linear_channels, spreads_of
from filterpress.levels import fit_levels, level_option
from filterpress.methods import Outcome
from filterpress.progress import progress
from filterpress.surgery import layers

LEVELS = {  # kinds of them that stand beside steps
    "steps": (),
    "widths": ("symmetric",),
    "codebooks": ("codebook",),
    "all": ("symmetric", "codebook"),
}


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    """How `project_channels` chooses.

    Attributes:
        images: Calibration images; fewer where they are large.
        max_groups: Largest number of groups of filters with a projection of their own; 0 projects
            nothing, and layers are only rounded.
        kinds: Chains of layers that stand beside projections, with commas between: svd, tucker, cp,
            spatial, separable and low-rank; none without a name.
        levels: What else layers may be rounded to: steps (nothing but multiples of steps that the
            allocator chooses), widths (integers of 1 to 8 bits, too), codebooks (of 2 to 256
            numbers, too), or all.
        max_shrink: Largest factor by which one pass may shrink the file; statistics are local, and
            a long way is better gone in several passes. 0 sets no limit.
    """

    images: int = 1024
    max_groups: int = 4
    kinds: str = ""
    levels: str = "steps"
    max_shrink: float = 0.0

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"images must be at least 1, got {self.images}")
        if self.max_groups < 0:
            raise ValueError(f"max_groups must be 0 or more, got {self.max_groups}")
        if self.kinds:
            kinds_of(self.kinds, tuple(CUTS))
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
        The network with quantised, partly projected layers; the number of layers ``projected``, of
        those whose projection was ``folded`` into others, and of those ``cut`` into chains, the
        ``distortion`` and the bytes predicted, and ``theta``. Where no allocation meets the budget,
        the smallest.

    Raises:
        ModelError: Every allocation found is one to avoid.
    """
    source = measured(model, images, seed=seed)
    linear = linear_channels(source.network, images[:2]) if config.max_groups else []
    source = source._replace(linear=linear, spreads=spreads_of(source.network, linear, images))
    rates = _rates(source, config, seed)
    if config.max_shrink:
        least = math.ceil(goal.size(model) / config.max_shrink)
        goal = goal._replace(max_bytes=max(goal.max_bytes, least))
    return _outcome(fit_budget(rates, lambda allocation: build(source, allocation), goal))


def _rates(source: Source, config: ProjectionConfig, seed: int) -> Rates:
    """List what every layer, and every group of layers between nonlinearities, can become."""
    used = {n: layer for n, layer in layers(source.network).items() if n in source.moments}
    kinds = kinds_of(config.kinds, tuple(CUTS)) if config.kinds else ()
    candidates = {}
    with progress("reduce", len(used) + len(source.linear)) as advance:
        for name, layer in used.items():
            groups, moments = config.max_groups, source.moments[name]
            candidates[name] = options(layer, moments, max_groups=groups, seed=seed)
            candidates[name] += chain_options(layer, moments, kinds, seed=seed)[1:]
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
    options = found.allocation.chosen.values()
    folded = sum(option.folded for option in options)
    projected = sum(option.rank > 0 for option in options) - folded
    counts = {"projected": float(projected), "folded": float(folded)}
    if cut := sum(option.plan is not None for option in options):
        counts["cut"] = float(cut)
    notes, changed = told(found)
    return Outcome(found.model, {**counts, **notes}, changed)
