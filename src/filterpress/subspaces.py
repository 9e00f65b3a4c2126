"""Directions of a layer's input channels that its filters make most of.

A projection on the first few of them keeps the layer's outputs at the least damage (see
`statistics`); filters in groups have directions of their own.

Reference:
    Zhang et al., "Accelerating Very Deep Convolutional Networks for Classification and Detection",
    2015, section 3.2, for projections fitted on activations; Bradley and Mangasarian, "k-Plane
    Clustering", 2000, for the groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from filterpress.clustering import kmeans
from filterpress.statistics import Moments, eigen, regular


class Subspaces(NamedTuple):
    """Directions of a layer's input that its filters, in groups, make most of."""

    order: Tensor  # (O,) the filters, sorted by group, groups of equal size
    bases: Tensor  # (G, m, I) a projection's rows, the most important first
    energies: Tensor  # (G, m) twice the damage of leaving a row out


class ChannelMoments(NamedTuple):
    """Statistics of a layer's input channels, averaged over the taps of its kernel."""

    second: Tensor  # (I, I) second moment of the channels
    mass: Tensor  # (T,) share of the power that each tap sees, mean 1


def taps_of(weight: Tensor) -> Tensor:
    """View a weight ``(O, I, kh, kw)`` or ``(O, I)`` as ``(O, I, T)``."""
    return weight.flatten(2) if weight.ndim > 2 else weight[..., None]


def channel_moments(weight: Tensor, moments: Moments) -> ChannelMoments:
    """Average the statistics of a layer over the taps of its kernel."""
    n_in, taps = weight.shape[1], weight[0, 0].numel()
    by_tap = moments.inputs[0].view(n_in, taps, n_in, taps).diagonal(dim1=1, dim2=3)  # (I, I, T)
    channels = by_tap.mean(dim=2)
    mass = by_tap.diagonal().mean(dim=1) / channels.diagonal().mean().clamp(min=1e-30)
    return ChannelMoments(channels, mass)


def input_subspaces(
    weight: Tensor, outputs: Tensor, channels: ChannelMoments, groups: int = 1, *, seed: int = 0
) -> Subspaces:
    """Find the projections of a layer's input that keep its outputs.

    With whitened inputs the damage of a projection is the energy of the filters outside it, so the
    best one of each rank is spanned by the first principal directions of the filters. For several
    groups, filters and subspaces are matched in turn (k-subspaces), groups of equal size.

    Args:
        weight: ``(O, I, kh, kw)`` or ``(O, I)``.
        outputs: ``(O, O)`` second moment of the derivative by the filters' outputs.
        channels: Statistics of the input channels.
        groups: Number of groups; divides ``O``.
        seed: Seed of the first grouping.
    """
    root = torch.linalg.cholesky(regular(channels.second))  # (I, I)
    filters = (taps_of(weight) * channels.mass.sqrt()).transpose(1, 2) @ root  # (O, T, I) whitened
    gain = outputs.diagonal().sqrt()[:, None, None]
    order = group_filters(filters * gain, groups, seed=seed).argsort(stable=True)
    own = regular(blocks_of(outputs, order, groups))
    sorted_ = torch.unflatten(filters[order], 0, (groups, -1))
    parts = torch.einsum("gpq,gpti->gqti", torch.linalg.cholesky(own), sorted_)
    bases, energies = principal(parts.flatten(1, 2))
    bases = torch.linalg.solve_triangular(root, bases, upper=False, left=False)
    return Subspaces(order, bases, energies)


def blocks_of(outputs: Tensor, order: Tensor, groups: int) -> Tensor:
    """Return the part ``(G, O/G, O/G)`` of ``(O, O)`` that each group of filters has to itself."""
    size = len(outputs) // groups
    parts = outputs[order][:, order].view(groups, size, groups, size)
    return parts.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def principal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal directions of rows and their energies, the largest first.

    Args:
        rows: ``(G, n, d)``.

    Returns:
        ``(G, m, d)`` and ``(G, m)``, ``m = min(n, d)``.
    """
    if rows.shape[1] < rows.shape[2]:
        energy, left = eigen(rows @ rows.mT)
        energy, left = energy.flip(1).clamp(min=0), left.flip(2)
        inverse = torch.where(energy > 1e-7 * energy[:, :1], energy.rsqrt(), 0)
        return (left * inverse[:, None]).mT @ rows, energy
    energy, right = eigen(rows.mT @ rows)
    return right.flip(2).mT, energy.flip(1).clamp(min=0)


def group_filters(filters: Tensor, groups: int, *, seed: int, iterations: int = 2) -> Tensor:
    """Group filters that live in the same subspace, in groups of equal size.

    Args:
        filters: ``(O, T, I)`` whitened filters.
        groups: Number of groups, divides ``O``.
        seed: Seed of k-means, which makes the first grouping.
        iterations: Rounds of fitting subspaces and assigning filters.

    Returns:
        ``(O,)`` group of each filter.
    """
    from scipy.optimize import linear_sum_assignment

    n_out, _, n_in = filters.shape
    if groups == 1:
        return torch.zeros(n_out, dtype=torch.long)
    size, rank = n_out // groups, max(1, n_in // 4)
    means = torch.nn.functional.normalize(filters.flatten(1), dim=1)
    sketch = means @ torch.randn(means.shape[1], 32, generator=torch.Generator().manual_seed(seed))
    cost = kmeans(sketch, groups, seed=seed).distances.float()
    labels = torch.zeros(n_out, dtype=torch.long)
    for iteration in range(iterations + 1):
        slots = cost.repeat_interleave(size, dim=1).numpy()
        labels = torch.from_numpy(linear_sum_assignment(slots)[1] // size)
        if iteration < iterations:
            own = filters[labels.argsort(stable=True)].view(groups, -1, n_in)
            spans = principal(own)[0][:, :rank]  # (G, rank, I)
            cost = -torch.einsum("oti,gri->gotr", filters, spans).square().sum(dim=(2, 3)).T
    return labels
