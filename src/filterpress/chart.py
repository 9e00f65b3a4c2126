"""The chart of a run: accuracy against size, one numbered point a stage, as inline SVG.

Sizes span orders of magnitude, so their axis is logarithmic. Small and accurate is top left; the
corner that meets both thresholds is shaded when they are known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise, product
from typing import NamedTuple

WIDTH, HEIGHT = 640, 350
LEFT, RIGHT, TOP, BOTTOM = 76, 18, 44, 46  # margins around the axes


Place = tuple[int, int]  # x, y
Box = tuple[float, float, float, float]  # left, top, right, bottom


class Point(NamedTuple):
    """A stage on the chart."""

    number: int  # of its row in the table of stages
    name: str
    n_bytes: float  # positive
    accuracy: float  # a fraction, on the same split for every point


class Frame(NamedTuple):
    """The range of both axes, and so where a value lies in the drawing."""

    low_bytes: float
    high_bytes: float
    low: float
    high: float

    def x(self, n_bytes: float) -> float:
        """Give the horizontal place of a size, kept inside the axes."""
        span = math.log(self.high_bytes / self.low_bytes)
        share = math.log(max(n_bytes, self.low_bytes) / self.low_bytes) / span
        return LEFT + min(share, 1.0) * (WIDTH - LEFT - RIGHT)

    def y(self, accuracy: float) -> float:
        """Give the vertical place of an accuracy, kept inside the axes."""
        share = (accuracy - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - min(max(share, 0.0), 1.0) * (HEIGHT - TOP - BOTTOM)


def draw(
    points: Sequence[Point],
    *,
    split: str,
    max_bytes: float | None = None,
    min_accuracy: float | None = None,
    kept: Point | None = None,
) -> str:
    """Draw the way of a run through size and accuracy.

    Args:
        points: In the order of the stages; at least one.
        split: Name of the data that the accuracy was measured on.
        max_bytes: Size threshold, if known.
        min_accuracy: Accuracy threshold, a fraction, if known.
        kept: The point that stands out, the last one by default.

    Returns:
        An ``<svg>`` element, every text in it escaped.

    Example:
        >>> draw([Point(1, "train", 9000, 0.9)], split="test").startswith("<svg")
        True
    """
    frame = _frame(points, max_bytes, min_accuracy)
    label = f"{split} accuracy against size, stage by stage"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{_goal(frame, max_bytes, min_accuracy)}{_size_axis(frame)}"
        f"{_accuracy_axis(frame, split)}{_path(frame, points)}"
        f"{_marks(frame, points, kept or points[-1])}</svg>"
    )


def _frame(points: Sequence[Point], max_bytes: float | None, min_accuracy: float | None) -> Frame:
    sizes = [point.n_bytes for point in points] + ([max_bytes] if max_bytes else [])
    accuracies = [point.accuracy for point in points]
    accuracies += [] if min_accuracy is None else [min_accuracy]
    low, high = min(accuracies), max(accuracies)
    room = max(0.12 * (high - low), 0.005)
    return Frame(min(sizes) / 1.6, max(sizes) * 1.4, max(0.0, low - room), min(1.0, high + room))


def _goal(frame: Frame, max_bytes: float | None, min_accuracy: float | None) -> str:
    """Shade what meets the thresholds; one that is not known does not bound it."""
    if max_bytes is None and min_accuracy is None:
        return ""
    right = frame.x(max_bytes if max_bytes else frame.high_bytes)
    bottom = frame.y(frame.low if min_accuracy is None else min_accuracy)
    return (
        f'<rect class="goal" x="{LEFT}" y="{TOP}" width="{right - LEFT:.1f}" '
        f'height="{bottom - TOP:.1f}"/>'
        f'<text class="goal-name end" x="{WIDTH - RIGHT}" y="18">'
        '<tspan class="goal">&#9632;</tspan> within the budget</text>'
    )


def _size_axis(frame: Frame) -> str:
    bottom = HEIGHT - BOTTOM
    ticks = "".join(
        f'<line class="grid" x1="{frame.x(size):.1f}" x2="{frame.x(size):.1f}" '
        f'y1="{TOP}" y2="{bottom}"/>' + _text(frame.x(size), bottom + 17, short_bytes(size), "mid")
        for size in size_ticks(frame.low_bytes, frame.high_bytes)
    )
    middle = (LEFT + WIDTH - RIGHT) / 2
    return ticks + _text(middle, HEIGHT - 8, "size of the encoded file", "axis mid")


def _accuracy_axis(frame: Frame, split: str) -> str:
    right = WIDTH - RIGHT
    ticks = accuracy_ticks(frame.low, frame.high)
    digits = max(0, -math.floor(math.log10(100 * (ticks[1] - ticks[0])))) if len(ticks) > 1 else 1
    lines = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{right}" '
        f'y1="{frame.y(tick):.1f}" y2="{frame.y(tick):.1f}"/>'
        + _text(LEFT - 8, frame.y(tick) + 4, f"{100 * tick:.{digits}f} %", "end")
        for tick in ticks
    )
    return lines + _text(8, 18, f"{split} accuracy", "axis")


def _path(frame: Frame, points: Sequence[Point]) -> str:
    places = " ".join(f"{frame.x(p.n_bytes):.1f},{frame.y(p.accuracy):.1f}" for p in points)
    return f'<polyline class="path" points="{places}"/>'


def _marks(frame: Frame, points: Sequence[Point], kept: Point) -> str:
    """Draw the points; those that coincide share one mark, named by all of their numbers."""
    places = [(round(frame.x(p.n_bytes)), round(frame.y(p.accuracy))) for p in points]
    groups: dict[Place, list[Point]] = {place: [] for place in places}
    for place, point in zip(places, points, strict=True):
        groups[place].append(point)
    labels = {place: ", ".join(str(p.number) for p in group) for place, group in groups.items()}
    placed = place_labels(labels, _along(places))
    marks = []
    for (x, y), group in groups.items():
        last = " last" if kept in group else ""
        told = "; ".join(
            f"{p.number} {p.name}: {p.n_bytes:,.0f} bytes, {p.accuracy:.2%}" for p in group
        )
        marks.append(
            f'<circle class="mark{last}" cx="{x}" cy="{y}" r="5"><title>{escape(told)}</title>'
            "</circle>" + _text(*placed[x, y], labels[x, y], f"number mid{last}")
        )
    return "".join(marks)


def _along(places: Sequence[Place]) -> list[Place]:
    """Give places on the lines between consecutive marks, too close for a label between."""
    return [
        (round(x0 + (x1 - x0) * share), round(y0 + (y1 - y0) * share))
        for (x0, y0), (x1, y1) in pairwise(places)
        for n_steps in [1 + int(math.dist((x0, y0), (x1, y1)) // 8)]
        for share in (step / n_steps for step in range(1, n_steps))
    ]


def place_labels(labels: Mapping[Place, str], avoid: Iterable[Place] = ()) -> dict[Place, Place]:
    """Put each label beside its mark, clear of the marks and labels around it where possible.

    Args:
        labels: Text by the centre of its mark, in the drawing's units.
        avoid: More places that no label should cover.

    Returns:
        The middle of each text's baseline, by the centre of its mark.
    """
    taken = [_box(x, y + 5, 10) for x, y in labels] + [_box(x, y + 5, 2) for x, y in avoid]
    placed = {}
    for (x, y), text in labels.items():
        width = 8 * len(text)
        side = 9 + width // 2
        offsets = [(0, -11), (0, 21), (side, 4), (-side, 4)]
        offsets += [(dx, dy) for dy, dx in product((-13, 21), (side, -side))]
        free = [
            (x + dx, y + dy)
            for dx, dy in offsets
            if not any(_overlap(_box(x + dx, y + dy, width), box) for box in taken)
        ]
        placed[x, y] = free[0] if free else (x, y - 11)
        taken.append(_box(*placed[x, y], width))
    return placed


def _box(x: int, baseline: int, width: int) -> Box:
    return x - width / 2, baseline - 10, x + width / 2, baseline


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def size_ticks(low: float, high: float) -> list[float]:
    """Give round sizes between two positive ones: 1, 2, 5 times powers of ten, or these alone.

    Example:
        >>> size_ticks(900, 12_000)
        [1000, 2000, 5000, 10000]
    """
    tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps: Iterable[int] = (1, 2, 5) if high / low < 200 else (1,)
    ticks = [step * 10.0**power for power in tens for step in steps]
    return [int(tick) if tick >= 1 else tick for tick in ticks if low <= tick <= high]


def accuracy_ticks(low: float, high: float) -> list[float]:
    """Give three to seven round values between two accuracies.

    Example:
        >>> [round(tick, 3) for tick in accuracy_ticks(0.903, 0.981)]
        [0.92, 0.94, 0.96, 0.98]
    """
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda factor: abs(factor * power - rough))
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def short_bytes(n_bytes: float) -> str:
    """Write a size in three digits and a decimal unit.

    Example:
        >>> short_bytes(500), short_bytes(12_340), short_bytes(46_800_000)
        ('500 B', '12.3 kB', '46.8 MB')
    """
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} GB"


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
