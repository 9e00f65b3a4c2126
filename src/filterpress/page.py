"""Parts of the report page: values read leniently from a report, text, and tables in HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

Report = Mapping[str, Any]

NUMERIC = {"#", "Bytes", "Ratio", "Validation", "Test", "Parameters", "Multiply-adds"}
NUMERIC |= {"Bits a weight", "Error", "Retrains"}
RIGHT = ' class="n"'


def number(report: Report, key: str) -> float | None:
    """Return a finite number of a report, None where there is none."""
    value = report.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def positive(report: Report, key: str) -> float | None:
    """Return a number of a report that is at least 1, None where there is none."""
    value = number(report, key)
    return value if value is not None and value >= 1 else None


def fraction(report: Report, key: str) -> float | None:
    """Return a number of a report in [0, 1], None where there is none."""
    value = number(report, key)
    return value if value is not None and 0 <= value <= 1 else None


def entries(value: object) -> Sequence[Any]:
    """Return a list as it is, and anything else as an empty one."""
    return value if isinstance(value, list) else []


def text(value: object) -> str:
    """Return text; nothing for None."""
    return "" if value is None else str(value)


def count(value: float | None, unit: str = "") -> str:
    """Write a whole number with its unit; nothing for None."""
    return "" if value is None else f"{value:,.0f}{unit}"


def percent(value: float | None) -> str:
    """Write a fraction in percent; nothing for None."""
    return "" if value is None else f"{100 * value:.2f} %"


def note(text: str) -> str:
    """Return a paragraph that explains what is above it."""
    return f'<p class="note">{escape(text)}</p>'


def section(title: str, body: str) -> str:
    """Return a section of the page, whose body is HTML already."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def table(head: str, rows: str, name: str, kind: str = "") -> str:
    """Return a table that scrolls by itself, by keys too, where it is too wide."""
    kind = f' class="{kind}"' if kind else ""
    table = f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    label = escape(name)
    return f'<div class="wide" tabindex="0" role="region" aria-label="{label}">{table}</div>'


def head(*titles: str) -> str:
    """Return the cells of a table's head."""
    return "".join(
        f'<th scope="col"{RIGHT if title in NUMERIC else ""}>{escape(title)}</th>'
        for title in titles
    )


def cells(texts: Iterable[str]) -> str:
    """Return the cells of a row of numbers."""
    return "".join(f'<td class="n">{escape(text)}</td>' for text in texts)
