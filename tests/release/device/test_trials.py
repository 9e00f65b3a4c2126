"""The process that tries a network, with the real runtime."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest

from filterpress.codec.graph import to_onnx
from filterpress.errors import ReleaseError
from filterpress.release.device import identity, state, trial
from filterpress.release.device.identity import Identity
from filterpress.release.device.vehicle import Outcome, Vehicle
from tests.release.device.conftest import LIMITS
from tests.release.device.fleet import CHANNEL, HARDWARE, V1, V2, digest, encoded, health


@pytest.fixture
def model(tmp_path):
    """Writes the decoded model of a file."""

    def write(data):
        path = tmp_path / "model.onnx"
        path.write_bytes(to_onnx(data))
        return path

    return write


def reason(data, **changes):
    return trial.examine(to_onnx(data), health(data, **changes)).reason


def test_a_network_that_answers_as_expected_passes(model):
    assert trial.run(model(V1), health(V1)) == trial.Verdict("", final=True)


def test_an_answer_may_be_off_by_the_tolerance_and_no_more():
    outputs = np.asarray(health(V1)["outputs"])
    outputs[1, 2] += 0.01
    assert reason(V1, outputs=outputs.tolist(), atol=0.011) == ""
    assert reason(V1, outputs=outputs.tolist(), atol=0.009).startswith("an answer is off by 0.01")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"outputs": health(V2)["outputs"]}, "is off by"),
        ({"outputs": [[float("nan")] * 3] * 2}, "is off by"),
        ({"outputs": []}, "have shape"),
        ({"outputs": health(V1)["outputs"][:1]}, "have shape"),
        ({"max_ms": 1e-6}, " ms, more than"),
        ({"max_mb": 1}, " MB, more than"),
        ({"count": "many"}, "does not run"),
        ({"seed": None}, "does not run"),
    ],
)
def test_a_network_that_does_not_do_as_expected_fails(changes, expected):
    assert expected in reason(V1, **changes)


def test_bounds_that_hold_are_no_obstacle():
    assert reason(V1, max_ms=10_000, max_mb=10_000) == ""


def test_answers_that_are_not_finite_fail():
    nan = encoded(1, kind="not finite")
    expected = np.nan_to_num(health(nan)["outputs"]).tolist()
    assert reason(nan, outputs=expected) == "its answers are not finite"


@pytest.mark.parametrize("data", [b"", b"not a model", to_onnx(V1)[:-100]])
def test_what_is_no_network_fails(data):
    assert trial.examine(data, health(V1)).reason.startswith("it does not run")


def test_a_network_that_never_ends_is_given_up(model):
    began = time.monotonic()
    verdict = trial.run(model(encoded(1, kind="endless")), health(V1), timeout_s=3)
    assert verdict == trial.Verdict("it did not answer within 3 s", final=False)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("last_words", ["", r"printf 'caf\351\n' >&2"])
def test_a_process_that_dies_is_no_verdict(model, monkeypatch, tmp_path, last_words):
    dying = tmp_path / "dying"
    dying.write_text(f"#!/bin/sh\n{last_words}\nexit 1\n")
    dying.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(dying))
    verdict = trial.run(model(V1), health(V1))
    assert verdict.reason.startswith("it ended with code 1")
    assert not verdict.final


BAD = {
    "answers otherwise": (V2, {"health": health(V1)}),
    "not finite": (encoded(1, kind="not finite"), {"health": health(V1)}),
    "too large": (V2, {"health": health(V2, max_mb=1)}),
    "does not run": (encoded(1, kind="does not run"), {"health": health(V1)}),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_release_that_fails_its_trial_is_never_run_nor_fetched_again(bad, home, store, server):
    data, said = BAD[bad]
    store.publish(data, **said)
    vehicle = Vehicle(home, limits=LIMITS)
    assert vehicle.update() is Outcome.STAGED
    assert vehicle.boot().manifest.sha256 == digest(V1)
    server.requests.clear()
    assert vehicle.update() is Outcome.KNOWN_BAD
    assert not [path for path, _ in server.requests if path.startswith("targets")]
    report = vehicle.status()["signed"]
    assert (report["sha256"], report["bad"]) == (digest(V1), [digest(data)])
    assert "failed its trial" in report["error"]


def test_the_release_after_a_bad_one_is_installed(home, store):
    store.publish(V2, health=health(V1))
    vehicle = Vehicle(home, limits=LIMITS)
    vehicle.update()
    vehicle.boot()
    good = encoded(9)
    store.publish(good)
    assert vehicle.update() is Outcome.STAGED
    assert vehicle.boot().manifest.sha256 == digest(good)


def test_a_trial_that_is_cut_short_is_repeated_and_in_the_end_bad(home, store):
    store.publish(V2)
    hangs = Vehicle(home, limits=LIMITS, examine=lambda *_: trial.Verdict("it hung", final=False))
    assert hangs.update() is Outcome.STAGED
    for _ in range(3):
        assert hangs.boot().manifest.sha256 == digest(V1)
        assert hangs.status()["signed"]["trial"] == digest(V2)
        assert hangs.update() is Outcome.TRIAL_PENDING
    assert hangs.boot().manifest.sha256 == digest(V1)
    assert hangs.update() is Outcome.KNOWN_BAD


def test_a_network_that_was_too_slow_once_may_try_again(home, store):
    store.publish(V2, health=health(V2, max_ms=1e-6))
    vehicle = Vehicle(home, limits=LIMITS)
    vehicle.update()
    for _ in range(3):
        assert vehicle.boot().manifest.sha256 == digest(V1)
        assert " ms, more than" in vehicle.status()["signed"]["error"]
        assert vehicle.update() is Outcome.TRIAL_PENDING
    vehicle.boot()
    assert vehicle.update() is Outcome.KNOWN_BAD


def test_a_file_that_cannot_be_decoded_is_bad(home, store):
    store.publish(b"not an encoded file", health=health(V1))
    vehicle = Vehicle(home, limits=LIMITS)
    with pytest.raises(Exception, match="the release cannot be decoded"):
        vehicle.update()
    assert vehicle.update() is Outcome.KNOWN_BAD
    assert vehicle.boot().manifest.sha256 == digest(V1)


def test_other_software_tries_what_was_bad_again(home, store, monkeypatch):
    store.publish(V2)
    old = Vehicle(home, limits=LIMITS, examine=lambda *_: trial.Verdict("opset 99", final=True))
    old.update()
    old.boot()
    assert old.update() is Outcome.KNOWN_BAD
    monkeypatch.setattr(state, "versions", lambda: "filterpress 99")
    new = Vehicle(home, limits=LIMITS)
    assert new.update() is Outcome.STAGED
    assert new.boot().manifest.sha256 == digest(V2)


def test_a_vehicle_runs_with_another_build_of_the_runtime(home, store, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(state, "version", missing)
    store.publish(V2)
    vehicle = Vehicle(home, limits=LIMITS)
    assert vehicle.update() is Outcome.STAGED
    assert vehicle.boot().manifest.sha256 == digest(V2)


def test_a_release_for_which_there_was_no_memory_is_tried_again(home, store, server, monkeypatch):
    def exhaust(data):
        raise MemoryError

    store.publish(V2)
    vehicle = Vehicle(home, limits=LIMITS)
    with monkeypatch.context() as short:
        short.setattr("filterpress.codec.graph.to_onnx", exhaust)
        with pytest.raises(ReleaseError, match="not enough memory to decode the release"):
            vehicle.update()
    server.requests.clear()
    assert vehicle.update() is Outcome.STAGED
    assert not [name for name, _ in server.requests if "model.fpk" in name]  # it was still there
    assert vehicle.boot().manifest.sha256 == digest(V2)


def test_a_first_release_that_fails_its_trial_does_not_run(tmp_path, store, server):
    me = Identity(store=server.url, hardware=HARDWARE, channel=CHANNEL)
    identity.create(tmp_path / "new", me, store.root)
    store.publish(V2, health=health(V1))
    vehicle = Vehicle(tmp_path / "new", limits=LIMITS)
    assert vehicle.update() is Outcome.STAGED
    assert vehicle.boot() is None
    assert vehicle.boot() is None


def test_what_was_never_tried_does_not_take_the_place_of_a_slot_that_rots(home, store):
    store.publish(V2, health=health(V1))
    vehicle = Vehicle(home, limits=LIMITS)
    vehicle.update()
    (home / "slots" / "a" / "model.onnx").write_bytes(b"")
    assert vehicle.boot() is None


def test_the_runtime_reports_to_nobody(tmp_path):
    # a bare environment: the runtime is silent by itself where it finds that it is being tested
    environment = {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import filterpress, onnxruntime"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert list(tmp_path.rglob("*")) == []
