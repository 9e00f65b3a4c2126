"""Publishing and reading back, with the reference client as the judge."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tuf.api.metadata import Metadata
from tuf.ngclient import Updater

from filterpress.errors import ReleaseError
from filterpress.release import fetch, latest, publish
from filterpress.release.names import MAX_METADATA

TARGET = "models/demo/0123456789abcdef/model.fpk"
FILE = bytes(range(256)) * 40


def test_a_published_file_is_fetched_bit_by_bit(store, keys, root):
    publish(FILE, target=TARGET, custom={}, store=store, keys=keys)
    assert fetch(store, TARGET, root=root) == FILE


def test_a_release_tells_what_was_published(store, keys):
    custom = {"accuracy_ppm": 973_333, "parts": [{"name": "head", "prior": None}], "final": True}
    release = publish(FILE, target=TARGET, custom=custom, store=store, keys=keys)
    assert dataclasses.asdict(release) == {
        "store": store,
        "target": TARGET,
        "sha256": hashlib.sha256(FILE).hexdigest(),
        "n_bytes": len(FILE),
        "version": 1,
        "custom": {**custom, "hardware_ids": ["any"], "release_counter": 1},
        "deltas": {},
        "created": True,
    }


def test_the_latest_release_is_the_one_published_last(store, keys, root):
    for number in (1, 2, 3):
        # Names in falling order: the newest is not the last by name.
        target, file = f"models/demo/{9 - number}/file", f"file {number}".encode()
        made = publish(file, target=target, custom={}, store=store, keys=keys)
        assert latest(store, root=root) == dataclasses.replace(made, created=False)
        assert made.version == number
    assert fetch(store, "models/demo/8/file", root=root) == b"file 1"


def test_publishing_the_same_file_again_changes_nothing(directory, keys, contents):
    first = publish(FILE, target=TARGET, custom={"a": 1}, store=directory, keys=keys)
    before = contents(directory)
    again = publish(FILE, target=TARGET, custom={"a": 2}, store=directory, keys=keys)
    assert again == dataclasses.replace(first, created=False)
    assert contents(directory) == before


def test_a_target_stands_for_one_file_for_ever(directory, keys, root, contents):
    publish(FILE, target=TARGET, custom={}, store=directory, keys=keys)
    before = contents(directory)
    with pytest.raises(ReleaseError, match=f"{TARGET} is released already with sha256 "):
        publish(b"another", target=TARGET, custom={}, store=directory, keys=keys)
    assert contents(directory) == before


def test_one_file_may_have_two_targets(store, keys, root):
    for target in ("models/a/1/model.fpk", "models/b/1/model.fpk"):
        publish(FILE, target=target, custom={}, store=store, keys=keys)
        assert fetch(store, target, root=root) == FILE


def test_one_set_of_keys_serves_two_stores(tmp_path, keys, root):
    for name in ("one", "two"):
        publish(
            name.encode(),
            target="models/m/1/file",
            custom={},
            store=str(tmp_path / name),
            keys=keys,
        )
    assert fetch(str(tmp_path / "one"), "models/m/1/file", root=root) == b"one"
    assert fetch(str(tmp_path / "two"), "models/m/1/file", root=root) == b"two"


def test_the_first_publication_makes_development_keys(store, tmp_path):
    publish(FILE, target=TARGET, custom={}, store=store, keys=tmp_path / "keys")
    root = (tmp_path / "keys" / "root.json").read_bytes()
    assert fetch(store, TARGET, root=root) == FILE


@pytest.mark.parametrize("emulator", [None, ""])
def test_a_real_bucket_gets_no_development_keys(tmp_path, monkeypatch, emulator):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    if emulator is not None:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator)
    with pytest.raises(ReleaseError, match="holds no keys"):
        publish(
            FILE, target="models/m/1/file", custom={}, store="gs://bucket/x", keys=tmp_path / "keys"
        )
    publish(
        FILE,
        target="models/m/1/file",
        custom={},
        store=str(tmp_path / "store"),
        keys=tmp_path / "keys",
    )
    with pytest.raises(ReleaseError, match="holds development keys"):
        publish(
            FILE, target="models/m/1/file", custom={}, store="gs://bucket/x", keys=tmp_path / "keys"
        )


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def served(store, emulator):
    """Address at which any HTTP client reads the store."""
    if store.startswith("gs://"):
        yield store.replace("gs:/", emulator)
        return
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=store)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_reference_client_verifies_what_was_published(store, keys, root, served, tmp_path):
    publish(b"before", target="models/demo/before/file", custom={}, store=store, keys=keys)
    publish(FILE, target=TARGET, custom={"size": len(FILE)}, store=store, keys=keys)
    (tmp_path / "client").mkdir()
    client = Updater(
        str(tmp_path / "client"),
        f"{served}/metadata/",
        str(tmp_path / "client"),
        f"{served}/targets/",
        bootstrap=root,
    )
    info = client.get_targetinfo(TARGET)
    assert info.custom == {"size": len(FILE), "hardware_ids": ["any"], "release_counter": 2}
    assert Path(client.download_target(info)).read_bytes() == FILE


def test_every_listed_file_has_a_length_and_a_digest(directory, keys):
    publish(FILE, target=TARGET, custom={}, store=directory, keys=keys)
    metadata = Path(directory) / "metadata"
    snapshot = json.loads((metadata / "1.snapshot.json").read_bytes())["signed"]["meta"]
    timestamp = json.loads((metadata / "timestamp.json").read_bytes())["signed"]["meta"]
    assert set(snapshot) == {"targets.json", "release.json", "rollout.json"}
    listed = [(snapshot, name) for name in ("targets", "release", "rollout")]
    for meta, name in (*listed, (timestamp, "snapshot")):
        data = (metadata / f"1.{name}.json").read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        assert meta[f"{name}.json"]["length"] == len(data)
        assert meta[f"{name}.json"]["hashes"] == {"sha256": digest}


def test_the_root_is_published_as_it_is_trusted(directory, keys, root):
    publish(FILE, target=TARGET, custom={}, store=directory, keys=keys)
    assert (Path(directory) / "metadata" / "1.root.json").read_bytes() == root
    assert Metadata.from_bytes(root).signed.version == 1


@pytest.mark.parametrize("store_name", ["store", "store/private", "store/a/../private"])
def test_keys_inside_the_store_are_refused(tmp_path, store_name):
    folder = tmp_path / store_name
    with pytest.raises(ValueError, match="keys must lie outside the store"):
        publish(
            FILE, target="models/m/1/file", custom={}, store=str(tmp_path / "store"), keys=folder
        )
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "target",
    [
        *(
            "",
            "/etc/passwd",
            "models/a/b",
            "models/a/b/c/d",
            "channels/any/x.json",
            "models/../a/b",
        ),
        *("models/a//b", "models/a/b/", "models/a/b/.c", "models/a/b/c d", "models/a/b/ä"),
        *("models/a/b/c?d", "models/a/b/..", "models/a/b\n/c", "models/a/b/c\n"),
    ],
)
def test_a_target_that_is_no_plain_path_is_refused(directory, keys, root, target):
    with pytest.raises(ValueError, match="target must be models/NAME/VERSION/FILE"):
        publish(FILE, target=target, custom={}, store=directory, keys=keys)
    with pytest.raises(ValueError, match="target must be models/NAME/VERSION/FILE"):
        fetch(directory, target, root=root)
    assert not Path(directory).exists()


@pytest.mark.parametrize(
    "custom", [{"accuracy": 0.97}, {"a": [{"b": 1.5}]}, {"a": {1: 2}}, {"a": b"x"}, {"a": {1, 2}}]
)
def test_what_cannot_be_signed_is_refused_by_name(directory, keys, custom):
    with pytest.raises(ValueError, match=r"custom\.a.* must be JSON without fractions, got "):
        publish(FILE, target=TARGET, custom=custom, store=directory, keys=keys)


def test_the_counter_belongs_to_the_publisher(directory, keys):
    custom = {"release_counter": 7}
    with pytest.raises(ValueError, match="custom must leave release_counter to publish, got 7"):
        publish(FILE, target=TARGET, custom=custom, store=directory, keys=keys)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=8,
)


@settings(max_examples=10, deadline=None)
@given(custom=st.dictionaries(st.text(st.characters(codec="utf-8")), _JSON))
def test_any_json_without_fractions_survives_signing(custom, tmp_path_factory, keys, root):
    store = str(tmp_path_factory.mktemp("any") / "store")
    for ours in ("release_counter", "hardware_ids"):
        custom.pop(ours, None)
    publish(b"", target="models/m/1/file", custom=custom, store=store, keys=keys)
    ours = {"hardware_ids": ["any"], "release_counter": 1}
    assert latest(store, root=root).custom == {**custom, **ours}


def test_a_list_that_no_vehicle_would_read_is_not_written(store, keys, root):
    where = {"store": store, "keys": keys}
    made = publish(FILE, target=TARGET, custom={}, **where)
    long = {"note": "x" * MAX_METADATA}
    with pytest.raises(ReleaseError, match=r"the list of release would have \d+ bytes, and a vehi"):
        publish(b"two", target="models/demo/2/file", custom=long, **where)
    assert latest(store, root=root) == dataclasses.replace(made, created=False)
    assert publish(b"two", target="models/demo/2/file", custom={}, **where).created


def test_what_was_never_published_cannot_be_fetched(store, keys, root):
    publish(FILE, target=TARGET, custom={}, store=store, keys=keys)
    with pytest.raises(ReleaseError, match="has no release models/demo/other/file"):
        fetch(store, "models/demo/other/file", root=root)


def test_an_empty_store_says_what_is_missing(store, root):
    for read in (
        lambda: latest(store, root=root),
        lambda: fetch(store, "models/m/1/file", root=root),
    ):
        with pytest.raises(ReleaseError, match=r"metadata/timestamp\.json is missing"):
            read()


def test_importing_releases_needs_neither_torch_nor_kubeflow_nor_google():
    program = (
        "import sys; sys.modules['torch'] = None; import filterpress.release;"
        "print([name for name in ('kfp', 'google.cloud.storage') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"
