r"""Write the kernels of a layer as multiples of templates plus constants: ``a T + b``.

What a kernel ``v`` loses as ``a T + b`` is :math:`\tfrac12 g\, e M e^\top`, where ``e`` is the
error and ``M``, ``(T, T)`` for ``T`` taps, what the layer's inputs make of errors in one channel.
With :math:`\langle u, v \rangle = u M v^\top` and the part
:math:`T' = T - \langle T, 1\rangle / \langle 1, 1\rangle` of a template that no constant makes,

.. math:: a = \langle T', v\rangle / \langle T', T'\rangle, \qquad
   b = \langle 1, v - a T\rangle / \langle 1, 1\rangle,

and the best template is that of the largest :math:`\langle T', v\rangle^2 / \langle T', T'\rangle`.
Kernels are fitted one input channel after the other, each to what makes up for the errors of those
before it: with the factor :math:`A = U P U^\top` of the inputs' second moment (see `rounding`),
what later channels cannot make up for is :math:`M = U_{ii} P_i U_{ii}^\top`, and what earlier
errors ``e`` ask of channel ``i`` is :math:`e\, U_{\cdot i} U_{ii}^{-1}`. ``a`` and ``b`` are
rounded right there, so that later channels make up for that, too.

Reference:
    Van Baalen et al., "GPTVQ: The Blessing of Dimensionality for LLM Quantization", 2024, for error
    feedback with vectors in place of weights.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from filterpress.allocation import LEFT, SLOPE, unit_steps
from filterpress.forms import MAX_INTEGER, Templates
from filterpress.representations import Layer, multiply_templates_, roundings
from filterpress.rounding import (
    BITS_COUNT,
    DAMPING,
    DEAD_ZONE,
    LARGEST,
    Factor,
    cells,
    code_lengths,
    factorise,
)
from filterpress.statistics import Moments

SCORES = 2**24  # of kernels with templates that are held at a time


class Seen(NamedTuple):
    """The kernels of a layer, ``O = G R`` filters in ``G`` groups of ``I`` channels each."""

    kernels: Tensor  # (I, G, R, T)
    along: Factor  # of the inputs' second moment
    metric: Tensor  # (I, G, T, T) M above
    gain: Tensor  # (O,)


class Fit(NamedTuple):
    """Kernels ``(..., R)`` as multiples of templates plus constants."""

    indices: Tensor  # of the templates
    factors: Tensor  # a
    offsets: Tensor  # b
    factor_power: Tensor  # <T', T'>
    offset_power: Tensor  # (..., 1) <1, 1>
    cross: Tensor  # <T, 1>
    left: Tensor  # e M e^T


class Rounded(NamedTuple):
    """Kernels ``(O, I)`` in the form that the codec stores."""

    indices: Tensor
    factors: Tensor  # a in steps, before it is rounded
    offsets: Tensor  # b likewise
    factor_integers: Tensor
    offset_integers: Tensor


class Prices(NamedTuple):
    """Bits that are worth their damage."""

    indices: Tensor  # (K,) of each template
    factors: Tensor  # (LARGEST + 1,) of each magnitude
    offsets: Tensor  # likewise


def fit_kernels(kernels: Tensor, templates: Tensor, metric: Tensor, bonus: Tensor) -> Fit:
    r"""Fit kernels by their best template and, by least squares, its factor and a constant.

    Args:
        kernels: ``(..., R, T)``.
        templates: ``(K, T)``.
        metric: ``(..., T, T)`` positive definite.
        bonus: ``(..., R, K)``, or what broadcasts to it, to be added to
            :math:`\langle T', v\rangle^2 / \langle T', T'\rangle` when templates are compared.
    """
    ones = metric.sum(dim=-1)  # (..., T)
    power = ones.sum(dim=-1)[..., None]  # (..., 1)
    seen = templates @ metric  # (..., K, T)
    cross = seen.sum(dim=-1)  # (..., K)
    own = (seen * templates).sum(dim=-1) - cross.square() / power
    constant = (kernels @ ones[..., None])[..., 0]  # (..., R) <1, v>
    shape = kernels @ seen.mT - constant[..., None] * (cross / power)[..., None, :]  # (..., R, K)
    inverse = torch.where(own > 0, 1 / own, 0)[..., None, :]
    best = (shape.square() * inverse + bonus).argmax(dim=-1, keepdim=True)

    def chosen(values: Tensor) -> Tensor:  # (..., 1, K) or (..., R, K) -> (..., R)
        return values.expand_as(shape).gather(-1, best)[..., 0]

    factors, cross = chosen(shape * inverse), chosen(cross[..., None, :])
    offsets = (constant - factors * cross) / power
    whole = ((kernels @ metric) * kernels).sum(dim=-1)
    left = whole - constant.square() / power - chosen(shape.square() * inverse)
    own = chosen(own[..., None, :])
    return Fit(best[..., 0], factors, offsets, own, power, cross, left.clamp(min=0))


def look(weight: Tensor, moments: Moments) -> Seen:
    """Look at the kernels of a layer ``(O, I/groups, kh, kw)`` with its statistics."""
    kernels = weight.flatten(2)
    kernels = kernels.view(len(moments.inputs), -1, *kernels.shape[1:]).permute(2, 0, 1, 3)
    along = factorise(moments.inputs, DAMPING)
    groups, taps = len(along.power), kernels.shape[-1]
    blocks = along.unit.view(groups, -1, taps, len(kernels), taps).diagonal(dim1=1, dim2=3)
    blocks = blocks.permute(3, 0, 1, 2)  # (I, G, T, T)
    power = along.power.view(groups, -1, taps).transpose(0, 1)
    return Seen(kernels, along, (blocks * power[..., None, :]) @ blocks.mT, moments.gain)


def fit_alone(seen: Seen, templates: Tensor) -> Fit:
    """Fit the kernels of a layer, each for itself.

    Args:
        seen: The kernels.
        templates: ``(K, T)``.

    Returns:
        The fit, ``(O, I)`` all.
    """
    n_channels = max(1, SCORES // (len(seen.gain) * len(templates)))
    nothing = torch.zeros(())
    parts = [
        fit_kernels(kernels, templates, metric, nothing)
        for kernels, metric in zip(
            torch.split(seen.kernels, n_channels), torch.split(seen.metric, n_channels), strict=True
        )
    ]
    shape = seen.kernels.shape[:-1]
    return Fit(*(_rows(torch.cat(column).expand(shape)) for column in zip(*parts, strict=True)))


def round_compensated(
    seen: Seen, templates: Tensor, fit: Fit, steps: tuple[Tensor, Tensor], theta: float
) -> Rounded:
    """Fit and round the kernels of a layer, each making up for the errors of those before it.

    Args:
        seen: The kernels. One of zeros has been pruned and stays.
        templates: ``(K, T)``.
        fit: Of each kernel for itself.
        steps: ``(O,)`` of factors and of offsets.
        theta: Cost of rounding a weight, as for `rounding.round_compensated`.
    """
    prices = _prices(fit, steps, len(templates), theta)
    n_channels, groups, n_rows, taps = seen.kernels.shape
    gain, first, second = (values.view(groups, n_rows) for values in (seen.gain, *steps))
    bonus = -2 * prices.indices / gain.clamp(min=1e-30)[..., None]  # (G, R, K)
    unit, errors = seen.along.unit, seen.kernels.new_zeros(groups, n_rows, n_channels * taps)
    found = []
    for channel, own in enumerate(seen.kernels):  # (G, R, T)
        here = slice(channel * taps, (channel + 1) * taps)
        asked = errors[..., : here.start] @ unit[:, : here.start, here]
        asked = torch.linalg.solve_triangular(unit[:, here, here], asked, upper=True, left=False)
        best = fit_kernels(own + asked, templates, seen.metric[channel], bonus)
        rounded = _rounded(best, gain, (first, second), prices, own.any(dim=-1))
        kernels = (rounded.factor_integers * first)[..., None] * templates[rounded.indices]
        errors[..., here] = own - kernels - (rounded.offset_integers * second)[..., None]
        found.append(rounded)
    return Rounded(*(_rows(torch.stack(column)) for column in zip(*found, strict=True)))


def _rounded(
    fit: Fit, gain: Tensor, steps: tuple[Tensor, Tensor], prices: Prices, used: Tensor
) -> Rounded:
    """Round the factors and offsets ``(G, R)`` of one channel; where it is not used, to zero."""
    factors = torch.where(used, fit.factors / steps[0], 0)
    worth = 0.5 * gain * fit.factor_power * steps[0].square()
    index = prices.indices[fit.indices]
    factor_integers = _cheapest(factors, worth, prices.factors, index)
    # the offset makes up for what rounding the factor cost
    change = (fit.factors - factor_integers * steps[0]) * fit.cross / fit.offset_power
    offsets = torch.where(used, (fit.offsets + change) / steps[1], 0)
    worth = 0.5 * gain * fit.offset_power * steps[1].square()
    offset_integers = _cheapest(offsets, worth, prices.offsets, torch.zeros(()))
    return Rounded(fit.indices, factors, offsets, factor_integers, offset_integers)


def _cheapest(units: Tensor, worth: Tensor, price: Tensor, beside: Tensor) -> Tensor:
    """Choose between zero and the integers beside a value, by damage and price.

    Args:
        units: Values in steps.
        worth: Damage of an error of one step.
        price: Of each magnitude.
        beside: Price of not being zero.
    """
    tried = torch.stack([torch.zeros_like(units), units.trunc(), units.round()])
    cost = worth * (units - tried).square() + price[tried.abs().clamp(max=LARGEST).long()]
    cost += beside * (tried != 0)
    return tried.gather(0, cost.argmin(dim=0)[None])[0]


def _prices(fit: Fit, steps: tuple[Tensor, Tensor], n_templates: int, theta: float) -> Prices:
    """Price what the codec stores by how often it occurs when kernels are fitted alone."""
    bit = BITS_COUNT * SLOPE * theta / 8
    factors = torch.round(fit.factors / steps[0][:, None])
    offsets = torch.round(fit.offsets / steps[1][:, None])
    return Prices(
        bit * index_lengths(fit.indices[factors != 0], n_templates),
        bit * code_lengths(factors),
        bit * code_lengths(offsets),
    )


def index_lengths(indices: Tensor, n_templates: int) -> Tensor:
    """Return the bits ``(K,)`` of each index, by how often it occurs; rare ones have a bound."""
    counts = torch.bincount(indices.flatten(), minlength=n_templates) + 0.5
    return (counts.sum() / counts).log2()


def steps_of_kernels(fit: Fit, gain: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Return the steps ``(O,)`` of factors and of offsets that cost ``theta`` each.

    The powers of a fit are what is left after errors are made up for, while those that steps are
    meant for are from before.
    """
    found = []
    for power, values in ((fit.factor_power, fit.factors), (fit.offset_power, fit.offsets)):
        steps = unit_steps(gain, power.mean(dim=1) / LEFT) * math.sqrt(theta)
        found.append(torch.maximum(steps, values.abs().amax(dim=1) / MAX_INTEGER))
    return found[0], found[1]


def _rows(values: Tensor) -> Tensor:
    """View one value for each of ``(I, G, R)`` kernels as ``(O, I)``."""
    return values.permute(1, 2, 0).flatten(0, 1)


def multiply_compensated_(
    layer: Layer, templates: Templates, moments: Moments, theta: float
) -> None:
    """Make the kernels of a plain convolution multiples of templates, chosen for its outputs.

    Args:
        layer: The layer, changed in place. It learns with the factors and offsets from before they
            were rounded, moved into the cells of their integers.
        templates: Of the size of its kernels.
        moments: Its statistics.
        theta: Cost of rounding a weight, which gives the steps.
    """
    seen, shapes = look(layer.weight.detach(), moments), templates.values.detach().flatten(1)
    fit = fit_alone(seen, shapes)
    steps = steps_of_kernels(fit, seen.gain, theta)
    rounded = round_compensated(seen, shapes, fit, steps, theta)
    multiply_templates_(layer, templates, rounded.indices, *steps, DEAD_ZONE)
    integers = (rounded.factor_integers, rounded.offset_integers)
    with torch.no_grad():
        for name, units, its in zip(
            roundings(layer), (rounded.factors, rounded.offsets), integers, strict=True
        ):
            layer.get_parameter(name).copy_(units.clamp(*cells(its, 1, DEAD_ZONE)))
