"""Prune a trained network by thresholds, with each of a few decisions made otherwise, and compare.

    python benchmarks/sparsity.py RUN [RUN ...] --ratio 24 --data fashion-mnist --data-dir DIR

RUN is the folder of a run of ``filterpress compress``; its trained network is pruned for a file of
that ratio. Ways of ``threshold`` (docs/adr/0026) are ``as it is``; ``even``, thresholds that stay
in proportion to deviations; ``other function``, w sigma(beta (w^2 - alpha^2) / 2 alpha); ``fixed``
and ``annealed``, sharpness that is not learned; ``priced by macs``, survivors that count as often
as they are used; ``weights kept``, survivors with the weights underneath.
Ways of ``macs`` are ``as it is``; ``by weight``, allowances by multiply-accumulates of a weight;
``alike``, the same for all layers; ``outputs``, with errors of the outputs; ``from the deviation``,
thresholds that come down from there in steps. Divergence from the trained network and accuracy are
of the validation set. Results are printed as JSON and added to
``benchmarks/results/sparsity.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from comparison import Other, Row, Validation, arguments, compare, goal_of, otherwise
from torch import Tensor, nn

from filterpress import package, statistics
from filterpress.methods import learn_thresholds, prune_by_macs
from filterpress.methods.learn_thresholds import ThresholdConfig, Thresholded
from filterpress.methods.prune_by_macs import Ladder, MacsConfig
from filterpress.surgery import layers
from filterpress.tasks import Task, calibration
from filterpress.training import steps_per_epoch

RESULTS = Path(__file__).parent / "results" / "sparsity.json"
WAYS = {
    "threshold": (
        "as it is",
        "even",
        "other function",
        "fixed",
        "annealed",
        "priced by macs",
        "weights kept",
    ),
    "macs": ("as it is", "by weight", "alike", "outputs", "from the deviation"),
}
FIRST_SHARPNESS = 5.0  # of annealing
STEP = 0.9  # of thresholds that come down from the deviation


def other_function(weight: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Return a function of the same slope at the threshold, that has no kinks."""
    return weight * torch.sigmoid(beta * (weight.square() - alpha.square()) / (2 * alpha))


def only_together(*args: Any) -> dict[str, Thresholded]:
    """Let all thresholds learn one factor."""
    forms = _THRESHOLDED(*args)
    for form in forms.values():
        form.own.requires_grad_(False)
    return forms


def priced(uses: Mapping[str, float]) -> Callable[..., Callable[[], Tensor]]:
    """Count survivors as often as they are used."""

    def cost_of(network: nn.Module, share: float, strictness: float) -> Callable[[], Tensor]:
        sizes = {name: layer.weight.numel() for name, layer in layers(network).items()}
        wanted = share * sum(uses[name] * n for name, n in sizes.items())

        def cost() -> Tensor:
            found = learn_thresholds.learning(network).items()
            counts = [uses[name] * form.survivors(weight) for name, (form, weight) in found]
            return strictness / 2 * (torch.stack(counts).sum() / wanted).log().square()

        return cost

    return cost_of


def annealed(n_steps: int) -> tuple[property, Callable[..., Callable[[], Tensor]]]:
    """Let sharpness rise with each step; the function that is called in each counts them."""
    passed = 0

    def cost_of(*args: Any) -> Callable[[], Tensor]:
        nonlocal passed
        cost, passed = _COST(*args), 0

        def counted() -> Tensor:
            nonlocal passed
            passed += 1
            return cost()

        return counted

    def beta(form: Thresholded) -> Tensor:
        left = max(0.0, 1 - passed / n_steps)
        return form.sharpness * (FIRST_SHARPNESS / form.sharpness) ** left / form.alpha

    return property(beta), cost_of


def with_weights(network: nn.Module, share: float) -> tuple[nn.Module, Mapping[str, Tensor], float]:
    """Cut, and give survivors the weights underneath."""
    result, kept, factor = _CUT(network, share)
    with torch.no_grad():
        for name, (_, weight) in learn_thresholds.learning(network).items():
            layers(result)[name].weight.copy_(weight * kept[name])
    return result, kept, factor


def of_outputs(source: package.Package, task: Task) -> Callable[[Tensor], Ladder]:
    """Sort weights by magnitude, with the errors that their loss makes in the outputs."""
    network = statistics.plain_for(source.network, calibration(task, 1024))
    moments = statistics.measure(network, calibration(task, 1024))
    used = package.macs_by_layer(network, task.input_shape)
    costs = [moments[name].importance.flatten() for name in used]

    def ladder(weight: Tensor) -> Ladder:  # called layer by layer, in this order
        magnitudes, order = weight.flatten().abs().sort()
        cost = costs.pop(0)[order].double() * magnitudes.double().square()
        return Ladder(magnitudes, cost.cumsum(0) / cost.sum())

    return ladder


def from_the_deviation(rungs: Ladder, allowance: float) -> float:
    """Lower a threshold from the deviation of the weights until what goes is allowed."""
    threshold = float(rungs.magnitudes.square().mean().sqrt())
    while (count := int((rungs.magnitudes <= threshold).sum())) and (
        rungs.errors[count - 1] > allowance
    ):
        threshold *= STEP
    return threshold if count else 0.0


_THRESHOLDED, _COST, _CUT = (
    learn_thresholds.thresholded_,
    learn_thresholds.cost_of_survivors,
    learn_thresholds.cut,
)
_ALLOWANCES = prune_by_macs.allowances


def uses_of(source: package.Package) -> dict[str, float]:
    """Count how often a weight of each layer is used for an image."""
    macs = package.macs_by_layer(source.network, source.input_shape)
    return {name: n / layers(source.network)[name].weight.numel() for name, n in macs.items()}


def others_of(way: str, source: package.Package, task: Task, n_steps: int) -> Iterator[Other]:
    """Say what a way makes otherwise; thresholds learn for so many steps."""
    uses = uses_of(source)
    match way:
        case "even":
            yield learn_thresholds, "thresholded_", only_together
        case "other function":
            yield learn_thresholds, "soft_threshold", other_function
        case "fixed":
            yield Thresholded, "beta", property(lambda form: form.sharpness / form.alpha)
        case "annealed":
            beta, cost_of = annealed(n_steps)
            yield Thresholded, "beta", beta
            yield learn_thresholds, "cost_of_survivors", cost_of
        case "priced by macs":
            yield learn_thresholds, "cost_of_survivors", priced(uses)
        case "weights kept":
            yield learn_thresholds, "cut", with_weights
        case "by weight":
            yield prune_by_macs, "allowances", lambda _, epsilon: _ALLOWANCES(uses, epsilon)
        case "alike":
            same = dict.fromkeys(uses, 1.0)
            yield prune_by_macs, "allowances", lambda _, epsilon: _ALLOWANCES(same, epsilon)
        case "outputs":
            yield prune_by_macs, "ladder", of_outputs(source, task)
        case "from the deviation":
            yield Ladder, "threshold", from_the_deviation


def rows_of(run: Path, task: Task, given: argparse.Namespace) -> Iterator[Row]:
    """Prune in each way, with each seed."""
    source = package.load(run / "train")
    validation = Validation(source.network, task)
    uses = uses_of(source)
    goal = goal_of(source, given.ratio)
    steps = {"epoch_steps": given.epoch_steps}
    config = ThresholdConfig(learning_epochs=given.learning_epochs, epochs=given.epochs, **steps)
    alike = MacsConfig(epochs=given.learning_epochs + given.epochs, **steps)  # as many in all
    n_steps = given.learning_epochs * steps_per_epoch(task, config)
    for name in given.ways or [f"{method}/{way}" for method in WAYS for way in WAYS[method]]:
        method, _, way = name.partition("/")
        for seed in range(given.seeds):
            with otherwise(others_of(way, source, task, n_steps)):
                if method == "threshold":
                    made = learn_thresholds.learn_thresholds(
                        source.network, task, config, goal=goal, seed=seed
                    )
                else:
                    made = prune_by_macs.prune_by_macs(
                        source.network, task, alike, goal=goal, seed=seed
                    )
            measured = validation.measure(made.model)
            left = {n: int(m.weight.count_nonzero()) for n, m in layers(made.model).items()}
            yield {
                "method": method,
                "way": way,
                "ratio": given.ratio,
                "seed": seed,
                "pruned": round(float(made.notes["pruned"]), 4),
                "macs": round(sum(uses[name] * n for name, n in left.items())),
                "divergence": round(measured.divergence, 5),
                "validation_accuracy": measured.accuracy,
            }


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--ratio", type=float, default=24.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--learning-epochs", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--ways", nargs="*", metavar="METHOD/WAY", default=[])
    parser.add_argument("--epoch-steps", type=int, default=0, help="0 for a whole pass")
    compare(parser, RESULTS, rows_of)
