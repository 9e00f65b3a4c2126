"""The folder of keys: made whole, private, and checked before it is used."""

from __future__ import annotations

import json
import logging
import shutil
import stat

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner, Signer
from tuf.api.metadata import Metadata

from filterpress.errors import ReleaseError
from filterpress.release import create_keys, publish
from filterpress.release.keys import load_keys
from tests import children


@pytest.fixture
def copied(keys, tmp_path):
    return shutil.copytree(keys, tmp_path / "keys")


def test_only_their_owner_can_read_keys(keys):
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in keys.iterdir()} == {0o600}


ONLINE = ("release", "rollout", "snapshot", "timestamp")


def test_the_folder_holds_the_root_the_delegations_and_a_key_for_each_role(keys):
    names = {file.name for file in keys.iterdir()}
    pems = {f"{role}.pem" for role in ("root", "targets", *ONLINE)}
    assert names == {"root.json", "targets.json", "signers.json", *pems}


def test_each_role_has_a_key_of_its_own_and_the_root_signs_itself(keys, root):
    metadata = Metadata.from_bytes(root)
    targets = Metadata.from_bytes((keys / "targets.json").read_bytes())
    roles = [*metadata.signed.roles.values(), *targets.signed.delegations.roles.values()]
    keyids = [keyid for role in roles for keyid in role.keyids]
    assert len(set(keyids)) == len(keyids) == 6
    assert metadata.signed.consistent_snapshot
    metadata.signed.verify_delegate("targets", targets.signed_bytes, targets.signatures)
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


def opened(folder, role):
    """Open the keys of a role as a publisher does."""
    loaded = load_keys(folder, development=True)
    by = loaded.first_targets if role in {"release", "rollout"} else loaded.root
    return loaded.signers(role, Metadata.from_bytes(by).signed)


@pytest.mark.parametrize("role", ONLINE)
def test_publishing_needs_neither_the_key_of_the_root_nor_that_of_the_targets(copied, role):
    (copied / "root.pem").unlink()
    (copied / "targets.pem").unlink()
    (found,) = opened(copied, role)
    found.public_key.verify_signature(found.sign(b"data"), b"data")


@pytest.mark.parametrize(
    "generate",
    [CryptoSigner.generate_ed25519, CryptoSigner.generate_ecdsa, CryptoSigner.generate_rsa],
)
def test_a_key_may_be_of_any_scheme_and_anywhere(copied, tmp_path, generate):
    made = generate()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "key.pem").write_bytes(made.private_bytes)
    edit_places(copied, "snapshot", f"file2:{tmp_path}/elsewhere/key.pem", made.public_key.keyid)
    root = Metadata.from_bytes((copied / "root.json").read_bytes()).signed
    root.add_key(made.public_key, "snapshot")
    (found,) = load_keys(copied, development=False).signers("snapshot", root)
    assert found.public_key == made.public_key


def edit_places(folder, role, uri, keyid=None):
    places = json.loads((folder / "signers.json").read_bytes())
    places[role] = [{"uri": uri, "keyid": keyid or places[role][0]["keyid"]}]
    (folder / "signers.json").write_text(json.dumps(places))


def test_a_key_of_an_unknown_kind_is_refused_with_the_kinds_there_are(copied):
    edit_places(copied, "release", "ftp:key")
    with pytest.raises(ReleaseError, match=r"no kind of key is called 'ftp:key': .*gcpkms:, "):
        opened(copied, "release")


def test_a_key_that_cannot_be_reached_is_a_line_and_nothing_is_published(
    keys, tmp_path, monkeypatch
):
    def unreachable(*_):
        raise ConnectionError("no route to the key service")

    monkeypatch.setattr(CryptoSigner, "sign", unreachable)
    given = {"custom": {}, "store": str(tmp_path / "store"), "keys": keys}
    with pytest.raises(
        ReleaseError, match=r"^the key of \w+ did not sign: no route to the key service$"
    ):
        publish(b"file", target="models/demo/1/file", **given)
    assert not (tmp_path / "store" / "metadata" / "timestamp.json").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"release": [{"uri": "file2:a"}]}', '{"release": 3}'])
def test_places_of_keys_that_are_no_list_of_uris_are_refused(copied, text):
    (copied / "signers.json").write_text(text)
    with pytest.raises(ReleaseError, match=r"signers\.json must list uri and keyid"):
        load_keys(copied, development=True)


def test_development_keys_are_made_only_where_they_will_do(tmp_path):
    with pytest.raises(ReleaseError, match="holds no keys: make them once with release init"):
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
    with children.CONTEXT.Pool(8) as pool:
        roots = pool.map(_root_of, [tmp_path / "keys"] * 8)
    assert roots == [(tmp_path / "keys" / "root.json").read_bytes()] * 8
    assert [path.name for path in tmp_path.iterdir()] == ["keys"]


def _root_of(folder):
    return load_keys(folder, development=True).root


@pytest.mark.parametrize("name", ["root.json", *(f"{role}.pem" for role in ONLINE)])
def test_a_damaged_file_is_named(copied, name):
    (copied / name).write_bytes((copied / name).read_bytes()[:-30])
    with pytest.raises(ReleaseError, match=f"{name} must be ") as caught:
        opened(copied, name.removesuffix(".pem") if name in PEMS else "snapshot")
    assert "\n" not in str(caught.value)


PEMS = tuple(f"{role}.pem" for role in ONLINE)


@pytest.mark.parametrize("role", ONLINE)
def test_a_missing_key_is_named(copied, role):
    (copied / f"{role}.pem").unlink()
    with pytest.raises(ReleaseError, match=rf"cannot read the key file2:{role}.pem of .*: No such"):
        opened(copied, role)


def test_an_encrypted_key_is_refused(copied):
    path = copied / "release.pem"
    key = load_pem_private_key(path.read_bytes(), None)
    lock = BestAvailableEncryption(b"password")
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))
    with pytest.raises(ReleaseError, match=r"release\.pem must be an unencrypted private key"):
        opened(copied, "release")
