"""What every stage of a deployment works with: the plan, the journal, the machines, the server's own scripts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from agent.orders.orders import Action, Report
from orchestrator.journal.events import (
    Dispatched,
    Event,
    Note,
    Refused,
    Reported,
    ServerRunDispatched,
    ServerRunEnded,
    UndoEnded,
    UndoStarted,
)
from orchestrator.plan.plan import Plan, PlannedPackage, PlannedRelay, PreAcquire, ServerRun
from relay.errors import WaystationError, first_of

if TYPE_CHECKING:
    from agent.runs.runs import Outcome
    from orchestrator.deployment.server_runs import RunResult, ServerRuns
    from orchestrator.depot.depot import Depot
    from orchestrator.fleet.fleet import Fleet
    from orchestrator.journal.journal import Journal
    from orchestrator.trust.secrets import SecretStore
    from relay.protocol.client import RelayClient
    from relay.support.progress import Progress

T = TypeVar("T")

SERVER = "server"
"""Stands in an operation's id where a machine would; no machine may be called so."""
PROBE = "probe"
"""Action of a look at a rotation. It changes nothing, so the journal does not hear of it."""

Tell = Callable[[Event], None]
"""Hears of every event after it is in the journal."""


class DeploymentFailedError(WaystationError):
    """The deployment cannot go on, for a reason that is told to people."""


@dataclass
class Engine:
    """One deployment while it runs."""

    plan: Plan
    deployment: str
    """Its ULID."""
    journal: Journal
    fleet: Fleet
    runs: ServerRuns
    secrets: SecretStore
    depot: Depot
    tell: Tell
    bar: Callable[[str], Progress]
    open_relay: Callable[[PlannedRelay], RelayClient]
    notify: Callable[[Mapping[str, Any]], Coroutine[Any, Any, list[str]]]
    """Tells the plan's receivers; a sentence for each that could not be told."""
    server_tree: Callable[[PlannedPackage], Coroutine[Any, Any, str]]
    """Builds the verified tree of a package on the server; its path."""
    operator: str
    fence: int
    server_trees: dict[str, str] = field(default_factory=dict)
    """Where the trees of packages stand that the server itself uses, by the package's name."""
    out: set[str] = field(default_factory=set)
    """Machines whose bracket is open."""
    stopping: str = ""
    """Why nothing new may start any more; empty while all goes on."""
    has_met: bool = False
    """Whether every machine was there, so that orders may have left."""
    refused_before: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """What agents had refused, by their own word, before any order of this deployment left."""
    cancelled: bool = False
    """Whether a person stopped it."""
    stopped: asyncio.Event = field(default_factory=asyncio.Event)

    async def note(self, *events: Event) -> None:
        """Into the journal, durable on return, and then to whoever watches. Raises `StoreError`."""
        await asyncio.to_thread(self.journal.append, self.deployment, *events)
        for event in events:
            self.tell(event)

    def stop(self, why: str) -> None:
        """Start nothing new. What is in flight comes to its end. The first reason stays."""
        self.stopping = self.stopping or why
        self.stopped.set()

    def cancel(self, why: str) -> None:
        """As `stop`, because a person said so."""
        self.cancelled = True
        self.stop(why)

    # --- on machines

    async def perform(
        self,
        machine: str,
        step: int,
        name: str,
        action: Action,
        *,
        attempt: int = 1,
        on_progress: Callable[[Report], None] | None = None,
    ) -> Report:
        """Order it and wait for what became of it. Raises as `Fleet.perform`."""
        return await self.fleet.perform(machine, step, name, attempt, action, on_progress)

    def seal(self, machine: str, operation: str, names: Iterable[str]) -> dict[str, bytes]:
        """Secrets as only this machine can open them, and only in this operation."""
        return self.secrets.sealed(names, self.fleet.presence(machine).sealing, operation) if names else {}

    # --- on the server

    async def run_here(self, run: ServerRun, step: int, who: str, name: str, extra: Mapping[str, str]) -> RunResult:
        """Run something of the plan on the server; `who` is the machine that it serves, or `server`."""
        return await self.runs.run(run, f"{self.deployment}/{step}/{who}/{name}", extra)


async def undo_step(
    step: PreAcquire, deployment: str, runs: ServerRuns, note: Callable[[Event], Awaitable[None]]
) -> bool:
    """Close what a step before acquisition opened, where it has an undo. Whether that went well."""
    if step.undo is None:
        return True
    await note(UndoStarted(step.run.name))
    result = await runs.run(step.undo, f"{deployment}/0/{SERVER}/undo-{step.run.name}", {"UNDO": "1"})
    await note(UndoEnded(step.run.name, ok=result.ok, reason=result.reason))
    return result.ok


async def together(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All at once; the first that fails ends the others, and its error is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as errors:
        raise first_of(errors) from None
    return [task.result() for task in tasks]


class JournalHooks:
    """Writes down what the fleet and the server's runs do, before and after they do it."""

    def __init__(self, note: Callable[[Event], Coroutine[Any, Any, None]]) -> None:
        self._note = note

    async def before_dispatch(self, operation: str, machine: str, order: str) -> None:
        await self._note(Dispatched(operation, machine, order))

    async def after_report(self, machine: str, report: Report) -> None:
        await self._note(Reported.of(machine, report))
        if report.state == "refused":
            await self._note(Refused(machine, report.reason, report.operation))

    async def note(self, machine: str, text: str) -> None:
        await self._note(Note(text, machine))

    async def before_run(self, operation: str) -> None:
        _, _, who, action, _ = operation.split("/")
        if action != PROBE:
            await self._note(ServerRunDispatched(operation, action, _machine(who)))

    async def after_run(self, operation: str, outcome: Outcome) -> None:
        _, _, who, action, _ = operation.split("/")
        if action != PROBE:
            await self._note(
                ServerRunEnded(
                    operation,
                    outcome.state,
                    _machine(who),
                    reason=outcome.reason,
                    exit_status=outcome.exit_status,
                    started=outcome.started,
                    ended=outcome.ended,
                    log_bytes=outcome.output_bytes,
                )
            )


def _machine(who: str) -> str:
    """The machine that a run on the server serves; empty where it serves none."""
    return "" if who == SERVER else who
