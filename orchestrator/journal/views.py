"""What a journal's entries mean together: views for people and for a resume. Pure; nothing is read or written.

Each view is one pass over the entries, in their order. Entries may repeat themselves, as a resume repeats what it did not
see the end of: then the first beginning and the last end count. The structs are printed as JSON as they are: a field is
added, never renamed, without a new `DeploymentView.format`. Times are seconds since 1970, sizes are bytes.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec

from agent.orders.operation_id import action_of
from agent.orders.orders import FINAL, SwitchFacts
from orchestrator.journal import events as ev
from orchestrator.journal.events import DeploymentRecord, JournalEntry
from orchestrator.journal.ledger import LedgerView, ledger
from orchestrator.plan.plan import MachineStep, Plan

DeploymentState = Literal[
    "running", "waiting", "paused", "succeeded", "done with exclusions", "failed", "cancelled", "interrupted"
]
"""`waiting`: people are asked something; `paused`: nothing new starts; both whether or not a process is alive that runs
it. `interrupted`: written as running, and none is. The ends are those of `ev.Outcome`.
"""
Stage = Literal["pre_acquire", "acquisition", "steps", "ended"]
StepState = Literal["waiting", "running", "done", "failed", "skipped"]
UndoState = Literal["none", "due", "running", "done", "failed"]
MachineStage = Literal["waiting", "surveyed", "acquiring", "acquired", "in flight", "through", "excluded"]


class OpenBracket(msgspec.Struct, frozen=True):
    """A machine that may be out of its rotation: `before` was begun at `since`, and no `after` ended well since then.

    `deployment`, `label`, `step` and `number` (of the entry) are those of who opened it; `adopted_by` is the ULID of the
    deployment that answers for it now, where another took it over. `project` is that of who answers for it.
    """

    machine: str
    rotation: str
    environment: str
    deployment: str
    label: str
    since: float
    step: int
    number: int
    adopted_by: str = ""
    project: str = ""

    @property
    def owner(self) -> str:
        """ULID of the deployment that has to close it."""
        return self.adopted_by or self.deployment


class DeploymentSummary(msgspec.Struct, frozen=True):
    """A line of a list of deployments."""

    deployment: str
    project: str
    label: str
    environment: str
    goal: ev.Goal
    state: DeploymentState
    reason: str
    operator: str
    host: str
    fence: int
    started: float
    ended: float | None


class PreAcquireView(msgspec.Struct, frozen=True):
    name: str
    state: StepState
    undo: UndoState
    since: float | None = None
    reason: str = ""


class TurnView(msgspec.Struct, frozen=True):
    """One machine in one step; `ended` is None while it is in flight. `begun` counts from 1."""

    machine: str
    step: int
    started: float
    ended: float | None = None
    outcome: str = ""
    failure: bool = False
    stop_roll: bool = False
    reason: str = ""
    begun: int = 1


class StepView(msgspec.Struct, frozen=True):
    """`machines`: how many it has in all, 0 for a step on the server; `turns`: those that began, in that order."""

    number: int
    name: str
    state: StepState
    started: float | None = None
    ended: float | None = None
    reason: str = ""
    machines: int = 0
    turns: tuple[TurnView, ...] = ()


class OperationView(msgspec.Struct, frozen=True):
    """An operation of an agent (`order`: SHA-256 of its envelope) or of the server (`order` is empty).

    `result` is None while its end was not seen.
    """

    operation: str
    machine: str
    order: str
    since: float
    result: ev.Reported | ev.ServerRunEnded | None = None


class MachineView(msgspec.Struct, frozen=True):
    """Where a machine stands.

    Attributes:
        version: of what is current there, as far as the journal knows; several roots with `, ` between.
        step: of its last turn, 0 before the first.
        since: in flight since then.
        doing: the action of an operation whose end was not seen.
        outcome, reason: of its last turn that ended.
        failure: one of its turns ended as a failure, and no later one of that step made it good.
        out_since: its bracket is open since then.
    """

    name: str
    stage: MachineStage
    version: str = ""
    step: int = 0
    since: float | None = None
    doing: str = ""
    outcome: str = ""
    failure: bool = False
    reason: str = ""
    out_since: float | None = None


class RefusalView(msgspec.Struct, frozen=True):
    at: float
    machine: str
    reason: str
    operation: str = ""


class BehindView(msgspec.Struct, frozen=True):
    """A relay that has not got a package, since `at`; the deployment went on without it."""

    at: float
    relay: str
    package: str
    version: str
    reason: str


class LeftView(msgspec.Struct, frozen=True):
    """A machine that was left out: on purpose, `by` a person, or by rule (empty)."""

    at: float
    machine: str
    reason: str
    by: str = ""


class DecisionView(msgspec.Struct, frozen=True):
    at: float
    operator: str
    what: str
    data: dict[str, Any]


class NoteView(msgspec.Struct, frozen=True):
    at: float
    text: str
    machine: str = ""
    step: int = 0


class AskView(msgspec.Struct, frozen=True):
    """A question that people have not settled: asked at `since`, over at `until` (0: never)."""

    ask: str
    step: int
    name: str
    text: str
    since: float
    until: float = 0.0


class PauseView(msgspec.Struct, frozen=True):
    """Nothing new starts until a person says so. `by` is empty where the deployment paused itself."""

    reason: str
    by: str
    since: float


class WaitingMachine(msgspec.Struct, frozen=True):
    """A machine whose turn waits for a person: `choices` are what may be decided. `since`: seconds since 1970."""

    machine: str
    step: int
    reason: str
    choices: tuple[str, ...]
    since: float


class DeploymentView(msgspec.Struct, frozen=True):
    """All of one deployment. `last` is the number of the newest entry that it was made of; `is_alive`: a process runs it."""

    summary: DeploymentSummary
    stage: Stage
    pre_acquire: tuple[PreAcquireView, ...]
    ledger: LedgerView
    steps: tuple[StepView, ...]
    machines: tuple[MachineView, ...]
    running: tuple[OperationView, ...]
    brackets: tuple[OpenBracket, ...]
    behind: tuple[BehindView, ...]
    left: tuple[LeftView, ...]
    refusals: tuple[RefusalView, ...]
    decisions: tuple[DecisionView, ...]
    notes: tuple[NoteView, ...]
    last: int
    is_alive: bool = False
    asks: tuple[AskView, ...] = ()
    waiting: tuple[WaitingMachine, ...] = ()
    paused: PauseView | None = None
    format: int = 1


def view(
    record: DeploymentRecord,
    entries: Sequence[JournalEntry],
    *,
    is_alive: bool,
    plan: Plan | None = None,
    brackets: Iterable[OpenBracket] | None = None,
) -> DeploymentView:
    """Everything that is known of one deployment.

    Args:
        record: its row.
        entries: all of its entries, in order.
        is_alive: whether a process holds the lock of the environment for it.
        plan: its plan; with it, steps and machines that did not begin are shown too.
        brackets: the open ones of its environment (`open_brackets`); without them only its own entries tell, which know
            nothing of a bracket that it adopted, or that was closed elsewhere.
    """
    listed = open_brackets([(record, entries)]) if brackets is None else brackets
    mine = tuple(bracket for bracket in listed if bracket.owner == record.deployment)
    return DeploymentView(
        summary=summary(record, entries, is_alive=is_alive),
        stage=_stage(record, entries),
        pre_acquire=_pre_acquire(entries, plan),
        ledger=ledger(entries, plan),
        steps=_steps(entries, plan),
        machines=_machines(entries, plan, mine),
        running=tuple(found for found in operations(entries).values() if found.result is None),
        brackets=mine,
        behind=behind(entries),
        left=tuple(left(entries).values()),
        refusals=tuple(
            RefusalView(entry.at, entry.event.machine, entry.event.reason, entry.event.operation)
            for entry in entries
            if isinstance(entry.event, ev.Refused)
        ),
        decisions=tuple(
            DecisionView(entry.at, entry.event.operator, entry.event.what, entry.event.data)
            for entry in entries
            if isinstance(entry.event, ev.DecisionTaken)
        ),
        notes=tuple(_notes(entries)),
        last=max((entry.number for entry in entries), default=0),
        is_alive=is_alive,
        asks=asks_open(entries),
        waiting=machines_asked(entries),
        paused=pause_of(entries) if record.state == "running" else None,
    )


def summary(record: DeploymentRecord, entries: Iterable[JournalEntry], *, is_alive: bool) -> DeploymentSummary:
    """A line of a list; `entries` are only needed of one that did not end. See `view` for `is_alive`."""
    return DeploymentSummary(
        deployment=record.deployment,
        project=record.project,
        label=record.label,
        environment=record.environment,
        goal=record.goal,
        state=_state(record, entries, is_alive=is_alive),
        reason=record.reason,
        operator=record.operator,
        host=record.host,
        fence=record.fence,
        started=record.started,
        ended=record.ended,
    )


def _state(record: DeploymentRecord, entries: Iterable[JournalEntry], *, is_alive: bool) -> DeploymentState:
    if record.state != "running":
        return ev.outcome_of(record.state, record.reason)
    if asks_open(entries) or machines_asked(entries):
        return "waiting"
    if is_paused(entries):
        return "paused"
    return "running" if is_alive else "interrupted"


# --- what waits for people


def asks_open(entries: Iterable[JournalEntry]) -> tuple[AskView, ...]:
    """The questions that wait for answers, in the order in which they were asked; none once the deployment has ended."""
    found: dict[str, AskView] = {}
    for entry in entries:
        match entry.event:
            case ev.AskOpened(ask=ask, step=step, name=name, text=text, at=at):
                found.setdefault(ask, AskView(ask, step, name, text, entry.at, at))
            case ev.AskClosed(ask=ask):
                found.pop(ask, None)
            case ev.Ended():
                found.clear()
            case _:
                pass
    return tuple(found.values())


def machines_asked(entries: Iterable[JournalEntry]) -> tuple[WaitingMachine, ...]:
    """The machines that wait for a person, in the order in which they began to. As `asks_open`."""
    found: dict[tuple[str, int], WaitingMachine] = {}
    for entry in entries:
        match entry.event:
            case ev.MachineAsked(machine=machine, step=step, reason=reason, choices=choices):
                asked = found.get((machine, step))
                since = asked.since if asked else entry.at
                found[machine, step] = WaitingMachine(machine, step, reason, choices, since)
            case ev.MachineDecided(machine=machine, step=step) | ev.TurnEnded(machine=machine, step=step):
                found.pop((machine, step), None)
            case ev.Ended():
                found.clear()
            case _:
                pass
    return tuple(found.values())


def is_paused(entries: Iterable[JournalEntry]) -> bool:
    """Nothing new starts before a person says so."""
    return pause_of(entries) is not None


def pause_of(entries: Iterable[JournalEntry]) -> PauseView | None:
    """Why and since when nothing new starts; None where things go on."""
    paused = None
    for entry in entries:
        match entry.event:
            case ev.Paused(reason=reason, by=by):
                paused = PauseView(reason, by, entry.at)
            case ev.Unpaused():
                paused = None
            case _:
                pass
    return paused


# --- what a resume and the next deployment ask


def open_brackets(deployments: Iterable[tuple[DeploymentRecord, Sequence[JournalEntry]]]) -> list[OpenBracket]:
    """All that is open, oldest first.

    A bracket is one machine in one rotation of an environment, opened and closed by any deployment: so all deployments of an
    environment belong in here (`Journal.brackets` has just what is needed of them).
    """
    told = [(entry, record) for record, entries in deployments for entry in entries]
    found: dict[tuple[str, str, str], OpenBracket] = {}
    for entry, record in sorted(told, key=lambda pair: pair[0].number):
        event = entry.event
        if isinstance(event, BracketEvent):
            key = (record.environment, event.rotation, event.machine)
            after = bracket_after(found.pop(key, None), record, entry, event)
            if after is not None:
                found[key] = after
    return sorted(found.values(), key=lambda bracket: bracket.number)


BracketEvent = ev.BracketOpened | ev.BracketClosed | ev.BracketAdopted


def bracket_after(
    bracket: OpenBracket | None, record: DeploymentRecord, entry: JournalEntry, event: BracketEvent
) -> OpenBracket | None:
    """What becomes of a machine's bracket in a rotation (None: it is closed) by an entry of the deployment `record`."""
    match event:
        case ev.BracketClosed():
            return None
        case ev.BracketOpened() if bracket is None:
            return OpenBracket(
                machine=event.machine,
                rotation=event.rotation,
                environment=record.environment,
                deployment=record.deployment,
                label=record.label,
                since=entry.at,
                step=event.step,
                number=entry.number,
                project=record.project,
            )
        case _:
            if bracket is None or (isinstance(event, ev.BracketOpened) and bracket.owner == record.deployment):
                return bracket
            return msgspec.structs.replace(bracket, adopted_by=record.deployment, project=record.project)


def operations(entries: Iterable[JournalEntry]) -> dict[str, OperationView]:
    """Every operation that was about to begin, by its id, in the order of their beginnings.

    An order sent again keeps its result, as an agent acts once; a run on the server that began again has none yet.
    """
    found: dict[str, OperationView] = {}
    for entry in entries:
        match entry.event:
            case ev.Dispatched(operation=operation, machine=machine, order=order):
                known = found.get(operation)
                found[operation] = known or OperationView(operation, machine, order, entry.at)
            case ev.ServerRunDispatched(operation=operation, machine=machine):
                known = found.get(operation)
                found[operation] = OperationView(operation, machine, "", known.since if known else entry.at)
            case ev.Reported() | ev.ServerRunEnded() as result if result.state in FINAL:
                known = found.get(result.operation) or OperationView(result.operation, result.machine, "", entry.at)
                found[result.operation] = msgspec.structs.replace(known, result=result)
    return found


def turns(entries: Iterable[JournalEntry]) -> dict[tuple[int, str], TurnView]:
    """The last turn of each (step, machine), in the order in which they first began."""
    found: dict[tuple[int, str], TurnView] = {}
    for entry in entries:
        match entry.event:
            case ev.TurnStarted(machine=machine, step=step):
                last = found.get((step, machine))
                if last is None or last.ended is not None:
                    begun = last.begun + 1 if last else 1
                    found[step, machine] = TurnView(machine, step, entry.at, begun=begun)
            case ev.TurnEnded() as end:
                last = found.get((end.step, end.machine)) or TurnView(end.machine, end.step, entry.at)
                found[end.step, end.machine] = msgspec.structs.replace(
                    last,
                    ended=entry.at,
                    outcome=end.outcome,
                    failure=end.failure,
                    stop_roll=end.stop_roll,
                    reason=end.reason,
                )
    return found


def behind(entries: Iterable[JournalEntry]) -> tuple[BehindView, ...]:
    """Relays that have not got everything, each package once, with the newest reason."""
    found: dict[tuple[str, str, str], BehindView] = {}
    for entry in entries:
        match entry.event:
            case ev.RelayBehind(relay=relay, package=package, version=version, reason=reason):
                since = found[relay, package, version].at if (relay, package, version) in found else entry.at
                found[relay, package, version] = BehindView(since, relay, package, version, reason)
            case ev.Replicated(relay=relay, package=package, version=version):
                found.pop((relay, package, version), None)
            case _:
                pass
    return tuple(found.values())


# --- the parts of a view


def _stage(record: DeploymentRecord, entries: Iterable[JournalEntry]) -> Stage:
    if record.state != "running":
        return "ended"
    stage: Stage = "pre_acquire"
    for entry in entries:
        match entry.event:
            case ev.Surveyed() | ev.Replicated() | ev.Acquired() | ev.Dispatched() if stage == "pre_acquire":
                stage = "acquisition"
            case ev.Barrier() | ev.StepStarted():
                return "steps"
    return stage


def _pre_acquire(entries: Iterable[JournalEntry], plan: Plan | None) -> tuple[PreAcquireView, ...]:
    found = {one.run.name: PreAcquireView(one.run.name, "waiting", "none") for one in plan.pre_acquire} if plan else {}
    for entry in entries:
        match entry.event:
            case ev.PreAcquireStarted(name=name, undo_due=due):
                found[name] = PreAcquireView(name, "running", "due" if due else "none", entry.at)
            case ev.PreAcquireEnded(name=name, ok=ok, undo_due=due, reason=reason):
                since = found[name].since if name in found else entry.at
                found[name] = PreAcquireView(name, _end(ok=ok), "due" if due else "none", since, reason)
            case ev.UndoStarted(name=name) if name in found:
                found[name] = msgspec.structs.replace(found[name], undo="running")
            case ev.UndoEnded(name=name, ok=ok, reason=reason) if name in found:
                undone: UndoState = "done" if ok else "failed"
                found[name] = msgspec.structs.replace(found[name], undo=undone, reason=reason or found[name].reason)
    return tuple(found.values())


def _steps(entries: Sequence[JournalEntry], plan: Plan | None) -> tuple[StepView, ...]:
    found: dict[int, StepView] = {}
    for step in plan.steps if plan else ():
        count = len(step.turns) if isinstance(step, MachineStep) else 0
        found[step.number] = StepView(step.number, step.name, "waiting", machines=count)
    for entry in entries:
        match entry.event:
            case ev.StepStarted(step=number, name=name):
                known = found.get(number, StepView(number, name, "waiting"))
                # A step that failed and begins again (`retry`) has no end any more, but its first beginning.
                since = entry.at if known.started is None else known.started
                found[number] = msgspec.structs.replace(known, state="running", started=since, ended=None, reason="")
            case ev.StepEnded(step=number, ok=ok, skipped=skipped, reason=reason):
                known = found.get(number, StepView(number, "", "waiting"))
                state: StepState = "skipped" if skipped else _end(ok=ok)
                found[number] = msgspec.structs.replace(known, state=state, ended=entry.at, reason=reason)
    begun = turns(entries).values()
    return tuple(
        msgspec.structs.replace(step, turns=tuple(turn for turn in begun if turn.step == step.number))
        for step in sorted(found.values(), key=lambda step: step.number)
    )


def _machines(
    entries: Sequence[JournalEntry], plan: Plan | None, brackets: Sequence[OpenBracket]
) -> tuple[MachineView, ...]:
    began, known, away = turns(entries), _versions(entries), left(entries)
    ordered = operations(entries).values()
    doing = {one.machine: action_of(one.operation) for one in ordered if one.result is None}
    stages = _acquisition_stages(entries)
    named = [machine.name for machine in plan.machines] if plan else []
    named += [*stages, *(machine for _, machine in began), *(one.machine for one in ordered if one.machine)]
    views = []
    for name in dict.fromkeys(named):
        mine = sorted((turn for turn in began.values() if turn.machine == name), key=lambda turn: turn.started)
        flying = [turn for turn in mine if turn.ended is None]
        through = [turn for turn in mine if turn.ended is not None]
        last = max(through, key=lambda turn: turn.ended or 0.0) if through else None
        planned = len(plan.steps_with(name)) if plan else 1
        stage = stages.get(name, "waiting")
        if flying:
            stage = "in flight"
        elif last and len(through) >= planned:
            stage = "through"
        views.append(
            MachineView(
                name=name,
                stage=stage,
                version=", ".join(dict.fromkeys(known.get(name, {}).values())),
                step=mine[-1].step if mine else 0,
                since=flying[0].started if flying else None,
                doing=doing.get(name, ""),
                outcome=last.outcome if last else "",
                failure=any(turn.failure for turn in through),
                reason=last.reason if last else away[name].reason if name in away else "",
                out_since=min((one.since for one in brackets if one.machine == name), default=None),
            )
        )
    return tuple(views)


def _acquisition_stages(entries: Iterable[JournalEntry]) -> dict[str, MachineStage]:
    found: dict[str, MachineStage] = {}
    for entry in entries:
        match entry.event:
            case ev.Surveyed(machine=machine) if found.get(machine) != "acquired":
                found[machine] = "surveyed"
            case ev.Dispatched(machine=machine, operation=operation) if action_of(operation) == "acquire":
                if found.get(machine) != "acquired":
                    found[machine] = "acquiring"
            case ev.Reported(machine=machine, operation=operation, state=state) if action_of(operation) == "acquire":
                if state != "done" and found.get(machine) == "acquiring":
                    found[machine] = "surveyed"
            case ev.Acquired(machine=machine):
                found[machine] = "acquired"
            case ev.Barrier(excluded=excluded):
                found |= dict.fromkeys(excluded, "excluded")
            case ev.Left(machine=machine):
                found[machine] = "excluded"
    return found


def left(entries: Iterable[JournalEntry]) -> dict[str, LeftView]:
    """Machines that take no part, by name; each as it was said first."""
    found: dict[str, LeftView] = {}
    for entry in entries:
        match entry.event:
            case ev.Left(machine=machine, reason=reason, by=by):
                found.setdefault(machine, LeftView(entry.at, machine, reason, by))
            case ev.Barrier(excluded=excluded):
                for machine, reason in excluded.items():
                    found.setdefault(machine, LeftView(entry.at, machine, reason))
    return found


def _versions(entries: Iterable[JournalEntry]) -> dict[str, dict[str, str]]:
    """What is current on each machine, by root: as surveyed, then as switched."""
    current: dict[str, dict[str, str]] = {}
    of_trees: dict[tuple[str, str], str] = {}
    for entry in entries:
        match entry.event:
            case ev.Surveyed(machine=machine, facts=facts):
                for there in facts.trees:
                    if there.root and there.current_version:
                        current.setdefault(machine, {})[there.root] = there.current_version
            case ev.Acquired(machine=machine, facts=acquired):
                of_trees |= {(machine, tree.path): tree.version for tree in acquired.trees}
            case ev.Reported(machine=machine, state="done", facts=SwitchFacts(before=before, after=after)):
                root = posixpath.dirname(posixpath.dirname(after))  # ROOT/releases/TREE
                roots = current.setdefault(machine, {})
                if before and root in roots:
                    of_trees.setdefault((machine, before), roots[root])
                roots[root] = of_trees.get((machine, after), "unknown")
    return current


def _notes(entries: Iterable[JournalEntry]) -> Iterable[NoteView]:
    for entry in entries:
        match entry.event:
            case ev.Note(text=text, machine=machine, step=step):
                yield NoteView(entry.at, text, machine, step)
            case ev.Notified(event=event, target=target, error=error) if error:
                yield NoteView(entry.at, f"{target} was not told of '{event}': {error}")
            case ev.UndoEnded(name=name, ok=False, reason=reason):
                yield NoteView(entry.at, f"the undo of '{name}' failed: {reason}")


def _end(*, ok: bool) -> StepState:
    return "done" if ok else "failed"
