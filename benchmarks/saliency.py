"""Prune a trained network by each of several measures of saliency, and compare.

    python benchmarks/saliency.py RUN --data fashion-mnist --data-dir DIR --epochs 0 1

RUN is the folder of a run of ``filterpress compress``; its trained network is pruned at once to
each rate, with one threshold for all weights. Gradients are added up over batches with their signs
(``sum``) or without (``absolute``), and left as they are, or divided by their root mean square or
their norm over the layer (``rms``, ``norm``); ``magnitude`` is the size of the weight alone. Then
batch-norm is measured again, or the network is retrained for some epochs. The first ``--images``
training images stand for all. Accuracy, and divergence from the trained network, are those on the
validation set. Results are printed as JSON and added to ``benchmarks/results/saliency.json``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from comparison import Row, Validation, arguments, compare
from torch import Tensor, nn

from filterpress import package, statistics
from filterpress.data import Arrays
from filterpress.retraining import fine_tune_
from filterpress.saliency import PruningConfig, kept_of
from filterpress.sparsity import prune_
from filterpress.surgery import layers
from filterpress.tasks import ImageClassification, Task, calibration

RESULTS = Path(__file__).parent / "results" / "saliency.json"


class Sums(NamedTuple):
    """What a pass over the data adds up of one layer's gradients."""

    sum: Tensor
    absolute: Tensor


NORMALISED: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda gradient: gradient.abs(),
    "rms": lambda gradient: gradient.abs() / gradient.square().mean().sqrt(),
    "norm": lambda gradient: gradient.abs() / gradient.norm(),
}
WAYS = ("magnitude", *(f"{g} {n}" for g, n in product(Sums._fields, NORMALISED)))


def gather(network: nn.Module, task: Task) -> dict[str, Sums]:
    """Pass once over the training images."""
    weights = {name: layer.weight for name, layer in layers(network).items()}
    sums = {n: Sums(*(torch.zeros_like(w) for _ in Sums._fields)) for n, w in weights.items()}
    for images, targets in task.batches("train", PruningConfig.batch_size):
        loss = task.loss(network(images), targets)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for found, gradient in zip(sums.values(), gradients, strict=True):
            found.sum.add_(gradient)
            found.absolute.add_(gradient.abs())
    return sums


def scores(way: str, sums: dict[str, Sums], network: nn.Module) -> dict[str, Tensor]:
    """Return the saliency of all weights by layer."""
    sizes = {name: layer.weight.detach().abs() for name, layer in layers(network).items()}
    if way == "magnitude":
        return sizes
    gradient, normalised = way.split()
    made = NORMALISED[normalised]
    return {name: made(getattr(sums[name], gradient)) * size for name, size in sizes.items()}


def first_images(task: Task, n: int) -> Task:
    """Return a task with fewer training images."""
    if not isinstance(task, ImageClassification):
        raise TypeError(f"task must be image classification, got {type(task).__name__}")
    train = Arrays(*(part[:n] for part in task.data.train))
    return replace(task, data=task.data._replace(train=train))


def rows_of(run: Path, task: Task, given: argparse.Namespace) -> Iterator[Row]:
    """Prune in each way, to each rate."""
    teacher = package.load(run / "train").network
    validation, few = Validation(teacher, task), first_images(task, given.images)
    images = calibration(task, 1024)
    network = statistics.plain_for(teacher, images)
    sums = gather(network, few)
    for epochs, rate, way in product(given.epochs, given.rates, given.ways):
        pruned, score = copy.deepcopy(network), scores(way, sums, network)
        kept = kept_of(list(score.values()), rate)
        prune_(pruned, dict(zip(score, kept, strict=True)))
        if epochs:
            fine_tune_(pruned, teacher, few, PruningConfig(epochs=epochs), seed=0)
        else:
            statistics.recalibrate_(pruned, images)
        measured = validation.measure(pruned)
        yield {
            "images": given.images,
            "epochs": epochs,
            "rate": rate,
            "way": way,
            "divergence": round(measured.divergence, 4),
            "validation_accuracy": measured.accuracy,
        }


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--epochs", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, default=10000)
    compare(parser, RESULTS, rows_of)
