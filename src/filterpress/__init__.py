"""Compress a trained CNN to a storage budget and an accuracy floor, and publish it signed.

Importing this imports nothing heavy: names are looked up when they are used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filterpress.loop import compress
    from filterpress.stages import (
        cluster,
        evaluate,
        give_up,
        prune,
        publish,
        reduce,
        retrain,
        search,
        train,
    )

__all__ = [
    "cluster",
    "compress",
    "evaluate",
    "give_up",
    "prune",
    "publish",
    "reduce",
    "retrain",
    "search",
    "train",
]


# From 1.29 on onnxruntime reports to its maker what it runs, unless this is set when it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module filterpress has no attribute {name}")
    from filterpress import loop, stages

    return getattr(loop if name == "compress" else stages, name)
