"""Compare the presets: the same trained networks, sizes and epochs, three seeds.

    python benchmarks/presets.py --data-dir DIR [--only resnet-20 ...] [--presets NAME ...]
        [--sizes 20x ...] [--seeds 0 ...]

A network is trained once, as for `networks.py`. Each point is one call of ``filterpress compress
--preset NAME`` with the trained weights, for one size and one seed; its time is that of the
processor, which other work on the machine hardly changes. The floor is the accuracy of the trained
network, and a file that meets it as it is gets its retrain all the same, so that none stops early.
Every preset trains for `EPOCHS` epochs of `EPOCH_STEPS` steps in all, which is one pass over the
training images: those that train while they prune or quantise have so many fewer to retrain with,
and ``post-training`` has none.

Processors of another kind train other weights. A point is compared with the weights that it was
made from, so points of several machines go together.

Latency is that of the decoded file in onnxruntime on one thread, one image at a time, against the
trained network's own in turns with it (see `latency.py`).

Results go to ``benchmarks/results/presets``, one file a network, after every point; points that are
there are not run again. Then ``docs/presets.svg`` is drawn and the table of README.md printed,
which ``--draw`` does alone. The committed results are of ``OMP_NUM_THREADS=1``.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import statistics
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import latency
import networks
import numpy as np
from preset_plot import draw

from filterpress import files, package, settings
from filterpress.presets import PRESETS
from filterpress.stages import ENCODED

Json = dict[str, Any]

RESULTS = Path(__file__).parent / "results" / "presets"
DRAWING = Path(__file__).parents[1] / "docs" / "presets.svg"
SIZES = {"resnet-18": ("100x", "350x"), "resnet-20": ("10x", "20x")}
SEEDS = (0, 1, 2)
EPOCHS = 3
EPOCH_STEPS = 143
EARLY = 2  # epochs, of presets that train before the stage retrain
TRAINING: dict[str, tuple[str, Json]] = {  # the stage and how it spends them
    "deep-compression": ("prune", {"steps": 2, "epochs": 1}),
    "saliency-birch": ("prune", {"steps": 2, "epochs": 1}),
    "learned-threshold": ("prune", {"learning_epochs": 1, "epochs": 1}),
    "joint": ("reduce", {"epochs": 2}),
    "mac-budget": ("prune", {"epochs": 2}),
}
KEPT = ("n_bytes", "ratio", "accuracy", "validation_accuracy", "macs", "sha256")


class Point(NamedTuple):
    """One run."""

    preset: str
    size: str
    seed: int

    @property
    def key(self) -> Json:
        """What tells it from the others."""
        return {"preset": self.preset, "max_size": self.size, "seed": self.seed}


def configs_of(preset: str) -> dict[str, str]:
    """Share the epochs out among the stages that train; without any for those that do not."""
    if PRESETS[preset].retrain.get("method") == settings.NONE:
        return {}
    left, configs = EPOCHS, {}
    if preset in TRAINING:
        stage, fields = TRAINING[preset]
        configs[stage] = json.dumps(fields | {"epoch_steps": EPOCH_STEPS})
        left -= EARLY
    retrain = {"epochs": left, "epoch_steps": EPOCH_STEPS, "margin": 0.5}  # no early stop
    return configs | {"retrain": json.dumps(retrain)}


def run(runs: networks.Runs, point: Point, weights: str) -> Json:
    """Compress the trained network of some weights, and measure the file."""
    folder = runs.out / f"{point.preset}-{point.size}-{point.seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped: its time is not known
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    last = compress(runs, point, folder)
    total = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = total.ru_utime + total.ru_stime - spent.ru_utime - spent.ru_stime
    report = json.loads((last / "report.json").read_text())
    ratio = latency_ratio(package.load(runs.out / "train"), (last / ENCODED).read_bytes())
    kept = {name: report[name] for name in KEPT}
    cost = {"cpu_seconds": round(seconds), "latency_ratio": ratio}
    made = {**point.key, **kept, **cost, "weights_sha256": weights}
    shutil.rmtree(folder)
    return made


def compress(runs: networks.Runs, point: Point, folder: Path) -> Path:
    """Compress the trained network and return the package that was evaluated last."""
    configs = configs_of(point.preset)
    n_retrains = int("retrain" in configs)
    thresholds = ("--max-size", point.size, "--min-accuracy", "-0pp")
    runs.run(
        *("compress", folder, "--weights", str(runs.out / "train" / "weights.safetensors")),
        *("--preset", point.preset, *thresholds),
        *("--max-rounds", "1", "--max-retrains", str(n_retrains)),
        *(word for stage, text in configs.items() for word in (f"--{stage}-config", text)),
        seed=point.seed,
    )
    last = max(folder.glob("round-1/evaluate*"))
    if json.loads((last / "report.json").read_text())["retrains"] == n_retrains:
        return last
    trained, retrained, last = folder / "train", folder / "retrain-1", folder / "evaluate-1"
    runs.call(
        *("retrain", retrained, "--model", str(folder / "round-1" / "evaluate")),
        *("--trained", str(trained), "--preset", point.preset, *thresholds),
        *("--config", configs["retrain"], "--seed", str(point.seed)),
    )
    runs.call("evaluate", last, "--model", str(retrained), *thresholds)
    return last


def latency_ratio(trained: package.Package, encoded: bytes) -> float:
    """Return the time of one image in a file's network by that in the trained one."""
    files = [package.encode(trained, trained.network), encoded]
    image = np.random.default_rng(0).standard_normal((1, *trained.input_shape)).astype(np.float32)
    sessions = [latency.session(file) for file in files]
    before, after = latency.time_by_turns(sessions, image, rounds=50, runs=10).T
    return round(float(np.median(after / before)), 3)


def load(name: str) -> Json:
    """Read what is known of a network; nothing, if it was never run."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {"baselines": [], "points": []}


def complete(name: str, runs: networks.Runs, wanted: list[Point]) -> None:
    """Add the points that are missing to a network's results."""
    result = load(name)
    there = [{k: point[k] for k in ("preset", "max_size", "seed")} for point in result["points"]]
    missing = [point for point in wanted if point.key not in there]
    if not missing:
        return
    trained = runs.baseline()
    weights = trained["weights_sha256"]
    if weights not in {known["weights_sha256"] for known in result["baselines"]}:
        result["baselines"].append(trained)
    for point in missing:
        print(name, *point, flush=True)
        result["points"].append(run(runs, point, weights))
        result["points"].sort(
            key=lambda p: (list(PRESETS).index(p["preset"]), p["ratio"], p["seed"])
        )
        text = json.dumps(result, indent=1) + "\n"
        files.write(RESULTS / f"{name}.json", text.encode())


def rows(result: Json) -> Iterator[Json]:
    """Average the seeds of each preset and size."""
    points = result["points"]
    trained = {known["weights_sha256"]: known for known in result["baselines"]}
    sizes = sorted({p["max_size"] for p in points}, key=lambda size: float(size.rstrip("x")))
    for size, preset in product(sizes, PRESETS):
        mine = [p for p in points if (p["max_size"], p["preset"]) == (size, preset)]
        if mine:
            lost, chosen = (
                [100 * (p[kind] - trained[p["weights_sha256"]][kind]) for p in mine]
                for kind in ("accuracy", "validation_accuracy")
            )
            yield {
                "size": size,
                "preset": preset,
                "seeds": len(mine),
                "change": statistics.mean(lost),
                "error": statistics.stdev(lost) / math.sqrt(len(lost)) if len(lost) > 1 else None,
                "validation": statistics.mean(chosen),
                "n_bytes": statistics.mean(p["n_bytes"] for p in mine),
                "macs": statistics.mean(p["macs"] for p in mine),
                "latency": statistics.mean(p["latency_ratio"] for p in mine),
                "minutes": statistics.mean(p["cpu_seconds"] for p in mine) / 60,
            }


def table(results: dict[str, Json]) -> str:
    """Lay the results out as the rows of README.md."""
    lines = []
    for title, result in results.items():
        for row in rows(result):
            error = "" if row["error"] is None else f" ± {row['error']:.2f}"
            lines.append(
                f"| {title}, {row['size']} | `{row['preset']}` | {row['change']:+.2f}{error} "
                f"| {row['validation']:+.2f} "
                f"| {row['n_bytes']:,.0f} | {row['macs'] / 1e6:.1f} M | {row['latency']:.2f} "
                f"| {row['minutes']:.0f} | {row['seeds']} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, draw the results and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", default="", help="folder of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument(
        "--sizes", nargs="+", default=[s for sizes in SIZES.values() for s in sizes]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--draw", action="store_true", help="run nothing")
    given = parser.parse_args()
    for name in () if given.draw else given.only:
        sizes = [size for size in SIZES[name] if size in given.sizes]
        wanted = [Point(*p[1:], p[0]) for p in product(given.seeds, given.presets, sizes)]
        runs = networks.Runs(networks.NETWORKS[name], given.out / name, given.data_dir)
        complete(name, runs, wanted)
    known = {networks.NETWORKS[name].title: load(name) for name in SIZES}
    results = {title: result for title, result in known.items() if result["points"]}
    if not results:
        sys.exit("there are no results yet")
    files.write(DRAWING, draw({title: list(rows(result)) for title, result in results.items()}))
    print(table(results))


if __name__ == "__main__":
    main()
