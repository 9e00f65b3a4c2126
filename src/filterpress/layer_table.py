"""The layers of a network on the report page: their bytes, their error, and what became of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from filterpress import page
from filterpress.page import Report

_FATES = ("removed", "merged")  # of filters
_TOLD = {  # of a layer, by what its number is called: what was done, and of what that many
    "templates": ("multiples of", "template"),
    "clusters": ("sharing", "value"),
    "bits": ("rounded to", "bit"),
}
_NOTE = (
    "Error: how far the last reduce expected the layer by itself to move the outputs of the "
    "network, as a divergence in nats; a retrain wins part of it back."
)


class _Row(NamedTuple):
    """What is known of a layer."""

    layer: Report  # as it was last measured, or else last changed
    n_bytes: float | None
    error: float | None
    changes: str


def section(history: Sequence[Report]) -> str:
    """Tabulate the layers that were measured or changed; nothing where none was.

    Args:
        history: Reports of the stages, in order.

    Returns:
        A section of the page with a row a layer, in the order of the network where it was measured.
    """
    layers = _known(history)
    if not layers:
        return ""
    cut, rounded = _filters_cut(history), _last_of(history, "cluster", "reduce")
    pruned = _last_of(history, "prune")
    rows = [
        _Row(
            layer,
            page.number(layer, "n_bytes"),
            page.number(rounded.get(name, {}), "distortion"),
            _changes(layer, cut, pruned.get(name, {}), rounded.get(name, {})),
        )
        for name, layer in layers.items()
    ]
    most = max((row.n_bytes or 0 for row in rows), default=0)
    worst = max((row.error or 0 for row in rows), default=0)
    head = page.head("Layer", "Bytes", "", "Bits a weight")
    if worst > 0:
        head += page.head("Error", "")
    head += page.head("Changes", "Shape")
    table = page.table(head, "".join(_html(row, most, worst) for row in rows), "Layers", "layers")
    return page.section("Layers", table + (page.note(_NOTE) if worst > 0 else ""))


def _known(history: Sequence[Report]) -> dict[str, Report]:
    """Return the layers by name as they were last measured, or else as they were last changed."""
    measured = [
        entry
        for entry in history
        if any(page.number(layer, "n_bytes") is not None for layer in _layers(entry))
    ]
    found = measured[-1:] or history
    return {page.text(layer.get("name")): layer for entry in found for layer in _layers(entry)}


def _layers(entry: Report) -> list[Report]:
    return [layer for layer in page.entries(entry.get("layers")) if isinstance(layer, Mapping)]


def _filters_cut(history: Sequence[Report]) -> Counter[tuple[str, str]]:
    """Count the filters that each layer lost, by its name and by what became of them."""
    cut: Counter[tuple[str, str]] = Counter()
    for entry in history:
        for layer in _layers(entry):
            for fate in _FATES:
                cut[page.text(layer.get("name")), fate] += round(page.number(layer, fate) or 0)
    return cut


def _last_of(history: Sequence[Report], *stages: str) -> dict[str, Report]:
    """Return the layers by name as the last of some stages left them, that changed any."""
    made = [entry for entry in history if entry.get("stage") in stages and _layers(entry)]
    layers = _layers(made[-1]) if made else []
    return {page.text(layer.get("name")): layer for layer in layers}


def _changes(
    layer: Report, cut: Mapping[tuple[str, str], int], pruned: Report, reduced: Report
) -> str:
    name = page.text(layer.get("name"))
    changes = [
        f"{lost:,} filter{'' if lost == 1 else 's'} {fate}"
        for fate in _FATES
        if (lost := cut[name, fate]) > 0
    ]
    for entry in (pruned, reduced):
        if share := page.fraction(entry, "pruned"):
            changes.append(f"{100 * share:.3g} % pruned")
    rank, groups = page.positive(layer, "rank"), page.positive(layer, "groups")
    kind, its_rank = page.text(reduced.get("kind")), page.positive(reduced, "rank")
    if kind and its_rank is not None:
        changes.append(f"{kind} of rank {its_rank:.0f}")
    elif rank is not None:
        parts = "" if groups is None or groups == 1 else f" in {groups:.0f} groups"
        changes.append(f"projected to rank {rank:.0f}{parts}")
    for key, (done, noun) in _TOLD.items():
        if (number := page.positive(reduced, key)) is not None:
            changes.append(f"{done} {number:.0f} {noun}{'' if number == 1 else 's'}")
    return ", ".join(changes)


def _html(row: _Row, most: float, worst: float) -> str:
    bits = page.number(row.layer, "bits_per_weight")
    shape = " x ".join(map(str, page.entries(row.layer.get("shape"))))
    error = ""
    if worst > 0:
        error = page.cells([_error(row.error)]) + _bar("bar error", row.error, worst)
    return (
        f'<tr><th scope="row">{escape(page.text(row.layer.get("name")))}</th>'
        f"{page.cells([page.count(row.n_bytes)])}{_bar('bar', row.n_bytes, most)}"
        f"{page.cells(['' if bits is None else f'{bits:.2f}'])}{error}"
        f"<td>{escape(row.changes)}</td><td>{escape(shape)}</td></tr>"
    )


def _error(value: float | None) -> str:
    if value is None:
        return ""
    return "<0.0001" if 0 < value < 1e-4 else f"{value:.2g}"


def _bar(kind: str, value: float | None, most: float) -> str:
    share = 100 * (value or 0) / most if most > 0 else 0
    bar = f'<i style="width:{share:.1f}%"></i>' if share > 0 else ""
    return f'<td class="{kind}">{bar}</td>'
