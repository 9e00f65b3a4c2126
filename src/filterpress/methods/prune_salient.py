r"""Set the connections to zero on which the loss hangs least, wherever in the network they are.

Saliency (see `saliency`) is measured on all training data, and one rate for the whole network
decides how many weights each layer loses. Pruning and retraining take turns, and what has been
pruned stays zero to the end: it is rounded to 0, and the coder makes runs of zeros cheap.

Saves, of a layer of ``n`` weights of which a share ``p`` stays, ``n (b' - h(p) - b p)`` bits, with
``h`` the binary entropy, ``b`` the bits of a weight that stays and ``b'`` those of a weight where
all stay. Saves multiply-accumulates only on hardware that skips zeros, and where nothing is left
that reads a channel, which is cut. Biases and batch-norm stay, and so does the most salient weight
of each layer, but not of each filter: filters of zeros are filters found useless.

Does not help where rounding alone gets there: a weight rounded to zero costs no more than a pruned
one. At the same bytes and epochs both presets that prune so lose more than the default one, half a
point more in ResNet-18 at a hundredth, and nearly three at a 350th, where removing whole filters
pays (README, presets compared). Ranking by the size of the weights alone does as
well or better (docs/adr/0024).

Reference:
    "The source" for saliency over all data, one rate and turns; Han et al., "Learning both Weights
    and Connections for Efficient Neural Networks", NIPS 2015, for turns; Lee et al., "SNIP", ICLR
    2019, for one threshold. Here the rate follows from the budget, and the retrain imitates the
    network as it came.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from filterpress.checkpoints import NO_CHECKPOINTS, Checkpoints
from filterpress.fitting import Goal
from filterpress.methods import Outcome
from filterpress.saliency import PruningConfig, Way, kept_of, prune_in_turns
from filterpress.sparsity import prune_
from filterpress.tasks import Task


@dataclass(frozen=True, kw_only=True)
class SaliencyConfig(PruningConfig):
    """How `prune_salient` prunes; the rate is a share of all weights."""


def prune_salient(
    model: nn.Module,
    task: Task,
    config: SaliencyConfig,
    *,
    goal: Goal,
    seed: int = 0,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> Outcome:
    """Prune the weights of a network by their saliency, and retrain it.

    Args:
        model: Network to prune.
        task: Data, loss and score.
        config: How much, and in which turns.
        goal: The budget, which decides how much where the config does not.
        seed: Seed of the retrains.
        checkpoints: Where retrains go on from, if they are there.

    Returns:
        The network with zeros among its weights, and what `prune_in_turns` notes.

    Raises:
        ModelError: A weight or a gradient is not finite.
    """
    way = Way(kept_weights, prune_, shrink=True)
    pruned = prune_in_turns(
        model, task, config, lambda *_: way, goal=goal, seed=seed, checkpoints=checkpoints
    )
    return Outcome(*pruned)


def kept_weights(saliency: Mapping[str, Tensor], rate: float) -> dict[str, Tensor]:
    """Keep all but a share of the weights of a network, those of least saliency."""
    return dict(zip(saliency, kept_of(list(saliency.values()), rate), strict=True))
