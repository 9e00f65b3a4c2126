r"""Cluster vectors by the lines they lie on: k-means under the Pearson correlation.

Vectors are made mean-free and of unit norm. A vector belongs to the centre :math:`c_t` of largest
:math:`|\operatorname{corr}|`, since a factor of either sign can follow, and the share of its energy
that the centre leaves is :math:`1 - \operatorname{corr}^2`. The best centre of a cluster is the
leading eigenvector of :math:`\sum_n m_n x_n x_n^\top`; one step of the power method, the sum of its
members with their signs, comes near it from the centre before.

Reference:
    Spherical k-means (Dhillon and Modha, "Concept decompositions for large sparse text data using
    clustering", 2001), here of lines instead of directions; k-means++ for the first centres.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SAMPLE = 2**16  # vectors that centres are fitted to
SEEDS = 2**12  # vectors among which the first centres are chosen
CHUNK = 2**14  # vectors compared with all centres at a time
ITERATIONS = 50
ENOUGH = 1e-4  # of what centres leave; when an iteration saves less, the next one will not


class Matches(NamedTuple):
    """The line of each vector."""

    labels: Tensor  # (n,)
    correlations: Tensor  # (n,) with the centre, signed


def standardise(vectors: Tensor) -> Tensor:
    """Make vectors ``(n, d)`` mean-free and of unit norm; flat ones become zero."""
    centred = vectors - vectors.mean(dim=1, keepdim=True)
    length = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    # what rounding leaves of a constant is not a shape
    flat = length <= 1e-6 * torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return torch.where(flat, 0, centred / length)


def match(points: Tensor, centres: Tensor) -> Matches:
    """Find the line of largest absolute correlation for each vector.

    Args:
        points: ``(n, d)`` as `standardise` makes them.
        centres: ``(k, d)`` likewise.
    """
    labels, correlations = [], []
    for part in torch.split(points, CHUNK):
        scores = part @ centres.T
        best = scores.abs().argmax(dim=1)
        labels.append(best)
        correlations.append(scores.gather(1, best[:, None])[:, 0])
    return Matches(torch.cat(labels), torch.cat(correlations))


def k_lines(vectors: Tensor, k: int, *, seed: int = 0, weight: Tensor | None = None) -> Tensor:
    """Find the lines that leave the least of some vectors.

    Args:
        vectors: ``(n, d)``, finite; of many, centres are fitted to a sample of about `SAMPLE`.
        k: Number of lines, at least 1.
        seed: Chooses the sample and the first centres.
        weight: ``(n,)`` how much what is left of a vector counts, not negative; all the same
            without it.

    Returns:
        ``(k, d)`` mean-free, unit norm. Fewer than ``k`` where there are fewer different lines,
        none where all vectors are flat.

    Example:
        >>> x = torch.tensor([[1.0, 0.0, 0.0], [-2.0, 0.0, 0.0], [5.0, 5.0, 6.0]])
        >>> (100 * k_lines(x, 2).abs()).round().sort(dim=0).values[1].tolist()
        [82.0, 41.0, 82.0]
    """
    generator = torch.Generator().manual_seed(seed)
    points = standardise(vectors)
    mass = points.new_ones(len(points)) if weight is None else weight
    seen = points.any(dim=1) & (mass > 0)
    points, mass = _sample(points[seen], mass[seen], SAMPLE, generator)
    if not len(points):
        return points
    centres = _first_centres(*_sample(points, mass, SEEDS, generator), k, generator)
    before = torch.inf
    for _ in range(ITERATIONS):
        labels, correlations = match(points, centres)
        left = mass * (1 - correlations.square()).clamp(min=0)
        if float(left.sum()) >= (1 - ENOUGH) * before:
            break
        before = float(left.sum())
        centres = _moved(points, mass * correlations, labels, left, centres)
    return centres


def _sample(
    points: Tensor, mass: Tensor, n: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw about ``n`` vectors, each with a chance as its mass, and give those drawn its worth.

    A few vectors often have most of the mass, and drawn alike these would be missing.
    """
    if len(points) <= n:
        return points, mass
    chance = (mass * (n / mass.sum())).clamp(max=1)
    drawn = torch.rand(len(mass), generator=generator) < chance
    return points[drawn], (mass / chance)[drawn]


def _first_centres(points: Tensor, mass: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Choose vectors as centres, each with a chance as large as what those before leave of it."""
    left, chosen = mass, []
    for _ in range(min(k, len(points))):
        if float(left.max()) <= 1e-6 * float(mass.max()):
            break  # every vector is on a line
        chosen.append(int(torch.multinomial(left, 1, generator=generator)))
        left = torch.minimum(left, mass * (1 - (points @ points[chosen[-1]]).square()).clamp(min=0))
    return points[chosen]


def _moved(points: Tensor, pull: Tensor, labels: Tensor, left: Tensor, centres: Tensor) -> Tensor:
    """Move centres to what their members have in common, and lost ones to what fits worst."""
    sums = torch.zeros_like(centres).index_add_(0, labels, points * pull[:, None])
    length = torch.linalg.vector_norm(sums, dim=1, keepdim=True)
    moved = torch.where(length > 0, sums / length.clamp(min=1e-30), centres)
    lost = (length[:, 0] == 0).nonzero().flatten()
    if len(lost):
        worst = left.topk(min(len(lost), len(left))).indices
        moved[lost[: len(worst)]] = points[worst]
    return moved
