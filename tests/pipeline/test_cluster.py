"""Runs and schedules on a cluster: what is made there, once, and what is taken back."""

import json
import socket

import pytest
from typer.testing import CliRunner

import pipeline
from components._cron import check_cron
from components._ir import check_image
from tests.pipeline.kfp_server import NAMESPACE, TOKEN, KfpServer

SMALL = ["--max-rounds", "1", "--max-retrains", "0", "--size-tries", "1"]
IMAGE = "registry.example/filterpress-python@sha256:" + "0" * 64
KINDS = ["pipelines", "versions", "experiments", "runs", "recurringruns"]


@pytest.fixture
def kfp():
    server = KfpServer()
    yield server
    server.close()


@pytest.fixture
def call(kfp, tmp_path):
    (tmp_path / "token").write_text(TOKEN + "\n")

    def call(command, *flags, host=kfp.host, namespace=NAMESPACE):
        where = ["--host", host, "--namespace", namespace]
        where += ["--token-file", str(tmp_path / "token")]
        return CliRunner().invoke(pipeline.app, [command, *where, *SMALL, "--image", IMAGE, *flags])

    return call


def made(kfp):
    return {kind: len(kfp.found[kind]) for kind in KINDS}


def complaint(done):
    assert done.exit_code == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def shown(call):
    done = call("schedule", "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)["schedules"]


def test_a_run_is_of_a_version_that_is_named_after_its_content(kfp, call):
    done = call("submit", "--max-size", "20x", "--service-account", "filterpress-run")
    (run,) = kfp.found["runs"]
    assert done.stdout == f"{kfp.host}/#/runs/details/{run['run_id']}\n", done.stderr
    assert done.stderr == ""
    (version,) = kfp.found["versions"]
    reference = run["pipeline_version_reference"]
    assert reference["pipeline_version_id"] == version["pipeline_version_id"]
    assert run["runtime_config"]["parameters"]["max_size"] == "20x"
    assert run["service_account"] == "filterpress-run"
    assert kfp.found["experiments"][0]["namespace"] == NAMESPACE


def test_the_same_pipeline_is_uploaded_once_and_another_one_beside_it(kfp, call):
    for _ in range(2):
        assert call("submit").exit_code == 0
    assert made(kfp) | {"runs": 0} == dict.fromkeys(KINDS[:3], 1) | {"runs": 0, "recurringruns": 0}
    assert call("submit", "--image", IMAGE.replace("0", "1")).exit_code == 0
    assert made(kfp)["versions"] == 2
    assert len(set(kfp.names("versions"))) == 2
    assert made(kfp)["pipelines"] == 1


def test_an_installation_for_one_user_is_asked_for_no_namespace(kfp, call):
    kfp.multi_user = False
    assert call("submit").exit_code == 0
    assert not kfp.found["experiments"][0].get("namespace")


@pytest.mark.parametrize("part", ["pipeline_spec", "platform_spec", "sdkVersion"])
def test_a_version_with_other_content_is_one_line_and_no_run(kfp, call, part):
    call("submit")
    (version,) = kfp.found["versions"]
    if part == "sdkVersion":
        version["pipeline_spec"] = {part: {"no": "pipeline"}}
    else:
        version["pipeline_spec"][part].popitem()
    kfp.found["runs"].clear()
    line = complaint(call("submit"))
    assert f"version {version['display_name']} of filterpress exists with other content" in line
    assert "delete that version in the UI" in line
    assert not kfp.found["runs"]


def test_content_that_a_cluster_writes_otherwise_is_the_same(kfp, call):
    call("submit")
    (version,) = kfp.found["versions"]
    ours = json.dumps(version["pipeline_spec"])
    assert "0.0" in ours
    version["pipeline_spec"] = json.loads(ours, parse_float=lambda text: int(float(text)))
    assert call("submit").exit_code == 0
    assert made(kfp)["versions"] == 1


@pytest.mark.parametrize("command", [["submit"], ["schedule", "--cron", "0 2 * * *"], ["schedule"]])
def test_what_a_cluster_refuses_is_one_line_that_says_what_to_do(kfp, call, command, tmp_path):
    kfp.forbidden = {(verb, kind) for verb in ("list", "create") for kind in KINDS}
    line = complaint(call(*command))
    assert f"does not allow this in namespace {NAMESPACE} (403 may not list experiments)" in line
    assert "bound to kubeflow-pipelines-edit there, or name another --namespace" in line
    (tmp_path / "token").write_text("old")
    line = complaint(call(*command))
    assert "refuses the token (401 Unauthenticated): write a new one into --token-file" in line
    assert made(kfp) == dict.fromkeys(KINDS, 0)


@pytest.mark.parametrize("denied", ["experiments", "pipelines", "versions", "runs"])
def test_a_run_that_is_refused_leaves_nothing_behind(kfp, call, denied):
    kfp.forbidden = {("create", denied)}
    assert f"(403 may not create {denied})" in complaint(call("submit"))
    assert made(kfp) == dict.fromkeys(KINDS, 0)


def test_a_run_that_is_refused_leaves_what_was_there(kfp, call):
    call("submit")
    before = made(kfp)
    kfp.forbidden = {("create", "runs")}
    complaint(call("submit"))
    assert made(kfp) == before


def test_what_cannot_be_taken_back_hides_no_refusal(kfp, call):
    kfp.forbidden = {("create", "runs"), ("delete", "versions")}
    assert "(403 may not create runs)" in complaint(call("submit"))


def test_another_namespace_is_refused_by_name(kfp, call):
    assert "in namespace others (403" in complaint(call("submit", namespace="others"))
    assert made(kfp) == dict.fromkeys(KINDS, 0)


@pytest.mark.parametrize("command", [["submit"], ["schedule"], ["schedule", "--remove"]])
def test_a_host_that_does_not_answer_is_one_line(call, command):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        host = f"http://127.0.0.1:{closed.getsockname()[1]}"
        line = complaint(call(*command, host=host))
    assert f"{host} does not answer: [Errno 111] Connection refused; check --host" in line


@pytest.mark.parametrize(
    "host", ["localhost:8888", "http://", "http://a:b", "http://a b", "http://a..b", "ftp://a"]
)
def test_an_address_that_is_none_is_one_line(call, host):
    assert "host must be an address like http://localhost:8888" in complaint(
        call("schedule", host=host)
    )


@pytest.mark.parametrize("host", ["http://[::1]:1", "http://127.0.0.1:1/pipeline/", "http://a_b:1"])
def test_an_address_that_is_one_is_tried(call, host):
    assert "does not answer: " in complaint(call("schedule", host=host))


def test_a_port_of_something_else_is_one_line(kfp, call):
    kfp.raw = b"\x00\x00\x18\x04\n"  # of a gRPC server
    line = complaint(call("submit"))
    assert f"{kfp.host} answers, but not as the API of KFP: check the port of --host" in line


def test_a_login_before_the_api_is_one_line(kfp, call):
    kfp.page = "<html>Log in</html>"
    assert "answers, but not as the API of KFP" in complaint(call("submit"))


@pytest.mark.parametrize("command", [["submit"], ["schedule", "--cron", "0 2 * * *"]])
@pytest.mark.parametrize(
    "image",
    [
        "filterpress-python:0.1.0",
        "registry.example/filterpress-python@sha256:12",
        "registry.example/filterpress-python@sha256:" + "G" * 64,
        "registry.example/Filterpress@sha256:" + "0" * 64,
        "https://registry.example/filterpress-python@sha256:" + "0" * 64,
        "two words@sha256:" + "0" * 64,
        "@sha256:" + "0" * 64,
    ],
)
def test_an_image_that_a_cluster_cannot_pull_is_one_line_and_the_cluster_is_not_asked(
    kfp, call, command, image
):
    line = complaint(call(*command, "--image", image))
    assert "image must be a repository and a digest, registry.example/filterpress-python@" in line
    assert line.endswith(f"got {image!r}")
    assert kfp.asked == []


@pytest.mark.parametrize("command", [["submit"], ["schedule", "--cron", "0 2 * * *"]])
@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (["--max-size", "12 y"], "max_size must be"),
        (["--prune-config", '{"method": "nosuch"}'], "method must be"),
        (["--store", "gs://bucket/models"], "keys must name the folder of signing keys for gs://"),
    ],
)
def test_what_a_step_would_refuse_is_refused_before_the_cluster_is_asked(
    kfp, call, command, flags, rule
):
    assert rule in complaint(call(*command, *flags))
    assert kfp.asked == []


@pytest.mark.parametrize(
    "image", ["a", "a.b/c", "localhost:5000/a/b_c-d", "registry.example/a--b/c__d:v1.0"]
)
def test_an_image_with_a_digest_is_taken(image):
    check_image(f"{image}@sha256:{'0' * 64}")


def test_what_got_no_answer_may_run_and_is_left_as_it_is(kfp, call):
    kfp.silent = {("create", "runs")}
    line = complaint(call("submit"))
    assert f"{kfp.host} does not answer any more: " in line
    assert "look in the UI for what was begun, then try again" in line
    assert made(kfp) == dict.fromkeys(KINDS[:4], 1) | {"recurringruns": 0}


def test_a_token_is_not_sent_on_to_a_login_elsewhere(kfp, call):
    login = KfpServer()
    try:
        login.page, kfp.elsewhere = "<html>Log in</html>", login.host
        assert "answers, but not as the API of KFP" in complaint(call("submit"))
    finally:
        login.close()
    assert kfp.tokens == [f"Bearer {TOKEN}"]
    assert login.tokens == [None]


@pytest.mark.parametrize("text", ["ey1\ney2", "ey1 ey2", "ey\u2026"])
def test_a_file_that_is_no_token_is_one_line_without_what_is_in_it(kfp, call, tmp_path, text):
    (tmp_path / "token").write_text(text, encoding="utf-8")
    line = complaint(call("submit"))
    assert (
        line == f"error: token_file must hold one token and nothing else, got {tmp_path / 'token'}"
    )
    assert kfp.asked == []


def test_a_token_file_that_is_missing_is_one_line(call, tmp_path):
    (tmp_path / "token").unlink()
    assert "No such file or directory" in complaint(call("submit"))


def test_a_schedule_is_shown_changed_and_removed(kfp, call):
    assert shown(call) == "none"
    first = call("schedule", "--cron", "0 2 * * *", "--max-size", "20x")
    assert first.exit_code == 0, first.stderr
    (schedule,) = kfp.found["recurringruns"]
    assert schedule["trigger"]["cron_schedule"]["cron"] == "0 0 2 * * *"
    assert schedule["no_catchup"]
    assert schedule["max_concurrency"] == 1
    (row,) = shown(call)
    assert row["cron"] == "0 2 * * *"
    assert row["state"] == "enabled"
    assert row["version"] == kfp.names("versions")[0]
    assert row["parameters"] == "max_size=20x max_rounds=1 max_retrains=0"
    call("schedule", "--cron", "30 4 * * 1-5")
    (row,) = shown(call)
    assert row["cron"] == "30 4 * * 1-5"
    assert row["cron"] in call("schedule").stdout
    assert call("schedule", "--remove").exit_code == call("schedule", "--remove").exit_code == 0
    assert shown(call) == "none"
    assert not kfp.found["recurringruns"]


@pytest.mark.parametrize(
    ("reference", "version"),
    [
        (None, "its own"),
        ({"pipeline_id": "pipelines-2"}, "the newest"),
        ({"pipeline_id": "pipelines-2", "pipeline_version_id": "gone"}, "deleted"),
    ],
)
def test_a_schedule_that_somebody_set_in_the_ui_is_shown_too(kfp, call, reference, version):
    call("schedule", "--cron", "0 2 * * *")
    (schedule,) = kfp.found["recurringruns"]
    schedule["pipeline_version_reference"] = reference
    del schedule["runtime_config"]
    (row,) = shown(call)
    assert (row["version"], row["parameters"]) == (version, "")


def test_a_schedule_of_another_experiment_stays(kfp, call):
    for experiment in ("one", "two"):
        call("schedule", "--cron", "0 2 * * *", "--experiment", experiment)
    call("schedule", "--remove", "--experiment", "one")
    (left,) = kfp.found["recurringruns"]
    (two,) = [e for e in kfp.found["experiments"] if e["display_name"] == "two"]
    assert left["experiment_id"] == two["experiment_id"]


@pytest.mark.parametrize("denied", [("create", "recurringruns"), ("delete", "recurringruns")])
def test_a_schedule_that_cannot_be_changed_stays_as_it_was(kfp, call, denied):
    call("schedule", "--cron", "0 2 * * *")
    before = made(kfp)
    kfp.forbidden = {denied}
    line = complaint(call("schedule", "--cron", "30 4 * * *", "--image", IMAGE.replace("0", "1")))
    assert f"(403 may not {' '.join(denied)})" in line
    assert "0 0 2 * * *" in [
        r["trigger"]["cron_schedule"]["cron"] for r in kfp.found["recurringruns"]
    ]
    if denied[0] == "create":
        assert made(kfp) == before


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("nightly", "cron must be minute hour day month weekday"),
        ("0 0 2 * * *", "cron must be minute hour day month weekday"),
        ("60 2 * * *", "minute of cron must be numbers from 0 to 59, got '60'"),
        ("0 2-1 * * *", "hour of cron must be numbers from 0 to 23, got '2-1'"),
        ("0 2 0 * *", "day of cron must be"),
        ("0 2 * 1,13 *", "month of cron must be"),
        ("0 2 * * 7", "weekday of cron must be numbers from 0 to 6"),
        ("0 */0 * * *", "hour of cron must be"),
        ("0 2 * * MON", "weekday of cron must be"),
        ("0 -1 * * *", "hour of cron must be"),
        ("0 \u0662 * * *", "hour of cron must be"),
        ("0 2 30 2 *", "day of cron must be one that its months have, got '0 2 30 2 *'"),
        ("0 2 31 4-6/2,11 *", "day of cron must be one that its months have"),
    ],
)
def test_a_wrong_line_of_cron_is_one_line_and_the_cluster_is_not_asked(kfp, call, line, rule):
    assert rule in complaint(call("schedule", "--cron", line))
    assert kfp.asked == []


@pytest.mark.parametrize(
    "line",
    [
        *("0 2 * * *", "*/15 0-6,22 1 1-12/2 0", "5,10-20/5 * * * 6", "0 2 29 2 *"),
        *("0 2 31 4/3 *", "0 2 31 2,3 *", "0 2 28,30 2 *", "0 2 30 2 1"),
    ],
)
def test_a_right_line_of_cron_is_taken(line):
    check_cron(line)


def test_a_schedule_is_changed_or_removed_but_not_both(kfp, call):
    line = complaint(call("schedule", "--cron", "0 2 * * *", "--remove"))
    assert "remove must go without cron, got '0 2 * * *'" in line
    assert kfp.asked == []
