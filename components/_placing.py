"""What a step asks of a cluster, and what becomes of it if it fails there; nothing of it is local.

Amounts are parameters of a run, as far as KFP allows. How long a step may take, how often it is
tried and what pulls its image are not: they are fixed when the pipeline is compiled.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kfp import kubernetes
from kfp.dsl.pipeline_task import PipelineTask

#: Parameters of the pipeline that mean nothing on one machine.
PARAMETERS = ("cpu", "memory", "accelerator", "accelerators", "node_selector", "tolerations")

#: An amount, as Kubernetes writes it.
AMOUNT = re.compile(r"\d+(\.\d+)?([EPTGMk]i?|m)?")

#: Steps that train, and those that do so with some methods: `check` says what these get.
_TRAIN, _MAY_TRAIN = ("train", "search", "retrain"), ("prune", "reduce")
_LIGHT = ("check", "give-up", "report", "curve")
_UNCACHED = ("publish", "give-up", "report")


class Policy(NamedTuple):
    """How steps are run; the same for all of a pipeline.

    Attributes:
        tries: Times that a step is tried. Steps begin again from their inputs: a side effect that
            was done is not done twice.
        hours: Time that a step may take; one that hangs is stopped then.
        pull_secrets: Names of Secrets that the image is pulled with.
        cache_evaluate: Whether a measurement may be taken from the cache. On a cluster a
            sub-pipeline that ends in a cached step is shown as running forever.
        parallel: Sizes of a sweep that are worked on at once.
    """

    tries: int = 3
    hours: int = 24
    pull_secrets: Sequence[str] = ()
    cache_evaluate: bool = False
    parallel: int = 4


ON_A_CLUSTER = Policy()
#: kfp.local shows no sub-pipelines, and a run that was killed goes on after its last measurement.
LOCAL = Policy(tries=1, cache_evaluate=True, parallel=1)


def policy_of(
    *,
    tries: int = ON_A_CLUSTER.tries,
    hours: int = ON_A_CLUSTER.hours,
    parallel: int = ON_A_CLUSTER.parallel,
    pull_secrets: list = [],  # noqa: B006 (of the flag, and never changed)
) -> Policy:
    """Say how steps are run on a cluster.

    Args:
        tries: Times that a step is tried.
        hours: Time that a step may take.
        parallel: Sizes of a sweep that are worked on at once.
        pull_secrets: JSON list of the names of Secrets that the image is pulled with.

    Raises:
        ValueError: A number is below 1.
    """
    for name, value in (("tries", tries), ("hours", hours), ("parallel", parallel)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return Policy(tries, hours, tuple(pull_secrets), parallel=parallel)


def place(task: PipelineTask, given: Mapping[str, Any], policy: Policy) -> None:
    """Say how a step is run, and ask for what it needs.

    Args:
        task: Task of a component.
        given: Parameters of its pipeline, with those in `PARAMETERS` that are for this task, and
            the accelerators of prune and reduce as ``shrink_accelerators``.
        policy: How it is run.
    """
    if task.name.startswith(_UNCACHED):
        task.set_caching_options(False)
    if task.name.startswith("evaluate"):
        task.set_caching_options(policy.cache_evaluate)
    kubernetes.set_timeout(task, policy.hours * 3600)
    if policy.pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(policy.pull_secrets))
    if task.name.startswith(_LIGHT):
        return
    if policy.tries > 1:
        # Argo tries nothing again that began longer ago than the last of these, else an hour.
        longest = f"{policy.tries * (policy.hours + 1)}h"
        task.set_retry(policy.tries - 1, "30s", backoff_factor=2, backoff_max_duration=longest)
    task.set_cpu_request(given["cpu"])
    task.set_memory_request(given["memory"])
    task.set_memory_limit(given["memory"])
    asked = ["cpu", "memory"]
    if task.name.startswith(_TRAIN + _MAY_TRAIN):
        count = "accelerators" if task.name.startswith(_TRAIN) else "shrink_accelerators"
        asked += ["accelerator", count]
        task.set_accelerator_type(given["accelerator"])
        task.set_accelerator_limit(given[count])
        kubernetes.add_node_selector_json(task, given["node_selector"])
        kubernetes.add_toleration_json(task, given["tolerations"])
    # Else KFP would not hand amounts on to the conditions and the exit handler that the task is in.
    task.channel_inputs.extend(given[name] for name in asked)


def check_amounts(given: Mapping[str, Any]) -> None:
    """Refuse amounts that a cluster would refuse, step by step.

    Args:
        given: Parameters of the pipeline.

    Raises:
        ValueError: One is no amount as Kubernetes writes it.
    """
    for name in ("cpu", "memory", "accelerators"):
        if not AMOUNT.fullmatch(given[name]):
            raise ValueError(f"{name} must be an amount like 2, 500m or 4Gi, got {given[name]!r}")
