"""A simulation that finds no fault must be one that would: the engine with one fault each is found out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from simulation.mutants import MUTANTS
from simulation.runs import taken_up, whole

SEEDS = 600
"""Within so many it must be found, unbroken or taken up."""


def found() -> Iterator[str]:
    for seed in range(SEEDS):
        yield from (f"seed {seed}: {text}" for text in whole(seed).broken)
    for seed in range(SEEDS):
        for effect, broken in taken_up(seed, most=3):
            yield from (f"seed {seed}, effect {effect}: {text}" for text in broken)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_of_the_engine_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)
    first = next(found(), "")
    print(f"{name}: {first}")
    assert first, f"{name} was not found within {SEEDS} seeds"


# --- faults that the engine had, by the seeds that showed them (some only show in worlds of their day)


SHOWN = (
    0,
    5,
    16,
    23,
    26,
    27,
    57,
    78,
    98,
    246,
    302,
    456,
    467,
    468,
    487,
    490,
    595,
    803,
    826,
    856,
    2126,
    10280,
    23032,
    23582,
)


@pytest.mark.parametrize("seed", SHOWN)
def test_what_once_was_wrong_stays_right(seed: int) -> None:
    assert [told for told in taken_up(seed, most=6) if told[1]] == []
