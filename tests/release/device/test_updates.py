"""From the store to the model that runs."""

from __future__ import annotations

from filterpress.codec.graph import to_onnx
from filterpress.release.device.vehicle import Outcome
from tests.release.device.fleet import V2, digest


def test_a_new_release_runs_after_the_next_boot(vehicle, store):
    store.publish(V2)
    assert vehicle.update() is Outcome.STAGED
    running = vehicle.boot()
    assert running.path.read_bytes() == to_onnx(V2)
    assert (running.manifest.sha256, running.manifest.release_counter) == (digest(V2), 2)
    assert vehicle.update() is Outcome.CURRENT
