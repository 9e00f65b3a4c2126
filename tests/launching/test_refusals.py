"""Machines that cannot be had: one line that says what to do, and nothing half-done."""

from __future__ import annotations

import socket
import sys

import pytest

from filterpress import kubernetes_api, stages
from filterpress.errors import ClusterError
from filterpress.launching import machines
from filterpress.loop import compress
from tests.launching.conftest import TINY, complaint, contents


def no_trainer(cluster, monkeypatch):
    cluster.kinds -= {"trainjobs"}


def no_rights(cluster, monkeypatch):
    cluster.forbidden = {("create", "trainjobs")}


def no_rights_to_look(cluster, monkeypatch):
    cluster.forbidden = {("get", "trainjobs")}


def old_token(cluster, monkeypatch):
    cluster.token = "the next one"


def nobody(cluster, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(free.getsockname()[1]))


def silence(cluster, monkeypatch):
    monkeypatch.setattr(kubernetes_api, "_TIMEOUT_S", 0.3)
    cluster.silent = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(cluster.silent.getsockname()[1]))


def other_name(cluster, monkeypatch):
    monkeypatch.setenv("KFP_POD_NAME", "somebody")


REFUSALS = [
    (no_trainer, "this cluster has no Kubeflow Trainer of version 2; install it, or train with"),
    (no_rights, "namespace fleet allows no such job; manifests/components/trainer has the rights"),
    (no_rights_to_look, "namespace fleet allows no such job; manifests/components/trainer has"),
    (old_token, "the cluster takes this pod's token no longer; start the step again"),
    (nobody, "the Kubernetes API does not answer; try again, or look at the network policies"),
    (silence, "the Kubernetes API does not answer; try again, or look at the network policies"),
    (other_name, "this pod is not named somebody: set KFP_POD_NAME to its name"),
]


@pytest.mark.parametrize(("trouble", "says"), REFUSALS)
def test_a_cluster_that_refuses_is_one_line_that_says_what_to_do(
    cluster, train, trained, monkeypatch, scratch, tmp_path, trouble, says
):
    trouble(cluster, monkeypatch)
    weights = str(trained / "weights.safetensors")
    assert complaint(lambda: train(weights=weights), ClusterError).startswith(says)
    assert cluster.made == []
    assert contents(scratch) == {}
    assert not (tmp_path / "out").exists()
    if trouble is silence:
        cluster.silent.close()


def test_a_runtime_that_is_missing_is_one_line_that_says_what_to_do(cluster, train, scratch):
    said = complaint(lambda: train(runtime="other"))
    assert "manifests/components/trainer has the rights and the TrainingRuntime: apply it" in said
    assert "TrainingRuntime is not found" in said
    assert contents(scratch) == {}


def test_outside_a_cluster_there_are_no_machines(train, monkeypatch, tmp_path):
    monkeypatch.setattr(machines, "_ACCOUNT", tmp_path / "none")
    assert complaint(train).endswith("here, train with nodes=1")


def test_without_the_package_of_kubernetes_one_is_told_which(train, monkeypatch, account):
    monkeypatch.setattr(machines, "_ACCOUNT", account)
    monkeypatch.setitem(sys.modules, "filterpress.kubernetes_api", None)
    assert "pip install 'filterpress[publish]'" in complaint(train)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"nodes": 0}, "nodes must be at least 1, got 0"),
        ({"nodes": 2}, "scratch must be a bucket that all machines reach where nodes is 2, got ''"),
    ],
)
def test_machines_that_cannot_be_had_are_refused_at_once(given, says, tmp_path, trained):
    for act in (
        lambda: stages.train(tmp_path / "out", **TINY, **given),
        lambda: stages.retrain(trained, trained, tmp_path / "out", **given),
        lambda: stages.search(trained, trained, tmp_path / "out", max_size="smallest", **given),
    ):
        assert complaint(act, ValueError) == says


def test_a_whole_run_on_machines_that_cannot_be_had_is_refused_before_it_begins(tmp_path):
    said = complaint(lambda: compress(tmp_path / "run", nodes=2), ValueError)
    assert said.startswith("scratch must be a bucket that all machines reach")
    assert not (tmp_path / "run").exists()


def test_what_stands_where_the_package_shall_be_is_refused_before_there_is_a_job(
    cluster, train, tmp_path
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    assert "exists already" in complaint(train)
    assert cluster.made == []
