"""Build the network of an allocation: give each layer the form that was chosen for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from filterpress import statistics
from filterpress.allocation import Allocation, Option, Rates
from filterpress.chains import chain, chain_options, project, suits
from filterpress.compensation import refit_projected
from filterpress.fitting import Attempt, Goal, fingerprint, fit_budget
from filterpress.folding import LinearChannels, fold_
from filterpress.levels import choose, quantize_to_
from filterpress.progress import progress
from filterpress.rounding import quantize_compensated_
from filterpress.statistics import Moments
from filterpress.surgery import layers, plain


class Source(NamedTuple):
    """A plain network, and what is known of it."""

    network: nn.Module
    images: Tensor
    moments: Mapping[str, Moments]
    linear: Sequence[LinearChannels] = ()  # channels that may be folded into others
    spreads: Mapping[str, Tensor] = {}  # of these, see `folding`


def measured(model: nn.Module, images: Tensor, *, seed: int) -> Source:
    """Make a network plain, and measure what its layers see.

    Args:
        model: Any network.
        images: ``(N, C, H, W)`` normalised calibration images.
        seed: Seed of the statistics.
    """
    network = statistics.plain_for(model, images)
    return Source(network, images, statistics.measure(network, images, seed=seed))


def build(source: Source, allocation: Allocation) -> nn.Module:
    """Give every layer the form that was chosen for it, and measure batch-norm again."""
    result = plain(source.network)
    seen = dict(source.moments)
    for channels in source.linear:
        if allocation.chosen[channels.names[0]].folded:
            seen |= fold(result, channels, source, allocation.chosen[channels.names[0]])
    statistics.note_offsets_(result, source.images)  # of batch-norm that is new
    for name, option in allocation.chosen.items():
        layer = layers(result)[name]
        if option.levels is not None:
            places = choose(layer, option.levels, seen[name], "compensated")
            quantize_to_(layer, option.levels, places, seen[name])
        elif option.plan is not None:
            made = chain(layer, option.plan, seen[name], allocation.theta)
            result.set_submodule(name, made)
        elif option.rank and not option.folded:
            result.set_submodule(name, project(layer, option, seen[name], allocation.theta))
        else:
            quantize_compensated_(layer, seen[name], allocation.theta)
    statistics.recalibrate_(result, source.images)
    return result


def fold(
    network: nn.Module, channels: LinearChannels, source: Source, option: Option
) -> dict[str, Moments]:
    """Project the channels between layers without a nonlinearity.

    Args:
        network: Copy of the source's network, changed in place.
        channels: The channels to project.
        source: The network the statistics are of.
        option: Rank and subspaces.

    Returns:
        The statistics of these layers as they are now.
    """
    if option.subspaces is None:
        raise ValueError("option must have a rank to project to, got a layer that stays as it is")
    basis = option.subspaces.bases[0, : option.rank]
    energies = option.subspaces.energies[0, : option.rank]
    readers, seen = {}, {}
    for member in channels.group.producers:
        seen[member.name] = Moments(source.moments[member.name].inputs, torch.diag(energies)[None])
    for member in channels.group.consumers:
        weight, moments = layers(source.network)[member.name].weight, source.moments[member.name]
        readers[member.name], second = refit_projected(weight.detach(), basis, moments, 1)
        seen[member.name] = Moments(second, moments.outputs)
    fold_(network, channels, basis, readers, source.spreads)
    return seen


def fit_chains(
    model: nn.Module, images: Tensor, kinds: Sequence[str], *, goal: Goal, seed: int
) -> tuple[nn.Module, dict[str, float | str], dict[str, dict[str, float | str]]]:
    """Replace layers by chains and quantise all until the file of a network meets a budget.

    Args:
        model: Network to shrink.
        images: ``(N, C, H, W)`` normalised calibration images.
        kinds: Of chains that layers may become, see `chains`.
        goal: What the file shall meet.
        seed: Seed of the statistics.

    Returns:
        The network; the number of layers that were ``cut``, in all and by kind, that of those that
        no kind ``suits``, and what `told` says; and the same of each layer.

    Raises:
        ModelError: Every allocation found is one to avoid.
    """
    source = measured(model, images, seed=seed)
    used = {n: layer for n, layer in layers(source.network).items() if n in source.moments}
    candidates = {}
    with progress("reduce", len(used)) as advance:
        for name, layer in used.items():
            candidates[name] = chain_options(layer, source.moments[name], kinds, seed=seed)
            advance()
    found = fit_budget(Rates(candidates), lambda allocation: build(source, allocation), goal)
    notes, changed = told(found)
    taken = Counter(o.plan.kind for o in found.allocation.chosen.values() if o.plan is not None)
    left = sum(not any(suits(kind, layer) for kind in kinds) for layer in used.values())
    counts = {"cut": float(taken.total()), "unsuited": float(left)}
    return found.model, counts | {kind: float(taken[kind]) for kind in kinds} | notes, changed


def told(found: Attempt) -> tuple[dict[str, float | str], dict[str, dict[str, float | str]]]:
    """Return what there is to report of a network that was built, and of each of its layers."""
    allocation = found.allocation
    changed: dict[str, dict[str, float | str]] = {
        name: {
            "rank": float(option.rank if option.plan is None else option.plan.ranks[0]),
            "groups": float(option.groups),
            "n_bytes": round(sum(allocation.n_bytes[name]), 1),
            "distortion": allocation.damage[name],
        }
        | ({"bits": float(option.bits)} if option.bits else {})
        | ({"kind": option.plan.kind} if option.plan is not None else {})
        for name, option in allocation.chosen.items()
    }
    notes: dict[str, float | str] = {
        "distortion": allocation.total_damage,
        "theta": allocation.theta,
        "expected_bytes": round(found.expected),
        "allocation": fingerprint(allocation),
    }
    return notes, changed
