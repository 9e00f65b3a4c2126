from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from filterpress.allocation import SLOPE, Rates, options
from filterpress.folding import (
    fold_,
    fold_options,
    linear_channels,
    normalised,
    spreads_of,
)
from filterpress.package import count
from filterpress.statistics import measure, recalibrate_
from filterpress.subspaces import taps_of
from filterpress.surgery import layers
from tests import networks

IMAGES = networks.images(128)
STREAM = {"stem", "first.shrink", "second.shrink", "first.expand", "second.expand", "shrink"}


@pytest.fixture(scope="module")
def network():
    return networks.make("bottlenecks")


def found_in(network):
    return linear_channels(network, IMAGES[:2])


def rotated(network, channels, rank=None):
    """Fold an orthogonal basis into a copy of a network."""
    n = channels.group.n_channels
    basis = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(3))).Q[:rank]
    names = [member.name for member in channels.group.consumers]
    readers = {
        name: torch.einsum("oct,rc->ort", taps_of(layers(network)[name].weight.detach()), basis)
        for name in names
    }
    result = copy.deepcopy(network)
    fold_(result, channels, basis, readers, spreads_of(network, [channels], IMAGES))
    return result


def relative_error(network, other):
    with torch.no_grad():
        expected, got = network(IMAGES), other(IMAGES)
    return float((got - expected).square().mean() / expected.var(dim=0).mean())


def test_residual_sums_of_linear_layers_are_found(network):
    [stream] = found_in(network)
    assert set(stream.names) == STREAM
    assert dict(stream.norms) == {
        "stem": "norm",
        "first.shrink": "first.norm3",
        "second.shrink": "second.norm3",
    }


def test_a_pair_of_layers_is_found_where_the_stream_is_not_linear():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(2, 10, 3, padding=1)
            self.shrink = nn.Conv2d(10, 8, 1)
            self.last = nn.Conv2d(8, 12, 3, padding=1)
            self.head = nn.Linear(12, networks.CLASSES)

        def forward(self, x):
            x = self.last(self.shrink(torch.relu(self.stem(x))))
            return self.head(torch.relu(x).mean((2, 3)))

    [pair] = found_in(networks.randomise_(Pair()))
    assert set(pair.names) == {"shrink", "last"}
    assert not pair.norms


@pytest.mark.parametrize("name", ["residual", "depthwise", "grouped", "concatenating"])
def test_nothing_behind_a_nonlinearity_is_found(name):
    assert found_in(networks.make(name)) == []


@pytest.mark.parametrize(
    "between", [nn.Hardswish(), nn.Tanh(), nn.LeakyReLU(), nn.MaxPool2d(2), nn.Softplus()]
)
def test_a_nonlinearity_that_lets_negative_numbers_pass_is_noticed(between):
    network = nn.Sequential(
        nn.Conv2d(2, 8, 3), between, nn.Conv2d(8, 12, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.ReLU(), nn.Linear(12, networks.CLASSES),
    )  # fmt: skip
    assert found_in(networks.randomise_(network)) == []


def test_average_pooling_lets_any_basis_pass():
    network = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.AvgPool2d(2), nn.Dropout(), nn.Conv2d(8, 12, 3),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, networks.CLASSES),
    )  # fmt: skip
    [pair] = found_in(networks.randomise_(network))
    assert pair.names == ("0", "4")


def test_a_branch_that_adds_nothing_yet_is_judged_by_what_it_computes():
    """A wrong fold into a silent branch would not show in the network's outputs."""

    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(2, 8, 3, padding=1)
            self.make = nn.Conv2d(8, 8, 1)
            self.read = nn.Conv2d(8, 8, 1)
            self.head = nn.Linear(8, networks.CLASSES)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            x = x + 0 * torch.relu(self.read(torch.tanh(self.make(x))))
            return self.head(torch.relu(x).mean((2, 3)))

    assert found_in(networks.randomise_(Silent())) == []


def test_another_basis_leaves_the_network_as_it_is(network):
    [stream] = found_in(network)
    assert relative_error(network, rotated(network, stream)) < 1e-6


def test_batch_norm_can_be_measured_again_after_a_fold(network):
    """The new batch-norm has the statistics that its inputs really have."""
    recalibrated = copy.deepcopy(network)
    recalibrate_(recalibrated, IMAGES)
    [stream] = found_in(recalibrated)
    folded = rotated(recalibrated, stream)
    before = relative_error(recalibrated, folded)
    recalibrate_(folded, IMAGES)
    assert before < 1e-6
    assert relative_error(recalibrated, folded) < 1e-4


def test_a_planted_subspace_is_found_and_costs_nothing(network):
    """Readers that look at three directions only need three channels."""
    planted = copy.deepcopy(network)
    looks = torch.randn(3, 10, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for name in ("first.expand", "second.expand", "shrink"):
            weight = planted.get_parameter(f"{name}.weight")
            rows = torch.randn(len(weight), 3, generator=torch.Generator().manual_seed(len(name)))
            weight.copy_((rows @ looks)[..., None, None] / 3)
    [stream] = found_in(planted)
    moments = measure(planted, IMAGES)
    found = fold_options(planted, stream, moments)
    damages = {
        rank: sum(o.damage for options in found.values() for o in options if o.rank == rank)
        for rank in (1, 2, 3, 4)
    }
    assert damages[1] > damages[2] > 100 * damages[3] >= 0
    option = next(o for o in found["stem"] if o.rank == 3)
    basis = option.subspaces.bases[0, :3]
    span = torch.linalg.lstsq(basis.T, looks.T)
    torch.testing.assert_close(basis.T @ span.solution, looks.T, rtol=0, atol=0.02)


def test_options_of_a_group_agree(network):
    [stream] = found_in(network)
    found = fold_options(network, stream, measure(network, IMAGES))
    assert set(found) == STREAM
    ranks = [[option.rank for option in options] for options in found.values()]
    assert all(r == ranks[0] for r in ranks)
    assert ranks[0] == sorted(set(ranks[0]))
    assert 1 <= ranks[0][0] <= ranks[0][-1] < 10
    assert all(option.folded for options in found.values() for option in options)


def test_a_group_is_folded_where_that_pays_and_as_a_whole(network):
    [stream] = found_in(network)
    moments = measure(network, IMAGES)
    alone = {n: options(layer, moments[n]) for n, layer in layers(network).items()}
    fold = fold_options(network, stream, moments)
    fine = Rates(alone, [fold]).allocate(1e-9)
    coarse = Rates(alone, [fold]).allocate(1e-1)
    for allocation in (fine, coarse):
        states = {allocation.chosen[name].folded for name in fold}
        ranks = {allocation.chosen[name].rank for name in fold if allocation.chosen[name].folded}
        assert len(states) == 1
        assert len(ranks) <= 1
    assert not any(o.folded for o in fine.chosen.values())
    assert any(o.folded for o in coarse.chosen.values())

    def cost(allocation):
        n_bytes = allocation.total_bytes
        return allocation.total_damage + SLOPE * 1e-1 * n_bytes

    assert cost(coarse) < cost(Rates(alone).allocate(1e-1))


def test_a_fold_takes_parameters_and_multiplications_away(network):
    [stream] = found_in(network)
    before = count(network, networks.SHAPE)
    after = count(rotated(network, stream, rank=4), networks.SHAPE)
    assert after[0] < before[0]
    assert after[1] < before[1]


@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_and_its_batch_norm_are_one(affine):
    network = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8, affine=affine), nn.Conv2d(8, 12, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, networks.CLASSES),
    )  # fmt: skip
    networks.randomise_(network)
    [pair] = found_in(network)
    weight, bias = normalised(network, pair, "0")
    with torch.no_grad():
        expected = network[:2](IMAGES)
        got = nn.functional.conv2d(IMAGES, weight, bias)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert relative_error(network, rotated(network, pair)) < 1e-6


def test_channels_that_span_less_than_they_are_many_can_be_folded():
    """The second moment of the channels has no inverse."""
    network = nn.Sequential(
        nn.Conv2d(2, 8, 1), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, networks.CLASSES),
    )  # fmt: skip
    networks.randomise_(network)
    [pair] = found_in(network)
    found = fold_options(network, pair, measure(network, IMAGES))
    assert all(math.isfinite(option.damage) for option in found["1"])
    three = next(option for option in found["1"] if option.rank == 3)  # two colours and a constant
    assert three.damage < 1e-3 * found["1"][0].damage
