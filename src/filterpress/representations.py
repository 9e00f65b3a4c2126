"""Layers whose weight is made of fewer numbers, and layers that replace another.

Two parametrisations make a weight of what the codec stores. With `Quantized` a layer keeps a
floating-point weight to learn with, and computes with the nearest integers times a step. With
`Codebook` it learns a few levels, and which of them a weight is stays as it was chosen; a level
that is exactly zero is that of pruned weights, and stays zero. `Projected` stands for one
convolution by two smaller ones.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Layer = nn.Conv2d | nn.Linear
UNROUNDED = "parametrizations.weight.original"  # parameter of a layer that learns in another form
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


class ChannelOrder(nn.Module):
    """Put the channels of a feature map in another order.

    Args:
        index: ``(O,)`` integers; output channel ``o`` is input channel ``index[o]``.
    """

    index: Tensor

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index.long())

    def forward(self, x: Tensor) -> Tensor:
        """Return the feature map ``(N, O, ...)`` with its channels reordered."""
        return x.index_select(1, self.index)


class Projected(nn.Sequential):
    """One layer as two: a projection of the input channels, then the layer on what is left.

    ``project`` is a 1x1 convolution (or a linear layer) from ``I`` to ``groups * rank`` channels
    without bias; ``apply`` is the layer itself on these, grouped when ``groups`` is above one;
    ``order`` undoes the sorting of filters into groups.
    """

    def __init__(
        self, project: nn.Module, layer: nn.Module, order: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.add_module("project", project)
        self.add_module("apply_", layer)
        if order is not None:
            self.add_module("order", order)


def form_of(module: nn.Module) -> nn.Module | None:
    """Return what makes a layer's weight from fewer numbers, None for a plain layer."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    return module.get_submodule("parametrizations.weight.0")


def is_quantized(module: nn.Module) -> bool:
    """Tell whether a layer computes with integers and steps."""
    return isinstance(form_of(module), Quantized)


def has_codebook(module: nn.Module) -> bool:
    """Tell whether a layer computes with the levels of a codebook."""
    return isinstance(form_of(module), Codebook)


def describe_form(module: nn.Module) -> dict[str, Any]:
    """Describe what makes a layer's weight, as JSON without its numbers; ``{}`` for a plain one."""
    match form_of(module):
        case Quantized():
            return {"kind": "quantized"}
        case Codebook() as form:
            return {"kind": "codebook", "levels": form.n_levels}
    return {}


def take_form_(module: nn.Module, description: dict[str, Any]) -> None:
    """Give a plain layer the form that `describe_form` described; its numbers are loaded later.

    Raises:
        ValueError: The description is of no known kind.
    """
    match description.get("kind"):
        case "quantized":
            quantize_(module, torch.ones(len(latent_weight(module))))
        case "codebook":
            levels = torch.zeros(int(description["levels"]))
            share_levels_(module, levels, torch.zeros_like(latent_weight(module)))
        case kind:
            raise ValueError(f"kind must be that of a known form, got {kind!r}")


def check_form(name: str, module: nn.Module) -> None:
    """Refuse numbers of a layer's form that do not go together.

    Raises:
        ValueError: An index is beyond the levels.
    """
    if has_codebook(module) and indices_of(module).max() >= len(levels_of(module)):
        raise ValueError(f"indices of {name} must be below {len(levels_of(module))}")


def quantize_(
    module: nn.Module,
    step: Tensor,
    low: Tensor | None = None,
    high: Tensor | None = None,
    spacing: int = 1,
    dead_zone: float = 0.0,
) -> None:
    """Make a plain layer compute with integers and steps.

    Args:
        module: A convolution or linear layer, changed in place.
        step: ``(O,)`` positive, one step per output channel; raised where integers would be beyond
            16 bits, if there are no bounds.
        low: ``(O,)`` the smallest integer of each row; see `Quantized`.
        high: ``(O,)`` the largest integer of each row.
        spacing: Of the integers.
        dead_zone: In steps.
    """
    if low is None:
        largest = latent_weight(module).flatten(1).abs().amax(dim=1)
        step = torch.maximum(step, largest / MAX_INTEGER)
    form = Quantized(step, low, high, spacing, dead_zone)
    parametrize.register_parametrization(module, "weight", form)


def share_levels_(module: nn.Module, levels: Tensor, indices: Tensor) -> None:
    """Make a plain layer compute with the levels of a codebook.

    Args:
        module: A convolution or linear layer, changed in place.
        levels: ``(K,)``, K at most 256.
        indices: The level of each weight, of the weight's shape.
    """
    parametrize.register_parametrization(module, "weight", Codebook(indices, len(levels)))
    with torch.no_grad():
        levels_of(module).copy_(levels)


def levels_of(module: nn.Module) -> Tensor:
    """Return the ``(K,)`` levels that a layer with a codebook learns."""
    return module.get_parameter(UNROUNDED)


def indices_of(module: nn.Module) -> Tensor:
    """Return the level ``(O, ...)`` of each weight of a layer with a codebook."""
    return module.get_buffer("parametrizations.weight.0.indices").long()


def step_of(module: nn.Module) -> Tensor:
    """Return the ``(O,)`` steps of a quantised layer."""
    return module.get_buffer("parametrizations.weight.0.step")


def coarsen_(module: nn.Module, factor: Tensor) -> None:
    """Make the steps of a quantised layer larger; the weight underneath stays.

    Args:
        module: The layer, changed in place.
        factor: ``(O,)`` or ``()``, positive.
    """
    units, step = _units_of(module), step_of(module)
    with torch.no_grad():
        step.mul_(factor)
        units.div_(Quantized.rows(factor.expand_as(step), units))


def integers_of(module: nn.Module) -> Tensor:
    """Return the integers ``(O, ...)`` that a quantised layer computes with, as floats."""
    form = form_of(module)
    if not isinstance(form, Quantized):
        raise ValueError(f"module must be a quantised layer, got {module}")
    return form.integers(_units_of(module).detach())


def _units_of(module: nn.Module) -> Tensor:
    return module.get_parameter(UNROUNDED)


def latent_weight(module: nn.Module) -> Tensor:
    """Return the floating-point weight that a layer learns with; with a codebook, its levels'."""
    if is_quantized(module):
        units = _units_of(module).detach()
        return units * Quantized.rows(step_of(module), units)
    return module.weight.detach()  # type: ignore[operator]


def like(layer: Layer, n_in: int, n_out: int, groups: int = 1) -> Layer:
    """Make a layer of other width with the kind and geometry of a given one."""
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Linear(n_in, n_out, bias)
    return nn.Conv2d(
        n_in,
        n_out,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        groups,
        bias,
        layer.padding_mode,
    )


def without_quantization(model: nn.Module, *, rounded: bool) -> nn.Module:
    """Copy a network with plain layers in place of quantised ones.

    Args:
        model: Any network.
        rounded: Whether weights are those the network computes with, or those it learns with.

    Returns:
        The copy, in evaluation mode.
    """
    result = copy.deepcopy(model).eval()
    for name, module in list(model.named_modules()):
        if form_of(module) is not None and isinstance(module, nn.Conv2d | nn.Linear):
            n_out, n_in = module.weight.shape[:2]
            groups = module.groups if isinstance(module, nn.Conv2d) else 1
            # A new layer: removing a parametrisation would break every copy of the network, because
            # copies share the class that holds it.
            bare = like(module, n_in * groups, n_out, groups)
            with torch.no_grad():
                bare.weight.copy_(module.weight if rounded else latent_weight(module))
                if bare.bias is not None and module.bias is not None:
                    bare.bias.copy_(module.bias)
            result.set_submodule(name, bare.to(module.weight.device).eval())
    return result
