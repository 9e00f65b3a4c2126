from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from filterpress.compensation import (
    ChannelStatistics,
    channel_statistics,
    cut_compensated_,
    refit,
    solve,
)
from filterpress.errors import ModelError
from filterpress.statistics import Moments, measure
from filterpress.surgery import channel_groups
from tests import networks


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mixed(n, n_channels, size, seed=0):
    """Draw images whose channels predict one another in part."""
    mixing = torch.randn(n_channels, n_channels, generator=generator(seed))
    noise = torch.randn(n, n_channels, size, size, generator=generator(seed + 1))
    return torch.einsum("ck,nkhw->nchw", mixing + torch.eye(n_channels), noise)


def moments_of(layer, images):
    """Return the statistics of a layer whose outputs matter differently, and together."""
    seen = F.unfold(images, layer.kernel_size, padding=layer.padding)
    rows = seen.transpose(1, 2).flatten(0, 1)
    outputs = torch.diag(torch.linspace(0.5, 2.0, layer.out_channels)) + 0.3
    return Moments((rows.T @ rows / len(rows))[None], outputs[None]), rows


@pytest.mark.parametrize("size", [1, 3])
def test_a_refit_weight_is_the_least_squares_solution_on_the_patches(size):
    layer, images = nn.Conv2d(6, 5, size, padding=size // 2), mixed(40, 6, 8)
    moments, rows = moments_of(layer, images)
    kept = torch.tensor([True, False, True, True, False, True])
    weight = layer.weight.detach()
    columns = kept.repeat_interleave(size * size)
    solution = torch.linalg.lstsq(rows[:, columns], rows @ weight.flatten(1).T).solution
    expected = torch.zeros(5, 6 * size * size)
    expected[:, columns] = solution.T
    found = refit(weight, moments, kept)
    torch.testing.assert_close(found.flatten(1), expected, rtol=2e-2, atol=5e-3)
    assert moments.error(found - weight) <= 1.01 * moments.error(expected.view_as(weight) - weight)


def test_nothing_changes_when_every_feature_stays():
    layer = nn.Conv2d(6, 5, 3, padding=1)
    moments, _ = moments_of(layer, mixed(40, 6, 8))
    weight = layer.weight.detach()
    found = refit(weight, moments, torch.ones(6, dtype=torch.bool))
    assert moments.error(found - weight) <= 1e-3 * moments.error(weight)


def one_consumer(n_channels=8):
    """Make a network in which one 1 x 1 convolution alone reads the channels of another."""
    return nn.Sequential(
        nn.Conv2d(2, n_channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(n_channels, 6, 1),
        nn.Flatten(),
        nn.Linear(6 * 64, 5),
    ).eval()


def group_of(network, producer, images):
    return next(g for g in channel_groups(network, images[:2]) if g.producers[0].name == producer)


@pytest.mark.parametrize("seed", range(3))
def test_damage_of_a_1x1_consumer_is_the_error_of_the_exact_refit(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = one_consumer()
    images = networks.images(64)
    moments = measure(network, images)
    (consumer,) = group_of(network, "0", images).consumers
    view = channel_statistics(network, consumer, moments)
    kept = torch.rand(8, generator=generator(seed)) < 0.6
    kept[0], kept[1] = True, False
    weight = network[2].weight.detach()
    exact = moments["2"].error(refit(weight, moments["2"], kept) - weight)
    assert view.damage(kept) == pytest.approx(exact, rel=1e-2)
    assert exact > 0


def test_keeping_more_channels_never_damages_more():
    images = networks.images(64)
    network = one_consumer()
    (consumer,) = group_of(network, "0", images).consumers
    view = channel_statistics(network, consumer, measure(network, images))
    order = torch.randperm(8, generator=generator())
    damages = [view.damage(torch.isin(torch.arange(8), order[:k])) for k in range(1, 9)]
    assert damages[-1] == 0
    assert all(more <= less * (1 + 1e-3) for less, more in pairwise(damages))


def test_a_channel_that_is_the_sum_of_two_others_costs_nothing():
    mixing = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0.0], [0, 0, 1]])
    view = ChannelStatistics(mixing @ mixing.T, torch.eye(4))
    without_third = view.damage(torch.tensor([True, True, False, True]))
    without_fourth = view.damage(torch.tensor([True, True, True, False]))
    assert without_third == pytest.approx(0, abs=1e-3)
    assert without_fourth == pytest.approx(0.5, rel=1e-3)


def duplicate_(network, producer, source, copy, norm=None):
    """Let one filter of a layer do exactly what another one does."""
    with torch.no_grad():
        for name in filter(None, (producer, norm)):
            module = network.get_submodule(name)
            for key in ("weight", "bias", "running_mean", "running_var"):
                value = getattr(module, key, None)
                if value is not None:
                    value[copy] = value[source]


@pytest.mark.parametrize(
    ("name", "producer", "norm"),
    [
        ("residual", "blocks.1.first.0", "blocks.1.first.1"),
        ("flattening", "3", "4"),
        ("flattening", "0", None),
        ("grouped", "last", None),
        ("concatenating", "right", None),
    ],
)
@torch.no_grad()
def test_duplicates_are_cut_without_damage(name, producer, norm):
    network, images = networks.make(name), networks.images(100)
    if name == "concatenating":
        norm_module = network.norm
        with torch.no_grad():
            for key in ("weight", "bias", "running_mean", "running_var"):
                getattr(norm_module, key)[14 + 3] = getattr(norm_module, key)[14 + 1]
    duplicate_(network, producer, 1, 3, norm)
    group = group_of(network, producer, images)
    keep = torch.arange(group.n_channels) != 3
    before, moments = network(images), measure(network, images)
    damage = cut_compensated_(network, [group], [keep], moments)
    after = network(images)
    scale = float(before.abs().max())
    torch.testing.assert_close(after, before, rtol=0, atol=5e-3 * scale)
    unscaled = sum(moments[m.name].error(network_weight(name, m)) for m in group.consumers)
    assert damage <= 1e-3 * unscaled


def network_weight(name, member):
    """Return a consumer's weight from before anything was done, as the largest damage there is."""
    return networks.make(name).get_submodule(member.name).weight.detach()


@torch.no_grad()
def test_compensation_beats_cutting_alone():
    network, images = networks.make("flattening"), networks.images(200)
    group = group_of(network, "0", images)
    keep = torch.arange(group.n_channels) % 2 == 0
    before, moments = network(images), measure(network, images)
    alone = networks.make("flattening")
    with torch.no_grad():
        alone[3].weight[:, ~keep] = 0
    bare = (alone(images) - before).square().mean()
    bare_damage = moments["3"].error(alone[3].weight.detach() - network[3].weight.detach())
    damage = cut_compensated_(network, [group], [keep], moments)
    assert float((network(images) - before).square().mean()) < float(bare)
    assert damage < bare_damage


@torch.no_grad()
def test_channels_whose_readers_were_pruned_are_not_cut_and_a_dead_input_is_no_pruned_one():
    network, images = networks.make("flattening"), networks.images(100)
    network[0].weight[5], network[0].bias[5] = (
        0,
        -1.0,
    )  # never fires: its readers see nothing
    network[3].weight[:, 5] = 0
    group = group_of(network, "0", images)
    keep = torch.arange(group.n_channels) != 2
    cut_compensated_(copy.deepcopy(network), [group], [keep], measure(network, images))
    network[3].weight[torch.rand(network[3].weight.shape, generator=generator()) < 0.3] = 0
    before = network[3].weight.clone()
    with pytest.raises(
        ModelError, match=r"channels that 3 reads cannot be cut: \d+% of its weights"
    ):
        cut_compensated_(network, [group], [keep], measure(network, images))
    assert network[3].weight.equal(before)


def test_solve_is_the_inverse_where_there_is_one():
    root = torch.randn(6, 6, generator=generator())
    matrix, right = root @ root.T + torch.eye(6), torch.randn(6, 3, generator=generator(1))
    torch.testing.assert_close(
        solve(matrix, right), torch.linalg.solve(matrix, right), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(3, 3),
        torch.ones(3, 3),
        torch.diag(torch.eye(3)[0]),
        torch.diag(torch.tensor([1.0, 1.0, -2e-4])),  # as rounding leaves it
    ],
)
def test_solve_gives_finite_numbers_where_rank_is_missing(matrix):
    right = matrix @ torch.tensor([[1.0], [2.0], [-1.0]])
    found = solve(matrix, right)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(matrix @ found, right, rtol=1e-2, atol=1e-3)
