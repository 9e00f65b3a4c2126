"""The loop with its real stages: every path through it, and every way to be killed."""

from __future__ import annotations

import json
import random
import signal

import pytest

from filterpress import stages
from filterpress.errors import BudgetError, PackageError
from filterpress.loop import compress
from tests import children, tiny
from tests.tiny import PATHS, RUNS

PUBLISHED = [name for name, (_, decision) in PATHS.items() if decision == "publish"]
GIVEN_UP = [name for name in PATHS if name not in PUBLISHED]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with tiny.one_thread():
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    out = tmp_path_factory.mktemp("weights") / "package"
    given = {name: tiny.COMMON[name] for name in ("model", "task")}
    stages.train(out, **given, config=tiny.TRAINED)
    return str(out / "weights.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory, weights):
    """Run the loop along one of its paths, once; returns folder, settings, report and error."""
    done = {}

    def run(name):
        if name not in done:
            out = tmp_path_factory.mktemp("runs") / "run"
            settings = RUNS[name] | ({} if "round" not in name else {"weights": weights})
            try:
                done[name] = out, settings, compress(out, **settings), None
            except BudgetError as error:
                done[name] = out, settings, json.loads((out / "report.json").read_text()), error
        return done[name]

    return run


def last_package(out):
    return max((path.parent for path in out.rglob("model.fpk") if path.parent != out), key=length)


def length(package):
    return len(tiny.history(package))


@pytest.mark.parametrize("name", PATHS)
def test_a_run_takes_the_path_that_its_settings_ask_for(run, name):
    out, _, report, _ = run(name)
    steps, decision = PATHS[name]
    package = last_package(out)
    assert tiny.stages_of(package) == steps
    assert tiny.history(package)[-1]["decision"] == report["decision"] == decision
    assert report["round"] == 1 + (len(steps) > steps.index("evaluate") + 4)
    assert report["retrains"] == steps.count("retrain")


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_published_is_what_was_measured_and_meets_both_thresholds(run, name):
    out, settings, report, error = run(name)
    assert error is None
    tiny.check_published(out, settings, last_package(out), report)
    assert json.loads((out / "report.json").read_text()) == report
    assert "Both thresholds hold" in (out / "report.html").read_text()


@pytest.mark.parametrize("name", GIVEN_UP)
def test_a_run_that_fails_says_so_in_numbers_and_publishes_nothing(run, name):
    out, _, report, error = run(name)
    numbers = [report["n_bytes"], report["max_bytes"], f"{report['validation_accuracy']:.4f}"]
    assert all(str(number) in str(error) for number in numbers)
    assert "\n" not in str(error)
    assert not (out / "release").exists()
    assert not (out / "model.fpk").exists()
    page = (out / "report.html").read_text()
    assert ("Over the size budget" if name == "never small enough" else "Given up") in page


def test_two_tries_get_smaller_than_one(run):
    told = tiny.history(last_package(run("smaller in two tries")[0]))
    first, second = (h for h in told if h["stage"] == "reduce")
    assert first["state"] == "too-big"
    assert second["state"] == "fits"
    assert second["n_bytes"] <= second["max_bytes"] < first["n_bytes"]


def test_the_second_round_tries_another_allocation(run):
    told = tiny.history(last_package(run("in the second round")[0]))
    first, second = (h for h in told if h["stage"] == "reduce")
    assert (first["round"], second["round"]) == (1, 2)
    assert first["allocation"] != second["allocation"]


def test_a_retrain_that_taught_nothing_leaves_the_network_as_it_was(run):
    out, *_ = run("in the second round")
    before, after = (out / "round-1" / name / "model.fpk" for name in ("evaluate", "evaluate-1"))
    assert before.read_bytes() == after.read_bytes()


def test_the_same_run_gives_the_same_bytes(run, tmp_path):
    out, settings, report, _ = run("retrained")
    again = compress(tmp_path / "again", **settings)
    assert again["sha256"] == report["sha256"]
    assert tiny.packages(tmp_path / "again") == tiny.packages(out)


def test_another_seed_gives_another_network(run, tmp_path):
    *_, report, _ = run("at once")
    other = compress(tmp_path / "other", **RUNS["at once"], seed=1)
    assert other["sha256"] != report["sha256"]


def test_a_finished_run_is_not_run_again(run):
    for name in ("at once", "never accurate"):
        out, settings, *_ = run(name)
        before = inodes(out)
        with pytest.raises(PackageError, match="finished run"):
            compress(out, **settings)
        assert inodes(out) == before


def test_a_folder_with_a_run_of_other_settings_is_left_alone(run):
    out, settings, *_ = run("at once")
    before = inodes(out)
    with pytest.raises(PackageError, match="other settings"):
        compress(out, **settings | {"seed": 7})
    assert inodes(out) == before


@pytest.mark.parametrize("name", [".git", "notes.txt", ".mine.partial"])
def test_a_folder_with_anything_in_it_is_left_alone(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(PackageError, match="exists already"):
        compress(tmp_path, **RUNS["at once"])
    assert [path.name for path in tmp_path.iterdir()] == [name]


# Kills. Each run is a process of its own.


class KillAtRename:
    """Kills the process before or after its nth rename, of those in scratch or of all others.

    Renames are what finishes a stage, and an epoch in scratch.
    """

    def __init__(self, number, after, in_scratch=False):
        self.left, self.after, self.in_scratch, self.renamed = number, after, in_scratch, False

    def __call__(self, event, arguments):
        renames = event == "os.rename" and ("/scratch/" in str(arguments[1])) == self.in_scratch
        self.left -= renames
        if self.renamed or (renames and not self.left and not self.after):
            signal.raise_signal(signal.SIGKILL)
        self.renamed = renames and not self.left


def inodes(root):
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in root.rglob("*")}


def finished(out):
    """Name the files of the packages that stand, none of them half."""
    places = [path.parent for path in out.rglob("report.json") if path.parent != out]
    for place in places:
        assert not place.name.startswith(".") or place.name.startswith(tuple(DRAFTS))
    whole = [place for place in places if not place.name.startswith(".")]
    for place in whole:
        wanted = {"report.json"} if place.name == "publish" else {"report.json", "model.json"}
        assert wanted <= {path.name for path in place.iterdir()}
    return {f: s for place in whole for f, s in inodes(place).items()}


DRAFTS = (".train-", ".prune-", ".cluster-", ".reduce-", ".evaluate", ".retrain-", ".publish-")


def check_same_result(out, expected):
    assert not [path for path in out.rglob("*") if path.name.startswith(DRAFTS)]
    assert tiny.packages(out) == tiny.packages(expected)
    report, wanted = (json.loads((o / "report.json").read_text()) for o in (out, expected))
    places = {"store", "release", "package", "html", "created"}
    assert {k: v for k, v in report.items() if k not in places} == {
        k: v for k, v in wanted.items() if k not in places
    }
    assert (out / "report.html").read_bytes() == (expected / "report.html").read_bytes()


@pytest.mark.slow
def test_a_run_killed_around_every_rename_goes_on_from_its_last_stage(run, tmp_path):
    expected, settings, *_ = run("retrained")
    out, kills, number, stood = tmp_path / "run", 0, 1, {}
    while not (out / "report.json").exists():
        # before a rename its work is lost, after it nothing is: then the next one has its turn
        after = bool(kills % 2)
        child = children.start(tiny.compress_in_child, out, settings, KillAtRename(number, after))
        assert children.exit_code(child) in {0, -signal.SIGKILL}
        now = finished(out)
        assert stood.items() <= now.items()
        number = 1 if now.keys() > stood.keys() else number + after
        stood = now
        kills += child.exitcode != 0
    assert kills > 2 * len(PATHS["retrained"][0])
    check_same_result(out, expected)
    tiny.check_published(
        out, settings, last_package(out), json.loads((out / "report.json").read_text())
    )


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(run, tmp_path):
    expected, settings, *_ = run("in the second round")
    out, chance, stood, kills = tmp_path / "run", random.Random(0), {}, 0
    while not (out / "report.json").exists():
        child = children.start(tiny.compress_in_child, out, settings)
        child.join(chance.uniform(0.1, 1.5) if kills < 8 else None)
        child.kill()
        child.join()
        assert child.exitcode in {0, -signal.SIGKILL}
        kills += child.exitcode != 0
        now = finished(out)
        assert stood.items() <= now.items()
        stood = now
    assert kills
    check_same_result(out, expected)


@pytest.mark.slow
def test_a_run_killed_in_training_goes_on_from_its_checkpoint(run, tmp_path, caplog):
    expected, settings, *_ = run("at once")
    kill = KillAtRename(4, True, in_scratch=True)
    child = children.start(tiny.compress_in_child, tmp_path / "run", settings, kill)
    assert children.exit_code(child) == -signal.SIGKILL
    with caplog.at_level("INFO"):
        compress(tmp_path / "run", **settings)
    assert "going on after epoch" in caplog.text
    assert "epoch 1 of" not in caplog.text
    check_same_result(tmp_path / "run", expected)
    assert not (tmp_path / "run" / "scratch").exists()


def test_a_draft_that_a_kill_left_is_not_a_package_and_is_cleared_away(run, tmp_path):
    before, settings, report, _ = run("at once")
    draft = tmp_path / ".train-abcdefgh"
    draft.mkdir()
    (draft / "report.json").write_text("{}")
    (tmp_path / "run.json").write_text((before / "run.json").read_text())
    assert compress(tmp_path, **settings)["sha256"] == report["sha256"]
    assert not draft.exists()
    assert tiny.packages(tmp_path) == tiny.packages(before)


def test_a_kill_before_the_settings_were_noted_does_not_block_the_folder(run, tmp_path):
    _, settings, report, _ = run("at once")
    (tmp_path / ".run.json.partial").write_text("{")
    assert compress(tmp_path, **settings)["sha256"] == report["sha256"]
