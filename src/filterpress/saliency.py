r"""How much the loss hangs on each weight, and pruning by it in turns with retraining.

One pass over all training data gives the saliency of every weight, the product of its size and of
the normalised gradient of the loss:

.. math:: S = \frac{\bar g}{\lVert\bar g\rVert}\,|w|,
   \qquad \bar g = \sum_b \left|\frac{\partial L_b}{\partial w}\right|

with the norm taken over the weight's layer, so that weights of all layers compare and one rate for
the network gives each layer a rate of its own. The sum is over batches; where training has ended
gradients with their signs cancel, and what is left of them tells little.

Pruning and retraining take turns. Each turn measures saliency again, sets a part of the weights to
zero, and trains the others to imitate the network as it came. Zeros stay zeros.

Reference:
    Lee et al., "SNIP", ICLR 2019, for the product of gradient and weight; Zhu and Gupta, "To prune,
    or not to prune", 2017, for the cubic schedule. docs/adr/0024 has what other normalisations
    give.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from filterpress import statistics
from filterpress.checkpoints import Checkpoints
from filterpress.errors import ModelError
from filterpress.fitting import Goal
from filterpress.grids import range_grid
from filterpress.processes import best_device
from filterpress.progress import progress
from filterpress.representations import quantize_
from filterpress.retraining import FineTuneConfig, fine_tune_
from filterpress.sparsity import prune_
from filterpress.surgery import cut_unread_, layers
from filterpress.tasks import Task, calibration
from filterpress.training import FitConfig, forward, in_bfloat16

Schedule = Literal["cubic", "geometric"]
IMAGES = 1024  # on which batch-norm is measured again after a cut
LEAST = 1e-9  # normalised gradient that every weight has
HIGHEST = 0.99  # rate that a budget can ask for; the rest is better left to fewer bits
HALVINGS = 7  # of the interval in which that rate is searched


@dataclass(frozen=True, kw_only=True)
class PruningConfig(FineTuneConfig):
    """How pruning and retraining take turns; `FineTuneConfig` is for each retrain.

    Attributes:
        rate: Share that is removed, in [0, 1); 0 for the least with which the file meets the budget
            when what stays is rounded to ``bits``.
        bits: That rate 0 reckons with, 2 to 8.
        steps: Turns.
        schedule: How the rate grows: cubic (the more the earlier), or geometric (each turn removes
            the same share of what is there).
    """

    epochs: int = 1
    rate: float = 0.0
    bits: int = 4
    steps: int = 3
    schedule: Schedule = "cubic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate must be in [0, 1), got {self.rate}")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be in 2..8, got {self.bits}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"schedule must be one of {get_args(Schedule)}, got {self.schedule!r}")

    def rates(self, last: float) -> list[float]:
        """Return the share that is gone after each turn.

        Args:
            last: After the last one, in [0, 1).

        Example:
            >>> config = PruningConfig(steps=2, schedule="geometric")
            >>> [round(rate, 6) for rate in config.rates(0.75)]
            [0.5, 0.75]
        """
        passed = [turn / self.steps for turn in range(1, self.steps + 1)]
        if self.schedule == "cubic":
            return [last * (1 - (1 - share) ** 3) for share in passed]
        return [1 - (1 - last) ** share for share in passed]


class Way(NamedTuple):
    """A way to prune one network."""

    #: From the saliency of all weights and a rate, which weights stay: booleans by layer name that
    #: broadcast to the layer's weight. What is zero already counts.
    kept: Callable[[Mapping[str, Tensor], float], dict[str, Tensor]]
    #: Sets the others to zero.
    remove_: Callable[[nn.Module, Mapping[str, Tensor]], None]
    shrink: bool  # whether to cut the channels that nothing reads any more


class Pruned(NamedTuple):
    """What came of pruning in turns."""

    network: nn.Module
    notes: dict[str, float | str]
    layers: dict[str, dict[str, float]]


def prune_in_turns(
    model: nn.Module,
    task: Task,
    config: PruningConfig,
    plan: Callable[[nn.Module, Tensor], Way],
    *,
    goal: Goal,
    seed: int,
    checkpoints: Checkpoints,
) -> Pruned:
    """Prune and retrain by turns.

    Args:
        model: Network to prune, and the teacher of the retrains.
        task: Data, loss and score.
        config: How much, and in which turns.
        plan: Given the network in plain form and calibration images, says how to prune it.
        goal: The budget, from which the rate follows where the config has none.
        seed: Seed of the retrains.
        checkpoints: Where retrains go on from, if they are there.

    Returns:
        The network in plain form, or a copy of the one given where nothing need go or can; the
        ``rate``, the numbers of weights ``pruned`` and of ``channels`` cut, and the
        ``trained_validation_accuracy``; of each layer the weights ``pruned`` and ``kept``.
    """
    images = calibration(task, IMAGES, seed)
    network = statistics.plain_for(model, images)
    teacher, before = copy.deepcopy(model).eval(), weights_left(network)
    way, saliency = plan(network, images), measure(network, task, config)

    def cut(rate: float) -> nn.Module:
        made = copy.deepcopy(network)
        prune_(made, way.kept(saliency, rate))
        if way.shrink:
            cut_unread_(made, images[:2])
        return made

    rate = config.rate or rate_for(goal, cut, config.bits)
    if not rate or weights_left(cut(rate)) == before:
        return Pruned(copy.deepcopy(model), {"rate": rate, "pruned": 0.0, "channels": 0.0}, {})
    for turn, share in enumerate(config.rates(rate)):
        if turn:
            saliency = measure(network, task, config)
        way.remove_(network, way.kept(saliency, share))
        statistics.recalibrate_(network, images)
        checkpoint = checkpoints.take()
        result = fine_tune_(network, teacher, task, config, seed=seed + turn, checkpoint=checkpoint)
    channels = cut_unread_(network, images[:2]) if way.shrink else 0
    after = weights_left(network)
    notes: dict[str, float | str] = {
        "rate": rate,
        "pruned": 1 - sum(after.values()) / sum(before.values()),
        "channels": float(channels),
        "trained_validation_accuracy": result.validation_score,
    }
    changed = {
        name: {"pruned": 1 - after[name] / n} for name, n in before.items() if n > after[name]
    }
    return Pruned(network, notes, changed)


def weights_left(network: nn.Module) -> dict[str, int]:
    """Count the weights of each layer that have not been pruned."""
    return {name: int(layer.weight.count_nonzero()) for name, layer in layers(network).items()}


def measure(network: nn.Module, task: Task, config: FitConfig) -> dict[str, Tensor]:
    """Measure the saliency of every weight in one pass over the training images, as they are.

    Args:
        network: A plain network; it stays as it is.
        task: Data and loss.
        config: Batch size and precision.

    Returns:
        ``(O, I/groups, kh, kw)`` or ``(O, I)`` by layer name, not negative; nearly zero in a layer
        that is not used by the forward pass.

    Raises:
        ModelError: A gradient is not finite.
    """
    device = best_device()
    student = copy.deepcopy(network).to(device).eval()
    bfloat16 = in_bfloat16(config.precision, student, device)
    weights = {name: layer.weight for name, layer in layers(student).items()}
    totals = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    n_batches = -(-task.size("train") // config.batch_size)
    with progress("saliency", n_batches) as advance, torch.enable_grad():
        for images, targets in task.batches("train", config.batch_size, device=device):
            loss = task.loss(forward(student, images, bfloat16), targets)
            gradients = torch.autograd.grad(
                loss, list(weights.values()), allow_unused=True, materialize_grads=True
            )
            for total, gradient in zip(totals.values(), gradients, strict=True):
                total.add_(gradient.abs())
            advance()
    for name, total in totals.items():
        if not torch.isfinite(total).all():
            raise ModelError(f"the gradients of {name} must be finite, got NaN or infinity")
    return {n: salience(totals[n], w.detach()).cpu() for n, w in weights.items()}


def salience(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return the saliency of a layer's weights.

    Args:
        gradient: Of any shape and unit.
        weight: Of the same shape.

    Returns:
        Of the same shape; zero only where a weight is, so that what has been pruned goes first.

    Example:
        >>> saliency = salience(torch.tensor([3.0, -4.0]), torch.tensor([-2.0, 1.0]))
        >>> (10 * saliency).round().tolist()
        [12.0, 8.0]
    """
    norm = gradient.norm()
    return (gradient.abs() / torch.where(norm > 0, norm, 1) + LEAST) * weight.abs()


def kept_of(scores: Sequence[Tensor], rate: float) -> list[Tensor]:
    """Keep all items but a share with the lowest scores; of equal ones the first go.

    Args:
        scores: Of any shape; items of all tensors compare.
        rate: Share of all items that goes, rounded to whole ones. The highest of each tensor stays
            whatever its score.

    Returns:
        Booleans of the same shapes.

    Example:
        >>> scores = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5])]
        >>> [keep.tolist() for keep in kept_of(scores, 0.5)]
        [[False, False, True], [True]]
    """
    if not scores:
        return []
    flat = torch.cat([_first_of_all(score) for score in scores])
    n_gone = min(round(rate * len(flat)), len(flat) - len(scores))
    keep = torch.ones(len(flat), dtype=torch.bool)
    keep[flat.argsort(stable=True)[:n_gone]] = False
    parts = torch.split(keep, [score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def _first_of_all(score: Tensor) -> Tensor:
    """Flatten scores, with infinity in place of the highest."""
    flat = score.flatten()
    return flat.index_fill(0, flat.argmax(), math.inf)


def rate_for(goal: Goal, cut: Callable[[float], nn.Module], bits: int) -> float:
    """Find the least rate at which a network roughly rounded fits.

    The roughly rounded network has integers of a width over the range of each filter: it is quick
    to make, and goes through the coder, which knows best what zeros among them are worth. The stage
    that quantises spends the bytes better, on ``bits`` where they are needed.

    Args:
        goal: Largest file, and the size of a network's.
        cut: Makes the network of a rate.
        bits: Width of a weight that stays.

    Returns:
        The rate; 0 where nothing needs to go, and `HIGHEST` where even that does not fit.
    """

    def fits(rate: float) -> bool:
        return goal.size(_rough(cut(rate), bits)) <= goal.max_bytes

    if fits(0.0):
        return 0.0
    low, high = 0.0, HIGHEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _rough(network: nn.Module, bits: int) -> nn.Module:
    """Round a network, in place, to integers of a width."""
    for layer in layers(network).values():
        quantize_(layer, *range_grid(layer.weight.detach().flatten(1), bits, symmetric=True))
    return network
