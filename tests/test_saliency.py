from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from filterpress.errors import ModelError
from filterpress.fitting import Goal
from filterpress.saliency import (
    HALVINGS,
    HIGHEST,
    PruningConfig,
    kept_of,
    measure,
    rate_for,
    salience,
)
from filterpress.sparsity import prune_
from filterpress.surgery import layers
from tests import networks

every_network = pytest.mark.parametrize("name", networks.BUILDERS)


def config(**fields):
    return PruningConfig(precision="float32", **fields)


def task_for(network, noise=0.5):
    """Make a task in which the network is not perfect, so that all gradients are of some size."""
    task = networks.Imitation(network)
    images, labels = task.sets["train"]
    drawn = torch.rand(len(labels), generator=torch.Generator().manual_seed(0))
    task.sets["train"] = (images, torch.where(drawn < noise, (labels + 1) % 5, labels))
    return task


@every_network
def test_saliency_is_that_of_a_loop_over_batches(name):
    network = networks.make(name)
    task = task_for(network)
    found = measure(network, task, config(batch_size=100))  # the last batch has 56 images
    images, labels = task.sets["train"]
    for layer_name, layer in layers(network).items():
        total = torch.zeros_like(layer.weight)
        for batch, targets in zip(images.split(100), labels.split(100), strict=True):
            network.zero_grad()
            F.cross_entropy(network(batch), targets).backward()
            total += layer.weight.grad.abs()
        expected = total / total.square().sum().sqrt() * layer.weight.detach().abs()
        torch.testing.assert_close(found[layer_name], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("layer_name", ["mix", "head"])
def test_saliency_is_that_of_finite_differences(layer_name):
    network = networks.make("grouped")
    task = task_for(network)
    images, labels = task.sets["train"]
    exact = copy.deepcopy(network).double()
    weight = exact.get_submodule(layer_name).weight.detach()
    slopes = torch.zeros_like(weight)
    for place in range(weight.numel()):
        losses = []
        for change in (1e-5, -1e-5):
            weight.view(-1)[place] += change
            with torch.no_grad():
                losses.append(F.cross_entropy(exact(images.double()), labels))
            weight.view(-1)[place] -= change
        slopes.view(-1)[place] = (losses[0] - losses[1]).abs() / 2e-5
    expected = slopes / slopes.square().sum().sqrt() * weight.abs()
    found = measure(network, task, config(batch_size=256))[layer_name]
    torch.testing.assert_close(found.double(), expected, rtol=5e-3, atol=1e-4)


def test_the_network_measured_stays_as_it_is():
    network = networks.make("residual")
    task = task_for(network)
    before = copy.deepcopy(network.train().state_dict())
    measure(network, task, config())
    assert all(before[key].equal(value) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert network.training


def test_each_image_is_read_once():
    network = networks.make("residual")
    task, seen = task_for(network), []
    read = task.batches

    def batches(split, *args, **options):
        for images, labels in read(split, *args, **options):
            seen.extend([split] * len(images))
            yield images, labels

    task.batches = batches
    measure(network, task, config())
    assert seen == ["train"] * 256


def test_a_layer_that_is_not_used_has_no_saliency():
    network = networks.make("residual")
    network.idle = nn.Linear(3, 2)
    assert measure(network, task_for(network), config())["idle"].max() < 1e-8


def test_gradients_that_are_not_finite_are_refused():
    network = networks.make("residual")
    task = task_for(network)
    with torch.no_grad():
        network.classifier.weight.fill_(3e38)
    with pytest.raises(ModelError, match=r"gradients of .* must be finite"):
        measure(network, task, config())


def test_the_unit_of_a_layers_gradient_does_not_count():
    gradient, weight = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    one, other = salience(gradient, weight), salience(1e6 * gradient, weight)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(salience(torch.ones(50), weight), weight.abs() / 50**0.5)


def test_what_has_been_pruned_goes_before_weights_without_a_gradient():
    saliency = salience(torch.tensor([0.0, 0, 0, 1]), torch.tensor([3.0, 0, -2, 1]))
    assert saliency.argsort().tolist() == [1, 2, 0, 3]
    assert saliency[1] == 0
    assert salience(torch.zeros(2), torch.ones(2)).max() < 1e-8


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.77, 0.99])
def test_the_threshold_is_one_for_all_and_exact(rate):
    generator = torch.Generator().manual_seed(1)
    scores = [torch.rand(shape, generator=generator) * size for shape, size in SHAPES]
    kept = kept_of(scores, rate)
    flat = sorted((float(s), i) for i, score in enumerate(scores) for s in score.flatten())
    first = {(float(score.max()), i) for i, score in enumerate(scores)}
    gone = [item for item in flat if item not in first][: round(rate * len(flat))]
    expected = [[s for s, i in gone if i == number] for number in range(len(scores))]
    found = [score[~keep].sort().values.tolist() for score, keep in zip(scores, kept, strict=True)]
    assert found == expected
    assert [keep.shape for keep in kept] == [score.shape for score in scores]


SHAPES = [((4, 3, 3), 1.0), ((20,), 0.1), ((5, 7), 2.0), ((1,), 0.001)]


def test_the_highest_of_each_stays_even_if_it_is_zero():
    kept = kept_of([torch.zeros(4), torch.ones(2, 2)], 0.9)
    assert [int(keep.sum()) for keep in kept] == [1, 1]


def test_of_nothing_nothing_is_kept():
    assert kept_of([], 0.5) == []


def test_weights_of_some_columns_go():
    network = networks.make("residual")
    name = "blocks.0.first.0"
    before = network.get_submodule(name).weight.detach().clone()
    prune_(network, {name: (torch.arange(before.shape[1]) != 2).view(1, -1, 1, 1)})
    after = network.get_submodule(name).weight.detach()
    assert not after[:, 2].any()
    assert after[:, :2].equal(before[:, :2])
    assert after[:, 3:].equal(before[:, 3:])


def test_a_cubic_schedule_is_that_of_its_formula():
    rates = PruningConfig(steps=4, schedule="cubic").rates(0.8)
    assert rates == pytest.approx([0.8 * (1 - (1 - t / 4) ** 3) for t in (1, 2, 3, 4)])
    assert rates[-1] == pytest.approx(0.8)


def test_each_turn_of_a_geometric_schedule_removes_the_same_share_of_the_rest():
    rates = PruningConfig(steps=3, schedule="geometric").rates(0.875)
    left = [1.0, *(1 - rate for rate in rates)]
    assert [after / before for before, after in pairwise(left)] == pytest.approx([0.5] * 3)


def cut_weights(network, scores):
    def cut(rate):
        made = copy.deepcopy(network)
        prune_(made, dict(zip(scores, kept_of(list(scores.values()), rate), strict=True)))
        return made

    return cut


def left(network):
    return sum(int(layer.weight.count_nonzero()) for layer in layers(network).values())


def test_the_rate_is_the_least_with_which_the_file_fits():
    network = networks.make("residual")
    scores = {name: layer.weight.detach().abs() for name, layer in layers(network).items()}
    cut = cut_weights(network, scores)
    most = left(network) // 3
    rate = rate_for(Goal(most, left), cut, bits=8)
    finest = HIGHEST / 2**HALVINGS
    assert left(cut(rate)) <= most + 0.02 * left(network)  # rounding makes zeros, too
    assert left(cut(rate - 2 * finest)) > most


def test_a_file_that_fits_loses_nothing_and_one_that_cannot_loses_much():
    network = networks.make("residual")
    scores = {name: layer.weight.detach().abs() for name, layer in layers(network).items()}
    cut = cut_weights(network, scores)
    assert rate_for(Goal(10**6, left), cut, bits=4) == 0
    assert rate_for(Goal(0, left), cut, bits=4) == pytest.approx(HIGHEST)


def test_fewer_bits_leave_more_weights():
    network = networks.make("residual")
    scores = {name: layer.weight.detach().abs() for name, layer in layers(network).items()}

    def entropy(model):
        bits = 0.0
        for layer in layers(model).values():
            _, counts = layer.weight.unique(return_counts=True)
            share = counts / counts.sum()
            bits -= float((share * share.log2()).sum()) * layer.weight.numel()
        return math.ceil(bits / 8)

    goal = Goal(entropy(network) // 4, entropy)
    rates = [rate_for(goal, cut_weights(network, scores), bits) for bits in (2, 4, 8)]
    assert rates == sorted(rates)
    assert rates[0] < rates[2]


@pytest.mark.parametrize(
    ("field", "value"),
    [("rate", 1.0), ("rate", -0.1), ("bits", 1), ("steps", 0), ("schedule", "linear")],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be "):
        PruningConfig(**{field: value})
