"""The example of a service: it answers while it updates, and the command line around it."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from typer.testing import CliRunner

from filterpress.release.device import identity, service
from filterpress.release.device.__main__ import app
from filterpress.release.device.vehicle import Vehicle
from filterpress.release.golden import images
from tests.release.device.conftest import LIMITS, passes
from tests.release.device.fleet import CHANNEL, HARDWARE, IMAGE, V1, V2, digest, health

IMAGES = images(0, 2, IMAGE)
EXPECTED = {n: health(data)["outputs"][0] for n, data in ((1, V1), (2, V2))}


def command_line(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ask(connection, body):
    connection.request("POST", "/infer", body)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


@pytest.fixture
def serving(home, store):
    """A service that runs the first release, and its address."""
    answering = service.Service(Vehicle(home, limits=LIMITS))
    answering.load()
    with service.serve(answering, 0) as http_server:
        thread = threading.Thread(target=http_server.serve_forever, args=(0.01,))
        thread.start()
        yield answering, ("127.0.0.1", http_server.server_port)
        http_server.shutdown()
        thread.join()


def test_no_request_is_dropped_while_an_update_happens(serving, store):
    answering, address = serving
    answers, over = [], threading.Event()

    def drive():
        connection = http.client.HTTPConnection(*address)
        while not over.is_set():
            answers.append(ask(connection, IMAGES[0].tobytes()))
        connection.close()

    drivers = [threading.Thread(target=drive) for _ in range(2)]
    for driver in drivers:
        driver.start()
    store.publish(V2, base=V1)
    answering.refresh()
    seen = len(answers)
    while len(answers) < seen + 10:
        time.sleep(0.01)
    over.set()
    for driver in drivers:
        driver.join()
    assert {status for status, _ in answers} == {200}
    assert {answer["release_counter"] for _, answer in answers} == {1, 2}
    assert answers[0][1]["sha256"] == digest(V1)
    assert answers[-1][1]["sha256"] == digest(V2)
    for _, answer in answers:
        assert np.allclose(answer["outputs"], EXPECTED[answer["release_counter"]], atol=1e-4)


def test_a_service_goes_on_when_an_update_is_refused_or_bad(serving, store, server):
    answering, address = serving
    store.publish(V2, health=health(V1))
    answering.refresh()
    store.issue("timestamp", days=-1)
    answering.refresh()
    connection = http.client.HTTPConnection(*address)
    assert ask(connection, IMAGES[0].tobytes())[1]["release_counter"] == 1
    assert ask(connection, b"too short")[0] == 400
    connection.close()


def test_a_service_without_a_release_says_so(tmp_path, store, server):
    me = identity.Identity(store=server.url, hardware=HARDWARE, channel=CHANNEL)
    identity.create(tmp_path / "new", me, store.root)
    answering = service.Service(Vehicle(tmp_path / "new", limits=LIMITS, examine=passes))
    answering.load()
    assert answering.answer(IMAGES[0].tobytes())[0] == 503
    answering.refresh()
    assert answering.answer(IMAGES[0].tobytes())[0] == 200


def test_a_report_is_signed_and_no_other_report_has_its_signature(vehicle, store):
    report = vehicle.status()
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(report["public_key"]))
    signature = bytes.fromhex(report["signature"])
    text = json.dumps(report["signed"], sort_keys=True, separators=(",", ":"))
    key.verify(signature, text.encode())
    with pytest.raises(InvalidSignature):
        key.verify(signature, text.replace(digest(V1), digest(V2)).encode())
    assert report["signed"]["release_counter"] == 1
    assert abs(report["signed"]["time"] - time.time()) < 60


def test_a_vehicle_is_set_up_updated_and_run_from_the_command_line(tmp_path, store):
    root, home = tmp_path / "root.json", tmp_path / "vehicle"
    root.write_bytes(store.root)
    where = ("--store", store.path, "--root", root, "--hardware", HARDWARE)
    assert command_line("init", home, *where).exit_code == 0
    assert (home / "device.pem").stat().st_mode & 0o777 == 0o600
    failed = command_line("boot", home)
    assert failed.exit_code == 2
    assert failed.stderr == (
        "error: no release has passed its trial here yet: update, then boot again\n"
    )
    assert json.loads(command_line("update", home, "--json").stdout) == {"outcome": "staged"}
    running = json.loads(command_line("boot", home, "--json").stdout)
    assert (running["release_counter"], running["sha256"]) == (1, digest(V1))
    report = json.loads(command_line("status", home, "--json").stdout)
    assert report["signed"]["sha256"] == digest(V1)
    again = command_line("init", home, *where)
    assert again.exit_code == 2
    assert "exists already" in again.stderr


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_service_is_run_from_the_command_line(home, store, sent, code):
    # whoever starts the tests in the background has them ignore what is sent below
    python = ["env", "--default-signal=INT", sys.executable]
    command = [*python, "-m", "filterpress.release.device", "run", str(home)]
    store.publish(V2)
    started = [*command, "--port", "0", "--every", "60"]
    with subprocess.Popen(started, stderr=subprocess.PIPE, text=True) as process:
        port = None
        for line in process.stderr:
            found = re.search(r"http://127.0.0.1:(\d+)", line)
            port = int(found[1]) if found else port
            if "running release 2" in line:
                break
        connection = http.client.HTTPConnection("127.0.0.1", port)
        assert ask(connection, IMAGES[0].tobytes())[1]["release_counter"] == 2
        connection.request("GET", "/")
        assert json.loads(connection.getresponse().read())["signed"]["release_counter"] == 2
        connection.close()
        process.send_signal(sent)
        assert process.wait(20) == code


@pytest.mark.parametrize(
    ("root", "reason"),
    [
        (lambda store: b"{}", "root must be signed root metadata"),
        (lambda store: store.read("metadata/timestamp.json"), "root must be signed root metadata"),
        (lambda store: store.root.replace(b'"threshold":2', b'"threshold":1'), "0/1 keys|0/2"),
    ],
)
def test_a_vehicle_trusts_nothing_that_is_no_root(tmp_path, store, root, reason):
    (tmp_path / "root.json").write_bytes(root(store))
    where = ("--store", store.path, "--root", tmp_path / "root.json")
    failed = command_line("init", tmp_path / "vehicle", *where)
    assert failed.exit_code == 2
    assert re.search(reason, failed.stderr)
    assert not (tmp_path / "vehicle").exists()


def test_a_vehicle_that_was_just_set_up_shows_its_key(tmp_path, store):
    (tmp_path / "root.json").write_bytes(store.root)
    where = ("--store", store.path, "--root", tmp_path / "root.json")
    assert command_line("init", tmp_path / "vehicle", *where, "--device-id", "one").exit_code == 0
    shown = command_line("status", tmp_path / "vehicle", "--json")
    assert shown.exit_code == 0, shown.stderr
    report = json.loads(shown.stdout)
    assert (report["signed"]["device_id"], report["signed"]["sha256"]) == ("one", "")
    assert len(bytes.fromhex(report["public_key"])) == 32


def test_a_root_for_development_is_trusted_on_demand_only(tmp_path, store):
    root = store.signed["root"]
    root.unrecognized_fields["x-filterpress-development"] = True
    (tmp_path / "root.json").write_bytes(store.sign("root", root))
    where = ("--store", store.path, "--root", tmp_path / "root.json")
    failed = command_line("init", tmp_path / "vehicle", *where)
    assert (failed.exit_code, "for development" in failed.stderr) == (2, True)
    made = command_line("init", tmp_path / "vehicle", *where, "--development")
    assert made.exit_code == 0


def test_the_conformance_client_downloads_what_is_signed(tmp_path, store, server):
    metadata, targets = tmp_path / "metadata", tmp_path / "targets"
    metadata.mkdir()
    (tmp_path / "root.json").write_bytes(store.root)
    client = ("conformance-client", "--metadata-dir", metadata)
    where = ("--metadata-url", f"{server.url}/metadata", "--target-base-url")
    what = (f"{server.url}/targets", "--target-dir", targets, "--target-name")
    assert command_line(*client, "init", tmp_path / "root.json").exit_code == 0
    assert command_line(*client, *where[:2], "refresh").exit_code == 0
    done = command_line(*client, *where, *what, store.target(V1), "download")
    assert done.exit_code == 0, done.stderr
    assert [path.read_bytes() for path in targets.iterdir()] == [V1]
    assert command_line(*client, *where, *what, "models/no/such/file", "download").exit_code == 1
    shutil.copy(metadata / "root.json", metadata / "timestamp.json")
    store.issue("timestamp", days=-1)
    assert command_line(*client, *where[:2], "refresh").exit_code == 1
    assert len(list(targets.iterdir())) == 1
