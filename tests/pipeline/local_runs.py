"""Runs of the pipeline on kfp.local, one process a step, as the tests of its paths look at them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import NamedTuple

from tests import tiny

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny.ROOT)}
#: What is told of a step: its place, its name, its number where a name is used twice, its end.
STEP = re.compile(r"(?:[\w-]+/)?([a-z-]+?)(?:-\d+)? +(done|reused|passed on|failed)\b")


class Ended(NamedTuple):
    """What a command left on its standard output and its standard error."""

    code: int
    report: dict
    steps: list[tuple[str, str]]
    last_line: str

    @property
    def did(self):
        """The steps that did something."""
        return [step for step, end in self.steps if end != "passed on"]


def command(name, settings, out):
    return [sys.executable, "pipeline.py", name, *tiny.flags(settings), "--out", str(out)]


def run(settings, out, name="run"):
    ended = subprocess.run(
        [*command(name, settings, out), "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tiny.ROOT,
        env=ENVIRONMENT,
    )
    lines = ended.stderr.splitlines()
    steps = [found.groups() for found in map(STEP.match, lines) if found]
    report = json.loads(ended.stdout) if ended.stdout else {}
    return Ended(ended.returncode, report, steps, lines[-1])
