"""The stages that make the network smaller: ``prune``, ``cluster`` and ``reduce``.

A method looks at calibration images, and never at their labels, or it trains: then it is given the
task, and what the file shall meet already in ``prune``.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from filterpress import files
from filterpress.presets import DEFAULT
from filterpress.stages.handover import (
    Report,
    hand_on,
    max_bytes_of,
    pass_on,
    settled,
    task_of,
)
from filterpress.stages.tables import chosen

if TYPE_CHECKING:
    from filterpress.checkpoints import Checkpoints
    from filterpress.fitting import Goal
    from filterpress.methods import Outcome
    from filterpress.package import Package
    from filterpress.settings import Choice
    from filterpress.tasks import Task


def prune(
    model: Path,
    out: Path,
    *,
    max_size: str = "12x",
    data: str = "digits",
    data_dir: str = "",
    image_size: int = 0,
    task: str = "",
    seed: int = 0,
    scratch: str = "",
    preset: str = DEFAULT,
    config: str = "{}",
) -> Report:
    """Remove what the network can do without: by default, filters that another can stand in for.

    Args:
        model: Package to prune.
        out: Package to write.
        max_size: Largest encoded file: bytes, 300KB, 300KiB or 12x (of the float32 weights); for
            methods that train and prune as far as it asks.
        data: Data set: digits, fashion-mnist, cifar10 or image-folder:PATH (gs://... too).
        data_dir: Folder of the data set; empty for the cache folder.
        image_size: Height and width to resize images to; 0 keeps the data set's own.
        task: Your own task, package.module:function; empty for image classification.
        seed: Seed of everything random.
        scratch: Folder or gs://bucket/prefix for checkpoints, from which the trainings of a method
            that trains go on if they were killed; empty for none.
        preset: Name of the methods and settings that config goes over; `filterpress presets`
            lists them.
        config: JSON object with a method and fields of its config, such as {"threshold": 0.9};
            the method none passes the network on.

    Returns:
        Report with what was removed and the size that is left.
    """
    given = {k: v for k, v in locals().items() if k not in ("model", "out", "scratch")}
    from filterpress import package
    from filterpress.checkpoints import open_checkpoints

    choice = chosen("prune", preset, config)
    source = package.load(model)
    goal = _goal(source, max_size) if trains(choice) else None
    checkpoints = open_checkpoints(scratch, "prune", given, [model])
    its_task = task_of(source, data, data_dir, image_size, task)
    files.refuse_existing(out)
    outcome = _apply(choice, source, its_task, seed, goal, checkpoints)
    report = {"stage": "prune", "method": choice.name, **outcome.notes}
    whole = hand_on(out, source, outcome.model, report, outcome.layers)
    checkpoints.delete()
    return whole


def cluster(
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
    preset: str = DEFAULT,
    config: str = "{}",
) -> Report:
    """Let weights share: by default, filters that compute nearly the same become one.

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
        seed: Seed of the choice of calibration images and of the first centres.
        preset: Name of the methods and settings that config goes over; `filterpress presets`
            lists them.
        config: JSON object with a method and fields of its config; the method none passes the
            network on.

    Returns:
        Report with what was shared and the size that is left.
    """
    from filterpress import package

    if settled(state, ("fits",), ("too-big",)):
        return pass_on(model, out)
    choice = chosen("cluster", preset, config)
    source = package.load(model)
    goal = _goal(source, max_size, avoid=_failed(source, "cluster", round))
    its_task = task_of(source, data, data_dir, image_size, task)
    files.refuse_existing(out)
    outcome = _apply(choice, source, its_task, seed, goal)
    report = {"stage": "cluster", "method": choice.name, "round": round, **outcome.notes}
    return hand_on(out, source, outcome.model, report, outcome.layers)


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
    scratch: str = "",
    preset: str = DEFAULT,
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
        seed: Seed of everything random.
        scratch: Folder or gs://bucket/prefix for checkpoints, from which the training of a method
            that trains goes on if it was killed; empty for none.
        preset: Name of the methods and settings that config goes over; `filterpress presets`
            lists them.
        config: JSON object with a method and fields of its config, such as {"max_groups": 1}, or
            {"method": "quantize", "bits": 4}; the method none passes the network on.

    Returns:
        Report with the size; its ``state`` is fits or too-big.
    """
    given = {k: v for k, v in locals().items() if k not in ("model", "out", "scratch")}
    from filterpress import package
    from filterpress.checkpoints import open_checkpoints

    if settled(state, ("fits",), ("too-big",)):
        return pass_on(model, out) | {"state": state}
    choice = chosen("reduce", preset, config)
    source = package.load(model)
    goal = _goal(source, max_size, avoid=_failed(source, "reduce", round))
    checkpoints = open_checkpoints(scratch, "reduce", given, [model])
    its_task = task_of(source, data, data_dir, image_size, task)
    files.refuse_existing(out)
    outcome = _apply(choice, source, its_task, seed, goal, checkpoints)
    report = {"stage": "reduce", "method": choice.name, "round": round, **outcome.notes}
    whole = hand_on(out, source, outcome.model, report, outcome.layers, goal.max_bytes)
    checkpoints.delete()
    return whole


def trains(choice: Choice) -> bool:
    """Tell whether a stage's method trains, and so looks at labels."""
    from filterpress.training import FitConfig

    return isinstance(choice.config, FitConfig)


def _goal(source: Package, max_size: str, avoid: frozenset[str] = frozenset()) -> Goal:
    from filterpress import package
    from filterpress.fitting import Goal

    return Goal(
        max_bytes_of(source, max_size), lambda network: len(package.encode(source, network)), avoid
    )


def _failed(source: Package, stage: str, round: int) -> frozenset[str]:
    """Return the allocations that a stage found in earlier rounds."""
    earlier = [h for h in source.history if h["stage"] == stage and h["round"] < round]
    return frozenset(h["allocation"] for h in earlier if "allocation" in h)


def _apply(
    choice: Choice,
    source: Package,
    task: Task,
    seed: int,
    goal: Goal | None,
    checkpoints: Checkpoints | None = None,
) -> Outcome:
    """Apply a method to the network of a package; one that prunes without training has no goal."""
    from filterpress.methods import Outcome
    from filterpress.tasks import calibration

    if choice.method is None:
        return Outcome(copy.deepcopy(source.network), {}, {})
    data = task if trains(choice) else calibration(task, choice.config.images, seed)
    more: dict[str, object] = {"goal": goal} if goal else {}
    if trains(choice) and checkpoints:
        more["checkpoints"] = checkpoints
    made: Outcome = choice.method(source.network, data, choice.config, **more, seed=seed)
    return made
