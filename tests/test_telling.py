"""The page of a whole run, made of what its steps have left."""

from __future__ import annotations

import json
import os
import re

import pytest

from filterpress import stages
from filterpress.errors import PackageError
from filterpress.package import FORMAT
from filterpress.scratch import open_scratch

HISTORY = [
    {"stage": "train", "n_bytes": 96_000, "validation_accuracy": 0.96, "ratio": 1.0},
    {"stage": "evaluate", "n_bytes": 8_000, "validation_accuracy": 0.95, "ratio": 12.0, "round": 1},
]
RELEASE = {
    "n_bytes": 8_000,
    "ratio": 12.0,
    "target": "models/net/3.fpk",
    "release_counter": 3,
    "store": "gs://models",
    "channel": "",
    "delta_bytes": 0,
}
RUN = "filterpress/one-run"
DESCRIBED = {
    **{"format": FORMAT, "model": "net", "input_shape": [1, 8, 8], "n_classes": 10, "inputs": {}},
    **{"layers": {}, "baseline": {}, "forms": {}, "weights_sha256": "00"},
}


@pytest.fixture(params=["directory", "bucket"])
def root(request, tmp_path):
    """Where the artifacts of all runs are."""
    return str(tmp_path) if request.param == "directory" else request.getfixturevalue("bucket")


def leave(root, decision, *, step="evaluate/1", run=RUN):
    history = [*HISTORY[:-1], {**HISTORY[-1], "decision": decision}]
    model = json.dumps({"model": "net", "history": history}).encode()
    open_scratch(f"{root}/{run}").write(f"{step}/evaluated/model.json", model)


def leave_receipt(root):
    model = json.dumps({"model": "net", "history": HISTORY}).encode()
    scratch = open_scratch(f"{root}/{RUN}")
    scratch.write("publish/2/release/report.json", json.dumps(RELEASE).encode())
    scratch.write("publish/2/release/story.json", model)


def tell(root, tmp_path, **how):
    page = tmp_path / "told" / "page.html"
    told = stages.report(f"{root}/{RUN}/report/7/page", page, **how)
    text = page.read_text(encoding="utf-8")
    assert f">{told['verdict']}<" in text
    return told["verdict"], text


@pytest.mark.parametrize("state", ["SUCCEEDED", "COMPLETE", "RUNNING", "FAILED", "CANCELLED"])
def test_a_run_that_published_tells_its_release_whatever_state_lags_behind(state, root, tmp_path):
    leave_receipt(root)  # alone, as where the evaluation is that of an earlier run
    verdict, page = tell(root, tmp_path, state=state)
    assert verdict == "Published as release 3: 8,000 bytes, 12.0 times smaller."
    assert 'class="good"' in page
    assert "models/net/3.fpk" in page
    assert "evaluate, round 1" in page
    assert "Channel" not in page  # it named none


def test_a_run_that_gave_up_tells_the_numbers_of_its_last_measurement(root, tmp_path):
    leave(root, "retrain")
    leave(root, "give-up", step="evaluate-2/2")
    verdict, page = tell(root, tmp_path, state="FAILED", error="Task exit-handler-1 failed.")
    assert verdict == (
        "Nothing published. Given up: not accurate enough: 8,000 bytes, 12.0 times smaller."
    )
    assert 'class="open"' in page


def test_the_last_measurement_is_the_one_written_last_whatever_its_name(tmp_path):
    leave(tmp_path, "too-big", step="evaluate/1")
    leave(tmp_path, "retrain", step="evaluate-2/2")
    early = tmp_path / RUN / "evaluate-2/2/evaluated/model.json"
    os.utime(early, ns=(0, 0))
    verdict, _ = tell(tmp_path, tmp_path, state="FAILED")
    assert verdict.startswith("Nothing published. Over the size budget")


@pytest.mark.parametrize("decision", ["retrain", "next", "publish"])
def test_a_step_that_failed_is_told_as_kubeflow_tells_it(root, tmp_path, decision):
    leave(root, decision)
    verdict, page = tell(root, tmp_path, state="FAILED", error="OOMKilled.")
    assert verdict == (
        "Failed after evaluate, round 1, and nothing published: OOMKilled. "
        "The log of the step that failed says more."
    )
    assert 'class="open"' in page
    assert "12.0x" in page


def test_a_run_that_failed_before_a_measurement_tells_the_story_up_to_there(root, tmp_path):
    model = json.dumps({"model": "net", "history": HISTORY[:1]}).encode()
    open_scratch(f"{root}/{RUN}").write("train/1/trained/model.json", model)
    verdict, page = tell(root, tmp_path, state="FAILED")
    assert verdict.startswith("Failed after train, and nothing published. The log of the step")
    assert "96,000" in page


@pytest.mark.parametrize("decision", ["next", "give-up", "too-big"])
def test_a_run_that_was_cancelled_is_not_put_down_to_its_numbers(decision, tmp_path):
    leave(tmp_path, decision)
    verdict, _ = tell(tmp_path, tmp_path, state="CANCELLED")
    assert verdict == "Cancelled after evaluate, round 1, and nothing published."


def test_what_other_runs_left_is_not_of_this_one(root, tmp_path):
    leave(root, "give-up", run="filterpress/another-run")
    verdict, _ = tell(root, tmp_path, state="FAILED", error="Task run failed.")
    assert verdict.startswith("Failed, and nothing published: Task run failed. The log")


@pytest.mark.parametrize("state", ["SUCCEEDED", "COMPLETE", "RUNNING", "FAILED"])
def test_where_the_steps_left_their_pages_out_of_reach_the_page_says_so(state, tmp_path):
    verdict, _ = tell("minio://mlpipeline/v2", tmp_path, state=state)
    unknown = f"Whether it published is not known here: the steps are said to be {state}. The"
    assert verdict.startswith("Published. The" if state in ("SUCCEEDED", "COMPLETE") else unknown)
    assert f"in minio://mlpipeline/v2/{RUN}, which cannot be read here." in verdict


@pytest.fixture
def packages(tmp_path):
    """Three sizes of one network, of which two keep the floor."""

    def make(name, n_bytes, validation, decision):
        last = {
            **HISTORY[-1],
            **{"n_bytes": n_bytes, "ratio": 96_000 / n_bytes, "validation_accuracy": validation},
            **{"decision": decision, "accuracy": validation - 0.01, "min_accuracy": 0.95},
        }
        path = tmp_path / name
        path.mkdir()
        described = DESCRIBED | {"history": [HISTORY[0], last]}
        (path / "model.json").write_text(json.dumps(described))
        return path

    return [
        make("b", 8_000, 0.955, "publish"),
        make("a", 16_000, 0.96, "publish"),
        make("c", 4_000, 0.80, "give-up"),
    ]


def test_a_sweep_tells_all_sizes_and_the_smallest_that_keeps_the_floor(packages, tmp_path):
    told = stages.curve(packages, tmp_path / "page.html")
    assert [entry["n_bytes"] for entry in told["tries"]] == [16_000, 8_000, 4_000]
    assert told["n_bytes"] == 8_000
    page = (tmp_path / "page.html").read_text()
    assert ">The smallest that keeps the floor: 8,000 bytes, 12.0 times smaller, 94.50 %" in page
    assert re.findall(r'<td class="n">([\d,]+,000)</td>', page)[:3] == ["16,000", "8,000", "4,000"]
    assert re.search(r'"mark last".*?<title>(.*?)</title>', page)[1].startswith("2 try 2: 8,000")


def test_a_sweep_in_which_no_size_keeps_the_floor_says_so(packages, tmp_path):
    told = stages.curve(packages[2:], tmp_path / "page.html")
    assert "n_bytes" not in told
    assert ">None of 1 sizes keeps the floor.<" in (tmp_path / "page.html").read_text()


def test_a_sweep_of_nothing_or_of_what_was_not_measured_is_refused(packages, tmp_path):
    with pytest.raises(ValueError, match="packages must be at least one, got none"):
        stages.curve([], tmp_path / "page.html")
    described = DESCRIBED | {"history": HISTORY[:1]}
    (packages[0] / "model.json").write_text(json.dumps(described))
    with pytest.raises(PackageError, match="must be an evaluated one"):
        stages.curve(packages, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
