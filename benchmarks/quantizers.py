"""Compare the allocator with each single choice for a whole network, at the same bytes.

    python benchmarks/quantizers.py RUN [RUN ...] [--ratios 8 12 20] --data-dir DIR

RUN is the folder of a run of ``filterpress compress``. Its pruned network is made smaller, without
retraining, by one method with one setting for all layers:

* ``quantize``: weights of 2, 3 or 4 bits, of each grid; the file is as large as it comes out;
* ``merge``: a share of the filters of each layer is merged into the others, and weights of 4 bits;
* ``project``: each layer's projection leaves out a share of the energy, where that saves weights,
  and one theta for all layers gives the steps that meet a ratio.

The allocator, which is ``project_channels`` as it is, then gets as many bytes as the file has, or
up to a percent fewer. Accuracy, and divergence of the outputs from the trained network's, are of
the validation set; standard errors are those of the mean difference, image by image. Seconds are of
the processor, for the setting; statistics of a network are taken for its first row. ``--ratios``
adds ``quantize`` with widths that the allocator chooses to meet these ratios, which is no single
choice and is not counted as one (docs/adr/0015). Results go to
``benchmarks/results/quantizers.json``, in place of those of the same runs, and are printed.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

from comparison import Measured, Row, Validation, arguments, compare
from safetensors.torch import save
from torch import Tensor, nn

from filterpress import allocation, package, statistics
from filterpress.allocation import Option
from filterpress.fitting import Goal
from filterpress.methods import Outcome, merge_filters, project_channels
from filterpress.methods.quantize_weights import QuantizationConfig, quantize_weights
from filterpress.representations import Layer
from filterpress.statistics import Moments
from filterpress.tasks import Task, calibration

RESULTS = Path(__file__).parent / "results" / "quantizers.json"
NEAR = 1.01  # bytes of files that the allocator is compared with at once
ERRORS = 2  # standard errors that are no difference
Measure = Callable[..., dict[str, Moments]]
WIDTHS = (2, 3, 4)
GRIDS: tuple[Mapping[str, Any], ...] = (
    {"grid": "symmetric", "per": "channel", "fit": "range"},
    {"grid": "symmetric", "per": "channel", "fit": "outputs"},
    {"grid": "symmetric", "per": "tensor", "fit": "outputs"},
    {"grid": "asymmetric", "per": "channel", "fit": "range"},
    {"grid": "asymmetric", "per": "channel", "fit": "outputs"},
    {"grid": "codebook", "per": "tensor", "fit": "outputs"},
)


class Setting(NamedTuple):
    """A method and what it is told for all layers alike."""

    method: str
    ratio: float = 0.0  # to meet; 0 where the size is what it comes to
    share: float = 0.0  # of filters merged, or of energy left out
    weights: Mapping[str, Any] = {}  # fields of `QuantizationConfig`

    @property
    def fields(self) -> Row:
        """What the setting is, without what it does not have."""
        numbers = {"ratio": self.ratio, "share": self.share}
        return {"method": self.method, **{k: v for k, v in numbers.items() if v}, **self.weights}


def settings(ratios: list[float]) -> Iterator[Setting]:
    """Yield the single settings, then those whose widths are chosen for ratios."""
    for bits, grid, rounding in product(WIDTHS, GRIDS, ("nearest", "compensated")):
        yield Setting("quantize", weights={"bits": bits, **grid, "rounding": rounding})
    for share in (0.1, 0.3):
        yield Setting("merge", share=share, weights={"bits": 4})
    for ratio, share in product((12.0, 20.0), (0.01, 0.05)):
        yield Setting("project", ratio, share)
    for ratio, grid, rounding in product(ratios, GRIDS, ("compensated", "learned")):
        yield Setting("quantize", ratio, weights={"bits": 0, **grid, "rounding": rounding})


def merged(network: nn.Module, images: Tensor, share: float) -> nn.Module:
    """Merge a share of the filters of each layer."""

    def alike(_: object, levels: list[merge_filters.Levels], *__: object) -> list[int]:
        return [int((level.share - share).abs().argmin()) for level in levels]

    with patch.object(merge_filters, "choose_levels", alike):
        config = merge_filters.MergeConfig()
        return merge_filters.merge_filters(network, images, config, goal=Goal(0, len)).model


def one_option(share: float, layer: Layer, moments: Moments, **given: Any) -> list[Option]:
    """Return the smallest projection of a layer that leaves out no more than a share of energy."""
    whole, *projections = allocation.options(layer, moments, **given | {"max_groups": 1})
    for option in projections:  # ranks rise
        if option.subspaces and option.damage <= share / 2 * option.subspaces.energies.sum():
            return [option]
    return [whole]


def once(measure: Measure) -> Measure:
    """Return a function that measures each network once; reducing it takes less time."""
    known: dict[bytes, dict[str, Moments]] = {}

    def measured(model: nn.Module, images: Tensor, *, seed: int = 0) -> dict[str, Moments]:
        key = hashlib.sha256(save(model.state_dict())).digest()
        if key not in known:
            known[key] = measure(model, images, seed=seed)
        return known[key]

    return measured


class Source:
    """A pruned network, and what is needed to make it smaller."""

    def __init__(self, run: Path, task: Task) -> None:
        self.package = package.load(run / "prune")
        self.images = calibration(task, QuantizationConfig().images, 0)

    def size(self, network: nn.Module) -> int:
        """Return the bytes of the file of a network."""
        return len(package.encode(self.package, network))

    def allocated(self, max_bytes: int) -> Outcome:
        """Let the allocator choose for a number of bytes."""
        return project_channels.project_channels(
            self.package.network,
            self.images,
            project_channels.ProjectionConfig(),
            goal=Goal(max_bytes, self.size),
        )

    def reduced(self, setting: Setting) -> nn.Module:
        """Apply a setting."""
        network, whole = self.package.network, self.package.baseline["n_bytes"]
        max_bytes = int(whole / setting.ratio) if setting.ratio else int(whole)
        if setting.method == "project":
            option = partial(one_option, setting.share)
            with (
                patch.object(project_channels, "options", option),
                patch.object(project_channels, "linear_channels", lambda *_: []),  # none folded
            ):
                return self.allocated(max_bytes).model
        if setting.method == "merge":
            network = merged(network, self.images, setting.share)
        config = QuantizationConfig(**setting.weights)
        made = quantize_weights(network, self.images, config, goal=Goal(max_bytes, self.size))
        return made.model


def rows_of(run: Path, task: Task, given: argparse.Namespace) -> Iterator[Row]:
    """Measure each setting, and the allocator at its bytes."""
    source = Source(run, task)
    validation = Validation(package.load(run / "train").network, task)
    found: dict[int, tuple[Row, Measured]] = {}  # of the allocator, by the bytes it was given
    with patch.object(statistics, "measure", once(statistics.measure)):
        for setting in settings(given.ratios):
            started = time.process_time()
            network = source.reduced(setting)
            seconds = round(time.process_time() - started, 1)
            n_bytes, single = source.size(network), validation.measure(network)
            limit = max((b for b in found if b <= n_bytes <= NEAR * b), default=n_bytes)
            if limit not in found:
                made = source.allocated(limit)
                expected = made.notes["expected_bytes"]
                sizes = {"allocator_bytes": source.size(made.model), "allocator_expected": expected}
                found[limit] = sizes, validation.measure(made.model)
            sizes, allocator = found[limit]
            row = {"bytes": n_bytes, **sizes, **compared(single, allocator)}
            yield {"setting": setting.fields, **row, "seconds": seconds}


def compared(single: Measured, allocator: Measured) -> Row:
    """Say how a single setting and the allocator do, and how sure the difference is."""
    root = len(single.right) ** 0.5
    gained = allocator.right.double() - single.right.double()
    grown = allocator.divergences - single.divergences
    return {
        "accuracy": round(single.accuracy, 5),
        "divergence": round(single.divergence, 6),
        "allocator_accuracy": round(allocator.accuracy, 5),
        "allocator_divergence": round(allocator.divergence, 6),
        "accuracy_error": round(float(gained.std()) / root, 5),
        "divergence_error": round(float(grown.std()) / root, 6),
    }


def named(setting: Mapping[str, Any]) -> str:
    """Say in words what a setting is."""
    return " ".join(v if isinstance(v, str) else f"{k} {v:g}" for k, v in setting.items())


def table(rows: list[Row]) -> str:
    """Lay rows out in Markdown, the smallest file first."""
    cells = "{:,} · {:.2f} % · {:.4f}"
    lines = ["| setting | bytes · accuracy · divergence | allocator |", "|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["bytes"]):
        single, allocator = (
            cells.format(row[f"{of}bytes"], 100 * row[f"{of}accuracy"], row[f"{of}divergence"])
            for of in ("", "allocator_")
        )
        lines.append(f"| {named(row['setting'])} | {single} | {allocator} |")
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """Count the single settings that the allocator does no worse than."""
    singles = [row for row in rows if row["setting"].get("bits") != 0]  # 0: widths are chosen
    fit = [row for row in singles if row["allocator_bytes"] <= row["bytes"]]
    text = f"{rows[0]['run']}: the allocator fits the bytes of {len(fit)} of {len(singles)} single"
    text += " settings; of these"
    for name, sign in (("divergence", 1), ("accuracy", -1)):
        errors = [r[f"{name}_error"] for r in fit]
        worse = [sign * (r[f"allocator_{name}"] - r[name]) for r in fit]
        plainly = sum(w <= 0 for w in worse)
        nearly = sum(w <= ERRORS * e for w, e in zip(worse, errors, strict=True))
        text += f" {name} is no worse in {plainly}, within {ERRORS} standard errors in {nearly}"
        text += f" (median standard error {median(errors):.2g}),"
    off = max(abs(r["allocator_expected"] / r["allocator_bytes"] - 1) for r in rows)
    return f"{text} and its files have the bytes expected to within {100 * off:.1f} %"


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[])
    for rows in compare(parser, RESULTS, rows_of):
        print(table(rows), summary(rows), sep="\n\n")
