"""Draw what `presets.py` measured: what each preset loses at each size, side by side."""

from __future__ import annotations

import io
from typing import Any

import matplotlib as mpl
from curves import ALLOWED, GREY, SVG, WIDTH
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Json = dict[str, Any]
LOWEST = -6.0  # points that the horizontal axis shows
LINE = 0.24  # inches a preset
# Blue and vermilion of Okabe and Ito, which colour-blind people tell apart, and two shapes.
STYLES: list[Json] = [{"color": "#0072b2", "marker": "o"}, {"color": "#d55e00", "marker": "s"}]


def draw(results: dict[str, list[Json]]) -> bytes:
    """Draw a panel for each network, with a line for each preset.

    Args:
        results: Rows of `presets.py` by the title of the network; at least one.

    Returns:
        An SVG file, the same for the same results.
    """
    presets = list(dict.fromkeys(row["preset"] for rows in results.values() for row in rows))
    with mpl.rc_context(SVG):
        figure = Figure(
            figsize=(WIDTH, LINE * len(presets) + 1.1), layout="constrained", facecolor="white"
        )
        panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
        for panel, (title, rows) in zip(panels, results.items(), strict=True):
            _panel(panel, title, rows, presets)
        figure.supxlabel("change of test accuracy, points; lines are standard errors", fontsize=10)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _panel(panel: Axes, title: str, rows: list[Json], presets: list[str]) -> None:
    panel.set_title(title, loc="left", fontsize=10)
    panel.set_yticks(range(len(presets)), presets)
    panel.set_ylim(len(presets) - 0.5, -0.5)
    panel.set_xlim(LOWEST, 0.5)
    panel.spines[["top", "right"]].set_visible(False)
    panel.axvline(0, color=GREY, linewidth=0.8)
    panel.axvline(ALLOWED, color=GREY, linewidth=0.8, linestyle="--")
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    for style, size in zip(STYLES, sizes, strict=False):
        mine = [row for row in rows if row["size"] == size]
        places = [presets.index(row["preset"]) for row in mine]
        shown = [max(row["change"], LOWEST) for row in mine]
        errors = [row["error"] or 0.0 for row in mine]
        panel.errorbar(shown, places, xerr=errors, linestyle="none", label=size, **style)
        for row, place in zip(mine, places, strict=True):
            if row["change"] < LOWEST:
                change = f"{row['change']:.0f}".replace("-", "\N{MINUS SIGN}")
                panel.annotate(
                    change, (LOWEST, place), xytext=(6, 0), textcoords="offset points",
                    va="center", fontsize=8, color=style["color"],
                )  # fmt: skip
    panel.legend(frameon=False, loc="lower left", fontsize=8)
