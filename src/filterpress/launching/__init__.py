"""Where a stage that trains does its work: here, in several processes, or on several machines.

A stage asks `is_elsewhere` and hands its arguments to `launch`, which starts the same stage there,
waits, and brings its package here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filterpress import files
from filterpress.launching.signals import end_on_sigterm

if TYPE_CHECKING:
    from filterpress.launching.work import Work


def check(nodes: int, scratch: str) -> None:
    """Refuse a number of machines that cannot be had.

    Args:
        nodes: Machines to train on.
        scratch: Where they find what they need.

    Raises:
        ValueError: There are fewer than one, or several without scratch.

    Example:
        >>> check(2, "")
        Traceback (most recent call last):
        ValueError: scratch must be a bucket that all machines reach where nodes is 2, got ''
    """
    if nodes < 1:
        raise ValueError(f"nodes must be at least 1, got {nodes}")
    if nodes > 1 and not scratch:
        raise ValueError(
            f"scratch must be a bucket that all machines reach where nodes is {nodes}, got ''"
        )


def is_elsewhere(nodes: int) -> bool:
    """Say whether training is for other processes than this one.

    Args:
        nodes: Machines to train on.

    Returns:
        False in a process that ``torchrun`` has started, and where one machine with no more than
        one accelerator is all there is.
    """
    return "WORLD_SIZE" not in os.environ and (nodes > 1 or processes_here() > 1)


def processes_here() -> int:
    """Count the processes that this machine trains in.

    Torchrun's own variable ``PET_NPROC_PER_NODE`` says it. Without a number there, it is one for
    each CUDA device, and one without any.
    """
    import torch

    asked = os.environ.get("PET_NPROC_PER_NODE", "")
    return int(asked) if asked.isdigit() else max(1, torch.cuda.device_count())


def launch(work: Work, out: Path, *, nodes: int, runtime: str) -> dict[str, Any]:
    """Have a stage done elsewhere.

    Args:
        work: The stage, and its arguments.
        out: Package to write.
        nodes: Machines to train on.
        runtime: TrainingRuntime of the machines, where there are several.

    Returns:
        The report of the stage.

    Raises:
        FilterpressError: The stage failed, with its own message; or there is no way to those
            machines. Nothing is written.
    """
    from filterpress import package

    files.refuse_existing(out)
    with end_on_sigterm():
        if nodes > 1:
            from filterpress.launching.machines import train_on_machines

            train_on_machines(work, out, nodes, runtime)
        else:
            from filterpress.launching.processes import train_in_processes

            train_in_processes(work, out, processes_here())
    report: dict[str, Any] = package.read_description(out)["history"][-1]
    return report
