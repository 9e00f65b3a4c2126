from __future__ import annotations

import itertools
import math

import pytest
import torch

from filterpress.learned_rounding import round_learned_to
from filterpress.rounding import descend, round_nearest_to
from filterpress.statistics import Moments


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(n_out, d, *, groups=1, seed=0):
    """Return statistics of inputs of which each resembles the others."""
    root = draw(groups, d, d, seed=seed) / math.sqrt(d) + 0.5 / d
    gain = 0.5 + torch.rand(n_out, generator=torch.Generator().manual_seed(seed + 1))
    return Moments(root @ root.mT + 0.05 * torch.eye(d), gain)


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
def test_no_row_is_worse_than_with_the_nearest_levels_and_all_are_much_better(case, groups):
    weight, moments, table = draw(16, 60), correlated(16, 60, groups=groups), TABLES[case]

    def damages(places):
        return moments.errors(table.gather(1, places) - weight)

    learned = damages(round_learned_to(weight, table, moments))
    nearest = damages(round_nearest_to(weight, table))
    assert (learned <= nearest).all()
    assert learned.sum() < 0.8 * nearest.sum()


@pytest.mark.parametrize("d", [1, 4, 8])
def test_the_damage_is_nearly_the_least_of_all_ways_up_and_down(d):
    ratios, descended = [], []
    for seed in range(4):
        weight, moments = draw(6, d, seed=seed).clamp(-2, 2), correlated(6, d, seed=seed)
        table = uniform(6, 0.7, 3)
        lower = torch.floor(weight / 0.7) + 3
        ways = torch.tensor(list(itertools.product((0.0, 1.0), repeat=d)))
        least = torch.stack(
            [moments.errors((lower + way - 3) * 0.7 - weight) for way in ways]
        ).amin(dim=0)
        found = round_learned_to(weight, table, moments)
        further = descend(weight, table, moments, found)
        for places, into in ((found, ratios), (further, descended)):
            damage = moments.errors(table.gather(1, places) - weight).sum()
            into.append(float(damage / least.sum()))
    assert min(ratios) > 1 - 1e-4
    assert sum(ratios) / 4 < 1.25
    assert sum(descended) / 4 < 1.1


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
    moments = Moments(torch.zeros(1, 12, 12), torch.ones(4))
    places = round_learned_to(draw(4, 12), uniform(4, 1.0, 1), moments)
    assert (places == 1).all()


def test_a_single_level_is_taken():
    places = round_learned_to(draw(4, 12), torch.zeros(4, 1), correlated(4, 12))
    assert not places.any()


def test_the_same_weights_are_rounded_the_same_way_each_time():
    weight, moments, table = draw(16, 60), correlated(16, 60), TABLES["three levels"]
    first, second = (round_learned_to(weight, table, moments) for _ in range(2))
    assert first.equal(second)
