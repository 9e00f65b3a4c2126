"""A store with one release, and a vehicle that runs it."""

from __future__ import annotations

import shutil

import pytest

from filterpress.release.device import identity
from filterpress.release.device.identity import Identity
from filterpress.release.device.source import Limits
from filterpress.release.device.trial import Verdict
from filterpress.release.device.vehicle import Outcome, Vehicle
from tests.release.device.fleet import CHANNEL, HARDWARE, V1, Publisher, digest
from tests.release.device.misbehaviour import Server

#: Short, so that a test of patience takes none.
LIMITS = Limits(silence_s=0.6, metadata_s=0.6, grace_s=0.6, bytes_per_s=1000)


def passes(model, health):
    """Stand in for the process that tries a model; that has tests of its own."""
    return Verdict("", final=True)


@pytest.fixture(scope="session")
def server():
    """One server for all; `store` gives it back as it was."""
    server = Server()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def first(server, tmp_path_factory):
    """A publisher and a vehicle after the first release."""
    folder = tmp_path_factory.mktemp("first")
    publisher = Publisher(folder / "store")
    publisher.publish(V1)
    me = Identity(store=server.url, hardware=HARDWARE, channel=CHANNEL, device_id="one")
    identity.create(folder / "home", me, publisher.root)
    server.folder = publisher.path
    vehicle = Vehicle(folder / "home", limits=LIMITS, examine=passes)
    assert vehicle.update() is Outcome.STAGED
    assert vehicle.boot().manifest.sha256 == digest(V1)
    return publisher, folder


@pytest.fixture
def store(first, server, tmp_path):
    """The publisher, with a store of its own that the server serves."""
    publisher, folder = first
    shutil.copytree(folder / "store", tmp_path / "store")
    server.folder, server.faults, server.requests = tmp_path / "store", {}, []
    return publisher.copy(tmp_path / "store")


@pytest.fixture
def home(first, tmp_path):
    """The folder of a vehicle that runs the first release."""
    return shutil.copytree(first[1] / "home", tmp_path / "home")


@pytest.fixture
def vehicle(home, store):
    return Vehicle(home, limits=LIMITS, examine=passes)


@pytest.fixture
def runs(home):
    """Says which file a vehicle runs, from the disk alone."""

    def digest_of_what_runs():
        model = Vehicle(home, examine=passes).boot()
        return model and model.manifest.sha256

    return digest_of_what_runs
