"""Command-line flags from the signature and the docstring of a function.

A function gains a flag by gaining a parameter: the name, the type and the default are read from
its signature, the help from the ``Args`` of its docstring.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import typer

F = TypeVar("F", bound=Callable[..., Any])
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show more, and the traceback of an error.")]

_ARGS = re.compile(r"^Args:\n(?P<body>(?:[ ]+.*\n|\n)*)", re.MULTILINE)
_ARG = re.compile(r"^    (?P<name>\w+): (?P<help>.*(?:\n {5,}.*)*)", re.MULTILINE)


def with_flags_of(
    function: Callable[..., Any], *, without: Collection[str] = (), grouped: bool = False
) -> Callable[[F], F]:
    """Give a command one flag for each parameter of a function.

    Args:
        function: Function that the command calls; a parameter without a default is a required flag.
        without: Parameters that get none.
        grouped: Whether the help of each begins with the group it is shown in, as in ``Data: …``.

    Returns:
        Decorator of a command that takes the values as keyword arguments, beside its own flags.

    Example:
        >>> def stage(*, max_size: str = "12x") -> None:
        ...     '''Compress.
        ...
        ...     Args:
        ...         max_size: Largest file.
        ...     '''
        >>> @with_flags_of(stage)
        ... def command(json: bool = False, **given: str) -> None: ...
        >>> list(inspect.signature(command).parameters)
        ['max_size', 'json']
    """
    flags = [flag for flag in _flags(function, grouped) if flag.name not in without]

    def decorate(command: F) -> F:
        own = [
            parameter.replace(kind=parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        command.__signature__ = inspect.Signature(flags + own)  # type: ignore[attr-defined]
        return command

    return decorate


def help_of(function: Callable[..., Any]) -> dict[str, str]:
    """Read what a Google docstring says of each argument.

    Args:
        function: Function with a docstring.

    Returns:
        One line of help for each name under ``Args``.

    Example:
        >>> help_of(help_of)
        {'function': 'Function with a docstring.'}
    """
    section = _ARGS.search((inspect.getdoc(function) or "") + "\n")
    found = _ARG.finditer(section["body"]) if section else ()
    return {arg["name"]: " ".join(arg["help"].split()) for arg in found}


def _flags(function: Callable[..., Any], grouped: bool) -> list[inspect.Parameter]:
    """Make a keyword-only parameter that typer understands of each parameter."""
    texts, flags = help_of(function), []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if get_origin(parameter.annotation) is Annotated:  # it says for itself what its flag is
            flags.append(parameter.replace(kind=parameter.KEYWORD_ONLY))
            continue
        text = texts.get(parameter.name, "")
        group, _, text = text.partition(": ") if grouped else ("", "", text)
        kind: Any = _one_type(parameter.annotation)
        default = parameter.default
        option: dict[str, Any] = {"help": text, "rich_help_panel": group or None}
        if kind in (dict, list):
            option |= {"parser": _parser(kind), "metavar": "JSON"}
            default = json.dumps(default)
        annotation = Annotated[kind, typer.Option(**option)]
        flags.append(
            parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        )
    return flags


def _parser(kind: type) -> Callable[[str], Any]:
    """Make what reads a JSON object or list."""
    name = "object" if kind is dict else "list"

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if isinstance(value := json.loads(text), kind):
                return value
        raise typer.BadParameter(f"must be a JSON {name}, got {text!r}")

    return parse


def _one_type(annotation: Any) -> Any:
    """Take a path where a function takes text too: typer knows one type for a flag."""
    return Path if Path in get_args(annotation) and str in get_args(annotation) else annotation
