"""Draw what `networks.py` measured: accuracy lost on the test set against the ratio of sizes."""

from __future__ import annotations

import io
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

Json = dict[str, Any]
LOWEST, HIGHEST = -3.0, 1.0  # points that the vertical axis shows
ALLOWED = -0.5
WIDTH, ROW = 8.33, 2.8  # inches; 8.33 are 800 pixels
GREY = "#595959"
# Blue and vermilion of Okabe and Ito, which colour-blind people tell apart, and two shapes.
STYLES: dict[str, Json] = {
    "retrained": {"color": "#0072b2", "marker": "o"},
    "post-training": {"color": "#d55e00", "marker": "s"},
}
# At the first point, on the outer side of its line.
BESIDE: dict[str, Json] = {
    "retrained": {"xytext": (-4, 7), "ha": "left", "va": "bottom"},
    "post-training": {"xytext": (-4, -7), "ha": "left", "va": "top"},
}
ABOVE = {"retrained": 14, "post-training": 5}  # the edge, for values below it
SVG: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "filterpress", "font.size": 9}


def draw(results: dict[str, Json]) -> bytes:
    """Draw a panel for each network.

    Args:
        results: What `networks.py` stores of each network, by the network's title; at least one.

    Returns:
        An SVG file, the same for the same results.
    """
    rows = (len(results) + 1) // 2
    with mpl.rc_context(SVG):
        figure = Figure(figsize=(WIDTH, ROW * rows + 0.4), layout="constrained", facecolor="white")
        panels = list(figure.subplots(rows, 2, sharey=True, squeeze=False).flat)
        for panel, (title, result) in zip(panels, results.items(), strict=False):
            _panel(panel, title, result)
        for panel in panels[len(results) :]:
            panel.set_axis_off()
        figure.supxlabel("times smaller than the float32 weights", fontsize=10)
        figure.supylabel("change of test accuracy, points", fontsize=10)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _panel(panel: Axes, title: str, result: Json) -> None:
    before = result["baseline"]
    told = f"{title}: {before['n_bytes'] / 1e6:.1f} MB, {100 * before['accuracy']:.2f} %"
    panel.set_title(told, loc="left", fontsize=10)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}x"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_ylim(LOWEST, HIGHEST)
    panel.spines[["top", "right"]].set_visible(False)
    panel.axhline(0, color=GREY, linewidth=0.8)
    panel.axhline(ALLOWED, color=GREY, linewidth=0.8, linestyle="--")
    for series in STYLES:
        points = [
            (point["ratio"], 100 * (point["accuracy"] - before["accuracy"]))
            for point in result["points"]
            if point["series"] == series
        ]
        if points:
            _line(panel, series, sorted(points))


def _line(panel: Axes, series: str, points: list[tuple[float, float]]) -> None:
    """Draw a series; what lies below the panel is marked at its lower edge, with its value."""
    style = STYLES[series]
    panel.plot(*zip(*points, strict=True), linewidth=1.8, markersize=5, **style)
    text: Json = {"color": style["color"], "textcoords": "offset points"}
    for point in points:
        if point[1] < LOWEST:
            edge = point[0], LOWEST
            panel.plot(*edge, marker="v", color=style["color"], markersize=7, clip_on=False)
            change = f"{point[1]:.2g}".replace("-", "\N{MINUS SIGN}")
            panel.annotate(change, edge, xytext=(0, ABOVE[series]), ha="center", fontsize=8, **text)
    if shown := [point for point in points if point[1] >= LOWEST]:
        panel.annotate(series, shown[0], **text, **BESIDE[series])
