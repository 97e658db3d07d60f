"""Projects that release at once onto shared machines: real processes and a real journal, a fleet that only takes its time.

What happened is read from the journal, whose entries have one order for all processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.process import Talk, wait_for
from harness.seed import SEED, SOAK

from orchestrator.journal import events as ev
from orchestrator.journal.events import JournalEntry
from orchestrator.journal.journal import Journal

PROJECTS, MACHINES, WINDOW = (20, 200, 5) if SOAK else (4, 8, 3)

ENGINE = """
import asyncio, random, sys
from orchestrator.journal.events import BracketClosed, BracketOpened, TurnEnded, TurnStarted
from orchestrator.journal.journal import Journal
from orchestrator.locks.leases import Promise, Tenant, claim
from orchestrator.locks.locks import hold
from orchestrator.plan.plan import PlannedPhase
from orchestrator.rolling import rolling, shared
from orchestrator.rolling.rolling import Roll, RotationState

path, project, deployment, seed, count, window, least = sys.argv[1:]
chance = random.Random(f"{seed} {project}")
keys = {f"web{number}": f"sha256:{number}" for number in range(int(count))}
names = list(keys)
chance.shuffle(names)

async def turn(journal, lease):
    machine = lease.machine
    await asyncio.to_thread(journal.append, deployment, BracketOpened(machine, "web", 1))
    await asyncio.sleep(chance.uniform(0.0, 0.02))
    ends = BracketClosed(machine, "web", "deployed"), TurnEnded(machine, 1, "deployed")
    await asyncio.to_thread(journal.append, deployment, *ends)
    lease.release()

async def roll_out(journal):
    mine, own = Tenant(project, "production", "1", deployment, project), shared.Own(project, "web")
    promise = Promise(deployment, "web", int(least), frozenset(names))
    roll, running = Roll(tuple(names), (PlannedPhase(0, int(window)),), int(least)), {}
    service = RotationState(frozenset(names), frozenset())
    while not roll.is_over:
        claimed = await claim(journal, mine, keys, lambda elsewhere: shared.starts(roll, service, own, elsewhere),
                              promise=promise, entry=lambda machine: TurnStarted(machine, 1))
        for lease in claimed.leases:
            roll = rolling.started(roll, lease.machine)
            running[asyncio.create_task(turn(journal, lease))] = lease.machine
        if not running:
            await asyncio.sleep(0.05)
            continue
        done, _ = await asyncio.wait(running, timeout=0.1, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
            roll = rolling.ended(roll, running.pop(task))

with Journal.open(path) as journal:
    print("ready", flush=True)
    sys.stdin.readline()
    with hold(journal, project, "production", operator=project, label="1", why="deploy", deployment=deployment):
        asyncio.run(roll_out(journal))
"""


@dataclass
class Project:
    name: str
    deployment: str
    least: int
    """What it keeps in service."""
    engine: Talk


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal.open(str(tmp_path / "journal.db")) as opened:
        yield opened


def projects(journal: Journal, window: int = WINDOW) -> list[Project]:
    found = []
    for number in range(PROJECTS):
        name, deployment = f"project{number}", f"01JD00000000000000000{number:05d}"
        plan = f'{{"project":"{name}","label":"1","environment":"production"}}'
        journal.begin(deployment, plan.encode(), 1, "ann")
        least = MACHINES - MACHINES // 4 - number % 2
        words = (journal.path, name, deployment, SEED, MACHINES, window, least)
        found.append(Project(name, deployment, least, Talk(Path(journal.path).parent, ENGINE, *words)))
    for project in found:
        assert project.engine.hear() == "ready\n"
    return found


def history(journal: Journal, found: Sequence[Project]) -> list[JournalEntry]:
    return sorted((entry for one in found for entry in journal.entries(one.deployment)), key=lambda entry: entry.number)


def check(entries: Sequence[JournalEntry], found: Sequence[Project]) -> None:
    """No machine turns twice at once, and at every start what each project that turns machines has promised is kept."""
    least = {project.deployment: project.least for project in found}
    out: set[str] = set()
    turning: dict[str, str] = {}
    for entry in entries:
        match entry.event:
            case ev.TurnStarted(machine=machine):
                assert machine not in turning, f"{machine} was turned already (entry {entry.number})"
                turning[machine] = entry.deployment
                inside = MACHINES - len(out | turning.keys())
                promised = max(least[deployment] for deployment in set(turning.values()))
                assert machine in out or inside >= promised, f"{inside} in service at entry {entry.number}"
            case ev.BracketOpened(machine=machine):
                assert turning[machine] == entry.deployment
                out.add(machine)
            case ev.BracketClosed(machine=machine):
                out.discard(machine)
            case ev.TurnEnded(machine=machine):
                del turning[machine]


@pytest.mark.processes
def test_projects_that_release_at_once_share_machines_and_never_break_what_any_of_them_promised(
    journal: Journal,
) -> None:
    found = projects(journal)
    for project in found:
        project.engine.say("go")
    done = [project.engine.end() for project in found]
    assert [one.code for one in done] == [0] * PROJECTS, [one.err for one in done]
    entries = history(journal, found)
    check(entries, found)
    for project in found:
        ended = [e.event for e in entries if e.deployment == project.deployment and isinstance(e.event, ev.TurnEnded)]
        assert len({end.machine for end in ended}) == len(ended) == MACHINES
    assert journal.open_brackets() == []


@pytest.mark.processes
def test_what_a_killed_one_had_out_is_touched_by_nobody_until_it_is_put_back(journal: Journal) -> None:
    found = projects(journal, window=1)
    killed, others = found[0], found[1:]
    killed.engine.say("go")
    wait_for(lambda: bool(journal.open_brackets()) or not killed.engine.process.is_alive)
    killed.engine.process.kill()
    left = [bracket.machine for bracket in journal.open_brackets()]
    for project in others:
        project.engine.say("go")

    def ended() -> int:
        return sum(isinstance(entry.event, ev.TurnEnded) for entry in history(journal, others))

    wait_for(lambda: ended() == len(others) * (MACHINES - len(left)), pause=0.1)
    touched = {e.event.machine for e in history(journal, others) if isinstance(e.event, ev.TurnStarted)}
    assert touched.isdisjoint(left)
    journal.append(killed.deployment, *(ev.BracketClosed(machine, "web", "put_back") for machine in left))
    assert [project.engine.end().code for project in others] == [0] * len(others)
    # The turn that was killed has no end: it ended with its process, before it was put back.
    story = journal.entries(killed.deployment)[: -len(left)]
    last = [entry.event for entry in story if isinstance(entry.event, ev.TurnStarted | ev.TurnEnded)][-1]
    ends = [JournalEntry(story[-1].number, killed.deployment, 0.0, ev.TurnEnded(last.machine, 1, "lost"))]
    lost = ends if isinstance(last, ev.TurnStarted) else []
    check(sorted([*history(journal, found), *lost], key=lambda entry: entry.number), found)
