"""Stages on several machines, by a server that behaves as a cluster with Kubeflow Trainer."""

from __future__ import annotations

import inspect
import json
import logging
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from torch import nn

from filterpress import launching, stages
from filterpress.checkpoints import Checkpoint, Course, name_of
from filterpress.errors import ClusterError
from filterpress.launching import trainjob
from filterpress.scratch import DirectoryScratch, open_scratch
from filterpress.stages.learning import PLACES
from tests.api_server import TOKEN
from tests.launching.conftest import TINY, complaint, contents
from tests.launching.trainer_server import IMAGE
from tests.tiny import ROOT


def args_of(job):
    """Return scratch and the name of the work there, as the machines are told."""
    _, module, uri, name, _ = job["spec"]["trainer"]["args"]
    assert module == "filterpress.node"
    return open_scratch(uri), name


def complete_with(package):
    def play(server, job):
        scratch, name = args_of(job)
        scratch.put(f"{name}/out", package)
        server.end(job, "Complete")

    return play


def fail_with(message, said=""):
    def play(server, job):
        scratch, name = args_of(job)
        if said:
            scratch.write(f"{name}/error", said.encode())
        server.end(job, "Failed", message)

    return play


def test_a_job_that_completes_hands_its_package_over_and_leaves_nothing(
    cluster, train, trained, tmp_path, scratch
):
    cluster.play = complete_with(trained)
    report = train()
    assert contents(tmp_path / "out") == contents(trained)
    assert report == json.loads((trained / "report.json").read_text())
    (job,) = cluster.made
    assert job["spec"]["trainer"]["image"] == IMAGE
    assert job["spec"]["trainer"]["numNodes"] == 2
    assert job["spec"]["runtimeRef"] == {"name": "filterpress", "kind": "TrainingRuntime"}
    assert cluster.deleted == [job["metadata"]["name"]]
    assert contents(scratch) == {}


def test_the_log_tells_what_changes_and_nothing_twice(cluster, train, trained, caplog):
    defaults = inspect.signature(stages.train).parameters.values()
    given = {p.name: p.default for p in defaults if p.name not in (*PLACES, "weights")} | TINY
    training = name_of("train", given, ())

    def play(server, job):
        scratch, _ = args_of(job)
        server.tell(job, jobsStatus=[{"name": "node", "active": 2, "ready": 1, "failed": 0}])
        time.sleep(0.2)
        layer = nn.Linear(2, 2)
        course = Course(layer, torch.optim.SGD(layer.parameters()), torch.Generator(), [0.75])
        Checkpoint(scratch, training).save(course, 2)
        time.sleep(0.2)
        complete_with(trained)(server, job)

    caplog.set_level(logging.INFO)
    cluster.play = play
    train()
    said = [r.getMessage().partition(": ")[2] for r in caplog.records if "TrainJob" in r.msg]
    assert said == [
        *("made, for 2 machines", "node: 2 active, 1 ready", "epoch 1 of 2: validation 0.7500"),
        *("Complete: JobSet", "deleted"),
    ]


def test_a_job_that_fails_is_said_with_its_own_message_and_its_first_errors(
    cluster, train, tmp_path
):
    cluster.play = fail_with("jobset failed due to one or more job failures", "no data here")
    said = complaint(train, ClusterError)
    (job,) = cluster.made
    name = job["metadata"]["name"]
    failed = f"TrainJob {name} failed: jobset failed due to one or more job failures"
    assert said == f"no data here ({failed})"
    assert not (tmp_path / "out").exists()
    assert cluster.deleted == []  # people may look at its pods


def test_a_cluster_that_refuses_is_not_said_with_an_error_of_an_earlier_try(cluster, train):
    cluster.play = fail_with("out of luck", "old error")
    complaint(train, ClusterError)
    cluster.forbidden = {("get", "trainjobs")}
    assert complaint(train, ClusterError).startswith("namespace fleet allows no such job")


def test_a_job_that_fails_in_silence_is_said_with_its_own_message(cluster, train):
    cluster.play = fail_with("jobset failed: no pod was ever ready")
    assert complaint(train).endswith("failed: jobset failed: no pod was ever ready")


def test_a_step_that_is_tried_again_adopts_the_job_of_the_first(
    cluster, train, trained, monkeypatch
):
    monkeypatch.setattr(trainjob, "_PATIENCE_S", 0)
    cluster.play = lambda server, job: server.troubles.append(503)
    assert "in trouble" in complaint(train)
    (job,) = cluster.made
    assert cluster.deleted == []
    complete_with(trained)(cluster, job)
    assert train()["stage"] == "train"
    assert cluster.made == [job]


def test_the_packages_of_a_job_made_at_the_same_time_are_there_all_the_time(
    cluster, train, trained, scratch, monkeypatch
):
    removed = []
    delete = DirectoryScratch.delete

    def note(self, name):
        removed.append(name.rpartition("/")[2])
        delete(self, name)

    monkeypatch.setattr(DirectoryScratch, "delete", note)
    cluster.play = lambda server, job: (
        removed.append("made"),
        complete_with(trained)(server, job),
    )
    train(weights=str(trained / "weights.safetensors"))
    assert removed[: removed.index("made")] == ["out", "error"]
    assert removed[-1] == "weights"


def test_a_job_that_somebody_else_makes_at_the_same_time_is_adopted(
    cluster, train, trained, caplog
):
    cluster.instead = 409  # its launcher was between our question and our job
    cluster.play = complete_with(trained)
    caplog.set_level(logging.INFO)
    assert train()["stage"] == "train"
    assert len(cluster.made) == 1
    assert "adopted" in caplog.text
    assert "made, for" not in caplog.text


def test_a_job_of_which_nobody_knows_whether_it_was_made_is_deleted(cluster, train, scratch):
    cluster.instead = 504
    assert "in trouble" in complaint(train)
    assert cluster.deleted == [job["metadata"]["name"] for job in cluster.made]
    assert len(cluster.made) == 1
    assert contents(scratch) == {}


def test_a_job_that_failed_before_goes_and_is_made_again(cluster, train, trained, scratch):
    cluster.play, cluster.lingers = fail_with("out of luck", "old error"), 0.1
    complaint(train)
    cluster.play = fail_with("out of luck again")
    said = complaint(train)
    assert said.startswith("TrainJob ")  # not with the old error
    assert said.endswith("failed: out of luck again")
    cluster.play = complete_with(trained)
    assert train()["stage"] == "train"
    (name,) = {job["metadata"]["name"] for job in cluster.made}
    assert len({job["metadata"]["uid"] for job in cluster.made}) == 3
    assert cluster.deleted == [name] * 3
    assert contents(scratch) == {}


def test_other_work_is_another_job(cluster, train, trained, tmp_path):
    cluster.play = complete_with(trained)
    train(tmp_path / "0")
    train(tmp_path / "1", seed=1)
    train(tmp_path / "2", runtime="filterpress")
    names = [job["metadata"]["name"] for job in cluster.made]
    assert names[0] == names[2] != names[1]
    assert all(name.startswith("filterpress-train-") for name in names)
    cluster.objects["pods", "train-pod"]["metadata"]["labels"] = {}  # of another run
    train(tmp_path / "3")
    assert cluster.made[-1]["metadata"]["name"] not in names


def test_a_job_that_takes_too_long_is_deleted(cluster, train, monkeypatch, scratch):
    monkeypatch.setattr(trainjob, "_LIMIT_S", 0.1)
    assert complaint(train).endswith("is given up: it has not ended in 2.77778e-05 hours")
    assert len(cluster.deleted) == 1
    assert contents(scratch) == {}


def pod_of(job, **status):
    """Make a pod of a job, for the objects of a cluster."""
    labels = {"jobset.sigs.k8s.io/jobset-name": job["metadata"]["name"]}
    return {("pods", "pod"): {"metadata": {"name": "pod", "labels": labels}, "status": status}}


def test_an_image_that_cannot_be_pulled_is_said_and_the_job_is_deleted(cluster, train, scratch):
    waiting = {"reason": "ImagePullBackOff", "message": "Back-off pulling image: not found"}
    states = [{"name": "node", "state": {"waiting": waiting}}]
    cluster.play = lambda server, job: server.objects.update(pod_of(job, containerStatuses=states))
    said = complaint(train)
    assert said.endswith("ImagePullBackOff: Back-off pulling image: not found")
    assert cluster.deleted == [job["metadata"]["name"] for job in cluster.made]
    assert contents(scratch) == {}


def test_machines_that_find_no_place_are_waited_for(cluster, train, trained, caplog):
    no_place = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    no_place["message"] = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."

    def play(server, job):
        server.objects.update(pod_of(job, conditions=[no_place]))
        time.sleep(0.2)
        complete_with(trained)(server, job)

    caplog.set_level(logging.INFO)
    cluster.play = play
    assert train()["stage"] == "train"
    line = "a pod does not run: Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia"
    assert caplog.text.count(line) == 1


def test_an_api_that_is_in_trouble_for_a_while_does_not_end_the_job(
    cluster, train, trained, caplog
):
    def play(server, job):
        server.troubles += [503, 500, 429]
        time.sleep(0.3)
        complete_with(trained)(server, job)

    cluster.play = play
    assert train()["stage"] == "train"
    assert sum("in trouble" in record.getMessage() for record in caplog.records) == 1


def test_a_job_that_somebody_deletes_is_an_error(cluster, train):
    cluster.play = lambda server, job: server.objects.pop(("trainjobs", job["metadata"]["name"]))
    assert complaint(train).endswith("was deleted by somebody else")


def test_a_job_that_cannot_be_deleted_is_left_to_people_and_its_package_counts(
    cluster, train, trained, tmp_path, caplog
):
    cluster.forbidden = {("delete", "trainjobs")}
    cluster.play = complete_with(trained)
    train()
    assert contents(tmp_path / "out") == contents(trained)
    assert any(r.getMessage().startswith("delete TrainJob filterpress-") for r in caplog.records)


def test_a_job_that_leaves_no_package_is_an_error_and_goes(cluster, train):
    cluster.play = lambda server, job: server.end(job, "Complete")
    assert "was complete and left no package in " in complaint(train)
    assert len(cluster.deleted) == 1


def test_a_token_that_was_replaced_meanwhile_is_read_again(cluster, train, trained, account):
    def play(server, job):
        server.token = "the next one"
        (account / "token").write_text(server.token)
        complete_with(trained)(server, job)

    cluster.play = play
    assert train()["stage"] == "train"
    assert cluster.token != TOKEN


SLEEP = """
import sys
from pathlib import Path
from filterpress.launching import machines, trainjob
machines._ACCOUNT, trainjob._PAUSE_S = Path(sys.argv.pop(1)), 0.05
from filterpress.__main__ import main
main()
"""


@pytest.mark.slow
def test_a_step_that_is_ended_takes_its_job_along(cluster, account, scratch, tmp_path):
    flags = [f"--{name}={value}" for name, value in TINY.items()]
    flags += ["--nodes=2", f"--scratch={scratch}", f"--out={tmp_path / 'out'}"]
    started = subprocess.Popen(
        [sys.executable, "-c", SLEEP, account, "train", *flags], cwd=ROOT, stderr=subprocess.PIPE
    )
    for line in started.stderr:
        if b"made, for 2 machines" in line:
            break
    time.sleep(0.2)
    started.terminate()
    _, said = started.communicate(timeout=30)
    assert started.returncode == 128 + signal.SIGTERM, said
    assert cluster.deleted == [job["metadata"]["name"] for job in cluster.made]
    assert len(cluster.made) == 1
    assert contents(scratch) == {}


def test_who_interrupts_a_step_interrupts_its_job(cluster, train, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainjob.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train()
    assert cluster.deleted == [job["metadata"]["name"] for job in cluster.made]


def test_the_rights_of_a_step_are_those_that_it_uses(cluster, train, trained):
    cluster.play = fail_with("out of luck")
    complaint(train)
    cluster.play = complete_with(trained)
    train()
    text = (ROOT / "manifests" / "components" / "trainer" / "accounts.yaml").read_text()
    rules = next(yaml.safe_load_all(text))["rules"]
    assert cluster.asked == {
        (v, k) for rule in rules for k in rule["resources"] for v in rule["verbs"]
    }


def test_a_signal_is_what_it_was_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with launching.end_on_sigterm():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
