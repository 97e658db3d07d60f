"""A seed as it is run: unbroken, broken off once, or again and again; and whether two runs came to the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from orchestrator.deployment.deployment import Result
from orchestrator.journal import events as ev
from simulation.process import Process
from simulation.promises import broken
from simulation.scenario import Scenario, scenario_of
from simulation.virtual_loop import StuckError
from simulation.world import World

PROCESSES_MAX: Final = 60
"""Of one deployment."""
_EFFECTS: Final = 80
"""About as many as a deployment has."""


@dataclass
class Run:
    """What came of it. `broken`: promises that it did not keep."""

    world: World
    result: Result | None
    broken: list[str]


def run_to_the_end(world: World, *, dies: tuple[int, ...] = (), snapshots: list[World] | None = None) -> Run:
    """Process after process until the deployment has ended; the first ones die after so many effects each.

    `snapshots` takes the world after each effect of the first process.
    """
    deaths = list(dies)
    waits = world.scenario.waits
    for _ in range(PROCESSES_MAX):
        process = Process(world, deaths.pop(0) if deaths else None, snapshots, waits=waits)
        try:
            result = process.run()
        except StuckError as error:
            return Run(world, None, [str(error)])
        except Exception as error:  # the engine's own process would have died of it
            return Run(world, None, [f"{type(error).__name__}: {error}"])
        snapshots = None
        if result is not None and result.state != "waiting":
            return Run(world, result, broken(world, result))
        if world.state != "running":
            # It died right behind its end: nobody takes it up, and nobody heard how it went.
            return Run(world, None, [])
        if result is not None and not result.reason:
            return Run(world, result, ["it waits, and does not say for what"])
        rest(world)
        # Where nobody will say anything more, somebody stays to hear what time decides.
        waits = world.scenario.waits or not any(row.at > world.now for row in world.rows)
    return Run(world, None, [f"it did not end in {PROCESSES_MAX} processes"])


def rest(world: World) -> None:
    """Nobody works on it for a while: a moment, or half a day."""
    how = world.scenario.fate("rests", len(world.entries))
    world.now += 0.1 if how < 0.3 else 20 * how if how < 0.9 else 40_000 * how
    world.advance()


# --- ways to run a seed


def whole(seed: int) -> Run:
    """Unbroken, but where it leaves because it waits for people."""
    return run_to_the_end(World.of(scenario_of(seed)))


def shaken(seed: int) -> Run:
    """Its processes die never, once or three times, wherever the seed says."""
    scenario = scenario_of(seed)
    times = int(scenario.one_of(("0", "0", "1", "1", "3"), "dies"))
    dies = tuple(1 + int(_EFFECTS * scenario.fate("dies", number) / max(times, 1)) for number in range(times))
    return run_to_the_end(World.of(scenario), dies=dies)


def limping(seed: int) -> Run:
    """Each process dies after a few effects, until nothing is left to do."""
    scenario = scenario_of(seed)
    few = [2 + int(8 * scenario.fate("limps", number)) for number in range(PROCESSES_MAX - 5)]
    return run_to_the_end(World.of(scenario), dies=tuple(few))


def taken_up(seed: int, *, most: int | None = None) -> Iterator[tuple[int | None, list[str]]]:
    """Unbroken (None), and then from what was there after each effect (or `most` of them): what is wrong with each."""
    scenario = scenario_of(seed)
    snapshots: list[World] = []
    first = run_to_the_end(World.of(scenario), snapshots=snapshots)
    yield None, first.broken
    if first.broken:
        return
    every = [index for index, world in enumerate(snapshots) if world.state == "running"]
    if most is not None:
        every = sorted({every[int(len(every) * scenario.fate("prefix", number))] for number in range(most)})
    for index in every:
        again = from_prefix(snapshots[index])
        yield index, again.broken or same_end(scenario, first, again)


def from_prefix(snapshot: World) -> Run:
    """A new process over all that was kept at that moment."""
    world = snapshot.clone()
    rest(world)
    return run_to_the_end(world)


def same_end(scenario: Scenario, first: Run, then: Run) -> list[str]:
    """What differs in the end of two runs of one scenario, where it must not."""
    if first.result is None or then.result is None or not scenario.is_timeless:
        return []
    if any(isinstance(e.event, ev.Paused) and not e.event.by for e in (*first.world.mine, *then.world.mine)):
        # A balancer that could not be asked: how often it was is a matter of time.
        return []
    wrong = []
    if first.result.state != then.result.state:
        told = f"unbroken it {first.result.state} ({first.result.reason})"
        wrong.append(f"{told}, taken up {then.result.state} ({then.result.reason})")
    ends, others = _ends(first), _ends(then)
    # Where it was stopped, who was in flight by then is a matter of time.
    stopped = any(isinstance(e.event, ev.StepEnded) and not e.event.ok for e in first.world.mine)
    names = ends.keys() & others.keys() if stopped else ends.keys() | others.keys()
    return wrong + [
        f"{machine} in step {step}: unbroken {ends.get((step, machine))}, taken up {others.get((step, machine))}"
        for step, machine in sorted(names)
        if ends.get((step, machine)) != others.get((step, machine))
    ]


def _ends(run: Run) -> dict[tuple[int, str], str]:
    return {
        (entry.event.step, entry.event.machine): entry.event.outcome
        for entry in run.world.mine
        if isinstance(entry.event, ev.TurnEnded)
    }
