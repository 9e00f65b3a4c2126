from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from filterpress.fitting import Goal
from filterpress.methods.learn_thresholds import (
    ThresholdConfig,
    cost_of_survivors,
    cut,
    learn_thresholds,
    soft_threshold,
    thresholded_,
)
from filterpress.package import Package, encode
from filterpress.sparsity import share_for
from filterpress.surgery import layers
from filterpress.training import FitConfig, fit, predictor
from tests import tiny

TASK = tiny.Patterns()
CONFIG = ThresholdConfig(epochs=2, learning_epochs=8, batch_size=64, precision="float32")


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


@pytest.fixture(scope="module")
def goal(trained):
    return Goal(size(trained) // 3, size)


@pytest.fixture(scope="module")
def outcome(trained, goal):
    return learn_thresholds(trained, TASK, CONFIG, goal=goal)


def double(*values):
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]


@pytest.mark.parametrize("beta", [0.7, 6.0, 25.0])
def test_derivatives_by_weight_threshold_and_sharpness_are_those_of_finite_differences(beta):
    weight, *parameters = double([-2.0, -1.1, -0.9, -0.3, 0.0, 0.2, 0.8, 1.2, 3.0], 1.0, beta)
    assert torch.autograd.gradcheck(soft_threshold, (weight, *parameters))


def test_a_threshold_without_end_of_sharpness_is_a_hard_one():
    weight = torch.linspace(-3, 3, 1000, dtype=torch.float64)
    for alpha in (0.1, 0.77, 2.0):
        hard = torch.where(weight.abs() > alpha, weight, 0.0)
        soft = soft_threshold(weight, torch.tensor(alpha), torch.tensor(1e7))
        torch.testing.assert_close(soft, hard, rtol=0, atol=1e-6)


def test_the_function_is_odd_and_never_enlarges_a_weight():
    weight = torch.linspace(-3, 3, 1001, dtype=torch.float64)
    soft = soft_threshold(weight, torch.tensor(1.0), torch.tensor(8.0))
    torch.testing.assert_close(soft, -soft.flip(0))
    assert bool((soft * weight >= 0).all())
    assert bool((soft.abs() <= weight.abs() + 0.02).all())


def test_what_survivors_cost_has_the_slopes_of_finite_differences():
    network = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).double()
    forms = [form.double() for form in thresholded_(network, 0.4, CONFIG).values()]
    cost = cost_of_survivors(network, 0.3, 2.0)
    parameters = [forms[0].common, *(form.own for form in forms), *(f.sharper for f in forms)]
    weights = [p for n, p in network.named_parameters() if n.endswith("original")]
    found = torch.autograd.grad(cost(), [*parameters, *weights])
    for parameter, gradient in zip([*parameters, *weights], found, strict=True):
        entry = parameter.data.view(-1)[:1]
        entry += 1e-6
        above = cost().item()
        entry -= 2e-6
        slope = (above - cost().item()) / 2e-6
        entry += 1e-6
        assert gradient.flatten()[0].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_a_cost_is_least_with_the_survivors_that_are_wanted():
    network = nn.Sequential(nn.Linear(40, 50))
    (form,) = thresholded_(network, 0.25, dataclasses.replace(CONFIG, start=1.0)).values()
    cost, costs = cost_of_survivors(network, 0.25, 1.0), []
    for moved in (-0.4, -0.2, 0.0, 0.2, 0.4):
        form.own.data.fill_(moved)
        costs.append(cost().item())
    assert min(costs) == costs[2] < 0.01
    assert costs[0] > costs[1] > costs[2] < costs[3] < costs[4]


def test_thresholds_start_where_an_even_one_would_meet_the_budget(trained):
    network = copy.deepcopy(trained)
    forms = thresholded_(network, 0.3, dataclasses.replace(CONFIG, start=1.0))
    weights = {name: layer.weight.detach() for name, layer in layers(trained).items()}
    for name, form in forms.items():
        deviation = float(weights[name].square().mean().sqrt())
        assert form.alpha.item() == pytest.approx(form.threshold * deviation, rel=1e-5)
    above = sum(int((weights[n].abs() > form.alpha).sum()) for n, form in forms.items())
    assert above == pytest.approx(0.3 * sum(w.numel() for w in weights.values()), abs=2)


def test_cutting_leaves_the_share_asked_for_and_what_the_network_computed_with(trained):
    network = copy.deepcopy(trained)
    forms = thresholded_(network, 0.3, CONFIG)
    forms["3"].own.data.fill_(1.0)
    computed = {name: layer.weight.detach().clone() for name, layer in layers(network).items()}
    plain, kept, factor = cut(network, 0.3)
    total = sum(keep.numel() for keep in kept.values())
    assert sum(int(keep.sum()) for keep in kept.values()) == round(0.3 * total)
    assert not any(parametrize.is_parametrized(module) for module in plain.modules())
    for name, layer in layers(plain).items():
        assert layer.weight.equal(torch.where(kept[name], computed[name], 0.0))
        above = layers(trained)[name].weight.abs() >= factor * forms[name].alpha * (1 - 1e-6)
        assert above.equal(kept[name])
    assert kept["3"].float().mean() < kept["6"].float().mean()


def test_learning_moves_thresholds_to_the_survivors_that_the_budget_leaves(outcome):
    assert outcome.notes["factor"] == pytest.approx(1.0, abs=0.15)
    share = 1 - outcome.notes["pruned"]
    counts = {n: layer.weight.numel() for n, layer in layers(outcome.model).items()}
    told = sum(counts[n] * (1 - entry["pruned"]) for n, entry in outcome.layers.items())
    assert share == pytest.approx(told / sum(counts.values()))


def test_as_many_weights_survive_as_the_budget_leaves_and_retraining_fills_none(
    outcome, trained, goal
):
    wanted = share_for(trained, goal)
    weights = [layer.weight for layer in layers(outcome.model).values()]
    left = sum(int(weight.count_nonzero()) for weight in weights)
    n_weights = sum(weight.numel() for weight in weights)
    assert 0.1 < wanted < 0.9
    assert left == pytest.approx(wanted * n_weights, abs=2)
    for name, layer in layers(outcome.model).items():
        kept = 1 - outcome.layers[name]["pruned"]
        assert int(layer.weight.count_nonzero()) == round(kept * layer.weight.numel())


def test_thresholds_differ_by_layer_and_accuracy_stays(outcome, trained):
    deviations = [entry["deviations"] for entry in outcome.layers.values()]
    assert max(deviations) > 1.2 * min(deviations)
    before, after = (TASK.score(predictor(n), "test") for n in (trained, outcome.model))
    assert after > before - 0.04
    assert outcome.notes["validation_accuracy"] == TASK.score(
        predictor(outcome.model), "validation"
    )


class Beside(nn.Module):
    """Two like layers side by side, of which the outputs hang on the first alone."""

    def __init__(self):
        super().__init__()
        self.used, self.useless = nn.Linear(64, 48), nn.Linear(64, 48)
        self.last = nn.Linear(48, 4)

    def forward(self, x):
        x = x.flatten(1)
        return self.last(F.relu(self.used(x) + 0 * self.useless(x)))


def test_the_threshold_of_a_layer_that_does_nothing_rises_above_that_of_one_like_it():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Beside()
    fit(network, TASK, FitConfig(epochs=6, batch_size=64, precision="float32"), seed=0)
    config = dataclasses.replace(CONFIG, learning_epochs=20)
    made = learn_thresholds(network, TASK, config, goal=Goal(size(network) // 3, size))
    deviations = {name: entry["deviations"] for name, entry in made.layers.items()}
    assert deviations["useless"] > 1.1 * deviations["used"]


def test_a_network_that_fits_as_it_is_comes_back(trained):
    made = learn_thresholds(trained, TASK, CONFIG, goal=Goal(10**6, size))
    assert made.notes["pruned"] == 0
    assert not made.layers
    assert made.model is not trained
    for one, other in zip(made.model.parameters(), trained.parameters(), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("learning_epochs", 0, "at least 1"),
        ("start", 0.0, "positive"),
        ("sharpness", -1.0, "positive"),
        ("strictness", float("inf"), "positive"),
        ("pace", 0.0, "positive"),
        ("epochs", 0, "at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(field, value, rule):
    with pytest.raises(ValueError, match=f"{field} must be {rule}, got {value}"):
        ThresholdConfig(**{field: value})
