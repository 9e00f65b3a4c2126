"""Reduce a network with each of a few decisions undone, without retraining it, and compare.

    python benchmarks/rounding.py RUN [RUN ...] --ratios 20 30 --data fashion-mnist --data-dir DIR

RUN is the folder of a run of ``filterpress compress``; its pruned network is clustered and reduced
to each ratio, and its trained one is what it is compared with, on the validation set: accuracy, and
divergence of the outputs. Ways are ``as it is``; ``filters apart``, whose errors do not add up in
the damage; ``whole damage`` of rounding to the nearest in the allocator's estimates (docs/adr/0017
for both); ``no cluster``, without that stage; and ``all levels``, with fixed widths and codebooks
on offer for each layer (docs/adr/0015). Results are printed as JSON and added to
``benchmarks/results/rounding.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
from comparison import Other, Row, Validation, arguments, compare, otherwise
from torch import Tensor, nn

from filterpress import allocation, package, rounding, statistics
from filterpress.allocation import LEFT, SLOPE
from filterpress.fitting import Goal
from filterpress.methods import merge_filters, project_channels
from filterpress.statistics import Moments
from filterpress.tasks import Task, calibration

RESULTS = Path(__file__).parent / "results" / "rounding.json"
WAYS = ("as it is", "filters apart", "whole damage", "no cluster", "all levels")


def others_of(way: str) -> Iterator[Other]:
    """Say what a way makes otherwise."""
    if way == "filters apart":
        yield statistics, "measure", apart(statistics.measure)
    if way == "whole damage":
        yield allocation, "LEFT", 1.0
        for module in (allocation, rounding, merge_filters):
            yield module, "SLOPE", SLOPE / LEFT
        yield rounding, "BITS_COUNT", rounding.BITS_COUNT * LEFT


def apart(measure: Callable[..., dict[str, Moments]]) -> Callable[..., dict[str, Moments]]:
    """Return a function that measures, and leaves nothing off the diagonal of the outputs'."""

    def measured(model: nn.Module, images: Tensor, *, seed: int = 0) -> dict[str, Moments]:
        found = measure(model, images, seed=seed)
        return {
            name: m._replace(outputs=torch.diag_embed(m.outputs.diagonal(dim1=1, dim2=2)))
            for name, m in found.items()
        }

    return measured


def rows_of(run: Path, task: Task, given: argparse.Namespace) -> Iterator[Row]:
    """Reduce in each way, to each ratio."""
    trained, source = (package.load(run / stage) for stage in ("train", "prune"))
    validation = Validation(trained.network, task)
    images = calibration(task, 1024, 0)

    def size(network: nn.Module) -> int:
        return len(package.encode(source, network))

    for ratio, way in product(given.ratios, WAYS):
        max_bytes = int(trained.baseline["n_bytes"] / ratio)
        goal = Goal(max_bytes, size)
        with otherwise(others_of(way)):
            network = source.network
            if way != "no cluster":
                network = merge_filters.merge_filters(
                    network, images, merge_filters.MergeConfig(), goal=goal
                ).model
            levels = "all" if way == "all levels" else "steps"
            config = project_channels.ProjectionConfig(levels=levels)
            network = project_channels.project_channels(network, images, config, goal=goal).model
        measured = validation.measure(network)
        yield {
            "ratio": ratio,
            "way": way,
            "bytes": size(network),
            "divergence": round(measured.divergence, 5),
            "validation_accuracy": measured.accuracy,
        }


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[20.0])
    compare(parser, RESULTS, rows_of)
