"""Quantise a trained network in many ways without retraining it, and compare.

    python benchmarks/quantizers.py RUN --data fashion-mnist --data-dir DIR

RUN is the folder of a run of ``filterpress compress``; its pruned network is quantised, and its
trained one is what it is compared with, on the validation set: accuracy, and divergence of the
outputs. Ways are those of `QuantizationConfig`, at widths that are given and at widths that the
allocator chooses for a ratio, and ``project``, the other method of the stage. Results go to
``benchmarks/results/quantizers.json`` and are printed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from filterpress import package
from filterpress.methods.project_channels import ProjectionConfig, project_channels
from filterpress.methods.quantize_weights import QuantizationConfig, quantize_weights
from filterpress.tasks import calibration, load_task
from filterpress.training import predictor

RESULTS = Path(__file__).parent / "results" / "quantizers.json"
GRIDS = (
    {"grid": "symmetric", "fit": "range"},
    {"grid": "symmetric", "fit": "outputs"},
    {"grid": "asymmetric", "fit": "range"},
    {"grid": "asymmetric", "fit": "outputs"},
    {"grid": "codebook", "fit": "outputs", "per": "tensor"},
)


def ways() -> Iterator[tuple[float, dict[str, Any] | None]]:
    """Yield ratios, 0 where the width is given, with the fields of a config; None for project."""
    for bits in (2, 3, 4):
        for grid in GRIDS:
            for rounding in ("nearest", "compensated"):
                yield 0, {"bits": bits, "rounding": rounding, **grid}
    for ratio in (8, 12, 20):
        yield ratio, None
        for grid in GRIDS:
            for rounding in ("compensated", "learned"):
                yield ratio, {"bits": 0, "rounding": rounding, **grid, "headroom": 0.0}


def main() -> None:
    """Quantise in each way and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run of filterpress compress")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--data-dir", default="")
    given = parser.parse_args()
    task = load_task(given.data, given.data_dir, 0, "")
    source = package.load(given.run / "prune")
    teacher = predictor(package.load(given.run / "train").network)
    images, labels = map(torch.cat, zip(*task.batches("validation", 500), strict=True))
    wanted = torch.cat([teacher(part) for part in images.split(500)]).log_softmax(1)
    sample = calibration(task, QuantizationConfig().images, 0)
    whole = source.baseline["n_bytes"]

    def size(network: torch.nn.Module) -> int:
        return len(package.encode(source, network))

    rows = []
    for ratio, fields in ways():
        limit = int(whole / ratio) if ratio else whole
        started = time.perf_counter()
        if fields is None:
            config = ProjectionConfig(headroom=0.0)
            made = project_channels(source.network, sample, config, max_bytes=limit, size=size)
        else:
            chosen = QuantizationConfig(**fields)
            made = quantize_weights(source.network, sample, chosen, max_bytes=limit, size=size)
        seconds = time.perf_counter() - started
        predict = predictor(made.model)
        found = torch.cat([predict(part) for part in images.split(500)])
        divergence = F.kl_div(found.log_softmax(1), wanted, log_target=True, reduction="batchmean")
        row = {"ratio_asked": ratio, "method": "project" if fields is None else "quantize"}
        row |= fields or {}
        row |= {
            "bytes": size(made.model),
            "accuracy": round(float((found.argmax(1) == labels).float().mean()), 4),
            "divergence": round(float(divergence), 5),
            "seconds": round(seconds, 1),
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    result = {"run": given.run.name, "n_bytes": whole, "rows": rows}
    result["accuracy"] = source.baseline["validation_accuracy"]
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
