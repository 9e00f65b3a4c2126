"""Submit the pipeline to a Kubeflow cluster."""

import socket
import urllib.error
import urllib.request
import warnings
from typing import Any

from kfp import Client
from kfp.dsl.graph_component import GraphComponent
from kfp_server_api import ApiException
from urllib3.exceptions import HTTPError

from filterpress.errors import FilterpressError

TIMEOUT_SECONDS = 20


def send(
    pipeline: GraphComponent,
    arguments: dict[str, Any],
    *,
    host: str,
    experiment: str,
    namespace: str,
    token: str = "",
) -> str:
    """Start a run on a cluster.

    Args:
        pipeline: Pipeline.
        arguments: Its parameters.
        host: Address of the KFP API.
        experiment: Experiment of the run; it is made when it is new.
        namespace: Namespace of the run, on a cluster with users.
        token: Bearer token, where the API wants one.

    Returns:
        Address of the run.

    Raises:
        ValueError: The host is no address.
        FilterpressError: The host does not answer, or refuses.
    """
    if not host.startswith(("http://", "https://")):
        raise ValueError(f"host must be an address like http://localhost:8888, got {host!r}")
    _knock(host, token)
    socket.setdefaulttimeout(TIMEOUT_SECONDS)  # kfp.Client sets none
    try:
        with warnings.catch_warnings(action="ignore"):
            client = Client(host=host, namespace=namespace, existing_token=token or None)
            started = client.create_run_from_pipeline_func(
                pipeline, arguments=arguments, experiment_name=experiment
            )
    except ApiException as error:
        raise FilterpressError(f"{host} refused the run: {error.status} {error.reason}") from error
    except (HTTPError, OSError) as error:
        raise FilterpressError(f"{host} does not answer: {error}") from error
    return f"{host.rstrip('/')}/#/runs/details/{started.run_id}"


def _knock(host: str, token: str) -> None:
    """Find out at once what kfp.Client would find out after five attempts."""
    request = urllib.request.Request(f"{host.rstrip('/')}/apis/v2beta1/healthz")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError as error:
        raise FilterpressError(f"{host} refused the run: {error.code} {error.reason}") from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise FilterpressError(f"{host} does not answer: {reason}") from error
