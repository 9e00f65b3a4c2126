"""The stage that finds the smallest file which keeps the floor: ``search``."""

from __future__ import annotations

import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

from filterpress import files, launching
from filterpress.budget import SMALLEST
from filterpress.errors import BudgetError
from filterpress.presets import DEFAULT
from filterpress.stages.handover import ENCODED, Report, pass_on
from filterpress.stages.rounds import Run, one_round

log = logging.getLogger(__name__)

FIRST, LEAST = 8.0, 1.0  # ratios of the float32 weights: tried first, and given up at
CLOSE = 1.05  # between the smallest file that passed and the largest that did not
SHOWN = ("max_bytes", "n_bytes", "ratio", "validation_accuracy", "decision", "retrains")


class Try(NamedTuple):
    """A size that was tried, and the package it ended in."""

    ratio: float
    package: Path
    report: Report

    @property
    def passed(self) -> bool:
        """Whether its file keeps the floor."""
        return bool(self.report["decision"] == "publish")


def search(
    model: Path,
    trained: Path,
    out: Path,
    *,
    max_size: str = "12x",
    min_accuracy: str = "-1pp",
    max_minutes: int = 60,
    max_retrains: int = 2,
    size_tries: int = 2,
    data: str = "digits",
    data_dir: str = "",
    image_size: int = 0,
    task: str = "",
    seed: int = 0,
    scratch: str = "",
    nodes: int = 1,
    runtime: str = "filterpress",
    preset: str = DEFAULT,
    cluster_config: str = "{}",
    reduce_config: str = "{}",
    retrain_config: str = "{}",
) -> Report:
    """Find the smallest file that keeps the accuracy floor, if max_size asks for it.

    Sizes are halved until one fails, and the gap between the last two is then bisected. Each is
    tried by a whole round of cluster, reduce, evaluate and retrain on the validation set.

    Args:
        model: Package to shrink.
        trained: Package of the trained network, the teacher of retraining.
        out: Package to write.
        max_size: smallest searches; any size passes the package on.
        min_accuracy: Accuracy floor on the validation set: 0.92, or -0.5pp below the trained one.
        max_minutes: Time for the search; no size is begun that would take longer, judging by the
            slowest before it.
        max_retrains: Retrains for each size at most.
        size_tries: Passes of cluster and reduce for each size at most.
        data: Data set: digits, fashion-mnist, cifar10 or image-folder:PATH (gs://... too).
        data_dir: Folder of the data set; empty for the cache folder.
        image_size: Height and width to resize images to; 0 keeps the data set's own.
        task: Your own task, package.module:function; empty for image classification.
        seed: Seed of everything random.
        scratch: Folder or gs://bucket/prefix for checkpoints, from which a training that was killed
            goes on; empty for none.
        nodes: Machines to retrain on; more than one needs a Kubernetes cluster with Kubeflow
            Trainer, and scratch in a bucket.
        runtime: TrainingRuntime of the machines.
        preset: Name of the methods and settings that config goes over; `filterpress presets`
            lists them.
        cluster_config: JSON object with a method of the cluster stage and fields of its config.
        reduce_config: JSON object with a method of the reduce stage and fields of its config.
        retrain_config: JSON object with fields of RetrainConfig.

    Returns:
        Report of the smallest file, with all sizes tried; its ``state`` is fits, or too-big where
        there was nothing to search.

    Raises:
        BudgetError: No size tried keeps the floor.
    """
    given = {k: v for k, v in locals().items() if k not in ("model", "trained", "out")}
    if max_size != SMALLEST:
        return pass_on(model, out) | {"state": "too-big"}
    launching.check(nodes, scratch)
    files.refuse_existing(out)
    with files.new_directory(out) as draft:
        tries = _try_sizes(model, trained, draft / "tries", given, 60 * max_minutes)
        best = max((t for t in tries if t.passed), key=reached, default=None)
        if best is None:
            raise BudgetError(
                f"no size tried keeps the floor of {min_accuracy}: " + "; ".join(map(_told, tries))
            )
        report = _hand_on(best, tries, draft)
        shutil.rmtree(draft / "tries")
    return report


def _try_sizes(
    model: Path, trained: Path, out: Path, given: dict[str, Any], seconds: float
) -> list[Try]:
    """Try sizes until the smallest that passes is known well enough, or time is up."""
    from filterpress import package

    source = package.load(model)
    whole, least = source.baseline["n_bytes"], package.least_bytes(source)
    tries: list[Try] = []
    slowest, deadline = 0.0, time.monotonic() + seconds
    while (ratio := next_ratio(tries, whole / least)) is not None:
        begun = time.monotonic()
        if tries and begun + slowest > deadline:
            log.info("no time left for %.1fx", ratio)
            break
        log.info("search: %.1fx", ratio)
        size = str(int(whole / ratio))
        run = Run(out / str(len(tries)), {**given, "max_size": size, "max_rounds": 1})
        last, _ = one_round(run, trained, model, 1)
        tries.append(Try(ratio, last, package.read_description(last)["history"][-1]))
        slowest = max(slowest, time.monotonic() - begun)
        log.info("search: %s", _told(tries[-1]))
    return tries


def next_ratio(tries: list[Try], most: float) -> float | None:
    """Choose the ratio to try next, None when the search is over.

    Args:
        tries: What was tried so far.
        most: Ratio of a file without any weights, which is never tried.
    """
    passed = max((reached(t) for t in tries if t.passed), default=None)
    failed = min((t.ratio for t in tries if not t.passed), default=None)
    if failed is None:
        ratio = FIRST if passed is None else 2 * passed
        return ratio if ratio < most else None
    if passed is None:
        return failed / 2 if failed / 2 > LEAST else None
    return math.sqrt(passed * failed) if failed / passed > CLOSE else None


def reached(tried: Try) -> float:
    """Return the ratio that a file has, which can be above the one it was asked for."""
    return float(max(tried.ratio, tried.report["ratio"]))


def _told(tried: Try) -> str:
    r = tried.report
    return f"{r['n_bytes']} bytes, {r['validation_accuracy']:.4f}, {r['decision']}"


def _hand_on(best: Try, tries: list[Try], out: Path) -> Report:
    """Copy the package of the best try, and report all of them."""
    from filterpress import package

    source = package.load(best.package)
    report = {k: v for k, v in best.report.items() if k != "layers"} | {
        "stage": "search",
        "decision": None,
        "state": "fits",
        "tries": [{k: t.report[k] for k in SHOWN} for t in tries],
    }
    package.save(source.after(source.network, report), out)
    shutil.copyfile(best.package / ENCODED, out / ENCODED)
    return report
