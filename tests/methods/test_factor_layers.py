from __future__ import annotations

import pytest
import torch
from torch import nn

from filterpress.fitting import Goal
from filterpress.methods.factor_layers import FactorConfig, factor_layers
from filterpress.package import Package, encode
from filterpress.representations import Chain, is_quantized
from filterpress.surgery import layers, plain
from tests import networks
from tests.moments import draw

IMAGES = networks.images(128)


def size(network):
    source = Package(network=network, model="", input_shape=networks.SHAPE, n_classes=5)
    return len(encode(source, network))


def run(network, max_bytes, **fields):
    return factor_layers(network, IMAGES, FactorConfig(**fields), goal=Goal(max_bytes, size))


def relative_error(network, other):
    """Compare probabilities: what is added to all outputs alike changes nothing."""
    with torch.no_grad():
        found, expected = (made(IMAGES).log_softmax(dim=1) for made in (network, other))
    return float((found - expected).square().mean() / expected.var(dim=0).mean())


class Wide(nn.Module):
    """Two wide convolutions, of which the second may be a product."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 32, 3, padding=1)
        self.wide = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, networks.CLASSES)

    def forward(self, x):
        return self.head(torch.relu(self.wide(torch.relu(self.stem(x)))).mean((2, 3)))


def products(kind):
    """Draw filters (32, 32, 9) that are a chain of a kind."""
    if kind == "svd":
        return torch.einsum("or,rit->oit", draw(32, 2), draw(2, 32, 9, seed=1))
    if kind == "tucker":
        whole = torch.einsum("or,rst->ost", draw(32, 5), draw(5, 5, 9, seed=1))
        return torch.einsum("ost,si->oit", whole, draw(5, 32, seed=2))
    return torch.einsum("or,ri,rt->oit", draw(32, 12), draw(12, 32, seed=1), draw(12, 9, seed=2))


def planted(kind):
    network = networks.randomise_(Wide())
    with torch.no_grad():
        weight = products(kind).view_as(network.wide.weight)
        network.wide.weight.copy_(weight * 0.08 / weight.std())
    return network


@pytest.mark.parametrize(("kind", "n_layers"), [("svd", 2), ("tucker", 3), ("cp", 3)])
def test_the_product_that_a_layer_is_is_found(kind, n_layers):
    network = planted(kind)
    made = run(network, size(network) // 5)
    assert made.layers["wide"]["kind"] == kind
    assert isinstance(made.model.wide, Chain)
    assert len(made.model.wide) == n_layers
    assert made.notes[kind] >= 1
    assert relative_error(made.model, network) < 0.1


@pytest.mark.parametrize("share", [0.7, 0.4])
def test_a_budget_is_met_and_used_and_all_is_quantised(share):
    network = planted("cp")
    budget = round(share * size(network))
    made = run(network, budget)
    assert 0.85 * budget < size(made.model) <= budget
    assert made.notes["expected_bytes"] == pytest.approx(size(made.model), rel=0.03)
    assert all(is_quantized(layer) for layer in layers(made.model).values())


@pytest.mark.parametrize("kind", ["svd", "tucker", "cp"])
def test_only_the_kinds_that_are_asked_for_are_taken(kind):
    made = run(networks.randomise_(Wide()), 3000, kinds=kind)
    taken = {layer.get("kind", kind) for layer in made.layers.values()}
    assert taken == {kind}
    assert made.notes["cut"] == made.notes[kind] > 0
    assert made.notes["unsuited"] == (0 if kind == "svd" else 1)


def test_grouped_and_depthwise_convolutions_are_left_and_counted():
    for name, layer in (("grouped", "grouped"), ("depthwise", "block.depthwise")):
        network = networks.make(name)
        made = run(network, size(network) // 2)
        assert is_quantized(made.model.get_submodule(layer))
        assert "kind" not in made.layers[layer]
        assert made.notes["unsuited"] == 1


def test_a_network_of_chains_becomes_plain_again():
    network = planted("tucker")
    made = run(network, size(network) // 5)
    again = plain(made.model)
    assert not any(isinstance(module, Chain) for module in again.modules())
    shapes = {name: layer.weight.shape for name, layer in layers(network).items()}
    assert {name: layer.weight.shape for name, layer in layers(again).items()} == shapes
    assert relative_error(again, made.model) < 0.1


@pytest.mark.parametrize(
    ("field", "value"), [("images", 0), ("kinds", ""), ("kinds", "spatial"), ("kinds", "svd;cp")]
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be "):
        FactorConfig(**{field: value})
