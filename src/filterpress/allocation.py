r"""One allocator: what form each layer takes and how finely it is quantised, for a number of bytes.

Every layer offers options: stay as it is, become a projection of rank ``r`` in ``G`` groups of
filters, or be rounded to fixed levels (see `levels`). Each option has a damage of its own and, once
its weights are rounded to steps, a damage and a number of bytes that both follow from the steps.
The steps follow from one number for the whole network, ``theta``: rounding to the nearest multiple
of :math:`\Delta_o` costs :math:`\theta / 12` a weight when

.. math:: \tfrac12 g_o \bar a \Delta_o^2 = \theta

(``g`` and ``a``: gain and mean power of the inputs, see `statistics`), which is where no bit can be
moved from one weight to another with profit. Half of that is left where errors are made up for (see
`rounding`). There the damage saved by a byte is ``theta`` times `SLOPE`, and each layer by itself
takes the option of least damage + slope * bytes. Bisection on ``theta`` meets the budget (see
`fitting`).

Reference:
    Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988; reverse
    water-filling as in Cover and Thomas, section 10.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor, nn

from filterpress.cuts import Plan
from filterpress.grids import Levels
from filterpress.representations import Layer
from filterpress.statistics import Moments
from filterpress.subspaces import (
    ChannelMoments,
    Subspaces,
    channel_moments,
    input_subspaces,
    taps_of,
)

LEFT = 0.5  # share of the damage of rounding to the nearest that is left with errors fed back
SLOPE = LEFT * 8 * 2 * math.log(2) / 12  # damage saved by a byte at theta = 1: d/db 2**(-2b) / 12
SAMPLES = 4096  # weights of a block that stand for all of them
N_RANKS = 12  # ranks offered a layer and number of groups
LINEAR, BINS = 64, 8  # integers told apart up to the first, then in so many bins an octave
OCTAVES = 64  # above LINEAR told apart
STEP_BITS = 6.0  # a row's step in the file
BIAS_BITS = 9.0  # a row's bias in the file


class Block(NamedTuple):
    """Weights that are quantised together, by a sample of those that have not been pruned."""

    units: Tensor  # (SAMPLES,) weight over the step that costs theta = 1
    noise: Tensor  # (SAMPLES,) how much the weight's error counts, mean 1
    n_weights: int
    side_bits: float  # steps and biases
    beside_bits: float = 0.0  # of each weight that is not rounded to zero, besides its integer
    share: float = 1.0  # of the weights that have not been pruned


class Option(NamedTuple):
    """One form that a layer can take."""

    rank: int  # 0: stay as it is
    subspaces: Subspaces | None
    blocks: tuple[Block, ...]
    damage: float
    folded: bool = False  # the projection is in the neighbours, with which the layer must agree
    n_bytes: float = 0.0  # in place of blocks, whatever theta is
    levels: Levels | None = None  # of the weights, if these do not follow from theta
    n_templates: int = 0  # that kernels are multiples of; 0: they are not
    plan: Plan | None = None  # of the chain of layers that it becomes

    @property
    def groups(self) -> int:
        """Number of groups of filters, 1 for a layer that stays as it is."""
        return 1 if self.subspaces is None else len(self.subspaces.bases)

    @property
    def bits(self) -> int:
        """Width of a weight before entropy coding, 0 where it follows from ``theta``."""
        return 0 if self.levels is None else self.levels.bits

    @property
    def form(self) -> tuple[object, ...]:
        """What becomes of a layer, but for the steps that follow from ``theta``."""
        kind, n_levels = "", 0
        if self.levels is not None:
            kind, n_levels = self.levels.kind, self.levels.n_levels
        chain = () if self.plan is None else (self.plan.kind, *self.plan.ranks)
        return self.rank, self.groups, self.folded, n_levels, kind, self.n_templates, *chain


class Allocation(NamedTuple):
    """What the allocator chose."""

    theta: float
    chosen: dict[str, Option]
    n_bytes: dict[str, tuple[float, ...]]  # of each layer's blocks, or of it as a whole
    damage: dict[str, float]  # of each layer

    @property
    def total_damage(self) -> float:
        """Damage of all layers."""
        return sum(self.damage.values())

    @property
    def total_bytes(self) -> float:
        """Bytes of all layers."""
        return sum(sum(split) for split in self.n_bytes.values())

    @property
    def forms(self) -> list[tuple[object, ...]]:
        """The form of each layer, with its name."""
        return [(name, *option.form) for name, option in sorted(self.chosen.items())]

    @property
    def scale(self) -> float:
        """Return ``theta``, or 1 where nothing follows from it."""
        return self.theta if any(option.blocks for option in self.chosen.values()) else 1.0


def unit_steps(gain: Tensor, power: Tensor) -> Tensor:
    """Return the step ``(O,)`` at which a row costs ``theta = 1``.

    Args:
        gain: ``(O,)`` squared derivative of the outputs by each row.
        power: ``(O,)`` mean power of the inputs of each row.
    """
    cost = 0.5 * gain * power
    # a row that does nothing would get an endless step: bound it by the layer's typical one
    floor = 1e-4 * cost.mean().clamp(min=1e-24)
    return cost.clamp(min=float(floor)).rsqrt()


def steps_of(weight: Tensor, moments: Moments, theta: float) -> Tensor:
    """Return the steps ``(O,)`` of a layer that is quantised at ``theta``."""
    power = moments.inputs.diagonal(dim1=1, dim2=2).mean(dim=1)
    power = power.repeat_interleave(len(weight) // len(power))
    return unit_steps(moments.gain, power) * math.sqrt(theta)


def options(layer: Layer, moments: Moments, *, max_groups: int = 4, seed: int = 0) -> list[Option]:
    """List the forms that a layer can take.

    Args:
        layer: A plain layer.
        moments: Its statistics.
        max_groups: Largest number of groups of filters; powers of two up to it are offered, and no
            projection at 0.
        seed: Chooses the sample of weights.

    Returns:
        The layer as it is first, then projections that need fewer weights.
    """
    weight = layer.weight.detach()
    generator = torch.Generator().manual_seed(seed)
    found = [as_it_is(weight, moments, generator)]
    power = moments.inputs.diagonal(dim1=1, dim2=2)
    grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1
    if grouped or not max_groups or not power.any():
        return found
    channels = channel_moments(weight, moments)
    most = max_groups if weight.ndim > 2 and weight[0, 0].numel() > 1 else 1
    for groups in (2**k for k in range(int(math.log2(most)) + 1)):
        if len(weight) % groups:
            continue
        subspaces = input_subspaces(weight, moments.outputs[0], channels, groups, seed=seed)
        for rank in _ranks(weight, groups, subspaces):
            found.append(_projected(weight, moments.gain, channels, subspaces, rank, generator))
    return found


def as_it_is(weight: Tensor, moments: Moments, generator: torch.Generator) -> Option:
    """Describe the option of a layer that is only rounded.

    Args:
        weight: ``(O, ...)``.
        moments: The layer's statistics.
        generator: Chooses the sample of weights.
    """
    return Option(0, None, (whole_block(weight, moments, BIAS_BITS, generator),), 0.0)


def _ranks(weight: Tensor, groups: int, subspaces: Subspaces) -> list[int]:
    n_out, n_in = weight.shape[:2]
    taps = weight[0, 0].numel()
    limit = min(
        n_out * n_in * taps / (groups * n_in + n_out * taps) * 0.95, subspaces.bases.shape[1]
    )
    if limit < 1:
        return []
    return spaced_ranks(limit, N_RANKS)


def spaced_ranks(limit: float, count: int) -> list[int]:
    """Return at most ``count`` ranks up to a limit, which is at least 1, in even ratios."""
    spaced = torch.logspace(math.log10(max(1.0, limit / 48)), math.log10(limit), count)
    return sorted({int(r) for r in spaced.round().clamp(1, int(limit)).tolist()})


def _projected(
    weight: Tensor,
    gain: Tensor,
    channels: ChannelMoments,
    subspaces: Subspaces,
    rank: int,
    generator: torch.Generator,
) -> Option:
    """Describe the option of one rank."""
    groups = len(subspaces.bases)
    each = channels.second.diagonal()
    power = each.mean()
    project = subspaces.bases[:, :rank].flatten(0, 1)  # (G r, I)
    energies = subspaces.energies[:, :rank].flatten()
    steps = unit_steps(energies, power.expand(len(energies)))
    first = block(project, steps, (each / power).expand_as(project), 0.0, generator)
    # the projected channels have power one, whatever the tap: what is left of the weight is
    # W C U^T, the least-squares solution when taps are independent
    taps = taps_of(weight)[subspaces.order]
    taps = taps.view(groups, -1, *taps.shape[1:])  # (G, O/G, I, T)
    inner = subspaces.bases[:, :rank] @ channels.second  # (G, r, I)
    rest = torch.einsum("goit,gri->gort", taps, inner).flatten(0, 1)  # (O, r, T)
    gain = gain[subspaces.order]
    noise = channels.mass.expand_as(rest)
    last = block(rest, unit_steps(gain, torch.ones(len(gain))), noise, BIAS_BITS, generator)
    damage = float(0.5 * subspaces.energies[:, rank:].sum())
    return Option(rank, subspaces, (first, last), damage)


def whole_block(
    weight: Tensor, moments: Moments, bias_bits: float, generator: torch.Generator
) -> Block:
    """Sample the weights ``(O, ...)`` of a layer of which all statistics are known."""
    power = moments.inputs.diagonal(dim1=1, dim2=2)
    noise = power / power.mean(dim=1, keepdim=True).clamp(min=1e-30)
    noise = noise.repeat_interleave(len(weight) // len(power), dim=0).view_as(weight)
    return block(weight, steps_of(weight, moments, 1.0), noise, bias_bits, generator)


def block(
    weight: Tensor, steps: Tensor, noise: Tensor, bias_bits: float, generator: torch.Generator
) -> Block:
    """Sample a block of weights.

    Args:
        weight: ``(O, ...)``.
        steps: ``(O,)`` at which each row costs ``theta = 1``.
        noise: Shape of ``weight``; how much an error counts, mean 1.
        bias_bits: Bits of a row's bias; 0 where there is none.
        generator: Chooses the sample.
    """
    flat = weight.reshape(-1)
    left = flat.nonzero().flatten()
    if not len(left):
        left = torch.arange(len(flat))
    chosen = left[torch.randint(len(left), (SAMPLES,), generator=generator)]
    units = flat[chosen] / steps[chosen // weight[0].numel()]
    side_bits = len(weight) * (STEP_BITS + bias_bits)
    share = len(left) / len(flat)
    return Block(units, noise.reshape(-1)[chosen], len(flat), side_bits, share=share)


class Rates:
    """Bytes and damage of every option, as functions of ``theta``.

    Args:
        candidates: Options by layer name.
        folds: For each group of layers that can only take an option together, the options by layer
            name, in the same order; no layer in two groups, and each one in ``candidates``.
    """

    def __init__(
        self,
        candidates: Mapping[str, Sequence[Option]],
        folds: Sequence[Mapping[str, Sequence[Option]]] = (),
    ) -> None:
        self.options: list[Option] = []
        self.alone = {name: self._number(found) for name, found in candidates.items()}
        self.together = [  # by layer name, as rows (options,)
            {name: self._number(found) for name, found in fold.items()} for fold in folds
        ]
        blocks = [(i, b) for i, option in enumerate(self.options) for b in option.blocks]
        self.owner = torch.tensor([i for i, _ in blocks], dtype=torch.long)  # (B,) option of each
        none = torch.empty(0, SAMPLES)
        self.units = torch.stack([b.units for _, b in blocks]) if blocks else none  # (B, SAMPLES)
        self.noise = torch.stack([b.noise for _, b in blocks]) if blocks else none
        self.n_weights = torch.tensor([float(b.n_weights) for _, b in blocks])
        self.side = torch.tensor([b.side_bits for _, b in blocks])
        self.beside = np.array([b.beside_bits for _, b in blocks])
        self.share = np.array([b.share for _, b in blocks])
        self.damage = torch.tensor([option.damage for option in self.options])  # (P,)
        self.n_bytes = torch.tensor([option.n_bytes for option in self.options])

    def _number(self, found: Sequence[Option]) -> Tensor:
        """List options; return their places in the list."""
        start = len(self.options)
        self.options.extend(found)
        return torch.arange(start, len(self.options))

    def blocks_at(self, theta: float) -> tuple[Tensor, Tensor]:
        """Return bytes and rounding damage ``(B,)`` of every block."""
        samples = self.units.numpy(), self.noise.numpy(), self.beside, self.share
        measured = _round_blocks(*samples, math.sqrt(theta))
        bits, damage = (torch.from_numpy(m).float() * self.n_weights for m in measured)
        return (bits + self.side) / 8, LEFT * damage

    def allocate(self, theta: float, kept: Mapping[str, Option] | None = None) -> Allocation:
        """Take the best option of every layer at one ``theta``.

        Args:
            theta: What a byte is worth.
            kept: Options by layer name, to take whatever they cost.
        """
        n_bytes, damage = self.blocks_at(theta)
        total_bytes = self.n_bytes.index_add(0, self.owner, n_bytes)
        total_damage = self.damage.index_add(0, self.owner, damage)
        if kept is None:
            best = self._cheapest(total_damage + SLOPE * theta * total_bytes)
        else:
            numbers = {id(option): number for number, option in enumerate(self.options)}
            best = {name: numbers[id(option)] for name, option in kept.items()}
        return Allocation(
            theta,
            {name: self.options[number] for name, number in best.items()},
            {
                name: tuple(n_bytes[self.owner == number].tolist())
                or (self.options[number].n_bytes,)
                for name, number in best.items()
            },
            {name: float(total_damage[number]) for name, number in best.items()},
        )

    def _cheapest(self, cost: Tensor) -> dict[str, int]:
        """Return the number of the option ``(P,)`` of least cost, by layer name."""
        best = {name: int(mine[cost[mine].argmin()]) for name, mine in self.alone.items()}
        for fold in self.together:
            joint = torch.stack([cost[mine] for mine in fold.values()]).sum(dim=0)  # (options,)
            if float(joint.min()) < sum(float(cost[best[name]]) for name in fold):
                best |= {name: int(mine[joint.argmin()]) for name, mine in fold.items()}
        return best


@njit(cache=True)
def _round_blocks(
    units: NDArray[np.float32],
    noise: NDArray[np.float32],
    beside: NDArray[np.float64],
    share: NDArray[np.float64],
    step: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the bits and the mean damage ``(B,)`` of rounding a weight to a step.

    The bits are the order-0 entropy of the integers, and what goes with those that are not zero.
    Weights that were pruned are zeros for certain, so a sample of the others says more.

    Args:
        units: (B, m) weights that have not been pruned, in steps that cost theta = 1.
        noise: (B, m) how much a weight's error counts.
        beside: (B,) bits of each integer that is not zero, besides its own.
        share: (B,) of the weights that have not been pruned, positive.
        step: Positive, in the same steps.
    """
    n_blocks, n_weights = units.shape
    entropy, damage = np.empty(n_blocks), np.empty(n_blocks)
    c_log_c = np.zeros(n_weights + 1)
    for c in range(2, n_weights + 1):
        c_log_c[c] = c * np.log2(c)
    counts = np.zeros((2, LINEAR + BINS * OCTAVES + 1), np.int32)  # of each sign and magnitude
    for b in range(n_blocks):
        counts[:] = 0
        within = error = 0.0  # bits of the place in a bin, and beside integers; damage
        for i in range(n_weights):
            value = units[b, i] / step
            integer = np.rint(value)
            error += noise[b, i] * (value - integer) ** 2
            size = abs(integer)
            code = int(min(size, LINEAR))
            if size > 0:
                within += beside[b]
            if size > LINEAR:
                code += int(BINS * min(np.log2(size / LINEAR), OCTAVES))
                within += np.log2(size * (2 ** (1 / BINS) - 1))
            counts[int(integer < 0), code] += 1
        n_zeros = counts[0, 0]
        within += c_log_c[n_zeros]
        for count in counts.flat:
            within -= c_log_c[count]
        left = share[b] * (1 - n_zeros / n_weights)  # share of integers that are not zero
        entropy[b] = share[b] * within / n_weights + left * np.log2(n_weights / share[b])
        if left < 1:
            entropy[b] -= (1 - left) * np.log2(1 - left)
        damage[b] = share[b] * error * step**2 / n_weights
    return entropy, damage
