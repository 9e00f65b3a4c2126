from __future__ import annotations

import json
from pathlib import Path

import pytest

from filterpress.presets import DEFAULT, PRESETS, overlay, told
from filterpress.stages.tables import TABLES, check_configs, chosen


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("stage", TABLES)
def test_every_preset_names_methods_and_fields_that_there_are(preset, stage):
    given = getattr(PRESETS[preset], stage)
    choice = chosen(stage, preset, "{}")
    assert choice.name == given.get("method", next(iter(TABLES[stage]())))
    for field, value in given.items():
        assert field == "method" or getattr(choice.config, field) == value


def test_the_default_preset_is_the_default_of_every_stage():
    for stage in TABLES:
        assert overlay(DEFAULT, stage, "{}") == "{}"


def test_a_users_field_goes_over_that_of_the_preset():
    found = json.loads(overlay("post-training", "reduce", '{"levels": "steps", "max_groups": 1}'))
    assert found == {**PRESETS["post-training"].reduce, "levels": "steps", "max_groups": 1}


def test_another_method_has_nothing_of_the_preset():
    own = {"method": "quantize", "bits": 3}
    assert json.loads(overlay("post-training", "reduce", json.dumps(own))) == own


def test_an_unknown_preset_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"preset must be one of .*patent-loop.*, got 'fast'"):
        check_configs("fast")
    with pytest.raises(ValueError, match="preset must be one of"):
        overlay("fast", "prune", "{}")


def test_a_preset_is_told_by_what_it_does_in_each_stage():
    rows = {name: told(preset) for name, preset in PRESETS.items()}
    assert all(list(row) == ["summary", *TABLES] for row in rows.values())
    assert rows["post-training"]["prune"] == "none"
    assert rows[DEFAULT]["prune"] == "default"


def test_the_readme_lists_every_preset_with_its_methods():
    lines = (Path(__file__).parents[1] / "README.md").read_text().splitlines()
    for name in PRESETS:
        (row,) = [line for line in lines if line.startswith(f"| `{name}`")]
        for stage, cell in zip(("prune", "cluster", "reduce"), row.split("|")[2:5], strict=True):
            method = chosen(stage, name, "{}").name
            assert (f"`{method}`" in cell) == (method != "none"), (name, stage)
