"""Methods: pure functions from a network to a smaller one, one file each."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class Outcome(NamedTuple):
    """What a method did."""

    model: nn.Module  # a new network; the one given is untouched
    notes: dict[str, float]  # what to report: counts and errors
    layers: dict[str, dict[str, float]]  # the same, for each layer that was changed
