"""Operations under way: which may begin now, and how they are stopped; their ends go to the reporter.

What changes the machine (scripts, services, switching, settling) is done one after another; looking and pulling goes on
beside it (`agent/orders/turns.py` says whose turn it is).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from agent.operations import Ended, Job, Operations, last_run
from agent.orders.acceptance import fenced_off
from agent.orders.journal import OperationJournal, OperationRecord
from agent.orders.orders import ControlService, Order, RunScript, Settle, Switch
from agent.orders.turns import Turns
from agent.reporter import Reporter
from agent.runs import runs
from relay.errors import StoreError

_STOPS_KEPT = 1024
_RUNS = (RunScript, ControlService)
_SETTLED_ACTIONS = (Switch, Settle)
"""Repeated later, they could undo what came after them: their results are kept durably."""
_ONE_AT_A_TIME = (*_RUNS, *_SETTLED_ACTIONS)


@dataclass(slots=True)
class _ActiveOperation:
    """`begun`: it has its turn. `waits`: for what, where it has to. `progress`: bytes done, bytes of the whole."""

    record: OperationRecord
    order: Order
    begun: bool = False
    stopped: bool = False
    waits: str = ""
    progress: tuple[int, int] = (0, 0)
    task: asyncio.Task[None] = field(init=False)

    def set_progress(self, done: int, whole: int) -> None:
        self.progress = (done, whole)

    def set_waits(self, words: str) -> None:
        self.waits = words


@dataclass(eq=False)
class Scheduler:
    """Starts and stops operations, each in a task of its own. `clock` gives seconds since 1970."""

    operations: Operations
    journal: OperationJournal
    reporter: Reporter
    tasks: asyncio.TaskGroup
    clock: Callable[[], float]
    _turns: Turns = field(default_factory=Turns, init=False)
    _active: dict[str, _ActiveOperation] = field(default_factory=dict, init=False)
    _stops: dict[str, str] = field(default_factory=dict, init=False)

    def start(self, record: OperationRecord, order: Order, *, barred: str = "") -> None:
        """Do what was accepted, and report its end. `barred`: why it must not begin any more."""
        active = _ActiveOperation(record, order)
        active.stopped = self._stops.pop(record.operation, None) == order.environment
        self._active[record.operation] = active
        active.task = self.tasks.create_task(self._operate(active, barred))

    def leave(self) -> int:
        """The agent ends: how many operations are under way. Runners go on by themselves, and the next process collects
        their results.
        """
        for active in self._active.values():
            active.task.cancel()
        return len(self._active)

    async def end(self, deployment: str) -> None:
        """This deployment is over: its turn, too."""
        await self._turns.end(deployment)

    # --- stopping

    def stop(self, operation: str, environment: str) -> None:
        """End this operation, if an order in this environment began it."""
        active = self._active.get(operation)
        if active is not None:
            if active.order.environment == environment:
                self._stop(active)
        elif operation not in self.journal.operations:
            # The stop came by another relay, before what it is to stop.
            self._stops[operation] = environment
            while len(self._stops) > _STOPS_KEPT:
                del self._stops[next(iter(self._stops))]

    def _stop(self, active: _ActiveOperation) -> None:
        if active.stopped:
            return
        active.stopped = True
        if isinstance(active.order.action, _RUNS) and active.begun:
            self.tasks.create_task(_stop_run(active))
        elif not (isinstance(active.order.action, _SETTLED_ACTIONS) and active.begun):
            active.task.cancel()

    # --- one operation

    async def _operate(self, active: _ActiveOperation, barred: str) -> None:
        began = self.clock()
        progress = self.tasks.create_task(self.reporter.follow(active.record, lambda: (*active.progress, active.waits)))
        try:
            ended = await self._perform(active, barred)
        except asyncio.CancelledError:
            if not active.stopped:
                raise  # the agent ends; the next process takes it up
            active.task.uncancel()  # what was meant is the operation, not this task
            ended = Ended("stopped", "it was stopped" if active.begun else "it was stopped before it began")
        finally:
            progress.cancel()
        del self._active[active.record.operation]
        ended = replace(ended, started=ended.started or began, ended=ended.ended or self.clock())
        await self.reporter.finish(active.record, ended, durable=isinstance(active.order.action, _SETTLED_ACTIONS))

    async def _perform(self, active: _ActiveOperation, barred: str) -> Ended:
        if active.stopped:
            return Ended("stopped", "it was stopped before it began")
        record = active.record
        job = Job(
            active.order,
            record.folder,
            on_output=partial(self.reporter.outbox.log, record.deployment, record.operation),
            on_progress=active.set_progress,
            barred=barred,
        )
        if not isinstance(active.order.action, _ONE_AT_A_TIME):
            active.begun = True
            async with self._turns.beside(active.order):
                return await self.operations.perform(job)
        async with self._turns.one(active.order, active.set_waits):
            if await self._may_begin(active):
                active.begun = True
                return await self.operations.perform(job)
        why = fenced_off(active.order, self.journal.fences)
        return Ended("refused", "fenced_off: " + (why[1] if why else ""))

    async def _may_begin(self, active: _ActiveOperation) -> bool:
        """Whether it still may, now that its turn has come; what runs already is only followed."""
        if fenced_off(active.order, self.journal.fences) is None:
            return True
        if not isinstance(active.order.action, _RUNS):
            return False
        return await asyncio.to_thread(runs.state_of, last_run(active.record.folder)) != "new"


async def _stop_run(active: _ActiveOperation) -> None:
    while not active.task.done():
        try:
            await asyncio.to_thread(runs.stop, last_run(active.record.folder))
            return
        except StoreError:
            # It is just being started: there is no folder yet.
            await asyncio.sleep(0.05)
