from __future__ import annotations

from itertools import pairwise

import pytest

from filterpress import chart


def test_equal_ratios_of_size_are_equal_distances_on_the_chart():
    frame = chart.Frame(1_000, 64_000, 0.0, 1.0)
    steps = [frame.x(1_000 * 4**k) for k in range(4)]
    assert len({round(b - a, 6) for a, b in pairwise(steps)}) == 1
    assert (steps[0], steps[-1]) == pytest.approx((chart.LEFT, chart.WIDTH - chart.RIGHT))


def test_more_accurate_is_higher_and_nothing_leaves_the_axes():
    frame = chart.Frame(100, 1_000, 0.5, 0.9)
    heights = [frame.y(accuracy) for accuracy in (0.1, 0.5, 0.7, 0.9, 1.0)]
    bottom, middle = chart.HEIGHT - chart.BOTTOM, (chart.HEIGHT - chart.BOTTOM + chart.TOP) / 2
    assert heights == pytest.approx([bottom, bottom, middle, chart.TOP, chart.TOP])


def test_labels_of_crowded_marks_do_not_overlap():
    crowd = {(100 + 14 * k, 100): str(k) for k in range(6)}
    placed = chart.place_labels(crowd)
    boxes = [(*placed[place], 8 * len(text)) for place, text in crowd.items()]
    for i, (x, y, width) in enumerate(boxes):
        for other_x, other_y, other_width in boxes[:i]:
            assert abs(x - other_x) >= (width + other_width) / 2 or abs(y - other_y) >= 10


def test_stages_at_one_place_share_a_mark_that_names_them_all():
    points = [chart.Point(k, f"stage {k}", 5_000, 0.9) for k in (1, 2, 3)]
    drawing = chart.draw(points, split="Test")
    assert drawing.count("<circle") == 1
    assert ">1, 2, 3</text>" in drawing


@pytest.mark.parametrize("thresholds", [(None, None), (4_000, None), (None, 0.8), (4_000, 0.8)])
def test_the_goal_is_shaded_only_where_a_threshold_is_known(thresholds):
    max_bytes, min_accuracy = thresholds
    points = [chart.Point(1, "train", 50_000, 0.9), chart.Point(2, "reduce", 5_000, 0.5)]
    svg = chart.draw(points, split="Test", max_bytes=max_bytes, min_accuracy=min_accuracy)
    assert ("<rect" in svg) == (thresholds != (None, None))
