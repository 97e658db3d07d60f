"""Who is there: what several relays have seen of the agents, merged into one answer per machine. Pure.

Relays are believed in nothing but availability: a presence counts where it is signed by the keys that the plan names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from agent.orders.envelopes import verify_presence
from agent.orders.keys import fingerprint_of
from agent.orders.orders import SKEW_SECONDS, Presence
from orchestrator.plan.plan import PlannedMachine
from relay.errors import SignatureError
from relay.protocol.messages import AgentSeen

LOST_SECONDS = 90.0
"""A machine that no living relay has seen for so long is lost."""

Answers = Mapping[str, Sequence[AgentSeen] | str]
"""By the relay's name: whom it has seen, or why it did not answer."""


@dataclass(frozen=True, slots=True)
class Sight:
    """A machine as a relay has seen it last. `age` is seconds since then; `skew` how far its clock is ahead of ours."""

    presence: Presence
    relay: str
    age: float
    skew: float


@dataclass(frozen=True, slots=True)
class Presences:
    """All machines that were asked for: each is in one of the two.

    Attributes:
        present: they are there, and may be given orders.
        missing: why the others may not, in words.
        silent: relays that did not answer, and why.
    """

    present: Mapping[str, Presence]
    missing: Mapping[str, str]
    silent: Mapping[str, str]


def merge_presences(
    machines: Iterable[PlannedMachine], answers: Answers, now: float, lost_seconds: float = LOST_SECONDS
) -> Presences:
    """Merge the relays' `answers`. `now` is this server's clock, seconds since 1970."""
    present: dict[str, Presence] = {}
    missing: dict[str, str] = {}
    for machine in machines:
        sight = sight_of(machine, answers, now)
        why = _why_unseen(machine, answers) if sight is None else _why_unfit(sight, lost_seconds)
        if sight is None or why:
            missing[machine.name] = why
        else:
            present[machine.name] = sight.presence
    silent = {relay: answer for relay, answer in answers.items() if isinstance(answer, str)}
    return Presences(present, missing, silent)


def sight_of(machine: PlannedMachine, answers: Answers, now: float) -> Sight | None:
    """The freshest presence that the machine itself signed; None where no relay has one."""
    sights = [
        Sight(said, relay, seen.age, said.time + seen.presence_age - now)
        for relay, seen in _seen(machine, answers)
        if isinstance(said := _opened(machine, seen), Presence)
    ]
    return min(sights, key=lambda sight: sight.age, default=None)


def _seen(machine: PlannedMachine, answers: Answers) -> Iterable[tuple[str, AgentSeen]]:
    for relay, answer in answers.items():
        if not isinstance(answer, str):
            yield from ((relay, seen) for seen in answer if seen.name.lower() == machine.name.lower())


def _opened(machine: PlannedMachine, seen: AgentSeen) -> Presence | str:
    """What the machine said of itself, or what is wrong with it."""
    said = _verified(seen.presence)
    if isinstance(said, str):
        return f"its presence is not signed as it should be: {said}"
    if said.name.lower() != machine.name.lower():
        return f"its presence is that of {said.name}"
    found = fingerprint_of(said.signing, said.sealing)
    if found != machine.key:
        return f"it has the key {found}, but the environment names {machine.key}"
    return said


@lru_cache(maxsize=4096)
def _verified(envelope: bytes) -> Presence | str:
    # Kept: an agent sends the same presence for a while, and it is looked at every few seconds.
    try:
        return verify_presence(envelope)
    except SignatureError as error:
        return error.message


def _why_unseen(machine: PlannedMachine, answers: Answers) -> str:
    wrong = [str(_opened(machine, seen)) for _, seen in _seen(machine, answers)]
    if wrong:
        return f"{wrong[0]}; if it was set up anew, compare 'waystation agent init' there and correct its key"
    own = {relay: answers[relay] for relay in machine.relays if relay in answers}
    if own and all(isinstance(answer, str) for answer in own.values()):
        return "none of its relays answers: " + "; ".join(f"{relay}: {answer}" for relay, answer in own.items())
    return "no relay has seen it; is 'waystation agent serve' running there?"


def _why_unfit(sight: Sight, lost_seconds: float) -> str:
    if sight.age >= lost_seconds:
        return f"lost: relay {sight.relay} has seen it last {sight.age:.0f} s ago"
    if abs(sight.skew) > SKEW_SECONDS:
        side = "ahead of" if sight.skew > 0 else "behind"
        return (
            f"its clock is {abs(sight.skew):.0f} s {side} this server's, and at most {SKEW_SECONDS:.0f} s are allowed; "
            "set the clock that is wrong"
        )
    return ""
