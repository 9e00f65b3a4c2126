"""The search for the smallest file that keeps the floor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from filterpress import stages
from filterpress.errors import BudgetError
from filterpress.loop import compress
from filterpress.stages.searching import CLOSE, LEAST, Try, next_ratio
from tests import tiny

SMALLEST = tiny.RUNS["at once"] | {"max_size": "smallest"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with tiny.one_thread():
        yield


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A trained package and a pruned one."""
    out = tmp_path_factory.mktemp("packages")
    task = {"task": tiny.COMMON["task"]}
    stages.train(out / "train", model=tiny.COMMON["model"], config=tiny.TRAINED, **task)
    stages.prune(out / "train", out / "prune", **task)
    return out / "prune", out / "train"


def search(packages, out, **given):
    settings = {k: v for k, v in SMALLEST.items() if k in ("task", "min_accuracy", "max_size")}
    return stages.search(*packages, out, **(settings | {"max_retrains": 0} | given))


def tried(ratio, threshold, gained=1.0):
    decision = "publish" if ratio <= threshold else "give-up"
    return Try(ratio, Path(), {"decision": decision, "ratio": ratio * gained})


@pytest.mark.parametrize("threshold", np.geomspace(2.01, 900, 40))
@pytest.mark.parametrize("gained", [1.0, 1.02, 1.04])
def test_the_threshold_is_found_within_the_gap_allowed(threshold, gained):
    tries = []
    while (ratio := next_ratio(tries, most=1000)) is not None:
        assert LEAST < ratio < 1000
        tries.append(tried(ratio, threshold, gained))
        assert len(tries) < 20
    best = max(t.ratio for t in tries if t.passed)
    if threshold < 500:  # below the last doubling
        assert best <= threshold <= best * CLOSE * gained


def test_no_size_is_tried_twice():
    tries = []
    while (ratio := next_ratio(tries, most=1e6)) is not None:
        assert ratio not in {t.ratio for t in tries}
        tries.append(tried(ratio, 37.0))


def test_a_network_that_no_size_suits_is_given_up_soon():
    tries = []
    while (ratio := next_ratio(tries, most=1e6)) is not None:
        tries.append(tried(ratio, 0.0))
    assert [t.ratio for t in tries] == [8, 4, 2]


def test_sizes_below_the_format_alone_are_not_tried():
    assert next_ratio([tried(8, 1e9)], most=10) is None


def test_a_size_that_is_given_needs_no_search(packages, tmp_path):
    report = search(packages, tmp_path / "out", max_size="12x")
    assert report["state"] == "too-big"
    assert tiny.history(tmp_path / "out") == tiny.history(packages[0])


def test_the_smallest_file_that_passed_is_handed_on_with_all_that_was_tried(packages, tmp_path):
    report = search(packages, tmp_path / "out")
    told = tiny.history(tmp_path / "out")
    assert told[-1] == report
    assert report["state"] == "fits"
    passed = [t for t in report["tries"] if t["decision"] == "publish"]
    failed = [t for t in report["tries"] if t["decision"] != "publish"]
    assert report["n_bytes"] == min(t["n_bytes"] for t in passed)
    assert (tmp_path / "out" / "model.fpk").stat().st_size == report["n_bytes"]
    floor = told[0]["validation_accuracy"] - 0.08
    assert report["validation_accuracy"] >= floor
    assert max(t["max_bytes"] for t in failed) >= report["n_bytes"] / CLOSE - 1
    encoded = (tmp_path / "out" / "model.fpk").read_bytes()
    assert tiny.accuracy_by_hand(encoded, "validation") == report["validation_accuracy"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_no_second_size_is_begun_without_time(packages, tmp_path):
    report = search(packages, tmp_path / "out", max_minutes=0)
    assert len(report["tries"]) == 1
    assert report["ratio"] >= 8


def test_a_floor_that_no_size_keeps_is_told_with_every_try(packages, tmp_path):
    baseline = tiny.history(packages[1])[0]["validation_accuracy"]
    task = {"task": "tests.test_searching:hopeless", "min_accuracy": str(baseline)}
    with pytest.raises(BudgetError, match="no size tried keeps the floor") as caught:
        search(packages, tmp_path / "out", **task)
    assert str(caught.value).count(" bytes, 0.0000, give-up") == 3
    assert not any(tmp_path.iterdir())


class Hopeless(tiny.Patterns):
    """A task at which every network fails."""

    def score(self, predict, split):
        return 0.0


def hopeless(data, data_dir, image_size):
    return Hopeless()


def test_a_run_publishes_what_the_search_found(tmp_path):
    report = compress(tmp_path / "run", **SMALLEST, max_minutes=0)
    searched = json.loads((tmp_path / "run" / "search" / "report.json").read_text())
    assert report["sha256"] == searched["sha256"]
    path = ["train", "prune", *tiny.ROUND, "search", "evaluate"]
    assert tiny.stages_of(tmp_path / "run" / "round-1" / "evaluate") == path
    settings = SMALLEST | {"max_size": str(searched["max_bytes"])}
    tiny.check_published(tmp_path / "run", settings, Path(report["package"]), report)
    assert "Sizes tried" in (tmp_path / "run" / "report.html").read_text()


def test_a_stage_that_needs_a_size_says_that_none_was_searched(packages, tmp_path):
    its_task = tiny.COMMON["task"]
    with pytest.raises(ValueError, match="max_size must be a size before the stage search"):
        stages.cluster(packages[0], tmp_path / "out", max_size="smallest", task=its_task)
