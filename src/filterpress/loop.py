"""The claimed loop: train, prune, then cluster, reduce, evaluate and retrain until it is done.

Every stage writes its package below one folder and is finished when that package is there. A run
that was killed goes on after the last finished stage when it is started again.
"""

from __future__ import annotations

import inspect
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from filterpress import files, stages
from filterpress.budget import SMALLEST
from filterpress.errors import PackageError
from filterpress.presets import DEFAULT
from filterpress.reporting import write_html
from filterpress.stages.rounds import Run, one_round

log = logging.getLogger(__name__)
Report = dict[str, Any]

SCRATCH = "scratch"  # folder in the run's own, while it lasts


def compress(
    out: str | Path,
    *,
    model: str = "small",
    weights: str = "",
    data: str = "digits",
    data_dir: str = "",
    image_size: int = 0,
    task: str = "",
    max_size: str = "12x",
    min_accuracy: str = "-1pp",
    max_rounds: int = 2,
    max_retrains: int = 2,
    max_minutes: int = 60,
    size_tries: int = 2,
    seed: int = 0,
    scratch: str = "",
    nodes: int = 1,
    runtime: str = "filterpress",
    store: str = "",
    keys: str = "",
    name: str = "filterpress",
    channel: str = "any/stable",
    percent: float = 100.0,
    preset: str = DEFAULT,
    train_config: str = "{}",
    prune_config: str = "{}",
    cluster_config: str = "{}",
    reduce_config: str = "{}",
    retrain_config: str = "{}",
) -> Report:
    """Compress a network to a storage budget and an accuracy floor, and publish it.

    Args:
        out: Folder of the run. A run that was interrupted is continued; any other folder that
            exists is refused.
        model: Network: small, resnet20, torchvision:NAME or package.module:function.
        weights: File with the weights of a trained network (.safetensors, or a state dict of
            torch); without it the network is trained first.
        data: Data set: digits, fashion-mnist, cifar10 or image-folder:PATH (gs://... too).
        data_dir: Folder of the data set; empty for the cache folder.
        image_size: Height and width to resize images to; 0 keeps the data set's own.
        task: Your own task, package.module:function; empty for image classification.
        max_size: Largest encoded file: bytes, 300KB, 300KiB or 12x (of the float32 weights); or
            smallest, for the smallest file that keeps the floor.
        min_accuracy: Accuracy floor on the validation set: 0.92, or -0.5pp below the trained one.
        max_rounds: Rounds of cluster, reduce and retrain at most.
        max_retrains: Retrains in a round at most.
        max_minutes: Time for finding the smallest file, where that is asked for.
        size_tries: Passes of cluster and reduce in a round at most.
        seed: Seed of everything random.
        scratch: Folder or gs://bucket/prefix for checkpoints, from which a training that was killed
            goes on; empty for the folder scratch in out.
        nodes: Machines to train on; more than one needs a Kubernetes cluster with Kubeflow Trainer,
            and scratch in a bucket.
        runtime: TrainingRuntime of the machines.
        store: Folder or gs://bucket/prefix to publish to; empty for the folder release in out.
        keys: Folder of signing keys, outside the store; empty for the folder keys beside a local
            store, where development keys are made if there are none.
        name: Name of the network in the store.
        channel: Kind of vehicle and name of the channel that shall name the release; empty for
            none.
        percent: Share of these vehicles that take part at once.
        preset: Name of the methods and settings that config goes over; `filterpress presets`
            lists them.
        train_config: JSON object with fields of FitConfig, such as {"epochs": 10}.
        prune_config: JSON object with a method of the prune stage and fields of its config.
        cluster_config: JSON object with a method of the cluster stage and fields of its config.
        reduce_config: JSON object with a method of the reduce stage and fields of its config.
        retrain_config: JSON object with fields of RetrainConfig.

    Returns:
        The report of the published network, with ``release``, ``package`` and ``html``.

    Raises:
        BudgetError: The thresholds were not met; nothing was published.
        FilterpressError: The input cannot be used.
        ValueError: An argument breaks its rule.
    """
    given = {key: value for key, value in locals().items() if key != "out"}
    known = inspect.signature(stages.check).parameters
    stages.check(**{key: value for key, value in given.items() if key in known})
    places = {
        "store": store or str(Path(out) / "release"),
        "scratch": scratch or str(Path(out) / SCRATCH),
    }
    run = Run(Path(out), given | places)
    _open(run.out, given)
    try:
        trained, _ = run.step("train", stages.train)
        stages.check_thresholds(trained, max_size=max_size, min_accuracy=min_accuracy)
    except Exception:
        _undo(run.out)
        raise
    last, _ = run.step("prune", stages.prune, trained)
    state = "too-big"
    if max_size == SMALLEST:
        last, report = run.step("search", stages.search, last, trained)
        state = report["state"]
    for number in range(1, max_rounds + 1):
        last, decision = one_round(run, trained, last, number, state)
        if decision != "next":
            break
    return _finish(run, last, decision)


def _finish(run: Run, last: Path, decision: str) -> Report:
    """Publish, or raise with the numbers; either way the folder tells how the run ended."""
    shutil.rmtree(run.out / SCRATCH, ignore_errors=True)
    page = run.out / "report.html"
    goal = {key: run.given[key] for key in ("max_size", "min_accuracy")}
    report: Report = json.loads((last / "report.json").read_text()) | {"decision": decision}
    write_html(last, page)
    if decision != "publish":
        _write(run.out / "report.json", report)
        stages.give_up(last, **goal)
    receipt, _ = run.step("publish", stages.publish, last)
    report |= json.loads((receipt / "report.json").read_text())
    report |= {"release": report["store"], "package": str(last), "html": str(page)}
    files.write(run.out / stages.ENCODED, (last / stages.ENCODED).read_bytes())
    _write(run.out / "report.json", report)
    return report


def _open(out: Path, given: Report) -> None:
    """Start a run in a new folder, or go on with the same one."""
    started = out / "run.json"
    if started.exists():
        if json.loads(started.read_text()) != given:
            raise PackageError(f"{out} holds a run with other settings: name another folder")
        if (out / "report.json").exists():
            raise PackageError(
                f"{out} exists already and holds a finished run: name another folder"
            )
        log.info("continuing the run in %s", out)
        return
    files.refuse_existing(out, but=files.draft(started))
    _write(started, given)


def _undo(out: Path) -> None:
    """Remove a run's folder, unless it holds something that took work, as training does."""
    report = out / "train" / "report.json"
    trained = report.exists() and json.loads(report.read_text())["trained"]
    if not trained and {path.name for path in out.iterdir()} <= {"run.json", "train"}:
        shutil.rmtree(out)


def _write(path: Path, value: Report) -> None:
    files.write(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())
