"""TrainJobs of Kubeflow Trainer in the namespace of this pod.

Of ``trainer.kubeflow.org/v1alpha1`` only ``runtimeRef`` and ``trainer`` are used: versions 2.0 to
2.3 understand them alike. Where pods run and what they may is said by the TrainingRuntime.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from filterpress.errors import ClusterError

if TYPE_CHECKING:
    from filterpress.kubernetes_api import Api

log = logging.getLogger(__name__)
Json = dict[str, Any]

_GROUP = "trainer.kubeflow.org/v1alpha1"
_POD_OF = "jobset.sigs.k8s.io/jobset-name"  # the label; a JobSet has the name of its TrainJob
_PAUSE_S = 10.0
_PATIENCE_S = 600.0  # with an API that answers no more, and with jobs that are to go
_LIMIT_S = 7 * 24 * 3600.0
# Of containers that wait, and will for ever unless somebody does something.
_HOPELESS = frozenset({"ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"})
_SAID = _HOPELESS | {"ErrImagePull", "CreateContainerConfigError", "Unschedulable", "OOMKilled"}
_STILL = ("waiting", "terminated")  # states of a container
_ADVICE = {
    0: "the Kubernetes API does not answer; try again, or look at the network policies",
    HTTPStatus.UNAUTHORIZED: "the cluster takes this pod's token no longer; start the step again",
    HTTPStatus.FORBIDDEN: "namespace {namespace} allows no such job; manifests/components/trainer "
    "has the rights and the TrainingRuntime: apply it here",
    HTTPStatus.NOT_FOUND: "this cluster has no Kubeflow Trainer of version 2; install it, or train "
    "with nodes=1",
}


def body(name: str, image: str, args: Sequence[str], *, nodes: int, runtime: str) -> Json:
    """Describe a job.

    Args:
        name: Its name.
        image: Image of its pods.
        args: Arguments of ``torchrun``, to which the runtime says how many processes there are.
        nodes: Number of its pods.
        runtime: TrainingRuntime in the same namespace.
    """
    return {
        "apiVersion": _GROUP,
        "kind": "TrainJob",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/managed-by": "filterpress"}},
        "spec": {
            "runtimeRef": {"name": runtime, "kind": "TrainingRuntime"},
            "trainer": {
                "image": image,
                "command": ["torchrun"],
                "args": list(args),
                "numNodes": nodes,
            },
        },
    }


class HopelessError(ClusterError):
    """A job that is there, or may be, is of no use any more."""


class TrainJobs:
    """The TrainJobs of a namespace.

    Args:
        api: The API of its cluster.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._path = f"/apis/{_GROUP}/namespaces/{api.namespace}/trainjobs"
        self._pods = f"/api/v1/namespaces/{api.namespace}/pods"

    def adopt(self, name: str) -> bool:
        """Say whether there is a job to wait for; one that failed or is on its way out goes first.

        Args:
            name: Its name.

        Raises:
            ClusterError: The cluster does not answer or refuses, or has no Trainer.
        """
        job = self._get(name)
        if job and (_condition(job, "Failed") or "deletionTimestamp" in job["metadata"]):
            log.info("TrainJob %s of an earlier try goes first", name)
            self.delete(name)
            self._wait_until_gone(name)
            job = {}
        return bool(job)

    def create(self, job: Json) -> None:
        """Make a job, unless somebody has in the meantime.

        Args:
            job: What `body` returned.

        Raises:
            HopelessError: The cluster does not answer, and may have made it.
            ClusterError: The cluster refuses, or has no Trainer.
        """
        try:
            made = self._ask("POST", self._path, job, none_if=HTTPStatus.CONFLICT)
        except ClusterError as error:
            if _is_passing(error):
                raise HopelessError(str(error), error.status) from error
            raise
        name, nodes = job["metadata"]["name"], job["spec"]["trainer"]["numNodes"]
        how = f"made, for {nodes} machines" if made else "adopted"
        log.info("TrainJob %s: %s", name, how)

    def wait(self, name: str, progress: Callable[[], list[str]]) -> None:
        """Wait until a job is complete, and tell what changes.

        Args:
            name: Its name.
            progress: Says how far it is, in lines.

        Raises:
            HopelessError: It cannot go on, or takes too long.
            ClusterError: It failed; or the cluster does not answer any longer, and the job goes on.
        """
        told: list[str] = []
        end = time.monotonic() + _LIMIT_S
        while True:
            job, pods = self._patiently(lambda: self._look(name))
            lines = [*_lines(job), *_troubles(pods, _SAID), *progress()]
            for line in lines:
                if line not in told:
                    log.info("TrainJob %s: %s", name, line)
            told = lines
            if _condition(job, "Complete"):
                return
            if failed := _condition(job, "Failed"):
                raise ClusterError(f"TrainJob {name} failed: {_one_line(failed)}")
            hopeless = next(_troubles(pods, _HOPELESS), "")
            if hopeless or time.monotonic() > end:
                why = hopeless or f"it has not ended in {_LIMIT_S / 3600:g} hours"
                raise HopelessError(f"TrainJob {name} is given up: {why}")
            time.sleep(_PAUSE_S)

    def delete(self, name: str) -> None:
        """Delete a job with its pods, if there is one; it is gone once they are.

        Args:
            name: Its name.

        Raises:
            ClusterError: The cluster does not answer or refuses.
        """
        options = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Foreground"}
        self._ask("DELETE", f"{self._path}/{name}", options, none_if=HTTPStatus.NOT_FOUND)
        log.info("TrainJob %s: deleted", name)

    def this_pod(self) -> Json:
        """Return the pod that this process is in.

        Raises:
            ClusterError: The cluster does not answer or refuses.
        """
        name = os.environ.get("KFP_POD_NAME") or socket.gethostname()
        pod = self._ask("GET", f"{self._pods}/{name}", none_if=HTTPStatus.NOT_FOUND)
        if not pod:
            raise ClusterError(f"this pod is not named {name}: set KFP_POD_NAME to its name")
        return pod

    def _get(self, name: str) -> Json:
        """Return a job; nothing if there is none."""
        return self._ask("GET", f"{self._path}/{name}", none_if=HTTPStatus.NOT_FOUND)

    def _ask(self, *request: Any, **given: Any) -> Json:
        """Send a request; where the cluster refuses, say what to do."""
        try:
            return self._api.request(*request, **given)
        except ClusterError as error:
            advice = _ADVICE.get(error.status, "the cluster refuses")
            told = advice.format(namespace=self._api.namespace)
            raise ClusterError(f"{told} ({error})", error.status) from error

    def _look(self, name: str) -> tuple[Json, list[Json]]:
        """Return a job and its pods."""
        job = self._get(name)
        if not job or "deletionTimestamp" in job["metadata"]:
            raise ClusterError(
                f"TrainJob {name} was deleted by somebody else", HTTPStatus.NOT_FOUND
            )
        query = [("labelSelector", f"{_POD_OF}={name}")]
        return job, self._ask("GET", self._pods, query=query)["items"]

    def _wait_until_gone(self, name: str) -> None:
        end = time.monotonic() + _PATIENCE_S
        while self._get(name):
            if time.monotonic() > end:
                raise ClusterError(f"TrainJob {name} is deleted and does not go: look at its pods")
            time.sleep(min(1.0, _PAUSE_S))

    def _patiently(self, look: Callable[[], tuple[Json, list[Json]]]) -> tuple[Json, list[Json]]:
        """Ask again while the API has trouble of its own; the job does not depend on it."""
        end, told = time.monotonic() + _PATIENCE_S, False
        while True:
            try:
                return look()
            except ClusterError as error:
                if not _is_passing(error) or time.monotonic() > end:
                    raise
                if not told:
                    log.warning("%s", error)
                told = True
                time.sleep(_PAUSE_S)


def _is_passing(error: ClusterError) -> bool:
    """Say whether the API had trouble of its own, rather than refused."""
    return error.status in (0, HTTPStatus.TOO_MANY_REQUESTS) or error.status >= 500


def _condition(job: Json, kind: str) -> Json | None:
    """Return a condition that holds."""
    conditions = job.get("status", {}).get("conditions", [])
    return next((c for c in conditions if c["type"] == kind and c["status"] == "True"), None)


def _lines(job: Json) -> Iterator[str]:
    """Say what a job says of itself."""
    status = job.get("status", {})
    for condition in status.get("conditions", []):
        if condition["status"] == "True":
            yield f"{condition['type']}: {_one_line(condition)}"
    for jobs in status.get("jobsStatus", []):
        counts = [f"{jobs[key]} {key}" for key in ("active", "ready", "failed") if jobs.get(key)]
        if counts:
            yield f"{jobs['name']}: {', '.join(counts)}"


def _troubles(pods: Sequence[Json], reasons: frozenset[str]) -> Iterator[str]:
    """Say what keeps pods from running, if it is one of these reasons."""
    for pod in pods:
        status = pod.get("status", {})
        states = [c["state"] for c in status.get("containerStatuses", [])]
        still = [state[kind] for state in states for kind in _STILL if kind in state]
        for found in (*status.get("conditions", []), *still):
            if found.get("reason") in reasons:
                yield f"a pod does not run: {found['reason']}: {_one_line(found)}"


def _one_line(found: Json) -> str:
    return " ".join(str(found.get("message") or found.get("reason", "")).split())[:300]
