r"""Remove what the loss hangs on least in pieces that hardware can leave out.

Saliency (see `saliency`) is added up over filters or input channels, or compared within blocks of
consecutive input channels, and the pieces with the least of it for what they cost go, in turns with
retraining. What a piece costs is a mix of its shares of the network's parameters and of its
multiply-accumulates; convolutions and fully connected layers are ranked apart.

Grains:
    filters: Output channels, or neurons of fully connected layers, with all that makes, passes on
        or reads them: residual sums, concatenations and depthwise convolutions go along. For any
        runtime. Saves a row in one layer and a column in the next, in bits and in
        multiply-accumulates. Before each retrain the weights that read the channels are solved
        again, to do without those gone.
    channels: Input channels of one layer. One that no other layer reads is cut as above; elsewhere
        its weights become zeros, cheap in the file and as slow as others. For networks whose
        residual sums leave little to cut.
    n:m: Of every m consecutive input channels of a filter, at each place of its kernel, the same
        number of weights stays; with a rate of 0.5, two of four. Costs do not count. For hardware
        made for the pattern; it saves bits as zeros do, and on others no time.

Single connections are the matter of `prune_salient`.

With ResNet-20 at 28 pixels cut down, ``benchmarks/latency.py`` (ONNX Runtime, one thread, one
image) finds 0.85 of the time for 30 % of the filters, 0.77 for 50 %, 0.78 for 50 % of the channels,
and 0.99 for two of four. Where widths are no multiples of 8 or so it does not help: 30 % of the
filters gone took 1.20 of the time, for the runtime leaves its blocked convolutions. Nor does it
where layers are too narrow to be halved.

Of a small ResNet on digits (97.77 % on the validation set, 98.61 % on the test) ``{"method":
"structured", "rate": 0.3, "epochs": 4, "steps": 2, "multiple": 1}`` took 49 % of the parameters and
36 % of the multiply-accumulates; 98.05 and 98.61 % stayed.

Reference:
    "The source" for the separate ranking and the balance; Molchanov et al., "Importance Estimation
    for Neural Network Pruning", CVPR 2019, for sums of gradient times weight over filters; Mishra
    et al., "Accelerating Sparse Deep Neural Networks", 2021, for n:m. Here the saliency is that of
    batches without signs, over everything that goes with a channel, for what it costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filterpress import package, statistics
from filterpress.checkpoints import NO_CHECKPOINTS, Checkpoints
from filterpress.compensation import PRUNED, refit
from filterpress.fitting import Goal
from filterpress.methods import Outcome
from filterpress.representations import Layer
from filterpress.saliency import PruningConfig, Way, kept_of, prune_in_turns
from filterpress.sparsity import prune_
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
        multiple: The filters that stay of a layer, or of layers that share channels, are a multiple
            of it, or all; of channels those that each layer reads. Others leave the fast paths of
            most runtimes.
        m: Consecutive input channels in a block of n:m, of which as many go as the rate says.
    """

    grain: Grain = "filters"
    balance: float = 0.5
    multiple: int = 8
    m: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grain not in get_args(Grain):
            raise ValueError(f"grain must be one of {get_args(Grain)}, got {self.grain!r}")
        if not 0 <= self.balance <= 1:
            raise ValueError(f"balance must be in [0, 1], got {self.balance}")
        if self.multiple < 1:
            raise ValueError(f"multiple must be at least 1, got {self.multiple}")
        if self.m < 2:
            raise ValueError(f"m must be at least 2, got {self.m}")


def prune_structures(
    model: nn.Module,
    task: Task,
    config: StructureConfig,
    *,
    goal: Goal,
    seed: int = 0,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> Outcome:
    """Prune a network in pieces by their saliency, and retrain it.

    Args:
        model: Network to prune.
        task: Data, loss and score.
        config: Which pieces, how much, and in which turns.
        goal: The budget, which decides how much where the config does not.
        seed: Seed of the retrains.
        checkpoints: Where retrains go on from, if they are there.

    Returns:
        The network with fewer channels, or with zeros, and what `prune_in_turns` notes.

    Raises:
        ModelError: A weight or a gradient is not finite.
    """

    def plan(network: nn.Module, images: Tensor) -> Way:
        if config.grain == "n:m":  # a channel less would shift the blocks
            return Way(partial(kept_blocks, config.m), prune_, shrink=False)
        costs = weight_costs(network, images, config.balance)
        make_up_ = partial(_remove_inputs_, images, seed)
        if config.grain == "channels":
            kept = partial(kept_inputs, layers(network), costs, config.multiple)
        else:
            groups = channel_groups(network, images[:2])
            kept = partial(kept_filters, network, groups, costs, config.multiple)
        return Way(kept, make_up_, shrink=True)

    pruned = prune_in_turns(
        model, task, config, plan, goal=goal, seed=seed, checkpoints=checkpoints
    )
    return Outcome(*pruned)


def kept_filters(
    network: nn.Module,
    groups: Sequence[ChannelGroup],
    costs: Mapping[str, float],
    multiple: int,
    saliency: Saliency,
    rate: float,
) -> dict[str, Tensor]:
    """Keep all but a share of the channels, and say what that leaves to those that read them.

    Args:
        network: The network of the groups.
        groups: The channels that can be cut.
        costs: Of one weight, by layer name.
        multiple: Of which as many channels of a group stay.
        saliency: Of all weights, by layer name.
        rate: Share of the channels that convolutions make, and of those of linear layers.

    Returns:
        Booleans by layer name, ``(1, I, 1, 1)`` or ``(1, I)``.
    """
    modules = layers(network)
    left: dict[str, Tensor] = {}
    for linear in (False, True):
        alike = [
            group
            for group in groups
            if all(isinstance(modules[m.name], nn.Linear) for m in group.producers) == linear
        ]
        scores = [filter_scores(group, saliency, costs) for group in alike]
        kept = in_multiples(scores, kept_of(scores, rate), multiple)
        for name, features in features_left(network, alike, kept).items():
            left[name] = left.get(name, torch.tensor(True)) & features
    return _by_input(left, saliency)


def kept_inputs(
    modules: Mapping[str, Layer],
    costs: Mapping[str, float],
    multiple: int,
    saliency: Saliency,
    rate: float,
) -> dict[str, Tensor]:
    """Keep all but a share of the input channels of convolutions, and of those of linear layers.

    Args:
        modules: The layers of the network; grouped ones keep all.
        costs: Of one weight, by layer name.
        multiple: Of which as many input channels of a layer stay.
        saliency: Of all weights, by layer name.
        rate: Share of the input channels.

    Returns:
        Booleans by layer name, ``(1, I, 1, 1)`` or ``(1, I)``.
    """
    left: dict[str, Tensor] = {}
    for linear in (False, True):
        names = [
            name
            for name, layer in modules.items()
            if isinstance(layer, nn.Linear) == linear and getattr(layer, "groups", 1) == 1
        ]
        scores = [along(saliency[n], 1).mean(dim=1) / costs[n] for n in names]
        kept = in_multiples(scores, kept_of(scores, rate), multiple)
        left |= dict(zip(names, kept, strict=True))
    return _by_input(left, saliency)


def _by_input(left: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """View booleans ``(I,)`` so that they broadcast to the weights."""
    return {n: keep.view(1, -1, *[1] * (weights[n].ndim - 2)) for n, keep in left.items()}


def in_multiples(scores: Sequence[Tensor], kept: Sequence[Tensor], multiple: int) -> list[Tensor]:
    """Keep some more or fewer, so that their number is a multiple, or all: the nearest of these.

    Args:
        scores: ``(n,)`` each; the highest stay.
        kept: Booleans ``(n,)`` each.
        multiple: Where it is more than n, all stay.

    Example:
        >>> scores, kept = torch.arange(6.0), torch.arange(6) > 2
        >>> [keep.long().tolist() for keep in in_multiples([scores], [kept], 4)]
        [[0, 0, 1, 1, 1, 1]]
    """
    found = []
    for score, keep in zip(scores, kept, strict=True):
        n = int(keep.sum())
        fewer = n // multiple * multiple
        more = min(fewer + multiple, len(keep))
        nearest = fewer if fewer > 0 and n - fewer <= more - n else more
        highest = score.argsort(descending=True, stable=True)[:nearest]
        found.append(torch.zeros_like(keep).index_fill(0, highest, True))
    return found


def kept_blocks(m: int, saliency: Saliency, rate: float) -> dict[str, Tensor]:
    """Keep the same number of weights, at least one, in all blocks of m input channels."""
    n = max(1, m - round(rate * m))
    return {name: kept_of_blocks(score, n, m) for name, score in saliency.items()}


def _remove_inputs_(
    images: Tensor, seed: int, network: nn.Module, kept: Mapping[str, Tensor]
) -> None:
    """Set the weights of input channels to zero, and let the others of the layer do their work.

    Where connections have been pruned before, the others stay as they are.
    """
    moments = statistics.measure(network, images, seed=seed)
    with torch.no_grad():
        for name, keep in kept.items():
            weight, inputs = layers(network)[name].weight, keep.flatten()
            pruned = float((weight[:, inputs] == 0).float().mean()) > PRUNED
            if not pruned and not inputs.all() and name in moments:
                weight.copy_(refit(weight, moments[name], inputs))
    prune_(network, kept)


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
