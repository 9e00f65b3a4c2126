"""The command line: flags, exit codes, and what is on which stream."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from filterpress import stages, terminal
from filterpress.__main__ import app
from filterpress.errors import BudgetError, DataError
from filterpress.flags import with_flags_of
from filterpress.loop import compress

COMMANDS = ["train", "prune", "cluster", "reduce", "evaluate", "retrain", "publish", "compress"]
QUICK = ["--train-config", '{"epochs": 2}']
NO_TORCH = "import sys; sys.modules['torch'] = None; from filterpress.__main__ import main; main()"

run_in_process = CliRunner().invoke


def command_line(*arguments, code=None, folder=None):
    start = ["-c", code] if code else ["-m", "filterpress"]
    return subprocess.run(
        [sys.executable, *start, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        check=False,
    )


def parameters_of(command):
    (found,) = [c for c in app.registered_commands if c.name == command]
    return inspect.signature(found.callback).parameters


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("packages") / "trained"
    stages.train(out, config='{"epochs": 2}')
    return out


@pytest.fixture(scope="module")
def encoded(trained):
    out = trained.parent / "evaluated"
    stages.evaluate(trained, out, max_size="1x")
    return out / stages.ENCODED


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_exactly_the_flags_of_its_function_and_the_two_common_ones(command):
    function = {**vars(stages), "compress": compress}[command]
    wanted = inspect.signature(function).parameters
    flags = parameters_of(command)
    assert set(flags) == {*wanted, "json", "debug"}
    assert {n: flags[n].default for n in wanted} == {n: p.default for n, p in wanted.items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_a_help_text(command):
    for name, parameter in parameters_of(command).items():
        (option,) = parameter.annotation.__metadata__
        assert option.help, name


def test_a_function_gains_a_flag_by_gaining_a_parameter():
    def stage(*, new_one: int = 3) -> None:
        """Do it.

        Args:
            new_one: Something new,
                told in two lines.
        """

    given = []

    @with_flags_of(stage)
    def command(json: bool = False, **arguments):
        given.append((json, arguments))

    small = typer.Typer()
    small.command()(command)
    assert run_in_process(small, ["--new-one", "5"]).exit_code == 0
    assert given == [(False, {"new_one": 5})]
    (option,) = inspect.signature(command).parameters["new_one"].annotation.__metadata__
    assert option.help == "Something new, told in two lines."


def structured(*, labels: dict = {}, taints: list = [], left_out: int = 0):  # noqa: B006
    """Run.

    Args:
        labels: Cluster: labels of nodes.
        taints: Cluster: taints: those tolerated.
        left_out: Nothing.
    """


def told_structured(*arguments):
    given = []

    @with_flags_of(structured, without=["left_out"], grouped=True)
    def command(**arguments):
        given.append(arguments)

    small = typer.Typer()
    small.command()(command)
    return run_in_process(small, arguments), given, command


def test_a_structured_parameter_is_json_on_the_command_line():
    arguments = ["--labels", '{"pool": "gpu"}', "--taints", '[{"key": "gpu"}]']
    _, given, _ = told_structured(*arguments)
    assert given == [{"labels": {"pool": "gpu"}, "taints": [{"key": "gpu"}]}]
    assert told_structured()[1] == [{"labels": {}, "taints": []}]


@pytest.mark.parametrize("bad", [["--labels", "[]"], ["--labels", "{"], ["--taints", "{}"]])
def test_json_of_another_kind_is_refused(bad):
    result, given, _ = told_structured(*bad)
    assert result.exit_code == 2
    assert given == []
    assert f"must be a JSON {'object' if bad[0] == '--labels' else 'list'}" in " ".join(
        result.output.replace("│", " ").split()
    )


def test_flags_are_shown_in_the_group_that_their_help_begins_with():
    _, _, command = told_structured()
    parameters = inspect.signature(command).parameters
    (labels,) = parameters["labels"].annotation.__metadata__
    (taints,) = parameters["taints"].annotation.__metadata__
    assert (labels.rich_help_panel, labels.help) == ("Cluster", "labels of nodes.")
    assert (taints.rich_help_panel, taints.help) == ("Cluster", "taints: those tolerated.")
    assert "left_out" not in parameters


def test_a_value_may_start_with_a_minus():
    given = []

    @with_flags_of(stages.evaluate)
    def command(**arguments):
        given.append(arguments["min_accuracy"])

    small = typer.Typer()
    small.command()(command)
    result = run_in_process(small, ["--model", "a", "--out", "b", "--min-accuracy", "-0.5pp"])
    assert result.exit_code == 0, result.output
    assert given == ["-0.5pp"]


def test_help_does_not_wait_for_torch():
    code = NO_TORCH.replace("'torch'", "'torch'] = sys.modules['onnx'] = sys.modules['numba'")
    for command in ([], ["compress"], ["decode"], ["delta"], ["patch"]):
        result = command_line(*command, "--help", code=code)
        assert result.returncode == 0, result.stderr
        assert "--help" in result.stdout


def test_json_is_one_object_on_standard_output_and_nothing_else(tmp_path):
    out = tmp_path / "p"
    result = run_in_process(
        app, ["train", "--out", str(out), "--config", '{"epochs": 1}', "--json"]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((out / "report.json").read_text(encoding="utf-8"))


def test_numbers_that_json_does_not_know_become_null(capsys):
    terminal.show({"loss": float("nan"), "accuracy": 0.5}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"loss": None, "accuracy": 0.5}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--model", "no-such-model"], "no-such-model"),
        (["train", "--config", '{"epoch": 1}'], "epoch"),
        (["train", "--config", "epochs=1"], "config must be a JSON object"),
        (["train", "--data", "no-such-data"], "no-such-data"),
        (["train", "--task", "no.such:task"], "no.such"),
        (["prune", "--model", "no-such-package"], "no-such-package"),
        (["compress", "--max-size", "12 parsecs"], "max_size must be"),
        (["compress", "--min-accuracy", "-half"], "min_accuracy must be"),
        (["compress", "--max-rounds", "0"], "max_rounds must be"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_wrong_input_is_exit_code_2_and_one_clear_line(arguments, says, tmp_path):
    result = run_in_process(app, [*arguments, "--out", str(tmp_path / "out")])
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(errors) == 1
    assert says in errors[0]


def test_a_wrong_flag_is_exit_code_2():
    assert run_in_process(app, ["compress", "--no-such-flag"]).exit_code == 2


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (BudgetError("12 bytes of 10"), 1, "12 bytes of 10"),
        (DataError("no images\nin there"), 2, "no images in there"),
        (OSError(28, "No space left on device", "/some/file"), 2, "No space left on device: /some"),
        (KeyError("x"), 2, "KeyError: 'x' (--debug shows where)"),
        (KeyboardInterrupt(), 130, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_error_is_one_line_and_the_right_exit_code(error, code, line, capsys):
    with pytest.raises(typer.Exit) as raised, terminal.polite(debug=False):
        raise error
    told = capsys.readouterr()
    assert raised.value.exit_code == code
    assert told.out == ""
    assert told.err.startswith(f"error: {line}" if line else "interrupted")
    assert len(told.err.splitlines()) == 1


def test_debug_shows_the_traceback_as_well(capsys):
    with pytest.raises(typer.Exit), terminal.polite(debug=True):
        raise DataError("no images")
    assert "Traceback" in capsys.readouterr().err


def test_what_a_stage_prints_goes_to_standard_error(capsys):
    with terminal.polite(debug=False):
        print("noise")  # noqa: T201
    assert capsys.readouterr() == ("", "noise\n")


def test_a_folder_that_cannot_be_written_is_one_line(trained, tmp_path):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    result = run_in_process(app, ["prune", "--model", str(trained), "--out", str(out)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")


def test_inspect_shows_every_tensor_of_a_package(trained):
    result = run_in_process(app, ["inspect", str(trained), "--json"])
    found = json.loads(result.stdout)
    assert found["kind"] == "package"
    assert found["header"]["stages"] == ["train"]
    n_bytes = sum(tensor["n_bytes"] for tensor in found["tensors"])
    assert found["n_bytes"] - n_bytes < 10_000  # the rest is the header of the file


def test_inspect_shows_every_tensor_of_an_encoded_file(encoded):
    from filterpress import codec

    result = run_in_process(app, ["inspect", str(encoded), "--json"])
    found = json.loads(result.stdout)
    tensors = codec.decode(encoded.read_bytes()).tensors
    assert found["n_bytes"] == encoded.stat().st_size
    assert {row["name"]: row["shape"] for row in found["tensors"]} == {
        name: list(tensor.integers.shape) for name, tensor in tensors.items()
    }
    weight = next(name for name, tensor in tensors.items() if tensor.integers.ndim == 4)
    (row,) = [row for row in found["tensors"] if row["name"] == weight]
    assert row["zeros"] == pytest.approx(np.mean(tensors[weight].integers == 0))


def test_inspect_prints_a_table_for_people(trained, encoded):
    for path in (trained, encoded):
        result = run_in_process(app, ["inspect", str(path)])
        assert result.exit_code == 0, result.output
        assert "tensors" in result.stdout


@pytest.mark.parametrize("content", [b"", b"not an encoded file", b"\x00" * 64])
def test_inspect_refuses_what_is_neither(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    for path in (tmp_path / "file", tmp_path, tmp_path / "missing"):
        result = run_in_process(app, ["inspect", str(path)])
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1


def test_inspect_refuses_a_package_with_damaged_weights(trained, tmp_path):
    (tmp_path / "model.json").write_bytes((trained / "model.json").read_bytes())
    for content in (b"", b"\xff" * 100, b"\x02\x00\x00\x00\x00\x00\x00\x00[]"):
        (tmp_path / "weights.safetensors").write_bytes(content)
        assert run_in_process(app, ["inspect", str(tmp_path)]).exit_code == 2


def test_decode_writes_an_onnx_model_where_there_is_no_torch(encoded, tmp_path):
    import onnxruntime

    result = command_line("decode", encoded, "--onnx", tmp_path / "model.onnx", code=NO_TORCH)
    assert result.returncode == 0, result.stderr
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (given,) = session.get_inputs()
    images = np.zeros((1, *given.shape[1:]), dtype=np.float32)
    (outputs,) = session.run(None, {given.name: images})
    assert outputs.shape == (1, 10)


def test_decode_refuses_to_overwrite_and_leaves_what_was_there(encoded, tmp_path):
    out = tmp_path / "model.onnx"
    out.write_text("precious", encoding="utf-8")
    result = run_in_process(app, ["decode", str(encoded), "--onnx", str(out)])
    assert result.exit_code == 2
    assert out.read_text(encoding="utf-8") == "precious"


def test_a_damaged_file_decodes_to_nothing(encoded, tmp_path):
    (tmp_path / "damaged").write_bytes(encoded.read_bytes()[:-7])
    out = tmp_path / "model.onnx"
    result = run_in_process(app, ["decode", str(tmp_path / "damaged"), "--onnx", str(out)])
    assert result.exit_code == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "damaged"]


@pytest.fixture(scope="module")
def renewed(encoded):
    """A file whose tensors are those of the encoded one, but for a few integers of the first."""
    from filterpress import codec

    tensors, graph, header = codec.decode(encoded.read_bytes())
    name = next(name for name, tensor in tensors.items() if tensor.integers.ndim == 4)
    integers = tensors[name].integers.copy()
    integers[0] += 1
    tensors[name] = tensors[name]._replace(integers=integers)
    path = encoded.with_name("renewed.fpk")
    path.write_bytes(codec.encode(tensors, graph, header))
    return path


@pytest.fixture(scope="module")
def change(encoded, renewed):
    path = encoded.with_name("change.fpd")
    result = run_in_process(app, ["delta", str(encoded), str(renewed), "--out", str(path)])
    assert result.exit_code == 0, result.output
    assert "n_bytes" in result.stdout
    return path


def test_a_patch_gives_the_bytes_of_the_new_file_where_there_is_no_torch(
    encoded, renewed, change, tmp_path
):
    result = command_line("patch", encoded, change, "--out", tmp_path / "new", code=NO_TORCH)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "new").read_bytes() == renewed.read_bytes()
    assert change.stat().st_size < renewed.stat().st_size / 10


def test_delta_reports_the_sizes_as_one_json_object(encoded, renewed, tmp_path):
    arguments = ["delta", encoded, renewed, "--out", tmp_path / "change", "--json"]
    result = command_line(*arguments, code=NO_TORCH)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {
        "delta": str(tmp_path / "change"),
        "n_bytes": (tmp_path / "change").stat().st_size,
        "old_bytes": encoded.stat().st_size,
        "new_bytes": renewed.stat().st_size,
    }


def test_a_delta_for_another_file_patches_nothing(renewed, change, tmp_path):
    out = tmp_path / "out"
    result = run_in_process(app, ["patch", str(renewed), str(change), "--out", str(out)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: the delta is for another file")
    assert len(result.stderr.splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_a_damaged_delta_and_what_is_none_patch_nothing(encoded, change, tmp_path):
    data, path, out = change.read_bytes(), tmp_path / "damaged", tmp_path / "out"
    for content in (data[:-7], b"", encoded.read_bytes(), data[:60] + b"?" + data[61:]):
        path.write_bytes(content)
        result = run_in_process(app, ["patch", str(encoded), str(path), "--out", str(out)])
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1
        assert list(tmp_path.iterdir()) == [path]


def test_delta_and_patch_refuse_to_overwrite_and_leave_what_was_there(
    encoded, renewed, change, tmp_path
):
    out = tmp_path / "out"
    out.write_text("precious", encoding="utf-8")
    for command, second in (("delta", renewed), ("patch", change)):
        result = run_in_process(app, [command, str(encoded), str(second), "--out", str(out)])
        assert result.exit_code == 2
        assert "out must be a file that does not exist yet" in result.stderr
        assert out.read_text(encoding="utf-8") == "precious"


@pytest.mark.slow
def test_compress_says_how_it_ended_and_where_the_results_are(tmp_path):
    out = tmp_path / "run"
    arguments = [
        "--out",
        out,
        *QUICK,
        "--max-size",
        "12x",
        "--min-accuracy",
        "-20pp",
        "--seed",
        "0",
    ]
    result = command_line("compress", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["decision"] == "publish"
    assert Path(report["html"]).is_file()
    assert Path(report["release"]).is_dir()
    assert report["n_bytes"] <= report["baseline_bytes"] / 12


@pytest.mark.slow
def test_thresholds_that_are_not_met_are_exit_code_1_with_the_numbers_on_one_line(tmp_path):
    out = tmp_path / "run"
    arguments = ["--out", str(out), *QUICK, "--max-size", "1KB", "--size-tries", "1", "--json"]
    result = run_in_process(app, ["compress", *arguments])
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "1000" in last
    assert not (out / "release").exists()
