"""Measure how much faster networks run than a first one, from the files that ship.

    python benchmarks/latency.py PACKAGE PACKAGE [PACKAGE ...]

Each package's network is encoded, decoded and run by ONNX Runtime on the CPU, with one thread and
one image at a time. In each round the networks take turns, and of some runs in a row the fastest
counts, so that whatever else the machine does hits them alike, and little. A time is the median
over rounds, a ratio the median over rounds of a network's time by the first one's. Results are
printed as JSON and go to ``benchmarks/results/latency.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from filterpress import package
from filterpress.codec.graph import to_onnx

RESULTS = Path(__file__).parent / "results" / "latency.json"


def session(encoded: bytes) -> onnxruntime.InferenceSession:
    """Decode a file and open it in ONNX Runtime, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(to_onnx(encoded), options, ["CPUExecutionProvider"])


def time_by_turns(
    sessions: Sequence[onnxruntime.InferenceSession],
    image: NDArray[np.float32],
    *,
    rounds: int,
    runs: int,
) -> NDArray[np.float64]:
    """Return the seconds of one run ``(rounds, sessions)``, the least of some in a row."""
    seconds = np.empty((rounds, len(sessions)))
    for i in range(-1, rounds):  # the first round warms up
        for j, network in enumerate(sessions):
            each = []
            for _ in range(runs):
                started = time.perf_counter()
                network.run(None, {"images": image})
                each.append(time.perf_counter() - started)
            seconds[i, j] = min(each)
    return seconds


def main() -> None:
    """Time the packages named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("packages", type=Path, nargs="+", metavar="PACKAGE")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--runs", type=int, default=10, help="of a network in a row")
    given = parser.parse_args()
    sources = [package.load(path) for path in given.packages]
    files = [package.encode(source, source.network) for source in sources]
    shape = sources[0].input_shape
    image = np.random.default_rng(0).standard_normal((1, *shape)).astype(np.float32)
    sessions = [session(file) for file in files]
    seconds = time_by_turns(sessions, image, rounds=given.rounds, runs=given.runs)
    rows = []
    for path, source, file, own in zip(given.packages, sources, files, seconds.T, strict=True):
        n_parameters, macs = package.count(source.network, shape)
        rows.append(
            {
                "package": path.name,
                "n_bytes": len(file),
                "n_parameters": n_parameters,
                "macs": macs,
                "milliseconds": round(1e3 * float(np.median(own)), 4),
                "ratio": round(float(np.median(own / seconds[:, 0])), 3),
            }
        )
        print(json.dumps(rows[-1]))
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
