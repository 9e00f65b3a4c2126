"""The compiled pipeline under the rules of the KFP backend, which is emulated."""

import functools
import itertools
import tempfile
from pathlib import Path

import pytest
from kfp import compiler, dsl, local

import pipeline as module
from components._lint import lint, read
from components._placing import Policy
from tests.pipeline import test_lint as broken
from tests.pipeline.backend import Backend, KilledError, StepError
from tests.pipeline.metadata import DriverError

VERSIONS = ["2.14", "2.16", "2.17"]  # 2.15 does all of this as 2.14 does
DECISIONS = ["publish", "retrain", "next", "give-up", "too-big"]
LEAVES = ("publish", "give-up")
TRAIN, MAY_TRAIN = ("train", "search", "retrain"), ("prune", "reduce")
SIZES = ["10x", "20x", "40x"]
#: What a step that trains is given: amounts, a kind of node, and taints.
ASKED = {
    **{"cpu": "3", "memory": "5Gi", "accelerators": "2", "accelerator": "example.com/gpu"},
    "node_selector": {"pool": "gpu"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
}


@functools.cache
def compiled(make=module.build, **bounds):
    return in_file(make(**bounds))


def in_file(made):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(made, str(path))
        return read(path)


def function(step):
    """Name what a step runs: the second task of it has a number."""
    stem, _, number = step.task.rpartition("-")
    return stem if number.isdigit() else step.task


def deciding(*decisions, **failing):
    """Make steps that decide so, the last time for ever; ``give_up`` and ``failing`` end badly."""
    left = itertools.chain(decisions, itertools.repeat(decisions[-1]))

    def outcome(step):
        name = function(step)
        if name in failing:
            raise failing[name]
        if name == "give-up":
            raise StepError
        if name == "evaluate":
            return {"Output": next(left)}
        if name == "check":
            return {"Output": str(min(1, int(step.parameters["accelerators"])))}
        return {"Output": "fits"} if name in ("search", "reduce") else {}

    return outcome


def did(run):
    """Name what was run, each task once however often it was tried."""
    return [function(step) for step in {step.place: step for step in run.started}.values()]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("bounds", [{}, {"rounds": 2, "retrains": 0}], ids=["usual", "no retrains"])
def test_whatever_is_decided_a_run_ends_in_one_leaf_and_is_reported(bounds, version, backwards):
    cluster = Backend(compiled(**bounds), version, backwards)
    for decisions in itertools.product(DECISIONS, repeat=3):
        run = cluster.run(deciding(*decisions))
        assert run.errors == []
        (leaf,) = [name for name in did(run) if name in LEAVES]
        assert did(run)[-1] == "report"
        assert run.status == ("Succeeded" if leaf == "publish" else "Failed")


def test_the_committed_pipeline_is_the_one_that_is_tried_here():
    assert read(module.COMPILED) == compiled()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_sweep_gathers_the_packages_of_all_sizes_in_their_order(version):
    run = Backend(compiled(module.build_sweep), version).run(deciding("give-up"), sizes=SIZES)
    assert (run.status, run.errors) == ("Succeeded", [])
    measured = [made for made in run.executions if made.task == "evaluate"]
    last = [made for made in measured if made.parent.task == "retrain-loop-1"]
    assert len(last) == len(SIZES)
    made = [made.output_artifacts["evaluated"] for made in last]
    (told,) = [step for step in run.started if function(step) == "curve"]
    assert told.artifacts["packages"] == made
    tried = [step.parameters["max_size"] for step in run.started if function(step) == "cluster"]
    assert tried == [size for size in SIZES for _ in range(2)]


@pytest.mark.parametrize("sweeps", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_second_run_decides_the_same_with_what_the_cache_has(version, sweeps):
    cluster = Backend(compiled(module.build_sweep) if sweeps else compiled(), version)
    decisions = ["give-up"] if sweeps else ["retrain", "next", "next", "publish"]
    first, second = (cluster.run(deciding(*decisions)) for _ in range(2))
    assert (second.status, second.errors) == (first.status, []) == ("Succeeded", [])
    places = {step.place for step in first.started}
    assert {step.place for step in second.started} | set(second.cached) == places
    # what is measured anew is a new artifact, and nothing that comes of it is in the cache
    stages = {place.rpartition("/")[2] for place in second.cached}
    assert {"check", "train", "prune", "cluster", "reduce"} <= stages
    assert not stages & {"evaluate", "publish", "give-up", "report"}


def test_a_run_with_other_amounts_finds_nothing_in_the_cache():
    cluster = Backend(compiled())
    cluster.run(deciding("publish"))
    second = cluster.run(deciding("publish"), memory="8Gi")
    assert [place.rpartition("/")[2] for place in second.cached] == ["check"]


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("decisions", [["publish"], ["give-up"], ["retrain", "publish"]])
def test_nothing_is_shown_as_running_but_what_no_launcher_is_the_last_in(decisions, warm):
    cluster = Backend(compiled())
    for _ in range(1 + warm):
        run = cluster.run(deciding(*decisions))
    running = [made for made in run.executions if made.parent and made.state == "RUNNING"]
    if decisions[0] != "retrain":
        assert running == []
        return
    # where a run retrains, "not published" holds and "give up" within does not: nothing runs there
    handler, guard = running
    assert handler.task == "exit-handler-1"
    assert [made.state for made in run.executions if made.parent is guard] == ["CANCELED"]


@pytest.mark.parametrize("version", ["2.14", "2.16"])
def test_before_2_17_the_exit_handler_is_left_running_and_the_report_is_told_so(version):
    run = Backend(compiled(), version).run(deciding("publish"))
    assert run.shown_as("RUNNING") == ["exit-handler-1"]
    assert run.started[-1].parameters["status"]["state"] == "RUNNING"


@pytest.mark.parametrize(
    ("decisions", "failing", "state"),
    [
        (["publish"], {}, "COMPLETE"),
        (["give-up"], {}, "FAILED"),
        (["publish"], {"prune": StepError()}, "FAILED"),
        (["retrain", "publish"], {"retrain": StepError()}, "FAILED"),
        (["publish"], {"train": KilledError()}, "RUNNING"),
        (["publish"], {"publish": KilledError()}, "RUNNING"),
    ],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_however_a_run_ends_the_report_is_told_what_2_17_knows(
    decisions, failing, state, backwards
):
    run = Backend(compiled(), "2.17", backwards).run(deciding(*decisions, **failing))
    assert run.status == ("Succeeded" if state == "COMPLETE" else "Failed")
    assert did(run)[-1] == "report"
    assert run.started[-1].parameters["status"]["state"] == state
    assert run.started[-1].parameters["status"]["error"] == {}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("end", [StepError(), KilledError()], ids=["fails", "is killed"])
def test_a_step_that_does_not_end_well_is_tried_three_times(end, version):
    run = Backend(compiled(), version).run(deciding("publish", prune=end))
    assert [function(step) for step in run.started] == ["check", "train", *["prune"] * 3, "report"]
    assert run.status == "Failed"


@pytest.mark.parametrize("bounds", [{}, {"tries": 2, "hours": 100}])
def test_a_step_that_fails_late_is_tried_again_all_the_same(bounds):
    # workflow/controller/operator.go of Argo: not longer than this after the first try began
    spec = compiled(policy=Policy(**bounds))
    policies = [
        task["retryPolicy"]
        for component in spec["components"].values()
        for task in component.get("dag", {}).get("tasks", {}).values()
        if "retryPolicy" in task
    ]
    settings = spec["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    (deadline,) = {int(setting["activeDeadlineSeconds"]) for setting in settings}
    assert policies
    for policy in policies:
        assert int(policy["backoffMaxDuration"][:-1]) > (policy["maxRetryCount"] + 1) * deadline


def test_a_step_that_ends_well_the_second_time_fails_nothing_but_the_state():
    usual, fails = deciding("retrain", "publish"), iter([True])

    def outcome(step):
        if function(step) == "train" and next(fails, False):
            raise StepError
        return usual(step)

    run = Backend(compiled()).run(outcome)
    assert run.status == "Succeeded"
    assert did(run)[-2:] == ["publish", "report"]
    assert run.started[-1].parameters["status"]["state"] == "FAILED"


@pytest.mark.parametrize(
    "wrong",
    [{"memory": "much"}, {"cpu": ""}, {"node_selector": {"gpu": 1}}, {"tolerations": "all"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_driver_that_refuses_a_parameter_fails_the_run_and_it_is_reported(wrong):
    run = Backend(compiled()).run(deciding("publish"), **wrong)
    assert run.status == "Failed"
    assert len(run.errors) == 1
    # a list or an object of another type is refused before, by the driver of the whole group
    assert did(run) == ([] if "tolerations" in wrong else ["check", "report"])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("make", "bounds"),
    [
        (module.build, {}),
        (module.build, {"retrains": 0}),
        (module.build, {"rounds": 1, "size_tries": 1}),
        (module.build_sweep, {}),
    ],
)
def test_every_step_gets_what_it_asks_for_wherever_it_is(make, bounds, version):
    cluster = Backend(compiled(make, **bounds), version)
    started = []
    for decisions in (["retrain", "next", "next"], ["publish"], ["retrain", "publish"]):
        run = cluster.run(deciding(*decisions), **ASKED)
        assert run.errors == []
        started += run.started
    for step in started:
        name, resources = function(step), {**step.pod["resources"]}
        if name in ("check", "give-up", "report", "curve"):
            assert resources == {}
            continue
        count = resources.pop("example.com/gpu", None)
        memory = dict.fromkeys(["resourceMemoryRequest", "resourceMemoryLimit"], 5 * 2**30)
        assert resources == {"resourceCpuRequest": 3, **memory}
        trains, may_train = (name in names for names in (TRAIN, MAY_TRAIN))
        assert count == (2 if trains else 1 if may_train else None)
        assert step.pod["labels"] == (ASKED["node_selector"] if trains or may_train else {})
        assert step.pod["tolerations"] == (ASKED["tolerations"] if trains or may_train else [])
        assert bool(step.pod["secrets"]) == (name == "publish")
    assert all(step.pod["deadline"] == 24 * 3600 for step in started)


# Why there are rules: what breaks one goes wrong.


def rules_broken_by(spec):
    return {finding.split()[0] for finding in lint(spec)}


def always(**outputs):
    return lambda step: outputs


@pytest.mark.parametrize(
    ("make", "outputs", "rule"),
    [
        (broken.condition_on_a_field, {"word": "a", "number": 1.0}, "L1"),
        (broken.condition_on_a_whole_number, {"Output": 1.0}, "L2"),
    ],
    ids=["a field", "a number"],
)
def test_a_condition_holds_on_a_cluster_and_silently_not_in_kfp_local(
    make, outputs, rule, tmp_path, capsys
):
    spec = in_file(make())
    assert rules_broken_by(spec) == {rule}
    run = Backend(spec).run(always(**outputs))
    first, then = run.started
    assert then.place == "condition-1/decide"
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path))
    make()()  # ends well
    printed = capsys.readouterr().out
    assert f"'{first.task}'" in printed
    assert f"'{then.task}'" not in printed


def one_of_artifacts_used(flag):
    @dsl.pipeline(name="inner")
    def inner(flag: str) -> dsl.Dataset:
        with dsl.If(broken.decide(flag=flag).output == "a"):
            left = broken.make()
        with dsl.Else():
            right = broken.make()
        return dsl.OneOf(left.outputs["data"], right.outputs["data"])

    @dsl.pipeline(name="bad")
    def bad():
        broken.use(data=inner(flag=flag).output)

    return bad


def test_one_of_takes_a_branch_that_was_skipped_or_none_the_second_time():
    spec = in_file(one_of_artifacts_used("a"))
    assert "L3" in rules_broken_by(spec)
    for version in ("2.14", "2.16"):
        assert "not in tasks" in Backend(spec, version).run(always(Output="a")).errors[0]
    cluster = Backend(spec, "2.17")
    assert cluster.run(always(Output="a")).status == "Succeeded"
    assert "no successful task" in cluster.run(always(Output="a")).errors[0]


def test_kfp_local_loses_the_inputs_of_a_sub_pipeline_with_artifacts_only(tmp_path):
    spec = in_file(broken.artifacts_only())
    assert rules_broken_by(spec) == {"L4"}
    assert Backend(spec).run(always()).status == "Succeeded"
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path))
    with pytest.raises(Exception, match="input argument 'data' not found"):
        broken.artifacts_only()()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_sub_pipeline_whose_end_is_cached_is_shown_as_running(version):
    spec = in_file(broken.cached_end())
    assert rules_broken_by(spec) == {"L5"}
    cluster = Backend(spec, version)
    assert cluster.run(always(Output="a")).shown_as("RUNNING") == []
    second = cluster.run(always(Output="a"))
    assert (second.status, second.shown_as("RUNNING")) == ("Succeeded", ["inner"])


def test_an_importer_finds_no_address_that_a_step_has_made():
    @dsl.pipeline(name="bad")
    def bad():
        dsl.importer(artifact_uri=broken.decide(flag="a").output, artifact_class=dsl.Dataset)

    spec = in_file(bad)
    assert rules_broken_by(spec) == {"L8"}
    assert "resolving artifact URI" in Backend(spec).run(always(Output="gs://b")).errors[0]
    assert Backend(in_file(broken.importer())).run(always()).status == "Succeeded"


def test_an_artifact_iterator_is_refused_by_its_driver():
    spec = in_file(broken.clean())
    spec["root"]["dag"]["tasks"]["decide"]["artifactIterator"] = {"items": {}}
    assert rules_broken_by(spec) == {"L8"}
    assert "artifact iterator" in Backend(spec).run(always(Output="a")).errors[0]


def test_what_waits_for_a_step_that_ignores_failures_is_no_workflow():
    @dsl.pipeline(name="bad")
    def bad():
        ignoring = broken.decide(flag=broken.decide(flag="a").output).ignore_upstream_failure()
        broken.decide(flag=ignoring.output)

    spec = in_file(bad)
    assert rules_broken_by(spec) == {"L9"}
    with pytest.raises(DriverError, match="waits for an exit task"):
        Backend(spec).run(always(Output="a"))


@pytest.mark.parametrize("version", VERSIONS)
def test_what_a_loop_with_a_name_gathers_is_not_found_before_2_16(version):
    @dsl.component(base_image="python:3.11", install_kfp_package=False)
    def gather(flags: list):
        pass

    @dsl.pipeline(name="bad")
    def bad():
        with dsl.ParallelFor(["a", "b"], name="letters") as letter:
            decided = broken.decide(flag=letter)
        gather(flags=dsl.Collected(decided.output))

    spec = in_file(bad)
    assert rules_broken_by(spec) == {"L10"}
    run = Backend(spec, version).run(lambda step: {"Output": step.parameters.get("flag")})
    if version >= "2.16":
        assert run.started[-1].parameters == {"flags": ["a", "b"]}
    else:
        assert "for-loop-2_1, not in tasks" in run.errors[0]


@pytest.mark.parametrize(
    ("make", "rule", "reason"),
    [
        (broken.amount_without_default, "L11", "Invalid number"),
        (broken.amount_without_default_by_another_name, "L11", "Invalid number"),
        (broken.amount_that_is_none, "L11", "Invalid number"),
        (broken.amount_inside_of_a_condition, "L12", "does not have input parameter"),
        (broken.equal_containers, "L13", "neither value nor default"),
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_driver_refuses_what_a_rule_refuses(make, rule, reason, version):
    spec = in_file(make())
    assert rules_broken_by(spec) == {rule}
    run = Backend(spec, version).run(always(Output="a"))
    assert run.status == "Failed"
    assert reason in run.errors[0]
