"""What stages have in common: how they take a package over and hand the next one on."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filterpress import files
from filterpress.budget import SMALLEST, Budget, parse_accuracy, parse_size
from filterpress.errors import BudgetError, ModelError, PackageError

if TYPE_CHECKING:
    from torch import nn

    from filterpress.package import Package
    from filterpress.tasks import Task

Report = dict[str, Any]
ENCODED = "model.fpk"  # the encoded file in a package


def settled(state: str, settled: tuple[str, ...], open_: tuple[str, ...]) -> bool:
    """Tell whether there is nothing left to do; refuse a state that is neither settled nor open."""
    if state not in settled + open_:
        raise ValueError(f"state must be one of {sorted(settled + open_)}, got {state!r}")
    return state in settled


def pass_on(model: Path, out: Path) -> Report:
    """Copy a package and repeat its report."""
    from filterpress import package

    description = package.read_description(model)
    with files.new_directory(out) as draft:
        shutil.copytree(model, draft, dirs_exist_ok=True)
    return description["history"][-1] | {"passed_on": True}  # type: ignore[no-any-return]


def hand_on(
    out: Path,
    source: Package,
    network: nn.Module,
    report: Report,
    layers: Mapping[str, Mapping[str, Any]],
    max_bytes: int | None = None,
) -> Report:
    """Write the package of a stage that changed the network, and complete its report.

    Args:
        out: Package to write; under ``torchrun`` the first process does.
        source: Package the stage began with.
        network: What it made of it.
        report: What is particular to the stage.
        layers: What it did to each layer it changed.
        max_bytes: Largest encoded file; with it the report has a ``state``, fits or too-big.

    Returns:
        The report with the numbers every stage gives; those that only an evaluation knows are None.
    """
    from filterpress import measurement, package
    from filterpress.processes import is_main

    encoded = package.encode(source, network)
    n_parameters, macs = package.count(network, source.input_shape)
    measured = {
        "n_bytes": len(encoded),
        "accuracy": None,
        "n_parameters": n_parameters,
        "macs": macs,
    }
    whole = {
        **measurement.against(measured, source.baseline),
        "decision": None,
        "round": next((h["round"] for h in reversed(source.history) if "round" in h), None),
        "retrains": sum(h["stage"] == "retrain" for h in source.history),
        "sha256": hashlib.sha256(encoded).hexdigest(),
        **report,
        "layers": [{"name": name, **change} for name, change in layers.items()],
    }
    if max_bytes is not None:
        state = "fits" if len(encoded) <= max_bytes else "too-big"
        whole |= {"max_bytes": max_bytes, "state": state}
    if is_main():
        with files.new_directory(out) as draft:
            package.save(source.after(network, whole), draft)
    return whole


def max_bytes_of(source: Package, max_size: str) -> int:
    """Turn a size as written into bytes; refuse one below what the format alone needs."""
    from filterpress import package

    max_bytes, least = _bytes_of(source, max_size), package.least_bytes(source)
    if max_bytes < least:
        raise ValueError(
            f"max_size must be at least {least} bytes for this network, without any weights, "
            f"got {max_size!r}, which is {max_bytes}"
        )
    return max_bytes


def budget_of(
    source: Package, max_size: str, min_accuracy: str, max_rounds: int = 1, max_retrains: int = 0
) -> Budget:
    """Turn thresholds as written into those of a run, against the trained network."""
    return Budget(
        max_bytes=_bytes_of(source, max_size),
        min_accuracy=parse_accuracy(min_accuracy, source.baseline["validation_accuracy"]),
        max_rounds=max_rounds,
        max_retrains=max_retrains,
    )


def _bytes_of(source: Package, max_size: str) -> int:
    """Turn a size as written into bytes; ``smallest`` is what ``search`` has found."""
    if max_size != SMALLEST:
        return parse_size(max_size, source.baseline["n_bytes"])
    found = [h["max_bytes"] for h in source.history if h["stage"] == "search"]
    if not found:
        raise ValueError(f"max_size must be a size before the stage search, got {max_size!r}")
    return int(found[-1])


def require(budget: Budget, n_bytes: int, accuracy: float) -> None:
    """Raise `BudgetError`, with the numbers, unless both thresholds hold."""
    if n_bytes > budget.max_bytes or accuracy < budget.min_accuracy:
        raise BudgetError(
            f"not published: {n_bytes} bytes of {budget.max_bytes} allowed, validation accuracy "
            f"{accuracy:.4f} of {budget.min_accuracy:.4f} needed"
        )


def encoded_file(model: Path) -> bytes:
    """Read the encoded file of an evaluated package."""
    try:
        return (model / ENCODED).read_bytes()
    except OSError as error:
        raise PackageError(
            f"{model} must be an evaluated package: {error.strerror} {ENCODED}"
        ) from error


def evaluated_report(source: Package, encoded: bytes) -> Report:
    """Return the report of the evaluation that an encoded file comes from."""
    reports = [h for h in source.history if h["stage"] == "evaluate"]
    digest = hashlib.sha256(encoded).hexdigest()
    if not reports or reports[-1]["sha256"] != digest:
        raise PackageError(
            f"model.fpk must be the file that was evaluated, got one with digest {digest[:16]}: "
            "evaluate the package again"
        )
    return reports[-1]


def task_of(source: Package, data: str, data_dir: str, image_size: int, task: str) -> Task:
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
