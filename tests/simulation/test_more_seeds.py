"""The other half of the seeds of `test_simulation.py`, for another worker."""

from __future__ import annotations

from simulation.seeds import FIRST, SEEDS, keep_every_promise


def test_as_many_more_keep_every_promise_wherever_their_processes_die() -> None:
    keep_every_promise(range(FIRST + SEEDS // 2, FIRST + SEEDS))
