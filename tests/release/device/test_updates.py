"""From the store to the model that runs, over links that break, from disks that rot."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
import threading
from datetime import UTC, datetime, timedelta

import pytest

from filterpress.codec import make_delta
from filterpress.codec.graph import to_onnx
from filterpress.errors import ReleaseError
from filterpress.release.device.trial import Verdict
from filterpress.release.device.vehicle import BusyError, Outcome, RefusedError, Vehicle
from tests.release.device import misbehaviour
from tests.release.device.conftest import LIMITS, passes
from tests.release.device.fleet import V1, V2, V3, clock, digest, encoded

LARGE = encoded(5, width=64)


def bytes_sent(server, path):
    """How often a file was asked for, and from which positions."""
    return [wanted for name, wanted in server.requests if name == path]


def test_a_new_release_runs_after_the_next_boot(vehicle, store, runs):
    store.publish(V2)
    assert vehicle.update() is Outcome.STAGED
    assert not list((vehicle.home / "staging").iterdir())
    running = vehicle.boot()
    assert running.path.read_bytes() == to_onnx(V2)
    assert (running.manifest.sha256, running.manifest.release_counter) == (digest(V2), 2)
    assert runs() == digest(V2)
    assert vehicle.update() is Outcome.CURRENT


def test_until_it_is_tried_the_old_release_runs(vehicle, store):
    store.publish(V2)
    vehicle.update()
    tried = []

    def examine(model, health):
        # What would run if this trial were the last thing that the vehicle does.
        tried.append(Vehicle(vehicle.home, examine=passes)._running(vehicle._state()))
        return Verdict("", final=True)

    Vehicle(vehicle.home, examine=examine).boot()
    assert [model.manifest.sha256 for model in tried] == [digest(V1)]


def test_a_poll_without_news_is_two_requests_and_writes_nothing(vehicle, store, server):
    assert vehicle.update() is Outcome.CURRENT
    before = {path: path.stat().st_mtime_ns for path in vehicle.home.rglob("*")}
    server.requests.clear()
    assert vehicle.update() is Outcome.CURRENT
    names = [name for name, _ in server.requests]
    assert names == ["metadata/2.root.json", "metadata/timestamp.json"]
    assert {path: path.stat().st_mtime_ns for path in vehicle.home.rglob("*")} == before


def test_releases_take_turns_in_two_slots(vehicle, store):
    slots = []
    for data in (V2, V3, encoded(4)):
        store.publish(data)
        vehicle.update()
        slots.append(vehicle.boot().slot)
    assert slots == ["b", "a", "b"]


def test_a_recall_runs_the_old_bytes_under_a_higher_counter(vehicle, store, server):
    store.publish(V2)
    vehicle.update()
    vehicle.boot()
    store.publish(V1, target=f"models/demo/{digest(V1)[:16]}-3/model.fpk")
    server.requests.clear()
    assert vehicle.update() is Outcome.STAGED
    assert not [name for name, _ in server.requests if "model.fpk" in name]  # it was still there
    running = vehicle.boot()
    assert (running.manifest.sha256, running.manifest.release_counter) == (digest(V1), 3)


def test_a_recall_of_what_runs_raises_the_counter_for_good(vehicle, store):
    store.counter = 6
    store.publish(V1, target=f"models/demo/{digest(V1)[:16]}-7/model.fpk")
    assert vehicle.update() is Outcome.CURRENT
    (vehicle.home / "state.json").unlink()
    store.counter = 2
    store.publish(V2)
    with pytest.raises(RefusedError, match="release 3 is older than 7"):
        vehicle.update()


def test_a_recall_is_in_time_for_what_waits_for_its_trial(vehicle, store, runs):
    store.publish(V2)
    assert vehicle.update() is Outcome.STAGED
    assert vehicle.update() is Outcome.TRIAL_PENDING
    store.publish(V1, target=f"models/demo/{digest(V1)[:16]}-3/model.fpk")
    assert vehicle.update() is Outcome.CURRENT
    assert runs() == digest(V1)


def test_a_halt_is_in_time_for_what_waits_for_its_trial(vehicle, store, server, runs):
    store.publish(V2)
    assert vehicle.update() is Outcome.STAGED
    store.publish(V2, rollout={"halted": True})
    assert vehicle.update() is Outcome.WAITING
    assert runs() == digest(V1)
    store.publish(V2)
    server.requests.clear()
    assert vehicle.update() is Outcome.STAGED
    assert not [name for name, _ in server.requests if "model.fpk" in name]  # it was still there
    assert runs() == digest(V2)


# Rollouts


def test_a_share_of_a_fleet_is_true_and_grows_without_changing_sides():
    def members(percent_bp):
        from filterpress.release.device.channel import Rollout

        rollout = Rollout(
            salt="s", percent_bp=percent_bp, cohorts=(), not_before=None, halted=False
        )
        return {n for n in range(20_000) if rollout.includes(str(n), (), datetime.now(UTC))}

    tenth, half = members(1000), members(5000)
    assert abs(len(tenth) - 2000) < 5 * (20_000 * 0.1 * 0.9) ** 0.5
    assert tenth < half
    assert len(members(10_000)) == 20_000


@pytest.mark.parametrize(
    ("rollout", "outcome"),
    [
        ({"percent_bp": 0, "cohorts": ["friends"]}, Outcome.STAGED),
        ({"percent_bp": 0, "cohorts": ["others"]}, Outcome.WAITING),
        ({"halted": True, "cohorts": ["friends"]}, Outcome.WAITING),
        ({"not_before": (datetime.now(UTC) - timedelta(1)).isoformat()}, Outcome.STAGED),
        ({"not_before": (datetime.now(UTC) + timedelta(1)).isoformat()}, Outcome.WAITING),
    ],
)
def test_a_vehicle_takes_part_if_the_rollout_says_so(vehicle, store, rollout, outcome):
    path = vehicle.home / "device.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "cohorts": ["friends"]}))
    store.publish(V2, rollout=rollout)
    assert vehicle.update() is outcome


# Deltas and broken links


def test_a_delta_is_fetched_in_place_of_the_whole_file(vehicle, store, server):
    store.publish(V2, base=V1)
    assert vehicle.update() is Outcome.STAGED
    assert not bytes_sent(server, store.payload(V2))
    assert vehicle.boot().path.read_bytes() == to_onnx(V2)


@pytest.mark.parametrize("delta", [b"damaged", make_delta(V1, V3), make_delta(V3, V2)])
def test_a_signed_delta_that_makes_another_file_does_no_harm(vehicle, store, server, delta):
    store.publish(V2, base=V1, delta=delta)
    assert vehicle.update() is Outcome.STAGED
    assert len(bytes_sent(server, store.payload(V2))) == 1
    assert vehicle.boot().path.read_bytes() == to_onnx(V2)


@pytest.mark.parametrize(
    "fault",
    [
        misbehaviour.answers(404),
        misbehaviour.flips_a_bit,
        misbehaviour.never_ends,
        misbehaviour.trickles,
    ],
)
def test_without_the_delta_the_whole_file_is_fetched(vehicle, store, server, fault):
    store.publish(V2, base=V1)
    server.faults[".fpd"] = fault
    assert vehicle.update() is Outcome.STAGED
    assert vehicle.boot().manifest.sha256 == digest(V2)


def test_a_delta_of_a_release_that_has_rotted_is_not_used(vehicle, store, server):
    store.publish(V2, base=V1)
    (vehicle.home / "slots" / "a" / "model.fpk").write_bytes(V3)
    assert vehicle.update() is Outcome.STAGED
    assert len(bytes_sent(server, store.payload(V2))) == 1


def test_a_broken_download_goes_on_where_it_stopped(vehicle, store, server):
    store.publish(LARGE)
    server.faults["model.fpk"] = misbehaviour.stops_at(0.75)
    assert vehicle.update() is Outcome.STAGED
    wanted = bytes_sent(server, store.payload(LARGE))
    starts = [int(w.removeprefix("bytes=").rstrip("-")) for w in wanted if w]
    assert wanted[0] is None
    assert starts == sorted(set(starts))
    assert starts[0] > len(LARGE) // 3


def test_what_came_is_kept_for_another_day(home, vehicle, store, server):
    store.publish(LARGE)
    server.faults["model.fpk"] = misbehaviour.trickles
    with pytest.raises(RefusedError, match="too slowly"):
        vehicle.update()
    (part,) = (home / "staging").iterdir()
    came = part.stat().st_size
    assert LARGE.startswith(part.read_bytes())
    server.faults.clear()
    server.requests.clear()
    assert vehicle.update() is Outcome.STAGED
    assert bytes_sent(server, store.payload(LARGE)) == [f"bytes={came}-"]


@pytest.mark.parametrize("length", [10, len(LARGE), len(LARGE) + 10])
def test_a_beginning_that_was_poisoned_is_thrown_away(home, vehicle, store, length):
    store.publish(LARGE)
    (home / "staging" / f"{digest(LARGE)}.part").write_bytes(bytes(length))
    assert vehicle.update() is Outcome.STAGED
    assert vehicle.boot().manifest.sha256 == digest(LARGE)


def test_a_server_without_ranges_sends_all_of_it_again(home, vehicle, store, server):
    store.publish(LARGE)
    (home / "staging" / f"{digest(LARGE)}.part").write_bytes(LARGE[:1000])
    server.faults["model.fpk"] = misbehaviour.knows_no_ranges
    assert vehicle.update() is Outcome.STAGED
    assert vehicle.boot().manifest.sha256 == digest(LARGE)


def test_downloads_of_other_releases_are_cleared_away(home, vehicle, store):
    store.publish(V2)
    (home / "staging" / f"{digest(V3)}.part").write_bytes(V3[:100])
    vehicle.update()
    assert not list((home / "staging").iterdir())


# Other sources


def test_an_offline_bundle_is_installed_without_a_network(vehicle, store, server, tmp_path):
    store.publish(V2)
    with tarfile.open(tmp_path / "bundle.tar", "w") as bundle:
        for path in sorted(store.path.rglob("*")):
            bundle.add(path, path.relative_to(store.path), recursive=False)
    server.requests.clear()
    assert vehicle.update(str(tmp_path / "bundle.tar")) is Outcome.STAGED
    assert server.requests == []
    assert vehicle.boot().manifest.sha256 == digest(V2)


def test_a_directory_is_a_store(vehicle, store, server):
    store.publish(V2)
    server.requests.clear()
    assert vehicle.update(str(store.path)) is Outcome.STAGED
    assert server.requests == []


@pytest.mark.parametrize("address", ["/nowhere", "ftp://host/store"])
def test_an_address_that_is_no_store_is_refused(vehicle, address):
    with pytest.raises((ReleaseError, ValueError), match=address):
        vehicle.update(address)


def with_pax_header(header):
    """Make a tar file with a file that such an extended header describes."""
    entry = tarfile.TarInfo("././@PaxHeader")
    entry.type, entry.size = tarfile.XHDTYPE, len(header)
    return entry.tobuf() + header.ljust(512, b"\0") + tarfile.TarInfo("x").tobuf() + bytes(1024)


@pytest.mark.parametrize(
    "content", [b"not a tar file", with_pax_header(b"13 GNU.sparse.map=a\n"), b""]
)
def test_a_bundle_that_is_no_tar_file_is_refused(vehicle, tmp_path, content):
    (tmp_path / "bundle.tar").write_bytes(content)
    with pytest.raises(ReleaseError, match="must be an uncompressed tar file"):
        vehicle.update(str(tmp_path / "bundle.tar"))


# What can happen to a vehicle


def test_a_second_updater_is_locked_out_and_a_boot_meanwhile_is_not(vehicle, store):
    store.publish(V2)
    with vehicle._alone():
        other = Vehicle(vehicle.home, limits=LIMITS, examine=passes)
        with pytest.raises(BusyError, match="another process"):
            other.update()
        assert other.boot().manifest.sha256 == digest(V1)
    assert other.update() is Outcome.STAGED


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json"])
@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", None])
def test_when_the_active_slot_rots_the_other_one_runs(vehicle, store, name, damage):
    store.publish(V2)
    vehicle.update()
    path = vehicle.boot().path.with_name(name)
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    assert vehicle.boot().manifest.sha256 == digest(V1)
    assert vehicle.update() is Outcome.STAGED
    assert vehicle.boot().manifest.sha256 == digest(V2)


def test_a_bit_that_flips_in_a_new_slot_is_not_blamed_on_the_release(vehicle, store):
    store.publish(V2)
    vehicle.update()
    path = vehicle.home / "slots" / "b" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert vehicle.boot().manifest.sha256 == digest(V1)
    assert vehicle.update() is Outcome.STAGED
    assert vehicle.boot().manifest.sha256 == digest(V2)


@pytest.mark.parametrize("left", [None, b"", b"{}", b"[]", b'{"trial": 3, "bad": []}', b"\xff"])
def test_a_lost_state_is_rebuilt_from_the_slots(vehicle, store, left):
    store.publish(V2)
    vehicle.update()
    vehicle.boot()
    path = vehicle.home / "state.json"
    path.unlink() if left is None else path.write_bytes(left)
    assert vehicle.boot().manifest.sha256 == digest(V2)
    assert vehicle.update() is Outcome.CURRENT
    store.counter = 0
    store.publish(V3)
    with pytest.raises(RefusedError, match="release 1 is older than 2"):
        vehicle.update()


def test_a_release_that_was_never_proven_does_not_run_because_the_state_was_lost(vehicle, store):
    store.publish(V2)
    vehicle.update()
    (vehicle.home / "state.json").unlink()
    assert vehicle.boot().manifest.sha256 == digest(V1)
    assert vehicle.update() is Outcome.STAGED


def test_lost_metadata_is_fetched_anew(vehicle, store):
    for path in (vehicle.home / "metadata").rglob("*.json"):
        path.unlink()
    store.publish(V2)
    assert vehicle.update() is Outcome.STAGED


def test_a_damaged_device_file_stops_updates_but_not_the_vehicle(vehicle, store, runs):
    (vehicle.home / "device.json").write_text("{")
    with pytest.raises(ReleaseError, match="is damaged"):
        Vehicle(vehicle.home).update()
    assert runs() == digest(V1)


@pytest.mark.parametrize("days", [-365 * 50, -365 * 6])
def test_a_clock_of_the_past_stops_no_update(vehicle, store, monkeypatch, days):
    store.publish(V2)
    monkeypatch.setattr("tuf.ngclient._internal.trusted_metadata_set.datetime", clock(days))
    assert vehicle.update() is Outcome.STAGED
    assert vehicle.boot().manifest.sha256 == digest(V2)


def test_a_clock_of_the_future_stops_updates_until_it_is_right(vehicle, store, monkeypatch):
    store.publish(V2)
    with monkeypatch.context() as patch:
        patch.setattr("tuf.ngclient._internal.trusted_metadata_set.datetime", clock(365 * 15))
        with pytest.raises(RefusedError, match="expired"):
            vehicle.update()
        assert vehicle.boot().manifest.sha256 == digest(V1)
    assert vehicle.update() is Outcome.STAGED


def test_a_full_disk_is_noticed_before_the_download(vehicle, store, server, monkeypatch):
    store.publish(V2)
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: full)
    with pytest.raises(ReleaseError, match="not enough space"):
        vehicle.update()
    assert not bytes_sent(server, store.payload(V2))


def test_an_update_writes_below_the_folder_of_the_vehicle_only(vehicle, store, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    store.publish(V2)
    assert vehicle.update() is Outcome.STAGED
    assert vehicle.boot().manifest.sha256 == digest(V2)


def test_updates_of_many_processes_leave_one_state(vehicle, store):
    store.publish(V2)
    outcomes = []

    def update():
        try:
            outcomes.append(Vehicle(vehicle.home, limits=LIMITS, examine=passes).update())
        except BusyError:
            outcomes.append(None)

    threads = [threading.Thread(target=update) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(Outcome.STAGED) == 1
    assert vehicle.boot().manifest.sha256 == digest(V2)


def test_a_vehicle_needs_neither_torch_nor_the_publisher():
    refuse = "for name in ('torch', 'kfp', 'google.cloud', 'kubernetes'): sys.modules[name] = None"
    load = "import filterpress.release.device.__main__, filterpress.release.device.trial"
    subprocess.run([sys.executable, "-c", f"import sys\n{refuse}\n{load}"], check=True)


def test_a_command_of_a_vehicle_starts_without_publisher_compiler_and_runtime():
    code = (
        "import sys, filterpress.release.device.__main__\n"
        "names = ['numba', 'onnx', 'onnxruntime', 'filterpress.release.repository']\n"
        "print([name for name in names if name in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
