r"""Factorise layers into thinner ones, each layer in the way that its outputs ask for.

A layer becomes a chain: its filters to ``r`` channels, then 1x1 (svd); 1x1 to ``r``, its filters
from there to ``s``, 1x1 (tucker); or 1x1 to ``r``, one filter for each of these, 1x1 (cp). Kind,
ranks and steps of all layers come from one allocator, so that the encoded file meets the budget at
the least damage to the network's outputs; a layer that gains nothing is only rounded.

Chains have ``r (I T + O)``, ``I r + T r s + s O`` and ``r (I + T + O)`` weights instead of
``O I T``, and as many multiply-accumulates a position, where strides are one. Layers are fitted to
the inputs they see and to what their outputs are worth, and each is rounded before the next is
fitted. To fit the weights alone costs 1.5 to 9 times the damage. At 20 times fewer bytes and
untrained, ResNet-20 has 5 layers factorised and diverges as with projections, with 6 % fewer
multiply-accumulates (docs/adr/0029); at 10 times it does no better than rounding alone. Does not
help layers of few channels, nor 1x1 convolutions, for which svd is a projection; grouped and
depthwise ones are left as they are. Small layers take longer to call than to compute: fewer
multiply-accumulates are not always less time.

Reference:
    Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
    Applications", ICLR 2016, for Tucker-2, and Lebedev et al., "Speeding-up Convolutional Neural
    Networks Using Fine-tuned CP-Decomposition", ICLR 2015. There ranks are chosen by layer and
    weights are approximated; here the allocator chooses, and outputs are approximated. Rows and
    columns of a kernel stay together in cp. `project_channels` is the general form of a projection
    of the inputs: grouped, and folded into the neighbours where that is free.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from filterpress.building import fit_chains
from filterpress.chains import kinds_of
from filterpress.fitting import Goal
from filterpress.methods import Outcome

KINDS = ("svd", "tucker", "cp")


@dataclass(frozen=True, kw_only=True)
class FactorConfig:
    """How `factor_layers` chooses.

    Attributes:
        images: Calibration images; fewer where they are large.
        kinds: Factorisations that layers may take, with commas between: svd, tucker and cp.
    """

    images: int = 1024
    kinds: str = ",".join(KINDS)

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"images must be at least 1, got {self.images}")
        kinds_of(self.kinds, KINDS)


def factor_layers(
    model: nn.Module, images: Tensor, config: FactorConfig, *, goal: Goal, seed: int = 0
) -> Outcome:
    """Factorise and quantise the layers of a network until its file meets a budget.

    Args:
        model: Network to shrink.
        images: ``(N, C, H, W)`` normalised calibration images.
        config: How to choose.
        goal: What its file shall meet.
        seed: Seed of the statistics.

    Returns:
        The network with quantised, partly factorised layers; the number of layers ``cut``, in all
        and by kind, of those that no kind suits (``unsuited``), the ``distortion`` and the bytes
        predicted, and ``theta``. Where no allocation meets the budget, the smallest.

    Raises:
        ModelError: Every allocation found is one to avoid.
    """
    kinds = kinds_of(config.kinds, KINDS)
    return Outcome(*fit_chains(model, images, kinds, goal=goal, seed=seed))
