"""The components: interfaces only."""

import ast
import inspect
from pathlib import Path

import pytest
from kfp import dsl

import components
from filterpress import stages
from filterpress.flags import help_of

STAGES = [
    "check",
    "train",
    "prune",
    "search",
    "cluster",
    "reduce",
    "evaluate",
    "retrain",
    "publish",
]
STAGES += ["give_up", "report", "curve"]
FOLDER = Path(components.__file__).parent
DECISIONS = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.BoolOp, ast.Match, ast.Compare)
ARITHMETIC = (ast.BinOp, ast.UnaryOp, ast.AugAssign)
OUTPUTS = (dsl.Output[dsl.Model], dsl.Output[dsl.Metrics], dsl.Output[dsl.HTML])


def component(name):
    return getattr(__import__(f"components.{name}", fromlist=[name]), name)


def function_in(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return function


def library_calls(function):
    called = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return [call.attr for call in called if isinstance(call, ast.Attribute) and is_stages(call)]


def is_stages(call):
    return isinstance(call.value, ast.Name) and call.value.id == "stages"


def test_every_stage_has_one_component_file_and_there_are_no_others():
    assert sorted(path.stem for path in FOLDER.glob("[a-z]*.py")) == sorted(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_a_component_decides_nothing_and_computes_nothing(name):
    found = [node for node in ast.walk(function_in(name)) if isinstance(node, DECISIONS)]
    found += [node for node in ast.walk(function_in(name)) if isinstance(node, ARITHMETIC)]
    assert not found, [ast.unparse(node) for node in found]


@pytest.mark.parametrize("name", STAGES)
def test_a_component_makes_one_call_into_the_stages_namely_its_own(name):
    assert library_calls(function_in(name)) == [name]


@pytest.mark.parametrize("name", STAGES)
def test_a_component_imports_only_inside_of_its_body_what_its_container_must_have(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    imported = [
        ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert set(imported) <= {"from kfp import dsl", "from components import stage"}


@pytest.mark.parametrize("name", STAGES)
def test_a_component_passes_every_parameter_that_its_stage_has(name):
    (call,) = [
        node
        for node in ast.walk(function_in(name))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and is_stages(node.func)
    ]
    passed = [keyword.arg for keyword in call.keywords]
    wanted = inspect.signature(getattr(stages, name)).parameters.values()
    assert sorted(passed) == sorted(p.name for p in wanted if p.kind is p.KEYWORD_ONLY)


@pytest.mark.parametrize("name", STAGES)
def test_a_component_says_what_each_of_its_parameters_is(name):
    function = component(name).python_func
    assert list(help_of(function)) == list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", STAGES)
def test_a_component_has_no_default_because_the_pipeline_has_them(name):
    parameters = inspect.signature(component(name).python_func).parameters.values()
    assert [p.name for p in parameters if p.default is not p.empty] == []


@pytest.mark.parametrize("name", set(STAGES) - {"check"})
def test_a_component_leaves_a_page_for_the_ui(name):
    kinds = inspect.signature(component(name).python_func).parameters
    assert kinds["page"].annotation == dsl.Output[dsl.HTML]
    assert ("report" in kinds) == (name not in {"give_up", "report"})  # its metrics


def test_only_the_deciding_components_return_a_value_and_it_is_one_string():
    returns = {name: component(name).python_func.__annotations__.get("return") for name in STAGES}
    deciding = {"check", "search", "reduce", "evaluate"}
    assert {name for name, kind in returns.items() if kind} == deciding
    assert {kind for kind in returns.values() if kind} == {str}


@pytest.mark.parametrize("name", STAGES)
def test_a_component_installs_nothing_when_it_starts(name):
    container = component(name).component_spec.implementation.container
    assert container.image == components.IMAGE
    assert not any("pip" in part for part in container.command)
