"""Layers that read rounded activations, as integers on the device.

A quantiser before a layer rounds what it reads to a few levels. In the graph it is a pair of
QuantizeLinear and DequantizeLinear, which runtimes know to be integers (see `export`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _RoundInputs(torch.autograd.Function):
    """Multiples of a scale within a range; the gradient passes where nothing was cut off.

    In a graph it is QuantizeLinear and DequantizeLinear, whose scale is a constant of the graph: no
    codec rounds it, and a runtime finds the very integers.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
        # divided, and in single precision, as the runtime does: the integers are the same
        integers = torch.round(x.float() / scale)
        low, high = -zero_point, 2**bits - 1 - zero_point
        ctx.save_for_backward((integers >= low) & (integers <= high))
        return integers.clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None

    @staticmethod
    def symbolic(graph: Any, x: Any, scale: float, zero_point: int, bits: int) -> Any:
        def constant(value: float, dtype: torch.dtype = torch.float32) -> Any:
            return graph.op("Constant", value_t=torch.tensor(value, dtype=dtype))

        if bits < 8:  # a runtime's integers have 8 bits
            low, high = -zero_point, 2**bits - 1 - zero_point
            x = graph.op("Clip", x, constant(low * scale), constant(high * scale))
        grid = constant(scale), constant(zero_point, torch.uint8)
        return graph.op("DequantizeLinear", graph.op("QuantizeLinear", x, *grid), *grid)


class ActivationQuantizer(nn.Module):
    """Round what a layer reads to ``2**bits`` multiples of a scale, zero among them.

    The straight-through estimator trains what comes before it; it has nothing to learn itself.

    Args:
        scale: Distance between two levels, positive; rounded to float32.
        zero_point: Number of levels below zero; 0 where inputs are never negative.
        bits: 2 to 8.
    """

    def __init__(self, scale: float, zero_point: int, bits: int) -> None:
        super().__init__()
        self.scale = float(torch.tensor(scale, dtype=torch.float32))
        self.zero_point = zero_point
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """Return the nearest levels to activations of any shape, in single precision."""
        rounded = _RoundInputs.apply(x, self.scale, self.zero_point, self.bits)  # type: ignore[no-untyped-call]
        return rounded  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Say what the levels are."""
        return f"scale={self.scale:.3g}, zero_point={self.zero_point}, bits={self.bits}"


class Activated(nn.Sequential):
    """A layer behind the quantiser of its inputs."""

    def __init__(self, quantizer: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.add_module("quantizer", quantizer)
        self.add_module("layer", layer)
