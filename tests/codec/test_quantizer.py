from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from filterpress.codec import QuantizedTensor, quantize, snap
from filterpress.codec.quantizer import from_exponents, restep, to_exponents

GRID = np.arange(-4096, 4096)


def test_every_step_of_the_grid_is_the_float32_nearest_to_a_64th_power_of_two():
    steps = from_exponents(GRID)
    assert steps.dtype == np.float32
    neighbours = np.nextafter(steps, np.float32(np.inf)), np.nextafter(steps, np.float32(0))
    for k in range(64):
        # s is nearest to 2**(k/64) if it lies between the midpoints around s: compare 64th powers.
        i = 4096 + k
        above, below = ((Fraction(float(steps[i])) + Fraction(float(n[i]))) / 2 for n in neighbours)
        assert below**64 < 2**k < above**64
    octaves = steps.reshape(-1, 64)
    assert np.array_equal(octaves[1:], octaves[:-1] * np.float32(2))


def test_exponents_and_steps_are_inverse():
    assert np.array_equal(to_exponents(from_exponents(GRID)), GRID)


@given(st.floats(2.0**-63, 2.0**63))
def test_snap_is_within_half_a_grid_step(scale):
    assert abs(np.log2(float(snap(scale)) / scale)) <= 1 / 128 + 1e-6


@given(st.integers(-4096, 4095))
def test_snap_keeps_what_is_on_the_grid(exponent):
    step = from_exponents(exponent)
    assert snap(step) == step


def test_snap_keeps_the_shape_and_moves_extremes_to_the_ends_of_the_grid():
    assert snap(0.3).shape == ()
    assert snap(np.ones((3, 2))).shape == (3, 2)
    assert snap([1e-40, 1e38]).tolist() == [2.0**-64, float(from_exponents(4095))]


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, [1.0, 0.0]])
def test_snap_refuses_what_is_no_step(scale):
    with pytest.raises(ValueError, match="scale must be positive and finite, got"):
        snap(scale)


def test_weights_are_rounded_half_to_even_per_row():
    weight = np.float32([[0.5, 1.5, -2.5], [1.0, 3.0, -5.0]])
    tensor = quantize(weight, snap([1.0, 2.0]))
    assert tensor.integers.tolist() == [[0, 2, -2], [0, 2, -2]]
    assert tensor.integers.dtype == np.int32
    assert tensor.dequantize().tolist() == [[0, 2, -2], [0, 4, -4]]


@given(st.floats(-100, 100, width=32), st.floats(0.01, 10))
def test_rounding_errs_by_half_a_step_at_most(weight, scale):
    tensor = quantize(weight, snap(scale))
    assert abs(float(tensor.dequantize()) - weight) <= float(tensor.scale) * (0.5 + 1e-5)


def test_huge_ratios_are_clipped_and_stay_finite():
    tensor = quantize([3e38, -3e38, 0.0], snap(1e-30))
    assert tensor.integers.tolist() == [2**20, -(2**20), 0]
    assert np.isfinite(QuantizedTensor(tensor.integers, snap(1e38)).dequantize()).all()


@pytest.mark.parametrize(
    ("weight", "scale", "message"),
    [
        ([np.nan], snap(1), "weight must be finite, got nan"),
        ([1.0], 0.3, "scale must lie on the grid"),
        ([1.0], -1.0, "scale must lie on the grid"),
        ([1.0], np.nan, "scale must lie on the grid"),
        (np.ones((2, 3)), snap(np.ones(3)), r"scale must have shape \(\) or \(2,\), got \(3,\)"),
    ],
)
def test_quantize_says_what_is_wrong(weight, scale, message):
    with pytest.raises(ValueError, match=message):
        quantize(weight, scale)


@given(
    hnp.arrays(np.int32, (2, 3), elements=st.integers(-9, 9) | st.integers(-(2**20), 2**20)),
    hnp.arrays(np.int32, (2,), elements=st.integers(-4096, 4095)),
    hnp.arrays(np.int32, (2,), elements=st.integers(-200, 200) | st.integers(-8191, 8191)),
)
@settings(deadline=None)
def test_integers_on_other_steps_are_the_nearest_to_the_same_weights(integers, old, further):
    new = np.clip(old + further, -4096, 4095).astype(np.int32)
    for row, factor_exponent, found in zip(
        integers, old - new, restep(integers, old, new), strict=True
    ):
        for value, restepped in zip(row.tolist(), found.tolist(), strict=True):
            exact = value * Decimal(2) ** (Decimal(int(factor_exponent)) / 64)
            exact = max(min(exact, Decimal(2**20)), Decimal(-(2**20)))
            assert abs(restepped - exact) <= Decimal("0.500001")


def test_halves_on_other_steps_are_rounded_away_from_zero():
    integers = np.arange(-4, 5, dtype=np.int32)
    halves = restep(integers, np.int32(0), np.int32(64))
    assert halves.tolist() == [-2, -2, -1, -1, 0, 1, 1, 2, 2]
