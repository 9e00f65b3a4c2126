"""A cluster with Kubeflow Trainer: what a TrainJob asks for is done, or what a test says."""

import os
import socket
import subprocess
import sys
import threading
import time

from tests.api_server import ApiServer, RefusedError
from tests.tiny import ROOT

POD = "train-pod"
IMAGE = "registry.example/filterpress-python@sha256:" + "1" * 64


def step_pod():
    """The pod of a step, as KFP makes it: the container of the stage is not the first."""
    containers = [{"name": "wait", "image": "argoexec"}, {"name": "main", "image": IMAGE}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": POD, "labels": {"workflows.argoproj.io/workflow": "run-1"}},
        "spec": {"containers": containers},
    }


class TrainerServer(ApiServer):
    """An API server whose TrainJobs do something.

    Attributes:
        play: Called in a thread with each job that is made.
        lingers: Seconds that a deleted job takes to go.
        instead: Status that is answered although the job is made.
        made: Jobs that were made, in order.
        deleted: Names of jobs that were deleted, in order.
    """

    kinds = ApiServer.kinds | {"trainjobs"}

    def __init__(self, folder, play=lambda server, job: None):
        super().__init__(folder)
        self.play, self.lingers, self.instead, self.made, self.deleted = play, 0.0, 0, [], []
        self.objects["pods", POD] = step_pod()

    def _create(self, where, body, *rest):
        if body["spec"]["runtimeRef"]["name"] != "filterpress":
            denied = 'admission webhook "validator.trainjob" denied the request: spec.runtimeRef'
            raise RefusedError(403, "Forbidden", f"{denied}: TrainingRuntime is not found")
        job = super()._create(where, body, *rest)
        self.made.append(job)
        threading.Thread(target=self.play, args=(self, job), daemon=True).start()
        if self.instead:
            raise RefusedError(self.instead, "Trouble", "the server is in trouble")
        return job

    def _delete(self, where, options, *_):
        assert options["propagationPolicy"] == "Foreground", "its pods would outlive it"
        job = self._get(where)
        job["metadata"]["deletionTimestamp"] = "now"
        self.deleted.append(where[1])
        threading.Timer(self.lingers, lambda: self.objects.pop(where, None)).start()
        return job

    def tell(self, job, **status):
        """Set what a job says of itself."""
        job["status"] = job.get("status", {}) | status

    def end(self, job, kind, message=""):
        """Set the condition that ends a job."""
        condition = {"type": kind, "status": "True", "reason": "JobSet", "message": message}
        self.tell(job, conditions=[condition])


def run_for_real(server, job):
    """Run the command of a job, one torchrun for each node, as Trainer's policy for torch does."""
    spec = job["spec"]["trainer"]
    assert spec["command"] == ["torchrun"]
    nodes = spec["numNodes"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job["status"] = {"jobsStatus": [{"name": "node", "active": nodes, "ready": nodes}]}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *spec["args"]],
            cwd=ROOT,
            env=os.environ
            | {"PET_NNODES": str(nodes), "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": str(rank)}
            | {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
            | {"CUDA_VISIBLE_DEVICES": ""},
        )
        for rank in range(nodes)
    ]
    while any(process.poll() is None for process in started):
        if "deletionTimestamp" in job["metadata"]:
            for process in started:
                process.terminate()
        time.sleep(0.05)
    failed = any(process.returncode for process in started)
    message = "jobset failed due to one or more job failures" if failed else "jobset completed"
    server.end(job, "Failed" if failed else "Complete", message)
