"""What is done to a compiled pipeline: names that do not depend on chance, and the image.

KFP numbers the components and executors of sub-pipelines in the order of a hash map, which differs
from process to process. A committed pipeline could then not be compared with a fresh one, and a
second local run would not find the first one's steps in the cache. It also repeats the source of a
component, and what is said of its parameters, for every task; all that is half of the size.
"""

import json
import re
from collections import Counter
from collections.abc import MutableMapping
from copy import deepcopy
from typing import Any

from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct
from kfp.dsl.graph_component import GraphComponent

_LABEL = re.compile(r"exec-(?P<step>.+?)(?:-\d+)*")
_PART = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*"
_HOST = r"[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?(?::[0-9]+)?"
_PINNED = re.compile(
    rf"(?:{_HOST}/)?{_PART}(?:/{_PART})*(?::[a-zA-Z0-9_][a-zA-Z0-9_.-]{{0,127}})?@sha256:[0-9a-f]{{64}}"
)


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
    level = [spec["root"]["dag"]]
    while level:
        below = []
        for dag in level:
            for name, task in sorted(dag["tasks"].items()):
                component = _undescribed(components[task["componentRef"]["name"]])
                place = _numbered(used, _without_number(name))
                task["componentRef"]["name"] = f"comp-{place}"
                spec["components"][f"comp-{place}"] = component
                if "dag" in component:
                    below.append(component["dag"])
                else:
                    executor = executors[component["executorLabel"]]
                    label = labels.setdefault(json.dumps(executor), f"exec-{place}")
                    component["executorLabel"] = label
                    spec["deploymentSpec"]["executors"][label] = executor
        level = below
    pipeline.pipeline_spec.Clear()
    json_format.ParseDict(spec, pipeline.pipeline_spec)
    for platform in pipeline.platform_spec.platforms.values():
        _settle_settings(platform.deployment_spec.executors, sorted(set(labels.values())))
    return pipeline


def is_pinned(image: str) -> bool:
    """Tell whether an image is named by a repository and a digest that can be one."""
    return bool(_PINNED.fullmatch(image))


def check_image(image: str) -> None:
    """Refuse an image that a cluster cannot pull, or that may be another one tomorrow.

    Args:
        image: Name of an image.

    Raises:
        ValueError: It has no digest, or is not a name.
    """
    if not is_pinned(image):
        raise ValueError(
            "image must be a repository and a digest, registry.example/filterpress-python@sha256:… "
            f"with 64 hexadecimal digits, as a push prints it, got {image!r}"
        )


def pin(pipeline: GraphComponent, image: str) -> GraphComponent:
    """Run every step of a pipeline in one image.

    Args:
        pipeline: Pipeline to change in place.
        image: Image.

    Returns:
        The same pipeline.
    """
    for executor in pipeline.pipeline_spec.deployment_spec["executors"].values():
        executor["container"]["image"] = image
    return pipeline


def _undescribed(component: dict[str, Any]) -> dict[str, Any]:
    """Copy a component without what is said of its parameters: the form shows those of the root."""
    copied = deepcopy(component)
    for side in ("inputDefinitions", "outputDefinitions"):
        for definitions in copied.get(side, {}).values():
            for definition in definitions.values():
                definition.pop("description", None)
    return copied


def _settle_settings(executors: MutableMapping[str, Struct], labels: list[str]) -> None:
    """Give what a platform is told of each step to the label that its executor has now.

    KFP mixes up the labels of a step that is used in several sub-pipelines when it merges them, so
    all tasks of a step must have the same settings.

    Raises:
        ValueError: They have not.
    """
    settings: dict[str, Struct] = {}
    for label in sorted(executors):
        step, copied = _step(label), Struct()
        copied.CopyFrom(executors[label])
        if settings.setdefault(step, copied) != copied:
            raise ValueError(f"settings of {step} for a cluster must be the same for all its tasks")
    for label in list(executors):
        del executors[label]
    for label in labels:
        if _step(label) in settings:
            executors[label].CopyFrom(settings[_step(label)])


def _step(label: str) -> str:
    """Return the name of a step, of the label of its executor."""
    return _LABEL.fullmatch(label)["step"]


def _without_number(task: str) -> str:
    """Drop the number that KFP gives to the second task of a name, and to every condition."""
    stem, _, number = task.rpartition("-")
    return stem if number.isdigit() and not stem.startswith(("round", "retrain-loop")) else task


def _numbered(used: Counter[str], stem: str) -> str:
    used[stem] += 1
    return stem if used[stem] == 1 else f"{stem}-{used[stem]}"
