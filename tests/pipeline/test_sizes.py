"""The pipeline on kfp.local where it looks for sizes itself: the smallest file, and a sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from filterpress.loop import compress
from tests import tiny
from tests.pipeline.local_runs import run
from tests.tiny import RUNS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All sizes are looked for in one folder, so that steps with the same inputs are done once."""
    return tmp_path_factory.mktemp("pipeline") / "run"


def test_the_pipeline_finds_the_smallest_file_that_the_library_finds(folder, tmp_path):
    settings = RUNS["at once"] | {"max_size": "smallest", "max_minutes": 0}
    ended = run(settings | {"store": str(tmp_path / "release")}, folder)
    assert ended.code == 0, ended.last_line
    assert ended.did == ["check", "train", "prune", "search", "evaluate", "publish", "report"]
    with tiny.one_thread():
        assert ended.report["sha256"] == compress(tmp_path / "library", **settings)["sha256"]


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
