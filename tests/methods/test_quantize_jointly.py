from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import nn

from filterpress.activations import Activated, ActivationQuantizer
from filterpress.annealing import COLD, Annealed, harden, soften, width
from filterpress.fitting import Goal
from filterpress.methods.quantize_jointly import (
    JointConfig,
    begin,
    input_quantizers,
    quantize_jointly,
)
from filterpress.package import Package, encode
from filterpress.representations import integers_of, is_quantized, latent_weight
from filterpress.retraining import RetrainConfig, fine_tune_
from filterpress.soft_levels import WARM, SoftActivations, SoftWeight
from filterpress.surgery import layers, plain
from tests import networks

IMAGES = networks.images(96)
QUICK = {"epochs": 2, "batch_size": 32, "precision": "float32", "images": 96}


def size(network):
    source = Package(network=network, model="", input_shape=networks.SHAPE, n_classes=5)
    return len(encode(source, network))


@cache
def trained(name="residual"):
    return networks.make(name)


def goal_of(share, name="residual"):
    return Goal(int(share * size(trained(name))), size)


def run(share=0.6, name="residual", **fields):
    network = trained(name)
    config = JointConfig(**QUICK | fields)
    return quantize_jointly(network, networks.Imitation(network), config, goal=goal_of(share, name))


@cache
def made(act_bits):
    return run(act_bits=act_bits, bits=4)


@cache
def started(act_bits=5, share=0.6):
    config = JointConfig(act_bits=act_bits, bits=4)
    return begin(trained(), IMAGES, config, goal_of(share), 0)


@pytest.mark.parametrize("act_bits", [0, 8])
def test_the_file_fits_and_holds_few_integers_and_many_zeros(act_bits):
    network, notes, changed = made(act_bits)
    assert size(network) <= goal_of(0.6).max_bytes
    zeros = total = 0
    for layer in layers(network).values():
        integers = integers_of(layer)
        assert len(integers.unique()) <= 2**4
        # what has been pruned is exactly zero, and stays so when training goes on
        assert ((integers == 0) == (latent_weight(layer) == 0)).all()
        zeros, total = zeros + int((integers == 0).sum()), total + integers.numel()
    assert notes["pruned"] == zeros / total
    assert 0.1 < notes["pruned"] < 0.95
    assert set(changed) == set(layers(trained()))
    assert all(2 <= change["bits"] <= 4 for change in changed.values())


def test_each_layer_reads_what_a_quantiser_of_its_own_rounds():
    rounded = [m for m in made(8).model.modules() if isinstance(m, Activated)]
    assert len(rounded) == len(layers(trained()))
    assert {m.quantizer.bits for m in rounded} == {8}
    assert not any(isinstance(m, Activated) for m in made(0).model.modules())
    assert not any(isinstance(m, SoftWeight | SoftActivations) for m in made(8).model.modules())


def test_a_network_that_cannot_fit_is_only_rounded():
    outcome = run(0.1)
    assert "price" not in outcome.notes
    assert outcome.notes["pruned"] == 1.0
    assert size(outcome.model) < size(trained())


def test_hard_quantisers_compute_what_soft_ones_do_in_evaluation():
    soft = soften(started().model, 4)
    with torch.no_grad():
        for parameter in soft.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            parameter.add_(0.02 * noise)
    hard = harden(soft)
    with torch.no_grad():
        expected, found = soft.eval()(IMAGES), hard(IMAGES)
        warm = soft.train()(IMAGES)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.std()))
    assert (warm - expected).abs().max() > 1e-2 * expected.std()
    assert all(is_quantized(layer) for layer in layers(hard).values())


def test_cooling_alone_leaves_the_rounded_network_as_it_was():
    start = started().model
    expected = {n: integers_of(layer) for n, layer in layers(start).items()}
    found = {n: integers_of(layer) for n, layer in layers(harden(soften(start, 4))).items()}
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_inputs_that_are_never_negative_have_their_zero_below_all_levels():
    quantizers = input_quantizers(trained(), IMAGES, 8)
    first, *others = quantizers.values()
    assert 0 < first.zero_point < 255
    assert [quantizer.zero_point for quantizer in others] == [0] * len(others)
    seen = {}
    hook = layers(trained())["classifier"].register_forward_pre_hook(
        lambda _, inputs: seen.update(x=inputs[0])
    )
    with torch.no_grad():
        trained()(IMAGES)
    hook.remove()
    x = seen["x"]
    error = (quantizers["classifier"](x) - x).square().mean().sqrt()
    assert 0 < error < quantizers["classifier"].scale / 2  # a level's rounding has 0.29
    assert quantizers["classifier"](x).max() > 0.9 * x.max()


@pytest.mark.parametrize(("n_bytes", "rises"), [(1100, True), (900, False)])
def test_the_price_follows_the_size_of_the_file(n_bytes, rises):
    student = soften(started().model, 4)
    soft = Annealed(student, 1e-3, 100, Goal(1000, lambda _: n_bytes))
    first = float(soft.price)
    penalties = [float(soft.cost().detach()) for _ in range(50)]
    assert (soft.price > 1.5 * first) == rises
    assert (soft.price < first / 1.5) == (not rises)
    form = next(m for m in student.modules() if isinstance(m, SoftWeight))
    assert COLD < form.temperature < WARM
    assert penalties[0] > 0


def test_the_penalty_is_the_expected_bits_at_the_price():
    student = soften(started().model, 4)
    soft = Annealed(student, 1e-3, 100, Goal(1000, lambda _: 1000))
    penalty = soft.cost()
    bits = 0.0
    for layer in layers(student).values():
        form = layer.parametrizations.weight[0]
        bits += float(form.bits(layer.parametrizations.weight.original)[0].detach())
    assert float(penalty.detach()) == pytest.approx(float(soft.price) * bits, rel=1e-4)
    penalty.backward()
    assert all(m.growth.grad.abs().sum() > 0 for m in student.modules() if hasattr(m, "growth"))


def test_retraining_keeps_quantisers_and_pruned_weights():
    network = copy.deepcopy(made(8).model)
    before = {n: integers_of(layer) for n, layer in layers(network).items()}
    quantizers = repr([m for m in network.modules() if isinstance(m, ActivationQuantizer)])
    config = RetrainConfig(epochs=2, batch_size=32, precision="float32", lr=0.1)
    fine_tune_(network, trained(), networks.Imitation(trained()), config, seed=0)
    changed = 0
    for name, layer in layers(network).items():
        integers = integers_of(layer)
        assert not integers[before[name] == 0].any()
        changed += int((integers != before[name]).sum())
    assert changed
    assert repr([m for m in network.modules() if isinstance(m, ActivationQuantizer)]) == quantizers


def test_the_plain_form_of_a_network_rounds_nothing():
    bare = plain(made(8).model)
    assert [*layers(bare)] == [*layers(trained())]
    assert not any(isinstance(m, Activated | ActivationQuantizer) for m in bare.modules())
    assert all(type(layer) in (nn.Conv2d, nn.Linear) for layer in layers(bare).values())


@pytest.mark.parametrize(("largest", "bits"), [(0, 2), (1, 2), (2, 3), (3, 3), (4, 4), (127, 8)])
def test_a_width_holds_its_integers_and_no_narrower_one_does(largest, bits):
    assert width(torch.tensor([0.0, -float(largest)])) == bits
    assert largest < 2 ** (bits - 1)
    assert bits == 2 or largest >= 2 ** (bits - 2)


@pytest.mark.parametrize(
    ("field", "value"), [("images", 1), ("bits", 1), ("bits", 9), ("act_bits", 1), ("act_bits", 9)]
)
def test_a_field_out_of_range_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*got {value}"):
        JointConfig(**{field: value})


def test_an_allocation_that_failed_before_is_not_tried_again():
    first = run(0.6, epochs=1)
    task = networks.Imitation(trained())
    again = goal_of(0.6)._replace(avoid=frozenset([str(first.notes["allocation"])]))
    second = quantize_jointly(trained(), task, JointConfig(**QUICK), goal=again)
    assert second.notes["allocation"] != first.notes["allocation"]
