"""Methods: pure functions from a network to a smaller one, one file each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn


class Outcome(NamedTuple):
    """What a method did."""

    model: nn.Module  # a new network; the one given is untouched
    notes: Mapping[str, float | str]  # what to report: counts and errors
    layers: Mapping[str, Mapping[str, float | str]]  # the same, for each layer that was changed
