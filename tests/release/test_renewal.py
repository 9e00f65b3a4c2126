"""How long metadata lives, and who renews it."""

from __future__ import annotations

import json
import shutil
import time
from datetime import UTC, datetime, timedelta

import pytest
from tuf.api.metadata import Metadata

from filterpress.errors import ReleaseError
from filterpress.release import create_keys, fetch, latest, publish, refresh
from filterpress.release.keys import LIFE, Keys
from filterpress.release.transaction import transact

TARGET = "models/demo/a/file"


def signed(store, name):
    return Metadata.from_file(f"{store}/metadata/{name}.json").signed


def days_left(part):
    return (part.expires - datetime.now(UTC)) / timedelta(days=1)


@pytest.fixture
def published(directory, keys):
    publish(b"file", target=TARGET, custom={}, store=directory, keys=keys)
    return directory


@pytest.mark.parametrize(
    ("name", "days"),
    [
        *(("1.root", 365), ("1.targets", 365), ("1.release", 90)),
        *(("1.rollout", 30), ("1.snapshot", 7), ("timestamp", 1)),
    ],
)
def test_each_role_lives_as_long_as_was_decided(published, name, days):
    assert days_left(signed(published, name)) == pytest.approx(days, abs=0.01)


@pytest.mark.parametrize("name", ["1.release", "1.rollout", "1.snapshot", "timestamp"])
def test_what_development_keys_sign_outlives_a_trial_that_nobody_renews(directory, tmp_path, name):
    publish(b"file", target=TARGET, custom={}, store=directory, keys=tmp_path / "keys")
    assert days_left(signed(directory, name)) == pytest.approx(90, abs=0.01)


def test_a_timestamp_says_when_it_was_issued_in_whole_seconds(published):
    issued = signed(published, "timestamp").unrecognized_fields["x-issued"]
    assert isinstance(issued, int)
    assert time.time() - 60 < issued <= time.time()


def test_a_refresh_issues_a_timestamp_and_nothing_that_has_long_to_live(
    published, keys, contents, root
):
    before = contents(published)
    refresh(store=published, keys=keys)
    after = contents(published)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"metadata/timestamp.json"}
    assert signed(published, "timestamp").version == 2
    assert fetch(published, TARGET, root=root) == b"file"


def test_a_refresh_does_not_begin_a_store_at_a_mistyped_address(store, keys, root):
    with pytest.raises(ReleaseError, match="is empty: there is nothing to refresh"):
        refresh(store=store, keys=keys)
    with pytest.raises(ReleaseError, match=r"metadata/timestamp\.json is missing"):
        latest(store, root=root)


@pytest.fixture
def short_lives(monkeypatch):
    """What is signed from now on has less than a quarter of its life left."""
    monkeypatch.setattr(Keys, "life", lambda self, role: LIFE[role] / 5)


def test_a_refresh_renews_all_that_nears_its_end(directory, keys, root, monkeypatch, short_lives):
    publish(b"file", target=TARGET, custom={}, store=directory, keys=keys)
    monkeypatch.undo()
    refresh(store=directory, keys=keys)
    found = json.loads((Metadata.from_file(f"{directory}/metadata/2.snapshot.json")).to_bytes())
    versions = {name: meta["version"] for name, meta in found["signed"]["meta"].items()}
    assert versions == {"release.json": 2, "rollout.json": 2, "targets.json": 1}
    for name, days in (("2.release", 90), ("2.rollout", 30), ("2.snapshot", 7)):
        assert days_left(signed(directory, name)) == pytest.approx(days, abs=0.01)


def test_a_refresh_needs_the_keys_of_timestamp_and_snapshot_only(
    directory, keys, root, monkeypatch, short_lives, tmp_path, caplog
):
    publish(b"file", target=TARGET, custom={}, store=directory, keys=keys)
    monkeypatch.undo()
    few = shutil.copytree(keys, tmp_path / "few")
    places = json.loads((few / "signers.json").read_bytes())
    kept = {role: places[role] for role in ("snapshot", "timestamp")}
    (few / "signers.json").write_text(json.dumps(kept))
    for path in few.glob("*.pem"):
        if path.stem not in kept:
            path.unlink()
    refresh(store=directory, keys=few)
    said = [r.getMessage() for r in caplog.records if "is due" in r.getMessage()]
    assert said == [
        f"{role} is due, and {few} has no key to sign it: others must"
        for role in ("release", "rollout")
    ]
    assert days_left(signed(directory, "2.snapshot")) == pytest.approx(7, abs=0.01)
    assert signed(directory, "2.snapshot").meta["release.json"].version == 1
    with pytest.raises(ReleaseError, match=r"signers\.json must name a key that may sign release"):
        publish(b"new", target="models/demo/b/file", custom={}, store=directory, keys=few)


@pytest.mark.parametrize(("behind", "refused"), [(200, False), (400, True), (3e8, True)])
def test_a_publisher_whose_clock_is_behind_signs_nothing(
    published, keys, contents, monkeypatch, behind, refused
):
    before, now = contents(published), time.time()
    monkeypatch.setattr(time, "time", lambda: now - behind)
    if refused:
        with pytest.raises(ReleaseError, match=r"clock of this machine is .* behind"):
            refresh(store=published, keys=keys)
    else:
        refresh(store=published, keys=keys)
    assert (contents(published) == before) is refused


def test_an_empty_store_is_begun_with_signed_targets_or_not_at_all(directory, keys, tmp_path):
    folder = shutil.copytree(keys, tmp_path / "keys")
    (folder / "targets.json").unlink()
    with pytest.raises(ReleaseError, match="the store is empty: publish a root and its targets"):
        publish(b"file", target=TARGET, custom={}, store=directory, keys=folder)


def test_a_publisher_warns_of_a_root_that_ends_within_a_month(
    directory, tmp_path, caplog, monkeypatch
):
    monkeypatch.setitem(LIFE, "root", timedelta(days=20))
    create_keys(tmp_path / "keys")
    publish(b"file", target=TARGET, custom={}, store=directory, keys=tmp_path / "keys")
    assert [record.message for record in caplog.records] == [
        "the root expires in 19 days: sign a new one before"
    ]


def test_a_change_that_fails_leaves_nothing(published, keys, contents):
    before = contents(published)

    def fail(draft):
        draft.add("release", "models/demo/x/file", b"x", {})
        raise ReleaseError("stop")

    with pytest.raises(ReleaseError, match="stop"):
        transact(published, keys, fail)
    assert contents(published) == before
