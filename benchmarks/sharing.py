"""Share the weights of a trained network by each way of counting clusters, and compare.

    python benchmarks/sharing.py RUN [RUN ...] [--ratios 10 20] --data fashion-mnist --data-dir DIR

RUN is the folder of a run of ``filterpress compress``. Its trained network is made smaller without
retraining: by ``share_weights`` with its defaults and with one field of its config changed, and by
``quantize_weights`` with codebooks of any width, at the same budgets. Accuracy, and divergence of
the outputs from the trained network's, are of the validation set; seconds are of the processor.
Before that the time is printed that it takes to count the clusters of ten million weights at 16
radii. Results go to ``benchmarks/results/sharing.json`` (docs/adr/0025).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from comparison import Row, Validation, arguments, compare, goal_of

from filterpress import package
from filterpress.clustering import count_clusters
from filterpress.methods.quantize_weights import QuantizationConfig, quantize_weights
from filterpress.methods.share_weights import MOST, SharingConfig, share_weights
from filterpress.tasks import Task, calibration

RESULTS = Path(__file__).parent / "results" / "sharing.json"
CONFIGS = {
    "as it is": SharingConfig(),
    "one threshold, by damage": SharingConfig(threshold="damage"),
    "one threshold, by deviation": SharingConfig(threshold="deviation"),
    "one threshold, by range": SharingConfig(threshold="range"),
    "weights alike": SharingConfig(fit="weights"),
    "nearest": SharingConfig(rounding="nearest"),
    "codebooks of 2 to 256": QuantizationConfig(grid="codebook", per="tensor"),
}


def rows_of(run: Path, task: Task, given: argparse.Namespace) -> Iterator[Row]:
    """Share in each way."""
    source = package.load(run / "train")
    images = calibration(task, SharingConfig().images, 0)
    validation = Validation(source.network, task)
    for ratio in given.ratios:
        goal = goal_of(source, ratio)
        for way, config in CONFIGS.items():
            started = time.process_time()
            if isinstance(config, SharingConfig):
                made = share_weights(source.network, images, config, goal=goal)
            else:
                made = quantize_weights(source.network, images, config, goal=goal)
            seconds = time.process_time() - started
            measured = validation.measure(made.model)
            yield {
                "ratio": ratio,
                "way": way,
                "clusters": [layer.get("clusters", 0) for layer in made.layers.values()],
                "bytes": goal.size(made.model),
                "divergence": round(measured.divergence, 5),
                "validation_accuracy": measured.accuracy,
                "seconds": round(seconds, 1),
            }


def seconds_for(n_weights: int) -> float:
    """Time the counting of the clusters of normally distributed weights at 16 radii."""
    weights = torch.randn(n_weights, generator=torch.Generator().manual_seed(0))
    radii = [2 ** (-power / 2) for power in range(16)]
    count_clusters(weights[:9], torch.ones(9), radii, most=MOST)  # compiles
    started = time.process_time()
    count_clusters(weights, torch.ones(n_weights), radii, most=MOST)
    return time.process_time() - started


if __name__ == "__main__":
    print(f"ten million weights: {seconds_for(10_000_000):.1f} s")
    parser = arguments(__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[10.0, 20.0])
    compare(parser, RESULTS, rows_of)
