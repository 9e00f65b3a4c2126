"""Submit the pipeline to a Kubeflow cluster."""

import socket
from typing import Any

from kfp import Client
from kfp.dsl.graph_component import GraphComponent
from kfp_server_api import ApiException
from urllib3.exceptions import HTTPError

from filterpress.errors import FilterpressError


def send(
    pipeline: GraphComponent,
    arguments: dict[str, Any],
    *,
    host: str,
    experiment: str,
    namespace: str,
    token: str,
) -> str:
    """Start a run on a cluster.

    Returns:
        Address of the run.

    Raises:
        FilterpressError: The host does not answer, or refuses.
    """
    socket.setdefaulttimeout(20)  # kfp.Client sets none
    try:
        client = Client(host=host, namespace=namespace, existing_token=token or None)
        started = client.create_run_from_pipeline_func(
            pipeline, arguments=arguments, experiment_name=experiment
        )
    except ApiException as error:
        raise FilterpressError(f"{host} refused the run: {error.status} {error.reason}") from error
    except (HTTPError, OSError) as error:
        raise FilterpressError(f"{host} does not answer: {error}") from error
    return f"{host.rstrip('/')}/#/runs/details/{started.run_id}"
