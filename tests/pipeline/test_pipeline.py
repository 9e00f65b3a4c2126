"""The compiled pipeline: the loop as a staircase of conditions."""

import functools
import inspect
import itertools
import operator
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from google.protobuf import json_format
from kfp import compiler

import pipeline as module
from components._ir import pin
from components._lint import check
from filterpress.loop import compress

ROOT = Path(module.__file__).parent
DECISIONS = ["publish", "retrain", "next", "give-up", "too-big"]
CONDITION = re.compile(r"parameter_values\['([^']+)'\] (==|!=) '([a-z-]+)'")
SIGNS = {"==": operator.eq, "!=": operator.ne}
SUB_PIPELINE = r"(round|retrain-loop)-\d+"
FIRST = {"train", "prune", "search"}
SIDE_EFFECTS = ("publish", "give-up")


@functools.cache
def compiled(**bounds):
    return json_format.MessageToDict(module.build(**bounds).pipeline_spec)


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

    return [name for name in walk(spec["root"]["dag"]) if name not in FIRST]


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
    compiler.Compiler().compile(module.build(), str(tmp_path / "fresh.yaml"))
    fresh = (tmp_path / "fresh.yaml").read_text(encoding="utf-8")
    assert module.COMPILED.read_text(encoding="utf-8") == fresh, "run: python pipeline.py compile"


def test_the_committed_pipeline_is_clean():
    check(module.COMPILED)


def test_measurements_and_side_effects_never_come_from_the_cache():
    uncached = ("evaluate", *SIDE_EFFECTS)
    for name, task in every_task(compiled()):
        if "enableCache" in task.get("cachingOptions", {}):
            assert not name.startswith(uncached), name
        elif not name.startswith(("condition", "round", "retrain-loop")):
            assert name.startswith(uncached), name


def test_a_measurement_may_come_from_the_cache_of_one_machine_but_a_side_effect_may_not():
    for name, task in every_task(compiled(cache_evaluate=True)):
        cached = task.get("cachingOptions", {}).get("enableCache", False)
        if name.startswith("evaluate"):
            assert cached
        if name.startswith(SIDE_EFFECTS):
            assert not cached


def test_the_defaults_are_those_of_the_library():
    given = inspect.signature(module.build(rounds=1).pipeline_func).parameters
    known = inspect.signature(compress).parameters
    compile_time = {"out", "size_tries"}
    assert set(given) == set(known) - compile_time
    assert {n: p.default for n, p in given.items()} == {n: known[n].default for n in given}


def test_every_parameter_of_the_form_has_a_default_and_a_help_text():
    for name, parameter in compiled()["root"]["inputDefinitions"]["parameters"].items():
        assert parameter.get("description"), name
        assert "defaultValue" in parameter, name


def test_every_stage_of_the_pipeline_is_written_down_once():
    executors = compiled()["deploymentSpec"]["executors"]
    functions = [executor["container"]["args"][-1] for executor in executors.values()]
    assert len(functions) == len(set(functions)) == 9


def test_every_component_runs_the_function_that_its_task_is_named_after():
    spec = compiled()
    for name, task in every_task(spec):
        component = spec["components"][task["componentRef"]["name"]]
        if "executorLabel" in component:
            executor = spec["deploymentSpec"]["executors"][component["executorLabel"]]
            function = executor["container"]["args"][-1].replace("_", "-")
            assert re.fullmatch(rf"{function}(-\d+)?", name)


def test_the_step_that_signs_is_shown_the_keys_and_no_other_step_is():
    spec = compiled()
    (platform,) = json_format.MessageToDict(module.build().platform_spec)["platforms"].values()
    ((label, settings),) = platform["deploymentSpec"]["executors"].items()
    executor = spec["deploymentSpec"]["executors"][label]
    assert executor["container"]["args"][-1] == "publish"
    (volume,) = settings["secretAsVolume"]
    assert volume["mountPath"] == "/etc/filterpress/keys"
    assert volume["optional"]  # a run that publishes nothing needs no keys


def test_pinning_changes_the_image_of_every_step(tmp_path):
    image = "registry/filterpress-python@sha256:" + "0" * 64
    compiler.Compiler().compile(pin(module.build(), image), str(tmp_path / "pinned.yaml"))
    check(tmp_path / "pinned.yaml", pinned=True)
    spec = next(yaml.safe_load_all((tmp_path / "pinned.yaml").read_text(encoding="utf-8")))
    images = {e["container"]["image"] for e in spec["deploymentSpec"]["executors"].values()}
    assert images == {image}


@pytest.mark.parametrize(
    "bounds", [{"rounds": 0}, {"size_tries": 0}, {"retrains": -1}], ids=lambda b: next(iter(b))
)
def test_impossible_bounds_are_refused(bounds):
    (name,) = bounds
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        module.build(**bounds)
