"""Which seeds a run has, and what is wrong with some of them. They stand in several files of tests: each worker takes a
file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

from harness.seed import SEED

from simulation.runs import Run, shaken

FIRST: Final = SEED * 100_000
"""Seed of the first scenario: no two runs have the same ones."""
SEEDS: Final = 10_000
"""Deployments that go through wherever their processes die."""
OTHERS: Final = FIRST + SEEDS
"""Seed of the first scenario that is run in another way."""


def faults(seeds: range, run: Callable[[int], Run]) -> tuple[list[str], Counter[str]]:
    """What is wrong, with the seeds, and how the others ended."""
    wrong: list[str] = []
    ends: Counter[str] = Counter()
    for seed in seeds:
        done = run(seed)
        ends[done.result.state if done.result else "nobody heard"] += 1
        wrong += [f"seed {seed}: {text}" for text in done.broken]
    return wrong, ends


def keep_every_promise(seeds: range) -> None:
    """Deployments whose processes die wherever the seed says. Raises `AssertionError`."""
    wrong, ends = faults(seeds, shaken)
    assert not wrong, "\n".join(wrong)
    # A simulation in which nothing ever goes well, or ill, would find nothing.
    assert min(ends["succeeded"], ends["failed"]) > len(seeds) / 5
    assert ends["cancelled"]
