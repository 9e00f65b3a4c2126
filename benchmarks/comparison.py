"""What benchmarks of trained networks share: arguments, the validation set, results by run."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filterpress import package, settings
from filterpress.fitting import Goal
from filterpress.methods import Outcome
from filterpress.settings import Table
from filterpress.tasks import Task, calibration, load_task
from filterpress.training import predictor

Row = dict[str, Any]
Other = tuple[object, str, object]  # what has a name, the name, and what else it is to stand for
RowsOf = Callable[[Path, Task, argparse.Namespace], Iterator[Row]]


class Measured(NamedTuple):
    """What a network makes of each image ``(N,)`` of the validation set."""

    right: Tensor
    divergences: Tensor  # KL of its outputs from the trained network's, in nats

    @property
    def accuracy(self) -> float:
        """Share of the images that it gets right."""
        return float(self.right.double().mean())

    @property
    def divergence(self) -> float:
        """Mean divergence."""
        return float(self.divergences.double().mean())


class Validation:
    """The validation set of a task, with what a trained network makes of it to compare with."""

    def __init__(self, trained: nn.Module, task: Task) -> None:
        self.task = task
        self.labels = torch.cat([labels for _, labels in task.batches("validation", 500)])
        self.wanted = self._log_probabilities(trained)  # (N, K)

    def measure(self, network: nn.Module) -> Measured:
        """Run a network on the set."""
        found = self._log_probabilities(network)
        divergences = F.kl_div(found, self.wanted, log_target=True, reduction="none").sum(dim=1)
        return Measured(found.argmax(dim=1) == self.labels, divergences)

    def _log_probabilities(self, network: nn.Module) -> Tensor:
        predict = predictor(network)
        batches = self.task.batches("validation", 500)
        return torch.cat([predict(images).log_softmax(1) for images, _ in batches])


def arguments(doc: str) -> argparse.ArgumentParser:
    """Make the parser of a script, with the first line of its docstring, that asks for data."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--data-dir", default="")
    return parser


def task_of(given: argparse.Namespace) -> Task:
    """Load the data that was asked for."""
    return load_task(given.data, given.data_dir, 0, "")


def goal_of(source: package.Package, ratio: float) -> Goal:
    """Ask for a file of a trained network that is so many times smaller than its weights."""
    return Goal(
        int(source.baseline["n_bytes"] / ratio),
        lambda network: len(package.encode(source, network)),
    )


@contextmanager
def otherwise(others: Iterable[Other]) -> Iterator[None]:
    """Make decisions of the library otherwise for a while."""
    with ExitStack() as stack:
        for owner, name, value in others:
            stack.enter_context(patch.object(owner, name, value))
        yield


def made_by(
    table: Table, text: str, source: package.Package, task: Task, ratio: float
) -> tuple[Outcome, float]:
    """Make a trained network so many times smaller by a method, and count the processor's seconds.

    Args:
        table: Methods by name.
        text: Config that names one of them, which does not train.
        source: The trained network.
        task: Where calibration images come from.
        ratio: Of the bytes of its weights to those of the file.
    """
    _, method, config = settings.choose(table, text)
    images = calibration(task, config.images, 0)
    started = time.process_time()
    made = method(source.network, images, config, goal=goal_of(source, ratio), seed=0)
    return made, round(time.process_time() - started, 1)


def compare(parser: argparse.ArgumentParser, results: Path, rows_of: RowsOf) -> list[list[Row]]:
    """Make the rows of each run that is named, and put them into a file in place of those it had.

    Args:
        parser: Parser of the script.
        results: File of rows, each with the name of its ``run``.
        rows_of: Makes the rows from the folder of a run, the task and the arguments; each is
            printed as it comes.

    Returns:
        The rows, by run.
    """
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folder of a run of filterpress compress"
    )
    given = parser.parse_args()
    task = task_of(given)
    found = []
    for run in given.runs:
        rows = []
        for row in rows_of(run, task, given):
            rows.append({"run": run.name, **row})
            print(json.dumps(rows[-1]), flush=True)
        before = json.loads(results.read_text()) if results.exists() else []
        others = [row for row in before if row["run"] != run.name]
        results.write_text(json.dumps(others + rows, indent=1) + "\n")
        found.append(rows)
    return found
