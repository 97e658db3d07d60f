"""What must hold of every run, read from its journal and from the world beside it. It knows the plan, and nothing of how the
engine decides.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import accumulate, pairwise

from orchestrator.deployment.deployment import Result
from orchestrator.journal import events as ev
from orchestrator.journal.events import JournalEntry
from orchestrator.people.asks import planned_asks
from orchestrator.people.statement import Approve, Decide, Reject
from orchestrator.plan.leave_out import without
from orchestrator.plan.plan import MachineStep, PlannedPhase, ServerStep
from simulation.people import counts
from simulation.scenario import DEPLOYMENT, EARLIER, NEW, OLD
from simulation.world import Execution, World

AT_ONCE = 1.0
"""Seconds in which a pause or a cancel takes hold."""


def broken(world: World, result: Result) -> list[str]:
    """Every promise that this run did not keep, in words. `result`: of its last process, at the end of the deployment."""
    world.advance()
    entries, steps = world.mine, steps_of(world)
    return [
        *world.faults,
        *_of_rolls(steps, entries),
        *_of_stops(entries),
        *_of_gates(world, steps, entries),
        *_of_asks(world, entries),
        *_of_machines_words(world, entries),
        *_of_brackets(world, entries, result),
        *_of_turns(world, steps, entries),
        *_of_executions(world, entries),
        *_of_undos(world, entries, result),
        *_of_the_end(world, entries, result),
    ]


def steps_of(world: World) -> list[MachineStep]:
    """Those over machines, without whoever a rule has left out."""
    plan = world.scenario.plan
    for machine in sorted(world.left):
        plan = without(plan, machine, "left") if machine in {each.name for each in plan.machines} else plan
    return [step for step in plan.steps if isinstance(step, MachineStep)]


# --- who starts when


def _of_rolls(steps: list[MachineStep], entries: list[JournalEntry]) -> Iterator[str]:
    for step in steps:
        phases = step.phases if step.strategy == "rolling" else (PlannedPhase(0, len(step.turns)),)
        ends = list(accumulate(phase.machines or len(step.turns) for phase in phases))
        started: list[str] = []
        ended: dict[str, ev.TurnEnded] = {}
        known: dict[str, float] = {}
        gates: set[int] = set()
        for entry in entries:
            match entry.event:
                case ev.TurnStarted(machine=machine, step=step.number):
                    phase = next((i for i, end in enumerate(ends) if len(started) < end), len(phases) - 1)
                    # What ends in the same moment may not be known yet.
                    before = {name: end for name, end in ended.items() if known[name] < entry.at}
                    yield from _of_start(step, phases, ends, phase, machine, started, ended, before, gates)
                    started.append(machine)
                case ev.TurnEnded(machine=machine, step=step.number) as end:
                    if machine in ended:
                        yield f"the turn of {machine} in step {step.number} ended twice"
                    ended[machine], known[machine] = end, entry.at
                case ev.GatePassed(step=step.number, phase=phase):
                    gates.add(phase - 1)
                    if set(started) - set(ended):
                        yield f"gate {phase} was passed with {set(started) - set(ended)} in flight"
                    if phase - 1 < len(ends) and len(started) < ends[phase - 1] and len(ended) < len(step.turns):
                        yield f"gate {phase} was passed before its phase was through"


def _of_start(
    step: MachineStep,
    phases: tuple[PlannedPhase, ...],
    ends: list[int],
    phase: int,
    machine: str,
    started: list[str],
    ended: dict[str, ev.TurnEnded],
    known: dict[str, ev.TurnEnded],
    gates: set[int],
) -> Iterator[str]:
    if machine in started:
        yield f"{machine} started twice in step {step.number}"
    if machine not in {turn.machine for turn in step.turns}:
        yield f"{machine} has no turn in step {step.number}"
    flying = set(started) - set(ended)
    if len(flying) >= phases[phase].window:
        yield f"{machine} started beside {sorted(flying)}, with a window of {phases[phase].window}"
    first = ends[phase - 1] if phase else 0
    if flying.intersection(started[:first]):
        yield f"{machine} started before phase {phase} was through"
    for before in range(phase):
        if phases[before].gate is not None and before not in gates:
            yield f"{machine} started before gate {before + 1}"
    failures = [end.machine for end in known.values() if end.failure]
    if len(failures) > step.max_failures:
        yield f"{machine} started after {failures} had failed, and {step.max_failures} may"
    if any(end.stop_roll for end in known.values()):
        yield f"{machine} started after the capacity was not known any more"


def _of_stops(entries: list[JournalEntry]) -> Iterator[str]:
    """Nothing new after a cancel, nor in a pause."""
    since: float | None = None
    cancelled: float | None = None
    for entry in entries:
        match entry.event:
            case ev.Paused():
                since = entry.at
            case ev.Unpaused():
                since = None
            case ev.DecisionTaken(what="cancel"):
                cancelled = entry.at
            case ev.TurnStarted() | ev.StepStarted() as event:
                for when, why in ((since, "a pause"), (cancelled, "a cancel")):
                    if when is not None and entry.at > when + AT_ONCE:
                        yield f"{event} {entry.at - when:.2f} s after {why}"
            case ev.ServerRunDispatched(operation=operation) if "/server/gate-" in operation:
                if cancelled is not None and entry.at > cancelled + AT_ONCE:
                    yield f"{operation} {entry.at - cancelled:.2f} s after a cancel"


# --- people


def _of_gates(world: World, steps: list[MachineStep], entries: list[JournalEntry]) -> Iterator[str]:
    """Whoever is passed has said yes before."""
    agreed: set[str] = set()
    checked: set[tuple[int, str]] = set()
    asks = planned_asks(world.scenario.plan)
    for entry in entries:
        match entry.event:
            case ev.AskClosed(ask=ask, outcome=outcome):
                if outcome == "approved" or (outcome == "expired" and asks[ask].on_expiry == "proceed"):
                    agreed.add(ask)
            case ev.ServerRunEnded(operation=operation, state="done") if "/server/gate-" in operation:
                _, step, _, action, _ = operation.split("/")
                checked.add((int(step), action))
            case ev.GatePassed(step=number, phase=phase, name=name):
                [step] = [step for step in steps if step.number == number]
                gate = step.phases[phase - 1].gate
                if gate is None:
                    yield f"{name} is no gate"
                elif gate.ask is not None and f"{number}/{name}" not in agreed:
                    yield f"{name} was passed and nobody agreed"
                elif gate.check is not None and (number, f"gate-{phase}") not in checked:
                    yield f"{name} was passed and its check never said yes"


def _of_asks(world: World, entries: list[JournalEntry]) -> Iterator[str]:
    asks = planned_asks(world.scenario.plan)
    opened: dict[str, float] = {}
    rows = {row.number: row for row in world.rows}
    taken = {entry.event.decision for entry in entries if isinstance(entry.event, ev.DecisionTaken)}
    for entry in entries:
        match entry.event:
            case ev.AskOpened(ask=ask):
                if ask in opened:
                    yield f"{ask} was asked twice"
                opened[ask] = entry.at
            case ev.AskAnswered(ask=ask, decision=number, by=by):
                row = rows[number]
                if row.data["said"].ask != ask or row.envelope != b"signed" or not counts(asks[ask], by):
                    yield f"{by}'s row {number} ({row.data['said']}) was taken for an answer to {ask}"
            case ev.AskClosed(ask=ask, outcome=outcome):
                planned, said = (
                    asks[ask],
                    [row for row in world.rows if row.at <= entry.at and row.envelope == b"signed"],
                )
                late = opened[ask] + planned.expires if planned.expires and planned.on_expiry != "pause" else None
                mine = [
                    row
                    for row in said
                    if isinstance(row.data["said"], Approve | Reject)
                    and row.data["said"].ask == ask
                    and counts(planned, row.operator)
                    and (late is None or row.at <= late + 0.1)
                ]
                yes = {row.operator for row in mine if row.kind == "approve"}
                no = [row for row in mine if row.kind == "reject"]
                if outcome == "approved" and len(yes) < planned.minimum:
                    yield f"{ask} is approved by {sorted(yes)}, and {planned.minimum} are needed"
                if outcome == "rejected" and not no:
                    yield f"{ask} is rejected, and nobody said no"
                if outcome == "expired" and (
                    late is None or entry.at < late - 0.1 or len(yes) >= planned.minimum or no
                ):
                    yield f"{ask} has expired, at {entry.at - opened[ask]:.1f} of {planned.expires}"
    for row in world.rows:
        if row.at < world.now - AT_ONCE and row.number not in taken and row.at < entries[-1].at - AT_ONCE:
            yield f"row {row.number} ({row.kind} of {row.operator}) was never taken up"


def _of_machines_words(world: World, entries: list[JournalEntry]) -> Iterator[str]:
    """An answer for one machine is not applied to another, nor to another question."""
    rows = {row.number: row for row in world.rows}
    asked: dict[tuple[str, int], tuple[float, tuple[str, ...]]] = {}
    open_: set[tuple[str, int]] = set()
    used: Counter[int] = Counter()
    last: dict[tuple[str, int], str] = {}
    for entry in entries:
        match entry.event:
            case ev.MachineAsked(machine=machine, step=step, choices=choices):
                if (machine, step) in open_:
                    yield f"{machine} was asked about twice"
                asked[machine, step] = (entry.at, choices)
                open_.add((machine, step))
            case ev.MachineDecided(machine=machine, step=step, what=what, decision=number):
                row = rows[number]
                said, (since, choices) = row.data["said"], asked.get((machine, step), (0.0, ()))
                used[number] += 1
                if (machine, step) not in open_:
                    yield f"{machine} was decided about, and nobody asked"
                open_.discard((machine, step))
                last[machine, step] = what
                if not isinstance(said, Decide) or (said.machine, said.step, said.what) != (machine, step, what):
                    yield f"row {number} ({said}) was applied to {machine}: {what}"
                elif row.envelope != b"signed" or row.at < since or what not in (*choices, "fail"):
                    yield f"row {number} ({said}) does not count for {machine}"
            case ev.TurnEnded(machine=machine, step=step, outcome=outcome):
                word = last.get((machine, step))
                if outcome == "excluded" and word != "exclude":
                    yield f"{machine} is excluded, and a person said {word}"
                if outcome == "put_back" and word != "put-back":
                    yield f"{machine} is put back, and a person said {word}"
                if word == "exclude" and outcome != "excluded":
                    yield f"{machine} was to be excluded, and is {outcome}"
    for number, times in used.items():
        if times > 1:
            yield f"row {number} was obeyed {times} times"


# --- brackets


def _of_brackets(world: World, entries: list[JournalEntry], result: Result) -> Iterator[str]:
    open_ = {entry.event.machine for entry in world.entries if entry.deployment == EARLIER}  # type: ignore[union-attr]
    adopted: set[str] = set()
    told: dict[str, str] = {}
    for entry in entries:
        match entry.event:
            case ev.BracketOpened(machine=machine):
                open_.add(machine)
            case ev.BracketAdopted(machine=machine):
                adopted.add(machine)
            case ev.BracketClosed(machine=machine, outcome=outcome):
                # Where a process died right behind it, it is said again.
                if machine not in open_ and told.get(machine) != outcome:
                    yield f"the bracket of {machine} was closed, and was not open"
                told[machine] = outcome
                open_.discard(machine)
            case ev.ServerRunDispatched(operation=operation, machine=machine) if operation.split("/")[3] == "before":
                if machine not in open_:
                    yield f"'before' of {machine} began without a bracket"
    mine = {machine.name for machine in world.scenario.plan.machines} & {
        entry.event.machine
        for entry in world.entries
        if entry.deployment == EARLIER  # type: ignore[union-attr]
    }
    if any(isinstance(entry.event, ev.Barrier) for entry in entries) and mine - adopted - set(world.left):
        yield f"the brackets of {sorted(mine - adopted)} were not adopted"
    if set(result.out) != open_:
        yield f"{sorted(open_)} are out, and the result lists {result.out}"
    before = world.scenario.outside | set(world.scenario.plan.excluded)
    for each in {execution.what[1] for execution in world.executions if execution.what[2] == "before"}:
        if each not in world.inside and each not in open_ and each not in before:
            yield f"{each} is out of the balancer, and nobody lists it"


# --- turns


def _of_turns(world: World, steps: list[MachineStep], entries: list[JournalEntry]) -> Iterator[str]:
    begun = {(e.event.step, e.event.machine) for e in entries if isinstance(e.event, ev.TurnStarted)}
    ends = {(e.event.step, e.event.machine): e.event for e in entries if isinstance(e.event, ev.TurnEnded)}
    for step, machine in begun - set(ends):
        yield f"the turn of {machine} in step {step} has no end"
    closed: dict[tuple[int, str], list[str]] = defaultdict(list)
    running: dict[str, int] = {}
    for entry in entries:
        match entry.event:
            case ev.TurnStarted(machine=machine, step=step):
                running[machine] = step
            case ev.BracketClosed(machine=machine, outcome=outcome):
                closed[running.get(machine, 0), machine].append(outcome)
    for (number, machine), end in ends.items():
        [step] = [step for step in steps if step.number == number]
        if end.failure and not end.reason:
            yield f"{machine} failed without a reason"
        if end.outcome not in {"deployed", "already_current"} and not end.reason:
            yield f"{machine} is {end.outcome} without a reason"
        if end.failure != (end.outcome not in {"deployed", "already_current", "excluded", "put_back"}) and not (
            end.outcome == "deployed" and end.failure  # settle failed
        ):
            yield f"{machine} is {end.outcome}, and failure is {end.failure}"
        closes = {"deployed", "kept_old", "rolled_back", "put_back", "not_started"}
        ran_before = world.really_ran((number, machine, "before"))
        if (
            step.rotation is not None
            and end.outcome in closes
            and ran_before
            and end.outcome not in closed[number, machine]
        ):
            yield f"{machine} is {end.outcome}, and 'after' was told {closed[number, machine]}"
        if (
            step.rotation is not None
            and end.outcome in {"excluded", "left_out", "lost"}
            and not end.bracket_open
            and ran_before
        ):
            yield f"{machine} is {end.outcome}, and its bracket is said to be closed"
        yield from _of_versions(world, entries, step, machine, end)


def _of_versions(
    world: World, entries: list[JournalEntry], step: MachineStep, machine: str, end: ev.TurnEnded
) -> Iterator[str]:
    if not step.package:
        return
    root = f"/srv/{step.package}"
    now, before = world.current.get((machine, root), ""), world.scenario.current.get((machine, root), "")
    switches = [
        each for each in world.executions if each.what[:2] == (step.number, machine) and "switch" in each.what[2]
    ]
    unseen = any(each.state in {"unknown", "stopped"} for each in switches) or machine in world.gone
    if end.outcome in {"deployed", "already_current"} and now != NEW[step.package]:
        yield f"{machine} is {end.outcome}, and runs {now[:4]}"
    if end.outcome in {"not_started", "kept_old", "rolled_back"} and now != before and not unseen:
        yield f"{machine} is {end.outcome}, and runs {now[:4]} instead of {before[:4]}"
    if end.outcome == "rolled_back" and now != OLD:
        yield f"{machine} is rolled back, and runs {now[:4]}"
    if end.outcome == "deployed" and any(not check.on_server for check in step.turns[0].verify):
        verified = world.really_ran((step.number, machine, "verify"))
        if not verified or verified[-1].state != "done":
            yield f"{machine} is deployed, and was not verified"


def _of_executions(world: World, entries: list[JournalEntry]) -> Iterator[str]:
    """Nothing runs beside itself; what did its work is not done again, nor what may have, without a person's word."""
    by_what: dict[tuple[int, str, str], list[Execution]] = defaultdict(list)
    for each in world.executions:
        by_what[each.what].append(each)
    retries: dict[tuple[int, str], list[float]] = defaultdict(list)
    for entry in entries:
        match entry.event:
            case ev.MachineDecided(machine=machine, step=step, what="retry"):
                retries[step, machine].append(entry.at)
            case _:
                pass
    for what, ran in by_what.items():
        step, who, action = what
        if action == "probe":
            continue
        for first, then in pairwise(ran):
            if then.begin < first.end - 1e-6:
                yield f"{what} ran beside itself"
        if action in {"before", "after", "survey", "acquire", "settle"} or action.startswith(("verify", "back-switch")):
            continue
        again = retries[step, who]
        for first, then in pairwise(ran):
            asked = any(first.begin <= at <= then.begin for at in again)
            may = first.state == "failed" or (first.state == "unknown" and first.is_idempotent)
            if not may and not (asked and first.state != "done"):
                yield f"{what} ran again, after it {first.state} (execution {first.n})"
        if len(ran) > max(each.attempts for each in ran) * (1 + len(again)):
            yield f"{what} ran {len(ran)} times"


# --- the whole


def _of_undos(world: World, entries: list[JournalEntry], result: Result) -> Iterator[str]:
    begun = {e.event.name for e in entries if isinstance(e.event, ev.PreAcquireStarted)}
    tried = {e.event.name for e in entries if isinstance(e.event, ev.UndoEnded)}
    for step in world.scenario.plan.pre_acquire:
        if step.undo is not None and step.run.name in begun - tried:
            yield f"{step.run.name} was not undone"


def _of_the_end(world: World, entries: list[JournalEntry], result: Result) -> Iterator[str]:
    ends = [entry.event for entry in entries if isinstance(entry.event, ev.Ended)]
    if len(ends) != 1 or not isinstance(entries[-1].event, ev.Ended):
        yield f"it has {len(ends)} ends"
        return
    if (ends[0].state, ends[0].reason) != (result.state, result.reason) or world.state != result.state:
        yield f"the journal ends with {ends[0]}, the process with {result.state}"
    if result.state != "succeeded" and not result.reason:
        yield f"it {result.state} without a reason"
    steps = {e.event.step: e.event for e in entries if isinstance(e.event, ev.StepEnded)}
    for step in steps.values():
        if not step.ok and not step.reason:
            yield f"step {step.step} failed without a reason"
    turns = {(e.event.step, e.event.machine): e.event for e in entries if isinstance(e.event, ev.TurnEnded)}
    failed = {machine for (_, machine), end in turns.items() if end.failure or end.outcome == "excluded"}
    if result.state == "succeeded":
        for name in (failed | set(world.scenario.plan.excluded)) - {""}:
            if name not in result.reason:
                yield f"it succeeded without {name}, and does not say so"
        for each in world.scenario.plan.steps:
            over = steps.get(each.number)
            if over is None or not over.ok:
                yield f"it succeeded without step {each.number}"
            elif isinstance(each, MachineStep) and not over.skipped:
                for turn in each.turns:
                    if (each.number, turn.machine) not in turns and turn.machine not in world.left:
                        yield f"it succeeded, and {turn.machine} had no turn in step {each.number}"
            elif isinstance(each, ServerStep) and not over.skipped:
                ran = world.really_ran((each.number, "server", each.run.name))
                skips = any(isinstance(e.event, ev.MachineDecided) and e.event.machine == "server" for e in entries)
                if not (ran and ran[-1].state == "done") and not skips:
                    yield f"it succeeded, and {each.run.name} did not end well"
    assert all(entry.deployment == DEPLOYMENT for entry in entries)
