r"""Learn for each weight whether it is rounded up or down.

A weight between two levels becomes the lower one plus :math:`h(v)` times the gap, with the
rectified sigmoid :math:`h(v) = \mathrm{clip}(1.2\,\sigma(v) - 0.1, 0, 1)`. Adam moves all ``v``
of a layer at once to lower its damage ``D`` (see `statistics`), which is a quadratic of the weights
and needs no images, plus a regulariser :math:`\sum 1 - |2h - 1|^\beta` that drives ``h`` to 0 or 1
while ``beta`` falls.

Reference:
    Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020; there
    with the layer's outputs on batches of images instead of their second moments, and followed by
    its activation. A layer that ends worse than with the nearest levels takes these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from filterpress.rounding import round_nearest_to, seen_rows
from filterpress.statistics import Moments

ITERATIONS = 600
RATE = 0.1  # of Adam
FREE = 0.2  # share of the iterations without the regulariser
PRICE = 5.0  # of the regulariser, in damages of an error of half a gap
SHARPNESS = (20.0, 2.0)  # beta, from the first iteration with it to the last


def round_learned_to(weight: Tensor, levels: Tensor, moments: Moments) -> Tensor:
    """Round a weight to the levels of its rows, up or down as learned.

    Args:
        weight: ``(O, I/groups, kh, kw)`` or ``(O, I)``.
        levels: ``(O, K)`` ascending, different.
        moments: Statistics of the layer.

    Returns:
        ``(O, d)`` places in the row of levels; they damage no more than the nearest ones.
    """
    rows = seen_rows(weight, moments)
    table = levels.view(*rows.shape[:2], -1).contiguous()
    nearest = round_nearest_to(rows.flatten(0, 1), levels).view_as(rows)
    if table.shape[-1] == 1:
        return nearest.flatten(0, 1)
    lower = torch.searchsorted(table, rows, right=True).sub(1).clamp(0, table.shape[-1] - 2)
    bottom = table.gather(2, lower)
    gap = table.gather(2, lower + 1) - bottom
    share = ((rows - bottom) / gap).clamp(0, 1)
    learned = lower + _learn(rows - bottom, gap, share, moments)
    errors = [(table.gather(2, p) - rows).flatten(0, 1) for p in (learned, nearest)]
    damages = [moments.errors(e).view(len(rows), -1).sum(dim=1) for e in errors]  # (G,)
    chosen = torch.where((damages[0] < damages[1])[:, None, None], learned, nearest)
    return chosen.flatten(0, 1)


def _learn(above: Tensor, gap: Tensor, share: Tensor, moments: Moments) -> Tensor:
    """Learn which weights go up.

    Args:
        above: ``(G, R, d)`` weights less their lower level.
        gap: ``(G, R, d)`` from the lower to the upper level.
        share: ``(G, R, d)`` of the gap that they are above, within [0, 1].
        moments: Statistics of the layer.

    Returns:
        ``(G, R, d)`` integers 0 and 1.
    """
    cost = 0.25 * gap.square() * moments.importance.view_as(gap)
    unit = cost.mean(dim=2, keepdim=True)  # of damage, by row
    unit = unit.clamp(min=torch.finfo(unit.dtype).tiny)
    v = torch.logit((share + 0.1) / 1.2).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=RATE)
    first, last = SHARPNESS
    for iteration in range(ITERATIONS):
        sigmoid = torch.sigmoid(v.detach())
        h = (1.2 * sigmoid - 0.1).clamp(0, 1)
        slope = 1.2 * sigmoid * (1 - sigmoid) * ((h > 0) & (h < 1))
        errors = above - h * gap
        gradient = -2 * (moments.outputs @ errors @ moments.inputs) * gap / unit
        done = (iteration / ITERATIONS - FREE) / (1 - FREE)
        if done >= 0:
            beta = last + (first - last) * (1 - done)
            side = 2 * h - 1
            gradient -= PRICE * 2 * beta * side.abs().pow(beta - 1) * side.sign()
        v.grad = gradient * slope
        optimizer.step()
    return (v.detach() >= 0).long()
