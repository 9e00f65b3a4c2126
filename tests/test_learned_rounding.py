from __future__ import annotations

import itertools

import pytest
import torch

from filterpress.learned_rounding import round_learned_to
from filterpress.rounding import round_nearest_to
from tests.moments import apart, correlated, draw


def uniform(n_rows, step, reach):
    return (step * torch.arange(-reach, reach + 1.0)).expand(n_rows, -1)


TABLES = {
    "one bit": torch.tensor([[-1.0, 1.0]]).expand(16, -1),
    "three levels": uniform(16, 1.0, 1),
    "four bits": uniform(16, 0.4, 7),
    "a codebook": torch.tensor([[-1.7, -0.9, -0.1, 0.2, 0.6, 1.9]]).expand(16, -1),
    "steps of their own": uniform(16, 1.0, 3) * torch.linspace(0.2, 1.5, 16)[:, None],
}


@pytest.mark.parametrize("case", TABLES)
@pytest.mark.parametrize("groups", [1, 4])
def test_a_layer_is_damaged_much_less_than_with_the_nearest_levels(case, groups):
    weight, moments, table = draw(16, 60), correlated(16, 60, groups=groups), TABLES[case]

    def damage(places):
        return moments.error(table.gather(1, places) - weight)

    learned = damage(round_learned_to(weight, table, moments))
    assert learned < 0.8 * damage(round_nearest_to(weight, table))


def test_a_layer_whose_nearest_levels_are_best_takes_these():
    weight, table = draw(16, 60), TABLES["four bits"]
    moments = apart(torch.eye(60)[None], torch.ones(16))
    assert round_learned_to(weight, table, moments).equal(round_nearest_to(weight, table))


@pytest.mark.parametrize("d", [1, 4, 8])
def test_the_damage_is_nearly_the_least_of_all_ways_up_and_down(d):
    ratios = []
    for seed in range(4):
        weight = draw(6, d, seed=seed).clamp(-2, 2)
        moments = apart(correlated(6, d, seed=seed).inputs, torch.linspace(0.5, 1.5, 6))
        table = uniform(6, 0.7, 3)
        lower = torch.floor(weight / 0.7) + 3
        ways = torch.tensor(list(itertools.product((0.0, 1.0), repeat=d)))
        least = torch.stack(
            [moments.errors((lower + way - 3) * 0.7 - weight) for way in ways]
        ).amin(dim=0)
        found = table.gather(1, round_learned_to(weight, table, moments))
        ratios.append(float(moments.errors(found - weight).sum() / least.sum()))
    assert min(ratios) > 1 - 1e-4
    assert sum(ratios) / 4 < 1.25


def test_each_weight_goes_to_a_level_beside_it():
    weight, table = draw(16, 60), TABLES["four bits"]
    units = weight / 0.4 + 7
    found = round_learned_to(weight, table, correlated(16, 60))
    inside = (units > 0) & (units < 14)
    assert ((found - units).abs() < 1)[inside].all()
    assert (found[units >= 14] >= 13).all()


def test_what_is_never_seen_takes_the_level_nearest_zero():
    moments = correlated(8, 30)
    seen = torch.arange(30) % 3 > 0
    moments.inputs[0, ~seen] = 0
    moments.inputs[0, :, ~seen] = 0
    table = torch.tensor([[-1.0, -0.1, 1.0]]).expand(8, -1)
    places = round_learned_to(draw(8, 30), table, moments)
    assert (places[:, ~seen] == 1).all()
    assert (places[:, seen] != 1).any()


def test_inputs_that_are_always_zero_are_no_trouble():
    moments = apart(torch.zeros(1, 12, 12), torch.ones(4))
    places = round_learned_to(draw(4, 12), uniform(4, 1.0, 1), moments)
    assert (places == 1).all()


def test_a_single_level_is_taken():
    places = round_learned_to(draw(4, 12), torch.zeros(4, 1), correlated(4, 12))
    assert not places.any()


def test_the_same_weights_are_rounded_the_same_way_each_time():
    weight, moments, table = draw(16, 60), correlated(16, 60), TABLES["three levels"]
    first, second = (round_learned_to(weight, table, moments) for _ in range(2))
    assert first.equal(second)
