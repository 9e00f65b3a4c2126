"""What all tests share."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def seeded():
    """Begin each test with the same numbers: pytest-randomly seeds Python and NumPy, not torch."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
