"""Clusters of tensors: k-means, by scikit-learn, and how many there are among numbers, by BIRCH.

Reference:
    Zhang, Ramakrishnan and Livny, "BIRCH: An Efficient Data Clustering Method for Very Large
    Databases", SIGMOD 1996; here numbers come in order of size, so that the tree is a list of which
    only the last entry can grow. Its sums are those of Lang and Schubert, "BETULA: Numerically
    stable CF-trees for BIRCH clustering", 2020.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

ROUNDS = 300  # of k-means


class Clusters(NamedTuple):
    """Points grouped around centres."""

    labels: Tensor  # (n,) cluster of each point
    distances: Tensor  # (n, k) of each point from each centre


def kmeans(points: Tensor, k: int, *, seed: int = 0, weight: Tensor | None = None) -> Clusters:
    """Group points into at most ``k`` clusters; points that coincide may leave some empty.

    Args:
        points: ``(n, d)``, finite.
        k: Number of clusters, at least 1 and at most ``n``.
        seed: Seed of the first centres, which k-means++ chooses.
        weight: ``(n,)`` positive, how much each point counts; all the same without it.

    Returns:
        The clusters.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    array = points.double().numpy()
    weights = None if weight is None else weight.double().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different points than clusters
        fitted = KMeans(k, n_init=1, random_state=seed).fit(array, sample_weight=weights)
    return Clusters(
        torch.from_numpy(fitted.labels_).long(), torch.from_numpy(fitted.transform(array))
    )


def cluster_means(values: Tensor, k: int, *, weight: Tensor, seed: int = 0) -> Tensor:
    """Group numbers by k-means, as `kmeans` does for points, and return the mean of each cluster.

    Clusters of numbers are intervals, so that a round takes as many look-ups as there are clusters.

    Args:
        values: ``(n,)``, finite.
        k: Number of clusters, at least 1 and at most as many as there are different numbers.
        weight: ``(n,)`` positive, how much each number counts.
        seed: Seed of the first means, which k-means++ chooses.

    Returns:
        ``(k,)`` means, ascending; fewer where a cluster was left without numbers.
    """
    from sklearn.cluster import kmeans_plusplus

    ascending, order = values.double().sort()
    numbers, mass = ascending.numpy(), weight.double()[order].numpy()
    seeds, _ = kmeans_plusplus(numbers[:, None], k, sample_weight=mass, random_state=seed)
    below = np.concatenate([[0.0], mass.cumsum()])  # the mass of all numbers before each
    moment = np.concatenate([[0.0], (mass * numbers).cumsum()])
    means = np.unique(seeds)
    for _ in range(ROUNDS):
        cuts = np.searchsorted(numbers, (means[1:] + means[:-1]) / 2)
        edges = np.unique(np.concatenate([[0], cuts, [len(numbers)]]))
        before, means = means, np.diff(moment[edges]) / np.diff(below[edges])
        if np.array_equal(before, means):
            break
    return torch.from_numpy(means)


def count_clusters(
    values: Tensor, weight: Tensor, radii: Sequence[float], *, most: int
) -> list[int]:
    """Count the clusters that BIRCH finds among numbers, for each largest radius of a cluster.

    The radius of a cluster is the root of the mean squared distance from its mean. A number joins
    the cluster of the nearest mean, unless that grows beyond the largest radius: then it founds one
    of its own. Of numbers in order of size the nearest cluster is always the last, so the order in
    which they are given does not matter.

    Args:
        values: ``(n,)``, finite, n at least 1.
        weight: ``(n,)`` positive, how much each number counts.
        radii: Not negative.
        most: Where counting ends.

    Returns:
        The number of clusters for each radius, 1 to ``most``.

    Example:
        >>> numbers = torch.tensor([0.0, 5.1, 0.1, 5.0])
        >>> count_clusters(numbers, torch.ones(4), [0.0, 0.1, 5.0], most=9)
        [4, 2, 1]
    """
    ascending, order = values.double().sort()
    arrays = ascending.numpy(), weight.double()[order].numpy()
    return [int(_count(*arrays, float(radius), most)) for radius in radii]


@njit(cache=True)
def _count(
    values: NDArray[np.float64], weights: NDArray[np.float64], radius: float, most: int
) -> int:
    """Count the clusters of ascending numbers."""
    n_clusters, mass, mean, spread = 1, 0.0, 0.0, 0.0  # of the last: of squares around the mean
    for i in range(values.size):
        total, distance = mass + weights[i], values[i] - mean
        grown = spread + distance**2 * mass * weights[i] / total
        if grown > radius**2 * total:
            if n_clusters == most:
                break
            n_clusters, mass, mean, spread = n_clusters + 1, weights[i], values[i], 0.0
        else:
            mass, mean, spread = total, mean + distance * weights[i] / total, grown
    return n_clusters
