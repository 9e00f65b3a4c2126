"""The stages that train: ``train`` and ``retrain``.

Under ``torchrun`` all processes train; only the first writes the package and uses standard output.
Without it a stage asks `launching` where its work belongs, which may start the same stage there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from filterpress import files, launching
from filterpress.launching.work import Work
from filterpress.presets import DEFAULT
from filterpress.stages.handover import (
    Report,
    budget_of,
    encoded_file,
    evaluated_report,
    hand_on,
    pass_on,
    settled,
    task_of,
)
from filterpress.stages.tables import chosen

if TYPE_CHECKING:
    from torch import nn

    from filterpress.package import Package
    from filterpress.tasks import Task

PLACES = ("out", "scratch", "nodes", "runtime")  # arguments that say where, not what


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
    scratch: str = "",
    nodes: int = 1,
    runtime: str = "filterpress",
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
        scratch: Folder or gs://bucket/prefix for checkpoints, from which a training that was killed
            goes on; empty for none.
        nodes: Machines to train on; more than one needs a Kubernetes cluster with Kubeflow Trainer,
            and scratch in a bucket.
        runtime: TrainingRuntime of the machines.
        config: JSON object with fields of FitConfig, such as {"epochs": 10}.

    Returns:
        Report with the network's size, accuracy, parameters and multiply-accumulates.
    """
    given = {k: v for k, v in locals().items() if k not in (*PLACES, "weights")}
    from filterpress import models, package, settings
    from filterpress.checkpoints import name_of, open_checkpoints
    from filterpress.processes import first_here, from_main, is_main
    from filterpress.retraining import shown
    from filterpress.tasks import load_task
    from filterpress.training import FitConfig, fit

    fields = settings.parse(config)
    fit_config = settings.configure(FitConfig, fields)
    trains = bool(fields or not weights)
    launching.check(nodes, scratch)
    if trains and launching.is_elsewhere(nodes):
        inputs = {"weights": Path(weights)} if weights else {}
        name = name_of("train", given, (), weights)
        work = Work("train", inputs, given | {"scratch": scratch}, name)
        return launching.launch(work, out, nodes=nodes, runtime=runtime)
    with first_here():
        its_task = load_task(data, data_dir, image_size, task)
    from_main(lambda: files.refuse_existing(out))
    network = models.build(model, its_task.input_shape, its_task.n_classes, seed=seed)
    if weights:
        models.load_weights(network, weights)
    checkpoints = open_checkpoints(scratch, "train", given, (), weights)
    if trains:
        checkpoint = checkpoints.take()
        with shown("train", its_task, fit_config) as advance:
            fit(network, its_task, fit_config, seed=seed, progress=advance, checkpoint=checkpoint)
    made = _package_of(network, model, its_task, trains)
    if is_main():
        with files.new_directory(out) as draft:
            package.save(made, draft)
    checkpoints.delete()
    return made.history[-1]


def _package_of(network: nn.Module, model: str, task: Task, trained: bool) -> Package:
    """Measure a network, and make it the first package of a run."""
    from filterpress import measurement
    from filterpress.package import Package

    baseline = measurement.baseline(network, task)
    report = {
        "stage": "train",
        "trained": trained,
        **measurement.against(baseline, baseline),
        "decision": None,
        "round": None,
        "retrains": 0,
        "sha256": None,
    }
    return Package(
        network=network,
        model=model,
        input_shape=task.input_shape,
        n_classes=task.n_classes,
        inputs=measurement.preprocessing(task),
        baseline=baseline,
        history=(report,),
    )


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
    scratch: str = "",
    nodes: int = 1,
    runtime: str = "filterpress",
    preset: str = DEFAULT,
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
        scratch: Folder or gs://bucket/prefix for checkpoints, from which a training that was killed
            goes on; empty for none.
        nodes: Machines to train on; more than one needs a Kubernetes cluster with Kubeflow Trainer,
            and scratch in a bucket.
        runtime: TrainingRuntime of the machines.
        preset: Name of the methods and settings that config goes over; `filterpress presets`
            lists them.
        config: JSON object with fields of RetrainConfig, such as {"epochs": 5}; with
            {"method": "none"} the network is passed on as it is.

    Returns:
        Report with the epochs used and the validation accuracy reached.
    """
    given = {k: v for k, v in locals().items() if k not in (*PLACES, "model", "trained")}
    from filterpress import package
    from filterpress.checkpoints import name_of, open_checkpoints
    from filterpress.processes import first_here, from_main

    done = settled(decision, ("publish", "next", "give-up", "too-big"), ("retrain",))
    choice = chosen("retrain", preset, config)
    if done or choice.method is None:
        return from_main(lambda: pass_on(model, out))
    launching.check(nodes, scratch)
    source, teacher = package.load(model), package.load(trained)
    budget = budget_of(source, max_size, min_accuracy)
    evaluated = evaluated_report(source, encoded_file(model))
    if launching.is_elsewhere(nodes):
        name = name_of("retrain", given, (model, trained))
        inputs = {"model": model, "trained": trained}
        work = Work("retrain", inputs, given | {"scratch": scratch}, name)
        return launching.launch(work, out, nodes=nodes, runtime=runtime)
    with first_here():
        its_task = task_of(source, data, data_dir, image_size, task)
    from_main(lambda: files.refuse_existing(out))
    attempt = sum(h["stage"] == "retrain" for h in source.history)
    checkpoints = open_checkpoints(scratch, "retrain", given, (model, trained))
    network, notes = choice.method(
        source.network,
        teacher.network,
        its_task,
        choice.config,
        floor=budget.min_accuracy,
        reached=evaluated["validation_accuracy"],
        max_bytes=budget.max_bytes,
        size=lambda network: len(package.encode(source, network)),
        seed=seed + attempt,
        checkpoint=checkpoints.take(),
    )
    told = {"stage": "retrain", "retrains": attempt + 1, **notes}
    report = hand_on(out, source, network, told, {})
    checkpoints.delete()
    return report
