"""The confusion matrix of a network on the report page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from filterpress import page
from filterpress.page import Report

_UPRIGHT = 4  # characters of the longest name of a class that is written upright over its column


def section(history: Sequence[Report]) -> str:
    """Tabulate the last counts of what was taken for what; nothing where nothing was counted.

    Args:
        history: Reports of the stages, in order.

    Returns:
        A section of the page with a row a label, stronger in colour where its share is larger.
    """
    found = [c for entry in history if isinstance(c := entry.get("confusion"), Mapping)]
    classes = [page.text(name) for name in page.entries(found[-1].get("classes"))] if found else []
    counts = [page.entries(row) for row in page.entries(found[-1].get("counts"))] if found else []
    if not classes or [len(row) for row in counts] != [len(classes)] * len(classes):
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(_confused(row, column, column == number) for column in range(len(row)))
        + "</tr>"
        for number, (name, row) in enumerate(zip(classes, counts, strict=True))
    )
    kind = "across" if max(map(len, classes)) > _UPRIGHT else "n"
    head = page.head("label \N{DOWNWARDS ARROW}, taken for \N{RIGHTWARDS ARROW}") + "".join(
        f'<th scope="col" class="{kind}"><span title="{escape(name)}">{escape(name)}</span></th>'
        for name in classes
    )
    whole = [_whole(row) for row in counts]
    right, total = sum(row[k] for k, row in enumerate(whole)), sum(map(sum, whole))
    note = page.note(
        f"{right:,} of {total:,} images right. Rows are the labels, columns what the network took "
        "the images for. The stronger the colour, the larger the share of the row; mistakes have "
        "a colour of their own, which shows small shares already."
    )
    table = page.table(head, rows, "Confusion", "confusion")
    return page.section("Confusion on the test set", table + note)


def _confused(row: Sequence[object], column: int, right: bool) -> str:
    numbers = _whole(row)
    if not numbers[column]:
        return "<td></td>"
    share = numbers[column] / sum(numbers)
    kind = "right" if right else "wrong"
    return f'<td class="n {kind}" style="--share:{share:.3f}">{numbers[column]}</td>'


def _whole(row: Sequence[object]) -> list[int]:
    return [max(0, value) if isinstance(value, int) else 0 for value in row]
