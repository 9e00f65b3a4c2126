r"""Chains of smaller layers in place of one: what they cost, and building them.

Each kind of chain is a layer cut once or twice (see `cuts`):

=========  ====================================  ========================================
kind       layers                                weights
=========  ====================================  ========================================
svd        k x k to r, then 1 x 1                r (I k^2 + O)
tucker     1 x 1 to r, k x k to s, then 1 x 1    I r + k^2 r s + s O
cp         1 x 1 to r, k x k by channel, 1 x 1   r (I + k^2 + O)
spatial    k x 1 to r, then 1 x k                r k (I + O)
separable  k x k, r by channel, then 1 x 1       r I (k^2 + O)
low-rank   a linear layer to r, then another     r (I + O)
=========  ====================================  ========================================

The last layer of a chain is the least-squares fit to what those before it make of the inputs. Each
is rounded before the next is fitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from filterpress.allocation import (
    BIAS_BITS,
    N_RANKS,
    Option,
    as_it_is,
    spaced_ranks,
    whole_block,
)
from filterpress.compensation import refit_projected, refit_rest
from filterpress.cuts import (
    CHANNELS,
    COLUMNS,
    TAPS,
    WHOLE,
    Cut,
    Part,
    Plan,
    as_filters,
    cut_moments,
    fit_part,
    fit_polyadic,
    join,
    taken_moments,
)
from filterpress.representations import Chain, ChannelOrder, Layer
from filterpress.rounding import quantize_compensated_
from filterpress.statistics import Moments, regular
from filterpress.subspaces import blocks_of, channel_moments

CUTS = {
    "svd": (WHOLE,),
    "tucker": (CHANNELS, WHOLE),
    "cp": (CHANNELS, TAPS),
    "spatial": (COLUMNS,),
    "separable": (TAPS,),
    "low-rank": (WHOLE,),
}
SPANNED = {"svd": 0, "tucker": 1, "cp": 1, "spatial": 2, "separable": 1}  # of a kernel's two axes
Take = Callable[[Part, Cut, Moments, torch.Size], Tensor]
MOST_TERMS = 512  # of a sum of products; more take long to fit
SMALLER = 0.95  # share of the layer's weights that a chain may have at most


def kinds_of(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Read the names of kinds of chains, with commas between.

    Raises:
        ValueError: A name is unknown, or there is none.
    """
    kinds = tuple(name.strip() for name in text.split(","))
    if not set(kinds) <= set(known):
        raise ValueError(f"kinds must be among {','.join(known)}, with commas, got {text!r}")
    return kinds


def chain_options(
    layer: Layer, moments: Moments, kinds: Sequence[str], *, seed: int = 0
) -> list[Option]:
    """List the chains that can stand in place of a layer.

    Args:
        layer: Plain layer.
        moments: Its statistics.
        kinds: Of chains, among `CUTS`; those that do not suit the layer are passed over.
        seed: Chooses the sample of weights.

    Returns:
        The layer as it is first, then chains that need fewer weights.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = as_filters(layer.weight.detach())
    found = [as_it_is(layer.weight.detach(), moments, generator)]
    for kind in kinds:
        if not suits(kind, layer) or not moments.inputs.any():
            continue
        for plan in plans(kind, weight, moments):
            if n_weights(plan, weight.shape) <= SMALLER * weight.numel():
                found.append(_option(weight, moments, plan, generator))
    return found


def suits(kind: str, layer: Layer) -> bool:
    """Tell whether a kind of chain can stand in place of a layer."""
    if isinstance(layer, nn.Linear):
        return kind in ("svd", "low-rank")
    n_long = sum(n > 1 for n in layer.kernel_size)
    return layer.groups == 1 and kind in SPANNED and n_long >= SPANNED[kind]


def plans(kind: str, weight: Tensor, moments: Moments) -> Iterator[Plan]:
    """Fit the chains of one kind to filters ``(O, I, kh, kw)``, from few weights to many."""
    cut, *others = CUTS[kind]
    n_out, n_in, *kernel = weight.shape
    if kind == "cp":
        limit = min(MOST_TERMS, weight.numel() / (n_in + n_out + math.prod(kernel)))
        ranks = spaced_ranks(max(1, limit), N_RANKS)
        for rank, parts in zip(ranks, fit_polyadic(weight, moments, ranks), strict=True):
            yield Plan(kind, (rank, 1), parts)
        return
    part = fit_part(weight, moments, cut)
    apart, taken, shared = cut.sizes(weight.shape[1:])
    if not others:
        limit = weight.numel() / (apart * taken + n_out * apart * shared)
        for rank in spaced_ranks(max(1, min(limit, part.rows.shape[1])), N_RANKS):
            yield Plan(kind, (rank,), (part.first(rank),))
        return
    worth = part.worth[0].diagonal()
    whole = fit_part(weight, moments, WHOLE).worth[0].diagonal()
    for rank in spaced_ranks(len(worth), N_RANKS):
        other = max(1, min(int((whole >= worth[rank - 1]).sum()), rank * math.prod(kernel)))
        yield Plan(kind, (rank, other), (part.first(rank),))


def n_weights(plan: Plan, shape: Sequence[int]) -> int:
    """Count the weights of a chain in place of filters ``(O, I, kh, kw)``."""
    n_out, *sizes = shape
    total = 0
    for cut, rank in zip(CUTS[plan.kind], plan.ranks, strict=True):
        apart, taken, _ = cut.sizes(sizes)
        total += apart * rank * taken
        sizes = [
            apart * rank,
            *(1 if a in cut.taken else n for a, n in zip("yx", sizes[1:], strict=True)),
        ]
    return total + n_out * math.prod(sizes)


def _option(weight: Tensor, moments: Moments, plan: Plan, generator: torch.Generator) -> Option:
    """Describe what a chain costs and damages, before its weights are rounded."""
    blocks = []
    firsts: list[tuple[Tensor, Cut, torch.Size]] = []

    def note(part: Part, cut: Cut, seen: Moments, shape: torch.Size) -> Tensor:
        blocks.append(whole_block(part.rows.flatten(0, 1), seen, 0.0, generator))
        firsts.append((part.rows, cut, shape))
        return part.rows

    whole, seen = _cut(weight, moments, plan, note)
    blocks.append(whole_block(whole, seen, BIAS_BITS, generator))
    for rows, cut, shape in reversed(firsts):
        whole = join(whole, rows, cut, shape)
    # few images leave directions of the outputs without a derivative: they count for a little, too
    sure = Moments(moments.inputs, regular(moments.outputs))
    return Option(0, None, tuple(blocks), sure.error(whole - weight), plan=plan)


def _cut(weight: Tensor, moments: Moments, plan: Plan, take: Take) -> tuple[Tensor, Moments]:
    """Cut filters ``(O, I, kh, kw)`` once or twice, each time refitting what is left.

    Args:
        weight: The filters.
        moments: Statistics of their layer.
        plan: How to cut.
        take: Called with each first layer, its cut, its statistics and the shape that is cut;
            returns the filters that it has in the end.

    Returns:
        The weight of the last layer, and its statistics.
    """
    if len(plan.parts) > 1:
        return _cut_together(weight, moments, plan, take)
    for number, (cut, rank) in enumerate(zip(CUTS[plan.kind], plan.ranks, strict=True)):
        part = plan.parts[0] if number == 0 else fit_part(weight, moments, cut).first(rank)
        shape, second = weight.shape[1:], moments.inputs[0]
        taken = taken_moments(cut_moments(second, shape, cut))
        rows = take(part, cut, Moments(taken, part.worth), shape)
        weight, second = refit_rest(weight, second, rows, cut)
        moments = Moments(second[None], moments.outputs)
    return weight, moments


def _cut_together(
    weight: Tensor, moments: Moments, plan: Plan, take: Take
) -> tuple[Tensor, Moments]:
    """Cut filters twice, where both first layers were fitted together.

    The second one stays as it was fitted: from the channels between, of which there may be more
    than the layer has, it alone would not follow.
    """
    channels, taps = plan.parts
    second, shape = moments.inputs[0], weight.shape[1:]
    blocks = cut_moments(second, shape, CHANNELS)
    rows = take(channels, CHANNELS, Moments(taken_moments(blocks), channels.worth), shape)[0]
    seen = torch.einsum("ri,itju,rj->rtu", rows, blocks[0, :, :, 0], rows)
    between = torch.Size((len(rows), *shape[1:]))
    own = take(taps, TAPS, Moments(seen, taps.worth), between)
    both = torch.einsum("ri,rqt->rit", rows, own).flatten(1)[None]
    weight, second = refit_rest(weight, second, both, WHOLE)
    return weight, Moments(second[None], moments.outputs)


def chain(layer: Layer, plan: Plan, moments: Moments, theta: float) -> Chain:
    """Build a chain of quantised layers in place of one.

    Args:
        layer: Plain layer, ungrouped.
        plan: The chain.
        moments: The layer's statistics.
        theta: Cost of rounding a weight.
    """
    made: list[Layer] = [layer]

    def rounded(part: Part, cut: Cut, seen: Moments, _: torch.Size) -> Tensor:
        first, rest = halves(made.pop(), cut, part.rows.shape[:2].numel())
        made.extend((first, rest))
        fill_(first, part.rows)
        quantize_compensated_(first, seen, theta)
        return first.weight.detach().reshape(part.rows.shape)

    weight, seen = _cut(as_filters(layer.weight.detach()), moments, plan, rounded)
    fill_(made[-1], weight, layer.bias)
    quantize_compensated_(made[-1], seen, theta)
    return Chain(*made)


def project(layer: Layer, option: Option, moments: Moments, theta: float) -> Chain:
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
    first, last = halves(layer, CHANNELS, len(rows), option.groups)
    fill_(first, rows)
    second = channel_moments(weight, moments).second
    quantize_compensated_(first, Moments(second[None], torch.diag(energies)[None]), theta)
    rounded = first.weight.detach().flatten(1)
    rest, second = refit_projected(weight[order], rounded, moments, option.groups)
    fill_(last, rest, None if layer.bias is None else layer.bias[order])
    outputs = blocks_of(moments.outputs[0], order, option.groups)
    quantize_compensated_(last, Moments(second, outputs), theta)
    back = [ChannelOrder(order.argsort())] if option.groups > 1 else []
    return Chain(first, last, *back)


def halves(layer: Layer, cut: Cut, width: int, groups: int = 1) -> tuple[Layer, Layer]:
    """Make the two layers that a layer is cut into, without weights yet.

    Args:
        layer: An ungrouped layer.
        cut: What the first one takes.
        width: Channels between them.
        groups: Of the second one.

    Returns:
        The two. Each has the stride and the padding of the axes that it spans; along an axis of
        one pixel the first one has them, since what is skipped need not be computed.
    """
    if isinstance(layer, nn.Linear):
        first = nn.Linear(layer.in_features, width, bias=False)
        return first, nn.Linear(width, layer.out_features, layer.bias is not None)
    mine = [axis in cut.taken or n == 1 for axis, n in zip("yx", layer.kernel_size, strict=True)]

    def made(n_in: int, n_out: int, spans: list[bool], its_groups: int, bias: bool) -> nn.Conv2d:
        def pair(values: tuple[int, ...], other: int) -> tuple[int, int]:
            y, x = (v if spans else other for v, spans in zip(values, spans, strict=True))
            return y, x

        padding = layer.padding
        return nn.Conv2d(
            n_in,
            n_out,
            pair(layer.kernel_size, 1),
            pair(layer.stride, 1),
            padding if isinstance(padding, str) else pair(padding, 0),
            pair(layer.dilation, 1),
            its_groups,
            bias,
            layer.padding_mode,
        )

    apart = layer.in_channels if "i" in cut.apart else 1
    bias = layer.bias is not None
    return (
        made(layer.in_channels, width, mine, apart, False),
        made(width, layer.out_channels, [not m for m in mine], groups, bias),
    )


def fill_(layer: Layer, weight: Tensor, bias: Tensor | None = None) -> None:
    """Give a plain layer its weight, of any shape, and its bias, if it has one."""
    with torch.no_grad():
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)
