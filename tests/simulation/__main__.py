"""`PYTHONPATH=tests:. python -m simulation SEED [EFFECT]`: the journal of a simulated deployment, unbroken or as it is taken
up after so many effects, and what is wrong with it.
"""

from __future__ import annotations

import sys

from simulation.runs import from_prefix, run_to_the_end, same_end
from simulation.scenario import BEGINS, scenario_of
from simulation.world import World


def main(seed: int, effect: int | None = None) -> None:
    scenario = scenario_of(seed)
    for step in scenario.plan.steps:
        print(step)
    snapshots: list[World] = []
    run = first = run_to_the_end(World.of(scenario), snapshots=snapshots)
    if effect is not None:
        print("unbroken:", first.result, *first.broken, sep="\n  ")
        run = from_prefix(snapshots[effect])
    for entry in run.world.mine:
        print(f"{entry.number:4} {entry.at - BEGINS:9.2f} {entry.event}")
    print(run.result, *run.broken, *same_end(scenario, first, run), sep="\n  ")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
