r"""Remove the filters that another filter of their layer can stand in for.

Filters whose similarity to each other is above a threshold form a cluster; of each cluster the one
that matters most stays, and the weights that read the channels are solved again by least squares,
so that the survivor takes over the work of those removed.

Costs nothing in the file and saves, for each filter removed, its row in its own layer and its
column in the next, in bits and in multiply-accumulates alike. Does not help where no two filters
agree: on small nets trained to the end similar filters are rare, and most of what goes are filters
that never fire.

Reference:
    The claimed loop's first compression step. Where the claim leaves the measure open there are
    three; the compensation is not in the claim and is worth several times the error (He et al.,
    "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, equation 2).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from filterpress import statistics
from filterpress.compensation import channel_statistics, cut_compensated_
from filterpress.methods import Outcome
from filterpress.statistics import Moments
from filterpress.surgery import ChannelGroup, channel_groups, check_runs

Measure = Literal["activation", "cosine", "pearson"]
DEAD = 1e-8  # a channel with less than this share of the strongest one's power never fires


@dataclass(frozen=True, kw_only=True)
class SimilarityConfig:
    """How `prune_similar` finds redundant filters.

    Attributes:
        measure: ``activation``, cosine of the feature maps on calibration images; ``cosine`` or
            ``pearson``, of the filters' weights.
        threshold: Similarity in (0, 1] from which filters count as the same.
        images: Calibration images; fewer where they are large.
    """

    measure: Measure = "activation"
    threshold: float = 0.95
    images: int = 1024

    def __post_init__(self) -> None:
        if self.measure not in get_args(Measure):
            raise ValueError(f"measure must be one of {get_args(Measure)}, got {self.measure!r}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold}")
        if self.images < 1:
            raise ValueError(f"images must be at least 1, got {self.images}")


def prune_similar(
    model: nn.Module, images: Tensor, config: SimilarityConfig, *, seed: int = 0
) -> Outcome:
    """Remove the redundant filters of every layer.

    Args:
        model: Network to prune.
        images: ``(N, C, H, W)`` normalised calibration images.
        config: What counts as redundant.
        seed: Seed of the statistics.

    Returns:
        The pruned network; ``removed`` filters, and the ``distortion`` that compensation left.
    """
    result = statistics.plain_for(model, images)
    groups = channel_groups(result, images[:2])
    moments = statistics.measure(result, images, seed=seed)
    kept = [distinct_channels(result, group, moments, config) for group in groups]
    removed = sum(int((~keep).sum()) for keep in kept)
    if removed == 0:
        return Outcome(copy.deepcopy(model), {"removed": 0.0, "distortion": 0.0}, {})
    n_outputs = result(images[:2]).shape[1]
    distortion = cut_compensated_(result, groups, kept, moments)
    check_runs(result, images[:2], n_outputs)
    statistics.recalibrate_(result, images)
    changed = {
        member.name: {"removed": float((~keep).sum()), "kept": float(keep.sum())}
        for group, keep in zip(groups, kept, strict=True)
        for member in group.producers
        if not keep.all()
    }
    return Outcome(result, {"removed": float(removed), "distortion": distortion}, changed)


def distinct_channels(
    model: nn.Module,
    group: ChannelGroup,
    moments: Mapping[str, Moments],
    config: SimilarityConfig,
) -> Tensor:
    """Choose the channels of a group that no other one can stand in for.

    Returns:
        ``(n_channels,)`` boolean, the channels to keep.
    """
    views = [channel_statistics(model, member, moments) for member in group.consumers]
    power = torch.stack([view.second.diagonal() for view in views]).amax(dim=0)
    alive = power > DEAD * power.max()
    if not alive.any():
        return torch.arange(group.n_channels) == 0
    if config.measure == "activation":
        similarity = torch.stack([_normalised(view.second) for view in views]).amin(dim=0)
    else:
        filters = _filters(model, group)
        if config.measure == "pearson":
            filters = filters - filters.mean(dim=1, keepdim=True)
        similarity = _normalised(filters @ filters.T)
    importance = sum(view.importance.diagonal() * view.second.diagonal() for view in views)
    return alive & distinct(similarity, torch.as_tensor(importance) * alive, config.threshold)


def distinct(similarity: Tensor, importance: Tensor, threshold: float) -> Tensor:
    """Keep the most important item of every cluster of similar ones.

    Args:
        similarity: ``(n, n)`` symmetric, at most 1.
        importance: ``(n,)`` non-negative.
        threshold: Least similarity of any two items of a cluster.

    Returns:
        ``(n,)`` boolean.

    Example:
        >>> s = torch.tensor([[1.0, 0.99, 0.1], [0.99, 1.0, 0.2], [0.1, 0.2, 1.0]])
        >>> distinct(s, torch.tensor([1.0, 2.0, 3.0]), 0.9).tolist()
        [False, True, True]
    """
    from sklearn.cluster import AgglomerativeClustering

    if len(similarity) < 2:
        return torch.ones(len(similarity), dtype=torch.bool)
    distance = (1 - similarity).clamp(min=0).double().numpy()
    clusters = AgglomerativeClustering(
        n_clusters=None,
        metric="precomputed",
        linkage="complete",
        # just above: filters at exactly the threshold count as the same
        distance_threshold=1 - threshold + 1e-6,
    ).fit_predict(distance)
    labels = torch.from_numpy(clusters).long()
    strongest = torch.zeros(int(labels.max()) + 1).scatter_reduce(
        0, labels, importance.float(), "amax", include_self=False
    )
    first = torch.full_like(strongest, len(labels), dtype=torch.long)
    candidates = (importance.float() == strongest[labels]).nonzero().flatten()
    first.scatter_reduce_(0, labels[candidates], candidates, "amin")
    return torch.zeros(len(labels), dtype=torch.bool).index_fill(0, first, True)


def _filters(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Put the filters that make each channel, of all its producers, side by side."""
    rows = []
    for member in group.producers:
        weight = model.get_submodule(member.name).weight.detach().flatten(1)  # type: ignore[operator]
        order = member.channels.argsort(stable=True)
        rows.append(weight[member.features[order]].reshape(group.n_channels, -1))
    return torch.cat(rows, dim=1)


def _normalised(gram: Tensor) -> Tensor:
    """Turn inner products into cosines; an item without length is similar to none."""
    length = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(length > 0, 1 / length, 0)
    return gram * inverse[:, None] * inverse
