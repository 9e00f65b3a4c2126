"""Stages in several real processes: of this machine, and as the machines of a job."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from filterpress import launching, node, stages
from filterpress.errors import DataError, FilterpressError, ScratchError
from filterpress.launching import torchrun
from filterpress.launching.work import Work, fetch
from filterpress.scratch import DirectoryScratch, open_scratch
from tests import tiny
from tests.launching.conftest import TINY, contents
from tests.launching.trainer_server import run_for_real

TASK = {"task": "tests.tiny:task"}


UNREACHABLE = """
import os
from filterpress.errors import DataError
from tests.tiny import task as patterns

def task(data, data_dir, image_size):
    if os.environ.get("RANK") == "1":
        raise DataError("no data here")
    return patterns(data, data_dir, image_size)
"""


class Witnessed(tiny.Patterns):
    """Data that leaves the number of each process that reads it."""

    def __init__(self, data, data_dir, image_size):
        super().__init__()
        (Path(data_dir) / str(os.getpid())).touch()


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluated")
    stages.reduce(trained, root / "reduced", max_size="20x", **TASK)
    stages.evaluate(root / "reduced", root / "evaluated", max_size="20x", **TASK)
    return root / "evaluated"


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setenv("PET_NPROC_PER_NODE", "2")
    monkeypatch.setenv("PET_NNODES", "2")  # as on machines of Trainer; here there is one
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.slow
def test_two_machines_give_the_bytes_that_two_processes_of_one_give(
    cluster, two, evaluated, trained, tmp_path, caplog, capfd
):
    caplog.set_level(logging.INFO)
    cluster.play = run_for_real
    given = {**TASK, "max_size": "20x", "min_accuracy": "-0pp", "config": '{"epochs": 2}'}
    given["scratch"] = str(tmp_path / "scratch")
    here = stages.retrain(evaluated, trained, tmp_path / "here", **given)
    assert "reducer.cpp" not in capfd.readouterr().err
    there = stages.retrain(evaluated, trained, tmp_path / "there", **given, nodes=2)
    assert here == there == json.loads((tmp_path / "there" / "report.json").read_text())
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    assert here["epochs"] >= 1
    assert contents(tmp_path / "scratch") == {}
    (job,) = cluster.made
    assert cluster.deleted == [job["metadata"]["name"]]
    assert "node: 2 active, 2 ready" in caplog.text
    assert "epoch 1 of 2: validation" in caplog.text


@pytest.mark.slow
def test_the_process_that_fails_first_says_why_and_nothing_is_written(two, tmp_path, monkeypatch):
    """They find the modules that this process finds, and no others of their working directory."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "unreachable.py").write_text(UNREACHABLE)
    (tmp_path / "queue.py").write_text("raise ImportError('of the working directory')")
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    monkeypatch.syspath_prepend(tiny.ROOT)
    monkeypatch.chdir(tmp_path)
    given = {**TINY, "task": "unreachable:task"}
    with pytest.raises(FilterpressError, match=r"^no data here$"):
        stages.train(tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_stage_that_is_ended_takes_its_processes_along(two, tmp_path):
    given = {
        **{"model": "tests.tiny:network", "task": "tests.launching.test_processes:Witnessed"},
        **{"config": '{"epochs": 1000000}', "data-dir": tmp_path, "out": tmp_path / "out"},
    }
    flags = [f"--{name}={value}" for name, value in given.items()]
    command = [sys.executable, "-m", "filterpress", "train", *flags]
    started = subprocess.Popen(command, cwd=tiny.ROOT, stderr=subprocess.PIPE)
    for line in started.stderr:
        if b"epoch 1 of" in line:
            break
    numbers = [int(file.name) for file in tmp_path.iterdir()]
    started.terminate()
    started.stderr.close()
    assert started.wait(30) == 128 + signal.SIGTERM
    assert len(numbers) == 2
    assert not any(Path(f"/proc/{number}").exists() for number in numbers)


def test_processes_are_counted_as_torchrun_does(monkeypatch):
    monkeypatch.delenv("PET_NPROC_PER_NODE", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert launching.processes_here() == 4
    assert launching.is_elsewhere(1)
    monkeypatch.setenv("PET_NPROC_PER_NODE", "1")
    assert not launching.is_elsewhere(1)
    assert launching.is_elsewhere(2)
    monkeypatch.setenv("PET_NPROC_PER_NODE", "gpu")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert launching.processes_here() == 1


def test_a_process_that_torchrun_started_trains_itself(monkeypatch):
    monkeypatch.setenv("PET_NPROC_PER_NODE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launching.is_elsewhere(1)
    assert not launching.is_elsewhere(2)


@pytest.fixture
def failure(tmp_path):
    def failure(rank, exitcode, said=""):
        file = tmp_path / f"{rank}.json"
        if said:
            file.write_text(json.dumps({"message": said, "timestamp": 0}))
            time.sleep(0.01)
        return ProcessFailure(rank, 100 + rank, exitcode, str(file))

    return failure


def test_the_reason_is_what_was_said_first(failure):
    found = {1: failure(1, 2, "the first"), 0: failure(0, 2, "the second"), 2: failure(2, -15)}
    assert torchrun.reason_of(found) == "the first"


def test_a_process_that_was_killed_is_the_reason_whatever_others_say(failure):
    found = {0: failure(0, 2, "another process is gone"), 1: failure(1, -9)}
    assert torchrun.reason_of(found).startswith("process 1 was ended by SIGKILL: often there was")


def test_a_process_that_aborts_is_the_reason_only_where_nobody_says_more(failure):
    told, aborted = failure(0, 2, "lower lr"), failure(1, -6)
    assert torchrun.reason_of({0: told, 1: aborted}) == "lower lr"
    assert torchrun.reason_of({0: failure(2, -15), 1: aborted}) == "process 1 was ended by SIGABRT"


def test_a_process_that_crashes_is_the_reason_and_memory_is_not_blamed(failure):
    found = {0: failure(0, 2, "another process is gone"), 1: failure(1, -11)}
    assert torchrun.reason_of(found) == "process 1 was ended by SIGSEGV"


def test_a_process_that_says_nothing_is_named(failure):
    assert torchrun.reason_of({3: failure(3, 7)}) == "process 3 ended with exit code 7"


def test_files_and_packages_reach_the_machines_as_they_are(tmp_path, trained):
    scratch = open_scratch(str(tmp_path / "scratch"))
    weights = trained / "weights.safetensors"
    settings = {"seed": 3, "data": "image-folder:$(HOME)/$x"}
    work = Work("train", {"model": trained, "weights": weights}, settings, "training")
    text = work.put(scratch, "name")
    assert "$" not in text  # which Kubernetes would replace in arguments
    stage, arguments = fetch(text, scratch, "name", tmp_path / "there")
    assert stage == "train"
    assert contents(arguments["model"]) == contents(trained)
    assert arguments["weights"].name == weights.name
    assert arguments["weights"].read_bytes() == weights.read_bytes()
    assert settings.items() <= arguments.items()
    work.clear(scratch, "name")
    assert contents(tmp_path / "scratch") == {}


def test_machines_that_find_no_inputs_say_so(tmp_path, trained):
    scratch = open_scratch(str(tmp_path / "scratch"))
    work = Work("retrain", {"model": trained}, {}, "training")
    text = work.put(scratch, "name")
    work.clear(scratch, "name")
    with pytest.raises(DataError, match="has no name/model: it was removed meanwhile"):
        fetch(text, scratch, "name", tmp_path / "there")


def test_of_the_machines_that_fail_the_first_leaves_its_error(tmp_path, capsys):
    scratch = open_scratch(str(tmp_path))
    for config in ('{"epochs": 0}', '{"lr": -1}'):
        with pytest.raises(typer.Exit):
            node.main(str(tmp_path), "name", json.dumps(["train", {}, {**TINY, "config": config}]))
    assert scratch.read("name/error") == b"epochs must be at least 1, got 0"
    assert capsys.readouterr().err.count("error: ") == 2


def test_an_error_that_cannot_be_left_is_said_all_the_same(tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise ScratchError("cannot write")

    monkeypatch.setattr(DirectoryScratch, "_writing", broken)
    with pytest.raises(typer.Exit):
        node.main(str(tmp_path), "name", json.dumps(["train", {}, {**TINY, "config": "{"}]))
    said = capsys.readouterr().err
    assert said.startswith("error: config must be")
    assert "cannot write" not in said


def test_machines_run_no_other_stage(tmp_path, capsys):
    with pytest.raises(typer.Exit):
        node.main(str(tmp_path), "name", json.dumps(["publish", {}, {}]))
    assert "stage must be one of ('train', 'retrain'), got 'publish'" in capsys.readouterr().err


def test_what_one_machine_trains_is_what_its_launcher_gets(tmp_path, trained):
    scratch = open_scratch(str(tmp_path / "scratch"))
    node.main(scratch.uri, "name", Work("train", {}, TINY, "training").put(scratch, "name"))
    assert scratch.get("name/out", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(trained)
