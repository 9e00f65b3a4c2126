"""Whatever stops an update at whatever moment, the vehicle drives on, and has the news next time.

The disk fails at each operation in turn: the process is killed there, the power goes there and
takes along what was not synchronised, the operation fails once, or all fail from there on.
"""

from __future__ import annotations

import contextlib
import os
import shutil

import pytest

from filterpress.codec.graph import to_onnx
from filterpress.errors import ReleaseError
from filterpress.release.device.vehicle import Outcome, Vehicle
from tests import children
from tests.release.device.conftest import LIMITS, passes
from tests.release.device.disk import KILLED, Disk
from tests.release.device.fleet import V1, V2, digest

FAULTS = ["kill", "power", "error", "broken"]
EVERY = 12


@pytest.fixture(params=["whole file", "delta"])
def prepared(request, first, store, tmp_path):
    """A vehicle that runs one release and is offered the next, with nothing left to compile."""
    store.publish(V2, base=V1 if request.param == "delta" else None)
    to_onnx(V2)
    return first[1] / "home", str(store.path), tmp_path


def cycle(home, store):
    """Update and boot, whatever happens to the update."""
    vehicle = Vehicle(home, limits=LIMITS, examine=passes)
    with contextlib.suppress(ReleaseError):
        vehicle.update(store)
    return vehicle.boot()


def operations(prepared):
    """What an update does to the disk."""
    base, store, folder = prepared
    home, log = shutil.copytree(base, folder / "counted"), folder / "log"
    assert children.exit_code(children.start(_count, home, store, log)) == 0
    return [tuple(line.split()) for line in log.read_text().splitlines()]


def _count(home, store, log):
    disk = Disk(home, "none", 0)
    disk.install()
    assert cycle(home, store).manifest.sha256 == digest(V2)
    log.write_text("\n".join(f"{kind} {name}" for kind, name in disk.log))


def survives(prepared, fault, at):
    base, store, folder = prepared
    home = shutil.copytree(base, folder / f"{fault}-{at}")
    code = children.exit_code(children.start(_fail, home, store, fault, at))
    assert code == (KILLED if fault in {"kill", "power"} else 0)
    # The power is back, and there is no network.
    alone = Vehicle(home, limits=LIMITS, examine=passes).boot()
    assert alone.manifest.sha256 in {digest(V1), digest(V2)}
    assert alone.path.read_bytes() in {to_onnx(V1), to_onnx(V2)}
    # The next cycle; after a boot that tried what was staged, there may be nothing left to do.
    assert cycle(home, store).manifest.sha256 == digest(V2)
    assert Vehicle(home, limits=LIMITS).update(store) is Outcome.CURRENT
    assert not list((home / "staging").iterdir())
    shutil.rmtree(home)


def _fail(home, store, fault, at):
    Disk(home, fault, at).install()
    assert cycle(home, store).manifest.sha256 in {digest(V1), digest(V2)}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_update_survives_a_disk_that_fails_at_some_operations(prepared, fault):
    count = len(operations(prepared))
    # Another sample for each fault, so that together they see more.
    for at in range(1 + FAULTS.index(fault), count + 1, EVERY):
        survives(prepared, fault, at)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_an_update_survives_a_disk_that_fails_at_any_operation(prepared, fault):
    count = len(operations(prepared))
    assert count > 60
    for at in range(1, count + 1):
        survives(prepared, fault, at)


def _boot_and_die(home):
    Vehicle(home, examine=lambda *_: os._exit(KILLED)).boot()


def test_a_trial_that_takes_the_vehicle_down_was_counted(home, store, vehicle):
    store.publish(V2)
    assert vehicle.update() is Outcome.STAGED
    for _ in range(3):
        assert children.exit_code(children.start(_boot_and_die, home)) == KILLED
    assert vehicle.boot().manifest.sha256 == digest(V1)
    assert vehicle.update() is Outcome.KNOWN_BAD


def test_a_slot_vouches_for_nothing_while_it_is_written(prepared):
    done = operations(prepared)
    assert done.index(("unlink", "manifest.json")) < done.index(("replace", "model.fpk"))
    assert done.index(("replace", "model.onnx")) < done.index(("replace", "manifest.json"))


def test_what_a_commit_speaks_of_is_on_the_disk_before_it(prepared):
    unsynced = set()
    commits = 0
    for kind, name in operations(prepared):
        if kind in {"open", "write"}:
            unsynced.add(name)
        elif kind == "fsync":
            unsynced.discard(name)
        elif kind == "replace" and name == "state.json":
            commits += 1
            assert not unsynced
    assert commits >= 3  # staged, counted, good
