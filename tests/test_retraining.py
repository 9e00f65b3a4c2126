from __future__ import annotations

import contextlib
import copy
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from filterpress.checkpoints import Checkpoint
from filterpress.package import Package, encode
from filterpress.progress import shown_by
from filterpress.representations import (
    coarsen_,
    is_quantized,
    latent_weight,
    levels_of,
    quantize_,
    share_levels_,
    step_of,
)
from filterpress.retraining import (
    RetrainConfig,
    constant_channels_held,
    fine_tune_,
    levels_paced,
    paces,
    retrain_quantized,
)
from filterpress.scratch import open_scratch
from filterpress.statistics import note_offsets_, recalibrate_
from filterpress.surgery import layers
from filterpress.tasks import calibration
from filterpress.training import fit, steps_per_epoch
from tests import networks
from tests.test_training import checksum

CONFIG = RetrainConfig(epochs=3, batch_size=32, lr=0.01, precision="float32")


@pytest.fixture(scope="module")
def teacher():
    return networks.make("residual")


@pytest.fixture(scope="module")
def task(teacher):
    return networks.Imitation(teacher)


@pytest.fixture
def network():
    made = networks.make("residual")
    for layer in layers(made).values():
        quantize_(layer, 0.4 * layer.weight.detach().flatten(1).abs().amax(dim=1))
    return made


def size(network):
    source = Package(network=network, model="", input_shape=networks.SHAPE, n_classes=5)
    return len(encode(source, network))


def retrain(network, teacher, task, **options):
    wanted = {"floor": 1.0, "reached": 0.0, "max_bytes": 10**6, "size": size, "seed": 0} | options
    return retrain_quantized(network, teacher, task, CONFIG, **wanted)


def test_retraining_brings_a_quantised_network_closer_to_its_teacher(network, teacher, task):
    before = copy.deepcopy(network.state_dict())
    result, report = retrain(network, teacher, task)
    images = networks.images(128, 7)
    with torch.no_grad():
        wanted = F.log_softmax(teacher(images), 1)
        distance = [
            float(
                F.kl_div(
                    F.log_softmax(n.eval()(images), 1),
                    wanted,
                    reduction="batchmean",
                    log_target=True,
                )
            )
            for n in (network, result)
        ]
    assert distance[1] < 0.8 * distance[0]
    assert report["epochs"] == 3
    assert report["improved"] is True
    assert report["trained_validation_accuracy"] == task.score(result.eval(), "validation")
    assert all(before[key].equal(value) for key, value in network.state_dict().items())


def test_steps_stay_and_integers_change(network, teacher, task):
    result, report = retrain(network, teacher, task)
    assert report["coarsened"] == 0
    moved = 0
    for name, layer in layers(result).items():
        step = step_of(layer)
        assert step.equal(step_of(network.get_submodule(name)))
        integers = layer.weight / step.view(-1, *[1] * (layer.weight.ndim - 1))
        torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-3)
        moved += int((layer.weight != network.get_submodule(name).weight).sum())
    assert moved > 0


def test_training_stops_at_the_floor(network, teacher, task):
    _, report = retrain(network, teacher, task, floor=0.0)
    assert report["epochs"] == 1


def test_a_retrain_that_made_it_worse_is_dropped(network, teacher, task):
    result, report = retrain(network, teacher, task, floor=0.0, reached=1.01)
    assert report["improved"] is False
    before = network.state_dict()
    assert all(before[key].equal(value) for key, value in result.state_dict().items())


def test_a_file_that_grew_is_made_to_fit_again(network, teacher, task):
    _, free = retrain(network, teacher, task, floor=0.0)
    limit = round(0.97 * size(network))
    result, report = retrain(network, teacher, task, floor=0.0, max_bytes=limit)
    assert free["coarsened"] == 0
    assert report["coarsened"] > 0
    assert size(result) <= limit


def test_batch_norm_is_measured_again_for_the_steps_that_made_it_fit(network, teacher, task):
    """By as much as coarser steps change what it sees."""
    trained, _ = retrain(network, teacher, task, floor=0.0)
    limit = round(0.97 * size(network))
    coarse, report = retrain(network, teacher, task, floor=0.0, max_bytes=limit)
    assert report["coarsened"] > 0
    images = calibration(task, 256)
    for model in (trained, coarse):
        note_offsets_(model, images)
    for name in ("stem.1", "blocks.1.second.1"):
        before, after = trained.get_submodule(name), coarse.get_submodule(name)
        torch.testing.assert_close(after.offset, before.offset, rtol=0, atol=1e-3)
        assert not torch.equal(after.running_mean, before.running_mean)


def test_the_same_seed_gives_the_same_network(network, teacher, task):
    first, second = (retrain(network, teacher, task, floor=0.0)[0].state_dict() for _ in range(2))
    assert all(first[key].equal(second[key]) for key in first)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_retrain_that_was_killed_ends_with_the_same_network(
    optimizer, network, teacher, task, tmp_path
):
    def ended(checkpoint=None):
        torch.manual_seed(len(list(tmp_path.iterdir())))  # the global state must not matter
        config = replace(CONFIG, optimizer=optimizer, lr=0.005)
        wanted = {"floor": 1.0, "reached": 0.0, "max_bytes": 10**6, "size": size, "seed": 0}
        return retrain_quantized(network, teacher, task, config, **wanted, checkpoint=checkpoint)

    @contextlib.contextmanager
    def killing(description, total):
        steps = itertools.count(1)

        def advance(n):
            if next(steps) == 2 * steps_per_epoch(task, CONFIG) + 2:
                raise KeyboardInterrupt

        yield advance

    @contextlib.contextmanager
    def counting(description, total):
        yield trained.append

    scratch, trained = open_scratch(str(tmp_path)), []
    with pytest.raises(KeyboardInterrupt), shown_by(killing):
        ended(Checkpoint(scratch, "retrain", share=1.0))
    with shown_by(counting):
        result, report = ended(Checkpoint(scratch, "retrain", share=1.0))
    expected, wanted = ended()
    n_steps = steps_per_epoch(task, CONFIG)
    assert trained == [2 * n_steps + 1] + [1] * (n_steps - 1)
    assert report == wanted
    assert report["best_epoch"] == 3
    assert checksum(result) == checksum(expected) != checksum(network)


def test_a_weight_learns_alike_in_any_unit(network, teacher, task):
    """Whatever number of steps the weights are made of, descent moves them by the same amounts."""
    config = RetrainConfig(epochs=1, batch_size=32, lr=1e-3, precision="float32")
    moved = []
    for factor in (0.0005, 0.002):
        student = copy.deepcopy(network)
        for module in student.modules():
            if is_quantized(module):
                coarsen_(module, torch.tensor(factor))  # so fine that rounding hardly counts
        before = [latent_weight(m) for m in student.modules() if is_quantized(m)]
        fit(student, task, config, seed=0, teacher=teacher, paces=paces(student))
        after = [latent_weight(m) for m in student.modules() if is_quantized(m)]
        moved.append([b - a for a, b in zip(before, after, strict=True)])
    for fine, coarse in zip(*moved, strict=True):
        torch.testing.assert_close(fine, coarse, rtol=0.1, atol=0.05 * float(fine.abs().max()))


def test_a_layer_with_finer_steps_learns_slower(network, teacher, task):
    student = copy.deepcopy(network)
    coarsen_(student.classifier, torch.tensor(1e-3))
    whole = latent_weight(student.classifier)
    fit(student, task, CONFIG, seed=0, teacher=teacher, paces=paces(student))
    slow = (latent_weight(student.classifier) - whole).abs().max()
    quick = copy.deepcopy(network)
    fit(quick, task, CONFIG, seed=0, teacher=teacher, paces=paces(quick))
    assert slow < 1e-2 * (latent_weight(quick.classifier) - whole).abs().max()


def zero_filters_(network, name, n=3):
    """Give the first filters of a layer steps so coarse that nothing is left of them."""
    layer = network.get_submodule(name)
    factor = 2.1 * latent_weight(layer).flatten(1).abs().amax(1) / step_of(layer)
    coarsen_(layer, torch.where(torch.arange(len(factor)) < n, factor, 1.0))
    recalibrate_(network, networks.images(64))
    assert not layer.weight[:n].any()


def gradients(network, teacher, name):
    images = networks.images(64)
    F.cross_entropy(network.train()(images), teacher(images).argmax(1)).backward()
    return network.get_submodule(name).parametrizations.weight.original.grad.clone()


@pytest.mark.parametrize("name", ["stem.0", "blocks.1.first.0", "blocks.1.second.0"])
def test_batch_norm_passes_no_gradient_to_filters_of_zeros(name, network, teacher):
    zero_filters_(network, name)
    free = gradients(copy.deepcopy(network), teacher, name)
    norms = free.flatten(1).norm(dim=1)
    assert norms[:3].max() > 100 * norms[3:].max()
    with constant_channels_held(network):
        held = gradients(network, teacher, name)
    assert not held[:3].any()
    assert held[3:].any()
    assert held[3:].equal(free[3:])
    network.zero_grad()
    assert gradients(network, teacher, name).equal(free)


def test_filters_of_zeros_do_not_cost_a_retrain_its_result(network, teacher, task):
    name = "blocks.1.second.0"
    zero_filters_(network, name, n=10)
    reached = task.score(network.eval(), "validation")
    limit = round(1.05 * size(network))
    result, report = retrain(network, teacher, task, reached=reached, max_bytes=limit)
    assert (report["improved"], report["coarsened"]) == (True, 0)
    assert report["trained_validation_accuracy"] > reached + 0.1
    before, after = (latent_weight(n.get_submodule(name)) for n in (network, result))
    torch.testing.assert_close(after[:10], before[:10], rtol=1e-3, atol=0)
    assert not after[10:].equal(before[10:])


def test_filters_of_zeros_go_on_learning_where_no_batch_norm_follows(network, teacher, task):
    zero_filters_(network, "classifier")
    result, _ = retrain(network, teacher, task)
    moved = (latent_weight(result.classifier) - latent_weight(network.classifier))[:3]
    assert (moved.abs().amax(1) > 0.01 * step_of(network.classifier)[:3]).all()
    assert result.classifier.weight[:3].any()


def test_a_network_without_filters_of_zeros_trains_as_ever(network, teacher, task):
    result, _ = retrain(network, teacher, task)
    fit(network, task, CONFIG, seed=0, teacher=teacher, paces=paces(network))
    expected = network.state_dict()
    assert all(expected[key].equal(value) for key, value in result.state_dict().items())


@pytest.mark.parametrize("margin", [-0.1, 1.0])
def test_an_impossible_margin_is_refused(margin):
    with pytest.raises(ValueError, match=r"margin must be in \[0, 1\), got"):
        RetrainConfig(margin=margin)


def test_the_rules_of_training_hold_here_too():
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        RetrainConfig(epochs=0)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("quantized", [False, True])
def test_weights_that_were_pruned_stay_zero_while_others_learn(quantized, optimizer, teacher, task):
    student = copy.deepcopy(teacher)
    pruned = {}
    for name, layer in layers(student).items():
        pruned[name] = (
            torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(3)) < 0.6
        )
        with torch.no_grad():
            layer.weight.masked_fill_(pruned[name], 0)
        if quantized:
            quantize_(layer, torch.full((len(layer.weight),), 0.02), dead_zone=0.2)
    before = {name: layer.weight.detach().clone() for name, layer in layers(student).items()}
    config = replace(CONFIG, optimizer=optimizer, lr=0.01 if optimizer == "sgd" else 0.002)
    fine_tune_(student, teacher, task, config, seed=0)
    for name, layer in layers(student).items():
        assert (layer.weight[pruned[name]] == 0).all()
        assert (latent_weight(layer)[pruned[name]] == 0).all()
        assert not layer.weight.equal(before[name])
        assert all(p._backward_hooks in (None, {}) for p in layer.parameters())


def test_levels_descend_to_the_means_of_their_targets_at_the_pace_of_plain_weights():
    """On a quadratic of curvature 1, descent at a rate of 0.5 halves the distance in each step."""
    layer, targets = torch.nn.Linear(600, 1, bias=False), torch.randn(1, 600)
    indices = (torch.arange(600) % 100 < 70).long().view(1, 600)  # 420 weights of 600 share one
    levels = torch.tensor([0.3, -0.2])
    share_levels_(layer, levels, indices)
    best = torch.stack([targets[indices == level].mean() for level in range(2)])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    with levels_paced(layer):
        for step in range(1, 5):
            optimizer.zero_grad()
            (0.5 * (layer.weight - targets).square().sum()).backward()
            optimizer.step()
            expected = best + (levels - best) * 0.5**step
            torch.testing.assert_close(levels_of(layer).detach(), expected)
    optimizer.zero_grad()
    (0.5 * (layer.weight - targets).square().sum()).backward()
    counts = torch.tensor([180.0, 420.0])
    plain_sum = counts * (levels_of(layer).detach() - best)  # what is left once they are let go
    torch.testing.assert_close(levels_of(layer).grad, plain_sum, rtol=1e-3, atol=1e-4)


def test_a_level_of_zero_has_no_gradient_and_others_have_that_of_differences():
    layer = torch.nn.Linear(6, 2, bias=False).double()
    share_levels_(layer, torch.tensor([-0.5, 0.0, 0.7]), torch.arange(12).view(2, 6) % 3)
    inputs, levels = torch.randn(5, 6).double(), levels_of(layer)

    def loss():
        return layer(inputs).tanh().square().sum()

    loss().backward()
    measured = []
    for level in range(3):
        sides = []
        for shift in (1e-6, -2e-6):
            with torch.no_grad():
                levels[level] += shift
                sides.append(float(loss()))
        with torch.no_grad():
            levels[level] += 1e-6
        measured.append((sides[0] - sides[1]) / 2e-6)
    assert float(levels.grad[1]) == 0
    for level in (0, 2):
        assert float(levels.grad[level]) == pytest.approx(measured[level], rel=1e-4)
