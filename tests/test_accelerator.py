"""All that trains, on a device that is none of the CPU's."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from filterpress.stages.tables import pruners, reducers
from filterpress.training import FitConfig
from tests import tiny

TABLES = {"prune": pruners(), "reduce": reducers()}
METHODS = [
    f"{stage} {name}"
    for stage, table in TABLES.items()
    for name, (_, kind) in table.items()
    if issubclass(kind, FitConfig)
]
FORMS = ["steps", "codebooks", "shared values", "kernels", "factors", "rounded activations"]
CASES = ["train", "go on", "evaluate", "saliency", *METHODS, "prune channels"]
CASES += [f"retrain {form}" for form in FORMS]


@pytest.fixture(scope="module")
def told():
    done = subprocess.run(
        [sys.executable, "-m", "tests.train_on_an_accelerator"],
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_an_accelerator_makes_of_a_network_what_the_cpu_makes(case, told):
    assert told[case] == "the same"


def test_the_accelerator_refuses_tensors_of_the_cpu(told):
    assert "Expected all tensors to be on the same device" in told["two devices"]
    assert told.keys() == {*CASES, "two devices"}
