"""Runs and schedules of the pipeline on a Kubeflow cluster, through the API of KFP.

A version of the pipeline is named after its content and uploaded once. Whatever a call makes before
it is refused, it takes back; where there is no answer, what was asked for may have been done.
"""

import contextlib
import http.client
import io
import json
import re
import socket
import tempfile
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import json_format
from kfp import Client, compiler
from kfp.dsl.graph_component import GraphComponent
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec
from kfp_server_api import ApiException, V2beta1Pipeline
from urllib3.exceptions import HTTPError

from components._cron import check_cron
from components._manifests import read_ir, version_name
from filterpress.errors import FilterpressError

TIMEOUT_SECONDS = 20
_ADDRESS = re.compile(
    r"https?://(?:\[[0-9a-fA-F:]+\]|[a-zA-Z0-9_-]+(?:\.[a-zA-Z0-9_-]+)*)(?::[0-9]{1,5})?(?:/[!-~]*)?"
)


class Cluster(NamedTuple):
    """Where runs go.

    Attributes:
        host: Address of the KFP API.
        experiment: Experiment of the runs; it is made when it is new.
        namespace: Namespace of the runs, on a cluster with users.
        token: Bearer token, where the API wants one.
        account: Service account of the steps; empty for the cluster's own choice.
    """

    host: str
    experiment: str
    namespace: str
    token: str = ""
    account: str = ""


class Version(NamedTuple):
    """A version of the pipeline that is on the cluster."""

    pipeline_id: str
    version_id: str


def send(pipeline: GraphComponent, arguments: dict[str, Any], cluster: Cluster) -> str:
    """Start a run.

    Args:
        pipeline: Pipeline.
        arguments: Its parameters.
        cluster: Where to.

    Returns:
        Address of the run.

    Raises:
        ValueError: The host is no address.
        FilterpressError: The host does not answer, or refuses.
    """
    with _connected(cluster) as (client, namespace), _taken_back() as undo:
        experiment_id = _experiment(client, cluster.experiment, namespace, undo)
        version = _upload(client, pipeline, namespace, undo)
        started = client.run_pipeline(
            experiment_id,
            f"{pipeline.name} {datetime.now(UTC):%Y-%m-%d %H-%M-%S}",
            params=arguments,
            **version._asdict(),
            service_account=cluster.account or None,
        )
    return f"{cluster.host.rstrip('/')}/#/runs/details/{started.run_id}"


def set_schedule(
    pipeline: GraphComponent, arguments: dict[str, Any], cron: str, cluster: Cluster
) -> None:
    """Start a run on a schedule from now on, in place of the schedule that the experiment has.

    Args:
        pipeline: Pipeline.
        arguments: Its parameters.
        cron: When, in the cluster's time zone.
        cluster: Where.

    Raises:
        ValueError: The line of cron is wrong, or the host is no address.
        FilterpressError: The host does not answer, or refuses.
    """
    check_cron(cron)
    with _connected(cluster) as (client, namespace), _taken_back() as undo:
        experiment_id = _experiment(client, cluster.experiment, namespace, undo)
        version = _upload(client, pipeline, namespace, undo)
        before = _schedules(client, experiment_id)
        made = client.create_recurring_run(
            experiment_id,
            pipeline.name,
            cron_expression=f"0 {cron}",  # KFP counts seconds too
            no_catchup=True,
            params=arguments,
            **version._asdict(),
            service_account=cluster.account or None,
        )
        _later(undo, client.delete_recurring_run, made.recurring_run_id)
        for old in before:
            client.delete_recurring_run(old.recurring_run_id)


def read_schedule(cluster: Cluster) -> list[dict[str, Any]]:
    """Say when runs of an experiment start.

    Args:
        cluster: Where.

    Returns:
        The line of cron, whether it holds, the version that is run and what it is told; none if
        there is no schedule.

    Raises:
        ValueError: The host is no address.
        FilterpressError: The host does not answer, or refuses.
    """
    with _connected(cluster) as (client, namespace):
        found = _named(client.list_experiments, "experiments", cluster.experiment, namespace)
        return [
            {
                "cron": schedule.trigger.cron_schedule.cron.removeprefix("0 "),
                "state": f"{schedule.mode}D".lower(),
                "version": _shown_version(client, schedule.pipeline_version_reference),
                "parameters": getattr(schedule.runtime_config, "parameters", None) or {},
            }
            for schedule in (_schedules(client, found.experiment_id) if found else ())
        ]


def remove_schedule(cluster: Cluster) -> int:
    """Start no more runs of an experiment on a schedule; runs that have started go on.

    Args:
        cluster: Where.

    Returns:
        How many schedules there were.

    Raises:
        ValueError: The host is no address.
        FilterpressError: The host does not answer, or refuses.
    """
    with _connected(cluster) as (client, namespace):
        found = _named(client.list_experiments, "experiments", cluster.experiment, namespace)
        schedules = _schedules(client, found.experiment_id) if found else []
        for schedule in schedules:
            client.delete_recurring_run(schedule.recurring_run_id)
        return len(schedules)


def _experiment(client: Client, name: str, namespace: str, undo: contextlib.ExitStack) -> str:
    found = _named(client.list_experiments, "experiments", name, namespace)
    if found is None:
        found = client.create_experiment(name, namespace=namespace or None)
        _later(undo, client.delete_experiment, found.experiment_id)
    return found.experiment_id


def _upload(
    client: Client, pipeline: GraphComponent, namespace: str, undo: contextlib.ExitStack
) -> Version:
    """Have the pipeline on the cluster, under the name of its content."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(file))
        ir = read_ir(file)
        name = version_name(ir)
        there = _named(client.list_pipelines, "pipelines", pipeline.name, namespace)
        if there is None:
            new = V2beta1Pipeline(
                name=pipeline.name, display_name=pipeline.name, namespace=namespace or None
            )
            there = client.pipelines.pipeline_service_create_pipeline(new)
            _later(undo, client.delete_pipeline, there.pipeline_id)
        versions = _lister(client.list_pipeline_versions, there.pipeline_id)
        found = _named(versions, "pipeline_versions", name)
        if found is None:
            found = client.upload_pipeline_version(str(file), name, pipeline_id=there.pipeline_id)
            made = there.pipeline_id, found.pipeline_version_id
            _later(undo, client.delete_pipeline_version, *made)
        elif not _is(found.pipeline_spec, ir):
            raise FilterpressError(
                f"version {name} of {pipeline.name} exists with other content: somebody used its "
                "name; delete that version in the UI, and try again"
            )
        return Version(there.pipeline_id, found.pipeline_version_id)


def _is(there: dict[str, Any], ours: dict[str, Any]) -> bool:
    """Compare as messages: a cluster may write the same content otherwise."""
    found = there.get("pipeline_spec", there)  # bare where there is nothing for one platform
    try:
        message = json_format.ParseDict(found, PipelineSpec(), ignore_unknown_fields=True)
    except json_format.ParseError:
        return False
    if there.get("platform_spec", {}) != ours.get("platformSpec", {}):
        return False
    return message == json_format.ParseDict(ours["pipelineSpec"], PipelineSpec())


def _schedules(client: Client, experiment_id: str) -> list[Any]:
    found = client.list_recurring_runs(experiment_id=experiment_id, page_size=100)
    return [schedule for schedule in found.recurring_runs or [] if schedule.trigger.cron_schedule]


def _shown_version(client: Client, reference: Any | None) -> str:
    """Name what a schedule runs, which somebody else may have set in the UI, or deleted since."""
    if reference is None:
        return "its own"
    if not reference.pipeline_version_id:
        return "the newest"
    try:
        found = client.get_pipeline_version(reference.pipeline_id, reference.pipeline_version_id)
    except ApiException as error:
        if error.status != 404:
            raise
        return "deleted"
    return found.display_name


def _lister(listing: Callable[..., Any], pipeline_id: str) -> Callable[..., Any]:
    return lambda **query: listing(pipeline_id, **query)


def _named(listing: Callable[..., Any], key: str, name: str, namespace: str = "") -> Any | None:
    """Return what has a name, if anything has."""
    wanted = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
    query = {"namespace": namespace} if namespace else {}
    found = listing(filter=json.dumps({"predicates": [wanted]}), **query)
    return next(iter(getattr(found, key) or ()), None)


@contextlib.contextmanager
def _taken_back() -> Iterator[contextlib.ExitStack]:
    """Undo on a refusal; a request that got no answer may have started a run of what was made."""
    undo = contextlib.ExitStack()
    try:
        yield undo
    except (ApiException, FilterpressError):
        undo.close()
        raise


def _later(undo: contextlib.ExitStack, remove: Callable[..., Any], *which: str) -> None:
    """Remove something if what follows fails; where that fails as well, it stays."""

    def quietly() -> None:
        with contextlib.suppress(ApiException, HTTPError, OSError):
            remove(*which)

    undo.callback(quietly)


@contextlib.contextmanager
def _connected(cluster: Cluster) -> Iterator[tuple[Client, str]]:
    """Talk to a cluster, and say in one line what it objects to.

    Yields the client, and the namespace, which is empty on a cluster without users.
    """
    host, token = cluster.host.rstrip("/"), cluster.token
    if not _ADDRESS.fullmatch(host):
        raise ValueError(f"host must be an address like http://localhost:8888, got {host!r}")
    namespace = cluster.namespace if _knock(cluster) else ""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_SECONDS)  # kfp.Client sets none
    try:
        # It prints an address of each thing that it makes.
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield Client(host=host, existing_token=token or None), namespace
    except ApiException as error:
        message = _refusal(cluster, error.status, error.body, error.reason)
        raise FilterpressError(message) from error
    except (HTTPError, OSError) as error:
        raise FilterpressError(
            f"{host} does not answer any more: {error}; look in the UI for what was begun, then "
            "try again"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _knock(cluster: Cluster) -> bool:
    """Find out at once what kfp.Client finds out after five attempts, and if there are users."""
    host = cluster.host.rstrip("/")
    request = urllib.request.Request(f"{host}/apis/v2beta1/healthz")
    if cluster.token:
        # Not sent on to a login elsewhere.
        request.add_unredirected_header("Authorization", f"Bearer {cluster.token}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            return bool(json.load(answer).get("multi_user"))
    except urllib.error.HTTPError as error:
        raise FilterpressError(_refusal(cluster, error.code, error.read(), error.reason)) from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise FilterpressError(
            f"{host} does not answer: {reason}; check --host, or forward a port to it: "
            "kubectl port-forward -n kubeflow svc/ml-pipeline 8888"
        ) from error
    except (ValueError, http.client.HTTPException) as error:
        raise FilterpressError(
            f"{host} answers, but not as the API of KFP: check the port of --host, and where there "
            "is a login before it, give --token-file"
        ) from error


def _refusal(cluster: Cluster, status: int, body: bytes | str | None, reason: str) -> str:
    """Say what a refusal means, and what to do."""
    try:
        said = json.loads(body or "")["message"]
    except (ValueError, KeyError, TypeError):
        said = reason
    host = cluster.host.rstrip("/")
    if status == 401:
        return (
            f"{host} refuses the token (401 {said}): write a new one into --token-file, such as "
            "that of kubectl create token NAME --audience pipelines.kubeflow.org"
        )
    if status == 403:
        return (
            f"{host} does not allow this in namespace {cluster.namespace} (403 {said}): have your "
            "account bound to kubeflow-pipelines-edit there, or name another --namespace"
        )
    return f"{host} refused the run: {status} {said}"
