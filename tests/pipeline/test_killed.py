"""The pipeline on kfp.local that was killed, and is run again."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from filterpress.loop import compress
from tests import tiny
from tests.pipeline.local_runs import ENVIRONMENT, command, run
from tests.tiny import RUNS

pytestmark = pytest.mark.slow


def test_a_pipeline_that_was_killed_goes_on_after_its_last_step(tmp_path):
    settings, out = RUNS["at once"], tmp_path / "run"
    with (tmp_path / "told").open("w+") as told:
        killed = subprocess.Popen(
            command("run", settings, out),
            stderr=told,
            cwd=tiny.ROOT,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        while "round-1/cluster " not in (tmp_path / "told").read_text():
            assert killed.poll() is None
            time.sleep(0.02)
        time.sleep(1)  # into the next step
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    stood = {p: p.stat().st_mtime_ns for p in out.rglob("*/clustered/*")}
    assert stood
    code, report, steps, _ = run(settings, out)
    assert code == 0
    ends = dict(steps)
    assert [ends[step] for step in ("train", "prune", "cluster")] == ["reused"] * 3
    assert ends["publish"] == "done"
    assert {p: p.stat().st_mtime_ns for p in stood} == stood
    with tiny.one_thread():
        assert report["sha256"] == compress(tmp_path / "library", **settings)["sha256"]
