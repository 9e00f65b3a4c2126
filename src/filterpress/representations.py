"""Layers whose weight is made of fewer numbers, and layers that replace another.

A layer keeps its kind when its weight takes another form (see `forms`), so that it trains and runs
as before. `Chain` stands for one layer by several smaller ones.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from filterpress.forms import MAX_INTEGER, Codebook, LinearKernels, Quantized, Templates

Layer = nn.Conv2d | nn.Linear
UNROUNDED = "parametrizations.weight.original"  # parameter of a layer that learns in another form


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


class Chain(nn.Sequential):
    """One layer as several smaller ones, such as a projection and the layer on what is left.

    Convolutions, or linear layers, of which only the last has a bias; behind it there may be a
    `ChannelOrder` that undoes the sorting of filters into groups.
    """


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


def has_linear_kernels(module: nn.Module) -> bool:
    """Tell whether the kernels of a layer are multiples of templates."""
    return isinstance(form_of(module), LinearKernels)


def describe_form(module: nn.Module) -> dict[str, Any]:
    """Describe what makes a layer's weight, as JSON without its numbers; ``{}`` for a plain one."""
    match form_of(module):
        case Quantized():
            return {"kind": "quantized"}
        case Codebook() as form:
            return {"kind": "codebook", "levels": form.n_levels}
        case LinearKernels() as form:
            n_templates, learn = len(form.templates.values), form.templates.learn
            return {"kind": "linear-kernels", "templates": n_templates, "learn": learn}
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
        case "linear-kernels":
            n_out, n_in, *size = latent_weight(module).shape
            empty = torch.zeros(int(description["templates"]), *size)
            templates = Templates(empty, learn=bool(description["learn"]))
            indices, steps = torch.zeros(n_out, n_in), torch.ones(2, n_out)
            multiply_templates_(module, templates, indices, steps[0], steps[1])
        case kind:
            raise ValueError(f"kind must be that of a known form, got {kind!r}")


def check_form(name: str, module: nn.Module) -> None:
    """Refuse numbers of a layer's form that do not go together.

    Raises:
        ValueError: An index is beyond the levels or templates.
    """
    match form_of(module):
        case Codebook() as form:
            limit = form.n_levels
        case LinearKernels() as form:
            limit = len(form.templates.values)
        case _:
            return
    if indices_of(module).max() >= limit:
        raise ValueError(f"indices of {name} must be below {limit}")


def tie_templates_(network: nn.Module) -> None:
    """Let layers whose templates are equal share one module of them, as before they were saved.

    Args:
        network: The network, changed in place.
    """
    known: list[Templates] = []
    for module in network.modules():
        if isinstance(module, LinearKernels):
            mine = module.templates
            same = (t for t in known if t.learn == mine.learn and t.values.equal(mine.values))
            module.templates = next(same, mine)
            if module.templates is mine:
                known.append(mine)


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


def multiply_templates_(
    module: nn.Module,
    templates: Templates,
    indices: Tensor,
    factor_step: Tensor,
    offset_step: Tensor,
    dead_zone: float = 0.0,
) -> None:
    """Make the kernels of a plain convolution multiples of templates plus offsets.

    Args:
        module: The layer, changed in place; factors and offsets are those nearest to its weight.
        templates: What to multiply.
        indices: The template of each kernel; it and the rest as for `LinearKernels`.
        factor_step: ``(O,)``.
        offset_step: ``(O,)``.
        dead_zone: In steps.
    """
    form = LinearKernels(templates, indices, factor_step, offset_step, dead_zone)
    parametrize.register_parametrization(module, "weight", form)


def levels_of(module: nn.Module) -> Tensor:
    """Return the ``(K,)`` levels that a layer with a codebook learns."""
    return module.get_parameter(UNROUNDED)


def indices_of(module: nn.Module) -> Tensor:
    """Return the level ``(O, ...)`` of each weight, or the template of each kernel."""
    return module.get_buffer("parametrizations.weight.0.indices").long()


def step_of(module: nn.Module) -> Tensor:
    """Return the ``(O,)`` steps of a quantised layer."""
    return module.get_buffer("parametrizations.weight.0.step")


def roundings(module: nn.Module) -> dict[str, Quantized]:
    """Return what rounds a layer's numbers, by the name of the parameter that learns in steps."""
    match form_of(module):
        case Quantized() as form:
            return {UNROUNDED: form}
        case LinearKernels() as form:
            return {f"{UNROUNDED}0": form.factor, f"{UNROUNDED}1": form.offset}
    return {}


def coarsen_(module: nn.Module, factor: Tensor) -> None:
    """Make the steps of a layer larger; the weight underneath stays.

    Args:
        module: The layer, changed in place; nothing to do where it has no steps.
        factor: ``(O,)`` or ``()``, positive.
    """
    for name, form in roundings(module).items():
        units = module.get_parameter(name)
        with torch.no_grad():
            form.step.mul_(factor)
            units.div_(Quantized.rows(factor.expand_as(form.step), units))


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
    unrounded = [
        module.get_parameter(name).detach() * Quantized.rows(form.step, module.get_parameter(name))
        for name, form in roundings(module).items()
    ]
    match form_of(module):
        case Quantized():
            return unrounded[0].detach()
        case LinearKernels() as form:
            return form.combine(*unrounded).detach()
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
