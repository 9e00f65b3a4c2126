"""The stages that make the network smaller: ``prune``, ``cluster`` and ``reduce``."""

from __future__ import annotations

from pathlib import Path

from filterpress import files
from filterpress.stages.handover import (
    Report,
    hand_on,
    max_bytes_of,
    pass_on,
    settled,
    task_of,
)
from filterpress.stages.tables import clusterers, pruners, reducers


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
    its_task = task_of(source, data, data_dir, image_size, task)
    files.refuse_existing(out)
    images = calibration(its_task, its_config.images, seed)
    outcome = method(source.network, images, its_config, seed=seed)
    return hand_on(out, source, outcome.model, {"stage": "prune", **outcome.notes}, outcome.layers)


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

    if settled(state, ("fits",), ("too-big",)):
        return pass_on(model, out)
    method, its_config = settings.choose(clusterers(), config)
    source = package.load(model)
    max_bytes = max_bytes_of(source, max_size)
    its_task = task_of(source, data, data_dir, image_size, task)
    files.refuse_existing(out)
    images = calibration(its_task, its_config.images, seed)
    outcome = method(source.network, images, its_config, max_bytes=max_bytes, seed=seed)
    return hand_on(
        out, source, outcome.model, {"stage": "cluster", **outcome.notes}, outcome.layers
    )


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
    """Quantise the weights, by default of projected input channels, so that the file fits.

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
        config: JSON object with a method and fields of its config, such as {"max_groups": 1}, or
            {"method": "quantize", "bits": 4}.

    Returns:
        Report with the size; its ``state`` is fits or too-big.
    """
    from filterpress import package, settings
    from filterpress.tasks import calibration

    if settled(state, ("fits",), ("too-big",)):
        return pass_on(model, out) | {"state": state}
    method, its_config = settings.choose(reducers(), config)
    source = package.load(model)
    max_bytes = max_bytes_of(source, max_size)
    its_task = task_of(source, data, data_dir, image_size, task)
    files.refuse_existing(out)
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
    report = {"stage": "reduce", "round": round, **outcome.notes}
    return hand_on(out, source, outcome.model, report, outcome.layers, max_bytes)
