r"""Write each kernel as a factor of a template plus an offset, ``a T + b``, with few templates.

All kernels of a layer, of layers alike, or of the whole network are clustered with the Pearson
correlation as distance (see `lines`); the centres are the templates, and ``a`` and ``b`` of each
kernel are least squares in what its layer's inputs see (see `templates`). One allocator chooses for
the file's budget how many templates there are, which layers stay as they are, and the steps to
which everything is rounded, so there is nothing left to do for ``reduce``.

A kernel of ``T`` weights costs an index of ``log2 K`` bits, entropy-coded like all, and the bits of
two integers, instead of those of ``T``; the templates cost some 4.5 bits a weight, once. A retrain
moves ``a`` and ``b`` alone. Multiply-accumulates stay as they are.

Does not help where plain steps can be coarse: with 256 templates a layer, the convolutions of a
ResNet-18 take a 21st of their bytes at 16 bits for 0.3 points of accuracy, and rounded to steps
alone as few for none. Small layers cannot pay for templates, and where feature maps are so small
that most of a kernel sees padding only, there is no shape to share. Left free, the allocator
shares what is in between; at a 24th of ResNet-20 that is better than steps alone.

Reference:
    The source's linear kernel representation. Where it leaves the details open: kernels count by
    their energy and by what an error costs, a sign is part of ``a``, and kernels make up for the
    errors of those before them, as in GPTVQ (see `templates`); the decisions are measured in
    docs/adr/0023. Layers without kernels of more than a weight are only rounded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from filterpress import statistics
from filterpress.allocation import BIAS_BITS, Allocation, Option, Rates, as_it_is, block
from filterpress.compensation import PRUNED
from filterpress.errors import ModelError
from filterpress.export import TEMPLATE_STEP
from filterpress.fitting import Attempt, Goal, fingerprint, fit_budget
from filterpress.forms import Templates
from filterpress.lines import k_lines, match, standardise
from filterpress.methods import Outcome
from filterpress.progress import progress
from filterpress.representations import Layer
from filterpress.rounding import quantize_compensated_
from filterpress.statistics import Moments
from filterpress.surgery import layers, plain
from filterpress.templates import (
    fit_alone,
    index_lengths,
    look,
    multiply_compensated_,
    steps_of_kernels,
)

Scope = Literal["layer", "group", "net"]
MOST = 256  # templates; an index is a byte
TEMPLATE_BITS = 4.5  # of a weight of a template in the file


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """How `share_kernels` chooses templates.

    Attributes:
        images: Calibration images; fewer where they are large.
        scope: Which kernels share templates, if they have one shape: those of a ``layer``, of a
            ``group`` of layers with as many input channels, or of the whole ``net``.
        templates: Number of them in each scope, 2 to 256; 0 chooses a number for each, or none,
            so that the file meets the budget at the least damage.
        learn_templates: Whether a retrain moves the templates, and not only factors and offsets.
    """

    images: int = 1024
    scope: Scope = "layer"
    templates: int = 0
    learn_templates: bool = False

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"images must be at least 1, got {self.images}")
        if self.scope not in get_args(Scope):
            raise ValueError(f"scope must be one of {get_args(Scope)}, got {self.scope!r}")
        if self.templates != 0 and not 2 <= self.templates <= MOST:
            raise ValueError(
                f"templates must be in 2..{MOST}, or 0 to choose them, got {self.templates}"
            )

    @property
    def counts(self) -> list[int]:
        """The numbers of templates a scope can take."""
        return [self.templates] if self.templates else [2**k for k in range(1, 9)]


class Source(NamedTuple):
    """A plain network, and what is known of it."""

    network: nn.Module
    images: Tensor
    moments: Mapping[str, Moments]
    templates: Mapping[str, Mapping[int, Templates]]  # by layer and their number


def share_kernels(
    model: nn.Module, images: Tensor, config: KernelsConfig, *, goal: Goal, seed: int = 0
) -> Outcome:
    """Write kernels as multiples of templates, and quantise all, until the file meets a budget.

    Args:
        model: Network to shrink.
        images: ``(N, C, H, W)`` normalised calibration images.
        config: How to choose templates.
        goal: What the file shall meet. A network whose file meets it is passed on.
        seed: Seed of the statistics and of the clustering.

    Returns:
        The network with quantised layers; the number of layers ``shared``, whose kernels are
        multiples of ``templates``, the ``distortion`` and bytes predicted, and ``theta``. A network
        without kernels of more than one weight is passed on. Where nothing meets the budget, the
        smallest.

    Raises:
        ModelError: Parts of kernels have been pruned, or every allocation found is one to avoid.
    """
    network = statistics.plain_for(model, images)
    moments = statistics.measure(network, images, seed=seed)
    used = {name: layer for name, layer in layers(network).items() if name in moments}
    scopes = scopes_of(used, config.scope)
    if not scopes or goal.is_met(model):
        return Outcome(copy.deepcopy(model), {"shared": 0.0}, {})
    for name in (name for names in scopes for name in names):
        check_whole(name, used[name], moments[name])
    generator = torch.Generator().manual_seed(seed)
    candidates, folds = {}, []
    templates: dict[str, dict[int, Templates]] = {}
    with progress("cluster", len(used)) as advance:
        for name, layer in used.items():
            candidates[name] = [as_it_is(layer.weight.detach(), moments[name], generator)]
        for names in scopes:
            members = {name: used[name] for name in names}
            shared = templates_of(members, moments, config.counts, config.learn_templates, seed)
            templates |= dict.fromkeys(names, shared)
            fold = {}
            for name, layer in members.items():
                fold[name] = kernel_options(layer, shared, moments[name], len(names), generator)
                advance()
            folds.append(fold)
    if config.templates:
        rates = Rates(candidates | {name: found for fold in folds for name, found in fold.items()})
    else:
        rates = Rates(candidates, folds)
    source = Source(network, images, moments, templates)
    return _outcome(fit_budget(rates, lambda allocation: apply(source, allocation), goal))


def scopes_of(used: Mapping[str, Layer], scope: Scope) -> list[list[str]]:
    """List the layers that share templates: those with kernels of one size, more than a weight."""
    scopes: dict[tuple[object, ...], list[str]] = {}
    for name, layer in used.items():
        if isinstance(layer, nn.Conv2d) and layer.weight[0, 0].numel() > 1:
            alike = {"layer": name, "group": layer.in_channels, "net": None}[scope]
            scopes.setdefault((alike, *layer.kernel_size), []).append(name)
    return list(scopes.values())


def check_whole(name: str, layer: Layer, moments: Moments) -> None:
    """Refuse kernels that have been pruned in part: a factor and an offset would fill them again.

    Raises:
        ModelError: They are more than an accident.
    """
    seen = moments.inputs.diagonal(dim1=1, dim2=2) > 0  # what is never seen is zero after a cut
    kernels = layer.weight.detach().flatten(2)
    seen = seen.repeat_interleave(len(kernels) // len(seen), dim=0).view_as(kernels)
    partly = (kernels == 0) & seen & (kernels * seen).any(dim=2, keepdim=True)
    share = float(partly.sum() / seen.sum().clamp(min=1))
    if share > PRUNED:
        raise ModelError(
            f"the kernels of {name} must be whole, or zero as a whole: {share:.0%} of its weights "
            "have been pruned from kernels, which templates would fill again; share kernels before "
            "connections are pruned, or let the stage's method be none"
        )


def templates_of(
    members: Mapping[str, Layer],
    moments: Mapping[str, Moments],
    counts: list[int],
    learn: bool,
    seed: int,
) -> dict[int, Templates]:
    """Cluster the kernels of layers into each of some numbers of templates.

    Kernels count by their energy and by what an error in them costs.

    Args:
        members: Layers with kernels of one size.
        moments: Their statistics.
        counts: Numbers of templates, rising.
        learn: Whether training moves the templates.
        seed: Seed of the clustering.

    Returns:
        Templates by their number, the most used first; that is less than asked for where kernels
        have fewer shapes.
    """
    weights = [layer.weight.detach() for layer in members.values()]
    kernels = torch.cat([weight.flatten(2).flatten(0, 1) for weight in weights])
    costs = [
        moments[name].importance.view(*layer.weight.shape[:2], -1).mean(dim=2).flatten()
        for name, layer in members.items()
    ]
    mass = kernels.var(dim=1, correction=0) * torch.cat(costs)
    points, found = standardise(kernels), dict[int, Templates]()
    for count in counts:
        centres = k_lines(kernels, count, seed=seed, weight=mass)
        if not len(centres):  # all kernels are flat
            centres = kernels.new_zeros(1, kernels.shape[1])
        usage = torch.bincount(match(points, centres).labels, minlength=len(centres))
        order = usage.argsort(descending=True, stable=True)
        values = (centres[order] / TEMPLATE_STEP).round() * TEMPLATE_STEP
        found[len(values)] = Templates(values.view(-1, *weights[0].shape[2:]), learn=learn)
    return found


def kernel_options(
    layer: Layer,
    templates: Mapping[int, Templates],
    moments: Moments,
    n_layers: int,
    generator: torch.Generator,
) -> list[Option]:
    """Describe a layer as multiples of each number of templates.

    Args:
        layer: Plain convolution.
        templates: By their number.
        moments: Its statistics.
        n_layers: How many layers share the bytes of the templates.
        generator: Chooses samples.
    """
    seen, found = look(layer.weight.detach(), moments), []
    for n_templates, module in templates.items():
        fit = fit_alone(seen, module.values.detach().flatten(1))
        steps = steps_of_kernels(fit, seen.gain, 1.0)
        factors, offsets = (
            block(values, step, power / power.mean().clamp(min=1e-30), 0.0, generator)
            for values, step, power in zip(
                (fit.factors, fit.offsets),
                steps,
                (fit.factor_power, fit.offset_power),
                strict=True,
            )
        )
        side = BIAS_BITS * len(layer.weight) + TEMPLATE_BITS * module.values.numel() / n_layers
        factors = factors._replace(
            side_bits=factors.side_bits + side,
            beside_bits=float(index_lengths(fit.indices, n_templates)[fit.indices].mean()),
        )
        damage = 0.5 * float((seen.gain * fit.left.sum(dim=1)).sum())
        found.append(Option(0, None, (factors, offsets), damage, n_templates=n_templates))
    return found


def apply(source: Source, allocation: Allocation) -> nn.Module:
    """Give every layer the form that was chosen for it, and measure batch-norm again."""
    result = plain(source.network)
    statistics.note_offsets_(result, source.images)
    for name, option in allocation.chosen.items():
        layer, moments = layers(result)[name], source.moments[name]
        if option.n_templates:
            templates = source.templates[name][option.n_templates]
            multiply_compensated_(layer, templates, moments, allocation.theta)
        else:
            quantize_compensated_(layer, moments, allocation.theta)
    statistics.recalibrate_(result, source.images)
    return result


def _outcome(found: Attempt) -> Outcome:
    allocation = found.allocation
    changed = {
        name: {
            "templates": float(option.n_templates),
            "n_bytes": round(sum(allocation.n_bytes[name]), 1),
            "distortion": allocation.damage[name],
        }
        for name, option in allocation.chosen.items()
    }
    notes: dict[str, float | str] = {
        "shared": float(sum(option.n_templates > 0 for option in allocation.chosen.values())),
        "distortion": allocation.total_damage,
        "theta": allocation.theta,
        "expected_bytes": round(found.expected),
        "allocation": fingerprint(allocation),
    }
    return Outcome(found.model, notes, changed)
