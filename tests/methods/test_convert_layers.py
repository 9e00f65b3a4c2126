from __future__ import annotations

import pytest
import torch
from torch import nn

from filterpress.fitting import Goal
from filterpress.methods.convert_layers import ConversionConfig, convert_layers
from filterpress.package import Package, count, encode
from filterpress.representations import Chain, is_quantized
from filterpress.surgery import layers
from tests import networks
from tests.moments import draw

IMAGES = networks.images(128)


def size(network):
    source = Package(network=network, model="", input_shape=networks.SHAPE, n_classes=5)
    return len(encode(source, network))


def run(network, max_bytes, **fields):
    goal = Goal(max_bytes, size)
    return convert_layers(network, IMAGES, ConversionConfig(**fields), goal=goal)


def relative_error(network, other):
    """Compare probabilities: what is added to all outputs alike changes nothing."""
    with torch.no_grad():
        found, expected = (made(IMAGES).log_softmax(dim=1) for made in (network, other))
    return float((found - expected).square().mean() / expected.var(dim=0).mean())


class Net(nn.Module):
    """A wide convolution and a wide linear layer, which may be products."""

    def __init__(self, kernel=3):
        super().__init__()
        self.stem = nn.Conv2d(2, 24, 3, padding=1)
        self.wide = nn.Conv2d(24, 24, kernel, stride=2, padding=kernel // 2)
        self.full = nn.Linear(24 * 4, 48)
        self.head = nn.Linear(48, networks.CLASSES)

    def forward(self, x):
        x = torch.relu(self.wide(torch.relu(self.stem(x))))
        x = nn.functional.max_pool2d(x, 2).flatten(1)
        return self.head(torch.relu(self.full(x)))


def planted(kind):
    network = networks.randomise_(Net())
    with torch.no_grad():
        if kind == "low-rank":
            weight = draw(48, 3) @ draw(3, 96, seed=1)
            network.full.weight.copy_(weight * 0.1 / weight.std())
            return network
        if kind == "spatial":
            weight = torch.einsum("orx,riy->oiyx", draw(24, 3, 3), draw(3, 24, 3, seed=1))
        else:
            weight = torch.einsum("oi,iyx->oiyx", draw(24, 24), draw(24, 3, 3, seed=1))
        network.wide.weight.copy_(weight * 0.1 / weight.std())
    return network


@pytest.mark.parametrize(
    ("kind", "name", "rank"),
    [("spatial", "wide", 3), ("separable", "wide", 1), ("low-rank", "full", 3)],
)
def test_the_structure_that_a_layer_has_is_found(kind, name, rank):
    network = planted(kind)
    made = run(network, 3 * size(network) // 4)
    assert made.layers[name]["kind"] == kind
    assert made.layers[name]["rank"] == rank
    parts = list(made.model.get_submodule(name))
    assert all(is_quantized(part) for part in parts)
    if kind == "spatial":
        assert [part.kernel_size for part in parts] == [(3, 1), (1, 3)]
        assert [part.stride for part in parts] == [(2, 1), (1, 2)]
    elif kind == "separable":
        assert parts[0].groups == parts[0].in_channels == 24
        assert [part.kernel_size for part in parts] == [(3, 3), (1, 1)]
    assert relative_error(made.model, network) < 0.05


def test_a_budget_is_met_and_used_and_all_is_quantised():
    network = planted("separable")
    budget = size(network) // 2
    made = run(network, budget)
    assert 0.85 * budget < size(made.model) <= budget
    assert all(is_quantized(layer) for layer in layers(made.model).values())


def test_structures_found_save_operations():
    network = planted("separable")
    made = run(network, size(network) // 3, kinds="separable").model
    assert isinstance(made.wide, Chain)
    assert count(made, networks.SHAPE)[1] < 0.9 * count(network, networks.SHAPE)[1]


@pytest.mark.parametrize(("kinds", "left"), [("spatial,separable", 2), ("low-rank", 2)])
def test_layers_that_no_kind_suits_are_counted_and_only_quantised(kinds, left):
    made = run(networks.randomise_(Net()), 4000, kinds=kinds)
    assert made.notes["unsuited"] == left
    unsuited = ("full", "head") if "spatial" in kinds else ("stem", "wide")
    assert all(is_quantized(made.model.get_submodule(name)) for name in unsuited)


def test_a_network_of_single_pixels_passes_with_nothing_cut():
    network = networks.randomise_(Net(kernel=1))
    network.stem = nn.Conv2d(2, 24, 1)
    made = run(network, 4000, kinds="spatial")
    assert (made.notes["cut"], made.notes["unsuited"]) == (0, 4)
    assert size(made.model) <= 4000


@pytest.mark.parametrize(
    ("field", "value"), [("images", 0), ("kinds", ""), ("kinds", "svd"), ("kinds", "spatial;")]
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be "):
        ConversionConfig(**{field: value})
