"""What the command lines show: progress, tables, and every error as one line."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from filterpress import progress
from filterpress.errors import BudgetError, FilterpressError
from filterpress.reporting import summary_rows, verdict

_ON_THE_PAGE = ("layers", "confusion")
#: Exit codes besides 0.
NOT_MET, FAILED, INTERRUPTED = 1, 2, 130


@contextlib.contextmanager
def polite(debug: bool) -> Iterator[None]:
    """Run a command: what it prints goes to standard error, what it raises becomes one line there.

    Standard output is left to the result. Bars are shown on a terminal only.

    Args:
        debug: Whether to show the traceback of an error too.

    Raises:
        Exit: The command failed: with code 1 because the thresholds were not met, with 130 because
            it was interrupted, with 2 otherwise.
    """
    console = Console(stderr=True, highlight=False)
    logging.basicConfig(level=logging.WARNING, handlers=[_Lines(console)], force=True)
    logging.getLogger("filterpress").setLevel(logging.DEBUG if debug else logging.INFO)
    try:
        with contextlib.redirect_stdout(sys.stderr), _bars(console):
            yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:  # noqa: BLE001 (a user sees one line, whatever it is)
        if debug:
            traceback.print_exc()
        line = one_line(error)
        sys.stderr.write(f"error: {line}\n")
        _tell_torchrun(line)
        raise typer.Exit(NOT_MET if isinstance(error, BudgetError) else FAILED) from None


def show(report: Mapping[str, Any], as_json: bool) -> None:
    """Print the report of a stage or a run on standard output; people see its layers on the page.

    Under ``torchrun`` every process has the report, and the first one prints it.

    Args:
        report: Flat report.
        as_json: Print one JSON object and nothing else; numbers that are not finite become null.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        sys.stdout.write(json.dumps({key: _json(value) for key, value in report.items()}) + "\n")
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    output = _standard_output()
    if report.get("decision"):
        output.print(verdict(report))
        rows = summary_rows(report)
    else:
        rows = [(key, str(value)) for key, value in report.items() if key not in _ON_THE_PAGE]
    for row in rows:
        table.add_row(*row)
    output.print(table)


def show_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows on standard output, with the keys of the first as columns.

    Args:
        title: Line above the table.
        rows: Cells by column.
    """
    table = Table(box=None, pad_edge=False)
    for column in rows[0] if rows else ():
        numeric = isinstance(rows[0][column], int | float)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    output = _standard_output()
    output.print(title)
    output.print(table)


class _Lines(logging.Handler):
    """Writes messages as lines above the progress bars."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        self.console.print(record.getMessage(), markup=False, soft_wrap=True)


def _standard_output() -> Console:
    return Console(highlight=False, markup=False)


@contextlib.contextmanager
def _bars(console: Console) -> Iterator[None]:
    if not console.is_terminal:
        yield
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:

        @contextlib.contextmanager
        def display(description: str, total: int) -> Iterator[progress.Advance]:
            task = bars.add_task(description, total=total)
            try:
                yield lambda n=1: bars.advance(task, n)
            finally:
                bars.remove_task(task)

        with progress.shown_by(display):
            yield


def _tell_torchrun(line: str) -> None:
    """Leave an error where torchrun looks for it, so that it shows the one that was first."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        said = {"message": line, "timestamp": int(time.time())}
        Path(file).write_text(json.dumps(said), encoding="utf-8")


def one_line(error: Exception) -> str:
    """Say what went wrong; an error that nobody foresaw gives its type as well.

    Args:
        error: The error.
    """
    message = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, ModuleNotFoundError):
        return f"{message}: install filterpress[all], or the extra that has it"
    if isinstance(error, ValueError | TypeError | FilterpressError):
        return message
    return f"{type(error).__name__}: {message} (--debug shows where)"


def _json(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
