"""Compress networks on real images, and print the table of README.md.

    python benchmarks/networks.py --data-dir DIR [--out runs/bench]

Each row is one call of ``filterpress compress``, training included, timed as a whole process. Rows
that are in ``benchmarks/results/networks.json`` already are not run again; remove one to repeat it.
The committed ones are of ``OMP_NUM_THREADS=1``: another number of threads trains another network.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "networks.json"
RUNS = {
    "ResNet-18": [
        *("--model", "torchvision:resnet18", "--data", "fashion-mnist"),
        *("--train-config", '{"epochs": 4, "lr": 0.05}'),
        *("--retrain-config", '{"epochs": 5, "margin": 0.5}'),  # no early stop
        *("--max-size", "500x", "--min-accuracy", "-0.4pp"),
    ],
    "ResNet-20": [
        *("--model", "resnet20", "--data", "fashion-mnist"),
        *("--train-config", '{"epochs": 3}'),
        *("--retrain-config", '{"epochs": 4, "margin": 0.5}'),
        *("--max-size", "30x", "--min-accuracy", "-0.4pp"),
    ],
    "MobileNetV2": [
        *("--model", "torchvision:mobilenet_v2", "--data", "fashion-mnist"),
        *("--train-config", '{"epochs": 4, "lr": 0.05}'),
        *("--retrain-config", '{"epochs": 2, "margin": 0.5}'),
        *("--max-size", "30x", "--min-accuracy", "-0.4pp"),
    ],
}
KEPT = ("n_bytes", "baseline_bytes", "ratio", "accuracy", "baseline_accuracy")
KEPT += ("validation_accuracy", "n_parameters", "macs", "round", "retrains", "sha256")


def run(name: str, data_dir: str, out: Path) -> dict[str, object]:
    """Run one row; `subprocess.CalledProcessError` if it does not meet its thresholds."""
    folder = out / name.lower()
    command = [sys.executable, "-m", "filterpress", "compress", *RUNS[name], "--json"]
    command += ["--data-dir", data_dir, "--out", str(folder), "--seed", "0"]
    started = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    report = json.loads(done.stdout)
    return {key: report[key] for key in KEPT} | {"seconds": round(time.perf_counter() - started)}


def table(results: dict[str, dict[str, float]]) -> str:
    """Lay the results out as the rows of README.md."""
    rows = []
    for name, r in results.items():
        drop = 100 * (r["accuracy"] - r["baseline_accuracy"])
        rows.append(
            f"| {name} | {r['baseline_bytes']:,} | {r['n_bytes']:,} | {r['ratio']:.0f}x "
            f"| {100 * r['baseline_accuracy']:.2f} % | {100 * r['accuracy']:.2f} % ({drop:+.2f}) "
            f"| {r['macs'] / 1e6:.1f} M | {r['seconds'] / 60:.0f} min |"
        )
    return "\n".join(rows)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", required=True, help="folder of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="rows to run")
    given = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in given.only:
        if name not in results:
            results[name] = run(name, given.data_dir, given.out)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
