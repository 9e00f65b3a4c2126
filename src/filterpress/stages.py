"""The stages of a run: functions from package directories to package directories.

Each reads packages, writes one, and returns a flat report; the same functions are called by
`filterpress.compress`, by the command line and by the steps of the Kubeflow pipeline, and give the
same bytes in all three. A stage with nothing left to do copies its package. Whatever is imported
here is light: a stage imports what it needs when it runs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filterpress.budget import Budget, decide, parse_accuracy, parse_size
from filterpress.errors import BudgetError, ModelError, PackageError

if TYPE_CHECKING:
    from torch import nn

    from filterpress.package import Package
    from filterpress.settings import Table
    from filterpress.tasks import Task

log = logging.getLogger(__name__)
Report = dict[str, Any]
ENCODED = "model.fpk"  # the encoded file in a package


def pruners() -> Table:
    """Methods of the ``prune`` stage, the default first."""
    from filterpress.methods.prune_similar import SimilarityConfig, prune_similar

    return {"similarity": (prune_similar, SimilarityConfig)}


def clusterers() -> Table:
    """Methods of the ``cluster`` stage, the default first."""
    from filterpress.methods.merge_filters import MergeConfig, merge_filters

    return {"merge": (merge_filters, MergeConfig)}


def reducers() -> Table:
    """Methods of the ``reduce`` stage, the default first."""
    from filterpress.methods.project_channels import ProjectionConfig, project_channels

    return {"project": (project_channels, ProjectionConfig)}


def check_configs(**configs: str) -> None:
    """Refuse configurations that a stage would refuse.

    Args:
        configs: JSON text by the names that `filterpress.compress` gives them.

    Raises:
        ValueError: There is no such method or field, or a value breaks its rule.
    """
    from filterpress import settings
    from filterpress.retraining import RetrainConfig
    from filterpress.training import FitConfig

    tables = {"prune": pruners, "cluster": clusterers, "reduce": reducers}
    kinds = {"train": FitConfig, "retrain": RetrainConfig}
    for key, text in configs.items():
        stage = key.removesuffix("_config")
        try:
            if stage in kinds:
                settings.configure(kinds[stage], settings.parse(text))
            else:
                settings.choose(tables[stage](), text)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error


def train(
    out: Path,
    *,
    model: str = "small",
    weights: str = "",
    data: str = "digits",
    data_dir: str = "",
    image_size: int = 0,
    task: str = "",
    seed: int = 0,
    config: str = "{}",
) -> Report:
    """Train a network, or take one that is trained already.

    Args:
        out: Package to write.
        model: Network: small, resnet20, torchvision:NAME or package.module:function.
        weights: File with weights to start from (.safetensors, or a state dict of torch). With an
            empty config they are taken as they are; with one, training goes on from them.
        data: Data set: digits, fashion-mnist, cifar10 or image-folder:PATH (gs://... too).
        data_dir: Folder of the data set; empty for the cache folder.
        image_size: Height and width to resize images to; 0 keeps the data set's own.
        task: Your own task, package.module:function; empty for image classification.
        seed: Seed of the weights, the order of the images and their augmentation.
        config: JSON object with fields of FitConfig, such as {"epochs": 10}.

    Returns:
        Report with the network's size, accuracy, parameters and multiply-accumulates.
    """
    from filterpress import measurement, models, package, settings
    from filterpress.progress import progress
    from filterpress.tasks import load_task
    from filterpress.training import FitConfig, fit, is_main, steps_per_epoch

    fields = settings.parse(config)
    fit_config = settings.configure(FitConfig, fields)
    its_task = load_task(data, data_dir, image_size, task)
    _refuse_existing(out)
    network = models.build(model, its_task.input_shape, its_task.n_classes, seed=seed)
    if weights:
        models.load_weights(network, weights)
    if fields or not weights:
        steps = fit_config.epochs * steps_per_epoch(its_task, fit_config.batch_size)
        with progress("train", steps) as advance:
            fit(network, its_task, fit_config, seed=seed, progress=lambda *_: advance())
    baseline = measurement.baseline(network, its_task)
    report = {
        "stage": "train",
        "trained": bool(fields or not weights),
        **measurement.against(baseline, baseline),
    }
    trained = package.Package(
        network=network,
        model=model,
        input_shape=its_task.input_shape,
        n_classes=its_task.n_classes,
        inputs=measurement.preprocessing(its_task),
        baseline=baseline,
        history=(report,),
    )
    if is_main():
        with package.writing(out) as draft:
            package.save(trained, draft)
    return report


def prune(
    model: Path,
    out: Path,
    *,
    data: str = "digits",
    data_dir: str = "",
    image_size: int = 0,
    task: str = "",
    seed: int = 0,
    config: str = "{}",
) -> Report:
    """Remove the filters that another filter of their layer can stand in for.

    Args:
        model: Package to prune.
        out: Package to write.
        data: Data set: digits, fashion-mnist, cifar10 or image-folder:PATH (gs://... too).
        data_dir: Folder of the data set; empty for the cache folder.
        image_size: Height and width to resize images to; 0 keeps the data set's own.
        task: Your own task, package.module:function; empty for image classification.
        seed: Seed of the choice of calibration images.
        config: JSON object with a method and fields of its config, such as {"threshold": 0.9}.

    Returns:
        Report with the number of filters removed and the size that is left.
    """
    from filterpress import package, settings
    from filterpress.tasks import calibration

    method, its_config = settings.choose(pruners(), config)
    source = package.load(model)
    its_task = _task_of(source, data, data_dir, image_size, task)
    _refuse_existing(out)
    images = calibration(its_task, its_config.images, seed)
    outcome = method(source.network, images, its_config, seed=seed)
    return _write(out, source, outcome.model, {"stage": "prune", **outcome.notes}, outcome.layers)


def cluster(
    model: Path,
    out: Path,
    *,
    state: str = "too-big",
    max_size: str = "12x",
    data: str = "digits",
    data_dir: str = "",
    image_size: int = 0,
    task: str = "",
    seed: int = 0,
    config: str = "{}",
) -> Report:
    """Cluster the filters of each layer by what they compute, and merge each cluster into one.

    Args:
        model: Package to shrink.
        out: Package to write.
        state: fits passes the package on; too-big works on it.
        max_size: Largest encoded file: bytes, 300KB, 300KiB or 12x (of the float32 weights).
        data: Data set: digits, fashion-mnist, cifar10 or image-folder:PATH (gs://... too).
        data_dir: Folder of the data set; empty for the cache folder.
        image_size: Height and width to resize images to; 0 keeps the data set's own.
        task: Your own task, package.module:function; empty for image classification.
        seed: Seed of the choice of calibration images and of k-means.
        config: JSON object with a method and fields of its config.

    Returns:
        Report with the number of filters merged and the size that is left.
    """
    from filterpress import package, settings
    from filterpress.tasks import calibration

    if _settled(state, ("fits",), ("too-big",)):
        return _pass_on(model, out)
    method, its_config = settings.choose(clusterers(), config)
    source = package.load(model)
    max_bytes = parse_size(max_size, source.baseline["n_bytes"])
    its_task = _task_of(source, data, data_dir, image_size, task)
    _refuse_existing(out)
    images = calibration(its_task, its_config.images, seed)
    outcome = method(source.network, images, its_config, max_bytes=max_bytes, seed=seed)
    return _write(out, source, outcome.model, {"stage": "cluster", **outcome.notes}, outcome.layers)


def reduce(
    model: Path,
    out: Path,
    *,
    state: str = "too-big",
    max_size: str = "12x",
    round: int = 1,
    data: str = "digits",
    data_dir: str = "",
    image_size: int = 0,
    task: str = "",
    seed: int = 0,
    config: str = "{}",
) -> Report:
    """Project the input channels of each layer and quantise, so that the file meets the budget.

    Args:
        model: Package to shrink.
        out: Package to write.
        state: fits passes the package on; too-big works on it.
        max_size: Largest encoded file: bytes, 300KB, 300KiB or 12x (of the float32 weights).
        round: Number of the round; a later round does not repeat an earlier allocation.
        data: Data set: digits, fashion-mnist, cifar10 or image-folder:PATH (gs://... too).
        data_dir: Folder of the data set; empty for the cache folder.
        image_size: Height and width to resize images to; 0 keeps the data set's own.
        task: Your own task, package.module:function; empty for image classification.
        seed: Seed of the choice of calibration images.
        config: JSON object with a method and fields of its config, such as {"max_groups": 1}.

    Returns:
        Report with the size; its ``state`` is fits or too-big.
    """
    from filterpress import package, settings
    from filterpress.tasks import calibration

    if _settled(state, ("fits",), ("too-big",)):
        return _pass_on(model, out) | {"state": state}
    method, its_config = settings.choose(reducers(), config)
    source = package.load(model)
    max_bytes = parse_size(max_size, source.baseline["n_bytes"])
    its_task = _task_of(source, data, data_dir, image_size, task)
    _refuse_existing(out)
    images = calibration(its_task, its_config.images, seed)
    failed = [
        h["allocation"] for h in source.history if h["stage"] == "reduce" and h["round"] < round
    ]
    outcome = method(
        source.network,
        images,
        its_config,
        max_bytes=max_bytes,
        size=lambda network: len(package.encode(source, network)),
        avoid=frozenset(failed),
        seed=seed,
    )
    n_bytes = len(package.encode(source, outcome.model))
    report = {"stage": "reduce", "round": round, "max_bytes": max_bytes, **outcome.notes}
    report["state"] = "fits" if n_bytes <= max_bytes else "too-big"
    return _write(out, source, outcome.model, report, outcome.layers)


def evaluate(
    model: Path,
    out: Path,
    *,
    state: str = "fits",
    max_size: str = "12x",
    min_accuracy: str = "-1pp",
    round: int = 1,
    retrains: int = 0,
    max_rounds: int = 2,
    max_retrains: int = 2,
    data: str = "digits",
    data_dir: str = "",
    image_size: int = 0,
    task: str = "",
) -> Report:
    """Encode the network, decode the file again, and measure what came out.

    Args:
        model: Package to measure.
        out: Package to write: the same one with its encoded file, model.fpk.
        state: fits or retrain measures; too-big measures and settles; any other decision has been
            taken before and is passed on with its package.
        max_size: Largest encoded file: bytes, 300KB, 300KiB or 12x (of the float32 weights).
        min_accuracy: Accuracy floor on the validation set: 0.92, or -0.5pp below the trained one.
        round: Number of this round, from 1.
        retrains: Retrains done in this round.
        max_rounds: Rounds at most.
        max_retrains: Retrains in a round at most.
        data: Data set: digits, fashion-mnist, cifar10 or image-folder:PATH (gs://... too).
        data_dir: Folder of the data set; empty for the cache folder.
        image_size: Height and width to resize images to; 0 keeps the data set's own.
        task: Your own task, package.module:function; empty for image classification.

    Returns:
        Report with all the numbers; its ``decision`` is publish, retrain, next, give-up or too-big.
    """
    from filterpress import measurement, package

    if _settled(state, ("publish", "next", "give-up"), ("fits", "retrain", "too-big")):
        return _pass_on(model, out)
    source = package.load(model)
    budget = _budget(source, max_size, min_accuracy, max_rounds, max_retrains)
    its_task = _task_of(source, data, data_dir, image_size, task)
    _refuse_existing(out)
    encoded = package.encode(source, source.network)
    measured = measurement.measure(encoded, its_task)
    n_parameters, macs = package.count(source.network, source.input_shape)
    measured |= {"n_parameters": n_parameters, "macs": macs}
    decision = decide(
        budget,
        n_bytes=len(encoded),
        accuracy=measured["validation_accuracy"],
        round=round,
        retrains=retrains,
    )
    report = {
        "stage": "evaluate",
        **measurement.against(measured, source.baseline),
        "max_bytes": budget.max_bytes,
        "min_accuracy": budget.min_accuracy,
        "decision": decision,
        "round": round,
        "retrains": sum(h["stage"] == "retrain" for h in source.history),
        "sha256": hashlib.sha256(encoded).hexdigest(),
        "layers": measurement.layer_rows(encoded),
    }
    with package.writing(out) as draft:
        package.save(source.after(source.network, report), draft)
        (draft / ENCODED).write_bytes(encoded)
    return report


def retrain(
    model: Path,
    trained: Path,
    out: Path,
    *,
    decision: str = "retrain",
    max_size: str = "12x",
    min_accuracy: str = "-1pp",
    data: str = "digits",
    data_dir: str = "",
    image_size: int = 0,
    task: str = "",
    seed: int = 0,
    config: str = "{}",
) -> Report:
    """Fine-tune the quantised network to imitate the trained one, until the floor is met.

    Args:
        model: Evaluated package to retrain.
        trained: Package of the trained network, the teacher.
        out: Package to write.
        decision: retrain works on the package; any other decision passes it on.
        max_size: Largest encoded file: bytes, 300KB, 300KiB or 12x (of the float32 weights).
        min_accuracy: Accuracy floor on the validation set: 0.92, or -0.5pp below the trained one.
        data: Data set: digits, fashion-mnist, cifar10 or image-folder:PATH (gs://... too).
        data_dir: Folder of the data set; empty for the cache folder.
        image_size: Height and width to resize images to; 0 keeps the data set's own.
        task: Your own task, package.module:function; empty for image classification.
        seed: Seed of the order of the images and their augmentation.
        config: JSON object with fields of RetrainConfig, such as {"epochs": 5}.

    Returns:
        Report with the epochs used and the validation accuracy reached.
    """
    from filterpress import package, settings
    from filterpress.progress import progress
    from filterpress.retraining import RetrainConfig, retrain_quantized
    from filterpress.training import is_main, steps_per_epoch

    if _settled(decision, ("publish", "next", "give-up", "too-big"), ("retrain",)):
        return _pass_on(model, out)
    its_config = settings.configure(RetrainConfig, settings.parse(config))
    source, teacher = package.load(model), package.load(trained)
    budget = _budget(source, max_size, min_accuracy)
    its_task = _task_of(source, data, data_dir, image_size, task)
    _refuse_existing(out)
    attempt = sum(h["stage"] == "retrain" for h in source.history)
    evaluated = _evaluated(source, _encoded_file(model))
    steps = its_config.epochs * steps_per_epoch(its_task, its_config.batch_size)
    with progress("retrain", steps) as advance:
        network, notes = retrain_quantized(
            source.network,
            teacher.network,
            its_task,
            its_config,
            floor=budget.min_accuracy,
            reached=evaluated["validation_accuracy"],
            max_bytes=budget.max_bytes,
            size=lambda network: len(package.encode(source, network)),
            seed=seed + attempt,
            progress=lambda *_: advance(),
        )
    report = {"stage": "retrain", "attempt": attempt + 1, **notes}
    if is_main():
        with package.writing(out) as draft:
            package.save(source.after(network, report), draft)
    return report


def publish(
    model: Path,
    out: Path,
    *,
    store: str,
    keys: str = "",
    name: str = "filterpress",
    max_size: str = "12x",
    min_accuracy: str = "-1pp",
    data: str = "digits",
    data_dir: str = "",
    image_size: int = 0,
    task: str = "",
    html: Path | None = None,
) -> Report:
    """Sign the evaluated file and release it, once both thresholds hold for the file itself.

    Args:
        model: Evaluated package.
        out: Folder to write, with the receipt, report.json.
        store: Folder or gs://bucket/prefix of the signed repository; made when it is new.
        keys: Folder of signing keys, outside the store; empty for the folder keys beside a local
            store, where development keys are made if there are none.
        name: Name of the network in the repository.
        max_size: Largest encoded file: bytes, 300KB, 300KiB or 12x (of the float32 weights).
        min_accuracy: Accuracy floor on the validation set: 0.92, or -0.5pp below the trained one.
        data: Data set: digits, fashion-mnist, cifar10 or image-folder:PATH (gs://... too).
        data_dir: Folder of the data set; empty for the cache folder.
        image_size: Height and width to resize images to; 0 keeps the data set's own.
        task: Your own task, package.module:function; empty for image classification.
        html: File for the report page of the run; none is written without it.

    Returns:
        Report with the release: store, target, digest and version.

    Raises:
        BudgetError: A threshold does not hold; nothing is published.
    """
    from filterpress import measurement, package, release, reporting

    source = package.load(model)
    budget = _budget(source, max_size, min_accuracy)
    encoded = _encoded_file(model)
    evaluated = _evaluated(source, encoded)
    its_task = _task_of(source, data, data_dir, image_size, task)
    _refuse_existing(out)
    measured = measurement.measure(encoded, its_task)
    _require(budget, measured["n_bytes"], measured["validation_accuracy"])
    digest = evaluated["sha256"]
    issued = release.publish(
        encoded,
        target=f"models/{name}/{digest[:16]}/{ENCODED}",
        # signed metadata knows no fractions: numbers travel as text
        custom={k: str(evaluated[k]) for k in ("accuracy", "validation_accuracy", "macs", "ratio")},
        store=store,
        keys=_keys(store, keys),
    )
    report = {k: v for k, v in evaluated.items() if k != "layers"} | {
        "stage": "publish",
        "decision": "publish",
        "store": store,
        "target": issued.target,
        "version": issued.version,
        "created": issued.created,
    }
    with package.writing(out) as draft:
        (draft / "report.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    if html is not None:
        reporting.write_html(model, html)
    return report


def give_up(
    model: Path,
    *,
    max_size: str = "12x",
    min_accuracy: str = "-1pp",
    html: Path | None = None,
) -> Report:
    """End a run whose network did not meet the thresholds.

    Args:
        model: Evaluated package.
        max_size: Largest encoded file: bytes, 300KB, 300KiB or 12x (of the float32 weights).
        min_accuracy: Accuracy floor on the validation set: 0.92, or -0.5pp below the trained one.
        html: File for the report page of the run; none is written without it.

    Returns:
        Nothing: it always raises, unless the thresholds hold after all.

    Raises:
        BudgetError: With the numbers, in one line.
    """
    from filterpress import package, reporting

    source = package.load(model)
    budget = _budget(source, max_size, min_accuracy)
    evaluated = _evaluated(source, _encoded_file(model))
    if html is not None:
        reporting.write_html(model, html)
    _require(budget, evaluated["n_bytes"], evaluated["validation_accuracy"])
    return evaluated


def _settled(state: str, settled: tuple[str, ...], open_: tuple[str, ...]) -> bool:
    if state not in settled + open_:
        raise ValueError(f"state must be one of {sorted(settled + open_)}, got {state!r}")
    return state in settled


def _pass_on(model: Path, out: Path) -> Report:
    """Copy a package and repeat its report."""
    from filterpress import package

    description = package.read_description(model)
    with package.writing(out) as draft:
        shutil.copytree(model, draft, dirs_exist_ok=True)
    return description["history"][-1] | {"passed_on": True}  # type: ignore[no-any-return]


def _write(
    out: Path, source: Package, network: nn.Module, report: Report, layers: dict[str, Any]
) -> Report:
    """Write the package of a stage that changed the network."""
    from filterpress import package

    n_parameters, macs = package.count(network, source.input_shape)
    whole = report | {
        "n_bytes": len(package.encode(source, network)),
        "n_parameters": n_parameters,
        "macs": macs,
        "layers": [{"name": name, **change} for name, change in layers.items()],
    }
    with package.writing(out) as draft:
        package.save(source.after(network, whole), draft)
    return whole


def _budget(
    source: Package, max_size: str, min_accuracy: str, max_rounds: int = 1, max_retrains: int = 0
) -> Budget:
    return Budget(
        max_bytes=parse_size(max_size, source.baseline["n_bytes"]),
        min_accuracy=parse_accuracy(min_accuracy, source.baseline["validation_accuracy"]),
        max_rounds=max_rounds,
        max_retrains=max_retrains,
    )


def _require(budget: Budget, n_bytes: int, accuracy: float) -> None:
    if n_bytes > budget.max_bytes or accuracy < budget.min_accuracy:
        raise BudgetError(
            f"not published: {n_bytes} bytes of {budget.max_bytes} allowed, validation accuracy "
            f"{accuracy:.4f} of {budget.min_accuracy:.4f} needed"
        )


def _keys(store: str, keys: str) -> Path:
    if not keys and store.startswith("gs://"):
        raise ValueError(
            f"keys must name the folder of signing keys for the bucket {store}, got none"
        )
    return Path(keys) if keys else Path(store).resolve().parent / "keys"


def _encoded_file(model: Path) -> bytes:
    try:
        return (model / ENCODED).read_bytes()
    except OSError as error:
        raise PackageError(
            f"{model} must be an evaluated package: {error.strerror} {ENCODED}"
        ) from error


def _evaluated(source: Package, encoded: bytes) -> Report:
    """Return the report of the evaluation that an encoded file comes from."""
    reports = [h for h in source.history if h["stage"] == "evaluate"]
    digest = hashlib.sha256(encoded).hexdigest()
    if not reports or reports[-1]["sha256"] != digest:
        raise PackageError(
            f"model.fpk must be the file that was evaluated, got one with digest {digest[:16]}: "
            "evaluate the package again"
        )
    return reports[-1]


def _task_of(source: Package, data: str, data_dir: str, image_size: int, task: str) -> Task:
    """Load the task and make sure that the network fits it."""
    from filterpress.tasks import load_task

    its_task = load_task(data, data_dir, image_size, task)
    wanted, got = (source.input_shape, source.n_classes), (its_task.input_shape, its_task.n_classes)
    if wanted != got:
        raise ModelError(
            "the data must have images and classes like those the network was trained on, "
            f"{wanted}, got {got}"
        )
    return its_task


def _refuse_existing(out: Path) -> None:
    """Refuse before the work what `package.writing` would refuse after it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PackageError(f"{out} exists already: name another folder or remove it")
