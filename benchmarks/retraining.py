"""Retrain a network for one epoch with each of two decisions undone, and compare.

    python benchmarks/retraining.py RUN [RUN ...] --data fashion-mnist --data-dir DIR

RUN is the folder of a run of ``filterpress compress``; its first reduced network is retrained, with
its trained one as the teacher. ``plain rates`` lets each layer learn at the plain learning rate
instead of one pace for the network (docs/adr/0013), ``no dead zone`` rounds to the nearest integer
(docs/adr/0012). Divergence from the teacher is measured on the validation set. Results are printed
as JSON and added to ``benchmarks/results/retraining.json``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

from comparison import Row, Validation, arguments, compare
from torch import nn

from filterpress import package
from filterpress.representations import UNROUNDED, is_quantized, step_of
from filterpress.retraining import RetrainConfig, constant_channels_held, paces
from filterpress.tasks import Task
from filterpress.training import fit

RESULTS = Path(__file__).parent / "results" / "retraining.json"


def plain_rates(network: nn.Module) -> dict[str, float]:
    """Return paces at which each layer learns as if it did not learn in steps."""
    quantized = {name: m for name, m in network.named_modules() if is_quantized(m)}
    return {f"{n}.{UNROUNDED}": float(step_of(m).median() ** -2) for n, m in quantized.items()}


def without_dead_zone_(network: nn.Module) -> None:
    """Let weights round to the nearest integer."""
    for module in network.modules():
        if is_quantized(module):
            module.get_buffer("parametrizations.weight.0.dead_zone").zero_()


def rows_of(run: Path, task: Task, given: argparse.Namespace) -> Iterator[Row]:
    """Retrain in each way."""
    source = package.load(run / "round-1" / "reduce-1")
    teacher = package.load(run / "train").network
    validation = Validation(teacher, task)
    before = {
        "bytes_before": len(package.encode(source, source.network)),
        "divergence_before": round(validation.measure(source.network).divergence, 5),
    }
    for way in ("as it is", "plain rates", "no dead zone"):
        student = copy.deepcopy(source.network)
        if way == "no dead zone":
            without_dead_zone_(student)
        pace = plain_rates(student) if way == "plain rates" else paces(student)
        with constant_channels_held(student):
            config = RetrainConfig(epochs=given.epochs)
            fit(student, task, config, seed=1, teacher=teacher, paces=pace)
        measured = validation.measure(student)
        yield {
            "way": way,
            "epochs": given.epochs,
            **before,
            "bytes": len(package.encode(source, student)),
            "divergence": round(measured.divergence, 5),
            "validation_accuracy": measured.accuracy,
        }


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--epochs", type=int, default=1)
    compare(parser, RESULTS, rows_of)
