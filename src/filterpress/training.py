"""Train a network: plain or with a teacher, in one process or in many.

Each step lowers

    (1 - alpha) * L(outputs, targets) + alpha * T**2 * KL(teacher || student)

where L is the loss of the task and the softmaxes of KL are taken of outputs / T. T**2 keeps the
gradient of the second term from shrinking with T.

Reference: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015,
section 2.

Under ``torchrun`` each process takes its rows of each batch, so the batch size and the result mean
the same with any number of processes, except that batch normalisation sees the smaller part. What
is decided by a loss, a score or a file is decided once, for all of them.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from filterpress import processes
from filterpress.checkpoints import Checkpoint, Course
from filterpress.errors import DataError, ModelError
from filterpress.tasks import Predict, Task

log = logging.getLogger(__name__)
Precision = Literal["auto", "float32", "bfloat16"]
Progress = Callable[[int, int, int, float], None]


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How to train.

    Attributes:
        epochs: Passes over the training set, or parts of one.
        epoch_steps: Steps after which an epoch ends, each on images of its own draw; 0 for a whole
            pass, which an epoch never exceeds.
        lr: Highest learning rate. It rises linearly, then falls to zero along a cosine.
        warmup: Share of the steps in which it rises, in [0, 1).
        batch_size: Images in a step, of all processes together; at least two for each of them.
        optimizer: ``sgd``, with Nesterov momentum, or ``adamw``.
        momentum: Momentum of ``sgd``, in [0, 1).
        weight_decay: Weight decay of parameters with two or more dimensions; biases, scales and
            other vectors have none.
        label_smoothing: Share of the uniform distribution in the targets, in [0, 1).
        alpha: Share of the teacher in the loss, in [0, 1].
        temperature: T above.
        precision: Of convolutions and matrix products; ``auto`` is what is fast here.
    """

    epochs: int = 20
    epoch_steps: int = 0
    lr: float = 0.1
    warmup: float = 0.2
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    alpha: float = 0.9
    temperature: float = 4.0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("epoch_steps", 0), ("batch_size", 2)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("lr", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup", "momentum", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if self.optimizer not in ("sgd", "adamw"):
            raise ValueError(f"optimizer must be sgd or adamw, got {self.optimizer!r}")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision must be auto, float32 or bfloat16, got {self.precision!r}")


class FitResult(NamedTuple):
    """What a training did.

    Attributes:
        validation_score: Score of the state that was kept; of equal ones, the earliest is.
        epoch: Epoch of that state, from 1.
        scores: Validation score after each epoch.
    """

    validation_score: float
    epoch: int
    scores: tuple[float, ...]


def fit(
    model: nn.Module,
    task: Task,
    config: FitConfig,
    *,
    seed: int,
    teacher: nn.Module | None = None,
    stop: Callable[[float], bool] | None = None,
    progress: Progress | None = None,
    paces: Mapping[str, float] | None = None,
    penalty: Callable[[], Tensor] | None = None,
    checkpoint: Checkpoint | None = None,
) -> FitResult:
    """Train a network in place and leave it in its best state on the validation set.

    The same seed gives the same bytes on a CPU with the same number of threads.

    Args:
        model: The network; it comes back in evaluation mode, on the device where it was. Layers
            may be parametrised.
        task: Data, loss and score.
        config: How to train.
        seed: Decides the order of the images, the augmentation and dropout.
        teacher: A trained network to imitate; its mode is set to evaluation.
        stop: Called with the validation score after each epoch; True ends the training.
        progress: Called after each step with the epoch from 0, the step from 1, the number of
            steps in an epoch, and the loss of the whole batch.
        paces: Factors of the learning rate, by the name of the parameter; 1 for all others.
        penalty: Scalar to be added to the loss of each batch, such as the size of the network.
            Scores do not tell of it, so the last state is kept and not the best.
        checkpoint: Where to go on from, if it is there, and where to write how far it is.

    Returns:
        The scores, and which epoch was kept.

    Raises:
        ModelError: Nothing in the network can be trained, or the loss or the score became NaN or
            infinite.
        DataError: There are fewer than two training images for each process.
        ValueError: There are fewer than two images of a batch for each process.
        ScratchError: The checkpoint cannot be read or written.
        WorkerError: Another process is gone.
    """
    device = processes.best_device()
    processes.join()
    _check(model, task, config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(processes.others_watched())
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        torch.manual_seed(seed + processes.rank())
        for network in (model, teacher):
            if network is not None:
                stack.enter_context(_lent_to(device, network))
        replica = processes.replica_of(model)
        bfloat16 = in_bfloat16(config.precision, model, device)
        imitated = predictor(teacher, device, config.precision) if teacher is not None else None

        def loss_of(images: Tensor, targets: Tensor) -> Tensor:
            outputs = forward(replica, images, bfloat16)
            # A clone, because a tensor of inference mode cannot be kept for the backward pass.
            soft = imitated(images).to(device).clone() if imitated else None
            loss = _loss(task, config, outputs, targets, soft)
            return loss + penalty() if penalty else loss

        n_steps = steps_per_epoch(task, config)
        generator = torch.Generator().manual_seed(seed)
        course = Course(model, _optimizer(model, config, paces or {}), generator)
        if checkpoint:
            checkpoint.restore(course)
        rates = _rates(config, n_steps, from_epoch=len(course.scores))
        predict = predictor(model, device, config.precision)
        while not _ended(course.scores, config, stop):
            epoch = len(course.scores)
            model.train()
            batches = _shards(task, config.batch_size, course.generator, device)
            steps = _descend(course.optimizer, rates, loss_of, islice(batches, n_steps))
            for step, loss in enumerate(steps, start=1):
                if progress:
                    progress(epoch, step, n_steps, loss)
            score = _validation_score(model, task, predict)
            if processes.is_main():
                log.info("epoch %d of %d: validation %.4f", epoch + 1, config.epochs, score)
            if penalty or score > max(course.scores, default=-math.inf):
                course.best = copy.deepcopy(model.state_dict())
            course.scores.append(score)
            if checkpoint:
                checkpoint.save(course, config.epochs)
        model.load_state_dict(course.best)
        model.eval()
    scores = tuple(course.scores)
    kept = len(scores) if penalty else scores.index(max(scores)) + 1
    return FitResult(scores[kept - 1], kept, scores)


def predictor(
    model: nn.Module, device: str | torch.device = "cpu", precision: Precision = "float32"
) -> Predict:
    """Make the function that `Task.score` asks for.

    Args:
        model: A network on the device; each call sets it to evaluation mode.
        device: Where it runs.
        precision: Of convolutions and matrix products.

    Returns:
        A function from images of shape (N, C, H, W) on any device to float32 outputs on the CPU.
    """
    device = torch.device(device)
    bfloat16 = in_bfloat16(precision, model, device)

    def predict(images: Tensor) -> Tensor:
        model.eval()
        with torch.inference_mode():
            return forward(model, images.to(device), bfloat16).cpu()

    return predict


def learning_rate(config: FitConfig, share: float) -> float:
    """Return the learning rate after a share of all steps.

    Example:
        >>> config = FitConfig(lr=1.0, warmup=0.5)
        >>> [round(learning_rate(config, share), 3) for share in (0.25, 0.5, 0.75, 1.0)]
        [0.5, 1.0, 0.5, 0.0]
    """
    if share < config.warmup:
        return config.lr * share / config.warmup
    fallen = (min(share, 1.0) - config.warmup) / (1 - config.warmup)
    return config.lr * (1 + math.cos(math.pi * fallen)) / 2


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T**2 * KL(softmax(teacher / T) || softmax(student / T)), the mean over the batch.

    Args:
        student: Outputs of shape (N, classes).
        teacher: Likewise.
        temperature: T, positive.
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return temperature**2 * divergence


def forward(model: nn.Module, images: Tensor, bfloat16: bool) -> Tensor:
    """Run a network on a batch of images; the outputs are float32."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
        return model(_channels_last(images)).float()  # type: ignore[no-any-return]


def _loss(
    task: Task, config: FitConfig, outputs: Tensor, targets: Tensor, soft: Tensor | None
) -> Tensor:
    loss = task.loss(outputs, targets)
    if config.label_smoothing:
        uniform = -F.log_softmax(outputs, dim=1).mean()
        loss = (1 - config.label_smoothing) * loss + config.label_smoothing * uniform
    if soft is None:
        return loss
    imitation = distillation_loss(outputs, soft, config.temperature)
    return (1 - config.alpha) * loss + config.alpha * imitation


def _check(model: nn.Module, task: Task, config: FitConfig) -> None:
    """Refuse what cannot be trained by all the processes there are."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError("the network has no parameter that can be trained")
    least = 2 * processes.world()
    if (n := task.size("train")) < least:
        raise DataError(f"training needs at least {least} images, got {n}")
    if config.batch_size < least:
        raise ValueError(
            f"batch_size must be at least {least}, two for each of {processes.world()} processes, "
            f"got {config.batch_size}"
        )


def _rates(config: FitConfig, n_steps: int, from_epoch: int) -> Iterator[float]:
    n_all = config.epochs * n_steps
    return (learning_rate(config, (k + 0.5) / n_all) for k in count(from_epoch * n_steps))


def _ended(scores: list[float], config: FitConfig, stop: Callable[[float], bool] | None) -> bool:
    if not scores:
        return False
    return bool(stop and stop(scores[-1])) or len(scores) == config.epochs


def _descend(
    optimizer: torch.optim.Optimizer,
    rates: Iterator[float],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    batches: Iterator[tuple[Tensor, Tensor]],
) -> Iterator[float]:
    """Take one step a batch and yield its loss."""
    for images, targets in batches:
        loss = loss_of(images, targets)
        value = processes.mean_of_all(loss)
        if not math.isfinite(value):
            raise ModelError(f"the loss became {value} while training; lower lr")
        rate = next(rates)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["pace"]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield value


def _optimizer(
    model: nn.Module, config: FitConfig, paces: Mapping[str, float]
) -> torch.optim.Optimizer:
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((decay, paces.get(name, 1.0)), []).append(parameter)
    settings = [
        {"params": members, "weight_decay": decay, "pace": pace}
        for (decay, pace), members in groups.items()
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(settings, lr=config.lr)
    nesterov = config.momentum > 0
    return torch.optim.SGD(settings, lr=config.lr, momentum=config.momentum, nesterov=nesterov)


def steps_per_epoch(task: Task, config: FitConfig) -> int:
    """Count the steps of one epoch; a last batch too small to train on is none."""
    full, rest = divmod(task.size("train"), config.batch_size)
    whole = full + (rest >= 2 * processes.world())
    return min(whole, config.epoch_steps or whole)


def _shards(
    task: Task, batch_size: int, generator: torch.Generator, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's rows of each batch.

    All processes draw the same batches and take every n-th image, equally many each. A last batch
    that leaves a process with one image is skipped: batch normalisation needs two.
    """
    n, first = processes.world(), processes.rank()
    for images, targets in task.batches("train", batch_size, generator=generator, device=device):
        each = len(images) // n
        if each >= 2:
            mine = slice(first, each * n, n)
            yield images[mine], targets[mine]


def _validation_score(model: nn.Module, task: Task, predict: Predict) -> float:
    """Score the network of rank 0, after giving its running statistics to the other processes."""
    if processes.world() > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.broadcast(buffer, 0)
    score = processes.from_main(lambda: task.score(predict, "validation"))
    if not math.isfinite(score):
        raise ModelError(f"the validation score became {score} while training; lower lr")
    return score


@contextlib.contextmanager
def _lent_to(device: torch.device, model: nn.Module) -> Iterator[None]:
    home = next((tensor.device for tensor in model.parameters()), device)
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


def _channels_last(images: Tensor) -> Tensor:
    """Copy a batch to the layout that is faster; the activations then take it too.

    On two cores of a Zen 4 CPU, batches of 128 at 28 pixels, a training step takes, against
    the standard layout: ResNet-20 0.79 (float32) and 0.93 (bfloat16) of the time, ResNet-18 0.99
    and 0.90. Converting the weights as well gains no more, and changes them for whoever holds them.
    """
    return torch.empty_like(images, memory_format=torch.channels_last).copy_(images)


def in_bfloat16(precision: Precision, model: nn.Module, device: torch.device) -> bool:
    """Choose the faster precision, if the choice is ours; say whether it is bfloat16.

    Measured as above, bfloat16 takes 0.61 of the time of float32 for ResNet-20 and 0.76 for
    ResNet-18, but 1.9 for MobileNetV2, because of its depthwise convolutions. A CPU without the
    instructions has to emulate them.
    """
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(native) and not any(
        isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels for m in model.modules()
    )
