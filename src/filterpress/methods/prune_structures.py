r"""Remove what the loss hangs on least in pieces that hardware can leave out.

Saliency (see `saliency`) is added up over filters, over the input channels of a layer, or compared
within blocks of consecutive input channels, and the pieces with the least of it for what they cost
go, in turns with retraining. What a piece costs is a mix of its share of the network's parameters
and of its multiply-accumulates; convolutions and fully connected layers are ranked apart.

Grains:
    filters: Whole output channels, or neurons of fully connected layers, from every layer that
        makes or reads them: residual sums, concatenations and depthwise convolutions go along. Any
        runtime is faster for it.
    channels: Input channels of one layer each. Where no other layer reads the channel it is cut as
        above; elsewhere its weights are zeros, which are cheap in the file and as slow as others.
    2:4, or any N:M: Of every M consecutive input channels of a filter, at each place of its kernel,
        N weights stay. No other share goes and no costs count. Faster only on hardware made for the
        pattern; ONNX Runtime on a CPU is not.

TODO numbers

Reference:
    TODO
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filterpress import package
from filterpress.fitting import Goal
from filterpress.methods import Outcome
from filterpress.representations import Layer
from filterpress.saliency import Cut, PruningConfig, kept_of, prune_in_turns, zero_
from filterpress.surgery import ChannelGroup, channel_groups, features_left, layers
from filterpress.tasks import Task

Grain = Literal["filters", "channels", "n:m"]
Saliency = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class StructureConfig(PruningConfig):
    """How `prune_structures` prunes.

    The rate is a share of all channels, of convolutions and of fully connected layers alike; with
    n:m, of each block.

    Attributes:
        grain: What goes as a whole: filters, channels, or n:m.
        balance: Weight of parameters in what a filter or channel costs, in [0, 1]; the rest is that
            of multiply-accumulates.
        m: Consecutive input channels in a block of n:m, of which as many go as the rate says.
    """

    grain: Grain = "filters"
    balance: float = 0.5
    m: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grain not in get_args(Grain):
            raise ValueError(f"grain must be one of {get_args(Grain)}, got {self.grain!r}")
        if not 0 <= self.balance <= 1:
            raise ValueError(f"balance must be in [0, 1], got {self.balance}")
        if self.m < 2:
            raise ValueError(f"m must be at least 2, got {self.m}")


def prune_structures(
    model: nn.Module, task: Task, config: StructureConfig, *, goal: Goal, seed: int = 0
) -> Outcome:
    """Prune a network in pieces by their saliency, and retrain it.

    Args:
        model: Network to prune.
        task: Data, loss and score.
        config: Which pieces, how much, and in which turns.
        goal: The budget, which decides how much where the config does not.
        seed: Seed of the retrains.

    Returns:
        The network with fewer channels, or with zeros, and what `prune_in_turns` notes.

    Raises:
        ModelError: A weight or a gradient is not finite.
    """

    def plan(network: nn.Module, example: Tensor) -> Cut:
        if config.grain == "n:m":
            return partial(_cut_blocks_, config.m)
        costs = weight_costs(network, example, config.balance)
        if config.grain == "channels":
            return partial(_cut_channels_, costs)
        return partial(_cut_filters_, channel_groups(network, example), costs)

    shrink = config.grain != "n:m"  # a channel less would shift the blocks
    pruned = prune_in_turns(model, task, config, plan, goal=goal, seed=seed, shrink=shrink)
    return Outcome(*pruned)


def _cut_filters_(
    groups: Sequence[ChannelGroup],
    costs: Mapping[str, float],
    network: nn.Module,
    saliency: Saliency,
    rate: float,
) -> None:
    """Let nothing read the channels of least saliency."""
    modules = layers(network)
    for linear in (False, True):
        of_kind = [
            group
            for group in groups
            if all(isinstance(modules[m.name], nn.Linear) for m in group.producers) == linear
        ]
        kept = kept_of([filter_scores(group, saliency, costs) for group in of_kind], rate)
        _keep_features_(network, features_left(network, of_kind, kept))


def _cut_channels_(
    costs: Mapping[str, float], network: nn.Module, saliency: Saliency, rate: float
) -> None:
    """Let each layer read the channels of most saliency only."""
    for linear in (False, True):
        names = [
            name
            for name, layer in layers(network).items()
            if isinstance(layer, nn.Linear) == linear and not _is_grouped(layer)
        ]
        scores = [along(saliency[n], 1).mean(dim=1) / costs[n] for n in names]
        _keep_features_(network, dict(zip(names, kept_of(scores, rate), strict=True)))


def _cut_blocks_(m: int, network: nn.Module, saliency: Saliency, rate: float) -> None:
    """Leave a few weights of each block of consecutive input channels."""
    n = max(1, m - round(rate * m))
    zero_(network, {name: kept_of_blocks(score, n, m) for name, score in saliency.items()})


def _keep_features_(network: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Set the weights of input features to zero, those that are false in ``(I,)`` by layer."""
    zero_(
        network,
        {
            name: keep.view(-1, *[1] * (layers(network)[name].weight.ndim - 2))
            for name, keep in kept.items()
        },
    )


def _is_grouped(layer: Layer) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups > 1


def weight_costs(network: nn.Module, example: Tensor, balance: float) -> dict[str, float]:
    """Return what one weight of each layer costs, as a share of the whole network.

    Args:
        network: A plain network.
        example: ``(N, C, H, W)`` images.
        balance: Weight of the share of parameters; the rest is that of multiply-accumulates.

    Returns:
        By layer name; the costs of all weights add up to 1.
    """
    channels, height, width = example.shape[1:]
    macs = package.macs_by_layer(network, (channels, height, width))
    sizes = {name: layer.weight.numel() for name, layer in layers(network).items()}
    n_weights, n_macs = sum(sizes.values()), sum(macs.values())
    return {
        name: balance / n_weights + (1 - balance) * macs.get(name, 0) / size / n_macs
        for name, size in sizes.items()
    }


def filter_scores(group: ChannelGroup, saliency: Saliency, costs: Mapping[str, float]) -> Tensor:
    """Return the saliency of each channel of a group for what it costs.

    Args:
        group: The layers that make, pass on and read the channels.
        saliency: Of all weights, by layer name.
        costs: Of one weight, by layer name.

    Returns:
        ``(n_channels,)``, the sums over all weights that go with a channel.
    """
    worth, cost = torch.zeros(group.n_channels), torch.zeros(group.n_channels)
    for member in group.members:
        if member.name in saliency:  # not a norm
            rows = along(saliency[member.name], int(member.side == "in"))[member.features]
            worth.index_add_(0, member.channels, rows.sum(dim=1))
            spent = torch.full((len(rows),), rows.shape[1] * costs[member.name])
            cost.index_add_(0, member.channels, spent)
    return worth / cost


def along(weight: Tensor, dim: int) -> Tensor:
    """View a weight with a row for each feature along a dimension: ``(n, the others)``."""
    return weight.transpose(0, dim).flatten(1)


def kept_of_blocks(score: Tensor, n: int, m: int) -> Tensor:
    """Keep the n highest scores of each m consecutive input channels.

    Args:
        score: ``(O, I, ...)``, not negative.
        n: How many stay.
        m: Size of a block; the last one may be smaller, and keeps as many.

    Returns:
        Booleans of the same shape.

    Example:
        >>> kept_of_blocks(torch.tensor([[1.0, 4.0, 3.0, 2.0, 5.0]]), 2, 4).long().tolist()
        [[0, 1, 1, 0, 1]]
    """
    columns = score.flatten(1).view(*score.shape[:2], -1)  # (O, I, T)
    padded = F.pad(columns, (0, 0, 0, -score.shape[1] % m), value=-1.0)
    blocks = torch.unflatten(padded, 1, (-1, m))  # (O, I/m, m, T)
    ranks = blocks.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
    keep: Tensor = ranks < n
    return keep.flatten(1, 2)[:, : score.shape[1]].reshape(score.shape)
