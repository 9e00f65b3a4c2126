"""What both kinds of store promise, and what each does about the world's faults."""

from __future__ import annotations

import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from filterpress.errors import ReleaseError
from filterpress.release.store import ConflictError, open_store
from tests.disks import largest_file


def test_what_was_created_is_read_back(store):
    opened = open_store(store)
    opened.create("a/b/1.file", b"bytes")
    data, generation = opened.read("a/b/1.file")
    assert data == b"bytes"
    assert generation != 0


def test_a_name_that_was_never_written_reads_as_none(store):
    assert open_store(store).read("a/b/1.file") is None


def test_creating_a_name_twice_with_the_same_bytes_is_fine(store):
    opened = open_store(store)
    opened.create("name", b"bytes")
    before = opened.read("name")
    opened.create("name", b"bytes")
    assert opened.read("name") == before


def test_creating_a_name_twice_with_other_bytes_is_a_conflict(store):
    opened = open_store(store)
    opened.create("name", b"bytes")
    with pytest.raises(ConflictError, match="name was written by someone else"):
        opened.create("name", b"other")
    assert opened.read("name")[0] == b"bytes"


def test_a_name_is_replaced_by_who_saw_its_last_state(store):
    opened = open_store(store)
    opened.replace("name", b"one", 0)
    _, generation = opened.read("name")
    opened.replace("name", b"two", generation)
    assert opened.read("name")[0] == b"two"
    assert opened.read("name")[1] != generation


def test_a_name_is_not_replaced_by_who_saw_an_older_state(store):
    opened = open_store(store)
    opened.replace("name", b"one", 0)
    _, generation = opened.read("name")
    opened.replace("name", b"two", generation)
    for stale in (generation, 0):
        with pytest.raises(ConflictError):
            opened.replace("name", b"three", stale)
    assert opened.read("name")[0] == b"two"


def test_a_name_that_vanished_is_not_replaced(store):
    with pytest.raises(ConflictError):
        open_store(store).replace("name", b"two", 12345)


def test_of_eight_threads_that_create_one_name_one_wins(store):
    outcomes = _race(store, lambda opened, n: opened.create("name", str(n).encode()))
    assert sorted(map(str, outcomes)) == ["lost"] * 7 + ["won"]


def test_of_eight_threads_that_replace_one_state_one_wins(store):
    open_store(store).create("name", b"first")
    _, generation = open_store(store).read("name")
    outcomes = _race(store, lambda o, n: o.replace("name", str(n).encode(), generation))
    assert sorted(map(str, outcomes)) == ["lost"] * 7 + ["won"]


def _race(store, write):
    start, outcomes = threading.Barrier(8), []

    def run(number):
        opened = open_store(store)
        opened.read("name")
        start.wait()
        try:
            write(opened, number)
            outcomes.append("won")
        except ConflictError:
            outcomes.append("lost")

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


@pytest.mark.parametrize("uri", ["", "gs://", "gs:///prefix", "s3://bucket/x", "file:///tmp/x"])
def test_an_address_that_is_no_store_is_refused(uri):
    with pytest.raises(ValueError, match="store must be a directory or gs://bucket/prefix"):
        open_store(uri)


def test_opening_a_directory_writes_nothing(directory):
    open_store(directory).read("name")
    assert not Path(directory).exists()


def test_a_directory_below_a_file_can_be_neither_read_nor_written(tmp_path):
    (tmp_path / "file").touch()
    opened = open_store(str(tmp_path / "file" / "store"))
    with pytest.raises(ReleaseError, match=r"cannot read .*name: Not a directory"):
        opened.read("name")
    with pytest.raises(ReleaseError, match=r"cannot write .*name: "):
        opened.create("name", b"bytes")


def test_a_write_that_the_disk_refuses_leaves_nothing(directory, contents):
    open_store(directory).create("old", b"old")
    with largest_file(4096), pytest.raises(ReleaseError, match="new: File too large"):
        open_store(directory).create("new", bytes(10_000))
    assert contents(directory) == {"old": b"old"}


def test_a_bucket_is_told_what_may_be_cached(bucket, emulator):
    opened = open_store(bucket)
    opened.create("1.file", b"for ever")
    opened.replace("current", b"for now", 0)
    url = bucket.replace("gs:/", emulator)
    for name, rule in {
        "1.file": "public, max-age=31536000, immutable",
        "current": "no-store",
    }.items():
        with urllib.request.urlopen(f"{url}/{name}") as response:
            assert response.headers["Cache-Control"] == rule


def test_a_bucket_without_prefix_is_a_store(bucket):
    opened = open_store("/".join(bucket.split("/")[:3]))
    opened.create("name", b"bytes")
    assert opened.read("name")[0] == b"bytes"
    assert open_store(bucket).read("name") is None


def test_a_bucket_that_does_not_exist_cannot_be_written(bucket):
    with pytest.raises(ReleaseError, match=r"cannot write gs://no-such-bucket/x/name: "):
        open_store("gs://no-such-bucket/x").create("name", b"bytes")


def test_a_bucket_that_forbids_access_is_reported_in_one_line(monkeypatch):
    class Forbidding(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(403)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Forbidding) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(ReleaseError, match=r"cannot read gs://bucket/x/name: ") as caught:
            open_store("gs://bucket/x").read("name")
        server.shutdown()
    assert "\n" not in str(caught.value)


def test_a_real_bucket_needs_credentials(monkeypatch, tmp_path):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nowhere.json"))
    with pytest.raises(ReleaseError, match=r"cannot read gs://bucket/x/name: .*nowhere\.json"):
        open_store("gs://bucket/x").read("name")
