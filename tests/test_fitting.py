from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import nn

from filterpress.allocation import Option, Rates, block
from filterpress.errors import ModelError
from filterpress.fitting import ATTEMPTS, Goal, fingerprint, fit_budget, meet
from filterpress.grids import Levels


@pytest.mark.parametrize("target", [3.0, 117.0, 10_000.0])
def test_meet_finds_the_smallest_theta_that_meets_the_target(target):
    theta = meet(lambda theta: 1000 / theta, target)
    assert 1000 / theta <= target
    assert theta == pytest.approx(1000 / target, rel=2e-3)


def test_meet_returns_its_largest_theta_for_what_cannot_be_met():
    theta = meet(lambda theta: 5.0 + 1 / theta, 4.0)
    assert math.isfinite(theta)
    assert theta > 1e9


class Widths(nn.Module):
    """A network that is nothing but the widths of its layers."""

    def __init__(self, allocation):
        super().__init__()
        self.bits = tuple(option.bits for option in allocation.chosen.values())


def of(bits):
    """Make levels of a width; their number is all that matters here."""
    return Levels("symmetric", bits, torch.zeros(2**bits))


def widths(seed, n_layers=5):
    """Draw layers that can take one to eight bits, and what the file has besides."""
    draw = random.Random(seed)
    layers = {}
    for number in range(n_layers):
        n_weights, worth = draw.uniform(50, 2000), draw.uniform(0.1, 10)
        layers[str(number)] = [
            Option(0, None, (), worth * 4.0**-bits, n_bytes=n_weights * bits / 8, levels=of(bits))
            for bits in range(1, 9)
        ]
    overhead, error = draw.uniform(0, 1500), [draw.uniform(0.9, 1.2) for _ in layers]

    def size(network):
        chosen = zip(network.bits, layers.values(), error, strict=True)
        return round(overhead + sum(e * found[bits - 1].n_bytes for bits, found, e in chosen))

    return layers, size


def fit(layers, size, max_bytes, *, avoid=frozenset()):
    sizes = []

    def counted(network):
        sizes.append(size(network))
        return sizes[-1]

    rates = Rates(layers)
    found = fit_budget(rates, Widths, Goal(max_bytes, counted, avoid))
    assert found.n_bytes == size(found.model)
    assert len(sizes) <= ATTEMPTS + 1
    return found


def extremes(layers, size):
    """Return the sizes of the smallest and of the largest network."""
    ends = []
    for bits in (1, 8):
        network = nn.Module()
        network.bits = (bits,) * len(layers)
        ends.append(size(network))
    return ends


@pytest.mark.parametrize("share", [1.0, 0.9, 0.5, 0.2, 0.05, 0.001, 0.0])
@pytest.mark.parametrize("seed", range(20))
def test_a_file_of_whole_widths_fits_whenever_one_exists(seed, share):
    layers, size = widths(seed)
    smallest, largest = extremes(layers, size)
    max_bytes = round(smallest + share * (largest - smallest))
    found = fit(layers, size, max_bytes)
    assert found.n_bytes <= max_bytes
    if share == 1:
        assert found.n_bytes == largest


@pytest.mark.parametrize("seed", range(20))
def test_no_whole_widths_within_the_bytes_found_damage_much_less(seed):
    layers, size = widths(seed, n_layers=3)
    smallest, largest = extremes(layers, size)
    max_bytes = (smallest + largest) // 2
    found = fit(layers, size, max_bytes)
    least = math.inf
    for chosen in itertools.product(*layers.values()):
        network = nn.Module()
        network.bits = tuple(option.bits for option in chosen)
        if size(network) <= found.n_bytes:
            least = min(least, sum(option.damage for option in chosen))
    # a Lagrangian finds what lies on the convex hull: at equal bytes there is nothing better
    assert found.allocation.total_damage <= 1.3 * least


@pytest.mark.parametrize("seed", range(5))
def test_the_smallest_file_is_returned_where_none_fits(seed):
    layers, size = widths(seed)
    smallest, _ = extremes(layers, size)
    assert fit(layers, size, smallest - 1).n_bytes == smallest
    assert fit(layers, size, 1).n_bytes == smallest


def test_a_budget_that_does_not_bind_takes_one_attempt():
    layers, size = widths(0)
    built = []

    def build(allocation):
        built.append(allocation)
        return Widths(allocation)

    fit_budget(Rates(layers), build, Goal(10**6, size))
    assert len(built) == 1


def test_widths_that_failed_are_not_taken_again_whatever_theta_they_come_from():
    layers, size = widths(2)
    smallest, largest = extremes(layers, size)
    max_bytes = (smallest + largest) // 2
    seen, avoid = set(), frozenset()
    for _ in range(3):
        found = fit(layers, size, max_bytes, avoid=avoid)
        assert found.model.bits not in seen
        assert found.n_bytes <= max_bytes
        seen.add(found.model.bits)
        avoid |= {fingerprint(found.allocation)}
    one, other = (Rates(layers).allocate(theta) for theta in (1e-18, 1e-20))
    assert one.theta != other.theta
    assert fingerprint(one) == fingerprint(other)


def test_running_out_of_widths_is_said():
    layers, size = widths(3, n_layers=1)
    every = frozenset(fingerprint(Rates({"0": [option]}).allocate(1.0)) for option in layers["0"])
    with pytest.raises(ModelError, match="has failed before"):
        fit(layers, size, 500, avoid=every)


def rounded(n_weights, damage, seed):
    """An option whose weights are rounded to steps, on top of what it does to the outputs."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_weights // 10, 10, generator=draw)
    steps, noise = torch.ones(len(weight)), torch.ones_like(weight)
    return Option(0, None, (block(weight, steps, noise, 0.0, draw),), damage)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.98])
def test_a_budget_between_two_options_of_a_layer_is_spent_on_finer_steps(share):
    layers = {
        "large": [rounded(50_000, 0.0, 1), rounded(25_000, 200.0, 2)],
        "small": [rounded(10_000, 0.0, 3)],
    }
    rates = Rates(layers)

    def take(theta):
        return rates.allocate(theta)

    def smaller(allocation):
        return allocation.chosen["large"] is layers["large"][1]

    low, high = 1e-9, 1e9
    while high > low * (1 + 1e-6):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if smaller(take(middle)) else (middle, high)
    below, above = take(high).total_bytes, take(low).total_bytes
    assert above > 1.2 * below  # nothing that one theta gives lies between
    max_bytes = round(0.9 * (below + share * (above - below)) + 300)

    def build(allocation):
        network = nn.Module()
        network.n_bytes = round(0.9 * allocation.total_bytes + 300)
        return network

    found = fit_budget(rates, build, Goal(max_bytes, lambda network: network.n_bytes))
    assert 0.985 * max_bytes <= found.n_bytes <= max_bytes
    assert found.expected == pytest.approx(found.n_bytes, rel=0.02)
