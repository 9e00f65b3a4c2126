"""Progress of long work, shown by whoever runs it.

The library says what it is doing; it shows nothing by itself. The command line installs a display
with `shown_by`; without one, reporting costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

#: Called after every unit of the work, or after several with their number.
Advance = Callable[..., None]

#: Shows work with a description and a number of units for as long as its context is open.
Display = Callable[[str, int], AbstractContextManager[Advance]]

_display: ContextVar[Display | None] = ContextVar("display", default=None)


@contextmanager
def shown_by(display: Display) -> Iterator[None]:
    """Show the progress of everything inside the block.

    Args:
        display: What shows it.
    """
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)


@contextmanager
def progress(description: str, total: int) -> Iterator[Advance]:
    """Report the progress of the block.

    Args:
        description: What is being done, in a few words.
        total: Number of its units; fewer may be done.

    Yields:
        Function to call after every unit, or after several with their number.

    Example:
        >>> with progress("train", total=2) as advance:
        ...     for _ in range(2):
        ...         advance()
    """
    display = _display.get()
    if display is None:
        yield _nothing
        return
    with display(description, total) as advance:
        yield advance


def _nothing(n: int = 1) -> None:
    pass
