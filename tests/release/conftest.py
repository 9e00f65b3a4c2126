"""Real parts for the tests of publication: keys and stores."""

from __future__ import annotations

from pathlib import Path

import pytest

from filterpress.release import create_keys


@pytest.fixture(scope="session")
def keys(tmp_path_factory):
    """Keys that their owner asked for; nothing changes them."""
    folder = tmp_path_factory.mktemp("publisher") / "keys"
    create_keys(folder)
    return folder


@pytest.fixture(scope="session")
def root(keys):
    return (keys / "root.json").read_bytes()


@pytest.fixture
def directory(tmp_path):
    return str(tmp_path / "store")


@pytest.fixture(params=["directory", "bucket"])
def store(request):
    """Address of an empty store, of each kind."""
    return request.getfixturevalue(request.param)


def files_below(path):
    """Everything in a directory store that a reader could ask for."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in Path(path).rglob("*")
        if file.is_file() and not file.name.startswith(".")
    }


@pytest.fixture
def contents():
    return files_below
