"""k-means on tensors, by scikit-learn."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor


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
