"""Walking a whole store, and taking one channel of it to a vehicle without a network."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from filterpress.errors import ReleaseError
from filterpress.release import audit, fetch, publish, rollout
from filterpress.release.store import DirectoryStore
from filterpress.release.transaction import transact
from tests.release.encoded import network, weight
from tests.release.test_attacks import resign

ONE, TWO = network(weight(0)), network(weight(0, 0.05))


def target_of(file):
    return f"models/demo/{hashlib.sha256(file).hexdigest()[:16]}/model.fpk"


def fill(store, keys):
    for file in (ONE, TWO):
        publish(file, target=target_of(file), custom={}, store=store, keys=keys)
    rollout.publish(target_of(TWO), store=store, keys=keys, percent=25, cohorts=["test"])


@pytest.fixture(scope="session")
def filled(keys, tmp_path_factory):
    store = tmp_path_factory.mktemp("filled") / "store"
    fill(str(store), keys)
    return store


@pytest.fixture
def copied(filled, tmp_path):
    return shutil.copytree(filled, tmp_path / "store")


def test_a_sound_store_is_listed_without_problems(store, keys, root):
    fill(store, keys)
    found = audit.verify(store, root=root)
    assert found["problems"] == []
    days = {row["role"]: row["days_left"] for row in found["roles"]}
    lives = {"root": 365, "targets": 365, "release": 90, "rollout": 30, "snapshot": 7}
    assert days == pytest.approx(lives | {"timestamp": 1}, abs=0.05)
    listed = {row["target"]: row["n_bytes"] for row in found["releases"]}
    assert listed[target_of(ONE)] == len(ONE)
    assert listed[target_of(TWO)] == len(TWO)
    assert len(listed) == 3  # and a delta
    (channel,) = found["channels"]
    assert channel == {
        "channel": "channels/any/stable.json",
        "release_counter": 2,
        "target": target_of(TWO),
        "percent": 25,
        "cohorts": "test",
        "not_before": "",
        "halted": False,
    }


def test_every_file_is_read_once(filled, root, monkeypatch, contents):
    read = []

    class Counted(DirectoryStore):
        def read(self, name):
            read.append(name)
            return super().read(name)

    monkeypatch.setattr(audit, "open_store", lambda store: Counted(Path(store)))
    assert audit.verify(str(filled), root=root)["problems"] == []
    payloads = [name for name in contents(filled) if name.startswith("targets/")]
    assert sorted(name for name in read if name.startswith("targets/")) == sorted(payloads)


def test_a_file_that_is_lost_or_altered_is_a_problem_of_its_own(copied, root):
    one, two = (
        next((copied / "targets").glob(f"models/demo/{hashlib.sha256(f).hexdigest()[:16]}/*.fpk"))
        for f in (ONE, TWO)
    )
    one.unlink()
    two.write_bytes(two.read_bytes()[:-1])
    assert sorted(audit.verify(str(copied), root=root)["problems"]) == sorted(
        [f"{target_of(ONE)} is lost", f"{target_of(TWO)} is altered"]
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"target": "models/demo/x/model.fpk"}, "names models/demo/x/model.fpk, which nobody"),
        ({"release_counter": 7}, "says release 7, its target 2"),
        ({"sha256": "0" * 64}, "names other bytes than its target"),
        ({"deltas": [{"from_sha256": "0", "target": "models/a/b/c"}]}, "names models/a/b/c, which"),
        ({"schema": 2}, "must have the schema 1"),
    ],
)
def test_a_channel_that_no_vehicle_would_follow_is_a_problem(copied, keys, root, change, problem):
    path = "channels/any/stable.json"

    def edit(draft):
        content = json.loads(draft.read(draft.listed("rollout")[path]))
        draft.add("rollout", path, json.dumps(content | change).encode(), {})

    transact(str(copied), keys, edit)
    (found,) = audit.verify(str(copied), root=root)["problems"]
    assert problem in found


def test_a_channel_whose_release_is_for_other_vehicles_is_a_problem(copied, keys, root):
    def edit(draft):
        (listed,) = (i for p, i in draft.listed("release").items() if p == target_of(TWO))
        listed.unrecognized_fields["custom"]["hardware_ids"] = ["cam-v1", "cam-v2"]
        draft.sign_again("release")

    transact(str(copied), keys, edit)
    assert audit.verify(str(copied), root=root)["problems"] == [
        "channels/any/stable.json names a release for cam-v1, cam-v2"
    ]


def test_metadata_that_ends_within_hours_is_a_problem(copied, keys, root):
    def shorten(signed):
        signed.expires = datetime.now(UTC) + timedelta(hours=5)

    resign(copied / "metadata" / "timestamp.json", keys, "timestamp", shorten)
    (problem,) = audit.verify(str(copied), root=root)["problems"]
    assert problem.startswith("the timestamp ends ")


def test_a_bundle_is_a_store_of_one_channel_for_a_vehicle_without_a_network(
    store, keys, root, tmp_path
):
    fill(store, keys)
    made = audit.bundle(tmp_path / "bundle.tar", store=store, root=root)
    with tarfile.open(tmp_path / "bundle.tar") as tar:
        assert sorted(tar.getnames()) == made["names"]
        tar.extractall(tmp_path / "unpacked", filter="data")
    unpacked = str(tmp_path / "unpacked")
    channel = rollout.read(unpacked, root=root).content
    assert channel == rollout.read(store, root=root).content
    assert fetch(unpacked, channel["target"], root=root) == TWO
    payloads = [name for name in made["names"] if name.endswith(".fpk")]
    assert len(payloads) == 1
    assert "metadata/1.root.json" in made["names"]
    left = datetime.fromisoformat(made["expires"]) - datetime.now(UTC)
    assert left / timedelta(days=1) == pytest.approx(1, abs=0.01)


def test_a_bundle_has_the_same_bytes_each_time_and_overwrites_nothing(filled, root, tmp_path):
    one, two = (tmp_path / name for name in ("one.tar", "two.tar"))
    for out in (one, two):
        audit.bundle(out, store=str(filled), root=root)
    assert one.read_bytes() == two.read_bytes()
    with pytest.raises(ValueError, match="out must be a file that does not exist yet"):
        audit.bundle(one, store=str(filled), root=root)


def test_a_bundle_with_a_bad_file_is_not_written(copied, root, tmp_path):
    (file,) = (copied / "targets").glob(target_of(TWO).replace("model.fpk", "*.model.fpk"))
    file.write_bytes(b"other")
    with pytest.raises(ReleaseError, match="nothing that can be trusted"):
        audit.bundle(tmp_path / "bundle.tar", store=str(copied), root=root)
    with pytest.raises(ReleaseError, match="has no channel any/beta"):
        audit.bundle(tmp_path / "bundle.tar", store=str(copied), root=root, channel="beta")
    assert not Path(tmp_path / "bundle.tar").exists()
