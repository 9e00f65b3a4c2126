"""What ``torchrun`` does, but that it leaves the reason of a failure in a file, in one line.

``python -m filterpress.launching.torchrun FILE ARGUMENTS_OF_TORCHRUN...``
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

_CONSEQUENCES = {signal.SIGTERM, signal.SIGABRT}  # torchrun sends the one, NCCL raises the other
_MEMORY = ": often there was too little memory for so many processes"


def main(file: str, *arguments: str) -> None:
    """Start processes and wait for them.

    Args:
        file: Where the reason goes.
        arguments: Of ``torchrun``.

    Raises:
        SystemExit: A process failed.
    """
    try:
        run(parse_args(list(arguments)))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        Path(file).write_text(reason_of(error.failures), encoding="utf-8")
        raise SystemExit(1) from None


def reason_of(failures: Mapping[int, ProcessFailure]) -> str:
    """Say why processes failed: the others fail because the first is gone.

    Args:
        failures: What is known of each, by rank.
    """
    for rank, failure in failures.items():
        if failure.exitcode < 0 and -failure.exitcode not in _CONSEQUENCES:
            killed = failure.exitcode == -signal.SIGKILL
            return f"process {rank} was ended by {failure.signal_name()}" + _MEMORY * killed
    told = {rank: Path(f.error_file) for rank, f in failures.items() if Path(f.error_file).exists()}
    if not told:
        # A process that torchrun ended is no reason.
        rank, failure = max(failures.items(), key=lambda f: f[1].exitcode != -signal.SIGTERM)
        if failure.exitcode < 0:
            return f"process {rank} was ended by {failure.signal_name()}"
        return f"process {rank} ended with exit code {failure.exitcode}"
    # The times that torch knows are rounded to seconds.
    first = min(told, key=lambda rank: told[rank].stat().st_mtime_ns)
    return str(failures[first].message)


if __name__ == "__main__":
    main(*sys.argv[1:])
