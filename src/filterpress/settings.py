"""Read a stage's configuration: JSON text that names a method and overrides its defaults.

Every stage knows the method ``none``, which passes the network on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

C = TypeVar("C")
Table = Mapping[str, tuple[Callable[..., Any], type]]
NONE = "none"


class Choice(NamedTuple):
    """A stage's method, and how it is to be applied."""

    name: str
    method: Callable[..., Any] | None  # None passes the network on
    config: Any


def parse(text: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: The text is no JSON object.
    """
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise ValueError(f"config must be a JSON object, got {text!r}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"config must be a JSON object, got {text!r}")
    return value


def configure(kind: type[C], fields: Mapping[str, Any]) -> C:
    """Make a config of the fields given and the defaults of the others.

    JSON knows one kind of number, and Kubeflow turns whole numbers into floats: a whole float is
    taken for an integer field.

    Raises:
        ValueError: A field does not exist, or its value breaks its rule.

    Example:
        >>> @dataclasses.dataclass(frozen=True, kw_only=True)
        ... class Demo:
        ...     epochs: int = 3
        >>> configure(Demo, {"epochs": 5.0})
        Demo(epochs=5)
    """
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"{kind.__name__} has fields {sorted(known)}, got {unknown}")
    given = {name: _like_default(name, value, known[name]) for name, value in fields.items()}
    return kind(**given)


def _like_default(name: str, value: Any, field: dataclasses.Field[Any]) -> Any:
    default = field.default
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, bool) or not isinstance(default, int | float | str):
        right = type(value) is type(default)
    elif isinstance(default, int):
        right = number and float(value).is_integer()
    elif isinstance(default, float):
        right = number
    else:
        right = isinstance(value, str)
    if not right:
        raise ValueError(f"{name} must be of type {type(default).__name__}, got {value!r}")
    return type(default)(value)  # type: ignore[misc]  # every field has a default


def choose(table: Table, text: str) -> Choice:
    """Choose a stage's method and its configuration.

    Args:
        table: Methods and their config classes by name; the first one is the default.
        text: JSON object with the name under ``method`` and overrides of its config.

    Raises:
        ValueError: There is no such method or field, or a value breaks its rule.
    """
    fields = parse(text)
    name = fields.pop("method", next(iter(table)))
    if name == NONE:
        if fields:
            raise ValueError(f"method none has no fields, got {sorted(fields)}")
        return Choice(NONE, None, None)
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"method must be one of {sorted([*table, NONE])}, got {name!r}")
    method, kind = table[name]
    return Choice(name, method, configure(kind, fields))
