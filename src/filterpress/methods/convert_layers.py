r"""Convert layers into cheaper structures, each fitted to what the layer puts out.

A k x k convolution becomes a k x 1 and a 1 x k one with ``r`` channels between (spatial), or ``r``
filters for each input channel by itself and a 1x1 convolution over what these give (separable: the
best sum of ``r`` depthwise-separable convolutions, not only of one); a linear layer becomes two
with ``r`` features between (low-rank). Structure, rank and steps of all layers come from one
allocator under the budget; a layer that gains nothing is only rounded.

The structures have ``r k (I + O)``, ``r I (k^2 + O)`` and ``r (I + O)`` weights instead of
``O I k^2``, and as many multiply-accumulates a position, where strides are one. Bytes alone choose
them: at 20 times fewer and untrained, ResNet-20 has 6 of its layers converted and diverges by 0.004
instead of 0.0056 with projections and 0.0073 only rounded (docs/adr/0029). Does not help at 10
times, nor 1x1 and grouped convolutions, which are left as they are, nor the linear layer that ends
a network, which is small. Depthwise layers read and write many channels for little arithmetic, so
that separable takes more time for as many multiply-accumulates.

Reference:
    Jaderberg et al., "Speeding up Convolutional Neural Networks with Low Rank Expansions", BMVC
    2014, scheme 2, for k x 1 and 1 x k; Guo et al., "Network Decoupling: From Regular to Depthwise
    Separable Convolutions", BMVC 2018, for the sum. Both approximate the weights in closed form;
    here it is done in the metric of inputs and outputs, and the last layer is the least-squares fit
    to the rounded ones before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from filterpress.building import fit_chains
from filterpress.chains import kinds_of
from filterpress.fitting import Goal
from filterpress.methods import Outcome

KINDS = ("spatial", "separable", "low-rank")


@dataclass(frozen=True, kw_only=True)
class ConversionConfig:
    """How `convert_layers` chooses.

    Attributes:
        images: Calibration images; fewer where they are large.
        kinds: Structures that layers may take, with commas between: spatial, separable and
            low-rank.
    """

    images: int = 1024
    kinds: str = ",".join(KINDS)

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"images must be at least 1, got {self.images}")
        kinds_of(self.kinds, KINDS)


def convert_layers(
    model: nn.Module, images: Tensor, config: ConversionConfig, *, goal: Goal, seed: int = 0
) -> Outcome:
    """Convert and quantise the layers of a network until its file meets a budget.

    Args:
        model: Network to shrink.
        images: ``(N, C, H, W)`` normalised calibration images.
        config: How to choose.
        goal: What its file shall meet.
        seed: Seed of the statistics.

    Returns:
        The network with quantised, partly converted layers; the number of layers ``cut``, in all
        and by kind, of those that no kind suits (``unsuited``), the ``distortion`` and the bytes
        predicted, and ``theta``. Where no allocation meets the budget, the smallest.

    Raises:
        ModelError: Every allocation found is one to avoid.
    """
    kinds = kinds_of(config.kinds, KINDS)
    return Outcome(*fit_chains(model, images, kinds, goal=goal, seed=seed))
