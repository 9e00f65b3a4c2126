from __future__ import annotations

import pytest
import torch
from torch import nn

from filterpress.allocation import LEFT
from filterpress.forms import Templates
from filterpress.lines import standardise
from filterpress.representations import form_of, has_linear_kernels, latent_weight, roundings
from filterpress.rounding import DAMPING
from filterpress.statistics import Moments
from filterpress.templates import (
    fit_alone,
    fit_kernels,
    index_lengths,
    look,
    multiply_compensated_,
    round_compensated,
    steps_of_kernels,
)

FREE = 1e-12  # of theta: bits count for nothing
O, I, T = 4, 3, 9  # noqa: E741  # the letters of the shapes


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moments_of(groups=1, seed=0):
    """Draw correlated inputs with a mean, as after a ReLU, and outputs of different gain."""
    seen = draw(groups, 400, I * T, seed=seed) @ draw(groups, I * T, I * T, seed=seed + 1) * 0.3
    seen = (seen + draw(groups, 400, 1, seed=seed + 2)).relu()
    outputs = torch.diag_embed(torch.rand(groups, O // groups) + 0.5)
    return Moments(seen.mT @ seen / 400, outputs)


def damped(second):
    power = second.diagonal().double()
    ridge = DAMPING * power.mean() + 1e-5 * power.max()
    return second.double() + ridge * torch.eye(len(second))


@pytest.fixture
def templates():
    return standardise(draw(5, T, seed=7))


def lstsq(kernel, template, metric):
    """Solve ``a`` and ``b`` by torch's least squares; return them and what is left."""
    half = torch.linalg.cholesky(metric.double())  # M = half half^T
    basis = torch.stack([template, torch.ones(T)]).double()  # (2, T)
    solved = torch.linalg.lstsq((basis @ half).T, (kernel.double() @ half)[:, None]).solution[:, 0]
    error = (kernel.double() - solved @ basis) @ half
    return *solved.tolist(), float(error.square().sum())


def test_factor_and_offset_are_those_of_least_squares_for_the_best_template(templates):
    kernels, half = draw(2, 6, T), draw(2, T, T, seed=3)
    metric = half @ half.mT + 0.1 * torch.eye(T)
    fit = fit_kernels(kernels, templates, metric, torch.zeros(()))
    for group in range(2):
        for row in range(6):
            tried = [lstsq(kernels[group, row], t, metric[group]) for t in templates]
            left = [one[2] for one in tried]
            best = left.index(min(left))
            assert fit.indices[group, row] == best
            found = [fit.factors[group, row], fit.offsets[group, row], fit.left[group, row]]
            assert [float(f) for f in found] == pytest.approx(tried[best], rel=1e-3, abs=1e-4)


def test_a_bonus_can_outweigh_the_fit(templates):
    kernels, metric = draw(1, 6, T), torch.eye(T)[None]
    bonus = torch.tensor([0.0, 0.0, 1e6, 0.0, 0.0])
    assert (fit_kernels(kernels, templates, metric, bonus).indices == 2).all()


def test_kernels_that_are_multiples_of_templates_leave_nothing(templates):
    indices = torch.arange(O * I).view(O, I) % 5
    factors, offsets = draw(O, I), draw(O, I, seed=1)
    kernels = factors[..., None] * templates[indices] + offsets[..., None]
    seen = look(kernels.view(O, I, 3, 3), moments_of())
    fit = fit_alone(seen, templates)
    assert fit.indices.equal(indices)
    torch.testing.assert_close(fit.factors, factors, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fit.offsets, offsets, rtol=1e-3, atol=1e-3)
    scale = (kernels.flatten(1) @ moments_of().inputs[0] * kernels.flatten(1)).sum()
    assert float(fit.left.sum()) < 1e-4 * float(scale)


def test_a_flat_kernel_has_no_factor(templates):
    seen = look(torch.full((O, I, 3, 3), 0.7), moments_of())
    fit = fit_alone(seen, templates)
    torch.testing.assert_close(fit.factors, torch.zeros(O, I), rtol=0, atol=1e-4)
    torch.testing.assert_close(fit.offsets, torch.full((O, I), 0.7), rtol=1e-4, atol=0)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_metric_is_what_later_channels_cannot_make_up_for(groups):
    moments = moments_of(groups)
    seen = look(draw(O, I, 3, 3), moments)
    assert seen.kernels.shape == (I, groups, O // groups, T)
    for group, inputs in enumerate(moments.inputs):
        second = damped(inputs)
        for channel in range(I):
            here, later = slice(channel * T, (channel + 1) * T), slice((channel + 1) * T, None)
            solved = torch.linalg.solve(second[later, later], second[later, here])
            expected = second[here, here] - second[here, later] @ solved
            torch.testing.assert_close(
                seen.metric[channel, group].double(), expected, rtol=1e-2, atol=1e-3
            )


def kernels_of(rounded, templates, steps):
    factors = rounded.factor_integers * steps[0][:, None]
    offsets = rounded.offset_integers * steps[1][:, None]
    return factors[..., None] * templates[rounded.indices] + offsets[..., None]


def test_later_kernels_make_up_for_the_errors_of_earlier_ones(templates):
    weight, moments = draw(O, I, 3, 3, seed=5), moments_of()
    seen = look(weight, moments)
    steps = torch.full((O,), 0.2), torch.full((O,), 0.1)
    rounded = round_compensated(seen, templates, fit_alone(seen, templates), steps, FREE)
    found = kernels_of(rounded, templates, steps)
    # slow, and plain: fit a kernel, then solve all weights to come by least squares
    second, left = damped(moments.inputs[0]), weight.flatten(1).double()
    for channel in range(I):
        here, later = slice(channel * T, (channel + 1) * T), slice((channel + 1) * T, None)
        solved = torch.linalg.solve(second[later, later], second[later, here])
        metric = second[here, here] - second[here, later] @ solved
        wanted = left[:, here].clone()
        fit = fit_kernels(wanted.float()[None], templates, metric.float()[None], torch.zeros(()))
        assert rounded.indices[:, channel].equal(fit.indices[0])
        torch.testing.assert_close(
            rounded.factors[:, channel], fit.factors[0] / 0.2, rtol=1e-2, atol=2e-2
        )
        error = wanted - found[:, channel].double()
        left[:, later] += error @ solved.T
        assert (rounded.factors - rounded.factor_integers).abs().max() < 1
    alone = fit_alone(seen, templates)
    nearest = (alone.factors / 0.2).round()[..., None] * 0.2 * templates[alone.indices]
    nearest += (alone.offsets / 0.1).round()[..., None] * 0.1
    damage = [moments.error(k.view_as(weight) - weight) for k in (found, nearest)]
    assert damage[0] < 0.8 * damage[1]


def test_where_bits_are_dear_fewer_kernels_have_a_factor(templates):
    seen = look(0.3 * draw(O, I, 3, 3), moments_of())
    fit = fit_alone(seen, templates)
    counts = []
    for theta in (1e-6, 0.3, 1e3):
        steps = steps_of_kernels(fit, seen.gain, theta)
        rounded = round_compensated(seen, templates, fit, steps, theta)
        counts.append(int(rounded.factor_integers.count_nonzero()))
    assert counts[0] == O * I > counts[1] > counts[2] == 0


def test_a_kernel_that_was_pruned_makes_up_for_nothing(templates):
    weight, moments = draw(O, I, 3, 3), moments_of()
    weight[1, 2] = 0
    layer = nn.Conv2d(I, O, 3)
    with torch.no_grad():
        layer.weight.copy_(weight)
    multiply_compensated_(layer, Templates(templates.view(5, 3, 3), learn=False), moments, 1e-4)
    assert not layer.weight[1, 2].any()
    assert all(not layer.get_parameter(name)[1, 2].any() for name in roundings(layer))
    assert layer.weight.detach().flatten(2).any(dim=2).sum() == O * I - 1


def test_steps_cost_theta_each(templates):
    seen = look(draw(O, I, 3, 3), moments_of())
    fit = fit_alone(seen, templates)
    for step, power in zip(
        steps_of_kernels(fit, seen.gain, 0.01), (fit.factor_power, fit.offset_power), strict=True
    ):
        cost = 0.5 * seen.gain * power.mean(dim=1) / LEFT * step.square()
        torch.testing.assert_close(cost, torch.full((O,), 0.01))


def test_the_length_of_an_index_follows_from_how_often_it_occurs():
    lengths = index_lengths(torch.tensor([0] * 64 + [1] * 32 + [2] * 32), 4)
    torch.testing.assert_close(lengths[:3], torch.tensor([1.0, 2.0, 2.0]), rtol=0, atol=0.05)
    assert 7 < float(lengths[3]) < 9


def test_a_layer_computes_with_its_rounded_multiples_and_learns_with_what_they_were(templates):
    torch.manual_seed(0)
    layer, moments = nn.Conv2d(I, O, 3), moments_of()
    before = layer.weight.detach().clone()
    module = Templates(templates.view(5, 3, 3), learn=False)
    multiply_compensated_(layer, module, moments, 1e-5)
    assert has_linear_kernels(layer)
    assert form_of(layer).templates is module
    seen = look(before, moments)
    fit = fit_alone(seen, templates)
    steps = steps_of_kernels(fit, seen.gain, 1e-5)
    rounded = round_compensated(seen, templates, fit, steps, 1e-5)
    torch.testing.assert_close(
        layer.weight.detach().flatten(2), kernels_of(rounded, templates, steps)
    )
    for (name, form), integers in zip(
        roundings(layer).items(),
        (rounded.factor_integers, rounded.offset_integers),
        strict=True,
    ):
        units = layer.get_parameter(name).detach()
        assert form.integers(units).equal(integers)
        assert not units.equal(integers)
    assert not latent_weight(layer).equal(layer.weight)
