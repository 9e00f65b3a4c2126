"""Measure what fitting on activations is worth to chains of layers, and sweeps to CP.

    python benchmarks/cuts.py RUN [...] --data-dir DIR

``RUN`` is the folder of a run of ``filterpress compress``. Of the largest square convolution of its
trained network, each kind of chain with about a quarter of the weights is fitted as it is, to the
weights with the last layer refitted to the inputs and outputs, and to the weights alone; and CP
with other numbers of sweeps. The damage is what the allocator sees, before rounding, on statistics
of 384 images. Results go to ``benchmarks/results/cuts.json``, in place of those of the same runs,
and are printed (docs/adr/0029).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comparison import Row, arguments, compare, otherwise
from torch import Tensor

from filterpress import chains, compensation, cuts, package, statistics
from filterpress.allocation import Option
from filterpress.representations import Layer
from filterpress.statistics import Moments
from filterpress.surgery import layers
from filterpress.tasks import Task, calibration

RESULTS = Path(__file__).parent / "results" / "cuts.json"
IMAGES = 384
SHARE = 1 / 4  # of the layer's weights
KINDS = ("svd", "tucker", "spatial", "separable")
SWEEPS = (0, 5, 20, 100)


def fit_to_weights(weight: Tensor, moments: Moments, cut: cuts.Cut) -> cuts.Part:
    """Find the first filters of a cut as if all inputs and outputs counted alike."""
    flat = Moments(*(torch.eye(second.shape[-1])[None] for second in moments))
    return cuts.fit_part(weight, flat, cut)


def refit_to_weights(
    weight: Tensor, second: Tensor, rows: Tensor, cut: cuts.Cut
) -> tuple[Tensor, Tensor]:
    """Find the second layer as if all inputs counted alike; the moments are what they are."""
    rest, _ = compensation.refit_rest(weight, torch.eye(len(second)), rows, cut)
    _, seen = compensation.refit_rest(weight, second, rows, cut)
    return rest, seen


WAYS: dict[str, dict[str, Any]] = {
    "on activations": {},
    "on weights, refitted": {"fit_part": fit_to_weights},
    "on weights": {"fit_part": fit_to_weights, "refit_rest": refit_to_weights},
}


def option_of(layer: Layer, moments: Moments, kind: str, patches: dict[str, Any]) -> Option:
    """Return the chain of a kind that is nearest to the share of the weights."""
    wanted = SHARE * layer.weight.numel()
    with otherwise((chains, name, made) for name, made in patches.items()):
        found = chains.chain_options(layer, moments, [kind])[1:]
    return min(found, key=lambda option: abs(weights_of(option, layer) - wanted))


def weights_of(option: Option, layer: Layer) -> int:
    """Count the weights of a chain."""
    assert option.plan is not None
    return chains.n_weights(option.plan, cuts.as_filters(layer.weight).shape)


def rows_of(run: Path, task: Task, _: argparse.Namespace) -> Iterator[Row]:
    """Fit the chains of the largest layer in each way."""
    network = package.load(run / "train").network
    images = calibration(task, IMAGES, 0)
    plain = statistics.plain_for(network, images)
    known = statistics.measure(plain, images, seed=0)
    square = {
        n: m for n, m in layers(plain).items() if m.weight.ndim == 4 and m.weight[0, 0].numel() > 1
    }
    name = max(square, key=lambda n: square[n].weight.numel())
    tried = [(kind, way, patches) for kind in KINDS for way, patches in WAYS.items()]
    tried += [
        ("cp", f"{n} sweeps", {"fit_polyadic": partial(cuts.fit_polyadic, sweeps=n)})
        for n in SWEEPS
    ]
    for kind, way, patches in tried:
        option = option_of(square[name], known[name], kind, patches)
        assert option.plan is not None
        yield {
            "layer": name,
            "kind": kind,
            "ranks": option.plan.ranks,
            "weights": weights_of(option, square[name]),
            "way": way,
            "damage": round(float(option.damage), 5),
        }


if __name__ == "__main__":
    compare(arguments(__doc__), RESULTS, rows_of)
