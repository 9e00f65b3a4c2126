"""Signed publication to a directory or a bucket, and verified reading from it.

Names are looked up when they are used: a vehicle imports nothing of its publisher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filterpress.release.keys import create_keys
    from filterpress.release.repository import (
        Release,
        fetch,
        latest,
        publish,
        publish_network,
        refresh,
    )

__all__ = [
    "Release",
    "create_keys",
    "fetch",
    "latest",
    "publish",
    "publish_network",
    "refresh",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module filterpress.release has no attribute {name}")
    from filterpress.release import keys, repository

    return getattr(keys if name == "create_keys" else repository, name)
