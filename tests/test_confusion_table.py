"""The confusion matrix on the report page."""

from __future__ import annotations

import re

import pytest

from filterpress import confusion_table

COUNTS = {"classes": ["cat", "dog"], "counts": [[3, 1], [0, 4]]}


def show(*found):
    return confusion_table.section([{"stage": "evaluate", "confusion": one} for one in found])


def test_what_was_last_taken_for_what_is_a_table_with_a_row_a_label():
    section = show({**COUNTS, "counts": [[9, 9], [9, 9]]}, COUNTS)
    rows = re.findall(r'<th scope="row">(\w+)</th>(.*?)</tr>', section)
    numbers = {name: re.findall(r"<td[^>]*>(\d*)</td>", cells) for name, cells in rows}
    assert numbers == {"cat": ["3", "1"], "dog": ["", "4"]}
    told = dict(re.findall(r'<td class="n (\w+)" style="--share:(0.\d+)">[31]<', section))
    assert told == {"right": "0.750", "wrong": "0.250"}
    assert "7 of 8 images right." in section


@pytest.mark.parametrize(("name", "kind"), [("dog!", "n"), ("horse", "across")])
def test_short_names_of_classes_stand_upright_and_long_ones_on_their_side(name, kind):
    section = show({**COUNTS, "classes": ["cat", name]})
    assert re.findall(r'<th scope="col" class="(\w+)"><span', section) == [kind, kind]


def test_hostile_names_of_classes_stay_text():
    hostile = "\"><script>alert(1)</script><b x='$verdict"
    section = show({**COUNTS, "classes": ["cat", hostile]})
    assert not re.search(r"<script|<b ", section)
    assert section.count("&quot;&gt;&lt;script") == 3  # its row, its column, its title


@pytest.mark.parametrize(
    "odd",
    [3, {}, {"classes": ["a"]}, COUNTS | {"counts": [[1], [2]]}, COUNTS | {"classes": 1}],
)
def test_odd_counts_are_left_out(odd):
    assert show(odd) == ""
