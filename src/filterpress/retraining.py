"""Train a network that has been made smaller, so that it imitates the one it came from."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from filterpress.checkpoints import Checkpoint
from filterpress.fitting import Goal
from filterpress.processes import best_device, is_main
from filterpress.progress import progress
from filterpress.representations import (
    coarsen_,
    has_codebook,
    indices_of,
    levels_of,
    roundings,
)
from filterpress.statistics import note_offsets_, recalibrate_
from filterpress.surgery import layers
from filterpress.tasks import Task, calibration
from filterpress.training import FitConfig, FitResult, Progress, fit, predictor, steps_per_epoch

COARSER = 1.03  # steps grow by this until the file fits again
ATTEMPTS = 20  # times they grow at most
IMAGES = 1024  # on which batch-norm is then measured again


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig(FitConfig):
    """How to train a network that has been trained before: as `FitConfig`, but more gently."""

    lr: float = 0.02
    warmup: float = 0.1
    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RetrainConfig(FineTuneConfig):
    """How to retrain: as `FineTuneConfig`, until the accuracy is reached.

    Attributes:
        margin: Accuracy above the floor, on the validation set, at which retraining stops early.
    """

    epochs: int = 8
    margin: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.margin < 1:
            raise ValueError(f"margin must be in [0, 1), got {self.margin}")


def retrain_quantized(
    network: nn.Module,
    teacher: nn.Module,
    task: Task,
    config: RetrainConfig,
    *,
    floor: float,
    reached: float,
    max_bytes: int,
    size: Callable[[nn.Module], int],
    seed: int,
    checkpoint: Checkpoint | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train what the codec stores: the integers, through the straight-through estimator.

    Args:
        network: Network with quantised layers.
        teacher: The trained network.
        task: Data and score.
        config: How to train.
        floor: Accuracy on the validation set to reach.
        reached: Accuracy of the network as it comes; a retrain that ends below, or in a file that
            cannot be made to fit, is dropped.
        max_bytes: Largest encoded file; steps grow where training made the file larger.
        size: Size of the encoded file of a network.
        seed: Seed of the order of the images and their augmentation.
        checkpoint: Where to go on from, and where to write how far it is; see `fit`.

    Returns:
        The retrained network, and what to report of it.
    """
    student = copy.deepcopy(network)
    goal = min(1.0, floor + config.margin)
    result = fine_tune_(
        student,
        teacher,
        task,
        config,
        seed=seed,
        stop=lambda score: score >= goal,
        checkpoint=checkpoint,
    )
    score = result.validation_score
    coarser = fit_steps_(student, calibration(task, IMAGES, seed), Goal(max_bytes, size))
    if coarser:
        device = best_device()
        score = task.score(predictor(student.to(device), device), "validation")
        student.cpu()
    improved = score >= reached and size(student) <= max_bytes
    if not improved:
        student = copy.deepcopy(network)
    return student, {
        "epochs": len(result.scores),
        "best_epoch": result.epoch,
        "trained_validation_accuracy": result.validation_score,
        "improved": improved,
        "coarsened": coarser,
    }


def fine_tune_(
    network: nn.Module,
    teacher: nn.Module,
    task: Task,
    config: FitConfig,
    *,
    seed: int,
    description: str = "retrain",
    stop: Callable[[float], bool] | None = None,
    penalty: Callable[[], Tensor] | None = None,
    checkpoint: Checkpoint | None = None,
) -> FitResult:
    """Train a network in place to imitate another one, and keep what made it smaller.

    Quantised weights learn in units of their steps, shared ones at the pace of plain ones, weights
    that have been pruned stay zero, and progress is shown in the main process.

    Args:
        network: The network.
        teacher: The network it came from.
        task: Data and score.
        config: How to train.
        seed: Seed of the order of the images and their augmentation.
        description: What is being done, in a word.
        stop: As for `fit`, like the rest.
        penalty: Scalar to be added to the loss.
        checkpoint: Where to go on from.
    """
    with (
        constant_channels_held(network),
        zeros_held(network),
        levels_paced(network),
        shown(description, task, config) as advance,
    ):
        return fit(
            network,
            task,
            config,
            seed=seed,
            teacher=teacher,
            stop=stop,
            progress=advance,
            paces=paces(network),
            penalty=penalty,
            checkpoint=checkpoint,
        )


def fit_steps_(network: nn.Module, images: Tensor, goal: Goal) -> int:
    """Let the steps of a quantised network grow until its file fits.

    Args:
        network: The network, changed in place.
        images: ``(N, C, H, W)`` calibration images, on which batch-norm is measured again.
        goal: What its file shall meet.

    Returns:
        How often they grew; 0 where the file fitted, and at most `ATTEMPTS`.
    """
    for grown in range(ATTEMPTS):
        if goal.size(network) <= goal.max_bytes:
            return grown
        note_offsets_(network, images)
        for module in network.modules():
            coarsen_(module, torch.tensor(COARSER))
        recalibrate_(network, images)
    return ATTEMPTS


def paces(network: nn.Module) -> dict[str, float]:
    """Return factors of the learning rate with which quantised weights learn like plain ones.

    They learn in units of their steps, and descent by a gradient in units of w moves a weight by
    ``w**2`` times what it would move plainly. The factor makes up for that at the median step, and
    is one for the whole network, because a step costs the same anywhere in it.

    Args:
        network: The network.

    Returns:
        Factors by the name of the parameter.
    """
    steps = {
        f"{name}.{parameter}": form.step
        for name, module in network.named_modules()
        for parameter, form in roundings(module).items()
    }
    if not steps:
        return {}
    typical = torch.cat(list(steps.values())).median()
    return dict.fromkeys(steps, float(typical**-2))


@contextlib.contextmanager
def constant_channels_held(network: nn.Module) -> Iterator[None]:
    """Let batch-norm pass no gradient back to channels that are constant in a batch.

    A filter whose integers are all zero makes such a channel. Its variance is zero, so batch-norm
    divides its gradient by the root of ``eps``: some hundred times more than the other filters get
    reaches the weights underneath, which land many steps away, and the file grows. Where
    batch-norm cannot tell which way a filter should go, the filter stays.

    Args:
        network: The network; without such channels it trains as if this were not here.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    handles = [norm.register_forward_pre_hook(_held) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def zeros_held(network: nn.Module) -> Iterator[None]:
    """Let weights that are exactly zero stay so: they have been pruned.

    Args:
        network: The network; the numbers that weights are made of count as weights.
    """
    handles = []
    for layer in layers(network).values():
        for parameter in layer.parameters():
            pruned = parameter.detach() == 0
            if parameter.ndim > 1 and pruned.any():
                hold = partial(_without, pruned)
                handles.append(parameter.register_hook(hold))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _divided(counts: Tensor, gradient: Tensor) -> Tensor:
    return gradient / counts.to(gradient.device)


def _without(pruned: Tensor, gradient: Tensor) -> Tensor:
    return gradient.masked_fill(pruned.to(gradient.device), 0)


@contextlib.contextmanager
def levels_paced(network: nn.Module) -> Iterator[None]:
    """Let each level of a codebook learn by the mean of its weights' gradients, not by their sum.

    That is the step which the weights would take plainly, projected on those that keep them shared.
    So a learning rate at which plain weights descend lets levels descend, however many weights they
    stand for.

    Args:
        network: The network.
    """
    handles = []
    for layer in layers(network).values():
        if has_codebook(layer):
            counts = indices_of(layer).flatten().bincount(minlength=len(levels_of(layer)))
            mean = partial(_divided, counts.clamp(min=1))
            handles.append(levels_of(layer).register_hook(mean))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def shown(description: str, task: Task, config: FitConfig) -> Iterator[Progress | None]:
    """Show the steps of a training in the main process."""
    if not is_main():
        yield None
        return
    steps = config.epochs * steps_per_epoch(task, config)
    done = 0

    def show(epoch: int, step: int, n_steps: int, _: float) -> None:
        nonlocal done
        before, done = done, epoch * n_steps + step
        advance(done - before)  # more than one where a training goes on

    with progress(description, steps) as advance:
        yield show


def _held(norm: nn.Module, inputs: tuple[Tensor]) -> Tensor | None:
    x = inputs[0]
    if not norm.training:
        return None
    rest = [dim for dim in range(x.ndim) if dim != 1]
    constant = x.detach().amax(rest, keepdim=True) == x.detach().amin(rest, keepdim=True)
    return torch.where(constant, x.detach(), x) if constant.any() else None
