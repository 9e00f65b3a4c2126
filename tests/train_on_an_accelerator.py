"""Trains on the CPU and on `accelerator`, and says whether the same came of it.

`test_accelerator` starts it, and reads what it prints: by case "the same", or what went wrong.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial

import torch

from filterpress import measurement, processes, settings
from filterpress.checkpoints import Checkpoint
from filterpress.fitting import Goal
from filterpress.package import Package, encode
from filterpress.retraining import RetrainConfig, retrain_quantized
from filterpress.saliency import PruningConfig, measure
from filterpress.scratch import open_scratch
from filterpress.stages.tables import clusterers, pruners, reducers
from filterpress.training import FitConfig, fit
from tests import accelerator, networks

QUICK = {"epochs": 1, "batch_size": 64, "precision": "float32"}
TABLES = {"prune": pruners(), "cluster": clusterers(), "reduce": reducers()}
TASK = networks.Imitation(networks.make("residual"))
SOURCE = networks.plant_duplicates_(networks.make("residual"), "residual")
PACKAGE = Package(
    network=SOURCE,
    model="tests.networks:residual",
    input_shape=networks.SHAPE,
    n_classes=networks.CLASSES,
)
GOAL = Goal(len(encode(PACKAGE, SOURCE)) // 2, lambda network: len(encode(PACKAGE, network)))
#: Networks whose weights take other forms, which are retrained.
FORMS = {
    "steps": ("reduce", "project", {}),
    "codebooks": ("reduce", "quantize", {"bits": 3, "grid": "codebook", "per": "tensor"}),
    "shared values": ("cluster", "share", {}),
    "kernels": ("cluster", "kernels", {"templates": 4, "scope": "net"}),
    "factors": ("reduce", "convert", {}),
    "rounded activations": ("reduce", "joint", {}),
}


def apply(stage, method, fields):
    """Apply a method to the network that all cases begin with."""
    function, kind = TABLES[stage][method]
    trains = issubclass(kind, FitConfig)
    config = settings.configure(kind, QUICK | fields if trains else fields)
    more = {"goal": GOAL} if trains or stage != "prune" else {}
    return function(SOURCE, TASK if trains else networks.images(96), config, **more).model


def train():
    """Train from scratch."""
    network = copy.deepcopy(SOURCE)
    fit(network, TASK, settings.configure(FitConfig, QUICK), seed=0)
    return network


def go_on():
    """Train from the checkpoint of a training that was stopped in its second epoch."""
    config = settings.configure(FitConfig, QUICK | {"epochs": 3})

    def stop(epoch, *_):
        if epoch == 1:
            raise InterruptedError

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint(open_scratch(folder), "training", share=1.0)
        with contextlib.suppress(InterruptedError):
            fit(copy.deepcopy(SOURCE), TASK, config, seed=0, checkpoint=checkpoint, progress=stop)
        network = copy.deepcopy(SOURCE)
        fit(network, TASK, config, seed=0, checkpoint=checkpoint)
    return network


def retrain(start):
    """Retrain a network in its form."""
    config = settings.configure(RetrainConfig, QUICK)
    bounds = {"floor": 1.0, "reached": 0.0, "max_bytes": GOAL.max_bytes, "size": GOAL.size}
    return retrain_quantized(start, SOURCE, TASK, config, **bounds, seed=0)[0]


def two_devices():
    """Add what has been moved to what has not."""
    return {"sum": torch.ones(2).to(processes.best_device()) + torch.ones(2)}


CASES: dict[str, Callable[[], object]] = {
    "two devices": two_devices,
    "train": train,
    "go on": go_on,
    "evaluate": lambda: measurement.baseline(SOURCE, TASK),
    "saliency": lambda: measure(SOURCE, TASK, settings.configure(PruningConfig, QUICK)),
    **{
        f"{stage} {name}": partial(apply, stage, name, {})
        for stage, table in TABLES.items()
        for name, (_, kind) in table.items()
        if issubclass(kind, FitConfig)
    },
    "prune channels": partial(apply, "prune", "structured", {"grain": "channels", "rate": 0.3}),
}


def state_of(made):
    """Return what a case made as tensors and numbers by name."""
    return made.state_dict() if isinstance(made, torch.nn.Module) else made


def difference(made, expected):
    """Say where two states differ; empty where they do not."""
    if made.keys() != expected.keys():
        return f"other names: {sorted(made.keys() ^ expected.keys())}"
    for name, value in made.items():
        if isinstance(value, torch.Tensor):
            if value.device.type != "cpu":
                return f"{name} was left on {value.device}"
            # memory is laid out otherwise, which rounds sums otherwise; training makes more of it
            if not torch.allclose(value, expected[name], rtol=0, atol=0.01):
                return f"{name} differs by up to {(value - expected[name]).abs().max()}"
        elif value != expected[name]:
            return f"{name} is {value}, and {expected[name]} on the CPU"
    return ""


def told(case):
    """Say what comes of a case on the accelerator, against the CPU."""
    expected = copy.deepcopy(state_of(case()))
    try:
        with accelerator.used():
            return difference(state_of(case()), expected) or "the same"
    except Exception:  # noqa: BLE001 (it is told)
        return traceback.format_exc(limit=-6)


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerator.plug_in()
    with contextlib.redirect_stdout(io.StringIO()):
        starts = {form: apply(*how) for form, how in FORMS.items()}
        cases = CASES | {f"retrain {form}": partial(retrain, made) for form, made in starts.items()}
        found = {name: told(case) for name, case in cases.items()}
    sys.stdout.write(json.dumps(found))
