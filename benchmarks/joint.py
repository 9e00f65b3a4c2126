"""Prune and quantise jointly, with each of a few decisions made otherwise, and compare.

    python benchmarks/joint.py RUN [RUN ...] --ratio 20 --data fashion-mnist --data-dir DIR

RUN is the folder of a run of ``filterpress compress``; its trained network is made smaller by
``joint`` (docs/adr/0028) for a file of that ratio. Not trained are ``inputs over their range`` and
``inputs at least error``, where only what layers read is rounded, and ``rounded``, which training
begins with. Ways of training are ``as it is``; ``from inside`` and ``from the edge`` of the cells
of their integers, for weights to begin at; ``warmer``, which ends at another temperature; ``higher
thresholds`` to begin with; ``sgd`` in place of ``adamw``; ``slower`` and ``faster`` rates of
learning; ``slow price`` and ``quick price``; ``weights only``. Divergence from the trained network
and accuracy are of the validation set. Results are printed as JSON and added to
``benchmarks/results/joint.json``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from comparison import Other, Row, Validation, arguments, compare, goal_of, otherwise
from torch import Tensor, nn

from filterpress import annealing, package, soft_levels, statistics
from filterpress.activations import Activated, ActivationQuantizer
from filterpress.errors import ModelError
from filterpress.grids import best_grid
from filterpress.methods.quantize_jointly import (
    JointConfig,
    begin,
    input_quantizers,
    quantize_jointly,
)
from filterpress.representations import without_quantization
from filterpress.surgery import layers
from filterpress.tasks import Task, calibration

RESULTS = Path(__file__).parent / "results" / "joint.json"


def inwards(share: float) -> Callable[..., nn.Module]:
    """Let weights begin where they were, but a share of the way to the middle of their cells."""

    def beginning(network: nn.Module, *, rounded: bool) -> nn.Module:
        result = without_quantization(network, rounded=False)
        if rounded:
            middles = layers(without_quantization(network, rounded=True))
            with torch.no_grad():
                for name, layer in layers(result).items():
                    layer.weight.lerp_(middles[name].weight, share)
        return result

    return beginning


def least_error(network: nn.Module, images: Tensor, bits: int) -> dict[str, ActivationQuantizer]:
    """Spread levels over what layers read as squared errors ask for; see `input_quantizers`."""
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            seen[name] = inputs[0].flatten()[None, ::16]

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name, layer in layers(network).items():
            stack.callback(layer.register_forward_pre_hook(look(name)).remove)
        network(images[:256])
    grids = {n: best_grid(v, torch.ones_like(v), bits, symmetric=False) for n, v in seen.items()}
    return {
        name: ActivationQuantizer(float(grid.step), -int(grid.low), bits)
        for name, grid in grids.items()
    }


RANGES: dict[str, Callable[[nn.Module, Tensor, int], dict[str, ActivationQuantizer]]] = {
    "inputs over their range": input_quantizers,
    "inputs at least error": least_error,
}


class Way(NamedTuple):
    """What is otherwise: fields of the config, and decisions of the library."""

    fields: Row
    others: tuple[Other, ...] = ()


WAYS = {
    "as it is": Way({}),
    "from inside": Way({}, ((annealing, "without_quantization", inwards(0.5)),)),
    "from the edge": Way({}, ((annealing, "without_quantization", inwards(0.0)),)),
    "warmer": Way({}, ((annealing, "COLD", 0.1),)),
    "higher thresholds": Way({}, ((soft_levels, "FIRST_LEVEL", -0.4),)),  # 0.7 steps
    "sgd": Way({"optimizer": "sgd", "lr": 0.02}),
    "slower": Way({"lr": 0.0005}),
    "faster": Way({"lr": 0.008}),
    "slow price": Way({}, ((annealing, "PULL", 100.0),)),
    "quick price": Way({}, ((annealing, "PULL", 1600.0),)),
    "weights only": Way({"act_bits": 0}),
}


def rows_of(run: Path, task: Task, given: argparse.Namespace) -> Iterator[Row]:
    """Make the network smaller in each way, with each seed."""
    source = package.load(run / "train")
    validation = Validation(source.network, task)
    goal = goal_of(source, given.ratio)
    images = calibration(task, JointConfig.images, 0)

    def measured(network: nn.Module) -> Row:
        found = validation.measure(network)
        return {"divergence": round(found.divergence, 5), "validation_accuracy": found.accuracy}

    for name, ranges in RANGES.items():
        network = statistics.plain_for(source.network, images)
        for path, quantizer in ranges(network, images, JointConfig.act_bits).items():
            network.set_submodule(path, Activated(quantizer, layers(network)[path]))
        yield {"way": name, **measured(network)}

    def row(way: str, seed: int, network: nn.Module, notes: dict[str, Any]) -> Row:
        return {
            "way": way,
            "ratio": given.ratio,
            "steps": given.epochs * given.epoch_steps,
            "seed": seed,
            "n_bytes": goal.size(network),
            **notes,
            **measured(network),
        }

    for seed in range(given.seeds):
        images = calibration(task, JointConfig.images, seed)
        yield row(
            "rounded", seed, begin(source.network, images, JointConfig(), goal, seed).model, {}
        )
        for name in given.ways:
            fields, others = WAYS[name]
            config = JointConfig(epochs=given.epochs, epoch_steps=given.epoch_steps, **fields)
            before = time.process_time()
            try:
                with otherwise(others):
                    made = quantize_jointly(source.network, task, config, goal=goal, seed=seed)
            except ModelError as error:  # a way that diverges is a result
                yield {"way": name, "ratio": given.ratio, "seed": seed, "error": str(error)}
                continue
            seconds = round(time.process_time() - before)
            yield row(
                name,
                seed,
                made.model,
                {
                    "pruned": round(float(made.notes["pruned"]), 4),
                    "coarsened": made.notes.get("coarsened", 0.0),
                    "cpu_seconds": seconds,
                },
            )


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--ratio", type=float, default=20.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--epoch-steps", type=int, default=143)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    compare(parser, RESULTS, rows_of)
