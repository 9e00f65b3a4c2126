from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filterpress.budget import Budget, decide, parse_accuracy, parse_size

BUDGET = Budget(max_bytes=1000, min_accuracy=0.9, max_rounds=3, max_retrains=2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("300000", 300_000),
        (300_000, 300_000),
        ("300B", 300),
        ("300KB", 300_000),
        ("300 kb", 300_000),
        ("300KiB", 307_200),
        ("1.5MB", 1_500_000),
        ("2MiB", 2 * 2**20),
        ("1GB", 10**9),
        ("1GiB", 2**30),
        (" 12x ", 10_000),
        ("12X", 10_000),
        ("2.5x", 48_000),
        ("1e", None),
        ("0.5", 1),
        ("1000000x", 1),
    ],
)
def test_sizes_are_read_as_written(text, expected):
    if expected is None:
        with pytest.raises(ValueError, match="max_size must be bytes, like 300KB, 300KiB or 12x"):
            parse_size(text, 120_000)
    else:
        assert parse_size(text, 120_000) == expected


@pytest.mark.parametrize(
    "text", ["", "x", "12y", "KB", "-3KB", "3 4", "1e6", "0", "0x", "nan", "inf", "12x KB", "1,000"]
)
def test_what_is_no_size_is_refused_and_quoted(text):
    with pytest.raises(ValueError, match="max_size must be bytes") as caught:
        parse_size(text, 120_000)
    assert repr(text) in str(caught.value)


@given(st.integers(1, 10**12), st.integers(0, 10**12))
def test_whole_bytes_are_exact(n_bytes, baseline):
    assert parse_size(n_bytes, baseline) == n_bytes
    assert parse_size(f"{n_bytes}B", baseline) == n_bytes


@given(st.integers(1, 10**9), st.integers(1, 1000))
def test_a_ratio_never_allows_more_than_its_share(baseline, ratio):
    n_bytes = parse_size(f"{ratio}x", baseline)
    assert n_bytes * ratio <= max(baseline, ratio)
    assert (n_bytes + 1) * ratio > baseline


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.92", 0.92),
        (0.92, 0.92),
        ("0", 0.0),
        ("-0.5pp", 0.945),
        ("-1 pp", 0.94),
        ("0pp", 0.95),
        ("-95pp", 0.0),
    ],
)
def test_floors_are_read_as_written(text, expected):
    assert parse_accuracy(text, 0.95) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("text", ["", "-0.5", "+0.5", "92%", "pp", "1.5", "-96pp", "nan", "0.9.1"])
def test_what_is_no_floor_is_refused_and_quoted(text):
    with pytest.raises(ValueError, match=r"min_accuracy must be a fraction like 0\.92") as caught:
        parse_accuracy(text, 0.95)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["0.951", "1.0", "+1pp", "1pp"])
def test_a_floor_above_the_trained_network_is_refused(text):
    with pytest.raises(ValueError, match=r"must not be above the trained model's 0\.9500, got"):
        parse_accuracy(text, 0.95)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_bytes", 0),
        ("min_accuracy", -0.1),
        ("min_accuracy", 1.1),
        ("max_rounds", 0),
        ("max_retrains", -1),
    ],
)
def test_impossible_thresholds_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be .*, got {value}$"):
        Budget(**{"max_bytes": 1, "min_accuracy": 0.5} | {field: value})


def test_both_thresholds_are_met_at_equality():
    assert decide(BUDGET, n_bytes=1000, accuracy=0.9, round=1, retrains=0) == "publish"


@given(st.integers(1, 2000), st.floats(0, 1), st.integers(1, 3), st.integers(0, 2))
def test_exactly_what_meets_both_thresholds_is_published(n_bytes, accuracy, round, retrains):
    decision = decide(BUDGET, n_bytes=n_bytes, accuracy=accuracy, round=round, retrains=retrains)
    assert (decision == "publish") == (n_bytes <= 1000 and accuracy >= 0.9)
    assert (decision == "too-big") == (n_bytes > 1000)


@pytest.mark.parametrize(
    ("max_rounds", "max_retrains"), [*itertools.product([1, 2, 3], [0, 1, 2, 3])]
)
def test_a_run_that_never_gets_there_tries_everything_once_and_ends(max_rounds, max_retrains):
    budget = Budget(
        max_bytes=1000, min_accuracy=0.9, max_rounds=max_rounds, max_retrains=max_retrains
    )
    round, retrains, total = 1, 0, 0
    decision = None
    for _ in range(100):
        decision = decide(budget, n_bytes=900, accuracy=0.5, round=round, retrains=retrains)
        if decision == "retrain":
            retrains, total = retrains + 1, total + 1
        elif decision == "next":
            round, retrains = round + 1, 0
        else:
            break
    assert decision == "give-up"
    assert total == max_rounds * max_retrains
    assert round == (max_rounds if max_retrains else 1)
