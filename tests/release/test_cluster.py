"""What a cluster is shown of a rollout, and how publishers in it take turns."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from filterpress import kubernetes_api
from filterpress.errors import ReleaseError
from filterpress.release import cluster, kube, latest, publish, publish_network, rollout
from tests.api_server import NAMESPACE, TOKEN, ApiServer
from tests.release.encoded import network, weight
from tests.release.test_rollout import release, target_of

ONE, TWO = (network(weight(0, moved)) for moved in (0, 0.05))


@pytest.fixture
def api(tmp_path):
    server = ApiServer(tmp_path)
    yield server
    server.close()


@pytest.fixture
def pod(api, tmp_path, monkeypatch):
    """The folder of the service account, as a pod has it."""
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "namespace").write_text(NAMESPACE)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api.port))
    monkeypatch.setattr(cluster, "_ACCOUNT", tmp_path)
    return tmp_path


@pytest.fixture
def place(directory, keys):
    return {"store": directory, "keys": keys}


def publish_on(place, file, **given):
    release(**place, file=file)
    return rollout.publish(target_of(file), **place, **given)


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_the_cluster_shows_what_a_channel_says(pod, api, place):
    made = publish_on(place, ONE, percent=12.5, cohorts=["test"], run="run-1")

    (shown,) = api.of("configmaps")
    assert shown["data"] == {
        "store": place["store"],
        "channel": "channels/any/stable.json",
        "release_counter": "1",
        "target": target_of(ONE),
        "sha256": made.content["sha256"],
        "n_bytes": str(len(ONE)),
        "percent": "12.5",
        "cohorts": "test",
        "not_before": "",
        "halted": "false",
        "run": "run-1",
    }
    assert shown["metadata"]["name"].startswith("filterpress-channels-any-stable-")
    (event,) = api.of("events")
    assert event["note"] == f"release 1 on any/stable, 12.5 % of the vehicles: {target_of(ONE)}"
    assert event["regarding"]["uid"] == shown["metadata"]["uid"]


def test_a_network_that_is_released_and_named_in_one_step_is_shown_too(pod, api, place):
    publish_network(ONE, name="demo", custom={}, **place, then=rollout.naming(percent=7))

    (shown,) = api.of("configmaps")
    assert (shown["data"]["percent"], len(api.of("events"))) == ("7", 1)


def test_nothing_is_shown_that_the_store_does_not_say(pod, api, place, monkeypatch):
    publish_on(place, ONE)
    api.objects.clear()
    monkeypatch.setattr("filterpress.release.transaction.commit", refuse)

    with pytest.raises(ReleaseError, match="no space"):
        rollout.ramp(50, **place)

    assert api.of("configmaps") == api.of("events") == []


def refuse(*_):
    raise ReleaseError("no space")


def test_each_change_of_a_channel_is_an_event(pod, api, place):
    publish_on(place, ONE, percent=5)
    publish_on(place, TWO)
    rollout.ramp(50, **place)
    rollout.halt(**place)
    rollout.resume(**place)
    rollout.recall(1, **place)

    told = [(event["action"], event["type"]) for event in api.of("events")]
    assert [action for action, _ in told] == [
        *("Publish", "Publish", "Ramp", "Halt", "Resume", "Recall")
    ]
    assert [action for action, kind in told if kind == "Warning"] == ["Halt"]
    (shown,) = api.of("configmaps")
    assert shown["data"]["release_counter"] == "3"


def test_what_changes_nothing_is_no_event_but_mends_the_state(pod, api, place):
    publish_on(place, ONE)
    rollout.ramp(50, **place)
    api.objects.clear()

    rollout.ramp(50, **place)

    assert api.of("events") == []
    (shown,) = api.of("configmaps")
    assert shown["data"]["percent"] == "50"


def test_fields_of_others_stay_and_ours_are_ours(pod, api, place):
    publish_on(place, ONE)
    name = api.of("configmaps")[0]["metadata"]["name"]
    by_hand = {"metadata": {"name": name, "namespace": NAMESPACE}, "data": {"approved-by": "ops"}}
    body = {"apiVersion": "v1", "kind": "ConfigMap", **by_hand}
    body["data"]["percent"] = "1"
    api.apply("configmaps", body, "kubectl", force=True)

    rollout.ramp(40, **place)

    (shown,) = api.of("configmaps")
    assert (shown["data"]["approved-by"], shown["data"]["percent"]) == ("ops", "40")


def test_stores_and_channels_share_no_object(pod, api, place, tmp_path):
    publish_on(place, ONE)
    rollout.publish(target_of(ONE), **place, channel="Stable")
    publish_on({**place, "store": str(tmp_path / "other")}, ONE)

    assert len(api.of("configmaps")) == 3
    assert len(api.of("leases")) == 2


def test_a_publisher_gives_its_turn_back(pod, api, place):
    publish_on(place, ONE)

    (lease,) = api.of("leases")
    assert lease["spec"]["holderIdentity"] == ""
    assert lease["spec"]["leaseTransitions"] == 1


def test_a_failed_publication_gives_its_turn_back(pod, api, place):
    publish_on(place, ONE)
    with pytest.raises(ReleaseError, match="no release"):
        rollout.publish(target_of(TWO), **place)

    (lease,) = api.of("leases")
    assert lease["spec"]["holderIdentity"] == ""


def test_publishers_in_a_cluster_meet_no_other(pod, api, place, monkeypatch):
    publish_on(place, ONE)
    monkeypatch.setattr(kube, "_PAUSE_S", 0.01)
    monkeypatch.setattr("filterpress.release.transaction._TRIES", 1)  # to meet is to fail

    def add(number):
        target = f"models/demo/{number}/file"
        return publish(b"%d" % number, target=target, custom={}, **place).version

    with ThreadPoolExecutor(8) as pool:
        counters = list(pool.map(add, range(8)))

    assert sorted(counters) == [2, 3, 4, 5, 6, 7, 8, 9]


def test_a_turn_waits_for_the_one_before(pod, api, monkeypatch):
    monkeypatch.setattr(kube, "_PAUSE_S", 0.01)
    order, inside = [], threading.Event()

    def wait_for_turn():
        inside.wait()
        with cluster.turn("store"):
            order.append("second")

    other = threading.Thread(target=wait_for_turn)
    other.start()
    with cluster.turn("store"):
        inside.set()
        time.sleep(0.2)
        order.append("first")
    other.join()

    assert order == ["first", "second"]


def test_the_turn_of_a_publisher_that_died_ends(pod, api, place):
    publish_on(place, ONE)
    hold(api, since=timedelta(seconds=61))

    rollout.ramp(50, **place)

    assert api.of("leases")[0]["spec"]["holderIdentity"] == ""


def test_nobody_waits_for_ever_for_a_turn(pod, api, place, monkeypatch, caplog):
    publish_on(place, ONE)
    hold(api, since=timedelta(0))
    monkeypatch.setattr(kube, "_PATIENCE_S", 0)

    changed = rollout.ramp(50, **place)

    assert changed.content["rollout"]["percent_bp"] == 5000
    assert any("not waiting any longer for the lease" in line for line in warnings_of(caplog))
    assert api.of("leases")[0]["spec"]["holderIdentity"] == "other"


def hold(api, since):
    (lease,) = api.of("leases")
    renewed = (datetime.now(UTC) - since).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    lease["spec"] |= {"holderIdentity": "other", "renewTime": renewed}


@pytest.mark.parametrize(
    ("verb", "kind"),
    [
        *[("patch", "configmaps"), ("create", "events")],
        *[("get", "leases"), ("create", "leases"), ("update", "leases")],
    ],
)
def test_a_publisher_that_may_not_tell_the_cluster_says_so_and_publishes(
    pod, api, place, root, caplog, monkeypatch, verb, kind
):
    api.forbidden = {(verb, kind)}
    monkeypatch.setattr(kube, "_PATIENCE_S", 0)

    publish_on(place, ONE)
    rollout.ramp(50, **place)

    assert rollout.read(place["store"], root=root).content["rollout"]["percent_bp"] == 5000
    assert any(f"cannot {verb} {kind}" in line for line in warnings_of(caplog))


@pytest.mark.parametrize("trouble", ["nobody listens", "other authority", "old token", "silence"])
def test_a_cluster_that_cannot_be_reached_stops_no_publication(
    pod, api, place, caplog, trouble, monkeypatch
):
    monkeypatch.setattr(kubernetes_api, "_TIMEOUT_S", 0.3)
    silent = socket.create_server(("127.0.0.1", 0))
    if trouble == "nobody listens":
        api.close()
    elif trouble == "other authority":
        other = pod / "other"
        other.mkdir()
        ApiServer(other).close()
        (pod / "ca.crt").write_bytes((other / "ca.crt").read_bytes())
    elif trouble == "old token":
        (pod / "token").write_text("old")
    else:
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(silent.getsockname()[1]))

    made = publish_on(place, ONE)

    silent.close()
    assert made.changed
    assert warnings_of(caplog)
    assert not any("\n" in line for line in warnings_of(caplog))


@pytest.mark.parametrize("lost", ["token", "ca.crt", "namespace"])
def test_half_a_service_account_is_said_in_a_line(pod, place, caplog, lost):
    (pod / lost).unlink()

    publish_on(place, ONE)

    assert any(line.startswith("cannot tell the cluster: ") for line in warnings_of(caplog))


def test_outside_a_cluster_that_is_one_line_and_no_failure(place, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(cluster, "_ACCOUNT", tmp_path / "none")
    caplog.set_level(logging.INFO, "filterpress.release.cluster")

    publish_on(place, ONE)

    said = [r.getMessage() for r in caplog.records if r.name == "filterpress.release.cluster"]
    assert said == ["no cluster to tell of channels/any/stable.json"]


def test_outside_a_cluster_nobody_needs_its_package():
    program = (
        "import sys; sys.modules['kubernetes'] = None\n"
        "from filterpress.release import rollout, cluster\n"
        "with cluster.turn('store'): pass\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_the_package_a_pod_publishes_all_the_same(pod, place, caplog, monkeypatch, root):
    monkeypatch.setitem(sys.modules, "filterpress.release.kube", None)

    publish_on(place, ONE)

    assert latest(place["store"], root=root).version == 1
    assert any("pip install 'filterpress[publish]'" in line for line in warnings_of(caplog))


@pytest.mark.parametrize(("halted", "who"), [(True, "halted"), (False, "10 % of the vehicles")])
def test_a_note_says_who_takes_part_and_is_as_long_as_an_event_takes(halted, who):
    content = {"release_counter": 3, "hardware": "any", "channel": "stable", "target": "t" * 2000}
    content["rollout"] = {"halted": halted, "percent_bp": 1000}

    note = kube.note_of(SimpleNamespace(content=content))

    assert note.startswith(f"release 3 on any/stable, {who}: tt")
    assert len(note) == 1024
