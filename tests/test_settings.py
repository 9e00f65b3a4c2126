from __future__ import annotations

from dataclasses import dataclass

import pytest

from filterpress.settings import choose, configure, parse


@dataclass(frozen=True, kw_only=True)
class Demo:
    epochs: int = 3
    rate: float = 0.5
    kind: str = "plain"
    fast: bool = False

    def __post_init__(self):
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")


@dataclass(frozen=True, kw_only=True)
class Other:
    depth: int = 1


def press():
    """Stand for a method."""


def squeeze():
    """Stand for another method."""


TABLE = {"press": (press, Demo), "squeeze": (squeeze, Other)}


@pytest.mark.parametrize("text", ["", "{}", " {} "])
def test_no_text_is_no_overrides(text):
    assert parse(text) == {}
    assert choose(TABLE, text) == ("press", press, Demo())


@pytest.mark.parametrize("text", ["[]", "1", '"x"', "null", "{", "epochs=3", "{'epochs': 3}"])
def test_text_that_is_no_json_object_is_refused_and_quoted(text):
    with pytest.raises(ValueError, match="config must be a JSON object") as caught:
        parse(text)
    assert repr(text) in str(caught.value)


def test_the_first_method_is_the_default():
    assert choose(TABLE, '{"epochs": 7}') == ("press", press, Demo(epochs=7))


def test_a_method_is_chosen_by_name_with_its_own_fields():
    assert choose(TABLE, '{"method": "squeeze", "depth": 4}') == (
        "squeeze",
        squeeze,
        Other(depth=4),
    )


def test_the_method_none_is_known_everywhere_and_has_no_fields():
    assert choose(TABLE, '{"method": "none"}') == ("none", None, None)
    with pytest.raises(ValueError, match=r"method none has no fields, got \['epochs'\]"):
        choose(TABLE, '{"method": "none", "epochs": 3}')


@pytest.mark.parametrize("name", ['"crush"', "3", "null", "[]", "{}"])
def test_an_unknown_method_is_refused_with_those_there_are(name):
    with pytest.raises(
        ValueError, match=r"method must be one of \['none', 'press', 'squeeze'\], got"
    ):
        choose(TABLE, f'{{"method": {name}}}')


def test_unknown_fields_are_refused_with_those_there_are():
    message = r"Demo has fields \['epochs', 'fast', 'kind', 'rate'\], got \['depth', 'epoch'\]"
    with pytest.raises(ValueError, match=message):
        configure(Demo, {"epoch": 3, "depth": 1, "rate": 0.1})


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("epochs", 2.5, "int"),
        ("epochs", "3", "int"),
        ("epochs", True, "int"),
        ("epochs", None, "int"),
        ("epochs", float("inf"), "int"),
        ("epochs", float("nan"), "int"),
        ("rate", "0.5", "float"),
        ("rate", False, "float"),
        ("rate", [0.5], "float"),
        ("kind", 1, "str"),
        ("kind", None, "str"),
        ("fast", 1, "bool"),
        ("fast", "yes", "bool"),
    ],
)
def test_a_value_of_another_type_is_refused(field, value, kind):
    with pytest.raises(ValueError, match=f"^{field} must be of type {kind}, got "):
        configure(Demo, {field: value})


def test_whole_floats_are_taken_for_integers_and_integers_for_floats():
    made = configure(Demo, {"epochs": 5.0, "rate": 1})
    assert made == Demo(epochs=5, rate=1.0)
    assert (type(made.epochs), type(made.rate)) == (int, float)


def test_the_rules_of_the_config_itself_hold():
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        configure(Demo, {"epochs": 0})
