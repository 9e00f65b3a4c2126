"""Small networks as files, for tests that need real ones."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from filterpress.codec import encode, quantize, snap
from filterpress.codec.graph import strip

SHAPE = (1, 4, 8)


def weight(seed, moved=0.0):
    """A matrix (32, 64); `moved` of its values are one step off."""
    random = np.random.default_rng(seed)
    made = random.normal(size=(32, 64))
    return made + 0.25 * (np.random.default_rng(seed + 1).random(made.shape) < moved)


def network(values):
    """Encode a network of one matrix."""
    tensors = {"weight": quantize(values, snap(0.25))}
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["outputs"]),
    ]
    shape = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "linear",
        [shape("images", TensorProto.FLOAT, ["n", *SHAPE])],
        [shape("outputs", TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(np.float32(values), "weight")],
    )
    opset = helper.make_opsetid("", 17)
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    return encode(tensors, strip(model, tensors), {})
