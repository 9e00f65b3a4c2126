"""What each process of a TrainJob does: ``torchrun -m filterpress.node SCRATCH NAME WORK``.

It fetches the inputs of a stage from scratch and runs the stage; the first process puts the package
there. Of those that fail, the first leaves its message.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import typer

from filterpress import stages, terminal
from filterpress.errors import ScratchError
from filterpress.launching.work import ERROR, OUT, fetch
from filterpress.processes import is_main
from filterpress.scratch import Scratch, open_scratch


def main(uri: str, name: str, text: str) -> None:
    """Do a work.

    Args:
        uri: Scratch.
        name: Of the work there.
        text: The work, as `Work.put` wrote it.

    Raises:
        Exit: It failed; why is one line on standard error, and in scratch.
    """
    with terminal.polite(debug=False):
        scratch = open_scratch(uri)
        try:
            with tempfile.TemporaryDirectory() as folder:
                _run(scratch, name, text, Path(folder))
        except Exception as error:
            with suppress(ScratchError):  # the error itself has more to say than that
                _leave(scratch, name, terminal.one_line(error))
            raise


def _leave(scratch: Scratch, name: str, said: str) -> None:
    """Leave an error, unless another process has: who fails later has less to say."""
    if scratch.read(f"{name}/{ERROR}") is None:
        scratch.write(f"{name}/{ERROR}", said.encode())


def _run(scratch: Scratch, name: str, text: str, folder: Path) -> None:
    stage, arguments = fetch(text, scratch, name, folder)
    out = folder / OUT
    getattr(stages, stage)(**arguments, out=out)
    if is_main():
        scratch.put(f"{name}/{OUT}", out)


if __name__ == "__main__":
    typer.run(main)
