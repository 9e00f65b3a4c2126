"""The pipeline on kfp.local, one process a step, along every path of the loop."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from filterpress import stages
from filterpress.loop import compress
from filterpress.release import rollout
from tests import tiny
from tests.tiny import PATHS, RUNS

pytestmark = pytest.mark.slow
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny.ROOT)}
#: What is told of a step: its place, its name, its number where a name is used twice, its end.
STEP = re.compile(r"(?:[\w-]+/)?([a-z-]+?)(?:-\d+)? +(done|reused|passed on|failed)\b")


class Ended(NamedTuple):
    code: int
    report: dict
    steps: list[tuple[str, str]]
    last_line: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All paths are run in one folder, so that steps with the same inputs are done once."""
    return tmp_path_factory.mktemp("pipeline") / "run"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    out = tmp_path_factory.mktemp("weights") / "package"
    given = {name: tiny.COMMON[name] for name in ("model", "task")}
    with tiny.one_thread():
        stages.train(out, **given, config=tiny.TRAINED)
    return str(out / "weights.safetensors")


def run(settings, out, command="run"):
    ended = subprocess.run(
        [sys.executable, "pipeline.py", command, *tiny.flags(settings), "--out", out, "--json"],
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


def id_of_the_run(store):
    """Return what made the release, as its channel says."""
    root = (store.parent / "keys" / "root.json").read_bytes()
    made_by = rollout.read(str(store), root=root).content["run"]
    assert made_by.isdecimal()  # as kfp.local draws it
    return made_by


@pytest.mark.parametrize("name", PATHS)
def test_the_pipeline_takes_the_path_that_the_library_takes(name, folder, weights, tmp_path):
    path, decision = PATHS[name]
    for left in ("report.json", "report.html", "model.fpk"):
        (folder / left).unlink(missing_ok=True)
    settings = RUNS[name] | {"store": str(tmp_path / "release")}
    settings |= {"weights": weights} if "round" in name else {}
    code, report, steps, last_line = run(settings, folder)
    left = json.loads((folder / "report.json").read_text())
    package = Path(left["package"])
    published = decision == "publish"
    assert code == (0 if published else 1), last_line
    did = [step for step, end in steps if end != "passed on"]
    assert did == ["check", *path, "publish" if published else "give-up", "report"]
    assert tiny.stages_of(package) == path
    assert tiny.history(package)[-1]["decision"] == decision
    if published:
        assert left == report
        tiny.check_published(folder, settings, package, report)
        assert id_of_the_run(Path(report["release"])) in (folder / "run.log").read_text()
        return
    numbers = [left["n_bytes"], left["max_bytes"], f"{left['validation_accuracy']:.4f}"]
    assert last_line.startswith("error: not published: ")
    assert all(str(number) in last_line for number in numbers)
    assert report == {}
    assert not (tmp_path / "release").exists()
    assert not (folder / "model.fpk").exists()
    page = (folder / "report.html").read_text()
    assert ("Over the size budget" if decision == "too-big" else "Given up") in page


def test_the_pipeline_finds_the_smallest_file_that_the_library_finds(folder, tmp_path):
    for left in ("report.json", "report.html", "model.fpk"):
        (folder / left).unlink(missing_ok=True)
    settings = RUNS["at once"] | {"max_size": "smallest", "max_minutes": 0}
    code, report, steps, last_line = run(settings | {"store": str(tmp_path / "release")}, folder)
    assert code == 0, last_line
    did = [step for step, end in steps if end != "passed on"]
    assert did == ["check", "train", "prune", "search", "evaluate", "publish", "report"]
    with tiny.one_thread():
        assert report["sha256"] == compress(tmp_path / "library", **settings)["sha256"]


def test_a_sweep_finds_at_each_size_what_the_library_finds(folder, tmp_path):
    settings = {k: v for k, v in RUNS["retrained"].items() if k not in ("max_size", "max_rounds")}
    sizes = {"4x": "publish", "850": "give-up"}
    given = settings | {"sizes": json.dumps(list(sizes)), "min_accuracy": "-2pp"}
    code, report, steps, last_line = run(given, folder, "sweep")
    assert code == 0, last_line
    assert [step for step, _ in steps][:3] == ["check", "train", "prune"]
    assert steps[-1] == ("curve", "done")
    assert [entry["decision"] for entry in report["tries"]] == list(sizes.values())
    assert report["sha256"] == report["tries"][0]["sha256"]
    assert "The smallest that keeps the floor" in Path(report["html"]).read_text()
    alone = {**settings, "min_accuracy": "-2pp", "max_size": "4x", "max_rounds": 1}
    with tiny.one_thread():
        assert report["sha256"] == compress(tmp_path / "library", **alone)["sha256"]


def test_a_pipeline_that_was_killed_goes_on_after_its_last_step(tmp_path):
    settings, out = RUNS["at once"], tmp_path / "run"
    with (tmp_path / "told").open("w+") as told:
        killed = subprocess.Popen(
            [sys.executable, "pipeline.py", "run", *tiny.flags(settings), "--out", str(out)],
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
