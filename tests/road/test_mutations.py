"""A property: whatever a relay makes of its answers, beside an honest one an order ends in the signed tree, and in a report.

Everything takes part, in this process: an orchestrator's fleet, an agent that serves, and two relays with mail, of which the
first changes its answers at random. `WAYSTATION_SEED` repeats what was drawn.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness.evil_front import EvilFront, mutations
from harness.evil_relay import tree_of
from harness.orders_kit import DEPLOYMENT, JOURNAL, Desk, desk_in, tree
from harness.origins import Keys, depot_with
from harness.packages import SMALL, SMALL_TREE, make_nupkg, noise
from harness.relays import RELAY_LIMITS
from harness.seed import SOAK, chance

from agent.config import AgentConfig
from agent.orders.operation_id import OperationId
from agent.orders.orders import Acquire
from agent.relays.health import Average, Health
from agent.relays.memory import State, save_state
from agent.relays.sources import Sources
from agent.service import Service
from agent.trees.installed import AgentState
from agent.trees.pull import parse_request, pull
from orchestrator.fleet.fleet import Fleet, FleetLimits
from orchestrator.fleet.relay_mail import Pauses
from orchestrator.journal.events import Dispatched, Event
from orchestrator.journal.recorder import Recorder
from orchestrator.plan.plan import AcquirePlan, Plan, PlannedMachine, PlannedRelay
from relay.config import RelayConfig
from relay.mail.mailbox import Mail
from relay.protocol.client import RelayClient
from relay.protocol.connection import ClientLimits, Connection
from relay.server.app import RelayApp
from relay.server.http.listen import Running, start_guarded
from relay.server.packages import Transfer

ANSWERS = 20_000 if SOAK else 300
"""Changed answers, in all."""
WORLD_ANSWERS = 1000
"""Of one world: journals grow."""
OF_PACKAGES = ("health", "package", "manifest", "bundle")
OF_MAIL = ("poll", "report", "reports", "agents", "orders", "output", "logs", "metrics")
LIMITS = ClientLimits(connect_seconds=3, answer_seconds=3, window_seconds=1.5, window_bytes=2000, attempts=1)


class Quiet(Recorder):
    """Keeps nothing: what is told of a relay that lies is another test's."""

    def __init__(self) -> None:
        self.deployment = DEPLOYMENT
        self.orders: dict[str, bytes] = {}

    async def record(self, *events: Event) -> None:
        await asyncio.sleep(0)

    async def dispatch(self, event: Dispatched, envelope: bytes) -> None:
        self.orders[event.operation] = envelope

    def order(self, operation: OperationId) -> bytes | None:
        return self.orders.get(str(operation))

    def ordered(self) -> set[str]:
        return set(self.orders)


@dataclass
class World:
    """An agent's desk and home, an evil relay and an honest one, and a fleet that orders through both."""

    folder: Path
    desk: Desk
    manifest: str
    front: EvilFront
    good: Running
    fleet: Fleet
    orders: int = 0

    async def acquire(self) -> dict[str, Any]:
        """By a fresh agent that takes the evil relay for the closest by far; the tree that it then has."""
        self.orders += 1
        root = self.folder / "srv"
        shutil.rmtree(root, ignore_errors=True)
        self._prefer_evil()
        stop = asyncio.Event()
        service = Service(self.desk.home, relays=[self.front.url, self.good.url], limits=LIMITS)
        serving = asyncio.create_task(service.serve(stop))
        try:
            name = OperationId.of(DEPLOYMENT, 0, "web1", f"acquire-{self.orders}")
            what = Acquire((tree(self.manifest, root=str(root)),), deadline=60.0, stall=2.0)
            report = await self._performed(name, what, serving)
        finally:
            stop.set()
            await serving
        assert report.state == "done", report.reason
        return tree_of(report.facts.trees[0].path)

    async def pull(self) -> dict[str, Any]:
        """By hand, with the pointer that a relay gives."""
        root = self.folder / "by-hand"
        shutil.rmtree(root, ignore_errors=True)
        self._prefer_evil()
        urls = (self.front.url, self.good.url)
        sources = Sources(AgentConfig(name="web1"), Path(self.desk.home) / "relays.json", relays=urls, limits=LIMITS)
        async with sources:
            request = parse_request("Acme.Web", "1.0.0", str(root), None, switch=False)
            pulled = await pull(request, AgentState(self.desk.home), sources, self.desk.pins, stall_seconds=2.0)
        return tree_of(pulled.tree)

    async def _performed(self, name: OperationId, what: Acquire, serving: asyncio.Task[None]) -> Any:
        performing = asyncio.create_task(self.fleet.perform(name, what))
        async with asyncio.timeout(90):
            await asyncio.wait({performing, serving}, return_when=asyncio.FIRST_COMPLETED)
        assert not serving.done(), "the agent ended"
        return performing.result()

    def _prefer_evil(self) -> None:
        now = time.time()
        healths = {
            url: Health(latency=Average(0.001 * 10**n, 0.01, 50, now), last_checked=now)
            for n, url in enumerate((self.front.url, self.good.url))
        }
        save_state(Path(self.desk.home) / "relays.json", State(current=self.front.url, healths=healths))


@asynccontextmanager
async def world_in(folder: Path) -> AsyncIterator[World]:
    os.chmod(folder, 0o700)
    nupkg = make_nupkg(folder, SMALL)
    older = make_nupkg(folder, SMALL | {"a.bin": noise("old", 70_000)}, version="0.9.0")
    async with AsyncExitStack() as stack:
        origin = await stack.enter_async_context(depot_with(folder / "origin", nupkg, older))
        behind, good = [await _relay(origin.depot.store, stack) for _ in range(2)]
        front = EvilFront(behind.port)
        await front.start()
        stack.push_async_callback(front.stop)
        desk = desk_in(folder, keys=Keys(origin.keys.folder, origin.keys.pins, origin.keys.signer))
        urls = {"evil": front.url, "good": good.url}
        clients = {name: await stack.enter_async_context(Connection(url, limits=LIMITS)) for name, url in urls.items()}
        fleet = await stack.enter_async_context(_fleet(desk, urls, clients, folder))
        yield World(folder, desk, origin.added[0].manifest.id, front, good, fleet)


async def _relay(store: Any, stack: AsyncExitStack) -> Running:
    """The whole relay but for its measuring of the processor, which would take most of the time."""
    transfer, mail = Transfer(store), Mail(None)
    await transfer.load()
    await mail.load()
    stack.push_async_callback(mail.close)
    running = await start_guarded(
        RelayApp(transfer, RelayConfig(), RELAY_LIMITS, None, mail).build(), "127.0.0.1", 0, RELAY_LIMITS
    )
    stack.push_async_callback(running.stop)
    return running


def _fleet(desk: Desk, urls: dict[str, str], clients: dict[str, Connection], folder: Path) -> Fleet:
    machine = PlannedMachine(desk.name, "10.1.0.11", "fra", desk.identity.fingerprint, ("web",), tuple(urls))
    plan = Plan(
        format=1,
        project="webshop",
        label="1.4.2",
        environment="test",
        packages={},
        scripts=None,
        relays=tuple(PlannedRelay(name, url, "fra") for name, url in urls.items()),
        feeds={},
        machines=(machine,),
        secrets={},
        machine_secrets=(),
        pre_acquire=(),
        acquire=AcquirePlan(),
        steps=(),
    )
    pauses = Pauses(first=0.02, longest=0.2, ask=3.0, grace=0.2, close=0.2)
    return Fleet(
        plan,
        clients,
        signer=desk.order_signer,
        journal=JOURNAL,
        folder=str(folder / "deployment"),
        recorder=Quiet(),
        fence=1,
        limits=FleetLimits(look=0.05, pauses=pauses),
    )


def _drawn(rng: random.Random) -> list[str]:
    """Kinds of answers that are changed: one, some of those beside it, or every one."""
    group = list(rng.choice((OF_PACKAGES, OF_MAIL, OF_MAIL, (*OF_PACKAGES, *OF_MAIL))))
    return rng.sample(group, rng.randint(1, len(group)))


async def play(folder: Path, number: int, answers: int) -> int:
    """So many changed answers in one world, or a few more; how many there were."""
    rng = chance("mutations", number)
    async with world_in(folder) as world:
        with_older = AgentState(world.desk.home)
        while world.front.played < answers:
            kinds = _drawn(rng)
            world.front.way = None
            if rng.random() < 0.3:
                await _install_older(world, with_older)
            world.front.way = mutations(rng, kinds)
            found = await (world.pull() if "package" in kinds else world.acquire())
            assert found == SMALL_TREE, world.front.way.name
        return world.front.played


async def _install_older(world: World, state: AgentState) -> None:
    """Something that the next one may come as a difference from; until it is removed."""
    root = world.folder / "older"
    shutil.rmtree(root, ignore_errors=True)
    path = Path(world.desk.home) / "relays.json"
    async with Sources(AgentConfig(name="web1"), path, relays=[world.good.url], limits=LIMITS) as sources:
        request = parse_request("Acme.Web", "0.9.0", str(root), None, switch=False)
        await pull(request, state, sources, world.desk.pins)


async def test_whatever_a_relay_answers_the_tree_is_the_signed_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unheard: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: unheard.append(context))
    played, number = 0, 0
    with caplog.at_level(logging.ERROR):
        while played < ANSWERS:
            folder = tmp_path / str(number)
            folder.mkdir()
            played += await play(folder, number, min(WORLD_ANSWERS, ANSWERS - played))
            shutil.rmtree(folder)
            number += 1
    print(f"{played} changed answers")
    assert not unheard
    assert not [record for record in caplog.records if record.exc_info], "code of ours stumbled over an answer"


async def test_without_a_change_the_relay_that_is_asked_first_takes_part_in_everything(tmp_path: Path) -> None:
    """So that a changed answer is met wherever it is given."""
    async with world_in(tmp_path) as world:
        assert await world.acquire() == SMALL_TREE
        assert await world.pull() == SMALL_TREE
        assert {"package", "manifest", "bundle", *OF_MAIL} - set(world.front.counts) <= {"output", "metrics"}
        async with RelayClient(world.front.url, limits=LIMITS) as client:
            assert (await client.health()).status == "ok"
