"""The processes that ``torchrun`` starts: who they are, and what one does for all.

Without ``torchrun`` there is one process, and all of this costs nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

PATIENCE = timedelta(hours=2)  # of processes with one that downloads the data or takes the score


def best_device() -> torch.device:
    """Name the accelerator of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def is_main() -> bool:
    """Say whether this is the process that writes files: the only one, or rank 0 of several."""
    return rank() == 0


def from_main(work: Callable[[], T]) -> T:
    """Do in the main process what one alone can do or judge, and tell all what came of it.

    Args:
        work: Called in the main process; the others wait for it in the same call.

    Returns:
        What it returned there.

    Raises:
        Exception: What it raised there.
    """
    join()
    if world() == 1:
        return work()
    told: list[Any] = [None, None]  # the result, the exception
    if is_main():
        try:
            told[0] = work()
        except Exception as error:  # noqa: BLE001 (each process raises it below)
            told[1] = error
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]  # type: ignore[no-any-return]


@contextlib.contextmanager
def first_here() -> Iterator[None]:
    """Let one process of each machine do the block before the others: it fills their caches."""
    join()
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        _wait_for_all()
    try:
        yield
    finally:
        if first:
            _wait_for_all()


def join() -> None:
    """Join the process group that torchrun describes, once in the life of a process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    device = best_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)


def _wait_for_all() -> None:
    """Wait until all processes are here."""
    if world() > 1:
        dist.barrier()


def world() -> int:
    """Count the processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number this process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
