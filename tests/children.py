"""Processes of their own, for what a test kills or starts many times at once.

They are forked from one that has everything imported and no threads: a fork of the process of the
tests would wait for ever for what another thread of that one held at the moment.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys

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


def killed_at_change(number, action):
    """Run an action in a child that is killed just before it changes the disk for the nth time."""
    code = exit_code(start(_act_until_change, number, action))
    assert code in {0, -signal.SIGKILL}
    return code == -signal.SIGKILL


def _run(action, *arguments):
    faulthandler.dump_traceback_later(_PATIENCE, exit=True)
    action(*arguments)


def _changes_the_disk(event, arguments):
    if event == "open":
        return arguments[2] & (os.O_WRONLY | os.O_RDWR)
    return event in {"os.mkdir", "os.rename", "os.remove", "fcntl.flock"}


def _act_until_change(number, action):
    changes = 0

    def watch(event, arguments):
        nonlocal changes
        if _changes_the_disk(event, arguments):
            changes += 1
            if changes == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    action()
