"""Measure one point of `scale.py`, alone in its process, and print it as JSON.

    python benchmarks/growth.py network WIDTH
    python benchmarks/growth.py data IMAGES FOLDER
    python benchmarks/growth.py fleet RELEASES
    python benchmarks/growth.py limit MILLIONS

FOLDER is the one of Fashion-MNIST. One thread on one core. Seconds are of the clock, and of the
processor, which work beside this changes less; short calls are repeated and the least counts. Peak
is the most memory that the process held during a stage, and is reset before each, so that it takes
a Linux. Calibration within a stage, which is `statistics.measure`, is counted apart.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from updates import Fleet

from filterpress import codec, measurement, models, package, statistics
from filterpress.codec.graph import strip, to_onnx
from filterpress.codec.quantizer import QuantizedTensor
from filterpress.data import load_data
from filterpress.errors import FilterpressError
from filterpress.export import to_graph
from filterpress.methods.merge_filters import MergeConfig, merge_filters
from filterpress.methods.project_channels import ProjectionConfig, project_channels
from filterpress.methods.prune_similar import SimilarityConfig, prune_similar
from filterpress.release.device.channel import Rollout
from filterpress.release.device.vehicle import Outcome, Vehicle
from filterpress.tasks import calibration, load_task
from filterpress.training import FitConfig, fit

Json = dict[str, Any]
T = TypeVar("T")

SHORT, REPEATS = 2.0, 3  # calls of fewer seconds are repeated
IMAGES = 256  # that a network is trained and calibrated with
RATIO = 100
PIXELS = 28  # of the images of `data`
VEHICLES = 1_000_000
ONE_EPOCH = FitConfig(epochs=1, lr=0.01, precision="float32")
SIDE = 4096  # channels of a layer of `limit`


class Meter:
    """What each stage takes.

    Attributes:
        base: Bytes that the process held before the first stage.
        stages: By name: ``seconds``, ``processor``, ``calibration`` of the latter, ``peak`` bytes.
    """

    def __init__(self) -> None:
        _give_back()
        self.base = _memory("VmRSS")
        self.stages: dict[str, dict[str, float]] = {}
        self._calibration = 0.0

    def __call__(self, name: str, stage: Callable[[], T], repeats: int = REPEATS) -> T:
        """Run a stage, again if it is short, and return what it does."""
        rows = []
        with patch.object(statistics, "measure", self._apart(statistics.measure)):
            while True:
                result, row = self._once(stage)
                rows.append(row)
                if len(rows) == repeats or row["processor"] > SHORT:
                    break
        self.stages[name] = {key: min(row[key] for row in rows) for key in rows[0]}
        return result

    def _once(self, stage: Callable[[], T]) -> tuple[T, dict[str, float]]:
        self._calibration = 0.0
        _give_back()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
        started, processor = time.perf_counter(), time.process_time()
        result = stage()
        processor, seconds = time.process_time() - processor, time.perf_counter() - started
        found = {"seconds": seconds, "processor": processor, "calibration": self._calibration}
        return result, {k: round(v, 4) for k, v in found.items()} | {"peak": _memory("VmHWM")}

    def _apart(self, measure: Callable[..., T]) -> Callable[..., T]:
        def timed(*args: Any, **named: Any) -> T:
            started = time.process_time()
            result = measure(*args, **named)
            self._calibration += time.process_time() - started
            return result

        return timed


def _give_back() -> None:
    """Give the system what memory is free in this process."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _memory(field: str) -> int:
    """Return a field of what the kernel says of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _source(network: nn.Module, input_shape: tuple[int, int, int]) -> package.Package:
    return package.Package(network=network, model="own", input_shape=input_shape, n_classes=10)


class Noise:
    """A task of noise, for what does not depend on the images."""

    input_shape, n_classes = (3, 32, 32), 10

    def size(self, split: str) -> int:
        """Count the images of a split."""
        return IMAGES if split == "train" else IMAGES // 2

    def batches(self, split: str, batch_size: int, **_: Any) -> Any:
        """Yield images and labels."""
        random = torch.Generator().manual_seed(0)
        images = torch.randn(self.size(split), *self.input_shape, generator=random)
        labels = torch.randint(self.n_classes, (len(images),), generator=random)
        yield from zip(images.split(batch_size), labels.split(batch_size), strict=True)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy."""
        return F.cross_entropy(outputs, targets)

    def score(self, predict: Callable[[Tensor], Tensor], split: str) -> float:
        """Return the accuracy."""
        ((images, labels),) = self.batches(split, IMAGES)
        return float((predict(images).argmax(1) == labels).double().mean())


def _size(source: package.Package, network: nn.Module) -> int:
    return len(package.encode(source, network))


def network(width: int) -> Json:
    """Measure the stages on a residual network of four widths, of 17 layers of 3 x 3."""
    task, meter = Noise(), Meter()
    widths = [width * 2**k for k in range(4)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        residual = models.ResidualNet(3, widths, 2, task.n_classes)
    model = nn.Sequential(nn.AvgPool2d(2), residual)  # feature maps of 16, 8, 4 and 2 pixels
    n_parameters, macs = package.count(model, task.input_shape)
    source = _source(model, task.input_shape)
    size, limited = partial(_size, source), {"max_bytes": 4 * n_parameters // RATIO}
    meter("train", lambda: fit(model, task, ONE_EPOCH, seed=0), repeats=1)
    images = calibration(task, IMAGES)
    statistics.recalibrate_(model, images)
    meter("calibrate", lambda: len(statistics.measure(model, images)))
    prune = partial(prune_similar, model, images, SimilarityConfig(images=IMAGES))
    pruned = meter("prune", prune).model
    merge = partial(merge_filters, pruned, images, MergeConfig(images=IMAGES), **limited)
    merged = meter("cluster", merge).model
    del pruned, merge
    reduction = ProjectionConfig(images=IMAGES)
    project = partial(project_channels, merged, images, reduction, size=size, **limited)
    small = meter("reduce", project).model
    left, n_bytes = package.count(small, task.input_shape)[0], size(small)
    del merged, project, small
    file = meter("encode", lambda: package.encode(source, model))
    meter("decode", lambda: len(codec.decode(file).tensors))
    meter("evaluate", lambda: measurement.runner(file)(images))
    return {
        "parameters": n_parameters,
        "macs": macs,
        "file": len(file),
        "reduced_parameters": left,
        "reduced_file": n_bytes,
        "base": meter.base,
        "stages": meter.stages,
    }


def data(n_images: int, folder: str) -> Json:
    """Measure reading, training and the like with some images of Fashion-MNIST, as PNG files."""
    source = load_data("fashion-mnist", folder)
    images = torch.cat([source.train.images, source.validation.images])
    labels = torch.cat([source.train.labels, source.validation.labels])
    meter = Meter()
    with tempfile.TemporaryDirectory() as place:
        for i in range(n_images):
            path = Path(place, source.classes[labels[i]], f"{i}.png")
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(images[i, 0].numpy()).save(path)
        del source, images, labels
        task = meter("read", partial(load_task, f"image-folder:{place}", image_size=PIXELS), 1)
    model = models.build("small", task.input_shape, task.n_classes)
    meter("train", lambda: fit(model, task, ONE_EPOCH, seed=0), 1)
    chosen = meter("choose calibration images", lambda: calibration(task, MergeConfig().images))
    meter("calibrate", lambda: len(statistics.measure(model, chosen)))
    file = package.encode(_source(model, task.input_shape), model)
    meter("evaluate", lambda: measurement.measure(file, task))
    sets = {split: task.size(split) for split in ("train", "validation", "test")}
    return {
        "images": n_images,
        **sets,
        "pixels": PIXELS,
        "base": meter.base,
        "stages": meter.stages,
    }


def fleet(n_releases: int) -> Json:
    """Publish so many releases into one store, and measure the last one and who fetches it."""
    logging.getLogger("filterpress").setLevel(logging.ERROR)  # it warns of development keys
    random, model = np.random.default_rng(0), models.build("small", (3, 32, 32), 10).eval()
    graph, tensors = to_graph(model, (3, 32, 32))
    bare, n_deltas = strip(graph, tensors), 3

    def next_file() -> bytes:
        for name, tensor in tensors.items():
            moved = random.random(tensor.integers.shape) < 0.05  # by a step, as by a retrain
            integers = tensor.integers + moved * random.choice([-1, 1], moved.shape)
            tensors[name] = QuantizedTensor(integers.astype(np.int32), tensor.scale)
        return codec.encode(tensors, bare, {})

    with tempfile.TemporaryDirectory() as place:
        files = [next_file(), next_file()]
        publisher = Fleet(Path(place), *files)
        store = Path(place, "many")
        for _ in range(n_releases - 1):
            files.append(next_file())
            publisher.publish(files[-1], store, n_deltas)
        vehicle = Vehicle(publisher.new_home())
        publisher.ask(vehicle, store.name, Outcome.STAGED)
        vehicle.boot()
        before = set(store.rglob("*.fpd"))
        files.append(next_file())
        times = publisher.publish(files[-1], store, n_deltas)
        written = sorted((store / "metadata").glob("*.json"), key=lambda file: file.stat().st_mtime)
        update = publisher.ask(vehicle, store.name, Outcome.STAGED)
        vehicle.boot()
        poll = publisher.ask(vehicle, store.name, Outcome.CURRENT)
        from_last = hashlib.sha256(files[-2]).hexdigest()[:16]
        (delta,) = (f for f in {*store.rglob("*.fpd")} - before if from_last in f.name)
        payload = delta.stat().st_size
        metadata = {
            role: next(f.stat().st_size for f in reversed(written) if f.match(f"*.{role}.json"))
            for role in ("release", "rollout", "snapshot")
        }
    return {
        "releases": n_releases,
        "deltas": n_deltas,
        "file": len(files[-1]),
        "metadata": metadata,
        "publish": times,
        "poll": poll,
        "update": {**update, "payload": payload, "over_payload": update["bodies"] - payload},
    }


def buckets() -> Json:
    """Let a million vehicles decide for themselves whether they take part in a rollout."""
    now, found = datetime.now(UTC), {}
    for basis_points in (100, 1000, 5000):
        rollout = Rollout(
            salt="salt", percent_bp=basis_points, cohorts=(), not_before=None, halted=False
        )
        started = time.process_time()
        taking = sum(rollout.includes(f"vehicle-{i}", (), now) for i in range(VEHICLES))
        found[f"{basis_points / 100:g} %"] = taking
    return {"vehicles": VEHICLES, "taking part": found, "seconds": time.process_time() - started}


def limit(n_millions: int) -> Json:
    """Encode and decode a network of many weights, nearly all zero, and say what refuses it."""

    def layer(place: int) -> nn.Module:
        made = nn.utils.skip_init(nn.Conv2d, SIDE, SIDE, 1, bias=False)
        with torch.no_grad():
            made.weight.zero_().view(-1)[place] = 1.0  # none like another
        return made

    n_layers = n_millions * 10**6 // SIDE**2 + 1
    model = nn.Sequential(*map(layer, range(n_layers)), nn.Flatten(), nn.Linear(SIDE, 10)).eval()
    source, meter, refused = _source(model, (SIDE, 1, 1)), Meter(), ""
    try:
        file = meter("encode", lambda: package.encode(source, model), 1)
        meter("decode", lambda: len(to_onnx(file)), 1)
    except FilterpressError as error:
        refused = f"{type(error).__name__}: {error}"
    n_parameters = sum(p.numel() for p in model.parameters())
    peak = _memory("VmHWM")  # of the last stage, whether it was refused or not
    return {"parameters": n_parameters, "refused": refused, "peak": peak, "stages": meter.stages}


def main() -> None:
    """Measure the point that the command line names."""
    kind, *given = sys.argv[1:]
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    small = models.build("small", Noise.input_shape, 10)
    fit(small, Noise(), ONE_EPOCH, seed=0)  # loads what the first stage would load
    measurement.runner(package.encode(_source(small, Noise.input_shape), small))  # compiles
    points = {"network": network, "fleet": fleet, "limit": limit}
    match kind, given:
        case "data", (n_images, folder):
            found = data(int(n_images), folder)
        case "buckets", ():
            found = buckets()
        case _, (size,):
            found = points[kind](int(size))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
