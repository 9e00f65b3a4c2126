"""Disks with too little room."""

from __future__ import annotations

import contextlib
import resource


@contextlib.contextmanager
def largest_file(n_bytes):
    """Let no file grow beyond a size: writing more fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
