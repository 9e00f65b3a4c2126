from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from filterpress.compensation import refit_rest
from filterpress.cuts import (
    CHANNELS,
    COLUMNS,
    TAPS,
    WHOLE,
    Cut,
    as_filters,
    cut_filters,
    cut_moments,
    fit_part,
    fit_polyadic,
    join,
    taken_moments,
)
from filterpress.statistics import Moments, measure
from tests import networks
from tests.moments import correlated, draw

SHAPE = (6, 3, 2)  # (I, kh, kw)
N_OUT = 7
CUTS = {"channels": CHANNELS, "columns": COLUMNS, "whole": WHOLE, "taps": TAPS}
every_cut = pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)


def filters(seed=0):
    return draw(N_OUT, *SHAPE, seed=seed)


def random_layers(cut, rank, seed=0):
    """Draw the weights of two layers, of which the first takes what a cut says."""
    apart, taken, shared = cut.sizes(SHAPE)
    rows = draw(apart, rank, taken, seed=seed)
    return draw(N_OUT, apart * rank, shared, seed=seed + 1), rows


def spd(n, seed):
    root = draw(n, n, seed=seed) / math.sqrt(n)
    return root @ root.T + 0.2 * torch.eye(n)


def factorised(cut, seed=0):
    """Make statistics that factorise into those of the axes taken and of those shared."""
    apart, taken, shared = cut.sizes(SHAPE)
    side = torch.stack([spd(taken, seed + g) for g in range(apart)])
    other = spd(shared, seed + 50)
    other *= shared / other.trace()
    blocks = torch.einsum("gtu,sv,gh->gtshuv", side, other, torch.eye(apart))
    sizes = [SHAPE[place] for place in cut.order]
    back = torch.tensor(cut.order).argsort().tolist()
    whole = blocks.reshape(*sizes, *sizes).permute(*back, *(3 + b for b in back))
    d = math.prod(SHAPE)
    return Moments(whole.reshape(1, d, d), spd(N_OUT, seed + 90)[None])


@every_cut
def test_two_layers_multiplied_out_are_what_they_compute_in_sequence(cut):
    rest, rows = random_layers(cut, 2)
    joined = join(rest, rows, cut, SHAPE)
    patch = draw(5, *SHAPE, seed=9)  # as filters are viewed
    between = torch.einsum("ngts,grt->ngrs", cut_filters(patch, cut), rows)
    expected = between.flatten(1) @ rest.flatten(1).T
    torch.testing.assert_close(patch.flatten(1) @ joined.flatten(1).T, expected)


@every_cut
def test_filters_and_their_statistics_are_cut_alike(cut):
    weight, moments = filters(), correlated(N_OUT, math.prod(SHAPE))
    blocks = cut_moments(moments.inputs[0], SHAPE, cut)
    parts = cut_filters(weight, cut)
    power = torch.einsum("ogts,gtshuv,ohuv->o", parts, blocks, parts)
    rows = weight.flatten(1)
    torch.testing.assert_close(power, (rows @ moments.inputs[0] * rows).sum(dim=1))


@every_cut
def test_a_first_layer_of_full_rank_loses_nothing(cut):
    weight, moments = filters(), correlated(N_OUT, math.prod(SHAPE))
    part = fit_part(weight, moments, cut)
    rest, _ = refit_rest(weight, moments.inputs[0], part.rows, cut)
    delta = join(rest, part.rows, cut, SHAPE) - weight
    assert moments.error(delta) < 1e-4 * moments.error(weight)


@every_cut
def test_a_planted_rank_is_found(cut):
    rest, rows = random_layers(cut, 1, seed=3)
    weight = join(rest, rows, cut, SHAPE)
    moments = correlated(N_OUT, math.prod(SHAPE))
    part = fit_part(weight, moments, cut)
    if part.rows.shape[1] > 1:
        energies = part.worth.diagonal(dim1=1, dim2=2)
        assert (energies[:, 1:] < 1e-3 * energies[:, :1]).all()
    rows = part.first(1).rows
    again, _ = refit_rest(weight, moments.inputs[0], rows, cut)
    delta = join(again, rows, cut, SHAPE) - weight
    assert moments.error(delta) < 1e-4 * moments.error(weight)


@every_cut
@pytest.mark.parametrize("rank", [1, 2])
def test_worth_is_twice_the_damage_of_leaving_rows_out_where_statistics_factorise(cut, rank):
    weight, moments = filters(), factorised(cut)
    part = fit_part(weight, moments, cut)
    rows = part.first(rank).rows
    rest, _ = refit_rest(weight, moments.inputs[0], rows, cut)
    damage = moments.error(join(rest, rows, cut, SHAPE) - weight)
    left = part.worth.diagonal(dim1=1, dim2=2)[:, rank:].sum()
    assert damage == pytest.approx(0.5 * float(left), rel=2e-2)
    other = draw(*rows.shape, seed=5)
    worse, _ = refit_rest(weight, moments.inputs[0], other, cut)
    assert moments.error(join(worse, other, cut, SHAPE) - weight) > damage


def test_a_cut_of_whole_filters_is_the_best_of_its_rank():
    weight, moments = filters(), correlated(N_OUT, math.prod(SHAPE))
    side = torch.linalg.cholesky(moments.outputs[0].double())
    root = torch.linalg.cholesky(moments.inputs[0].double())
    sizes = torch.linalg.svdvals(side.T @ weight.flatten(1).double() @ root)
    energies = fit_part(weight, moments, WHOLE).worth[0].diagonal()
    torch.testing.assert_close(energies[:5].double(), sizes[:5].square(), rtol=1e-2, atol=0)


@every_cut
def test_errors_of_first_rows_cost_what_their_worth_says(cut):
    weight, moments = filters(), factorised(cut)
    part = fit_part(weight, moments, cut)
    rest, _ = refit_rest(weight, moments.inputs[0], part.rows, cut)
    change = 0.1 * draw(*part.rows.shape, seed=4)
    taken = taken_moments(cut_moments(moments.inputs[0], SHAPE, cut))
    expected = Moments(taken, part.worth).error(change.flatten(0, 1))
    done = moments.error(join(rest, change, cut, SHAPE))
    assert done == pytest.approx(expected, rel=2e-2)


@every_cut
def test_what_is_refitted_is_the_least_squares_solution_on_the_patches(cut):
    weight, rank = filters(), 2
    patches = draw(400, *SHAPE, seed=1) + draw(400, 1, 1, 1, seed=2)
    _, rows = random_layers(cut, rank)
    between = torch.einsum("ngts,grt->ngrs", cut_filters(patches, cut), rows).flatten(1)
    wanted = patches.flatten(1) @ weight.flatten(1).T
    expected = torch.linalg.lstsq(between, wanted).solution.T
    second = patches.flatten(1).T @ patches.flatten(1) / len(patches)
    rest, seen = refit_rest(weight, second, rows, cut)
    torch.testing.assert_close(rest.flatten(1), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(seen, between.T @ between / len(patches), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("cut", "first", "last"),
    [
        (CHANNELS, nn.Conv2d(4, 3, 1, bias=False), nn.Conv2d(3, 5, 3, padding=1)),
        (
            COLUMNS,
            nn.Conv2d(4, 3, (3, 1), (2, 1), (1, 0), bias=False),
            nn.Conv2d(3, 5, (1, 3), (1, 2), (0, 1)),
        ),
        (WHOLE, nn.Conv2d(4, 3, 3, padding=1, bias=False), nn.Conv2d(3, 5, 1)),
        (TAPS, nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False), nn.Conv2d(8, 5, 1)),
    ],
    ids=["channels", "columns", "whole", "taps"],
)
def test_statistics_between_two_layers_are_those_that_are_measured_there(cut, first, last):
    images = networks.images(40, shape=(4, 8, 8))
    strided = cut is COLUMNS
    layer = nn.Conv2d(4, 5, 3, stride=2 if strided else 1, padding=1)

    def seen(*parts):
        flat = nn.Flatten()
        with torch.no_grad():
            n = flat(nn.Sequential(*parts)(images[:1])).shape[1]
        return measure(nn.Sequential(*parts, flat, nn.Linear(n, 3)).eval(), images)

    apart, taken, _ = cut.sizes((4, 3, 3))
    rows = first.weight.detach().reshape(apart, -1, taken)
    before = seen(layer)["0"].inputs[0]
    _, between = refit_rest(layer.weight.detach(), before, rows, cut)
    found = seen(first, last)["1"].inputs[0]
    torch.testing.assert_close(between, found, rtol=1e-3, atol=1e-4 * float(found.max()))


def polyadic(rank, seed=0):
    a, b, c = draw(N_OUT, rank, seed=seed), draw(6, rank, seed=seed + 1), draw(6, rank, seed=9)
    return torch.einsum("or,ir,tr->oit", a, b, c).view(N_OUT, *SHAPE)


def damage_of_polyadic(weight, moments, rank, **given):
    ((channels, taps),) = fit_polyadic(weight, moments, [rank], **given)
    assert channels.rows.shape == (1, rank, 6)
    assert taps.rows.shape == (rank, 1, 6)
    both = torch.einsum("ri,rt->rit", channels.rows[0], taps.rows[:, 0]).flatten(1)[None]
    rest, _ = refit_rest(weight, moments.inputs[0], both, WHOLE)
    return moments.error(join(rest, both, WHOLE, SHAPE) - weight)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_planted_sum_of_products_is_found(rank):
    weight, moments = polyadic(rank), correlated(N_OUT, math.prod(SHAPE))
    assert damage_of_polyadic(weight, moments, rank) < 1e-3 * moments.error(weight)


def test_sweeps_and_terms_lessen_the_damage_of_a_sum_of_products():
    weight, moments = filters(), correlated(N_OUT, math.prod(SHAPE))
    by_sweeps = [damage_of_polyadic(weight, moments, 6, sweeps=n) for n in (0, 2, 20)]
    assert by_sweeps == sorted(by_sweeps, reverse=True)
    by_terms = [damage_of_polyadic(weight, moments, n) for n in (2, 4, 8, 16)]
    assert by_terms == sorted(by_terms, reverse=True)
    assert by_terms[-1] < 0.3 * by_terms[0]


def test_axes_are_taken_kept_apart_or_shared():
    assert [cut.shared for cut in CUTS.values()] == ["yx", "x", "", ""]
    assert Cut("x", apart="i").sizes(SHAPE) == (6, 2, 3)
    assert as_filters(torch.zeros(4, 5)).shape == (4, 5, 1, 1)
