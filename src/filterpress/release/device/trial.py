"""A trial: run a new network in a process of its own, and compare it with what is expected.

A network that crashes, hangs or eats the memory takes that process with it and nothing else. What
is expected comes with the channel (``health``):

``seed``, ``count``
    Which images to try; see `filterpress.release.golden`.
``outputs``, ``atol``
    What the network answers to each of them, and how far off each value may be.
``max_ms``, ``max_mb``
    Bounds of the median time of one image and of the memory of the process; 0 is no bound.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from filterpress.release.golden import images

TIMEOUT_S = 120
_ADDRESS_SPACE = 2**33  # a hostile network fails here before it takes the vehicle's memory


class Verdict(NamedTuple):
    """How a trial went.

    Attributes:
        reason: Why the network failed; empty if it passed.
        final: Whether it would fail again: it was not cut short, nor slow on a vehicle that may
            have been busy.
    """

    reason: str
    final: bool


def run(model: Path, health: Mapping[str, Any], timeout_s: float = TIMEOUT_S) -> Verdict:
    """Try a network in a process of its own.

    Args:
        model: ONNX file.
        health: What to expect of it.
        timeout_s: When to give up.

    Returns:
        How it went.
    """
    command = [sys.executable, "-m", __name__, str(model), str(int(timeout_s) + 1)]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(dict(health)),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Verdict(f"it did not answer within {timeout_s} s", final=False)
    try:
        return Verdict(**json.loads(done.stdout))
    except (ValueError, TypeError):
        last = done.stderr.strip().rpartition("\n")[2][-200:]
        return Verdict(f"it ended with code {done.returncode}: {last}", final=False)


def examine(model: bytes, health: Mapping[str, Any]) -> Verdict:
    """Run a network and compare.

    Args:
        model: ONNX model with one input ``(N, *shape)``.
        health: What to expect of it.

    Returns:
        How it went.
    """
    try:
        answers, milliseconds = _answers(model, int(health["seed"]), int(health["count"]))
        expected = np.asarray(health["outputs"], np.float64)
        bounds = {name: float(health[name]) for name in ("atol", "max_ms", "max_mb")}
    except Exception as error:  # noqa: BLE001 (whatever the runtime raises, the network failed)
        return Verdict(f"it does not run: {type(error).__name__}: {str(error)[:200]}", final=True)
    if not np.isfinite(answers).all():
        return Verdict("its answers are not finite", final=True)
    if answers.shape != expected.shape:
        return Verdict(f"its answers have shape {answers.shape}, not {expected.shape}", final=True)
    # Turned round, NaN among the expectations would pass for agreement.
    furthest = float(np.abs(answers - expected).max(initial=0))
    if not furthest <= bounds["atol"]:
        return Verdict(
            f"an answer is off by {furthest:.3g}, more than {bounds['atol']:.3g}", final=True
        )
    if 0 < bounds["max_ms"] < milliseconds:
        return Verdict(
            f"an image takes {milliseconds:.1f} ms, more than {bounds['max_ms']:g}", final=False
        )
    if 0 < bounds["max_mb"] < (megabytes := _peak_megabytes()):
        return Verdict(f"it takes {megabytes:.0f} MB, more than {bounds['max_mb']:g}", final=True)
    return Verdict("", final=True)


def _answers(model: bytes, seed: int, count: int) -> tuple[NDArray[np.float64], float]:
    """Return the first output for each image, and the median time of one in milliseconds."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised as well
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    made = images(seed, max(count, 1), tuple(entry.shape[1:]))
    session.run(None, {entry.name: made[:1]})  # the first run is slower than those to come
    answers, times = [], []
    for image in made:
        began = time.perf_counter()
        outputs = session.run(None, {entry.name: image[None]})
        times.append(time.perf_counter() - began)
        answers.append(np.asarray(outputs[0], np.float64).ravel())
    return np.stack(answers), 1000 * statistics.median(times)


def _peak_megabytes() -> float:
    # Not `getrusage`: that includes what the process was before it became this program.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1000


def _main() -> None:
    model, seconds = Path(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    # If the parent is killed, nobody else ends a network that hangs.
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    json.dump(examine(model.read_bytes(), json.load(sys.stdin))._asdict(), sys.stdout)


if __name__ == "__main__":
    _main()
