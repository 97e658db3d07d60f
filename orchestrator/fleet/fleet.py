"""The machines of one deployment as the orchestrator reaches them: orders out through the relays, signed results back.

An order goes to every relay of its machine's list; whichever the agent hears first counts, as it acts on an operation
once. Results come by long polls that are open all the time (`orchestrator/fleet/relay_mail.py`), so that nothing here sleeps
between an order and its result. Relays are believed in nothing: what an agent did not sign with the keys that the plan
names is dropped and noted.

The journal comes first: an order is on disk and recorded before it leaves; a result is recorded before anything follows
from it, or in the same commit, before what follows.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

import msgspec

from agent.orders.envelopes import order_digest, seal_action, sign_order, verify_report
from agent.orders.keys import AgentIdentity
from agent.orders.operation_id import OperationId
from agent.orders.orders import (
    ACCEPT_SECONDS,
    FINAL,
    PROJECT_FENCES,
    SEALED_ACTIONS,
    STALL_LIMITS,
    Acknowledge,
    Action,
    OpenAction,
    Order,
    Presence,
    Report,
    RunScript,
    Stop,
    longest_of,
)
from orchestrator.fleet.logs import LogFile
from orchestrator.fleet.order_book import OrderBook
from orchestrator.fleet.presence import LOST_SECONDS, Answers, Presences, merge_presences
from orchestrator.fleet.relay_mail import Mailroom, Pauses, Posting
from orchestrator.journal.events import Dispatched, Note, Refused, Reported
from orchestrator.plan.plan import Plan, PlannedMachine
from relay.errors import SignatureError, StoreError, UnreachableError, WaystationError
from relay.folders import make_folder
from relay.protocol import messages
from relay.protocol.mail_client import MailClient
from relay.support.together import together

if TYPE_CHECKING:
    from securesystemslib.signer import Signer

    from orchestrator.journal.recorder import Recorder
    from relay.protocol.connection import Connection

OPERATIONS_AT_ONCE = 1024
"""In one acknowledgement."""
STOP_SECONDS = 5.0
"""For a relay to take the order that ends an operation."""
NOTES_MAX = 1000
"""Different things that are noted of one deployment's mail: a stranger who can post could else fill the journal."""
UNPROVEN_MAX = 1024
"""Reports kept of a machine whose keys were not shown yet."""


class LostError(UnreachableError):
    """No living relay has seen the machine for too long. What it was doing may go on there.

    `stranger`: what is wrong with another agent that is there under its name.
    """

    def __init__(self, machine: str, seconds: float, stranger: str = "") -> None:
        who = f"; who is there under its name is another: {stranger}" if stranger else ""
        super().__init__(f"{machine} is lost: no relay has seen it for {seconds:.0f} s{who}")


@dataclass(frozen=True, slots=True)
class FleetLimits:
    """Seconds.

    Attributes:
        lost: without a relay that has seen a machine, or that takes its order.
        look: between two looks at who is there, while something is in flight.
        accept: for an agent that is there to say the first word about an order.
        report: for the end of an operation to be told, beyond the longest that it may take by its own limits.
        logs: for the rest of the output, after the last result.
    """

    lost: float = LOST_SECONDS
    look: float = 5.0
    accept: float = 300.0
    report: float = 300.0
    logs: float = 5.0
    pauses: Pauses = field(default_factory=Pauses)


@dataclass(eq=False)
class _Flight:
    """An operation that is awaited. `newest` is the number of its last report."""

    operation: OperationId
    machine: PlannedMachine
    envelope: bytes
    digest: str
    since: float
    on_progress: Callable[[Report], None] | None
    result: asyncio.Future[Report]
    patience: float
    longest: float
    """Seconds that it may take by its own limits, from its first word on."""
    posting: Posting | None = None
    newest: int = 0
    heard_at: float = 0.0
    """Since when it is known to run; while it waits for its turn, it does not."""

    @property
    def letter(self) -> messages.OrderLetter:
        return messages.OrderLetter(self.machine.name, str(self.operation), self.envelope)


class Fleet:
    """Reaches the machines of one deployment. Use it as an async context manager; safe for many tasks at once."""

    def __init__(
        self,
        plan: Plan,
        relays: Mapping[str, Connection],
        *,
        signer: Signer,
        journal: str,
        folder: str,
        recorder: Recorder,
        fence: int,
        limits: FleetLimits | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Nothing is sent before it is entered.

        Args:
            plan: the frozen plan; machines, their keys and relays are taken from it.
            relays: open clients by the plan's names of relays; their tokens have the scope `order`. The caller
                closes them.
            signer: the order key.
            journal: id of the journal, 32 hex digits.
            folder: of this deployment, private; `logs/` is made in it.
            recorder: has an order before it leaves, and its result before `perform` returns.
            fence: signed into every order; it may be raised later.
            limits: how long to bear with what.
            clock: seconds since 1970.

        Raises:
            RefusedError: a folder is not private, or cannot be made.
            StoreError: the journal cannot be read.
        """
        self._plan = plan
        self._deployment = recorder.deployment
        self._signer = signer
        self._journal = journal
        self._recorder = recorder
        self.fence = fence
        self._limits = limits or FleetLimits()
        self._clock = clock
        self._machines = {machine.name.lower(): machine for machine in plan.machines}
        mail = {name: MailClient(relay) for name, relay in relays.items()}
        self._room = Mailroom(recorder.deployment, mail, self, self._limits.pauses)
        self._book = OrderBook(recorder, os.path.join(folder, "orders"))
        self._log_folder = os.path.join(folder, "logs")
        make_folder(self._log_folder, mode=0o700)
        self._logs: dict[OperationId, LogFile] = {}
        self._log_news = asyncio.Event()
        self._flights: dict[OperationId, _Flight] = {}
        self._in_flight = asyncio.Event()
        self._presences: dict[str, Presence] = {}
        self._doubled: Mapping[str, str] = {}
        self._seen: dict[str, float] = {}
        self._unproven: dict[str, deque[tuple[str, messages.NumberedReport]]] = {}
        self._given: set[OperationId] = set()
        self._finals: dict[OperationId, Report] = {}
        self._unacknowledged: dict[OperationId, Report] = {}
        self._told: set[tuple[str, str]] = set()

    async def __aenter__(self) -> Self:
        await self._room.__aenter__()
        self._room.spawn(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._room.__aexit__(kind, error, trace)

    # --- who is there

    async def presences(self) -> Presences:
        """Ask all relays at once who is there. A relay that does not answer in time is named, not waited for; and where
        the others have seen every machine, it has hardly any.
        """
        return await self._meet(await self._room.agents(lambda answers: not self._merged(answers).missing))

    def presence(self, machine: str) -> Presence:
        """What the machine said of itself last, by its own signature: its sealing key among it.

        Raises:
            UnreachableError: no relay has seen it yet.
        """
        try:
            return self._presences[machine]
        except KeyError:
            raise UnreachableError(f"no relay has seen {machine}") from None

    async def see(self, machine: str, patience: float | None = None) -> None:
        """Look until some relay has seen it, for at most so many seconds; by default as long as a machine may be away."""
        until = asyncio.get_running_loop().time() + (self._limits.lost if patience is None else patience)
        while machine not in self._presences:
            await self.presences()
            if machine in self._presences or asyncio.get_running_loop().time() >= until:
                return
            await asyncio.sleep(self._limits.look)

    # --- orders

    def log_path(self, operation: OperationId) -> str:
        """Where its output is written; there is no file before there is output."""
        return os.path.join(self._log_folder, f"{operation.file_name}.log")

    async def perform(
        self,
        operation: OperationId,
        action: OpenAction,
        on_progress: Callable[[Report], None] | None = None,
        *,
        patience: float = 0.0,
        goes_on: bool = False,
    ) -> Report:
        """Order it, and wait for the final report. What was ordered before under the same id is not ordered anew: the
        same bytes are sent, and the agent answers with what became of them.

        Args:
            operation: its id; `who` is the machine.
            action: what to do. On a repeat after a crash the first order's counts.
            on_progress: hears the reports of a running operation.
            patience: seconds that all relays of the machine may be away; by default as long as a machine may.
            goes_on: where it is done well, the caller records at once what follows from that: so the result comes into
                the same commit, before it.

        Raises:
            LostError: no relay has seen the machine for too long.
            UnreachableError: no relay took the order, none of the machine's relays answers any more, or the agent is
                there and says nothing.
            StoreError: it could not be written down first; nothing left.
            UsageError: it does not fit into an order.
        """
        machine = operation.who
        flight = await self._begin(
            operation, self._plan.machine(machine), action, on_progress, patience or self._limits.lost
        )
        try:
            if not flight.result.done():
                await self._book.dispatch(
                    operation, flight.envelope, Dispatched(str(operation), machine, flight.digest)
                )
                # To every relay of its machine. One that took it is enough, and so is a result that is there already.
                flight.posting = self._room.post(flight.machine.relays, flight.letter)
                await flight.posting.taken(flight.patience, flight.result)
            report = await flight.result
        finally:
            self._end(flight)
        if goes_on and report.state == "done":
            self._recorder.later(machine, Reported.of(machine, report))
        else:
            await self._recorder.record(Reported.of(machine, report), *_refusals(machine, report))
        self._unacknowledged[operation] = report
        await self._compare_log(operation)
        return report

    def gave(self, operation: OperationId) -> bool:
        """Whether this process made its order, and did not find it written down by an earlier one."""
        return operation in self._given

    async def stop(self, operation: OperationId) -> None:
        """Ask the agent to end a running operation; its own report says what became of it.

        Raises:
            UnreachableError: no relay takes the order, or none has seen the machine.
        """
        await self._send(
            OperationId.of(operation.deployment, operation.step, operation.who, f"stop-{operation.action}"),
            Stop(str(operation)),
        )

    async def stop_all(self, operations: Iterable[OperationId] | None = None) -> None:
        """End these, or all that is under way on machines. Where no relay takes that soon, their own limits end them."""

        async def end(operation: OperationId) -> None:
            with suppress(UnreachableError, TimeoutError):
                async with asyncio.timeout(STOP_SECONDS):
                    await self.stop(operation)

        await together([end(operation) for operation in list(self._flights if operations is None else operations)])

    async def acknowledge(self, machine: str, *, ends: bool = False) -> None:
        """Tell the agent which results are on disk here, with all of their output: it need not keep them. `ends`
        closes the deployment for it, whatever is still open.

        Raises:
            UnreachableError: no relay takes the order; the agent then keeps them for longer.
            StoreError: output could not be made durable.
        """
        await self._recorder.catch_up()
        held = [op for op in self._unacknowledged if op.who == machine and self._has_log(op)]
        await asyncio.to_thread(self._make_durable, held)
        parts = [tuple(held[at : at + OPERATIONS_AT_ONCE]) for at in range(0, len(held), OPERATIONS_AT_ONCE)]
        if ends and not parts:
            parts = [()]
        for part in parts:
            names = tuple(map(str, part))
            what = Acknowledge(names, ends=ends and part is parts[-1])
            await self._send(OperationId.of(self._deployment, 0, machine, "acknowledge"), what)
            for operation in part:
                self._unacknowledged.pop(operation, None)

    async def logs_arrived(self) -> bool:
        """Wait, a bounded time, for the output of everything that has reported. What is still missing is noted."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._limits.logs):
                while self._lacking():
                    self._log_news.clear()
                    await self._log_news.wait()
        lacking = self._lacking()
        for operation in lacking:
            size, whole = self._log(operation).size, self._unacknowledged[operation].log_bytes
            await self._tell(operation.who, f"{operation}: {size} of {whole} bytes of its output have come")
        return not lacking

    # --- an order's way

    async def _begin(
        self,
        operation: OperationId,
        machine: PlannedMachine,
        action: OpenAction,
        on_progress: Callable[[Report], None] | None,
        patience: float,
    ) -> _Flight:
        # An order that was kept is sent as it is: other bytes under its name would be refused.
        await self.see(machine.name, 0.0 if self._book.has(operation) else patience)
        if why := self._doubled.get(machine.name):
            raise UnreachableError(f"{machine.name} is ordered nothing: {why}")
        envelope = await self._order(operation, machine, action)
        if operation in self._flights:
            raise ValueError(f"{operation} is in flight already")
        loop = asyncio.get_running_loop()
        flight = _Flight(
            operation,
            machine,
            envelope,
            order_digest(envelope),
            loop.time(),
            on_progress,
            loop.create_future(),
            patience,
            longest_of(action),
        )
        self._flights[operation] = flight
        self._in_flight.set()
        if (known := self._finals.pop(operation, None)) is not None:
            await self._deliver(flight, known)
        return flight

    async def _order(self, operation: OperationId, machine: PlannedMachine, action: OpenAction) -> bytes:
        """The order's envelope: the one that was kept under this operation, else a new one, to be kept before it leaves."""
        if (kept := self._book.find(operation)) is not None:
            return kept
        if self.fence < 1:
            raise ValueError("no fence was claimed")
        if isinstance(action, RunScript) and action.stall is not None and not self._understands(machine, STALL_LIMITS):
            action = msgspec.structs.replace(action, stall=None)
            what = f"the agent of {machine.name} is older than stall limits: only the time of its scripts is watched"
            await self._tell(machine.name, what)
        self._given.add(operation)
        now = self._clock()
        order = Order(
            format=1,
            operation=str(operation),
            deployment=self._deployment,
            environment=self._plan.environment,
            fence=self.fence,
            journal=self._journal,
            agent=machine.name,
            key=machine.key,
            not_before=now,
            not_after=now + ACCEPT_SECONDS,
            relays=tuple(self._plan.relay(name).url for name in machine.relays),
            action=self._sealed(operation, machine, action),
            project=self._project_for(machine),
        )
        return sign_order(order, self._signer)

    def _project_for(self, machine: PlannedMachine) -> str:
        """Whose fence it is; to an agent that knows fences of environments only, it is of the environment.

        Raises:
            UnreachableError: no relay has seen the machine, so what it understands is unknown.
        """
        return self._plan.project if PROJECT_FENCES in self.presence(machine.name).understands else ""

    def _sealed(self, operation: OperationId, machine: PlannedMachine, action: OpenAction) -> Action:
        """For this agent alone, where it understands that. What only names operations is no more than orders tell anyway.

        Raises:
            UnreachableError: no relay has seen the machine, so what it understands is unknown.
        """
        if isinstance(action, Stop | Acknowledge):
            return action
        sealing = self.presence(machine.name).sealing
        understands = self._understands(machine, SEALED_ACTIONS)
        return seal_action(action, sealing, str(operation)) if understands else action

    def _understands(self, machine: PlannedMachine, form: str) -> bool:
        """Whether its agent knows a form of orders. Raises `UnreachableError` where no relay has seen it."""
        return form in self.presence(machine.name).understands

    async def _send(self, operation: OperationId, action: OpenAction) -> None:
        """A new order of which no result is awaited; it takes the next attempt."""
        while self._book.has(operation):
            operation = replace(operation, attempt=operation.attempt + 1)
        planned = self._plan.machine(operation.who)
        await self.see(planned.name, 0.0)
        letter = messages.OrderLetter(planned.name, str(operation), await self._order(operation, planned, action))
        await self._book.keep(operation, letter.envelope)
        posting = self._room.post(planned.relays, letter)
        await posting.taken(self._limits.lost)
        # The others are a moment behind; one that is down gets no more than that.
        asyncio.get_running_loop().call_later(self._limits.pauses.longest, posting.cancel)

    def _end(self, flight: _Flight) -> None:
        del self._flights[flight.operation]
        if not self._flights:
            self._in_flight.clear()
        if flight.posting is not None:
            flight.posting.cancel()
        if not flight.result.cancel():
            flight.result.exception()  # heard, also where the caller was cancelled meanwhile

    # --- what comes in

    async def take_reports(self, relay: str, reports: Sequence[messages.NumberedReport]) -> None:
        """Of the mailroom."""
        for letter in reports:
            machine = self._machines.get(letter.agent.lower())
            if machine is None:
                await self._tell("", f"relay {relay} has a report of {letter.agent}, which has no part in this")
            elif machine.name not in self._presences:
                kept = self._unproven.setdefault(machine.name, deque(maxlen=UNPROVEN_MAX))
                kept.append((relay, letter))
            else:
                await self._take_report(relay, machine, letter)

    async def _take_report(self, relay: str, machine: PlannedMachine, letter: messages.NumberedReport) -> None:
        shown = self._presences[machine.name]
        try:
            report = verify_report(letter.envelope, AgentIdentity(shown.signing, shown.sealing))
        except SignatureError as error:
            await self._tell(machine.name, f"relay {relay} has a report that {machine.name} did not sign: {error}")
            return
        if self._is_of_a_foreign_letter(report):
            text = f"{report.operation}: {machine.name} refused another order under this name, not ours"
            await self._tell(machine.name, f"{text} ({report.reason})")
            return
        operation = self._ordered(machine, report.operation)
        if operation is None or report.agent.lower() != machine.name.lower() or report.deployment != self._deployment:
            await self._tell(machine.name, f"{machine.name} reports of {report.operation}, which it was never ordered")
            return
        self._seen[machine.name] = asyncio.get_running_loop().time()
        flight = self._flights.get(operation)
        if flight is not None:
            await self._deliver(flight, report)
        elif report.state in FINAL and operation not in self._unacknowledged:
            self._finals.setdefault(operation, report)

    def _is_of_a_foreign_letter(self, report: Report) -> bool:
        """Whether it refuses something that a stranger put into the mail under a name of this deployment."""
        if report.state != "refused" or report.deployment != self._deployment:
            return False
        operation = OperationId.find(report.operation)
        ordered = self._book.find(operation) if operation is not None else None
        return ordered is None or order_digest(ordered) != report.order

    async def _deliver(self, flight: _Flight, report: Report) -> None:
        if report.order != flight.digest:
            text = f"{flight.operation}: {report.state} is reported of another order under this name"
            await self._tell(flight.machine.name, f"{text} ({report.reason})" if report.reason else text)
        elif flight.result.done():
            return
        elif report.state in FINAL:
            flight.result.set_result(report)
        elif report.number > flight.newest:
            if report.reason:
                await self._tell(flight.machine.name, f"{flight.operation}: {report.reason}")
            else:
                flight.heard_at = flight.heard_at or asyncio.get_running_loop().time()
            flight.newest = report.number
            if flight.on_progress is not None:
                flight.on_progress(report)

    async def take_pieces(self, relay: str, pieces: Sequence[messages.NumberedPiece]) -> None:
        """Of the mailroom. Pieces are not signed; the final report says what the whole must be."""
        touched = set()
        for piece in pieces:
            machine = self._machines.get(piece.agent.lower())
            operation = self._ordered(machine, piece.operation) if machine is not None else None
            if machine is None or operation is None:
                await self._tell("", f"relay {relay} has output of {piece.operation!r}, which was never ordered")
                continue
            touched.add(operation)
            try:
                # At most 64 KiB each, into the page cache: a thread would cost more than it.
                self._log(operation).take(piece.offset, piece.data)
            except StoreError as error:
                await self._tell(machine.name, error.message)
        for operation in touched:
            await self._compare_log(operation)
        self._log_news.set()

    async def take_trouble(self, relay: str, error: WaystationError) -> None:
        """Of the mailroom."""
        await self._tell("", f"relay {relay}: {error.message}")

    def lose_mail(self, relay: str) -> None:
        """Of the mailroom. The same bytes again are harmless wherever they were not lost."""
        for flight in self._flights.values():
            if relay in flight.machine.relays and flight.posting is not None:
                self._room.post_again(flight.posting, relay, flight.letter)

    # --- output

    def _ordered(self, machine: PlannedMachine, text: str) -> OperationId | None:
        """The operation of this name, if it was ordered. Names come from a relay: only ours become files."""
        operation = OperationId.find(text)
        if operation is None or (operation.deployment, operation.who) != (self._deployment, machine.name):
            return None
        is_known = operation in self._logs or operation in self._flights or self._book.has(operation)
        return operation if is_known else None

    def _log(self, operation: OperationId) -> LogFile:
        if operation not in self._logs:
            self._logs[operation] = LogFile(self.log_path(operation))
        return self._logs[operation]

    def _has_log(self, operation: OperationId) -> bool:
        return self._log(operation).size >= self._unacknowledged[operation].log_bytes

    def _lacking(self) -> list[OperationId]:
        return [operation for operation in self._unacknowledged if not self._has_log(operation)]

    async def _compare_log(self, operation: OperationId) -> None:
        report = self._unacknowledged.get(operation)
        if report is not None and self._log(operation).compare(report.log_bytes, report.log_sha256) == "differs":
            await self._tell(operation.who, f"{operation}: its output is not what the agent says it sent")

    def _make_durable(self, operations: Iterable[OperationId]) -> None:
        for operation in operations:
            self._log(operation).make_durable()

    # --- who is lost

    async def _meet(self, answers: Answers) -> Presences:
        """Remember who was seen, and take up reports that waited for a key to be shown."""
        now = asyncio.get_running_loop().time()
        found = self._merged(answers)
        for machine in self._plan.machines:
            sight = found.newest.get(machine.name)
            if sight is None:
                continue
            self._presences[machine.name] = sight.presence
            self._seen[machine.name] = max(now - sight.age, self._seen.get(machine.name, 0.0))
            for relay, letter in self._unproven.pop(machine.name, ()):
                await self._take_report(relay, machine, letter)
        self._doubled = found.doubled
        return found

    def _merged(self, answers: Answers) -> Presences:
        return merge_presences(self._plan.machines, answers, self._clock(), self._limits.lost)

    async def _watch(self) -> None:
        """While something is in flight, look who is there: a machine that is gone must not be awaited for ever."""
        while True:
            await self._in_flight.wait()
            await asyncio.sleep(self._limits.look)
            found = await self.presences()
            for flight in list(self._flights.values()):
                error = self._why_given_up(flight, found)
                if error is not None and not flight.result.done():
                    flight.result.set_exception(error)

    def _why_given_up(self, flight: _Flight, found: Presences) -> UnreachableError | None:
        now = asyncio.get_running_loop().time()
        unseen = now - max(flight.since, self._seen.get(flight.machine.name, 0.0))
        if all(relay in found.silent for relay in flight.machine.relays):
            text = f"none of the relays of {flight.machine.name} has answered for {unseen:.0f} s"
            return UnreachableError(text) if unseen >= flight.patience else None
        if unseen >= self._limits.lost:
            return LostError(flight.machine.name, unseen, found.strangers.get(flight.machine.name, ""))
        if not flight.newest and now - flight.since >= self._limits.accept:
            return UnreachableError(f"{flight.machine.name} is there, but says nothing of an order")
        if flight.heard_at and now - flight.heard_at >= flight.longest + self._limits.report:
            return UnreachableError(
                f"{flight.machine.name} began, and no relay brought its end within {now - flight.heard_at:.0f} s"
            )
        return None

    async def _tell(self, machine: str, text: str) -> None:
        """Once: what a relay repeats every second is one thing to know."""
        if (machine, text) not in self._told and len(self._told) < NOTES_MAX:
            self._told.add((machine, text))
            await self._recorder.record(Note(text, machine))


def _refusals(machine: str, report: Report) -> list[Refused]:
    return [Refused(machine, report.reason, report.operation)] if report.state == "refused" else []
