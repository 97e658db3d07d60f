"""Deployments that are taken up: after every effect, after some, and again and again."""

from __future__ import annotations

from harness.seed import SOAK

from simulation.runs import limping, taken_up
from simulation.seeds import FIRST, OTHERS, SEEDS, faults

WHOLE_JOURNALS = 1000 if SOAK else 10
"""Each is taken up some sixty times."""
LIMPING = 2000 if SOAK else 40
SAMPLED = SEEDS if SOAK else 150


def test_processes_that_die_again_and_again_come_through() -> None:
    wrong, _ = faults(range(OTHERS, OTHERS + LIMPING), limping)
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
    for seed in range(OTHERS + LIMPING, OTHERS + LIMPING + SAMPLED):
        for effect, broken in taken_up(seed, most=2):
            wrong += [f"seed {seed}, taken up after effect {effect}: {text}" for text in broken]
    assert wrong == []
