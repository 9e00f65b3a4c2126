r"""Round each layer's weights to a few levels, of a width that is given or chosen for each layer.

The levels are integers times a step, for each output channel or for a whole layer, or a codebook
of any ``2**bits`` numbers. The step spans the range of the weights, or is searched for the least
error, of the weights or of the outputs; each weight takes the nearest level, or one that makes up
for the errors of others. Biases take over the mean error that is left.

A weight costs ``bits`` or, entropy-coded, less, besides 6 bits a step or 16 bits a level; the
multiply-accumulates stay. With ``bits = 0`` the allocator chooses widths under the byte budget; any
other width is taken as it is, and the file is as large as it comes out. Codebooks pay where weights
are many and bits few: their levels travel with each layer, and batch-norm after a convolution is
not folded into one. A single bit needs retraining. Since the coder writes rare integers with more
bits, many levels over the whole range can cost less than few over a part of it.

Reference:
    Nagel et al., "A White Paper on Neural Network Quantization", 2021, for grids, ranges and bias
    correction; Han et al., "Deep Compression", ICLR 2016, for codebooks; see `grids`, `rounding`
    and `learned_rounding`. All is measured on the network as it was: layers are quantised
    independently of one another, and batch-norm is measured again in the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from filterpress import statistics
from filterpress.allocation import Allocation, Rates
from filterpress.fitting import Goal, fingerprint, fit_budget
from filterpress.grids import Levels
from filterpress.levels import fit_levels, level_option, rounder
from filterpress.methods import Outcome
from filterpress.progress import progress
from filterpress.representations import Layer
from filterpress.statistics import Moments
from filterpress.surgery import layers

CHOICES = {
    "grid": ("symmetric", "asymmetric", "codebook"),
    "per": ("channel", "tensor"),
    "fit": ("range", "weights", "outputs"),
    "rounding": ("nearest", "compensated", "learned"),
}


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How `quantize_weights` chooses levels and rounds to them.

    Attributes:
        images: Calibration images.
        bits: Width of each weight before it is entropy-coded, 1 to 8; 0 chooses one for each layer,
            so that the file meets the budget.
        grid: symmetric (as many integers below zero as above), asymmetric (zero anywhere among the
            integers), or codebook (levels anywhere).
        per: channel or tensor: what has a step, or a codebook, of its own.
        fit: range (levels span the weights), weights or outputs (levels of least error of these).
        rounding: nearest, compensated (errors are fed back to later weights), or learned (up or
            down, all weights at once; slow for wide layers).
    """

    images: int = 1024
    bits: int = 0
    grid: str = "symmetric"
    per: str = "channel"
    fit: str = "outputs"
    rounding: str = "compensated"

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"images must be at least 1, got {self.images}")
        if not 0 <= self.bits <= 8:
            raise ValueError(f"bits must be in 1..8, or 0 to choose them, got {self.bits}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if self.grid == "asymmetric" and self.bits == 1:
            raise ValueError("bits must be 2 or more for an asymmetric grid, got 1")
        if self.grid == "codebook" and self.per != "tensor":
            raise ValueError(f"per must be tensor for a codebook, got {self.per}")
        if self.grid == "codebook" and self.fit == "range":
            raise ValueError("fit must be weights or outputs for a codebook, got range")

    @property
    def widths(self) -> range:
        """The widths a layer can take."""
        if self.bits:
            return range(self.bits, self.bits + 1)
        return range(2 if self.grid == "asymmetric" else 1, 9)

    def levels_of(self, layer: Layer, moments: Moments, seed: int) -> dict[int, Levels]:
        """Fit levels of each width to a layer's weights."""
        weight = layer.weight.detach()
        return {
            bits: fit_levels(
                weight, moments, self.grid, bits, per=self.per, fit=self.fit, seed=seed
            )
            for bits in self.widths
        }


def quantize_weights(
    model: nn.Module,
    images: Tensor,
    config: QuantizationConfig,
    *,
    goal: Goal,
    seed: int = 0,
) -> Outcome:
    """Quantise the weights of a network.

    Args:
        model: Network to shrink.
        images: ``(N, C, H, W)`` normalised calibration images.
        config: How to quantise.
        goal: What its file shall meet, where widths are chosen and not given.
        seed: Seed of the statistics and of codebooks.

    Returns:
        The network with quantised layers; the mean number of ``bits`` a weight before entropy
        coding, the ``distortion`` predicted for rounding to the nearest level, and the
        ``allocation``. Where no widths meet the budget, the smallest.

    Raises:
        ModelError: All widths found are to avoid.
    """
    network = statistics.plain_for(model, images)
    moments = statistics.measure(network, images, seed=seed)
    used = {name: layer for name, layer in layers(network).items() if name in moments}

    fitted: dict[str, dict[int, Levels]] = {}
    with progress("reduce", len(used)) as advance:
        for name, layer in used.items():
            fitted[name] = config.levels_of(layer, moments[name], seed)
            advance()

    rates = Rates(
        {
            name: [
                level_option(used[name], levels, moments[name], config.rounding)
                for levels in found.values()
            ]
            for name, found in fitted.items()
        }
    )
    build = rounder(network, images, moments, config.rounding)
    if config.bits:
        allocation = rates.allocate(1.0)
        return _outcome(build(allocation), allocation, used)
    best = fit_budget(rates, build, goal)
    return _outcome(best.model, best.allocation, used)


def _outcome(model: nn.Module, allocation: Allocation, used: Mapping[str, Layer]) -> Outcome:
    counts = {name: layer.weight.numel() for name, layer in used.items()}
    total = sum(counts[name] * option.bits for name, option in allocation.chosen.items())
    changed = {
        name: {
            "bits": float(option.bits),
            "n_bytes": round(option.n_bytes, 1),
            "distortion": allocation.damage[name],
        }
        for name, option in allocation.chosen.items()
    }
    notes: dict[str, float | str] = {
        "bits": total / sum(counts.values()),
        "distortion": allocation.total_damage,
        "allocation": fingerprint(allocation),
    }
    return Outcome(model, notes, changed)
