from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from filterpress import codec
from filterpress.allocation import SLOPE, Option, Rates, options, steps_of, unit_steps
from filterpress.fitting import meet
from filterpress.grids import Levels
from filterpress.statistics import Moments, measure
from filterpress.subspaces import channel_moments, group_filters, input_subspaces
from filterpress.surgery import layers
from tests import networks
from tests.moments import apart


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def white(layer, gain=None):
    """Return the statistics of a layer whose inputs are independent, with variance one."""
    groups = getattr(layer, "groups", 1)
    d = layer.weight[0].numel()
    gain = torch.ones(len(layer.weight)) if gain is None else gain
    return apart(torch.eye(d).expand(groups, d, d).clone(), gain)


def correlated(layer, seed=0):
    """Return the statistics of a layer whose inputs and outputs differ in what they matter."""
    d = layer.weight[0].numel()
    root = torch.randn(d, d, generator=generator(seed)) / math.sqrt(d)
    n = len(layer.weight)
    side = torch.randn(n, n, generator=generator(seed + 1)) / math.sqrt(n)
    outputs = side @ side.T + 0.1 * torch.eye(n)
    return Moments((root @ root.T + 0.1 * torch.eye(d))[None], outputs[None])


def low_rank_convolution(n_out, n_in, size, rank, seed=0):
    layer = nn.Conv2d(n_in, n_out, size, padding=size // 2)
    inner = torch.randn(n_out, rank, size * size, generator=generator(seed))
    basis = torch.randn(rank, n_in, generator=generator(seed + 1))
    with torch.no_grad():
        layer.weight.copy_(torch.einsum("ort,ri->oit", inner, basis).view_as(layer.weight) / 10)
    return layer


@pytest.fixture(scope="module")
def candidates():
    """Options of three layers of different kinds."""
    made = {
        "low": low_rank_convolution(12, 10, 3, 3),
        "full": nn.Conv2d(6, 12, 3),
        "linear": nn.Linear(24, 10),
    }
    return {
        name: options(layer, correlated(layer, seed), max_groups=2)
        for seed, (name, layer) in enumerate(made.items())
    }


def n_bytes_of(allocation):
    return allocation.total_bytes


def test_rounding_at_theta_costs_a_twelfth_of_it_a_weight():
    layer = nn.Conv2d(8, 16, 3)
    moments = white(layer, gain=torch.linspace(0.2, 3.0, 16))
    theta = 1e-6
    step = steps_of(layer.weight.detach(), moments, theta)[:, None, None, None]
    delta = torch.round(layer.weight.detach() / step) * step - layer.weight.detach()
    assert moments.error(delta) == pytest.approx(theta / 12 * delta.numel(), rel=0.1)


def test_a_row_that_does_nothing_has_a_finite_step():
    steps = unit_steps(torch.tensor([0.0, 1.0, 4.0]), torch.ones(3))
    assert torch.isfinite(steps).all()
    assert steps[0] > steps[1] > steps[2]
    assert torch.isfinite(unit_steps(torch.zeros(3), torch.zeros(3))).all()


def test_finer_steps_damage_less_and_none_at_the_end(candidates):
    rates = Rates(candidates)
    thetas = [10.0**k for k in range(-12, 1)]
    damages = [rates.allocate(theta).total_damage for theta in thetas]
    assert damages[0] < 1e-6 * damages[-1]
    assert all(fine <= coarse * 1.05 for fine, coarse in itertools.pairwise(damages))


@pytest.mark.parametrize(
    "finest",
    [-48, -100],
)
def test_coarser_steps_never_cost_more_bytes(candidates, finest):
    rates = Rates(candidates)
    sizes = [n_bytes_of(rates.allocate(math.exp(k / 4))) for k in range(finest, 8)]
    assert all(less <= more * 1.01 for more, less in itertools.pairwise(sizes))
    assert sizes[-1] < 0.2 * sizes[0]


@pytest.mark.parametrize("theta", [1e-6, 1e-4, 1e-3, 1e-2, 0.1])
def test_the_allocation_is_the_best_of_all_combinations(candidates, theta):
    # every option by itself: its bytes and its damage, without the others' company
    alone = {
        (name, number): Rates({name: [option]}).allocate(theta)
        for name, found in candidates.items()
        for number, option in enumerate(found)
    }

    def cost(picked):
        parts = [alone[key] for key in picked]
        return sum(p.total_damage for p in parts) + SLOPE * theta * sum(
            n_bytes_of(p) for p in parts
        )

    every = itertools.product(
        *[[(name, n) for n in range(len(found))] for name, found in candidates.items()]
    )
    best = min(every, key=cost)
    found = Rates(candidates).allocate(theta)
    total = found.total_damage + SLOPE * theta * n_bytes_of(found)
    assert total == pytest.approx(cost(best), rel=1e-4)
    for name, number in best:
        mine = SLOPE * theta * sum(found.n_bytes[name])
        assert mine == pytest.approx(SLOPE * theta * n_bytes_of(alone[name, number]), rel=1e-3)


def test_options_of_fixed_bytes_compete_with_blocks():
    whole = options(nn.Conv2d(6, 12, 3), white(nn.Conv2d(6, 12, 3)))[0]
    alone = Rates({"layer": [whole]}).allocate(1e-3)
    cost = alone.total_damage + SLOPE * 1e-3 * n_bytes_of(alone)
    for share in (0.99, 1.01):
        n_bytes = 0.5 * share * cost / (SLOPE * 1e-3)
        levels = Levels("codebook", 3, torch.arange(8.0))
        fixed = Option(0, None, (), 0.5 * cost, n_bytes=n_bytes, levels=levels)
        found = Rates({"layer": [whole, fixed]}).allocate(1e-3)
        assert found.chosen["layer"].bits == (3 if share < 1 else 0)
        if share < 1:
            assert found.damage == {"layer": pytest.approx(fixed.damage)}
            assert n_bytes_of(found) == pytest.approx(fixed.n_bytes)


def test_a_layer_of_low_rank_is_projected_to_it_and_one_of_full_rank_is_not(candidates):
    found = Rates(candidates).allocate(1e-4).chosen
    assert 3 <= found["low"].rank <= 4
    assert found["full"].rank == 0


@pytest.mark.parametrize("target", [600, 1200, 2000])
def test_a_budget_is_met_and_used(candidates, target):
    rates = Rates(candidates)
    spent = n_bytes_of(rates.allocate(meet(lambda t: n_bytes_of(rates.allocate(t)), target)))
    assert 0.93 * target <= spent <= target


@pytest.mark.parametrize("bits", [1.5, 3.0, 5.0])
def test_estimated_bytes_are_those_of_the_file(bits):
    layer = nn.Conv2d(32, 64, 3)
    laplace = np.random.default_rng(0).laplace(size=tuple(layer.weight.shape))
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(laplace * 0.05).float())
    moments = white(layer, gain=torch.linspace(0.5, 2.0, 64))
    rates = Rates({"layer": options(layer, moments)[:1]})
    # of a Laplacian with deviation s, rounded to steps of d, about log2(e s sqrt(2) / d) bits
    theta = 0.5 * (0.05 * math.sqrt(2) * math.e * math.sqrt(2) / 2**bits) ** 2
    allocation = rates.allocate(theta)
    weight = layer.weight.detach().numpy()
    steps = codec.snap(steps_of(layer.weight.detach(), moments, theta).numpy())
    bias = np.random.default_rng(1).normal(size=64).astype(np.float32)
    tensors = {
        "layer.weight": codec.quantize(weight, steps),
        "layer.bias": codec.quantize(bias, codec.snap(1 / 64)),
    }
    real = len(codec.encode(tensors, b"", {})) - len(codec.encode({}, b"", {}))
    assert n_bytes_of(allocation) == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("theta", [1e-6, 1e-3])
def test_bits_of_a_pruned_layer_are_the_entropy_of_all_its_integers(share, theta):
    """A sample of few survivors would show fewer integers than there are."""
    layer = nn.Conv2d(128, 128, 3)
    with torch.no_grad():
        layer.weight[torch.rand(layer.weight.shape, generator=generator()) >= share] = 0
    moments = white(layer)
    (whole,) = options(layer, moments, max_groups=0)
    expected_bytes, damage = Rates({"layer": [whole]}).blocks_at(theta)
    steps = steps_of(layer.weight.detach(), moments, theta)[:, None, None, None]
    exact = layer.weight.detach() / steps
    integers = exact.round()
    shares = integers.unique(return_counts=True)[1].double() / integers.numel()
    bits = integers.numel() * float(torch.special.entr(shares).sum() / math.log(2))
    assert float(8 * expected_bytes) - whole.blocks[0].side_bits == pytest.approx(bits, rel=0.04)
    assert float(damage) == pytest.approx(0.5 * moments.error((exact - integers) * steps), rel=0.1)


def test_grouped_convolutions_are_offered_no_projection():
    layer = nn.Conv2d(8, 12, 3, groups=4)
    assert [option.rank for option in options(layer, white(layer))] == [0]


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(16, 16, 3), nn.Conv2d(16, 32, 1), nn.Linear(30, 20)], ids=str
)
def test_every_projection_on_offer_needs_fewer_weights(layer):
    whole, *rest = options(layer, correlated(layer))
    assert whole.rank == 0
    assert whole.damage == 0
    assert rest
    for option in rest:
        n_weights = sum(block.n_weights for block in option.blocks)
        assert n_weights < layer.weight.numel()
        n_out, n_in = layer.weight.shape[:2]
        taps = layer.weight[0, 0].numel()
        expected = option.rank * (option.groups * n_in + n_out * taps)
        assert n_weights == expected


def test_a_layer_that_divides_into_no_groups_is_offered_none():
    layer = nn.Conv2d(16, 15, 3)
    assert {option.groups for option in options(layer, white(layer))} == {1}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 3])
def test_all_subspaces_together_reproduce_the_layer(size, groups):
    layer = nn.Conv2d(6, 8, size)
    moments = correlated(layer)
    weight = layer.weight.detach()
    channels = channel_moments(weight, moments)
    found = input_subspaces(weight, moments.outputs[0], channels, groups)
    rows = weight.flatten(2)[found.order].view(groups, -1, 6, size * size)
    inner = torch.einsum("goit,gri->gort", rows, found.bases @ channels.second)
    back = torch.einsum("gort,gri->goit", inner, found.bases).flatten(0, 1)
    torch.testing.assert_close(back, weight.flatten(2)[found.order], rtol=1e-2, atol=1e-3)


def test_projected_channels_have_power_one():
    layer = nn.Conv2d(6, 8, 3)
    moments = correlated(layer)
    channels = channel_moments(layer.weight.detach(), moments)
    found = input_subspaces(layer.weight.detach(), moments.outputs[0], channels)
    covariance = found.bases[0] @ channels.second @ found.bases[0].T
    torch.testing.assert_close(covariance, torch.eye(6), rtol=0, atol=5e-3)


@pytest.mark.parametrize("rank", [0, 1, 3, 5])
@pytest.mark.parametrize(
    "layer", [nn.Conv2d(6, 8, 3), nn.Conv2d(6, 4, 1), nn.Linear(6, 9)], ids=["3x3", "1x1", "linear"]
)
def test_energies_are_the_damage_of_leaving_rows_out_of_white_inputs(layer, rank):
    weight = layer.weight.detach()
    moments = white(layer, gain=torch.linspace(0.5, 2.0, len(weight)))
    found = input_subspaces(weight, moments.outputs[0], channel_moments(weight, moments))
    basis = found.bases[0, :rank]
    flat = weight if weight.ndim == 2 else weight.transpose(1, -1)
    kept = flat @ basis.T @ basis
    left = (kept if weight.ndim == 2 else kept.transpose(1, -1)) - weight
    energy = 0.5 * float(found.energies[0, rank:].sum())
    assert energy == pytest.approx(moments.error(left), rel=1e-2, abs=1e-6)


def test_no_other_projection_of_a_rank_damages_less():
    layer = nn.Conv2d(6, 8, 1)
    moments = correlated(layer)
    weight = layer.weight.detach()
    found = input_subspaces(weight, moments.outputs[0], channel_moments(weight, moments))
    least = 0.5 * float(found.energies[0, 2:].sum())
    root = torch.linalg.cholesky(moments.inputs[0])
    for seed in range(20):
        basis = torch.linalg.qr(torch.randn(6, 2, generator=generator(seed))).Q.T  # in white space
        white_rows = weight.flatten(1) @ root
        delta = torch.linalg.solve(root.T, (white_rows @ basis.T @ basis - white_rows).T).T
        # the least-squares weights for this projection
        damage = moments.error(delta.view_as(weight))
        assert damage >= least * (1 - 1e-3)


def planted_filters(groups, seed):
    """Draw 8 filters from each of some subspaces of four dimensions in sixteen, in any order."""
    bases = [torch.randn(4, 16, generator=generator(1000 * seed + g)) for g in range(groups)]
    planted = torch.arange(groups).repeat(8)[torch.randperm(groups * 8, generator=generator(seed))]
    inner = torch.randn(groups * 8, 9, 4, generator=generator(100 + seed))
    return torch.stack([rows @ bases[g] for rows, g in zip(inner, planted, strict=True)]), planted


def partition(labels):
    return {tuple((labels == g).nonzero().flatten().tolist()) for g in labels.unique()}


@pytest.mark.parametrize("groups", [2, 4])
def test_filters_that_live_in_the_same_subspace_are_grouped(groups):
    found = 0
    for seed in range(10):
        filters, planted = planted_filters(groups, seed)
        labels = group_filters(filters, groups, seed=0)
        assert labels.bincount().tolist() == [8] * groups
        found += partition(labels) == partition(planted)
    assert found >= 6  # by chance, one in a thousand and fewer


def test_options_are_the_same_for_the_same_seed():
    network, images = networks.make("residual"), networks.images(20)
    moments = measure(network, images)
    layer = layers(network)["blocks.1.second.0"]
    first, second = (
        Rates({"a": options(layer, moments["blocks.1.second.0"], seed=4)}).allocate(1e-3)
        for _ in range(2)
    )
    assert first.n_bytes == second.n_bytes
    assert first.damage == second.damage


def test_a_layer_that_nothing_depends_on_is_allocated_without_nan():
    layer = nn.Conv2d(8, 8, 3)
    dead = apart(torch.zeros(1, 72, 72), torch.zeros(8))
    allocation = Rates({"dead": options(layer, dead, max_groups=1)}).allocate(1e-3)
    assert math.isfinite(allocation.total_damage)
    assert math.isfinite(n_bytes_of(allocation))
    assert allocation.damage == {"dead": pytest.approx(0, abs=1e-6)}
