r"""Prune each layer as far as its share of the multiply-accumulates allows, and retrain.

Layers that cost more multiply-accumulates may lose more: of layer ``l`` the weights up to a
threshold go, the largest for which what is pruned is at most a share of the layer's power,

.. math:: \frac1{n_l} \sum_{|w| \le t_l} w^2 \le \frac{x_l}{1 + x_l}\, \sigma_l^2,
    \qquad x_l = \varepsilon\, \frac{m_l}{\bar m},

with ``n`` weights of variance :math:`\sigma^2` about zero, ``m`` multiply-accumulates and
:math:`\bar m` their mean over layers; no allowance lets a whole layer go. One number for the
network, :math:`\varepsilon`, follows from the weights or the multiply-accumulates that may be left.

Of ``n`` weights of which a share ``p`` is left, the file takes ``n (H(p) + b p)`` bits, ``H`` the
binary entropy and ``b`` the bits of a weight, about four. A zero saves one multiply-accumulate a
position on hardware that skips zeros, and none on any other. Saves few multiply-accumulates beyond
that share in a ResNet, whose layers cost the same but for a few, which are spared. Learned
thresholds leave less damage (docs/adr/0026). Does not help where a budget of bytes is small and the
weights are where the multiply-accumulates are not, as in ResNet-18 on small images: dear layers
are emptied first, and no preset loses as much (README, presets compared).

Reference:
    The source starts each threshold at the deviation of the weights and lowers it until the error
    is allowed, so it never prunes beyond one deviation. Here errors are running sums over sorted
    magnitudes, and the largest threshold that is allowed is found at once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from filterpress import statistics
from filterpress.checkpoints import NO_CHECKPOINTS, Checkpoints
from filterpress.fitting import Goal, meet
from filterpress.methods import Outcome
from filterpress.package import macs_by_layer
from filterpress.retraining import IMAGES, FineTuneConfig, fine_tune_
from filterpress.sparsity import prune_, share_for, surviving
from filterpress.surgery import layers
from filterpress.tasks import Task, calibration


@dataclass(frozen=True, kw_only=True)
class MacsConfig(FineTuneConfig):
    """How `prune_by_macs` retrains: as `FineTuneConfig`.

    Attributes:
        macs: Share of the multiply-accumulates, of weights that are not zero, that may be left, in
            (0, 1); 0 leaves as many weights as the budget does.
    """

    epochs: int = 3
    macs: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.macs < 1:
            raise ValueError(f"macs must be in (0, 1), or 0 for the budget, got {self.macs}")


class Ladder(NamedTuple):
    """The magnitudes of a layer's weights, and what pruning up to each of them does."""

    magnitudes: Tensor  # (n,) rising
    errors: Tensor  # (n,) share of the layer's power in weights up to that magnitude

    def threshold(self, allowance: float) -> float:
        """Return the largest magnitude that may go, 0 if none may.

        Args:
            allowance: Share of the layer's power, in [0, 1).
        """
        count = int((self.errors <= allowance).sum())
        return float(self.magnitudes[count - 1]) if count else 0.0


def ladder(weight: Tensor) -> Ladder:
    """Sort the weights of a layer by magnitude.

    Args:
        weight: Any shape; weights of one magnitude go together.

    Example:
        >>> rungs = ladder(torch.tensor([3.0, -1.0, 0.0, 1.0]))
        >>> rungs.threshold(0.1), rungs.threshold(0.2)
        (0.0, 1.0)
    """
    magnitudes = weight.flatten().abs().sort().values
    sums = magnitudes.double().square().cumsum(dim=0)
    last = torch.searchsorted(magnitudes, magnitudes, right=True) - 1  # of the same magnitude
    return Ladder(magnitudes, sums[last] / sums[-1].clamp(min=torch.finfo(torch.double).tiny))


def allowances(macs: Mapping[str, float], epsilon: float) -> dict[str, float]:
    """Return the share of its power that each layer may lose.

    Args:
        macs: Multiply-accumulates by layer name.
        epsilon: What a layer of mean cost may lose, over what it keeps.

    Example:
        >>> allowances({"cheap": 100, "dear": 300}, 1.0)
        {'cheap': 0.3333333333333333, 'dear': 0.6}
    """
    mean = sum(macs.values()) / len(macs)
    excess = {name: epsilon * n / mean for name, n in macs.items()}
    return {name: x / (1 + x) for name, x in excess.items()}


def thresholds(
    weights: Mapping[str, Tensor],
    macs: Mapping[str, float],
    worth: Mapping[str, float],
    most: float,
) -> dict[str, float]:
    """Choose the thresholds of all layers by one epsilon.

    Args:
        weights: By layer name.
        macs: Multiply-accumulates of each layer.
        worth: What a weight of each layer counts that is left.
        most: What all weights that are left may count, positive.

    Returns:
        Thresholds by layer name, of the smallest epsilon that leaves no more than that.
    """
    rungs = {name: ladder(weight) for name, weight in weights.items()}

    def at(epsilon: float) -> dict[str, float]:
        allowed = allowances(macs, epsilon)
        return {name: rung.threshold(allowed[name]) for name, rung in rungs.items()}

    def left(epsilon: float) -> float:
        return sum(
            worth[name] * int((rungs[name].magnitudes > threshold).sum())
            for name, threshold in at(epsilon).items()
        )

    return at(meet(left, most))


def prune_by_macs(
    model: nn.Module,
    task: Task,
    config: MacsConfig,
    *,
    goal: Goal,
    seed: int = 0,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> Outcome:
    """Prune the weights of a network by what its layers cost to run, and train what is left.

    Args:
        model: Network to prune.
        task: Data and score.
        config: How far to prune, and how to train.
        goal: Its budget tells how many weights survive, where ``macs`` is 0.
        seed: Seed of the order of the images and their augmentation.
        checkpoints: Where training goes on from, if they are there.

    Returns:
        The network with zeros; the share ``pruned``, the share of ``macs`` of weights that are not
        zero, and the ``validation_accuracy``. Of each layer its ``threshold``, in ``deviations``
        too, the share of its weights ``pruned``, and ``macs`` of these.
    """
    teacher = statistics.plain_for(model, calibration(task, IMAGES, seed))
    macs = macs_by_layer(teacher, task.input_shape)
    weights = {name: layers(teacher)[name].weight.detach() for name in macs}
    if config.macs:
        worth = {name: n / weights[name].numel() for name, n in macs.items()}
        most = config.macs * sum(macs.values())
    else:
        worth = dict.fromkeys(weights, 1.0)
        most = share_for(teacher, goal) * sum(weight.numel() for weight in weights.values())
    now = sum(worth[name] * int(weight.count_nonzero()) for name, weight in weights.items())
    if now <= most:
        return Outcome(copy.deepcopy(model), {"pruned": 0.0}, {})
    chosen = thresholds(weights, macs, worth, most)
    result = copy.deepcopy(teacher)
    kept = {name: weight.abs() > chosen[name] for name, weight in weights.items()}
    prune_(result, kept)
    checkpoint = checkpoints.take()
    tuned = fine_tune_(result, teacher, task, config, seed=seed, checkpoint=checkpoint)
    told = {n: _told(weights[n], kept[n], chosen[n], macs[n]) for n in macs}
    notes = {
        "pruned": 1 - surviving(result),
        "macs": sum(entry["macs"] for entry in told.values()) / sum(macs.values()),
        "validation_accuracy": tuned.validation_score,
    }
    return Outcome(result, notes, told)


def _told(weight: Tensor, kept: Tensor, threshold: float, macs: int) -> dict[str, float]:
    share = float(kept.float().mean())
    deviation = float(weight.square().mean().sqrt())
    return {
        "threshold": threshold,
        "deviations": threshold / deviation if deviation else 0.0,
        "pruned": 1 - share,
        "macs": share * macs,
    }
