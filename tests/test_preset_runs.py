"""Every preset, from a trained network to a signed release that runs without torch."""

from __future__ import annotations

import json

import pytest

from filterpress import settings, stages
from filterpress.loop import compress
from filterpress.presets import PRESETS
from filterpress.stages.shrinking import trains
from filterpress.stages.tables import chosen
from tests import tiny

pytestmark = pytest.mark.slow
SIZE = {"max_size": "2x", "min_accuracy": "-10pp"}
QUICK = {"epochs": 2, "batch_size": 64, "precision": "float32"}


def quick(preset):
    """Let the stages of a preset that train do so for a moment."""
    given = {}
    for stage in ("prune", "reduce", "retrain"):
        choice = chosen(stage, preset, "{}")
        if choice.name != settings.NONE and trains(choice):
            given[f"{stage}_config"] = json.dumps(QUICK)
    return given


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with tiny.one_thread():
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    out = tmp_path_factory.mktemp("weights") / "package"
    given = {name: tiny.COMMON[name] for name in ("model", "task")}
    stages.train(out, **given, config=tiny.TRAINED)
    return str(out / "weights.safetensors")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_ends_in_a_release_that_meets_the_thresholds(preset, weights, tmp_path):
    given = {**tiny.COMMON, **SIZE, **quick(preset), "weights": weights, "preset": preset}
    report = compress(tmp_path / "run", **given)
    package = tmp_path / "run" / "round-1"
    last = max(package.glob("evaluate*"), key=lambda path: len(tiny.history(path)))
    tiny.check_published(tmp_path / "run", given, last, report)
    methods = {h["stage"]: h["method"] for h in tiny.history(last) if "method" in h}
    for stage in ("prune", "cluster", "reduce"):
        assert methods[stage] == chosen(stage, preset, "{}").name
