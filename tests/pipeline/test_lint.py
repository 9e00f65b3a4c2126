"""The lint of a compiled pipeline: each rule fires on a pipeline that breaks it."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from kfp import compiler, dsl, kubernetes

from components._lint import RULES, check, images_are_pinned, lint, read
from filterpress.errors import FilterpressError


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def decide(flag: str = "") -> str:
    return flag


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def decide_two() -> NamedTuple("Two", [("word", str), ("number", float)]):
    return ("a", 1.0)


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def measure() -> float:
    return 1.0


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def make(data: dsl.Output[dsl.Dataset]):
    pass


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def use(data: dsl.Input[dsl.Dataset]):
    pass


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def on_exit(status: dsl.PipelineTaskFinalStatus):
    pass


def clean():
    @dsl.pipeline(name="inner")
    def inner(data: dsl.Input[dsl.Dataset], flag: str):
        use(data=data)
        decide(flag=flag).set_caching_options(False)
        use(data=data).set_caching_options(False)

    @dsl.pipeline(name="clean")
    def outer(flag: str = "a", memory: str = "4Gi", kind: str = "nvidia.com/gpu"):
        asks = decide(flag=flag).set_memory_limit(memory).set_accelerator_type(kind)
        asks.set_accelerator_limit(1)
        with dsl.ExitHandler(on_exit().set_caching_options(False)), dsl.If(flag == "a"):
            decide(flag=flag)
        decided = decide(flag=flag)
        with dsl.If(decided.output == "a"):
            decide(flag=flag)
        decide(flag=flag).set_accelerator_type(kind).set_accelerator_limit(decided.output)

    return outer


def condition_on_a_field():
    @dsl.pipeline(name="bad")
    def bad():
        with dsl.If(decide_two().outputs["word"] == "a"):
            decide()

    return bad


def condition_on_a_number():
    @dsl.pipeline(name="bad")
    def bad():
        with dsl.If(measure().output == 1.0):
            decide()

    return bad


def condition_on_a_whole_number():
    @dsl.pipeline(name="bad")
    def bad():
        with dsl.If(measure().output == 1):
            decide()

    return bad


def one_of_parameters():
    @dsl.pipeline(name="inner")
    def inner(flag: str) -> str:
        with dsl.If(decide(flag=flag).output == "a"):
            left = decide().set_caching_options(False)
        with dsl.Else():
            right = decide().set_caching_options(False)
        return dsl.OneOf(left.output, right.output)

    @dsl.pipeline(name="bad")
    def bad():
        inner(flag="a")

    return bad


def one_of_artifacts():
    @dsl.pipeline(name="inner")
    def inner(flag: str) -> dsl.Dataset:
        with dsl.If(decide(flag=flag).output == "a"):
            left = make().set_caching_options(False)
        with dsl.Else():
            right = make().set_caching_options(False)
        return dsl.OneOf(left.outputs["data"], right.outputs["data"])

    @dsl.pipeline(name="bad")
    def bad():
        inner(flag="a")

    return bad


def artifacts_only():
    @dsl.pipeline(name="inner")
    def inner(data: dsl.Input[dsl.Dataset]):
        use(data=data).set_caching_options(False)

    @dsl.pipeline(name="bad")
    def bad():
        inner(data=make().outputs["data"])

    return bad


def cached_end():
    @dsl.pipeline(name="inner")
    def inner(flag: str):
        decide(flag=flag)

    @dsl.pipeline(name="bad")
    def bad():
        inner(flag="a")

    return bad


def many_steps():
    @dsl.pipeline(name="bad")
    def bad():
        for _ in range(300):
            decide()

    return bad


def importer():
    @dsl.pipeline(name="bad")
    def bad(uri: str = "gs://bucket/data"):
        dsl.importer(artifact_uri=uri, artifact_class=dsl.Dataset)

    return bad


def ignored_failure():
    @dsl.pipeline(name="bad")
    def bad():
        decide(flag=decide(flag="a").output).ignore_upstream_failure()

    return bad


def amount_without_default():
    @dsl.pipeline(name="bad")
    def bad(memory: str = ""):
        decide().set_memory_limit(memory)

    return bad


def amount_without_default_by_another_name():
    @dsl.pipeline(name="inner")
    def inner(amount: str):
        decide().set_memory_limit(amount).set_caching_options(False)

    @dsl.pipeline(name="bad")
    def bad(memory: str = ""):
        inner(amount=memory)

    return bad


def amount_that_is_none():
    @dsl.pipeline(name="bad")
    def bad(cpu: str = "many"):
        decide().set_cpu_request(cpu)

    return bad


def display_name():
    @dsl.pipeline(name="bad")
    def bad():
        decide().set_display_name("a nicer name")

    return bad


def name_of_a_loop():
    @dsl.pipeline(name="bad")
    def bad():
        with dsl.ParallelFor(["a", "b"], name="letters") as letter:
            decide(flag=letter)

    return bad


def amount_inside_of_a_condition():
    @dsl.pipeline(name="bad")
    def bad(flag: str = "a", memory: str = "4Gi"):
        with dsl.If(flag == "a"):
            decide().set_memory_limit(memory)

    return bad


def labels_inside_of_a_condition():
    @dsl.pipeline(name="bad")
    def bad(flag: str = "a", labels: dict = {}):  # noqa: B006
        with dsl.If(flag == "a"):
            kubernetes.add_node_selector_json(decide(), labels)

    return bad


def equal_containers():
    @dsl.container_component
    def letter(flag: str):
        return dsl.ContainerSpec(image="python:3.11", command=["true"])

    @dsl.container_component
    def number(count: int):
        return dsl.ContainerSpec(image="python:3.11", command=["true"])

    @dsl.pipeline(name="bad")
    def bad():
        letter(flag="a")
        number(count=1)

    return bad


def spec_of(make_pipeline: Callable, folder):
    path = folder / "pipeline.yaml"
    compiler.Compiler().compile(make_pipeline(), str(path))
    return read(path)


BAD = {
    condition_on_a_field: "L1",
    condition_on_a_number: "L2",
    condition_on_a_whole_number: "L2",
    one_of_parameters: "L3",
    one_of_artifacts: "L3",
    artifacts_only: "L4",
    cached_end: "L5",
    many_steps: "L7",
    importer: "L8",
    ignored_failure: "L9",
    display_name: "L10",
    name_of_a_loop: "L10",
    amount_inside_of_a_condition: "L12",
    equal_containers: "L13",
    amount_without_default: "L11",
    amount_without_default_by_another_name: "L11",
    amount_that_is_none: "L11",
}


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.__name__)
def test_a_rule_fires_on_a_pipeline_that_breaks_it_and_no_other_does(bad, tmp_path):
    findings = lint(spec_of(bad, tmp_path))
    assert {finding.split()[0] for finding in findings} == {BAD[bad]}


def test_a_pipeline_that_keeps_the_rules_is_clean(tmp_path):
    assert lint(spec_of(clean, tmp_path)) == []


def test_a_tag_is_refused_only_where_images_must_be_pinned(tmp_path):
    spec = spec_of(clean, tmp_path)
    findings = lint(spec, pinned=True)
    assert {finding.split()[0] for finding in findings} == {"L6"}
    assert len(findings) == len(spec["deploymentSpec"]["executors"])


def test_an_artifact_iterator_is_refused(tmp_path):
    spec = spec_of(clean, tmp_path)
    spec["root"]["dag"]["tasks"]["decide"]["artifactIterator"] = {"items": {}}
    assert [finding.split()[0] for finding in lint(spec)] == ["L8"]


def test_settings_whose_parameters_a_group_does_not_have_are_refused(tmp_path):
    spec = spec_of(labels_inside_of_a_condition, tmp_path)
    assert lint(spec) == []
    del spec["components"]["comp-condition-1"]["inputDefinitions"]["parameters"][
        "pipelinechannel--labels"
    ]
    assert [finding.split()[0] for finding in lint(spec)] == ["L12"]


def test_every_rule_is_tried_by_a_pipeline_that_breaks_it():
    numbers = {rule.__doc__.split(":")[0] for rule in [*RULES, images_are_pinned]}
    assert numbers == {*BAD.values(), "L6"}


def test_a_refusal_names_the_file_and_every_finding(tmp_path):
    path = tmp_path / "pipeline.yaml"
    compiler.Compiler().compile(display_name(), str(path))
    with pytest.raises(FilterpressError, match=r"pipeline\.yaml: L10 decide: a display name"):
        check(path)


def test_every_rule_is_in_the_documentation_with_its_reason():
    page = (Path(__file__).parents[2] / "docs" / "pipeline.md").read_text(encoding="utf-8")
    for rule in [*RULES, images_are_pinned]:
        number, _, reason = " ".join(rule.__doc__.split()).partition(": ")
        assert f"| {number} | {reason} |" in page
