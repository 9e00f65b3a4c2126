"""Statistics of layers, made up."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from filterpress.statistics import Moments


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(inputs: Tensor, gain: Tensor, *mean: Tensor) -> Moments:
    """Return statistics ``(G, d, d)`` and ``(O,)`` of filters whose errors do not add up."""
    return Moments(inputs, torch.diag_embed(gain.view(len(inputs), -1)), *mean)


def white(n_out: int, d: int) -> Moments:
    """Return statistics in which all weights are alike and apart."""
    return apart(torch.eye(d)[None], torch.ones(n_out))


def correlated(n_out: int, d: int, *, groups: int = 1, seed: int = 0) -> Moments:
    """Return statistics of inputs, and of outputs, of which each resembles the others."""
    sides = []
    for n, number in ((d, seed), (n_out // groups, seed + 100)):
        root = draw(groups, n, n, seed=number) / math.sqrt(n) + 0.5 / n
        sides.append(root @ root.mT + 0.05 * torch.eye(n))
    return Moments(*sides)
