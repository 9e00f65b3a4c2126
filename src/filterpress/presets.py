"""Whole systems by one name: what each stage of the loop is configured with.

A preset is as its source describes the system, with the budget of the run in place of numbers for
each layer. What a user configures besides goes over it, field by field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from filterpress import settings

DEFAULT = "patent-loop"
Fields = Mapping[str, Any]
OFF: Fields = MappingProxyType({"method": settings.NONE})
AS_IT_IS: Fields = MappingProxyType({})


class Preset(NamedTuple):
    """The configuration of each stage that makes the network smaller, or trains it after that."""

    summary: str
    prune: Fields = AS_IT_IS
    cluster: Fields = AS_IT_IS
    reduce: Fields = AS_IT_IS
    retrain: Fields = AS_IT_IS


STEPS: Fields = MappingProxyType({"method": "project", "max_groups": 0})
SALIENCY: Fields = MappingProxyType({"method": "saliency"})

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        DEFAULT: Preset("Similar filters go, others merge, channels are projected; steps."),
        "deep-compression": Preset(
            "Connections are pruned by saliency, the others share codebooks that learn.",
            prune=SALIENCY,
            cluster=OFF,
            reduce={"method": "quantize", "grid": "codebook", "per": "tensor"},
        ),
        "post-training": Preset(
            "No labels, no training: projections, 1-D and separable layers, widths, steps.",
            prune=OFF,
            cluster=OFF,
            reduce={
                "method": "project",
                "kinds": "svd,tucker,cp,spatial,separable,low-rank",
                "levels": "all",
            },
            retrain=OFF,
        ),
        "linear-kernels": Preset(
            "Kernels are multiples of shared templates; factors and offsets learn.",
            prune=OFF,
            cluster={"method": "kernels"},
            reduce=OFF,
        ),
        "saliency-birch": Preset(
            "Connections are pruned by saliency, the others share as many values as BIRCH finds.",
            prune=SALIENCY,
            cluster={"method": "share"},
            reduce=OFF,
        ),
        "learned-threshold": Preset(
            "Each layer learns the threshold below which its weights go; steps.",
            prune={"method": "threshold"},
            cluster=OFF,
            reduce=STEPS,
        ),
        "joint": Preset(
            "One training prunes and quantises weights, and quantises activations.",
            prune=OFF,
            cluster=OFF,
            reduce={"method": "joint"},
        ),
        "mac-budget": Preset(
            "Layers lose weights by their multiply-accumulates; steps.",
            prune={"method": "macs"},
            cluster=OFF,
            reduce=STEPS,
        ),
        "best": Preset(
            "The default, with 1-D, separable and Tucker layers, and labels that count for half.",
            reduce={"method": "project", "kinds": "tucker,spatial,separable"},
            retrain={"alpha": 0.5},
        ),
    }
)


def told(preset: Preset) -> dict[str, str]:
    """Say in a few words what a preset is and what it does in each stage."""
    stages = {stage: fields for stage, fields in preset._asdict().items() if stage != "summary"}
    return {"summary": preset.summary} | {s: _in_words(f) for s, f in stages.items()}


def _in_words(fields: Fields) -> str:
    words = [str(v) if k == "method" else f"{k} {v}" for k, v in fields.items()]
    return ", ".join(words) or "default"


def find(name: str) -> Preset:
    """Return a preset by its name.

    Raises:
        ValueError: There is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {name!r}")
    return PRESETS[name]


def overlay(preset: str, stage: str, config: str) -> str:
    """Lay a user's configuration of a stage over that of a preset.

    Args:
        preset: Name of the preset.
        stage: prune, cluster, reduce or retrain.
        config: JSON object of the user's own. Where it names another method than the preset, only
            its fields count.

    Returns:
        JSON object of both.

    Raises:
        ValueError: There is no such preset, or the text is no JSON object.

    Example:
        >>> overlay("mac-budget", "reduce", '{"levels": "widths"}')
        '{"method": "project", "max_groups": 0, "levels": "widths"}'
        >>> overlay("mac-budget", "reduce", '{"method": "quantize"}')
        '{"method": "quantize"}'
    """
    base: Fields = getattr(find(preset), stage)
    own = settings.parse(config)
    if own.get("method", base.get("method")) != base.get("method"):
        return json.dumps(own)
    return json.dumps({**base, **own})
