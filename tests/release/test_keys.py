"""The folder of keys: made whole, private, and checked before it is used."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import stat

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import Signer
from tuf.api.metadata import Metadata

from filterpress.errors import ReleaseError
from filterpress.release import create_keys
from filterpress.release.keys import load_keys


@pytest.fixture
def copied(keys, tmp_path):
    return shutil.copytree(keys, tmp_path / "keys")


def test_only_their_owner_can_read_keys(keys):
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in keys.iterdir()} == {0o600}


def test_the_folder_holds_the_root_and_a_key_for_each_role(keys):
    names = {file.name for file in keys.iterdir()}
    assert names == {"root.json", "root.pem", "targets.pem", "snapshot.pem", "timestamp.pem"}


def test_each_role_has_a_key_of_its_own_and_the_root_signs_itself(root):
    metadata = Metadata.from_bytes(root)
    keyids = [keyid for role in metadata.signed.roles.values() for keyid in role.keyids]
    assert len(set(keyids)) == len(keyids) == 4
    assert metadata.signed.consistent_snapshot
    metadata.signed.verify_delegate("root", metadata.signed_bytes, metadata.signatures)


def test_any_securesystemslib_signer_reads_a_key_by_its_uri(keys, root):
    key = Metadata.from_bytes(root).signed.keys
    (keyid,) = Metadata.from_bytes(root).signed.roles["targets"].keyids
    signer = Signer.from_priv_key_uri(f"file2:{keys / 'targets.pem'}", key[keyid])
    key[keyid].verify_signature(signer.sign(b"data"), b"data")


def test_keys_are_never_overwritten(copied):
    before = (copied / "root.json").read_bytes()
    with pytest.raises(ReleaseError, match="exists already: keys are never overwritten"):
        create_keys(copied)
    assert (copied / "root.json").read_bytes() == before
    assert [path.name for path in copied.parent.iterdir()] == ["keys"]


def test_keys_are_made_in_a_folder_that_is_empty(tmp_path):
    create_keys(tmp_path)
    assert load_keys(tmp_path, development=False).root == (tmp_path / "root.json").read_bytes()


def test_keys_that_cannot_be_written_are_reported_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ReleaseError, match=r"cannot write keys to .*: "):
        create_keys(tmp_path / "file" / "keys")


def test_publishing_needs_no_root_key(copied):
    (copied / "root.pem").unlink()
    signers = load_keys(copied, development=False).signers
    assert set(signers) == {"targets", "snapshot", "timestamp"}


def test_development_keys_are_made_only_where_they_will_do(tmp_path):
    with pytest.raises(ReleaseError, match="holds no keys: make them once with create_keys"):
        load_keys(tmp_path / "keys", development=False)
    assert not (tmp_path / "keys").exists()
    load_keys(tmp_path / "keys", development=True)
    with pytest.raises(ReleaseError, match="holds development keys: make real ones"):
        load_keys(tmp_path / "keys", development=False)


def test_development_keys_are_announced_and_others_are_not(tmp_path, keys, caplog):
    load_keys(keys, development=True)
    assert not caplog.records
    load_keys(tmp_path / "keys", development=True)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "development keys" in record.message


def test_eight_publishers_that_start_at_once_agree_on_one_set_of_keys(tmp_path):
    with multiprocessing.get_context("fork").Pool(8) as pool:
        roots = pool.map(_root_of, [tmp_path / "keys"] * 8)
    assert roots == [(tmp_path / "keys" / "root.json").read_bytes()] * 8
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]


def _root_of(folder):
    return load_keys(folder, development=True).root


@pytest.mark.parametrize("name", ["root.json", "targets.pem", "snapshot.pem", "timestamp.pem"])
def test_a_damaged_file_is_named(copied, name):
    (copied / name).write_bytes((copied / name).read_bytes()[:-30])
    with pytest.raises(ReleaseError, match=f"{name} must be ") as caught:
        load_keys(copied, development=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["targets.pem", "snapshot.pem", "timestamp.pem"])
def test_a_missing_key_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(ReleaseError, match=rf"cannot read .*{name}: No such file"):
        load_keys(copied, development=True)


def test_an_encrypted_key_is_refused(copied):
    path = copied / "targets.pem"
    key = load_pem_private_key(path.read_bytes(), None)
    lock = BestAvailableEncryption(b"password")
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))
    with pytest.raises(ReleaseError, match=r"targets\.pem must be an unencrypted private key"):
        load_keys(copied, development=True)
