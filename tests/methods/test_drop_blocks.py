from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from filterpress import models
from filterpress.errors import ModelError
from filterpress.methods.drop_blocks import (
    BlocksConfig,
    drop_blocks,
    residual_blocks,
    without,
)
from filterpress.package import Package, encode, load, save
from filterpress.statistics import TEMPERATURE, plain_for, recalibrate_
from filterpress.surgery import layers
from tests import networks

IMAGES = networks.images(64)
EVERYTHING = BlocksConfig(allowance=1e6)


class Deep(nn.Module):
    """Blocks of a few kinds, one inside another, and what only looks like one."""

    def __init__(self, in_channels, n_classes):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 6, 3, stride=2, padding=1)
        self.stage = nn.Sequential(*(models._Block(6, 6, stride=1) for _ in range(3)))
        self.plain = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.halved = _Scaled(6)
        self.head = nn.Linear(6, n_classes)

    def forward(self, x):
        x = self.halved(self.plain(self.stage(F.relu(self.stem(x)))))
        return self.head(x.mean((2, 3)))


class _Scaled(nn.Module):
    """A layer that tells how much of its input passes: half, if it says nothing."""

    def __init__(self, width):
        super().__init__()
        self.gate = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.gate(x))


def deep(input_shape=networks.SHAPE, n_classes=networks.CLASSES):
    return Deep(input_shape[0], n_classes)


@pytest.fixture
def stacked():
    """Make a network of three blocks that add little, the second the least."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = networks.randomise_(deep())
    for block, factor in zip(network.stage, (0.5, 0.1, 0.2), strict=True):
        with torch.no_grad():
            block.second[1].weight.mul_(factor)
            block.second[1].bias.mul_(factor)
    recalibrate_(network, IMAGES)
    return network


def silence_(block):
    """Let the last norm of a block give zeros."""
    with torch.no_grad():
        norm = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)][-1]
        norm.weight.zero_()
        norm.bias.zero_()


def outputs(network, images=IMAGES):
    with torch.no_grad():
        return network(images)


def divergence(network, other):
    """Return ``T**2 KL`` by its definition."""
    p, q = (torch.softmax(outputs(n).double() / TEMPERATURE, dim=1) for n in (network, other))
    return TEMPERATURE**2 * float((p * (p / q).log()).sum(dim=1).mean())


def cut(network, names):
    """Bypass blocks by hand: their last norms give zeros, batch-norm is measured by difference."""
    made = plain_for(network, IMAGES)
    for name in names:
        silence_(made.get_submodule(name))
    recalibrate_(made, IMAGES)
    return made


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("residual", ["blocks.0"]),
        ("depthwise", ["block"]),
        ("bottlenecks", ["first", "second"]),
        ("grouped", []),
        ("concatenating", []),
        ("flattening", []),
    ],
)
def test_blocks_are_what_adds_to_its_input(name, blocks):
    assert residual_blocks(networks.make(name), IMAGES[:2]) == blocks


def test_of_blocks_in_blocks_the_innermost_are_found(stacked):
    assert residual_blocks(stacked, IMAGES[:2]) == ["stage.0", "stage.1", "stage.2"]


@pytest.mark.parametrize(
    ("name", "n_blocks"),
    [  # blocks in all, less those that change the shape
        ("resnet20", 9 - 2),
        ("torchvision:resnet18", 8 - 3),
        ("torchvision:resnet50", 16 - 4),
        ("torchvision:mobilenet_v2", 17 - 7),
        ("torchvision:mobilenet_v3_small", 11 - 5),
        ("torchvision:efficientnet_b0", 16 - 7),
        ("torchvision:convnext_tiny", 3 + 3 + 9 + 3),
        ("torchvision:densenet121", 0),
        ("torchvision:vgg11_bn", 0),
    ],
)
@pytest.mark.slow
def test_every_block_of_known_networks_is_found(name, n_blocks):
    network = models.build(name, (3, 32, 32), 10).eval()
    assert len(residual_blocks(network, torch.rand(2, 3, 32, 32))) == n_blocks


def test_looking_for_blocks_changes_nothing(stacked):
    before = {key: value.clone() for key, value in stacked.state_dict().items()}
    residual_blocks(stacked, IMAGES[:2])
    assert all(value.equal(before[key]) for key, value in stacked.state_dict().items())
    assert not any(module._forward_pre_hooks for module in stacked.modules())


def test_a_module_that_is_called_with_more_than_a_tensor_is_no_block():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(2, 2, 1)

        def forward(self, x, scale=1.0):
            return x + scale * self.layer(x)

    class Calling(nn.Module):
        def __init__(self, **named):
            super().__init__()
            self.block, self.named = Scaled(), named

        def forward(self, x):
            return self.block(x, **self.named).mean((2, 3))

    assert residual_blocks(Calling(), IMAGES[:2]) == ["block"]
    assert residual_blocks(Calling(scale=0.5), IMAGES[:2]) == []


def test_a_block_that_sees_nothing_is_not_taken_for_one(stacked):
    with torch.no_grad():
        stacked.stem.weight.zero_()
        stacked.stem.bias.zero_()
    assert "stage.0" not in residual_blocks(stacked, IMAGES[:2])


@pytest.mark.parametrize(
    ("name", "block"),
    [("residual", "blocks.0"), ("depthwise", "block"), ("bottlenecks", "second")],
)
def test_a_block_that_adds_nothing_goes_and_the_outputs_stay(name, block):
    network = networks.make(name)
    silence_(network.get_submodule(block))
    recalibrate_(network, IMAGES)
    made = drop_blocks(network, IMAGES, BlocksConfig(allowance=1e-6))
    n_parameters = sum(p.numel() for p in network.get_submodule(block).parameters())
    assert made.notes["dropped"] == 1
    assert made.layers[block]["parameters"] == n_parameters
    assert isinstance(made.model.get_submodule(block), nn.Identity)
    torch.testing.assert_close(outputs(made.model), outputs(network), rtol=0, atol=1e-5)
    count = [sum(p.numel() for p in n.parameters()) for n in (network, made.model)]
    assert count[1] == count[0] - n_parameters


def test_batch_norm_after_a_block_that_is_gone_is_measured_again(stacked):
    made, seen = without(stacked, "stage.0", IMAGES), []
    norm = made.plain[1]
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    outputs(made)
    mean, deviation = seen[0].mean((0, 2, 3)), seen[0].std((0, 2, 3))
    assert float(((norm.running_mean - mean) / deviation).abs().max()) < 0.01
    assert float(((stacked.plain[1].running_mean - mean) / deviation).abs().max()) > 0.1


def test_the_divergence_reported_is_that_of_the_network(stacked):
    made = drop_blocks(stacked, IMAGES, EVERYTHING)
    assert set(made.layers) == {"stage.0", "stage.1", "stage.2"}
    assert made.notes["divergence"] == pytest.approx(divergence(stacked, made.model), rel=1e-3)
    assert made.notes["divergence"] == pytest.approx(
        sum(layer["divergence"] for layer in made.layers.values())
    )
    assert "next" not in made.notes


def test_each_drop_is_the_best_of_those_left(stacked):
    """Compared with all ways to bypass blocks, without taking any out."""
    gone, reached = [], 0.0
    made = drop_blocks(stacked, IMAGES, EVERYTHING)
    for name, layer in made.layers.items():
        left = [f"stage.{i}" for i in range(3) if f"stage.{i}" not in gone]
        costs = {b: divergence(stacked, cut(stacked, [*gone, b])) for b in left}
        assert min(costs, key=costs.get) == name  # blocks of one size
        assert layer["divergence"] == pytest.approx(costs[name] - reached, rel=0.01)
        gone, reached = [*gone, name], costs[name]


def test_the_next_block_would_break_the_allowance(stacked):
    made = drop_blocks(stacked, IMAGES, BlocksConfig(allowance=0.0))
    least = min(divergence(stacked, cut(stacked, [f"stage.{i}"])) for i in range(3))
    assert made.notes["next"] == pytest.approx(least, rel=1e-3)
    assert made.notes["dropped"] == 0
    above, below = (BlocksConfig(allowance=least * f) for f in (1.01, 0.99))
    assert drop_blocks(stacked, IMAGES, above).notes["dropped"] == 1
    assert drop_blocks(stacked, IMAGES, below).notes["dropped"] == 0


def test_a_larger_allowance_never_drops_fewer_and_is_kept(stacked):
    costs = sorted(
        divergence(stacked, cut(stacked, names))
        for n in (1, 2, 3)
        for names in combinations([f"stage.{i}" for i in range(3)], n)
    )
    dropped = []
    for allowance in (0.0, *(1.01 * cost for cost in costs)):
        made = drop_blocks(stacked, IMAGES, BlocksConfig(allowance=allowance))
        assert divergence(stacked, made.model) <= allowance * 1.001
        dropped.append(made.notes["dropped"])
    assert dropped == sorted(dropped)
    assert (dropped[0], dropped[-1]) == (0, 3)


def test_of_blocks_that_cost_the_same_the_larger_goes_first():
    network = networks.make("bottlenecks")
    for block in (network.first, network.second):  # the first is the wider one
        with torch.no_grad():
            block.norm3.weight.mul_(0.2)
            block.norm3.bias.mul_(0.2)
    recalibrate_(network, IMAGES)
    costs = {b: divergence(network, cut(network, [b])) for b in ("first", "second")}
    size = {b: sum(p.numel() for p in getattr(network, b).parameters()) for b in costs}
    first, *_ = drop_blocks(network, IMAGES, EVERYTHING).layers
    assert first == min(costs, key=lambda b: costs[b] / size[b])


@pytest.mark.parametrize("name", ["grouped", "concatenating", "flattening"])
def test_a_network_without_blocks_comes_back_the_same(name):
    network = networks.make(name)
    made = drop_blocks(network, IMAGES, EVERYTHING)
    assert made.notes == {"dropped": 0.0, "divergence": 0.0}
    assert made.layers == {}
    assert outputs(made.model).equal(outputs(network))


def test_weights_that_were_pruned_stay_pruned(stacked):
    with torch.no_grad():
        for layer in layers(stacked).values():
            layer.weight[::2] = 0
    made = drop_blocks(stacked, IMAGES, EVERYTHING).model
    for name, layer in layers(made).items():
        assert (layer.weight == 0).equal(stacked.get_submodule(name).weight == 0)


@pytest.mark.parametrize("name", ["residual", "depthwise", "bottlenecks"])
def test_a_package_without_blocks_comes_back_bit_by_bit(name, tmp_path):
    network = networks.make(name)
    made = drop_blocks(network, IMAGES, EVERYTHING).model
    package = Package(
        network=made,
        model=f"tests.networks:{name}",
        input_shape=networks.SHAPE,
        n_classes=networks.CLASSES,
    )
    save(package, tmp_path)
    back = load(tmp_path).network
    assert outputs(back).equal(outputs(made))
    assert repr(back) == repr(made)
    assert encode(package, back) == encode(package, made)
    assert len(encode(package, made)) < len(encode(package, network))


def test_outputs_that_overflow_are_refused():
    network = networks.make("depthwise")
    with torch.no_grad():
        network.head.weight.fill_(3e38)
    with pytest.raises(ModelError, match=r"^the outputs must be finite"):
        drop_blocks(network, IMAGES, BlocksConfig())


@pytest.mark.parametrize(
    ("field", "value"),
    [("allowance", -0.1), ("allowance", float("nan")), ("allowance", float("inf")), ("images", 1)],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} must "):
        BlocksConfig(**{field: value})
