"""What the real publisher writes, the vehicle installs: both keep to the contract."""

from __future__ import annotations

import contextlib

import numpy as np
import onnxruntime
import pytest

from filterpress.codec.graph import to_onnx
from filterpress.errors import ReleaseError
from filterpress.release import audit, create_keys, fetch, publish, refresh, rollout
from filterpress.release.device import identity
from filterpress.release.device.identity import Identity
from filterpress.release.device.offer import find_offer, obtain, open_client
from filterpress.release.device.source import Limits, open_source
from filterpress.release.device.vehicle import Outcome, Vehicle
from tests.release.device import misbehaviour
from tests.release.device.fleet import IMAGE, digest, encoded

FILES = [encoded(seed, width=16) for seed in range(4)]
IMAGES = np.random.default_rng(5).normal(size=(3, *IMAGE)).astype(np.float32)


def answers(model):
    return onnxruntime.InferenceSession(model).run(None, {"x": IMAGES})[0]


class Fleet:
    """A publisher with keys of its own, and one vehicle."""

    def __init__(self, folder, store):
        self.where = {"store": str(folder / "store"), "keys": folder / "keys"}
        create_keys(folder / "keys")
        self.root = (folder / "keys" / "root.json").read_bytes()
        identity.create(folder / "home", Identity(store=store), self.root)
        self.vehicle = Vehicle(folder / "home")

    def release(self, data, **options):
        target = f"models/demo/{digest(data)[:16]}/model.fpk"
        publish(data, target=target, custom={}, **self.where)
        return rollout.publish(target, **options, **self.where)

    def runs(self, data, counter):
        """Say whether the vehicle runs a release, and answers as its publisher's network does."""
        model = self.vehicle.boot()
        found = (model.manifest.sha256, model.manifest.release_counter)
        np.testing.assert_array_equal(answers(model.path.read_bytes()), answers(to_onnx(data)))
        return found == (digest(data), counter)


@pytest.fixture
def fleet(tmp_path, server):
    server.folder, server.faults, server.requests = tmp_path / "store", {}, []
    fleet = Fleet(tmp_path, server.url)
    fleet.release(FILES[0])
    assert fleet.vehicle.update() is Outcome.STAGED
    assert fleet.runs(FILES[0], 1)
    return fleet


def test_a_release_arrives_as_a_delta_and_a_recall_without_a_download(fleet, server):
    fleet.release(FILES[1])
    server.requests.clear()
    assert fleet.vehicle.update() is Outcome.STAGED
    fetched = [name for name, _ in server.requests if name.startswith("targets/models")]
    assert [name.rpartition(".")[2] for name in fetched] == ["fpd"]
    assert fleet.runs(FILES[1], 2)
    rollout.recall(1, **fleet.where)
    server.requests.clear()
    assert fleet.vehicle.update() is Outcome.STAGED
    assert not [name for name, _ in server.requests if name.startswith("targets/models")]
    assert fleet.runs(FILES[0], 3)


def test_a_ramp_takes_the_vehicle_in_and_a_halt_leaves_it_where_it_is(fleet):
    fleet.release(FILES[1], percent=0)
    assert fleet.vehicle.update() is Outcome.WAITING
    rollout.halt(**fleet.where)
    rollout.ramp(100, **fleet.where)
    assert fleet.vehicle.update() is Outcome.WAITING
    rollout.resume(**fleet.where)
    assert fleet.vehicle.update() is Outcome.STAGED
    assert fleet.runs(FILES[1], 2)


def test_a_release_into_a_halted_channel_waits_for_the_resume(fleet):
    rollout.halt(**fleet.where)
    fleet.release(FILES[1])
    assert fleet.vehicle.update() is Outcome.WAITING
    assert fleet.runs(FILES[0], 1)
    rollout.resume(**fleet.where)
    assert fleet.vehicle.update() is Outcome.STAGED
    assert fleet.runs(FILES[1], 2)


def test_a_bundle_is_installed_and_a_renewed_timestamp_is_no_news(fleet, tmp_path, server):
    fleet.release(FILES[2])
    audit.bundle(tmp_path / "bundle.tar", store=fleet.where["store"], root=fleet.root)
    server.requests.clear()
    assert fleet.vehicle.update(str(tmp_path / "bundle.tar")) is Outcome.STAGED
    assert server.requests == []
    assert fleet.runs(FILES[2], 2)
    refresh(**fleet.where)
    assert fleet.vehicle.update() is Outcome.CURRENT


def test_a_vehicle_that_fetches_a_delta_while_it_leaves_the_list_gets_it(fleet, server, tmp_path):
    fleet.release(FILES[1])
    limits, home = Limits(), fleet.vehicle.home
    with contextlib.closing(open_source(server.url, limits)) as source:
        client = open_client(home, source, limits)
        client.refresh()
        offer = find_offer(client, source, home, fleet.vehicle.identity, 1, limits)
        for data in FILES[2:]:
            fleet.release(data)
        (delta,) = offer.channel.deltas.values()
        with pytest.raises(ReleaseError, match="has no release"):
            fetch(fleet.where["store"], delta, root=fleet.root)
        server.requests.clear()
        part = obtain(offer, client, source, home, [FILES[0]], limits)
    assert part.read_bytes() == FILES[1]
    fetched = [name.rpartition(".")[2] for name, _ in server.requests if "/models/" in name]
    assert fetched == ["fpd"]


def test_a_download_cut_off_by_newer_releases_ends_on_the_newest(fleet, server):
    fleet.release(FILES[1])

    def half_and_no_more(handler, path):
        again = handler.headers.get("Range")
        (misbehaviour.hangs_up if again else misbehaviour.stops_at(0.5))(handler, path)

    server.faults = {".fpd": half_and_no_more, ".fpk": misbehaviour.answers(503)}
    with pytest.raises(ReleaseError, match="503"):
        fleet.vehicle.update()
    (part,) = (fleet.vehicle.home / "staging").iterdir()
    assert part.stat().st_size
    server.faults = {}
    for data in FILES[2:]:
        fleet.release(data)
    assert fleet.vehicle.update() is Outcome.STAGED
    assert fleet.runs(FILES[-1], len(FILES))
    assert not list((fleet.vehicle.home / "staging").iterdir())


def test_a_vehicle_that_missed_two_releases_still_gets_a_delta(fleet, server):
    for data in FILES[1:]:
        fleet.release(data)
    server.requests.clear()
    assert fleet.vehicle.update() is Outcome.STAGED
    fetched = [name.rpartition(".")[2] for name, _ in server.requests if "/models/" in name]
    assert fetched == ["fpd"]
    assert fleet.runs(FILES[-1], len(FILES))
