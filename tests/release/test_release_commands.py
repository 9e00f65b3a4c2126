"""The commands below ``filterpress release``, as their users meet them."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from filterpress.__main__ import app
from filterpress.release import fetch, rollout
from tests.release.encoded import network, weight
from tests.release.test_ceremony import make_key

ONE, TWO = network(weight(0)), network(weight(0, 0.05))


def run(*arguments):
    wide = {"COLUMNS": "300"}  # so that no cell of a table is folded
    return CliRunner().invoke(app, ["release", *map(str, arguments)], env=wide)


def report_of(*arguments):
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def refusal(*arguments):
    done = run(*arguments)
    assert done.exit_code == 2
    *warnings, line = done.stderr.splitlines()
    assert all("development keys" in warning for warning in warnings)
    return line


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "one.fpk").write_bytes(ONE)
    (tmp_path / "two.fpk").write_bytes(TWO)
    return tmp_path


@pytest.fixture
def store(folder):
    """A store with two releases, of which a channel names the second."""
    keys = folder / "keys"
    report_of("init", keys)
    for name in ("one", "two"):
        report_of("publish", folder / f"{name}.fpk", "--store", folder / "store", "--name", "demo")
    return folder / "store"


@pytest.fixture
def root(store, folder):
    return (folder / "keys" / "root.json").read_bytes()


def channel(store, root):
    return rollout.read(str(store), root=root).content


def test_a_release_is_published_and_named_by_a_channel(folder):
    given = ("--store", folder / "store", "--name", "demo", "--percent", "12.5", "--max-ms", 40)
    made = report_of("publish", folder / "one.fpk", *given, "--cohort", "a", "--cohort", "b")
    root = (folder / "keys" / "root.json").read_bytes()
    assert made["channel"] == "channels/any/stable.json"
    assert fetch(str(folder / "store"), made["target"], root=root) == ONE
    said = channel(folder / "store", root)
    assert (said["target"], said["health"]["max_ms"]) == (made["target"], 40)
    assert said["rollout"]["percent_bp"] == 1250
    assert said["rollout"]["cohorts"] == ["a", "b"]
    again = report_of("publish", folder / "one.fpk", *given)
    assert (again["version"], again["created"]) == (1, False)


def test_a_release_can_be_published_without_a_channel(folder):
    made = report_of("publish", folder / "one.fpk", "--store", folder / "store", "--channel", "")
    assert "channel" not in made
    found = report_of(
        "verify", "--store", folder / "store", "--root", folder / "keys" / "root.json"
    )
    assert found["channels"] == []


def test_a_channel_is_ramped_halted_resumed_and_recalled(store, root):
    assert report_of("ramp", 50, "--store", store)["percent_bp"] == 5000
    assert report_of("halt", "--store", store)["halted"]
    assert channel(store, root)["rollout"]["halted"]
    assert not report_of("resume", "--store", store)["halted"]
    made = report_of("recall", "--to", 1, "--store", store)
    assert (made["release_counter"], made["changed"]) == (3, True)
    assert fetch(str(store), channel(store, root)["target"], root=root) == ONE
    assert not report_of("recall", "--to", 1, "--store", store)["changed"]


def test_a_recall_can_mend_a_bound_that_was_a_mistake(folder, store, root):
    (folder / "three.fpk").write_bytes(network(weight(0, 0.1)))
    given = ("--store", store, "--name", "demo", "--max-ms", 1, "--max-mb", 900)
    report_of("publish", folder / "three.fpk", *given)
    report_of("recall", "--to", 2, "--store", store, "--max-ms", 0)
    health = channel(store, root)["health"]
    assert (health["max_ms"], health["max_mb"]) == (0, 900)
    assert "max_mb must be finite" in refusal(
        *("recall", "--to", 1, "--store", store, "--max-mb", -1)
    )


def test_a_refresh_renews_the_timestamp(store):
    before = json.loads((store / "metadata" / "timestamp.json").read_bytes())["signed"]["version"]
    report_of("refresh", "--store", store)
    after = json.loads((store / "metadata" / "timestamp.json").read_bytes())["signed"]["version"]
    assert after == before + 1


def test_verify_shows_tables_and_fails_with_the_problems_in_one_line(store, folder):
    given = ("verify", "--store", store, "--root", folder / "keys" / "root.json")
    done = run(*given)
    assert done.exit_code == 0
    for word in ("timestamp", "days_left", "release_counter", "channels/any/stable.json"):
        assert word in done.stdout
    next(store.glob("targets/models/demo/*/*.fpd")).unlink()
    assert refusal(*given).startswith(f"error: 1 problems in {store}: models/demo/")


def test_a_bundle_unpacks_to_a_store(store, folder, root):
    given = ("--store", store, "--root", folder / "keys" / "root.json")
    made = report_of("bundle", folder / "bundle.tar", *given)
    with tarfile.open(made["bundle"]) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    assert fetch(str(folder / "unpacked"), made["target"], root=root) == TWO


def test_a_root_is_drawn_up_signed_by_two_and_published(folder):
    people = {name: make_key(folder, name) for name in ("ann", "bob", "online")}
    held = [
        *(f"root={people['ann'][1]}", f"root={people['bob'][1]}", f"targets={people['ann'][1]}"),
        *(f"{r}={people['online'][1]}" for r in ("release", "rollout", "snapshot", "timestamp")),
    ]
    flags = [flag for pair in held for flag in ("--key", pair)]
    draft, keys, store = folder / "draft", folder / "keys", folder / "store"
    made = report_of("root", "new", draft, *flags, "--threshold", "root=2")
    assert made["root"]["missing"] == 2
    report_of("root", "sign", draft, "--with", f"file2:{people['ann'][0]}")
    signed = report_of("root", "sign", draft, "--with", f"file2:{people['bob'][0]}")
    assert (signed["root"]["missing"], signed["targets"]["missing"]) == (0, 0)
    keys.mkdir()
    root = (draft / "1.root.json").read_bytes()
    (keys / "root.json").write_bytes(root)
    place = {"uri": "file2:../online.pem", "keyid": made["keys"]["release"]["keys"][0]}
    online = ("release", "rollout", "snapshot", "timestamp")
    (keys / "signers.json").write_text(json.dumps({role: [place] for role in online}))
    report_of("root", "publish", draft, "--store", store)
    made = report_of("publish", folder / "one.fpk", "--store", store)
    assert fetch(str(store), made["target"], root=root) == ONE
    copied = report_of(
        "root", "begin", folder / "copied", "--store", store, "--root", keys / "root.json"
    )
    assert copied == report_of("root", "status", draft)
    _, public = make_key(folder, "next")
    report_of("root", "add-key", draft, "timestamp", public)
    dropped = report_of("root", "drop-key", draft, "timestamp", place["keyid"])
    assert dropped["root"] == dropped["root"] | {"version": 2, "missing": 2}
    assert report_of("root", "renew", draft)["targets"]["version"] == 2
    assert "timestamp" in run("root", "status", draft).stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["publish", "one.fpk", "--store", "gs://b/x"], "keys must name the folder of signing"),
        (["publish", "one.fpk", "--store", "s3://b/x"], "store must be a directory or gs://"),
        (["publish", "none.fpk", "--store", "store"], "No such file or directory: none.fpk"),
        (["publish", "one.fpk", "--store", "store", "--name", "a/b"], "name must be letters"),
        (["publish", "one.fpk", "--store", "store", "--percent", "101"], "percent must be from"),
        (["publish", "one.fpk", "--store", "store", "--keys", "store/k"], "keys must lie outside"),
        (["ramp", "10", "--store", "store"], "has no channel channels/any/stable.json: publish"),
        (["recall", "--to", "1", "--store", "store"], "has no channel"),
        (["verify", "--store", "store", "--root", "none"], "cannot read none: No such file"),
        (["verify", "--store", "store", "--root", "one.fpk"], "holds nothing that can be trusted"),
        (["root", "status", "."], "must hold the root and the targets of a ceremony"),
        (["root", "new", "d", "--key", "root"], "key must be ROLE=VALUE, got 'root'"),
        (["root", "new", "d", "--key", "root=none"], "cannot read none: No such file"),
        (["root", "new", "d", "--key", "root=one.fpk", "--threshold", "root=x"], "ROLE=NUMBER"),
    ],
)
def test_what_cannot_be_done_is_one_line(folder, monkeypatch, arguments, says):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    line = refusal(*arguments)
    assert line.startswith("error: ")
    assert says in line


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["one.fpk", "--percent", "101"], "percent must be from 0 to 100"),
        (["one.fpk", "--not-before", "soon"], "not_before must be a time"),
        (["one.fpk", "--hardware", "a/b"], "hardware must be letters"),
        (["one.fpk", "--hardware", "lidar", "--made-for", "cam"], "made for cam, not for lidar"),
        (["one.fpk", "--max-ms", "-1"], "max_ms must be finite and from 0, got -1"),
        (["no-network.fpk"], "the file is truncated or damaged"),
        (["no-network.fpk", "--channel", ""], "the file is truncated or damaged"),
    ],
)
def test_what_cannot_be_done_leaves_no_release(folder, monkeypatch, wrong, says):
    monkeypatch.chdir(folder)
    Path("no-network.fpk").write_bytes(ONE[:-1])
    assert says in refusal("publish", *wrong, "--store", "store")
    assert not Path("store").exists()


def test_who_may_not_roll_out_releases_nothing_into_a_channel(store, folder, root, contents):
    (folder / "keys" / "rollout.pem").unlink()
    before = contents(store)
    (folder / "three.fpk").write_bytes(network(weight(0, 0.1)))
    given = (folder / "three.fpk", "--store", store, "--name", "demo")
    assert "cannot read the key file2:rollout.pem" in refusal("publish", *given)
    assert contents(store) == before
    assert report_of("publish", *given, "--channel", "")["version"] == 3


def test_keys_are_never_overwritten(folder):
    report_of("init", folder / "keys")
    assert "exists already: keys are never overwritten" in refusal("init", folder / "keys")


@pytest.mark.parametrize(
    "command",
    [["publish"], ["ramp"], ["halt"], ["resume"], ["recall"], ["refresh"], ["verify"], ["bundle"]]
    + [["root", name] for name in ("new", "begin", "add-key", "drop-key", "renew", "sign")],
)
def test_each_command_teaches_what_it_does(command):
    done = run(*command, "--help")
    assert done.exit_code == 0
    assert "Usage:" in done.stdout
    assert "--json" in done.stdout


def test_releasing_does_not_wait_for_torch(folder):
    program = (
        "import sys; sys.modules['torch'] = None; from filterpress.__main__ import main; main()"
    )
    arguments = ["release", "publish", folder / "one.fpk", "--store", folder / "store"]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "store" / "metadata" / "timestamp.json").exists()
