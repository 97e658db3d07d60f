"""What holds for every test of the simulation."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def rare_collections() -> Iterator[None]:
    """Each process leaves a loop and its tasks behind: to look for them a thousand times takes longer than all else."""
    kept = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    yield
    gc.set_threshold(*kept)
