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
SETTINGS = tiny.RUNS["retrained"]


def from_outside(start, out):
    given = [*tiny.flags(SETTINGS), "--out", str(out), "--json"]
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


def test_library_command_line_and_pipeline_make_the_same_packages(tmp_path):
    with tiny.one_thread():
        library = compress(tmp_path / "library", **SETTINGS)
    line = from_outside(["-m", "filterpress", "compress"], tmp_path / "line")
    pipeline = from_outside([str(tiny.ROOT / "pipeline.py"), "run"], tmp_path / "pipeline")
    expected = tiny.packages(tmp_path / "library")
    assert len(expected) == len(tiny.PATHS["retrained"][0])
    assert all(set(content) >= set(tiny.FILES[:3]) for content in expected.values())
    assert tiny.packages(tmp_path / "line") == expected
    assert tiny.packages(tmp_path / "pipeline") == expected
    assert library["sha256"] == line["sha256"] == pipeline["sha256"]
    assert library["target"] == line["target"] == pipeline["target"]
    files = [tmp_path / way / "model.fpk" for way in ("library", "line", "pipeline")]
    assert len({file.read_bytes() for file in files}) == 1
    pages = [tmp_path / way / "report.html" for way in ("library", "line", "pipeline")]
    assert len({page.read_bytes() for page in pages}) == 1
