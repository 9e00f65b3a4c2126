"""The story of a package as one HTML page, and its numbers as rows for a terminal.

The page holds everything itself (inline SVG and CSS, no script, nothing fetched), so it can be
mailed, stored beside the package, and shown by Kubeflow in its sandboxed frame. Reports are read
leniently: what a stage did not say is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from filterpress import chart, confusion_table, files, layer_table, page
from filterpress.errors import PackageError
from filterpress.page import Report

_COLUMNS = ("n_bytes", "ratio", "validation_accuracy", "accuracy", "n_parameters", "macs")
_SHOWN_ELSEWHERE = {"stage", "round", "decision", "state", *_COLUMNS}
_SHOWN_ELSEWHERE |= {"layers", "tries", "confusion", "pruned"}
_NOUNS = {  # what a count is of, by what was done to it
    "removed": "filter",
    "merged": "filter",
    "dropped": "block",
    "shared": "layer",
    "projected": "layer",
    "cut": "layer",
}
_SHOWN_ELSEWHERE |= _NOUNS.keys()
_THRESHOLDS = ("max_bytes", "min_accuracy")
_OUTCOMES = {
    "publish": "Both thresholds hold",
    "retrain": "Not accurate enough yet",
    "next": "Not accurate enough in this round",
    "give-up": "Given up: not accurate enough",
    "too-big": "Over the size budget",
}


# Nothing of a try is published yet.
_OF_A_TRY = {"publish": "accurate enough", "give-up": "not accurate enough", "too-big": "too big"}


class End(NamedTuple):
    """How a run ended, where there is more to say than the last stage knows."""

    verdict: str
    good: bool | None  # None where it is neither
    facts: Mapping[str, object] = {}  # of the release


def write_html(package: Path, out: Path, report: Report | None = None) -> None:
    """Write the page that tells how a package came about.

    Args:
        package: Package directory; only its ``model.json`` is read.
        out: File to write; it appears whole or not at all.
        report: Report of the stage whose page it is, where that may have left the package as it
            was: it passed it on, or published it.

    Raises:
        PackageError: ``model.json`` is missing or is no JSON object.
    """
    source = package / "model.json"
    try:
        model = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PackageError(f"{source} cannot be read: {error}") from error
    if not isinstance(model, dict):
        raise PackageError(f"{source} must hold a JSON object, got {type(model).__name__}")
    files.write(out, render(model, _end(report or {})).encode())


def render(model: Report, end: End | None = None) -> str:
    """Make the page of a ``model.json``.

    Args:
        model: The object in ``model.json``; the page is made of its ``history`` and ``baseline``.
        end: How the run ended; without it the page says what the last stage did.

    Returns:
        One HTML document that refers to nothing outside itself.

    Example:
        >>> page = render({"model": "<b>", "history": [{"stage": "train", "n_bytes": 10}]})
        >>> "&lt;b&gt;" in page, "<b>" in page
        (True, False)
    """
    history = [entry for entry in page.entries(model.get("history")) if isinstance(entry, Mapping)]
    final = _final(model, history)
    frame = Template(resources.files("filterpress").joinpath("report.html").read_text("utf-8"))
    return frame.substitute(
        title=escape(f"filterpress: {model.get('model', 'network')}"),
        network=escape(_network(model)),
        outcome=_tone(final, end),
        verdict=escape(end.verdict if end else verdict(final)),
        cards="".join(map(_html, _cards(final))),
        release=_release_section(end.facts if end else {}),
        chart=_chart_section(history, final),
        search=_search_section(history, final),
        confusion=confusion_table.section(history),
        layers=layer_table.section(history),
        stages=_stages_section(history),
    )


def verdict(report: Report, outcome: str = "") -> str:
    """Say in one line how a run ended.

    Args:
        report: Report of a stage or of ``compress``.
        outcome: What it came to; without it what its decision means.

    Example:
        >>> verdict({"decision": "publish", "n_bytes": 8000, "ratio": 12.0, "accuracy": 0.95})
        'Both thresholds hold: 8,000 bytes, 12.0 times smaller, 95.00 % on the test set.'
    """
    done = f"After {stage_name(report)}" if report.get("stage") else "Not evaluated yet"
    outcome = outcome or _OUTCOMES.get(str(report.get("decision", "")), done)
    n_bytes, ratio = page.number(report, "n_bytes"), _ratio(report)
    accuracy, change = page.percent(page.number(report, "accuracy")), _change(report, "accuracy")
    facts = [
        "" if n_bytes is None else f"{n_bytes:,.0f} bytes",
        "" if ratio is None else f"{ratio:,.1f} times smaller",
        accuracy and f"{accuracy} on the test set" + (change and f" ({change})"),
    ]
    told = ", ".join(fact for fact in facts if fact)
    return f"{outcome}: {told}." if told else f"{outcome}."


def summary_rows(report: Report) -> list[tuple[str, str]]:
    """Give the numbers of a report as labelled text, for a table in a terminal.

    Args:
        report: Report of ``evaluate`` or ``compress``; what it lacks is left out.

    Returns:
        Pairs of label and value, in reading order.

    Example:
        >>> summary_rows({"n_bytes": 8000, "baseline_bytes": 96000, "accuracy": 0.95})
        [('Size', '8,000 bytes, 12.0x smaller than 96,000'), ('Test accuracy', '95.00 %')]
    """
    rows = [(card.label, ", ".join([card.value, *card.notes])) for card in _cards(report)]
    tries = [
        f"{count:.0f} {noun}{'' if count == 1 else 's'}"
        for key, noun in (("round", "round"), ("retrains", "retrain"))
        if (count := page.number(report, key)) is not None
    ]
    rows += [
        ("Decision", page.text(report.get("decision"))),
        ("Tries", ", ".join(tries)),
        ("Digest", page.text(report.get("sha256"))),
        ("Package", page.text(report.get("package"))),
        ("Release", page.text(report.get("release"))),
        ("Page", page.text(report.get("html"))),
    ]
    return [(label, value) for label, value in rows if value]


def _ratio(report: Report) -> float | None:
    ratio = page.number(report, "ratio")
    n_bytes, baseline = page.number(report, "n_bytes"), page.number(report, "baseline_bytes")
    if ratio is None and n_bytes and baseline:
        return baseline / n_bytes
    return ratio


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:,.1f}x"


def _change(report: Report, key: str) -> str:
    accuracy, baseline = page.number(report, key), page.number(report, f"baseline_{key}")
    if accuracy is None or baseline is None:
        return ""
    return f"{100 * (accuracy - baseline):+.2f} points"


def _end(report: Report) -> End | None:
    """Tell of a stage what the package does not."""
    if report.get("passed_on"):
        return End(f"Nothing to do here, passed on as it was. {verdict(report)}", None)
    return End(published(report), True) if report.get("release_counter") else None


def published(release: Report) -> str:
    """Say in one line what a release is."""
    return verdict(release, f"Published as release {release['release_counter']}")


def _tone(final: Report, end: End | None) -> str:
    """Choose how the verdict looks: a stage on the way is neither good nor bad."""
    good = final["decision"] == "publish" if final.get("decision") else None
    good = end.good if end else good
    return "plain" if good is None else "good" if good else "open"


def _final(model: Report, history: Sequence[Report]) -> dict[str, Any]:
    """Take the last report; add the thresholds of those before, and the baseline's numbers."""
    final: dict[str, Any] = dict((history or [{}])[-1])
    if final.get("stage") == "train":  # the baseline itself
        known = [key for key in final if key == "ratio" or str(key).startswith("baseline_")]
        return {key: value for key, value in final.items() if key not in known}
    for entry in reversed(history):
        for key in _THRESHOLDS:
            if final.get(key) is None and key in entry:
                final[key] = entry[key]
    baseline = model.get("baseline")
    if isinstance(baseline, Mapping):
        for key, value in baseline.items():
            name = "bytes" if key == "n_bytes" else str(key)
            final.setdefault(f"baseline_{name}", value)
    return final


def _network(model: Report) -> str:
    shape = " x ".join(map(str, page.entries(model.get("input_shape"))))
    classes = f"{model['n_classes']} classes" if "n_classes" in model else ""
    return " · ".join(part for part in (page.text(model.get("model")), shape, classes) if part)


class _Card(NamedTuple):
    """A headline number."""

    label: str
    value: str
    notes: list[str]


def _cards(report: Report) -> list[_Card]:
    """Give the headline numbers that are known."""
    cards = [
        _size_card(report),
        _accuracy_card(report, "Validation", "validation_accuracy"),
        _accuracy_card(report, "Test", "accuracy"),
    ]
    for label, key in (("Parameters", "n_parameters"), ("Multiply-adds", "macs")):
        before = page.count(page.number(report, f"baseline_{key}"))
        notes = [f"from {before}"] if before else []
        cards.append(_Card(label, page.count(page.number(report, key)), notes))
    return [card for card in cards if card.value]


def _size_card(report: Report) -> _Card:
    ratio, baseline_bytes = _ratio(report), page.count(page.number(report, "baseline_bytes"))
    notes = [] if ratio is None else [f"{ratio:,.1f}x smaller"]
    if notes and baseline_bytes:
        notes = [f"{notes[0]} than {baseline_bytes}"]
    allowed = page.count(page.positive(report, "max_bytes"), " allowed")
    notes += [allowed] if allowed else []
    return _Card("Size", page.count(page.number(report, "n_bytes"), " bytes"), notes)


def _accuracy_card(report: Report, split: str, key: str) -> _Card:
    """Compare an accuracy with the trained network's; thresholds are about the validation set."""
    baseline = page.percent(page.number(report, f"baseline_{key}"))
    notes = [f"{_change(report, key)} from {baseline}"] if _change(report, key) else []
    needed = page.percent(page.fraction(report, "min_accuracy"))
    notes += [f"{needed} needed"] if needed and key == "validation_accuracy" else []
    return _Card(f"{split} accuracy", page.percent(page.number(report, key)), notes)


def _html(card: _Card) -> str:
    notes = "".join(f'<dd class="note">{escape(note)}</dd>' for note in card.notes)
    return (
        f'<div class="card"><dt>{escape(card.label)}</dt><dd>{escape(card.value)}</dd>{notes}</div>'
    )


def stage_name(entry: Report) -> str:
    """Name a stage as the page does, with its round."""
    stage, round = page.text(entry.get("stage")) or "stage", page.number(entry, "round")
    return stage if round is None else f"{stage}, round {round:.0f}"


def _chart_section(history: Sequence[Report], final: Report) -> str:
    """Draw the path on the validation set, which thresholds are about, or else on the test set."""
    for split, key in (("Validation", "validation_accuracy"), ("Test", "accuracy")):
        points = [
            chart.Point(number, stage_name(entry), n_bytes, accuracy)
            for number, entry in enumerate(history, 1)
            if (n_bytes := page.positive(entry, "n_bytes")) is not None
            if (accuracy := page.fraction(entry, key)) is not None
        ]
        if len(points) > 1:
            max_bytes = page.positive(final, "max_bytes")
            min_accuracy = page.fraction(final, "min_accuracy")
            drawing = chart.draw(
                points, split=split, max_bytes=max_bytes, min_accuracy=min_accuracy
            )
            return page.section("Path", drawing)
    return ""


def _search_section(history: Sequence[Report], final: Report) -> str:
    """Draw and tabulate the sizes that a search tried, from the largest file to the smallest."""
    tries = [
        (number, entry, n_bytes)
        for report in history
        for number, entry in enumerate(page.entries(report.get("tries")), 1)
        if isinstance(entry, Mapping) and (n_bytes := page.positive(entry, "n_bytes")) is not None
    ]
    tries.sort(key=lambda found: -found[2])
    points = [
        chart.Point(number, f"try {number}", n_bytes, accuracy)
        for number, entry, n_bytes in tries
        if (accuracy := page.fraction(entry, "validation_accuracy")) is not None
        if entry.get("decision") != "too-big"  # says nothing of the size asked for
    ]
    if not points:
        return ""
    passed = {number for number, entry, _ in tries if entry.get("decision") == "publish"}
    kept = min(
        (p for p in points if p.number in passed), key=lambda point: point.n_bytes, default=None
    )
    floor = page.fraction(final, "min_accuracy")
    drawing = chart.draw(points, split="Validation", min_accuracy=floor, kept=kept)
    rows = "".join(_try_row(number, entry) for number, entry, _ in tries)
    table = page.table(page.head("#", *tried({})), rows, "Sizes tried")
    return page.section("Sizes tried", drawing + table)


def _try_row(number: int, entry: Report) -> str:
    outcome, *numbers = tried(entry).values()
    return f'<tr><td class="n">{number}</td><td>{escape(outcome)}</td>{page.cells(numbers)}</tr>'


def tried(entry: Report) -> dict[str, str]:
    """Give the numbers of a size that was tried as text, by the title of their column.

    Args:
        entry: Report of an evaluation; what it lacks is empty.

    Example:
        >>> tried({"decision": "publish", "n_bytes": 8000, "ratio": 12.0})["Bytes"]
        '8,000'
    """
    return {
        "Outcome": _OF_A_TRY.get(page.text(entry.get("decision")), _outcome(entry)),
        "Bytes": page.count(page.number(entry, "n_bytes")),
        "Ratio": _times(_ratio(entry)),
        "Validation": page.percent(page.number(entry, "validation_accuracy")),
        "Test": page.percent(page.number(entry, "accuracy")),
        "Retrains": page.count(page.number(entry, "retrains")),
    }


def _release_section(facts: Mapping[str, object]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(page.text(value))}</td></tr>'
        for name, value in facts.items()
    )
    return page.section("Release", page.table("", rows, "Release", "facts")) if rows else ""


def _stages_section(history: Sequence[Report]) -> str:
    if not history:
        return ""
    rows = "".join(_stage_row(number, entry) for number, entry in enumerate(history, 1))
    head = page.head("#", "Stage", "Outcome", "Bytes", "Ratio", "Validation", "Test", "Change")
    table = page.table(head + page.head("Parameters", "Multiply-adds", "More"), rows, "Stages")
    return page.section("Stages", table)


def _stage_row(number: int, entry: Report) -> str:
    numbers = (
        page.count(page.number(entry, "n_bytes")),
        _times(_ratio(entry)),
        page.percent(page.number(entry, "validation_accuracy")),
        page.percent(page.number(entry, "accuracy")),
    )
    counts = (page.count(page.number(entry, key)) for key in ("n_parameters", "macs"))
    return (
        f'<tr><td class="n">{number}</td><th scope="row">{escape(stage_name(entry))}</th>'
        f"<td>{escape(_outcome(entry))}</td>{page.cells(numbers)}<td>{escape(_changed(entry))}</td>"
        f"{page.cells(counts)}<td>{_more(entry)}</td></tr>"
    )


def _outcome(entry: Report) -> str:
    outcome = page.text(entry.get("decision") or entry.get("state"))
    return {"next": "next round", "too-big": "too big"}.get(outcome, outcome)


def _changed(entry: Report) -> str:
    """Say what a stage did to the network as a whole, also where that was nothing."""
    done = [
        f"{count:,.0f} {noun}{'' if count == 1 else 's'} {did}"
        for did, noun in _NOUNS.items()
        if (count := page.number(entry, did)) is not None
    ]
    if (pruned := page.number(entry, "pruned")) is not None:
        done.append(f"{100 * pruned:.3g} % of the weights pruned")
    return ", ".join(done)


def _more(entry: Report) -> str:
    rest = {key: value for key, value in entry.items() if key not in _SHOWN_ELSEWHERE}
    if not rest:
        return ""
    lines = "".join(
        f"<dt>{escape(str(key))}</dt>"
        f"<dd>{escape(value if isinstance(value, str) else json.dumps(value, default=str))}</dd>"
        for key, value in rest.items()
    )
    return f"<details><summary>{len(rest)} values</summary><dl>{lines}</dl></details>"
