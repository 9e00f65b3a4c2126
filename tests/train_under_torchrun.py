"""Trains under torchrun and writes what each process ends with; `test_training` starts it."""

from __future__ import annotations

import contextlib
import copy
import pickle
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_training import QUICK, easy_task, linear_net, small_net
from torch import nn

from filterpress.checkpoints import Checkpoint
from filterpress.processes import is_main
from filterpress.representations import quantize_
from filterpress.retraining import RetrainConfig, retrain_quantized
from filterpress.scratch import open_scratch
from filterpress.training import fit


class Witness(nn.Flatten):
    """Remembers the images that it was trained on."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        if self.training:
            self.seen += [image.numpy().tobytes() for image in images.contiguous()]
        return super().forward(images)


def partly_used_net(seed):
    """A network with a large buffer, others of other types, and a parameter that nothing uses."""
    network = small_net(seed)
    network.register_buffer("mask", torch.tensor([True, False]))
    network.register_buffer("large", torch.full((100_000,), seed, dtype=torch.bfloat16))
    network.register_buffer("nothing", torch.empty(0, 3))
    network.register_parameter("idle", nn.Parameter(torch.zeros(2)))
    return network


@contextlib.contextmanager
def largest_object():
    """Note the bytes of all that is pickled for other processes."""
    noted, broadcast = [0], dist.broadcast_object_list

    def note(objects, **given):
        noted.append(len(pickle.dumps(objects)))
        broadcast(objects, **given)

    dist.broadcast_object_list = note
    yield noted
    dist.broadcast_object_list = broadcast


def checkpoint(folder):
    return Checkpoint(open_scratch(str(folder / "scratch")), "training", share=1.0)


def interrupt(epoch, step, n_steps, loss):
    """Interrupt both processes in their second epoch."""
    if (epoch, step) == (1, 2):
        raise InterruptedError


def retrain(teacher, task, seed):
    student = copy.deepcopy(teacher)
    for layer in (student[0], student[4]):
        quantize_(layer, 0.2 * layer.weight.detach().flatten(1).abs().amax(dim=1))
    config = RetrainConfig(epochs=2, batch_size=16, precision="float32")
    limits = {"floor": 1.0, "reached": 0.0, "max_bytes": 10**6, "size": lambda network: 1}
    return retrain_quantized(student, teacher, task, config, **limits, seed=seed)


def main(folder):
    task = easy_task()
    ((clean, _),) = task.batches("train", 64)
    number = {image.numpy().tobytes(): k for k, image in enumerate(clean)}

    linear = linear_net(seed=0)
    linear[0] = Witness()
    fit(linear, task, QUICK, seed=0)  # joins the group of processes

    # The processes start from different weights: those of rank 0 must win.
    rank = dist.get_rank()
    network = small_net(seed=rank)
    network.register_buffer("mask", torch.tensor([True, False]))
    result = fit(network, task, QUICK, seed=0, progress=None)
    retrained, _ = retrain(network, task, seed=0)
    killed, resumed, whole = (partly_used_net(seed=rank) for _ in range(3))
    with contextlib.suppress(InterruptedError):
        fit(killed, task, QUICK, seed=0, checkpoint=checkpoint(folder), progress=interrupt)
    with largest_object() as largest:
        fit(resumed, task, QUICK, seed=0, checkpoint=checkpoint(folder))
    fit(whole, task, QUICK, seed=0)
    written = {
        "is_main": is_main(),
        "scores": result.scores,
        "state": network.state_dict(),
        "retrained": retrained.state_dict(),
        "resumed": resumed.state_dict(),
        "largest": max(largest),
        "whole": whole.state_dict(),
        "linear": linear.state_dict(),
        "seen": [number[image] for image in linear[0].seen[:32]],
    }
    torch.save(written, folder / f"{rank}.pt")


main(Path(sys.argv[1]))
