"""What a step leaves on the artifacts of Kubeflow: those of KFP itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kfp import dsl

from filterpress import recording


@pytest.fixture
def artifact(tmp_path):
    def make(kind):
        return kind(name="it", uri=str(tmp_path / "new" / kind.__name__), metadata={})

    return make


def test_a_report_becomes_the_file_the_metrics_and_what_is_said_of_the_package(artifact):
    metrics, model = artifact(dsl.Metrics), artifact(dsl.Model)
    report = {"stage": "reduce", "n_bytes": 3, "accuracy": None, "loss": float("inf"), "theta": 0.5}
    recording.record(report, metrics, model)
    assert json.loads(Path(metrics.path).read_text())["stage"] == "reduce"
    assert metrics.metadata == {"n_bytes": 3.0, "theta": 0.5}
    assert model.metadata == {"stage": "reduce", "n_bytes": 3}


def test_counts_become_the_matrix_that_the_ui_draws(artifact):
    metrics = artifact(dsl.ClassificationMetrics)
    confusion = {"classes": ["cat", "dog"], "counts": [[3, 1], [0, 4]]}
    recording.record_confusion({"confusion": confusion}, metrics)
    matrix = metrics.metadata["confusionMatrix"]
    assert [entry["displayName"] for entry in matrix["annotationSpecs"]] == ["cat", "dog"]
    assert [row["row"] for row in matrix["rows"]] == [[3, 1], [0, 4]]


def test_without_counts_there_is_a_file_for_the_cache_and_no_matrix(artifact):
    metrics = artifact(dsl.ClassificationMetrics)
    recording.record_confusion({"stage": "evaluate"}, metrics)
    assert json.loads(Path(metrics.path).read_text()) == {}
    assert metrics.metadata == {}
