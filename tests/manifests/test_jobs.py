"""The CronJobs: what they are told, what they may do, and the run that one of them starts."""

import inspect
import json
import os
import re
import socket
import subprocess
import sys

import pytest
import yaml
from typer.main import get_command

import pipeline
from components._cron import check_cron
from filterpress.__main__ import app
from filterpress.budget import check_spelling
from tests.manifests.rendering import ENVIRONMENTS, FOLDER, one, overlay
from tests.pipeline.kfp_server import NAMESPACE, TOKEN, VERBS, KfpServer

VERSION = "filterpress-0-1-0-0123456789"
SPEC = {"root": {"inputDefinitions": {"parameters": {"max_size": {}, "seed": {}}}}}


@pytest.fixture
def kfp():
    server = KfpServer()
    made = server.add("pipelines", display_name="filterpress")
    fields = {"pipeline_id": made["pipeline_id"], "pipeline_spec": {"pipeline_spec": SPEC}}
    server.add("versions", display_name=VERSION, **fields)
    yield server
    server.close()


@pytest.fixture
def job(kfp, tmp_path):
    (tmp_path / "token").write_text(TOKEN + "\n")
    (tmp_path / "parameters.json").write_text('{"max_size": "20x"}')

    def tried(**environment):
        given = {
            **{"FILES": str(tmp_path), "TOKENS": str(tmp_path), "HOST": kfp.host},
            **{"VERSION": VERSION, "JOB": "nightly-1", "JOB_UID": "3f2a9c1b-d4e5"},
            **{
                "NAMESPACE": NAMESPACE,
                "SERVICE_ACCOUNT": "filterpress-run",
                "PATH": os.environ["PATH"],
            },
        }
        return subprocess.run(
            [sys.executable, "-IS", FOLDER / "base" / "submit.py"],
            **{"env": {**given, **environment}, "capture_output": True, "text": True},
            check=False,
        )

    return tried


def complaint(done):
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_a_job_starts_a_run_of_the_version_in_git_with_its_parameters(kfp, job):
    done = job()
    (run,) = kfp.found["runs"]
    assert done.stdout == f"{kfp.host}/#/runs/details/{run['run_id']}\n", done.stderr
    (version,) = kfp.found["versions"]
    names = ("pipeline_id", "pipeline_version_id")
    assert run["pipeline_version_reference"] == {name: version[name] for name in names}
    assert run["runtime_config"] == {"parameters": {"max_size": "20x"}}
    assert run["service_account"] == "filterpress-run"
    assert kfp.found["experiments"][0]["namespace"] == NAMESPACE


def test_a_job_that_is_tried_again_starts_no_second_run_and_the_next_job_does(kfp, job):
    assert job().stdout == job().stdout != ""
    assert job(JOB="nightly-2").returncode == 0
    assert kfp.names("runs") == ["nightly-1-3f2a9c1b", "nightly-2-3f2a9c1b"]
    assert len(kfp.found["experiments"]) == 1


def test_a_job_that_was_deleted_and_made_anew_under_its_name_starts_a_run(kfp, job):
    first, second = job(JOB="now-1"), job(JOB="now-1", JOB_UID="77aa01c2-d4e5")
    assert first.stdout != second.stdout
    assert kfp.names("runs") == ["now-1-3f2a9c1b", "now-1-77aa01c2"]


def test_a_token_is_not_sent_on_to_a_login_elsewhere(kfp, job):
    login = KfpServer()
    try:
        login.page, kfp.elsewhere = "<html>Log in</html>", login.host
        assert "does not answer as KFP does; check HOST" in complaint(job())
    finally:
        login.close()
    assert kfp.tokens == [f"Bearer {TOKEN}"]
    assert login.tokens == [None]


def test_an_installation_for_one_user_is_asked_for_no_namespace(kfp, job):
    kfp.multi_user = False
    assert job().returncode == 0
    assert "namespace" not in kfp.found["experiments"][0]


def test_a_token_that_is_refused_is_one_line_and_nothing_is_made(kfp, job, tmp_path):
    (tmp_path / "token").write_text("old")
    assert "refuses the token (401); its audience must be pipelines.kubeflow" in complaint(job())
    assert not kfp.found["experiments"]


def test_a_namespace_without_rights_is_one_line_and_no_run(kfp, job):
    kfp.forbidden = {("create", "runs")}
    line = f"allows no runs in {NAMESPACE} (403); bind the Role filterpress-submit there"
    assert line in complaint(job())
    assert not kfp.found["runs"]


def test_a_version_that_was_not_applied_is_one_line_and_nothing_is_made(kfp, job):
    assert "no version other; apply the manifests" in complaint(job(VERSION="other"))
    kfp.found["pipelines"].clear()
    assert f"no pipeline filterpress in {NAMESPACE}; apply" in complaint(job())
    assert not kfp.found["experiments"]


def test_a_parameter_that_the_pipeline_does_not_have_is_one_line(kfp, job, tmp_path):
    (tmp_path / "parameters.json").write_text('{"max_sise": "20x"}')
    assert "refuses the run: 400 unknown parameters ['max_sise']" in complaint(job())
    (tmp_path / "parameters.json").write_text("{")
    assert complaint(job()).startswith("error: Expecting property name")


def test_a_host_that_does_not_answer_as_kfp_does_is_one_line(kfp, job):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        host = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert f"{host} does not answer: [Errno 111]" in complaint(job(HOST=host))
    line = "does not answer as KFP does; check HOST"
    assert line in complaint(job(HOST="http://a:x"))
    kfp.page = "<html>Log in</html>"
    assert line in complaint(job())
    kfp.raw = b"\x00\x00\x18\x04\n"  # of a gRPC server
    assert line in complaint(job())


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_schedule_starts_the_version_of_its_own_environment(environment):
    (container,) = pod(environment, "filterpress-submit")["containers"]
    told = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert told["VERSION"] == one(overlay(environment), "PipelineVersion")["metadata"]["name"]
    assert told["SERVICE_ACCOUNT"] == "filterpress-run"
    assert told.keys() >= {"HOST", "NAMESPACE", "JOB", "JOB_UID"}
    assert re.search("@sha256:[0-9a-f]{64}$", container["image"])


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_parameters_of_an_environment_are_those_of_the_pipeline(environment):
    found = one(overlay(environment), "ConfigMap", "filterpress-parameters")
    parameters = json.loads(found["data"]["parameters.json"])
    known = inspect.signature(pipeline.PARAMETERS).parameters
    for name, value in parameters.items():
        assert type(value) is known[name].annotation, name
    given = {name: parameters.get(name, known[name].default) for name in known}
    check_spelling(given["max_size"], given["min_accuracy"])
    assert given["max_rounds"] <= pipeline.ROUNDS
    assert given["max_retrains"] <= pipeline.RETRAINS


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_store_that_is_refreshed_is_the_one_that_is_published_to(environment):
    found = one(overlay(environment), "ConfigMap", "filterpress-store")["data"]["STORE"]
    parameters = one(overlay(environment), "ConfigMap", "filterpress-parameters")["data"]
    assert json.loads(parameters["parameters.json"])["store"] == found
    (container,) = pod(environment, "filterpress-refresh")["containers"]
    assert (
        one(overlay(environment), "ConfigMap", "filterpress-store")["metadata"]["name"]
        == (container["envFrom"][0]["configMapRef"]["name"])
    )


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_every_schedule_is_one(environment):
    for found in overlay(environment):
        if found["kind"] == "CronJob":
            check_cron(found["spec"]["schedule"])


def test_the_refresh_is_a_command_that_there_is():
    (container,) = pod("prod", "filterpress-refresh")["containers"]
    _, *command = container["command"]
    flags = [word for word in container["args"] if word.startswith("--")]

    found = get_command(app)
    for word in command:
        found = found.commands[word]
    assert set(flags) <= {flag for parameter in found.params for flag in parameter.opts}


def test_no_job_waits_for_a_sidecar_to_end():
    jobs = [found for found in overlay("prod") if found["kind"] == "CronJob"]
    assert len(jobs) == 2
    for job in jobs:
        labels = job["spec"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"]
        assert labels["sidecar.istio.io/inject"] == "false"


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_schedule_changes_after_its_version_is_there_and_git_says_if_it_is_paused(environment):
    wave = "argocd.argoproj.io/sync-wave"
    job = one(overlay(environment), "CronJob", "filterpress-submit")
    version = one(overlay(environment), "PipelineVersion")
    waves = [int(found["metadata"]["annotations"][wave]) for found in (version, job)]
    assert waves[0] < waves[1]
    assert job["spec"]["suspend"] == (environment == "dev")


def test_nobody_may_read_a_secret_and_no_right_is_a_wildcard():
    for found in overlay("prod"):
        assert found["kind"] not in ("ClusterRole", "ClusterRoleBinding", "Secret")
        for rule in found.get("rules", []):
            assert "secrets" not in rule["resources"]
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]


def test_every_account_has_the_rights_that_its_work_takes():
    bound = {
        (subject["name"], binding["roleRef"]["name"])
        for binding in overlay("prod")
        if binding["kind"] == "RoleBinding"
        for subject in binding["subjects"]
    }
    assert bound == {
        ("filterpress-run", "filterpress-run"),
        ("filterpress-run", "filterpress-publish"),
        ("filterpress-refresh", "filterpress-publish"),
        ("filterpress-submit", "filterpress-submit"),
    }
    rules = one(overlay("prod"), "Role", "filterpress-publish")["rules"]
    document = (FOLDER.parent / "docs" / "publishing.md").read_text()
    written = re.findall(r"- \{apiGroups.*\}", document)
    assert rules == [yaml.safe_load(line)[0] for line in written]


def test_the_rights_of_the_submitter_are_all_that_it_takes_to_start_a_run_and_no_more(kfp, job):
    kinds = {"pipelines": "pipelines", "versions": "pipelines"} | {
        k: k for k in ("experiments", "runs")
    }
    rules = one(overlay("prod"), "Role", "filterpress-submit")["rules"]
    granted = {
        (verb, kind) for rule in rules for kind in rule["resources"] for verb in rule["verbs"]
    }
    wanted = {(verb, kind) for verb in VERBS.values() for kind in kinds}
    for number, missing in enumerate([None, *sorted(granted)]):
        kfp.found["experiments"].clear()
        kfp.forbidden = {(v, k) for v, k in wanted if (v, kinds[k]) not in granted - {missing}}
        done = job(JOB=f"nightly-{number}")
        assert (done.returncode == 0) == (missing is None), missing


def test_a_policy_of_the_network_holds_for_the_pods_of_every_job():
    policies = [found for found in overlay("prod") if found["kind"] == "NetworkPolicy"]
    selected = [found["spec"]["podSelector"].get("matchLabels", {}) for found in policies]
    for found in overlay("prod"):
        if found["kind"] == "CronJob":
            labels = found["spec"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"]
            assert any(wanted and wanted.items() <= labels.items() for wanted in selected)
    for found in policies:
        assert found["spec"]["policyTypes"] == ["Ingress", "Egress"]
        assert "ingress" not in found["spec"]


def pod(environment, name):
    job = one(overlay(environment), "CronJob", name)
    return job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
