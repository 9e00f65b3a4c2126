from __future__ import annotations

import itertools
import math

import pytest
import torch

from filterpress.grids import POINTS, Grid, best_grid, codebook, range_grid


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def worths(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(100 + seed)).square()


def error(rows, importance, grid):
    delta = grid.rounded(rows) * grid.step[:, None] - rows
    return (importance * delta.square()).sum(dim=1)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_symmetric_range_leaves_no_weight_further_off_than_half_a_gap(bits):
    rows = draw(5, 300)
    grid = range_grid(rows, bits, symmetric=True)
    reach = 2 ** (bits - 1) - 1 if bits > 1 else 1
    assert grid.low.tolist() == [-reach] * 5
    assert grid.high.tolist() == [reach] * 5
    furthest = (grid.rounded(rows) * grid.step[:, None] - rows).abs().amax(dim=1)
    assert (furthest <= 0.5 * grid.spacing * grid.step * (1 + 1e-5)).all()
    if bits > 1:
        torch.testing.assert_close(grid.levels[:, -1], rows.abs().amax(dim=1))


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_asymmetric_range_has_zero_and_leaves_at_most_a_gap(bits):
    rows = draw(5, 300) + torch.tensor([[-9.0], [-0.5], [0.0], [1.0], [9.0]])
    grid = range_grid(rows, bits, symmetric=False)
    assert ((grid.low <= 0) & (grid.high >= 0)).all()
    assert (grid.high - grid.low).tolist() == [2**bits - 1] * 5
    furthest = (grid.rounded(rows) * grid.step[:, None] - rows).abs().amax(dim=1)
    assert (furthest <= grid.step * (1 + 1e-5)).all()
    assert grid.low[0] == 1 - 2**bits
    assert grid.low[4] == 0


def test_one_bit_is_a_sign():
    grid = range_grid(draw(3, 50), 1, symmetric=True)
    assert grid.levels.shape == (3, 2)
    assert grid.rounded(draw(3, 50)).equal(draw(3, 50).sign())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_levels_are_the_weights_a_grid_can_make(bits, symmetric):
    rows = draw(4, 60)
    grid = best_grid(rows, torch.ones(4, 60), bits, symmetric=symmetric)
    assert grid.levels.shape == (4, 2**bits - symmetric)
    distances = (rows[..., None] - grid.levels[:, None]).abs()
    nearest = grid.levels.gather(1, distances.argmin(dim=2))
    torch.testing.assert_close(grid.rounded(rows) * grid.step[:, None], nearest)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_finds_nearly_the_best_symmetric_step(bits, seed):
    rows, importance = draw(6, 9, seed=seed), worths(6, 9, seed=seed)
    grid = best_grid(rows, importance, bits, symmetric=True)
    for row in range(6):
        one = slice(row, row + 1)
        steps = torch.linspace(0.001, 1.0, 4000) * rows[row].abs().max()
        n = len(steps)
        bounds = grid.low[one].expand(n), grid.high[one].expand(n)
        tried = Grid(steps, *bounds, 1)
        least = error(rows[one].expand(n, 9), importance[one].expand(n, 9), tried).min()
        found = error(rows[one], importance[one], Grid(*(g[one] for g in grid[:3]), 1))
        assert found <= 1.15 * least + 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_the_search_finds_nearly_the_best_asymmetric_step_and_zero(seed):
    rows, importance = draw(4, 9, seed=seed) + 0.5, worths(4, 9, seed=seed)
    grid = best_grid(rows, importance, 3, symmetric=False)
    found = error(rows, importance, grid)
    for row in range(4):
        least = math.inf
        for low in range(-7, 1):
            steps = torch.linspace(0.01, 2.0, 2000)
            lows = torch.full_like(steps, low)
            one = rows[row].expand(2000, 9), importance[row].expand(2000, 9)
            least = min(least, float(error(*one, Grid(steps, lows, lows + 7, 1)).min()))
        assert found[row] <= 1.3 * least + 1e-6


def test_the_best_single_bit_is_the_mean_magnitude():
    rows = draw(6, 400)
    grid = best_grid(rows, torch.ones(6, 400), 1, symmetric=True)
    torch.testing.assert_close(grid.step, rows.abs().mean(dim=1))


def test_importance_weighs_the_single_bit():
    rows, importance = draw(6, 400), worths(6, 400)
    grid = best_grid(rows, importance, 1, symmetric=True)
    expected = (importance * rows.abs()).sum(dim=1) / importance.sum(dim=1)
    torch.testing.assert_close(grid.step, expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_search_is_never_worse_than_the_range(bits, symmetric):
    rows, importance = draw(8, 200), worths(8, 200)
    rows[:, 0] *= 5  # an outlier
    found = error(rows, importance, best_grid(rows, importance, bits, symmetric=symmetric))
    ranged = error(rows, importance, range_grid(rows, bits, symmetric=symmetric))
    assert (found <= ranged).all()
    assert bits > 4 or (found < 0.7 * ranged).any()


def test_a_row_nothing_depends_on_is_fitted_to_its_weights():
    rows = draw(2, 50)
    importance = torch.stack([torch.zeros(50), torch.ones(50)])
    grid = best_grid(rows, importance, 3, symmetric=True)
    alone = best_grid(rows, torch.ones(2, 50), 3, symmetric=True)
    assert grid.step.equal(alone.step)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_row_of_zeros_stays_zero(symmetric):
    for grid in (
        range_grid(torch.zeros(1, 5), 4, symmetric=symmetric),
        best_grid(torch.zeros(1, 5), torch.ones(1, 5), 4, symmetric=symmetric),
    ):
        assert torch.isfinite(grid.step).all()
        assert not grid.rounded(torch.zeros(1, 5)).any()


def best_partition(values, importance, k):
    """Return the least weighted error of k levels, by trying every way to cut the sorted values."""
    values, order = values.sort()
    importance = importance[order]
    n = len(values)

    def cost(start, end):
        part, worth = values[start:end], importance[start:end]
        mean = (worth * part).sum() / worth.sum()
        return float((worth * (part - mean).square()).sum())

    costs = {(i, j): cost(i, j) for i, j in itertools.combinations(range(n + 1), 2)}
    least = [0.0] + [math.inf] * n
    for _ in range(k):
        least = [math.inf] + [
            min(least[i] + costs[i, j] for i in range(j)) for j in range(1, n + 1)
        ]
    return least[n]


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_codebook_is_nearly_the_best_there_is(bits):
    ratios = []
    for seed in range(5):
        values, importance = draw(40, seed=seed).double(), worths(40, seed=seed).double() + 0.01
        levels = codebook(values, importance, 2**bits, seed=seed).double()
        assert len(levels) == 2**bits
        nearest = (values[:, None] - levels).square().amin(dim=1)
        ratios.append(
            float((importance * nearest).sum()) / best_partition(values, importance, 2**bits)
        )
    assert min(ratios) >= 0.999
    assert sum(ratios) / 5 < 1.25


def test_a_codebook_of_many_weights_is_nearly_that_of_all_of_them():
    weight = draw(20 * POINTS)
    levels = codebook(weight, torch.ones_like(weight), 8)
    # Lloyd's condition: each level is the mean of what is nearest to it
    labels = (weight[:, None] - levels).abs().argmin(dim=1)
    means = torch.stack([weight[labels == k].mean() for k in range(8)])
    torch.testing.assert_close(levels, means, rtol=0, atol=0.02)
    # the best quantiser of a normal distribution with 8 levels: Max, 1960
    nearest = (weight[:, None] - levels).square().amin(dim=1)
    assert float(nearest.mean()) == pytest.approx(0.03454, rel=0.03)


def test_weights_that_matter_have_levels_near_them():
    weight = torch.cat([torch.linspace(-1, 0, 50), torch.linspace(0, 1, 50)])
    importance = torch.cat([torch.full((50,), 1e-6), torch.ones(50)])
    levels = codebook(weight, importance, 8)
    assert (levels > 0).sum() >= 7


def test_a_codebook_of_few_different_weights_is_these_weights():
    weight = torch.tensor([[0.5, -1.0, 0.5], [0.0, -1.0, 0.5]])
    levels = codebook(weight, torch.ones(2, 3), 256)
    assert levels.tolist() == [-1.0, 0.0, 0.5]
    assert codebook(torch.zeros(2, 3), torch.ones(2, 3), 4).tolist() == [0.0]


def test_weights_that_nothing_depends_on_have_a_codebook_all_the_same():
    weight = draw(100)
    assert codebook(weight, torch.zeros(100), 4).equal(codebook(weight, torch.ones(100), 4))
