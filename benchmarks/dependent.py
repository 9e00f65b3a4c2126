r"""Compare dependent (trellis-coded) quantisation with rounding to one grid, at equal damage.

    python -m filterpress train --model resnet20 --data fashion-mnist --data-dir DIR \
        --config '{"epochs": 3}' --out runs/train --seed 0
    python benchmarks/dependent.py runs/train --data fashion-mnist --data-dir DIR

Ways to round each layer:

* ``nearest``: to the nearest integer.
* ``scalar``: to the integer of least damage + slope * bits, each weight by itself.
* ``today``: `rounding.round_compensated`.
* ``fed back``: as ``scalar``, with errors fed back to later columns.
* ``listed``: as ``fed back``, with the 8 best roundings of the columns so far instead of one.
* ``trellis 4`` and ``trellis 8``, of so many states: there are two grids, ``2 k`` and
  ``2 k - sign(k)`` steps, and which one a weight is on follows from the parities of the integers
  before it in its row. The best path is found by Viterbi's algorithm.
* ``trellis 4 fed back`` and ``trellis 8 fed back``: each state's survivor feeds back errors of its
  own.

Damage is that of `statistics`, but for how errors of filters add up. Bits are those of binary
decisions on zero, sign and magnitude, in contexts of the row's size and of the state, learnt on the
way (Krichevsky and Trofimov). Code lengths follow from the integers chosen before, until damage +
slope * bits falls no more. Every way has the best of some steps for each layer and slope. ``coded``
are the bits of `codec`, which knows no states. ``elsewhere`` is the damage by statistics of other
images than those rounded for. Bits of steps and biases are left out. What is saved at equal damage
is interpolated.
Results go to ``benchmarks/results/dependent.json`` and are printed.

Reference:
    H. Schwarz et al., "Hybrid video coding with trellis-coded quantization", DCC 2019, for grids
    and states; Marcellin and Fischer, "Trellis coded quantization of memoryless and Gauss-Markov
    sources", IEEE Trans. Comm. 1990, for what states gain.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from comparison import arguments, task_of
from numpy.typing import NDArray
from torch import Tensor
from trellis import EIGHT, FOUR, ONE_GRID, Integers, Trellis, search_rows, states_of

from filterpress import package, statistics
from filterpress.allocation import SLOPE, steps_of
from filterpress.codec import estimate_bits
from filterpress.rounding import DAMPING, factorise, round_compensated, seen_rows
from filterpress.statistics import Moments
from filterpress.surgery import layers
from filterpress.tasks import calibration

RESULTS = Path(__file__).parent / "results" / "dependent.json"
IMAGES = 1024
THETAS = tuple(2 * 2.5**-k for k in range(9))  # over the mean square of weights in steps
FLAGS = 64  # decisions on a magnitude before Exp-Golomb
LARGEST = 1023  # magnitude; larger ones count as this one
PASSES, ENOUGH = 6, 1e-3  # over a layer, while the cost falls by at least such a share
RATES = (0.5, 1.0, 1.5, 2.0, 3.0)
BASES = ("scalar", "today", "fed back", "listed")

Bits = NDArray[np.float32]
Row = dict[str, float]


class Way(NamedTuple):
    """A way to search for integers."""

    trellis: Trellis
    feeds_back: bool
    n_listed: int  # survivors of a state


WAYS = {
    "scalar": Way(ONE_GRID, False, 1),
    "fed back": Way(ONE_GRID, True, 1),
    "listed": Way(ONE_GRID, True, 8),
    "trellis 4": Way(FOUR, False, 1),
    "trellis 8": Way(EIGHT, False, 1),
    "trellis 4 fed back": Way(FOUR, True, 1),
    "trellis 8 fed back": Way(EIGHT, True, 1),
}
STEPS = (0.5, 1.0, 2.0)  # thetas tried, over the one whose slope is that of high rates
FED_BACK_STEPS = 3.0  # of theta where errors are fed back: these cost less than the others
TRELLIS_STEPS = 0.4  # of theta of a trellis over that of one grid: its steps are finer


class Rows(NamedTuple):
    """A layer to round."""

    weight: Tensor  # (O, ...)
    moments: Moments
    others: Moments  # of other images
    rows: NDArray[np.float32]  # (O, d)
    factor: NDArray[np.float32]  # (d, d) of errors fed back, lower triangular
    pivots: tuple[NDArray[np.float32], NDArray[np.float32]]  # (d,) without and with feeding back
    sizes: Integers  # (O,) class of each row


class Rounding(NamedTuple):
    """What a layer was rounded to, and what that comes to."""

    bits: float
    damage: float
    damage_elsewhere: float
    coded: float


def apart(moments: Moments) -> Moments:
    """Leave nothing off the diagonal of the outputs', so that rows can be rounded one by one."""
    return moments._replace(outputs=torch.diag_embed(moments.gain[None]))


def prepare(weight: Tensor, moments: Moments, others: Moments) -> Rows:
    """Take from a layer of one group what its roundings have in common."""
    unit, scale = (part[0] for part in factorise(moments.inputs, DAMPING))
    identity = torch.eye(len(unit))
    upper = torch.linalg.solve_triangular(unit, identity, upper=True) * scale.rsqrt()[:, None]
    power = moments.inputs[0].diagonal()
    alone = (power + DAMPING * power.mean()).rsqrt()
    units = (weight.flatten(1) / steps_of(weight, moments, 1.0)[:, None]).abs().mean(dim=1)
    octaves = units.clamp(min=1e-30).log2().floor().long()
    return Rows(
        weight,
        moments,
        others,
        seen_rows(weight, moments)[0].numpy(),
        upper.T.contiguous().numpy(),
        (alone.numpy(), upper.diagonal().contiguous().numpy()),
        octaves.unique(return_inverse=True)[1].numpy(),
    )


def count(integers: Integers, sizes: Integers, contexts: Integers, n_contexts: int) -> Integers:
    """Count magnitudes ``(sizes, contexts, LARGEST + 1)``."""
    shape = sizes.max() + 1, n_contexts, LARGEST + 1
    magnitudes = np.abs(integers).clip(0, LARGEST)
    where = (sizes[:, None] * n_contexts + contexts) * (LARGEST + 1) + magnitudes
    return np.bincount(where.ravel(), minlength=math.prod(shape)).reshape(shape)


def decisions(counts: Integers) -> tuple[Tensor, Tensor]:
    """Return how often each of the first magnitudes was passed, and how often it was not."""
    at = torch.as_tensor(counts[..., :FLAGS]).double()
    beyond = torch.as_tensor(counts.sum(axis=2, keepdims=True)) - at.cumsum(dim=2)
    return beyond, at


def fixed_bits() -> Tensor:
    """Return the bits ``(LARGEST + 1,)`` of a magnitude that are not learnt: sign, Exp-Golomb."""
    rest = (torch.arange(LARGEST + 1) - FLAGS + 1).clamp(min=0).double()
    golomb = torch.where(rest > 0, 2 * rest.clamp(min=1).log2().floor() + 1, 0)
    return golomb + (torch.arange(LARGEST + 1) > 0)


def total_bits(counts: Integers) -> float:
    """Return the bits of integers with given counts, learning included."""
    beyond, at = decisions(counts)
    half = torch.tensor(0.5).double()
    learnt = torch.lgamma(beyond + at + 1) - torch.lgamma(beyond + half) - torch.lgamma(at + half)
    learnt = (learnt + 2 * torch.lgamma(half)) / math.log(2)
    return float(learnt.sum() + (torch.as_tensor(counts).double() * fixed_bits()).sum())


def prices(counts: Integers) -> Bits:
    """Return the bits of each magnitude after integers with given counts."""
    beyond, at = decisions(counts)
    go_on = -((beyond + 0.5) / (beyond + at + 1)).log2()
    stop = -((at + 0.5) / (beyond + at + 1)).log2()
    before = torch.cat([torch.zeros_like(go_on[..., :1]), go_on.cumsum(dim=2)], dim=2)
    learnt = before[..., torch.arange(LARGEST + 1).clamp(max=FLAGS)]
    learnt[..., :FLAGS] += stop
    return (learnt + fixed_bits()).float().numpy()


def first_counts(layer: Rows, steps: Tensor, trellis: Trellis) -> Integers:
    """Count the integers nearest to all weights, in each state."""
    units = layer.rows / steps.numpy()[:, None]
    counts = np.zeros((layer.sizes.max() + 1, len(trellis.grids), LARGEST + 1), np.int64)
    for state, grid in enumerate(trellis.grids):
        integers = np.rint((np.abs(units) + grid) / trellis.spacing).astype(np.int64)
        at = np.full_like(integers, state)
        counts += count(integers, layer.sizes, at, len(trellis.grids))
    return counts


def search(layer: Rows, way: Way, theta: float, slope: float) -> Rounding:
    """Round a layer in a way, again and again with the code lengths of what came out before.

    Args:
        layer: The layer.
        way: How to search.
        theta: Gives the steps.
        slope: Damage that a bit is worth.
    """
    trellis = way.trellis
    steps = steps_of(layer.weight, layer.moments, theta)
    counts = first_counts(layer, steps, trellis)
    best, least = Rounding(0, 0, 0, 0), math.inf
    for _ in range(PASSES):
        integers = np.zeros(layer.rows.shape, np.int64)
        search_rows(
            *(layer.rows, layer.factor[: len(layer.factor) * way.feeds_back]),
            *(layer.pivots[way.feeds_back], steps.numpy(), 0.5 * layer.moments.gain.numpy()),
            *(slope * prices(counts)[layer.sizes], trellis, way.n_listed, integers),
        )
        states = states_of(integers, trellis)
        levels = trellis.spacing * integers - trellis.grids[states] * np.sign(integers)
        counts = count(integers, layer.sizes, states, len(trellis.grids))
        found = outcome(layer, integers, levels * steps.numpy()[:, None], counts)
        cost = found.damage + slope * found.bits
        if cost < least:
            best = found
        if cost > (1 - ENOUGH) * least:
            break
        least = cost
    return best


def outcome(layer: Rows, integers: Integers, weights: Any, counts: Integers) -> Rounding:
    """Say what a rounding comes to."""
    delta = torch.as_tensor(weights).float() - layer.weight.flatten(1)
    shaped = integers.reshape(layer.weight.shape).astype(np.int32)
    bits = total_bits(counts) + len(integers) * math.log2(layer.sizes.max() + 1)
    damages = layer.moments.error(delta), layer.others.error(delta)
    return Rounding(bits, *damages, estimate_bits(shaped))


def on_one_grid(layer: Rows, way: str, theta: float) -> Rounding:
    """Round a layer to the nearest integers, or as it is done today."""
    steps = steps_of(layer.weight, layer.moments, theta)
    if way == "nearest":
        units = torch.round(layer.weight.flatten(1) / steps[:, None])
    else:
        units = round_compensated(layer.weight, steps, layer.moments, theta)
    integers = units.numpy().astype(np.int64)
    counts = count(integers, layer.sizes, np.zeros_like(integers), 1)
    return outcome(layer, integers, units * steps[:, None], counts)


def best_of(layer: Rows, name: str, theta: float) -> Rounding:
    """Round a layer with some steps; return what has the least damage + slope * bits."""
    slope = SLOPE / 8 * theta
    if name in WAYS:
        way = WAYS[name]
        scale = theta * (TRELLIS_STEPS if way.trellis.spacing > 1 else 1)
        scale *= FED_BACK_STEPS if way.feeds_back else 1
        found = [search(layer, way, r * scale, slope) for r in STEPS]
    else:
        found = [on_one_grid(layer, name, r * theta) for r in STEPS]
    return min(found, key=lambda r: r.damage + slope * r.bits)


def curve(rows: list[Row], bits: str, damage: str) -> tuple[Any, Any]:
    """Return rates, rising, and logarithms of damages, falling, of points of one way."""
    rates, damages = np.array(sorted((row[bits], math.log(row[damage])) for row in rows)).T
    return rates, np.minimum.accumulate(damages)


def saved(
    base: list[Row], way: list[Row], rate: float, bits: str = "bits", damage: str = "damage"
) -> float | None:
    """Return the percent of bits saved at the damage of a base that takes ``rate`` bits a weight.

    None where no points are beyond.
    """
    (rates, damages), (others, same) = curve(base, bits, damage), curve(way, bits, damage)
    given = np.interp(rate, rates, damages)
    if not (rates[0] <= rate <= rates[-1] and same[-1] <= given <= same[0]):
        return None
    return round(100 - 100 * float(np.interp(-given, -same, others)) / rate, 1)


def savings(
    found: dict[str, list[Row]], *quantities: str
) -> dict[str, dict[str, list[float | None]]]:
    """Return what each way saves at `RATES` of each of `BASES`."""
    return {
        base: {
            way: [saved(found[base], rows, r, *quantities) for r in RATES]
            for way, rows in found.items()
        }
        for base in BASES
    }


def sweep(used: dict[str, Rows], way: str) -> Iterator[dict[str, Rounding]]:
    """Yield the roundings of all layers in a way, for one slope after the other."""
    unit = torch.cat([squares(layer) for layer in used.values()]).mean()
    for relative in THETAS:
        yield {name: best_of(layer, way, relative * float(unit)) for name, layer in used.items()}


def squares(layer: Rows) -> Tensor:
    """Return the squares ``(n,)`` of a layer's weights, in steps at theta = 1."""
    steps = steps_of(layer.weight, layer.moments, 1.0)
    return (layer.weight.flatten(1) / steps[:, None]).square().flatten()


def point(roundings: list[Rounding], n_weights: int) -> Row:
    """Say what roundings come to, in bits a weight."""
    return {
        "bits": round(sum(r.bits for r in roundings) / n_weights, 4),
        "coded": round(sum(r.coded for r in roundings) / n_weights, 4),
        "damage": float(f"{sum(r.damage for r in roundings):.5g}"),
        "damage_elsewhere": float(f"{sum(r.damage_elsewhere for r in roundings):.5g}"),
    }


def main() -> None:
    """Round in each way and print what dependent quantisation saves."""
    parser = arguments(__doc__)
    parser.add_argument("package", type=Path, help="folder of a trained network")
    given = parser.parse_args()
    task = task_of(given)
    images, others = (calibration(task, IMAGES, seed) for seed in (0, 1))
    network = statistics.plain_for(package.load(given.package).network, images)
    moments, elsewhere = (
        {name: apart(m) for name, m in statistics.measure(network, i, seed=k).items()}
        for k, i in ((0, images), (1, others))
    )
    plain = {name: layer.weight.detach() for name, layer in layers(network).items()}
    used = {name: prepare(w, moments[name], elsewhere[name]) for name, w in plain.items()}
    counts = {name: weight.numel() for name, weight in plain.items()}
    total: dict[str, list[Row]] = {}
    parts: dict[str, dict[str, list[Row]]] = {name: {} for name in used}
    seconds = {}
    for way in ("nearest", "today", *WAYS):
        started = time.process_time()
        for roundings in sweep(used, way):
            row = point(list(roundings.values()), sum(counts.values()))
            print(json.dumps({"way": way, **row}), flush=True)
            total.setdefault(way, []).append(row)
            for name, rounding in roundings.items():
                parts[name].setdefault(way, []).append(point([rounding], counts[name]))
        seconds[way] = round(time.process_time() - started, 1)
    result = {
        "weights": sum(counts.values()),
        "seconds": seconds,
        "points": total,
        "rates": RATES,
        "percent_saved": savings(total),
        "percent_saved_coded": savings(total, "coded"),
        "percent_saved_elsewhere": savings(total, "bits", "damage_elsewhere"),
        "layers": [
            {
                "name": name,
                "weights": counts[name],
                "percent_saved": savings(found)["today"],
            }
            for name, found in parts.items()
        ],
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["percent_saved"], indent=1))


if __name__ == "__main__":
    main()
