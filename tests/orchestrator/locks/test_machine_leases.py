"""The lease of a machine while it turns: one deployment at a time, a name for those who wait, nothing that outlives its process."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.process import Talk

from orchestrator.journal import events as ev
from orchestrator.journal.events import TurnStarted
from orchestrator.journal.journal import Journal
from orchestrator.journal.tables import leases, promises
from orchestrator.locks.leases import Elsewhere, Lease, Promise, Tenant, claim, machine
from orchestrator.locks.locks import hold
from relay.errors import StoreError

SHOP = "01JD0000000000000000000000"
DESK = "01JD0000000000000000000001"
KEYS = {name: f"sha256:{name}" for name in ("web1", "web2", "web3")}


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal.open(str(tmp_path / "journal.db")) as opened:
        for project, deployment in (("shop", SHOP), ("desk", DESK)):
            plan = f'{{"project":"{project}","label":"1.4.2","environment":"production"}}'
            opened.begin(deployment, plan.encode(), 1, "ann")
        yield opened


def tenant(project: str = "shop", environment: str = "production") -> Tenant:
    return Tenant(project, environment, "1.4.2", SHOP if project == "shop" else DESK, "ann")


async def take(journal: Journal, *names: str, who: Tenant | None = None, **more: Promise) -> list[Lease]:
    return list((await claim(journal, who or tenant(), KEYS, lambda _: names, **more)).leases)


async def elsewhere(journal: Journal, who: Tenant | None = None) -> Elsewhere:
    return (await claim(journal, who or tenant("desk"), KEYS, lambda _: ())).elsewhere


async def test_who_turns_a_machine_is_known_to_all_others_until_it_is_given_back(journal: Journal) -> None:
    first, second = await take(journal, "web2", "web1")
    assert [first.machine, second.machine] == ["web2", "web1"], "in the order of the decision"
    found = (await elsewhere(journal)).turning
    assert {name: (one.project, one.deployment, one.pid) for name, one in found.items()} == {
        "web1": ("shop", SHOP, os.getpid()),
        "web2": ("shop", SHOP, os.getpid()),
    }
    assert str(found["web1"]).startswith("web1 is being turned by 1.4.2 of shop since ")
    assert (await elsewhere(journal, tenant())).turning == {}, "one's own are no others'"
    first.release()
    first.release()
    assert set((await elsewhere(journal)).turning) == {"web1"}
    second.release()
    assert (await elsewhere(journal)).turning == {}


async def test_a_machine_is_one_machine_whatever_environments_call_it(journal: Journal) -> None:
    staging = Tenant("shop", "staging", "1", SHOP, "ann")
    await claim(journal, staging, {"first": KEYS["web1"], "other": "sha256:x"}, lambda _: ("first", "other"))
    assert set((await elsewhere(journal)).turning) == {"web1"}


async def test_the_decision_its_leases_and_its_entries_are_one(journal: Journal) -> None:
    before = journal.entries(SHOP)
    taken = await claim(journal, tenant(), KEYS, lambda _: ("web3", "web1"), entry=lambda name: TurnStarted(name, 2))
    assert [entry.event for entry in journal.entries(SHOP)[len(before) :]] == [
        TurnStarted("web3", 2),
        TurnStarted("web1", 2),
    ]
    for lease in taken.leases:
        lease.release()
    nobody = Tenant("shop", "production", "1", "01JD00000000000000000000ZZ", "ann")
    with pytest.raises(Exception, match="no deployment"):
        await claim(journal, nobody, KEYS, lambda _: ("web1",), entry=lambda name: TurnStarted(name, 2))
    assert (await elsewhere(journal)).turning == {}, "what was not written down was not taken"


async def test_who_waits_is_told_for_whom_and_begins_when_the_machine_is_free(journal: Journal) -> None:
    (lease,) = await take(journal, "web1")
    told: list[str] = []

    async def wait() -> str:
        async with machine(journal, tenant("desk"), "web1", KEYS["web1"], told.append) as mine:
            return mine.turning.project

    waiting = asyncio.create_task(wait())
    while not told:
        await asyncio.sleep(0.01)
    assert told[0].startswith("waiting: web1 is being turned by 1.4.2 of shop since ")
    lease.release()
    assert await asyncio.wait_for(waiting, 30) == "desk"
    assert len(told) == 1
    assert (await elsewhere(journal, tenant())).turning == {}


async def test_a_wait_can_be_cancelled_at_any_moment_and_leaves_nothing(journal: Journal) -> None:
    for seed in range(20):
        (lease,) = await take(journal, "web1")

        async def wait() -> None:
            async with machine(journal, tenant("desk"), "web1", KEYS["web1"], lambda _: None):
                await asyncio.sleep(60)

        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0.001 * seed)
        lease.release()
        await asyncio.sleep(0.0005 * seed)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        # What a thread took meanwhile is given back when it is through.
        async with machine(journal, tenant(), "web1", KEYS["web1"], lambda _: None):
            pass


async def test_a_promise_lasts_as_long_as_a_machine_of_its_deployment_turns(journal: Journal) -> None:
    promise = Promise(SHOP, "web", 2, frozenset(KEYS))
    (lease,) = await take(journal, "web1", promise=promise)
    assert (await elsewhere(journal)).promises == (promise,)
    assert (await elsewhere(journal, tenant())).promises == ()
    assert (await elsewhere(journal, tenant("desk", "staging"))).promises == ()
    lease.release()
    assert (await elsewhere(journal)).promises == ()
    await take(journal, who=tenant("desk"))
    with journal.database.reading() as connection:
        assert connection.execute(promises.select()).all() == []
        assert connection.execute(leases.select()).all() == []


async def test_a_bracket_is_seen_by_all_and_whether_its_deployment_lives(journal: Journal) -> None:
    journal.append(SHOP, ev.BracketOpened("web1", "web", 1))
    assert [(b.machine, b.project) for b in (await elsewhere(journal)).brackets] == [("web1", "shop")]
    assert (await elsewhere(journal)).alive == frozenset()
    with hold(journal, "shop", "production", operator="ann", label="1", why="deploy", deployment=SHOP):
        assert (await elsewhere(journal)).alive == {SHOP}
    assert (await elsewhere(journal)).alive == frozenset()


async def test_a_lock_that_is_held_without_a_row_is_respected_and_named(journal: Journal) -> None:
    (lease,) = await take(journal, "web2")
    with journal.database.writing() as connection:
        connection.execute(leases.delete())
    asked: list[Elsewhere] = []

    def decide(known: Elsewhere) -> list[str]:
        asked.append(known)
        return [name for name in ("web1", "web2", "web3") if name not in known.turning]

    taken = (await claim(journal, tenant("desk"), KEYS, decide)).leases
    assert [one.machine for one in taken] == ["web1", "web3"]
    assert len(asked) == 2
    assert "web2 is being turned by something of somebody" in str(asked[1].turning["web2"])
    lease.release()


async def test_a_lease_that_cannot_be_kept_is_a_store_error_and_holds_nothing(journal: Journal) -> None:
    folder = Path(f"{journal.path}.locks")
    folder.write_text("a file where the folder belongs")
    with pytest.raises(StoreError, match="web1"):
        await take(journal, "web1")
    folder.unlink()
    (lease,) = await take(journal, "web1")
    lease.release()


# --- many processes

TAKER = """
import asyncio, sys
from orchestrator.journal.journal import Journal
from orchestrator.locks.leases import Tenant, claim, machine
path, project, deployment = sys.argv[1:]
mine = Tenant(project, "production", "1.4.2", deployment, project)

async def turn(name):
    async with machine(journal, mine, name, "sha256:" + name, lambda words: print(words, flush=True)) as lease:
        print("turns", lease.machine, flush=True)
        sys.stdin.readline()

with Journal.open(path) as journal:
    print("ready", flush=True)
    for line in sys.stdin:
        asyncio.run(turn(line.strip()))
        print("gave back", flush=True)
"""
RACER = """
import asyncio, os, sys
from orchestrator.journal.journal import Journal
from orchestrator.locks.leases import Tenant, claim
path, folder, name, rounds = sys.argv[1:]
mine = Tenant(name, "production", "1", name, name)
keys = {f"web{n}": f"sha256:web{n}" for n in range(4)}

async def race():
    for number in range(int(rounds)):
        while True:
            claimed = await claim(journal, mine, keys, lambda elsewhere: [n for n in sorted(keys) if n not in elsewhere.turning][:2])
            if claimed.leases:
                break
            await asyncio.sleep(0.001)
        for lease in claimed.leases:
            os.close(os.open(f"{folder}/{lease.machine}", os.O_CREAT | os.O_EXCL))
        for lease in claimed.leases:
            os.unlink(f"{folder}/{lease.machine}")
            lease.release()

print("ready", flush=True)
sys.stdin.readline()
with Journal.open(path) as journal:
    asyncio.run(race())
"""


def taker(journal: Journal, project: str, deployment: str) -> Talk:
    talk = Talk(Path(journal.path).parent, TAKER, journal.path, project, deployment)
    assert talk.hear() == "ready\n"
    return talk


@pytest.mark.processes
def test_a_kill_of_the_holder_frees_its_machines(journal: Journal) -> None:
    shop, desk = taker(journal, "shop", SHOP), taker(journal, "desk", DESK)
    shop.say("web1")
    assert shop.hear() == "turns web1\n"
    desk.say("web1")
    assert desk.hear().startswith("waiting: web1 is being turned by 1.4.2 of shop since ")
    shop.process.kill()
    with journal.database.reading() as connection:
        assert connection.execute(leases.select()).first() is not None, "the killed process' row must still be there"
    assert desk.hear() == "turns web1\n"
    desk.say("")
    assert desk.hear() == "gave back\n"
    assert desk.end().code == 0


@pytest.mark.processes
def test_a_stopped_holder_still_holds(journal: Journal) -> None:
    shop = taker(journal, "shop", SHOP)
    shop.say("web1")
    assert shop.hear() == "turns web1\n"
    os.kill(shop.process.pid, signal.SIGSTOP)
    try:
        assert set(asyncio.run(elsewhere(journal)).turning) == {"web1"}
    finally:
        os.kill(shop.process.pid, signal.SIGCONT)
    shop.say("")
    assert shop.end().code == 0


@pytest.mark.processes
def test_of_many_processes_no_two_ever_turn_one_machine(journal: Journal, tmp_path: Path) -> None:
    """Each makes a file of its own while it turns a machine, which fails where another has made it."""
    held = tmp_path / "held"
    held.mkdir()
    racers = [Talk(tmp_path, RACER, journal.path, held, f"p{number}", 12) for number in range(6)]
    for racer in racers:
        assert racer.hear() == "ready\n"
    for racer in racers:
        racer.say("go")
    done = [racer.end() for racer in racers]
    assert [one.code for one in done] == [0] * len(racers), [one.err for one in done]
