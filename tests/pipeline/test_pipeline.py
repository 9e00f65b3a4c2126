"""The compiled pipeline: the loop as a staircase of conditions."""

import functools
import inspect
import itertools
import operator
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from google.protobuf import json_format
from kfp import compiler
from typer.testing import CliRunner

import pipeline as module
from components._ir import pin, settle_names
from components._lint import check
from components._placing import LOCAL, Policy, check_amounts
from components._placing import PARAMETERS as CLUSTER_ONLY
from filterpress import stages
from filterpress.flags import help_of
from filterpress.loop import compress
from tests.pipeline import test_components

ROOT = Path(module.__file__).parent
DECISIONS = ["publish", "retrain", "next", "give-up", "too-big"]
CONDITION = re.compile(r"parameter_values\['([^']+)'\] (==|!=) '([a-z-]+)'")
SIGNS = {"==": operator.eq, "!=": operator.ne}
SUB_PIPELINE = r"(round|retrain-loop)-\d+"
FIRST = {"check", "train", "prune", "search"}
SIDE_EFFECTS = ("publish", "give-up")
FUNCTIONS = len(test_components.STAGES) - len(["curve"])  # which is of the sweep


@functools.cache
def built(**bounds):
    return module.build(**bounds)


@functools.cache
def compiled(**bounds):
    return json_format.MessageToDict(built(**bounds).pipeline_spec)


@functools.cache
def settings_of(**bounds):
    """Return what steps ask of a cluster besides the resources of their containers."""
    found = json_format.MessageToDict(built(**bounds).platform_spec)
    return found["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def every_task(spec):
    for component in (spec["root"], *spec["components"].values()):
        yield from component.get("dag", {}).get("tasks", {}).items()


def leaves(spec, decisions):
    """Walk the graph as a runner does; sub-pipelines decide as told; give the last steps run."""
    told = {}

    def holds(task):
        condition = task.get("triggerPolicy", {}).get("condition", "")
        return all(
            SIGNS[sign](outcome(re.search(SUB_PIPELINE, parameter)[0]), wanted)
            for parameter, sign, wanted in CONDITION.findall(condition)
        )

    def outcome(name):
        if name not in told:
            told[name] = next(decisions)
        return told[name]

    def walk(dag):
        for name, task in dag["tasks"].items():
            below = spec["components"][task["componentRef"]["name"]].get("dag")
            if not holds(task):
                continue
            if below is None:
                yield name
            elif not re.fullmatch(SUB_PIPELINE, name):
                yield from walk(below)

    return [name for name in walk(spec["root"]["dag"]) if name not in FIRST | {"report"}]


@pytest.mark.parametrize("bounds", [{}, {"rounds": 1}, {"rounds": 2, "retrains": 0}])
def test_whatever_is_decided_a_run_ends_in_exactly_one_leaf(bounds):
    spec = compiled(**bounds)
    for decisions in itertools.product(DECISIONS, repeat=4):
        ended = leaves(spec, iter(decisions + ("next",) * 4))
        assert len(ended) == 1, decisions
        assert ended[0].startswith(SIDE_EFFECTS), decisions


@pytest.mark.parametrize(
    ("decisions", "leaf"),
    [
        (["publish"], "publish"),
        (["too-big"], "give-up"),
        (["give-up"], "give-up"),
        (["retrain", "publish"], "publish"),
        (["retrain", "give-up"], "give-up"),
        (["retrain", "next", "publish"], "publish"),
        (["retrain", "next", "too-big"], "give-up"),
        (["retrain", "next", "retrain", "next", "retrain", "publish"], "publish"),
        (["retrain", "next", "retrain", "next", "retrain", "next"], "give-up"),
        (["retrain", "retrain"], "give-up"),
    ],
)
def test_a_run_takes_the_branch_that_was_decided(decisions, leaf):
    (ended,) = leaves(compiled(), iter(decisions))
    assert ended.startswith(leaf)


def test_rounds_without_retrains_go_straight_to_the_next():
    spec = compiled(rounds=2, retrains=0)
    (ended,) = leaves(spec, iter(["next", "publish"]))
    assert ended.startswith("publish")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [("[]", "sizes must be at least one"), ('["tiny"]', "max_size must be bytes")],
)
def test_a_sweep_over_no_sizes_is_refused_before_anything_is_made(sizes, message, tmp_path):
    refused = CliRunner().invoke(
        module.app, ["sweep", "--out", str(tmp_path / "run"), "--sizes", sizes]
    )
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_sweep_with_a_method_that_there_is_not_is_refused_before_anything_is_made(tmp_path):
    given = ["--out", str(tmp_path / "run"), "--reduce-config", '{"method": "shrink"}']
    refused = CliRunner().invoke(module.app, ["sweep", *given])
    assert refused.exit_code == 2
    assert "reduce_config: method must be one of" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_the_sweep_is_not_compiled_over_the_pipeline():
    before = module.COMPILED.read_bytes()
    refused = CliRunner().invoke(module.app, ["compile", "--sweep"])
    assert refused.exit_code == 2
    assert "output must be another file for the sweep" in refused.stderr
    assert module.COMPILED.read_bytes() == before


def test_the_sweep_keeps_the_rules_and_its_parameters_are_those_of_a_run(tmp_path):
    made = CliRunner().invoke(
        module.app, ["compile", "--sweep", "--output", str(tmp_path / "sweep.yaml")]
    )
    assert made.exit_code == 0, made.output
    spec = next(yaml.safe_load_all((tmp_path / "sweep.yaml").read_text(encoding="utf-8")))
    (loop,) = [task for _, task in every_task(spec) if "parameterIterator" in task]
    assert loop["iteratorPolicy"]["parallelismLimit"] == 4
    swept, run = (inspect.signature(f).parameters for f in (module.SWEEP, module.PARAMETERS))
    assert swept.keys() - run.keys() == {"sizes"}
    shared = swept.keys() & run.keys() - {"max_retrains"}
    assert {n: swept[n].default for n in shared} == {n: run[n].default for n in shared}
    said, told = help_of(module.SWEEP), help_of(module.PARAMETERS)
    alike = shared - {"min_accuracy"}  # which ends no sweep
    assert {n: said[n] for n in alike} == {n: told[n] for n in alike}


def test_compiling_gives_the_same_bytes_in_every_process(tmp_path):
    files = [tmp_path / f"{seed}.yaml" for seed in range(2)]
    for seed, file in enumerate(files):
        subprocess.run(
            [sys.executable, ROOT / "pipeline.py", "compile", "-o", file],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            check=True,
        )
    assert len({file.read_bytes() for file in files}) == 1


def test_the_committed_pipeline_is_what_compiling_gives(tmp_path):
    compiler.Compiler().compile(built(), str(tmp_path / "fresh.yaml"))
    fresh = (tmp_path / "fresh.yaml").read_text(encoding="utf-8")
    assert module.COMPILED.read_text(encoding="utf-8") == fresh, "run: python pipeline.py compile"


def test_the_committed_pipeline_is_clean():
    check(module.COMPILED)


def test_measurements_and_side_effects_never_come_from_the_cache():
    uncached = ("evaluate", "report", *SIDE_EFFECTS)
    for name, task in every_task(compiled()):
        if "enableCache" in task.get("cachingOptions", {}):
            assert not name.startswith(uncached), name
        elif not name.startswith(("condition", "exit-handler", "round", "retrain-loop")):
            assert name.startswith(uncached), name


def test_a_measurement_may_come_from_the_cache_of_one_machine_but_a_side_effect_may_not():
    for name, task in every_task(compiled(policy=LOCAL)):
        cached = task.get("cachingOptions", {}).get("enableCache", False)
        if name.startswith("evaluate"):
            assert cached
        if name.startswith(SIDE_EFFECTS):
            assert not cached


def test_the_defaults_are_those_of_the_library():
    given = inspect.signature(built(rounds=1).pipeline_func).parameters
    known = inspect.signature(compress).parameters
    compile_time = {"out", "size_tries"}
    shared = set(given) - set(CLUSTER_ONLY)
    assert shared == set(known) - compile_time
    assert {n: given[n].default for n in shared} == {n: known[n].default for n in shared}


def test_every_parameter_of_the_form_has_a_default_and_a_help_text_with_its_group():
    groups = []
    for name, parameter in compiled()["root"]["inputDefinitions"]["parameters"].items():
        group, _, text = parameter["description"].partition(": ")
        assert text, name
        assert "defaultValue" in parameter, name
        groups.append(group)
    assert set(groups) == {"Train", "Data", "Goal", "Machines", "Methods", "Publish", "Cluster"}


def test_nothing_but_the_report_runs_before_the_settings_were_looked_at():
    spec = compiled()
    (handler,) = spec["root"]["dag"]["tasks"].keys() - {"report"}
    tasks = spec["components"][spec["root"]["dag"]["tasks"][handler]["componentRef"]["name"]]["dag"]
    waits = {name: set(task.get("dependentTasks", [])) for name, task in tasks["tasks"].items()}
    free = [name for name, others in waits.items() if not others]
    assert free == ["check"]


def test_every_setting_that_can_be_looked_at_beforehand_is():
    looked_at = set(inspect.signature(stages.check).parameters) - {
        "size_tries",
        "sizes",
        "rounds",
        "retrains",
    }
    given = set(inspect.signature(built(rounds=1).pipeline_func).parameters)
    names = {
        "weights",
        "data_dir",
        "seed",
        "runtime",
        "name",
        *CLUSTER_ONLY,
    } - {"accelerators"}  # any will do, or take reading
    assert looked_at == given - names


def asked(spec, function):
    """Return what a step asks of a cluster: of its container, and of the platform."""
    executors = spec["deploymentSpec"]["executors"]
    (label,) = [n for n, e in executors.items() if e["container"]["args"][-1] == function]
    return executors[label]["container"].get("resources", {}), settings_of()[label]


@pytest.mark.parametrize("function", ["train", "prune", "search", "reduce", "retrain"])
def test_what_trains_asks_for_accelerators_and_nodes_that_have_them(function):
    resources, platform = asked(compiled(), function)
    told = {"prune": "check-Output", "reduce": "shrink_accelerators"}
    count = f"pipelinechannel--{told.get(function, 'accelerators')}'"
    assert count in resources["accelerator"]["resourceCount"]
    assert "node_selector" in str(platform["nodeSelector"])
    assert "tolerations" in str(platform["tolerations"])


@pytest.mark.parametrize("function", ["cluster", "evaluate", "publish"])
def test_what_does_not_train_asks_for_memory_and_cpus_only(function):
    resources, platform = asked(compiled(), function)
    assert set(resources) == {"resourceCpuRequest", "resourceMemoryLimit", "resourceMemoryRequest"}
    assert not {"nodeSelector", "tolerations"} & set(platform)


def test_a_step_is_tried_again_unless_its_failure_is_what_it_is_for():
    tried = {name for name, task in every_task(compiled()) if "retryPolicy" in task}
    assert not [name for name in tried if name.startswith(("give-up", "check", "report"))]
    assert {"train", "prune", "search", "cluster", "reduce", "retrain", "publish"} <= tried
    here = compiled(policy=LOCAL)
    assert not [name for name, task in every_task(here) if "retryPolicy" in task]


def test_no_step_hangs_for_ever():
    settings = settings_of()
    assert settings.keys() == compiled()["deploymentSpec"]["executors"].keys()
    assert {entry["activeDeadlineSeconds"] for entry in settings.values()} == {str(24 * 3600)}


def test_every_step_pulls_its_image_with_the_secrets_that_are_named():
    for entry in settings_of(rounds=1, policy=Policy(pull_secrets=("registry",))).values():
        assert "registry" in str(entry["imagePullSecret"])


@pytest.mark.parametrize("amount", [{"cpu": "two"}, {"memory": ""}, {"accelerators": "-1"}])
def test_an_amount_that_a_cluster_would_refuse_is_refused(amount):
    (name,) = amount
    with pytest.raises(ValueError, match=f"{name} must be an amount like 2, 500m or 4Gi, got"):
        check_amounts({"cpu": "500m", "memory": "4Gi", "accelerators": "0"} | amount)


def test_every_stage_of_the_pipeline_is_written_down_once():
    executors = compiled()["deploymentSpec"]["executors"]
    functions = [executor["container"]["args"][-1] for executor in executors.values()]
    assert len(functions) == len(set(functions)) == FUNCTIONS


def test_every_component_runs_the_function_that_its_task_is_named_after():
    spec = compiled()
    for name, task in every_task(spec):
        component = spec["components"][task["componentRef"]["name"]]
        if "executorLabel" in component:
            executor = spec["deploymentSpec"]["executors"][component["executorLabel"]]
            function = executor["container"]["args"][-1].replace("_", "-")
            assert re.fullmatch(rf"{function}(-\d+)?", name)


def test_the_step_that_signs_is_shown_the_keys_and_no_other_step_is():
    shown = {name for name, entry in settings_of().items() if "secret" in str(entry)}
    assert shown == {"exec-publish"}
    (volume,) = asked(compiled(), "publish")[1]["secretAsVolume"]
    assert volume["mountPath"] == "/etc/filterpress/keys"
    assert volume["optional"]  # a run that publishes nothing needs no keys


def test_settings_that_differ_between_tasks_of_a_step_are_refused():
    pipeline = module.build(rounds=1)
    executors = pipeline.platform_spec.platforms["kubernetes"].deployment_spec.executors
    executors["exec-prune-2"].CopyFrom(executors["exec-publish"])
    with pytest.raises(ValueError, match="settings of prune for a cluster must be the same"):
        settle_names(pipeline)


def test_pinning_changes_the_image_of_every_step(tmp_path):
    image = "registry/filterpress-python@sha256:" + "0" * 64
    compiler.Compiler().compile(pin(module.build(), image), str(tmp_path / "pinned.yaml"))
    check(tmp_path / "pinned.yaml", pinned=True)
    spec = next(yaml.safe_load_all((tmp_path / "pinned.yaml").read_text(encoding="utf-8")))
    images = {e["container"]["image"] for e in spec["deploymentSpec"]["executors"].values()}
    assert images == {image}


@pytest.mark.parametrize("flags", [["--image", "registry/filterpress-python:1"], ["--rounds", "9"]])
def test_a_compilation_that_is_refused_leaves_the_file_as_it_was(tmp_path, flags):
    file = tmp_path / "pipeline.yaml"
    file.write_text("before")
    refused = CliRunner().invoke(module.app, ["compile", "--output", str(file), *flags])
    assert refused.exit_code == 2
    (line,) = refused.stderr.splitlines()
    assert "with 64 hexadecimal digits" in line or "the limit is 240000" in line
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_manifests_that_are_refused_stay_as_they_were(tmp_path):
    folder = shutil.copytree(ROOT / "manifests", tmp_path / "manifests")
    (folder / "pipeline.yaml").write_text("before")
    overlay = folder / "overlays" / "prod" / "kustomization.yaml"
    overlay.write_text(overlay.read_text().replace("digest: sha256:", "newTag: sha256-"))
    before = {file: file.read_bytes() for file in folder.rglob("*.*")}
    refused = CliRunner().invoke(module.app, ["manifests", str(folder)])
    assert refused.exit_code == 2
    assert f"{overlay} must give the digest of filterpress-python" in refused.stderr
    assert {file: file.read_bytes() for file in folder.rglob("*.*")} == before


@pytest.mark.parametrize(
    "bounds", [{"rounds": 0}, {"size_tries": 0}, {"retrains": -1}], ids=lambda b: next(iter(b))
)
def test_impossible_bounds_are_refused(bounds):
    (name,) = bounds
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        module.build(**bounds)
