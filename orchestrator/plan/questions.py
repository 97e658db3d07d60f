"""What a plan asks people: gates, and steps that ask. Whether enough of them can answer is seen here, before anything begins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from orchestrator.files.process import Gate, Step
from orchestrator.files.variables import Scope
from orchestrator.plan.context import SCRIPT_SECONDS, Ground
from orchestrator.plan.plan import AskStep, PlannedAsk, PlannedGate, ServerRun
from relay.trust.keys import PERSON_NAME
from relay.written.yaml_positions import Place, shown

_TEAM: Final = "team:"
_LATER: Final = {name: f"${{{name}}}" for name in ("machine.name", "machine.address")}
"""Facts that are known only when machines went through the phase: they stay as they are written."""


def ask_step(ground: Ground, number: int, step: Step, place: Place) -> AskStep:
    """A step that asks people."""
    ask = _ask(ground, step, place, ground.server_scope())
    return AskStep(number, step.name, ask, when=step.when, required=step.required)


def planned_gate(ground: Ground, gate: Gate, place: Place, step: Step, package: str) -> PlannedGate:
    """The gate of a phase of `step`; its ask may name the machines that went through."""
    if gate.check is None and gate.ask is None:
        ground.wrong(place, "waits for nothing: expected one of the keys check, ask, or both")
    scope = ground.server_scope(package)
    check = None if gate.check is None else _check(ground, gate, gate.check, place, step, package)
    ask = None
    if gate.ask is not None:
        ask = _ask(ground, gate, place, scope.with_facts(_LATER))
    elif _says_who(gate):
        ground.wrong(place, "says who is asked, and asks nothing: give it the key ask")
    return PlannedGate(gate.name, check, ask)


def _says_who(gate: Gate) -> bool:
    return bool(gate.approvers or gate.minimum != 1 or gate.not_author or gate.expires or gate.on_expiry != "pause")


def _check(ground: Ground, gate: Gate, path: str, place: Place, step: Step, package: str) -> ServerRun:
    """It only looks, so it may be run again."""
    seen = ground.seen_variables(ground.server_scope(package))
    return ServerRun(
        f"check {gate.name}",
        script=ground.frozen(ground.process, path, place.below("check")),
        timeout=SCRIPT_SECONDS,
        idempotent=True,
        variables={**ground.common_variables(step.name, package), "GATE": gate.name, **seen},
    )


def _ask(ground: Ground, what: Gate | Step, place: Place, scope: Scope) -> PlannedAsk:
    approvers = _approvers(ground, what.approvers, place.below("approvers"))
    if approvers is not None:
        _check_enough(ground, what, approvers, place)
    if what.on_expiry != "pause" and what.expires is None:
        ground.wrong(place.below("on_expiry"), f"is {what.on_expiry}, and it never expires: give it the key expires")
    return PlannedAsk(
        ground.fill(scope, what.ask or "", place.below("ask")),
        approvers=approvers or (),
        minimum=what.minimum,
        not_author=what.not_author,
        expires=ground.time_limit(what.expires, place.below("expires"), 0.0),
        on_expiry=what.on_expiry,
    )


def _approvers(ground: Ground, written: Sequence[str], place: Place) -> tuple[str, ...] | None:
    """Names of people, each once, as they are listed; None where some of them are a mistake."""
    found: list[str] = []
    wrong_before = len(ground.mistakes)
    for index, entry in enumerate(written):
        team = entry.removeprefix(_TEAM)
        if team != entry:
            found += _members(ground, team, place.below(index))
        elif _is_known(ground, entry, place.below(index)):
            found.append(entry)
    return tuple(dict.fromkeys(found)) if len(ground.mistakes) == wrong_before else None


def _members(ground: Ground, team: str, place: Place) -> list[str]:
    teams = ground.environment.value.teams
    if team not in teams:
        known = ", ".join(teams) or "none"
        where = ground.environment.name
        ground.wrong(place, f"there is no team {shown(team)}: define it under teams: in {where} (there: {known})")
        return []
    of_team = ground.environment.at("teams", team)
    if not teams[team]:
        ground.wrong(of_team, "has nobody: a team that is asked needs at least one name")
    return [name for index, name in enumerate(teams[team]) if _is_known(ground, name, of_team.below(index))]


def _is_known(ground: Ground, name: str, place: Place) -> bool:
    if not re.match(PERSON_NAME, name):
        ground.wrong(place, f"{shown(name)}: expected the name of a person (small letters first), or team:NAME")
    elif name not in ground.people:
        environment, known = ground.environment.value.environment, ", ".join(sorted(ground.people)) or "nobody"
        ground.wrong(
            place,
            f"trust.json names no {shown(name)} who may decide in {environment} (there: {known}): "
            f"'waystation trust person {name}' names one",
        )
    else:
        return True
    return False


def _check_enough(ground: Ground, what: Gate | Step, approvers: Sequence[str], place: Place) -> None:
    """Whether so many different people can say yes. Without names nobody can tell them apart, nor from the author."""
    needs_names = what.not_author or what.minimum > 1
    if not needs_names and not approvers:
        return
    names = set(approvers or ground.people)
    who = "of those who are asked" if approvers else "whom trust.json names"
    if not names:
        key = "not_author" if what.not_author else "minimum"
        ground.wrong(
            place.below(key), "needs people with names, and trust.json names nobody: 'waystation trust person'"
        )
    elif what.minimum > len(names):
        ground.wrong(
            place.below("minimum"), f"is {what.minimum}, more than the {len(names)} {who}: it can never be met"
        )
    elif what.not_author and ground.author == "":
        ground.wrong(
            place.below("not_author"),
            "nobody knows who made the release, as its key has no name: create it with --as NAME",
        )
    elif what.not_author and ground.author is not None and what.minimum > len(names - {ground.author}):
        ground.wrong(
            place.below("not_author"),
            f"cannot be met: {ground.author} made the release, and without them there are "
            f"{len(names - {ground.author})} {who}, and {what.minimum} must agree",
        )
