"""Functions of the user's own, named as ``package.module:function``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_function(parameter: str, reference: str) -> Callable[..., Any]:
    """Import the function that the user named; modules in the working directory are found.

    Args:
        parameter: Name of the parameter that held the reference, for the message.
        reference: ``package.module:function``.

    Returns:
        The function.

    Raises:
        ValueError: The module cannot be imported or has no such function.

    Example:
        >>> load_function("task", "math:sqrt")(9.0)
        3.0
    """
    rule = f"{parameter} must name a function as package.module:function, got {reference!r}"
    module_name, _, name = reference.partition(":")
    if not module_name or not name:
        raise ValueError(rule)
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"{rule}: importing {module_name} failed: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        found = "has no such name" if function is None else "has it, but it is not callable"
        raise ValueError(f"{rule}: {module.__name__} {found}")
    return function  # type: ignore[no-any-return]
