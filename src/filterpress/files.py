"""Writing files and directories whole or not at all, so that a power cut leaves no half of one.

What is being written stands beside its target under a hidden name, reaches the disk, and is then
renamed. On an error it is removed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filterpress.errors import PackageError


def write(path: Path, data: bytes) -> None:
    """Write a file, and wait until the disk has it.

    Args:
        path: The file; what it held is replaced. Its directory is made if there is none.
        data: All it will hold.

    Raises:
        OSError: It cannot be written; what was there before still is.
    """
    with new_file(path) as file:
        file.write(data)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write that becomes ``path`` when the block ends well, once the disk has it.

    Args:
        path: The file; what it held is replaced. Its directory is made if there is none.

    Raises:
        OSError: It cannot be written; what was there before still is.
    """
    make_directory(path.parent)
    growing = draft(path)
    try:
        with growing.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        growing.replace(path)
    except BaseException:
        growing.unlink(missing_ok=True)
        raise
    sync(path.parent)


def draft(path: Path) -> Path:
    """Return the name under which `path` grows; what a killed writer left there is overwritten.

    Example:
        >>> draft(Path("run/report.json")).name
        '.report.json.partial'
    """
    return path.with_name(f".{path.name}.partial")


@contextmanager
def new_directory(path: Path, mode: int = 0o755) -> Iterator[Path]:
    """Give a fresh directory that becomes ``path`` when the block ends well, all at once.

    Args:
        path: Where the directory shall be; may exist if it is empty.
        mode: Its permissions; until it is there, only its owner can look into it.

    Raises:
        PackageError: There is something already.
        OSError: It cannot be written.
    """
    refuse_existing(path)
    make_directory(path.parent)
    growing = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield growing
        growing.chmod(mode)
        for written in (*growing.rglob("*"), growing):
            sync(written)
        try:
            growing.replace(path)
        except OSError:
            refuse_existing(path)  # someone else was first
            raise
        sync(path.parent)
    finally:
        shutil.rmtree(growing, ignore_errors=True)


def refuse_existing(path: Path, but: Path | None = None) -> None:
    """Refuse to write where something is already.

    Args:
        path: What is to be written; an empty directory may be there.
        but: A file in the directory that does not count.

    Raises:
        PackageError: There is something.
    """
    if path.exists() and (not path.is_dir() or any(found != but for found in path.iterdir())):
        raise PackageError(f"{path} exists already: name another folder or remove it")


def make_directory(path: Path) -> None:
    """Make a directory and its parents, so that they outlive a power cut.

    Args:
        path: The directory; may exist.

    Raises:
        OSError: It cannot be made.
    """
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the disk has what is in a file, or the names in a directory.

    Args:
        path: The file or directory.

    Raises:
        OSError: It cannot be opened or synchronised.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
