"""A task and a network of the user's own, small enough that a stage takes a fraction of a second.

`RUNS` are settings of `compress` that take a run along each of the paths of the loop.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from pathlib import Path

import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn

from filterpress.budget import parse_accuracy, parse_size
from filterpress.codec.graph import to_onnx
from filterpress.loop import compress
from filterpress.release import fetch, latest

ROOT = Path(__file__).parents[1]
FILES = ("model.json", "weights.safetensors", "report.json", "model.fpk")  # of a package
SIZES = {"train": 384, "validation": 200, "test": 200}


class Patterns:
    """Four smooth patterns of 8 x 8 pixels in noise."""

    input_shape = (1, 8, 8)
    n_classes = 4

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        patterns = F.interpolate(torch.randn(4, 1, 3, 3, generator=generator), 8, mode="bicubic")
        self.sets = {}
        for split, n in SIZES.items():
            labels = torch.arange(n) % self.n_classes
            noise = 1.2 * torch.randn(n, 1, 8, 8, generator=generator)
            self.sets[split] = (patterns[labels] + noise, labels)

    def size(self, split):
        return SIZES[split]

    def batches(self, split, batch_size, *, generator=None, device="cpu"):
        images, labels = self.sets[split]
        n = len(labels)
        order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
        for index in order.split(batch_size):
            yield images[index].to(device), labels[index].to(device)

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets)

    def score(self, predict, split):
        images, labels = self.sets[split]
        return int((predict(images).argmax(1) == labels).sum()) / len(labels)


class Unlucky(Patterns):
    """The same, but whoever trains with seed 0 sees nothing but noise and learns nothing."""

    def batches(self, split, batch_size, *, generator=None, device="cpu"):
        for images, labels in super().batches(
            split, batch_size, generator=generator, device=device
        ):
            in_vain = generator is not None and generator.initial_seed() == 0
            yield (torch.randn(images.shape) if in_vain else images), labels


def task(data, data_dir, image_size):
    return Patterns()


def unlucky(data, data_dir, image_size):
    return Unlucky()


def network(input_shape, n_classes):
    def block(n_in, n_out, stride):
        convolution = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        return [convolution, nn.BatchNorm2d(n_out), nn.ReLU()]

    return nn.Sequential(
        *block(input_shape[0], 16, 1),
        *block(16, 24, 2),
        *block(24, 24, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, n_classes),
    )


# Not "auto", which rounds as the processor likes: a path must be the same everywhere.
_FIT = {"batch_size": 64, "precision": "float32"}
TRAINED = json.dumps({"epochs": 6, **_FIT})
COMMON = {"model": "tests.tiny:network", "task": "tests.tiny:task", "train_config": TRAINED}
_EASY = {"max_size": "12x", "min_accuracy": "-8pp", "max_rounds": 1, "max_retrains": 1}
_TIGHT = {"max_size": "900", "min_accuracy": "0.973", "max_rounds": 1, "max_retrains": 1}
_ONE_TRY = {"size_tries": 1}
_IN_STEPS = {"reduce_config": json.dumps({"max_shrink": 1.8})}  # 12x is two of them away
_LONG = {"retrain_config": json.dumps({"epochs": 8, "lr": 0.02, **_FIT})}
_FEEBLE = {"retrain_config": json.dumps({"epochs": 1, "lr": 1e-4, **_FIT})}

RUNS = {
    "at once": {**COMMON, **_EASY, **_ONE_TRY},
    "smaller in two tries": {**COMMON, **_EASY, **_IN_STEPS, "size_tries": 2},
    "retrained": {**COMMON, **_TIGHT, **_LONG, **_ONE_TRY},
    # needs weights=: the run's own training would be the first to have seed 0
    "in the second round": {
        **COMMON,
        **_TIGHT,
        **_LONG,
        **_ONE_TRY,
        "max_size": "875",
        "max_rounds": 2,
        "task": "tests.tiny:unlucky",
        "train_config": "{}",
    },
    "never accurate": {**COMMON, **_TIGHT, **_FEEBLE, **_ONE_TRY, "max_size": "850"},
    "never small enough": {**COMMON, **_EASY, **_IN_STEPS, **_ONE_TRY},
}

ROUND = ["cluster", "reduce", "evaluate"]
RETRAIN = ["retrain", "evaluate"]
PATHS = {  # the stages that do something, in order, and how the run ends
    "at once": (["train", "prune", *ROUND], "publish"),
    "smaller in two tries": (["train", "prune", *ROUND[:2], *ROUND], "publish"),
    "retrained": (["train", "prune", *ROUND, *RETRAIN], "publish"),
    "in the second round": (
        ["train", "prune", *ROUND, *RETRAIN, *ROUND, *RETRAIN],
        "publish",
    ),
    "never accurate": (["train", "prune", *ROUND, *RETRAIN], "give-up"),
    "never small enough": (["train", "prune", *ROUND], "too-big"),
}


@contextlib.contextmanager
def one_thread():
    """Compute with one thread, as the processes of the tests do, so that all make the same bytes.

    It is also the fastest for tensors this small.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def flags(settings):
    """Write settings as the flags of a command line."""
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items())
    return [part for pair in pairs for part in pair]


def history(package):
    return json.loads((package / "model.json").read_text())["history"]


def stages_of(package):
    return [report["stage"] for report in history(package)]


def packages(root):
    """Read the packages below a folder, the bytes of all their files, by the stages behind them."""
    found = {}
    for place in sorted(path.parent for path in root.rglob("model.json")):
        content = {name: (place / name).read_bytes() for name in FILES if (place / name).exists()}
        # a stage that had nothing to do wrote a copy
        assert found.setdefault(tuple(stages_of(place)), content) == content
    return found


def check_published(run, settings, package, report):
    """Check a release against the thresholds by means of its own bytes alone, decoded by hand."""
    store, keys = Path(report["release"]), Path(report["release"]).parent / "keys"
    root = (keys / "root.json").read_bytes()
    encoded = fetch(str(store), latest(str(store), root=root).target, root=root)
    assert encoded == (package / "model.fpk").read_bytes() == (run / "model.fpk").read_bytes()
    assert hashlib.sha256(encoded).hexdigest() == report["sha256"]
    assert history(package)[-1]["sha256"] == report["sha256"]
    measured = accuracy_by_hand(encoded, "validation")
    baseline = history(package)[0]
    assert measured == report["validation_accuracy"]
    assert measured >= parse_accuracy(settings["min_accuracy"], baseline["validation_accuracy"])
    assert len(encoded) == report["n_bytes"]
    assert len(encoded) <= parse_size(settings["max_size"], baseline["baseline_bytes"])


def accuracy_by_hand(encoded, split):
    """Run an encoded file in ONNX Runtime and count the images it gets right."""
    session = onnxruntime.InferenceSession(to_onnx(encoded), providers=["CPUExecutionProvider"])
    images, labels = Patterns().sets[split]
    (outputs,) = session.run(None, {"images": images.numpy()})
    return float((outputs.argmax(1) == labels.numpy()).mean())


def compress_in_child(out, settings, kill=None):
    """Run `compress` in this process, which exists for nothing else.

    Args:
        out: Folder of the run.
        settings: Settings of the run.
        kill: Called with the events that Python audits, before they take effect.
    """
    torch.set_num_threads(1)
    if kill is not None:
        sys.addaudithook(kill)
    compress(out, **settings)
