"""Trainings that are killed, and go on to the very bytes of one that was not."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from filterpress import checkpoints, stages
from filterpress.checkpoints import Checkpoint, Course, name_of
from filterpress.errors import BudgetError, ScratchError
from filterpress.progress import shown_by
from filterpress.scratch import DirectoryScratch, open_scratch
from filterpress.stages import searching
from filterpress.tasks import ImageClassification
from filterpress.training import FitConfig, fit
from tests import tiny
from tests.disks import largest_file
from tests.test_training import checksum, easy_task, small_net

SGD = FitConfig(epochs=4, batch_size=16, lr=0.01, precision="float32")
CONFIGS = {
    "sgd": SGD,
    "plain sgd": FitConfig(epochs=4, batch_size=16, lr=0.02, momentum=0.0, precision="float32"),
    "adamw": FitConfig(epochs=4, batch_size=16, lr=0.003, optimizer="adamw", precision="float32"),
}


class KilledError(BaseException):
    """Stands for a kill: nothing is done after it."""


class Killing:
    """Kills a training in an epoch, and notes the epochs that were trained."""

    def __init__(self, epoch=None):
        self.epoch, self.trained = epoch, []

    def __call__(self, epoch, step, n_steps, loss):
        if step == 2 and epoch == self.epoch:
            raise KilledError
        if step == n_steps:
            self.trained.append(epoch)


class Rising(ImageClassification):
    """A task whose score rises with every epoch, so that the last one is kept."""

    def score(self, predict, split):
        ((images, labels),) = self.batches(split, self.size(split))
        return float(predict(images).softmax(1)[torch.arange(len(labels)), labels].mean())


@pytest.fixture
def task():
    easy = easy_task()
    return Rising(**{field.name: getattr(easy, field.name) for field in fields(easy)})


@pytest.fixture
def scratch(tmp_path):
    return open_scratch(str(tmp_path / "scratch"))


def network():
    """A network that draws random numbers, has channels and counts what it has seen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Dropout(0.3), nn.Conv2d(1, 1, 3, 1, 1), small_net())


def every_epoch(scratch, name="training"):
    return Checkpoint(scratch, name, share=1.0)


def killed(made, task, config, checkpoint, epoch, **more):
    with pytest.raises(KilledError):
        fit(made, task, config, seed=3, checkpoint=checkpoint, progress=Killing(epoch), **more)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_training_that_was_killed_ends_with_the_same_bytes(config, task, scratch):
    undisturbed = network()
    torch.manual_seed(0)
    expected = fit(undisturbed, task, config, seed=3)
    assert expected.epoch == 4
    for epoch in range(config.epochs):
        torch.manual_seed(epoch)  # the global state must not matter
        made, then = network(), Killing()
        killed(made, task, config, every_epoch(scratch, str(epoch)), epoch)
        made = network()
        result = fit(
            made, task, config, seed=3, checkpoint=every_epoch(scratch, str(epoch)), progress=then
        )
        assert then.trained == list(range(epoch, config.epochs))
        assert result == expected
        assert checksum(made) == checksum(undisturbed)


def test_a_checkpoint_changes_nothing_and_may_be_killed_again_and_again(task, scratch):
    undisturbed, made = network(), network()
    expected = fit(undisturbed, task, SGD, seed=3)
    for epoch in range(4):
        killed(network(), task, SGD, every_epoch(scratch), epoch)
    assert fit(made, task, SGD, seed=3, checkpoint=every_epoch(scratch)) == expected
    assert checksum(made) == checksum(undisturbed)
    assert fit(network(), task, SGD, seed=3, checkpoint=every_epoch(scratch, "new")) == expected


def test_the_best_epoch_may_be_one_before_the_kill(task, scratch):
    class Planned:
        input_shape, n_classes = task.input_shape, task.n_classes
        batches, size, loss = task.batches, task.size, task.loss

        def __init__(self, scores):
            self.scores = iter(scores)

        def score(self, predict, split):
            return next(self.scores)

    undisturbed, made = network(), network()
    scores = [0.5, 0.9, 0.7, 0.8]
    expected = fit(undisturbed, Planned(scores), SGD, seed=3)
    killed(network(), Planned(scores), SGD, every_epoch(scratch), 3)
    result = fit(made, Planned(scores[3:]), SGD, seed=3, checkpoint=every_epoch(scratch))
    assert result == expected == (0.9, 2, tuple(scores))
    assert checksum(made) == checksum(undisturbed)


def test_a_training_that_had_stopped_is_not_trained_further(task, scratch):
    stop = {"stop": lambda score: True}
    expected = fit(network(), task, SGD, seed=3, checkpoint=every_epoch(scratch), **stop)
    again, trained = network(), Killing()
    result = fit(
        again, task, SGD, seed=3, checkpoint=every_epoch(scratch), progress=trained, **stop
    )
    assert (result, trained.trained) == (expected, [])


def damage(kind, folder, task):
    """Make a checkpoint one that must not be used."""
    place = folder / "training.checkpoint"
    if kind == "another network":
        place.unlink()
        killed(
            nn.Sequential(nn.Flatten(), nn.Linear(36, 2)),
            task,
            SGD,
            every_epoch(DirectoryScratch(folder)),
            1,
        )
    elif kind == "another training":
        killed(network(), task, SGD, every_epoch(DirectoryScratch(folder), "other"), 1)
        (folder / "other.checkpoint").rename(place)
    elif kind == "no archive":
        place.write_bytes(b"no archive" * 100)
    elif kind == "empty":
        place.write_bytes(bytes(10240))
    else:
        data = bytearray(place.read_bytes())
        where = {"a weight": b"model/1.weight", "a score": b'"scores": [', "cut off": b"random/"}
        at = data.rindex(where[kind]) + len(where[kind])
        data[at] ^= 1
        place.write_bytes(data[:at] if kind == "cut off" else data)


DAMAGES = ("another network", "another training", "no archive", "empty")
DAMAGES += ("a weight", "a score", "cut off")


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_checkpoint_that_cannot_be_used_is_told_in_one_line_and_ignored(
    kind, task, scratch, tmp_path, caplog
):
    undisturbed, made, then = network(), network(), Killing()
    expected = fit(undisturbed, task, SGD, seed=3)
    killed(network(), task, SGD, every_epoch(scratch), 2)
    damage(kind, tmp_path / "scratch", task)
    with caplog.at_level(logging.WARNING):
        result = fit(made, task, SGD, seed=3, checkpoint=every_epoch(scratch), progress=then)
    (record,) = caplog.records
    assert record.getMessage().startswith("starting anew, the checkpoint cannot be used: ")
    assert "\n" not in record.getMessage()
    assert then.trained == [0, 1, 2, 3]
    assert result == expected
    assert checksum(made) == checksum(undisturbed)


def test_a_checkpoint_holds_nothing_pickled(task, scratch, tmp_path):
    killed(network(), task, CONFIGS["adamw"], every_epoch(scratch), 2)
    assert scratch.get("training.checkpoint", tmp_path / "unpacked")
    tensors = load_file(tmp_path / "unpacked" / "state.safetensors")
    state = json.loads((tmp_path / "unpacked" / "state.json").read_text())
    assert {path.name for path in (tmp_path / "unpacked").iterdir()} == {
        "state.safetensors",
        "state.json",
    }
    assert len(state["scores"]) == 2
    assert {name.partition("/")[0] for name in tensors} == {"model", "best", "optimizer", "random"}


def test_momentum_keeps_its_layout(scratch):
    """Arithmetic on another layout may round otherwise."""

    def course():
        layer = nn.Conv2d(3, 5, 3)
        return Course(layer, torch.optim.SGD(layer.parameters(), momentum=0.9), torch.Generator())

    before, after = course(), course()
    layout = torch.randn(5, 3, 3, 3).to(memory_format=torch.channels_last)
    before.optimizer.state[before.model.weight]["momentum_buffer"] = layout
    before.best = before.model.state_dict()
    every_epoch(scratch).save(before, 2)
    every_epoch(scratch).restore(after)
    momentum = after.optimizer.state[after.model.weight]["momentum_buffer"]
    assert momentum.equal(layout)
    assert momentum.stride() == layout.stride()


def test_who_watches_is_told_of_every_epoch(task, scratch):
    told = []

    def watch(epoch, step, n_steps, loss):
        if step == 1:
            told.append(scratch.read("training.progress"))

    result = fit(
        network(), task, SGD, seed=3, checkpoint=Checkpoint(scratch, "training"), progress=watch
    )
    told.append(scratch.read("training.progress"))
    assert told[0] is None
    for epoch, text in enumerate(told[1:], start=1):
        wanted = {"epoch": epoch, "epochs": 4, "scores": list(result.scores[:epoch])}
        assert json.loads(text) == wanted


@pytest.mark.parametrize(("lasts", "written"), [(0.001, [1, 2, 3, 4]), (0.1, [1, 3]), (1, [1])])
def test_checkpoints_are_written_so_often_that_they_cost_little(
    lasts, written, task, tmp_path, monkeypatch
):
    clock, put = [0.0], []
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: clock[0])

    class Slow(DirectoryScratch):
        def put(self, name, folder):
            put.append(len(json.loads((folder / "state.json").read_text())["scores"]))
            clock[0] += lasts

    def an_epoch_lasts_a_second(epoch, step, n_steps, loss):
        clock[0] += 1 / n_steps

    checkpoint = Checkpoint(Slow(tmp_path / "scratch"), "training")
    fit(network(), task, SGD, seed=3, checkpoint=checkpoint, progress=an_epoch_lasts_a_second)
    assert put == written


def test_a_place_that_cannot_be_written_ends_the_training_with_one_line(task, tmp_path):
    (tmp_path / "scratch").touch()
    checkpoint = every_epoch(open_scratch(str(tmp_path / "scratch")))
    with pytest.raises(ScratchError, match=r"cannot read .*training.checkpoint: Not a directory"):
        fit(network(), task, SGD, seed=3, checkpoint=checkpoint)


def test_a_full_disk_ends_the_training_with_one_line(task, scratch):
    with largest_file(1000), pytest.raises(ScratchError, match=r"^cannot write a checkpoint in "):
        fit(network(), task, SGD, seed=3, checkpoint=every_epoch(scratch))


def test_what_cannot_be_removed_is_a_warning(tmp_path, caplog):
    (tmp_path / "scratch").touch()
    every_epoch(open_scratch(str(tmp_path / "scratch"))).delete()
    assert "cannot delete" in caplog.text


def test_a_training_is_named_by_all_that_it_depends_on(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.json").write_text(name)
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")
    given = ("retrain", {"seed": 0}, [tmp_path / "one", tmp_path / "two"], str(weights))
    names = {name_of(*given)}
    for place, other in enumerate(("train", {"seed": 1}, [tmp_path / "two", tmp_path / "one"], "")):
        names.add(name_of(*given[:place], other, *given[place + 1 :]))
    weights.write_bytes(b"others")
    names.add(name_of(*given))
    (tmp_path / "one" / "model.json").write_text("changed")
    names.add(name_of(*given))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "another")
        names.add(name_of(*given))
    assert len(names) == 8
    (tmp_path / "two").rename(tmp_path / "elsewhere")
    moved = [tmp_path / "one", tmp_path / "elsewhere"]
    assert name_of(*given[:2], moved, given[3]) in names


class Mortal(tiny.Patterns):
    """Whoever trains on it is killed after as many epochs as the environment says."""

    epochs = 0  # since the environment says so; one task serves all trainings of a process

    def batches(self, split, batch_size, *, generator=None, device="cpu"):
        self.epochs = self.epochs + (generator is not None) if "DIE_IN" in os.environ else 0
        for batch in super().batches(split, batch_size, generator=generator, device=device):
            yield batch
            if generator is not None and str(self.epochs) == os.environ.get("DIE_IN"):
                raise KilledError


def mortal(data, data_dir, image_size):
    return Mortal()


GIVEN = {"model": "tests.tiny:network", "task": "tests.test_checkpoints:mortal"}


def contents(package):
    return {path.name: path.read_bytes() for path in package.iterdir()}


@pytest.fixture(params=["directory", "bucket"])
def uri(request, tmp_path):
    """Address of an empty place, of each kind."""
    if request.param == "bucket":
        return request.getfixturevalue("bucket")
    return str(tmp_path / "scratch")


def test_a_stage_that_was_killed_goes_on_and_leaves_nothing_behind(
    uri, tmp_path, monkeypatch, caplog
):
    given = GIVEN | {"config": tiny.TRAINED}
    stages.train(tmp_path / "undisturbed", **given)
    name = name_of("train", training_of(given), [])
    names = [f"{name}.checkpoint", f"{name}.progress"]
    monkeypatch.setenv("DIE_IN", "3")
    with pytest.raises(KilledError):
        stages.train(tmp_path / "out", scratch=uri, **given)
    assert all(open_scratch(uri).read(name) for name in names)
    monkeypatch.delenv("DIE_IN")
    shown = {}

    def display(description, total):
        shown[description] = [total]
        return contextlib.nullcontext(lambda n=1: shown[description].append(n))

    with caplog.at_level(logging.INFO), shown_by(display):
        stages.train(tmp_path / "out", scratch=uri, **given)
    total, first, *others = shown["train"]
    assert first > total / 6  # of six epochs, where the training went on
    assert (set(others), first + sum(others)) == ({1}, total)
    assert "epoch 1 of 6" not in caplog.text
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert not any(open_scratch(uri).read(name) for name in names)


def training_of(given):
    """Return all settings of a training, as given or as they are without."""
    defaults = {"data": "digits", "data_dir": "", "image_size": 0, "seed": 0}
    return defaults | given


def test_a_network_that_is_taken_as_it_is_needs_no_checkpoint(tmp_path):
    stages.train(tmp_path / "one", **GIVEN, config=tiny.TRAINED)
    weights = str(tmp_path / "one" / "weights.safetensors")
    stages.train(tmp_path / "two", **GIVEN, weights=weights, scratch=str(tmp_path / "scratch"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize(
    ("stage", "size", "config"),
    [
        (stages.prune, "12x", {"method": "saliency", "steps": 2, "epochs": 2, "rate": 0.5}),
        (stages.prune, "12x", {"method": "threshold", "learning_epochs": 2, "epochs": 2}),
        (stages.prune, "12x", {"method": "macs", "epochs": 4}),
        (stages.reduce, "5x", {"method": "joint", "epochs": 4}),
    ],
    ids=["saliency", "threshold", "macs", "joint"],
)
@pytest.mark.parametrize("died", [2, 4])
def test_a_method_that_was_killed_goes_on_in_the_same_training(
    stage, size, config, died, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(Checkpoint.__init__, "__defaults__", (1.0,))  # after every epoch
    scratch = tmp_path / "scratch"
    quick = json.dumps(config | {"batch_size": 64, "precision": "float32"})
    given = {"task": GIVEN["task"], "max_size": size, "config": quick}
    with tiny.one_thread():
        stages.train(tmp_path / "train", **GIVEN, config=tiny.TRAINED)
        stage(tmp_path / "train", tmp_path / "undisturbed", **given)
        monkeypatch.setenv("DIE_IN", str(died))
        with pytest.raises(KilledError):
            stage(tmp_path / "train", tmp_path / "out", scratch=str(scratch), **given)
        monkeypatch.delenv("DIE_IN")
        caplog.clear()
        with caplog.at_level(logging.INFO):
            stage(tmp_path / "train", tmp_path / "out", scratch=str(scratch), **given)
    trained = [r for r in caplog.messages if r.startswith("epoch ")]
    assert len(trained) == 5 - died
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert not [path for path in scratch.rglob("*") if path.is_file()]


def test_a_search_that_was_killed_goes_on_in_its_retraining(tmp_path, monkeypatch, caplog):
    save = Checkpoint.save

    def save_and_die(*given):
        save(*given)
        raise KilledError

    monkeypatch.setattr(searching, "FIRST", 40.0)  # a size that does not do without retraining
    with tiny.one_thread():
        stages.train(tmp_path / "train", **GIVEN, config=tiny.TRAINED)
        retrain = json.dumps(json.loads(tiny.TRAINED) | {"epochs": 2, "margin": 0.05})
        settings = {"max_size": "smallest", "min_accuracy": "-0pp", "task": GIVEN["task"]}
        settings |= {"max_retrains": 1, "max_minutes": 0, "retrain_config": retrain}
        packages = (tmp_path / "train", tmp_path / "train", tmp_path / "search")
        scratch = str(tmp_path / "scratch")
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "save", save_and_die)
            with pytest.raises(KilledError):
                stages.search(*packages, **settings, scratch=scratch)
        with caplog.at_level(logging.INFO), contextlib.suppress(BudgetError):
            stages.search(*packages, **settings, scratch=scratch)
    assert "going on after epoch 1, from a checkpoint" in caplog.text
