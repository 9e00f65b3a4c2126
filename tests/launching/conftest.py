"""A pod in a cluster with Kubeflow Trainer, and a network that is trained."""

import pytest

from filterpress import stages
from filterpress.errors import FilterpressError
from filterpress.launching import machines, trainjob
from tests.api_server import NAMESPACE, TOKEN
from tests.launching.trainer_server import POD, TrainerServer

TINY = {"model": "tests.tiny:network", "task": "tests.tiny:task", "config": '{"epochs": 2}'}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def complaint(act, kind=FilterpressError):
    with pytest.raises(kind) as refused:
        act()
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A package, and what each stand-in for machines gives back."""
    out = tmp_path_factory.mktemp("trained") / "package"
    stages.train(out, **TINY)
    return out


@pytest.fixture
def account(tmp_path):
    folder = tmp_path / "account"
    folder.mkdir()
    (folder / "token").write_text(TOKEN)
    (folder / "namespace").write_text(NAMESPACE)
    return folder


@pytest.fixture
def cluster(account, monkeypatch):
    """A cluster that this process is in a pod of, and is asked often."""
    server = TrainerServer(account)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
    monkeypatch.setenv("KFP_POD_NAME", POD)
    monkeypatch.setattr(machines, "_ACCOUNT", account)
    monkeypatch.setattr(trainjob, "_PAUSE_S", 0.02)
    yield server
    server.close()


@pytest.fixture
def scratch(tmp_path):
    return tmp_path / "scratch"


@pytest.fixture
def train(tmp_path, scratch):
    def train(out=tmp_path / "out", **given):
        return stages.train(out, **TINY, nodes=2, scratch=str(scratch), **given)

    return train
