from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from filterpress import rounding
from filterpress.allocation import SLOPE, steps_of
from filterpress.representations import is_quantized, step_of
from filterpress.rounding import (
    BITS_COUNT,
    DAMPING,
    OUTPUT_DAMPING,
    code_lengths,
    quantize_compensated_,
    round_compensated,
    round_compensated_to,
    round_nearest_to,
)
from filterpress.statistics import Moments
from tests.moments import apart, correlated, draw, white

FREE = 1e-12  # of theta: bits count for nothing


def damage(weight, units, steps, moments):
    return moments.error(units * steps[:, None] - weight.flatten(1))


def damped(second, damping):
    power = second.diagonal()
    ridge = damping * power.mean() + 1e-5 * power.max()
    return (second + ridge * torch.eye(len(second))).double()


def one_after_the_other(weight, steps, moments, price):
    """Round weight after weight and solve all those to come by least squares: slow, and plain."""
    metric = torch.kron(
        damped(moments.outputs[0], OUTPUT_DAMPING), damped(moments.inputs[0], DAMPING)
    )
    left, units = weight.double().flatten(), []
    for i, step in enumerate(steps.double().repeat_interleave(weight.shape[1])):
        rest = slice(i + 1, None)
        # what one weight does that the later ones cannot do for it
        solved = torch.linalg.solve(metric[rest, rest], metric[rest, i])
        own = metric[i, i] - metric[i, rest] @ solved
        exact = left[i] / step
        candidates = torch.stack([exact.floor(), exact.ceil(), torch.zeros_like(exact)])
        bits = price.double()[candidates.abs().clamp(max=255).long()]
        best = (0.5 * own * (step * (exact - candidates)) ** 2 + bits).argmin()
        units.append(candidates[best])
        left[rest] += (left[i] - candidates[best] * step) * solved
    return torch.stack(units).view_as(weight)


def test_independent_inputs_leave_the_nearest_integers():
    weight, steps = draw(6, 40), torch.linspace(0.05, 0.3, 6)
    units = round_compensated(weight, steps, white(6, 40), FREE)
    assert torch.equal(units, torch.round(weight / steps[:, None]))


@pytest.mark.parametrize("theta", [FREE, 1e-2])
@pytest.mark.parametrize(("n_out", "d"), [(1, 60), (60, 1), (6, 9), (3, 40), (12, 15)])
def test_tiles_leave_what_one_weight_after_the_other_does(n_out, d, theta, monkeypatch):
    monkeypatch.setattr(rounding, "TILE", 4)
    weight, moments = draw(n_out, d), correlated(n_out, d)
    steps = torch.linspace(0.3, 0.9, n_out)
    price = code_lengths(torch.round(weight / steps[:, None])) * (BITS_COUNT * SLOPE * theta / 8)
    expected = one_after_the_other(weight, steps, moments, price)
    assert round_compensated(weight, steps, moments, theta).equal(expected.float())


@pytest.mark.parametrize("groups", [1, 3])
def test_the_size_of_tiles_changes_no_integer(groups, monkeypatch):
    weight, moments = draw(300, 50), correlated(300, 50, groups=groups)
    steps = torch.full((300,), 0.6)
    found = []
    for tile in (7, 128, 1000):
        monkeypatch.setattr(rounding, "TILE", tile)
        found.append(round_compensated(weight, steps, moments, 1e-2))
    for other in found[1:]:
        assert (found[0] != other).double().mean() < 0.002  # sums in another order: near ties


@pytest.mark.parametrize("seed", range(5))
def test_feedback_damages_less_than_the_nearest_integers(seed):
    weight, moments = draw(16, 3, 3, 12, seed=seed).transpose(1, 3), correlated(16, 108, seed=seed)
    steps = torch.full((16,), 0.8)
    nearest = torch.round(weight.flatten(1) / steps[:, None])
    found = round_compensated(weight, steps, moments, FREE)
    assert damage(weight, found, steps, moments) < 0.8 * damage(weight, nearest, steps, moments)


def test_bits_that_cost_are_saved_where_they_do_least():
    weight, moments = draw(16, 108), correlated(16, 108)
    theta = 3.0
    steps = steps_of(weight, moments, theta)
    costs = []
    for units in (
        round_compensated(weight, steps, moments, FREE),
        round_compensated(weight, steps, moments, theta),
    ):
        bits = float(code_lengths(units)[units.abs().long()].sum())
        costs.append((damage(weight, units, steps, moments), bits))
    (free_damage, free_bits), (priced_damage, priced_bits) = costs
    assert priced_bits < 0.95 * free_bits
    worth = BITS_COUNT * SLOPE * theta / 8
    assert priced_damage + worth * priced_bits < free_damage + worth * free_bits


def test_what_is_never_seen_becomes_zero():
    moments = correlated(8, 30)
    seen = torch.arange(30) % 3 > 0
    moments.inputs[0, ~seen] = 0
    moments.inputs[0, :, ~seen] = 0
    weight = draw(8, 30)
    units = round_compensated(weight, steps_of(weight, moments, 1e-2), moments, 1e-2)
    assert not units[:, ~seen].any()
    assert units[:, seen].any()


def test_a_weight_that_was_pruned_stays_zero_and_the_others_make_up_for_errors_around_it():
    weight, moments = draw(6, 40), correlated(6, 40)
    pruned = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    weight[pruned] = 0
    steps = torch.full((6,), 0.4)
    units = round_compensated(weight, steps, moments, FREE)
    levels = torch.arange(-20, 21.0) * 0.4
    places = round_compensated_to(weight, levels.expand(6, -1), moments)
    assert (units[pruned] == 0).all()
    assert (places[pruned] == 20).all()
    nearest = torch.round(weight / 0.4)
    assert damage(weight, units, steps, moments) < 0.8 * damage(weight, nearest, steps, moments)


def test_inputs_that_are_always_zero_leave_no_integer():
    moments = apart(torch.zeros(1, 12, 12), torch.ones(4))
    units = round_compensated(draw(4, 12), torch.ones(4), moments, 1e-2)
    assert not units.any()


def test_groups_are_rounded_each_with_its_own_inputs():
    moments, weight = correlated(12, 9, groups=4), draw(12, 1, 3, 3)
    steps = torch.full((12,), 0.4)
    whole = round_compensated(weight, steps, moments, 1e-3)
    lengths = torch.round(weight.flatten(1) / 0.4)
    assert whole.shape == lengths.shape
    for group in range(4):
        rows = slice(3 * group, 3 * group + 3)
        part = Moments(moments.inputs[group, None], moments.outputs[group, None])
        alone = round_compensated(weight[rows], steps[rows], part, FREE)
        assert torch.equal(round_compensated(weight, steps, moments, FREE)[rows], alone)


def test_code_lengths_are_those_of_the_frequencies():
    integers = torch.tensor([0.0] * 64 + [1.0] * 8 + [-1.0] * 8 + [2.0] * 16)
    lengths = code_lengths(integers)
    assert float(lengths[0]) == pytest.approx(math.log2(96 / 64), abs=0.05)
    assert float(lengths[1]) == pytest.approx(math.log2(96 / 16) + 1, abs=0.1)
    assert (lengths[3:].diff() >= 0).all()
    assert torch.isfinite(lengths).all()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 12, 3, groups=2),
        nn.Linear(9, 5),
    ],
    ids=["convolution", "depthwise", "grouped", "linear"],
)
def test_a_layer_computes_with_what_was_chosen(layer):
    groups = getattr(layer, "groups", 1)
    moments = correlated(len(layer.weight), layer.weight[0].numel(), groups=groups)
    weight = layer.weight.detach().clone()
    theta = 1e-4
    units = round_compensated(weight, steps_of(weight, moments, theta), moments, theta)
    quantize_compensated_(layer, moments, theta)
    assert is_quantized(layer)
    expected = (units * step_of(layer)[:, None]).view_as(weight)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-6, atol=1e-7)


def test_steps_too_fine_for_16_bits_are_coarsened():
    layer = nn.Linear(9, 5)
    quantize_compensated_(layer, correlated(5, 9), 1e-20)
    units = layer.weight.detach() / step_of(layer)[:, None]
    assert 2**14 < float(units.abs().max()) < 2**15


def test_second_moments_that_are_indefinite_by_rounding_are_damped_until_they_are_not():
    moments = correlated(8, 30)
    values, vectors = torch.linalg.eigh(moments.inputs[0])
    values[:3] = -0.01 * values[-1]
    moments = Moments((vectors * values @ vectors.T)[None], moments.outputs)
    weight, steps = draw(8, 30), torch.full((8,), 0.4)
    units = round_compensated(weight, steps, moments, FREE)
    assert (units * 0.4 - weight).abs().max() < 2


def table_of(n_rows, *levels):
    return torch.tensor(levels).expand(n_rows, -1)


def made(levels, places):
    return levels.gather(1, places)


def test_the_nearest_level_of_each_row_is_taken():
    levels = torch.tensor([[-1.0, 0.0, 2.0], [-3.0, 0.5, 0.7]])
    weight = torch.tensor([[-9.0, -0.6, 0.9, 1.1], [-1.3, -1.2, 0.59, 0.61]])
    expected = (weight[..., None] - levels[:, None]).abs().argmin(dim=-1)
    assert round_nearest_to(weight, levels).equal(expected)


def test_independent_inputs_leave_the_nearest_levels():
    weight, levels = draw(6, 40), torch.sort(draw(6, 7, seed=1)).values
    found = round_compensated_to(weight, levels, white(6, 40))
    assert found.equal(round_nearest_to(weight, levels))


@pytest.mark.parametrize("groups", [1, 4])
def test_many_equal_steps_are_rounded_to_as_integers_without_a_price(groups):
    moments, weight = correlated(12, 200, groups=groups), draw(12, 200)
    steps = torch.linspace(0.3, 0.9, 12)
    integers = torch.arange(-100.0, 101.0)
    found = round_compensated_to(weight, integers * steps[:, None], moments) - 100
    expected = round_compensated(weight, steps, moments, FREE)
    assert (found != expected).double().mean() < 0.01  # ties, and what follows from them


@pytest.mark.parametrize(
    "levels", [(-1.0, 1.0), (-1.2, 0.0, 1.2), (-1.5, -0.6, -0.2, 0.1, 0.8)], ids=len
)
def test_feedback_damages_less_than_the_nearest_levels(levels):
    weight, moments = draw(16, 108), correlated(16, 108)
    table = table_of(16, *levels)
    nearest = made(table, round_nearest_to(weight, table))
    found = made(table, round_compensated_to(weight, table, moments))
    assert moments.error(found - weight) < 0.8 * moments.error(nearest - weight)


def test_what_is_never_seen_takes_the_level_nearest_zero():
    moments = correlated(8, 30)
    seen = torch.arange(30) % 3 > 0
    moments.inputs[0, ~seen] = 0
    moments.inputs[0, :, ~seen] = 0
    places = round_compensated_to(draw(8, 30), table_of(8, -1.0, -0.1, 1.0), moments)
    assert (places[:, ~seen] == 1).all()
    assert (places[:, seen] != 1).any()
