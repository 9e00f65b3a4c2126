"""kfp.local, run strictly and in the open. The pipelines here are small ones of their own."""

import json
import logging
from pathlib import Path
from typing import NamedTuple

import pytest
from kfp import dsl, local

from components import _local
from components._local import ConditionError, Step, execute, fingerprint, on_this_machine, strict
from filterpress.errors import BudgetError, FilterpressError


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def say(text: str, said: dsl.Output[dsl.Artifact], report: dsl.Output[dsl.Metrics]) -> str:
    from pathlib import Path

    from filterpress import recording

    Path(said.path).write_text(text)
    recording.record({"n_bytes": len(text), "loss": float("nan")}, report, said)
    return text


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def say_two() -> NamedTuple("Two", [("word", str), ("number", float)]):
    return ("yes", 1.0)


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def fail(text: str):
    from filterpress import errors

    print("not the last line")  # noqa: T201
    raise getattr(errors, text)("12 bytes of 10")


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def be_killed():
    import os

    os.kill(os.getpid(), 9)


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def end_silently():
    import os

    os._exit(3)


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def tell_the_end(status: dsl.PipelineTaskFinalStatus):
    print(f"it {status.state}")  # noqa: T201


def two_steps():
    @dsl.pipeline(name="inner")
    def inner(text: str) -> str:
        return say(text=text).outputs["Output"]

    @dsl.pipeline(name="two-steps")
    def outer(text: str = "yes"):
        first = inner(text=text)
        with dsl.If(first.output == "yes"):
            say(text="done").set_caching_options(False)

    return outer


def field_condition():
    @dsl.pipeline(name="field-condition")
    def outer():
        with dsl.If(say_two().outputs["word"] == "yes"):
            say(text="never")

    return outer


def quote_condition():
    @dsl.pipeline(name="quote-condition")
    def outer(text: str = "it's"):
        with dsl.If(say(text=text).outputs["Output"] == "yes"):
            say(text="never")

    return outer


def with_exit_handler():
    @dsl.pipeline(name="with-exit-handler")
    def outer(text: str = "yes"):
        with dsl.ExitHandler(tell_the_end(), name="run"):
            fail(text="BudgetError").after(say(text=text))

    return outer


def failing(component, **given):
    @dsl.pipeline(name="inner")
    def inner(text: str):
        component(**given)

    @dsl.pipeline(name="failing")
    def outer():
        inner(text="")

    return outer


def steps_of(pipeline, out, **arguments):
    steps = []
    execute(pipeline, arguments, out, steps.append)
    return steps


def test_every_step_is_told_with_where_it_is_and_what_it_reported(tmp_path):
    steps = steps_of(two_steps(), tmp_path)
    assert [step.name for step in steps] == ["inner/say", "say"]
    assert [step.report["n_bytes"] for step in steps] == [3, 4]


def test_the_end_of_a_run_that_failed_is_told_and_its_failure_is_that_of_the_step(tmp_path):
    steps = []
    with pytest.raises(BudgetError, match="12 bytes of 10"):
        execute(with_exit_handler(), {}, tmp_path, steps.append)
    assert [step.name for step in steps] == ["say", "fail", "tell-the-end"]
    assert "it FAILED" in (tmp_path / "run.log").read_text()


def test_a_second_run_reuses_what_did_not_change_and_runs_what_is_never_cached(tmp_path):
    assert [step.reused for step in steps_of(two_steps(), tmp_path)] == [False, False]
    assert [step.reused for step in steps_of(two_steps(), tmp_path)] == [True, False]
    assert [step.reused for step in steps_of(two_steps(), tmp_path, text="no")] == [False]


def test_a_reused_step_is_reported_as_it_was(tmp_path):
    (first, _), (again, _) = (steps_of(two_steps(), tmp_path) for _ in range(2))
    assert again.report.keys() == first.report.keys()
    assert again.report["n_bytes"] == first.report["n_bytes"]


@pytest.mark.parametrize("bad", [field_condition, quote_condition], ids=lambda bad: bad.__name__)
def test_a_condition_that_cannot_be_evaluated_is_an_error(bad, tmp_path):
    with pytest.raises(ConditionError, match="cannot be run here"):
        steps_of(bad(), tmp_path)


def test_kfp_itself_takes_such_a_condition_for_false_and_says_nothing(tmp_path, capsys):
    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path))
    field_condition()()
    assert "SUCCESS" in capsys.readouterr().out


def test_strictness_ends_with_its_block(caplog):
    with strict():
        pass
    logging.getLogger().warning("Could not resolve")
    assert "Could not resolve" in caplog.text


def test_thresholds_that_were_not_met_are_a_budget_error_with_the_steps_own_words(tmp_path):
    with pytest.raises(BudgetError, match=r"^12 bytes of 10$"):
        steps_of(failing(fail, text="BudgetError"), tmp_path)


def test_another_failure_names_the_step_and_repeats_its_last_line(tmp_path):
    with pytest.raises(FilterpressError, match=r"^step inner/fail failed: 12 bytes of 10$"):
        steps_of(failing(fail, text="DataError"), tmp_path)


def test_a_step_that_was_killed_is_said_to_have_been(tmp_path):
    with pytest.raises(FilterpressError, match="step inner/be-killed failed: Killed"):
        steps_of(failing(be_killed), tmp_path)


def test_a_step_that_ends_silently_is_said_to_have_given_no_reason(tmp_path):
    with pytest.raises(FilterpressError, match="step inner/end-silently ended without a reason"):
        steps_of(failing(end_silently), tmp_path)


def test_the_whole_output_of_the_steps_is_in_the_log_and_not_on_the_terminal(tmp_path, capfd):
    with pytest.raises(FilterpressError):
        steps_of(failing(fail, text="DataError"), tmp_path)
    assert "not the last line" in (tmp_path / "run.log").read_text(encoding="utf-8")
    assert capfd.readouterr() == ("", "")


def test_kfp_is_left_as_it_was_found(tmp_path):
    before = _local.orchestrator.execute_task, list(logging.getLogger().filters)
    with pytest.raises(BudgetError):
        steps_of(failing(fail, text="BudgetError"), tmp_path)
    assert (_local.orchestrator.execute_task, logging.getLogger().filters) == before


def test_the_cache_is_another_one_for_other_weights_under_the_same_name(tmp_path):
    weights = tmp_path / "weights"
    weights.write_bytes(b"a")
    before = fingerprint({"weights": str(weights)})
    assert fingerprint({"weights": str(weights)}) == before
    weights.write_bytes(b"b")
    assert fingerprint({"weights": str(weights)}) != before


def test_the_cache_is_another_one_for_another_version_of_the_users_own_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    code = tmp_path / "my_own_task.py"
    code.write_text("x = 1", encoding="utf-8")
    before = fingerprint({"task": "my_own_task:make"})
    code.write_text("x = 2", encoding="utf-8")
    assert fingerprint({"task": "my_own_task:make"}) != before


def test_the_cache_is_another_one_for_another_image_under_the_same_name():
    assert len({fingerprint({}, image) for image in ("", "sha256:a", "sha256:b")}) == 3


def test_paths_are_absolute_and_addresses_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"weights": "w.pt", "data_dir": "", "store": "gs://bucket/x", "keys": "keys", "seed": 1}
    given["scratch"] = "work"
    assert on_this_machine(given, tmp_path / "out") == {
        "weights": str(tmp_path / "w.pt"),
        "data_dir": "",
        "store": "gs://bucket/x",
        "scratch": str(tmp_path / "work"),
        "keys": str(tmp_path / "keys"),
        "seed": 1,
    }


def test_what_has_no_place_is_in_the_folder_of_the_run(tmp_path):
    given = {"weights": "", "data_dir": "", "scratch": "", "store": "", "keys": ""}
    here = on_this_machine(given, tmp_path)
    assert here["store"] == str(tmp_path / "release")
    assert here["scratch"] == str(tmp_path / "cache" / "scratch")
    assert "store" not in on_this_machine({"scratch": ""}, tmp_path)  # a sweep publishes nothing


@pytest.fixture
def measured(tmp_path):
    package = dsl.Model(uri=str(tmp_path / "package"))
    Path(package.path).mkdir()
    (Path(package.path) / "model.json").write_text('{"history": []}', encoding="utf-8")
    (Path(package.path) / "model.fpk").write_bytes(b"encoded")
    report = {"decision": "publish", "accuracy": 0.9}
    return Step("round-1/evaluate", False, {"evaluated": package}, report, "")


def test_a_run_that_published_leaves_the_file_and_the_report_with_the_receipt(tmp_path, measured):
    earlier = measured._replace(report={"decision": "retrain", "accuracy": 0.8})
    receipt = Step("publish", False, {"release": None}, {"store": "there"}, "")
    report = _local.leave_results([earlier, measured, receipt], tmp_path)
    assert (report["accuracy"], report["release"]) == (0.9, "there")
    assert (tmp_path / "model.fpk").read_bytes() == b"encoded"
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report
    assert Path(report["html"]) == tmp_path / "report.html"


def test_a_run_that_gave_up_leaves_its_page_and_its_numbers_but_no_file(tmp_path, measured):
    report = _local.leave_results([measured, Step("give-up", False, {}, {}, "no")], tmp_path)
    assert "release" not in report
    assert (tmp_path / "report.html").is_file()
    assert not (tmp_path / "model.fpk").exists()


def test_a_run_that_measured_nothing_leaves_the_page_of_its_end_if_it_has_one(tmp_path):
    out, page = tmp_path / "run", dsl.HTML(uri=str(tmp_path / "page"))
    Path(page.path).write_text("Failed.", encoding="utf-8")
    failed = Step("train", False, {"page": dsl.HTML(uri=str(tmp_path / "none"))}, {}, "no memory")
    assert _local.leave_results([failed], out) == {}
    assert not out.exists()
    assert _local.leave_results([failed, Step("report", False, {"page": page}, {}, "")], out) == {}
    assert [(left.name, left.read_text()) for left in out.iterdir()] == [("report.html", "Failed.")]


def test_a_run_that_ends_well_without_publishing_is_an_error(tmp_path):
    with pytest.raises(FilterpressError, match="without publishing"):
        _local.run(two_steps(), {}, tmp_path)
