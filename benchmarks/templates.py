"""Share the kernels of a trained network in each scope, untrained, and compare with plain steps.

    python benchmarks/templates.py RUN [...] --ratios 42 --data-dir DIR

``RUN`` is the folder of a run of ``filterpress compress``. Its trained network is made so many
times smaller by ``kernels``, with as many templates as the allocator chooses and with 256 for all
layers, in each scope, and by ``project`` without projections. What convolutions take is all that
their weights are made of: factors, offsets, indices and templates. Accuracy is that of the network
that the file holds; divergence that of its outputs from the trained network's, on the validation
set.

Results go to ``benchmarks/results/templates.json``, in place of those of the same runs, and are
printed (docs/adr/0023).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from comparison import Row, Validation, arguments, compare, made_by
from factors import measured
from quantizers import once
from torch import nn

from filterpress import package, statistics
from filterpress.measurement import layer_rows
from filterpress.stages.tables import clusterers, reducers
from filterpress.surgery import layers
from filterpress.tasks import Task

RESULTS = Path(__file__).parent / "results" / "templates.json"
SCOPES = ("layer", "group", "net")
CONFIGS = (
    *(f'{{"method": "kernels", "scope": "{scope}"}}' for scope in SCOPES),
    *(f'{{"method": "kernels", "scope": "{scope}", "templates": 256}}' for scope in SCOPES),
    '{"method": "project", "max_groups": 0}',
)


def rows_of(run: Path, task: Task, given: argparse.Namespace) -> Iterator[Row]:
    """Measure each config at each ratio."""
    source = package.load(run / "train")
    validation = Validation(source.network, task)
    convolutions = [m for m in layers(source.network).values() if isinstance(m, nn.Conv2d)]
    in_16_bits = 2 * sum(convolution.weight.numel() for convolution in convolutions)
    methods = {**clusterers(), **reducers()}
    with patch.object(statistics, "measure", once(statistics.measure)):
        for ratio in given.ratios:
            for text in CONFIGS:
                made, seconds = made_by(methods, text, source, task, ratio)
                encoded = package.encode(source, made.model)
                rows = layer_rows(encoded, made.model)
                taken = sum(row["n_bytes"] for row in rows if len(row["shape"]) == 4)
                yield {
                    "ratio": ratio,
                    "config": text,
                    "bytes": len(encoded),
                    "against_16_bits": round(in_16_bits / taken, 2),
                    **measured(encoded, validation),
                    "expected_damage": round(float(made.notes["distortion"]), 5),
                    "shared": made.notes.get("shared", 0),
                    "layers": len(rows),
                    "seconds": seconds,
                }


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[24.0])
    compare(parser, RESULTS, rows_of)
