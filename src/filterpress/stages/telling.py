"""The stages that tell: ``report`` of a run, whatever happened, and ``curve`` of several sizes."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filterpress import files, reporting
from filterpress.errors import FilterpressError, PackageError
from filterpress.reporting import End
from filterpress.scratch import Scratch, open_scratch
from filterpress.stages.deciding import STORY
from filterpress.stages.handover import Report

log = logging.getLogger(__name__)

_OF_A_POINT = (
    *("max_bytes", "n_bytes", "ratio", "validation_accuracy", "accuracy", "n_parameters", "macs"),
    *("baseline_bytes", "baseline_accuracy", "min_accuracy", "decision", "retrains"),
    "sha256",
)
_SUCCEEDED = ("SUCCEEDED", "COMPLETE")
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

    The last package is looked for among what the steps of the run have left, also where none was
    measured. Where that cannot be read, the page says so; this step never fails because of it.

    Args:
        place: Address of the page in Kubeflow's object store, ``…/<run>/report/…``, or a path.
        html: File to write.
        state: How the steps ended, as Kubeflow has it: SUCCEEDED on one machine; COMPLETE, FAILED
            or RUNNING on a cluster, where it lags behind and may stay at RUNNING for good. A
            release that was left counts for more.
        error: What Kubeflow says of the failure, if it says anything.

    Returns:
        Report with the ``verdict``.
    """
    run, told = place.rpartition("/report/")[0], error or ""
    try:
        scratch = open_scratch(run)
        release = _newest(scratch, "release/report.json")
        model = _newest(scratch, f"release/{STORY}" if release else "model.json")
    except (FilterpressError, ValueError) as unreadable:
        log.warning("%s", unreadable)
        model, release = None, {}
        told = f"{told} The steps left their pages in {run}, which cannot be read here.".strip()
    end = End(_verdict(state, told, model, release), bool(release), _facts(release))
    files.write(html, reporting.render(model or {}, end).encode())
    log.info("%s", end.verdict)
    return {"stage": "report", "state": state, "verdict": end.verdict}


def curve(packages: Sequence[Path], html: Path) -> Report:
    """Set several sizes of one network side by side.

    Args:
        packages: Evaluated packages that come from one trained network.
        html: File to write, with accuracy against size.

    Returns:
        Report with the ``tries``, from the largest file to the smallest, and the numbers of the
        smallest file that keeps the floor; without these if none does.

    Raises:
        ValueError: There are no packages.
        PackageError: One is damaged, or was not evaluated.
    """
    if not packages:
        raise ValueError("packages must be at least one, got none")
    from filterpress import package

    descriptions = [package.read_description(path) for path in packages]
    tries = sorted((_measured(d) for d in descriptions), key=_size, reverse=True)
    kept = [entry for entry in tries if entry["decision"] == "publish"]
    found = {"stage": "curve", "tries": tries, **(kept[-1] if kept else {}), "decision": None}
    verdict = (
        reporting.verdict(found, "The smallest that keeps the floor")
        if kept
        else f"None of {len(tries)} sizes keeps the floor."
    )
    model = descriptions[0] | {"history": [found]}
    files.write(html, reporting.render(model, End(verdict, bool(kept))).encode())
    log.info("%s", verdict)
    return found


def _measured(description: Report) -> Report:
    """Return the numbers of the last evaluation of a package, and how often it was retrained."""
    evaluated = [entry for entry in description["history"] if entry["stage"] == "evaluate"]
    if not evaluated:
        raise PackageError("every package must be an evaluated one")
    return {key: evaluated[-1].get(key) for key in _OF_A_POINT}


def _size(point: Report) -> int:
    return int(point["n_bytes"])


def _newest(scratch: Scratch, ending: str) -> dict[str, Any]:
    """Read the object that was written last under names that end so; an empty one without any."""
    name = scratch.newest(ending)
    found = json.loads(scratch.read(name) or b"{}") if name else {}
    return found if isinstance(found, dict) else {}


def _verdict(state: str, error: str, model: Report | None, release: Report) -> str:
    """Say how a run ended; only what gave up is put down to its numbers."""
    if release:
        return reporting.published(release)
    if state in _SUCCEEDED:
        return f"Published. {error}".strip()
    if model is None:  # then a state is all there is, and one that lags behind
        return f"Whether it published is not known here: the steps are said to be {state}. {error}"
    last = (model.get("history") or [{}])[-1]
    ended, more = "Failed", " The log of the step that failed says more."
    if state == "CANCELLED":
        ended, more = "Cancelled", ""
    elif last.get("decision") in ("give-up", "too-big"):
        return f"Nothing published. {reporting.verdict(last)}"
    known = f" after {reporting.stage_name(last)}" if last else ""
    why = f": {error.rstrip('.')}." if error else "."
    return f"{ended}{known}, and nothing published{why}{more}"


def _facts(release: Report) -> dict[str, object]:
    return {label: release[key] for label, key in _FACTS.items() if release.get(key)}
