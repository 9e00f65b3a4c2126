"""Bad input of every kind: one clear line, exit code 2, and nothing written."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from filterpress import stages
from filterpress.__main__ import app
from tests import tiny
from tests.disks import largest_file

OURS = ["--task", "tests.tiny:task"]
NETWORK = ["--model", "tests.tiny:network"]
COMPRESS = ["compress", *NETWORK, *OURS, "--train-config", tiny.TRAINED]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with tiny.one_thread():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A trained package, and an evaluated one."""
    root = tmp_path_factory.mktemp("made")
    given = {"task": "tests.tiny:task"}
    stages.train(root / "train", model="tests.tiny:network", config=tiny.TRAINED, **given)
    stages.evaluate(root / "train", root / "evaluate", max_size="1x", **given)
    return root


def everything_below(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(folder, arguments, code=2):
    """Run the command line and return the one line that it says, having written nothing."""
    before = everything_below(folder)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    assert result.stdout == ""
    *others, line = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert not [other for other in others if "error" in other.lower() or "Traceback" in other]
    assert everything_below(folder) == before
    return line.removeprefix("error: ")


UNKNOWN = [
    (["train", "--model", "vgg"], ["small, resnet20, torchvision:NAME", "'vgg'"]),
    (["train", "--model", "torchvision:resnet19"], ["resnet18", "'torchvision:resnet19'"]),
    (["train", "--model", "tests.tiny:nothing"], ["has no such name", "tests.tiny:nothing"]),
    (["train", "--model", "tests.nothing:network"], ["No module named 'tests.nothing'"]),
    (["train", "--data", "mnist"], ["digits, fashion-mnist, cifar10", "'mnist'"]),
    (["train", "--task", "tests.tiny:ROOT"], ["not callable"]),
    (["train", "--task", "tests.tiny:network"], ["network() got an unexpected", "'data'"]),
    (["train", "--image-size", "-1"], ["image_size must be 0 or positive, got -1"]),
    (["train", "--config", '{"epoch": 3}'], ["epochs", "'epoch'"]),
    (["train", "--config", '{"epochs": "three"}'], ["epochs must be", "'three'"]),
    (["train", "--config", '{"epochs": 2.5}'], ["epochs must be", "2.5"]),
    (["train", "--config", '{"epochs": 0}'], ["epochs must be at least 1, got 0"]),
    (["train", "--config", '{"lr": NaN}'], ["lr must be positive, got nan"]),
    (["train", "--config", '{"optimizer": "adam"}'], ["sgd or adamw", "'adam'"]),
    (["train", "--config", "[1]"], ["config must be a JSON object, got '[1]'"]),
    (["train", "--config", "{epochs: 1}"], ["config must be a JSON object"]),
    (["prune", "--config", '{"method": "magic"}'], ["'none', ", "'similarity'", "'magic'"]),
    (["cluster", "--config", '{"method": "similarity"}'], ["'merge', 'none'", "got 'similarity'"]),
    (["reduce", "--config", '{"method": 3}'], ["'project', 'quantize'", "got 3"]),
    (["prune", "--config", '{"threshold": 1.5}'], ["threshold must be in (0, 1], got 1.5"]),
    (["cluster", "--config", '{"images": 0}'], ["images must be at least 1, got 0"]),
    (["reduce", "--config", '{"max_shrink": 1}'], ["max_shrink must be 0 or above 1, got 1"]),
    (["reduce", "--config", '{"groups": 1}'], ["max_groups", "'groups'"]),
    (["retrain", "--config", '{"margin": -1}'], ["margin must be in [0, 1), got -1"]),
    (["evaluate", "--max-size", "tiny"], ["max_size must be bytes", "'tiny'"]),
    (["evaluate", "--max-size", "0"], ["positive", "'0'"]),
    (["evaluate", "--min-accuracy", "95"], ["in [0, 1], got '95'"]),
    (["evaluate", "--min-accuracy", "+1pp"], ["must not be above the trained model's 0.98"]),
    (["evaluate", "--state", "small"], ["state must be one of", "'small'"]),
    (["compress", "--max-rounds", "0"], ["max_rounds must be at least 1, got 0"]),
    (["compress", "--max-retrains", "-1"], ["max_retrains must be at least 0, got -1"]),
    (["compress", "--size-tries", "0"], ["size_tries must be at least 1, got 0"]),
    (["compress", "--reduce-config", '{"method": "magic"}'], ["reduce_config: method", "'magic'"]),
    (["compress", "--retrain-config", '{"epoch": 1}'], ["retrain_config: ", "'epoch'"]),
    (["compress", "--preset", "fast"], ["preset must be one of", "'patent-loop'", "got 'fast'"]),
    (
        ["compress", "--preset", "saliency-birch", "--max-size", "smallest"],
        ["max_size must be a size where", "got 'smallest'", "another method for prune_config"],
    ),
    (
        ["compress", "--preset", "joint", "--reduce-config", '{"act_bits": 1}'],
        ["reduce_config: act_bits must be in 2..8, or 0 for none, got 1"],
    ),
    (["compress", "--model", "vgg"], ["small, resnet20", "'vgg'"]),
    (["compress", "--data", "mnist"], ["digits, fashion-mnist", "'mnist'"]),
]


@pytest.mark.parametrize(("arguments", "says"), UNKNOWN, ids=lambda v: " ".join(v)[:50])
def test_what_does_not_exist_is_named_beside_what_does(arguments, says, made, tmp_path):
    command, *own = arguments
    given = {
        "train": [],
        "compress": [],
        "retrain": ["--model", made / "evaluate", "--trained", made / "train", *OURS],
    }.get(command, ["--model", made / "train", *OURS])
    line = refused(tmp_path, [command, *given, *own, "--out", tmp_path / "out"])
    assert all(word in line for word in says), line


class Opens:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def truncated(path):
    path.write_bytes(path.read_bytes()[:-7])


def with_values(path, value):
    state = load_file(path)
    state["7.running_var"][3] = value
    save_file(state, path)


def without(path, name):
    save_file({k: v for k, v in load_file(path).items() if k != name}, path)


WEIGHTS = [
    ("missing", lambda p: p.unlink(), "no file of weights"),
    ("a folder", lambda p: (p.unlink(), p.mkdir()), "no file of weights"),
    ("empty", lambda p: p.write_bytes(b""), "no readable file of weights"),
    ("text", lambda p: p.write_text("weights"), "no readable file of weights"),
    ("truncated", truncated, "no readable file of weights"),
    ("not a number", lambda p: with_values(p, float("nan")), "7.running_var"),
    ("infinite", lambda p: with_values(p, float("inf")), "7.running_var"),
    ("incomplete", lambda p: without(p, "3.weight"), "3.weight is missing"),
    ("of another network", lambda p: save_file({"w": torch.zeros(2)}, p), "does not fit"),
    ("no tensors", lambda p: save_file({}, p), "does not fit"),
]


@pytest.mark.parametrize("command", ["train", "compress"])
@pytest.mark.parametrize(("damage", "says"), [w[1:] for w in WEIGHTS], ids=[w[0] for w in WEIGHTS])
def test_weights_that_cannot_be_used_are_refused(command, damage, says, made, tmp_path):
    weights = tmp_path / "weights.safetensors"
    shutil.copy(made / "train" / "weights.safetensors", weights)
    damage(weights)
    given = [*NETWORK, *OURS, "--weights", weights]
    line = refused(tmp_path, [command, *given, "--out", tmp_path / "out"])
    assert says in line


@pytest.mark.parametrize("command", ["train", "compress"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["in a state dict", "alone"])
def test_a_pickle_that_runs_code_is_not_opened(command, wrapped, tmp_path):
    harm, weights = tmp_path / "harm", tmp_path / "weights.pt"
    if wrapped:
        torch.save({"0.weight": Opens(harm)}, weights)
    else:
        weights.write_bytes(pickle.dumps(Opens(harm), protocol=2))
    given = [*NETWORK, *OURS, "--weights", weights]
    line = refused(tmp_path, [command, *given, "--out", tmp_path / "out"])
    assert "could run code" in line or "no readable file" in line
    assert not harm.exists()


def test_a_pickle_in_place_of_a_package_is_not_opened(made, tmp_path):
    harm = tmp_path / "harm"
    (tmp_path / "package.pkl").write_bytes(pickle.dumps(Opens(harm)))
    shutil.copytree(made / "train", tmp_path / "package")
    (tmp_path / "package" / "weights.safetensors").write_bytes(pickle.dumps(Opens(harm)))
    for package in ("package.pkl", "package"):
        given = ["--model", tmp_path / package, *OURS]
        refused(tmp_path, ["prune", *given, "--out", tmp_path / "out"])
    assert not harm.exists()


# Data


def folder_of(root, classes, n_images):
    for label in range(classes):
        for number in range(n_images):
            place = root / f"class-{label}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([label, number]).integers(0, 255, (8, 8), np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")


@pytest.mark.parametrize(
    ("classes", "n_images", "says"),
    [
        (0, 0, "no folder"),
        (1, 8, "a classifier needs at least two"),
        (2, 1, "set of image-folder"),
    ],
)
@pytest.mark.parametrize("command", ["train", "compress"])
def test_a_data_set_that_nothing_can_be_learned_from(command, classes, n_images, says, tmp_path):
    folder_of(tmp_path / "data", classes, n_images)
    given = ["--data", f"image-folder:{tmp_path / 'data'}", "--image-size", 8]
    assert says in refused(tmp_path, [command, *given, "--out", tmp_path / "out"])


def test_an_image_that_is_none_is_named(tmp_path):
    folder_of(tmp_path / "data", 2, 8)
    (tmp_path / "data" / "class-1" / "3.png").write_text("not a picture")
    given = ["--data", f"image-folder:{tmp_path / 'data'}", "--image-size", 8]
    assert "3.png" in refused(tmp_path, ["train", *given, "--out", tmp_path / "out"])


def idx(array):
    return (
        b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    )


@pytest.mark.parametrize(
    ("label", "says"), [(10, "labels of fashion-mnist must be 0 to 9, got 0 to 10"), (9, "")]
)
def test_labels_out_of_range_are_refused(label, says, tmp_path):
    for stem, n in (("train", 60), ("t10k", 20)):
        labels = (np.arange(n) % 10).astype(np.uint8)
        labels[labels == 9] = label
        images = np.random.default_rng(0).integers(0, 255, (n, 8, 8), np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = tmp_path / f"{stem}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(idx(array)))
    given = ["--data", "fashion-mnist", "--data-dir", tmp_path, "--out", tmp_path / "out"]
    if says:
        assert says in refused(tmp_path, ["train", *given])
    else:  # the other files are as they should be
        arguments = ["train", *given, "--config", '{"epochs": 1}']
        assert CliRunner().invoke(app, [str(a) for a in arguments]).exit_code == 0


class Odd(tiny.Patterns):
    """A task of the user's own with a mistake in it."""

    def __init__(self, mistake):
        super().__init__()
        self.mistake = mistake
        if mistake == "empty":
            self.sets["train"] = tuple(part[:0] for part in self.sets["train"])
        if mistake == "labels":
            self.sets["train"][1][5] = 17
        if mistake == "nan":
            self.sets["train"][0][:] = float("nan")

    def size(self, split):
        return len(self.sets[split][1])


def empty(data, data_dir, image_size):
    return Odd("empty")


def labels(data, data_dir, image_size):
    return Odd("labels")


def nan(data, data_dir, image_size):
    return Odd("nan")


@pytest.mark.parametrize(
    ("task", "says"),
    [("empty", "at least 2 images, got 0"), ("labels", "17"), ("nan", "the loss became nan")],
)
@pytest.mark.parametrize("command", ["train", "compress"])
def test_a_task_with_a_mistake_in_it_is_one_line(command, task, says, tmp_path):
    given = [*NETWORK, "--task", f"tests.test_bad_input:{task}"]
    assert says in refused(tmp_path, [command, *given, "--out", tmp_path / "out"])


# Packages and encoded files


def flipped(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("name", ["weights.safetensors", "model.json"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_package_is_refused(name, share, made, tmp_path):
    shutil.copytree(made / "train", tmp_path / "package")
    path = tmp_path / "package" / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    given = ["--model", tmp_path / "package", *OURS]
    assert name in refused(tmp_path, ["prune", *given, "--out", tmp_path / "out"])


@pytest.mark.parametrize("seed", range(8))
def test_a_package_with_a_flipped_bit_in_its_weights_is_refused(seed, made, tmp_path):
    shutil.copytree(made / "train", tmp_path / "package")
    path = tmp_path / "package" / "weights.safetensors"
    data = path.read_bytes()
    path.write_bytes(flipped(data, random.Random(seed).randrange(8 * len(data))))
    given = ["--model", tmp_path / "package", *OURS]
    assert "is damaged" in refused(tmp_path, ["prune", *given, "--out", tmp_path / "out"])


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_in_a_description_does_no_harm_or_is_one_line(seed, made, tmp_path):
    shutil.copytree(made / "train", tmp_path / "package")
    path = tmp_path / "package" / "model.json"
    data = path.read_bytes()
    path.write_bytes(flipped(data, random.Random(seed).randrange(8 * len(data))))
    arguments = ["evaluate", "--model", tmp_path / "package", *OURS, "--max-size", "1x"]
    arguments = [str(a) for a in [*arguments, "--out", tmp_path / "out"]]
    result = CliRunner().invoke(app, arguments)
    if result.exit_code:
        assert result.exit_code == 2, result.exception
        assert result.stderr.splitlines()[-1].startswith("error: ")
        assert not (tmp_path / "out").exists()
    else:
        assert (tmp_path / "out" / "model.fpk").exists()


@pytest.mark.parametrize("command", ["decode", "inspect"])
def test_a_damaged_encoded_file_is_refused_wherever_it_is_damaged(command, made, tmp_path):
    data, path = (made / "evaluate" / "model.fpk").read_bytes(), tmp_path / "model.fpk"
    chance = random.Random(0)
    damaged = [flipped(data, chance.randrange(8 * len(data))) for _ in range(40)]
    damaged += [data[:n] for n in (0, 1, 3, 4, 20, len(data) // 2, len(data) - 1)]
    damaged += [data + b"\0", b"ONNX" + data, pickle.dumps(Opens(tmp_path / "harm"))]
    for number, content in enumerate(damaged):
        path.write_bytes(content)
        arguments = [command, path, *(["--onnx", tmp_path / "out.onnx"] * (command == "decode"))]
        assert refused(tmp_path, arguments), number
    assert not (tmp_path / "harm").exists()


def test_an_encoded_file_that_is_not_the_evaluated_one_is_not_published(made, tmp_path):
    shutil.copytree(made / "evaluate", tmp_path / "package")
    path = tmp_path / "package" / "model.fpk"
    path.write_bytes(flipped(path.read_bytes(), 4321))
    given = ["--model", tmp_path / "package", *OURS, "--max-size", "1x", "--store", tmp_path / "s"]
    line = refused(tmp_path, ["publish", *given, "--out", tmp_path / "out"])
    assert "evaluate the package again" in line


def test_a_package_of_the_future_is_refused_by_its_number(made, tmp_path):
    shutil.copytree(made / "train", tmp_path / "package")
    path = tmp_path / "package" / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    given = ["--model", tmp_path / "package", *OURS]
    assert "99" in refused(tmp_path, ["prune", *given, "--out", tmp_path / "out"])


# Thresholds and folders


@pytest.mark.parametrize("command", ["cluster", "reduce", "compress"])
def test_a_size_below_what_the_format_needs_names_the_smallest_possible(command, made, tmp_path):
    package = ["--model", made / "train", *OURS]
    weights = [*NETWORK, *OURS, "--weights", made / "train" / "weights.safetensors"]
    given = weights if command == "compress" else package
    arguments = [command, *given, "--max-size", "100", "--out", tmp_path / "out"]
    line = refused(tmp_path, arguments)
    assert line.startswith("max_size must be at least ")
    assert 300 < int(line.split()[5]) < 1000


def test_a_floor_above_the_trained_network_is_refused_with_its_accuracy(made, tmp_path):
    given = [*NETWORK, *OURS, "--weights", made / "train" / "weights.safetensors"]
    line = refused(
        tmp_path, ["compress", *given, "--min-accuracy", "0.99", "--out", tmp_path / "out"]
    )
    assert line == "min_accuracy must not be above the trained model's 0.9800, got '0.99'"


@pytest.mark.parametrize("command", ["train", "prune", "evaluate", "publish", "compress"])
def test_a_folder_that_exists_is_left_alone(command, made, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    given = {
        "train": [*NETWORK, *OURS],
        "compress": [*NETWORK, *OURS],
        "publish": [
            "--model",
            made / "evaluate",
            "--max-size",
            "1x",
            "--store",
            tmp_path / "s",
            *OURS,
        ],
    }.get(command, ["--model", made / "train", *OURS])
    line = refused(tmp_path, [command, *given, "--out", tmp_path / "out"])
    assert "out exists already" in line


# A disk that is full


@pytest.mark.parametrize("command", ["train", "prune", "evaluate"])
@pytest.mark.parametrize("n_bytes", [0, 500, 9000])
def test_a_full_disk_is_one_line_and_no_half_written_package(command, n_bytes, made, tmp_path):
    given = {
        "train": [*NETWORK, *OURS, "--config", tiny.TRAINED],
        "prune": ["--model", made / "train", *OURS],
        "evaluate": ["--model", made / "train", *OURS, "--max-size", "1x"],
    }[command]
    with largest_file(n_bytes):
        line = refused(tmp_path, [command, *given, "--out", tmp_path / "out"])
    assert "File too large" in line


@pytest.fixture(params=["60k", "120k", "200k"])
def small_disk(tmp_path, request):
    """A file system of its own, with room for some of a run."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(["mount", *options], check=False).returncode:
        pytest.skip("needs to mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_run_on_a_full_disk_goes_on_when_there_is_room(small_disk, tmp_path):
    arguments = [str(a) for a in [*COMPRESS, "--min-accuracy", "-8pp", "--out", small_disk / "run"]]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "No space left on device" in result.stderr.splitlines()[-1]
    assert not [path for path in small_disk.rglob(".*") if path.is_dir()]
    assert not (small_disk / "run" / "report.json").exists()
    before = everything_below(small_disk / "run" / "train")
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert before.items() <= everything_below(small_disk / "run" / "train").items()


# The same from outside


@pytest.mark.slow
@pytest.mark.parametrize(
    "start",
    [["-m", "filterpress", "compress"], [str(tiny.ROOT / "pipeline.py"), "run"]],
    ids=["filterpress", "pipeline"],
)
@pytest.mark.parametrize(
    ("own", "says"),
    [
        (["--reduce-config", '{"method": "magic"}'], "'magic'"),
        (["--max-size", "100"], "max_size must be at least"),
        (["--model", "vgg"], "small, resnet20, torchvision:NAME"),
    ],
    ids=["method", "size", "model"],
)
def test_the_real_command_lines_say_one_line_too(start, own, says, made, tmp_path):
    given = [*NETWORK, *OURS, "--weights", str(made / "train" / "weights.safetensors"), *own]
    result = subprocess.run(
        [sys.executable, *start, *given, "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tiny.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny.ROOT)},
    )
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert [line for line in result.stderr.splitlines() if "error" in line] == [
        result.stderr.splitlines()[-1]
    ]
    assert says in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "release").exists()
