r"""Channels that pass no nonlinearity, and projections of them that cost nothing.

Between a layer that makes channels and those that read them there is often nothing but batch-norm,
sums and average pooling, as in the linear bottlenecks of MobileNetV2 and the networks after it.
Such channels can be written in any basis: a projection ``U`` of what the readers see is multiplied
into the layers that make it, and these make ``r`` channels instead of ``C``. Both sides shrink, and
no layer is added.

Reference:
    The claimed loop's reduction of the channel dimension, folded into the neighbour. For networks
    with residual sums as in Ashkboos et al., "SliceGPT", ICLR 2024, there for transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from filterpress.allocation import BIAS_BITS, N_RANKS, Option, block, spaced_ranks, unit_steps
from filterpress.compensation import ChannelStatistics, channel_statistics, solve
from filterpress.representations import Layer, like
from filterpress.statistics import Moments, batches, eigen, recalibrate_, regular
from filterpress.subspaces import Subspaces, channel_moments, taps_of
from filterpress.surgery import ChannelGroup, channel_groups, layers

Norm = nn.BatchNorm1d | nn.BatchNorm2d
EXACT = 1e-3  # relative error of a rotation that passes unharmed


class LinearChannels(NamedTuple):
    """Channels that can be written in any basis."""

    group: ChannelGroup
    norms: Mapping[str, str]  # the batch-norm after each producer that has one

    @property
    def names(self) -> tuple[str, ...]:
        """The layers that make the channels, then those that read them."""
        return tuple(m.name for m in (*self.group.producers, *self.group.consumers))


def linear_channels(model: nn.Module, example: Tensor) -> list[LinearChannels]:
    """Find the channels that pass no nonlinearity.

    Whether what lies between is linear is not read off the code but tried: every group that is
    returned has been written in another basis, and its readers gave the same outputs.

    Args:
        model: A plain network in evaluation mode.
        example: ``(N, C, H, W)`` images to try it with.

    Returns:
        Groups of channels, no layer in two of them: those of more layers come first.
    """
    norms, signed = _observe(model, example)
    found: list[LinearChannels] = []
    taken: set[str] = set()
    for group in sorted(channel_groups(model, example), key=lambda group: -len(group.members)):
        mine = {m.name: norms[m.name] for m in group.producers if m.name in norms}
        channels = LinearChannels(group, mine)
        if (
            taken.isdisjoint(channels.names)
            and _may_be_linear(model, channels, signed)
            and _rotates(model, channels, example)
        ):
            found.append(channels)
            taken.update(channels.names)
    return found


def _observe(model: nn.Module, example: Tensor) -> tuple[dict[str, str], set[str]]:
    """Return the batch-norm right after each layer, and the layers that see negative inputs."""
    made: dict[str, Tensor] = {}
    norms: dict[str, str] = {}
    signed: set[str] = set()

    def watch(name: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if isinstance(module, Norm) and module.track_running_stats:
                norms.update({n: name for n, output in made.items() if output is args[0]})
            if isinstance(module, Layer) and bool((args[0] < 0).any()):
                signed.add(name)

        def after(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            made[name] = output

        stack.callback(module.register_forward_pre_hook(before).remove)
        stack.callback(module.register_forward_hook(after).remove)

    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, Norm | Layer):
                watch(name, module)
        model(example)
    return norms, signed


def _may_be_linear(model: nn.Module, channels: LinearChannels, signed: set[str]) -> bool:
    """Rule out what a look can: shared layers, concatenations, and readers behind a ReLU."""
    group, norms = channels
    sides = {"out": 0, "in": 1}
    whole = all(
        len(m.features) == group.n_channels == model.get_parameter(f"{m.name}.weight").shape[side]
        and torch.equal(m.features, m.channels)
        for m in group.members
        if (side := sides.get(m.side)) is not None
    )
    between = {m.name for m in group.members if m.side == "through"}
    return (
        whole
        and between == set(norms.values())
        and len(set(channels.names)) == len(channels.names)
        and signed.issuperset(m.name for m in group.consumers)  # else they see no negative input
    )


def _rotates(model: nn.Module, channels: LinearChannels, example: Tensor) -> bool:
    """Tell whether the readers' outputs stay when the channels are written in another basis."""
    n = channels.group.n_channels
    normal = torch.randn(n, n, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(normal).Q
    trial = copy.deepcopy(model)
    names = [m.name for m in channels.group.consumers]
    weights = {name: taps_of(layers(model)[name].weight.detach()) for name in names}
    rotated = {k: torch.einsum("oct,rc->ort", w, basis) for k, w in weights.items()}
    fold_(trial, channels, basis, rotated, {name: torch.eye(n) for name in channels.norms})
    pairs = zip(_outputs(model, names, example), _outputs(trial, names, example), strict=True)
    return all((b - a).abs().max() <= EXACT * a.abs().max() for a, b in pairs)


def _outputs(model: nn.Module, names: list[str], example: Tensor) -> list[Tensor]:
    """Return what some layers put out, and the network itself."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> None:
        def after(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = output.clone()

        stack.callback(model.get_submodule(name).register_forward_hook(after).remove)

    with ExitStack() as stack, torch.no_grad():
        for name in names:
            watch(name)
        outputs = model(example)
    return [*(seen[name] for name in names), outputs]


def spreads_of(model: nn.Module, found: list[LinearChannels], images: Tensor) -> dict[str, Tensor]:
    """Measure how the channels of each producer with a batch-norm vary together.

    Args:
        model: The network the channels are of.
        found: Groups of channels.
        images: ``(N, C, H, W)`` calibration images, at least 2.

    Returns:
        Covariance ``(C, C)`` after batch-norm, by the name of the producer; as in `recalibrate_`,
        what all batch-norms see is normalised by its own statistics.
    """
    totals: dict[str, Tensor] = {}
    parts = batches(images)

    def watch(name: str, norm: nn.Module) -> None:
        def after(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            rows = output.transpose(0, 1).flatten(1).double()  # (C, n)
            totals[name] = totals.get(name, 0.0) + torch.cov(rows) / len(parts)

        norm.register_forward_hook(after)

    trial = copy.deepcopy(model)
    for channels in found:
        for name, norm in channels.norms.items():
            watch(name, trial.get_submodule(norm))
    if any(channels.norms for channels in found):
        recalibrate_(trial, images)
    return {name: total.float() for name, total in totals.items()}


def fold_options(
    model: nn.Module, channels: LinearChannels, moments: Mapping[str, Moments], *, seed: int = 0
) -> dict[str, list[Option]]:
    """List the ranks that a group of channels can have, by what they make of each layer.

    Args:
        model: Plain network.
        channels: The group.
        moments: Statistics of all layers.
        seed: Chooses the sample of weights.

    Returns:
        For each layer of the group its options, the ranks in the same order.
    """
    generator = torch.Generator().manual_seed(seed)
    n, consumers = channels.group.n_channels, channels.group.consumers
    views = [channel_statistics(model, member, moments) for member in consumers]
    bases, inverse, energies = _principal_basis(views)
    subspaces = Subspaces(torch.arange(n), bases[None], energies[None])
    views = [
        ChannelStatistics(bases @ v.second @ bases.T, inverse.T @ v.importance @ inverse)
        for v in views
    ]
    found: dict[str, list[Option]] = {name: [] for name in channels.names}
    for rank in [r for r in spaced_ranks(n, N_RANKS + 1) if r < n]:
        basis, kept = bases[:rank], torch.arange(n) < rank
        for member in channels.group.producers:
            weight, _ = normalised(model, channels, member.name)
            power = moments[member.name].inputs[0].diagonal()
            mean = power.mean().clamp(min=1e-30)
            rows = (basis @ weight.flatten(1)).view(rank, *weight.shape[1:])
            steps = unit_steps(energies[:rank], mean.expand(rank))
            noise = (power / mean).view(1, *weight.shape[1:]).expand_as(rows)
            made = block(rows, steps, noise, BIAS_BITS, generator)
            found[member.name].append(Option(rank, subspaces, (made,), 0.0, folded=True))
        for member, view in zip(consumers, views, strict=True):
            weight = model.get_parameter(f"{member.name}.weight").detach()
            second, mass = channel_moments(weight, moments[member.name])
            gram = basis @ second @ basis.T
            rest = torch.einsum("oct,cr->ort", taps_of(weight), solve(gram, basis @ second).T)
            mean = gram.diagonal().mean().clamp(min=1e-30)
            steps = unit_steps(moments[member.name].gain, mean.expand(len(weight)))
            noise = ((gram.diagonal() / mean)[:, None] * mass).expand_as(rest)
            made = block(rest, steps, noise, BIAS_BITS, generator)
            damage = view.damage(kept)
            found[member.name].append(Option(rank, subspaces, (made,), damage, folded=True))
    return found


def _principal_basis(views: list[ChannelStatistics]) -> tuple[Tensor, Tensor, Tensor]:
    """Find the basis whose first directions the readers make most of.

    Returns:
        The basis ``(C, C)``, in which the channels have a second moment of one; its inverse; and
        twice the damage of leaving each direction out, falling.
    """
    root = torch.linalg.cholesky(regular(torch.stack([v.second for v in views]).mean(dim=0)))
    importance = torch.stack([view.importance for view in views]).sum(dim=0)
    energies, vectors = eigen(root.T @ importance @ root)
    vectors = vectors.flip(1)
    basis = torch.linalg.solve_triangular(root, vectors.T, upper=False, left=False)
    return basis, root @ vectors, energies.flip(0).clamp(min=0)


def normalised(model: nn.Module, channels: LinearChannels, name: str) -> tuple[Tensor, Tensor]:
    """Return weight ``(C, ...)`` and bias ``(C,)`` of a producer with its batch-norm folded in."""
    layer = layers(model)[name]
    weight = layer.weight.detach()
    bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach()
    if name not in channels.norms:
        return weight, bias
    norm: Any = model.get_submodule(channels.norms[name])
    factor = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        factor = factor * norm.weight.detach()
    shift = norm.bias.detach() if norm.affine else 0.0
    shape = (-1, *[1] * (weight.ndim - 1))
    return weight * factor.view(shape), (bias - norm.running_mean) * factor + shift


def fold_(
    model: nn.Module,
    channels: LinearChannels,
    basis: Tensor,
    readers: Mapping[str, Tensor],
    spreads: Mapping[str, Tensor],
) -> None:
    """Write a group of channels in another basis.

    Args:
        model: Plain network, changed in place.
        channels: The group.
        basis: ``(r, C)`` projection of the channels.
        readers: New weight ``(O, r, T)`` of each layer that reads them.
        spreads: What `spreads_of` says of the producers with a batch-norm: they get one that
            changes nothing now, and that can be measured again after the weights have changed.
    """
    for member in channels.group.producers:
        old = layers(model)[member.name]
        weight, bias = normalised(model, channels, member.name)
        made = like(old, old.weight.shape[1], len(basis))
        if member.name in channels.norms:
            place = channels.norms[member.name]
            norm = model.get_submodule(place)
            model.set_submodule(place, _neutral(norm, basis, bias, spreads[member.name]))
            bias = torch.zeros_like(bias)
        _fill(made, (basis @ weight.flatten(1)), basis @ bias)
        model.set_submodule(member.name, made)
    for name, weight in readers.items():
        old = layers(model)[name]
        made = like(old, len(basis), len(weight))
        _fill(made, weight, old.bias)
        model.set_submodule(name, made)


def _fill(layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
    with torch.no_grad():
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)
    layer.eval()


def _neutral(norm: Any, basis: Tensor, bias: Tensor, spread: Tensor) -> nn.Module:
    """Make a batch-norm that only adds a bias, to channels that then vary as they should."""
    made: Any = type(norm)(len(basis), norm.eps, norm.momentum).eval()
    mean = basis @ norm.bias.detach() if norm.affine else torch.zeros(len(basis))
    variance = ((basis @ spread) * basis).sum(dim=1).clamp(min=0)
    with torch.no_grad():
        made.weight.copy_((variance + made.eps).sqrt())
        made.bias.copy_(mean)
        made.running_mean.copy_(mean - basis @ bias)
        made.running_var.copy_(variance)
    return made  # type: ignore[no-any-return]
