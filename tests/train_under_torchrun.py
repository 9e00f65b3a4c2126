"""Trains under torchrun and writes what each process ends with; `test_training` starts it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_training import QUICK, easy_task, linear_net, small_net
from torch import nn

from filterpress.processes import is_main
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
    written = {
        "is_main": is_main(),
        "scores": result.scores,
        "state": network.state_dict(),
        "linear": linear.state_dict(),
        "seen": [number[image] for image in linear[0].seen[:32]],
    }
    torch.save(written, folder / f"{rank}.pt")


main(Path(sys.argv[1]))
