r"""Cut a layer in two: where, and what the first of the two computes.

A filter spans input channels ``i``, rows ``y`` and columns ``x``. A cut says which of these axes
the first layer takes: its filters span them. Axes kept apart have first filters of their own at
each index. All others are shared: the same first filters slide along them, and the second layer
spans them. With ``G`` indices apart, ``t`` taken and ``S`` shared,

.. math:: W_{o,gts} \approx \sum_r V_{o,grs} U_{gr,t}

where ``U`` is the first layer and ``V`` the second. Once the statistics of the inputs factorise
into those along the axes taken and those along the axes shared, the best ``U`` follows from a
singular value decomposition; `compensation.refit_rest` finds the best ``V`` for it without that
assumption. Cutting the second layer again makes chains of any length.

Reference:
    Zhang et al., "Accelerating Very Deep Convolutional Networks for Classification and Detection",
    2015, for whole filters, fitted on activations; Jaderberg et al., "Speeding up Convolutional
    Neural Networks with Low Rank Expansions", 2014, for columns and rows; Guo et al., "Network
    Decoupling", 2018, for the taps of each channel; Lebedev et al., "Speeding-up Convolutional
    Neural Networks Using Fine-tuned CP-Decomposition", ICLR 2015. All but the first approximate the
    weights, here it is the outputs of the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from filterpress.statistics import Moments, regular
from filterpress.subspaces import principal

AXES = "iyx"
SWEEPS = 20  # of alternating least squares


class Cut(NamedTuple):
    """Axes of a filter that the first of two layers spans."""

    taken: str
    apart: str = ""

    @property
    def shared(self) -> str:
        """Axes that the second layer spans."""
        return "".join(axis for axis in AXES if axis not in self.taken + self.apart)

    def sizes(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Return ``G``, ``t`` and ``S`` of a filter of shape ``(I, kh, kw)``."""
        size = dict(zip(AXES, shape, strict=True))
        apart, taken, shared = (
            math.prod(size[axis] for axis in axes) for axes in (self.apart, self.taken, self.shared)
        )
        return apart, taken, shared

    @property
    def order(self) -> list[int]:
        """Places among the axes of a filter of those apart, taken and shared."""
        return [AXES.index(axis) for axis in self.apart + self.taken + self.shared]


CHANNELS, COLUMNS, WHOLE, TAPS = Cut("i"), Cut("iy"), Cut("iyx"), Cut("yx", apart="i")


class Part(NamedTuple):
    """The first layer of a cut."""

    rows: Tensor  # (G, r, t) its filters
    worth: Tensor  # (G, r, r) second moment of the derivative of the network by its outputs

    def first(self, rank: int) -> Part:
        """Return the filters of most worth, of each index apart."""
        return Part(self.rows[:, :rank], self.worth[:, :rank, :rank])


class Plan(NamedTuple):
    """A chain of layers in place of one."""

    kind: str
    ranks: tuple[int, ...]  # of each cut
    parts: tuple[
        Part, ...
    ]  # first layers; where that of a second cut is missing, it is fitted then


def as_filters(weight: Tensor) -> Tensor:
    """View the weight of a convolution or linear layer as ``(O, I, kh, kw)``."""
    return weight if weight.ndim > 2 else weight[..., None, None]


def cut_filters(weight: Tensor, cut: Cut) -> Tensor:
    """View filters ``(O, I, kh, kw)`` as ``(O, G, t, S)``."""
    order = [0, *(1 + place for place in cut.order)]
    return weight.permute(order).reshape(len(weight), *cut.sizes(weight.shape[1:]))


def cut_moments(second: Tensor, shape: Sequence[int], cut: Cut) -> Tensor:
    """View the second moment ``(d, d)`` of patches ``(I, kh, kw)`` as ``(G, t, S, G, t, S)``."""
    order = cut.order
    both = second.view(*shape, *shape).permute(*order, *(len(order) + place for place in order))
    return both.reshape(*cut.sizes(shape), *cut.sizes(shape))


def taken_moments(blocks: Tensor) -> Tensor:
    """Return the second moments ``(G, t, t)`` of what first filters are applied to."""
    return torch.einsum("gtsgus->gtu", blocks) / blocks.shape[2]


def join(rest: Tensor, rows: Tensor, cut: Cut, shape: Sequence[int]) -> Tensor:
    """Multiply two layers out.

    Args:
        rest: ``(O, G r, kh', kw')`` weight of the second one.
        rows: ``(G, r, t)`` filters of the first one.
        cut: What that takes.
        shape: ``(I, kh, kw)`` of the filters before they were cut.

    Returns:
        ``(O, I, kh, kw)``.
    """
    whole = torch.einsum("ogrs,grt->ogts", rest.reshape(len(rest), *rows.shape[:2], -1), rows)
    sizes, order = [shape[place] for place in cut.order], torch.tensor(cut.order)
    back = [0, *(1 + order.argsort()).tolist()]
    return whole.reshape(len(rest), *sizes).permute(back)


def fit_part(weight: Tensor, moments: Moments, cut: Cut) -> Part:
    """Find the first filters of a cut that keep the outputs of the network at each rank.

    Args:
        weight: ``(O, I, kh, kw)``.
        moments: Statistics of the layer, ungrouped.
        cut: What the first filters take.

    Returns:
        ``min(t, O S)`` filters for each index apart, the most important first, whose outputs have
        power one. Of ``worth``, which is diagonal, half is the damage of leaving a filter out.
    """
    blocks = cut_moments(moments.inputs[0], weight.shape[1:], cut)
    taken = torch.linalg.cholesky(regular(taken_moments(blocks)))  # (G, t, t)
    white: Tensor = torch.einsum(
        "ogts,op,gtu,sv->gpvu",
        cut_filters(weight, cut),
        torch.linalg.cholesky(regular(moments.outputs[0])),
        taken,
        shared_root(blocks),
    )
    rows, energies = principal(white.flatten(1, 2))
    rows = torch.linalg.solve_triangular(taken, rows, upper=False, left=False)
    return Part(rows, torch.diag_embed(energies))


def shared_root(blocks: Tensor) -> Tensor:
    """Factor the second moments of the shared axes ``(S, S)``, whose mean power is one."""
    shared = torch.einsum("gtsgtu->su", blocks)
    root: Tensor = torch.linalg.cholesky(
        regular(shared / shared.diagonal().mean().clamp(min=1e-30))
    )
    return root


def fit_polyadic(
    weight: Tensor, moments: Moments, ranks: Sequence[int], sweeps: int = SWEEPS
) -> list[tuple[Part, Part]]:
    r"""Find sums of products of an output, an input-channel and a tap factor.

    Minimises the damage of :math:`W_{oit} - \sum_r a_{or} b_{ir} c_{tr}` by alternating least
    squares, once the statistics of the inputs are taken to factorise into those of channels and of
    taps. Starts from the largest terms of two singular value decompositions, of the filters and of
    each of their principal directions.

    Args:
        weight: ``(O, I, kh, kw)``.
        moments: Statistics of the layer, ungrouped.
        ranks: Numbers of terms.
        sweeps: Over the three factors.

    Returns:
        For each rank the filters ``(1, r, I)`` of channels and those ``(r, 1, T)`` of taps.
    """
    blocks = cut_moments(moments.inputs[0], weight.shape[1:], CHANNELS)
    channels = torch.linalg.cholesky(regular(taken_moments(blocks)))[0]  # (I, I)
    taps = shared_root(blocks)
    outputs = torch.linalg.cholesky(regular(moments.outputs[0]))
    white = torch.einsum("oit,op,ij,tu->pju", weight.flatten(2), outputs, channels, taps)
    _, sizes, right = torch.linalg.svd(white.flatten(1), full_matrices=False)
    left, inner, across = torch.linalg.svd(
        (sizes[:, None] * right).view(-1, *white.shape[1:]), full_matrices=False
    )
    found = []
    for rank in ranks:
        largest = inner.flatten().topk(rank).indices
        b, c = left.mT.flatten(0, 1)[largest], across.flatten(0, 1)[largest]  # (r, I), (r, T)
        for _ in range(sweeps):
            a = _least_squares("oit,ri,rt->ro", white, b, c)
            b = _least_squares("oit,ro,rt->ri", white, a, c)
            c = _least_squares("oit,ro,ri->rt", white, a, b)
            b, c = (torch.nn.functional.normalize(factor, dim=1) for factor in (b, c))
        a = _least_squares("oit,ri,rt->ro", white, b, c)
        worth = a @ a.T
        first = torch.linalg.solve_triangular(channels, b, upper=False, left=False)
        last = torch.linalg.solve_triangular(taps, c, upper=False, left=False)
        found.append(
            (
                Part(first[None], (worth * (c @ c.T))[None]),
                Part(last[:, None], worth.diagonal()[:, None, None]),
            )
        )
    return found


def _least_squares(equation: str, white: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Solve one factor of a sum of products for the two others."""
    gram = (one @ one.T) * (other @ other.T)
    found: Tensor = torch.linalg.solve(regular(gram), torch.einsum(equation, white, one, other))
    return found
