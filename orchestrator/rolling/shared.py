"""What other deployments of the environment mean for a step: machines and rotations are shared. Pure.

A machine turns for one deployment at a time. One that another project left out of its rotation is not touched before it is
in again. Who is out, or in flight elsewhere, is not in service here; and no start of ours takes away what another
deployment, which turns machines of the same rotation, has promised to keep in service.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from orchestrator.journal.views import OpenBracket
from orchestrator.locks.leases import Elsewhere, Promise, since_text
from orchestrator.rolling import rolling
from orchestrator.rolling.rolling import Roll, RotationState


@dataclass(frozen=True, slots=True)
class Own:
    """Whose step it is. `rotation` is empty where it has none."""

    project: str
    rotation: str


def starts(roll: Roll, service: RotationState, own: Own, elsewhere: Elsewhere) -> list[str]:
    """The machines to start now, in this order. Call it again whenever one ended or the state changed."""
    found: list[str] = []
    while (machine := rolling.next_start(roll, seen(roll, service, own, elsewhere))) is not None:
        found.append(machine)
        roll = rolling.started(roll, machine)
    return found


def seen(roll: Roll, service: RotationState, own: Own, elsewhere: Elsewhere) -> RotationState:
    """The state of the rotation, with what is known of other deployments."""
    gone = _gone(own, elsewhere)
    held = {**_promised(roll, service, own, elsewhere), **_left_out(own, elsewhere), **_turned(elsewhere)}
    return replace(
        service,
        inside=service.inside - gone,
        out=service.out | gone.intersection(roll.machines),
        held={machine: held[machine] for machine in roll.waiting if machine in held},
    )


def is_patient(roll: Roll, own: Own, elsewhere: Elsewhere) -> bool:
    """Whether living deployments have what this one waits for: they come to their end, so it may take as long as it does."""
    busy = elsewhere.turning.keys() | {b.machine for b in elsewhere.brackets if _is_foreign(b, own, elsewhere.alive)}
    return bool(busy.intersection(roll.machines)) or any(one.rotation == own.rotation for one in elsewhere.promises)


def why_refused(own: Own, machines: frozenset[str], elsewhere: Elsewhere) -> list[str]:
    """Machines that another project's deployment left out of a rotation and that nobody will put back by himself."""
    return [
        f"{_words(bracket)} ('waystation rotation close {bracket.machine} --environment {bracket.environment}')"
        for bracket in elsewhere.brackets
        if bracket.project != own.project and bracket.owner not in elsewhere.alive and bracket.machine in machines
    ]


def _is_foreign(bracket: OpenBracket, own: Own, alive: frozenset[str]) -> bool:
    return bracket.project != own.project and bracket.owner in alive


def _gone(own: Own, elsewhere: Elsewhere) -> frozenset[str]:
    """Who is out of this rotation by anybody's bracket, or in flight in another deployment."""
    out = {bracket.machine for bracket in elsewhere.brackets if bracket.rotation == own.rotation}
    return frozenset(out | elsewhere.turning.keys())


def _turned(elsewhere: Elsewhere) -> Mapping[str, str]:
    return {machine: str(turning) for machine, turning in elsewhere.turning.items()}


def _left_out(own: Own, elsewhere: Elsewhere) -> Mapping[str, str]:
    return {bracket.machine: _words(bracket) for bracket in elsewhere.brackets if bracket.project != own.project}


def _promised(roll: Roll, service: RotationState, own: Own, elsewhere: Elsewhere) -> Mapping[str, str]:
    """Machines whose start would break what another deployment has promised of the same rotation."""
    out = _gone(own, elsewhere) | service.out | roll.in_flight
    held: dict[str, str] = {}
    for promise in elsewhere.promises:
        if promise.rotation != own.rotation or len(promise.machines - out) > promise.min_in_service:
            continue
        held |= {machine: _kept(promise, out) for machine in promise.machines.intersection(roll.waiting) - out}
    return held


def _kept(promise: Promise, out: frozenset[str]) -> str:
    return (
        f"{len(promise.machines - out)} in service, of which another deployment of {promise.rotation} "
        f"({promise.deployment}) keeps {promise.min_in_service}"
    )


def _words(bracket: OpenBracket) -> str:
    since = since_text(bracket.since)
    return f"{bracket.machine} is out of {bracket.rotation} since {since}, by {bracket.label} of {bracket.project}"
