"""Forms of a weight: parametrisations that make it of the fewer numbers that the codec stores.

With `Quantized` a layer keeps a floating-point weight to learn with, and computes with the nearest
integers times a step. With `Codebook` it learns a few levels, and which of them a weight is stays
as it was chosen; a level that is exactly zero is that of pruned weights, and stays zero. With
`LinearKernels` it learns a factor and an offset for each kernel; the templates that these are
applied to are shared, also with other layers. `representations` gives forms to layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MAX_INTEGER = 2**15 - 1  # of a quantised weight; finer steps would cost bits for nothing


class _StraightThrough(torch.autograd.Function):
    """Integers; the gradient passes to what was rounded, unless it leads out of the bounds."""

    @staticmethod
    def forward(ctx: Any, units: Tensor, integers: Tensor, beyond: Tensor) -> Tensor:
        ctx.save_for_backward(beyond)
        return integers.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (beyond,) = ctx.saved_tensors  # has the sign of what a weight is beyond the bounds
        return gradients[0].masked_fill(beyond * gradients[0] < 0, 0), None, None


class Quantized(nn.Module):
    """Parametrisation of a weight by integers and one step per output channel.

    The straight-through estimator trains the unrounded weight underneath, in steps: where steps
    were chosen so that one costs the same anywhere in the network, all weights learn at one pace.
    Steps do not learn: trained by the task's loss alone they only shrink, and the file grows.

    Args:
        step: ``(O,)`` positive, one step per output channel.
        low: ``(O,)`` the smallest integer of each row; without it, the smallest there is.
        high: ``(O,)`` the largest integer of each row.
        spacing: Of the integers in use, from ``low`` on: 1, or 2 for a grid of odd ones.
        dead_zone: Steps by which a weight must be nearer to the integer farther from zero than to
            the one below it, to become that. Above 0 training wastes no bits on weights that
            hardly need them.
    """

    step: Tensor
    low: Tensor
    high: Tensor
    spacing: Tensor
    dead_zone: Tensor

    def __init__(
        self,
        step: Tensor,
        low: Tensor | None = None,
        high: Tensor | None = None,
        spacing: int = 1,
        dead_zone: float = 0.0,
    ) -> None:
        super().__init__()
        step = step.float()
        widest = torch.full_like(step, MAX_INTEGER)
        self.register_buffer("step", step)
        self.register_buffer("low", -widest if low is None else low.float())
        self.register_buffer("high", widest if high is None else high.float())
        self.register_buffer("spacing", torch.full_like(step, spacing))
        self.register_buffer("dead_zone", torch.full_like(step, dead_zone))

    def forward(self, units: Tensor) -> Tensor:
        """Return the quantised weight, ``(O, ...)``, of an unrounded one in steps."""
        nearest = self._nearest(units)
        integers = self._bounded(nearest)
        rounded = _StraightThrough.apply(units, integers, nearest - integers)  # type: ignore[no-untyped-call]
        return rounded * self.rows(self.step, units)  # type: ignore[no-any-return]

    def integers(self, units: Tensor) -> Tensor:
        """Return the integers ``(O, ...)`` of an unrounded weight in steps, as floats."""
        return self._bounded(self._nearest(units))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the steps in an assigned weight, which is kept unrounded."""
        return weight / self.rows(self.step, weight)

    @staticmethod
    def rows(values: Tensor, weight: Tensor) -> Tensor:
        """View one value per output channel so that it multiplies a weight."""
        return values.view(-1, *[1] * (weight.ndim - 1))

    def _nearest(self, units: Tensor) -> Tensor:
        spacing = self.rows(self.spacing, units)
        offset = self.rows(self.low.remainder(self.spacing), units)
        units = units - units.sign() * self.rows(self.dead_zone, units)
        return torch.round((units - offset) / spacing) * spacing + offset

    def _bounded(self, integers: Tensor) -> Tensor:
        return integers.clamp(self.rows(self.low, integers), self.rows(self.high, integers))


class Codebook(nn.Module):
    """Parametrisation of a weight by a few levels, which learn, and an index for each weight.

    Args:
        indices: ``(O, ...)`` level of each weight, from 0 on.
        n_levels: Number of levels, at most 256.
    """

    indices: Tensor

    def __init__(self, indices: Tensor, n_levels: int) -> None:
        super().__init__()
        self.n_levels = n_levels
        self.register_buffer("indices", indices.to(torch.uint8))

    def forward(self, levels: Tensor) -> Tensor:
        """Return the weight, ``(O, ...)``, for levels ``(K,)``; one of zero has no gradient."""
        levels = torch.where(levels == 0, 0, levels)
        return levels.index_select(0, self.indices.flatten().int()).view(self.indices.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the mean of an assigned weight over the weights of each level."""
        indices = self.indices.flatten().int()
        totals = weight.new_zeros(self.n_levels).index_add(0, indices, weight.flatten())
        counts = torch.bincount(indices, minlength=self.n_levels)
        return totals / counts.clamp(min=1)


class Templates(nn.Module):
    """Kernels that others are multiples of; one module for all layers that share them.

    Args:
        values: ``(K, kh, kw)``, K at most 256.
        learn: Whether training moves them.
    """

    values: Tensor

    def __init__(self, values: Tensor, *, learn: bool) -> None:
        super().__init__()
        if learn:
            self.values = nn.Parameter(values.clone())
        else:
            self.register_buffer("values", values.clone())

    @property
    def learn(self) -> bool:
        """Whether training moves them."""
        return isinstance(self.values, nn.Parameter)


class LinearKernels(nn.Module):
    """Parametrisation of each kernel by a factor of a template and an offset: ``a T + b``.

    Factors and offsets are quantised, and learn in units of their steps (see `Quantized`); which
    template a kernel has stays as it was chosen.

    Args:
        templates: What the kernels are multiples of.
        indices: ``(O, I/groups)`` template of each kernel.
        factor_step: ``(O,)`` positive, step of the factors of each row.
        offset_step: ``(O,)`` positive, step of the offsets.
        dead_zone: Of both, in steps.
    """

    indices: Tensor

    def __init__(
        self,
        templates: Templates,
        indices: Tensor,
        factor_step: Tensor,
        offset_step: Tensor,
        dead_zone: float = 0.0,
    ) -> None:
        super().__init__()
        self.templates = templates
        self.factor = Quantized(factor_step, dead_zone=dead_zone)
        self.offset = Quantized(offset_step, dead_zone=dead_zone)
        self.register_buffer("indices", indices.to(torch.uint8))

    def forward(self, factors: Tensor, offsets: Tensor) -> Tensor:
        """Return the weight ``(O, I/groups, kh, kw)`` for numbers ``(O, I/groups)`` in steps."""
        return self.combine(self.factor(factors), self.offset(offsets))

    def combine(self, factors: Tensor, offsets: Tensor) -> Tensor:
        """Return the weight for factors and offsets ``(O, I/groups)``."""
        shapes = self.templates.values[self.indices.int()]  # (O, I/groups, kh, kw)
        return factors[..., None, None] * shapes + offsets[..., None, None]

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return, in steps, the factors and offsets nearest to an assigned weight."""
        shapes = self.templates.values.detach()[self.indices.int()].flatten(2)
        mean = shapes.mean(dim=2)
        centred = shapes - mean[..., None]
        power = centred.square().sum(dim=2).clamp(min=1e-30)
        factors = (centred * weight.flatten(2)).sum(dim=2) / power
        offsets = weight.flatten(2).mean(dim=2) - factors * mean
        return self.factor.right_inverse(factors), self.offset.right_inverse(offsets)
