"""Command line: every stage, the whole run, and what looks into their results.

A stage's flags are those of its function. Exit codes: 0 done, 1 the thresholds were not met and
nothing was published, 2 anything else that went wrong; the reason is one line on standard error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from filterpress import files, release_commands, stages, terminal
from filterpress.flags import Debug, Json, with_flags_of
from filterpress.loop import compress
from filterpress.presets import PRESETS, told

app = typer.Typer(
    name="filterpress",
    help="Compress a trained CNN to a storage budget and an accuracy floor, and publish it signed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.add_typer(release_commands.app)


def main() -> None:
    """Run the command line."""
    # Read when torch is imported: DDP warns at length in each process where nothing is unused.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    app()


def add_stage(function: Callable[..., dict[str, Any]]) -> None:
    """Add the command of a stage: its flags are the function's, its output the report."""

    @with_flags_of(function)
    def command(json: Json = False, debug: Debug = False, **given: Any) -> None:
        with terminal.polite(debug):
            report = function(**given)
        terminal.show(report, json)

    summary = (function.__doc__ or "").strip().partition("\n\n")[0]
    app.command(name=function.__name__.replace("_", "-"), help=summary)(command)


for _stage in (
    stages.train,
    stages.prune,
    stages.search,
    stages.cluster,
    stages.reduce,
    stages.evaluate,
    stages.retrain,
    stages.publish,
    compress,
):
    add_stage(_stage)


@app.command()
def presets(json: Json = False) -> None:
    """List the presets: whole systems of methods and settings by one name."""
    rows = [{"preset": name, **told(preset)} for name, preset in PRESETS.items()]
    if json:
        terminal.show({"presets": rows}, as_json=True)
    else:
        terminal.show_table("--preset NAME", rows)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Package directory or encoded file.")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what is in a package or an encoded file, layer by layer."""
    from filterpress.inspection import describe

    with terminal.polite(debug):
        found = describe(path)
    if json:
        terminal.show(found, as_json=True)
        return
    tensors = found.pop("tensors")
    terminal.show({"path": path, **found.pop("header"), **found}, as_json=False)
    terminal.show_table(f"{len(tensors)} tensors", tensors)


@app.command()
def decode(
    file: Annotated[Path, typer.Argument(help="Encoded file.")],
    onnx: Annotated[Path, typer.Option(help="ONNX file to write; it must not exist.")],
    debug: Debug = False,
) -> None:
    """Decode an encoded file to an ONNX model; torch is not needed."""
    with terminal.polite(debug):
        from filterpress.codec.graph import to_onnx

        _refuse_existing("onnx", onnx)
        files.write(onnx, to_onnx(file.read_bytes()))


@app.command()
def delta(
    old: Annotated[Path, typer.Argument(help="Encoded file that a device has.")],
    new: Annotated[Path, typer.Argument(help="Encoded file that it shall have.")],
    out: Annotated[Path, typer.Option(help="Delta to write; it must not exist.")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write what changes from one encoded file to another, to send instead of the new file.

    A device that has the old file makes the new one of it with `filterpress patch`, byte for byte,
    so that its digest and signature hold. A delta is for one old file and no other. The fewer
    integers differ, the smaller it is; layers of other names or shapes travel whole.
    """
    with terminal.polite(debug):
        from filterpress.codec import make_delta

        _refuse_existing("out", out)
        before, after = old.read_bytes(), new.read_bytes()
        change = make_delta(before, after)
        files.write(out, change)
    sizes = {"n_bytes": len(change), "old_bytes": len(before), "new_bytes": len(after)}
    terminal.show({"delta": str(out), **sizes}, json)


@app.command()
def patch(
    old: Annotated[Path, typer.Argument(help="Encoded file that the delta was made for.")],
    delta: Annotated[Path, typer.Argument(help="Delta made by `filterpress delta`.")],
    out: Annotated[Path, typer.Option(help="Encoded file to write; it must not exist.")],
    debug: Debug = False,
) -> None:
    """Make the new encoded file from the old one and a delta; torch is not needed.

    The result has the very bytes that the delta was made for. If the old file is another one than
    that of the delta, or either is damaged, nothing is written.
    """
    with terminal.polite(debug):
        from filterpress.codec import apply_delta

        _refuse_existing("out", out)
        files.write(out, apply_delta(old.read_bytes(), delta.read_bytes()))


def _refuse_existing(name: str, path: Path) -> None:
    if path.exists():
        raise ValueError(f"{name} must be a file that does not exist yet, got {path}")


if __name__ == "__main__":
    main()
