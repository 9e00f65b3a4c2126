"""Whoever can write to the store, or holds some of the keys, cannot make a reader believe them.

Nor a publisher: what it signs anew it has verified first.
"""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile

from filterpress.errors import ReleaseError
from filterpress.release import create_keys, fetch, latest, publish

FILE = bytes(range(256))


@pytest.fixture(scope="session")
def honest(keys, tmp_path_factory):
    store = tmp_path_factory.mktemp("honest") / "store"
    publish(FILE, target="models/a", custom={}, store=str(store), keys=keys)
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
            fetch(str(released), "models/a", root=root)
        with pytest.raises(ReleaseError, match=reason) as by_publisher:
            publish(b"new", target="models/b", custom={}, store=str(released), keys=keys)
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


def relist(metadata, keys, role, version=1):
    """Sign a timestamp or a snapshot that lists what lies below it with its true digest."""
    listed = {"timestamp": "snapshot", "snapshot": "targets"}[role]
    data = (metadata / f"{version}.{listed}.json").read_bytes()
    meta = {f"{listed}.json": MetaFile.from_data(version, data, ["sha256"])}

    def edit(signed):
        if role == "timestamp":
            signed.snapshot_meta = meta["snapshot.json"]
        else:
            signed.meta = meta

    resign(
        metadata / ("timestamp.json" if role == "timestamp" else "1.snapshot.json"),
        keys,
        role,
        edit,
    )


def expire(signed):
    signed.expires = datetime.now(UTC) - timedelta(seconds=1)


def nothing(signed):
    pass


@pytest.mark.parametrize("name", ["timestamp.json", "1.snapshot.json", "1.targets.json"])
def test_no_bit_of_the_metadata_can_be_changed(released, keys, root, name):
    path = released / "metadata" / name
    honest = path.read_bytes()
    for position in range(0, len(honest), 11):
        # Not the bit of upper and lower case: hexadecimal digits mean the same in both.
        path.write_bytes(honest[:position] + bytes([honest[position] ^ 1]) + honest[position + 1 :])
        with pytest.raises(ReleaseError):
            fetch(str(released), "models/a", root=root)
        with pytest.raises(ReleaseError):
            publish(b"new", target="models/b", custom={}, store=str(released), keys=keys)
    path.write_bytes(honest)
    assert fetch(str(released), "models/a", root=root) == FILE


@pytest.mark.parametrize("position", [0, 100, 255])
def test_no_bit_of_the_file_can_be_changed(released, root, position):
    (path,) = (released / "targets" / "models").iterdir()
    data = bytearray(FILE)
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(ReleaseError, match="nothing that can be trusted"):
        fetch(str(released), "models/a", root=root)


@pytest.mark.parametrize("forged", [FILE[:-1], FILE + b"\0", b""])
def test_a_file_of_another_length_is_refused(released, root, forged):
    (path,) = (released / "targets" / "models").iterdir()
    path.write_bytes(forged)
    with pytest.raises(ReleaseError, match="nothing that can be trusted"):
        fetch(str(released), "models/a", root=root)


def test_one_signed_file_does_not_pass_for_another(released, keys, root):
    publish(FILE[::-1], target="models/b", custom={}, store=str(released), keys=keys)
    one, two = sorted((released / "targets" / "models").iterdir())
    one.write_bytes(two.read_bytes())
    with pytest.raises(ReleaseError):
        fetch(str(released), f"models/{one.name[-1]}", root=root)


def test_a_file_that_is_lost_is_missed(released, root):
    shutil.rmtree(released / "targets")
    with pytest.raises(ReleaseError, match="lists models/a but has lost the file"):
        fetch(str(released), "models/a", root=root)


@pytest.mark.parametrize("name", ["1.snapshot.json", "1.targets.json"])
def test_metadata_that_is_lost_is_missed(released, refused, name):
    (released / "metadata" / name).unlink()
    refused(f"{name} is missing")


def test_a_file_planted_where_a_release_will_lie_is_noticed(released, keys, root, contents):
    publish(b"new", target="models/b", custom={}, store=str(released) + "-2", keys=keys)
    (honest,) = Path(str(released) + "-2").glob("targets/models/*.b")
    planted = released / "targets" / "models" / honest.name
    planted.write_bytes(b"old")
    with pytest.raises(ReleaseError, match="holds other bytes: other keys, or damage"):
        publish(b"new", target="models/b", custom={}, store=str(released), keys=keys)
    assert latest(str(released), root=root).target == "models/a"


def test_a_timestamp_signed_by_somebody_else_is_refused(released, others, refused):
    resign(released / "metadata" / "timestamp.json", others, "timestamp", nothing)
    refused("timestamp was signed by 0/1 keys")


def test_a_snapshot_signed_by_somebody_else_is_refused(released, others, keys, refused):
    metadata = released / "metadata"
    resign(metadata / "1.snapshot.json", others, "snapshot", nothing)
    relist(metadata, keys, "timestamp")
    refused("snapshot was signed by 0/1 keys")


def test_targets_signed_by_somebody_else_are_refused(released, others, keys, refused):
    metadata = released / "metadata"
    resign(metadata / "1.targets.json", others, "targets", nothing)
    relist(metadata, keys, "snapshot")
    relist(metadata, keys, "timestamp")
    refused("targets was signed by 0/1 keys")


def test_the_key_of_the_targets_alone_changes_no_release(released, keys, refused):
    path = released / "metadata" / "1.targets.json"
    resign(path, keys, "targets", lambda signed: signed.targets["models/a"].custom.clear())
    refused("nothing that can be trusted")


def test_an_old_snapshot_does_not_pass_for_a_new_version(released, keys, refused):
    metadata = released / "metadata"
    shutil.copy(metadata / "1.snapshot.json", metadata / "9.snapshot.json")
    relist(metadata, keys, "timestamp", version=9)
    refused("version")


def test_a_snapshot_that_lists_no_targets_is_refused(released, keys, refused):
    metadata = released / "metadata"
    resign(metadata / "1.snapshot.json", keys, "snapshot", lambda signed: signed.meta.clear())
    relist(metadata, keys, "timestamp")
    refused("targets")


def test_one_role_does_not_pass_for_another_even_with_its_key(tmp_path, keys):
    # A root that gives one key two roles, and a snapshot in the place of the timestamp.
    folder, store = shutil.copytree(keys, tmp_path / "keys"), tmp_path / "store"

    def share(root):
        root.roles["timestamp"].keyids = list(root.roles["snapshot"].keyids)

    resign(folder / "root.json", folder, "root", share)
    shutil.copy(folder / "snapshot.pem", folder / "timestamp.pem")
    publish(FILE, target="models/a", custom={}, store=str(store), keys=folder)
    shutil.copy(store / "metadata" / "1.snapshot.json", store / "metadata" / "timestamp.json")
    with pytest.raises(ReleaseError, match="expected timestamp, got snapshot"):
        publish(b"new", target="models/b", custom={}, store=str(store), keys=folder)
    with pytest.raises(ReleaseError):
        fetch(str(store), "models/a", root=(folder / "root.json").read_bytes())


@pytest.mark.parametrize("data", [b"", b"{}", b"[" * 100_000, b"\xff", b'{"signed": 1}'])
def test_what_is_no_metadata_is_refused(released, refused, data):
    (released / "metadata" / "timestamp.json").write_bytes(data)
    refused("nothing that can be trusted")


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_publishing_the_same_file_again_renews_what_ran_out(released, keys, root, role):
    metadata = released / "metadata"
    name = "timestamp.json" if role == "timestamp" else f"1.{role}.json"
    resign(metadata / name, keys, role, expire)
    if role == "targets":
        relist(metadata, keys, "snapshot")
    if role != "timestamp":
        relist(metadata, keys, "timestamp")
    with pytest.raises(ReleaseError, match=rf"out of date: .*{role}.* is expired"):
        fetch(str(released), "models/a", root=root)
    again = publish(FILE, target="models/a", custom={}, store=str(released), keys=keys)
    assert (again.version, again.created) == (1, False)
    assert fetch(str(released), "models/a", root=root) == FILE


def test_a_root_that_ran_out_is_refused_by_all(tmp_path, keys, contents):
    folder, store = shutil.copytree(keys, tmp_path / "keys"), str(tmp_path / "store")
    publish(FILE, target="models/a", custom={}, store=store, keys=folder)
    before = contents(store)
    resign(folder / "root.json", folder, "root", expire)
    with pytest.raises(ReleaseError, match=r"out of date: root\.json is expired"):
        publish(b"new", target="models/b", custom={}, store=store, keys=folder)
    with pytest.raises(ReleaseError, match=r"out of date: .*root\.json is expired"):
        fetch(store, "models/a", root=(folder / "root.json").read_bytes())
    assert contents(store) == before


def test_a_publisher_with_keys_of_its_own_root_cannot_take_over(released, others, contents):
    before = contents(released)
    with pytest.raises(ReleaseError, match="timestamp was signed by 0/1 keys"):
        publish(b"new", target="models/b", custom={}, store=str(released), keys=others)
    assert contents(released) == before


def test_a_store_that_another_publisher_began_is_left_alone(released, others, contents):
    (released / "metadata" / "timestamp.json").unlink()
    before = contents(released)
    with pytest.raises(ReleaseError, match=r"1\.root\.json holds other bytes"):
        publish(b"new", target="models/b", custom={}, store=str(released), keys=others)
    assert contents(released) == before


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_a_key_that_the_root_does_not_name_signs_nothing(released, keys, others, contents, role):
    mixed = shutil.copytree(keys, released.parent / "mixed")
    shutil.copy(others / f"{role}.pem", mixed / f"{role}.pem")
    before = contents(released)
    with pytest.raises(ReleaseError, match=f"root does not allow the key {role}.pem to sign"):
        publish(b"new", target="models/b", custom={}, store=str(released), keys=mixed)
    assert contents(released) == before


def test_a_reader_who_trusts_another_root_believes_nothing(released, others):
    with pytest.raises(ReleaseError, match="timestamp was signed by 0/1 keys"):
        fetch(str(released), "models/a", root=(others / "root.json").read_bytes())


@pytest.mark.parametrize("root", [b"", b"{}", b"not metadata"])
def test_a_reader_needs_a_root(released, root):
    with pytest.raises(ReleaseError, match="nothing that can be trusted"):
        latest(str(released), root=root)


def test_metadata_of_another_role_is_no_root(released, keys, tmp_path):
    folder = shutil.copytree(keys, tmp_path / "keys")
    shutil.copy(released / "metadata" / "timestamp.json", folder / "root.json")
    with pytest.raises(ReleaseError, match="the trusted root is timestamp metadata"):
        publish(b"new", target="models/b", custom={}, store=str(released), keys=folder)


def test_a_role_that_takes_two_signatures_is_not_signed_with_one(tmp_path, keys, contents):
    folder, store = shutil.copytree(keys, tmp_path / "keys"), tmp_path / "store"

    def demand_two(root):
        root.add_key(signer(folder, "snapshot").public_key, "targets")
        root.roles["targets"].threshold = 2

    resign(folder / "root.json", folder, "root", demand_two)
    with pytest.raises(ReleaseError, match="targets was signed by 1/2 keys"):
        publish(FILE, target="models/a", custom={}, store=str(store), keys=folder)
    assert "metadata/1.targets.json" not in contents(store)


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
        new.add_key(signer(others, "targets").public_key, "targets")

    successor(released, keys, add)
    mixed = shutil.copytree(keys, tmp_path / "mixed")
    shutil.copy(others / "targets.pem", mixed / "targets.pem")
    publish(b"new", target="models/b", custom={}, store=str(released), keys=mixed)
    assert fetch(str(released), "models/b", root=root) == b"new"


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_a_key_that_a_later_root_dropped_signs_nothing(released, keys, others, refused, role):
    def drop(new):
        new.revoke_key(new.roles[role].keyids[0], role)
        new.add_key(signer(others, role).public_key, role)

    successor(released, keys, drop)
    refused(f"{role} was signed by 0/1 keys|does not allow the key {role}.pem to sign")


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
