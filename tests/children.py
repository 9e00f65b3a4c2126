"""Processes of their own, for what a test kills or starts many times at once.

They are forked from one that has everything imported and no threads: a fork of the process of the
tests would wait for ever for what another thread of that one held at the moment.
"""

from __future__ import annotations

import faulthandler
import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "filterpress.measurement",
        "sklearn.cluster",
        "sklearn.datasets",
        "tests.in_two",
        "tests.release.device.conftest",
        "torch._dynamo",
    ]
)
_PATIENCE = 200  # seconds: less than a test may take, so that a child can say where it hangs


def start(action, *arguments):
    """Run an action, of a module, in a process of its own."""
    child = CONTEXT.Process(target=_run, args=(action, *arguments))
    child.start()
    return child


def exit_code(child):
    """Wait for a process; its exit code is that of `subprocess`, 1 where the action failed."""
    child.join()
    return child.exitcode


def _run(action, *arguments):
    faulthandler.dump_traceback_later(_PATIENCE, exit=True)
    action(*arguments)
