"""Channels: what they say, who may change them, and how they go forward only."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tuf.api.metadata import Metadata, TargetFile

from filterpress.codec import apply_delta, quantize, snap
from filterpress.errors import BitstreamError, ModelError, ReleaseError
from filterpress.release import fetch, golden, latest, publish, rollout
from filterpress.release.channel import Check
from filterpress.release.transaction import transact
from tests.children import killed_at_change
from tests.release.device.fleet import encoded
from tests.release.encoded import SHAPE, network, weight
from tests.release.test_attacks import list_again, resign

ONE, TWO, THREE = (network(weight(0, moved)) for moved in (0, 0.05, 0.1))


def target_of(file, name="demo"):
    return f"models/{name}/{hashlib.sha256(file).hexdigest()[:16]}/model.fpk"


def release(store, keys, file, **given):
    return publish(file, target=target_of(file), custom={}, store=store, keys=keys, **given)


@pytest.fixture(scope="session")
def begun(keys, tmp_path_factory):
    store = str(tmp_path_factory.mktemp("begun") / "store")
    for file in (ONE, TWO):
        release(store, keys, file)
    rollout.publish(target_of(ONE), store=store, keys=keys, percent=20, check=Check(atol=0.01))
    return store


@pytest.fixture
def channel(begun, tmp_path):
    """A store of one's own with two releases and a channel that names the first."""
    return shutil.copytree(begun, str(tmp_path / "store"))


def content(store, root):
    return rollout.read(store, root=root).content


def test_a_channel_says_all_that_was_decided(store, keys, root):
    release(store, keys, ONE)
    release(store, keys, TWO)
    made = rollout.publish(
        target_of(TWO),
        store=store,
        keys=keys,
        percent=12.34,
        cohorts=["test-drivers"],
        not_before="2027-01-31T06:00:00Z",
        check=Check(seed=3, count=2, atol=0.5, max_ms=40, max_mb=300),
        run="run-17",
    )
    found = rollout.read(store, root=root)
    assert (found.path, found.content) == ("channels/any/stable.json", made.content)
    answers = (
        golden.images(3, 2, SHAPE).reshape(2, -1)
        @ quantize(weight(0, 0.05), snap(0.25)).dequantize()
    )
    outputs = found.content["health"].pop("outputs")
    np.testing.assert_allclose(outputs, answers, atol=1e-4)
    salt = found.content["rollout"].pop("salt")
    assert len(bytes.fromhex(salt)) == 8
    old, new = (hashlib.sha256(file).hexdigest() for file in (ONE, TWO))
    assert found.content == {
        "schema": 1,
        "name": "demo",
        "hardware": "any",
        "channel": "stable",
        "release_counter": 2,
        "target": target_of(TWO),
        "sha256": new,
        "n_bytes": len(TWO),
        "deltas": [{"from_sha256": old, "target": f"models/demo/{new[:16]}/from-{old[:16]}.fpd"}],
        "rollout": {
            "percent_bp": 1234,
            "cohorts": ["test-drivers"],
            "not_before": "2027-01-31T06:00:00Z",
            "halted": False,
        },
        "health": {"seed": 3, "count": 2, "atol": 0.5, "max_ms": 40, "max_mb": 300},
        "run": "run-17",
    }


def test_a_delta_of_a_channel_makes_the_signed_file_of_the_one_before(channel, keys, root):
    made = rollout.publish(target_of(TWO), store=channel, keys=keys)
    (entry,) = made.content["deltas"]
    delta = fetch(channel, entry["target"], root=root)
    assert apply_delta(ONE, delta) == TWO
    assert len(delta) < 0.7 * len(TWO)


def test_a_delta_that_is_hardly_smaller_is_not_published(directory, keys):
    release(directory, keys, ONE)
    assert release(directory, keys, network(weight(5))).deltas == {}


def test_deltas_start_from_the_last_releases_of_the_same_name_only(directory, keys):
    files = [network(weight(0, moved / 100)) for moved in range(6)]
    for file in files[:5]:
        release(directory, keys, file)
    target = target_of(files[5])
    publish(
        network(weight(0, 0.5)),
        target="models/other/0/model.fpk",
        custom={},
        store=directory,
        keys=keys,
    )
    made = publish(files[5], target=target, custom={}, store=directory, keys=keys, n_deltas=2)
    assert set(made.deltas) == {hashlib.sha256(file).hexdigest() for file in files[3:5]}


@pytest.mark.parametrize("lost", [Path.unlink, lambda path: path.write_bytes(b"altered")])
def test_an_old_release_that_is_lost_costs_its_delta_and_no_more(channel, keys, root, caplog, lost):
    (path,) = Path(channel).glob(f"targets/{target_of(ONE).replace('model.fpk', '*.model.fpk')}")
    lost(path)
    made = release(channel, keys, THREE)
    assert set(made.deltas) == {hashlib.sha256(TWO).hexdigest()}
    assert fetch(channel, made.target, root=root) == THREE
    assert "no delta from release 1: " in caplog.text


def test_a_file_that_is_no_network_has_no_deltas_and_no_channel(directory, keys):
    release(directory, keys, b"one")
    assert release(directory, keys, b"two").deltas == {}
    with pytest.raises(BitstreamError):
        rollout.publish(target_of(b"two"), store=directory, keys=keys)


def test_publishing_a_channel_again_keeps_the_share_it_was_ramped_to(channel, keys, contents):
    rollout.ramp(50, store=channel, keys=keys)
    before = contents(channel)
    again = rollout.publish(target_of(ONE), store=channel, keys=keys, percent=1)
    assert not again.changed
    assert again.content["rollout"]["percent_bp"] == 5000
    assert contents(channel) == before


def test_a_channel_does_not_go_back_to_an_earlier_release(channel, keys, root, caplog):
    rollout.publish(target_of(TWO), store=channel, keys=keys)
    late = rollout.publish(target_of(ONE), store=channel, keys=keys)
    assert not late.changed
    assert content(channel, root)["release_counter"] == 2
    assert "names release 2 already" in caplog.text


def test_a_ramp_changes_the_share_and_nothing_else(channel, keys, root):
    before = content(channel, root)
    assert rollout.ramp(60, store=channel, keys=keys).changed
    wanted = before | {"rollout": before["rollout"] | {"percent_bp": 6000}}
    assert content(channel, root) == wanted
    assert not rollout.ramp(60, store=channel, keys=keys).changed


def test_a_halt_stops_a_channel_until_it_is_resumed(channel, keys, root):
    before = content(channel, root)
    rollout.halt(store=channel, keys=keys)
    assert content(channel, root) == before | {"rollout": before["rollout"] | {"halted": True}}
    rollout.resume(store=channel, keys=keys)
    assert content(channel, root) == before


def test_what_is_published_into_a_halted_channel_waits_until_it_is_resumed(
    channel, keys, root, caplog
):
    rollout.halt(store=channel, keys=keys)
    for _ in range(2):  # the second time nothing changes, but it is still worth saying
        caplog.clear()
        rollout.publish(target_of(TWO), store=channel, keys=keys, percent=70)
        warned = [r.message for r in caplog.records if r.levelno == logging.WARNING]
        assert warned == ["channels/any/stable.json stays halted: resume lets release 2 go"]
        said = content(channel, root)
        assert (said["target"], said["rollout"]["halted"]) == (target_of(TWO), True)
    rollout.resume(store=channel, keys=keys)
    said = content(channel, root)["rollout"]
    assert (said["percent_bp"], said["halted"]) == (7000, False)


def test_each_release_draws_its_own_lots(channel, keys, root):
    first = content(channel, root)["rollout"]["salt"]
    second = rollout.publish(target_of(TWO), store=channel, keys=keys).content["rollout"]["salt"]
    assert first != second


def test_a_recall_publishes_the_old_bytes_under_a_higher_counter(channel, keys, root):
    rollout.publish(target_of(TWO), store=channel, keys=keys, check=Check(max_ms=9), cohorts=["x"])
    rollout.halt(store=channel, keys=keys)
    made = rollout.recall(1, store=channel, keys=keys).content
    digest = hashlib.sha256(ONE).hexdigest()
    assert made["target"] == f"models/demo/{digest[:16]}-3/model.fpk"
    assert (made["release_counter"], made["sha256"]) == (3, digest)
    assert fetch(channel, made["target"], root=root) == ONE
    newest = latest(channel, root=root)
    assert (newest.version, newest.target) == (3, made["target"])
    assert made["health"]["max_ms"] == 9
    assert made["rollout"]["cohorts"] == ["x"]
    assert (made["rollout"]["percent_bp"], made["rollout"]["halted"]) == (10000, False)
    (entry,) = made["deltas"]
    assert entry["from_sha256"] == hashlib.sha256(TWO).hexdigest()
    assert apply_delta(TWO, fetch(channel, entry["target"], root=root)) == ONE
    np.testing.assert_allclose(
        made["health"]["outputs"],
        golden.images(0, 4, SHAPE).reshape(4, -1) @ quantize(weight(0), snap(0.25)).dequantize(),
        atol=1e-4,
    )


def test_a_recall_that_is_repeated_issues_one_release(channel, keys, contents):
    rollout.publish(target_of(TWO), store=channel, keys=keys)
    rollout.recall(1, store=channel, keys=keys)
    before = contents(channel)
    assert not rollout.recall(1, store=channel, keys=keys).changed
    assert contents(channel) == before


def test_what_was_recalled_can_be_released_again_by_a_recall_forward(channel, keys, root):
    rollout.publish(target_of(TWO), store=channel, keys=keys)
    rollout.recall(1, store=channel, keys=keys)
    made = rollout.recall(2, store=channel, keys=keys).content
    assert made["release_counter"] == 4
    assert fetch(channel, made["target"], root=root) == TWO


@pytest.mark.parametrize("killed_at", range(1, 40, 3))
def test_a_recall_killed_anywhere_has_happened_wholly_or_not_at_all(channel, keys, root, killed_at):
    rollout.publish(target_of(TWO), store=channel, keys=keys)
    killed_at_change(killed_at, partial(rollout.recall, 1, store=channel, keys=keys))
    found = content(channel, root)
    counter = latest(channel, root=root).version
    assert (found["release_counter"], counter) in {(2, 2), (3, 3)}
    rollout.recall(1, store=channel, keys=keys)
    assert content(channel, root)["release_counter"] == 3


def test_a_channel_names_only_what_was_released(channel, keys, contents):
    before = contents(channel)
    with pytest.raises(ReleaseError, match=r"has no release models/demo/unknown/model\.fpk"):
        rollout.publish("models/demo/unknown/model.fpk", store=channel, keys=keys)
    (delta,) = [path for path in before if path.endswith(".fpd")]
    name = Path(delta).name.partition(".")[2]
    target = f"{Path(delta).parent.relative_to('targets')}/{name}"
    with pytest.raises(ReleaseError, match=r"has no release .*fpd"):
        rollout.publish(target, store=channel, keys=keys)
    assert contents(channel) == before


def test_a_release_for_other_hardware_is_not_offered(directory, keys, root):
    release(directory, keys, ONE, hardware=["cam-v2"])
    with pytest.raises(ReleaseError, match="is made for cam-v2, not for any"):
        rollout.publish(target_of(ONE), store=directory, keys=keys)
    rollout.publish(target_of(ONE), store=directory, keys=keys, hardware="cam-v2")
    found = rollout.read(directory, root=root, hardware="cam-v2")
    assert found.path == "channels/cam-v2/stable.json"


def only(keys, folder, roles):
    """Keys of some roles, as their holder has them."""
    copied = shutil.copytree(keys, folder)
    places = json.loads((copied / "signers.json").read_bytes())
    (copied / "signers.json").write_text(json.dumps({role: places[role] for role in roles}))
    for path in copied.glob("*.pem"):
        if path.stem not in roles:
            path.unlink()
    return copied


def test_who_holds_the_rollout_key_ramps_and_halts_but_releases_and_recalls_nothing(
    channel, keys, root, tmp_path, contents
):
    few = only(keys, tmp_path / "few", ["rollout", "snapshot", "timestamp"])
    rollout.ramp(70, store=channel, keys=few)
    rollout.halt(store=channel, keys=few)
    rollout.publish(target_of(TWO), store=channel, keys=few)
    before = contents(channel)
    with pytest.raises(ReleaseError, match=r"must name a key that may sign release"):
        rollout.recall(1, store=channel, keys=few)
    with pytest.raises(ReleaseError, match=r"must name a key that may sign release"):
        release(channel, few, THREE)
    assert contents(channel) == before


def test_who_holds_the_release_key_releases_but_moves_no_channel(channel, keys, root, tmp_path):
    few = only(keys, tmp_path / "few", ["release", "snapshot", "timestamp"])
    release(channel, few, THREE)
    with pytest.raises(ReleaseError, match=r"must name a key that may sign rollout"):
        rollout.publish(target_of(THREE), store=channel, keys=few)
    assert content(channel, root)["release_counter"] == 1


def test_a_channel_signed_by_the_release_key_is_not_believed(channel, keys, root):
    def smuggle(signed):
        path = "channels/evil/stable.json"
        signed.targets[path] = TargetFile.from_data(path, b"{}", ["sha256"])

    metadata = Path(channel) / "metadata"
    newest = max(metadata.glob("*.release.json"), key=lambda path: int(path.name.split(".")[0]))
    listed = Metadata.from_file(str(newest)).signed.version
    shutil.copy(newest, metadata / "1.release.json")
    resign(metadata / "1.release.json", keys, "release", smuggle)
    resign(metadata / "1.release.json", keys, "release", lambda s: setattr(s, "version", 1))
    list_again(metadata, keys)
    assert listed > 1
    with pytest.raises(ReleaseError, match="has no channel evil/stable"):
        rollout.read(channel, root=root, hardware="evil")


def test_a_channel_that_is_not_there_cannot_be_changed_or_read(directory, keys, root):
    release(directory, keys, ONE)
    for change in (rollout.halt, rollout.resume):
        with pytest.raises(ReleaseError, match=r"no channel channels/any/x\.json: publish"):
            change(store=directory, keys=keys, channel="x")
    with pytest.raises(ReleaseError, match=r"no channel channels/any/stable\.json: publish"):
        rollout.recall(1, store=directory, keys=keys)
    with pytest.raises(ReleaseError, match="has no channel any/x"):
        rollout.read(directory, root=root, channel="x")


def test_a_recall_to_a_release_that_never_was_is_refused(channel, keys):
    with pytest.raises(ReleaseError, match="has no release with the counter 9"):
        rollout.recall(9, store=channel, keys=keys)


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"percent": -0.01}, "percent must be from 0 to 100"),
        ({"percent": 100.1}, "percent must be from 0 to 100"),
        ({"percent": float("nan")}, "percent must be from 0 to 100"),
        ({"hardware": "../x"}, "hardware must be letters"),
        ({"channel": ".stable"}, "channel must be letters"),
        ({"channel": "a/b"}, "channel must be letters"),
        ({"cohorts": "test"}, "cohorts must be names"),
        ({"cohorts": ["a b"]}, "cohorts must be names"),
        ({"not_before": "tomorrow"}, "not_before must be a time"),
        ({"not_before": "2027-01-31T06:00:00"}, "not_before must be a time"),
    ],
)
def test_what_a_channel_cannot_say_is_refused_by_name(tmp_path, keys, given, rule):
    with pytest.raises(ValueError, match=rule):
        rollout.publish(target_of(ONE), store=str(tmp_path / "none"), keys=keys, **given)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"atol": -0.1}, "atol must be finite and from 0, got -0.1"),
        ({"atol": float("nan")}, "atol must be finite and from 0, got nan"),
        ({"atol": float("inf")}, "atol must be finite and from 0, got inf"),
        ({"max_ms": -1}, "max_ms must be finite and from 0, got -1"),
        ({"max_mb": -1}, "max_mb must be finite and from 0, got -1"),
    ],
)
def test_a_check_that_no_network_could_pass_is_refused_by_name(given, rule):
    with pytest.raises(ValueError, match=rule):
        Check(**given)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("not finite", "answer with finite numbers"), ("does not run", "network must run, got .*")],
)
def test_a_network_that_every_vehicle_would_refuse_is_not_offered(directory, keys, kind, reason):
    broken = encoded(kind=kind)
    release(directory, keys, broken)
    with pytest.raises(ModelError, match=reason):
        rollout.publish(target_of(broken), store=directory, keys=keys)


def test_a_channel_is_no_longer_than_a_vehicle_reads(channel, keys, contents, monkeypatch):
    monkeypatch.setattr(rollout, "MAX_CHANNEL", 2000)
    before = contents(channel)
    with pytest.raises(ReleaseError, match=r"stable\.json would have \d+ bytes, .* fewer images"):
        rollout.publish(target_of(TWO), store=channel, keys=keys, check=Check(count=90))
    assert contents(channel) == before


def test_a_channel_of_another_version_is_left_alone(channel, keys):
    def write(draft):
        draft.add("rollout", "channels/any/stable.json", b'{"schema": 2}', {})

    transact(channel, keys, write)
    with pytest.raises(ReleaseError, match="must have the schema 1: update filterpress"):
        rollout.halt(store=channel, keys=keys)


def test_eight_operators_and_publishers_at_once_all_land(bucket, keys, root):
    for file in (ONE, TWO):
        release(bucket, keys, file)
    rollout.publish(target_of(TWO), store=bucket, keys=keys, percent=0)
    given = {"store": bucket, "keys": keys}
    works = [
        *(lambda p=p: rollout.ramp(p, **given) for p in (10, 20, 30)),
        lambda: rollout.halt(**given),
        lambda: rollout.publish(target_of(TWO), channel="canary", **given),
        lambda: rollout.publish(target_of(ONE), hardware="cam", **given),
        lambda: release(bucket, keys, THREE),
        lambda: release(bucket, keys, b"four"),
    ]
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work) for work in works]:
            done.result()
    stable = content(bucket, root)["rollout"]
    assert stable["halted"]
    assert stable["percent_bp"] in {1000, 2000, 3000}
    assert rollout.read(bucket, root=root, channel="canary").content["release_counter"] == 2
    assert rollout.read(bucket, root=root, hardware="cam").content["release_counter"] == 1
    assert latest(bucket, root=root).version == 4


def test_a_vehicle_without_torch_or_google_can_read_a_channel(channel, root, tmp_path):
    (tmp_path / "root.json").write_bytes(root)
    program = (
        "import sys; sys.modules['torch'] = sys.modules['google.cloud.storage'] = None;"
        "from pathlib import Path; from filterpress.release import rollout;"
        "print(rollout.read(sys.argv[1], root=Path(sys.argv[2]).read_bytes()).content['name'])"
    )
    command = [sys.executable, "-c", program, channel, str(tmp_path / "root.json")]
    done = subprocess.run(command, capture_output=True, check=True, env=dict(os.environ))
    assert done.stdout.strip() == b"demo"
