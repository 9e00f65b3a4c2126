"""What the emulated backend knows of a run, and how its drivers find inputs in that.

The rules were read in kubeflow/pipelines at 2.14.0 to 2.17.0, in ``backend/src/v2``: each names its
source. The names of executions are those of the metadata store, since lookups go wrong by name.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Spec = dict[str, Any]

_TYPES = {"STRUCT": dict, "LIST": list, "BOOLEAN": bool, "TASK_FINAL_STATUS": dict}
_RUN = {
    "{{$.pipeline_job_name}}": "display name",
    "{{$.pipeline_job_resource_name}}": "filterpress-abcde",
    "{{$.pipeline_job_uuid}}": "00000000-0000-4000-8000-000000000000",
}
_CEL = re.compile(r"'[^']*'|&&|\|\||!(?!=)")
_PYTHON = {"&&": " and ", "||": " or ", "!": " not "}


class DriverError(Exception):
    """A pipeline cannot be compiled to a workflow, or a driver ends with an error."""


@dataclass(eq=False)
class Execution:
    """What the metadata store knows of a task; the root has no parent."""

    id: int
    task: str
    parent: "Execution | None"
    component: Spec
    parameters: Spec
    artifacts: dict[str, list[int]]
    state: str = "RUNNING"
    outputs: Spec = field(default_factory=dict)
    output_artifacts: dict[str, int] = field(default_factory=dict)
    index: int | None = None  # of an iteration
    count: int | None = None  # of iterations, of a loop

    @property
    def is_dag(self) -> bool:
        return "dag" in self.component

    @property
    def place(self) -> str:
        above = self.parent.place if self.parent else ""
        number = "" if self.index is None else f"-{self.index}"
        return f"{above}/{self.task}{number}".strip("/")

    def selectors(self, kind: str) -> Spec:
        return self.component["dag"].get("outputs", {}).get(kind, {})


class Metadata:
    """The executions of one run.

    Args:
        version: Of the backend.
    """

    def __init__(self, version: str):
        self.is_new = version >= "2.17"
        self.executions: list[Execution] = []

    def create(
        self, task: str, parent: Execution | None, component: Spec, inputs: tuple[Spec, Spec]
    ) -> Execution:
        made = Execution(len(self.executions) + 1, task, parent, component, *map(dict, inputs))
        self.executions.append(made)
        return made

    def children(self, dag: Execution) -> dict[str, Execution]:
        """metadata/client.go GetExecutionsInDAG."""
        found: dict[str, Execution] = {}
        for made in self.executions:
            if made.parent is not dag:
                continue
            name = f"{made.task}_{dag.id}"
            index = dag.index if made.index is None else made.index
            name += "" if index is None else f"_idx_{index}"
            if name in found:
                raise DriverError(f"two tasks have the same task name {name}")
            found[name] = made
        return found

    def below(self, dag: Execution) -> dict[str, Execution]:
        """driver/resolve.go getDAGTasks."""
        found = self.children(dag)
        for made in list(found.values()):
            if made.is_dag:
                found |= self.below(made)
        return found

    def update(self, dag: Execution) -> None:
        """metadata/client.go UpdateDAGExecutionsState, called by launchers alone.

        Before 2.17 one level is updated, and a loop expects as many iterations as it has tasks.
        """
        if not dag.parent:
            return
        states = [made.state for made in self.children(dag).values()]
        iterates = self.is_new and dag.count is not None
        expected = dag.count if iterates else len(dag.component["dag"]["tasks"])
        if sum(state in ("COMPLETE", "CACHED", "CANCELED") for state in states) == expected:
            dag.state = "COMPLETE"
        elif "FAILED" in states:
            dag.state = "FAILED"
        else:
            return
        if self.is_new:
            self.update(dag.parent)

    def inputs(
        self, task: Spec, component: Spec, dag: Execution, index: int | None
    ) -> tuple[Spec, Spec]:
        """driver/resolve.go resolveInputs: parameters and artifacts of a task."""
        defined = component.get("inputDefinitions", {}).get("parameters", {})
        iterator = task.get("parameterIterator", {})
        item, source = iterator.get("itemInput"), iterator.get("items", {}).get("inputParameter")
        if index is not None:
            parameters, artifacts = dict(dag.parameters), dict(dag.artifacts)
            items = items_of(task, parameters)
            parameters.pop(source or item, None)
            parameters[item] = items[index]
            unset = {source}
        else:
            given = task.get("inputs", {})
            optional = [k for k in defined if "dag" in component and defined[k].get("isOptional")]
            parameters = {name: defined[name].get("defaultValue") for name in optional}
            for name, spec in given.get("parameters", {}).items():
                parameters[name] = self.parameter(spec, dag, task)
            artifacts = {
                name: self.artifact(spec, dag) for name, spec in given.get("artifacts", {}).items()
            }
            unset = {item}
        for name, definition in defined.items():
            if name in parameters:
                parameters[name] = _typed(name, parameters[name], definition)
            elif name not in unset and not {"isOptional", "defaultValue"} & definition.keys():
                raise DriverError(f"neither value nor default value for parameter {name}")
        return parameters, artifacts

    def parameter(self, spec: Spec, dag: Execution, task: Spec | None = None) -> Any:
        """driver/resolve.go resolveInputParameter."""
        if name := spec.get("componentInputParameter"):
            if dag.parameters.get(name) is None:
                raise DriverError(f"parent DAG does not have input parameter {name}")
            return dag.parameters[name]
        if "runtimeValue" in spec:
            constant = spec["runtimeValue"]["constant"]
            return _RUN.get(constant, constant) if isinstance(constant, str) else constant
        if "taskFinalStatus" in spec:
            producer = self.below(dag).get(f"{task['dependentTasks'][0]}_{dag.id}")
            if not producer:
                raise DriverError("producer task not in tasks")
            return {"state": producer.state, "pipelineTaskName": producer.task, "error": {}}
        found = self._upstream(dag, spec["taskOutputParameter"], "parameters")
        return found if isinstance(found, list) else found[0].outputs.get(found[1])

    def artifact(self, spec: Spec, dag: Execution) -> list[int]:
        """driver/resolve.go resolveInputArtifact."""
        if name := spec.get("componentInputArtifact"):
            if name not in dag.artifacts:
                raise DriverError(f"parent DAG does not have input artifact {name}")
            return dag.artifacts[name]
        found = self._upstream(dag, spec["taskOutputArtifact"], "artifacts")
        return found if isinstance(found, list) else [found[0].output_artifacts[found[1]]]

    def _upstream(self, dag: Execution, source: Spec, kind: str) -> list | tuple:
        """driver/resolve.go resolveUpstreamParameters, and the same of artifacts.

        Returns:
            Execution of a container and the name of its output, or all that a loop gathered.
        """
        tasks = self.below(dag)
        key = source.get("outputParameterKey") or source["outputArtifactKey"]
        name = f"{source['producerTask']}_{dag.id}" + (
            "" if dag.index is None else f"_idx_{dag.index}"
        )
        while True:
            if name not in tasks:
                raise DriverError(f"producer task, {name}, not in tasks")
            current = tasks[name]
            if not current.is_dag:
                return current, key
            if current.parent.count if current.count is None else current.count:
                return self._collect(tasks, name, key, kind)
            name, key = self._producer(current, tasks, name, key, kind)

    def _producer(
        self, dag: Execution, tasks: Mapping[str, Execution], name: str, key: str, kind: str
    ) -> tuple[str, str]:
        """driver/resolve.go GetProducerTask: which task of a DAG makes one of its outputs."""
        selector = dag.selectors(kind).get(key)
        if kind == "artifacts":
            choices = (selector or {}).get("artifactSelectors", [])
            name_of_key, is_one_of = "outputArtifactKey", self.is_new and len(choices) > 1
            choices = choices if is_one_of else choices[-1:]
        else:
            selector = selector or {}
            is_one_of = "valueFromOneof" in selector
            name_of_key = "outputParameterKey"
            choices = selector.get("valueFromOneof", {}).get("parameterSelectors", [])
            choices = choices or [value for value in [selector.get("valueFromParameter")] if value]
        if not choices and dag.selectors(kind):
            raise DriverError(f"output key {key} not found in {dag.place}")
        for choice in choices:
            made = tasks.get(f"{choice['producerSubtask']}_{dag.id}")
            if not is_one_of or (made and made.state in ("COMPLETE", "CACHED")):
                return f"{choice['producerSubtask']}_{dag.id}", choice[name_of_key]
        if is_one_of:
            raise DriverError(
                f"processing OneOf: no successful task found for {key} in {dag.place}"
            )
        return name, key

    def _collect(self, tasks: Mapping[str, Execution], name: str, key: str, kind: str) -> list:
        """driver/resolve.go CollectInputs: breadth first, with one key for all iterations."""
        gathered: list[Any] = []
        left, subtask, before = [name], "", (tasks[name].task, key)
        while left:
            if left[0] not in tasks:
                raise DriverError(f"task {left[0]} not in tasks")  # there, a nil pointer
            current = tasks[left.pop(0)]
            key = before[1] if current.task == before[0] else key
            before = (current.task, key)
            if not current.is_dag:
                if kind == "artifacts":
                    gathered.append(current.output_artifacts[key])
                else:
                    gathered.append(current.outputs.get(key))
                continue
            subtask, key = self._producer(current, tasks, subtask, key, kind)
            if current.count is None:
                left.append(subtask + ("" if current.index is None else f"_idx_{current.index}"))
            else:
                loop = f"{current.task}_{current.id}"
                left.extend(f"{loop}_idx_{index}" for index in range(current.count))
        return gathered


def items_of(task: Spec, parameters: Spec) -> list[Any]:
    """driver/util.go getItems: what a loop iterates over."""
    iterator = task["parameterIterator"]
    items = iterator["items"].get("raw")
    items = parameters[iterator["items"]["inputParameter"]] if items is None else items
    items = json.loads(items) if isinstance(items, str) else items
    if not isinstance(items, list):
        raise DriverError(f"{items!r} cannot be iterated")
    return items


def holds(task: Spec, parameters: Spec) -> bool:
    """expression/expression.go Condition: CEL, of which KFP writes comparisons, and, or and not."""
    condition = task.get("triggerPolicy", {}).get("condition", "true")
    python = _CEL.sub(lambda found: _PYTHON.get(found[0], found[0]), condition)
    inputs = type("Inputs", (), {"parameter_values": parameters})
    known = {"inputs": inputs, "int": int, "double": float, "true": True, "false": False}
    try:
        return bool(eval(python, {"__builtins__": {}}, known))  # noqa: S307 (of our own pipelines)
    except (SyntaxError, KeyError, TypeError, ValueError) as error:
        raise DriverError(f"evaluation error: {error}") from None


def _typed(name: str, value: Any, definition: Spec) -> Any:
    """driver/resolve.go handleParamTypeValidationAndConversion."""
    kind = definition["parameterType"]
    if kind == "STRING":
        return value if isinstance(value, str) or value is None else json.dumps(value)
    if value is None and definition.get("isOptional"):
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number if kind.startswith("NUMBER") else isinstance(value, _TYPES[kind])):
        raise DriverError(f"input parameter {name} type mismatch: expect {kind}, got {value!r}")
    return value
