"""The compiled coder against a slow one, written from docs/bitstream.md, that shares no code."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from math import isqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from filterpress.codec import estimate_bits
from filterpress.codec.binarisation import decode_tensor, encode_tensor
from filterpress.errors import BitstreamError

SCALAR = np.zeros((), np.int32)


def power_of_two(eighths):
    """2**(eighths / 256), rounded down to a multiple of 2**-52."""
    whole, part = divmod(eighths, 256)
    root = 2 ** (part + 52 * 256)
    for _ in range(8):
        root = isqrt(root)
    return Fraction(root * 2**whole, 2**52)


def middle(level):
    """The magnitude in the middle of a level."""
    if level < 4:
        return Fraction(2 * level + 1, 64)
    return Fraction(2 * (4 + level % 4) + 1, 64) * 2 ** (level // 4 - 1)


def level_of(x):
    """The level of x / 32, for whole x."""
    octave = x.bit_length() - 1
    return x if x < 4 else 4 * (octave - 1) + (x >> (octave - 2)) % 4


def shift_of(level):
    return max(level - 18, 0) // 4


@cache
def tail(n, level):
    exponent = (2 * n - 1) * 256 / middle(level)
    return Fraction((2**113 // int(2**52 * (1 + power_of_two(int(exponent))))), 2**60)


@cache
def first_guess(kind, level, n):
    """The probability of a one, in 2**-24, of a context that begins with one."""
    unit = 2 ** shift_of(level)
    start = 1 + n * unit if kind == "upper" else 1 + (n - 1) * unit
    if kind == "greater" and n == 0:
        return min(max(int(tail(1, level) * 2**24), 2**15), 2**24 - 2**15)
    level = max(level, 14)
    if kind == "greater":
        share = tail(start + unit, level) / max(tail(start, level), Fraction(1, 2**60))
    else:
        whole = tail(start, level) - tail(start + unit, level)
        half = tail(start + unit // 2, level) - tail(start + unit, level)
        share = half / max(whole, Fraction(1, 2**60))
    return min(max(int(share * 2**24), 2**15), 2**24 - 2**15)


class SlowCoder:
    """The interval as one big integer: no carries, no buffers."""

    def __init__(self):
        self.low, self.width, self.n_bytes, self.models = 0, 2**32, 0, {}

    def bit(self, context, bit):
        if context not in self.models:
            kind, where = context[1], context[2:]
            told = kind in ("greater", "upper")
            one = first_guess(kind, *where[-2:]) if told else 2**23
            self.models[context] = one, one, 16 if told else 0
        fast, slow, count = self.models[context]
        zeros = (self.width * (2**24 - (fast + slow) // 2)) // 2**24
        self.divide(zeros, bit)
        target = 2**24 - 2**12 if bit else 2**12
        fast += (target - fast) * (2**16 // min(count + 2, 160)) // 2**16
        slow += (target - slow) * (2**16 // min(count + 2, 1600)) // 2**16
        self.models[context] = fast, slow, min(count + 1, 1599)

    def even(self, n_bits, value):
        part = self.width // 2**n_bits
        self.low += value * part
        self.width = part if value < 2**n_bits - 1 else self.width - value * part
        self.widen()

    def divide(self, zeros, bit):
        self.low, self.width = (self.low + zeros, self.width - zeros) if bit else (self.low, zeros)
        self.widen()

    def widen(self):
        while self.width < 2**24:
            self.low, self.width, self.n_bytes = self.low * 256, self.width * 256, self.n_bytes + 1

    def finish(self):
        for n in range(5):
            unit = 256 ** (4 - n)
            value = -(-self.low // unit) * unit
            if value < self.low + self.width:
                return (value // unit).to_bytes(self.n_bytes + n, "big")
        raise AssertionError


def slow_integer(coder, part, largest, expected, prediction, value):
    level, magnitude = level_of(expected), abs(value)
    coder.bit((part, "greater", 0, level, 0), int(magnitude > 0))
    if magnitude == 0:
        return
    strength = sum(32 * abs(prediction) > expected * 2**n for n in range(3))
    differs = int((value < 0) != (prediction < 0))
    coder.bit((part, "sign", strength), differs)
    agreement = 0 if strength == 0 else 1 + differs if strength == 1 else 3 + differs
    units, place = divmod(magnitude - 1, 2 ** shift_of(level))
    for n in range(1, 15 if largest == 15 else (largest - 1) // 2 ** shift_of(level) + 1):
        coder.bit((part, "greater", agreement, level, n), int(units >= n))
        if units < n:
            break
    if units >= 14:
        digits = bin(units - 14 + 1)[3:]
        for n in range(min(len(digits) + 1, 20)):
            coder.bit((part, "length", n), int(n < len(digits)))
        coder.even(len(digits), int(digits or "0", 2))
    if shift_of(level):
        half = 2 ** (shift_of(level) - 1)
        coder.bit((part, "upper", level, min(units, 14)), place // half)
        coder.even(shift_of(level) - 1, place % half)


def slow_steps(coder, exponents):
    mean = sum(exponents) // len(exponents) if exponents else -4096
    coder.even(13, mean + 4096)
    if len(exponents) > 1:
        rows = np.array([exponents]) - mean
        slow_matrix(
            coder, "steps", rows, 15, 34, 1, 1, np.zeros(1, bool), np.zeros(rows.size, bool)
        )


def slow_zeros(coder, part, zeros, period):
    coder.bit((part, "any"), int(any(zeros)))
    if any(zeros):
        for i, zero in enumerate(zeros):
            before = i > 0 and zeros[i - 1]
            earlier = i >= period and zeros[i - period]
            coder.bit((part, "zero", bool(before), bool(earlier)), int(zero))


def slow_encode(integers, exponents, name_zeros=True, level=None, largest=None):
    coder = SlowCoder()
    slow_steps(coder, exponents.reshape(-1).tolist())
    if largest is None:
        largest = min(int(np.abs(integers).max(initial=0)), 15)
    coder.even(4, largest)
    if largest == 0:
        return coder.finish()
    one_row = integers.ndim < 2 or integers.size == len(integers)
    rows = integers.reshape(1 if one_row else len(integers), -1)
    taps = int(np.prod(integers.shape[2:]))
    width = integers.shape[-1] if integers.ndim > 2 else 1
    zero_rows, zero_columns = ~rows.any(axis=1), ~rows.any(axis=0)
    if not name_zeros:
        zero_rows[:], zero_columns[:] = False, False
    n_weights = int((~zero_rows).sum() * (~zero_columns).sum())
    if level is None:
        level = level_of(32 * int(np.abs(rows.astype(np.int64)).sum()) // n_weights)
    coder.even(7, level)
    slow_zeros(coder, "rows", zero_rows, 1)
    slow_zeros(coder, "columns", zero_columns, taps)
    slow_matrix(coder, "weights", rows, largest, level, taps, width, zero_rows, zero_columns)
    return coder.finish()


def moved(mean, value, n):
    return mean + (value - mean) * (2**20 // min(n, 400)) // 2**20


def slow_matrix(coder, part, rows, largest, level, taps, width, zero_rows, zero_columns):
    q, unit = rows.tolist(), 2**20
    start = int(middle(level) * unit)
    tensor, columns, places, n_weights, n_kernels = start, [0] * rows.shape[1], [0] * taps, 0, 0
    for r in np.flatnonzero(~zero_rows).tolist():
        row = tensor
        for c in range(rows.shape[1]):
            y, x = divmod(c % taps, width)
            n_kernels += c % taps == 0
            if zero_columns[c]:
                continue
            left = q[r][c - 1] if x else None
            above = q[r][c - width] if y else None
            corner = q[r][c - width - 1] if x and y else 0
            before = q[r - 1][c] if r else None
            back = q[r][c - taps] if c >= taps else None
            left_, above_, before_, back_ = (
                row if near is None else abs(near) * unit for near in (left, above, before, back)
            )
            expected = 12 * row + 9 * (start + columns[c]) + 3 * (start + places[c % taps])
            expected += 3 * tensor + (3 * (left_ + above_) + 2 * (before_ + back_)) // 2
            prediction = 2 * (left or 0) + 2 * (above or 0) - corner
            slow_integer(coder, part, largest, expected // unit, prediction, q[r][c])
            magnitude, n_weights = abs(q[r][c]) * unit, n_weights + 1
            row = moved(row, magnitude, c + 10)
            tensor = moved(tensor, magnitude, n_weights + 16)
            columns[c] = moved(columns[c], magnitude - start, min(r + 6, 64))
            places[c % taps] = moved(places[c % taps], magnitude - start, n_kernels + 4)


magnitudes = st.one_of(st.integers(-2, 2), st.integers(-40, 40), st.integers(-(2**20), 2**20))
shapes = st.one_of(
    hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4),
    hnp.array_shapes(min_dims=4, max_dims=4, min_side=1, max_side=5),
)


@st.composite
def tensors(draw):
    shape = draw(shapes)
    fill = st.integers(-1, 1) if draw(st.booleans()) else st.just(0)
    integers = draw(hnp.arrays(np.int32, shape, elements=magnitudes, fill=fill))
    per_row = draw(st.booleans()) and len(shape) > 0
    steps = hnp.arrays(np.int32, shape[:1] if per_row else (), elements=st.integers(-4096, 4095))
    return integers, draw(steps)


@given(tensors())
@settings(max_examples=150, deadline=None)
def test_the_compiled_encoder_writes_the_bytes_of_the_slow_one(tensor):
    assert encode_tensor(*tensor) == slow_encode(*tensor)


@given(tensors())
@settings(max_examples=150, deadline=None)
def test_a_tensor_comes_back_as_it_was(tensor):
    integers, exponents = tensor
    data = encode_tensor(integers, exponents)
    decoded, steps = decode_tensor(data, integers.shape, exponents.size)
    assert np.array_equal(decoded, integers)
    assert np.array_equal(steps, exponents.reshape(-1))


def test_carries_run_through_bytes_that_are_already_written():
    # Some of 200 tensors of random extremes have runs of 0xff in the making.
    random = np.random.default_rng(3)
    for _ in range(200):
        integers = random.integers(-(2**20), 2**20, 60, np.int32, endpoint=True)
        assert encode_tensor(integers, SCALAR) == slow_encode(integers, SCALAR)


def test_a_tensor_that_needs_more_room_than_first_given_is_still_right():
    integers = np.full(5000, 2**20, np.int32) * np.random.default_rng(0).choice([-1, 1], 5000)
    integers -= np.random.default_rng(1).integers(0, 2**19, 5000, np.int32) * np.sign(integers)
    data = encode_tensor(integers.astype(np.int32), SCALAR)
    assert len(data) > 2 * integers.size + 64
    assert np.array_equal(decode_tensor(data, (5000,), 1)[0], integers)


@pytest.mark.parametrize(
    ("integers", "exponents", "data"),
    [
        (np.zeros((3, 4), np.int32), np.int32(-384), "7400"),
        (np.int32([[1, -2, 0], [0, 40, -9]]), np.int32([-300, 17]), "7b97ff88d70494295aa909a0"),
        (
            np.arange(-18, 18, dtype=np.int32).reshape(2, 2, 3, 3),
            np.int32(0),
            "80079c3c2c13b7086c418a8f3064ee3d33da25bc9a3bdbd5ad30",
        ),
    ],
)
def test_golden_tensors_keep_their_bytes(integers, exponents, data):
    assert encode_tensor(integers, np.asarray(exponents)).hex() == data


def order_0_bits(integers):
    counts = np.unique(integers, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def laplace(shape, spread, seed=0):
    return np.rint(np.random.default_rng(seed).laplace(0, spread, shape)).astype(np.int32)


def structured(shape=(64, 48, 3, 3), seed=0):
    """Weights as training leaves them: filters and channels of unequal strength, some gone."""
    random = np.random.default_rng(seed)
    strength = np.exp(random.normal(0, 0.6, (shape[0], 1, 1, 1)))
    strength = strength * np.exp(random.normal(0, 0.6, (1, shape[1], 1, 1)))
    strength[:, random.random(shape[1]) < 0.2] = 0
    strength[random.random(shape[0]) < 0.2] = 0
    return np.rint(laplace(shape, 2.0, seed) * strength).astype(np.int32)


def test_independent_weights_cost_their_entropy_and_half_a_percent():
    integers = laplace((128, 128, 3, 3), 1.45)
    n_bits = 8 * len(encode_tensor(integers, SCALAR))
    assert order_0_bits(integers) * 0.99 < n_bits < order_0_bits(integers) * 1.01


def test_structured_weights_cost_far_less_than_their_order_0_entropy():
    integers = structured()
    assert 8 * len(encode_tensor(integers, SCALAR)) < 0.9 * order_0_bits(integers)


def test_smooth_kernels_cost_less_than_the_same_weights_shuffled():
    ramp = np.random.default_rng(0).normal(0, 4, (64, 16, 1, 1))
    smooth = np.rint(ramp + np.random.default_rng(1).normal(0, 1, (64, 16, 3, 3))).astype(np.int32)
    shuffled = np.random.default_rng(2).permutation(smooth.ravel()).reshape(smooth.shape)
    smooth_bytes, shuffled_bytes = (len(encode_tensor(q, SCALAR)) for q in (smooth, shuffled))
    assert smooth_bytes < 0.85 * shuffled_bytes


def test_kernel_taps_and_filters_that_are_zero_everywhere_cost_nearly_nothing():
    dense = laplace((64, 64, 3, 1), 1.5)
    spread = np.zeros((64, 64, 3, 3), np.int32)
    spread[:, :, :, 1] = dense[:, :, :, 0]
    taller = np.concatenate([dense, np.zeros_like(dense)])
    n_bytes = len(encode_tensor(dense, SCALAR))
    assert len(encode_tensor(spread, SCALAR)) < 1.01 * n_bytes + 32
    assert len(encode_tensor(taller, SCALAR)) < n_bytes + 8


def test_an_all_zero_tensor_of_any_size_costs_two_bytes():
    assert len(encode_tensor(np.zeros((512, 512, 3, 3), np.int32), SCALAR)) <= 2


def test_a_short_tensor_costs_at_most_two_bits_a_weight_over_its_entropy():
    integers = laplace(64, 1.5)
    assert 8 * len(encode_tensor(integers, SCALAR)) < order_0_bits(integers) + 2 * 64


@pytest.mark.parametrize("spread", [0.5, 1.0, 1.45, 4.0, 12.0])
@pytest.mark.parametrize("shape", [(32, 16, 3, 3), (300, 400), (200, 100, 3, 3)])
def test_the_estimate_is_within_5_percent_on_laplacian_weights(shape, spread):
    integers = laplace(shape, spread)
    assert estimate_bits(integers) == pytest.approx(8 * len(encode_tensor(integers, SCALAR)), 0.05)


@pytest.mark.parametrize("seed", range(4))
def test_the_estimate_is_within_5_percent_on_structured_and_sparse_weights(seed):
    kept = np.random.default_rng(seed + 9).random((300, 100, 3, 3)) < 0.1
    for integers in (structured((300, 100, 3, 3), seed), laplace(kept.shape, 2.0) * kept):
        n_bits = 8 * len(encode_tensor(integers.astype(np.int32), SCALAR))
        assert estimate_bits(integers.astype(np.int32)) == pytest.approx(n_bits, 0.05)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (400, 500)])
def test_the_estimate_of_nothing_is_nearly_nothing(shape):
    assert 0 <= estimate_bits(np.zeros(shape, np.int32)) < 16


def assert_canonical_or_refused(data, shape, n_exponents):
    try:
        integers, exponents = decode_tensor(data, shape, n_exponents)
    except BitstreamError:
        return
    assert encode_tensor(integers, exponents) == data


@given(st.binary(max_size=80), shapes, st.integers(0, 3))
@settings(max_examples=400, deadline=None)
def test_any_bytes_are_a_tensor_in_its_one_encoding_or_an_error(data, shape, n_exponents):
    assert_canonical_or_refused(data, shape, n_exponents)


@given(tensors(), st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_data_is_a_tensor_in_its_one_encoding_or_an_error(tensor, choice):
    integers, exponents = tensor
    data = bytearray(encode_tensor(integers, exponents))
    at = choice.draw(st.integers(0, len(data)))
    data[at : at + choice.draw(st.integers(0, 2))] = choice.draw(st.binary(max_size=2))
    assert_canonical_or_refused(bytes(data), integers.shape, exponents.size)


def test_data_that_goes_on_or_ends_far_too_early_is_refused():
    integers = laplace((8, 9), 3.0)
    data = encode_tensor(integers, SCALAR)
    for wrong in (data + b"\0", data + bytes(9), data[: len(data) // 2], b""):
        with pytest.raises(BitstreamError):
            decode_tensor(wrong, integers.shape, 1)


@pytest.mark.parametrize("integers", [[[1, 2], [0, 0]], [[1, 0], [2, 0]]])
def test_a_row_or_column_that_is_zero_but_not_named_so_is_refused(integers):
    data = slow_encode(np.int32(integers), SCALAR, name_zeros=False)
    with pytest.raises(BitstreamError, match="one way"):
        decode_tensor(data, (2, 2), 1)


def test_what_is_said_before_the_weights_must_be_true():
    integers = np.int32([[1, -2], [3, 0]])
    assert slow_encode(integers, SCALAR, largest=3) == encode_tensor(integers, SCALAR)
    for largest in (4, 15):
        with pytest.raises(BitstreamError, match="one way"):
            decode_tensor(slow_encode(integers, SCALAR, largest=largest), (2, 2), 1)
    for level in (0, 30, 99):
        with pytest.raises(BitstreamError, match="one way"):
            decode_tensor(slow_encode(integers, SCALAR, level=level), (2, 2), 1)
    with pytest.raises(BitstreamError, match="damaged"):
        decode_tensor(slow_encode(integers, SCALAR, level=100), (2, 2), 1)


def test_a_step_outside_the_grid_is_refused():
    data = slow_encode(np.int32([[1, 2], [3, 4]]), np.int32([4090, 4100]))
    with pytest.raises(BitstreamError, match="one way"):
        decode_tensor(data, (2, 2), 2)


def test_a_tensor_without_elements_cannot_hide_one():
    with pytest.raises(BitstreamError, match="one way"):
        decode_tensor(encode_tensor(np.int32([5]), SCALAR), (0,), 1)


def test_a_magnitude_over_the_limit_is_refused():
    data = slow_encode(np.array([2**20 + 1], np.int32), SCALAR)
    with pytest.raises(BitstreamError, match="damaged"):
        decode_tensor(data, (1,), 1)
