"""Several machines, by a TrainJob; packages go there and come back through scratch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filterpress.checkpoints import told_of
from filterpress.errors import ClusterError, ScratchError
from filterpress.launching.trainjob import HopelessError, TrainJobs, body
from filterpress.launching.work import ERROR, OUT, Work
from filterpress.scratch import Scratch, open_scratch

Json = dict[str, Any]
log = logging.getLogger(__name__)

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")  # in every pod
_RUN = "workflows.argoproj.io/workflow"  # the label of KFP's steps that names their run
_MODULE = "filterpress.node"


def train_on_machines(work: Work, out: Path, nodes: int, runtime: str) -> None:
    """Run a stage on machines of the cluster that this process is in a pod of.

    Whoever tries the same work again in the same run finds the same job, and waits for it.

    Args:
        work: The stage and its arguments, ``scratch`` among them.
        out: Package to write.
        nodes: How many machines.
        runtime: TrainingRuntime in the namespace of the pod.

    Raises:
        ClusterError: There is no cluster, or it refuses or does not answer; or the job failed.
        ScratchError: Scratch cannot be used.
    """
    scratch = open_scratch(work.settings["scratch"])
    jobs = _open_jobs()
    pod = jobs.this_pod()
    image, run = _image(pod), pod["metadata"].get("labels", {}).get(_RUN, "")
    name = work.name(nodes=nodes, runtime=runtime, image=image, run=run)
    try:
        if jobs.adopt(name):
            log.info("TrainJob %s: adopted", name)
        else:
            with _cleared(work, scratch, name):
                args = ["-m", _MODULE, scratch.uri, name, work.put(scratch, name)]
                jobs.create(body(name, image, args, nodes=nodes, runtime=runtime))
        _wait(jobs, work, scratch, name)
    except (KeyboardInterrupt, SystemExit, HopelessError):
        _remove(jobs, work, scratch, name)
        raise
    there = scratch.get(f"{name}/{OUT}", out)
    _remove(jobs, work, scratch, name)
    if not there:
        raise ClusterError(f"TrainJob {name} was complete and left no package in {scratch.uri}")


def _open_jobs() -> TrainJobs:
    if not _ACCOUNT.is_dir():
        raise ClusterError(
            "nodes above 1 needs a pod of a Kubernetes cluster with Kubeflow Trainer; "
            "here, train with nodes=1"
        )
    try:
        from filterpress.kubernetes_api import Api
    except ImportError as error:
        raise ClusterError(
            "nodes above 1 needs kubernetes: pip install 'filterpress[publish]'"
        ) from error
    return TrainJobs(Api(_ACCOUNT))


def _image(pod: Json) -> str:
    """Return the image of a pod's ``main`` container, as KFP names it, or of its first."""
    containers = pod["spec"]["containers"]
    return str(next((c for c in containers if c["name"] == "main"), containers[0])["image"])


@contextmanager
def _cleared(work: Work, scratch: Scratch, name: str) -> Iterator[None]:
    """Begin with nothing that machines left, and leave no trace of the work if the block fails."""
    work.forget(scratch, name)
    try:
        yield
    except BaseException:
        work.clear(scratch, name)
        raise


def _wait(jobs: TrainJobs, work: Work, scratch: Scratch, name: str) -> None:
    """Wait for a job; if it fails, say what its machines said first."""
    try:
        jobs.wait(name, lambda: _epochs(scratch, work.training))
    except HopelessError:
        raise
    except ClusterError as error:
        if said := _error(scratch, name):
            raise ClusterError(f"{said} ({error})", error.status) from error
        raise


def _remove(jobs: TrainJobs, work: Work, scratch: Scratch, name: str) -> None:
    """Delete a job and what it was given; where that fails, say who is left to do it."""
    try:
        jobs.delete(name)
        work.clear(scratch, name)
    except (ClusterError, ScratchError) as error:
        log.warning("delete TrainJob %s and %s/%s by hand: %s", name, scratch.uri, name, error)


def _epochs(scratch: Scratch, training: str) -> list[str]:
    """Say how far a training is, or that nobody can tell."""
    try:
        told = told_of(training, scratch)
    except ScratchError as error:
        return [str(error)]
    if told is None:
        return []
    return [f"epoch {told['epoch']} of {told['epochs']}: validation {told['scores'][-1]:.4f}"]


def _error(scratch: Scratch, name: str) -> str:
    """Read what the first machine that failed said; nothing if it did not, or cannot be heard."""
    try:
        return (scratch.read(f"{name}/{ERROR}") or b"").decode()
    except ScratchError as error:
        log.warning("%s", error)
        return ""
