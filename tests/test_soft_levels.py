from __future__ import annotations

import math

import pytest
import torch
from torch.nn.utils import parametrize

from filterpress.activations import ActivationQuantizer
from filterpress.rounding import code_lengths
from filterpress.soft_levels import SoftActivations, SoftWeight, _SoftRound, shares

UNITS = torch.linspace(-4.3, 4.3, 173, dtype=torch.float64)


def over_all_levels(units, temperature, threshold=0.5):
    """Average all integers that matter, each by its distance, with zero preferred."""
    levels = torch.arange(-12.0, 13.0, dtype=torch.float64)
    logits = -(units[:, None] - levels).square() + (2 * threshold - 1) * (levels == 0).double()
    return levels, torch.softmax(logits / temperature, dim=1)


def soft_weight(bits=4, rows=3, columns=5):
    """Make a weight that learns, in double precision; most of it is small."""
    generator = torch.Generator().manual_seed(1)
    step = 0.1 + torch.rand(rows, generator=generator, dtype=torch.float64)
    form = SoftWeight(step, 0.3, bits).double()
    units = torch.randn(rows, columns, generator=generator).double().pow(3)
    latent = form.right_inverse(units * step[:, None])
    with torch.no_grad():
        form.growth.copy_(0.2 * torch.randn(rows, generator=generator))
        form.level.copy_(torch.tensor(0.3))
    return form, latent.requires_grad_()


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.95])
@pytest.mark.parametrize("temperature", [0.05, 0.2])
def test_three_integers_average_as_all_of_them_do(temperature, threshold):
    levels, weights = over_all_levels(UNITS, temperature, threshold)
    found = shares(UNITS, temperature, torch.tensor(threshold, dtype=torch.float64))
    # what is left out is lightest where it is cold
    left_out = 2 * math.exp((2 * threshold - 3) / temperature) + 1e-12
    torch.testing.assert_close(found.mean, weights @ levels, rtol=0, atol=left_out)
    prices = torch.rand(13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = (weights * prices[levels.abs().long()]).sum(dim=1)
    torch.testing.assert_close(found.expected(prices), expected, rtol=0, atol=left_out)


def test_a_warm_average_is_nearly_the_number_itself():
    assert (shares(UNITS, 0.5).mean - UNITS).abs().max() < 0.06
    assert (shares(UNITS, 0.5).mean - UNITS.round()).abs().max() > 0.4


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.95])
def test_a_cold_average_is_rounding_with_a_threshold(threshold):
    found = shares(UNITS, 5e-3, torch.tensor(threshold, dtype=torch.float64)).mean
    rounded = UNITS.round() * (UNITS.abs() >= threshold)
    clear = ((UNITS.abs() - threshold).abs() > 0.02) & ((UNITS % 1 - 0.5).abs() > 0.02)
    torch.testing.assert_close(found[clear], rounded[clear], rtol=0, atol=1e-3)


def test_a_weight_has_the_gradients_of_finite_differences():
    form, latent = soft_weight()
    form.temperature = 0.3

    def weigh(latent, growth, level):
        given = {"growth": growth, "level": level}
        return torch.func.functional_call(form, given, (latent,))

    assert torch.autograd.gradcheck(weigh, (latent, form.growth, form.level))


def test_bits_are_code_lengths_averaged_over_all_levels():
    form, latent = soft_weight(columns=400)
    form.temperature = 0.2
    lengths = code_lengths(form.integers(latent)).double()

    def cost(latent, growth, level):
        units = (latent / form.typical / growth.exp()[:, None]).clamp(-7, 7).flatten()
        levels, weights = over_all_levels(units, 0.2, 0.5 + 0.5 * level.sigmoid())
        return (weights * lengths[levels.abs().long()]).sum()

    learned = (latent, form.growth, form.level)
    soft, hard = form.bits(latent)
    torch.testing.assert_close(soft, cost(*learned), rtol=1e-3, atol=0)
    assert float(hard) == float(lengths[form.integers(latent).abs().long()].sum())
    expected, found = (torch.autograd.grad(c, learned) for c in (cost(*learned), soft))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.05)
        assert one.abs().max() > 1


def test_bits_fall_with_larger_steps_and_a_higher_threshold():
    form, latent = soft_weight(columns=400)
    by_growth, by_level = torch.autograd.grad(form.bits(latent)[0], (form.growth, form.level))
    assert (by_growth < 0).all()
    assert by_level < 0


@pytest.mark.parametrize("bits", [2, 4])
def test_a_weight_is_rounded_to_few_integers_in_evaluation(bits):
    form, latent = soft_weight(bits, columns=100)
    form.eval()
    integers = form(latent).detach() / form.steps.detach()[:, None]
    torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-9)
    torch.testing.assert_close(integers, form.integers(latent), rtol=0, atol=1e-9)
    assert len(integers.round().unique()) <= 2**bits
    units = form.units(latent).detach()
    assert ((form.integers(latent) == 0) == (units.abs() < form.threshold)).all()
    assert integers.round().abs().max() == 2 ** (bits - 1) - 1


def test_a_weight_that_is_assigned_is_what_comes_out_where_steps_are_fine():
    layer = torch.nn.Linear(4, 3)
    weight = layer.weight.detach().clone()
    form = SoftWeight(torch.full((3,), 1e-3), 0.05, 12)
    parametrize.register_parametrization(layer, "weight", form)
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=0, atol=1e-3)
    assert not layer.weight.equal(weight)


@pytest.mark.parametrize("zero_point", [0, 3])
def test_activations_have_the_gradients_of_finite_differences(zero_point):
    quantizer = SoftActivations(ActivationQuantizer(0.25, zero_point, 3)).double()
    quantizer.temperature = 0.3
    x = torch.randn(40, generator=torch.Generator().manual_seed(2)).double().requires_grad_()

    def forward(x, log_scale):
        low, high = -zero_point, 7 - zero_point
        units = (x / log_scale.exp()).clamp(low, high)
        levels, weights = over_all_levels(units, 0.3)
        return (weights @ levels) * log_scale.exp()

    quantizer.train()
    scale = quantizer.log_scale
    upstream = torch.randn(40, generator=torch.Generator().manual_seed(3)).double()
    expected = torch.autograd.grad(forward(x, scale), (x, scale), upstream)
    soft = _SoftRound.apply(x, scale, -zero_point, 7 - zero_point, 0.3)
    torch.testing.assert_close(soft, forward(x, scale), rtol=0, atol=1e-3)
    found = torch.autograd.grad(soft, (x, scale), upstream)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)
    assert found[0].abs().max() > 0.5


def test_activations_in_evaluation_are_those_of_the_quantiser_they_become():
    start = ActivationQuantizer(0.25, 3, 3)
    quantizer = SoftActivations(start).eval()
    x = torch.randn(200, generator=torch.Generator().manual_seed(2))
    assert quantizer(x).equal(quantizer.hard()(x))
    torch.testing.assert_close(quantizer.hard()(x), start(x), rtol=1e-5, atol=1e-5)
    assert len(quantizer(x).unique()) == 8
