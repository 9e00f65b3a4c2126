"""Measure how accurate networks stay the smaller they get, and draw it.

    python benchmarks/networks.py --data-dir DIR [--only resnet-18 ...] [--sizes 500x ...]

A network is trained once, by ``filterpress train``. Each size is one call of ``filterpress
compress`` with the trained weights, timed as a whole process, and makes one or two points:
``post-training`` is the file as it is evaluated first, ``retrained`` the one after a retrain, where
the network's settings ask for one. The floor is the accuracy of the trained network, so that hardly
any goes without.

Results go to ``benchmarks/results/networks``, one file a network, after every point; points that
are there are not run again. Then ``docs/curves.svg`` is drawn and the table of README.md printed,
which ``--draw`` does alone: of each network the smallest file that loses at most half a point of
accuracy on the validation set. The committed results are of ``OMP_NUM_THREADS=1``: another number
of threads trains another network.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from curves import draw

from filterpress import files
from filterpress.terminal import NOT_MET

RESULTS = Path(__file__).parent / "results" / "networks"
DRAWING = Path(__file__).parents[1] / "docs" / "curves.svg"
LOSS = 0.005  # of validation accuracy that a row of the table may have
KEPT = (
    *("retrains", "decision", "n_bytes", "ratio", "accuracy", "validation_accuracy"),
    *("n_parameters", "macs", "sha256"),
)
Json = dict[str, Any]


class Network(NamedTuple):
    """A network on Fashion-MNIST, how it is trained, and the sizes of its points."""

    title: str
    model: str
    train: str
    retrain: str
    as_they_are: tuple[str, ...]  # sizes
    retrained: tuple[str, ...]  # sizes
    image_size: int = 0

    @property
    def sizes(self) -> tuple[str, ...]:
        """All sizes of the network."""
        return self.as_they_are + self.retrained


NETWORKS = {
    "resnet-18": Network(
        title="ResNet-18",
        model="torchvision:resnet18",
        train='{"epochs": 4, "lr": 0.05}',
        retrain='{"epochs": 4, "margin": 0.5}',  # no early stop
        as_they_are=("100x", "200x"),
        retrained=("350x", "500x", "600x", "800x"),
    ),
    "resnet-18-64": Network(
        title="ResNet-18, 64 pixels",
        model="torchvision:resnet18",
        train='{"epochs": 3, "lr": 0.05}',
        retrain='{"epochs": 2, "margin": 0.5}',
        as_they_are=("30x", "50x", "80x", "300x"),
        retrained=("120x", "200x"),
        image_size=64,
    ),
    "resnet-20": Network(
        title="ResNet-20",
        model="resnet20",
        train='{"epochs": 3}',
        retrain='{"epochs": 4, "margin": 0.5}',
        as_they_are=("8x", "12x"),
        retrained=("20x", "30x", "40x", "50x"),
    ),
    "mobilenet-v2": Network(
        title="MobileNetV2",
        model="torchvision:mobilenet_v2",
        train='{"epochs": 4, "lr": 0.05}',
        retrain='{"epochs": 2, "margin": 0.5}',
        as_they_are=("10x", "20x"),
        retrained=("30x", "40x", "50x", "60x"),
    ),
}


class Runs(NamedTuple):
    """The runs of one network."""

    network: Network
    out: Path
    data_dir: str

    def baseline(self) -> Json:
        """Train the network, unless that is done; say what came of it and how long it took."""
        folder, seconds = self.out / "train", None
        if not folder.exists():
            seconds = self.run("train", folder, "--config", self.network.train)
        package: Json = json.loads((folder / "model.json").read_text())
        digest = package["weights_sha256"]
        return {**package["baseline"], "weights_sha256": digest, "seconds": seconds}

    def points(self, size: str) -> list[Json]:
        """Compress the trained network; a file that misses the floor is a point all the same.

        Their ``seconds``, of the whole run, are None if an earlier call did part of it.
        """
        folder = self.out / size
        new, seconds = not folder.exists(), None
        if not (folder / "report.json").exists():
            seconds = self.run(
                *("compress", folder, "--weights", str(self.out / "train" / "weights.safetensors")),
                *("--max-size", size, "--min-accuracy", "-0pp", "--max-rounds", "1"),
                *("--max-retrains", str(int(size in self.network.retrained))),
                *("--retrain-config", self.network.retrain),
            )
        first, last = folder / "round-1" / "evaluate", folder
        reports = [json.loads((stage / "report.json").read_text()) for stage in (first, last)]
        made = {
            "retrained" if report["retrains"] else "post-training": report for report in reports
        }
        asked = {"max_size": size, "seconds": seconds if new else None}
        return [
            {"series": series, **asked, **{key: report[key] for key in KEPT}}
            for series, report in made.items()
        ]

    def run(self, command: str, out: Path, *own: str, seed: int = 0) -> int:
        """Run a command of filterpress that makes the network, and return its seconds."""
        own += ("--model", self.network.model, "--seed", str(seed))
        return self.call(command, out, *own)

    def call(self, command: str, out: Path, *own: str) -> int:
        """Run a command of filterpress and return its seconds."""
        called = [sys.executable, "-m", "filterpress", command, "--out", str(out), *own]
        called += ["--image-size", str(self.network.image_size), "--json"]
        called += ["--data", "fashion-mnist", "--data-dir", self.data_dir]
        started = time.perf_counter()
        done = subprocess.run(called, check=False, stdout=subprocess.DEVNULL)
        if done.returncode not in (0, NOT_MET):
            raise subprocess.CalledProcessError(done.returncode, called)
        return round(time.perf_counter() - started)


def load(name: str) -> Json:
    """Read what is known of a network; nothing, if it was never run."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {"baseline": {}, "points": []}


def save(name: str, result: Json) -> None:
    """Write what is known of a network."""
    files.write(RESULTS / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())


def complete(name: str, runs: Runs, wanted: Sequence[str]) -> None:
    """Add the sizes that are missing to a network's results.

    Raises:
        ValueError: The results are of other trained weights.
    """
    result = load(name)
    there = {point["max_size"] for point in result["points"]}
    missing = [size for size in runs.network.sizes if size in wanted and size not in there]
    if not missing:
        return
    before, now = result["baseline"], runs.baseline()
    if before and before["weights_sha256"] != now["weights_sha256"]:
        raise ValueError(f"{name}.json must be of the weights in {runs.out}: remove one of them")
    result["baseline"] = now | {"seconds": now["seconds"] or before.get("seconds")}
    save(name, result)
    for size in missing:
        result["points"] += runs.points(size)
        result["points"].sort(key=lambda point: (point["series"], point["ratio"]))
        save(name, result)


def smallest(result: Json) -> Json | None:
    """Choose the smallest file that keeps the validation accuracy."""
    floor = result["baseline"]["validation_accuracy"] - LOSS - 1e-9
    kept = [point for point in result["points"] if point["validation_accuracy"] >= floor]
    return min(kept, key=lambda point: int(point["n_bytes"]), default=None)


def row(title: str, before: Json, after: Json) -> str:
    """Lay a network out as a row of README.md; an unknown time of training is left out."""
    accuracies = before["accuracy"], after["accuracy"]
    drop = 100 * (accuracies[1] - accuracies[0])
    seconds = after["seconds"]
    took = "" if seconds is None else f"{(seconds + (before['seconds'] or 0)) / 60:.0f} min"
    return (
        f"| {title} | {before['n_bytes']:,} | {after['n_bytes']:,} | {after['ratio']:.0f}x "
        f"| {100 * accuracies[0]:.2f} % | {100 * accuracies[1]:.2f} % ({drop:+.2f}) "
        f"| {after['macs'] / 1e6:.1f} M | {after['retrains']} | {took} |"
    )


def table(results: dict[str, Json]) -> str:
    """Lay the results out as the rows of README.md, without networks that no file keeps."""
    chosen = {title: smallest(result) for title, result in results.items()}
    return "\n".join(row(t, results[t]["baseline"], point) for t, point in chosen.items() if point)


def main() -> None:
    """Run what is missing, draw the curves and print the table."""
    sizes = sorted({size for network in NETWORKS.values() for size in network.sizes})
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", default="", help="folder of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=sizes)
    parser.add_argument("--draw", action="store_true", help="run nothing")
    given = parser.parse_args()
    for name in () if given.draw else given.only:
        complete(name, Runs(NETWORKS[name], given.out / name, given.data_dir), given.sizes)
    known = {network.title: load(name) for name, network in NETWORKS.items()}
    results = {title: result for title, result in known.items() if result["points"]}
    if results:
        files.write(DRAWING, draw(results))
        print(table(results))


if __name__ == "__main__":
    main()
