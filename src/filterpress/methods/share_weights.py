r"""Let the weights of each layer share a few values, as many as they have clusters.

BIRCH scans all weights of a layer and counts the clusters of a largest radius; k-means, seeded by
k-means++, refines these, and each weight takes one of the values. Which one it is stays; the
values learn on in `retrain`, by the gradients of all their weights. Weights that are exactly zero
have been pruned: they keep a value of their own, which is zero and stays so.

The radius of a cluster is the root of the mean squared error of sharing its value, so a threshold
bounds the damage of a weight. The numbers of clusters follow, 2 to 256 a layer, and are options of
the allocator; a weight costs the entropy of the indices and a value 16 bits, the multiply-
accumulates stay. What sets it apart from the codebooks of `quantize_weights` is that numbers of
clusters are not powers of two, and that it fits the budget in `cluster`, so that `reduce` may be
none. Does not pay in bytes: at a twentieth of ResNet-20 it does what those codebooks do, which take
more bytes than steps (docs/adr/0015). A layer left with one value is a layer no more, whatever its
damage to second order, so two are the fewest.

Reference:
    Han et al., "Deep Compression", ICLR 2016, for shared weights and their training; the source for
    the number of clusters by BIRCH (see `clustering`). Here clusters count what a weight is worth,
    later weights make up for the errors of those before, and a threshold follows from the budget.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from filterpress import statistics
from filterpress.allocation import Option, Rates
from filterpress.clustering import count_clusters
from filterpress.fitting import Attempt, Goal, fingerprint, fit_budget
from filterpress.grids import Levels, codebook, unpruned
from filterpress.levels import level_option, rounder
from filterpress.methods import Outcome
from filterpress.progress import progress
from filterpress.statistics import Moments
from filterpress.surgery import layers

CHOICES = {
    "threshold": ("damage", "deviation", "range", "layer"),
    "fit": ("weights", "outputs"),
    "rounding": ("nearest", "compensated"),
}
LEAST = 2  # clusters; a layer of one value, whatever its damage to second order, is none
MOST = 256  # values of a layer
RATIO = math.sqrt(2)  # of thresholds on offer


class Span(NamedTuple):
    """How far the weights of a layer lie apart."""

    deviation: float  # of all, which is the radius of them as one cluster
    unit: float  # what the largest radius of a cluster is a multiple of


@dataclass(frozen=True, kw_only=True)
class SharingConfig:
    """How `share_weights` clusters.

    Attributes:
        images: Calibration images.
        threshold: What the largest radius of a cluster is a multiple of, one multiple for all
            layers: damage (the error of a weight that costs the same in every layer), deviation or
            range (of the layer's weights); or layer, a threshold of its own for every layer.
        fit: weights or outputs: whether weights of a cluster count alike or by what they are worth.
        rounding: nearest (each weight takes the value of its cluster) or compensated (errors are
            fed back to later weights, which may take another one).
    """

    images: int = 1024
    threshold: str = "layer"
    fit: str = "outputs"
    rounding: str = "compensated"

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"images must be at least 1, got {self.images}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")


def share_weights(
    model: nn.Module, images: Tensor, config: SharingConfig, *, goal: Goal, seed: int = 0
) -> Outcome:
    """Share weights until the file of a network meets a budget.

    Args:
        model: Network to shrink; it stays as it is where its file meets the budget.
        images: ``(N, C, H, W)`` normalised calibration images.
        config: How to cluster.
        goal: What its file shall meet.
        seed: Seed of the statistics and of k-means++.

    Returns:
        The network whose layers share weights.

    Raises:
        ModelError: All numbers of clusters found are to avoid.
    """
    network = statistics.plain_for(model, images)
    if goal.is_met(model):
        return Outcome(copy.deepcopy(model), {"shared": 0.0, "distortion": 0.0}, {})
    moments = statistics.measure(network, images, seed=seed)
    rates = _rates(network, moments, config, seed)
    return _outcome(fit_budget(rates, rounder(network, images, moments, config.rounding), goal))


def _rates(
    network: nn.Module, moments: Mapping[str, Moments], config: SharingConfig, seed: int
) -> Rates:
    """List what every layer becomes at each threshold."""
    used = {name: layer for name, layer in layers(network).items() if name in moments}
    spans = {n: span_of(used[n].weight.detach(), moments[n], config.threshold) for n in used}
    multiples = multiples_for(spans.values())
    offered: dict[str, list[Option]] = {}
    with progress("cluster", len(used)) as advance:
        for name, layer in used.items():
            radii = [multiple * spans[name].unit for multiple in multiples]
            rows = layer.weight.detach().flatten(1)
            worth = moments[name].importance if config.fit == "outputs" else torch.ones_like(rows)
            options: dict[int, Option] = {}
            for levels in shared_levels(rows, worth, radii, seed=seed):
                if levels.n_levels not in options:
                    options[levels.n_levels] = level_option(
                        layer, levels, moments[name], config.rounding
                    )
                offered.setdefault(name, []).append(options[levels.n_levels])
            advance()
    if config.threshold == "layer":
        return Rates(offered)
    return Rates({name: found[-1:] for name, found in offered.items()}, [offered])


def span_of(weight: Tensor, moments: Moments, threshold: str) -> Span:
    """Measure the weights of a layer that have not been pruned.

    Args:
        weight: ``(O, ...)``.
        moments: The layer's statistics.
        threshold: As in `SharingConfig`.
    """
    values = weight[weight != 0].double()
    if len(values) == 0:
        return Span(0.0, 1.0)
    deviation = float(values.std(correction=0))
    if threshold == "damage":
        cost = 0.5 * moments.importance.mean()
        return Span(deviation, float(cost.clamp(min=1e-24).rsqrt()))
    if threshold == "range":
        return Span(deviation, float(values.max() - values.min()))
    return Span(deviation, deviation)


def multiples_for(spans: Iterable[Span]) -> list[float]:
    """Return multiples, in even ratios, between the fewest and the most clusters of any layer."""
    shares = [span.deviation / span.unit for span in spans if span.deviation > 0]
    if not shares:
        return [1.0]
    low = math.floor(math.log(min(shares) / MOST, RATIO))
    high = math.ceil(math.log(max(shares), RATIO))
    return [RATIO**power for power in range(low, high + 1)]


def shared_levels(
    weight: Tensor, worth: Tensor, radii: Sequence[float], *, seed: int = 0
) -> list[Levels]:
    """Find the values that weights share, for each largest radius of their clusters.

    Args:
        weight: ``(O, ...)``; zeros, which have been pruned, share zero.
        worth: Of the same shape, how much each weight counts, not negative.
        radii: Largest radii.
        seed: Seed of k-means++.

    Returns:
        A codebook for each radius.
    """
    values, counted = unpruned(weight, worth)
    pruned = int((weight == 0).any())
    counts = [0] * len(radii)
    if len(values):
        found = count_clusters(values, counted, radii, most=MOST - pruned)
        counts = [max(k, LEAST) for k in found]
    books = {k: codebook(weight, worth, k + pruned, seed=seed) for k in sorted(set(counts))}
    return [Levels("codebook", math.ceil(math.log2(len(books[k]))), books[k]) for k in counts]


def _outcome(found: Attempt) -> Outcome:
    allocation = found.allocation
    changed = {
        name: {
            "clusters": float(option.levels.n_levels) if option.levels else 0.0,
            "n_bytes": round(option.n_bytes, 1),
            "distortion": allocation.damage[name],
        }
        for name, option in allocation.chosen.items()
    }
    notes: dict[str, float | str] = {
        "shared": float(len(changed)),
        "clusters": sum(layer["clusters"] for layer in changed.values()),
        "distortion": allocation.total_damage,
        "expected_bytes": round(found.expected),
        "allocation": fingerprint(allocation),
    }
    return Outcome(found.model, notes, changed)
