"""Orders out, signed results back: through real relays, with a small agent that signs what it says."""

from __future__ import annotations

import asyncio
import base64
import copy
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from harness.origins import trust_keys
from harness.process import eventually
from harness.relays import CLIENT_LIMITS, Relay, running_relay
from hypothesis import given
from hypothesis import strategies as st

from agent.orders.envelopes import open_order, order_digest, sign_order, sign_presence, sign_report, verify_order
from agent.orders.keys import load_agent_identity, load_report_signer, load_sealing_key, make_agent_keys
from agent.orders.operation_id import OperationId
from agent.orders.orders import (
    SEALED_ACTIONS,
    STALL_LIMITS,
    Acknowledge,
    Order,
    Presence,
    Report,
    RunScript,
    SealedAction,
    Stop,
    Survey,
)
from orchestrator.fleet.fleet import Fleet, FleetLimits, LostError
from orchestrator.fleet.logs import LogFile
from orchestrator.fleet.presence import Answers, merge_presences
from orchestrator.fleet.relay_mail import Mailroom, Pauses
from orchestrator.journal.events import Dispatched, Event, Note, Reported
from orchestrator.journal.recorder import Recorder
from orchestrator.plan.plan import AcquirePlan, Plan, PlannedMachine, PlannedRelay
from relay.errors import SignatureError, StoreError, UnreachableError, WaystationError
from relay.protocol import messages
from relay.protocol.connection import Connection
from relay.protocol.mail_client import MailClient

DEPLOYMENT = "01J9ZZZZZZZZZZZZZZZZZZZZZ0"
OPERATION = OperationId.of("01J9ZZZZZZZZZZZZZZZZZZZZZ0", 0, "web1", "survey")
JOURNAL = "0" * 31 + "1"
SURVEY = Survey(())
SCRIPT = RunScript(package="a" * 64, path="configure.sh", variables={})
QUICK = FleetLimits(
    lost=20.0, look=0.05, accept=60.0, logs=0.3, pauses=Pauses(first=0.02, longest=0.1, ask=2.0, close=0.2)
)
DEAD = "http://127.0.0.1:9"
"""Nobody listens on the discard port."""


# --- a fleet around it


@dataclass
class Told(Recorder):
    """A recorder that keeps what it hears here. `events` are those of operations, in order."""

    deployment: str = DEPLOYMENT
    events: list[Event] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hold: asyncio.Event | None = None
    """A dispatch waits for it, once it is kept, where there is one."""
    orders: dict[str, bytes] = field(default_factory=dict)

    async def record(self, *events: Event) -> None:
        await asyncio.sleep(0)
        for event in events:
            if isinstance(event, Note):
                self.notes.append(f"{event.machine}: {event.text}" if event.machine else event.text)
        self.events += [event for event in events if not isinstance(event, Note)]

    def later(self, machine: str, *events: Event) -> None:
        raise AssertionError(f"nothing follows here upon {events} of {machine}")

    async def catch_up(self) -> None:
        pass

    async def dispatch(self, event: Dispatched, envelope: bytes) -> None:
        assert self.orders.setdefault(event.operation, envelope) == envelope
        if self.hold is not None:
            await self.hold.wait()
        await self.record(event)

    async def keep_order(self, operation: OperationId, envelope: bytes) -> None:
        assert self.orders.setdefault(str(operation), envelope) == envelope

    def order(self, operation: OperationId) -> bytes | None:
        return self.orders.get(str(operation))

    def ordered(self) -> set[str]:
        return set(self.orders)

    @property
    def kinds(self) -> list[str]:
        return [event.kind() for event in self.events]


class Agent:
    """What an agent does in the fewest words: polls relays, remembers orders, reports what it is told to report."""

    def __init__(self, folder: Path, name: str = "web1") -> None:
        home = str(folder / name)
        make_agent_keys(home)
        self.name = name
        self.identity = load_agent_identity(home)
        self.signer = load_report_signer(home)
        self.pins = trust_keys(folder / f"{name}-trust")
        self.orders: list[Order] = []
        self.envelopes: list[bytes] = []
        self.skew = 0.0
        self.says: dict[str, Any] = {}
        self.answers: Callable[[Order, bytes, Connection], Awaitable[None]] = self.answer_done

    def presence(self, **changes: Any) -> bytes:
        said = Presence(
            format=1,
            name=self.name,
            signing=self.identity.signing_public,
            sealing=self.identity.sealing_public,
            version="1",
            system="linux",
            site="fra",
            time=time.time() + self.skew,
        )
        return sign_presence(msgspec.structs.replace(said, **self.says | changes), self.signer)

    def report(self, order: Order, envelope: bytes, state: str = "done", number: int = 1, **more: Any) -> Report:
        return Report(
            format=1,
            operation=order.operation,
            deployment=order.deployment,
            agent=self.name,
            key=self.identity.fingerprint,
            order=order_digest(envelope),
            number=number,
            state=state,  # type: ignore[arg-type]
            **more,
        )

    async def send(self, relay: Connection, *reports: Report, signer: Any = None) -> None:
        letters = tuple(
            messages.ReportLetter(report.operation, report.number, sign_report(report, signer or self.signer))
            for report in reports
        )
        await MailClient(relay).post_reports(self.name, messages.ReportsRequest(DEPLOYMENT, letters))

    async def send_output(self, relay: Connection, operation: str, *pieces: tuple[int, bytes]) -> None:
        letters = tuple(messages.LogPiece(operation, offset, data) for offset, data in pieces)
        await MailClient(relay).post_logs(self.name, messages.LogsRequest(DEPLOYMENT, letters))

    async def answer_done(self, order: Order, envelope: bytes, relay: Connection) -> None:
        await self.send(relay, self.report(order, envelope))

    async def poll(self, relay: Connection) -> None:
        after: messages.Cursor | None = None
        while True:
            try:
                answer = await MailClient(relay).poll(self.name, messages.PollRequest(self.presence(), after, 5.0))
            except UnreachableError:
                await asyncio.sleep(0.02)
                continue
            for letter in answer.orders:
                after = messages.Cursor(answer.epoch, letter.number)
                await self._take(letter, relay)

    async def _take(self, letter: messages.NumberedOrder, relay: Connection) -> None:
        order = verify_order(letter.envelope, self.pins.pins)
        if letter.envelope in self.envelopes:
            return
        self.envelopes.append(letter.envelope)
        self.orders.append(order)
        if not isinstance(order.action, (Stop, Acknowledge)):
            await self.answers(order, letter.envelope, relay)

    @asynccontextmanager
    async def polling(self, *relays: Connection) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self.poll(relay)) for relay in relays]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def machine_of(agent: Agent, relays: Iterable[str], **changes: Any) -> PlannedMachine:
    machine = PlannedMachine(agent.name, "10.1.0.11", "fra", agent.identity.fingerprint, ("web",), tuple(relays))
    return msgspec.structs.replace(machine, **changes)


def plan_of(machines: Sequence[PlannedMachine], urls: dict[str, str]) -> Plan:
    return Plan(
        format=1,
        project="webshop",
        label="1.4.2",
        environment="production",
        packages={},
        scripts=None,
        relays=tuple(PlannedRelay(name, url, "fra") for name, url in urls.items()),
        feeds={},
        machines=tuple(machines),
        secrets={},
        machine_secrets=(),
        pre_acquire=(),
        acquire=AcquirePlan(),
        steps=(),
    )


@dataclass
class Scene:
    """One agent, web1, at relays a and b (or as asked), and the fleet of a deployment."""

    agent: Agent
    relays: dict[str, Connection]
    fleet: Fleet
    told: Told
    folder: Path

    def path(self, operation: str) -> Path:
        return Path(self.fleet.log_path(OperationId.parse(operation)))


class World:
    """Relays and agents that live as long as a test."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self.told = Told()

    async def relay(self, name: str) -> Relay:
        return await self.stack.enter_async_context(running_relay(self.folder / f"relay-{name}"))

    async def client(self, url: str) -> Connection:
        return await self.stack.enter_async_context(Connection(url, limits=CLIENT_LIMITS))

    async def scene(
        self,
        *,
        extra: dict[str, str] | None = None,
        polls: Sequence[str] | None = None,
        limits: FleetLimits = QUICK,
        **said: Any,
    ) -> Scene:
        """Relay `a` (and what `extra` names by URL); web1 polls `polls`, or all that are alive. `said`: in its presence."""
        urls = {"a": (await self.relay("a")).url, **(extra or {})}
        clients = {name: await self.client(url) for name, url in urls.items()}
        agent = Agent(self.folder)
        agent.says = said
        alive = [name for name, url in urls.items() if url != DEAD] if polls is None else polls
        await self.stack.enter_async_context(agent.polling(*[await self.client(urls[name]) for name in alive]))
        fleet = self.fleet(agent, urls, clients, limits=limits)
        await self.stack.enter_async_context(fleet)
        return Scene(agent, clients, fleet, self.told, self.folder)

    def fleet(
        self,
        agent: Agent,
        urls: dict[str, str],
        clients: dict[str, Connection],
        *,
        limits: FleetLimits = QUICK,
        machine: PlannedMachine | None = None,
    ) -> Fleet:
        return Fleet(
            plan_of([machine or machine_of(agent, urls)], urls),
            clients,
            signer=order_signer(agent),
            journal=JOURNAL,
            folder=str(self.folder / "deployment"),
            recorder=self.told,
            fence=7,
            limits=limits,
        )


async def keep_order(world: World, agent: Agent) -> bytes:
    """An order that was written down before a crash."""
    now = time.time()
    order = Order(
        format=1,
        operation=str(OPERATION),
        deployment=DEPLOYMENT,
        environment="production",
        fence=7,
        journal=JOURNAL,
        agent="web1",
        key=agent.identity.fingerprint,
        not_before=now,
        not_after=now + 3600,
        relays=(),
        action=SURVEY,
    )
    envelope = sign_order(order, order_signer(agent))
    world.told.orders[str(OPERATION)] = envelope
    return envelope


def order_signer(agent: Agent) -> Any:
    from orchestrator.trust.keyring import load_signer

    return load_signer(agent.pins.folder, "order")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    os.chmod(tmp_path, 0o700)
    async with AsyncExitStack() as stack:
        yield World(tmp_path, stack)


async def perform(scene: Scene, action: Any = SURVEY, **more: Any) -> Report:
    return await scene.fleet.perform(OPERATION, action, **more)


# --- out and back


async def test_an_order_comes_back_as_a_signed_result(world: World) -> None:
    scene = await world.scene()
    report = await perform(scene)
    assert report.state == "done"
    [order] = scene.agent.orders
    assert order.operation == f"{DEPLOYMENT}/0/web1/survey/1" == report.operation
    assert (order.fence, order.journal, order.environment, order.agent) == (7, JOURNAL, "production", "web1")
    assert order.key == scene.agent.identity.fingerprint
    assert order.relays == (scene.relays["a"].url,)
    assert order.not_after - order.not_before == 3600.0


async def test_the_journal_has_the_order_before_it_leaves_and_the_result_before_it_is_returned(world: World) -> None:
    scene = await world.scene()
    scene.told.hold = asyncio.Event()
    running = asyncio.create_task(perform(scene))
    await eventually(lambda: str(OPERATION) in scene.told.orders)
    await scene.fleet.presences()
    # A letter that had left would be at the relay by now, and that relay answers at once.
    seen = await MailClient(scene.relays["a"]).poll("web1", messages.PollRequest(scene.agent.presence(), None, 0.0))
    assert seen.orders == ()
    assert scene.agent.orders == []

    scene.told.hold.set()
    report = await running
    digest = order_digest(scene.agent.envelopes[0])
    assert scene.told.events == [
        Dispatched(report.operation, "web1", digest),
        Reported.of("web1", report),
    ], "when perform returned, the journal had both"


async def test_a_journal_that_cannot_be_written_keeps_the_order_here(world: World) -> None:
    scene = await world.scene()

    async def full(*events: Event) -> None:
        raise StoreError("no space left", full=True)

    scene.told.record = full  # type: ignore[method-assign]
    with pytest.raises(StoreError):
        await perform(scene)
    seen = await MailClient(scene.relays["a"]).poll("web1", messages.PollRequest(scene.agent.presence(), None, 0.0))
    assert seen.orders == ()


async def test_an_order_at_two_relays_is_acted_on_once_and_answered_once(world: World) -> None:
    b = await world.relay("b")
    scene = await world.scene(extra={"b": b.url})
    done: list[Report] = []

    async def twice(order: Order, envelope: bytes, relay: Connection) -> None:
        # The same report at both relays, as an agent does that did not hear the first one's answer.
        report = scene.agent.report(order, envelope)
        done.append(report)
        for client in scene.relays.values():
            await scene.agent.send(client, report)

    scene.agent.answers = twice
    assert (await perform(scene)).state == "done"
    await eventually(lambda: len(done) == 1)
    assert scene.told.kinds == ["dispatched", "reported"]
    assert scene.told.notes == []


async def test_a_dead_relay_is_no_hindrance(world: World) -> None:
    scene = await world.scene(extra={"dead": DEAD})
    assert (await perform(scene)).state == "done"
    assert any("relay dead" in note for note in scene.told.notes), "nobody was told"


async def test_a_result_that_only_another_relay_has_is_found_there(world: World) -> None:
    b = await world.relay("b")
    scene = await world.scene(extra={"b": b.url}, polls=["a"])

    async def elsewhere(order: Order, envelope: bytes, relay: Connection) -> None:
        await scene.agent.send(scene.relays["b"], scene.agent.report(order, envelope))

    scene.agent.answers = elsewhere
    assert (await perform(scene)).state == "done"


async def test_a_relay_that_dies_with_the_order_is_made_up_for_when_it_comes_back_empty(world: World) -> None:
    """The relay takes the order, dies before the agent asked, and comes back without its mail."""
    agent = Agent(world.folder)
    async with AsyncExitStack() as first:
        relay = await first.enter_async_context(running_relay(world.folder / "one"))
        urls = {"a": relay.url}
        client = await world.client(relay.url)
        await MailClient(client).poll("web1", messages.PollRequest(agent.presence(), None, 0.0))
        fleet = world.fleet(agent, urls, {"a": client})
        await world.stack.enter_async_context(fleet)
        running = asyncio.create_task(fleet.perform(OPERATION, SURVEY))
        await eventually(lambda: world.told.kinds == ["dispatched"])
        async with asyncio.timeout(10):
            while not (await MailClient(client).poll("web1", messages.PollRequest(agent.presence(), None, 0.0))).orders:
                await asyncio.sleep(0.01)
    assert not running.done()
    other = await world.stack.enter_async_context(running_relay(world.folder / "two", port=relay.port))
    assert other.url == relay.url
    await world.stack.enter_async_context(agent.polling(await world.client(relay.url)))
    async with asyncio.timeout(20):
        assert (await running).state == "done"


def limits_with(**changes: Any) -> FleetLimits:
    return replace(QUICK, **changes)


# --- what agents and relays say


async def test_reports_out_of_order_and_twice_are_one_result(world: World) -> None:
    scene = await world.scene()
    heard: list[int] = []

    async def muddled(order: Order, envelope: bytes, relay: Connection) -> None:
        running = [scene.agent.report(order, envelope, "running", n, done=n, whole=9) for n in (1, 2, 3)]
        await scene.agent.send(relay, running[1])
        await scene.agent.send(relay, running[0], running[1])
        await scene.agent.send(relay, running[2], scene.agent.report(order, envelope, "failed", 5, exit_status=3))
        await scene.agent.send(relay, scene.agent.report(order, envelope, "running", 4, done=4))

    scene.agent.answers = muddled
    report = await perform(scene, on_progress=lambda report: heard.append(report.done))
    assert (report.state, report.exit_status) == ("failed", 3)
    assert heard == [2, 3], "older news than what is known is no news"


async def test_a_report_that_another_key_signed_counts_for_nothing(world: World) -> None:
    scene = await world.scene()
    other = Agent(world.folder, "web2")

    async def forged_first(order: Order, envelope: bytes, relay: Connection) -> None:
        await scene.agent.send(relay, scene.agent.report(order, envelope, "done", 1), signer=other.signer)
        await scene.agent.send(relay, scene.agent.report(order, envelope, "failed", 2))

    scene.agent.answers = forged_first
    assert (await perform(scene)).state == "failed", "the forged success was believed"
    assert any("web1 did not sign" in note for note in scene.told.notes)


async def test_a_report_of_another_order_under_the_same_name_counts_for_nothing(world: World) -> None:
    scene = await world.scene()

    async def of_another(order: Order, envelope: bytes, relay: Connection) -> None:
        stale = scene.agent.report(order, b"other bytes", "refused", 1, reason="other bytes under this operation")
        await scene.agent.send(relay, stale, scene.agent.report(order, envelope, "done", 2))

    scene.agent.answers = of_another
    assert (await perform(scene)).state == "done"
    assert any("another order under this name" in note for note in scene.told.notes)


async def test_a_machine_cannot_report_for_another(world: World) -> None:
    """web2 is in the plan, too, and signs as itself; it must not end what web1 was ordered to do."""
    relay = await world.relay("a")
    client = await world.client(relay.url)
    web1, web2 = Agent(world.folder, "web1"), Agent(world.folder, "web2")
    urls = {"a": relay.url}
    fleet = Fleet(
        plan_of([machine_of(web1, urls), machine_of(web2, urls)], urls),
        {"a": client},
        signer=order_signer(web1),
        journal=JOURNAL,
        folder=str(world.folder / "deployment"),
        recorder=world.told,
        fence=1,
        limits=QUICK,
    )

    async def meddled(order: Order, envelope: bytes, relay: Connection) -> None:
        await web2.send(relay, web2.report(order, envelope, "done", 1))
        await eventually(lambda: any("never ordered" in note for note in world.told.notes))
        await web1.send(relay, web1.report(order, envelope, "failed", 1))

    web1.answers = meddled
    async with fleet, web1.polling(client), web2.polling(await world.client(relay.url)):
        await all_present(fleet)
        report = await fleet.perform(OPERATION, SURVEY)
    assert (report.state, report.agent) == ("failed", "web1")


async def all_present(fleet: Fleet) -> None:
    async with asyncio.timeout(10):
        while (await fleet.presences()).missing:
            await asyncio.sleep(0.01)


async def test_reports_that_came_before_the_machine_showed_its_keys_are_not_lost(world: World) -> None:
    relay = await world.relay("a")
    client = await world.client(relay.url)
    agent = Agent(world.folder)
    urls = {"a": relay.url}
    envelope = await keep_order(world, agent)
    fleet = world.fleet(agent, urls, {"a": client})
    async with fleet:
        running = asyncio.create_task(fleet.perform(OPERATION, SURVEY))
        await eventually(lambda: world.told.kinds == ["dispatched"])
        order = verify_order(envelope, agent.pins.pins)
        await agent.send(client, agent.report(order, envelope))
        await eventually(lambda: bool(fleet._unproven))
        assert not running.done(), "a report was believed before its key was known"
        async with agent.polling(await world.client(relay.url)):
            assert (await running).state == "done"


# --- crashes


async def test_the_same_again_after_a_crash_sends_the_same_bytes_and_gets_the_first_result(world: World) -> None:
    scene = await world.scene()
    first = await perform(scene)
    await scene.fleet.__aexit__(None, None, None)

    again = world.fleet(scene.agent, {"a": scene.relays["a"].url}, scene.relays)
    async with again:
        report = await again.perform(OPERATION, SCRIPT)
    assert report == first
    assert len(scene.agent.orders) == 1, "another order left under the same name"
    assert isinstance(scene.agent.orders[0].action, Survey)


async def test_an_order_that_was_written_down_but_never_left_leaves_now(world: World) -> None:
    scene = await world.scene()
    scene.told.hold = asyncio.Event()
    running = asyncio.create_task(perform(scene))
    await eventually(lambda: str(OPERATION) in scene.told.orders)
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    kept = scene.told.orders[str(OPERATION)]
    scene.told.hold = None

    assert (await perform(scene)).state == "done"
    assert scene.agent.envelopes == [kept]


# --- lost, and not there


async def test_a_machine_that_is_gone_is_lost_after_a_while(world: World) -> None:
    relay = await world.relay("a")
    client = await world.client(relay.url)
    agent = Agent(world.folder)
    await MailClient(client).poll("web1", messages.PollRequest(agent.presence(), None, 0.0))
    async with world.fleet(agent, {"a": relay.url}, {"a": client}, limits=limits_with(lost=0.3)) as fleet:
        with pytest.raises(LostError, match="web1 is lost"):
            await fleet.perform(OPERATION, SURVEY)
        assert (await fleet.presences()).missing["web1"].startswith("lost: relay a has seen it last")


async def test_a_machine_that_is_seen_is_not_lost_however_long_it_takes(world: World) -> None:
    scene = await world.scene(limits=limits_with(lost=0.3))
    looks = 0
    look = scene.fleet.presences

    async def counted() -> Any:
        nonlocal looks
        looks += 1
        return await look()

    scene.fleet.presences = counted  # type: ignore[method-assign]

    async def late(order: Order, envelope: bytes, relay: Connection) -> None:
        # It polls no more, but it was seen by the relay's other connection: another task polls on.
        async with scene.agent.polling(await world.client(relay.url)):
            began = asyncio.get_running_loop().time()
            await eventually(lambda: asyncio.get_running_loop().time() - began > 1.0)
            await scene.agent.send(relay, scene.agent.report(order, envelope))

    scene.agent.answers = late
    assert (await perform(scene)).state == "done"
    assert looks > 3


async def test_where_no_relay_takes_the_order_the_road_is_named(world: World) -> None:
    agent = Agent(world.folder)
    client = await world.client(DEAD)
    await keep_order(world, agent)
    async with world.fleet(agent, {"a": DEAD}, {"a": client}, limits=limits_with(lost=0.3, look=30.0)) as fleet:
        with pytest.raises(UnreachableError, match="no relay has taken an order for web1") as caught:
            await fleet.perform(OPERATION, SURVEY)
        assert not isinstance(caught.value, LostError)
        found = await fleet.presences()
    assert "none of its relays answers" in found.missing["web1"]
    assert set(found.silent) == {"a"}


async def test_relays_that_stop_answering_are_told_apart_from_a_lost_machine(world: World) -> None:
    agent = Agent(world.folder)
    async with AsyncExitStack() as short:
        relay = await short.enter_async_context(running_relay(world.folder / "one"))
        client = await world.client(relay.url)
        await MailClient(client).poll("web1", messages.PollRequest(agent.presence(), None, 0.0))
        fleet = world.fleet(agent, {"a": relay.url}, {"a": client}, limits=limits_with(lost=3.0))
        await world.stack.enter_async_context(fleet)
        running = asyncio.create_task(fleet.perform(OPERATION, SURVEY))
        async with asyncio.timeout(10):
            while not (await MailClient(client).poll("web1", messages.PollRequest(agent.presence(), None, 0.0))).orders:
                await asyncio.sleep(0.01)
    with pytest.raises(UnreachableError, match="none of the relays of web1") as caught:
        await running
    assert not isinstance(caught.value, LostError)


async def test_an_agent_that_is_there_and_says_nothing_is_given_up(world: World) -> None:
    scene = await world.scene(limits=limits_with(accept=0.3))

    async def nothing(order: Order, envelope: bytes, relay: Connection) -> None:
        return

    scene.agent.answers = nothing
    with pytest.raises(UnreachableError, match="says nothing"):
        await perform(scene)


async def test_an_operation_whose_end_no_relay_brings_is_given_up_behind_its_own_limit(world: World) -> None:
    scene = await world.scene(limits=limits_with(report=0.2))

    async def only_begin(order: Order, envelope: bytes, relay: Connection) -> None:
        await scene.agent.send(relay, scene.agent.report(order, envelope, "running"))

    scene.agent.answers = only_begin
    script = msgspec.structs.replace(SCRIPT, timeout=0.1)
    with pytest.raises(UnreachableError, match="web1 began, and no relay brought its end"):
        await perform(scene, script)


async def test_without_a_fence_nothing_leaves(world: World) -> None:
    scene = await world.scene()
    scene.fleet.fence = 0
    with pytest.raises(ValueError, match="fence"):
        await perform(scene)
    assert scene.agent.orders == []


# --- who can read an order


async def test_a_machine_that_no_relay_has_seen_is_ordered_nothing_new(world: World) -> None:
    """What it understands is not known, and an order in the clear would be read by others."""
    scene = await world.scene(polls=[], limits=limits_with(lost=0.2))
    with pytest.raises(UnreachableError, match="no relay has seen web1"):
        await perform(scene)
    assert scene.told.kinds == []


CONFIGURE = RunScript("ab" * 32, "ops/configure.sh", {"VAR_DB": "db-of-production"})


async def test_an_action_travels_sealed_to_an_agent_that_understands_it(world: World) -> None:
    scene = await world.scene(understands=(SEALED_ACTIONS,))
    assert (await perform(scene, CONFIGURE)).state == "done"
    await scene.fleet.acknowledge("web1")
    await eventually(lambda: len(scene.agent.orders) == 2)
    order, acknowledge = scene.agent.orders
    assert isinstance(order.action, SealedAction)
    assert isinstance(acknowledge.action, Acknowledge), "it names operations, as every order does"
    assert open_order(order, load_sealing_key(str(world.folder / "web1"))).action == CONFIGURE


async def test_an_agent_of_before_is_ordered_in_the_clear(world: World) -> None:
    scene = await world.scene()
    assert (await perform(scene, CONFIGURE)).state == "done"
    assert scene.agent.orders[0].action == CONFIGURE


STALLS = msgspec.structs.replace(CONFIGURE, stall=30.0)


async def test_a_stall_limit_is_sent_only_to_an_agent_that_knows_it_and_else_it_is_said_once(world: World) -> None:
    """An older agent refuses an order with a field that it does not know."""
    new = await world.scene(understands=(STALL_LIMITS,))
    assert (await perform(new, STALLS)).state == "done"
    assert new.agent.orders[0].action == STALLS
    assert new.told.notes == []


async def test_an_agent_of_before_is_ordered_without_a_stall_limit(world: World) -> None:
    old = await world.scene()
    assert (await perform(old, STALLS)).state == "done"
    assert old.agent.orders[0].action == CONFIGURE
    assert b"stall" not in base64.b64decode(json.loads(old.agent.envelopes[0])["payload"])
    (note,) = old.told.notes
    assert "web1 is older than stall limits" in note


async def test_a_stranger_with_an_agents_token_neither_blocks_a_machine_nor_reads_its_variables(world: World) -> None:
    """It polls under the machine's name with keys of its own, all the time, and takes all letters."""
    scene = await world.scene(understands=(SEALED_ACTIONS,))
    stranger = Agent(world.folder / "stranger", "web1")

    async def nothing(order: Order, envelope: bytes, relay: Connection) -> None:
        pass

    stranger.answers = nothing
    stranger.pins = scene.agent.pins
    async with stranger.polling(scene.relays["a"]):
        await are_there(scene, 2)
        assert (await scene.fleet.presences()).missing == {}
        assert (await perform(scene, CONFIGURE)).state == "done"
        await eventually(lambda: bool(stranger.orders))
    assert isinstance(stranger.orders[0].action, SealedAction)
    with pytest.raises(SignatureError):
        open_order(stranger.orders[0], load_sealing_key(str(world.folder / "stranger" / "web1")))


async def test_two_agents_with_the_same_keys_are_ordered_nothing(world: World) -> None:
    scene = await world.scene(start="one", started=time.time())
    twin = copy.copy(scene.agent)
    twin.says, twin.orders = {"start": "two", "started": time.time()}, []
    async with twin.polling(scene.relays["a"]):
        await are_there(scene, 2)
        # Each has said that it lives after the other one began.
        await MailClient(scene.relays["a"]).poll("web1", messages.PollRequest(scene.agent.presence(), None, 0.0))
        await scene.fleet.presences()
        with pytest.raises(UnreachableError, match="two agents live with its keys"):
            await perform(scene, CONFIGURE)
    assert scene.agent.orders == twin.orders == []


async def are_there(scene: Scene, count: int) -> None:
    """Until the relay tells of so many presences."""
    async with asyncio.timeout(10):
        while len(await MailClient(scene.relays["a"]).agents()) < count:
            await asyncio.sleep(0.02)


# --- presences


async def test_a_present_machine_shows_its_keys(world: World) -> None:
    scene = await world.scene()
    await all_present(scene.fleet)
    found = await scene.fleet.presences()
    assert found.present["web1"].sealing == scene.agent.identity.sealing_public
    assert scene.fleet.presence("web1").signing == scene.agent.identity.signing_public
    with pytest.raises(UnreachableError):
        scene.fleet.presence("web9")


async def test_a_relay_that_is_silent_is_hardly_waited_for_where_the_others_have_seen_all(world: World) -> None:
    """It would have a minute to answer."""
    async with AsyncExitStack() as stack:
        # It takes connections, and leaves it at that.
        server = await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", 0)
        stack.callback(server.close)
        silent = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        pauses = Pauses(first=0.02, longest=0.1, ask=60.0, grace=0.05, close=0.2)
        scene = await world.scene(extra={"b": silent}, polls=["a"], limits=limits_with(pauses=pauses, look=60.0))
        async with asyncio.timeout(20):
            while not await MailClient(scene.relays["a"]).agents():
                await asyncio.sleep(0.01)
            found = await scene.fleet.presences()

    assert set(found.present) == {"web1"}
    assert set(found.silent) == {"b"}


def seen(agent: Agent, presence: bytes | None = None, *, age: float = 0.0) -> messages.AgentSeen:
    return messages.AgentSeen("web1", presence or agent.presence(), age, age)


def reason(agent: Agent, *seens: messages.AgentSeen, **changes: Any) -> str:
    machine = machine_of(agent, ["a"], **changes)
    found = merge_presences([machine], {"a": seens}, time.time())
    assert set(found.present) | set(found.missing) == {"web1"}
    return found.missing.get("web1", "")


def test_why_a_machine_is_missing_is_told_in_words(tmp_path: Path) -> None:
    agent, other = Agent(tmp_path, "web1"), Agent(tmp_path, "other")
    assert reason(agent, seen(agent)) == ""
    assert reason(agent).startswith("no relay has seen it")
    assert reason(agent, seen(agent, age=312.4)).startswith("lost: relay a has seen it last 312 s ago")
    wrong = reason(agent, seen(other, other.presence(name="web1")))
    assert f"it has the key {other.identity.fingerprint}" in wrong
    assert f"the environment names {agent.identity.fingerprint}" in wrong
    assert "not signed as it should be" in reason(agent, seen(agent, b"{}"))
    forged = other.presence(name="web1", signing=agent.identity.signing_public, sealing=agent.identity.sealing_public)
    assert "not signed as it should be" in reason(agent, seen(agent, forged))
    assert "its presence is that of web7" in reason(agent, seen(agent, agent.presence(name="web7")))


@pytest.mark.parametrize(("skew", "side"), [(612.0, "612 s ahead of"), (-4000.0, "4000 s behind")])
def test_a_clock_that_is_wrong_is_told_before_anything_is_ordered(tmp_path: Path, skew: float, side: str) -> None:
    agent = Agent(tmp_path)
    agent.skew = skew
    text = reason(agent, seen(agent))
    assert f"its clock is {side} this server's" in text
    assert "at most 300 s" in text
    agent.skew = skew / abs(skew) * 290.0
    assert reason(agent, seen(agent)) == ""


def test_a_presence_that_has_lain_at_the_relay_is_no_wrong_clock(tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    old = messages.AgentSeen("web1", agent.presence(time=time.time() - 1000.0), 0.0, 1000.0)
    assert reason(agent, old) == ""


def test_the_freshest_of_several_relays_counts(tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    machine = machine_of(agent, ["a", "b", "c"])
    answers: Answers = {"a": [seen(agent, age=500.0)], "b": "cannot be reached", "c": [seen(agent, age=3.0)]}
    found = merge_presences([machine], answers, time.time())
    assert set(found.present) == {"web1"}
    assert found.silent == {"b": "cannot be reached"}
    gone = merge_presences([machine], {"a": "no", "b": "no", "c": "no"}, time.time())
    assert gone.missing["web1"] == "none of its relays answers: a: no; b: no; c: no"


def test_names_are_compared_without_regard_to_case(tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    said = seen(agent, agent.presence(name="WEB1"))
    assert reason(agent, said) == "", "the agent's own file says WEB1, the environment web1"


# --- output


def told_of(data: bytes) -> dict[str, Any]:
    return {"log_bytes": len(data), "log_sha256": hashlib.sha256(data).hexdigest()}


async def test_output_comes_by_pieces_with_a_gap_that_is_filled_later(world: World) -> None:
    scene = await world.scene(limits=limits_with(logs=10.0))
    whole = b"".join(b"line %d\n" % number for number in range(2000))
    gate = asyncio.Event()

    async def gapped(order: Order, envelope: bytes, relay: Connection) -> None:
        await scene.agent.send_output(relay, order.operation, (0, whole[:1000]), (5000, whole[5000:]))
        await scene.agent.send(relay, scene.agent.report(order, envelope, **told_of(whole)))
        await gate.wait()
        await scene.agent.send_output(relay, order.operation, (500, whole[500:3000]), (3000, whole[3000:5000]))

    scene.agent.answers = gapped
    report = await perform(scene)
    path = scene.path(report.operation)
    await eventually(lambda: path.exists() and path.stat().st_size == 1000)
    assert path.read_bytes() == whole[:1000], "who follows the log reads a hole"
    assert not await logs_now(scene.fleet)
    gate.set()
    assert await scene.fleet.logs_arrived()
    assert path.read_bytes() == whole
    assert path.stat().st_mode & 0o077 == 0


async def logs_now(fleet: Fleet) -> bool:
    return not fleet._lacking()


async def test_output_that_never_comes_is_noted_and_not_waited_for_for_ever(world: World) -> None:
    scene = await world.scene(limits=limits_with(logs=0.1))

    async def silent(order: Order, envelope: bytes, relay: Connection) -> None:
        await scene.agent.send(relay, scene.agent.report(order, envelope, **told_of(b"x" * 100)))

    scene.agent.answers = silent
    await perform(scene)
    assert not await scene.fleet.logs_arrived()
    assert any("0 of 100 bytes of its output" in note for note in scene.told.notes)


async def test_output_that_a_relay_invented_is_noted(world: World) -> None:
    scene = await world.scene(limits=limits_with(logs=10.0))

    async def altered(order: Order, envelope: bytes, relay: Connection) -> None:
        await scene.agent.send_output(relay, order.operation, (0, b"all is wonderful"))
        await scene.agent.send(relay, scene.agent.report(order, envelope, **told_of(b"all is not well!")))

    scene.agent.answers = altered
    await perform(scene)
    await eventually(lambda: any("not what the agent says" in note for note in scene.told.notes))


async def test_output_of_what_was_never_ordered_becomes_no_file(world: World) -> None:
    scene = await world.scene()
    await perform(scene)
    for operation in (f"{DEPLOYMENT}/0/web1/other/1", f"{DEPLOYMENT}/../../etc/1", f"{DEPLOYMENT}/0/web1/" + "x" * 200):
        await scene.agent.send_output(scene.relays["a"], operation, (0, b"x"))
    await eventually(lambda: sum("never ordered" in note for note in scene.told.notes) == 3)
    assert os.listdir(world.folder / "deployment" / "logs") == []


@given(st.binary(max_size=300), st.lists(st.tuples(st.integers(0, 300), st.integers(1, 120)), max_size=30), st.data())
def test_a_log_is_at_any_time_a_true_beginning(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, cuts: list[tuple[int, int]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("log") / "one.log"
    log = LogFile(str(path))
    covered: set[int] = set()
    for offset, length in cuts:
        piece = whole[offset : offset + length]
        if not piece:
            continue
        log.take(offset, piece)
        on_disk = path.read_bytes() if path.exists() else b""
        assert whole.startswith(on_disk)
        assert len(on_disk) == log.size
        covered.update(range(offset, offset + len(piece)))
        if data.draw(st.integers(0, 9)) == 0:
            log, covered = LogFile(str(path)), set(range(log.size))  # a crash forgets what came too early
    prefix = next((at for at in range(len(whole) + 1) if at not in covered), 0)
    assert log.size >= min(prefix, len(whole)) or log.size == prefix
    log.take(0, whole) if whole else None
    assert log.compare(len(whole), hashlib.sha256(whole).hexdigest()) == "whole"
    assert log.compare(len(whole) + 1, "") == "missing"


# --- other orders


async def test_results_are_acknowledged_once_their_output_is_here(world: World) -> None:
    scene = await world.scene()

    async def lacking(order: Order, envelope: bytes, relay: Connection) -> None:
        output = b"x" if order.operation.endswith("/2") else b""
        await scene.agent.send(relay, scene.agent.report(order, envelope, **told_of(output)))

    scene.agent.answers = lacking
    first = await scene.fleet.perform(OPERATION, SURVEY)
    second = await scene.fleet.perform(replace(OPERATION, attempt=2), SURVEY)
    await scene.fleet.acknowledge("web1")
    await eventually(lambda: len(scene.agent.orders) == 3)
    assert scene.agent.orders[-1].action == Acknowledge((first.operation,)), "the second's output is not here yet"
    await scene.agent.send_output(scene.relays["a"], second.operation, (0, b"x"))
    assert await scene.fleet.logs_arrived()
    await scene.fleet.acknowledge("web1", ends=True)
    await eventually(lambda: len(scene.agent.orders) == 4)
    assert scene.agent.orders[-1].action == Acknowledge((second.operation,), ends=True)
    await scene.fleet.acknowledge("web1")
    await scene.fleet.acknowledge("web1", ends=True)
    await eventually(lambda: len(scene.agent.orders) == 5)
    assert scene.agent.orders[-1].action == Acknowledge((), ends=True)
    assert len({order.operation for order in scene.agent.orders}) == 5


async def test_a_running_operation_can_be_stopped(world: World) -> None:
    scene = await world.scene()
    taken: list[tuple[Order, bytes]] = []

    async def hangs(order: Order, envelope: bytes, relay: Connection) -> None:
        taken.append((order, envelope))
        await scene.agent.send(relay, scene.agent.report(order, envelope, "running", 1))

    scene.agent.answers = hangs
    running = asyncio.create_task(scene.fleet.perform(OperationId.of(DEPLOYMENT, 3, "web1", "1-configure"), SCRIPT))
    await eventually(lambda: len(taken) == 1)
    await scene.fleet.stop(OperationId.parse(taken[0][0].operation))
    await eventually(lambda: any(isinstance(order.action, Stop) for order in scene.agent.orders))
    assert scene.agent.orders[-1].action == Stop(f"{DEPLOYMENT}/3/web1/1-configure/1")
    await scene.agent.send(scene.relays["a"], scene.agent.report(*taken[0], "stopped", 2))
    assert (await running).state == "stopped"


# --- the mailroom


async def test_a_relay_that_answers_nothing_at_once_is_not_asked_without_a_pause(tmp_path: Path) -> None:
    asked = 0

    class Hasty:
        async def reports(self, deployment: str, after: messages.Cursor | None, wait: float) -> messages.ReportsAnswer:
            nonlocal asked
            asked += 1
            return messages.ReportsAnswer(epoch=f"e{asked}")

        async def logs(self, deployment: str, after: messages.Cursor | None, wait: float) -> messages.LogsAnswer:
            await asyncio.Event().wait()
            raise AssertionError

    class Deaf:
        async def take_reports(self, relay: str, reports: Sequence[messages.NumberedReport]) -> None: ...

        async def take_pieces(self, relay: str, pieces: Sequence[messages.NumberedPiece]) -> None: ...

        async def take_trouble(self, relay: str, error: WaystationError) -> None: ...

        def lose_mail(self, relay: str) -> None: ...

    relays: Any = {"a": Hasty()}
    began = asyncio.get_running_loop().time()
    async with Mailroom(DEPLOYMENT, relays, Deaf(), Pauses(first=0.1)):
        await eventually(lambda: asked > 4)
    took = asyncio.get_running_loop().time() - began
    assert took >= 0.05 * 3, "each pause but the one after the first answer is at least half of what it is set to"
