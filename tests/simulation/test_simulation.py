"""What a deployment promises, in every order of events that a seed can make: the real engine over a simulated world.

`WAYSTATION_SEED=… pytest tests/simulation` repeats a run. A failure names the seed of its scenario;
`PYTHONPATH=tests:. python -m simulation SEED [EFFECT]` shows it. The other half of the seeds is in `test_more_seeds.py`.
"""

from __future__ import annotations

from simulation.runs import shaken, whole
from simulation.seeds import FIRST, SEEDS, keep_every_promise


def test_thousands_of_deployments_keep_every_promise_wherever_their_processes_die() -> None:
    keep_every_promise(range(FIRST, FIRST + SEEDS // 2))


def test_the_same_seed_gives_the_same_journal() -> None:
    for seed in range(FIRST, FIRST + 20):
        for run in (whole, shaken):
            assert run(seed).world.entries == run(seed).world.entries
