"""One process of the orchestrator in a simulated world: the real engine, from `_roll_out` down, over what it reaches out to.

It dies where it is told to: after so many effects, an effect being whatever the world keeps of it (a commit of the journal,
an order written down or posted, a folder made, something started).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace, coroutine
from typing import Any, Final, TypeVar

from agent.orders.operation_id import OperationId
from agent.orders.orders import PROJECT_FENCES, FenceSeen, OpenAction, Report, TimedCheck
from agent.runs.runs import Outcome
from orchestrator.deployment import decisions, deployment, server_runs, steps, tries, turns
from orchestrator.deployment.context import DeploymentContext
from orchestrator.deployment.decisions import Desk, StopToken
from orchestrator.deployment.deployment import Result
from orchestrator.deployment.server_runs import ServerRuns
from orchestrator.fleet.fleet import LostError
from orchestrator.fleet.presence import Presences
from orchestrator.journal import events as ev
from orchestrator.journal import recorder as recorder_module
from orchestrator.journal.events import DeploymentRecord, Event, JournalEntry, WrittenState
from orchestrator.journal.journal import Decision
from orchestrator.journal.recorder import Recorder
from orchestrator.journal.views import OpenBracket, open_brackets
from orchestrator.locks.leases import Claimed, Elsewhere
from orchestrator.plan.leave_out import without
from orchestrator.plan.plan import Plan, ServerRun
from orchestrator.rolling.history import History
from relay.errors import UnreachableError
from simulation.people import read_row
from simulation.scenario import DEPLOYMENT, EARLIER
from simulation.virtual_loop import VirtualLoop
from simulation.world import ACCEPT, LOST, Order, World, people_rows

T = TypeVar("T")

WHO: Final = "ops@server"
JOURNAL: Final = "0" * 32


@dataclass
class Process:
    """One process.

    Attributes:
        dies_after: so many effects; None: never.
        snapshots: the world after each effect, where they are wanted.
        waits: whether it waits for people.
    """

    world: World
    dies_after: int | None = None
    snapshots: list[World] | None = None
    waits: bool = True
    effects: int = 0
    is_dead: bool = False
    waiters: dict[str, asyncio.Future[None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loop = VirtualLoop(self.world)
        self.chance = random.Random(self.world.scenario.seed * 1000 + len(self.world.entries))

    def check(self) -> None:
        """A dead process does nothing any more."""
        if self.is_dead:
            raise asyncio.CancelledError

    def effect(self) -> None:
        """The world has kept something."""
        self.effects += 1
        if self.snapshots is not None:
            self.snapshots.append(self.world.clone())
        if self.dies_after is not None and self.effects >= self.dies_after:
            self.is_dead = True
            self.loop.stop()
            raise asyncio.CancelledError

    async def to_thread(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Stands for `asyncio.to_thread`: others may come between."""
        if self.chance.random() < 0.4:
            await _others_come_first()
        self.check()
        result = function(*arguments, **named)
        if self.chance.random() < 0.4:
            await _others_come_first()
        return result

    async def until(self, key: str, when: float) -> None:
        """Until this time, or until somebody stops what is called so."""
        future: asyncio.Future[None] = self.loop.create_future()
        timer = self.loop.call_at(when, _settle, future)
        self.waiters[key] = future
        try:
            await future
        finally:
            timer.cancel()
            del self.waiters[key]
        self.check()
        self.world.advance()

    def wake(self, key: str) -> None:
        if key in self.waiters:
            _settle(self.waiters[key])

    # --- its life

    def run(self) -> Result | None:
        """How it ended; None where it died. Raises `StuckError`."""
        asyncio.set_event_loop(None)
        with simulated(self):
            main = self.loop.create_task(self._main())
            main.add_done_callback(lambda _: self.loop.stop())
            try:
                self.loop.run_forever()
                if self.is_dead:
                    return None
                return main.result()
            finally:
                self.is_dead = True
                self.loop.bury()

    async def _main(self) -> Result:
        context, brackets = await self._context()
        return await deployment._roll_out(context, brackets, adopt=False)

    async def _context(self) -> tuple[DeploymentContext, list[OpenBracket]]:
        """As `orchestrator.deployment.setup` makes it: `set_up` where nothing is in the journal yet, else `take_up`."""
        world, plan = self.world, self.world.scenario.plan
        journal = MemoryJournal(self)
        history = History(world.mine)
        if not history.entries:
            world.fence += 1
            world.write(ev.Started(WHO, "server", 1, world.fence))
        else:
            for machine, why in history.left_by_rule.items():
                plan = without(plan, machine, why)
            world.fence += 1
            world.write(ev.Resumed(WHO, "server", 1, world.fence))
        brackets = open_brackets(journal.brackets("prod"))
        self.effect()
        recorder = Recorder(journal, DEPLOYMENT)  # type: ignore[arg-type]
        secrets = SimpleNamespace(sealed=lambda *_: {})
        stop = StopToken()
        context = DeploymentContext(
            plan=plan,
            recorder=recorder,
            fleet=SimulatedFleet(self, recorder, plan, world.fence),  # type: ignore[arg-type]
            runs=SimulatedRuns(self, recorder),
            secrets=secrets,  # type: ignore[arg-type]
            depot=None,  # type: ignore[arg-type]
            trees=SimpleNamespace(build=_build),  # type: ignore[arg-type]
            notifier=SimpleNamespace(targets=lambda _event: ""),  # type: ignore[arg-type]
            filler=Filler(),  # type: ignore[arg-type]
            bar=lambda _name: lambda _done, _whole: None,
            history=history,
            desk=Desk(
                recorder,
                plan,
                lambda: None,  # type: ignore[arg-type,return-value]
                stop,
                history,
                waits=self.waits,
                clock=lambda: world.now,
            ),
            stop=stop,
            by_rule=dict(history.left_by_rule),
            unsure=set(history.unsure),
        )
        return context, brackets


@coroutine
def _others_come_first() -> Generator[None, None, None]:
    """As `asyncio.sleep(0)`, which is what a seed does most."""
    yield


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _build(_package: object) -> str:
    return "/packages/1"


@contextmanager
def simulated(process: Process) -> Iterator[None]:
    """The engine's ways out of its process lead into the world."""
    clock = SimpleNamespace(time=lambda: process.world.now)
    told = (
        (asyncio, "to_thread", process.to_thread),
        (decisions, "read_decision", lambda row, _pins, _plan, used: read_row(row, used)),
        (deployment, "time", clock),
        (tries, "time", clock),
        (deployment, "check_endings", _no_endings),
        (deployment, "operator", lambda: WHO),
        (steps, "operator", lambda: WHO),
        (recorder_module, "operator", lambda: WHO),
        (recorder_module, "line", lambda _event: ""),
        (steps, "STUCK_SECONDS", 5.0),
        (steps, "claim", partial(_claimed, process)),
        (steps, "leased", _leased),
        (turns, "run_checks", lambda checks: _checked(process, checks)),
    )
    kept = [(where, name, getattr(where, name)) for where, name, _ in told]
    for where, name, value in told:
        setattr(where, name, value)
    try:
        yield
    finally:
        for where, name, value in kept:
            setattr(where, name, value)


async def _claimed(
    process: Process,
    journal: MemoryJournal,
    _tenant: object,
    _machines: object,
    decide: Callable[[Elsewhere], Sequence[str]],
    *,
    promise: object = None,
    entry: Callable[[str], Event],
) -> Claimed:
    """As `orchestrator.locks.leases.claim`: who starts is decided and written down as one."""

    def take() -> Claimed:
        elsewhere = Elsewhere(brackets=tuple(open_brackets(journal.brackets("prod"))))
        wanted = decide(elsewhere)
        if wanted:
            journal.append(DEPLOYMENT, *map(entry, wanted))
        leases = tuple(SimpleNamespace(machine=machine, release=lambda: None) for machine in wanted)
        return Claimed(leases, elsewhere)  # type: ignore[arg-type]

    return await process.to_thread(take)


@asynccontextmanager
async def _leased(*_of: object) -> AsyncIterator[None]:
    """Nobody else wants the machine."""
    yield


async def _no_endings(_plan: object) -> list[str]:
    return []


async def _checked(process: Process, checks: Sequence[TimedCheck]) -> Any:
    """Checks that the server makes of a machine: `http://MACHINE/STEP/VERSION`."""
    await asyncio.sleep(0.3)
    process.check()
    world = process.world
    world.advance()
    _, _, machine, number, version = checks[0].check.url.split("/")  # type: ignore[union-attr]
    nth = len(
        [each for each in world.executions if each.what[:2] == (int(number), machine) and each.what[2] == "settle"]
    )
    ok = not world.scenario.fails("looked at", machine, number, version, nth)
    return SimpleNamespace(ok=ok, texts=["500"])


# --- the journal


class MemoryJournal:
    """What `Recorder` and the engine's beginning need of `orchestrator.journal.journal.Journal`."""

    id = JOURNAL

    def __init__(self, process: Process) -> None:
        self._process = process
        self._world = process.world

    def append(self, _deployment: str, *events: Event, orders: Mapping[str, Any] | None = None) -> int:
        if not events:
            raise ValueError("nothing to append")
        self._process.check()
        for operation, order in (orders or {}).items():
            self._world.book.setdefault(operation, order)
        number = self._world.write(*events)
        self._process.effect()
        return number

    def set_state(self, deployment: str, state: WrittenState, _reason: str = "", *events: Event) -> None:
        self._process.check()
        self._world.state = state
        self.append(deployment, *events)

    def deployments(self, _environment: str, **_which: object) -> list[DeploymentRecord]:
        """Those of other projects: none."""
        return []

    def claim(self, _project: str, _environment: str, seen: Sequence[int]) -> int:
        self._process.check()
        self._world.fence = max([self._world.fence, *seen]) + 1
        return self._world.fence

    def take_up(self, deployment: str, _fence: int, _operator: str, *events: Event) -> None:
        self.append(deployment, *events)

    def pending_decisions(self, _deployment: str) -> list[Decision]:
        self._process.check()
        return list(people_rows(self._world))

    def take_decision(self, number: int) -> bool:
        self._process.check()
        if number in self._world.taken:
            return False
        self._world.taken.add(number)
        row = self._world.rows[number - 1]
        self.append(DEPLOYMENT, ev.DecisionTaken(number, row.operator, row.kind, row.data))
        return True

    def brackets(self, environment: str) -> list[tuple[DeploymentRecord, list[JournalEntry]]]:
        return [
            (
                DeploymentRecord(
                    one, "shop", "2.0", environment, "deploy", 1, "running", "", WHO, "server", 1, 0.0, None
                ),
                [entry for entry in self._world.entries if entry.deployment == one],
            )
            for one in (EARLIER, DEPLOYMENT)
        ]


class Filler:
    """Relays that have everything."""

    behind: tuple[str, ...] = ()

    def begin(self) -> None:
        """Nothing is to be sent."""

    async def until_settled(self, everywhere: asyncio.Event) -> None:
        await everywhere.wait()

    async def until_offered(self, machine: str, stall: float) -> None:
        """It is there."""

    def widen(self, machine: str) -> bool:
        return False


# --- machines


class SimulatedFleet:
    """As `orchestrator.fleet.fleet.Fleet`: an order is written down and recorded before it leaves, its result before
    `perform` returns.
    """

    def __init__(self, process: Process, recorder: Recorder, plan: Plan, fence: int) -> None:
        self.fence = fence
        self._plan = plan
        self._process = process
        self._world = process.world
        self._recorder = recorder
        self._seen: set[str] = set()
        self._given: set[OperationId] = set()
        self._flights: set[OperationId] = set()

    async def presences(self) -> Presences:
        await asyncio.sleep(0.05)
        self._process.check()
        world = self._world
        world.advance()
        names = [machine.name for machine in self._plan.machines]
        present = {name: self._presence(name) for name in names if name not in world.gone}
        self._seen |= set(present)
        missing = {name: "no relay has seen it" for name in names if name in world.gone}
        return Presences(present, missing, {}, offline=frozenset(missing))

    def _presence(self, machine: str) -> Any:
        fence = self._world.fences.get(machine)
        fences = {"prod": FenceSeen(fence, JOURNAL, DEPLOYMENT, open=True)} if fence is not None else {}
        by_project = {name: {"shop": seen} for name, seen in fences.items()}
        return SimpleNamespace(
            sealing="00", fences=fences, project_fences=by_project, understands=(PROJECT_FENCES,), refused=()
        )

    def presence(self, machine: str) -> Any:
        if machine not in self._seen:
            raise UnreachableError(f"no relay has seen {machine}")
        return self._presence(machine)

    def gave(self, operation: OperationId) -> bool:
        return operation in self._given

    async def perform(
        self,
        operation: OperationId,
        action: OpenAction,
        _on_progress: object = None,
        *,
        patience: float = 0.0,
        goes_on: bool = False,
    ) -> Report:
        process, world, key = self._process, self._world, str(operation)
        order = world.book.get(key)
        if order is None:
            await self.see(operation.who, patience or LOST)
            self.presence(operation.who)
            order = Order(operation, key, action, self.fence, world.now + ACCEPT)
            self._given.add(operation)
        if operation in self._flights:
            raise ValueError(f"{operation} is in flight already")
        self._flights.add(operation)
        try:
            dispatched = ev.Dispatched(key, operation.who, order.digest)
            await self._recorder.dispatch(dispatched, order)  # type: ignore[arg-type]
            process.check()
            world.advance()
            world.post(order)
            process.effect()
            report = await self._result(order)
        finally:
            self._flights.discard(operation)
        refused = [ev.Refused(operation.who, report.reason, key)] if report.state == "refused" else []
        reported = ev.Reported.of(operation.who, report)
        if goes_on and report.state == "done":
            self._recorder.later(operation.who, reported)
        else:
            await self._recorder.record(reported, *refused)
        return report

    async def see(self, machine: str, patience: float = LOST) -> None:
        if machine not in self._seen:
            await self.presences()
            if machine not in self._seen:
                await asyncio.sleep(patience)
                await self.presences()

    async def _result(self, order: Order) -> Report:
        process, world, key = self._process, self._world, order.key
        lost_at = None
        while True:
            began, machine = world.operations.get(key), order.operation.who
            if machine in world.gone:
                lost_at = lost_at or world.now + LOST
                if world.now >= lost_at:
                    raise LostError(machine, LOST)
                await process.until(key, min(world.now + 0.5, lost_at))
            elif began is not None:
                end = world.executions[began.index].end
                if world.now >= end:
                    break
                await process.until(key, end)
            elif key in world.refused:
                return self._report(order, "refused", world.refused[key], 0.0)
            else:
                arrives = world.pending.get(key, (world.now,))[0]
                await process.until(key, max(arrives, world.now + 0.01))
        state = world.state_of(began)
        report = self._report(order, state, began.reason, world.executions[began.index].end)
        return _with(report, began.facts)

    def _report(self, order: Order, state: Any, reason: str, ended: float) -> Report:
        return Report(1, order.key, DEPLOYMENT, order.operation.who, "key", order.digest, 1, state, reason, ended=ended)

    async def stop_all(self, operations: Collection[OperationId] | None = None) -> None:
        await asyncio.sleep(0.1)
        self._process.check()
        self._world.advance()
        for operation in list(self._flights if operations is None else operations):
            self._world.stop(operation)
            self._process.wake(str(operation))

    async def acknowledge(self, machine: str, *, ends: bool = False) -> None:
        """What is on disk here need not be kept there."""

    async def logs_arrived(self) -> bool:
        return True


def _with(report: Report, facts: Any) -> Report:
    return report if facts is None else Report(**{**_fields(report), "facts": facts})


def _fields(report: Report) -> Mapping[str, Any]:
    return {name: getattr(report, name) for name in report.__struct_fields__}


# --- the server


class SimulatedRuns(ServerRuns):
    """The real one, but that its folders and processes are the world's."""

    def __init__(self, process: Process, recorder: Recorder) -> None:
        self._process = process
        self._world = process.world
        self._recorder = recorder
        self._folder = "/deployment"
        self._running = set()

    def _attempts(self, operation: OperationId) -> list[int]:
        return list(range(1, 1 + self._world.folders.get((operation.step, operation.who, operation.action), 0)))

    def _next_attempt(self, operation: OperationId) -> OperationId:
        what = (operation.step, operation.who, operation.action)
        self._world.folders[what] = number = self._world.folders.get(what, 0) + 1
        if operation.action != server_runs.PROBE:
            self._process.effect()
        return replace(operation, attempt=number)

    async def _end_of_last(self, operation: OperationId) -> None:
        for number in self._attempts(operation)[-1:]:
            last = self._world.runs.get(str(replace(operation, attempt=number)))
            if last is not None:
                await asyncio.sleep(max(0.0, self._world.executions[last.index].end - self._world.now))

    async def _follow(self, run: ServerRun, operation: OperationId, extra: Mapping[str, str], log: str) -> Outcome:
        process, world, key = self._process, self._world, str(operation)
        if self._process.chance.random() < 0.5:
            await _others_come_first()
        process.check()
        if key not in world.runs:
            world.launch(run, operation)
            if operation.action != server_runs.PROBE:
                process.effect()
        index = world.runs[key].index
        while (end := world.executions[index].end) > world.now:
            await process.until(key, end)
        world.advance()
        execution, reason = world.executions[index], world.runs[key].reason
        status = 0 if execution.state == "done" else 1 if execution.state == "failed" else None
        if operation.action == server_runs.PROBE:
            status = world.probed(operation)
        return Outcome(execution.state, status, reason, execution.begin, execution.end, 0)

    async def stop_all(self, *, spared: Collection[str] = ()) -> None:
        for operation in list(self._running):
            if operation.action not in spared:
                self._process.check()
                self._world.stop_run(operation)
                self._process.wake(str(operation))
