"""Several processes on this machine, by ``torchrun --standalone``."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from filterpress.errors import FilterpressError
from filterpress.launching.work import Work

_GRACE_S = 20  # for processes that were told to end


def train_in_processes(work: Work, out: Path, processes: int) -> None:
    """Run a stage in several processes; what they say goes to standard error.

    Args:
        work: The stage and its arguments.
        out: Package to write.
        processes: How many.

    Raises:
        FilterpressError: It failed; with what the first that failed said.
    """
    given = {**work.inputs, **work.settings, "out": out}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    with tempfile.TemporaryDirectory() as folder:
        reason = Path(folder) / "reason"
        started = subprocess.Popen(
            [
                *(sys.executable, "-m", "filterpress.launching.torchrun", reason, "--standalone"),
                *("--nnodes=1", f"--nproc-per-node={processes}", f"--log-dir={folder}"),
                *("-m", "filterpress", work.stage, *flags),
            ],
            env=os.environ | _imports(),
            stdout=subprocess.DEVNULL,  # the report, which is in the package too
        )
        try:
            status = started.wait()
        except BaseException:
            _end(started)
            raise
        if status:
            unknown = "torchrun failed: what it said last on standard error has the reason"
            said = reason.read_text(encoding="utf-8") if reason.exists() else unknown
            raise FilterpressError(said)


def _imports() -> dict[str, str]:
    """Let the processes find the modules that this one finds, in the same order."""
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def _end(started: subprocess.Popen[bytes]) -> None:
    """End torchrun, which ends its processes."""
    started.terminate()
    try:
        started.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        started.kill()
        started.wait()
