"""The two sub-pipelines of a round: smaller until it fits, accurate again."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from kfp import dsl
from kfp.dsl.base_component import BaseComponent
from kfp.dsl.graph_component import GraphComponent
from kfp.dsl.pipeline_task import PipelineTask

from components._placing import Policy, place
from components.cluster import cluster
from components.evaluate import evaluate
from components.reduce import reduce
from components.retrain import retrain


class Decided(NamedTuple):
    """What a sub-pipeline returns; kfp.local evaluates conditions on ``Output`` only."""

    Output: str
    model: dsl.Model


def call(component: BaseComponent, given: Mapping[str, Any], **own: Any) -> PipelineTask:
    """Add a task to the pipeline that is being defined.

    Args:
        component: Component or sub-pipeline.
        given: Parameters of the pipeline, and its ``policy``; what the component has a parameter
            for is passed on.
        own: What only this task gets.

    Returns:
        The task.
    """
    wanted = component.component_spec.inputs or {}
    task = component(**{name: value for name, value in given.items() if name in wanted} | own)
    if not isinstance(component, GraphComponent):
        place(task, given, given["policy"])
    return task


def make_round(number: int, size_tries: int, policy: Policy) -> GraphComponent:
    """Make the sub-pipeline of one round: smaller until it fits, then measured.

    Args:
        number: Number of the round, from 1.
        size_tries: Pairs of cluster and reduce; those after the first that fits are copies.
        policy: How steps are run.
    """

    @dsl.pipeline(name=f"round-{number}")
    def one_round(
        model: dsl.Input[dsl.Model],
        state: str,
        max_size: str,
        min_accuracy: str,
        max_rounds: int,
        max_retrains: int,
        seed: int,
        preset: str,
        cluster_config: str,
        reduce_config: str,
        data: str,
        data_dir: str,
        image_size: int,
        task: str,
        scratch: str,
        cpu: str,
        memory: str,
        accelerator: str,
        shrink_accelerators: str,
        node_selector: dict,
        tolerations: list,
    ) -> Decided:
        given = {**locals(), "round": number, "policy": policy}
        for _ in range(size_tries):
            clustered = call(cluster, given, model=model, state=state, config=cluster_config)
            model = clustered.outputs["clustered"]
            reduced = call(reduce, given, model=model, state=state, config=reduce_config)
            model, state = reduced.outputs["reduced"], reduced.outputs["Output"]
        measured = call(evaluate, given, model=model, state=state, retrains=0)
        return Decided(measured.outputs["Output"], measured.outputs["evaluated"])

    return one_round


def make_retrain_loop(number: int, retrains: int, policy: Policy) -> GraphComponent:
    """Make the sub-pipeline that retrains a round's network until it is accurate enough.

    Args:
        number: Number of the round, from 1.
        retrains: Pairs of retrain and evaluate; those after a decision are copies.
        policy: How steps are run.
    """

    @dsl.pipeline(name=f"retrain-loop-{number}")
    def retrain_loop(
        model: dsl.Input[dsl.Model],
        trained: dsl.Input[dsl.Model],
        decision: str,
        max_size: str,
        min_accuracy: str,
        max_rounds: int,
        max_retrains: int,
        seed: int,
        preset: str,
        retrain_config: str,
        data: str,
        data_dir: str,
        image_size: int,
        task: str,
        scratch: str,
        nodes: int,
        runtime: str,
        cpu: str,
        memory: str,
        accelerator: str,
        accelerators: str,
        node_selector: dict,
        tolerations: list,
    ) -> Decided:
        given = {**locals(), "round": number, "config": retrain_config, "policy": policy}
        for done in range(1, retrains + 1):
            retrained = call(retrain, given, model=model, decision=decision)
            model = retrained.outputs["retrained"]
            measured = call(evaluate, given, model=model, state=decision, retrains=done)
            model, decision = measured.outputs["evaluated"], measured.outputs["Output"]
        return Decided(decision, model)

    return retrain_loop
