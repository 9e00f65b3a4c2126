"""Find the layers of a network, and change their shapes in place.

The only module that knows how channels hang together. Which tensors share a channel (through
residual sums, concatenations, depthwise convolutions, flattening) is found by torch-pruning's
dependency graph; cutting is one routine here, `keep_channels_`, for all methods.

Shapes: a convolution's weight is ``(O, I, kh, kw)``, a linear layer's ``(O, I)``.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from filterpress.activations import Activated
from filterpress.errors import ModelError
from filterpress.representations import Chain, ChannelOrder, Layer, without_quantization

log = logging.getLogger(__name__)

Side = Literal["out", "in", "through"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# what torch-pruning and torch raise over a network that cannot be followed
_LOST = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class Member(NamedTuple):
    """One layer's share in a group of channels."""

    name: str
    side: Side  # "out": makes the channels; "in": consumes them; "through": keeps them apart
    features: Tensor  # (m,) positions along that side of the layer
    channels: Tensor  # (m,) the channel each position belongs to


class ChannelGroup(NamedTuple):
    """Channels that can only be removed together from every layer that shares them."""

    n_channels: int
    members: tuple[Member, ...]

    @property
    def producers(self) -> tuple[Member, ...]:
        """The layers that make the channels."""
        return tuple(m for m in self.members if m.side == "out")

    @property
    def consumers(self) -> tuple[Member, ...]:
        """The layers that read the channels."""
        return tuple(m for m in self.members if m.side == "in")


def layers(model: nn.Module) -> dict[str, Layer]:
    """Name the convolutions and linear layers of a network, in the order of definition."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def is_depthwise(layer: nn.Module) -> bool:
    """Tell whether a layer filters each channel by itself, into one channel."""
    return (
        isinstance(layer, nn.Conv2d) and layer.out_channels == layer.groups == layer.in_channels > 1
    )


def plain(model: nn.Module) -> nn.Module:
    """Copy a network with every layer in its plain form.

    Quantised layers get their floating-point weights back, their inputs are no longer rounded, and
    chains of layers become one layer again, so that every method sees ordinary layers whatever was
    done before.

    Args:
        model: Any network.

    Returns:
        A copy in evaluation mode; chains compute the same function.

    Raises:
        ModelError: A weight is not finite.
    """
    for name, value in model.state_dict().items():
        if not torch.isfinite(value).all():
            raise ModelError(f"the values of {name} must be finite, got NaN or infinity")
    result = without_quantization(model, rounded=False)
    for name, module in list(result.named_modules()):
        if isinstance(module, Chain):
            result.set_submodule(name, merged(module))
        elif isinstance(module, Activated):
            result.set_submodule(name, module.get_submodule("layer"))
    return result


def merged(chain: Chain) -> Layer:
    """Multiply a chain of layers out into one.

    Args:
        chain: Linear layers, or convolutions of which no two span the same axis; not quantised.

    Returns:
        An ungrouped layer with the same function.
    """
    orders = [part.index for part in chain if isinstance(part, ChannelOrder)]
    *firsts, result = [part for part in chain if isinstance(part, Layer)]
    for first in reversed(firsts):
        result = _product(first, result)
    with torch.no_grad():
        for order in orders:
            result.weight.copy_(result.weight[order])
            if result.bias is not None:
                result.bias.copy_(result.bias[order])
    return result


def _product(first: Layer, last: Layer) -> Layer:
    """Multiply two layers out, of which the first has no bias."""
    made: Layer
    if isinstance(first, nn.Linear) and isinstance(last, nn.Linear):
        made = nn.Linear(first.in_features, last.out_features, last.bias is not None)
        weight = last.weight @ first.weight
    elif isinstance(first, nn.Conv2d) and isinstance(last, nn.Conv2d):
        weight = torch.einsum("omyx,mivu->oiyvxu", _ungrouped(last), _ungrouped(first))
        weight = weight.flatten(4).flatten(2, 3)  # of two kernels, one has a single pixel
        made = _spanning_both(first, last)
    else:
        raise ModelError(f"a chain must hold layers of one kind, got {first} and {last}")
    with torch.no_grad():
        made.weight.copy_(weight)
        if made.bias is not None and last.bias is not None:
            made.bias.copy_(last.bias)
    return made


def _spanning_both(first: nn.Conv2d, last: nn.Conv2d) -> nn.Conv2d:
    """Make a convolution of the geometry of two, without weights yet."""

    def pairs(key: str) -> Iterator[tuple[int, int]]:
        return zip(getattr(first, key), getattr(last, key), strict=True)

    padding: str | tuple[int, ...] = next(
        (part.padding for part in (last, first) if isinstance(part.padding, str)), ()
    ) or tuple(p + s * q for s, (p, q) in zip(first.stride, pairs("padding"), strict=True))
    return nn.Conv2d(
        first.in_channels,
        last.out_channels,
        tuple(k * n for k, n in pairs("kernel_size")),  # type: ignore[arg-type]
        tuple(s * t for s, t in pairs("stride")),  # type: ignore[arg-type]
        padding,  # type: ignore[arg-type]
        tuple(  # type: ignore[arg-type]
            d if n == 1 else s * e
            for n, s, (d, e) in zip(last.kernel_size, first.stride, pairs("dilation"), strict=True)
        ),
        bias=last.bias is not None,
        padding_mode=last.padding_mode,
    )


def _ungrouped(layer: nn.Conv2d) -> Tensor:
    """Return the weight ``(O, I, kh, kw)`` of a convolution, zero between its groups."""
    parts = layer.weight.view(layer.groups, -1, *layer.weight.shape[1:])  # (G, O/G, I/G, kh, kw)
    blocks = torch.einsum("goiyx,gh->gohiyx", parts, torch.eye(layer.groups).to(parts))
    return blocks.flatten(2, 3).flatten(0, 1)


def channel_groups(model: nn.Module, example: Tensor) -> list[ChannelGroup]:
    """Find the groups of channels that can be cut.

    Left out are the outputs of the network, channels that pass a layer this module cannot cut
    (grouped convolutions, normalisations other than batch-norm, bare parameters), and those that
    pass something that cannot be followed, such as a shuffle or a shortcut filled up with zeros:
    every group that is returned has been cut on trial. What is left out can be projected and
    quantised all the same.

    Args:
        model: A plain network, see `plain`.
        example: ``(N, C, H, W)`` input to trace it with.

    Returns:
        The groups, in the order in which the graph is walked; the same for the same network.

    Reference:
        Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023.
    """
    groups = _traced(model, example)
    if _cut_cleanly(model, groups, example):
        return groups
    sound = []
    for group in groups:
        if _cut_cleanly(model, [group], example):
            sound.append(group)
        else:
            log.warning("channels of %s stay: they cannot be followed", group.members[0].name)
    return sound


def _traced(model: nn.Module, example: Tensor) -> list[ChannelGroup]:
    """Find the groups that torch-pruning believes in."""
    import torch_pruning

    names = {module: name for name, module in model.named_modules()}
    found = []
    try:
        with warnings.catch_warnings(), torch.enable_grad():  # tracing follows gradients
            warnings.simplefilter("ignore")
            graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
        for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
            members = _members(group, names)
            if members is not None and any(m.side == "in" for m in members):
                n_channels = 1 + max(int(m.channels.max()) for m in members)
                found.append(ChannelGroup(n_channels, members))
    except _LOST as error:
        log.warning("all channels stay: torch-pruning cannot trace this network (%r)", error)
        return []
    return found


def _cut_cleanly(model: nn.Module, groups: list[ChannelGroup], example: Tensor) -> bool:
    """Tell whether the outputs stay when half of the channels are silenced, then cut."""
    trial = copy.deepcopy(model)
    kept = [torch.arange(group.n_channels) % 2 == 0 for group in groups]
    try:
        with torch.no_grad():
            for group, keep in zip(groups, kept, strict=True):
                for member in group.consumers:
                    gone = member.features[~keep[member.channels]]
                    layers(trial)[member.name].weight[:, gone] = 0
            before = trial(example)
            keep_channels_(trial, groups, kept)
            after = trial(example)
    except _LOST:
        return False
    return before.shape == after.shape and bool(
        (after - before).abs().max() <= 1e-3 * before.abs().max()
    )


def _members(group: object, names: dict[nn.Module, str]) -> tuple[Member, ...] | None:
    """Translate a group of torch-pruning, or return None if it holds what cannot be cut."""
    members: dict[tuple[str, Side], Member] = {}
    for item in group:  # type: ignore[attr-defined]
        module = item.dep.target.module
        if module not in names:  # an operation of the graph, not a layer
            if isinstance(module, nn.Parameter):
                return None
            continue
        side = _side(module, item.dep.handler.__name__)
        if side is None:
            return None
        if (names[module], side) not in members:
            features = torch.tensor([int(i) for i in item.idxs])
            channels = torch.tensor([int(i) for i in (item.root_idxs or item.idxs)])
            members[names[module], side] = Member(names[module], side, features, channels)
    return tuple(members.values())


def _side(module: nn.Module, handler: str) -> Side | None:
    if isinstance(module, _NORMS) or is_depthwise(module):
        return "through"
    if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
        return "out" if handler.endswith("out_channels") else "in"
    return None


def keep_channels_(model: nn.Module, groups: list[ChannelGroup], kept: list[Tensor]) -> None:
    """Cut a network down to some channels of each group, all groups at once.

    Args:
        model: A plain network, changed in place.
        groups: Groups found in this very network.
        kept: For each group a boolean ``(n_channels,)``, with at least one true entry.

    Raises:
        ValueError: A group would keep no channel.
    """
    drop: dict[tuple[str, Side], list[Tensor]] = {}
    for group, keep in zip(groups, kept, strict=True):
        if not keep.any():
            raise ValueError(f"kept must leave a channel of every group, got none of {len(keep)}")
        for member in group.members:
            gone = member.features[~keep[member.channels]]
            drop.setdefault((member.name, member.side), []).append(gone)
    for (name, side), positions_of in drop.items():
        positions = torch.cat(positions_of)
        if len(positions):
            _cut_(model.get_submodule(name), side, positions)


def features_left(
    model: nn.Module, groups: Sequence[ChannelGroup], kept: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Say which inputs are left to the layers that read some groups.

    Args:
        model: The network of the groups.
        groups: Groups of channels.
        kept: For each group a boolean ``(n_channels,)``.

    Returns:
        Boolean ``(I,)`` by layer name.
    """
    left: dict[str, Tensor] = {}
    for group, keep in zip(groups, kept, strict=True):
        for member in group.consumers:
            n_features = layers(model)[member.name].weight.shape[1]
            features = left.setdefault(member.name, torch.ones(n_features, dtype=torch.bool))
            features[member.features[~keep[member.channels]]] = False
    return left


def cut_unread_(model: nn.Module, example: Tensor) -> int:
    """Cut the channels that nothing reads: all weights that are applied to them are zero.

    Args:
        model: A plain network, changed in place; its outputs stay.
        example: ``(N, C, H, W)`` input to trace it with.

    Returns:
        The number of channels cut.
    """
    groups = channel_groups(model, example)
    kept = [read_channels(model, group) for group in groups]
    keep_channels_(model, groups, kept)
    return sum(int((~keep).sum()) for keep in kept)


def read_channels(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Find the channels of a group that some layer reads; the first, if none does.

    Returns:
        ``(n_channels,)`` boolean.
    """
    read = torch.zeros(group.n_channels, dtype=torch.bool)
    for member in group.consumers:
        used = (layers(model)[member.name].weight.detach() != 0).transpose(0, 1).flatten(1).any(1)
        read[member.channels[used[member.features]]] = True
    read[0] |= not read.any()
    return read


def _cut_(module: nn.Module, side: Side, gone: Tensor) -> None:
    dim = 1 if side == "in" else 0
    name = "running_mean" if isinstance(module, _NORMS) else "weight"
    keep = torch.ones(getattr(module, name).shape[dim], dtype=torch.bool)
    keep[gone] = False
    n = int(keep.sum())
    if isinstance(module, _NORMS):
        module.num_features = n
        for key, buffer in module.named_buffers():
            if buffer.ndim:  # not the count of batches
                setattr(module, key, buffer[keep])
    elif isinstance(module, nn.Linear):
        setattr(module, "in_features" if side == "in" else "out_features", n)
    elif isinstance(module, nn.Conv2d):
        if side == "through":
            module.groups = module.in_channels = module.out_channels = n
        else:
            setattr(module, "in_channels" if side == "in" else "out_channels", n)
    cut = {"weight": dim} if side == "in" else {"weight": 0, "bias": 0}
    for key, axis in cut.items():
        value = getattr(module, key, None)
        if value is not None:
            kept = value.detach().index_select(axis, keep.nonzero().flatten())
            setattr(module, key, nn.Parameter(kept.clone()))


def check_runs(model: nn.Module, example: Tensor, n_outputs: int) -> None:
    """Make sure that a network still runs after surgery.

    Raises:
        ModelError: The forward pass fails or gives another number of outputs.
    """
    try:
        with torch.no_grad():
            shape = tuple(model.eval()(example).shape)
    except RuntimeError as error:
        raise ModelError(
            f"the network no longer runs after its channels were cut: {error}"
        ) from error
    if shape != (len(example), n_outputs):
        raise ModelError(
            f"the network must still give {(len(example), n_outputs)} after its channels were cut, "
            f"got {shape}"
        )
