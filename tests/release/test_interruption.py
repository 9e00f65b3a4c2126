"""Whatever stops a publisher, readers see the release before or the release after, whole."""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from filterpress.errors import ReleaseError
from filterpress.release import fetch, latest, publish
from tests import children
from tests.children import killed_at_change

OLD, NEW = b"the release before", b"the release after"


def _publish_at_once(actions):
    started = [children.start(action) for action in actions]
    assert [children.exit_code(child) for child in started] == [0] * len(started)


def _publishing(name, file, store, keys):
    """Return what publishes a file, in this process or in another."""
    given = {"target": f"models/demo/{name}/file", "custom": {}, "store": store, "keys": keys}
    return partial(publish, file, **given)


def _check_whole(found):
    for name, data in found.items():
        if name.startswith("targets/"):
            assert Path(name).name.startswith(hashlib.sha256(data).hexdigest())
        else:
            json.loads(data)


def test_a_publisher_killed_anywhere_leaves_the_old_release(tmp_path, keys, root, contents):
    publish(OLD, target="models/demo/a/file", custom={}, store=str(tmp_path / "before"), keys=keys)
    kills = 0
    for number in range(1, 1000):
        store = str(tmp_path / str(number))
        shutil.copytree(tmp_path / "before", store)

        publish_new = _publishing("b", NEW, store, keys)
        if not killed_at_change(number, publish_new):
            break
        _check_whole(contents(store))
        kills += 1
        assert latest(store, root=root).version == 1
        assert fetch(store, "models/demo/a/file", root=root) == OLD
        publish_new()
        assert latest(store, root=root).version == 2
        assert fetch(store, "models/demo/b/file", root=root) == NEW
        shutil.rmtree(store)
    # Four uploads, each locked, written beside, and renamed; the last rename is the commit.
    assert kills >= 12
    assert latest(store, root=root).version == 2


def test_a_first_publisher_killed_anywhere_can_be_followed_by_another(tmp_path):
    for number in range(1, 1000):
        store, keys = str(tmp_path / f"{number}/store"), tmp_path / f"{number}/keys"
        publish_new = _publishing("b", NEW, store, keys)
        if not killed_at_change(number, publish_new):
            break
        publish_new()
        assert fetch(store, "models/demo/b/file", root=(keys / "root.json").read_bytes()) == NEW
    assert number > 20


def test_eight_publishers_that_start_at_once_all_land(tmp_path):
    # Nothing exists when they start: neither the store nor the keys.
    store, keys = str(tmp_path / "a" / "store"), tmp_path / "b" / "keys"
    _publish_at_once(_publishing(n, str(n).encode(), store, keys) for n in range(8))
    root = (keys / "root.json").read_bytes()
    for number in range(8):
        assert fetch(store, f"models/demo/{number}/file", root=root) == str(number).encode()
    assert latest(store, root=root).version == 8


def test_eight_publishers_to_one_bucket_all_land(bucket, keys, root):
    releases = []

    def run(number):
        file, target = str(number).encode(), f"models/demo/{number}/file"
        releases.append(publish(file, target=target, custom={}, store=bucket, keys=keys))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(release.version for release in releases) == list(range(1, 9))
    for number in range(8):
        assert fetch(bucket, f"models/demo/{number}/file", root=root) == str(number).encode()


def test_two_publishers_of_one_file_issue_one_release(tmp_path, keys, root):
    store = str(tmp_path / "store")
    _publish_at_once([_publishing("b", NEW, store, keys)] * 4)
    assert latest(store, root=root).version == 1


_FULL_DISK = """
import subprocess, sys
from pathlib import Path
from filterpress.errors import ReleaseError
from filterpress.release import fetch, latest, publish

disk, keys = Path(sys.argv[1]), Path(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=True)
store, root = str(disk / "store"), (keys / "root.json").read_bytes()

def publish_file(name, file):
    return publish(file, target=f"models/m/{name}/f", custom={}, store=store, keys=keys)

publish_file("old", b"old")
refused = 0
for pages in range(12):
    name = f"new-{pages}"
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
        file.truncate(file.tell() - 4096 * pages)
    before = latest(store, root=root)
    try:
        publish_file(name, bytes(5000))
    except ReleaseError as error:
        refused += 1
        assert "No space left on device" in str(error), error
        assert latest(store, root=root) == before
        assert fetch(store, "models/m/old/f", root=root) == b"old"
        assert not list(disk.rglob("*.partial"))
    filler.unlink()
    publish_file(name, bytes(5000))
    assert fetch(store, f"models/m/{name}/f", root=root) == bytes(5000)
assert 3 < refused < 12, refused
"""


def test_a_full_disk_stops_a_publisher_at_any_upload_without_harm(tmp_path, keys):
    private = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        subprocess.run([*private, "true"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine does not let a test mount a small disk of its own")
    program = [sys.executable, "-c", _FULL_DISK, str(tmp_path), str(keys)]
    done = subprocess.run([*private, *program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class _Network(ThreadingHTTPServer):
    """Stands between publisher and bucket, and loses what `fault` says it loses.

    `fault` is given the number of an upload and returns "refuse", "lose" (the upload arrives, the
    answer does not) or nothing.
    """

    def __init__(self, bucket_url, fault):
        super().__init__(("127.0.0.1", 0), _Hop)
        self.bucket_url, self.fault, self.uploads = bucket_url, fault, 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Hop(BaseHTTPRequestHandler):
    def do_GET(self):
        fault = None
        if self.command == "POST":
            self.server.uploads += 1
            fault = self.server.fault(self.server.uploads)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault == "refuse":
            self.send_error(403)
            return
        status, headers, answer = self._forward(body)
        if fault == "lose":
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in {"content-length", "transfer-encoding", "connection"}:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_GET  # noqa: N815  the name that http.server looks for

    def _forward(self, body):
        connection = http.client.HTTPConnection(self.server.bucket_url.removeprefix("http://"))
        connection.request(self.command, self.path, body, dict(self.headers))
        response = connection.getresponse()
        answer = response.status, response.getheaders(), response.read()
        connection.close()
        return answer

    def log_message(self, *args):
        pass


@pytest.fixture
def network(bucket, emulator, monkeypatch):
    """Put a faulty network before the bucket; returns how many uploads it saw."""
    networks = []

    def publish_through(fault, **arguments):
        server = _Network(emulator, fault)
        networks.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with monkeypatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", server.url)
            # Google's client waits a second before it tries again.
            patch.setattr(time, "sleep", lambda seconds: None)
            return publish(store=bucket, custom={}, **arguments), server.uploads

    yield publish_through
    for server in networks:
        server.shutdown()
        server.server_close()


def test_each_answer_to_an_upload_may_be_lost(bucket, network, keys, root):
    def lose_each_first(number):
        # Every upload is sent twice: its first answer is lost, the second is a refusal.
        return "lose" if number % 2 else None

    release, uploads = network(lose_each_first, file=NEW, target="models/demo/b/file", keys=keys)
    assert uploads == 14  # root, file, release, rollout, targets, snapshot, timestamp
    assert (release.version, release.created) == (1, True)
    assert fetch(bucket, "models/demo/b/file", root=root) == NEW


@pytest.mark.parametrize("number", range(1, 5))
def test_a_publisher_cut_off_at_any_upload_leaves_the_old_release(
    bucket, network, keys, root, number
):
    publish(OLD, target="models/demo/a/file", custom={}, store=bucket, keys=keys)

    def refuse_from(upload):
        return "refuse" if upload >= number else None

    with pytest.raises(ReleaseError, match=f"cannot write {bucket}/"):
        network(refuse_from, file=NEW, target="models/demo/b/file", keys=keys)
    assert latest(bucket, root=root).version == 1
    assert fetch(bucket, "models/demo/a/file", root=root) == OLD
    release = publish(NEW, target="models/demo/b/file", custom={}, store=bucket, keys=keys)
    assert (release.version, release.created) == (2, True)
    assert fetch(bucket, "models/demo/b/file", root=root) == NEW


def test_a_publisher_whose_last_answer_is_lost_for_good_has_published(bucket, network, keys, root):
    publish(OLD, target="models/demo/a/file", custom={}, store=bucket, keys=keys)

    def fail_after_commit(upload):
        return {4: "lose"}.get(upload, "refuse" if upload > 4 else None)

    with pytest.raises(ReleaseError):
        network(fail_after_commit, file=NEW, target="models/demo/b/file", keys=keys)
    assert fetch(bucket, "models/demo/b/file", root=root) == NEW
    again = publish(NEW, target="models/demo/b/file", custom={}, store=bucket, keys=keys)
    assert (again.version, again.created) == (2, False)
