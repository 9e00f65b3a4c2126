"""From one end to the other: what the publisher signs is what a vehicle installs and runs."""

from __future__ import annotations

import hashlib

import numpy as np
import onnxruntime
import pytest

from filterpress import release
from filterpress.codec.graph import to_onnx
from filterpress.release import rollout
from filterpress.release.device import identity
from filterpress.release.device.identity import Identity
from filterpress.release.device.vehicle import Outcome, Vehicle
from tests.release.encoded import SHAPE, network, weight


@pytest.fixture
def place(tmp_path):
    return {"store": str(tmp_path / "store"), "keys": tmp_path / "keys"}


def issue(values, place):
    """Release a network and let all vehicles run it."""
    file = network(values)
    issued = release.publish_network(file, name="demo", custom={}, **place)
    rollout.publish(issued.target, hardware="any", channel="stable", percent=100, **place)
    return file, issued


def drive(home):
    """Update and boot; say what runs, with what it answers."""
    vehicle = Vehicle(home)
    outcome, running = vehicle.update(), vehicle.boot()
    session = onnxruntime.InferenceSession(running.path.read_bytes())
    return outcome, running.manifest.sha256, session.run(None, {"images": IMAGES})[0]


IMAGES = np.random.default_rng(5).normal(size=(3, *SHAPE)).astype(np.float32)


def answers(file):
    session = onnxruntime.InferenceSession(to_onnx(file))
    return session.run(None, {"images": IMAGES})[0]


def test_a_vehicle_runs_what_was_published_then_the_delta_and_then_what_was_recalled_to(
    place, tmp_path
):
    first, issued = issue(weight(0), place)
    home, root = tmp_path / "home", (place["keys"] / "root.json").read_bytes()
    identity.create(home, Identity(store=place["store"]), root, development=True)
    outcome, sha256, found = drive(home)
    assert outcome is Outcome.STAGED
    assert sha256 == hashlib.sha256(first).hexdigest()
    np.testing.assert_array_equal(found, answers(first))
    assert drive(home)[0] is Outcome.CURRENT

    second, later = issue(weight(0, moved=0.02), place)
    assert later.deltas
    outcome, sha256, found = drive(home)
    assert outcome is Outcome.STAGED
    assert sha256 == hashlib.sha256(second).hexdigest()
    np.testing.assert_array_equal(found, answers(second))

    rollout.recall(issued.version, **place)
    outcome, sha256, found = drive(home)
    assert sha256 == hashlib.sha256(first).hexdigest()
    np.testing.assert_array_equal(found, answers(first))
    assert Vehicle(home).status()["signed"]["release_counter"] > later.version


def test_a_halted_channel_changes_no_vehicle(place, tmp_path):
    first, _ = issue(weight(0), place)
    home, root = tmp_path / "home", (place["keys"] / "root.json").read_bytes()
    identity.create(home, Identity(store=place["store"]), root, development=True)
    drive(home)
    issue(weight(1), place)
    rollout.halt(**place)
    outcome, sha256, _ = drive(home)
    assert outcome is Outcome.WAITING
    assert sha256 == hashlib.sha256(first).hexdigest()
    rollout.resume(**place)
    assert drive(home)[0] is Outcome.STAGED
