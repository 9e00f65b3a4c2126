"""The compiled coder against the slow one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from filterpress.codec import estimate_bits
from filterpress.codec.binarisation import decode_tensor, encode_tensor
from filterpress.errors import BitstreamError
from tests.codec.slow_coder import slow_encode, slow_trusts

SCALAR = np.zeros((), np.int32)


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
        (np.int32([[1, -2, 0], [0, 40, -9]]), np.int32([-300, 17]), "7b97ff8c25e4f86f0600c3dc20"),
        (
            np.arange(-18, 18, dtype=np.int32).reshape(2, 2, 3, 3),
            np.int32(0),
            "80079cff9e22b058290db9c8d4c7db7f288eed17c7de52316df870",
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


def test_strengths_of_rows_channels_and_columns_are_found_where_there_are_any():
    random, trusts = np.random.default_rng(5), {}
    for axis in (None, 0, 1, 3):
        shape = [size if at == axis else 1 for at, size in enumerate((48, 32, 1, 3))]
        strength = np.exp(random.normal(0, 1.0, shape)) if axis is not None else 1.0
        q = np.rint(laplace((48, 32, 1, 3), 20.0) * strength).astype(np.int32)
        nothing = np.zeros(48, bool), np.zeros(96, bool)
        trusts[axis] = slow_trusts(q.reshape(48, 96), 3, *nothing)
        assert encode_tensor(q, SCALAR) == slow_encode(q, SCALAR)
    assert min(trusts[None]) >= 7
    assert [trusts[axis].index(min(trusts[axis])) for axis in (0, 1, 3)] == [0, 2, 1]
    assert all(min(trusts[axis]) <= 4 for axis in (0, 1, 3))


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
    row, column, _ = slow_trusts(integers, 1, np.zeros(2, bool), np.zeros(2, bool))
    for trusts in ((11 - row, column, 9), (row, 11 - column, 9)):
        with pytest.raises(BitstreamError, match="one way"):
            decode_tensor(slow_encode(integers, SCALAR, trusts=trusts), (2, 2), 1)
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
