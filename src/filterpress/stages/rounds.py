"""A round of the loop, and the folder that its stages write their packages to."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filterpress.stages.deciding import evaluate
from filterpress.stages.handover import Report
from filterpress.stages.learning import retrain
from filterpress.stages.shrinking import cluster, reduce

log = logging.getLogger(__name__)
Stage = Callable[..., Report]


@dataclass(frozen=True)
class Run:
    """A run's folder and settings."""

    out: Path
    given: Report

    def step(self, place: str, stage: Stage, *packages: Path, **own: Any) -> tuple[Path, Report]:
        """Run a stage, unless its package is there, with every setting it has a parameter for.

        Args:
            place: Folder of the package below the run's.
            stage: The stage.
            packages: Packages it reads.
            own: Settings of this step alone.

        Returns:
            The package it wrote, and its report.
        """
        written = self.out / place
        if not (written / "report.json").exists():
            log.info("%s", place)
            for draft in written.parent.glob(f".{written.name}-*"):
                shutil.rmtree(draft)  # of a stage that was killed
            kinds = inspect.signature(stage).parameters.values()
            named = {p.name for p in kinds if p.kind is p.KEYWORD_ONLY}
            config = {"config": self.given.get(f"{stage.__name__}_config")}
            settings = {k: v for k, v in (self.given | config | own).items() if k in named}
            stage(*packages, written, **settings)
        return written, json.loads((written / "report.json").read_text())


def one_round(
    run: Run, trained: Path, last: Path, number: int, state: str = "too-big"
) -> tuple[Path, str]:
    """Cluster and reduce until the file fits, then retrain until it is accurate.

    Args:
        run: Where, and with which settings.
        trained: Package of the trained network.
        last: Package to start from.
        number: Number of the round, from 1.
        state: fits where this package's file does.

    Returns:
        The last package, and the decision taken on it.
    """
    here = f"round-{number}"
    for attempt in range(1, run.given["size_tries"] + 1):
        if state == "too-big":
            last, _ = run.step(f"{here}/cluster-{attempt}", cluster, last, round=number)
            last, report = run.step(f"{here}/reduce-{attempt}", reduce, last, round=number)
            state = report["state"]
    last, report = run.step(f"{here}/evaluate", evaluate, last, state=state, round=number)
    for attempt in range(1, run.given["max_retrains"] + 1):
        if report["decision"] == "retrain":
            last, _ = run.step(f"{here}/retrain-{attempt}", retrain, last, trained)
            last, report = run.step(
                f"{here}/evaluate-{attempt}",
                evaluate,
                last,
                state="retrain",
                round=number,
                retrains=attempt,
            )
    return last, report["decision"]
