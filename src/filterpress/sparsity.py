r"""What the file of a network with pruned weights takes, and how many weights a budget leaves.

A weight that is exactly zero has been pruned. The coder spends the entropy of where the zeros are,
and a few bits on each weight that is left: of ``n`` weights, of which a share ``p`` survives,

.. math:: B(p) = \tfrac18\, n\, (H(p) + b\, p), \quad H(p) = -p \log_2 p - (1-p) \log_2 (1-p).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from filterpress.fitting import Goal
from filterpress.surgery import layers

SURVIVOR_BITS = 4.0  # of a weight that is left, once it is quantised; with its sign
PRECISION = 1e-6  # of a share
LEAST = 0.01  # share that survives whatever the budget; further on, fewer bits do better


def sparse_bytes(n_weights: float, share: Tensor) -> Tensor:
    """Return the bytes of weights of which a share survives; can be differentiated by it.

    Args:
        n_weights: Number of weights.
        share: Of those that are not zero, in [0, 1], any shape.

    Returns:
        Bytes, of the shape of ``share``.

    Example:
        >>> sparse_bytes(8000, torch.tensor([0.0, 0.5, 1.0])).tolist()
        [0.0, 3000.0, 4000.0]
    """
    positions = (torch.special.entr(share) + torch.special.entr(1 - share)) / math.log(2)
    bits: Tensor = positions + SURVIVOR_BITS * share
    return n_weights / 8 * bits


def survivors_for(n_weights: float, max_bytes: float) -> float:
    """Return the largest share of weights that may survive for a number of bytes.

    Args:
        n_weights: Number of weights, positive.
        max_bytes: Bytes for them; with none or fewer, no weight survives.

    Returns:
        In [0, 1], to within a millionth; 1 where no weight need go.

    Example:
        >>> round(survivors_for(8000, 3000), 3)
        0.5
    """
    low, high = 0.0, 1 / (1 + 2**-SURVIVOR_BITS)  # where bytes are most: above, all may stay
    if max_bytes >= sparse_bytes(n_weights, torch.tensor(high, dtype=torch.float64)):
        return 1.0
    while high - low > PRECISION:
        middle = (low + high) / 2
        if sparse_bytes(n_weights, torch.tensor(middle, dtype=torch.float64)) > max_bytes:
            high = middle
        else:
            low = middle
    return low


def share_for(network: nn.Module, goal: Goal) -> float:
    """Return the largest share of a network's weights that may survive for a budget.

    Args:
        network: A plain network; its graph, biases and norms take what they take.
        goal: The budget.

    Returns:
        In [`LEAST`, 1], of the weights of its layers; see `survivors_for`.
    """
    blank = copy.deepcopy(network)
    with torch.no_grad():
        for layer in layers(blank).values():
            layer.weight.zero_()
    n_weights = sum(layer.weight.numel() for layer in layers(network).values())
    return max(LEAST, survivors_for(n_weights, goal.max_bytes - goal.size(blank)))


def surviving(network: nn.Module) -> float:
    """Return the share of the weights of a network's layers that are not zero."""
    weights = [layer.weight.detach() for layer in layers(network).values()]
    return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def reached(scores: Iterable[Tensor], share: float) -> float:
    """Return the largest score that a share of all weights reach or exceed.

    Args:
        scores: Of each weight, any shapes.
        share: In (0, 1]; rounded to whole weights, and to one at least.

    Example:
        >>> reached([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0])], 0.5)
        2.0
    """
    flat = torch.cat([score.flatten() for score in scores])
    count = max(1, round(share * len(flat)))
    return flat.kthvalue(len(flat) - count + 1).values.item()


def strongest(scores: Mapping[str, Tensor], bound: float) -> dict[str, Tensor]:
    """Choose the weights whose scores reach a bound, and the strongest of each layer in any case.

    Args:
        scores: Of each weight, any shapes, by layer name.
        bound: The same for all layers.

    Returns:
        Boolean tensors of the same shapes.
    """
    return {name: score >= score.max().clamp(max=bound) for name, score in scores.items()}


def prune_(network: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Set weights of plain layers to zero.

    Args:
        network: The network, changed in place.
        kept: Boolean, by the name of a layer, that broadcast to its weight; false ones go.
    """
    with torch.no_grad():
        for name, keep in kept.items():
            layers(network)[name].weight.masked_fill_(~keep, 0)
