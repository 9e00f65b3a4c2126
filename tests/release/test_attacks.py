"""Whoever can write to the store, or holds some of the keys, cannot make a reader believe them.

Nor a publisher: what it signs anew it has verified first.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, TargetFile

from filterpress.errors import ReleaseError
from filterpress.release import create_keys, fetch, latest, publish

FILE = bytes(range(256))


@pytest.fixture(scope="session")
def honest(keys, tmp_path_factory):
    store = tmp_path_factory.mktemp("honest") / "store"
    publish(FILE, target="models/demo/a/file", custom={}, store=str(store), keys=keys)
    return store


@pytest.fixture
def released(honest, tmp_path):
    """A store of one's own that holds one release, as a path."""
    return Path(shutil.copytree(honest, tmp_path / "store"))


@pytest.fixture(scope="session")
def others(tmp_path_factory):
    """Keys of somebody else."""
    folder = tmp_path_factory.mktemp("somebody-else") / "keys"
    create_keys(folder)
    return folder


@pytest.fixture
def refused(released, keys, root, contents):
    """Fails unless reader and publisher both refuse the store, and leave it as it is."""

    def check(reason):
        before = contents(released)
        with pytest.raises(ReleaseError, match=reason) as by_reader:
            fetch(str(released), "models/demo/a/file", root=root)
        with pytest.raises(ReleaseError, match=reason) as by_publisher:
            publish(b"new", target="models/demo/b/file", custom={}, store=str(released), keys=keys)
        assert contents(released) == before
        for caught in (by_reader, by_publisher):
            assert "\n" not in str(caught.value)

    return check


def signer(keys, role):
    return CryptoSigner(load_pem_private_key((keys / f"{role}.pem").read_bytes(), None))


def resign(path, keys, role, edit):
    """Change signed metadata and sign it again, with a key of the thief's choice."""
    metadata = Metadata.from_bytes(path.read_bytes())
    edit(metadata.signed)
    metadata.sign(signer(keys, role))
    path.write_bytes(metadata.to_bytes())


def list_again(metadata, keys, version=1):
    """Sign a snapshot and a timestamp that list what lies below them with its true digest."""
    lists = ("targets", "release", "rollout")
    below = {f"{role}.json": (metadata / f"1.{role}.json").read_bytes() for role in lists}
    listed = {name: MetaFile.from_data(1, data, ["sha256"]) for name, data in below.items()}
    resign(metadata / "1.snapshot.json", keys, "snapshot", lambda new: setattr(new, "meta", listed))
    stamp(metadata, keys, version)


def stamp(metadata, keys, version=1):
    """Sign a timestamp that lists the snapshot with its true digest."""
    data = (metadata / f"{version}.snapshot.json").read_bytes()
    meta = MetaFile.from_data(version, data, ["sha256"])
    path = metadata / "timestamp.json"
    resign(path, keys, "timestamp", lambda new: setattr(new, "snapshot_meta", meta))


def expire(signed):
    signed.expires = datetime.now(UTC) - timedelta(seconds=1)


def nothing(signed):
    pass


@pytest.mark.parametrize(
    "name", ["timestamp.json", "1.snapshot.json", "1.targets.json", "1.release.json"]
)
def test_no_bit_of_the_metadata_can_be_changed(released, keys, root, name):
    path = released / "metadata" / name
    honest = path.read_bytes()
    for position in range(0, len(honest), 17):
        # Not the bit of upper and lower case: hexadecimal digits mean the same in both.
        path.write_bytes(honest[:position] + bytes([honest[position] ^ 1]) + honest[position + 1 :])
        with pytest.raises(ReleaseError):
            fetch(str(released), "models/demo/a/file", root=root)
        with pytest.raises(ReleaseError):
            publish(b"new", target="models/demo/b/file", custom={}, store=str(released), keys=keys)
    path.write_bytes(honest)
    assert fetch(str(released), "models/demo/a/file", root=root) == FILE


@pytest.mark.parametrize("position", [0, 100, 255])
def test_no_bit_of_the_file_can_be_changed(released, root, position):
    (path,) = released.glob("targets/models/demo/a/*")
    data = bytearray(FILE)
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(ReleaseError, match="nothing that can be trusted"):
        fetch(str(released), "models/demo/a/file", root=root)


@pytest.mark.parametrize("forged", [FILE[:-1], FILE + b"\0", b""])
def test_a_file_of_another_length_is_refused(released, root, forged):
    (path,) = released.glob("targets/models/demo/a/*")
    path.write_bytes(forged)
    with pytest.raises(ReleaseError, match="nothing that can be trusted"):
        fetch(str(released), "models/demo/a/file", root=root)


def test_one_signed_file_does_not_pass_for_another(released, keys, root):
    publish(FILE[::-1], target="models/demo/b/file", custom={}, store=str(released), keys=keys)
    (one,), (two,) = (released.glob(f"targets/models/demo/{name}/*") for name in "ab")
    one.write_bytes(two.read_bytes())
    with pytest.raises(ReleaseError, match="nothing that can be trusted"):
        fetch(str(released), "models/demo/a/file", root=root)


def test_a_file_that_is_lost_is_missed(released, root):
    shutil.rmtree(released / "targets")
    with pytest.raises(ReleaseError, match="lists models/demo/a/file but has lost the file"):
        fetch(str(released), "models/demo/a/file", root=root)


@pytest.mark.parametrize("name", ["1.snapshot.json", "1.targets.json", "1.release.json"])
def test_metadata_that_is_lost_is_missed(released, refused, name):
    (released / "metadata" / name).unlink()
    refused(f"{name} is missing")


def test_a_file_planted_where_a_release_will_lie_is_noticed(released, keys, root, contents):
    publish(b"new", target="models/demo/b/file", custom={}, store=str(released) + "-2", keys=keys)
    (honest,) = Path(str(released) + "-2").glob("targets/models/demo/b/*")
    planted = released / "targets" / "models" / "demo" / "b" / honest.name
    planted.parent.mkdir()
    planted.write_bytes(b"old")
    with pytest.raises(ReleaseError, match="holds other bytes: other keys, or damage"):
        publish(b"new", target="models/demo/b/file", custom={}, store=str(released), keys=keys)
    assert latest(str(released), root=root).target == "models/demo/a/file"


def test_a_timestamp_signed_by_somebody_else_is_refused(released, others, refused):
    resign(released / "metadata" / "timestamp.json", others, "timestamp", nothing)
    refused("timestamp was signed by 0/1 keys")


def test_a_snapshot_signed_by_somebody_else_is_refused(released, others, keys, refused):
    metadata = released / "metadata"
    resign(metadata / "1.snapshot.json", others, "snapshot", nothing)
    stamp(metadata, keys)
    refused("snapshot was signed by 0/1 keys")


@pytest.mark.parametrize("role", ["targets", "release"])
def test_a_list_signed_by_somebody_else_is_refused(released, others, keys, refused, role):
    metadata = released / "metadata"
    resign(metadata / f"1.{role}.json", others, role, nothing)
    list_again(metadata, keys)
    refused(f"{role} was signed by 0/1 keys")


@pytest.mark.parametrize("thief", ["rollout", "targets", "snapshot", "timestamp"])
def test_no_other_online_key_signs_a_release(released, keys, refused, thief):
    resign(released / "metadata" / "1.release.json", keys, thief, nothing)
    list_again(released / "metadata", keys)
    refused("release was signed by 0/1 keys")


def test_the_key_of_the_rollout_cannot_release_a_file(released, keys, root):
    def smuggle(rollout):
        rollout.targets["models/demo/evil/file"] = TargetFile.from_data("x", b"evil", ["sha256"])

    (released / "targets" / "models" / "demo" / "evil").mkdir()
    digest = hashlib.sha256(b"evil").hexdigest()
    (released / "targets" / "models" / "demo" / "evil" / f"{digest}.file").write_bytes(b"evil")
    resign(released / "metadata" / "1.rollout.json", keys, "rollout", smuggle)
    list_again(released / "metadata", keys)
    with pytest.raises(ReleaseError, match="has no release models/demo/evil/file"):
        fetch(str(released), "models/demo/evil/file", root=root)
    assert latest(str(released), root=root).target == "models/demo/a/file"


def test_a_release_out_of_its_place_is_not_believed_nor_counted(released, keys, root):
    def smuggle(release):
        path = "models/demo/a/deeper/file"
        info = TargetFile.from_data(path, b"deep", ["sha256"])
        info.unrecognized_fields["custom"] = {"release_counter": 99}
        release.targets[path] = info

    resign(released / "metadata" / "1.release.json", keys, "release", smuggle)
    list_again(released / "metadata", keys)
    assert latest(str(released), root=root).target == "models/demo/a/file"
    made = publish(b"b", target="models/demo/b/file", custom={}, store=str(released), keys=keys)
    assert made.version == 2


def test_the_key_of_the_releases_alone_changes_no_release(released, keys, refused):
    path = released / "metadata" / "1.release.json"
    resign(path, keys, "release", lambda new: new.targets["models/demo/a/file"].custom.clear())
    refused("nothing that can be trusted")


def test_an_old_snapshot_does_not_pass_for_a_new_version(released, keys, refused):
    metadata = released / "metadata"
    shutil.copy(metadata / "1.snapshot.json", metadata / "9.snapshot.json")
    stamp(metadata, keys, version=9)
    refused("version")


def test_a_snapshot_that_lists_no_targets_is_refused(released, keys, refused):
    metadata = released / "metadata"
    resign(metadata / "1.snapshot.json", keys, "snapshot", lambda signed: signed.meta.clear())
    stamp(metadata, keys)
    refused("targets")


def test_targets_that_delegate_to_nobody_are_refused(released, keys, refused):
    def keep_all(targets):
        targets.delegations = None

    resign(released / "metadata" / "1.targets.json", keys, "targets", keep_all)
    list_again(released / "metadata", keys)
    with pytest.raises(ReleaseError, match="nobody may sign release"):
        publish(b"b", target="models/demo/b/file", custom={}, store=str(released), keys=keys)


def test_one_role_does_not_pass_for_another_even_with_its_key(tmp_path, keys):
    # A root that gives one key two roles, and a snapshot in the place of the timestamp.
    folder, store = shutil.copytree(keys, tmp_path / "keys"), tmp_path / "store"

    def share(root):
        root.roles["timestamp"].keyids = list(root.roles["snapshot"].keyids)

    resign(folder / "root.json", folder, "root", share)
    places = json.loads((folder / "signers.json").read_bytes())
    places["timestamp"] = places["snapshot"]
    (folder / "signers.json").write_text(json.dumps(places))
    publish(FILE, target="models/demo/a/file", custom={}, store=str(store), keys=folder)
    shutil.copy(store / "metadata" / "1.snapshot.json", store / "metadata" / "timestamp.json")
    with pytest.raises(ReleaseError, match="expected timestamp, got snapshot"):
        publish(b"new", target="models/demo/b/file", custom={}, store=str(store), keys=folder)
    with pytest.raises(ReleaseError):
        fetch(str(store), "models/demo/a/file", root=(folder / "root.json").read_bytes())


@pytest.mark.parametrize("data", [b"", b"{}", b"[" * 100_000, b"\xff", b'{"signed": 1}'])
def test_what_is_no_metadata_is_refused(released, refused, data):
    (released / "metadata" / "timestamp.json").write_bytes(data)
    refused("nothing that can be trusted")


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "release"])
def test_publishing_the_same_file_again_renews_what_ran_out(released, keys, root, role):
    metadata = released / "metadata"
    name = "timestamp.json" if role == "timestamp" else f"1.{role}.json"
    resign(metadata / name, keys, role, expire)
    if role in {"targets", "release"}:
        list_again(metadata, keys)
    if role == "snapshot":
        stamp(metadata, keys)
    with pytest.raises(ReleaseError, match=rf"out of date: .*{role}.* is expired"):
        fetch(str(released), "models/demo/a/file", root=root)
    again = publish(FILE, target="models/demo/a/file", custom={}, store=str(released), keys=keys)
    assert (again.version, again.created) == (1, False)
    assert fetch(str(released), "models/demo/a/file", root=root) == FILE


def test_a_root_that_ran_out_is_refused_by_all(tmp_path, keys, contents):
    folder, store = shutil.copytree(keys, tmp_path / "keys"), str(tmp_path / "store")
    publish(FILE, target="models/demo/a/file", custom={}, store=store, keys=folder)
    before = contents(store)
    resign(folder / "root.json", folder, "root", expire)
    with pytest.raises(ReleaseError, match=r"out of date: root\.json is expired"):
        publish(b"new", target="models/demo/b/file", custom={}, store=store, keys=folder)
    with pytest.raises(ReleaseError, match=r"out of date: .*root\.json is expired"):
        fetch(store, "models/demo/a/file", root=(folder / "root.json").read_bytes())
    assert contents(store) == before


def test_a_publisher_with_keys_of_its_own_root_cannot_take_over(released, others, contents):
    before = contents(released)
    with pytest.raises(ReleaseError, match="timestamp was signed by 0/1 keys"):
        publish(b"new", target="models/demo/b/file", custom={}, store=str(released), keys=others)
    assert contents(released) == before


def test_a_store_that_another_publisher_began_is_left_alone(released, others, contents):
    (released / "metadata" / "timestamp.json").unlink()
    before = contents(released)
    with pytest.raises(ReleaseError, match=r"1\.root\.json holds other bytes"):
        publish(b"new", target="models/demo/b/file", custom={}, store=str(released), keys=others)
    assert contents(released) == before


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "release"])
def test_a_key_that_may_not_sign_a_role_signs_nothing(released, keys, others, contents, role):
    mixed = shutil.copytree(keys, released.parent / "mixed")
    use_key_of(others, role, mixed)
    before = contents(released)
    with pytest.raises(ReleaseError, match=f"signers.json must name a key that may sign {role}"):
        publish(b"new", target="models/demo/b/file", custom={}, store=str(released), keys=mixed)
    assert contents(released) == before


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "release"])
def test_a_key_that_is_not_the_one_it_is_said_to_be_signs_nothing(released, keys, others, role):
    mixed = shutil.copytree(keys, released.parent / "mixed")
    shutil.copy(others / f"{role}.pem", mixed / f"{role}.pem")
    with pytest.raises(ReleaseError, match=f"file2:{role}.pem of .* is not the key "):
        publish(b"new", target="models/demo/b/file", custom={}, store=str(released), keys=mixed)


def test_a_reader_who_trusts_another_root_believes_nothing(released, others):
    with pytest.raises(ReleaseError, match="timestamp was signed by 0/1 keys"):
        fetch(str(released), "models/demo/a/file", root=(others / "root.json").read_bytes())


@pytest.mark.parametrize("root", [b"", b"{}", b"not metadata"])
def test_a_reader_needs_a_root(released, root):
    with pytest.raises(ReleaseError, match="nothing that can be trusted"):
        latest(str(released), root=root)


def test_metadata_of_another_role_is_no_root(released, keys, tmp_path):
    folder = shutil.copytree(keys, tmp_path / "keys")
    shutil.copy(released / "metadata" / "timestamp.json", folder / "root.json")
    with pytest.raises(ReleaseError, match="the trusted root is timestamp metadata"):
        publish(b"new", target="models/demo/b/file", custom={}, store=str(released), keys=folder)


def take_two(folder, role):
    """Let a role take two signatures, the second by a key of its own; returns that key's place."""
    second = CryptoSigner.generate_ecdsa()
    (folder / "second.pem").write_bytes(second.private_bytes)

    def demand(new):
        new.add_key(second.public_key, role)
        new.get_delegated_role(role).threshold = 2

    by = "targets" if role == "release" else "root"
    resign(folder / f"{by}.json", folder, by, demand)
    return {"uri": "file2:second.pem", "keyid": second.public_key.keyid}


@pytest.mark.parametrize("role", ["release", "snapshot"])
def test_a_role_that_takes_two_signatures_is_not_signed_with_one(tmp_path, keys, contents, role):
    folder, store = shutil.copytree(keys, tmp_path / "keys"), tmp_path / "store"
    take_two(folder, role)
    with pytest.raises(ReleaseError, match=f"{role} takes 2 signatures: .* has keys for 1"):
        publish(FILE, target="models/demo/a/file", custom={}, store=str(store), keys=folder)
    assert not contents(store)


@pytest.mark.parametrize("role", ["release", "snapshot"])
def test_a_role_that_takes_two_signatures_takes_them_of_two_schemes(tmp_path, keys, role):
    folder, store = shutil.copytree(keys, tmp_path / "keys"), tmp_path / "store"
    second = take_two(folder, role)
    places = json.loads((folder / "signers.json").read_bytes())
    places[role].append(second)
    (folder / "signers.json").write_text(json.dumps(places))
    publish(FILE, target="models/demo/a/file", custom={}, store=str(store), keys=folder)
    root = (folder / "root.json").read_bytes()
    assert fetch(str(store), "models/demo/a/file", root=root) == FILE
    signed = Metadata.from_file(str(store / "metadata" / f"1.{role}.json"))
    assert len(signed.signatures) == 2


def use_key_of(other, role, folder):
    """Let a role be signed with the key that another folder has for it."""
    shutil.copy(other / f"{role}.pem", folder / f"{role}.pem")
    places, theirs = (json.loads((f / "signers.json").read_bytes()) for f in (folder, other))
    places[role] = theirs[role]
    (folder / "signers.json").write_text(json.dumps(places))


def successor(released, keys, edit):
    """Publish a second root, signed by the first."""
    path = released / "metadata" / "2.root.json"
    shutil.copy(keys / "root.json", path)

    def raise_version(root):
        root.version = 2
        edit(root)

    resign(path, keys, "root", raise_version)
    return path


def test_a_key_is_added_by_a_root_that_the_old_root_signed(released, keys, others, root, tmp_path):
    def add(new):
        new.add_key(signer(others, "snapshot").public_key, "snapshot")

    successor(released, keys, add)
    mixed = shutil.copytree(keys, tmp_path / "mixed")
    use_key_of(others, "snapshot", mixed)
    publish(b"new", target="models/demo/b/file", custom={}, store=str(released), keys=mixed)
    assert fetch(str(released), "models/demo/b/file", root=root) == b"new"


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_a_key_that_a_later_root_dropped_signs_nothing(released, keys, others, refused, role):
    def drop(new):
        new.revoke_key(new.roles[role].keyids[0], role)
        new.add_key(signer(others, role).public_key, role)

    successor(released, keys, drop)
    refused(f"{role} was signed by 0/1 keys")


def test_a_root_that_the_old_root_did_not_sign_is_refused(released, keys, others, refused):
    resign(successor(released, keys, nothing), others, "root", nothing)
    refused("root was signed by 0/1 keys")


def test_a_root_that_does_not_sign_itself_is_refused(released, keys, others, refused):
    def hand_over(new):
        new.revoke_key(new.roles["root"].keyids[0], "root")
        new.add_key(signer(others, "root").public_key, "root")

    successor(released, keys, hand_over)
    refused("root was signed by 0/1 keys")


@pytest.mark.parametrize("version", [1, 3])
def test_a_root_out_of_turn_is_refused(released, keys, refused, version):
    successor(released, keys, lambda new: setattr(new, "version", version))
    refused("version")
