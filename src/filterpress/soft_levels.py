r"""Quantisers that training anneals: averages over levels that turn into the nearest one.

A weight or an activation of ``u`` steps becomes the average of all integers ``k``, weighted by

.. math:: \operatorname{softmax}_k \frac{-(u - k)^2 + (2a - 1)[k = 0]}{T}

As the temperature ``T`` falls, that tends to rounding, where zero takes over all below the
threshold ``a``: pruning and quantisation are one average, and what it costs in bits is the same
average of code lengths. Everything in it is differentiated as it stands, by weights, steps,
thresholds and scales.

Only the nearest integer and its two neighbours are summed. Any other one weighs at most
``exp(-2/T)`` of the nearest, or ``exp((2a-3)/T)`` if it is zero: nothing in the limit.

Reference:
    Agustsson et al., "Soft-to-Hard Vector Quantization for End-to-End Learning Compressible
    Representations", NeurIPS 2017, for the average, its temperature and the expected code length;
    Azarian et al., "Learned Threshold Pruning", 2020, for thresholds that learn.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from filterpress.activations import ActivationQuantizer
from filterpress.forms import Quantized
from filterpress.rounding import LARGEST, code_lengths

WARM = 0.5  # temperature at which the average is the number itself, nearly
FIRST_LEVEL = -3.0  # of a threshold: hardly more than rounding prunes


class Shares(NamedTuple):
    """The three integers that are averaged, and what those beside the nearest weigh."""

    nearest: Tensor
    below: Tensor  # share of nearest - 1, in [0, 1]
    above: Tensor  # share of nearest + 1

    @property
    def mean(self) -> Tensor:
        """The average."""
        return self.nearest + (self.above - self.below)

    def expected(self, values: Tensor) -> Tensor:
        """Average a value of each magnitude ``(K,)`` instead of the integers."""
        near, low, high = (
            values[k.abs().clamp(max=len(values) - 1).long()]
            for k in (self.nearest, self.nearest - 1, self.nearest + 1)
        )
        return near + self.below * (low - near) + self.above * (high - near)


def shares(units: Tensor, temperature: float, threshold: Tensor | None = None) -> Shares:
    """Weigh the integers around a number.

    Args:
        units: Numbers in steps, any shape.
        temperature: ``T``, positive.
        threshold: ``()`` in steps, 1/2 to 1, of what becomes zero; without it, 1/2.
    """
    nearest = units.detach().round()
    offset = units - nearest
    below, above = -2 * offset - 1, 2 * offset - 1
    if threshold is not None:
        bonus = 2 * threshold - 1
        below = below + bonus * ((nearest == 1).to(units) - (nearest == 0).to(units))
        above = above + bonus * ((nearest == -1).to(units) - (nearest == 0).to(units))
    below, above = (below / temperature).exp(), (above / temperature).exp()
    total = 1 + below + above
    return Shares(nearest, below / total, above / total)


class SoftWeight(nn.Module):
    """Parametrisation of a weight while it learns its integers, its steps and its threshold.

    The weight underneath is kept in such units that, at the median step of the network, it learns
    as fast as a plain one; at other steps, as fast in steps. In evaluation mode it is rounded.

    Args:
        step: ``(O,)`` positive, one step per output channel to begin with.
        typical: The median step of the network.
        bits: Of the widest integers.
    """

    step: Tensor

    def __init__(self, step: Tensor, typical: float, bits: int) -> None:
        super().__init__()
        self.typical = typical
        self.largest = 2 ** (bits - 1) - 1
        self.temperature = WARM
        self.register_buffer("step", step)
        self.growth = nn.Parameter(torch.zeros_like(step))  # of the steps, in nats
        self.level = nn.Parameter(torch.tensor(FIRST_LEVEL))

    @property
    def threshold(self) -> Tensor:
        """Steps below which a weight is pruned, in (1/2, 1)."""
        return 0.5 + 0.5 * self.level.sigmoid()

    @property
    def steps(self) -> Tensor:
        """The steps ``(O,)`` as they are now."""
        return self.step * self.growth.exp()

    def forward(self, latent: Tensor) -> Tensor:
        """Return the weight ``(O, ...)``: soft in training, rounded in evaluation."""
        units = self.units(latent)
        if self.training:
            numbers = shares(units, self.temperature, self.threshold).mean
        else:
            numbers = self.integers(latent)
        return numbers * Quantized.rows(self.steps, units)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return what is kept of an assigned weight."""
        return weight / Quantized.rows(self.step, weight) * self.typical

    def units(self, latent: Tensor) -> Tensor:
        """Return the weight in steps, no larger than the largest integer."""
        units = latent / self.typical / Quantized.rows(self.growth.exp(), latent)
        return units.clamp(-self.largest, self.largest)

    def integers(self, latent: Tensor) -> Tensor:
        """Return the integers ``(O, ...)`` in the limit, as floats; zeros are pruned."""
        units = self.units(latent).detach()
        return units.round() * (units.abs() >= self.threshold.detach())

    def bits(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Count the bits of the weight in the file, by the code lengths of its integers.

        Returns:
            The expected ones, of which gradients can be taken, and those in the limit; each ``()``.
        """
        integers = self.integers(latent)
        lengths = code_lengths(integers).to(integers)
        soft = shares(self.units(latent), self.temperature, self.threshold)
        return soft.expected(lengths).sum(), lengths[integers.abs().clamp(max=LARGEST).long()].sum()


class _SoftRound(torch.autograd.Function):
    """Activations averaged over levels, with a scale that learns; keeps only a slope for each."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_scale: Tensor, low: int, high: int, temperature: float
    ) -> Tensor:
        # `shares`, in memory that is there already: most of the time goes into finding new.
        scale = log_scale.exp()
        units = x / scale
        inside = (units >= low) & (units <= high)
        nearest = units.clamp_(low, high).round()
        offset = units.sub_(nearest)
        above = (offset * (2 / temperature)).sub_(1 / temperature).exp_()
        below = offset.mul_(-2 / temperature).sub_(1 / temperature).exp_()
        beside = above + below
        drift = above.sub_(below)
        total = torch.add(beside, 1, out=below)
        drift, beside = drift.div_(total), beside.div_(total)
        rounded = nearest.add_(drift).mul_(scale)
        slope = beside.sub_(drift.square_()).mul_(2 / temperature).mul_(inside)
        ctx.save_for_backward(x, rounded, slope)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, rounded, slope = ctx.saved_tensors
        by_x = gradients[0] * slope
        # d (scale * mean(x / scale)) / d log(scale)
        by_scale = (gradients[0] * rounded).sum() - (by_x * x).sum()
        return by_x, by_scale, None, None, None


class SoftActivations(nn.Module):
    """Round what a layer reads while the scale of its levels learns.

    Args:
        start: The quantiser to begin with, whose number of levels and place of zero stay.
    """

    def __init__(self, start: ActivationQuantizer) -> None:
        super().__init__()
        self.bits, self.zero_point = start.bits, start.zero_point
        self.temperature = WARM
        self.log_scale = nn.Parameter(torch.tensor(start.scale).log())

    def forward(self, x: Tensor) -> Tensor:
        """Return activations of any shape: soft in training, rounded in evaluation."""
        if not self.training:
            return self.hard()(x)  # type: ignore[no-any-return]
        low, high = -self.zero_point, 2**self.bits - 1 - self.zero_point
        return _SoftRound.apply(x.float(), self.log_scale, low, high, self.temperature)  # type: ignore[no-any-return, no-untyped-call]

    def hard(self) -> ActivationQuantizer:
        """Return the quantiser in the limit."""
        return ActivationQuantizer(float(self.log_scale.detach().exp()), self.zero_point, self.bits)
