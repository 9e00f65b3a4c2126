from __future__ import annotations

import itertools

import pytest
import torch

from filterpress.fitting import Goal
from filterpress.methods.prune_by_macs import (
    MacsConfig,
    allowances,
    ladder,
    prune_by_macs,
    thresholds,
)
from filterpress.package import Package, count, encode, macs_by_layer
from filterpress.sparsity import share_for
from filterpress.surgery import layers
from filterpress.training import FitConfig, fit, predictor
from tests import tiny

TASK = tiny.Patterns()
CONFIG = MacsConfig(epochs=2, batch_size=64, precision="float32")


def size(network):
    source = Package(network=network, model="", input_shape=TASK.input_shape, n_classes=4)
    return len(encode(source, network))


@pytest.fixture(scope="module")
def trained():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = tiny.network(TASK.input_shape, TASK.n_classes)
    fit(network, TASK, FitConfig(epochs=6, batch_size=64, precision="float32"), seed=0)
    return network


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("allowance", [0.0, 0.01, 0.1, 0.35, 0.8, 0.999])
@pytest.mark.parametrize("ties", [False, True])
def test_a_threshold_is_the_largest_whose_error_is_allowed(allowance, ties):
    weight = normal(7, 9)
    weight = (weight * 3).round() / 3 if ties else weight
    power = float(weight.double().square().mean())
    found = ladder(weight).threshold(allowance)
    best = 0.0
    for candidate in weight.abs().unique().tolist():
        gone = weight[weight.abs() <= candidate].double()
        if float(gone.square().sum()) / weight.numel() <= allowance * power:
            best = max(best, candidate)
    assert found == best


def test_more_is_pruned_with_more_allowance():
    rungs = ladder(normal(400))
    found = [rungs.threshold(allowance / 50) for allowance in range(50)]
    assert found == sorted(found)
    assert found[0] == 0 < found[1] < found[-1] < float(rungs.magnitudes[-1])


def test_weights_that_are_zero_cost_nothing():
    assert ladder(torch.zeros(5)).threshold(0.5) == 0
    rungs = ladder(torch.tensor([0.0, 0.0, 1.0, 2.0]))
    assert rungs.errors.tolist() == pytest.approx([0, 0, 0.2, 1])


def test_allowances_follow_the_share_of_multiply_accumulates():
    macs = {"a": 10.0, "b": 20.0, "c": 30.0}
    small = allowances(macs, 1e-6)
    assert small["b"] / small["a"] == pytest.approx(2, rel=1e-4)
    assert small["c"] / small["a"] == pytest.approx(3, rel=1e-4)
    assert small["b"] == pytest.approx(1e-6, rel=1e-4)
    # what may go over what must stay is epsilon times the cost, however large
    for epsilon in (0.3, 5.0, 1e5):
        for name, allowed in allowances(macs, epsilon).items():
            assert allowed < 1
            assert allowed / (1 - allowed) == pytest.approx(epsilon * macs[name] / 20, rel=1e-6)


def test_of_like_layers_the_dearer_one_is_pruned_harder():
    weights = {"cheap": normal(4000), "dear": 3 * normal(4000, seed=1)}
    found = thresholds(weights, {"cheap": 1.0, "dear": 4.0}, dict.fromkeys(weights, 1), 3000)
    kept = {n: float((w.abs() > found[n]).float().mean()) for n, w in weights.items()}
    assert kept["dear"] < 0.7 * kept["cheap"]
    # each layer keeps 1 / (1 + x) of its power, and a weight's worth at most besides
    left = {n: w[w.abs() > found[n]].square().sum() / w.square().sum() for n, w in weights.items()}
    excess = {n: float(1 / share - 1) for n, share in left.items()}
    assert excess["dear"] / excess["cheap"] == pytest.approx(4, rel=0.02)


@pytest.mark.parametrize("most", [40.0, 120.0, 300.0])
def test_epsilon_is_the_smallest_that_leaves_no_more(most):
    weights = {"a": normal(10, 11), "b": normal(50, seed=2), "c": normal(30, seed=3)}
    macs, worth = {"a": 9.0, "b": 2.0, "c": 5.0}, {"a": 2.0, "b": 1.0, "c": 3.0}

    def left(found):
        return sum(worth[n] * int((w.abs() > found[n]).sum()) for n, w in weights.items())

    found = thresholds(weights, macs, worth, most)
    assert left(found) <= most
    # of all epsilons, in steps of a percent, those that leave no more leave no more than this
    grid = [1e-4 * 1.01**k for k in range(3000)]
    rungs = {n: ladder(w) for n, w in weights.items()}
    every = [
        left({n: rungs[n].threshold(a) for n, a in allowances(macs, epsilon).items()})
        for epsilon in grid
    ]
    assert all(later <= before for before, later in itertools.pairwise(every))
    assert left(found) >= max(n for n in every if n <= most)


def test_as_many_weights_stay_as_the_budget_leaves_and_retraining_fills_none(trained):
    goal = Goal(size(trained) // 3, size)
    made = prune_by_macs(trained, TASK, CONFIG, goal=goal)
    weights = [layer.weight for layer in layers(made.model).values()]
    total = sum(weight.numel() for weight in weights)
    wanted = share_for(trained, goal)
    assert 0.1 < wanted < 0.9
    assert sum(int(w.count_nonzero()) for w in weights) == pytest.approx(wanted * total, abs=8)
    assert made.notes["pruned"] == pytest.approx(1 - wanted, abs=8 / total)
    for name, layer in layers(made.model).items():
        before = layers(trained)[name].weight
        stays = before.abs() > made.layers[name]["threshold"]
        assert (layer.weight != 0).equal(stays)
        assert not layer.weight.equal(before * stays)  # it has been trained
    before, after = (TASK.score(predictor(network), "test") for network in (trained, made.model))
    assert after > before - 0.04


@pytest.mark.parametrize("macs", [0.5, 0.2])
def test_as_many_multiply_accumulates_stay_as_are_asked_for(trained, macs):
    config = MacsConfig(epochs=1, batch_size=64, precision="float32", macs=macs)
    made = prune_by_macs(trained, TASK, config, goal=Goal(10**6, size))
    _, total = count(trained, TASK.input_shape)
    left = sum(entry["macs"] for entry in made.layers.values())
    assert left == pytest.approx(
        sum(
            n * float((layers(made.model)[name].weight != 0).float().mean())
            for name, n in macs_by_layer(trained, TASK.input_shape).items()
        )
    )
    assert macs - 0.02 < left / total <= macs
    assert made.notes["macs"] == pytest.approx(left / total)


def test_a_network_that_fits_as_it_is_comes_back(trained):
    made = prune_by_macs(trained, TASK, CONFIG, goal=Goal(10**6, size))
    assert made.notes == {"pruned": 0.0}
    assert not made.layers
    for one, other in zip(made.model.parameters(), trained.parameters(), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("macs", [-0.1, 1.0])
def test_settings_that_cannot_be_are_refused(macs):
    with pytest.raises(ValueError, match=r"macs must be in \(0, 1\), or 0 for the budget, got"):
        MacsConfig(macs=macs)
