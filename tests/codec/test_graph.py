from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from filterpress.codec import decode, encode, quantize, snap
from filterpress.codec.graph import fill, strip, to_onnx
from filterpress.errors import BitstreamError

RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "conv.weight": RANDOM.normal(0, 1, (4, 2, 1, 1)).astype(np.float32),
    "conv.bias": RANDOM.normal(0, 1, 4).astype(np.float32),
    "fc.weight": RANDOM.normal(0, 1, (3, 4 * 5 * 5)).astype(np.float32),
}
TENSORS = {
    "conv.weight": quantize(WEIGHTS["conv.weight"], snap([0.1, 0.2, 0.1, 0.3])),
    "conv.bias": quantize(WEIGHTS["conv.bias"], snap(0.01)),
    "fc.weight": quantize(WEIGHTS["fc.weight"], snap(0.05)),
}
LONG = "/features/features.0/block/conv/Conv_output_0"


def network(typed=False):
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], [LONG], name="/conv/Conv"),
        helper.make_node("Relu", [LONG], ["r"], doc_string="/home/someone/net.py(12)"),
        helper.make_node("Reshape", ["r", "flat"], ["f"]),
        helper.make_node("Gemm", ["f", "fc.weight"], ["y"], transB=1),
    ]
    constants = {**WEIGHTS, "flat": np.int64([0, -1])}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [
            helper.make_tensor(name, TensorProto.FLOAT, array.shape, array.ravel())
            if typed and name == "conv.bias"
            else numpy_helper.from_array(array, name)
            for name, array in constants.items()
        ],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def expected(x):
    w = {name: tensor.dequantize() for name, tensor in TENSORS.items()}
    hidden = np.einsum("nihw,oi->nohw", x, w["conv.weight"][:, :, 0, 0])
    hidden = np.maximum(hidden + w["conv.bias"][:, None, None], 0)
    return hidden.reshape(len(x), -1) @ w["fc.weight"].T


def run(model, x):
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def stripped():
    return onnx.load_from_string(strip(network(), TENSORS))


def test_a_decoded_network_computes_what_its_integers_say():
    model = to_onnx(encode(TENSORS, strip(network(), TENSORS), {}))
    x = np.random.default_rng(1).normal(0, 1, (6, 2, 5, 5)).astype(np.float32)
    assert np.allclose(run(model, x), expected(x), rtol=1e-4, atol=1e-4)
    assert not np.allclose(run(network().SerializeToString(), x), expected(x), atol=1e-3)


def test_a_decoded_network_is_the_same_bytes_each_time():
    data = encode(TENSORS, strip(network(), TENSORS), {})
    assert to_onnx(data) == to_onnx(data)


def test_weights_that_were_not_in_raw_form_are_stripped_and_filled_alike():
    assert strip(network(typed=True), TENSORS) == strip(network(), TENSORS)


def test_a_stripped_graph_keeps_all_but_the_weights_and_the_comments():
    before, after = network(), stripped()
    assert after.ir_version == before.ir_version
    assert after.opset_import == before.opset_import
    assert after.graph.input == before.graph.input
    assert after.graph.output == before.graph.output
    assert [node.op_type for node in after.graph.node] == ["Conv", "Relu", "Reshape", "Gemm"]
    assert list(after.graph.initializer) == [
        w for w in before.graph.initializer if w.name == "flat"
    ]
    for gone in (LONG, "someone", "/conv/Conv"):
        assert gone.encode() not in strip(network(), TENSORS)


def test_stripping_does_not_change_the_model():
    model = network()
    strip(model, TENSORS)
    assert model == network()


def test_weights_that_are_not_named_stay_in_the_graph():
    some = {"fc.weight": TENSORS["fc.weight"]}
    model = fill(strip(network(), some), some)
    bias = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}["conv.bias"]
    assert np.array_equal(bias, WEIGHTS["conv.bias"])


def test_values_that_subgraphs_use_keep_their_names():
    model = network()
    inner = helper.make_graph(
        [helper.make_node("Identity", [LONG], ["z"])],
        "inner",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    model.graph.node.append(
        helper.make_node("If", ["yes"], ["unused"], then_branch=inner, else_branch=inner)
    )
    model.graph.initializer.append(numpy_helper.from_array(np.bool_(True), "yes"))
    x = np.ones((1, 2, 5, 5), np.float32)
    decoded = to_onnx(encode(TENSORS, strip(model, TENSORS), {}))
    assert np.allclose(run(decoded, x), expected(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["nothing", "flat"])
def test_only_float32_initializers_can_be_stripped(name):
    with pytest.raises(ValueError, match=f"float32 initializers of the model, got '{name}'"):
        strip(network(), [name])


def outside(tensor):
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def in_an_initializer(model):
    model.graph.initializer[0].ClearField("raw_data")
    outside(model.graph.initializer[0])


def in_a_constant(model):
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones(1)))
    outside(constant.attribute[0].t)
    model.graph.node.insert(0, constant)


def in_a_subgraph(model):
    inner = helper.make_graph([], "inner", [], [], [numpy_helper.from_array(np.ones(1), "w")])
    outside(inner.initializer[0])
    model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=inner))


def with_a_location_only(model):
    model.graph.initializer[0].external_data.add(key="location", value="w.bin")


@pytest.mark.parametrize(
    "hide", [in_an_initializer, in_a_constant, in_a_subgraph, with_a_location_only]
)
def test_external_data_is_refused_wherever_it_is(hide):
    model = stripped()
    hide(model)
    with pytest.raises(BitstreamError, match="external data"):
        fill(model.SerializeToString(), TENSORS)
    with pytest.raises(ValueError, match="external data"):
        strip(model, [])


def without(name):
    return {key: tensor for key, tensor in TENSORS.items() if key != name}


def with_initializer(name):
    model = stripped()
    model.graph.initializer.append(numpy_helper.from_array(WEIGHTS["conv.bias"], name))
    return model.SerializeToString()


def with_node(*arguments):
    model = stripped()
    model.graph.node.append(helper.make_node(*arguments))
    return model.SerializeToString()


GRAPH = strip(network(), TENSORS)
REFUSED = {
    "a graph without one of its tensors": (GRAPH, without("conv.bias")),
    "a tensor without a place": (GRAPH, {**TENSORS, "more": TENSORS["conv.bias"]}),
    "a tensor in its place already": (with_initializer("conv.bias"), TENSORS),
    "two initializers of one name": (with_initializer("flat"), TENSORS),
    "an operator that does not exist": (with_node("Nothing", ["x"], ["z"]), TENSORS),
    "a value from nowhere": (with_node("Relu", ["nowhere"], ["z"]), TENSORS),
    "bytes that are no graph": (b"\xff" * 20, TENSORS),
    "a graph that is cut off": (GRAPH[:-7], TENSORS),
    "a graph nested 1000 deep": (b"\x3a" + b"\xff\xff\x03" * 1000, TENSORS),
    "no graph": (b"", {}),
}


@pytest.mark.parametrize(("graph", "tensors"), REFUSED.values(), ids=REFUSED.keys())
def test_a_graph_that_does_not_fit_its_tensors_is_refused(graph, tensors):
    with pytest.raises(BitstreamError):
        fill(graph, tensors)


def test_a_filled_weight_is_the_dequantised_tensor():
    model = fill(GRAPH, decode(encode(TENSORS, GRAPH, {})).tensors)
    weights = {w.name: w for w in model.graph.initializer}
    for name in TENSORS:
        weight, array = weights[name], numpy_helper.to_array(weights[name])
        assert array.dtype == np.float32
        assert np.array_equal(array, TENSORS[weight.name].dequantize())
