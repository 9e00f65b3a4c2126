from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from filterpress.errors import ModelError
from filterpress.export import TEMPLATE_STEP, to_graph
from filterpress.fitting import Goal
from filterpress.lines import standardise
from filterpress.methods.share_kernels import KernelsConfig, scopes_of, share_kernels, templates_of
from filterpress.package import Package, encode, load, save
from filterpress.representations import (
    form_of,
    has_linear_kernels,
    indices_of,
    is_quantized,
    latent_weight,
)
from filterpress.retraining import RetrainConfig, fine_tune_
from filterpress.statistics import measure, recalibrate_
from filterpress.surgery import layers
from tests import networks
from tests.test_export import decoded_outputs

IMAGES = networks.images(96)


def package_of(network, name="residual"):
    return Package(
        network=network,
        model=f"tests.networks:{name}",
        input_shape=networks.SHAPE,
        n_classes=networks.CLASSES,
    )


def size(network):
    return len(encode(package_of(network), network))


def share(network, max_bytes, **fields):
    return share_kernels(network, IMAGES, KernelsConfig(**fields), goal=Goal(max_bytes, size))


def kernels_in(network):
    """Return the layers with kernels of 3 x 3, by name."""
    return {
        name: layer
        for name, layer in layers(network).items()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)
    }


@pytest.fixture
def planted():
    """Make a network whose kernels are multiples of three templates, plus constants."""
    network, generator = networks.make("residual"), torch.Generator().manual_seed(1)
    shapes = standardise(torch.randn(3, 9, generator=generator))
    shapes = (shapes / TEMPLATE_STEP).round() * TEMPLATE_STEP
    with torch.no_grad():
        for layer in kernels_in(network).values():
            size = layer.weight.shape[:2]
            labels = torch.randint(3, size, generator=generator)
            factors, offsets = 0.2 * torch.randn(2, *size, 1, generator=generator)
            layer.weight.copy_((factors * shapes[labels] + offsets).view_as(layer.weight))
    recalibrate_(network, IMAGES)
    return network


@pytest.fixture(scope="module")
def shared():
    """Share four templates in a whole network."""
    network = networks.make("residual")
    return share(network, size(network) * 2 // 3, templates=4, scope="net").model


@pytest.mark.parametrize("scope", ["layer", "group", "net"])
def test_planted_templates_are_found_again_and_kernels_are_what_they_were(planted, scope):
    made = share(planted, size(planted) - 1, templates=3, scope=scope)
    assert made.notes["shared"] == len(kernels_in(planted))
    for name, layer in kernels_in(planted).items():
        weight, now = layer.weight.detach(), made.model.get_submodule(name)
        assert has_linear_kernels(now)
        error = (latent_weight(now) - weight).square().sum()
        assert float(error) < 1e-3 * float(weight.square().sum())
    modules = [form_of(layer).templates for layer in kernels_in(made.model).values()]
    assert {len(module.values) for module in modules} == {3}


def test_kernels_share_templates_with_those_of_their_scope():
    network = networks.make("residual")
    names = set(kernels_in(network))
    count = {scope: len(scopes_of(layers(network), scope)) for scope in ("layer", "group", "net")}
    widths = {layer.in_channels for layer in kernels_in(network).values()}
    assert count == {"layer": len(names), "group": len(widths), "net": 1}
    for scope in ("layer", "group", "net"):
        found = [name for group in scopes_of(layers(network), scope) for name in group]
        assert sorted(found) == sorted(names)
    mixed = {"a": nn.Conv2d(2, 3, 3), "b": nn.Conv2d(2, 3, 5), "c": nn.Conv2d(2, 3, 1)}
    assert scopes_of(mixed | {"d": nn.Linear(2, 2)}, "net") == [["a"], ["b"]]


def test_the_file_meets_its_budget_and_uses_it():
    network = networks.make("residual")
    for templates in (0, 2):
        budget = size(network) * 2 // 3
        made = share(network, budget, templates=templates)
        assert 0.95 * budget <= size(made.model) <= budget
        assert all(is_quantized(m) or has_linear_kernels(m) for m in layers(made.model).values())


def test_the_decoded_file_computes_what_the_network_does(shared, monkeypatch):
    monkeypatch.setattr("filterpress.export.BIAS_LEVELS", 2**14)
    with torch.no_grad():
        expected = shared(networks.images(7))
    error = decoded_outputs(shared, networks.images(7)) - expected
    assert float(error.square().mean().sqrt()) < 0.03 * float(expected.std())


def test_layers_that_share_templates_read_one_tensor_in_the_file(shared):
    graph, tensors = to_graph(shared, networks.SHAPE)
    names = [name for name in tensors if name.endswith(".templates")]
    assert len(names) == 1
    assert tensors[names[0]].integers.shape == (4, 3, 3)
    readers = [node for node in graph.graph.node if names[0] in node.input]
    assert len(readers) == len(kernels_in(shared)) > 1
    assert all(node.op_type == "Gather" for node in readers)
    for name, layer in kernels_in(shared).items():
        factors = tensors[f"{name}.factors"].integers[..., 0, 0]
        expected = indices_of(layer).where(torch.from_numpy(factors) != 0, 0)
        assert tensors[f"{name}.weight"].integers.tolist() == expected.tolist()


def test_templates_stay_shared_when_the_network_is_saved(shared, tmp_path):
    assert len({id(form_of(layer).templates) for layer in kernels_in(shared).values()}) == 1
    save(package_of(shared), tmp_path)
    back = load(tmp_path).network
    assert len({id(form_of(layer).templates) for layer in kernels_in(back).values()}) == 1
    assert encode(package_of(back), back) == encode(package_of(shared), shared)


@pytest.mark.parametrize("learn", [False, True])
def test_training_moves_factors_and_offsets_and_templates_if_these_learn(learn):
    teacher = networks.make("residual")
    network = share(
        teacher, size(teacher) * 2 // 3, templates=4, scope="net", learn_templates=learn
    ).model
    before = copy.deepcopy(network)
    config = RetrainConfig(epochs=1, batch_size=32, lr=0.01, precision="float32")
    fine_tune_(network, teacher, networks.Imitation(teacher), config, seed=0)
    old, new = before.state_dict(), network.state_dict()
    for name in kernels_in(network):
        own = f"{name}.parametrizations.weight"
        assert not new[f"{own}.original0"].equal(old[f"{own}.original0"])
        assert not new[f"{own}.original1"].equal(old[f"{own}.original1"])
        assert new[f"{own}.0.indices"].equal(old[f"{own}.0.indices"])
        assert new[f"{own}.0.factor.step"].equal(old[f"{own}.0.factor.step"])
        assert new[f"{own}.0.templates.values"].equal(old[f"{own}.0.templates.values"]) != learn
    assert len({id(form_of(layer).templates) for layer in kernels_in(network).values()}) == 1


def test_a_retrain_brings_the_network_closer_to_its_teacher():
    teacher = networks.make("residual")
    network = share(teacher, size(teacher) // 2, templates=2).model
    images = networks.images(200, 9)
    with torch.no_grad():
        before = (network(images) - teacher(images)).square().mean()
        config = RetrainConfig(epochs=3, batch_size=32, lr=0.01, precision="float32")
    fine_tune_(network, teacher, networks.Imitation(teacher), config, seed=0)
    with torch.no_grad():
        after = (network(images) - teacher(images)).square().mean()
    assert float(after) < 0.8 * float(before)


def test_templates_are_on_the_grid_of_the_file_and_the_most_used_come_first():
    network = networks.make("residual")
    moments = measure(network, IMAGES)
    found = templates_of(kernels_in(network), moments, [2, 8], learn=False, seed=0)
    assert list(found) == [2, 8]
    values = found[8].values
    assert (values / TEMPLATE_STEP).equal((values / TEMPLATE_STEP).round())
    weights = [layer.weight.detach() for layer in kernels_in(network).values()]
    kernels = torch.cat([weight.flatten(2).flatten(0, 1) for weight in weights])
    correlation = standardise(kernels) @ standardise(values.flatten(1)).T
    counts = torch.bincount(correlation.abs().argmax(dim=1), minlength=8).tolist()
    assert counts == sorted(counts, reverse=True)


def test_flat_kernels_take_one_template_of_zeros():
    network = networks.make("residual")
    with torch.no_grad():
        for layer in kernels_in(network).values():
            layer.weight.copy_(layer.weight.mean(dim=(2, 3), keepdim=True).expand_as(layer.weight))
    recalibrate_(network, IMAGES)
    made = share(network, size(network) - 1, templates=16, scope="net").model
    for name, layer in kernels_in(made).items():
        assert not form_of(layer).templates.values.any()
        weight = network.get_submodule(name).weight.detach()
        error = (layer.weight.detach() - weight).square().sum()
        assert float(error) < 1e-2 * float(weight.square().sum())


def test_kernels_that_were_pruned_as_a_whole_stay_zero_through_training():
    teacher = networks.make("residual")
    name, layer = next(iter(kernels_in(teacher).items()))
    with torch.no_grad():
        layer.weight[::2, 1] = 0
    recalibrate_(teacher, IMAGES)
    network = share(teacher, size(teacher) * 2 // 3, templates=4).model
    config = RetrainConfig(epochs=1, batch_size=32, lr=0.01, precision="float32")
    fine_tune_(network, teacher, networks.Imitation(teacher), config, seed=0)
    weight = network.get_submodule(name).weight
    assert not weight[::2, 1].any()
    assert weight[1::2, 1].any()


def test_kernels_that_were_pruned_in_part_are_refused():
    network = networks.make("residual")
    name, layer = next(iter(kernels_in(network).items()))
    with torch.no_grad():
        layer.weight[0, 1, 2, 2] = 0
    share(network, size(network) * 2 // 3, templates=4)  # one weight may be an accident
    with torch.no_grad():
        layer.weight[:, :, 2, 2] = 0
    with pytest.raises(ModelError, match=f"kernels of {name} must be whole"):
        share(network, 1000)


def test_a_network_without_kernels_is_passed_on():
    network = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)).eval()
    made = share_kernels(network, IMAGES, KernelsConfig(), goal=Goal(1, lambda _: 10**6))
    assert made.notes == {"shared": 0.0}
    assert made.model is not network
    assert made.model(IMAGES).equal(network(IMAGES))


def test_what_the_allocator_expects_is_near_the_file():
    network = networks.make("residual")
    made = share(network, size(network) // 2, templates=4)
    assert math.isclose(made.notes["expected_bytes"], size(made.model), rel_tol=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": 0}, "images must be at least 1, got 0"),
        ({"scope": "all"}, "scope must be one of"),
        ({"templates": 1}, "templates must be in 2..256, or 0 to choose them, got 1"),
        ({"templates": 257}, "templates must be in 2..256"),
    ],
)
def test_impossible_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        KernelsConfig(**fields)
