"""Draw what `presets.py` measured: what each preset loses at each size, side by side."""

from __future__ import annotations

import io
import math
from typing import Any

import matplotlib as mpl
from curves import ALLOWED, GREY, SVG, WIDTH
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Json = dict[str, Any]
LOWEST = -6.0  # points that the horizontal axis shows at most
LINE = 0.28  # inches a preset
APART = 0.15  # lines between the two sizes
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
        label = "change of test accuracy, points"
        if any(row["error"] for rows in results.values() for row in rows):
            label += "; lines are standard errors"
        figure.supxlabel(label, fontsize=10)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _panel(panel: Axes, title: str, rows: list[Json], presets: list[str]) -> None:
    lowest = max(LOWEST, math.floor(min(row["change"] for row in rows)))
    panel.set_title(title, loc="left", fontsize=10)
    panel.set_yticks(range(len(presets)), presets)
    panel.set_ylim(len(presets) - 0.5, -0.5)
    panel.set_xlim(lowest, 0.5)
    panel.spines[["top", "right"]].set_visible(False)
    panel.axvline(0, color=GREY, linewidth=0.8)
    panel.axvline(ALLOWED, color=GREY, linewidth=0.8, linestyle="--")
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    for style, size, shift in zip(STYLES, sizes, (-APART, APART), strict=False):
        mine = [row for row in rows if row["size"] == size]
        places = [presets.index(row["preset"]) + shift for row in mine]
        shown = [max(row["change"], lowest) for row in mine]
        errors = [0.0 if row["change"] < lowest else row["error"] or 0.0 for row in mine]
        panel.errorbar(
            shown, places, xerr=errors, linestyle="none", label=size, markersize=5, **style
        )
        for row, place in zip(mine, places, strict=True):
            if row["change"] < lowest:
                change = f"{row['change']:.1f}".replace("-", "\N{MINUS SIGN}")
                change += f" ± {row['error']:.1f}" if row["error"] else ""
                panel.annotate(
                    change, (lowest, place), xytext=(6, 0), textcoords="offset points",
                    va="center", fontsize=8, color=style["color"],
                )  # fmt: skip
    panel.legend(
        frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(sizes), fontsize=8,
        borderpad=0, borderaxespad=0.3, handletextpad=0.2, columnspacing=1.2,
    )  # fmt: skip
