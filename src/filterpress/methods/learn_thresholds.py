r"""Prune weights by thresholds that are learned with them, one for each layer.

While it learns, a layer computes with a smooth function of its weights that is nearly zero below a
threshold :math:`\alpha` and nearly the weight above, the more so the larger the sharpness
:math:`\beta`:

.. math:: h(w) = \operatorname{relu}(w - \alpha) + \alpha\,\sigma(\beta(w - \alpha))
    - \operatorname{relu}(-w - \alpha) - \alpha\,\sigma(\beta(-w - \alpha))

Weights and both parameters of every layer descend, by back-propagation, on the loss of imitating
the network given, plus :math:`\tfrac\kappa2 \log^2(S / S^*)` for the number of survivors
:math:`S = \sum \sigma(\beta(|w| - \alpha))`; what a survivor costs, :math:`\lambda = \kappa
\log(S / S^*)`, thus follows from the number :math:`S^*` that the budget leaves. In the end all
thresholds move by one common factor, to leave that very number; weights below become zero, those
above what ``h`` makes of them, and the network is trained on with its zeros held.

Of ``n`` weights of which a share ``p`` is left, the file takes ``n (H(p) + b p)`` bits, ``H`` the
binary entropy and ``b`` the bits of a weight, about four. A zero saves one multiply-accumulate a
position on hardware that skips zeros, and none on any other. Of a small network, learned thresholds
move the outputs half as far as even ones (docs/adr/0026). Does not help where `reduce` follows,
which finds the zeros worth their damage: at the same bytes and epochs the preset loses more than
the default one, most of all in ResNet-18, where the budget lets few weights survive (README,
presets compared). In few steps thresholds stay near where they start.

Reference:
    Manessi et al., "Automated Pruning for Deep Neural Network Compression", ICPR 2018, for ``h``.
    Here parameters learn as logarithms, which keeps them positive and makes steps relative to the
    layer's own scale, and the regulariser is one on the number of survivors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from filterpress import statistics
from filterpress.checkpoints import NO_CHECKPOINTS, Checkpoints
from filterpress.fitting import Goal
from filterpress.methods import Outcome
from filterpress.representations import UNROUNDED, form_of, without_quantization
from filterpress.retraining import IMAGES, FineTuneConfig, fine_tune_
from filterpress.sparsity import prune_, reached, share_for, strongest, surviving
from filterpress.surgery import layers
from filterpress.tasks import Task, calibration


@dataclass(frozen=True, kw_only=True)
class ThresholdConfig(FineTuneConfig):
    """How `learn_thresholds` trains: as `FineTuneConfig`.

    Attributes:
        epochs: Passes over the training set with zeros held, once the thresholds are learned.
        learning_epochs: Passes in which thresholds and weights learn together.
        start: What thresholds start at, as a share of the one in standard deviations of a layer's
            weights that would meet the budget if it were that of all layers.
        sharpness: What ``alpha * beta`` starts at; 20 spreads the threshold over a tenth of itself.
        pace: Factor of the learning rate for the logarithms of thresholds and sharpnesses; their
            descent is unstable far above 1.
        strictness: What missing the number of survivors costs, kappa above.
    """

    epochs: int = 2
    learning_epochs: int = 1
    start: float = 0.5
    sharpness: float = 20.0
    pace: float = 1.0
    strictness: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learning_epochs < 1:
            raise ValueError(f"learning_epochs must be at least 1, got {self.learning_epochs}")
        for name in ("start", "sharpness", "pace", "strictness"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


def soft_threshold(weight: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Return ``h`` of each weight: odd, and smooth but for its slope, which rises by 1 at alpha.

    Args:
        weight: Any shape.
        alpha: Threshold, positive.
        beta: Sharpness, positive; without end, weights up to alpha are 0 and others as they are.

    Example:
        >>> weight = torch.tensor([-2.0, 0.5, 1.5])
        >>> soft = soft_threshold(weight, torch.tensor(1.0), torch.tensor(80.0))
        >>> [round(value, 3) for value in soft.tolist()]
        [-2.0, 0.0, 1.5]
    """
    above, below = weight - alpha, -weight - alpha
    return (
        F.relu(above)
        + alpha * torch.sigmoid(beta * above)
        - F.relu(below)
        - alpha * torch.sigmoid(beta * below)
    )


class Thresholded(nn.Module):
    """Parametrisation of a weight by one without a threshold, while the threshold is learned.

    Args:
        deviation: Of the layer's weights, positive.
        threshold: What the threshold starts at, in deviations.
        common: ``()`` part of the logarithms of all thresholds, shared by all layers: with it the
            budget moves them together, however few weights a layer has.
        config: Where sharpness starts, and how fast both learn.
    """

    def __init__(
        self, deviation: float, threshold: float, common: nn.Parameter, config: ThresholdConfig
    ) -> None:
        super().__init__()
        self.deviation, self.threshold, self.sharpness = deviation, threshold, config.sharpness
        # a parameter that counts speed times descends by speed ** 2 times the learning rate
        self.speed = math.sqrt(config.pace)
        self.common = common
        self.own = nn.Parameter(torch.zeros(()))
        self.sharper = nn.Parameter(torch.zeros(()))

    @property
    def alpha(self) -> Tensor:
        """The threshold."""
        grown = (self.speed * (self.common + self.own)).exp()
        return self.deviation * self.threshold * grown

    @property
    def beta(self) -> Tensor:
        """The sharpness."""
        return self.sharpness * (self.speed * self.sharper).exp() / self.alpha

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the layer computes with."""
        return soft_threshold(weight, self.alpha, self.beta)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Take an assigned weight for the one without a threshold."""
        return weight

    def survivors(self, weight: Tensor) -> Tensor:
        """Count the weights above the threshold, so that it can be differentiated."""
        return torch.sigmoid(self.beta * (weight.abs() - self.alpha)).sum()


def learn_thresholds(
    model: nn.Module,
    task: Task,
    config: ThresholdConfig,
    *,
    goal: Goal,
    seed: int = 0,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> Outcome:
    """Learn a threshold for each layer, prune below, and train what is left.

    Args:
        model: Network to prune.
        task: Data and score.
        config: How to learn.
        goal: Its budget tells how many weights survive.
        seed: Seed of the order of the images and their augmentation.
        checkpoints: Where training goes on from, if they are there.

    Returns:
        The network, as many of its weights zero as the budget asks for; the share ``pruned``; the
        ``factor`` by which all thresholds moved in the end, near 1 where learning did the work; and
        the ``validation_accuracy``. Of each layer its ``threshold``, in ``deviations`` too, its
        sharpness and the share of its weights ``pruned``.
    """
    teacher = statistics.plain_for(model, calibration(task, IMAGES, seed))
    share = share_for(teacher, goal)
    if share >= surviving(teacher):
        return Outcome(copy.deepcopy(model), {"pruned": 0.0}, {})
    student = copy.deepcopy(teacher)
    forms = thresholded_(student, share, config)
    fine_tune_(
        student,
        teacher,
        task,
        replace(config, epochs=config.learning_epochs),
        seed=seed,
        description="threshold",
        penalty=cost_of_survivors(student, share, config.strictness),
        checkpoint=checkpoints.take(),
    )
    result, kept, factor = cut(student, share)
    checkpoint = checkpoints.take()
    tuned = fine_tune_(result, teacher, task, config, seed=seed + 1, checkpoint=checkpoint)
    notes = {
        "pruned": 1 - surviving(result),
        "factor": factor,
        "validation_accuracy": tuned.validation_score,
    }
    return Outcome(result, notes, {n: _told(form, kept[n]) for n, form in forms.items()})


def _told(form: Thresholded, kept: Tensor) -> dict[str, float]:
    alpha, beta = form.alpha.item(), form.beta.item()
    return {
        "threshold": alpha,
        "deviations": alpha / form.deviation,
        "sharpness": alpha * beta,
        "pruned": 1 - float(kept.float().mean()),
    }


def thresholded_(
    network: nn.Module, share: float, config: ThresholdConfig
) -> dict[str, Thresholded]:
    """Give each layer of a plain network a threshold to learn.

    Args:
        network: The network, changed in place.
        share: Of its weights, in (0, 1), that survive in the end.
        config: Where thresholds start.

    Returns:
        The parametrisations, by the name of the layer.
    """
    weights = {name: layer.weight.detach() for name, layer in layers(network).items()}
    sizes = {name: _deviation(weight) for name, weight in weights.items()}
    even = reached([weight.abs() / sizes[name] for name, weight in weights.items()], share)
    common = nn.Parameter(torch.zeros(()))
    forms = {n: Thresholded(size, config.start * even, common, config) for n, size in sizes.items()}
    for name, layer in layers(network).items():
        parametrize.register_parametrization(layer, "weight", forms[name])
    return forms


def _deviation(weight: Tensor) -> float:
    """Return the standard deviation, about zero, of the weights that have not been pruned."""
    power = weight.square().sum().item() / max(1, int(weight.count_nonzero()))
    return math.sqrt(power) or 1.0


def cost_of_survivors(network: nn.Module, share: float, strictness: float) -> Callable[[], Tensor]:
    """Make the function that tells what the survivors of a network cost right now.

    Args:
        network: One with thresholds.
        share: Of all weights of its layers, that shall survive.
        strictness: Kappa.
    """
    wanted = share * sum(layer.weight.numel() for layer in layers(network).values())

    def cost() -> Tensor:
        counts = [form.survivors(weight) for form, weight in learning(network).values()]
        return strictness / 2 * (torch.stack(counts).sum() / wanted).log().square()

    return cost


def learning(network: nn.Module) -> dict[str, tuple[Thresholded, Tensor]]:
    """List the thresholds of a network with the weights that they are applied to."""
    found: dict[str, tuple[Thresholded, Tensor]] = {}
    for name, layer in layers(network).items():
        form = form_of(layer)
        if isinstance(form, Thresholded):
            found[name] = form, layer.get_parameter(UNROUNDED)
    return found


def cut(network: nn.Module, share: float) -> tuple[nn.Module, Mapping[str, Tensor], float]:
    """Make plain layers of those with thresholds, and zeros of the weights below.

    Args:
        network: One with thresholds, which comes back as it was.
        share: Of all weights of its layers, that survive.

    Returns:
        The plain network, boolean weights that survive by layer (one of each in any case), and the
        factor that all thresholds were multiplied by to leave so many.
    """
    learned = learning(network)
    with torch.no_grad():
        scores = {name: weight.abs() / form.alpha for name, (form, weight) in learned.items()}
    factor = reached(scores.values(), share)
    kept = strongest(scores, factor)
    result = without_quantization(network, rounded=True)
    prune_(result, kept)
    return result, kept, factor
