"""What happens in one deployment: into the journal first, then, as lines, to the people who watch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from agent.orders.operation_id import OperationId
from orchestrator.journal.event_text import line
from orchestrator.journal.events import DecisionTaken, Dispatched, Ended, Event, FinalState, Note
from orchestrator.journal.journal import Decision, Journal
from orchestrator.paths import operator
from relay.errors import StoreError

Tell = Callable[[str], None]
"""Shows a line to the people who watch."""
LATER_SECONDS: Final = 0.5
"""How long an event is kept for the next one of its machine."""


class _Waiting(NamedTuple):
    """What waits for the next commit, and its answer."""

    events: tuple[Event, ...]
    orders: dict[str, bytes]
    written: asyncio.Future[None]


class Recorder:
    """The record of one deployment. Every method raises `StoreError`, and then nothing was written or told.

    What comes while a commit is under way goes into the next one together, in the order in which it came.
    """

    def __init__(self, journal: Journal, deployment: str, tell: Tell = lambda _line: None) -> None:
        """`deployment` is a ULID that has begun in the journal, or begins before the first event."""
        self.deployment = deployment
        self.journal = journal
        self._tell = tell
        self._later: dict[str, list[Event]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: list[_Waiting] = []
        self._writer: asyncio.Task[None] | None = None

    def later(self, machine: str, *events: Event) -> None:
        """Keep events of this machine for the next one that is recorded of it: they come into one commit.

        For what only matters once something follows from it. Where nothing does for a while, they are recorded alone.
        """
        self._later.setdefault(machine, []).extend(events)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LATER_SECONDS, self._record_kept)

    async def record(self, *events: Event) -> None:
        """Append events; they are durable on return."""
        await self._record(events, {})

    async def dispatch(self, event: Dispatched, envelope: bytes) -> None:
        """Append that an order is about to leave, and keep its envelope; both are durable on return."""
        await self._record((event,), {event.operation: envelope})

    async def keep_order(self, operation: OperationId, envelope: bytes) -> None:
        """Keep an order of which nothing else is recorded; it is durable on return."""
        await asyncio.to_thread(self.journal.keep_order, self.deployment, str(operation), envelope)

    def order(self, operation: OperationId) -> bytes | None:
        """The envelope that was kept for an operation; blocking."""
        return self.journal.order(str(operation))

    def ordered(self) -> set[str]:
        """All operations that an order was kept for; blocking."""
        return self.journal.ordered(self.deployment)

    async def claim(self, project: str, environment: str, seen: list[int]) -> int:
        """Go on with a fence above all that agents have `seen`; the new fence."""
        fence = await asyncio.to_thread(self.journal.claim, project, environment, seen)
        note = Note(f"agents have seen fence {max(seen)}: this deployment goes on with {fence}")
        await asyncio.to_thread(self.journal.take_up, self.deployment, fence, operator(), note)
        self.tell(note)
        return fence

    async def pending_decisions(self) -> list[Decision]:
        """What people decided of this deployment, and was not taken up yet."""
        return await asyncio.to_thread(self.journal.pending_decisions, self.deployment)

    async def take(self, decision: Decision) -> None:
        """Mark a decision as taken up; one that another process took is passed over."""
        if await asyncio.to_thread(self.journal.take_decision, decision.number):
            self.tell(DecisionTaken(decision.number, decision.operator, decision.kind, decision.data))

    async def catch_up(self) -> None:
        """Append what was kept for later; it is durable on return."""
        if self._later:
            await self._record((), {}, *self._later)

    async def end(self, state: FinalState, reason: str) -> None:
        """Write down how the deployment ended."""
        await self.catch_up()
        ended = Ended(state, reason)
        await asyncio.to_thread(self.journal.set_state, self.deployment, state, reason, ended)
        self.tell(ended)

    def say(self, words: str) -> None:
        """Tell the people who watch; the journal does not keep it."""
        self._tell(words)

    def tell(self, *events: Event) -> None:
        """Show events that are in the journal already, or that only the people who watch should hear of."""
        for event in events:
            if text := line(event):
                self._tell(text)

    # --- one commit after another

    async def _record(self, events: tuple[Event, ...], orders: dict[str, bytes], *machines: str) -> None:
        later = self._take_later(machines, events) if self._later else {}
        kept = tuple(event for of_machine in later.values() for event in of_machine)
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting((*kept, *events), orders, written))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        try:
            await written
        except StoreError:
            for machine, unwritten in later.items():
                self._later[machine] = unwritten + self._later.get(machine, [])
            raise
        self.tell(*kept, *events)

    def _take_later(self, machines: Iterable[str], events: Iterable[Event]) -> dict[str, list[Event]]:
        """What was kept for these machines, and for those that the events are of."""
        of = dict.fromkeys((*machines, *(getattr(event, "machine", "") for event in events)))
        return {machine: self._later.pop(machine) for machine in of if machine in self._later}

    async def _write(self) -> None:
        while batch := self._waiting:
            self._waiting = []
            try:
                await self._append(*batch)
            except Exception as error:
                if len(batch) == 1:
                    _fail(batch[0], error)
                else:  # of one of them: each hears of its own
                    await self._append_each(batch)

    async def _append_each(self, batch: list[_Waiting]) -> None:
        for one in batch:
            try:
                await self._append(one)
            except Exception as error:
                _fail(one, error)

    async def _append(self, *batch: _Waiting) -> None:
        events = [event for one in batch for event in one.events]
        orders = {name: envelope for one in batch for name, envelope in one.orders.items()}
        await asyncio.to_thread(self.journal.append, self.deployment, *events, orders=orders)
        for one in batch:
            if not one.written.done():
                one.written.set_result(None)

    def _record_kept(self) -> None:
        self._timer = None
        if self._later:
            task = asyncio.ensure_future(self.catch_up())
            task.add_done_callback(_heard)


def _fail(waiting: _Waiting, error: Exception) -> None:
    if not waiting.written.done():
        waiting.written.set_exception(error)


def _heard(task: asyncio.Task[None]) -> None:
    """What the journal does not take is kept; the next record tries it again, and tells."""
    if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, StoreError):
        raise error
