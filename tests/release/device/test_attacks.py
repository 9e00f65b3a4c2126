"""Whoever can write to the store, or holds some of the keys: the vehicle stays on its version.

One test for each attack of The Update Framework's and Uptane's lists, named after it.
"""

from __future__ import annotations

import copy
import json
import shutil
import time

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import MetaFile

from filterpress.errors import ReleaseError
from filterpress.release.device.vehicle import Outcome, RefusedError
from filterpress.release.names import MAX_METADATA
from tests.release.device import misbehaviour
from tests.release.device.fleet import CHANNEL_FILE, V1, V2, V3, clock, digest, expiry


@pytest.fixture
def stays(vehicle, runs):
    """Fails unless the vehicle gives the reason, and stays on its version."""

    def check(reason, error=RefusedError):
        with pytest.raises(error, match=reason) as caught:
            vehicle.update()
        assert type(caught.value) is error
        assert "\n" not in str(caught.value)
        assert runs() == digest(V1)
        report = vehicle.status()["signed"]
        assert (report["sha256"], report["trial"]) == (digest(V1), "")
        assert (report["error"], report["attack"]) == (str(caught.value), error is RefusedError)

    return check


def relist(store, role, data, version):
    """Sign a timestamp that lists a snapshot of the thief's choice."""
    store.signed["timestamp"].snapshot_meta = MetaFile.from_data(version, data, ["sha256"])
    store.issue("timestamp")


# What is altered


def test_a_flipped_bit_in_the_payload(store, server, stays):
    store.publish(V2)
    server.faults["model.fpk"] = misbehaviour.flips_a_bit
    stays("does not match expected hash")


def test_a_payload_swapped_for_another_signed_one(store, stays):
    store.publish(V2)
    store.write(store.payload(V2), V1[: len(V2)].ljust(len(V2), b"\0"))
    stays("does not match expected hash")


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "release", "rollout"])
def test_tampered_metadata(store, stays, role):
    store.publish(V2, commit={"release": {}})
    store.commit("targets")
    path = store.path / store.name(role)
    honest = path.read_bytes()
    path.write_bytes(honest.replace(b'"expires":"20', b'"expires":"21'))
    assert path.read_bytes() != honest
    stays("was signed by 0/1 keys|does not match")


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "release", "rollout"])
def test_metadata_signed_by_a_stranger(store, stays, role):
    store.publish(V2)
    if role == "timestamp":
        store.issue(role, signers=[CryptoSigner.generate_ed25519()])
    else:
        store.commit(role, **{role: {"signers": [CryptoSigner.generate_ed25519()]}})
    if role == "snapshot":
        store.issue("snapshot", signers=[CryptoSigner.generate_ed25519()])
        store.issue("timestamp")
    stays(f"{role} was signed by 0/1 keys")


# What is old


def test_an_old_timestamp_is_replayed(vehicle, store, stays):
    old = store.read("metadata/timestamp.json")
    store.publish(V2, rollout={"halted": True})
    assert vehicle.update() is Outcome.WAITING
    store.write("metadata/timestamp.json", old)
    stays("timestamp version 2 must be newer|must be >= 2|version")


def test_a_stolen_timestamp_key_with_an_old_snapshot(vehicle, store, stays):
    old = store.read("metadata/1.snapshot.json")
    store.publish(V2, rollout={"halted": True})
    assert vehicle.update() is Outcome.WAITING
    relist(store, "snapshot", old, 1)
    stays("version")


def test_stolen_timestamp_and_snapshot_keys_with_old_targets(vehicle, store, stays):
    old = copy.deepcopy(store.signed["snapshot"].meta)
    store.publish(V2, rollout={"halted": True})
    assert vehicle.update() is Outcome.WAITING
    store.signed["snapshot"].meta = old
    store.commit()
    stays("version")


def test_stolen_release_and_rollout_keys_with_a_lower_release_counter(vehicle, store, stays):
    store.counter = 4
    store.publish(V1)
    assert vehicle.update() is Outcome.CURRENT
    store.counter = 1
    store.publish(V2)
    stays("release 2 is older than 5")


# What has expired


def test_an_expired_timestamp(store, stays):
    store.publish(V2)
    store.issue("timestamp", days=-1)
    stays("timestamp.json is expired")


@pytest.mark.parametrize("role", ["snapshot", "targets", "release", "rollout"])
def test_expired_metadata_below_the_timestamp(store, stays, role):
    store.publish(V2)
    store.issue(role, days=-1)
    if role != "snapshot":
        store.issue("snapshot")
    store.issue("timestamp")
    stays(f"{role}.* is expired")


def test_an_expired_root(store, stays):
    store.publish(V2)
    store.issue("root", days=-1)
    stays("root.json is expired")


def test_a_clock_set_back_by_a_year(home, store, stays, monkeypatch):
    # What is offered had not expired then; but the timestamp was issued today.
    shutil.rmtree(home / "metadata")
    store.publish(V2, commit={"rollout": {"days": -100}})
    monkeypatch.setattr("tuf.ngclient._internal.trusted_metadata_set.datetime", clock(-365))
    stays("rollout.* is expired")


def test_a_clock_set_back_and_a_stolen_timestamp_key(store, stays, monkeypatch):
    # The thief says that it is last year, too; but the vehicle has seen a timestamp of today.
    store.publish(V2)
    signed = store.signed["timestamp"]
    signed.version, signed.expires = signed.version + 1, expiry(-100)
    signed.unrecognized_fields["x-issued"] = int(expiry(-200).timestamp())
    store.write("metadata/timestamp.json", store.sign("timestamp", signed))
    monkeypatch.setattr("tuf.ngclient._internal.trusted_metadata_set.datetime", clock(-365))
    stays("timestamp.json is expired")


@pytest.mark.parametrize(
    "issued",
    # the name must be the same in every process that collects it
    ["today", -1, True, 10**30, pytest.param(int(time.time()) + 10 * 86400, id="in-ten-days")],
)
def test_a_time_that_cannot_be(store, stays, issued):
    store.publish(V2)
    signed = store.signed["timestamp"]
    signed.version += 1
    signed.unrecognized_fields["x-issued"] = issued
    store.write("metadata/timestamp.json", store.sign("timestamp", signed))
    stays("which cannot be")


def test_a_time_from_the_future_by_a_stolen_timestamp_key_goes_with_the_key(vehicle, store):
    signed = store.signed["timestamp"]
    signed.unrecognized_fields["x-issued"] = int(time.time()) + 10 * 365 * 86400
    signed.version, signed.expires = signed.version + 1, expiry(20 * 365)
    store.write("metadata/timestamp.json", store.sign("timestamp", signed))
    with pytest.raises(RefusedError, match="expired"):
        vehicle.update()
    store.publish(V2)
    with pytest.raises(RefusedError, match="expired"):
        vehicle.update()
    new = CryptoSigner.generate_ed25519()
    root = store.signed["root"]
    root.revoke_key(root.roles["timestamp"].keyids[0], "timestamp")
    root.add_key(new.public_key, "timestamp")
    store.issue("root")
    store.issue("timestamp", signers=[new])
    assert vehicle.update() is Outcome.STAGED


# The root


def test_a_root_by_an_attacker(store, stays):
    strangers = [CryptoSigner.generate_ed25519() for _ in range(3)]
    store.publish(V2)
    store.issue("root", signers=strangers)
    stays("root was signed by 0/2 keys")


def test_a_root_signed_by_one_of_two(store, stays):
    store.publish(V2)
    store.issue("root", signers=store.keys["root"][:1])
    stays("root was signed by 1/2 keys")


def test_a_root_that_skips_a_version(store, stays):
    store.publish(V2)
    store.issue("root", version=3, name="metadata/2.root.json")
    stays("Expected root version 2")


# What does not come as it should


def test_a_truncated_transfer(store, server, stays):
    store.publish(V2)
    server.faults["model.fpk"] = misbehaviour.stops_at(0)
    stays("model.fpk", ReleaseError)


@pytest.mark.parametrize("part", ["model.fpk", "timestamp.json", "2.root.json"])
def test_endless_data(store, server, stays, part):
    store.publish(V2)
    server.faults[part] = misbehaviour.never_ends
    stays("exceeding|longer than was signed")


def test_a_list_that_is_too_long_whatever_length_is_signed(store, stays):
    store.publish(V2, custom={"note": "x" * MAX_METADATA})
    stays(f"2.release.json: a body exceeding {MAX_METADATA} bytes")


def test_a_gzip_bomb(store, server, stays):
    server.faults["timestamp.json"] = misbehaviour.sends_a_bomb
    misbehaviour.bomb()  # now, so that its making does not count
    began = time.process_time()
    stays("comes encoded as gzip", ReleaseError)
    assert time.process_time() - began < 1


def test_deeply_nested_json(store, stays):
    store.write("metadata/timestamp.json", b"[" * 8000 + b"]" * 8000)
    stays("Failed to deserialize")


def test_the_store_is_out_of_order(store, server, stays):
    server.faults["timestamp.json"] = misbehaviour.answers(503)
    stays("status 503", ReleaseError)


def test_a_refused_connection(store, server, stays):
    server.faults["timestamp.json"] = misbehaviour.hangs_up
    stays("timestamp.json", ReleaseError)


def test_a_forbidden_store(store, server, stays):
    store.publish(V2)
    server.faults["/"] = misbehaviour.answers(403)
    stays("status 403", ReleaseError)


def test_a_half_published_release(store, stays):
    store.publish(V2)
    (store.path / store.name("release")).unlink()
    stays("status 404", ReleaseError)


def test_a_missing_payload(store, stays):
    store.publish(V2)
    (store.path / store.payload(V2)).unlink()
    stays("status 404", ReleaseError)


@pytest.mark.parametrize("part", ["timestamp.json", "model.fpk"])
def test_a_slow_trickle(store, server, stays, part):
    store.publish(V2)
    server.faults[part] = misbehaviour.trickles
    began = time.monotonic()
    stays("takes too long|comes too slowly")
    assert time.monotonic() - began < 3


def test_a_slow_trickle_of_the_head_of_an_answer(store, server, stays):
    server.faults["timestamp.json"] = misbehaviour.trickles_its_head
    began = time.monotonic()
    stays("timestamp.json", ReleaseError)
    assert time.monotonic() - began < 3


# What is meant for others


def test_the_wrong_hardware(store, stays):
    store.publish(V2, custom={"hardware_ids": ["cam-v3"]})
    stays("is not for cam-v2")


def test_the_channel_of_another_hardware(store, stays):
    store.publish(V2, hardware="cam-v3")
    stays("it is cam-v3/stable")


@pytest.mark.parametrize(
    "said", [{"release_counter": 7}, {"sha256": digest(V3)}, {"n_bytes": len(V2) + 1}]
)
def test_a_mix_of_one_channel_and_another_release(store, stays, said):
    store.publish(V2, **said)
    stays("the channel and the release disagree")


def test_a_channel_that_names_a_model_that_nobody_signed(store, stays):
    store.publish(V2)
    said = json.loads(store.read(store_channel(store)))
    store.point({**said, "target": "models/demo/evil/model.fpk"})
    store.commit("rollout")
    stays("nobody who may release signed")


def store_channel(store):
    return f"targets/{store.signed['rollout'].targets[CHANNEL_FILE].get_prefixed_paths()[0]}"


@pytest.mark.parametrize("target", ["models/../../../evil", "models/demo/../evil", "/etc/x/y/z"])
def test_a_path_that_leads_out_of_the_store(store, stays, target, tmp_path):
    store.add("release", target, V2) if not target.startswith("/") else None
    store.publish(V1, target=target)
    stays("is unusable|nobody who may release")
    assert not list(tmp_path.rglob("*evil*.part"))


def test_a_rollout_that_leaves_the_vehicle_out(vehicle, store, runs):
    store.publish(V2, rollout={"percent_bp": 0})
    assert vehicle.update() is Outcome.WAITING
    assert runs() == digest(V1)


def test_a_stolen_rollout_key_signs_no_model(store, stays):
    store.publish(V1)
    said = json.loads(store.read(store_channel(store)))
    target = "models/demo/evil/model.fpk"
    store.add("rollout", target, V2, {"release_counter": 9, "hardware_ids": ["any"]})
    changes = {"sha256": digest(V2), "n_bytes": len(V2), "release_counter": 9}
    store.point({**said, "target": target, **changes})
    store.commit("rollout")
    stays("nobody who may release signed")


def test_a_stolen_release_key_points_no_channel(store, vehicle, runs):
    store.publish(V2, rollout={"halted": True})
    info = store.signed["rollout"].targets.pop(CHANNEL_FILE)
    store.signed["release"].targets[CHANNEL_FILE] = info
    store.commit("release", "rollout")
    with pytest.raises(ReleaseError, match="the store has no channels"):
        vehicle.update()
    assert runs() == digest(V1)
