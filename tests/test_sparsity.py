"""Bytes of pruned weights, against the entropy of real masks and by their own inverse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from filterpress.fitting import Goal
from filterpress.package import Package, encode
from filterpress.sparsity import (
    LEAST,
    SURVIVOR_BITS,
    prune_,
    reached,
    share_for,
    sparse_bytes,
    strongest,
    surviving,
    survivors_for,
)
from filterpress.surgery import layers
from tests import networks


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.7])
def test_bytes_are_those_of_an_ideal_code_of_mask_and_survivors(share):
    mask = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) < share
    found = float(mask.float().mean())
    # the length of an ideal code of this very mask, weight by weight
    bits = torch.where(mask, -torch.tensor(found).log2(), -torch.tensor(1 - found).log2()).sum()
    expected = float(bits + SURVIVOR_BITS * mask.sum()) / 8
    assert float(sparse_bytes(100_000, torch.tensor(found))) == pytest.approx(expected, rel=1e-4)


def test_bytes_have_the_slope_of_finite_differences():
    share = torch.tensor([0.01, 0.2, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: sparse_bytes(1000, p), share)


@pytest.mark.parametrize("max_bytes", [1.0, 40.0, 700.0, 4000.0, 5100.0])
def test_the_survivors_take_the_bytes_they_were_allowed(max_bytes):
    share = survivors_for(10_000, max_bytes)
    taken = float(sparse_bytes(10_000, torch.tensor(share, dtype=torch.float64)))
    assert 0 < share < 1
    assert max_bytes - 0.1 <= taken <= max_bytes


def test_all_survive_where_they_fit_and_none_where_there_is_no_room():
    assert survivors_for(10_000, 10_000 * SURVIVOR_BITS) == 1.0
    assert survivors_for(10_000, 0.0) == 0.0
    assert survivors_for(10_000, -50.0) == 0.0


def size(network):
    source = Package(network=network, model="", input_shape=networks.SHAPE, n_classes=5)
    return len(encode(source, network))


def test_what_the_file_holds_besides_weights_is_taken_off_the_budget():
    network = networks.make("residual")
    n_weights = sum(layer.weight.numel() for layer in layers(network).values())
    blank = networks.make("residual")
    for layer in layers(blank).values():
        nn.init.zeros_(layer.weight)
    goal = Goal(size(blank) + 900, size)
    share = share_for(network, goal)
    assert 0.1 < share < 0.9
    assert share == survivors_for(n_weights, 900)
    assert share_for(network, Goal(10**6, size)) == 1
    assert share_for(network, Goal(10, size)) == LEAST


@pytest.mark.parametrize("share", [0.001, 0.3, 1.0])
def test_pruning_keeps_a_share_of_all_weights_and_one_of_each_layer(share):
    network = networks.make("residual")
    with torch.no_grad():
        layers(network)["classifier"].weight.mul_(1e-3)
    before = {name: layer.weight.detach().clone() for name, layer in layers(network).items()}
    scores = {name: weight.abs() for name, weight in before.items()}
    bound = reached(scores.values(), share)
    flat = torch.cat([score.flatten() for score in scores.values()])
    assert bound == flat.sort(descending=True).values[max(1, round(share * len(flat))) - 1]
    prune_(network, strongest(scores, bound))
    for name, layer in layers(network).items():
        stays = (scores[name] >= bound) | (scores[name] == scores[name].max())
        assert layer.weight.equal(torch.where(stays, before[name], 0))
    assert surviving(network) == pytest.approx(share, abs=len(scores) / len(flat))
