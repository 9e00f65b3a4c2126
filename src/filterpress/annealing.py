"""A network whose quantisers anneal while it trains, at a price for the bits of its file.

It is made of a rounded one (`soften`), and becomes one again (`harden`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from filterpress.activations import ActivationQuantizer
from filterpress.allocation import SLOPE
from filterpress.fitting import Goal
from filterpress.forms import Quantized
from filterpress.representations import (
    UNROUNDED,
    form_of,
    is_quantized,
    step_of,
    without_quantization,
)
from filterpress.rounding import quantize_at_
from filterpress.soft_levels import WARM, SoftActivations, SoftWeight
from filterpress.surgery import layers

COLD = 0.05  # temperature in the end
SIZES = 8  # times that the file is encoded while training, to learn what the estimate leaves out
PULL = 400.0  # nats by which the price would grow in a training with a file twice the budget
AIM = 0.995  # of the largest file: a file that misses it has to round more coarsely than it learned
MOST = 0.2  # of the excess or want of bits that counts


def width(integers: Tensor) -> int:
    """Return the bits of the narrowest symmetric integers that hold some, at least 2."""
    return max(2, 1 + int(integers.abs().max()).bit_length())


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
