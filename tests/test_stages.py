"""Each stage as a function, from package to package."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from filterpress import package, reporting, stages
from filterpress.codec import decode, encode, make_delta
from filterpress.errors import BudgetError, DataError, ModelError, PackageError, ReleaseError
from filterpress.release import create_keys, fetch, latest, publish_network, rollout
from tests import tiny
from tests.in_two import under_torchrun
from tests.tiny import FILES

TASK = {"task": "tests.tiny:task"}
TIGHT = {"max_size": "900"}
NONE = '{"method": "none"}'
RETRAIN = json.dumps({"epochs": 8, "lr": 0.02, "batch_size": 64, "precision": "float32"})
COMMON_NUMBERS = {
    *(
        "stage",
        "n_bytes",
        "baseline_bytes",
        "ratio",
        "accuracy",
        "baseline_accuracy",
        "n_parameters",
    ),
    *("macs", "decision", "round", "retrains", "sha256"),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with tiny.one_thread():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Packages of one run, each made by the stage it is named after."""
    root = tmp_path_factory.mktemp("stages")
    stages.train(root / "train", model="tests.tiny:network", config=tiny.TRAINED, **TASK)
    stages.prune(root / "train", root / "prune", **TASK)
    stages.cluster(root / "prune", root / "cluster", **TIGHT, **TASK)
    stages.reduce(root / "cluster", root / "reduce", **TIGHT, **TASK)
    stages.evaluate(root / "reduce", root / "evaluate", min_accuracy="0.973", **TIGHT, **TASK)
    stages.retrain(
        root / "evaluate", root / "train", root / "retrain", min_accuracy="0.973", config=RETRAIN,
        **TIGHT, **TASK,
    )  # fmt: skip
    stages.evaluate(root / "retrain", root / "good", min_accuracy="0.973", **TIGHT, **TASK)
    return root


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("publisher") / "keys"
    create_keys(folder)
    return folder


@pytest.fixture
def publish(made, keys, tmp_path):
    def publish(model="good", out="receipt", **thresholds):
        wanted = {"max_size": "900", "min_accuracy": "0.973"} | thresholds
        store, given = str(tmp_path / "store"), {**TASK, **wanted, "keys": str(keys)}
        model = made / model if isinstance(model, str) else model
        return stages.publish(model, tmp_path / out, store=store, **given)

    return publish


def report_of(path):
    return json.loads((path / "report.json").read_text())


def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize("name", ["train", "prune", "cluster", "reduce", "evaluate", "retrain"])
def test_every_report_has_the_numbers_that_all_have(made, name):
    report = report_of(made / name)
    assert set(report) >= COMMON_NUMBERS
    assert report["stage"] == name
    assert report["ratio"] == report["baseline_bytes"] / report["n_bytes"]
    assert tiny.history(made / name)[-1] == report


@pytest.mark.parametrize("name", ["prune", "cluster", "reduce", "retrain"])
def test_the_size_in_a_report_is_that_of_the_file_which_the_next_evaluation_writes(
    made, name, tmp_path
):
    stages.evaluate(made / name, tmp_path / "out", max_size="1x", min_accuracy="0", **TASK)
    encoded = (tmp_path / "out" / "model.fpk").read_bytes()
    assert report_of(made / name)["n_bytes"] == len(encoded)
    assert report_of(made / name)["sha256"] == hashlib.sha256(encoded).hexdigest()


SETTLED = [
    (stages.cluster, "reduce", {"state": "fits"}),
    (stages.reduce, "reduce", {"state": "fits"}),
    *((stages.evaluate, "good", {"state": state}) for state in ("publish", "next", "give-up")),
    *(
        (stages.retrain, "good", {"decision": decision})
        for decision in ("publish", "next", "give-up", "too-big")
    ),
]


@pytest.mark.parametrize(
    ("stage", "name", "state"), SETTLED, ids=lambda v: getattr(v, "__name__", str(v))
)
def test_a_stage_with_nothing_left_to_do_copies_its_package(stage, name, state, made, tmp_path):
    sources = [made / name] + ([made / "train"] if stage is stages.retrain else [])
    told = stage(*sources, tmp_path / "out", **state, **TASK)
    assert contents(tmp_path / "out") == contents(made / name)
    assert told == report_of(made / name) | {"passed_on": True} | (
        state if stage is stages.reduce else {}
    )


@pytest.mark.parametrize(
    ("stage", "state"),
    [
        (stages.cluster, {"state": "publish"}),
        (stages.reduce, {"state": ""}),
        (stages.evaluate, {"state": "Publish"}),
        (stages.retrain, {"decision": "fits"}),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_a_state_that_does_not_exist_is_refused(stage, state, made, tmp_path):
    sources = [made / "good"] + ([made / "train"] if stage is stages.retrain else [])
    with pytest.raises(ValueError, match="state must be one of"):
        stage(*sources, tmp_path / "out", **state, **TASK)
    assert not (tmp_path / "out").exists()


def test_a_trained_network_is_taken_bit_by_bit(made, tmp_path):
    weights = made / "train" / "weights.safetensors"
    given = {"model": "tests.tiny:network", "weights": str(weights), **TASK}
    report = stages.train(tmp_path / "same", **given)
    assert report["trained"] is False
    ours, theirs = (
        load_file(p / "weights.safetensors") for p in (made / "train", tmp_path / "same")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    numbers = {"accuracy", "validation_accuracy", "n_bytes", "macs"}
    before = report_of(made / "train")
    assert {k: report[k] for k in numbers} == {k: before[k] for k in numbers}


def test_training_goes_on_from_weights_when_it_is_told_how(made, tmp_path):
    weights = made / "train" / "weights.safetensors"
    config = json.dumps({**json.loads(tiny.TRAINED), "epochs": 1, "lr": 0.01})
    given = {"model": "tests.tiny:network", "weights": str(weights), **TASK}
    assert stages.train(tmp_path / "more", config=config, **given)["trained"] is True
    ours, theirs = (
        load_file(p / "weights.safetensors") for p in (made / "train", tmp_path / "more")
    )
    assert not torch.equal(ours["0.weight"], theirs["0.weight"])


def test_an_evaluation_is_that_of_the_file_it_wrote(made):
    report, encoded = report_of(made / "evaluate"), (made / "evaluate" / "model.fpk").read_bytes()
    assert report["n_bytes"] == len(encoded)
    assert report["sha256"] == hashlib.sha256(encoded).hexdigest()
    assert report["validation_accuracy"] == tiny.accuracy_by_hand(encoded, "validation")
    assert report["accuracy"] == tiny.accuracy_by_hand(encoded, "test")


def test_a_baseline_is_the_trained_network_in_floats(made):
    network = package.load(made / "train").network
    images, labels = tiny.Patterns().sets["test"]
    with torch.no_grad():
        right = int((network(images).argmax(1) == labels).sum())
    for name in ("train", "evaluate"):
        assert report_of(made / name)["baseline_accuracy"] == right / len(labels)
        assert report_of(made / name)["baseline_bytes"] == 4 * sum(
            p.numel() for p in network.parameters()
        )


@pytest.mark.parametrize(
    ("limits", "decision"),
    [
        ({"max_size": "2000", "min_accuracy": "0.5"}, "publish"),
        ({"max_size": "2000", "min_accuracy": "-0pp"}, "retrain"),
        ({"max_size": "2000", "min_accuracy": "-0pp", "retrains": 2}, "next"),
        ({"max_size": "2000", "min_accuracy": "-0pp", "retrains": 2, "round": 2}, "give-up"),
        ({"max_size": "780", "min_accuracy": "0.5"}, "too-big"),
    ],
)
def test_an_evaluation_decides_by_both_thresholds_and_what_is_left_to_try(
    limits, decision, made, tmp_path
):
    assert (
        stages.evaluate(made / "reduce", tmp_path / "out", **limits, **TASK)["decision"] == decision
    )


def test_a_network_that_is_too_big_says_so_and_comes_as_small_as_it_got(made, tmp_path):
    report = stages.reduce(
        made / "prune", tmp_path / "out", max_size="900", config='{"max_shrink": 2}', **TASK
    )
    assert report["state"] == "too-big"
    assert 900 < report["n_bytes"] < 0.6 * report_of(made / "prune")["n_bytes"]


def test_a_network_fits_to_the_byte_and_is_encoded_once_for_it(made, tmp_path, monkeypatch):
    def encode(source, network, encode=package.encode):
        encoded.append(network)
        return encode(source, network)

    encoded = []
    monkeypatch.setattr(package, "encode", encode)
    n_bytes = report_of(made / "prune")["n_bytes"]
    for out, limit, state in (("fits", n_bytes, "fits"), ("too-big", n_bytes - 1, "too-big")):
        report = stages.reduce(
            made / "prune", tmp_path / out, max_size=str(limit), config=NONE, **TASK
        )
        assert (report["state"], report["max_bytes"]) == (state, limit)
        _, *of_the_result = encoded  # the first is for the least size that there is
        assert len(of_the_result) == 1
        encoded.clear()


def test_the_method_none_passes_the_network_on_in_every_stage(made, tmp_path):
    expected = package.load(made / "train")
    for stage, given in {"prune": {}, "cluster": TIGHT, "reduce": TIGHT}.items():
        out = tmp_path / stage
        report = getattr(stages, stage)(made / "train", out, config=NONE, **given, **TASK)
        assert (report["stage"], report["method"]) == (stage, "none")
        passed = package.load(out)
        assert package.encode(passed, passed.network) == package.encode(expected, expected.network)
    out = tmp_path / "retrain"
    stages.retrain(made / "evaluate", made / "train", out, config=NONE, **TIGHT, **TASK)
    for file in FILES:
        assert (out / file).read_bytes() == (made / "evaluate" / file).read_bytes()


def test_a_preset_configures_every_stage_and_a_config_goes_over_it(made, tmp_path):
    report = stages.prune(made / "train", tmp_path / "0", preset="post-training", **TASK)
    assert report["method"] == "none"
    for out, config, method in (
        ("1", "{}", "project"),
        ("2", '{"method": "quantize"}', "quantize"),
    ):
        report = stages.reduce(
            made / "prune", tmp_path / out, preset="post-training", config=config, **TIGHT, **TASK
        )
        assert report["method"] == method
    with pytest.raises(ValueError, match=r"preset must be one of .*post-training.*, got 'fast'"):
        stages.reduce(made / "prune", tmp_path / "3", preset="fast", **TIGHT, **TASK)


def test_a_quantised_network_can_be_made_smaller_again(made, tmp_path):
    limit = {"max_size": "800", "round": 2}
    report = stages.reduce(made / "good", tmp_path / "out", **limit, **TASK)
    assert report["state"] == "fits"
    assert report["n_bytes"] <= 900


@pytest.mark.parametrize("method", ["share", "kernels"])
def test_weights_are_shared_in_another_way_in_a_second_round(method, made, tmp_path):
    given = {"config": json.dumps({"method": method}), "max_size": "2200", **TASK}
    first = stages.cluster(made / "prune", tmp_path / "1", **given)
    stays = stages.cluster(tmp_path / "1", tmp_path / "stays", **given)
    other = stages.cluster(tmp_path / "1", tmp_path / "other", round=2, **given)
    assert "allocation" not in stays  # it fits, and has not failed
    assert stays["sha256"] == first["sha256"]
    assert other["allocation"] != first["allocation"]
    assert max(first["n_bytes"], other["n_bytes"]) <= 2200


def test_a_budget_for_less_than_the_format_needs_names_the_smallest_one(made, tmp_path):
    with pytest.raises(ValueError, match="max_size must be at least") as raised:
        stages.reduce(made / "prune", tmp_path / "out", max_size="100", **TASK)
    least = int(str(raised.value).split("at least ")[1].split()[0])
    stages.reduce(made / "prune", tmp_path / "out", max_size=str(least), **TASK)
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        stages.reduce(made / "prune", tmp_path / "less", max_size=str(least - 1), **TASK)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_retraining_stops_when_it_is_accurate_enough(made):
    before, after = report_of(made / "evaluate"), report_of(made / "retrain")
    assert before["validation_accuracy"] < 0.973
    assert after["epochs"] < 8
    assert after["trained_validation_accuracy"] >= 0.974
    assert report_of(made / "good")["decision"] == "publish"


def test_retraining_does_not_touch_its_sources(made, tmp_path):
    before = {name: contents(made / name) for name in ("evaluate", "train")}
    given = {"min_accuracy": "0.5", "config": '{"epochs": 1, "batch_size": 64}', **TIGHT, **TASK}
    stages.retrain(made / "evaluate", made / "train", tmp_path / "out", **given)
    assert {name: contents(made / name) for name in ("evaluate", "train")} == before


def test_publication_releases_the_evaluated_bytes_signed(publish, made, keys, tmp_path):
    report, root = publish(), (keys / "root.json").read_bytes()
    released = latest(str(tmp_path / "store"), root=root)
    encoded = fetch(str(tmp_path / "store"), released.target, root=root)
    assert encoded == (made / "good" / "model.fpk").read_bytes()
    assert report["sha256"] == hashlib.sha256(encoded).hexdigest()
    assert report["target"] == released.target
    assert released.custom["validation_accuracy"] == str(report["validation_accuracy"])
    assert report_of(tmp_path / "receipt") == report
    story = (tmp_path / "receipt" / "story.json").read_bytes()
    assert story == (made / "good" / "model.json").read_bytes()


def test_publication_is_idempotent(publish, tmp_path):
    first = publish()
    before = {p: p.read_bytes() for p in (tmp_path / "store").rglob("*") if p.is_file()}
    second = publish(out="receipt-2")
    assert (first["created"], second["created"]) == (True, False)
    assert {k: v for k, v in first.items() if k != "created"} == {
        k: v for k, v in second.items() if k != "created"
    }
    assert {p: p.read_bytes() for p in (tmp_path / "store").rglob("*") if p.is_file()} == before


def test_publication_lets_a_channel_name_the_release(publish, keys, tmp_path):
    report = publish(min_accuracy="0.5", channel="cam-v2/canary", percent=12.5, run="run-7")
    root = (keys / "root.json").read_bytes()
    given = {"hardware": "cam-v2", "channel": "canary"}
    channel = rollout.read(str(tmp_path / "store"), root=root, **given)
    assert report["channel"] == channel.path
    names = ("target", "release_counter", "sha256", "n_bytes")
    assert {name: channel.content[name] for name in names} == {name: report[name] for name in names}
    assert channel.content["rollout"]["percent_bp"] == 1250
    assert channel.content["run"] == "run-7"
    assert (report["release_counter"], report["delta_bytes"]) == (1, 0)


def test_publication_without_a_channel_releases_only(publish, keys, tmp_path):
    report = publish(min_accuracy="0.5", channel="")
    assert report["channel"] == ""
    with pytest.raises(ReleaseError, match="has no channel any/stable"):
        rollout.read(str(tmp_path / "store"), root=(keys / "root.json").read_bytes())


def test_a_second_publication_says_how_many_bytes_its_delta_has(publish, made, keys, tmp_path):
    new = (made / "good" / "model.fpk").read_bytes()
    tensors, graph, header = decode(new)
    name, tensor = max(tensors.items(), key=lambda item: item[1].integers.size)
    moved = tensor._replace(
        integers=tensor.integers
        + (np.arange(tensor.integers.size) == 0).reshape(tensor.integers.shape)
    )
    old = encode({**tensors, name: moved}, graph, header)
    given = {"custom": {}, "store": str(tmp_path / "store"), "keys": keys}
    publish_network(old, name="filterpress", **given)
    report = publish(min_accuracy="0.5")
    assert report["release_counter"] == 2
    assert report["delta_bytes"] == len(make_delta(old, new)) < 0.7 * report["n_bytes"]


@pytest.mark.parametrize(
    "wrong", [{"channel": "stable"}, {"channel": "a/b/c"}, {"channel": "/x"}, {"percent": 101.0}]
)
def test_a_channel_that_cannot_be_is_refused_before_anything_is_released(wrong, publish, tmp_path):
    with pytest.raises(ValueError, match=r"(hardware|channel|percent) must be"):
        publish(min_accuracy="0.5", **wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def liar(made, tmp_path_factory):
    """A package that says it is accurate, and is not."""
    folder = tmp_path_factory.mktemp("made") / "liar"
    shutil.copytree(made / "evaluate", folder)
    description = json.loads((folder / "model.json").read_text())
    description["history"][-1] |= {"decision": "publish", "validation_accuracy": 1.0}
    (folder / "model.json").write_text(json.dumps(description))
    return folder


@pytest.mark.parametrize(
    ("model", "thresholds", "numbers"),
    [
        ("good", {"max_size": "780"}, "of 780 allowed"),
        ("liar", {"min_accuracy": "-0pp"}, "of 0.9800 needed"),
    ],
)
def test_publication_measures_the_thresholds_itself(
    model, thresholds, numbers, publish, liar, tmp_path
):
    with pytest.raises(BudgetError, match=numbers):
        publish(liar if model == "liar" else model, **thresholds)
    assert list(tmp_path.iterdir()) == []


def test_a_decision_to_publish_that_is_a_lie_does_not_publish(publish, liar, tmp_path):
    with pytest.raises(BudgetError, match=r"validation accuracy 0\.9"):
        publish(liar)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("at", [0, 100, -1])
def test_publication_refuses_a_file_that_is_not_the_evaluated_one(at, publish, made, tmp_path):
    shutil.copytree(made / "good", tmp_path / "other")
    encoded = bytearray((made / "good" / "model.fpk").read_bytes())
    encoded[at] ^= 1
    (tmp_path / "other" / "model.fpk").write_bytes(encoded)
    with pytest.raises(PackageError, match="must be the file that was evaluated"):
        publish(tmp_path / "other")
    assert not (tmp_path / "store").exists()


def test_publication_refuses_a_package_that_was_not_evaluated(publish, tmp_path):
    with pytest.raises(PackageError, match="must be an evaluated package"):
        publish("reduce")
    assert list(tmp_path.iterdir()) == []


def test_giving_up_raises_the_numbers(made):
    with pytest.raises(BudgetError, match=r"\d+ bytes of 900 allowed, .* of 0.9730 needed"):
        stages.give_up(made / "evaluate", max_size="900", min_accuracy="0.973")


def test_giving_up_on_what_is_good_enough_does_not_raise(made):
    report = stages.give_up(made / "good", max_size="900", min_accuracy="0.973")
    assert report["decision"] == "publish"


def test_the_page_tells_of_every_layer_what_became_of_it(made):
    page = reporting.render(json.loads((made / "evaluate" / "model.json").read_text()))
    table = page[page.index("<h2>Layers") :]
    head, *rows = (
        re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)
    )
    for title, column in zip(head, zip(*rows, strict=True), strict=True):
        assert any(column), f"nothing is ever told in the column {title}"
    changes = {row[0]: row[head.index("Changes")] for row in rows}
    for told in (entry for h in tiny.history(made / "evaluate") for entry in h.get("layers", [])):
        for fate in {"removed", "merged"} & set(told):
            assert f"{told[fate]:.0f} filter" in changes[told["name"]]
            assert fate in changes[told["name"]]
        if told.get("rank"):
            assert changes[told["name"]].endswith(f"projected to rank {told['rank']:.0f}")


@pytest.mark.parametrize(
    "stage",
    [stages.prune, stages.cluster, stages.reduce, stages.evaluate],
    ids=lambda s: s.__name__,
)
def test_a_network_meets_only_data_like_those_it_was_trained_on(stage, made, tmp_path):
    with pytest.raises(ModelError, match="images and classes like those"):
        stage(made / "train", tmp_path / "out", data="digits")
    assert not (tmp_path / "out").exists()


def test_a_stage_writes_over_nothing(made, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(PackageError, match="exists already"):
        stages.prune(made / "train", tmp_path, **TASK)
    with pytest.raises(PackageError, match="exists already"):
        stages.prune(made / "train", tmp_path / "mine", **TASK)
    assert contents(tmp_path) == {"mine": b"mine"}


def test_a_package_holds_only_what_a_package_has(made):
    for place in made.iterdir():
        evaluated = place.name in {"evaluate", "good"}
        assert set(contents(place)) == set(FILES if evaluated else FILES[:3])


def test_stages_depend_on_nothing_but_their_arguments(made, tmp_path):
    """The global generator and the files' dates make no difference."""
    torch.manual_seed(99)
    stages.cluster(made / "prune", tmp_path / "cluster", **TIGHT, **TASK)
    stages.reduce(tmp_path / "cluster", tmp_path / "reduce", **TIGHT, **TASK)
    assert contents(tmp_path / "reduce") == contents(made / "reduce")


def test_weights_of_another_network_are_refused(made, tmp_path):
    state = load_file(made / "train" / "weights.safetensors")
    state["0.weight"] = state["0.weight"][:8]
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"0\.weight has shape"):
        stages.train(
            tmp_path / "out",
            model="tests.tiny:network",
            weights=str(tmp_path / "w.safetensors"),
            **TASK,
        )
    assert not (tmp_path / "out").exists()


# Two processes, as torchrun starts them.

DIGITS = json.dumps({"epochs": 2, "batch_size": 64, "precision": "float32"})


class InTwo(tiny.Patterns):
    """A task that knows in which process it is."""

    def __init__(self, data, data_dir, image_size):
        super().__init__()
        self.other = os.environ.get("RANK") == "1"


class SlowDownload(InTwo):
    """Data that one process must fetch alone; the other looks late at what has been done."""

    def __init__(self, data, data_dir, image_size):
        super().__init__(data, data_dir, image_size)
        cache = Path(data_dir)
        if not (cache / "data").exists():
            (cache / "busy").mkdir()
            time.sleep(1.5)
            (cache / "data").touch()
        time.sleep(1.5 if self.other else 0)


class Unreachable(InTwo):
    """Data that rank 1 cannot read."""

    def __init__(self, data, data_dir, image_size):
        super().__init__(data, data_dir, image_size)
        if self.other:
            raise DataError("no data here")


class Poisoned(InTwo):
    """The second image of each batch to train on, one of rank 1, is no image."""

    def batches(self, split, batch_size, *, generator=None, device="cpu"):
        for images, labels in super().batches(split, batch_size, generator=generator):
            if generator is not None:
                images[1] = torch.nan
            yield images, labels


class Flattering(InTwo):
    """Rank 1 is content with everything."""

    def score(self, predict, split):
        return 1.0 if self.other else super().score(predict, split)


class Killed(InTwo):
    """The process of rank 1 dies in its second epoch."""

    epochs = 0

    def batches(self, split, batch_size, *, generator=None, device="cpu"):
        self.epochs += generator is not None
        if self.other and self.epochs == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield from super().batches(split, batch_size, generator=generator, device=device)


def train_on(kind, *more):
    """Write a command line that trains the tiny network."""
    given = ("--model", "tests.tiny:network", "--task", f"tests.test_stages:{kind.__name__}")
    return ("train", *given, *more)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Digits trained, made smaller and retrained; both trainings under torchrun."""
    root = tmp_path_factory.mktemp("digits")
    train = ("train", "--config", DIGITS, "--json", "--out")
    trained = under_torchrun(*train, root / "train")
    stages.reduce(root / "train", root / "reduce", max_size="20x")
    small = stages.evaluate(root / "reduce", root / "evaluate", max_size="20x")
    retrain = (
        *("retrain", "--model", root / "evaluate", "--trained", root / "train"),
        # a file that grows at all is made to fit again
        *("--max-size", small["n_bytes"], "--min-accuracy", "-0pp"),
        *("--config", DIGITS, "--json", "--out"),
    )
    retrained = under_torchrun(*retrain, root / "retrain")
    return root, {"train": (train, trained), "retrain": (retrain, retrained)}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "retrain"])
def test_under_torchrun_there_is_one_package_and_one_report(stage, digits):
    root, (_, done) = digits[0], digits[1][stage]
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == report_of(root / stage)
    assert done.stderr.count("epoch 1 of 2") == 1
    assert sorted(path.name for path in root.iterdir()) == [
        "evaluate",
        "reduce",
        "retrain",
        "train",
    ]
    assert package.load(root / stage).network(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "retrain"])
def test_under_torchrun_the_same_command_writes_the_same_bytes(stage, digits, in_two, tmp_path):
    root, (command, _) = digits[0], digits[1][stage]
    main, other = in_two(*command, tmp_path / "again")
    assert (main[0], other) == (0, (0, "", []))
    assert contents(tmp_path / "again") == contents(root / stage)


@pytest.mark.slow
def test_under_torchrun_retraining_makes_the_network_better(digits):
    root, _ = digits
    before, after = report_of(root / "evaluate"), report_of(root / "retrain")
    assert after["epochs"] == 2
    assert after["trained_validation_accuracy"] > before["validation_accuracy"]
    assert after["n_bytes"] <= before["n_bytes"]


@pytest.mark.slow
def test_one_of_two_processes_passes_a_package_on(in_two, made, tmp_path):
    given = ("--model", made / "good", "--trained", made / "train", "--decision", "publish")
    main, other = in_two("retrain", *given, "--json", "--out", tmp_path / "out")
    assert (main[0], other) == (0, (0, "", []))
    assert json.loads(main[1]) == report_of(made / "good") | {"passed_on": True}
    assert contents(tmp_path / "out") == contents(made / "good")


@pytest.mark.slow
def test_a_process_that_comes_late_meets_nothing_of_the_other(in_two, made, tmp_path):
    weights = ("--data-dir", tmp_path, "--weights", made / "train" / "weights.safetensors")
    results = in_two(*train_on(SlowDownload), *weights, "--out", tmp_path / "out")
    assert [(code, err) for code, _, err in results] == [(0, []), (0, [])]
    assert package.load(tmp_path / "out").history[-1]["trained"] is False


@pytest.mark.slow
def test_the_first_process_decides_when_to_stop(in_two, made, tmp_path):
    given = ("--model", made / "evaluate", "--trained", made / "train", "--config", RETRAIN)
    task = (
        "--task",
        "tests.test_stages:Flattering",
        "--max-size",
        "900",
        "--min-accuracy",
        "0.973",
    )
    main, other = in_two("retrain", *given, *task, "--out", tmp_path / "out")
    assert (main[0], other) == (0, (0, "", []))
    report = report_of(tmp_path / "out")
    assert report["epochs"] > 1
    assert 0.973 < report["trained_validation_accuracy"] < 1


REFUSED = [
    ({"epochs": 1}, "exists already: name another folder or remove it"),
    ({"batch_size": 3}, "batch_size must be at least 4, two for each of 2 processes, got 3"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "reason"), REFUSED, ids=["out", "batch_size"])
def test_both_processes_refuse_with_the_same_line(config, reason, in_two, made, tmp_path):
    out = tmp_path / "new" if "batch_size" in config else made / "train"
    before = contents(made / "train")
    main, other = in_two(*train_on(InTwo), "--config", json.dumps(config), "--out", out)
    (line,) = main[2]
    assert line.startswith("error: ")
    assert line.endswith(reason)
    assert main == other == (2, "", [line])
    assert contents(made / "train") == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_both_processes_report_a_loss_that_explodes_in_one(in_two, tmp_path):
    line = "error: the loss became nan while training; lower lr"
    results = in_two(*train_on(Poisoned, "--config", tiny.TRAINED, "--out", tmp_path / "out"))
    assert results == [(2, "", [line])] * 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "code", "told"), [(Killed, -signal.SIGKILL, 1), (Unreachable, 2, 0)]
)
def test_no_process_waits_for_one_that_is_gone(kind, code, told, in_two, tmp_path):
    main, other = in_two(*train_on(kind, "--config", tiny.TRAINED, "--out", tmp_path / "out"))
    assert other == (code, "", ["error: no data here"] if kind is Unreachable else [])
    assert main[:2] == (2, "")
    assert [line.split()[0] for line in main[2]] == ["epoch"] * told + ["error:"]
    assert list(tmp_path.iterdir()) == []
