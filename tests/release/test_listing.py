"""Which deltas the signed list names, and that what leaves it is missed by nobody."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata

from filterpress.codec import apply_delta
from filterpress.release import audit, fetch, publish, rollout
from filterpress.release.transaction import transact
from tests.release.encoded import network, weight

FILES = [network(weight(0, moved / 100)) for moved in range(7)]


def digest(file):
    return hashlib.sha256(file).hexdigest()


def folder_of(file, name="demo"):
    return f"models/{name}/{digest(file)[:16]}"


def target_of(file, name="demo"):
    return f"{folder_of(file, name)}/model.fpk"


def path_of(old, new, name="demo"):
    return f"{folder_of(new, name)}/from-{digest(old)[:16]}.fpd"


@pytest.fixture
def release(directory, keys):
    """Releases a file, and lets a channel name it if asked to."""

    def release(file, name="demo", channel=None, **given):
        target = target_of(file, name)
        publish(file, target=target, custom={}, store=directory, keys=keys, **given)
        if channel:
            rollout.publish(target, store=directory, keys=keys, channel=channel)

    return release


@pytest.fixture
def listed(directory):
    """Says which paths the newest list of releases names."""

    def listed():
        metadata = Path(directory) / "metadata"
        numbers = [int(p.name.partition(".")[0]) for p in metadata.glob("*.release.json")]
        return set(Metadata.from_file(f"{metadata}/{max(numbers)}.release.json").signed.targets)

    return listed


@pytest.fixture
def deltas(listed):
    """Says which deltas are listed, as their new and old file's places in `FILES`."""
    found = {
        path_of(old, new): (i, j) for j, old in enumerate(FILES) for i, new in enumerate(FILES)
    }

    def deltas():
        return {found[path] for path in listed() if path.endswith(".fpd")}

    return deltas


def test_a_list_names_every_release_and_only_the_deltas_of_the_last_two(
    directory, root, release, listed, deltas, contents
):
    for file in FILES:
        release(file, channel="stable")
    assert {target_of(file) for file in FILES} <= listed()
    assert deltas() == {(5, 4), (5, 3), (5, 2), (6, 5), (6, 4), (6, 3)}
    for file in FILES:
        assert fetch(directory, target_of(file), root=root) == file
    kept = [name for name in contents(directory) if name.endswith(".fpd")]
    assert len(kept) == 1 + 2 + 4 * 3  # what was created once is there for ever


def test_what_any_channel_names_stays_listed_also_while_it_is_halted(
    directory, keys, root, release, deltas
):
    release(FILES[0])
    release(FILES[1], channel="halted")
    rollout.halt(store=directory, keys=keys, channel="halted")
    release(FILES[2], channel="canary")
    for file in FILES[3:]:
        release(file, channel="stable", n_deltas=1)
    from_channels = {(new, old) for new in (5, 6) for old in (1, 2)}
    assert deltas() == {(1, 0), (2, 1), (2, 0), (5, 4), (6, 5)} | from_channels
    assert audit.verify(directory, root=root)["problems"] == []


def test_a_release_has_a_delta_from_what_each_channel_names_however_old_that_is(release, deltas):
    release(FILES[0], channel="stable")
    for file in FILES[1:5]:
        release(file, n_deltas=1)
    assert {old for new, old in deltas() if new == 4} == {3, 0}
    release(FILES[5], n_deltas=0)
    assert not {old for new, old in deltas() if new == 5}


def test_the_newest_of_each_network_and_kind_of_vehicle_keeps_its_deltas(release, listed):
    for file in FILES[:2]:
        release(file, name="other", hardware=["car"])
        release(file, hardware=["truck"])
    for file in FILES[2:]:
        release(file, hardware=["car", "van"], n_deltas=1)
    assert {path for path in listed() if path.endswith(".fpd")} == {
        path_of(FILES[0], FILES[1], "other"),
        path_of(FILES[0], FILES[1]),
        path_of(FILES[4], FILES[5]),
        path_of(FILES[5], FILES[6]),
    }


def test_a_channel_takes_up_with_deltas_what_another_left_in_the_last_step(
    directory, keys, release, deltas
):
    release(FILES[0])
    for file in FILES[1:3]:
        release(file, then=rollout.naming(channel="canary"))
    made = rollout.publish(target_of(FILES[1]), store=directory, keys=keys).content
    assert [delta["target"] for delta in made["deltas"]] == [path_of(FILES[0], FILES[1])]
    release(FILES[3], then=rollout.naming(channel="canary"))
    assert {new for new, _ in deltas()} == {1, 2, 3}


def test_a_recall_makes_the_deltas_again_that_had_left_the_list(
    directory, keys, root, release, deltas, contents
):
    for file in FILES[:5]:
        release(file, channel="stable")
    assert not {old for new, old in deltas() if new == 1}
    before = contents(directory)
    made = rollout.recall(2, store=directory, keys=keys, n_deltas=4).content
    assert {old for new, old in deltas() if new == 1} == {0, 2, 3, 4}
    for entry in made["deltas"]:
        (old,) = (file for file in FILES if digest(file) == entry["from_sha256"])
        assert apply_delta(old, fetch(directory, entry["target"], root=root)) == FILES[1]
    created = contents(directory).keys() - before.keys()
    # The one from the release before it was in the store, and has the same bytes and name.
    assert sum(name.endswith(".fpd") for name in created) == 3


def test_only_a_new_release_changes_the_list(directory, keys, release, deltas, contents):
    for file in FILES[:4]:
        release(file, channel="stable")
    release(FILES[4])
    rollout.publish(target_of(FILES[4]), store=directory, keys=keys)
    rollout.ramp(50, store=directory, keys=keys)
    before, left = contents(directory), deltas()
    assert {new for new, _ in left} == {3, 4}
    assert len([name for name in before if name.endswith(".release.json")]) == 5
    for file in FILES[:5]:
        release(file, channel="stable")
    assert contents(directory) == before


@pytest.mark.parametrize("said", [b"{", b'{"schema": 2}', b'{"schema": 1}'])
def test_a_channel_that_cannot_be_read_keeps_all_deltas_listed(
    directory, keys, release, deltas, caplog, said
):
    for file in FILES[:3]:
        release(file, channel="stable")

    def write(draft):
        draft.add("rollout", "channels/any/odd.json", said, {})

    transact(directory, keys, write)
    for file in FILES[3:5]:
        release(file)
    assert {new for new, _ in deltas()} == {1, 2, 3, 4}
    assert (
        "no delta leaves the list of releases: channels/any/odd.json cannot be read" in caplog.text
    )


def test_a_release_that_says_what_it_was_made_from_is_no_delta(directory, keys, release, listed):
    target = "models/demo/7/model.fpk"
    custom = {"from_sha256": digest(FILES[0])}
    publish(FILES[1], target=target, custom=custom, store=directory, keys=keys)
    for file in FILES[2:5]:
        release(file)
    assert target in listed()
