"""Roots and targets that several people sign off line, and keys that are exchanged."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata

from filterpress.errors import ReleaseError
from filterpress.release import ceremony, fetch, publish, refresh, rollout, roots
from filterpress.release.store import DirectoryStore
from tests.children import killed_at_change
from tests.release.encoded import network, weight

ONLINE = ("release", "rollout", "snapshot", "timestamp")
TARGET = "models/demo/a/file"
FILE = network(weight(0))


def make_key(folder, name, generate=CryptoSigner.generate_ed25519):
    """Make a pair of keys as `openssl` would; returns the private and the public file."""
    signer = generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(signer.private_bytes)
    pem = signer._private_key.public_key()
    public.write_bytes(pem.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


class People:
    """Three holders of root keys, two of which also sign targets, and an online publisher."""

    def __init__(self, folder):
        self.folder, self.draft, self.keys = folder, folder / "draft", folder / "publisher"
        self.keys.mkdir()
        names = ["ann", "bob", "cy", *ONLINE]
        kinds = {"bob": CryptoSigner.generate_ecdsa, "timestamp": CryptoSigner.generate_ecdsa}
        self.made = {
            name: make_key(folder, name, kinds.get(name, CryptoSigner.generate_ed25519))
            for name in names
        }
        public = {name: pair[1] for name, pair in self.made.items()}
        offline = [public[name] for name in ("ann", "bob", "cy")]
        online = {role: [public[role]] for role in ONLINE}
        self.status = ceremony.new(
            self.draft,
            {"root": offline, "targets": offline[:2], **online},
            {"root": 2, "targets": 2},
        )

    def sign(self, *names):
        for name in names:
            self.status = ceremony.sign(self.draft, f"file2:{self.made[name][0]}")

    def hold(self, **roles):
        """Give the publisher the keys of roles, by the names of their files."""
        places = {
            role: [
                {
                    "uri": f"file2:{self.made[name][0]}",
                    "keyid": ceremony.public_key(self.made[name][1]).keyid,
                }
                for name in names
            ]
            for role, names in roles.items()
        }
        (self.keys / "signers.json").write_text(json.dumps(places))


@pytest.fixture
def people(tmp_path):
    made = People(tmp_path)
    made.hold(**{role: [role] for role in ONLINE})
    return made


@pytest.fixture
def begun(people, directory):
    """A store whose root was signed by two of three, with a release and a channel."""
    people.sign("ann", "bob")
    shutil.copy(people.draft / "1.root.json", people.keys / "root.json")
    roots.publish(people.draft, store=directory, keys=people.keys)
    publish(FILE, target=TARGET, custom={}, store=directory, keys=people.keys)
    rollout.publish(TARGET, store=directory, keys=people.keys)
    return directory


@pytest.fixture
def first_root(begun, people):
    return (people.keys / "root.json").read_bytes()


def signatures(people, name):
    return len(Metadata.from_file(str(people.draft / name)).signatures)


def test_a_root_takes_the_signatures_of_two_of_three_one_at_a_time(people):
    assert [people.status[kind]["missing"] for kind in ("root", "targets")] == [2, 2]
    people.sign("cy")  # may sign the root only
    assert [people.status[kind]["missing"] for kind in ("root", "targets")] == [1, 2]
    people.sign("ann")
    assert [people.status[kind]["missing"] for kind in ("root", "targets")] == [0, 1]
    people.sign("bob")
    assert [people.status[kind]["missing"] for kind in ("root", "targets")] == [0, 0]
    assert signatures(people, "1.root.json") == 2  # no more than it takes
    root = Metadata.from_file(str(people.draft / "1.root.json"))
    root.signed.verify_delegate("root", root.signed_bytes, root.signatures)


def test_what_is_signed_by_too_few_is_not_published(people, directory):
    people.sign("ann")
    shutil.copy(people.draft / "1.root.json", people.keys / "root.json")
    with pytest.raises(ReleaseError, match="root was signed by 1/2 keys"):
        roots.publish(people.draft, store=directory, keys=people.keys)
    assert not Path(directory).exists()


def test_a_store_of_a_ceremony_is_published_to_and_read(begun, first_root):
    assert fetch(begun, TARGET, root=first_root) == FILE
    assert rollout.read(begun, root=first_root).content["release_counter"] == 1


def test_publishing_the_same_root_again_changes_nothing(begun, people, contents):
    before = contents(begun)
    roots.publish(people.draft, store=begun, keys=people.keys)
    assert contents(begun) == before


def test_a_stranger_signs_nothing(people, tmp_path):
    private, _ = make_key(tmp_path, "eve")
    with pytest.raises(ReleaseError, match=r"eve\.pem signs nothing in .*: it is none of the keys"):
        ceremony.sign(people.draft, f"file2:{private}")
    assert signatures(people, "1.root.json") == 0


def test_a_key_that_is_not_there_is_named(people):
    with pytest.raises(ReleaseError, match=r"cannot read the key file2:gone\.pem of .*: No such"):
        ceremony.sign(people.draft, "file2:gone.pem")


def test_one_holder_does_not_sign_twice(people):
    people.sign("ann")
    with pytest.raises(ReleaseError, match="signs nothing"):
        people.sign("ann")
    assert signatures(people, "1.root.json") == 1


def test_a_change_has_to_be_signed_by_all_again(people):
    people.sign("ann")
    _, public = make_key(people.folder, "extra")
    status = ceremony.add_key(people.draft, "snapshot", public)
    assert (status["root"]["version"], status["root"]["missing"]) == (1, 2)


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "release", "rollout"])
def test_an_online_key_is_exchanged_in_two_steps_and_no_reader_fails(
    begun, people, first_root, role
):
    def check():
        assert fetch(begun, TARGET, root=first_root) == FILE
        assert rollout.read(begun, root=first_root).content["name"] == "demo"

    people.made["next"] = make_key(people.folder, "next", CryptoSigner.generate_ecdsa)
    old = ceremony.status(people.draft)["keys"][role]["keys"][0]
    ceremony.add_key(people.draft, role, people.made["next"][1])
    people.sign("ann", "bob")
    roots.publish(people.draft, store=begun, keys=people.keys)
    check()
    held = {other: [other] for other in ONLINE}
    people.hold(**held | {role: ["next"]})
    refresh(store=begun, keys=people.keys)
    publish(b"more", target="models/demo/b/file", custom={}, store=begun, keys=people.keys)
    rollout.ramp(5, store=begun, keys=people.keys)
    check()
    ceremony.drop_key(people.draft, role, old)
    people.sign("ann", "bob")
    roots.publish(people.draft, store=begun, keys=people.keys)
    check()
    people.hold(**held)
    change = {
        "rollout": lambda: rollout.ramp(6, store=begun, keys=people.keys),
    }.get(role, lambda: release_once_more(begun, people))
    with pytest.raises(ReleaseError, match=f"must name a key that may sign {role}"):
        change()


def release_once_more(store, people):
    publish(b"last", target="models/demo/c/file", custom={}, store=store, keys=people.keys)


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "release", "rollout"])
def test_a_stolen_key_is_dropped_at_once_and_what_it_signed_is_signed_anew(
    begun, people, first_root, role
):
    people.made["next"] = make_key(people.folder, "next")
    old = ceremony.status(people.draft)["keys"][role]["keys"][0]
    ceremony.add_key(people.draft, role, people.made["next"][1])
    ceremony.drop_key(people.draft, role, old)
    people.sign("ann", "bob")
    held = {other: [other] for other in ONLINE}
    with pytest.raises(ReleaseError, match=f"must name a key that may sign {role}"):
        roots.publish(people.draft, store=begun, keys=people.keys)
    people.hold(**held | {role: ["next"]})
    roots.publish(people.draft, store=begun, keys=people.keys)
    assert fetch(begun, TARGET, root=first_root) == FILE
    assert rollout.read(begun, root=first_root).content["name"] == "demo"


def test_a_root_whose_publisher_died_on_the_way_is_published_by_the_next(
    begun, people, first_root, tmp_path
):
    people.made["next"] = make_key(people.folder, "next")
    old = ceremony.status(people.draft)["keys"]["timestamp"]["keys"][0]
    ceremony.add_key(people.draft, "timestamp", people.made["next"][1])
    ceremony.drop_key(people.draft, "timestamp", old)
    people.sign("ann", "bob")
    people.hold(**{role: [role] for role in ONLINE} | {"timestamp": ["next"]})
    killed = 0
    for number in range(1, 100):
        store = str(shutil.copytree(begun, tmp_path / str(number)))
        publish_root = partial(roots.publish, people.draft, store=store, keys=people.keys)
        if not killed_at_change(number, publish_root):
            break
        killed += 1
        publish_root()
        assert fetch(store, TARGET, root=first_root) == FILE
    assert killed > 6


def test_a_refresh_at_the_same_time_does_not_stop_a_root(begun, people, first_root, monkeypatch):
    people.made["next"] = make_key(people.folder, "next")
    ceremony.add_key(people.draft, "timestamp", people.made["next"][1])
    people.sign("ann", "bob")
    replace = DirectoryStore.replace

    def replace_second(store, name, *given):
        if name == "metadata/timestamp.json":
            monkeypatch.undo()
            refresh(store=begun, keys=people.keys)
        replace(store, name, *given)

    monkeypatch.setattr(DirectoryStore, "replace", replace_second)
    roots.publish(people.draft, store=begun, keys=people.keys)
    assert (Path(begun) / "metadata" / "2.root.json").exists()
    assert fetch(begun, TARGET, root=first_root) == FILE


def test_a_holder_of_the_root_is_replaced_with_the_signatures_of_old_and_new(
    begun, people, first_root
):
    people.made["dee"] = make_key(people.folder, "dee")
    ann, bob, _ = ceremony.status(people.draft)["keys"]["root"]["keys"]
    ceremony.add_key(people.draft, "root", people.made["dee"][1])
    ceremony.drop_key(people.draft, "root", ann)
    ceremony.drop_key(people.draft, "root", bob)
    people.sign("cy", "dee")
    assert people.status["root"]["missing"] == 1  # the old root wants two of its own
    people.sign("bob")
    assert people.status["root"]["missing"] == 0
    roots.publish(people.draft, store=begun, keys=people.keys)
    assert fetch(begun, TARGET, root=first_root) == FILE


def test_a_root_signed_by_one_of_two_holders_is_refused_by_all(begun, people, first_root):
    ceremony.renew(people.draft)
    people.sign("ann")
    shutil.copy(people.draft / "2.root.json", Path(begun) / "metadata" / "2.root.json")
    with pytest.raises(ReleaseError, match="root was signed by 1/2 keys"):
        fetch(begun, TARGET, root=first_root)
    with pytest.raises(ReleaseError, match="root was signed by 1/2 keys"):
        publish(b"new", target="models/demo/b/file", custom={}, store=begun, keys=people.keys)


def test_a_store_whose_root_has_ended_is_recovered_by_a_new_one(
    begun, people, first_root, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setitem(ceremony.LIFE, "root", timedelta(seconds=-1))
        ceremony.renew(people.draft)
        people.sign("ann", "bob")
    for name in ("2.root.json",):
        shutil.copy(people.draft / name, Path(begun) / "metadata" / name)
    (people.draft / "2.targets.json").unlink()
    with pytest.raises(ReleaseError, match=r"out of date: .*root\.json is expired"):
        fetch(begun, TARGET, root=first_root)
    with pytest.raises(ReleaseError, match=r"out of date: root\.json is expired"):
        refresh(store=begun, keys=people.keys)
    ceremony.renew(people.draft)
    people.sign("ann", "bob")
    roots.publish(people.draft, store=begun, keys=people.keys)
    assert fetch(begun, TARGET, root=first_root) == FILE


def test_readers_whom_a_thief_sent_far_ahead_are_freed_by_another_timestamp_key(
    begun, people, first_root
):
    path = Path(begun) / "metadata" / "timestamp.json"
    stolen = Metadata.from_bytes(path.read_bytes())
    stolen.signed.version = 2**31
    stolen.sign(CryptoSigner(load_pem_private_key(people.made["timestamp"][0].read_bytes(), None)))
    path.write_bytes(stolen.to_bytes())
    people.made["next"] = make_key(people.folder, "next")
    (old,) = ceremony.status(people.draft)["keys"]["timestamp"]["keys"]
    ceremony.add_key(people.draft, "timestamp", people.made["next"][1])
    ceremony.drop_key(people.draft, "timestamp", old)
    people.sign("ann", "bob")
    people.hold(**{role: [role] for role in ONLINE} | {"timestamp": ["next"]})
    roots.publish(people.draft, store=begun, keys=people.keys)
    assert fetch(begun, TARGET, root=first_root) == FILE
    assert Metadata.from_bytes(path.read_bytes()).signed.version > 2**31


def test_a_root_is_renewed_before_its_end(begun, people, first_root, monkeypatch):
    monkeypatch.setitem(ceremony.LIFE, "root", timedelta(days=500))
    status = ceremony.renew(people.draft)
    assert [status[kind]["version"] for kind in ("root", "targets")] == [2, 2]
    people.sign("ann", "bob")
    roots.publish(people.draft, store=begun, keys=people.keys)
    left = datetime.fromisoformat(people.status["root"]["expires"]) - datetime.now(UTC)
    assert left / timedelta(days=1) == pytest.approx(500, abs=0.01)
    assert fetch(begun, TARGET, root=first_root) == FILE
    assert (Path(begun) / "metadata" / "2.targets.json").exists()


def test_a_folder_begins_with_what_a_store_says(begun, people, first_root, tmp_path):
    ceremony.renew(people.draft)
    people.sign("ann", "bob")
    roots.publish(people.draft, store=begun, keys=people.keys)
    copied = tmp_path / "copied"
    status = roots.begin(copied, store=begun, root=first_root)
    assert status == ceremony.status(people.draft)
    assert {path.name for path in copied.iterdir()} == {
        "1.root.json",
        "2.root.json",
        "2.targets.json",
    }
    with pytest.raises(ReleaseError, match="holds something: name another folder"):
        roots.begin(copied, store=begun, root=first_root)


def test_keys_made_in_one_step_are_changed_by_a_ceremony_too(directory, keys, root, tmp_path):
    publish(FILE, target=TARGET, custom={}, store=directory, keys=keys)
    draft = tmp_path / "draft"
    roots.begin(draft, store=directory, root=root)
    _, public = make_key(tmp_path, "next")
    ceremony.add_key(draft, "release", public)
    ceremony.sign(draft, f"file2:{keys / 'targets.pem'}")
    roots.publish(draft, store=directory, keys=keys)
    assert fetch(directory, TARGET, root=root) == FILE
    assert (Path(directory) / "metadata" / "2.targets.json").exists()


def test_another_root_of_the_same_number_is_not_published(begun, people, tmp_path):
    other = People((tmp_path / "other").mkdir() or tmp_path / "other")
    other.sign("ann", "bob")
    ceremony.renew(other.draft)
    other.sign("ann", "bob")
    with pytest.raises(ReleaseError, match="holds nothing that can be trusted: root was signed"):
        roots.publish(other.draft, store=begun, keys=people.keys)


@pytest.mark.parametrize(
    ("keys", "thresholds", "rule"),
    [
        ({}, {}, "threshold of root must be from 1 to its number of keys, 0, got 1"),
        ({"boss": []}, {}, "role must be one of root, targets, release, rollout, snapshot,"),
        ({}, {"boss": 1}, "role must be one of root, targets"),
    ],
)
def test_a_root_without_keys_is_not_drawn_up(tmp_path, keys, thresholds, rule):
    with pytest.raises(ValueError, match=rule):
        ceremony.new(tmp_path / "draft", keys, thresholds)
    assert not (tmp_path / "draft").exists()


def test_the_last_key_of_a_role_is_not_dropped(people):
    (keyid,) = ceremony.status(people.draft)["keys"]["release"]["keys"]
    with pytest.raises(ValueError, match="threshold of release must be from 1 to"):
        ceremony.drop_key(people.draft, "release", keyid)
    with pytest.raises(ValueError, match="Key with id abc is not used by release"):
        ceremony.drop_key(people.draft, "release", "abc")


def test_a_public_key_may_name_its_scheme(tmp_path):
    key = CryptoSigner.generate_rsa(scheme="rsa-pkcs1v15-sha256").public_key
    path = tmp_path / "key.json"
    path.write_text(json.dumps({"keyid": key.keyid, **key.to_dict()}))
    assert ceremony.public_key(path) == key


@pytest.mark.parametrize("text", ["", "no key", "{}", '{"keyid": 1}'])
def test_what_is_no_public_key_is_named(tmp_path, text):
    (tmp_path / "key").write_text(text)
    with pytest.raises(ReleaseError, match="key must be a public key in PEM or JSON"):
        ceremony.public_key(tmp_path / "key")


def test_a_folder_without_a_ceremony_is_named(tmp_path):
    with pytest.raises(ReleaseError, match="must hold the root and the targets of a ceremony"):
        ceremony.status(tmp_path)
