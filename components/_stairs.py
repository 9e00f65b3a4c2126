"""The staircase of conditions that a pipeline consists of after its first steps."""

from typing import Any, NamedTuple

from kfp import dsl, kubernetes
from kfp.dsl.graph_component import GraphComponent
from kfp.dsl.pipeline_task import PipelineTask

from components._rounds import call
from components.give_up import give_up
from components.publish import publish

#: Where a cluster shows the step that signs its keys, if it has any.
KEYS_SECRET, KEYS_FOLDER = "filterpress-publish-keys", "/etc/filterpress/keys"


class Stairs(NamedTuple):
    """The sub-pipelines of the rounds, from the first; KFP wants them made before the pipeline.

    ``size_tries`` is the number of pairs of cluster and reduce in each.
    """

    size_tries: int
    rounds: list[GraphComponent]
    retrain_loops: list[GraphComponent]  # empty without retrains
    retrains: int  # in each of them

    def bounds(self) -> dict[str, int]:
        """Say how many rounds and retrains there are steps for."""
        return {"rounds": len(self.rounds), "retrains": self.retrains}


def add_level(given: dict[str, Any], stairs: Stairs, package: Any, state: Any, number: int) -> None:
    """Add a round to the pipeline that is being defined, and all that may follow it.

    Args:
        given: Parameters of the pipeline, and the trained network.
        stairs: Sub-pipelines.
        package: Package that the round starts from.
        state: Whether its file fits.
        number: Number of the round, from 1.
    """
    smaller = call(stairs.rounds[number - 1], given, model=package, state=state)
    if not stairs.retrain_loops:
        add_outcomes(given, stairs, smaller, number)
        return
    add_publication(given, smaller)
    with dsl.If(smaller.outputs["Output"] == "retrain", name=f"retrain-{number}"):
        loop = stairs.retrain_loops[number - 1]
        decided = {"model": smaller.outputs["model"], "decision": smaller.outputs["Output"]}
        accurate = call(loop, given, **decided)
        add_outcomes(given, stairs, accurate, number)
    add_failure(given, smaller, unless="retrain")


def add_outcomes(given: dict[str, Any], stairs: Stairs, decided: PipelineTask, number: int) -> None:
    """Add what may follow the last measurement of a round: publish, the next round, or give up."""
    add_publication(given, decided)
    if number == len(stairs.rounds):
        with dsl.If(decided.outputs["Output"] != "publish", name="give-up"):
            call(give_up, given, model=decided.outputs["model"])
        return
    with dsl.If(decided.outputs["Output"] == "next", name=f"round-{number + 1}"):
        add_level(given, stairs, decided.outputs["model"], "too-big", number + 1)
    add_failure(given, decided, unless="next")


def add_publication(given: dict[str, Any], decided: PipelineTask) -> None:
    """Add the publication of what was decided to be published."""
    with dsl.If(decided.outputs["Output"] == "publish", name="publish"):
        model, run = decided.outputs["model"], dsl.PIPELINE_JOB_ID_PLACEHOLDER
        published = call(publish, given, model=model, run=run)
        kubernetes.use_secret_as_volume(published, KEYS_SECRET, KEYS_FOLDER, optional=True)


def add_failure(given: dict[str, Any], decided: PipelineTask, unless: str) -> None:
    """Add the end of a run in which neither publication nor the one other branch was decided."""
    decision = decided.outputs["Output"]
    with (
        dsl.If(decision != "publish", name="not-published"),
        dsl.If(decision != unless, name="give-up"),
    ):
        call(give_up, given, model=decided.outputs["model"])
