"""The API of the Kubernetes cluster that this process runs in: limited in time, errors in one line.

Importing this needs the ``kubernetes`` package, takes a while, and is of use in a pod only.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from pathlib import Path
from typing import Any

from kubernetes.client import ApiClient, ApiException, Configuration
from kubernetes.config import ConfigException
from kubernetes.config.incluster_config import InClusterConfigLoader
from urllib3.exceptions import HTTPError

from filterpress.errors import ClusterError

Json = dict[str, Any]
_TIMEOUT_S = 5


class Api:
    """The API, with the rights of a pod.

    Args:
        account: Folder of the service account: ``token``, ``ca.crt`` and ``namespace``.

    Attributes:
        namespace: The namespace of the pod.

    Raises:
        ClusterError: The folder is not complete, or this is no pod.
    """

    def __init__(self, account: Path) -> None:
        self._account = account
        self._client = self._open()
        try:
            self.namespace = (account / "namespace").read_text(encoding="utf-8").strip()
        except OSError as error:
            raise _unreadable(error) from error

    def request(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        content_type: str = "application/json",
        query: list[tuple[str, str]] | None = None,
        none_if: int = 0,
    ) -> Json:
        """Send a request; the answer is empty if its status is the one that means none.

        A token that is refused is read again, once: it may have been replaced since.

        Args:
            method: Method of HTTP.
            path: Path of the resource.
            body: What to send.
            content_type: What that is.
            query: Names and values after the path.
            none_if: Status that is no error.

        Returns:
            The object in the answer.

        Raises:
            ClusterError: The cluster does not answer or refuses.
        """
        # Not by the typed clients: those of the version that kfp allows cannot apply; and the
        # dynamic one first asks for all that a cluster has, with no limit of time.
        request: Json = {
            "query_params": query or [],
            "header_params": {"Accept": "application/json", "Content-Type": content_type},
            "body": body,
            "response_type": "object",
            "auth_settings": ["BearerToken"],
            "_return_http_data_only": True,
            "_request_timeout": (_TIMEOUT_S, _TIMEOUT_S),  # to connect, and between two bytes
        }
        try:
            answer: Json = self._send(path, method, request)
        except (ApiException, ConfigException, HTTPError, OSError) as error:
            status = getattr(error, "status", None) or 0
            if none_if and status == none_if:
                return {}
            raise ClusterError(f"cannot {method} {path}: {_reason(error)}", status) from error
        return answer

    def _send(self, path: str, method: str, request: Json) -> Any:
        try:
            return self._client.call_api(path, method, **request)
        except ApiException as error:
            if error.status != HTTPStatus.UNAUTHORIZED:
                raise
        self._client = self._open()
        return self._client.call_api(path, method, **request)

    def _open(self) -> ApiClient:
        configuration = Configuration()
        token, authority = self._account / "token", self._account / "ca.crt"
        try:
            InClusterConfigLoader(token, authority).load_and_set(configuration)
        except (ConfigException, OSError) as error:
            raise _unreadable(error) from error
        configuration.retries = False
        return ApiClient(configuration)


def _unreadable(error: Exception) -> ClusterError:
    return ClusterError(f"cannot use the service account of this pod: {error}")


def _reason(error: Exception) -> str:
    """Say in one line why a request failed; a server says it as JSON."""
    if not isinstance(error, ApiException):
        return str(error).partition("\n")[0][:200]
    try:
        return str(json.loads(error.body)["message"]).replace("\n", " ")[:400]
    except (ValueError, TypeError, KeyError):
        return f"{error.status} {error.reason}".replace("\n", " ")
