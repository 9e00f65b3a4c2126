from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from filterpress import models
from filterpress.errors import ModelError
from filterpress.representations import Chain, ChannelOrder, like, quantize_
from filterpress.surgery import (
    channel_groups,
    check_runs,
    cut_unread_,
    features_left,
    is_depthwise,
    keep_channels_,
    layers,
    merged,
    plain,
    read_channels,
)
from tests import networks

IMAGES = networks.images(6)


def groups_by_producer(network, images=IMAGES):
    return {
        tuple(sorted(m.name for m in group.producers)): group
        for group in channel_groups(network, images[:2])
    }


def projected(layer, rank, groups=1):
    """Make two random layers that stand where one layer was."""
    n_in, n_out = layer.weight.shape[1], layer.weight.shape[0]
    width = groups * rank
    first = (
        nn.Linear(n_in, width, bias=False)
        if isinstance(layer, nn.Linear)
        else nn.Conv2d(n_in, width, 1, bias=False)
    )
    order = [ChannelOrder(torch.randperm(n_out))] if groups > 1 else []
    return Chain(first, like(layer, width, n_out, groups), *order)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(5, 6, 1),
        nn.Conv2d(5, 6, 3, stride=2, padding=1),
        nn.Conv2d(5, 6, (3, 2), padding=(2, 0), dilation=2, bias=False),
        nn.Conv2d(5, 6, 3, padding=1, padding_mode="reflect"),
    ],
    ids=["1x1", "strided", "dilated", "reflected"],
)
def test_a_merged_convolution_equals_its_two_halves_in_sequence(layer, groups):
    two = projected(layer, 2, groups)
    one = merged(two)
    x = torch.randn(2, 5, 7, 7)
    assert one.weight.shape == layer.weight.shape
    assert isinstance(one, nn.Conv2d)
    assert one.groups == 1
    torch.testing.assert_close(one(x), two(x), rtol=1e-4, atol=1e-5)


def test_a_stride_in_the_first_half_of_a_pointwise_layer_is_kept():
    first, last = nn.Conv2d(5, 2, 1, stride=(2, 3), bias=False), nn.Conv2d(2, 6, 1)
    x = torch.randn(2, 5, 7, 7)
    one, two = merged(Chain(first, last)), Chain(first, last)
    torch.testing.assert_close(one(x), two(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_merged_linear_layer_equals_its_two_halves_in_sequence(bias):
    two = projected(nn.Linear(7, 4, bias=bias), 3)
    x = torch.randn(5, 7)
    torch.testing.assert_close(merged(two)(x), two(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "parts",
    [
        (nn.Conv2d(5, 3, (3, 1), (2, 1), (1, 0)), nn.Conv2d(3, 6, (1, 2), (1, 2), (0, 2), (1, 2))),
        (nn.Conv2d(5, 3, 1, 2), nn.Conv2d(3, 6, 3, padding=1)),
        (nn.Conv2d(5, 10, 3, padding=1, groups=5), nn.Conv2d(10, 6, 1)),
        (nn.Conv2d(5, 4, 1), nn.Conv2d(4, 4, 3, 2, groups=4), nn.Conv2d(4, 6, 1)),
        (nn.Conv2d(5, 4, 3, padding="same", dilation=2), nn.Conv2d(4, 6, 1, padding="same")),
        (nn.Linear(7, 3), nn.Linear(3, 2), nn.Linear(2, 6)),
    ],
    ids=["columns and rows", "strided first", "by channel", "three", "same", "linear"],
)
def test_a_merged_chain_computes_the_same(parts):
    for part in parts[:-1]:
        part.bias = None
    chain = Chain(*parts)
    x = torch.randn(2, 7) if isinstance(parts[0], nn.Linear) else torch.randn(2, 5, 7, 7)
    one = merged(chain)
    assert isinstance(one, type(parts[0]))
    torch.testing.assert_close(one(x), chain(x), rtol=1e-4, atol=1e-5)


def test_a_projection_of_two_kinds_of_layer_is_refused():
    with pytest.raises(ModelError, match="layers of one kind"):
        merged(Chain(nn.Linear(3, 2), nn.Conv2d(2, 3, 1)))


def test_a_plain_network_has_only_ordinary_layers_and_computes_the_same():
    network = networks.make("residual")
    network.set_submodule("blocks.0.first.0", projected(network.blocks[0].first[0], 3, 2))
    images_through = network(IMAGES)
    for layer in layers(network).values():
        quantize_(layer, torch.full((len(layer.weight),), 0.1))
    result = plain(network)
    assert not any(isinstance(module, Chain) for module in result.modules())
    assert set(layers(result)) == set(layers(networks.make("residual")))
    torch.testing.assert_close(result(IMAGES), images_through, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_name(value):
    network = networks.make("residual")
    with torch.no_grad():
        network.blocks[1].second[0].weight[0, 0, 0, 0] = value
    with pytest.raises(
        ModelError, match=r"^the values of blocks\.1\.second\.0\.weight must be fin"
    ):
        plain(network)


# Producers and consumers as read off the definition of each network.
EXPECTED = {
    "residual": {
        ("blocks.0.first.0",): {"blocks.0.second.0"},
        ("blocks.1.first.0",): {"blocks.1.second.0"},
        ("blocks.0.second.0", "stem.0"): {
            *("blocks.0.first.0", "blocks.1.first.0", "blocks.1.shortcut.0")
        },
        ("blocks.1.second.0", "blocks.1.shortcut.0"): {"classifier"},
    },
    "depthwise": {
        ("block.expand",): {"block.shrink"},
        ("block.shrink", "stem"): {"block.expand", "head"},
    },
    "bottlenecks": {
        ("first.expand",): {"first.shrink"},
        ("second.expand",): {"second.shrink"},
        ("first.shrink", "second.shrink", "stem"): {"first.expand", "second.expand", "shrink"},
        ("shrink",): {"last"},
        ("last",): {"head"},
    },
    "grouped": {("last",): {"mix"}, ("mix",): {"head"}},
    "concatenating": {
        ("join",): {"head"},
        ("left",): {"join"},
        ("right",): {"join"},
        ("stem",): {"left", "right", "join"},
    },
    "flattening": {("0",): {"3"}, ("3",): {"8"}, ("8",): {"12"}},
}


@pytest.mark.parametrize("name", networks.BUILDERS)
def test_groups_join_the_layers_that_share_channels(name):
    found = groups_by_producer(networks.make(name))
    assert {k: {m.name for m in g.consumers} for k, g in found.items()} == EXPECTED[name]


@pytest.mark.parametrize("name", networks.BUILDERS)
def test_the_outputs_of_the_network_are_in_no_group(name):
    *_, last = layers(networks.make(name))
    found = channel_groups(networks.make(name), IMAGES[:2])
    assert last not in {m.name for group in found for m in group.producers}


def test_norms_and_depthwise_convolutions_pass_channels_through():
    group = groups_by_producer(networks.make("depthwise"))["block.expand",]
    through = {m.name for m in group.members if m.side == "through"}
    assert through == {"block.norm", "block.depthwise", "block.norm2"}


def test_a_flattened_channel_has_all_its_positions():
    group = groups_by_producer(networks.make("flattening"))["3",]
    (consumer,) = group.consumers
    features = consumer.features.view(-1)[consumer.channels.argsort(stable=True)].view(10, 4)
    assert features.tolist() == torch.arange(40).view(10, 4).tolist()


def test_concatenated_channels_know_their_offset():
    found = groups_by_producer(networks.make("concatenating"))
    offsets = {
        producer: int(
            next(m for m in found[producer,].consumers if m.name == "join").features.min()
        )
        for producer in ("left", "stem", "right")
    }
    assert offsets == {"left": 0, "stem": 6, "right": 14}


def silence_(network, groups, kept):
    """Let every reader of the channels that go ignore them."""
    with torch.no_grad():
        for group, keep in zip(groups, kept, strict=True):
            for member in group.consumers:
                gone = member.features[~keep[member.channels]]
                network.get_submodule(member.name).weight[:, gone] = 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", networks.BUILDERS)
def test_cutting_channels_that_nobody_reads_leaves_the_outputs_equal(name, seed):
    network = networks.make(name)
    groups = channel_groups(network, IMAGES[:2])
    generator = torch.Generator().manual_seed(seed)
    kept = [torch.rand(g.n_channels, generator=generator) < 0.6 for g in groups]
    for keep in kept:
        keep[seed] = True
    silence_(network, groups, kept)
    before = network(IMAGES)
    n_weights = sum(p.numel() for p in network.parameters())
    keep_channels_(network, groups, kept)
    torch.testing.assert_close(network(IMAGES), before, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in network.parameters()) < n_weights


@pytest.mark.parametrize("name", networks.BUILDERS)
def test_the_channels_that_nobody_reads_are_found_and_cut(name):
    network = networks.make(name)
    groups = channel_groups(network, IMAGES[:2])
    kept = [torch.arange(g.n_channels) % 3 > 0 for g in groups]
    silence_(network, groups, kept)
    before = network(IMAGES)
    found = [read_channels(network, group) for group in groups]
    assert [f.tolist() for f in found] == [k.tolist() for k in kept]
    assert cut_unread_(network, IMAGES[:2]) == sum(int((~keep).sum()) for keep in kept)
    torch.testing.assert_close(network(IMAGES), before, rtol=1e-4, atol=1e-5)
    after = channel_groups(network, IMAGES[:2])
    assert [g.n_channels for g in after] == [int(keep.sum()) for keep in kept]
    assert cut_unread_(network, IMAGES[:2]) == 0


def test_a_channel_that_one_of_two_layers_reads_stays():
    network = networks.make("residual")
    with torch.no_grad():
        network.blocks[0].first[0].weight[:, 2] = 0
    assert cut_unread_(network, IMAGES[:2]) == 0


def test_where_nothing_is_read_one_channel_stays():
    network = networks.make("flattening")
    with torch.no_grad():
        network[12].weight.zero_()
    assert cut_unread_(network, IMAGES[:2]) == 11
    assert network(IMAGES).shape == (len(IMAGES), networks.CLASSES)


def test_a_layer_that_reads_two_groups_is_left_what_is_kept_of_both():
    network = networks.make("concatenating")
    found = groups_by_producer(network)
    groups = [found["left",], found["right",]]
    kept = [torch.arange(6) != 1, torch.arange(10) != 0]
    left = features_left(network, groups, kept)
    assert set(left) == {"join"}
    assert (~left["join"]).nonzero().flatten().tolist() == [1, 14]  # 6 + 8 channels before


def test_cutting_every_channel_of_a_group_is_refused():
    network = networks.make("flattening")
    groups = channel_groups(network, IMAGES[:2])
    kept = [torch.zeros(g.n_channels, dtype=torch.bool) for g in groups]
    with pytest.raises(ValueError, match="kept must leave a channel of every group, got none of"):
        keep_channels_(network, groups, kept)


def test_layers_say_their_new_widths():
    network = networks.make("depthwise")
    groups = channel_groups(network, IMAGES[:2])
    keep_channels_(network, groups, [torch.arange(g.n_channels) < 3 for g in groups])
    depthwise = network.block.depthwise
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (3, 3, 3)
    assert network.head.in_features == 3
    assert network.block.norm.num_features == 3


def test_a_layer_that_makes_several_channels_of_one_is_not_depthwise():
    assert is_depthwise(nn.Conv2d(4, 4, 3, groups=4))
    assert not is_depthwise(nn.Conv2d(4, 8, 3, groups=4))
    assert not is_depthwise(nn.Conv2d(1, 1, 3))


class ZeroPadded(nn.Module):
    """A residual network whose shortcut fills missing channels up with zeros."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.second = nn.Conv2d(6, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = F.relu(self.second(F.relu(self.first(x))) + shortcut)
        return self.head(x.mean((2, 3)))


def test_a_shortcut_filled_up_with_zeros_keeps_its_channels_and_the_rest_is_cut(caplog):
    found = groups_by_producer(ZeroPadded().eval())
    assert set(found) == {("first",)}
    (record,) = caplog.records
    assert record.getMessage() == "channels of second stay: they cannot be followed"


def test_a_network_that_cannot_be_traced_has_no_groups_and_says_so(caplog):
    network = models.build("torchvision:shufflenet_v2_x0_5", (3, 32, 32), 5).eval()
    assert channel_groups(network, torch.randn(2, 3, 32, 32)) == []
    (record,) = caplog.records
    assert record.getMessage().startswith("all channels stay: torch-pruning cannot trace")


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3)
        self.scale = nn.Parameter(torch.ones(1, 6, 1, 1))
        self.second = nn.Conv2d(6, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.second(self.first(x) * self.scale).mean((2, 3)))


class Multiplied(nn.Module):
    """A depthwise convolution that makes two channels of one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3)
        self.multiply = nn.Conv2d(4, 8, 3, groups=4)
        self.second = nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.second(self.multiply(self.first(x))).mean((2, 3)))


class AveragedOverChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3)
        self.second = nn.Conv2d(6, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.first(x)
        return self.head(self.second(x - x.mean(1, keepdim=True)).mean((2, 3)))


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3)
        self.norm = nn.GroupNorm(2, 6)
        self.second = nn.Conv2d(6, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.second(self.norm(self.first(x))).mean((2, 3)))


@pytest.mark.parametrize("kind", [Scaled, Multiplied, AveragedOverChannels, Normalised])
def test_channels_that_pass_what_cannot_be_cut_are_left_out(kind):
    found = groups_by_producer(kind().eval())
    assert set(found) == {("second",)}


def test_a_layer_used_twice_is_cut_once_or_not_at_all():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(2, 6, 3, padding=1)
            self.shared = nn.Conv2d(6, 6, 3, padding=1)
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            return self.head(self.shared(F.relu(self.shared(F.relu(self.stem(x))))).mean((2, 3)))

    network = Shared().eval()
    groups = channel_groups(network, IMAGES[:2])
    kept = [torch.arange(g.n_channels) < 4 for g in groups]
    silence_(network, groups, kept)
    before = network(IMAGES)
    keep_channels_(network, groups, kept)
    torch.testing.assert_close(network(IMAGES), before, rtol=1e-4, atol=1e-5)


def test_finding_groups_leaves_the_network_as_it_is():
    network = networks.make("concatenating")
    before = copy.deepcopy(network.state_dict())
    channel_groups(network, IMAGES[:2])
    after = network.state_dict()
    assert all(after[name].equal(value) for name, value in before.items())
    assert all(p.grad is None for p in network.parameters())


def test_a_network_that_no_longer_runs_is_refused():
    network = nn.Sequential(nn.Flatten(), nn.Linear(128, 3))
    check_runs(network, IMAGES, 3)
    with pytest.raises(ModelError, match=r"must still give \(6, 4\)"):
        check_runs(network, IMAGES, 4)
    with pytest.raises(ModelError, match="no longer runs"):
        check_runs(network, IMAGES[:, :1], 3)
