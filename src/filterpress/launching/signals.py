"""A stage that waits for others takes them along when it is told to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def end_on_sigterm() -> Iterator[None]:
    """Turn the signal by which a pod is ended into `SystemExit`, so that ``finally`` is done.

    Outside the main thread nothing can be turned, and the signal does what it did.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough: the end is not interrupted
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
