"""Measure what the residual blocks of a trained network are worth, and in which order to drop them.

    python benchmarks/blocks.py RUN [RUN ...] --data fashion-mnist --data-dir DIR

RUN is the folder of a run of ``filterpress compress``. Each block of its trained network is
replaced by an identity, and by an affine map of each channel that is fitted to the block's outputs
by least squares: divergence of the network's outputs on calibration images, accuracy on the
validation set. Then all sets of blocks are measured, and for each allowance of divergence the
parameters saved are compared: of blocks dropped by the least divergence, by the least for each
parameter, and of the best set (docs/adr/0030). Results are printed as JSON and added to
``benchmarks/results/blocks.json``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, combinations
from pathlib import Path

import torch
from comparison import Row, Validation, arguments, compare
from torch import Tensor, nn

from filterpress import package, statistics
from filterpress.methods.drop_blocks import outputs_of, residual_blocks, without
from filterpress.tasks import Task, calibration
from filterpress.training import distillation_loss

RESULTS = Path(__file__).parent / "results" / "blocks.json"
ALLOWANCES = (0.1, 0.3, 0.7, 1.0, 1.5, 2.0, 3.0)
Set = frozenset[str]


class Affine(nn.Module):
    """What stands for a block: a factor and an offset for each channel, then a ReLU."""

    def __init__(self, factor: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor.float())
        self.register_buffer("offset", offset.float())

    def forward(self, x: Tensor) -> Tensor:
        """Map each channel of ``(N, C, H, W)``."""
        return (x * self.factor[:, None, None] + self.offset[:, None, None]).relu()


def mapped(network: nn.Module, name: str, images: Tensor) -> nn.Module:
    """Copy a network with the affine map of least squares in place of a block."""
    seen: list[Tensor] = []
    block = network.get_submodule(name)
    handle = block.register_forward_hook(lambda _, args, made: seen.extend((args[0].clone(), made)))
    with torch.no_grad():
        network(images)
    handle.remove()
    x, y = (value.transpose(0, 1).flatten(1).double() for value in seen)  # (C, n)
    variance, mean = torch.var_mean(x, dim=1, correction=0)
    factor = ((x - mean[:, None]) * y).mean(dim=1) / (variance + 1e-9)
    result = copy.deepcopy(network)
    result.set_submodule(name, Affine(factor, y.mean(dim=1) - factor * mean))
    statistics.recalibrate_(result, images)
    return result


def greedy(table: Mapping[Set, float], allowance: float, cost: Callable[[Set, str], float]) -> Set:
    """Drop the block of least cost, as long as the divergence allows."""
    gone: Set = frozenset()
    every = frozenset(chain.from_iterable(table))
    while left := [b for b in sorted(every - gone) if table[gone | {b}] <= allowance]:
        gone |= {min(left, key=lambda block: cost(gone, block))}
    return gone


def rows_of(run: Path, task: Task, given: argparse.Namespace) -> Iterator[Row]:
    """Replace each block by itself, then drop sets of them."""
    trained = package.load(run / "train").network
    validation, images = Validation(trained, task), calibration(task, given.images, 0)
    network = statistics.plain_for(trained, images)
    wanted, names = outputs_of(network, images), residual_blocks(network, images[:2])
    sizes = {b: sum(p.numel() for p in network.get_submodule(b).parameters()) for b in names}

    def divergence(made: nn.Module) -> float:
        found = outputs_of(made, images)
        return float(distillation_loss(found, wanted, statistics.TEMPERATURE))

    for name in names:
        row: Row = {"block": name, "n_parameters": sizes[name]}
        for way, replace in (("identity", without), ("affine", mapped)):
            made = replace(network, name, images)
            row[f"{way}_divergence"] = round(divergence(made), 4)
            row[f"{way}_accuracy"] = validation.measure(made).accuracy
        yield row

    table: dict[Set, float] = {frozenset(): 0.0}
    for blocks in chain.from_iterable(combinations(names, n) for n in range(1, len(names) + 1)):
        made = copy.deepcopy(network)
        for name in blocks:
            made.set_submodule(name, nn.Identity())
        statistics.recalibrate_(made, images)
        table[frozenset(blocks)] = divergence(made)

    def added(gone: Set, block: str) -> float:
        return table[gone | {block}] - table[gone]

    def saved(blocks: Set) -> int:
        return sum(sizes[block] for block in blocks)

    for allowance in ALLOWANCES:
        within = [blocks for blocks, found in table.items() if found <= allowance]
        yield {
            "allowance": allowance,
            "least": saved(greedy(table, allowance, added)),
            "least_for_each": saved(greedy(table, allowance, lambda g, b: added(g, b) / sizes[b])),
            "best": max(map(saved, within)),
        }


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=512)
    compare(parser, RESULTS, rows_of)
