"""Run the pipeline with kfp.local, strictly, and say which step does what.

kfp.local takes a condition that it cannot evaluate for false: the run ends well, having done
nothing. Here it is an error. This module leans on two inner parts of the kfp version that the
project pins: `execute_task`, which runs one step or one sub-pipeline, and the module that logs what
it could not evaluate.
"""

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from kfp import local
from kfp.dsl.graph_component import GraphComponent
from kfp.local.orchestrator import enhanced_dag_orchestrator as orchestrator
from kfp.local.status import Status

import filterpress
from components import _containers
from components._ir import pin
from components._lint import is_group
from filterpress import files
from filterpress.errors import BudgetError, FilterpressError
from filterpress.reporting import write_html
from filterpress.stages import ENCODED

Report = dict[str, Any]

#: The last line of a traceback.
_EXCEPTION = re.compile(r"(?:\w+\.)*(?P<kind>_?[A-Z]\w*)(?:: (?P<message>.*))?")


class Step(NamedTuple):
    """One step that ended."""

    name: str  # with the sub-pipeline it is in: round-1/evaluate
    reused: bool
    outputs: dict[str, Any]
    report: Report  # empty when the step failed or has none
    last_words: str  # the last line that a failed step printed


class ConditionError(FilterpressError):
    """A condition of the pipeline could not be evaluated."""


class _Unevaluated(BaseException):
    """Carries the news through kfp.local, which swallows every Exception while it evaluates."""


def run(pipeline: GraphComponent, arguments: dict[str, Any], out: Path, image: str = "") -> Report:
    """Run the pipeline on this machine, and tell on standard error what every step did.

    Args:
        pipeline: Pipeline.
        arguments: Its parameters; paths must be absolute.
        out: Folder of the run; a second run in it reuses the steps whose inputs did not change.
        image: Image of the containers that the steps run in; empty for processes.

    Returns:
        Report of the last measurement and of the publication, with ``release``, ``package`` and
        ``html``.

    Raises:
        BudgetError: The thresholds were not met.
        FilterpressError: The run ended without publishing for another reason.
    """
    steps: list[Step] = []
    try:
        execute(pipeline, arguments, out, _noting(steps), image)
    finally:
        report = leave_results(steps, out)
    if "release" not in report:
        raise FilterpressError(f"the run ended without publishing; see {out / 'run.log'}")
    return report


def sweep(
    pipeline: GraphComponent, arguments: dict[str, Any], out: Path, image: str = ""
) -> Report:
    """Run a sweep on this machine, and tell on standard error what every step did.

    Args:
        pipeline: Sweep.
        arguments: Its parameters; paths must be absolute.
        out: Folder of the run, as for `run`.
        image: Image of the containers that the steps run in; empty for processes.

    Returns:
        Report of the curve, with ``html``.

    Raises:
        FilterpressError: A step failed.
    """
    steps: list[Step] = []
    execute(pipeline, arguments, out, _noting(steps), image)
    page, report = out / "report.html", steps[-1].report
    files.write(page, Path(steps[-1].outputs["page"].path).read_bytes())
    files.write(out / "report.json", json.dumps(report, indent=1, sort_keys=True).encode())
    return report | {"html": str(page)}


def _noting(steps: list[Step]) -> Callable[[Step], None]:
    """Make what keeps every step, and tells of it."""

    def note(step: Step) -> None:
        steps.append(step)
        tell(step)

    return note


def execute(
    pipeline: GraphComponent,
    arguments: dict[str, Any],
    out: Path,
    note: Callable[[Step], None],
    image: str = "",
) -> None:
    """Run a pipeline with sub-pipelines, one process or container a step.

    Args:
        pipeline: Pipeline.
        arguments: Its parameters.
        out: Folder for ``steps/``, ``cache/`` and ``run.log``.
        note: Called with every step as it ends.
        image: Image of the containers; empty for processes.

    Raises:
        BudgetError: The thresholds were not met.
        FilterpressError: A step failed for another reason.
        ConditionError: A condition could not be evaluated.
    """
    found = _containers.find(image) if image else None
    (out / "steps").mkdir(parents=True, exist_ok=True)
    if found:
        pin(pipeline, found.name)
        runner = _containers.runner(arguments, out)
    else:
        runner = local.SubprocessRunner(use_venv=False)
    local.init(
        runner=runner,
        pipeline_root=str(out / "steps"),
        enable_caching=True,
        cache_root=str(out / "cache" / fingerprint(arguments, found.digest if found else "")),
    )
    failed: list[Step] = []

    def watch(step: Step) -> None:
        failed.extend([step] if step.last_words else [])
        note(step)

    with (
        (out / "run.log").open("a+", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        warnings.catch_warnings(action="ignore"),
        strict(),
        watched(watch, log),
    ):
        try:
            pipeline(**arguments)
        except RuntimeError as error:
            raise (_failure(failed[-1]) if failed else error) from None


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Raise where kfp.local only logs that it could not evaluate something.

    Raises:
        ConditionError: What kfp.local logged.
    """

    def refuse(record: logging.LogRecord) -> bool:
        evaluates = record.module in {"enhanced_dag_orchestrator", "orchestrator_utils"}
        if evaluates and record.levelno >= logging.WARNING:
            raise _Unevaluated(record.getMessage())
        return True

    root = logging.getLogger()
    root.addFilter(refuse)
    try:
        yield
    except _Unevaluated as message:
        raise ConditionError(f"the pipeline cannot be run here: {message}") from None
    finally:
        root.removeFilter(refuse)


@contextlib.contextmanager
def watched(tell: Callable[[Step], None], log: TextIO) -> Iterator[None]:
    """Tell of every step that ends.

    Args:
        tell: Called with every step as it ends.
        log: What standard output is redirected to.
    """
    inner, places = orchestrator.execute_task, []

    def execute_task(**given: Any) -> tuple[dict[str, Any], Status]:
        name, task = given["task_name"], given["task_spec"]
        if given["components"][task.component_ref.name].WhichOneof("implementation") == "dag":
            places.append(_innermost(places) if is_group(name) else name)
            try:
                return inner(**given)
            finally:
                places.pop()
        start = log.tell()
        outputs, status = inner(**given)
        root = Path(given["pipeline_root"], given["pipeline_resource_name"])
        uris = [value.uri for value in outputs.values() if hasattr(value, "uri")]
        tell(
            Step(
                name="/".join(filter(None, [_innermost(places), name])),
                reused=any(not Path(uri).is_relative_to(root) for uri in uris),
                outputs=outputs,
                report=_report(outputs),
                last_words="" if status == Status.SUCCESS else _last_words(log, start),
            )
        )
        return outputs, status

    orchestrator.execute_task = execute_task
    try:
        yield
    finally:
        orchestrator.execute_task = inner


def fingerprint(arguments: dict[str, Any], image: str = "") -> str:
    """Digest what the steps depend on besides their parameters, for the name of the cache.

    That is the library's own source, the image, the file of weights and the module of the user's
    own task: kfp.local keeps only their names in its keys.

    Args:
        arguments: Parameters of the run.
        image: Digest of the image; empty for processes.

    Returns:
        16 hexadecimal digits.
    """
    files = sorted(Path(filterpress.__file__).parent.rglob("*.py"))
    if arguments.get("weights"):
        files.append(Path(arguments["weights"]))
    for name in (arguments.get("task", ""), arguments.get("model", "")):
        module = name.partition(":")[0] if ":" in name else ""
        with contextlib.suppress(ImportError, ValueError):
            found = importlib.util.find_spec(module) if module else None
            files += [Path(found.origin)] if found and found.origin else []
    digest = hashlib.sha256(image.encode())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def on_this_machine(parameters: dict[str, Any], out: Path) -> dict[str, Any]:
    """Make paths absolute: a step runs in a process and a folder of its own.

    Args:
        parameters: Parameters as given; empty places to write to become folders of the run.
        out: Folder of the run.
    """
    here = dict(parameters)
    if "store" in here:
        here["store"] = here["store"] or str(out / "release")
    here["scratch"] = here["scratch"] or str(out / "cache" / "scratch")
    for name in _containers.PLACES:
        if here.get(name) and "://" not in here[name]:
            here[name] = str(Path(here[name]).resolve())
    return here


def tell(step: Step) -> None:
    """Say in one line on standard error what a step did."""
    shown = ("n_bytes", "validation_accuracy", "accuracy", "state", "decision")
    numbers = [
        f"{key} {_short(step.report[key])}" for key in shown if step.report.get(key) is not None
    ]
    if step.last_words:
        outcome = "failed"
    elif step.reused:
        outcome = "reused"
    else:
        outcome = "passed on" if step.report.get("passed_on") else "done"
    sys.stderr.write(f"{step.name:27} {outcome:9} {'  '.join(numbers)}".rstrip() + "\n")


def leave_results(steps: list[Step], out: Path) -> Report:
    """Leave in the folder of a run its page, its report and, if it published, the file.

    Where nothing was measured the page is that of the step ``report``, if the run came so far.

    Args:
        steps: Steps of the run, in order.
        out: Folder of the run.

    Returns:
        The report; without ``release`` if nothing was published, empty if nothing was measured.
    """
    measured = [step for step in steps if "evaluated" in step.outputs]
    published = [step for step in steps if "release" in step.outputs]
    page = out / "report.html"
    if not measured:
        for told in (step.outputs["page"] for step in steps if step.name == "report"):
            files.write(page, Path(told.path).read_bytes())
        return {}
    package = Path(measured[-1].outputs["evaluated"].path)
    write_html(package, page)
    report = {**measured[-1].report, "package": str(package), "html": str(page)}
    if published:
        report |= {**published[-1].report, "release": published[-1].report["store"]}
        files.write(out / ENCODED, (package / ENCODED).read_bytes())
    files.write(out / "report.json", json.dumps(report, indent=1, sort_keys=True).encode())
    return report


def _innermost(places: list[str]) -> str:
    return places[-1] if places else ""


def _report(outputs: dict[str, Any]) -> Report:
    if "report" not in outputs:
        return {}
    return json.loads(Path(outputs["report"].path).read_text(encoding="utf-8"))


def _last_words(log: TextIO, start: int) -> str:
    """Find the last line of a step in the log: kfp.local indents what steps print."""
    log.flush()
    log.seek(start)
    lines = [line.strip() for line in log if line.startswith("    ") and line.strip()]
    log.seek(0, os.SEEK_END)
    return lines[-1] if lines else "it printed nothing"


def _failure(step: Step) -> FilterpressError:
    """Make the error that a step ended with: its last line is ``module.Type: message``."""
    error = _EXCEPTION.fullmatch(step.last_words)
    if not error:
        return FilterpressError(f"step {step.name} ended without a reason; see run.log")
    if error["kind"] == BudgetError.__name__:
        return BudgetError(error["message"])
    return FilterpressError(f"step {step.name} failed: {error['message'] or error['kind']}")


def _short(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) and abs(value) <= 1 else f"{value}"
