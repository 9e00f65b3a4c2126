"""Stages that train in two processes: one dies, one hangs, and what goes on afterwards."""

from __future__ import annotations

import json
import os
import signal
from statistics import mean

import pytest
from torch import nn

from filterpress import stages
from tests import tiny
from tests.in_two import under_torchrun

pytestmark = pytest.mark.slow

MODULE = "tests.test_together"
TASK = f"{MODULE}:task"
CONFIG = json.dumps({"epochs": 4, "batch_size": 64, "precision": "float32"})
TRAIN = ("train", "--model", f"{MODULE}:network", "--task", TASK, "--config", CONFIG)
NEVER_CONTENT = json.dumps(json.loads(CONFIG) | {"margin": 0.05})


def network(input_shape, n_classes):
    """The tiny network, in which each process draws random numbers of its own."""
    return nn.Sequential(nn.Dropout(0.1), *tiny.network(input_shape, n_classes))


class Faulty(tiny.Patterns):
    """Where the environment says so, the process of rank 1 gets a signal in its second epoch."""

    epochs = 0

    def batches(self, split, batch_size, *, generator=None, device="cpu"):
        self.epochs += generator is not None
        for number, batch in enumerate(
            super().batches(split, batch_size, generator=generator, device=device)
        ):
            if generator is not None and (self.epochs, number) == (2, 1):
                self.signal()
            yield batch

    def signal(self):
        if os.environ.get("RANK") == "1" and "SEND" in os.environ:
            os.kill(os.getpid(), int(os.environ["SEND"]))


def task(data, data_dir, image_size):
    return Faulty()


def contents(package):
    return {path.name: path.read_bytes() for path in package.iterdir()}


def epochs_told(lines):
    return [line.split()[1] for line in lines if line.startswith("epoch ")]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Packages of a trained network, and of the same made smaller."""
    root = tmp_path_factory.mktemp("packages")
    given = {"task": TASK}
    with tiny.one_thread():
        stages.train(root / "train", model=f"{MODULE}:network", config=CONFIG, **given)
        stages.reduce(root / "train", root / "reduce", max_size="40x", **given)
        stages.evaluate(root / "reduce", root / "evaluate", max_size="40x", **given)
    return root


def test_a_training_whose_worker_was_killed_under_torchrun_goes_on(in_two, tmp_path):
    scratch = ("--scratch", tmp_path / "scratch")
    undisturbed = in_two(*TRAIN, "--out", tmp_path / "undisturbed")
    assert [code for code, _, _ in undisturbed] == [0, 0]
    ended = under_torchrun(*TRAIN, *scratch, "--out", tmp_path / "out", SEND=str(signal.SIGKILL))
    assert ended.returncode != 0
    assert "Signal 9 (SIGKILL) received" in ended.stderr
    assert epochs_told(ended.stderr.splitlines()) == ["1"]
    assert [path.name for path in tmp_path.iterdir()] == ["undisturbed", "scratch"]
    (progress,) = (tmp_path / "scratch").glob("*.progress")
    assert json.loads(progress.read_text())["epoch"] == 1
    again, _ = in_two(*TRAIN, *scratch, "--out", tmp_path / "out")
    assert again[0] == 0, again[2]
    assert "going on after epoch 1, from a checkpoint" in again[2]
    assert epochs_told(again[2]) == ["2", "3", "4"]
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert not any((tmp_path / "scratch").iterdir())


def test_a_retraining_whose_worker_was_killed_goes_on(in_two, evaluated, tmp_path):
    given = ("--model", evaluated / "evaluate", "--trained", evaluated / "train")
    how = ("--task", TASK, "--max-size", "40x", "--min-accuracy", "-0pp", "--config", NEVER_CONTENT)
    retrain = ("retrain", *given, *how)
    scratch = ("--scratch", tmp_path / "scratch", "--out", tmp_path / "out")
    in_two(*retrain, "--out", tmp_path / "undisturbed")
    main, other = in_two(*retrain, *scratch, SEND=str(signal.SIGKILL))
    assert (main[0], other[0]) == (2, -signal.SIGKILL), main[2]
    assert epochs_told(main[2]) == ["1"]
    assert main[2][-1].startswith("error: another of the 2 processes died or does not answer: ")
    main, other = in_two(*retrain, *scratch)
    assert (main[0], other) == (0, (0, "", []))
    assert epochs_told(main[2]) == ["2", "3", "4"]
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert tiny.history(tmp_path / "out")[-1]["epochs"] == 4


def test_one_process_goes_on_from_the_checkpoint_of_two(in_two, tmp_path, caplog):
    scratch = {"scratch": str(tmp_path / "scratch")}
    in_two(*TRAIN, "--scratch", scratch["scratch"], "--out", tmp_path / "out", SEND="9")
    given = {"model": f"{MODULE}:network", "task": TASK, "config": CONFIG}
    with tiny.one_thread(), caplog.at_level("INFO"):
        report = stages.train(tmp_path / "out", **given, **scratch)
    assert epochs_told(caplog.messages) == ["2", "3", "4"]
    assert report["validation_accuracy"] > 0.8


def test_nobody_waits_long_for_a_process_that_hangs(in_two, tmp_path):
    main, other = in_two(*TRAIN, "--out", tmp_path / "out", SEND=str(signal.SIGSTOP), patience=2)
    assert main[0] == 2
    assert main[2][-1].startswith("error: another of the 2 processes died or does not answer: ")
    assert other[0] == -signal.SIGKILL  # by this test, at its end
    assert list(tmp_path.iterdir()) == []


def test_two_processes_reach_the_score_of_one_within_the_noise(in_two, tmp_path):
    """The noise of a share of 200 images, without that of the seeds."""
    scores = []
    for seed in range(3):
        with tiny.one_thread():
            given = {"model": f"{MODULE}:network", "task": TASK, "config": CONFIG, "seed": seed}
            alone = stages.train(tmp_path / f"one-{seed}", **given)["validation_accuracy"]
        main, _ = in_two(*TRAIN, "--seed", seed, "--json", "--out", tmp_path / f"two-{seed}")
        scores.append((alone, json.loads(main[1])["validation_accuracy"]))
    one, two = map(mean, zip(*scores, strict=True))
    assert min(one, two) > 0.9
    assert abs(one - two) < 3 * (2 * one * (1 - one) / tiny.SIZES["validation"]) ** 0.5
    assert any(one != two for one, two in scores)  # they are other networks
