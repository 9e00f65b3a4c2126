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
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from filterpress import statistics
from filterpress.activations import Activated, ActivationQuantizer
from filterpress.allocation import Allocation, Rates, options, steps_of
from filterpress.annealing import Annealed, harden, soften, width
from filterpress.checkpoints import NO_CHECKPOINTS, Checkpoints
from filterpress.fitting import Attempt, Goal, fingerprint, fit_budget
from filterpress.grids import best_grid, range_grid
from filterpress.methods import Outcome
from filterpress.representations import Layer, integers_of, is_quantized
from filterpress.retraining import FineTuneConfig, fine_tune_, fit_steps_
from filterpress.rounding import quantize_at_, round_compensated
from filterpress.statistics import Moments
from filterpress.surgery import layers, plain
from filterpress.tasks import Task, calibration
from filterpress.training import steps_per_epoch


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

    Rare large activations matter far more than their squared error says: ranges of least error make
    the outputs of ResNet-20 diverge ten times as far as these (docs/adr/0028).

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
