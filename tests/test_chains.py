from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from filterpress import codec
from filterpress.allocation import Rates, options
from filterpress.chains import (
    CUTS,
    chain,
    chain_options,
    kinds_of,
    n_weights,
    plans,
    suits,
)
from filterpress.cuts import Plan, as_filters, fit_part, fit_polyadic
from filterpress.representations import (
    Chain,
    integers_of,
    is_quantized,
    without_quantization,
)
from filterpress.statistics import Moments, measure
from filterpress.surgery import layers, merged, plain
from tests import networks
from tests.moments import apart, correlated, draw

FINE = 1e-12  # theta of steps that change nothing
LAYERS = {
    "plain": lambda: nn.Conv2d(6, 8, 3, padding=1),
    "strided": lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
    "uneven": lambda: nn.Conv2d(6, 8, (3, 2), (2, 1), (1, 0), (1, 2)),
    "dilated": lambda: nn.Conv2d(6, 8, 3, padding="same", dilation=2),
    "reflected": lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    "pointwise": lambda: nn.Conv2d(6, 8, 1, stride=2),
    "row": lambda: nn.Conv2d(6, 8, (1, 3), stride=2, padding=(0, 1)),
    "linear": lambda: nn.Linear(6, 8),
}
PAIRS = [
    pytest.param(kind, name, id=f"{kind}-{name}")
    for kind in CUTS
    for name, made in LAYERS.items()
    if suits(kind, made())
]
every_pair = pytest.mark.parametrize(("kind", "name"), PAIRS)


def layer_of(name, seed=0):
    """Make a layer whose weights are drawn."""
    layer = LAYERS[name]()
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.3 * draw(*parameter.shape, seed=seed + number))
    return layer


def moments_of(layer, seed=0):
    return correlated(len(layer.weight), layer.weight[0].numel(), seed=seed)


def images_of(layer):
    return draw(3, 6, seed=7) if isinstance(layer, nn.Linear) else draw(3, 6, 9, 9, seed=7)


def largest(kind, layer, moments):
    """Fit the chain of a kind that loses least, whatever it costs."""
    weight = as_filters(layer.weight.detach())
    if kind == "cp":
        rank = len(weight) * min(6, weight[0, 0].numel())
        return Plan(kind, (rank, 1), fit_polyadic(weight, moments, [rank], sweeps=60)[0])
    part = fit_part(weight, moments, CUTS[kind][0])
    ranks = (part.rows.shape[1], *([len(weight)] if kind == "tucker" else []))
    return Plan(kind, ranks, (part,))


@every_pair
def test_a_chain_of_full_rank_and_fine_steps_is_the_layer_itself(kind, name):
    layer = layer_of(name)
    moments = moments_of(layer)
    made = chain(layer, largest(kind, layer, moments), moments, FINE).eval()
    assert isinstance(made, Chain)
    assert len(made) == len(CUTS[kind]) + 1
    assert all(is_quantized(part) for part in made)
    x = images_of(layer)
    with torch.no_grad():
        expected, found = layer(x), made(x)
    slack = 0.1 if kind == "cp" else 0.03
    torch.testing.assert_close(found, expected, rtol=0, atol=slack * float(expected.std()))


@every_pair
def test_a_chain_multiplied_out_computes_the_same(kind, name):
    layer = layer_of(name)
    moments = moments_of(layer)
    plan = next(plans(kind, as_filters(layer.weight.detach()), moments))
    network = nn.Sequential(chain(layer, plan, moments, FINE)).eval()
    (one,) = plain(network)
    x = images_of(layer)
    assert type(one) is type(layer)
    assert one.weight.shape == layer.weight.shape
    assert (one.bias is None) == (layer.bias is None)
    if isinstance(layer, nn.Conv2d):
        assert (one.stride, one.padding) == (layer.stride, layer.padding)
        assert (one.dilation, one.padding_mode) == (layer.dilation, layer.padding_mode)
    with torch.no_grad():
        expected, found = network(x), one(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@every_pair
def test_the_damage_and_the_weights_predicted_are_those_of_the_chain(kind, name):
    layer = layer_of(name)
    moments = moments_of(layer)
    whole, *found = chain_options(layer, moments, [kind])
    assert whole.damage == 0
    assert whole.plan is None
    for option in found:
        network = nn.Sequential(chain(layer, option.plan, moments, FINE))
        n_made = sum(part.weight.numel() for part in layers(network).values())
        assert n_made == sum(block.n_weights for block in option.blocks)
        assert n_made == n_weights(option.plan, as_filters(layer.weight).shape)
        assert n_made < layer.weight.numel()
        delta = plain(network)[0].weight.detach() - layer.weight.detach()
        assert moments.error(delta) == pytest.approx(option.damage, rel=0.03, abs=1e-4)


def test_the_damage_predicted_is_the_change_of_the_outputs():
    images = networks.images(64, shape=(6, 8, 8))
    layer = layer_of("plain")
    network = nn.Sequential(layer, nn.Flatten(), nn.Linear(8 * 64, 3)).eval()
    seen = measure(network, images)["0"]
    seen = Moments(seen.inputs, torch.eye(8)[None])  # each output counts by itself
    _, *found = chain_options(layer, seen, list(CUTS))
    assert {option.plan.kind for option in found} == set(CUTS) - {"low-rank"}
    for option in found:
        made = chain(layer, option.plan, seen, FINE)
        with torch.no_grad():
            change = (made(images) - layer(images)).square().sum(dim=1).mean()
        assert 0.5 * float(change) == pytest.approx(option.damage, rel=0.05, abs=1e-4)


@every_pair
def test_more_weights_damage_less(kind, name):
    layer = layer_of(name)
    moments = moments_of(layer)
    weight = as_filters(layer.weight.detach())
    found = [(n_weights(plan, weight.shape), plan) for plan in plans(kind, weight, moments)]
    assert [n for n, _ in found] == sorted(n for n, _ in found)
    _, *offered = chain_options(layer, moments, [kind])
    damages = [option.damage for option in offered]
    assert all(more <= 1.05 * less for less, more in pairwise(damages))


@pytest.mark.parametrize("kind", ["svd", "tucker", "spatial", "separable"])
def test_chains_fitted_on_activations_damage_less_than_those_fitted_on_weights(kind):
    layer = layer_of("plain")
    moments = moments_of(layer)
    weight = as_filters(layer.weight.detach())
    alike = Moments(torch.eye(54)[None], torch.eye(8)[None])

    def damage(plan):
        made = nn.Sequential(chain(layer, plan, moments, FINE))
        return moments.error(plain(made)[0].weight.detach() - weight)

    pairs = list(zip(plans(kind, weight, moments), plans(kind, weight, alike), strict=True))
    ranks = [(own, Plan(kind, own.ranks, other.parts)) for own, other in pairs]
    same = [(a, b) for a, b in ranks if a.parts[0].rows.shape == b.parts[0].rows.shape][1:4]
    assert len(same) == 3
    assert all(damage(own) < damage(other) for own, other in same)


@pytest.mark.parametrize("kind", [kind for kind in CUTS if kind != "low-rank"])
@pytest.mark.parametrize("theta", [1e-3, 1e-2])
def test_rounding_a_chain_damages_and_costs_about_what_was_allocated(kind, theta):
    layer = nn.Conv2d(24, 32, 3, padding=1)
    moments = correlated(32, 24 * 9)
    *_, option = chain_options(layer, moments, [kind])
    allocated = Rates({"layer": [option]}).allocate(theta)
    made = chain(layer, option.plan, moments, theta)
    one = merged(without_quantization(made, rounded=True))
    done = moments.error(one.weight.detach() - layer.weight.detach())
    assert allocated.total_damage > 1.2 * option.damage
    assert done == pytest.approx(allocated.total_damage, rel=0.4)
    bits = sum(codec.estimate_bits(integers_of(part).int().numpy()) for part in made)
    side = sum(block.side_bits for block in option.blocks)
    assert bits + side == pytest.approx(8 * allocated.total_bytes, rel=0.3)


def test_only_what_suits_a_layer_is_offered():
    kinds = list(CUTS)
    wanted = {
        "plain": {"svd", "tucker", "cp", "spatial", "separable"},
        "row": {"svd", "tucker", "cp", "separable"},
        "pointwise": {"svd"},
        "linear": {"svd", "low-rank"},
    }
    for name, expected in wanted.items():
        assert {kind for kind in kinds if suits(kind, LAYERS[name]())} == expected
    assert not any(suits(kind, nn.Conv2d(8, 8, 3, groups=2)) for kind in kinds)


def test_a_layer_that_nothing_depends_on_is_offered_no_chain():
    layer = nn.Conv2d(6, 8, 3)
    dead = apart(torch.zeros(1, 54, 54), torch.zeros(8))
    assert len(chain_options(layer, dead, list(CUTS))) == 1


def test_projections_and_chains_of_one_linear_layer_cost_the_same():
    layer = nn.Linear(40, 30)
    moments = correlated(30, 40)
    _, *projected = options(layer, moments, max_groups=1)
    _, *chained = chain_options(layer, moments, ["low-rank"])
    damages = {option.rank: option.damage for option in projected}
    for option in chained:
        (rank,) = option.plan.ranks
        if rank in damages:
            assert option.damage == pytest.approx(damages[rank], rel=0.02)


def test_names_of_kinds_are_read_and_unknown_ones_refused():
    assert kinds_of("svd, cp", ("svd", "tucker", "cp")) == ("svd", "cp")
    for text in ("", "svd,", "spatial"):
        with pytest.raises(ValueError, match=r"^kinds must be among svd,cp, with commas, got"):
            kinds_of(text, ("svd", "cp"))
