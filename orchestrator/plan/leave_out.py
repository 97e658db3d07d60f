"""Machines that take no part in a deployment: whom a person leaves out, whom a rule may, and a plan without them. Pure.

Their turns stand beside those of a step, so that a later deployment can go on with the same plan for just them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace

from orchestrator.files.environment import Machine
from orchestrator.plan.plan import MachineStep, Plan, PlannedBeside, PlannedMachine, PlannedPhase, PlannedRelay
from orchestrator.plan.routes import lineage
from relay.written.yaml_positions import shown


@dataclass(frozen=True, slots=True)
class Selection:
    """Which machines a person leaves out, and why.

    A selector is a machine's name, `site:NAME`, `role:NAME` or `tag:KEY=VALUE`.

    Attributes:
        exclude: whoever is selected by one of these is left out.
        only: where there are some, whoever is selected by none of them is left out.
        why: for the record.
    """

    exclude: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    why: str = ""


EVERYBODY: Final = Selection()
Wrong = tuple[str, str]
"""An option as it was typed, and what is wrong with it."""


def left_out(selection: Selection, machines: Mapping[str, Machine]) -> tuple[dict[str, str], list[Wrong]]:
    """Of `machines` (all that the release is for) those that are left out, by name, with the reason; and every mistake."""
    excluded, wrong = _selected("--exclude", selection.exclude, machines)
    wanted, more = _selected("--only", selection.only, machines)
    wrong += more
    names = [name for name in sorted(machines) if name in excluded or (selection.only and name not in wanted)]
    if names and len(names) == len(machines) and not wrong:
        option = "--exclude" if selection.exclude else "--only"
        wrong.append((option, f"leaves out every machine of this release: {', '.join(names)}"))
    return dict.fromkeys(names, selection.why), wrong


def _selected(option: str, selectors: Sequence[str], machines: Mapping[str, Machine]) -> tuple[set[str], list[Wrong]]:
    found: set[str] = set()
    wrong = []
    for text in selectors:
        names, there = _matches(text, machines)
        found |= names
        if not names:
            wrong.append((f"{option} {shown(text)}", f"selects no machine of this release; there: {there}"))
    return found, wrong


def _matches(selector: str, machines: Mapping[str, Machine]) -> tuple[set[str], str]:
    """The machines that are meant, and what could have been said in its place."""
    kind, colon, value = selector.partition(":")
    match (kind, colon):
        case ("site", ":"):
            names = {name for name, machine in machines.items() if machine.site == value}
            return names, _listed(f"site:{machine.site}" for machine in machines.values())
        case ("role", ":"):
            names = {name for name, machine in machines.items() if value in machine.roles}
            return names, _listed(f"role:{role}" for machine in machines.values() for role in machine.roles)
        case ("tag", ":"):
            tag, _, wanted = value.partition("=")
            names = {name for name, machine in machines.items() if str(machine.tags.get(tag)) == wanted}
            every = (f"tag:{key}={text}" for machine in machines.values() for key, text in machine.tags.items())
            return {name for name in names if tag in machines[name].tags}, _listed(every)
        case _:
            return {name for name in machines if name.lower() == selector.lower()}, _listed(machines)


def _listed(names: Iterable[str], most: int = 20) -> str:
    every = sorted(set(names))
    shown_ones = ", ".join(every[:most]) or "none"
    return f"{shown_ones} and {len(every) - most} more" if len(every) > most else shown_ones


# --- the parts of a plan


def asked_by(machines: Sequence[PlannedMachine], relays: Sequence[PlannedRelay]) -> tuple[PlannedRelay, ...]:
    """The relays that these machines may ask, and those that packages come to them through."""
    upstreams = {relay.name: relay.upstream for relay in relays}
    used = {name for machine in machines for asked in machine.relays for name in lineage(asked, upstreams)}
    return tuple(relay for relay in relays if relay.name in used)


def beside_of(
    every: Sequence[PlannedMachine],
    every_relay: Sequence[PlannedRelay],
    machines: Sequence[PlannedMachine],
    relays: Sequence[PlannedRelay],
) -> PlannedBeside | None:
    """What is in the first two and not in the last two; None where that is nothing."""
    others = tuple(machine for machine in every if machine not in machines)
    return PlannedBeside(others, tuple(relay for relay in every_relay if relay not in relays)) if others else None


def with_machines(plan: Plan, names: Collection[str], excluded: Mapping[str, str]) -> Plan:
    """The plan for just these of its machines; all others stand beside, and of them `excluded` count as out, with why.

    The numbers of its steps stay what they were, but that no window is wider than its step has machines.
    """
    aside = plan.beside or PlannedBeside()
    every = sorted((*plan.machines, *aside.machines), key=lambda machine: machine.name)
    every_relay = (*plan.relays, *aside.relays)
    machines = tuple(machine for machine in every if machine.name in names)
    relays = asked_by(machines, every_relay)
    return replace(
        plan,
        machines=machines,
        relays=relays,
        beside=beside_of(every, every_relay, machines, relays),
        excluded=dict(excluded),
        steps=tuple(_step_for(step, names) if isinstance(step, MachineStep) else step for step in plan.steps),
    )


def _step_for(step: MachineStep, names: Collection[str]) -> MachineStep:
    every = (*step.turns, *step.beside)
    turns = tuple(turn for turn in every if turn.machine in names)
    return replace(
        step,
        turns=turns,
        beside=tuple(turn for turn in every if turn.machine not in names),
        phases=_fitting(step.phases, len(turns)),
    )


def _fitting(phases: Sequence[PlannedPhase], count: int) -> tuple[PlannedPhase, ...]:
    """The phases that so few machines go through; the first stays in any case."""
    fitting: list[PlannedPhase] = []
    left = count
    for phase in phases:
        if fitting and not left:
            break
        machines = min(phase.machines, left)
        fitting.append(replace(phase, machines=machines, window=max(1, min(phase.window, max(count, 1)))))
        left -= machines or left
    return tuple(fitting)


# --- the rule for those that cannot be reached


def without(plan: Plan, machine: str, why: str) -> Plan:
    """The plan once this machine is left out of it."""
    names = {each.name for each in plan.machines} - {machine}
    return with_machines(plan, names, {**plan.excluded, machine: why})


def why_not_left_out(plan: Plan, machine: str, by_rule: int) -> str:
    """Why `acquire: offline` does not let this machine be left out, where `by_rule` are already; empty where it does."""
    rule = plan.acquire.offline
    if rule is None:
        return "no rule lets it be left out (acquire: offline)"
    if rule.roles and not set(rule.roles).intersection(plan.machine(machine).roles):
        return f"only machines with the role {' or '.join(rule.roles)} may be left out (acquire: offline)"
    if by_rule >= rule.at_most:
        return f"{by_rule} of at most {rule.at_most} are left out already (acquire: offline)"
    rest = without(plan, machine, "")
    if not rest.machines:
        return "no machine would be left"
    for step in rest.steps:
        if (
            isinstance(step, MachineStep)
            and step.turns
            and len(step.turns) - 1 + _untouched(step, rest) < step.min_in_service
        ):
            return f"step {step.number} ({step.name}) could not keep {step.min_in_service} in service without it"
    return ""


def _untouched(step: MachineStep, plan: Plan) -> int:
    """Machines beside a step that may well be in service."""
    return sum(turn.machine not in plan.excluded for turn in step.beside)
