r"""Drop whole residual blocks that the outputs of the network hardly depend on.

A block is residual if it returns its input once all its numbers are zero: an identity is all that
is left of it. One after the other goes the block that adds the least divergence of the outputs for
each of its parameters, batch-norm measured again each time, for as long as the divergence of all
drops together stays within an allowance.

Saves all bits and multiply-accumulates of a block, and the time its layers take one after the
other, which thinner layers do not; costs nothing in the file. On Fashion-MNIST ResNet-18 does
without its last block, 42 % of its weights, and loses 0.2 of 90.7 % on the validation set before
any retraining. Does not help networks that are short of blocks: of the seven of ResNet-20, trained
for 3 epochs, each is needed, and the one that costs the least takes 2 points of 92.1 % with it.
Networks without residual blocks are passed on, and blocks that change the shape stay.

Reference:
    Veit et al., "Residual Networks Behave Like Ensembles of Relatively Shallow Networks", NIPS
    2016, section 4.1, for dropping blocks of a trained network; which ones and how many is ours
    (docs/adr/0030).
"""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from filterpress import statistics
from filterpress.errors import ModelError
from filterpress.methods import Outcome
from filterpress.progress import progress
from filterpress.surgery import layers
from filterpress.training import distillation_loss, predictor

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BlocksConfig:
    """How `drop_blocks` chooses.

    Attributes:
        allowance: Largest divergence of the outputs, in nats, when all blocks chosen are gone.
        images: Calibration images; fewer where they are large.
    """

    allowance: float = 0.06
    images: int = 512

    def __post_init__(self) -> None:
        if not 0 <= self.allowance < math.inf:
            raise ValueError(f"allowance must not be negative, got {self.allowance}")
        if self.images < 2:
            raise ValueError(f"images must be at least 2, got {self.images}")


class Trial(NamedTuple):
    """What a network is without one block more."""

    name: str
    divergence: float  # of its outputs from those of the network that has all blocks
    n_parameters: int  # of the block


def drop_blocks(
    model: nn.Module,
    images: Tensor,
    config: BlocksConfig,
    *,
    seed: int = 0,  # noqa: ARG001  # every method takes one
) -> Outcome:
    """Replace residual blocks by identities.

    Args:
        model: Network to prune.
        images: ``(N, C, H, W)`` normalised calibration images, at least 2.
        config: How much may change.
        seed: Of no consequence, since nothing is drawn.

    Returns:
        The network without the blocks; how many were ``dropped``, the ``divergence`` that is left,
        and the least one, ``next``, with another block gone, if there is one. For each block the
        divergence it added when it went, and its parameters.

    Raises:
        ModelError: Outputs overflow, as in a network that was never trained.
    """
    network = statistics.plain_for(model, images)
    wanted = outputs_of(network, images)
    if not torch.isfinite(wanted).all():
        raise ModelError("the outputs must be finite, got NaN or infinity")
    reached, dropped = 0.0, {}
    while trials := without_each(network, images, wanted):
        within = [trial for trial in trials if trial.divergence <= config.allowance]
        if not within:
            break
        best = min(within, key=lambda trial: (trial.divergence - reached) / trial.n_parameters)
        network = without(network, best.name, images)
        dropped[best.name] = {
            "divergence": best.divergence - reached,
            "parameters": float(best.n_parameters),
        }
        reached = best.divergence
    notes: dict[str, float | str] = {"dropped": float(len(dropped)), "divergence": reached}
    if trials:
        notes["next"] = min(trial.divergence for trial in trials)
    return Outcome(network if dropped else copy.deepcopy(model), notes, dropped)


def without_each(network: nn.Module, images: Tensor, wanted: Tensor) -> list[Trial]:
    """Try a network without each of its residual blocks.

    Args:
        network: A plain network, see `statistics.plain_for`.
        images: ``(N, C, H, W)`` calibration images, at least 2.
        wanted: ``(N, K)`` outputs that it should have.

    Returns:
        A trial for each block; its divergence has the unit of `statistics`: to second order it is
        the damage of a change of weights.
    """
    names, trials = residual_blocks(network, images[:2]), []
    with progress("prune", len(names)) as advance:
        for name in names:
            found = outputs_of(without(network, name, images), images)
            divergence = float(distillation_loss(found, wanted, statistics.TEMPERATURE))
            log.info("without %s: divergence %.3g", name, divergence)
            block = network.get_submodule(name)
            trials.append(Trial(name, divergence, sum(p.numel() for p in block.parameters())))
            advance()
    return trials


def without(network: nn.Module, name: str, images: Tensor) -> nn.Module:
    """Copy a network with an identity in place of a block, and batch-norm measured again."""
    result = copy.deepcopy(network)
    result.set_submodule(name, nn.Identity())
    statistics.recalibrate_(result, images)
    return result


def outputs_of(network: nn.Module, images: Tensor) -> Tensor:
    """Return the outputs ``(N, K)``, in double precision for divergences that are small."""
    predict = predictor(network)
    return torch.cat([predict(batch) for batch in statistics.batches(images)]).double()


def residual_blocks(network: nn.Module, example: Tensor) -> list[str]:
    """Find the blocks that are identities but for what their own numbers add.

    Args:
        network: A plain network.
        example: ``(N, C, H, W)`` input to run it with.

    Returns:
        Names of modules that hold layers, take one tensor, and return it if all their numbers are
        zero; of such modules in one another the innermost.
    """
    inputs: dict[str, list[Tensor | None]] = {}

    def listen(name: str, module: nn.Module) -> RemovableHandle:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            alone = len(args) == 1 and isinstance(args[0], Tensor) and not kwargs
            # a clone, since what comes later may work in place
            inputs.setdefault(name, []).append(args[0].clone() if alone else None)

        return module.register_forward_pre_hook(before, with_kwargs=True)

    handles = [listen(name, m) for name, m in network.named_modules() if layers(m)]
    try:
        with torch.no_grad():
            network(example)
    finally:
        for handle in handles:
            handle.remove()
    found = [
        name
        for name, seen in inputs.items()
        if all(x is not None and _is_residual(network.get_submodule(name), x) for x in seen)
    ]
    return [name for name in found if not any(other.startswith(f"{name}.") for other in found)]


def _is_residual(block: nn.Module, x: Tensor) -> bool:
    silent = copy.deepcopy(block)
    with torch.no_grad():
        for value in (*silent.parameters(), *silent.buffers()):
            if value.is_floating_point():
                value.zero_()
        made = silent(x.clone())
    return isinstance(made, Tensor) and made.equal(x) and bool(x.any())
