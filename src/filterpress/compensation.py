r"""Cut channels so that the layers that read them change their outputs least.

A channel that goes is predicted from those that stay, by least squares on calibration images, and
the prediction is folded into the weights that read it. Compensation is worth three to ten times the
error of leaving the weights as they are; which channels go is worth a tenth of that.

A consumer's patch has ``T`` columns for each channel: the taps of its kernel, or the positions of a
flattened feature map.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from filterpress.cuts import CHANNELS, Cut, as_filters, cut_filters, cut_moments
from filterpress.errors import ModelError
from filterpress.representations import Layer
from filterpress.statistics import Moments, eigen, regular
from filterpress.surgery import ChannelGroup, Member, features_left, keep_channels_

PRUNED = 0.01  # share of exact zeros in a layer from which they are no accident


class ChannelStatistics(NamedTuple):
    """What one consumer knows of a group of channels, its taps averaged."""

    second: Tensor  # (n, n) second moment of the channels
    importance: Tensor  # (n, n) what the consumer's weights make of a change of the channels

    def damage(self, kept: Tensor) -> float:
        """Return what is left of the damage ``D`` when the other channels are predicted.

        Args:
            kept: ``(n,)`` boolean.
        """
        gone = ~kept
        cross = self.second[kept][:, gone]
        left = self.second[gone][:, gone] - cross.T @ solve(self.second[kept][:, kept], cross)
        return float(0.5 * (left * self.importance[gone][:, gone]).sum().clamp(min=0))


def channel_statistics(
    model: nn.Module, member: Member, moments: Mapping[str, Moments]
) -> ChannelStatistics:
    """Reduce a consumer's statistics to the channels of one group.

    Taps are taken to see the same channels more or less often, each independent of the others:
    enough to choose by. `refit` makes no such assumption.

    Args:
        model: Plain network.
        member: The consumer.
        moments: Statistics of all layers.
    """
    columns = _columns(member, model.get_submodule(member.name))  # type: ignore[arg-type]
    second, outputs = moments[member.name].inputs, moments[member.name].outputs
    taps = second[0][columns[:, None, :], columns[None, :, :]]  # (n, n, T)
    channels = taps.mean(dim=2)
    mass = taps.diagonal().mean(dim=1) / channels.diagonal().mean().clamp(min=1e-30)  # (T,)
    weight = model.get_parameter(f"{member.name}.weight").detach().flatten(1)
    rows = weight[:, columns] * mass.sqrt()  # (O, n, T)
    filters = torch.unflatten(rows, 0, outputs.shape[:2])  # (G, R, n, T)
    worth = torch.einsum("gpq,gqnt->gpnt", outputs, filters)
    return ChannelStatistics(channels, torch.einsum("gpnt,gpmt->nm", filters, worth))


def _columns(member: Member, layer: Layer) -> Tensor:
    """Return the patch columns ``(n_channels, T)`` that belong to each channel."""
    taps = layer.weight[0, 0].numel()
    order = member.channels.argsort(stable=True)
    features = member.features[order].view(int(member.channels.max()) + 1, -1)
    return (features[..., None] * taps + torch.arange(taps)).flatten(1)


def cut_compensated_(
    model: nn.Module,
    groups: list[ChannelGroup],
    kept: list[Tensor],
    moments: Mapping[str, Moments],
) -> float:
    """Cut channels and solve the weights that read them again.

    Args:
        model: Plain network, changed in place.
        groups: Groups of channels of this network.
        kept: For each group a boolean ``(n_channels,)``, at least one true.
        moments: Statistics of this network.

    Returns:
        The damage ``D`` that is left, summed over the layers that read the channels.

    Raises:
        ModelError: Weights that would be solved again have been pruned.
    """
    damage = 0.0
    for name, features in features_left(model, groups, kept).items():
        if features.all():
            continue
        weight = model.get_parameter(f"{name}.weight").detach()
        _refuse_pruned(name, weight, moments[name])
        solved = refit(weight, moments[name], features)
        damage += moments[name].error(solved - weight)
        weight.copy_(solved)
    keep_channels_(model, groups, kept)
    return damage


def _refuse_pruned(name: str, weight: Tensor, moments: Moments) -> None:
    """Refuse to fill connections that were taken out before."""
    seen = moments.inputs[0].diagonal() > 0  # what is never seen is zero after a cut
    share = float((weight.flatten(1)[:, seen] == 0).float().mean()) if seen.any() else 0.0
    if share > PRUNED:
        raise ModelError(
            f"channels that {name} reads cannot be cut: {share:.0%} of its weights have been "
            "pruned and would be filled again; cut channels before connections, or let the "
            "stage's method be none"
        )


def refit(weight: Tensor, moments: Moments, kept: Tensor) -> Tensor:
    r"""Let the inputs that stay do the work of those that go.

    Minimises the damage ``D`` over weights that are zero outside ``kept``; independently for every
    filter the solution is :math:`W_S = W A_{:S} A_{SS}^{-1}`.

    Args:
        weight: ``(O, I, ...)`` weight of an ungrouped layer.
        moments: Statistics of the layer.
        kept: ``(I,)`` boolean, the input features that stay.

    Returns:
        The new weight, of the shape of ``weight`` and zero at the features that go.
    """
    rows = weight.flatten(1)  # (O, d)
    second = moments.inputs[0]
    columns = kept.repeat_interleave(rows.shape[1] // len(kept))
    columns = columns & (second.diagonal() > 0)  # what is never seen needs no weight
    result = torch.zeros_like(rows)
    result[:, columns] = solve(second[columns][:, columns], second[columns] @ rows.T).T
    return result.view_as(weight)


def refit_projected(
    weight: Tensor, first: Tensor, moments: Moments, groups: int
) -> tuple[Tensor, Tensor]:
    r"""Solve the weights of a layer that reads a projection of its inputs.

    With :math:`P = U \otimes I_T`, the projection of whole patches, the weights of least damage are
    :math:`V = W A P^\top (P A P^\top)^{-1}`, for each group of filters by itself.

    Args:
        weight: ``(O, I, kh, kw)`` filters sorted by group.
        first: ``(G r, I)`` projection.
        moments: Statistics of the layer.
        groups: Number of groups.

    Returns:
        ``(O, r, T)`` and the second moments ``(G, r T, r T)`` of what it is applied to.
    """
    filters = as_filters(weight)
    found = [
        refit_rest(rows, moments.inputs[0], basis[None], CHANNELS)
        for rows, basis in zip(filters.chunk(groups), first.chunk(groups), strict=True)
    ]
    return torch.cat([rest.flatten(2) for rest, _ in found]), torch.stack([m for _, m in found])


def refit_rest(weight: Tensor, second: Tensor, rows: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
    r"""Solve the second of two layers that a layer is cut into, for a given first.

    With the function ``P`` of the first, from patches of the layer to those of the second, the
    weights of least damage are :math:`V = W A P^\top (P A P^\top)^{-1}`.

    Args:
        weight: ``(O, I, kh, kw)`` of the layer.
        second: ``(d, d)`` second moment of its patches.
        rows: ``(G, r, t)`` filters of the first layer.
        cut: What that takes.

    Returns:
        ``(O, G r, kh', kw')``, where axes that were taken have size 1, and the second moment
        ``(d', d')`` of what it is applied to.
    """
    shape = weight.shape[1:]
    blocks = cut_moments(second, shape, cut)
    half = torch.einsum("gtsn,grt->grsn", blocks.flatten(3), rows)  # P A
    half = half.reshape(-1, *blocks.shape[3:])
    gram = torch.einsum("ngts,grt->ngrs", half, rows).flatten(1)
    cross = half.flatten(1) @ cut_filters(weight, cut).flatten(1).T  # (d', O)
    gram = (gram + gram.T) / 2
    kernel = [1 if axis in cut.taken else n for axis, n in zip("yx", shape[1:], strict=True)]
    return solve(gram, cross).T.reshape(len(weight), -1, *kernel), gram


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve ``matrix x = right`` for a positive semi-definite matrix that may lack rank.

    Args:
        matrix: ``(n, n)``.
        right: ``(n, m)``.

    Returns:
        ``(n, m)``; directions without power get (nearly) no weight.
    """
    if not len(matrix):
        return torch.zeros_like(right)
    factor, failed = torch.linalg.cholesky_ex(regular(matrix))
    if not failed:
        return torch.cholesky_solve(right, factor)
    # rounding has made directions without power negative
    values, vectors = eigen(matrix)
    inverse = torch.where(values > 1e-6 * values[-1], 1 / values, 0)
    return vectors @ (inverse[:, None] * (vectors.T @ right))
