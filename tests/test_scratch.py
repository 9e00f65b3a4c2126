"""What both kinds of scratch promise, and what each does about the world's faults."""

from __future__ import annotations

import base64
import io
import stat
import tarfile
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, HTTPServer

import google_crc32c
import pytest

from filterpress.errors import PackageError, ScratchError
from filterpress.scratch import open_scratch
from tests.disks import largest_file


@pytest.fixture(params=["directory", "bucket"])
def uri(request, tmp_path):
    """Address of an empty place, of each kind."""
    return (
        str(tmp_path / "scratch")
        if request.param == "directory"
        else request.getfixturevalue("bucket")
    )


@pytest.fixture
def folder(tmp_path):
    """A directory with what directories have in them."""
    made = tmp_path / "made"
    (made / "inner" / "empty").mkdir(parents=True)
    (made / "a").write_bytes(b"a" * 100_000)
    (made / "inner" / ".hidden").write_bytes(b"")
    (made / "inner" / "tool").write_bytes(b"run me")
    (made / "inner" / "tool").chmod(0o755)
    return made


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_what_was_written_is_read_back_and_replaced(uri):
    opened = open_scratch(uri)
    assert opened.uri == uri
    assert opened.read("a/b") is None
    opened.write("a/b", b"one")
    opened.write("other", b"")
    assert open_scratch(uri).read("a/b") == b"one"
    opened.write("a/b", b"two, and longer")
    opened.write("a/b", b"3")
    assert opened.read("a/b") == b"3"
    assert opened.read("other") == b""


def test_what_was_deleted_is_gone_and_may_be_deleted_again(uri):
    opened = open_scratch(uri)
    opened.write("a/b", b"one")
    opened.write("a/c", b"stays")
    for _ in range(2):
        opened.delete("a/b")
        assert opened.read("a/b") is None
    assert opened.read("a/c") == b"stays"


def test_a_directory_comes_back_as_it_was(uri, folder, tmp_path):
    opened = open_scratch(uri)
    opened.put("runs/1", folder)
    assert opened.get("runs/1", tmp_path / "back" / "here")
    back = tmp_path / "back" / "here"
    assert content(back) == content(folder)
    assert back.stat().st_mode & stat.S_IXUSR
    assert (back / "inner" / "tool").stat().st_mode & stat.S_IXUSR
    assert not (back / "a").stat().st_mode & stat.S_IXUSR


def test_a_directory_replaces_another_whole(uri, folder, tmp_path):
    opened = open_scratch(uri)
    opened.put("name", folder)
    (folder / "a").unlink()
    (folder / "b").write_bytes(b"b")
    opened.put("name", folder)
    opened.get("name", tmp_path / "back")
    assert content(tmp_path / "back") == content(folder)


def test_a_directory_that_is_not_there_writes_nothing(uri, tmp_path):
    assert open_scratch(uri).get("name", tmp_path / "back") is False
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_unpacked_over_what_is_there(uri, folder):
    opened = open_scratch(uri)
    opened.put("name", folder)
    before = content(folder)
    with pytest.raises(PackageError, match="exists already"):
        opened.get("name", folder)
    assert content(folder) == before


def archive(**member):
    """Make an archive of one member by hand."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as made:
        info = tarfile.TarInfo()
        for name, value in member.items():
            setattr(info, name, value)
        made.addfile(info)
    return written.getvalue()


HOSTILE = {
    "no archive": b"neither magic nor header" * 100,
    "cut off": archive(name="a", size=5000)[:600],
    "climbs": archive(name="../outside", size=0),
    "links out": archive(name="a", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "device": archive(name="a", type=tarfile.CHRTYPE),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_what_put_did_not_write_is_refused_in_one_line(uri, data, tmp_path):
    opened = open_scratch(uri)
    opened.write("runs/1", data)
    with pytest.raises(ScratchError, match=r"/runs/1 is no archive: ") as caught:
        opened.get("runs/1", tmp_path / "back")
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.name not in {"scratch", "runs", "1"}]


def test_large_directories_pass_through_little_memory(uri, tmp_path):
    (tmp_path / "large").mkdir()
    with (tmp_path / "large" / "zeros").open("wb") as file:
        file.truncate(40_000_000)
    tracemalloc.start()
    opened = open_scratch(uri)
    opened.put("name", tmp_path / "large")
    opened.get("name", tmp_path / "back")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "back" / "zeros").stat().st_size == 40_000_000
    assert peak < 30_000_000


@pytest.mark.parametrize("uri", ["", "gs://", "gs:///prefix", "s3://bucket/x", "file:///tmp/x"])
def test_an_address_that_is_no_place_is_refused(uri):
    with pytest.raises(ValueError, match="scratch must be a directory or gs://bucket/prefix"):
        open_scratch(uri)


def test_opening_and_reading_write_nothing(tmp_path):
    opened = open_scratch(str(tmp_path / "scratch"))
    opened.read("name")
    opened.delete("name")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_below_a_file_can_be_neither_read_nor_written(tmp_path, folder):
    (tmp_path / "file").touch()
    opened = open_scratch(str(tmp_path / "file" / "scratch"))
    for act in (lambda: opened.read("name"), lambda: opened.get("name", tmp_path / "back")):
        with pytest.raises(ScratchError, match=r"cannot read .*name: Not a directory"):
            act()
    for act in (lambda: opened.write("name", b""), lambda: opened.put("name", folder)):
        with pytest.raises(ScratchError, match=r"cannot write .*name: "):
            act()
    with pytest.raises(ScratchError, match=r"cannot delete .*name: Not a directory"):
        opened.delete("name")


def test_a_full_disk_leaves_what_was_there_before(folder, tmp_path):
    opened = open_scratch(str(tmp_path / "scratch"))
    opened.write("name", b"old")
    with largest_file(4096):
        for act in (
            lambda: opened.write("name", bytes(10_000)),
            lambda: opened.put("name", folder),
        ):
            with pytest.raises(ScratchError, match=r"cannot write .*name: File too large"):
                act()
    assert content(tmp_path / "scratch") == {"name": b"old"}


def test_a_bucket_that_does_not_exist_cannot_be_written(bucket):
    with pytest.raises(ScratchError, match=r"cannot write gs://no-such-bucket/x/name: "):
        open_scratch("gs://no-such-bucket/x").write("name", b"bytes")


@pytest.fixture
def answers(monkeypatch):
    """Let a server that always answers alike stand in for a bucket."""

    def start(code, body=b"", **headers):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(code)
                for name, value in (headers | {"Content-Length": str(len(body))}).items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        started.append(server)

    started = []
    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def test_a_bucket_that_forbids_access_is_reported_in_one_line(answers):
    answers(403)
    with pytest.raises(ScratchError, match=r"cannot read gs://bucket/x/name: ") as caught:
        open_scratch("gs://bucket/x").read("name")
    assert "\n" not in str(caught.value)


def test_bytes_that_were_damaged_on_the_way_are_refused(answers):
    digest = base64.b64encode(google_crc32c.Checksum(b"bytes").digest()).decode()
    answers(200, b"bytes", X_Goog_Hash=f"crc32c={digest}")
    assert open_scratch("gs://bucket/x").read("name") == b"bytes"
    answers(200, b"bites", X_Goog_Hash=f"crc32c={digest}")
    with pytest.raises(ScratchError, match=r"name: Checksum mismatch while downloading$") as caught:
        open_scratch("gs://bucket/x").read("name")
    assert "\n" not in str(caught.value)


def test_the_newest_name_with_an_ending_is_found_wherever_it_is(uri):
    opened = open_scratch(uri)
    assert opened.newest("model.json") is None
    for name in ("b/model.json", "a/deep/model.json", "a/other.json", "model.json.old"):
        opened.write(name, b"{}")
        time.sleep(0.01)  # of a clock that counts milliseconds
    assert opened.newest("model.json") == "a/deep/model.json"
    assert opened.newest("b/model.json") == "b/model.json"
    opened.write("b/model.json", b"[]")
    assert opened.newest("model.json") == "b/model.json"
