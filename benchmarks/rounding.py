"""Reduce a network with each of a few decisions undone, without retraining it, and compare.

    python benchmarks/rounding.py RUN --ratios 20 30 --data fashion-mnist --data-dir DIR

RUN is the folder of a run of ``filterpress compress``; its pruned network is clustered and reduced
to each ratio, and its trained one is what it is compared with, on the validation set: accuracy, and
divergence of the outputs. Ways are ``as it is``; ``filters apart``, whose errors do not add up in
the damage; ``one way`` through each row of weights; ``whole damage`` of rounding to the nearest in
the allocator's estimates (docs/adr/0017 for the three); and ``no cluster``, without that stage.
Results are printed as JSON and added to ``benchmarks/results/rounding.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from filterpress import allocation, package, rounding, statistics
from filterpress.allocation import LEFT, SLOPE
from filterpress.methods import merge_filters, project_channels
from filterpress.statistics import Moments
from filterpress.tasks import Task, calibration, load_task
from filterpress.training import predictor

RESULTS = Path(__file__).parent / "results" / "rounding.json"
WAYS = ("as it is", "filters apart", "one way", "whole damage", "no cluster")


@contextmanager
def undone(way: str) -> Iterator[None]:
    """Undo a decision."""
    with ExitStack() as stack:

        def put(owner: Any, name: str, value: object) -> None:
            stack.enter_context(patch.object(owner, name, value))

        if way == "filters apart":
            put(statistics, "measure", apart(statistics.measure))
        if way == "one way":
            put(rounding, "SURVIVORS", 1)
        if way == "whole damage":
            put(allocation, "LEFT", 1.0)
            for module in (allocation, rounding, merge_filters):
                put(module, "SLOPE", SLOPE / LEFT)
            put(rounding, "BITS_COUNT", rounding.BITS_COUNT * LEFT)
        yield


def apart(measure: Callable[..., dict[str, Moments]]) -> Callable[..., dict[str, Moments]]:
    """Return a function that measures, and leaves nothing off the diagonal of the outputs'."""

    def measured(model: nn.Module, images: Tensor, *, seed: int = 0) -> dict[str, Moments]:
        found = measure(model, images, seed=seed)
        return {
            name: m._replace(outputs=torch.diag_embed(m.outputs.diagonal(dim1=1, dim2=2)))
            for name, m in found.items()
        }

    return measured


def log_probabilities(network: nn.Module, task: Task) -> Tensor:
    """Return those ``(N, K)`` of the validation set."""
    predict = predictor(network)
    return torch.cat([predict(x).log_softmax(1) for x, _ in task.batches("validation", 500)])


def main() -> None:
    """Reduce in each way and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run of filterpress compress")
    parser.add_argument("--ratios", type=float, nargs="+", default=[20.0])
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--data-dir", default="")
    given = parser.parse_args()
    task = load_task(given.data, given.data_dir, 0, "")
    trained, source = (package.load(given.run / stage) for stage in ("train", "prune"))
    images = calibration(task, 1024, 0)
    wanted = log_probabilities(trained.network, task)
    labels = torch.cat([y for _, y in task.batches("validation", 500)])
    rows = []
    for ratio in given.ratios:
        max_bytes = int(trained.baseline["n_bytes"] / ratio)
        for way in WAYS:
            with undone(way):
                network = source.network
                if way != "no cluster":
                    config = merge_filters.MergeConfig()
                    network = merge_filters.merge_filters(
                        network, images, config, max_bytes=max_bytes
                    ).model
                made = project_channels.project_channels(
                    network,
                    images,
                    project_channels.ProjectionConfig(headroom=0.0),
                    max_bytes=max_bytes,
                    size=lambda n: len(package.encode(source, n)),
                ).model
            outputs = log_probabilities(made, task)
            divergence = F.kl_div(outputs, wanted, log_target=True, reduction="batchmean")
            row = {"run": given.run.name, "ratio": ratio, "way": way}
            row["bytes"] = len(package.encode(source, made))
            row["divergence"] = round(float(divergence), 5)
            row["validation_accuracy"] = float((outputs.argmax(1) == labels).float().mean())
            print(json.dumps(row), flush=True)
            rows.append(row)
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    others = [row for row in before if row["run"] != given.run.name]
    RESULTS.write_text(json.dumps(others + rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
