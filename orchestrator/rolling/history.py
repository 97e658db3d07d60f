"""What a deployment's journal tells a process that takes it up: which of it is through, and which only began. Pure.

A new deployment has an empty history, so that both walk the same recipe. What was decided is not decided again: a turn
is folded anew from what became of its parts (`turn_did`), a roll from its turns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from agent.orders.operation_id import SERVER, OperationId
from agent.orders.orders import SurveyFacts
from orchestrator.journal import events as ev
from orchestrator.journal.events import JournalEntry
from orchestrator.plan.plan import MachineStep
from orchestrator.rolling import rolling
from orchestrator.rolling.rolling import Roll

Ending = ev.Reported | ev.ServerRunEnded


@dataclass(frozen=True, slots=True)
class Begun:
    """An operation that was begun, and its end where that was seen."""

    operation: OperationId
    ending: Ending | None = None


@dataclass(frozen=True, slots=True)
class TurnHistory:
    """A turn that began before.

    Attributes:
        did: what became of its parts, in order.
        begun: operations that began after the last part which came to an end: they belong to the one that comes next.
        attempts: the highest attempt of each action, whatever became of it.
    """

    did: tuple[ev.TurnDid, ...] = ()
    begun: tuple[Begun, ...] = ()
    attempts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AskHistory:
    """A question to people: when it was asked (seconds since 1970), who has answered, and how it was settled."""

    opened: float | None = None
    answers: tuple[ev.AskAnswered, ...] = ()
    closed: ev.AskClosed | None = None


@dataclass(frozen=True, slots=True)
class MachineHistory:
    """A question about a machine: when it was asked, and what a person said."""

    asked: float | None = None
    decided: ev.MachineDecided | None = None


@dataclass(frozen=True)
class History:
    """All entries of one deployment, in order; none where it is new."""

    entries: Sequence[JournalEntry] = ()

    @property
    def began(self) -> float:
        """Seconds since 1970; 0 where it is new."""
        return self.entries[0].at if self.entries else 0.0

    # --- stages

    @cached_property
    def barrier(self) -> ev.Barrier | None:
        """Everything is everywhere; None where it is not yet."""
        found = [entry.event for entry in self.entries if isinstance(entry.event, ev.Barrier)]
        return found[-1] if found else None

    @cached_property
    def surveyed(self) -> Mapping[str, SurveyFacts]:
        """What each machine said of itself before anything was done to it."""
        told: dict[str, SurveyFacts] = {}
        for entry in self.entries:
            if isinstance(entry.event, ev.Surveyed):
                told.setdefault(entry.event.machine, entry.event.facts)
        return told

    @cached_property
    def acquired(self) -> frozenset[str]:
        """Machines on which everything is."""
        return frozenset(entry.event.machine for entry in self.entries if isinstance(entry.event, ev.Acquired))

    @cached_property
    def pre_acquired(self) -> Mapping[str, bool]:
        """Steps before acquisition that began, by name: whether they ended well; those that were undone are not there."""
        found: dict[str, bool] = {}
        for entry in self.entries:
            match entry.event:
                case ev.PreAcquireStarted(name=name):
                    found[name] = False
                case ev.PreAcquireEnded(name=name, ok=ok):
                    found[name] = ok
                case ev.UndoEnded(name=name, ok=True):
                    found.pop(name, None)
                case _:
                    pass
        return found

    @cached_property
    def given_up(self) -> str:
        """Why it fails, where that was so before the barrier and what was opened is being closed; empty where it is not."""
        found = (entry.event for entry in self.entries if isinstance(entry.event, ev.UndoStarted))
        return "" if self.barrier is not None else next((event.why for event in found if event.why), "")

    @cached_property
    def left_by_rule(self) -> Mapping[str, str]:
        """Machines that a rule left out on the way, and why."""
        left = (entry.event for entry in self.entries if isinstance(entry.event, ev.Left))
        return {event.machine: event.reason for event in left if not event.by}

    @cached_property
    def unsure(self) -> frozenset[str]:
        """Machines whose `before` or `after` failed last: whether they are in service nobody knows."""
        found: set[str] = set()
        for entry in self.entries:
            match entry.event:
                case ev.ServerRunEnded(machine=machine, operation=text, state=state) if machine:
                    if OperationId.parse(text).action in {"before", "after"}:
                        (found.discard if state == "done" else found.add)(machine)
                case _:
                    pass
        return frozenset(found)

    # --- people

    @cached_property
    def cancelled_by(self) -> str:
        """Who cancelled it; empty where nobody did."""
        found = (entry.event for entry in self.entries if isinstance(entry.event, ev.DecisionTaken))
        return next((event.operator for event in found if event.what == "cancel"), "")

    @cached_property
    def paused(self) -> ev.Paused | None:
        """Why nothing new starts; None where it may."""
        last: ev.Paused | None = None
        for entry in self.entries:
            match entry.event:
                case ev.Paused() as paused:
                    last = paused
                case ev.Unpaused():
                    last = None
                case _:
                    pass
        return last

    def ask(self, ask: str) -> AskHistory:
        """What is known of a question to people."""
        found = AskHistory()
        for entry in self.entries:
            match entry.event:
                case ev.AskOpened(ask=name) if name == ask and found.opened is None:
                    found = replace(found, opened=entry.at)
                case ev.AskAnswered(ask=name) as answer if name == ask:
                    found = replace(found, answers=(*found.answers, answer))
                case ev.AskClosed(ask=name) as closed if name == ask:
                    found = replace(found, closed=closed)
                case _:
                    pass
        return found

    def machine_asked(self, step: int, machine: str) -> MachineHistory:
        """The question about this machine, or about the server's part, that nothing has followed yet."""
        found = MachineHistory()
        for entry, _ in self._about.get((step, machine), ()):
            match entry.event:
                case ev.MachineAsked():
                    found = MachineHistory(entry.at)
                case ev.MachineDecided() as decided:
                    found = replace(found, decided=decided)
                case ev.TurnDid():
                    found = MachineHistory()
                case ev.ServerRunDispatched() if machine == SERVER and found.decided is not None:
                    found = MachineHistory()
                case _:
                    pass
        return found

    @cached_property
    def _about(self) -> Mapping[tuple[int, str], Sequence[tuple[JournalEntry, OperationId | None]]]:
        """What was said of a step's part on one machine, or on the server, by number and name; with the operation."""
        found: dict[tuple[int, str], list[tuple[JournalEntry, OperationId | None]]] = {}
        for entry in self.entries:
            match entry.event:
                case ev.Dispatched() | ev.ServerRunDispatched() | ev.Reported() | ev.ServerRunEnded() as event:
                    operation = OperationId.parse(event.operation)
                    found.setdefault((operation.step, operation.who), []).append((entry, operation))
                case ev.TurnStarted() | ev.TurnDid() | ev.MachineAsked() | ev.MachineDecided() as event:
                    found.setdefault((event.step, event.machine), []).append((entry, None))
                case _:
                    pass
        return found

    # --- steps

    @cached_property
    def steps(self) -> Mapping[int, ev.StepEnded]:
        """Steps that are over, by number."""
        return {entry.event.step: entry.event for entry in self.entries if isinstance(entry.event, ev.StepEnded)}

    @cached_property
    def begun_steps(self) -> frozenset[int]:
        return frozenset(entry.event.step for entry in self.entries if isinstance(entry.event, ev.StepStarted))

    def roll(self, step: MachineStep) -> Roll:
        """How far the step has come over its machines."""
        roll = rolling.begin(step)
        for entry in self.entries:
            match entry.event:
                case ev.TurnStarted(machine=machine, step=step.number) if machine in roll.waiting:
                    roll = rolling.started(roll, machine)
                case ev.TurnEnded(machine=machine, step=step.number) as end:
                    if end.outcome == "already_current" and machine in roll.waiting:
                        roll = rolling.passed(roll, machine)
                    elif machine in roll.in_flight:
                        roll = rolling.ended(
                            roll,
                            machine,
                            failure=end.failure,
                            stop_roll=end.stop_roll,
                            is_excluded=end.outcome == "excluded",
                        )
                case ev.GatePassed(step=step.number) if roll.gate_due is not None:
                    roll = rolling.passed_gate(roll)
                case _:
                    pass
        return roll

    def turn(self, step: int, machine: str) -> TurnHistory | None:
        """The turn of this machine in this step; None where it did not begin."""
        told = self._about.get((step, machine), ())
        if not any(isinstance(entry.event, ev.TurnStarted) for entry, _ in told):
            return None
        did: list[ev.TurnDid] = []
        counts_from = 0
        for entry, _ in told:
            if isinstance(entry.event, ev.TurnDid):
                did.append(entry.event)
                # What is lost may still run there: a retry takes it up.
                if entry.event.how != "lost" and entry.event.do != "ask":
                    counts_from = entry.number
        return self._turn(step, machine, did, counts_from)

    def preparation(self, machine: str) -> TurnHistory:
        """What was begun on this machine before the steps."""
        return self._turn(0, machine, (), 0)

    def server_run(self, step: int, action: str) -> tuple[int, ...]:
        """Which attempts of something on the server were begun, since a person last had it tried again."""
        found: list[int] = []
        is_again = False
        for entry, operation in self._about.get((step, SERVER), ()):
            match entry.event:
                case ev.ServerRunDispatched() if operation is not None and operation.action == action:
                    found = [operation.attempt] if is_again else [*found, operation.attempt]
                    is_again = False
                case ev.MachineDecided(what="retry"):
                    is_again = True
                case _:
                    pass
        return tuple(found)

    def _turn(self, step: int, who: str, did: Iterable[ev.TurnDid], counts_from: int) -> TurnHistory:
        begun: dict[OperationId, Begun] = {}
        highest: dict[str, int] = {}
        for entry, operation in self._about.get((step, who), ()):
            if operation is None:
                continue
            match entry.event:
                case ev.Dispatched() | ev.ServerRunDispatched():
                    highest[operation.action] = max(operation.attempt, highest.get(operation.action, 0))
                    if entry.number > counts_from:
                        begun.setdefault(operation, Begun(operation))
                case ev.Reported() | ev.ServerRunEnded() as end if operation in begun:
                    begun[operation] = Begun(operation, end)
                case _:
                    pass
        return TurnHistory(tuple(did), tuple(begun.values()), highest)
