"""The stage that looks at the settings of a run before anything is spent on it: ``check``."""

from __future__ import annotations

from collections.abc import Sequence

from filterpress import launching
from filterpress.budget import SMALLEST, Budget, check_spelling
from filterpress.presets import DEFAULT
from filterpress.scratch import open_scratch
from filterpress.stages.handover import Report
from filterpress.stages.shrinking import trains
from filterpress.stages.tables import check_configs, chosen


def check(
    *,
    model: str = "small",
    data: str = "digits",
    image_size: int = 0,
    task: str = "",
    max_size: str = "12x",
    sizes: Sequence[str] = (),
    min_accuracy: str = "-1pp",
    max_rounds: int = 2,
    max_retrains: int = 2,
    max_minutes: int = 60,
    size_tries: int = 2,
    rounds: int = 0,
    retrains: int = 0,
    scratch: str = "",
    nodes: int = 1,
    accelerators: str = "0",
    store: str = "",
    keys: str = "",
    channel: str = "any/stable",
    percent: float = 100.0,
    preset: str = DEFAULT,
    train_config: str = "{}",
    prune_config: str = "{}",
    cluster_config: str = "{}",
    reduce_config: str = "{}",
    retrain_config: str = "{}",
) -> Report:
    """Refuse at once what a stage would refuse after hours.

    What takes reading files or building the network is left to the stages.

    Args:
        model: Network: small, resnet20, torchvision:NAME or package.module:function.
        data: Data set: digits, fashion-mnist, cifar10 or image-folder:PATH (gs://... too).
        image_size: Height and width to resize images to; 0 keeps the data set's own.
        task: Your own task, package.module:function; empty for image classification.
        max_size: Largest encoded file: bytes, 300KB, 300KiB or 12x (of the float32 weights).
        sizes: Several such sizes, for a sweep.
        min_accuracy: Accuracy floor on the validation set: 0.92, or -0.5pp below the trained one.
        max_rounds: Rounds at most.
        max_retrains: Retrains in a round at most.
        max_minutes: Time for finding the smallest file.
        size_tries: Passes of cluster and reduce in a round at most.
        rounds: Rounds that there are steps for; 0 for any number.
        retrains: Retrains that there are steps for in a round; likewise.
        scratch: Folder or gs://bucket/prefix for checkpoints; empty for none.
        nodes: Machines to train on.
        accelerators: Accelerators of a step that trains.
        store: Folder or gs://bucket/prefix to publish to; empty for none.
        keys: Folder of signing keys.
        channel: Kind of vehicle and name of the channel; empty for none.
        percent: Share of these vehicles that take part at once.
        preset: Name of the methods and settings that config goes over; `filterpress presets`
            lists them.
        train_config: JSON object with fields of FitConfig.
        prune_config: JSON object with a method of the prune stage and fields of its config.
        cluster_config: JSON object with a method of the cluster stage and fields of its config.
        reduce_config: JSON object with a method of the reduce stage and fields of its config.
        retrain_config: JSON object with fields of RetrainConfig.

    Returns:
        Report that the settings can be used, with ``accelerators`` of a step that prunes or
        reduces: as text, 1 where one of them trains and there are any, else 0.

    Raises:
        ValueError: A setting breaks its rule.
    """
    for size in (max_size, *sizes):
        check_spelling(size, min_accuracy)
    Budget(max_bytes=1, min_accuracy=0, max_rounds=max_rounds, max_retrains=max_retrains)
    for name, value, least in (("size_tries", size_tries, 1), ("max_minutes", max_minutes, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not accelerators.isdecimal():
        raise ValueError(f"accelerators must be a whole number, got {accelerators!r}")
    for name, value, most in (
        ("max_rounds", max_rounds, rounds),
        ("max_retrains", max_retrains, retrains),
    ):
        if most and value > most:
            raise ValueError(
                f"{name} must be at most {most}, as the pipeline was compiled, got {value}"
            )
    check_configs(
        preset,
        train_config=train_config,
        prune_config=prune_config,
        cluster_config=cluster_config,
        reduce_config=reduce_config,
        retrain_config=retrain_config,
    )
    prune_trains = trains(chosen("prune", preset, prune_config))
    if max_size == SMALLEST and not sizes and prune_trains:
        raise ValueError(
            "max_size must be a size where the network is pruned as far as it asks, got "
            f"{max_size!r}: name another method for prune_config"
        )
    _check_sources(model, data, image_size, task)
    launching.check(nodes, scratch)
    if scratch:
        open_scratch(scratch)
    _check_release(store, keys, channel, percent)
    of_use = prune_trains or trains(chosen("reduce", preset, reduce_config))
    return {"stage": "check", "accelerators": str(min(int(accelerators), int(of_use)))}


def _check_sources(model: str, data: str, image_size: int, task: str) -> None:
    from filterpress import models
    from filterpress._user_code import load_function
    from filterpress.data import check_source

    models.find(model)
    if task:
        load_function("task", task)
    else:
        check_source(data, image_size)


def _check_release(store: str, keys: str, channel: str, percent: float) -> None:
    from filterpress.release import rollout
    from filterpress.release.channel import parts_of
    from filterpress.release.keys import keys_for
    from filterpress.release.store import open_store

    if store:
        open_store(store)
        keys_for(store, keys)
    if channel:
        hardware, name = parts_of(channel)
        rollout.naming(hardware=hardware, channel=name, percent=percent)
