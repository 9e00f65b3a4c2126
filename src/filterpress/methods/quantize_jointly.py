r"""Prune and quantise weights, and quantise activations, all at once while training.

Every number is an average over levels that anneals to one of them, with zero for all weights below
a threshold (see `soft_levels`); weights, thresholds, steps and the scales of activations learn from
one cost: the loss against the network that was given, plus the expected bits of the file at a
price that follows the budget.

A weight costs what its integer takes entropy-coded, as after ``quantize``; each layer adds some 45
bytes of graph, which small networks feel. Multiply-accumulates stay; with 8-bit activations those
between two layers without a sum are of integers. Does not help speed in ONNX Runtime on a CPU where
sums of feature maps keep every other layer in floating point: ResNet-20 took 1.3 times as long as
without (README, presets compared). Does not help where rounding alone loses next to nothing, as at
a tenth of ResNet-20: training in few steps loses more. A step takes longer than an ordinary one.

Reference:
    Wang et al., "Differentiable Joint Pruning and Quantization for Hardware Efficiency", ECCV 2020,
    for one cost; see `soft_levels` for the averages. Here the price of a bit comes from a budget of
    bytes, widths follow from code lengths, and training begins with a file that fits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from filterpress import statistics
from filterpress.activations import Activated, ActivationQuantizer
from filterpress.allocation import SLOPE, Allocation, Rates, options, steps_of
from filterpress.checkpoints import NO_CHECKPOINTS, Checkpoints
from filterpress.fitting import Attempt, Goal, fingerprint, fit_budget
from filterpress.forms import Quantized
from filterpress.grids import best_grid, range_grid
from filterpress.methods import Outcome
from filterpress.representations import (
    UNROUNDED,
    Layer,
    form_of,
    integers_of,
    is_quantized,
    step_of,
    without_quantization,
)
from filterpress.retraining import FineTuneConfig, fine_tune_, fit_steps_
from filterpress.rounding import quantize_at_, round_compensated
from filterpress.soft_levels import WARM, SoftActivations, SoftWeight
from filterpress.statistics import Moments
from filterpress.surgery import layers, plain
from filterpress.tasks import Task, calibration
from filterpress.training import steps_per_epoch

COLD = 0.05  # temperature in the end
SIZES = 8  # times that the file is encoded while training, to learn what the estimate leaves out
PULL = 400.0  # nats by which the price would grow in a training with a file twice the budget
AIM = 0.995  # of the largest file: a file that misses it has to round more coarsely than it learned
MOST = 0.2  # of the excess or want of bits that counts


@dataclass(frozen=True, kw_only=True)
class JointConfig(FineTuneConfig):
    """How `quantize_jointly` trains: as `FineTuneConfig`, with another optimizer.

    Attributes:
        images: Calibration images.
        bits: Width of the widest integers of weights, 2 to 8; the cost makes them narrower. Eight
            bits can overflow on devices that add the products of two in 16 bits.
        act_bits: Width of activations, 2 to 8; 0 leaves them as they are.
    """

    epochs: int = 3
    lr: float = 0.002
    optimizer: Literal["sgd", "adamw"] = "adamw"
    images: int = 1024
    bits: int = 7
    act_bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images < 2:
            raise ValueError(f"images must be at least 2, got {self.images}")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be in 2..8, got {self.bits}")
        if self.act_bits != 0 and not 2 <= self.act_bits <= 8:
            raise ValueError(f"act_bits must be in 2..8, or 0 for none, got {self.act_bits}")


def quantize_jointly(
    model: nn.Module,
    task: Task,
    config: JointConfig,
    *,
    goal: Goal,
    seed: int = 0,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> Outcome:
    """Prune and quantise a network while training it.

    It begins with the network rounded so that its file fits, and leaves it at that where no steps
    make it fit. What is zero then stays zero.

    Args:
        model: Network to shrink, which the new one imitates.
        task: Data, loss and score.
        config: How to train.
        goal: What its file shall meet.
        seed: Seed of the statistics and of the order of the images.
        checkpoints: Where training goes on from, if they are there.

    Returns:
        The network with quantised layers, whose pruned weights are exactly zero, each behind a
        quantiser of its inputs if these are to be rounded; the share of weights ``pruned``, how
        often steps were ``coarsened`` in the end, ``theta`` of the beginning, the ``price`` of a
        bit in the end, and the ``allocation`` of the beginning.

    Raises:
        ModelError: Every allocation found is one to avoid, or the training diverged.
    """
    images = calibration(task, config.images, seed)
    start = begin(model, images, config, goal, seed)
    notes: dict[str, float | str] = {
        "theta": start.allocation.theta,
        "allocation": fingerprint(start.allocation),
    }
    if start.n_bytes > goal.max_bytes:
        return _outcome(start.model, notes)
    n_steps = config.epochs * steps_per_epoch(task, config)
    soft = Annealed(soften(start.model, config.bits), start.allocation.theta, n_steps, goal)
    fine_tune_(
        soft,
        copy.deepcopy(model),
        task,
        config,
        seed=seed,
        description="reduce",
        penalty=soft.cost,
        checkpoint=checkpoints.take(),
    )
    hard = harden(soft.network)
    statistics.recalibrate_(hard, images)
    coarsened = fit_steps_(hard, images, goal)
    return _outcome(hard, notes | {"price": float(soft.price), "coarsened": float(coarsened)})


def _outcome(model: nn.Module, notes: dict[str, float | str]) -> Outcome:
    found = {n: integers_of(m) for n, m in layers(model).items() if is_quantized(m)}
    zeros = sum(int((integers == 0).sum()) for integers in found.values())
    changed = {
        name.removesuffix(".layer"): {
            "bits": float(width(integers)),
            "pruned": float((integers == 0).float().mean()),
        }
        for name, integers in found.items()
    }
    total = sum(integers.numel() for integers in found.values())
    return Outcome(model, {"pruned": zeros / total} | notes, changed)


def width(integers: Tensor) -> int:
    """Return the bits of the narrowest symmetric integers that hold some, at least 2."""
    return max(2, 1 + int(integers.abs().max()).bit_length())


def begin(model: nn.Module, images: Tensor, config: JointConfig, goal: Goal, seed: int) -> Attempt:
    """Round a network, without training, so that its file fits.

    Args:
        model: Network to shrink.
        images: ``(N, C, H, W)`` calibration images.
        config: The widths.
        goal: What its file shall meet.
        seed: Seed of the statistics.
    """
    network = statistics.plain_for(model, images)
    moments = statistics.measure(network, images, seed=seed)
    used = {name: layer for name, layer in layers(network).items() if name in moments}
    quantizers = input_quantizers(network, images, config.act_bits) if config.act_bits else {}
    finest = {  # steps of least error with as many integers as there may be
        n: best_grid(
            layer.weight.detach().flatten(1), moments[n].importance, config.bits, symmetric=True
        ).step
        for n, layer in used.items()
    }

    def build(allocation: Allocation) -> nn.Module:
        result = plain(network)
        for name, layer in layers(result).items():
            if name in used:
                steps = steps_of(layer.weight.detach(), moments[name], allocation.theta)
                steps = torch.maximum(steps, finest[name])
                round_(layer, steps, moments[name], allocation.theta, config.bits)
            if name in quantizers:
                result.set_submodule(name, Activated(quantizers[name], layer))
        statistics.recalibrate_(result, images)
        return result

    rates = Rates(
        {n: options(layer, moments[n], max_groups=1, seed=seed)[:1] for n, layer in used.items()}
    )
    return fit_budget(rates, build, goal)


def round_(layer: Layer, steps: Tensor, moments: Moments, theta: float, bits: int) -> None:
    """Make a plain layer compute with integers, chosen for its outputs, of a width at most.

    Args:
        layer: The layer, changed in place.
        steps: ``(O,)`` positive.
        moments: Its statistics.
        theta: Cost of rounding a weight.
        bits: The width.
    """
    largest = torch.full_like(steps, 2 ** (bits - 1) - 1)
    integers = round_compensated(layer.weight.detach(), steps, moments, theta)
    integers = integers.clamp(-largest[:, None], largest[:, None])
    quantize_at_(layer, integers, steps, -largest, largest)


def input_quantizers(
    network: nn.Module, images: Tensor, bits: int
) -> dict[str, ActivationQuantizer]:
    """Spread levels over the range of what each layer reads.

    Rare large activations matter far more than their squared error says: ranges of least error made
    the outputs of ResNet-20 diverge by 0.17, these by 0.0001.

    Args:
        network: A plain network.
        images: ``(N, C, H, W)`` calibration images.
        bits: Number of levels, as a power of two.
    """
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            seen[name] = torch.stack(inputs[0].detach().aminmax())

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name, layer in layers(network).items():
            stack.callback(layer.register_forward_pre_hook(look(name)).remove)
        network(images[: statistics.batch_size(images)])
    found = {}
    for name, values in seen.items():
        grid = range_grid(values[None], bits, symmetric=False)
        found[name] = ActivationQuantizer(float(grid.step), -int(grid.low), bits)
    return found


def soften(network: nn.Module, bits: int) -> nn.Module:
    """Copy a quantised network with soft quantisers in place of hard ones.

    Weights begin as they are rounded. So those that are zero have been pruned, and stay zero.

    Args:
        network: What `begin` made.
        bits: Of the widest integers of weights.
    """
    # From the edge of their cells, cooling alone would let weights fall to the other side.
    result = without_quantization(network, rounded=True)
    steps = {name: step_of(m) for name, m in layers(network).items() if is_quantized(m)}
    typical = float(torch.cat([*steps.values()]).median())
    for name, step in steps.items():
        soft = SoftWeight(step.clone(), typical, bits)
        parametrize.register_parametrization(layers(result)[name], "weight", soft)
    for name, module in list(result.named_modules()):
        if isinstance(module, ActivationQuantizer):
            result.set_submodule(name, SoftActivations(module))
    return result


def harden(network: nn.Module) -> nn.Module:
    """Copy a softly quantised network with what its quantisers are in the limit.

    Args:
        network: What `soften` made, trained.

    Returns:
        The copy in evaluation mode. Its weights are bounded by the widths of their layers; those
        that are not zero learn on from where they are in the cell of their integer.
    """
    result = without_quantization(network, rounded=False)
    for name, layer in layers(network).items():
        soft, bare = form_of(layer), layers(result)[name]
        if not isinstance(soft, SoftWeight):
            continue
        latent, steps = layer.get_parameter(UNROUNDED).detach(), soft.steps.detach()
        integers = soft.integers(latent)
        units = torch.where(integers == 0, 0, soft.units(latent))
        with torch.no_grad():
            bare.weight.copy_(units * Quantized.rows(steps, units))
        largest = torch.full_like(steps, 2 ** (width(integers) - 1) - 1)
        quantize_at_(bare, integers.flatten(1), steps, -largest, largest)
    for name, module in list(result.named_modules()):
        if isinstance(module, SoftActivations):
            result.set_submodule(name, module.hard())
    return result.eval()


class Annealed(nn.Module):
    """A softly quantised network in training, and what the bits of its file cost.

    The price begins at what a bit is worth to the allocator, and rises or falls while the file is
    larger or smaller than the budget. What the file has besides the code lengths of its integers is
    measured again from time to time. All that the training goes on from is part of the state.

    Args:
        network: What `soften` made.
        theta: Of the allocation it began with.
        n_steps: Steps of the training.
        goal: What its file shall meet.
    """

    price: Tensor  # nats a bit
    step: Tensor  # of the training, from 0
    target: Tensor  # bits of the integers with which the file would meet the budget

    def __init__(self, network: nn.Module, theta: float, n_steps: int, goal: Goal) -> None:
        super().__init__()
        self.network, self.n_steps, self.goal = network, n_steps, goal
        state = {"price": SLOPE * theta / 8, "step": 0.0, "target": math.nan}
        for name, value in state.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64))
        self.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            lambda *_: self._cool(float(self.step) - 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Run the network."""
        outputs: Tensor = self.network(images)
        return outputs

    def cost(self) -> Tensor:
        """Return the penalty ``()`` of the next step, and cool the quantisers."""
        step, price, target = (float(value) for value in (self.step, self.price, self.target))
        self._cool(step)
        counted = [
            form.bits(layer.get_parameter(UNROUNDED))
            for layer in layers(self.network).values()
            if isinstance(form := form_of(layer), SoftWeight)
        ]
        expected, bits = (torch.stack(parts).sum() for parts in zip(*counted, strict=True))
        if step % math.ceil(self.n_steps / SIZES) == 0:
            left = AIM * self.goal.max_bytes - self.goal.size(harden(self.network))
            target = max(1.0, float(bits) + 8 * left)
        excess = min(max(float(bits) / target - 1, -MOST), MOST)
        price *= math.exp(PULL / self.n_steps * excess)
        for buffer, value in ((self.step, step + 1), (self.price, price), (self.target, target)):
            buffer.fill_(value)
        return price * expected

    def _cool(self, step: float) -> None:
        for module in self.network.modules():
            if isinstance(module, SoftWeight | SoftActivations):
                module.temperature = WARM * (COLD / WARM) ** (max(0.0, step) / self.n_steps)
