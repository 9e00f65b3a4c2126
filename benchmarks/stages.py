"""Time the compression stages themselves, and show where the time goes.

    python benchmarks/stages.py torchvision:resnet18 torchvision:resnet50

Calibration (running the network over calibration images) is counted apart from what the methods do
with its statistics. Weights are fresh: the time does not depend on training. Results go to
``benchmarks/results/stages.json``.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import time
from pathlib import Path

import torch

from filterpress import models, package, statistics
from filterpress.fitting import Goal
from filterpress.methods.merge_filters import MergeConfig, merge_filters
from filterpress.methods.project_channels import ProjectionConfig, project_channels
from filterpress.methods.prune_similar import SimilarityConfig, prune_similar

CALIBRATION = ("measure", "recalibrate_")
RESULTS = Path(__file__).parent / "results" / "stages.json"


def run(name: str, size: int, n_images: int, ratio: float) -> dict[str, object]:
    """Run the three stages once under the profiler."""
    shape = (3, size, size)
    network = models.build(name, shape, 10).eval()
    images = torch.randn(n_images, *shape, generator=torch.Generator().manual_seed(0))
    source = package.Package(network=network, model=name, input_shape=shape, n_classes=10)
    n_parameters = sum(p.numel() for p in network.parameters())
    max_bytes = int(4 * n_parameters / ratio)

    def length(other: torch.nn.Module) -> int:
        return len(package.encode(source, other))

    statistics.recalibrate_(network, images)  # fresh batch-norm lets the activations explode
    length(network)  # compiles the coder
    goal = Goal(max_bytes, length)
    profile = cProfile.Profile()
    started = time.perf_counter()
    profile.enable()
    pruned = prune_similar(network, images, SimilarityConfig()).model
    merged = merge_filters(pruned, images, MergeConfig(), goal=goal).model
    project_channels(merged, images, ProjectionConfig(), goal=goal)
    profile.disable()
    seconds = time.perf_counter() - started
    spent = _by_function(profile)
    calibration = sum(spent.get(f, 0.0) for f in CALIBRATION)
    return {
        "network": name,
        "parameters": n_parameters,
        "image_size": size,
        "images": n_images,
        "ratio": ratio,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 2),
        "calibration_seconds": round(calibration, 2),
        "compression_seconds": round(seconds - calibration, 2),
        "where": dict(sorted(spent.items(), key=lambda item: -item[1])[:14]),
    }


def _by_function(profile: cProfile.Profile) -> dict[str, float]:
    """Return cumulative seconds of filterpress's own functions."""
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    return {
        function: round(cumulative, 2)
        for (file, _, function), (_, _, _, cumulative, _) in stats.items()
        if "filterpress" in file and cumulative > 0.05 and not function.startswith("<")
    }


def main() -> None:
    """Run the benchmark for the networks named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=["torchvision:resnet18"])
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--ratio", type=float, default=100.0)
    given = parser.parse_args()
    results = [run(n, given.image_size, given.images, given.ratio) for n in given.networks]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for result in results:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
