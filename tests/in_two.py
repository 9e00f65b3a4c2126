"""Command lines in two processes that train together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from datetime import timedelta

import torch

from filterpress import processes
from filterpress.__main__ import app
from tests import children, tiny

STREAMS = {"out": 1, "err": 2}


def under_torchrun(*arguments, **environment):
    """Run a command line under torchrun, in two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*launcher, "-m", "filterpress", *map(str, arguments)],
        cwd=tiny.ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def run(said, *arguments, patience=None, **environment):
    """Run a command line in two processes, each of which ends as it will.

    Args:
        said: Folder for what they say.
        arguments: The command line.
        patience: Seconds that one waits for the other in a step.
        environment: Variables of both.

    Returns:
        Exit code, standard output, and the lines on standard error, of rank 0 and of rank 1.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = (port, said, [str(argument) for argument in arguments], patience, environment)
    started = [children.CONTEXT.Process(target=_one_of_two, args=(rank, *given)) for rank in "01"]
    for process in started:
        process.start()
    for process, seconds in zip(started, (60, patience or 60), strict=True):
        process.join(seconds)
        process.kill()
        process.join()
    codes = (process.exitcode for process in started)
    out, err = ([(said / f"{name}-{rank}").read_text() for rank in "01"] for name in STREAMS)
    return list(zip(codes, out, (lines.splitlines() for lines in err), strict=True))


def _one_of_two(rank, port, said, arguments, patience, environment):
    """Run a command line in this process, which exists for nothing else."""
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    for name, descriptor in STREAMS.items():
        os.dup2(os.open(said / f"{name}-{rank}", os.O_CREAT | os.O_WRONLY), descriptor)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if patience:
        processes.STEP = timedelta(seconds=patience)
    app(arguments)
