"""A disk that fails at its nth operation, and forgets what it was not told to keep."""

from __future__ import annotations

import errno
import os
from pathlib import Path

KILLED = 137

#: What a failing disk answers to each kind of operation.
ERRORS = {
    "open": errno.EROFS,
    "write": errno.ENOSPC,
    "fsync": errno.EIO,
    "replace": errno.EROFS,
    "unlink": errno.EROFS,
}


class Disk:
    """Every operation that changes a folder, counted; install it in a process of its own.

    Attributes:
        log: Kind and file name of each operation.
    """

    def __init__(self, home, fault, at):
        self.home, self.fault, self.at = Path(home), fault, at
        self.log = []
        self._unsynced = {}  # inodes of files: how much of them is on the disk
        self._undo = []  # names that changed in folders that were not synchronised since

    def install(self):
        opens, replaces, unlinks, syncs = Path.open, Path.replace, Path.unlink, os.fsync

        def open_path(path, mode="r", *arguments, **options):
            if mode.strip("bt") in {"r"} or not path.is_relative_to(self.home):
                return opens(path, mode, *arguments, **options)
            self._operation("open", path)
            file = opens(path, mode, *arguments, **options)
            self._unsynced.setdefault(os.fstat(file.fileno()).st_ino, 0)
            return _File(file, self, path)

        def replace(path, target):
            self._operation("replace", target)
            before = target.read_bytes() if target.exists() else None
            data, moved = path.read_bytes(), replaces(path, target)

            def undo():
                opens(path, "wb").write(data)
                opens(target, "wb").write(before) if before is not None else unlinks(target)

            self._undo.append((target.parent, undo))
            return moved

        def unlink(path, missing_ok=False):
            self._operation("unlink", path)
            if path.exists():
                data = path.read_bytes()
                self._undo.append((path.parent, lambda: opens(path, "wb").write(data)))
            unlinks(path, missing_ok)

        def fsync(descriptor):
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            self._operation("fsync", path)
            syncs(descriptor)
            self._unsynced.pop(os.fstat(descriptor).st_ino, None)
            self._undo = [(folder, undo) for folder, undo in self._undo if folder != path]

        Path.open, Path.replace, Path.unlink, os.fsync = open_path, replace, unlink, fsync
        self._opens = opens

    def _operation(self, kind, path, torn=lambda: None):
        self.log.append((kind, Path(path).name))
        n = len(self.log)
        if n == self.at and self.fault in {"kill", "power"}:
            torn()
            if self.fault == "power":
                self._forget()
            os._exit(KILLED)
        if (n == self.at and self.fault == "error") or (n >= self.at and self.fault == "broken"):
            raise OSError(ERRORS[kind], os.strerror(ERRORS[kind]), str(path))

    def _forget(self):
        """Lose what no fsync has reached: the content of files, then names in folders."""
        for path in self.home.rglob("*"):
            if path.is_file() and path.stat().st_ino in self._unsynced:
                os.truncate(path, 0)
        for _, undo in reversed(self._undo):
            undo()


class _File:
    """A file whose writes are counted; the nth is torn in the middle."""

    def __init__(self, file, disk, path):
        self._file, self._disk, self._path = file, disk, path

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def write(self, data):
        def torn():
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._disk._operation("write", self._path, torn)
        return self._file.write(data)
