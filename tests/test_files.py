"""Files and directories are there whole or not at all, and what is there is on the disk."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from filterpress import files
from filterpress.errors import PackageError
from tests.disks import largest_file

KILLED = """
import os, signal, sys
from pathlib import Path
from filterpress import files
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
"""
WRITES = KILLED + "files.write(Path(sys.argv[1]), b'new')"
MAKES = (
    KILLED
    + """
with files.new_directory(Path(sys.argv[1])) as growing:
    (growing / "file").write_text("new")
"""
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def killed(program, out):
    """Run a program that is killed before the disk has what it wrote."""
    done = subprocess.run([sys.executable, "-c", program, str(out)], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.fixture
def order(monkeypatch):
    """What reaches the disk and what gets another name, in the order in which it happens."""
    happened, sync, replace = [], os.fsync, Path.replace

    def note_sync(descriptor):
        happened.append(("synced", os.fstat(descriptor).st_ino))
        sync(descriptor)

    def note_rename(path, target):
        happened.append(("renamed", path.stat().st_ino))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_rename)
    return happened


@pytest.mark.parametrize("before", [None, b"a longer text that was there before"])
def test_a_file_holds_what_was_written_and_nothing_is_beside_it(before, tmp_path):
    if before is not None:
        (tmp_path / "file").write_bytes(before)
    files.write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


def test_folders_above_a_file_are_made(tmp_path):
    files.write(tmp_path / "a" / "b" / "file", b"new")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"new"


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_after(tmp_path, order):
    files.write(tmp_path / "file", b"new")
    file, folder = (path.stat().st_ino for path in (tmp_path / "file", tmp_path))
    assert order == [("synced", file), ("renamed", file), ("synced", folder)]


@pytest.mark.parametrize("n_bytes", [0, 500])
def test_a_full_disk_leaves_the_file_that_was_there_and_nothing_beside_it(n_bytes, tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with largest_file(n_bytes), pytest.raises(OSError, match="File too large"):
        files.write(tmp_path / "file", bytes(1000))
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write(tmp_path / "file", b"new")
    assert names(tmp_path) == []


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_clears_up(tmp_path):
    out = tmp_path / "file"
    out.write_bytes(b"old")
    killed(WRITES, out)
    assert out.read_bytes() == b"old"
    assert names(tmp_path) == [".file.partial", "file"]
    files.write(out, b"newer")
    assert out.read_bytes() == b"newer"
    assert names(tmp_path) == ["file"]


def make(out, text="new"):
    with files.new_directory(out) as growing:
        assert growing.parent == out.parent
        assert growing.name.startswith(f".{out.name}-")
        (growing / "inner").mkdir()
        (growing / "inner" / "file").write_text(text)


@pytest.mark.parametrize("empty", [False, True])
def test_a_directory_is_new_or_takes_the_place_of_an_empty_one(empty, tmp_path):
    out = tmp_path / "a" / "b"
    if empty:
        out.mkdir(parents=True)
    make(out)
    assert (out / "inner" / "file").read_text() == "new"
    assert names(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("mode", [0o755, 0o700])
def test_a_directory_is_private_until_it_is_there(mode, tmp_path):
    with files.new_directory(tmp_path / "out", mode) as growing:
        assert stat.S_IMODE(growing.stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode


def test_a_directory_is_on_the_disk_before_it_has_its_name_and_the_name_after(tmp_path, order):
    make(tmp_path / "out")
    out, inner, file, above = (
        (tmp_path / place).stat().st_ino for place in ("out", "out/inner", "out/inner/file", ".")
    )
    renamed = order.index(("renamed", out))
    assert set(order[:renamed]) == {("synced", out), ("synced", inner), ("synced", file)}
    assert order[renamed + 1 :] == [("synced", above)]


def test_an_existing_directory_is_left_as_it_is(tmp_path):
    make(tmp_path / "out", "old")
    with pytest.raises(PackageError, match="exists already: name another folder or remove it"):
        make(tmp_path / "out")
    assert (tmp_path / "out" / "inner" / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_file_in_the_way_of_a_directory_is_left_as_it_is(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(PackageError, match="exists already"):
        make(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_of_two_who_make_a_directory_the_first_to_finish_wins(tmp_path):
    with (
        pytest.raises(PackageError, match="exists already"),
        files.new_directory(tmp_path / "out"),
    ):
        make(tmp_path / "out", "the other's")
    assert (tmp_path / "out" / "inner" / "file").read_text() == "the other's"
    assert names(tmp_path) == ["out"]


def test_a_failure_leaves_no_directory(tmp_path):
    with pytest.raises(OSError, match="File too large"), largest_file(2):
        make(tmp_path / "out")
    assert names(tmp_path) == []


def test_a_kill_leaves_no_directory_of_that_name_and_the_next_one_makes_it(tmp_path):
    killed(MAKES, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    make(tmp_path / "out")
    assert (tmp_path / "out" / "inner" / "file").read_text() == "new"


def test_the_folder_above_knows_a_directory_that_was_made(tmp_path, order):
    files.make_directory(tmp_path / "a" / "b")
    assert order == [("synced", p.stat().st_ino) for p in (tmp_path, tmp_path / "a")]
    files.make_directory(tmp_path / "a" / "b")
    assert len(order) == 2
