from __future__ import annotations

import pytest
import torch
from torch import nn

from filterpress.allocation import LEFT
from filterpress.levels import choose, correct_bias_, fit_levels, level_option
from filterpress.representations import integers_of, latent_weight
from filterpress.rounding import quantize_at_
from filterpress.statistics import measure
from tests import networks
from tests.moments import apart


def correlated(n_out, d, *, groups=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(groups, d, d, generator=generator) / d**0.5
    mean = torch.randn(groups, d, generator=generator)
    second = root @ root.mT + mean[:, :, None] * mean[:, None]
    return apart(second, 0.5 + torch.rand(n_out, generator=generator), mean)


@pytest.mark.parametrize("grid", ["symmetric", "asymmetric", "codebook"])
def test_both_ways_of_choosing_levels_damage_less_than_the_nearest(grid):
    layer = nn.Conv2d(6, 16, 3)
    moments = correlated(16, 54)
    weight = layer.weight.detach()
    levels = fit_levels(weight, moments, grid, 3)
    damages = []
    for rounding in ("nearest", "compensated", "learned"):
        places = choose(layer, levels, moments, rounding)
        made = levels.table(16).gather(1, places)
        damages.append(moments.error(made - weight.flatten(1)))
    assert max(damages[1:]) < 0.7 * damages[0]


@pytest.mark.parametrize(("bits", "kind"), [(2, "symmetric"), (3, "asymmetric")])
def test_levels_fitted_to_outputs_damage_them_less(bits, kind):
    weight = torch.randn(12, 40, generator=torch.Generator().manual_seed(1))
    moments = correlated(12, 40)
    damages = {}
    for per in ("channel", "tensor"):
        for fit in ("range", "weights", "outputs"):
            grid = fit_levels(weight, moments, kind, bits, per=per, fit=fit).values
            delta = grid.rounded(weight) * grid.step[:, None] - weight
            damages[fit] = float((moments.importance * delta.square()).sum())
        assert damages["outputs"] <= damages["weights"] < damages["range"]


@pytest.mark.parametrize("groups", [1, 3])
def test_bias_correction_takes_away_the_mean_error_of_the_outputs(groups):
    layer = nn.Conv2d(6, 9, 3, groups=groups)
    images = networks.images(64, shape=(6, 8, 8)).relu()
    head = nn.Sequential(layer, nn.Flatten(), nn.Linear(9 * 36, 3)).eval()
    moments = measure(head, images)["0"]
    before = layer.weight.detach().clone()
    with torch.no_grad():
        expected = layer(images).mean(dim=(0, 2, 3))
    levels = fit_levels(before, moments, "symmetric", 2)
    places = choose(layer, levels, moments, "nearest")
    grid = levels.values
    quantize_at_(layer, grid.low[:, None] + places, *grid)
    with torch.no_grad():
        off = (layer(images).mean(dim=(0, 2, 3)) - expected).abs().max()
        correct_bias_(layer, before, moments)
        left = (layer(images).mean(dim=(0, 2, 3)) - expected).abs().max()
    assert off > 0.01
    assert left < 1e-5


def test_a_layer_learns_with_its_own_weights_in_the_cells_of_their_integers():
    layer = nn.Linear(30, 8)
    before, moments = layer.weight.detach().clone(), correlated(8, 30)
    levels = fit_levels(before, moments, "symmetric", 3)
    places, grid = choose(layer, levels, moments, "compensated"), levels.values
    quantize_at_(layer, grid.low[:, None] + places, *grid)
    assert (integers_of(layer) - grid.low[:, None]).equal(places.float())
    moved = latent_weight(layer) != before
    nearest = grid.rounded(before) == integers_of(layer)
    assert moved.any()
    # where the nearest integer was chosen, only weights at the edge of its cell move, a little
    shift = ((latent_weight(layer) - before).abs() / grid.step[:, None])[nearest]
    assert float(shift.max()) < 0.011
    assert float((latent_weight(layer) - before).abs().max()) > 0.02 * float(grid.step.min())


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "codebook"])
def test_an_option_counts_the_damage_of_the_nearest_levels_or_what_is_left_of_it(kind):
    layer, moments = nn.Linear(40, 12), correlated(12, 40)
    levels = fit_levels(layer.weight.detach(), moments, kind, 3)
    rows = layer.weight.detach()
    nearest = levels.table(12).gather(1, choose(layer, levels, moments, "nearest"))
    damage = 0.5 * float((moments.importance * (nearest - rows).square()).sum())
    found = {way: level_option(layer, levels, moments, way) for way in ("nearest", "compensated")}
    assert found["nearest"].damage == pytest.approx(damage, rel=1e-5)
    assert found["compensated"].damage == pytest.approx(LEFT * damage, rel=1e-5)
    n_levels = 7 if kind == "symmetric" else 8
    assert found["nearest"].form == (0, 1, False, n_levels, kind, 0)
    assert found["nearest"].n_bytes == found["compensated"].n_bytes
