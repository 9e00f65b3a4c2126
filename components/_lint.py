"""Lint of a compiled pipeline: the subset of KFP that runs alike on one machine and on a cluster.

Each rule is a function from the specification to its findings, and its docstring says what goes
wrong without it. A specification is the parsed IR: the first document of the compiled file, with
``platforms`` of the second.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from components._placing import AMOUNT
from filterpress.errors import FilterpressError

Spec = dict[str, Any]

#: Client-side apply keeps a whole manifest in an annotation of at most 262144 bytes.
MAX_JSON_BYTES = 240_000

_GROUPS = ("condition-", "exit-handler-", "for-loop-")
_NUMBER = re.compile(r"double\(|[=<>] -?\d")
_PLACEHOLDER = re.compile(r"inputs\.parameters\['([^']+)'\]")
_PARAMETER = re.compile(r"parameter_values\['([^']+)'\]")


def check(file: Path, *, pinned: bool = False) -> None:
    """Refuse a compiled file that breaks a rule.

    Args:
        file: Compiled pipeline.
        pinned: Whether images must be pinned by digest, as a release's must.

    Raises:
        FilterpressError: With all findings.
    """
    if findings := lint(read(file), pinned=pinned):
        raise FilterpressError(f"{file}: " + "; ".join(findings))


def read(file: Path) -> Spec:
    """Read both documents of a compiled file as one specification."""
    documents = yaml.safe_load_all(file.read_text(encoding="utf-8"))
    return {key: value for document in documents for key, value in document.items()}


def lint(spec: Spec, *, pinned: bool = False) -> list[str]:
    """Check a compiled pipeline against every rule.

    Args:
        spec: Parsed IR.
        pinned: Whether images must be pinned by digest, as a release's must.

    Returns:
        Findings as ``L1 place: what is wrong``; empty when the pipeline is clean.
    """
    rules = [*RULES, images_are_pinned] if pinned else RULES
    return [finding for rule in rules for finding in rule(spec)]


def conditions_use_output(spec: Spec) -> Iterator[str]:
    """L1: kfp.local takes a condition on any output but ``Output`` for false, and says nothing."""
    for _, name, task, _ in _tasks(spec):
        for source in _condition_sources(task):
            if source["outputParameterKey"] != "Output":
                yield f"L1 {name}: condition on {source['outputParameterKey']!r}, not 'Output'"


def conditions_have_no_numbers(spec: Spec) -> Iterator[str]:
    """L2: a number may compile to ``double(1)``, which kfp.local takes for false."""
    for _, name, task, _ in _tasks(spec):
        if _NUMBER.search(_condition(task)):
            yield f"L2 {name}: a number in a condition; compare strings"


def no_one_of(spec: Spec) -> Iterator[str]:
    """L3: backends before 2.17 take the wrong branch of OneOf, and kfp.local none."""
    components = _components(spec)
    for name, component in components.items():
        outputs = component.get("dag", {}).get("outputs", {})
        for key, selector in outputs.get("parameters", {}).items():
            if "valueFromParameter" not in selector:
                yield f"L3 {name}: OneOf parameter {key!r}"
        for key, selector in outputs.get("artifacts", {}).items():
            if len(selector.get("artifactSelectors", [])) != 1:
                yield f"L3 {name}: OneOf artifact {key!r}"
    for _, name, task, dag in _tasks(spec):
        for source in _condition_sources(task):
            producer = components[dag["tasks"][source["producerTask"]]["componentRef"]["name"]]
            declared = producer.get("outputDefinitions", {}).get("parameters", {})
            if source["outputParameterKey"] not in declared:
                yield f"L3 {name}: condition on an output that its step does not declare"


def sub_pipelines_have_a_parameter(spec: Spec) -> Iterator[str]:
    """L4: kfp.local loses the inputs of a sub-pipeline that takes artifacts only."""
    for name, component in _components(spec).items():
        inputs = component.get("inputDefinitions", {})
        if "dag" in component and inputs.get("artifacts") and not inputs.get("parameters"):
            yield f"L4 {name}: a sub-pipeline with artifacts but no parameter as input"


def sub_pipelines_end_uncached(spec: Spec) -> Iterator[str]:
    """L5: a sub-pipeline whose last step comes from the cache is shown as running forever."""
    components = _components(spec)
    groups = {task["componentRef"]["name"] for _, name, task, _ in _tasks(spec) if is_group(name)}
    for name, component in components.items():
        if "dag" not in component or name == "root" or name in groups:
            continue
        tasks = component["dag"]["tasks"]
        used = {source for task in tasks.values() for source in _sources(task)}
        for last in tasks.keys() - used:
            is_step = "dag" not in components[tasks[last]["componentRef"]["name"]]
            if is_step and tasks[last].get("cachingOptions", {}).get("enableCache"):
                yield f"L5 {name}: its last step {last} may come from the cache"


def images_are_pinned(spec: Spec) -> Iterator[str]:
    """L6: a tag may be another image tomorrow."""
    for name, executor in spec["deploymentSpec"]["executors"].items():
        image = executor.get("container", {}).get("image", "@sha256:")
        if "@sha256:" not in image:
            yield f"L6 {name}: image {image} is not pinned by digest"


def is_small(spec: Spec) -> Iterator[str]:
    """L7: `kubectl apply` refuses a manifest that is too long for an annotation."""
    n_bytes = len(json.dumps(spec, separators=(",", ":")))
    if n_bytes > MAX_JSON_BYTES:
        yield f"L7 pipeline: {n_bytes} bytes of JSON, the limit is {MAX_JSON_BYTES}; unroll less"


def no_importer(spec: Spec) -> Iterator[str]:
    """L8: importers resolve addresses otherwise on a cluster, which has no artifact iterator."""
    for name, executor in spec["deploymentSpec"]["executors"].items():
        if "importer" in executor:
            yield f"L8 {name}: importer"
    for _, name, task, _ in _tasks(spec):
        if "artifactIterator" in task:
            yield f"L8 {name}: artifact iterator"


def no_ignored_failures(spec: Spec) -> Iterator[str]:
    """L9: ``ignore_upstream_failure`` is an exit hook on a cluster and a plain step elsewhere."""
    for _, name, task, _ in _tasks(spec):
        strategy = task.get("triggerPolicy", {}).get("strategy")
        inputs = task.get("inputs", {}).get("parameters", {}).values()
        is_exit_task = any("taskFinalStatus" in source for source in inputs)
        if strategy == "ALL_UPSTREAM_TASKS_COMPLETED" and not is_exit_task:
            yield f"L9 {name}: ignore_upstream_failure"


def no_display_names(spec: Spec) -> Iterator[str]:
    """L10: before 2.14 a step's outputs, before 2.16 a loop's, are looked up by display name."""
    for _, name, task, _ in _tasks(spec):
        looked_up = not is_group(name) or "parameterIterator" in task
        if looked_up and task.get("taskInfo", {}).get("name", name) != name:
            yield f"L10 {name}: a display name"


def amounts_have_defaults(spec: Spec) -> Iterator[str]:
    """L11: a cluster refuses a step whose CPUs or memory are no amount; kfp.local ignores both."""
    parameters = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    asked = {
        (kind, name)
        for component, body in _components(spec).items()
        for kind, text in _resources(spec["deploymentSpec"]["executors"], body)
        for given in _PLACEHOLDER.findall(text)
        for name in _from_outside(spec, component, given)
    }
    for kind, name in sorted(asked):
        default = str(parameters.get(name, {}).get("defaultValue", ""))
        if not default or (kind != "resourceType" and not AMOUNT.fullmatch(default)):
            yield f"L11 {name}: default {default!r} for {kind}"


def inputs_are_handed_down(spec: Spec) -> Iterator[str]:
    """L12: a cluster takes a step's inputs from its group alone, which KFP hands no amounts to."""
    components = _components(spec)
    executors = spec.get("platforms", {}).get("kubernetes", {}).get("deploymentSpec", {})
    for component, name, task, _ in _tasks(spec):
        defined = components[component].get("inputDefinitions", {})
        label = components[task["componentRef"]["name"]].get("executorLabel")
        settings = executors.get("executors", {}).get(label, {})
        for source in (*_given(task.get("inputs", {})), *_given(settings)):
            known = {**defined.get("parameters", {}), **defined.get("artifacts", {})}
            if source not in known:
                yield f"L12 {name}: {component} has no input {source!r}"


def equal_containers_are_of_one_component(spec: Spec) -> Iterator[str]:
    """L13: a cluster keeps one definition of inputs and outputs for all equal containers."""
    first: dict[str, tuple[str, Spec]] = {}
    for name, component in _components(spec).items():
        label = component.get("executorLabel", "")
        container = spec["deploymentSpec"]["executors"].get(label, {}).get("container")
        if container is None:
            continue
        defined = {side: component.get(side) for side in ("inputDefinitions", "outputDefinitions")}
        key = json.dumps(container, sort_keys=True)
        other, known = first.setdefault(key, (name, defined))
        if defined != known:
            yield f"L13 {name}: the same container as {other}, but other inputs or outputs"


RULES = [
    conditions_use_output,
    conditions_have_no_numbers,
    no_one_of,
    sub_pipelines_have_a_parameter,
    sub_pipelines_end_uncached,
    is_small,
    no_importer,
    no_ignored_failures,
    no_display_names,
    amounts_have_defaults,
    inputs_are_handed_down,
    equal_containers_are_of_one_component,
]


def _components(spec: Spec) -> dict[str, Spec]:
    return {**spec.get("components", {}), "root": spec["root"]}


def _tasks(spec: Spec) -> Iterator[tuple[str, str, Spec, Spec]]:
    """Give component, name, task and enclosing DAG of every task."""
    for component, body in _components(spec).items():
        for name, task in body.get("dag", {}).get("tasks", {}).items():
            yield component, name, task, body["dag"]


def _from_outside(spec: Spec, component: str, name: str) -> Iterator[str]:
    """Name the parameters of the pipeline that a component's parameter may have its value from."""
    if component == "root":
        yield name
    for enclosing, _, task, _ in _tasks(spec):
        if task["componentRef"]["name"] == component:
            source = task.get("inputs", {}).get("parameters", {}).get(name, {})
            if "componentInputParameter" in source:
                yield from _from_outside(spec, enclosing, source["componentInputParameter"])


def _resources(executors: Spec, component: Spec) -> Iterator[tuple[str, str]]:
    """Give what a step asks for, by kind, as it is written down."""
    executor = executors.get(component.get("executorLabel", ""), {})
    resources = executor.get("container", {}).get("resources", {})
    for kind, value in {**resources, **resources.get("accelerator", {})}.items():
        if isinstance(value, str):
            yield kind, value


def is_group(task: str) -> bool:
    """Say whether a task is a condition, a loop or an exit handler, and no sub-pipeline of ours."""
    return task.startswith(_GROUPS)


def _condition(task: Spec) -> str:
    return task.get("triggerPolicy", {}).get("condition", "")


def _condition_sources(task: Spec) -> Iterator[Spec]:
    """Give the step outputs that a task's condition reads; inputs of its pipeline are none."""
    inputs = task.get("inputs", {}).get("parameters", {})
    for parameter in _PARAMETER.findall(_condition(task)):
        if "taskOutputParameter" in inputs.get(parameter, {}):
            yield inputs[parameter]["taskOutputParameter"]


def _given(part: Any) -> Iterator[str]:
    """Name the inputs of the enclosing pipeline that a part of the specification reads."""
    below = list(part.values()) if isinstance(part, dict) else part
    for key in ("componentInputParameter", "componentInputArtifact"):
        if isinstance(part, dict) and key in part:
            yield part[key]
    if isinstance(below, list):
        for value in below:
            yield from _given(value)


def _sources(task: Spec) -> set[str]:
    """Name the tasks that a task waits for."""
    inputs = task.get("inputs", {})
    values = [*inputs.get("parameters", {}).values(), *inputs.get("artifacts", {}).values()]
    kinds = ("taskOutputParameter", "taskOutputArtifact")
    read = {value[kind]["producerTask"] for value in values for kind in kinds if kind in value}
    return read | set(task.get("dependentTasks", []))
