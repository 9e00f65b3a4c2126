"""One run as a library call, on the command line and as a pipeline: the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from filterpress.loop import compress
from tests import tiny

pytestmark = pytest.mark.slow
FIT = json.dumps({"epochs": 2, "batch_size": 64, "precision": "float32"})
CASES = {
    "default": (tiny.RUNS["retrained"], tiny.PATHS["retrained"][0]),
    # its prune trains
    "learned-threshold": (
        {
            **tiny.RUNS["at once"],
            "max_size": "6x",
            "preset": "learned-threshold",
            "prune_config": FIT,
        },
        tiny.PATHS["at once"][0],
    ),
}


def from_outside(start, settings, out):
    given = [*tiny.flags(settings), "--out", str(out), "--json"]
    ended = subprocess.run(
        [sys.executable, *start, *given],
        capture_output=True,
        text=True,
        check=False,
        cwd=tiny.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tiny.ROOT)},
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize("case", CASES)
def test_library_command_line_and_pipeline_make_the_same_packages(case, tmp_path):
    settings, path = CASES[case]
    with tiny.one_thread():
        library = compress(tmp_path / "library", **settings)
    line = from_outside(["-m", "filterpress", "compress"], settings, tmp_path / "line")
    start = [str(tiny.ROOT / "pipeline.py"), "run"]
    pipeline = from_outside(start, settings, tmp_path / "pipeline")
    expected = tiny.packages(tmp_path / "library")
    assert len(expected) == len(path)
    assert all(set(content) >= set(tiny.FILES[:3]) for content in expected.values())
    assert tiny.packages(tmp_path / "line") == expected
    assert tiny.packages(tmp_path / "pipeline") == expected
    assert library["sha256"] == line["sha256"] == pipeline["sha256"]
    assert library["target"] == line["target"] == pipeline["target"]
    files = [tmp_path / way / "model.fpk" for way in ("library", "line", "pipeline")]
    assert len({file.read_bytes() for file in files}) == 1
    pages = [tmp_path / way / "report.html" for way in ("library", "line", "pipeline")]
    assert len({page.read_bytes() for page in pages}) == 1
