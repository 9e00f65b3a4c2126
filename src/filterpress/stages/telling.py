"""The stage that tells how a run ended, whatever happened: ``report``."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from filterpress import files, reporting
from filterpress.errors import FilterpressError
from filterpress.reporting import End
from filterpress.scratch import Scratch, open_scratch
from filterpress.stages.handover import Report

log = logging.getLogger(__name__)

_FACTS = {
    "Target": "target",
    "Release counter": "release_counter",
    "Digest": "sha256",
    "Channel": "channel",
    "Smallest delta, in bytes": "delta_bytes",
    "Store": "store",
}


def report(place: str, html: Path, *, state: str, error: str | None = None) -> Report:
    """Write the page of a whole run: the verdict first, then all that is known of how it came.

    The last package that was measured is looked for among what the steps of the run have left.
    Where that cannot be read, the page says so; this step never fails because of it.

    Args:
        place: Address of the page in Kubeflow's object store, ``…/<run>/report/…``, or a path.
        html: File to write.
        state: How the steps ended: SUCCEEDED, FAILED or CANCELLED.
        error: What Kubeflow says of the failure, if it says anything.

    Returns:
        Report with the ``verdict``.
    """
    run, told = place.rpartition("/report/")[0], error or ""
    try:
        scratch = open_scratch(run)
        model = _newest(scratch, "evaluated/model.json")
        release = _newest(scratch, "release/report.json")
    except (FilterpressError, ValueError) as unreadable:
        log.warning("%s", unreadable)
        model, release = {}, {}
        told = f"{told} The steps left their pages in {run}, which cannot be read here.".strip()
    published = state == "SUCCEEDED" and bool(release)
    end = End(_verdict(state, told, model, release), published, _facts(release))
    files.write(html, reporting.render(model, end).encode())
    log.info("%s", end.verdict)
    return {"stage": "report", "state": state, "verdict": end.verdict}


def _newest(scratch: Scratch, ending: str) -> dict[str, Any]:
    """Read the object that was written last under names that end so; an empty one without any."""
    name = scratch.newest(ending)
    found = json.loads(scratch.read(name) or b"{}") if name else {}
    return found if isinstance(found, dict) else {}


def _verdict(state: str, error: str, model: Report, release: Report) -> str:
    if state == "SUCCEEDED":
        known = f"Published as release {release['release_counter']}" if release else "Published"
        return reporting.verdict(release, known) if release else f"{known}. {error}".strip()
    history = model.get("history") or [{}]
    decision = history[-1].get("decision")
    if decision and decision not in ("publish", "retrain"):
        return f"Nothing published. {reporting.verdict(history[-1])}"
    ended = "Cancelled" if state == "CANCELLED" else "Failed"
    return f"{ended}, and nothing published: {error or 'the step in red says why'}"


def _facts(release: Report) -> dict[str, object]:
    return {label: release[key] for label, key in _FACTS.items() if release.get(key)}
