"""What is done to a compiled pipeline: names that do not depend on chance, and the image.

KFP numbers the components and executors of sub-pipelines in the order of a hash map, which differs
from process to process. A committed pipeline could then not be compared with a fresh one, and a
second local run would not find the first one's steps in the cache. It also repeats the source of a
component for every task; once is enough, and a third of the size.
"""

import json
from collections import Counter
from copy import deepcopy

from google.protobuf import json_format
from kfp.dsl.graph_component import GraphComponent


def settle_names(pipeline: GraphComponent) -> GraphComponent:
    """Number the components of a pipeline by their place in it, and share equal executors.

    Args:
        pipeline: Pipeline to change in place.

    Returns:
        The same pipeline.
    """
    spec = json_format.MessageToDict(pipeline.pipeline_spec)
    components, executors = spec["components"], spec["deploymentSpec"]["executors"]
    spec["components"], spec["deploymentSpec"]["executors"] = {}, {}
    used: Counter[str] = Counter()
    labels: dict[str, str] = {}
    renamed: dict[str, str] = {}
    level = [spec["root"]["dag"]]
    while level:
        below = []
        for dag in level:
            for name, task in sorted(dag["tasks"].items()):
                component = deepcopy(components[task["componentRef"]["name"]])
                place = _numbered(used, _without_number(name))
                task["componentRef"]["name"] = f"comp-{place}"
                spec["components"][f"comp-{place}"] = component
                if "dag" in component:
                    below.append(component["dag"])
                else:
                    executor = executors[component["executorLabel"]]
                    label = labels.setdefault(json.dumps(executor), f"exec-{place}")
                    renamed[component["executorLabel"]] = label
                    component["executorLabel"] = label
                    spec["deploymentSpec"]["executors"][label] = executor
        level = below
    pipeline.pipeline_spec.Clear()
    json_format.ParseDict(spec, pipeline.pipeline_spec)
    for platform in pipeline.platform_spec.platforms.values():
        settings = {renamed[old]: one for old, one in platform.deployment_spec.executors.items()}
        platform.deployment_spec.ClearField("executors")
        for label in sorted(settings):
            platform.deployment_spec.executors[label].CopyFrom(settings[label])
    return pipeline


def pin(pipeline: GraphComponent, image: str) -> GraphComponent:
    """Run every step of a pipeline in one image.

    Args:
        pipeline: Pipeline to change in place.
        image: Image, for a release by digest: repository@sha256:….

    Returns:
        The same pipeline.
    """
    for executor in pipeline.pipeline_spec.deployment_spec["executors"].values():
        executor["container"]["image"] = image
    return pipeline


def _without_number(task: str) -> str:
    """Drop the number that KFP gives to the second task of a name, and to every condition."""
    stem, _, number = task.rpartition("-")
    return stem if number.isdigit() and not stem.startswith(("round", "retrain-loop")) else task


def _numbered(used: Counter[str], stem: str) -> str:
    used[stem] += 1
    return stem if used[stem] == 1 else f"{stem}-{used[stem]}"
