"""Compare factorised and converted layers with projected ones, at the same bytes, untrained.

    python benchmarks/factors.py RUN [...] --ratios 10 20 --data-dir DIR

``RUN`` is the package that ``filterpress train`` has written. For each ratio its network is made
smaller by ``project``, by ``factor`` and ``convert`` with all their kinds of chains, and by each
kind alone. Accuracy is that of the file; divergence that of its outputs from the trained network's,
on the validation set; milliseconds are those of one image in ONNX Runtime with one thread, the
fastest of many. Results go to ``benchmarks/results/factors.json``, in place of those of the same
runs, and are printed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnxruntime
import torch
from comparison import Row, Validation, arguments, compare, made_by
from quantizers import once
from torch.nn import functional as F

from filterpress import package, statistics
from filterpress.codec.graph import to_onnx
from filterpress.measurement import runner
from filterpress.stages.tables import reducers
from filterpress.tasks import Task

RESULTS = Path(__file__).parent / "results" / "factors.json"
KINDS = {"factor": ("svd", "tucker", "cp"), "convert": ("spatial", "separable", "low-rank")}
CONFIGS = (
    *(f'{{"method": "{method}"}}' for method in ("project", *KINDS)),
    *(
        f'{{"method": "{method}", "kinds": "{kind}"}}'
        for method, kinds in KINDS.items()
        for kind in kinds
    ),
)
COUNTS = ("projected", "cut", *KINDS["factor"], *KINDS["convert"])
PASSES = 400  # of one image


def milliseconds(encoded: bytes, shape: tuple[int, ...]) -> float:
    """Time a file on one image, with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(to_onnx(encoded), options, ["CPUExecutionProvider"])
    image = {"images": np.zeros((1, *shape), np.float32)}
    times = []
    for _ in range(PASSES):
        started = time.perf_counter()
        session.run(None, image)
        times.append(time.perf_counter() - started)
    return 1e3 * min(times)


def measured(encoded: bytes, validation: Validation) -> Row:
    """Measure what a file decodes to."""
    predict, task = runner(encoded), validation.task
    batches = task.batches("validation", 500)
    found = torch.cat([predict(images).log_softmax(dim=1) for images, _ in batches])
    divergence = F.kl_div(found, validation.wanted, log_target=True, reduction="batchmean")
    return {
        "divergence": round(float(divergence), 6),
        "validation_accuracy": round(task.score(predict, "validation"), 4),
        "accuracy": round(task.score(predict, "test"), 4),
    }


def rows_of(run: Path, task: Task, given: argparse.Namespace) -> Iterator[Row]:
    """Measure each method and kind at each ratio."""
    source = package.load(run)
    validation = Validation(source.network, task)
    with patch.object(statistics, "measure", once(statistics.measure)):
        for ratio in given.ratios:
            for text in CONFIGS:
                made, seconds = made_by(reducers(), text, source, task, ratio)
                encoded = package.encode(source, made.model)
                yield {
                    "ratio": ratio,
                    "config": text,
                    "bytes": len(encoded),
                    "macs": package.count(made.model, source.input_shape)[1],
                    **measured(encoded, validation),
                    "milliseconds": round(milliseconds(encoded, task.input_shape), 3),
                    "expected_damage": round(float(made.notes["distortion"]), 5),
                    "seconds": seconds,
                    "layers": {k: made.notes[k] for k in COUNTS if k in made.notes},
                }


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[10.0, 20.0])
    compare(parser, RESULTS, rows_of)
