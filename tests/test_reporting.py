from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from filterpress import reporting
from filterpress.errors import PackageError

VOID = {"meta", "line", "rect", "polyline"}
BASELINE = {
    "n_bytes": 95_312,
    "accuracy": 0.9722,
    "validation_accuracy": 0.9757,
    "n_parameters": 23_828,
    "macs": 1_204_736,
}


def layer(name, shape, n_bytes, bits, **projected):
    return {"name": name, "shape": shape, "n_bytes": n_bytes, "bits_per_weight": bits, **projected}


LAYERS = [
    layer("stem", [16, 1, 3, 3], 98, 5.4),
    layer("blocks.0.conv1", [14, 16, 3, 3], 1_020, 4.0),
    layer("blocks.0.conv2", [16, 14, 3, 3], 940, 3.7, rank=6, groups=2),
    layer("blocks.1.conv1", [24, 16, 3, 3], 1_610, 3.7),
    layer("blocks.1.conv2", [32, 24, 3, 3], 1_904, 2.2, rank=9, groups=1),
    layer("blocks.1.shortcut", [32, 16, 1, 1], 260, 4.1),
    layer("head", [10, 32], 171, 4.3),
]
CHANGES = {
    "stem": "",
    "blocks.0.conv1": "1 filter removed, 4 filters merged",
    "blocks.0.conv2": "projected to rank 6 in 2 groups",
    "blocks.1.conv1": "8 filters merged",
    "blocks.1.conv2": "projected to rank 9",
    "blocks.1.shortcut": "",
    "head": "",
}
REMOVED = [{"name": "blocks.0.conv1", "removed": 1.0, "kept": 18.0}]
MERGED = [
    {"name": "blocks.0.conv1", "merged": 2.0, "kept": 16.0},
    {"name": "blocks.1.conv1", "merged": 8.0, "kept": 24.0},
]
REDUCED = [
    {"name": entry["name"], "n_bytes": 1.5 * entry["n_bytes"], "rank": 7.0, "groups": 1.0}
    for entry in LAYERS
]
MERGED_LATER = [{"name": "blocks.0.conv1", "merged": 2.0, "kept": 14.0}]


def stage(name, n_bytes, validation, **more):
    return {
        "stage": name,
        "n_bytes": n_bytes,
        "baseline_bytes": 95_312,
        "ratio": 95_312 / n_bytes,
        "validation_accuracy": validation,
        **more,
    }


def evaluated(decision, n_bytes, validation, accuracy, **more):
    return stage(
        "evaluate",
        n_bytes,
        validation,
        accuracy=accuracy,
        baseline_accuracy=0.9722,
        n_parameters=14_906,
        macs=801_200,
        decision=decision,
        max_bytes=7_942,
        min_accuracy=0.9657,
        layers=LAYERS,
        sha256="5f" * 32,
        **more,
    )


HISTORY = [
    stage("train", 95_312, 0.9757, accuracy=0.9722, n_parameters=23_828, macs=1_204_736, epochs=30),
    stage("prune", 78_400, 0.9730, removed=1.0, n_parameters=19_600, layers=REMOVED),
    stage("cluster", 31_250, 0.9690, round=1, merged=10.0, state="too-big", layers=MERGED),
    stage("reduce", 11_020, 0.9301, round=1, state="too-big", layers=REDUCED),
    stage("cluster", 9_870, 0.9250, round=1, merged=2.0, state="too-big", layers=MERGED_LATER),
    stage("reduce", 7_411, 0.8820, round=1, state="fits", layers=REDUCED),
    evaluated("retrain", 7_412, 0.8820, 0.8796, round=1, retrains=0),
    stage("retrain", 7_388, 0.9652, round=1, teacher="trained", epochs=10),
    evaluated("retrain", 7_388, 0.9652, 0.9640, round=1, retrains=1),
    stage("retrain", 7_391, 0.9705, round=1, teacher="trained", epochs=10),
    evaluated("publish", 7_391, 0.9705, 0.9694, round=1, retrains=2),
]
MODEL = {
    "format": 1,
    "model": "small",
    "input_shape": [1, 8, 8],
    "n_classes": 10,
    "baseline": BASELINE,
    "history": HISTORY,
}


class Outline(HTMLParser):
    """Collects tags, attributes and text, and refuses a page whose tags do not nest."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID, f"<{tag}/> is not closed in HTML"
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_well_formed_and_tells_the_verdict_first():
    outline = Outline(reporting.render(MODEL))
    body = " ".join("".join(outline.text).split()).split("10 classes", 1)[1].strip()
    assert body.startswith("Both thresholds hold: 7,391 bytes, 12.9 times smaller, 96.94 %")


def test_every_stage_and_every_layer_has_a_row():
    outline = Outline(reporting.render(MODEL))
    assert outline.tags.count("tr") == len(HISTORY) + len(LAYERS) + 2  # and two heads
    for name in [entry["name"] for entry in LAYERS]:
        assert name in outline.text


def test_the_page_refers_to_nothing_outside_itself():
    page = reporting.render(MODEL)
    outline = Outline(page)
    loading = {"src", "href", "srcset", "data", "action", "xlink:href", "poster"}
    assert not [found for found in outline.attributes if found[1] in loading]
    assert not {"script", "link", "iframe", "img", "object", "base"} & set(outline.tags)
    assert not re.search(r"url\(|@import|https?:|//[a-z]", page)


def test_hostile_names_stay_text():
    hostile = "\"><script>alert(1)</script><b x='$verdict"
    model = {
        "model": hostile,
        "input_shape": [hostile],
        "n_classes": hostile,
        "history": [
            {
                **evaluated(hostile, 10, 0.5, 0.5),
                "stage": hostile,
                "state": hostile,
                "sha256": hostile,
                hostile: hostile,
                "nested": {hostile: [hostile]},
                "layers": [{"name": hostile, "shape": [hostile], "n_bytes": 1}],
            }
        ],
    }
    outline = Outline(reporting.render(model))
    assert not {"script", "b"} & set(outline.tags)
    assert sum(hostile in text for text in outline.text) >= 8


@pytest.mark.parametrize("key", sorted({key for entry in HISTORY for key in entry}))
@pytest.mark.parametrize("value", ["absent", None, "text", float("nan"), True, -1, [None], {}])
def test_a_key_that_is_missing_or_odd_never_breaks_the_page(key, value):
    odd = [{**entry, key: value} for entry in HISTORY]
    if value == "absent":
        odd = [{k: v for k, v in entry.items() if k != key} for entry in HISTORY]
    Outline(reporting.render({"history": odd}))
    reporting.summary_rows(odd[-1])


@pytest.mark.parametrize("key", ["name", "shape", "n_bytes", "bits_per_weight", "rank", "merged"])
@pytest.mark.parametrize("value", [None, "text", float("nan"), True, -1, 0, [None], {}])
def test_a_layer_that_is_odd_never_breaks_the_page(key, value):
    odd = [
        {**entry, "layers": [{**layer, key: value} for layer in entry.get("layers", [])]}
        for entry in HISTORY
    ]
    Outline(reporting.render({"history": odd}))


def layer_changes(history):
    """What the table of the layers says of each."""
    page = reporting.render({"history": history})
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', page)
    return {name: re.findall(r"<td>(.*?)</td>", cells)[0] for name, cells in rows}


def test_a_layer_says_what_was_done_to_it_by_all_stages_until_it_was_measured():
    assert layer_changes(HISTORY) == CHANGES
    told = layer_changes([*HISTORY, stage("cluster", 7_000, 0.9, layers=MERGED)])
    assert told == CHANGES | {
        "blocks.0.conv1": "1 filter removed, 6 filters merged",
        "blocks.1.conv1": "16 filters merged",
    }


def test_a_search_shows_every_size_tried_and_marks_the_one_it_kept():
    tries = [
        {"n_bytes": 9_000, "validation_accuracy": 0.95, "decision": "publish", "retrains": 0},
        {"n_bytes": 3_000, "validation_accuracy": 0.80, "decision": "give-up", "retrains": 2},
        {"n_bytes": 4_500, "validation_accuracy": 0.94, "decision": "publish", "retrains": 1},
        {"n_bytes": 2_000, "validation_accuracy": 0.10, "decision": "too-big", "retrains": 0},
    ]
    page = reporting.render({"history": [stage("search", 4_500, 0.94, tries=tries)]})
    section = page[page.index("Sizes tried") : page.index("<h2>Stages")]
    assert re.findall(r'class="n">([\d,]{5})<', section) == ["9,000", "4,500", "3,000", "2,000"]
    outcomes = re.findall(r"<td>([a-z ]+)</td>", section)
    assert outcomes == [*["accurate enough"] * 2, "not accurate enough", "too big"]
    (kept,) = re.findall(r'"mark last".*?<title>(.*?)</title>', section)
    assert "try 3" in kept
    assert "try 4" not in section
    assert "Sizes tried" not in reporting.render({"history": HISTORY})


def test_a_layer_says_the_width_that_the_last_reduction_gave_it():
    def reduced(**bits):
        return stage(
            "reduce", 9_000, None, layers=[{"name": n, "bits": b} for n, b in bits.items()]
        )

    history = [reduced(stem=8.0, head=3.0), reduced(stem=1.0), HISTORY[-1]]
    told = layer_changes(history)
    assert told["stem"] == "rounded to 1 bit"
    assert told["head"] == ""
    assert layer_changes([reduced(head=3.0), HISTORY[-1]])["head"] == "rounded to 3 bits"


def test_a_layer_says_the_kind_of_chain_that_the_last_reduction_made_of_it():
    name = "blocks.1.conv2"  # has a rank of its own as it is measured
    cut = [{"name": name, "kind": "tucker", "rank": 12.0}]
    told = layer_changes([stage("reduce", 9_000, None, layers=cut), HISTORY[-1]])
    assert told[name] == "tucker of rank 12"
    assert told["blocks.0.conv2"] == CHANGES["blocks.0.conv2"]


def test_a_layer_says_what_is_left_of_it_and_what_its_weights_are_made_of():
    pruned = stage("prune", 9_000, None, layers=[{"name": "stem", "pruned": 0.25}])
    shared = [
        {"name": "stem", "clusters": 12.0},
        {"name": "blocks.1.conv2", "templates": 64.0},
        {"name": "head", "clusters": 0.0, "templates": 0.0},
    ]
    history = [pruned, stage("cluster", 8_000, None, layers=shared), stage("reduce", 8_000, None)]
    told = layer_changes([*history, HISTORY[-1]])
    assert told["stem"] == "25 % pruned, sharing 12 values"
    assert told["blocks.1.conv2"].endswith("multiples of 64 templates")
    assert told["head"] == ""
    plain = stage("reduce", 7_000, None, layers=[{"name": "stem", "bits": 4.0}])
    assert layer_changes([*history, plain, HISTORY[-1]])["stem"] == "25 % pruned, rounded to 4 bits"


def test_layers_are_told_as_planned_until_they_are_measured():
    told = layer_changes(HISTORY[:4])
    assert told["blocks.0.conv1"] == "1 filter removed, 2 filters merged, projected to rank 7"


def test_before_any_layer_has_bytes_the_table_says_what_was_changed():
    assert layer_changes(HISTORY[:3]) == {
        "blocks.0.conv1": "1 filter removed, 2 filters merged",
        "blocks.1.conv1": "8 filters merged",
    }
    assert layer_changes(HISTORY[:1]) == {}


@pytest.mark.parametrize("model", [{}, {"history": []}, {"history": [3]}, {"baseline": 3}])
def test_an_empty_story_says_that_nothing_was_evaluated(model):
    assert "Not evaluated yet." in Outline(reporting.render(model)).text


def bars(page, kind):
    found = re.findall(rf'<td class="{kind}">(?:<i style="width:([\d.]+)%"></i>)?</td>', page)
    return [float(width or 0) for width in found]


def test_the_error_of_a_layer_is_what_the_last_reduction_expected():
    def reduced(**errors):
        layers = [{"name": name, "distortion": error} for name, error in errors.items()]
        return stage("reduce", 9_000, None, layers=layers)

    page = reporting.render(
        {"history": [reduced(stem=9.0), reduced(stem=0.1, head=0.4), HISTORY[-1]]}
    )
    shares = dict(zip([entry["name"] for entry in LAYERS], bars(page, "bar error"), strict=True))
    assert shares == dict.fromkeys(shares, 0) | {"stem": 25, "head": 100}
    assert re.findall(r'class="n">([\d.]+)</td><td class="bar error"><i', page) == ["0.1", "0.4"]
    assert bars(reporting.render(MODEL), "bar error") == []


def test_the_page_of_a_stage_on_the_way_says_what_it_did_and_judges_nothing():
    page = reporting.render({"history": HISTORY[:8]})
    outline = Outline(page)
    assert ("h1", "class", "plain") in outline.attributes
    assert "After retrain, round 1: 7,388 bytes, 12.9 times smaller." in outline.text
    assert "within the budget" in "".join(outline.text)  # thresholds of the evaluation before


def test_the_trained_network_is_not_compared_with_itself():
    page = reporting.render(MODEL | {"history": HISTORY[:1]})
    head = " ".join("".join(Outline(page).text).split()).split("Stages")[0]
    assert "After train: 95,312 bytes, 97.22 % on the test set." in head
    assert not re.search("smaller|points", head)


@pytest.mark.parametrize(("good", "tone"), [(True, "good"), (False, "open")])
def test_the_end_of_a_run_is_told_first_and_then_its_release(good, tone):
    end = reporting.End("Published <3>.", good, {"Target": "small/3.fpk", "Odd": None})
    outline = Outline(reporting.render(MODEL, end))
    assert ("h1", "class", tone) in outline.attributes
    assert "Published <3>." in outline.text
    assert {"Release", "Target", "small/3.fpk"} <= set(outline.text)


def test_the_accuracy_that_is_judged_stands_beside_what_is_asked_of_it():
    page = reporting.render(MODEL)
    cards = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>(.*?)</div>", page)
    told = {label: [value, *re.findall(r">([^<]+)<", notes)] for label, value, notes in cards}
    assert told["Validation accuracy"] == ["97.05 %", "-0.52 points from 97.57 %", "96.57 % needed"]
    assert told["Test accuracy"] == ["96.94 %", "-0.28 points from 97.22 %"]
    assert told["Size"] == ["7,391 bytes", "12.9x smaller than 95,312", "7,942 allowed"]


def test_a_stage_says_what_it_did_to_the_network_also_where_that_was_nothing():
    story = [stage("prune", 9, None, removed=0.0), stage("cluster", 8, None, merged=1.0)]
    story += [stage("prune", 8, None, dropped=2.0), stage("reduce", 7, None, projected=2_000.0)]
    page = reporting.render({"history": story})
    assert "<td>0 filters removed</td>" in page
    assert "<td>1 filter merged</td>" in page
    assert "<td>2 blocks dropped</td>" in page
    assert "<td>2,000 layers projected</td>" in page
    story = [stage("prune", 7, None, pruned=0.634), stage("cluster", 7, None, shared=3.0)]
    page = reporting.render({"history": story})
    assert "<td>63.4 % of the weights pruned</td>" in page
    assert "<td>3 layers shared</td>" in page


@pytest.mark.parametrize(
    ("error", "told"), [(0.0, "0"), (3e-5, "&lt;0.0001"), (0.00149, "0.0015"), (2.0, "2")]
)
def test_an_error_is_told_in_as_many_digits_as_are_known(error, told):
    layers = [{"name": "stem", "distortion": error}, {"name": "head", "distortion": 9.0}]
    page = reporting.render({"history": [stage("reduce", 9_000, None, layers=layers)]})
    assert re.findall(r'<td class="n">([^<]*)</td><td class="bar error">', page) == [told, "9"]


def test_the_longest_bar_belongs_to_the_largest_layer():
    outline = Outline(reporting.render(MODEL))
    widths = [value for tag, name, value in outline.attributes if (tag, name) == ("i", "style")]
    shares = [float(re.fullmatch(r"width:([\d.]+)%", width)[1]) for width in widths]
    largest = max(entry["n_bytes"] for entry in LAYERS)
    assert shares == pytest.approx([100 * e["n_bytes"] / largest for e in LAYERS], abs=0.05)


@pytest.mark.parametrize(
    ("decision", "outcome"),
    [
        ("publish", "Both thresholds hold"),
        ("give-up", "Given up: not accurate enough"),
        ("too-big", "Over the size budget"),
        (None, "After evaluate"),
    ],
)
def test_the_verdict_follows_the_decision(decision, outcome):
    assert reporting.verdict(evaluated(decision, 7_391, 0.97, 0.96)).startswith(outcome + ": ")


def test_the_summary_of_a_release_has_all_of_its_numbers():
    rows = dict(reporting.summary_rows({**HISTORY[-1], "release": "out/release"}))
    assert rows == {
        "Size": "7,391 bytes, 12.9x smaller than 95,312, 7,942 allowed",
        "Validation accuracy": "97.05 %, 96.57 % needed",
        "Test accuracy": "96.94 %, -0.28 points from 97.22 %",
        "Parameters": "14,906",
        "Multiply-adds": "801,200",
        "Decision": "publish",
        "Tries": "1 round, 2 retrains",
        "Digest": "5f" * 32,
        "Release": "out/release",
    }


def test_the_file_is_the_rendered_page(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(MODEL), encoding="utf-8")
    reporting.write_html(tmp_path, tmp_path / "new" / "report.html")
    page = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert page == reporting.render(MODEL)


@pytest.mark.parametrize(
    ("report", "told", "tone"),
    [
        ({"passed_on": True}, "Nothing to do here, passed on as it was. Both thresholds", "plain"),
        ({"release_counter": 3}, "Published as release 3: 7,391 bytes", "good"),
        ({}, "Both thresholds hold: 7,391 bytes", "good"),
    ],
)
def test_a_stage_that_left_the_package_as_it_was_says_so(report, told, tone, tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(MODEL), encoding="utf-8")
    reporting.write_html(tmp_path, tmp_path / "report.html", HISTORY[-1] | report)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.search(rf'<h1 class="{tone}">(.*?)</h1>', page)[1].startswith(told)


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_package_without_a_readable_model_is_refused_by_name(tmp_path, content):
    if content is not None:
        (tmp_path / "model.json").write_text(content, encoding="utf-8")
    with pytest.raises(PackageError, match=r"model\.json"):
        reporting.write_html(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
