"""Images made of a seed, and what a network answers to them."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import onnx
import pytest

from filterpress.release import golden


def test_images_follow_the_rule_of_the_contract_value_by_value():
    made = golden.images(7, 3, (2, 3, 3))
    assert made.shape == (3, 2, 3, 3)
    assert made.dtype == np.float32
    for n in range(3):
        for i, value in enumerate(made[n].ravel()):
            digest = hashlib.sha256(b"7:%d:%d" % (n, i // 8)).digest()
            word = int.from_bytes(digest[4 * (i % 8) :][:4], "big")
            assert value == np.float32(word / 2**31 - 1)


def test_images_are_uniform_between_minus_one_and_one():
    values = golden.images(0, 4, (3, 64, 64)).ravel()
    assert values.min() >= -1
    assert values.max() <= 1
    # Kolmogorov's distance of 49,152 draws from their law is below 0.0088 but once in 1,000.
    law = np.linspace(0, 1, values.size)
    assert np.abs(np.sort((values + 1) / 2) - law).max() < 0.0088


def test_another_seed_makes_other_images_and_more_images_begin_with_the_same():
    few, many = golden.images(1, 2, (5,)), golden.images(1, 4, (5,))
    np.testing.assert_array_equal(many[:2], few)
    assert not np.isin(golden.images(2, 2, (5,)), few).any()


def _linear(shape):
    """A model that sums the values of an image, and has it doubled."""
    value = onnx.helper.make_tensor_value_info
    nodes = [
        onnx.helper.make_node("Flatten", ["images"], ["flat"]),
        onnx.helper.make_node("MatMul", ["flat", "weight"], ["outputs"]),
    ]
    weight = onnx.numpy_helper.from_array(np.float32([[1, 2]] * 4), "weight")
    graph = onnx.helper.make_graph(
        nodes,
        "linear",
        [value("images", onnx.TensorProto.FLOAT, shape)],
        [value("outputs", onnx.TensorProto.FLOAT, ["n", 2])],
        [weight],
    )
    opset = onnx.helper.make_opsetid("", 17)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()


def test_outputs_are_those_of_the_network_for_the_images():
    wanted = golden.images(5, 3, (1, 2, 2)).reshape(3, 4).sum(1, keepdims=True) * [[1, 2]]
    found = golden.outputs(_linear(["n", 1, 2, 2]), seed=5, count=3)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_outputs_are_written_in_as_few_digits_as_float32_takes():
    found = np.array(golden.outputs(_linear(["n", 1, 2, 2]), seed=1, count=8))
    assert max(len(repr(value)) for value in found.ravel().tolist()) <= len("-0.123456789")
    longer = found.astype(np.float32).astype(np.float64)  # the same numbers, written out
    assert max(len(repr(value)) for value in longer.ravel().tolist()) > 15


def test_a_network_of_images_of_any_size_has_no_golden_outputs():
    with pytest.raises(ValueError, match="model must have one input with fixed sizes"):
        golden.outputs(_linear(["n", 1, "height", 2]), seed=0, count=1)


def test_making_images_needs_neither_torch_nor_onnxruntime():
    program = (
        "import sys; sys.modules['torch'] = sys.modules['onnxruntime'] = None;"
        "from filterpress.release.golden import images; print(images(0, 1, (1,)).size)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.strip() == b"1"
