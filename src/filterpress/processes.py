"""The processes that ``torchrun`` starts: who they are, and what one does for all.

Without ``torchrun`` there is one process, and all of this costs nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from filterpress.errors import WorkerError

T = TypeVar("T")

# A process that dies is noticed at once. One that hangs, or a machine that is gone without a word,
# is waited for: not long in a step, which all take at the same time, but longer while one process
# works for all: it downloads the data, takes the score, writes a checkpoint.
STEP = timedelta(minutes=10)
ALONE = timedelta(hours=1)

_GLOO = ("/gloo/", "caused pair closure")  # in its messages; it has no type for them


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
    with others_watched():
        dist.broadcast_object_list(told, group=_patient())
    if told[1] is not None:
        raise told[1]
    return told[0]  # type: ignore[no-any-return]


def tensors_from_main(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give all processes tensors that the main one has, one at a time: there may be gigabytes.

    Args:
        tensors: Those of the main process, on the CPU; what others give does not count.

    Returns:
        The same in all.
    """
    if world() == 1:
        return dict(tensors)
    told = from_main(lambda: [(name, t.shape, t.dtype) for name, t in tensors.items()])
    received = {}
    with others_watched():
        for name, shape, dtype in told:
            tensor = tensors[name] if is_main() else torch.empty(shape, dtype=dtype)
            dist.broadcast(tensor.view(-1).view(torch.uint8), 0, group=_patient())  # of any type
            received[name] = tensor
    return received


def from_all(value: T) -> list[T]:
    """Collect a value of each process, in the order of their ranks."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    with others_watched():
        dist.all_gather_object(values, value, group=_patient())
    return values


def replica_of(model: nn.Module) -> nn.Module:
    """Wrap a network so that its gradients are the means over the processes.

    Args:
        model: The network, which takes the state that it has in the main process.
    """
    if world() == 1:
        return model
    # A parameter that is not used is no error with one process either. And torch then adds up in
    # one order; otherwise it changes it after the first step, so that the first step of a training
    # that goes on would round otherwise. It warns once that all are used.
    return DistributedDataParallel(model, find_unused_parameters=True)


def mean_of_all(value: Tensor) -> float:
    """Return the mean of a number over the processes, so that all judge it alike."""
    if world() == 1:
        return value.item()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total.item() / world()


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
    with others_watched():
        dist.init_process_group(backend, timeout=STEP)
        atexit.register(dist.destroy_process_group)
        _patient()


@contextlib.contextmanager
def others_watched() -> Iterator[None]:
    """Say in one line that another process is gone, if that is what goes wrong in the block.

    Raises:
        WorkerError: Another process died, or did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        told = str(error)
        if not isinstance(error, dist.DistError) and not any(part in told for part in _GLOO):
            raise
        raise WorkerError(
            f"another of the {os.environ['WORLD_SIZE']} processes died or does not answer: look at "
            "what it said last, and start again; with scratch, training goes on from its checkpoint"
        ) from error


@cache
def _patient() -> dist.ProcessGroup:
    """Return the group of all processes whose members wait long for one another."""
    return dist.new_group(backend="gloo", timeout=ALONE)  # type: ignore[no-any-return]


def _wait_for_all() -> None:
    """Wait until all processes are here."""
    if world() > 1:
        with others_watched():
            dist.barrier(group=_patient())


def world() -> int:
    """Count the processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number this process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
