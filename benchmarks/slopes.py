"""Fit power laws to what `scale.py` measured, and draw them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from curves import SVG, WIDTH
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

Json = dict[str, Any]
Points = Sequence[tuple[float, float]]
Ends = dict[str, float]
TARGET = 1e9  # parameters to reckon on to
CUBIC = ("prune", "cluster", "reduce")  # in the width, of whose square parameters go
FITTED = 4  # the largest points; what is fixed shows in smaller ones
HEIGHT = 3.6  # inches
GAP = 0.06  # of the height of a panel, between two names
# Okabe and Ito, which colour-blind people tell apart; black where there are too few of them.
COLOURS = {
    "reduce": "#d55e00",
    "cluster": "#e69f00",
    "prune": "#009e73",
    "calibrate": "#0072b2",
    "train": "#000000",
    "evaluate": "#56b4e9",
    "encode": "#cc79a7",
    "decode": "#595959",
}
NAMES = {1e5: "0.1 M", 1e6: "1 M", 1e7: "10 M", 1e8: "100 M", 1e9: "1 G"}


class Law(NamedTuple):
    """``factor * n ** exponent``.

    Attributes:
        factor: At n = 1.
        exponent: The slope on logarithmic axes.
        off: How far the worst point is from the law, as a share of it.
        last: The slope between the two largest points.
    """

    factor: float
    exponent: float
    off: float
    last: float


def law_of(points: Points) -> Law:
    """Fit a power law to the largest points by least squares of logarithms."""
    x, y = np.log(np.array(sorted(points)[-FITTED:]).T)
    exponent, offset = np.polyfit(x, y, 1)
    off = np.abs(np.expm1(y - exponent * x - offset)).max()
    last = (y[-1] - y[-2]) / (x[-1] - x[-2])
    return Law(float(np.exp(offset)), float(exponent), float(off), float(last))


def on_by_law(stage: str, points: Points) -> tuple[float, float]:
    """Reckon on to `TARGET` by the law; and from the largest point by the steepest of slopes.

    These are the law's, that of the last two points, and 1, since no stage skips a weight, or 1.5
    in a stage that factors matrices with a row for each weight of a filter.
    """
    law, (last, value) = law_of(points), max(points)
    steepest = max(1.5 if stage in CUBIC else 1.0, law.exponent, law.last)
    return law.factor * TARGET**law.exponent, value * (TARGET / last) ** steepest


def slope_of(points: Points) -> float:
    """Return the slope of the straight line through the two largest points."""
    (x, y), (last, value) = sorted(points)[-2:]
    return (value - y) / (last - x)


def on_by_line(points: Points) -> float:
    """Reckon on to `TARGET` by that line: what memory has besides it is fixed."""
    last, value = max(points)
    return value + slope_of(points) * (TARGET - last)


def processor_seconds(point: Json, stage: str) -> float:
    """Return what a stage takes without the calibration in it, which is a stage of its own."""
    row = point["stages"][stage]
    own = row["processor"] - (row["calibration"] if stage != "calibrate" else 0)
    return float(own)


def memory(point: Json, stage: str) -> float:
    """Return the most bytes that a stage held, above those of the process before it began."""
    return float(point["stages"][stage]["peak"] - point["base"])


def draw(points: Sequence[Json]) -> bytes:
    """Draw seconds and memory of each stage against the parameters.

    Args:
        points: Of networks, by rising size.

    Returns:
        An SVG file, the same for the same points.
    """
    with mpl.rc_context(SVG):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2)
        left.set_title("seconds of one core", loc="left", fontsize=10)
        spent = {s: [(p["parameters"], processor_seconds(p, s)) for p in points] for s in COLOURS}
        _panel(left, spent, {stage: on_by_law(stage, spent[stage])[1] for stage in spent})
        right.set_title("memory beside that of the libraries, GB", loc="left", fontsize=10)
        held = {s: [(p["parameters"], memory(p, s) / 1e9) for p in points] for s in COLOURS}
        _panel(right, held, {stage: on_by_line(held[stage]) for stage in held})
        figure.supxlabel("parameters", fontsize=10)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _panel(panel: Axes, series: dict[str, list[tuple[float, float]]], ends: Ends) -> None:
    """Draw lines, dashed where they are reckoned, each named at its end."""
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.xaxis.set_major_locator(LogLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda n, _: NAMES.get(n, "")))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    for stage, points in series.items():
        colour = COLOURS[stage]
        panel.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, marker="o", ms=3.5)
        reckoned = zip(points[-1], (TARGET, ends[stage]), strict=True)
        panel.plot(*reckoned, color=colour, linewidth=1.0, linestyle=(0, (3, 2)))
    panel.set_xlim(right=TARGET)
    _name(panel, ends)


def _name(panel: Axes, ends: Ends) -> None:
    """Write the stages beside their ends, none over another, and near them on the whole."""
    low, high = np.log(panel.get_ylim())
    names = sorted(ends, key=lambda stage: ends[stage])
    wanted = np.log([ends[stage] for stage in names])
    gap = GAP * (high - low) * np.arange(len(names))
    places = np.maximum.accumulate(wanted - gap) + gap
    places = np.minimum(places - (places - wanted).mean(), high + gap - gap[-1])
    for stage, place in zip(names, places, strict=True):
        panel.annotate(
            stage,
            (TARGET, float(np.exp(place))),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=COLOURS[stage],
            annotation_clip=False,
        )
