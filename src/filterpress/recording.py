"""What a Kubeflow step leaves of its report: a file, numbers, and what is said of its package.

The library does not know KFP: it uses of its artifacts what is named here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

_OF_A_MODEL = ("stage", "round", "n_bytes", "ratio", "validation_accuracy", "accuracy", "sha256")


class Artifact(Protocol):
    """What is used of any KFP artifact."""

    path: str
    metadata: dict[str, Any]


class Metrics(Artifact, Protocol):
    """What is used of a KFP ``Metrics`` artifact."""

    def log_metric(self, metric: str, value: float) -> None:
        """Set one metric."""


class ClassificationMetrics(Artifact, Protocol):
    """What is used of a KFP ``ClassificationMetrics`` artifact."""

    def log_confusion_matrix(self, categories: list[str], matrix: list[list[int]]) -> None:
        """Set the counts, with a row a label."""


def record(report: Mapping[str, Any], metrics: Metrics, model: Artifact) -> None:
    """Record the report of a stage on its metrics and on its package.

    The whole report becomes the file of the metrics: an artifact without one is never found in the
    cache of ``kfp.local``. Only finite numbers become metrics: others end the run.

    Args:
        report: Flat report of a stage.
        metrics: Metrics of the step.
        model: Package that the step wrote, or the receipt of a release.

    Example:
        >>> import tempfile
        >>> class Memory(dict):
        ...     path = tempfile.mkdtemp() + "/report"
        ...     log_metric = dict.__setitem__
        ...     metadata = {}
        >>> memory = Memory()
        >>> record({"n_bytes": 3, "state": "fits", "loss": float("nan")}, memory, memory)
        >>> memory, memory.metadata
        ({'n_bytes': 3.0}, {'n_bytes': 3})
    """
    _write(metrics, report)
    for name, value in report.items():
        if isinstance(value, int | float) and math.isfinite(value):
            metrics.log_metric(name, float(value))
    known = {key: report[key] for key in _OF_A_MODEL if report.get(key) is not None}
    model.metadata.update(known)


def record_confusion(report: Mapping[str, Any], metrics: ClassificationMetrics) -> None:
    """Record what was taken for what, where the report has it.

    Args:
        report: Report of ``evaluate``.
        metrics: Classification metrics of the step.
    """
    confusion: Mapping[str, Sequence[Any]] = report.get("confusion", {})
    _write(metrics, confusion)
    if confusion:
        metrics.log_confusion_matrix(list(confusion["classes"]), list(confusion["counts"]))


def _write(artifact: Artifact, content: Mapping[str, Any]) -> None:
    path = Path(artifact.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
