"""An emulator of the KFP backend: it runs a compiled file by the rules of drivers and launchers.

No container is started: a test says how each step ends. The rules were read in kubeflow/pipelines
at 2.14.0 to 2.17.0, in ``backend/src/v2``: each names its source. How Argo runs the workflow that
comes of it is as Argo documents it. Drivers of tasks that can begin at once all end before these
tasks go on, one after the other, by their names or from the last: the order must not matter.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from kubernetes.utils.quantity import parse_quantity

from tests.pipeline.metadata import DriverError, Execution, Metadata, Spec, holds, items_of

_PLACEHOLDER = re.compile(r"\{\{\$\.inputs\.parameters\['(.+?)'\]\}\}")


class StepError(Exception):
    """Raised by a test: the program of a step ends with an error, and its launcher says so."""


class KilledError(Exception):
    """Raised by a test: the whole pod ends, out of memory or of time, and nobody says so."""


class Step(NamedTuple):
    """A container that is started."""

    place: str  # with the tasks it is in: exit-handler-1/round-1/evaluate
    parameters: Spec
    artifacts: dict[str, list[int]]
    pod: Spec

    @property
    def task(self) -> str:
        return self.place.rpartition("/")[2]


Outcome = Callable[[Step], Mapping[str, Any] | None]


@dataclass
class Run:
    """What became of a run."""

    status: str = ""  # as Argo sees it
    started: list[Step] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # of drivers
    executions: list[Execution] = field(default_factory=list)

    def shown_as(self, state: str) -> list[str]:
        """Name the tasks that users see in a state, which launchers write, not Argo."""
        return [made.place for made in self.executions if made.parent and made.state == state]


class Backend:
    """A cluster with a cache.

    Args:
        spec: Both documents of a compiled file in one.
        version: 2.14 to 2.17.
        backwards: Whether tasks that may run at once do so from the last.
    """

    def __init__(self, spec: Spec, version: str = "2.17", backwards: bool = False):
        self.spec, self.version, self.backwards = spec, version, backwards
        self.executors = self.spec["deploymentSpec"]["executors"]
        kubernetes = spec.get("platforms", {}).get("kubernetes", {})
        self.settings = kubernetes.get("deploymentSpec", {}).get("executors", {})
        self.components = self._components()
        self.cache: dict[str, Execution] = {}
        self.n_artifacts = 0

    def run(self, outcome: Outcome, **parameters: Any) -> Run:
        """Run the pipeline.

        Args:
            outcome: Called with every step that is started; returns its output parameters, or
                raises `StepError` or `KilledError`.
            parameters: Of the run; the others have their defaults.
        """
        self.outcome, self.store, self.told = outcome, Metadata(self.version), Run()
        self.told.executions = self.store.executions
        defined = self.spec["root"].get("inputDefinitions", {}).get("parameters", {})
        given = {k: v["defaultValue"] for k, v in defined.items() if "defaultValue" in v}
        root = self.store.create("", None, self.spec["root"], (given | parameters, {}))
        self.told.status = self._run_dag(root)
        return self.told

    def _components(self) -> dict[str, Spec]:
        """compiler/argocompiler/argo.go hashComponentContainer: one specification a container."""
        found: dict[str, Spec] = {}
        first: dict[str, Spec] = {}

        def visit(name: str, component: Spec) -> None:
            for _, task in sorted(component.get("dag", {}).get("tasks", {}).items()):
                below = task["componentRef"]["name"]
                if below not in found:
                    visit(below, self.spec["components"][below])
            container = self.executors.get(component.get("executorLabel"), {}).get("container")
            key = json.dumps(container, sort_keys=True) if container else name
            found[name] = first.setdefault(key, component)

        visit("root", self.spec["root"])
        return found

    def _run_dag(self, dag: Execution) -> str:
        """compiler/argocompiler/dag.go DAG: what waits for a task that was skipped is omitted."""
        tasks = dag.component["dag"]["tasks"]
        hooks = {name: task for name, task in tasks.items() if _is_hook(task)}
        waits = {name: _waits_for(task) for name, task in tasks.items()}
        left = sorted(tasks.keys() - hooks.keys(), reverse=self.backwards)
        if orphans := [name for name in left if waits[name] & hooks.keys()]:
            raise DriverError(
                f"{orphans[0]} waits for an exit task, which is none of the workflow's"
            )
        ended: dict[str, str] = {}
        while left and "Failed" not in ended.values():
            ready = [name for name in left if waits[name] <= ended.keys()]
            left = [name for name in left if name not in ready]
            skipped = {n for n in ready if any(ended[other] != "Succeeded" for other in waits[n])}
            ended |= dict.fromkeys(skipped, "Omitted")
            started = {n: self._drive(n, tasks[n], dag) for n in ready if n not in skipped}
            for name, (made, rest) in started.items():
                ended[name] = rest()
                # common.go addExitTask: a hook is of the task, and its driver is another one
                for hook in (hook for hook in hooks if made and name in waits[hook]):
                    self._drive(hook, hooks[hook], dag)[1]()
        return "Failed" if "Failed" in ended.values() else "Succeeded"

    def _drive(
        self, name: str, task: Spec, dag: Execution, index: int | None = None
    ) -> tuple[Execution | None, Callable[[], str]]:
        """compiler/argocompiler/dag.go task: a driver, then what it drives if it says so.

        Returns:
            What the driver made, and the rest of the task.
        """
        component = self.components[task["componentRef"]["name"]]
        is_loop = "parameterIterator" in task
        # before 2.16 drivers of loops know their task by its display name alone
        known = task["taskInfo"]["name"] if is_loop and self.version < "2.16" else name
        try:
            if "artifactIterator" in task:
                raise DriverError("artifact iterator not implemented yet")
            if "importer" in self.executors.get(component.get("executorLabel"), {}):
                return self._import(name, task, dag), lambda: "Succeeded"
            inputs = self.store.inputs(task, component, dag, index)
            begins = holds(task, inputs[0])
            made = self.store.create(known, dag, component, inputs)
            made.index = index
            if not begins:
                made.state = "CANCELED"
                return None, lambda: "Skipped"
            if not made.is_dag:
                return made, self._drive_container(task, made)
            if not is_loop or index is not None:
                return made, partial(self._run_dag, made)
            made.count = len(items_of(task, made.parameters))
        except DriverError as error:
            self.told.errors.append(f"{dag.place}/{name}: {error}")
            return None, lambda: "Failed"
        return made, partial(self._run_loop, name, task, made)

    def _run_loop(self, name: str, task: Spec, loop: Execution) -> str:
        """compiler/argocompiler/dag.go iteratorTask."""
        started = [self._drive(name, task, loop, index)[1] for index in range(loop.count)]
        return "Failed" if "Failed" in [rest() for rest in started] else "Succeeded"

    def _drive_container(self, task: Spec, made: Execution) -> Callable[[], str]:
        """driver/container.go Container: a pod, unless the cache has what it would leave."""
        label = self.spec["components"][task["componentRef"]["name"]]["executorLabel"]
        container = self.executors[label]["container"]
        outputs = made.component.get("outputDefinitions", {})
        key = json.dumps([container, made.parameters, made.artifacts, outputs], sort_keys=True)
        caches = task.get("cachingOptions", {}).get("enableCache", False)
        if caches and key in self.cache:  # driver/cache.go; no launcher updates the DAG
            found = self.cache[key]
            made.outputs, made.output_artifacts = found.outputs, found.output_artifacts
            made.state = "CACHED"
            self.told.cached.append(made.place)
            return lambda: "Succeeded"
        pod = {"resources": _resources(container, made.parameters)}
        pod |= self._placing(label, made.parent)
        step = Step(made.place, made.parameters, made.artifacts, pod)
        tries = 1 + int(task.get("retryPolicy", {}).get("maxRetryCount", 0))
        return partial(self._run_container, step, made, tries, key if caches else None)

    def _run_container(self, step: Step, made: Execution, tries: int, key: str | None) -> str:
        if not any(self._launch(step, made) for _ in range(tries)):
            return "Failed"
        if key:
            self.cache[key] = made
        return "Succeeded"

    def _launch(self, step: Step, made: Execution) -> bool:
        """component/launcher_v2.go Execute: whatever it knows it says, then updates the DAG."""
        self.told.started.append(step)
        try:
            self._publish(made, self.outcome(step) or {})
        except KilledError:
            return False
        except StepError:
            made.state = "FAILED"
        self.store.update(made.parent)
        return made.state == "COMPLETE"

    def _publish(self, made: Execution, outputs: Mapping[str, Any]) -> None:
        made.outputs, made.state = dict(outputs), "COMPLETE"
        for name in made.component.get("outputDefinitions", {}).get("artifacts", {}):
            self.n_artifacts += 1
            made.output_artifacts[name] = self.n_artifacts

    def _import(self, name: str, task: Spec, dag: Execution) -> Execution:
        """component/importer_launcher.go: an address is a constant or a parameter of the DAG."""
        component = self.components[task["componentRef"]["name"]]
        address = self.executors[component["executorLabel"]]["importer"]["artifactUri"]
        if "runtimeParameter" in address:
            source = task["inputs"]["parameters"][address["runtimeParameter"]]
            if not dag.parameters.get(source.get("componentInputParameter")):
                raise DriverError("error resolving artifact URI: parent DAG has no such parameter")
        made = self.store.create(name, dag, component, ({}, {}))
        self._publish(made, {})
        return made

    def _placing(self, label: str, dag: Execution) -> Spec:
        """driver/k8s.go extendPodSpecPatch: parameters are those of the DAG that a task is in."""
        settings = self.settings.get(label, {})
        found: Spec = {"deadline": int(settings.get("activeDeadlineSeconds", 0))}
        found |= {"labels": {}, "tolerations": [], "secrets": []}
        if "nodeSelector" in settings:
            labels = self.store.parameter(settings["nodeSelector"]["nodeSelectorJson"], dag)
            found["labels"] = labels if isinstance(labels, dict) else {}  # GetStructValue
            if not all(isinstance(value, str) for value in found["labels"].values()):
                raise DriverError("failed to unmarshal k8s Resource json")
        for toleration in settings.get("tolerations", []):
            value = self.store.parameter(toleration["tolerationJson"], dag)
            if not isinstance(value, dict | list):
                raise DriverError("unexpected toleration, must be either struct or list type")
            found["tolerations"] += value if isinstance(value, list) else [value]
        for kind in ("secretAsVolume", "imagePullSecret"):
            for secret in settings.get(kind, []):
                name = self.store.parameter(secret["secretNameParameter"], dag)
                if not name or not isinstance(name, str):
                    raise DriverError("expected a non-empty string as name of a Secret")
                found["secrets"].append(name)
        return found


def _resources(container: Spec, parameters: Spec) -> Spec:
    """driver/driver.go initPodSpecPatch and getPodResource, of amounts in their newer fields."""

    def resolved(text: str) -> str:
        """driver/resolve.go resolvePodSpecInputRuntimeParameter."""
        found = _PLACEHOLDER.search(text)
        if found and found[1] not in parameters:
            raise DriverError(f"executorInput did not contain {found[1]}")
        value = parameters[found[1]] if found else text
        return value if isinstance(value, str) else ""

    amounts = dict(container.get("resources", {}))
    accelerator = amounts.pop("accelerator", {})
    kind = resolved(accelerator.get("resourceType", ""))
    if kind and accelerator.get("resourceCount"):
        amounts[kind] = accelerator["resourceCount"]
    try:
        return {k: parse_quantity(resolved(v)) for k, v in amounts.items() if isinstance(v, str)}
    except ValueError as error:
        raise DriverError(f"failed to init podSpecPatch: {error}") from None


def _is_hook(task: Spec) -> bool:
    strategy = task.get("triggerPolicy", {}).get("strategy")
    return strategy == "ALL_UPSTREAM_TASKS_COMPLETED"


def _waits_for(task: Spec) -> set[str]:
    """compiler/argocompiler/dag.go addImplicitDependencies."""
    inputs = task.get("inputs", {})
    values = [*inputs.get("parameters", {}).values(), *inputs.get("artifacts", {}).values()]
    kinds = ("taskOutputParameter", "taskOutputArtifact")
    read = {value[kind]["producerTask"] for value in values for kind in kinds if kind in value}
    return read | set(task.get("dependentTasks", []))
