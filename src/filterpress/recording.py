"""What a Kubeflow step leaves of its report: a file, and the numbers as metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class Metrics(Protocol):
    """What is used of a KFP ``Metrics`` artifact; the library does not know KFP."""

    path: str

    def log_metric(self, metric: str, value: float) -> None:
        """Set one metric."""


def record(report: Mapping[str, object], metrics: Metrics) -> None:
    """Record the report of a stage on a metrics artifact.

    The whole report becomes the artifact's file: a metrics artifact without one is never found in
    the cache of ``kfp.local``. Only finite numbers become metrics: others end the run.

    Args:
        report: Flat report of a stage.
        metrics: Artifact of the step.

    Example:
        >>> import tempfile
        >>> class Memory(dict):
        ...     path = tempfile.mkdtemp() + "/report"
        ...     log_metric = dict.__setitem__
        >>> memory = Memory()
        >>> record({"n_bytes": 3, "state": "fits", "loss": float("nan")}, memory)
        >>> memory
        {'n_bytes': 3.0}
    """
    path = Path(metrics.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    for name, value in report.items():
        if isinstance(value, int | float) and math.isfinite(value):
            metrics.log_metric(name, float(value))
