"""What stands outside of the orchestrator's process, and stays when it dies: journal, order book, agents, what runs on the
server, the balancer, and people. All that happens here is a matter of time and of the seed's fate.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from agent.orders.operation_id import OperationId
from agent.orders.orders import (
    Acquire,
    AcquireFacts,
    ControlService,
    Facts,
    OpenAction,
    RunScript,
    Settle,
    State,
    Survey,
    SurveyFacts,
    Switch,
    SwitchFacts,
    TreeFacts,
    TreePulled,
    Verify,
)
from orchestrator.journal import events as ev
from orchestrator.journal.events import JournalEntry
from orchestrator.journal.journal import Decision
from orchestrator.plan.plan import ServerRun
from simulation.people import rows_about
from simulation.scenario import BEGINS, DEPLOYMENT, EARLIER, NEW, OLD, Scenario

LOST: Final = 2.0
"""Seconds after which a machine that no relay has seen is lost."""
ACCEPT: Final = 3600.0

What = tuple[int, str, str]
"""Step, machine or server, action: what all attempts have in common."""


@dataclass(frozen=True, slots=True)
class Order:
    """As it was signed: the same bytes for ever. `key`: the text of its operation."""

    operation: OperationId
    key: str
    action: OpenAction
    fence: int
    until: float

    @property
    def digest(self) -> str:
        return f"{self.key} {self.fence} {self.until}"


@dataclass(frozen=True, slots=True)
class Execution:
    """Something that really ran, once. `n` counts those of the same `what`, from 1."""

    what: What
    n: int
    begin: float
    end: float
    state: Literal["done", "failed", "stopped", "unknown"]
    attempts: int = 1
    is_idempotent: bool = True


@dataclass(frozen=True, slots=True)
class Began:
    """An operation of an agent, or an attempt on the server: which execution it is."""

    index: int
    reason: str = ""
    facts: Facts | None = None


@dataclass
class World:
    """See the module. `now` is the clock of everybody, in seconds since 1970."""

    scenario: Scenario
    now: float = BEGINS
    # The orchestrator's disk.
    entries: list[JournalEntry] = field(default_factory=list)
    state: ev.WrittenState = "running"
    fence: int = 0
    book: dict[str, Order] = field(default_factory=dict)
    folders: dict[What, int] = field(default_factory=dict)
    rows: list[Decision] = field(default_factory=list)
    taken: set[int] = field(default_factory=set)
    # Agents.
    operations: dict[str, Began] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    fences: dict[str, int] = field(default_factory=dict)
    current: dict[tuple[str, str], str] = field(default_factory=dict)
    settled: dict[tuple[str, str], str] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    held: dict[str, tuple[Order, ...]] = field(default_factory=dict)
    lost: set[What] = field(default_factory=set)
    # The server, and the balancer.
    runs: dict[str, Began] = field(default_factory=dict)
    inside: set[str] = field(default_factory=set)
    # All of it.
    executions: list[Execution] = field(default_factory=list)
    counts: dict[What, int] = field(default_factory=dict)
    pending: dict[object, tuple[float, str, tuple[Any, ...]]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, scenario: Scenario) -> World:
        """At the beginning."""
        world = cls(scenario)
        world.current |= scenario.current
        world.settled |= scenario.settled
        world.gone |= scenario.offline
        plan = scenario.plan
        names = [machine.name for machine in plan.machines]
        beside = {turn.machine for step in scenario.machine_steps for turn in step.beside}
        world.inside = {*names, *beside} - scenario.outside - set(plan.excluded)
        for machine in sorted(scenario.brackets):
            world.entries.append(
                JournalEntry(len(world.entries) + 1, EARLIER, BEGINS - 100, ev.BracketOpened(machine, "web", 1))
            )
        return world

    def clone(self) -> World:
        """The same, and apart from it from now on."""
        other = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, dict | list | set):
                setattr(other, name, value.copy())
        return other

    @property
    def mine(self) -> list[JournalEntry]:
        """Entries of the deployment."""
        return [entry for entry in self.entries if entry.deployment == DEPLOYMENT]

    @property
    def left(self) -> set[str]:
        """Machines that a rule left out."""
        return {entry.event.machine for entry in self.entries if isinstance(entry.event, ev.Left)}

    # --- time

    def advance(self) -> None:
        """Let happen what was to happen by now."""
        while self.pending:
            key, (at, what, arguments) = min(self.pending.items(), key=lambda item: item[1][0])
            if at > self.now:
                return
            del self.pending[key]
            getattr(self, f"_{what}")(at, *arguments)

    def later(self, seconds: float, what: str, *arguments: Any, key: object = None) -> None:
        self.pending[key or (what, len(self.pending), self.now, arguments)] = (self.now + seconds, what, arguments)

    # --- the journal

    def write(self, *events: ev.Event) -> int:
        self.advance()
        for event in events:
            self.entries.append(JournalEntry(len(self.entries) + 1, DEPLOYMENT, self.now, event))
            self.rows += rows_about(self, event)
        return len(self.entries)

    # --- agents

    def post(self, order: Order) -> None:
        """Put it into the mail: it arrives whatever becomes of its sender."""
        key = order.key
        if key not in self.operations:
            self.refused.pop(key, None)
            slow = self.scenario.fate("mail", key)
            if slow < 0.6 and key not in self.pending:
                self._arrive(self.now, order)
            else:
                self.later(0.05 * slow, "arrive", order, key=key)

    def _arrive(self, at: float, order: Order) -> None:
        operation, machine = order.operation, order.operation.who
        key, what = order.key, _what(operation)
        if key in self.operations:
            return
        if machine in self.gone:
            self.held[machine] = (*self.held.get(machine, ()), order)
            return
        # Of what becomes lost, it happens once: whoever comes back stays.
        fate = self._fate_of(order.action, what)
        if fate == "lost before" and what not in self.lost:
            self.lost.add(what)
            self.gone.add(machine)
            self.held[machine] = (*self.held.get(machine, ()), order)
            return
        if order.fence < self.fences.get(machine, 0):
            self.refused[key] = "fenced off"
            return
        if at > order.until:
            self.refused[key] = "expired"
            return
        self.fences[machine] = order.fence
        fate = "done" if fate == "lost before" else fate
        self._perform(at, order, key, what, fate)

    def _fate_of(self, action: OpenAction, what: What) -> str:
        prepares = isinstance(action, Survey | Acquire)
        # What prepares is tried again by a resume; it fails each time or never.
        nth = 0 if prepares else self.counts.get(what, 0) + 1
        if not self.scenario.fails(what, nth) or (prepares and self.scenario.fate("prepares", what) < 0.7):
            return "done"
        options: tuple[str, ...] = ("failed", "failed", "failed", "unknown", "stopped", "lost before", "lost after")
        if isinstance(action, Settle | Acquire):
            options = ("failed", "lost before", "lost after")
        elif isinstance(action, Survey):
            options = ("failed", "lost before")
        return self.scenario.one_of(options, "how", what, nth)

    def _perform(self, at: float, order: Order, key: str, what: What, fate: str) -> None:
        machine, action = order.operation.who, order.action
        facts: Facts | None = None
        effect: tuple[str, tuple[Any, ...]] | None = None
        if fate == "lost after":
            if what not in self.lost:
                self.lost.add(what)
                self.gone.add(machine)
            fate = self.scenario.one_of(("done", "done", "failed", "unknown"), "after", what)
        attempts, is_idempotent = 1, not isinstance(action, RunScript | ControlService)
        match action:
            case Survey(trees=trees):
                facts = SurveyFacts(tuple(self._tree(machine, tree.root, tree.manifest) for tree in trees))
            case Acquire(trees=trees):
                facts = AcquireFacts(
                    tuple(TreePulled(tree.id, tree.version, tree.root, already=True, tree_bytes=1) for tree in trees)
                )
            case Switch(root=root, manifest=manifest):
                facts = SwitchFacts(self.current.get((machine, root), ""), manifest)
                may_have = fate in {"unknown", "stopped"} and self.scenario.fate("half", what) < 0.5
                if fate == "done" or may_have:
                    effect = ("switched", (machine, root, manifest))
            case Verify(root=root):
                wanted = OLD if what[2].startswith("verify-old") else NEW.get(root.rpartition("/")[2], "")
                if root and fate == "done" and self.current.get((machine, root)) != wanted:
                    fate = "failed"
            case Settle(root=root, fingerprint=fingerprint):
                effect = ("remembered", (machine, root, fingerprint)) if fate == "done" else None
            case RunScript() | ControlService():
                attempts, is_idempotent = self._planned(what), action.idempotent
            case _:
                raise AssertionError(f"{action} is not ordered here")
        seconds = 0.05 + 0.5 * self.scenario.fate("takes", what, self.counts.get(what, 0))
        if isinstance(action, Switch | Settle | RunScript | ControlService):
            # An agent changes its machine by one thing at a time, in the order in which they came.
            at = max(at, self.busy.get(machine, 0.0))
            self.busy[machine] = at + seconds
        index = self._began(what, at, seconds, fate, attempts, is_idempotent=is_idempotent)
        self.operations[key] = Began(index, "" if fate == "done" else f"it {fate}", facts if fate == "done" else None)
        if effect is not None:
            name, arguments = effect
            self.pending["effect", index] = (at + seconds, name, arguments)

    def _planned(self, what: What) -> int:
        number, machine, name = what
        name = name.removeprefix("back-")
        [step] = [step for step in self.scenario.machine_steps if step.number == number]
        [turn] = [turn for turn in step.turns if turn.machine == machine]
        return int(getattr(turn.actions[int(name.partition("-")[0]) - 1], "attempts", 1))

    def _tree(self, machine: str, root: str, manifest: str) -> TreeFacts:
        current = self.current.get((machine, root), "")
        version = {"": "", OLD: "1.0"}.get(current, "2.0")
        return TreeFacts(
            root,
            manifest,
            1 << 40,
            installed=True,
            current_manifest=current,
            current_version=version,
            current_path=current and f"{root}/releases/{current}",
            settled=self.settled.get((machine, root), ""),
        )

    def _switched(self, at: float, machine: str, root: str, manifest: str) -> None:
        self.current[machine, root] = manifest
        self.settled.pop((machine, root), None)

    def _remembered(self, at: float, machine: str, root: str, fingerprint: str) -> None:
        self.settled[machine, root] = fingerprint

    def _mended(self, at: float, machine: str) -> None:
        """The machine comes back, and finds what lay in its mail."""
        self.gone.discard(machine)
        for order in self.held.pop(machine, ()):
            self._arrive(at, order)

    def stop(self, operation: OperationId) -> None:
        """Whoever runs it hears of this, if it is there."""
        began = self.operations.get(str(operation))
        if began is not None and operation.who not in self.gone:
            self.operations[str(operation)] = replace(began, reason="it was stopped", facts=None)
            self._stop(began.index)

    def _stop(self, index: int) -> None:
        execution = self.executions[index]
        if execution.end > self.now:
            self.executions[index] = replace(execution, end=self.now, state="stopped")
            if self.scenario.fate("stops", execution.what) < 0.5:
                self.pending.pop(("effect", index), None)

    # --- the server

    def launch(self, run: ServerRun, operation: OperationId) -> None:
        """Begin this attempt, unless it began."""
        self.advance()
        key, what = str(operation), _what(operation)
        if key in self.runs:
            return
        state = self._outcome_here(run, what)
        seconds = 0.05 + (0.2 if what[2] == "probe" else 0.7) * self.scenario.fate(
            "takes", what, self.counts.get(what, 0)
        )
        index = self._began(what, self.now, seconds, state, run.attempts, is_idempotent=run.idempotent)
        self.runs[key] = Began(index, "" if state == "done" else f"it {state}")
        if what[2] == "before" and (state == "done" or self.scenario.fate("halfway", what) < 0.5):
            self._leave(operation.who, what[0])
        if what[2] == "after" and (state == "done" or self.scenario.fate("halfway", what) < 0.5):
            self.pending["effect", index] = (self.now + seconds, "entered", (operation.who,))

    def _outcome_here(self, run: ServerRun, what: What) -> str:
        _, who, action = what
        nth = self.counts.get(what, 0) + 1
        if action in {"before", "after"}:
            # So many fail, and then none ever again: to run it once more, as a resume may, changes nothing.
            times = int(self.scenario.one_of(("1", "2", "99", "99"), "times", what))
            return "failed" if self.scenario.fails(what) and nth <= times else "done"
        if action == "probe":
            return "done" if who in self.inside else "failed"
        if not self.scenario.fails(what, nth):
            return "done"
        return self.scenario.one_of(("failed", "failed", "unknown"), "how", what, nth)

    def probed(self, operation: OperationId) -> int | None:
        """The exit status of a look at the balancer."""
        nth = self.counts[_what(operation)]
        if self.scenario.fails("probe", operation.who, nth // 3):
            return 2
        return 0 if operation.who in self.inside else 1

    def _leave(self, machine: str, number: int) -> None:
        if machine not in self.inside:
            return
        self.inside.discard(machine)
        [step] = [step for step in self.scenario.machine_steps if step.number == number]
        serving = self.inside.intersection(turn.machine for turn in (*step.turns, *step.beside))
        if len(serving) < step.min_in_service:
            self.faults.append(
                f"{machine} was taken out, and only {len(serving)} of {step.min_in_service} are in service"
            )

    def _entered(self, at: float, machine: str) -> None:
        self.inside.add(machine)

    def stop_run(self, operation: OperationId) -> None:
        began = self.runs.get(str(operation))
        if began is not None:
            self.runs[str(operation)] = replace(began, reason="it was stopped")
            self._stop(began.index)

    # --- what ran

    def _began(self, what: What, at: float, seconds: float, state: str, attempts: int, *, is_idempotent: bool) -> int:
        n = self.counts[what] = self.counts.get(what, 0) + 1
        self.executions.append(
            Execution(what, n, at, at + seconds, state, attempts, is_idempotent)  # type: ignore[arg-type]
        )
        return len(self.executions) - 1

    def state_of(self, began: Began) -> State:
        execution = self.executions[began.index]
        return "running" if execution.end > self.now else execution.state

    def really_ran(self, what: What) -> list[Execution]:
        return [each for each in self.executions if each.what == what]


def _what(operation: OperationId) -> What:
    return operation.step, operation.who, operation.action


def people_rows(world: World) -> Iterable[Decision]:
    """Those that were written by now and are not taken up, oldest first."""
    return sorted(
        (row for row in world.rows if row.at <= world.now and row.number not in world.taken), key=lambda row: row.at
    )
