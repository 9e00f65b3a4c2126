"""The pipeline on kfp.local, one process a step, along every path of the loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from filterpress import stages
from filterpress.release import rollout
from tests import tiny
from tests.pipeline.local_runs import run
from tests.tiny import PATHS, RUNS

pytestmark = pytest.mark.slow


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
    ended = run(settings, folder)
    left = json.loads((folder / "report.json").read_text())
    package = Path(left["package"])
    published = decision == "publish"
    assert ended.code == (0 if published else 1), ended.last_line
    assert ended.did == ["check", *path, "publish" if published else "give-up", "report"]
    assert tiny.stages_of(package) == path
    assert tiny.history(package)[-1]["decision"] == decision
    if published:
        assert left == ended.report
        tiny.check_published(folder, settings, package, left)
        assert id_of_the_run(Path(left["release"])) in (folder / "run.log").read_text()
        return
    numbers = [left["n_bytes"], left["max_bytes"], f"{left['validation_accuracy']:.4f}"]
    assert ended.last_line.startswith("error: not published: ")
    assert all(str(number) in ended.last_line for number in numbers)
    assert ended.report == {}
    assert not (tmp_path / "release").exists()
    assert not (folder / "model.fpk").exists()
    page = (folder / "report.html").read_text()
    assert ("Over the size budget" if decision == "too-big" else "Given up") in page
