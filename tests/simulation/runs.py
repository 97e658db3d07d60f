"""A seed as it is run: unbroken, broken off once, or again and again; and whether two runs came to the same."""

from __future__ import annotations

from dataclasses import dataclass

from simulation.process import Process
from simulation.promises import broken
from simulation.scenario import Scenario
from simulation.virtual_loop import StuckError
from simulation.world import World

from orchestrator.deployment.deployment import Result
from orchestrator.journal import events as ev

import os
DEBUG = bool(os.environ.get("SIMDEBUG"))
PROCESSES_MAX = 60
"""Of one deployment."""


@dataclass
class Run:
    """What came of it. `broken`: promises that it did not keep."""

    world: World
    result: Result | None
    broken: list[str]


def run_to_the_end(world: World, *, dies: tuple[int, ...] = (), snapshots: list[World] | None = None) -> Run:
    """Process after process until the deployment has ended; the first ones die after so many effects each."""
    scenario = world.scenario
    deaths = list(dies)
    waits = scenario.waits
    for _ in range(PROCESSES_MAX):
        process = Process(world, deaths.pop(0) if deaths else None, snapshots, waits=waits)
        try:
            result = process.run()
        except StuckError as error:
            return Run(world, None, [str(error)])
        except Exception as error:  # the engine's own process would have died of it
            if DEBUG: raise
            return Run(world, None, [f"{type(error).__name__}: {error}"])
        snapshots = None
        if result is not None and result.state != "waiting":
            return Run(world, result, broken(world, result))
        if result is not None and not result.reason:
            return Run(world, result, ["it waits, and does not say for what"])
        waits = result is None and scenario.waits
        rest(world)
        if result is not None and not any(row.at > world.now for row in world.rows):
            waits = True
    return Run(world, None, [f"it did not end in {PROCESSES_MAX} processes"])


def rest(world: World) -> None:
    """Nobody works on it for a while: a moment, or half a day."""
    long = world.scenario.fate("rests", len(world.entries))
    world.now += 0.1 if long < 0.3 else 20 * long if long < 0.9 else 40_000 * long
    world.advance()


def same_end(scenario: Scenario, whole: Run, other: Run) -> list[str]:
    """What differs in the end of two runs of one scenario, where it must not."""
    if whole.result is None or other.result is None or not scenario.is_timeless:
        return []
    if any(isinstance(e.event, ev.Paused) and not e.event.by for e in (*whole.world.mine, *other.world.mine)):
        # A balancer that could not be asked: how often it was is a matter of time.
        return []
    first, then = _ends(whole), _ends(other)
    wrong = []
    if whole.result.state != other.result.state:
        wrong.append(f"unbroken it {whole.result.state} ({whole.result.reason}), broken {other.result.state} ({other.result.reason})")
    if any(isinstance(e.event, ev.StepEnded) and not e.event.ok for e in whole.world.mine):
        # Where it was stopped, who was in flight is a matter of time.
        names = first.keys() & then.keys()
    else:
        names = first.keys() | then.keys()
    wrong += [f"{name}: unbroken {first.get(name)}, broken {then.get(name)}" for name in sorted(names) if first.get(name) != then.get(name)]
    return wrong


def _ends(run: Run) -> dict[tuple[int, str], str]:
    return {
        (entry.event.step, entry.event.machine): entry.event.outcome
        for entry in run.world.mine
        if isinstance(entry.event, ev.TurnEnded)
    }
