from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from filterpress import codec, export
from filterpress.activations import Activated, ActivationQuantizer
from filterpress.codec.graph import fill, strip
from filterpress.errors import ModelError
from filterpress.export import to_graph
from filterpress.forms import Templates
from filterpress.representations import (
    Chain,
    ChannelOrder,
    like,
    multiply_templates_,
    quantize_,
    share_levels_,
    without_quantization,
)
from filterpress.surgery import layers
from tests import networks

IMAGES = networks.images(7)


def decoded_outputs(network, images=IMAGES):
    """Encode a network, decode the file, and run what comes out."""
    graph, tensors = to_graph(network, tuple(images.shape[1:]))
    data = codec.encode(tensors, strip(graph, tensors), {})
    decoded = codec.decode(data)
    model = fill(decoded.graph, decoded.tensors).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def on_grid(x):
    """Return the nearest sizes that the codec can store, with their signs."""
    signs = torch.where(x < 0, -1.0, 1.0)
    return signs * torch.from_numpy(codec.snap(x.abs().clamp(min=2.0**-60).numpy()))


def storable_norms_(network):
    """Choose factors of batch-norm that the codec stores without rounding."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                deviation = (module.running_var + module.eps).sqrt()
                if module.affine:
                    module.weight.copy_(on_grid(module.weight / deviation) * deviation)
                else:
                    module.running_var.copy_(on_grid(deviation).square() - module.eps)
    return network


def storable_(network):
    """Choose steps, and factors of batch-norm, whose products the codec stores without rounding."""
    storable_norms_(network)
    for layer in layers(network).values():
        quantize_(layer, on_grid(layer.weight.detach().flatten(1).abs().amax(dim=1) / 2**14))
    return network


@pytest.fixture
def fine(monkeypatch):
    """Round biases and constants so finely that nothing is left of it."""
    monkeypatch.setattr(export, "BIAS_LEVELS", 2**14)
    monkeypatch.setattr(export, "CONSTANT_LEVELS", 2**19)


def assert_same(network, images=IMAGES, tolerance=1e-3):
    with torch.no_grad():
        expected = network(images)
    scale = float(expected.std(dim=0).mean())
    torch.testing.assert_close(
        decoded_outputs(network, images), expected, rtol=0, atol=tolerance * scale
    )


@pytest.mark.parametrize("name", networks.BUILDERS)
def test_the_decoded_file_computes_what_the_network_does(name, fine):
    assert_same(storable_(networks.make(name)))


@pytest.mark.parametrize("name", networks.BUILDERS)
def test_default_rounding_of_biases_and_steps_is_slight(name):
    network = networks.make(name)
    for layer in layers(network).values():
        quantize_(layer, torch.full((len(layer.weight),), 0.01))
    assert_same(network, tolerance=0.15)


@pytest.mark.parametrize("name", networks.BUILDERS)
def test_a_network_that_is_not_quantised_is_rounded_to_eight_bits(name):
    network = networks.make(name)
    assert_same(network, tolerance=0.2)
    _, tensors = to_graph(network, networks.SHAPE)
    weights = [t.integers for t in tensors.values() if t.integers.ndim > 1]
    assert len(weights) == len(layers(network))
    for integers in weights:
        assert (abs(integers).reshape(len(integers), -1).max(axis=1) == 127).all()


def rounding_inputs(name, bits, coarse=63):
    """Make a network whose layers all read rounded activations."""
    network = networks.make(name)
    storable_(network)  # of batch-norm; steps become coarser
    network = without_quantization(network, rounded=True)
    for number, (path, layer) in enumerate(layers(network).items()):
        largest = layer.weight.detach().flatten(1).abs().amax(dim=1)
        quantize_(layer, on_grid(largest / coarse))
        scale, zero_point = 5.0 / 2**bits, 0 if number else 2**bits // 2
        network.set_submodule(path, Activated(ActivationQuantizer(scale, zero_point, bits), layer))
    return network.eval()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", networks.BUILDERS)
def test_the_graph_finds_the_integers_that_the_network_does(name, bits, fine):
    network = rounding_inputs(name, bits)
    graph, tensors = to_graph(network, networks.SHAPE)
    model = fill(strip(graph, tensors), tensors)
    rounded = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(rounded) == len(layers(network))
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("DequantizeLinear") == 2 * len(rounded)  # of inputs and of weights
    assert kinds.count("Clip") >= len(rounded) * (bits < 8)
    for node in rounded:
        model.graph.output.append(onnx.ValueInfoProto(name=node.output[0]))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    outputs, *found = session.run(None, {"images": IMAGES.numpy()})
    expected = []
    for module in network.modules():
        if isinstance(module, ActivationQuantizer):
            module.register_forward_hook(
                lambda its, _, rounded: expected.append(rounded / its.scale + its.zero_point)
            )
    with torch.no_grad():
        network(IMAGES)
    wrong = total = 0
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.uint8
        assert one.max() < 2**bits
        off = np.abs(one - other.round().numpy())
        # sums in another order may end on the other side of a half, and so on downstream
        assert off.max() <= 2
        wrong, total = wrong + int(off.sum()), total + off.size
    assert (found[0] == expected[0].round().numpy()).all()
    assert wrong <= 1e-2 * total
    assert np.isfinite(outputs).all()


@pytest.mark.parametrize("name", networks.BUILDERS)
def test_the_runtime_computes_what_a_network_that_reads_integers_does(name, fine):
    network = rounding_inputs(name, 8)
    with torch.no_grad():
        expected = network(IMAGES)
    error = (decoded_outputs(network) - expected).abs() / expected.std(dim=0)
    # it rounds biases to products of scales, and so a few activations the other way
    assert error.median() < 1e-3
    assert error.mean() < 0.02


def test_integers_of_more_than_eight_bits_behind_rounded_inputs_are_refused():
    with pytest.raises(ModelError, match="integers of 8 bits"):
        to_graph(rounding_inputs("residual", 8, coarse=200), networks.SHAPE)


@pytest.mark.parametrize("groups", [1, 2])
def test_projected_layers_are_exported_as_their_two_halves(groups, fine):
    torch.manual_seed(groups)
    network = networks.make("residual")
    for name in ("blocks.0.first.0", "blocks.1.first.0", "classifier"):
        layer = network.get_submodule(name)
        n_out, n_in = layer.weight.shape[:2]
        conv = isinstance(layer, nn.Conv2d)
        its_groups = groups if conv else 1
        first = (
            nn.Conv2d(n_in, 3 * its_groups, 1, bias=False)
            if conv
            else nn.Linear(n_in, 3, bias=False)
        )
        order = [ChannelOrder(torch.randperm(n_out))] if its_groups > 1 else []
        network.set_submodule(
            name, Chain(first, like(layer, 3 * its_groups, n_out, its_groups), *order)
        )
    assert_same(storable_(network.eval()))


def sequence(*modules):
    return networks.randomise_(nn.Sequential(*modules, nn.Flatten()))


ODD = {
    "norm after a bias": lambda: sequence(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)),
    "norm after nothing": lambda: sequence(nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 4, 3)),
    "norm after an activation": lambda: sequence(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
    "norm after a norm": lambda: sequence(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    ),
    "norm after a linear layer": lambda: sequence(
        nn.Flatten(), nn.Linear(128, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
    ),
    "norm without factors": lambda: sequence(
        *(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 3, 3))
    ),
    "norm of a depthwise layer": lambda: sequence(
        nn.Conv2d(2, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_norms_are_folded_wherever_they_stand(case, fine):
    assert_same(storable_(ODD[case]()))


def test_a_norm_whose_input_is_read_twice_stays_a_factor_and_an_offset(fine):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.conv(x)
            return (x + F.relu(self.norm(x))).flatten(1)

    assert_same(storable_(networks.randomise_(Twice())))


def test_a_convolution_used_under_two_norms_keeps_its_own_weight(fine):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)
            self.first, self.second = nn.BatchNorm2d(2), nn.BatchNorm2d(2)

        def forward(self, x):
            return self.second(self.conv(F.relu(self.first(self.conv(x))))).flatten(1)

    assert_same(storable_(networks.randomise_(Shared())))


def test_two_convolutions_that_share_one_weight_keep_it(fine):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(F.relu(self.a(x))).flatten(1)

    assert_same(networks.randomise_(Tied()), tolerance=0.2)


def test_equal_constants_of_two_layers_do_not_become_one(fine):
    network = sequence(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    with torch.no_grad():
        network[3].load_state_dict(network[1].state_dict())
        network[2].bias.copy_(network[0].bias)
    assert_same(storable_(network))


@pytest.mark.parametrize("gamma", [0.0, -1.5])
def test_a_factor_of_any_sign_is_folded(gamma, fine):
    network = sequence(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4))
    storable_(network)
    with torch.no_grad():
        network[1].weight[2] = gamma * (network[1].running_var[2] + network[1].eps).sqrt()
    assert_same(network, tolerance=5e-2)
    _, tensors = to_graph(network, networks.SHAPE)
    assert not any("running" in name or name.startswith("1.") for name in tensors)


def test_tensors_keep_the_names_of_the_network():
    network = networks.make("residual")
    graph, tensors = to_graph(network, networks.SHAPE)
    assert {f"{name}.weight" for name in layers(network)} <= set(tensors)
    assert "stem.0.bias" in tensors  # where batch-norm went
    assert {i.name for i in graph.graph.initializer} >= set(tensors)
    assert [i.name for i in graph.graph.input] == ["images"]
    assert [o.name for o in graph.graph.output] == ["outputs"]


def test_every_float_of_the_graph_is_quantised():
    graph, tensors = to_graph(networks.make("concatenating"), networks.SHAPE)
    floats = {i.name for i in graph.graph.initializer if i.data_type == onnx.TensorProto.FLOAT}
    assert floats == set(tensors)


def test_the_integers_are_those_the_network_computes_with():
    layer = nn.Conv2d(2, 4, 3)
    step = torch.from_numpy(codec.snap(np.linspace(0.02, 0.2, 4)))
    quantize_(layer, step)
    _, tensors = to_graph(nn.Sequential(layer, nn.Flatten()).eval(), networks.SHAPE)
    found = tensors["0.weight"].dequantize()
    assert np.array_equal(found, layer.weight.detach().numpy())


def share_(layer, n_levels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = layer.weight.detach()
    chosen = torch.randperm(weight.numel(), generator=generator)[:n_levels]
    levels = weight.flatten()[chosen]  # in any order
    share_levels_(layer, levels, (weight[..., None] - levels).abs().argmin(dim=-1))


@pytest.mark.parametrize("n_levels", [4, 30])
@pytest.mark.parametrize("name", networks.BUILDERS)
def test_the_decoded_file_gathers_weights_from_their_codebooks(name, n_levels, fine):
    network = storable_norms_(networks.make(name))
    for layer in layers(network).values():
        share_(layer, min(n_levels, layer.weight.numel()))
    assert_same(network, tolerance=1e-2)  # so coarse, they leave little of the outputs


def test_filters_without_weights_do_not_coarsen_the_factors_of_others():
    convolution = nn.Conv2d(IMAGES.shape[1], 16, 3, bias=False)
    norm = nn.BatchNorm2d(16, momentum=1.0)
    with torch.no_grad():
        convolution.weight[4:] = 0
    share_(convolution, convolution.weight.unique().numel())
    network = nn.Sequential(convolution, norm, nn.Flatten())
    network(IMAGES)  # where nothing varies, batch-norm divides by hardly anything
    assert_same(network.eval(), tolerance=0.15)


def multiply_kernels_(network):
    """Let kernels of 3 x 3 be multiples of templates that the codec stores; count their layers."""
    generator, n_shared = torch.Generator().manual_seed(0), 0
    values = (torch.randn(3, 3, 3, generator=generator) * 64).round() / 64
    templates = Templates(values, learn=False)
    for name, layer in layers(without_quantization(network, rounded=True)).items():
        if layer.weight.shape[2:] == (3, 3):
            n_out, n_in = layer.weight.shape[:2]
            indices = torch.randint(3, (n_out, n_in), generator=generator)
            step = on_grid(torch.linspace(1e-3, 2e-3, n_out))
            multiply_templates_(layer, templates, indices, step, 2 * step)
            network.set_submodule(name, layer)
            n_shared += 1
    return n_shared


@pytest.mark.parametrize("name", networks.BUILDERS)
def test_the_decoded_file_makes_kernels_of_templates(name, fine):
    network = storable_(networks.make(name))
    n_shared = multiply_kernels_(network)
    assert_same(network)
    _, tensors = to_graph(network, networks.SHAPE)
    assert sum(name.endswith("templates") for name in tensors) == 1
    assert sum(name.endswith("factors") for name in tensors) == n_shared > 0


@pytest.mark.parametrize("case", ODD)
def test_multiples_of_templates_and_batch_norm_may_meet_anywhere(case, fine):
    network = storable_(ODD[case]())
    multiply_kernels_(network)
    assert_same(network)


@pytest.mark.parametrize("case", ODD)
def test_codebooks_and_steps_may_stand_side_by_side(case, fine):
    network = storable_(ODD[case]())
    for name, layer in list(layers(without_quantization(network, rounded=True)).items())[:1]:
        network.set_submodule(name, layer)
        share_(layer, 5)
    assert_same(network)


def test_codebooks_of_both_halves_of_a_projection_are_gathered(fine):
    network = storable_norms_(networks.make("residual"))
    for name in ("blocks.0.first.0", "classifier"):
        layer = network.get_submodule(name)
        n_out, n_in = layer.weight.shape[:2]
        first = like(layer, n_in, 3) if isinstance(layer, nn.Linear) else nn.Conv2d(n_in, 3, 1)
        network.set_submodule(name, Chain(first, like(layer, 3, n_out)))
    for layer in layers(network).values():
        share_(layer, 8)
    assert_same(network.eval())


def test_the_level_nearest_zero_has_index_zero_and_order_is_kept():
    layer = nn.Linear(3, 2)
    levels, indices = torch.tensor([2.0, -1.5, 0.25, -4.0]), torch.tensor([[0, 1, 2], [3, 2, 2]])
    share_levels_(layer, levels, indices)
    _, tensors = to_graph(nn.Sequential(nn.Flatten(), nn.Linear(128, 3), layer), networks.SHAPE)
    assert tensors["2.weight"].integers.tolist() == [[1, -1, 0], [-2, 0, 0]]
    stored = torch.from_numpy(tensors["2.levels"].dequantize())
    torch.testing.assert_close(stored, torch.tensor([0.25, 2.0, -4.0, -1.5]), rtol=0, atol=1e-4)


def test_a_codebook_that_nothing_reads_is_not_in_the_file():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.spare = nn.Linear(128, 5), nn.Linear(4, 4)

        def forward(self, x):
            return self.head(x.flatten(1))

    network = networks.randomise_(Half())
    share_(network.spare, 4)
    _, tensors = to_graph(network, networks.SHAPE)
    assert set(tensors) == {"head.weight", "head.bias"}


def test_the_file_takes_any_number_of_images():
    network = storable_(networks.make("depthwise"))
    images = networks.images(9)
    together = decoded_outputs(network, images)
    apart = torch.cat([decoded_outputs(network, image[None]) for image in images])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_dropout_is_not_in_the_file():
    graph, _ = to_graph(networks.make("flattening"), networks.SHAPE)
    kinds = {node.op_type for node in graph.graph.node}
    assert "Dropout" not in kinds
    assert "BatchNormalization" in kinds  # the one after a linear layer


def test_exporting_leaves_the_network_as_it_is():
    network = storable_(networks.make("residual"))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    to_graph(network, networks.SHAPE)
    assert all(before[k].equal(v) for k, v in network.state_dict().items())
    assert not network.training


DIGEST = """
import hashlib
from filterpress import codec
from filterpress.codec.graph import strip
from filterpress.export import to_graph
from tests import networks
for name in networks.BUILDERS:
    graph, tensors = to_graph(networks.make(name), networks.SHAPE)
    print(hashlib.sha256(codec.encode(tensors, strip(graph, tensors), {})).hexdigest())
"""


def test_another_process_writes_the_same_bytes(request):
    made = []
    for name in networks.BUILDERS:
        graph, tensors = to_graph(networks.make(name), networks.SHAPE)
        made.append(hashlib.sha256(codec.encode(tensors, strip(graph, tensors), {})).hexdigest())
    other = subprocess.run(
        [sys.executable, "-c", DIGEST],
        capture_output=True,
        text=True,
        check=True,
        cwd=request.config.rootpath,
        env={"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7", "PATH": ""},
    )
    assert other.stdout.split() == made


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(value):
    network = networks.make("residual")
    with torch.no_grad():
        network.blocks[0].first[0].weight[1, 0, 0, 0] = value
    with pytest.raises(ModelError, match=r"^the weights of blocks\.0\.first\.0 must be finite"):
        to_graph(network, networks.SHAPE)


def test_a_bias_that_is_not_finite_is_refused_by_name():
    network = networks.make("depthwise")
    with torch.no_grad():
        network.head.bias[0] = float("nan")
    with pytest.raises(ModelError, match=r"^the values of head\.bias must be finite"):
        to_graph(network, networks.SHAPE)


def test_a_network_that_cannot_be_exported_is_refused():
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(128, 5)

        def forward(self, x):
            return self.head(torch.linalg.pinv(x.flatten(1)).T)

    with pytest.raises(ModelError, match="cannot be exported to ONNX"):
        to_graph(Sorted().eval(), networks.SHAPE)
