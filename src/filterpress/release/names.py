"""Names that a publisher writes and a vehicle reads, as in ADR 0019: both take them from here."""

from __future__ import annotations

import re

from tuf.api.metadata import TargetFile

ANY = "any"  # hardware
SCHEMA = 1  # of a channel
MAX_CHANNEL = 2**20  # bytes of one
MAX_METADATA = 2_000_000  # bytes of one file of it, whatever length is signed
COUNTER, HARDWARE = "release_counter", "hardware_ids"  # signed about a release
ISSUED = "x-issued"  # signed in a timestamp, in seconds since 1970
DEVELOPMENT = "x-filterpress-development"  # signed in a root whose keys anybody may hold

_SEGMENT = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
MODEL = re.compile(f"models/{_SEGMENT}/{_SEGMENT}/{_SEGMENT}")


def is_segment(text: str) -> bool:
    """Say whether text can be one part of a path in a store."""
    return re.fullmatch(_SEGMENT, text) is not None


def payload_name(info: TargetFile) -> str:
    """Return the name of a file in the store, which begins with its digest."""
    return f"targets/{info.get_prefixed_paths()[0]}"
