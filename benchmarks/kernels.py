"""Cluster kernels by the lines they lie on: how long it takes, and what each choice leaves.

    python benchmarks/kernels.py [PACKAGE ...] --data fashion-mnist --data-dir DIR

First a million random kernels of 3 x 3 are clustered into 256 lines, and timed. Then, for each
package, all its kernels of one size are clustered in each of a few ways: centres are leading
eigenvectors or means of vectors with their signs; kernels count alike, by their energy, or by their
energy and what an error costs; templates belong to a layer, to layers with as many input channels,
or to the network. What is left is the damage (see `filterpress.statistics`) of kernels that are
``a T + b``, by plain least squares, by those of the outputs, and where later kernels make up for
earlier ones, without rounding. Results are printed as JSON and written to
``benchmarks/results/kernels.json``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest.mock import patch

import torch
from comparison import Row, arguments, task_of
from torch import Tensor

from filterpress import lines, package, statistics
from filterpress.lines import k_lines, match, standardise
from filterpress.methods.share_kernels import scopes_of
from filterpress.representations import Layer
from filterpress.statistics import Moments
from filterpress.surgery import layers
from filterpress.tasks import calibration
from filterpress.templates import fit_alone, look, round_compensated

RESULTS = Path(__file__).parent / "results" / "kernels.json"
MILLION, COUNT = 10**6, 256
FINE = 1e-5  # of the largest factor: steps so small that nothing is rounded away
WAYS = (  # centre, weight, scope
    ("eigenvector", "energy and cost", "layer"),
    ("eigenvector", "energy and cost", "group"),
    ("eigenvector", "energy and cost", "net"),
    ("signed mean", "energy and cost", "net"),
    ("eigenvector", "energy", "net"),
    ("eigenvector", "alike", "net"),
)


def timed() -> Row:
    """Cluster a million kernels."""
    kernels = torch.randn(MILLION, 9, generator=torch.Generator().manual_seed(0))
    start, used = time.perf_counter(), time.process_time()
    centres = k_lines(kernels, COUNT)
    found = match(standardise(kernels), centres)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    left = float(1 - found.correlations.square().mean())
    return {
        "kernels": MILLION,
        "templates": COUNT,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used, 1),
        "energy_left": round(left, 4),
    }


def signed_mean(
    points: Tensor, pull: Tensor, labels: Tensor, left: Tensor, centres: Tensor
) -> Tensor:
    """Move centres to the weighted mean of their vectors, each with its sign."""
    own = (points * centres[labels]).sum(dim=1)
    return MOVED(points, pull / own.abs().clamp(min=1e-6), labels, left, centres)


MOVED = lines._moved


def compared(
    used: Mapping[str, Layer], moments: Mapping[str, Moments], counts: tuple[int, ...]
) -> Iterator[Row]:
    """Yield what each way leaves of a network."""
    for (centre, weight, scope), count in ((way, count) for way in WAYS for count in counts):
        with patch.object(lines, "_moved", MOVED if centre == "eigenvector" else signed_mean):
            damage = torch.zeros(3)
            for names in scopes_of(used, scope):
                damage += left_of({name: used[name] for name in names}, moments, weight, count)
        ways = ("plain", "outputs", "compensated")
        yield {"centre": centre, "weight": weight, "scope": scope, "templates": count} | {
            way: round(float(value), 5) for way, value in zip(ways, damage, strict=True)
        }


def left_of(
    members: Mapping[str, Layer], moments: Mapping[str, Moments], weight: str, count: int
) -> Tensor:
    """Return the damage ``(3,)`` of sharing templates between layers, in each way of fitting."""
    kernels = [layer.weight.detach().flatten(2) for layer in members.values()]
    masses = []
    for name, own in zip(members, kernels, strict=True):
        energy = own.var(dim=2, correction=0)
        cost = moments[name].importance.view(own.shape).mean(dim=2)
        mass = {"alike": torch.ones_like(cost), "energy": energy, "energy and cost": energy * cost}
        masses.append(mass[weight].flatten())
    vectors = torch.cat([own.flatten(0, 1) for own in kernels])
    templates = k_lines(vectors, count, weight=torch.cat(masses))
    total = torch.zeros(3)
    for name, own in zip(members, kernels, strict=True):
        labels, its = match(standardise(own.flatten(0, 1)), templates).labels, moments[name]
        shapes = templates[labels].view_as(own)
        factors = (shapes * own).sum(dim=2, keepdim=True)
        plain = factors * shapes + own.mean(dim=2, keepdim=True)
        seen = look(members[name].weight.detach(), its)
        fit = fit_alone(seen, templates)
        alone = fit.factors[..., None] * templates[fit.indices] + fit.offsets[..., None]
        step = (FINE * fit.factors.abs().max()).expand(len(own))
        rounded = round_compensated(seen, templates, fit, (step, step), 1e-12)
        found = (rounded.factors * step[:, None])[..., None] * templates[rounded.indices]
        found += (rounded.offsets * step[:, None])[..., None]
        total += torch.tensor([its.error(made - own) for made in (plain, alone, found)])
    return total


def main() -> None:
    """Time, compare, print and write."""
    parser = arguments(__doc__ or "")
    parser.add_argument("packages", type=Path, nargs="*", metavar="PACKAGE")
    parser.add_argument("--templates", type=int, nargs="+", default=[16, 256])
    given = parser.parse_args()
    rows = [timed()]
    print(json.dumps(rows[0]), flush=True)
    for path in given.packages:
        images = calibration(task_of(given), 1024)
        network = statistics.plain_for(package.load(path).network, images)
        moments = statistics.measure(network, images)
        for row in compared(layers(network), moments, tuple(given.templates)):
            rows.append({"network": path.name, **row})
            print(json.dumps(rows[-1]), flush=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
