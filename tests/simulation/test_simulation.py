"""What a deployment promises, in every order of events that a seed can make: the real engine over a simulated world.

`WAYSTATION_SEED=… pytest tests/simulation` repeats a run. A failure names the seed of its scenario;
`PYTHONPATH=tests:. python -m simulation SEED [EFFECT]` shows it.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from harness.seed import SEED, SOAK

from simulation.runs import Run, limping, shaken, taken_up, whole

FIRST = SEED * 100_000
"""Seed of the first scenario: no two runs have the same ones."""
SEEDS = 10_000 if SOAK else 3_000
WHOLE_JOURNALS = SEEDS if SOAK else 10


@pytest.fixture(autouse=True)
def rare_collections() -> Iterator[None]:
    """Each process leaves a loop and its tasks behind: to look for them a thousand times takes longer than all else."""
    kept = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    yield
    gc.set_threshold(*kept)


def faults(seeds: range, run: Callable[[int], Run]) -> tuple[list[str], Counter[str]]:
    """What is wrong, with the seeds, and how the others ended."""
    wrong: list[str] = []
    ends: Counter[str] = Counter()
    for seed in seeds:
        done = run(seed)
        ends[done.result.state if done.result else "nobody heard"] += 1
        wrong += [f"seed {seed}: {text}" for text in done.broken]
    return wrong, ends


def test_thousands_of_deployments_keep_every_promise_wherever_their_processes_die() -> None:
    wrong, ends = faults(range(FIRST, FIRST + SEEDS), shaken)
    assert wrong == []
    # A simulation in which nothing ever goes well, or ill, would find nothing.
    assert min(ends["succeeded"], ends["failed"]) > SEEDS / 5
    assert ends["cancelled"]


def test_processes_that_die_again_and_again_come_through() -> None:
    seeds = range(FIRST + SEEDS, FIRST + SEEDS + (2000 if SOAK else 40))
    wrong, _ = faults(seeds, limping)
    assert wrong == []


def test_resume_from_every_prefix_of_a_journal_ends_as_the_unbroken_run_does() -> None:
    wrong, prefixes = [], 0
    for seed in range(FIRST, FIRST + WHOLE_JOURNALS):
        for effect, broken in taken_up(seed):
            prefixes += effect is not None
            wrong += [f"seed {seed}, taken up after effect {effect}: {text}" for text in broken]
    assert wrong == []
    assert prefixes > 20 * WHOLE_JOURNALS


def test_resume_from_some_prefix_of_many_journals_ends_as_the_unbroken_run_does() -> None:
    wrong = []
    for seed in range(FIRST + 2 * SEEDS, FIRST + 2 * SEEDS + (SEEDS if SOAK else 150)):
        for effect, broken in taken_up(seed, most=2):
            wrong += [f"seed {seed}, taken up after effect {effect}: {text}" for text in broken]
    assert wrong == []


def test_the_same_seed_gives_the_same_journal() -> None:
    for seed in range(FIRST, FIRST + 20):
        for run in (whole, shaken):
            assert run(seed).world.entries == run(seed).world.entries
