import re
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 60


@pytest.mark.slow
def test_a_minute_of_fuzzing_finds_nothing_but_bitstream_errors(tmp_path):
    pytest.importorskip("atheris", reason="atheris, which finds the inputs, is not installed")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    limits = f"-max_total_time={SECONDS}", "-timeout=10", "-rss_limit_mb=2048", "-max_len=1024"
    run = subprocess.run(
        [
            # A process is said to have had the memory of the one that started it, here a test
            # runner's: of a shell in between, that is little.
            *("sh", "-c", '"$@"; exit $?', "sh"),
            *(sys.executable, Path(__file__).with_name("fuzz_decode.py"), corpus),
            *(*limits, f"-artifact_prefix={tmp_path}/"),
        ],
        capture_output=True,
        text=True,
        timeout=4 * SECONDS,
        check=False,
    )
    crashes = {path.name: path.read_bytes().hex() for path in tmp_path.glob("*-*")}
    assert run.returncode == 0, f"{crashes}\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}"
    assert not crashes
    (n_runs,) = re.findall(r"^Done (\d+) runs", run.stderr, re.MULTILINE)
    assert int(n_runs) > 1000
    assert len(list(corpus.iterdir())) > 20  # inputs that led to new code: coverage guides
