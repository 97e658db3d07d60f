"""Who is there: what several relays have seen of the agents, merged into one answer per machine. Pure.

Relays are believed in nothing but availability: a presence counts where it is signed by the keys that the plan names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache
from itertools import combinations

from agent.orders.envelopes import verify_presence
from agent.orders.keys import fingerprint_of
from agent.orders.orders import SKEW_SECONDS, Presence
from orchestrator.plan.plan import PlannedMachine
from relay.errors import SignatureError
from relay.protocol.messages import POLL_SECONDS, AgentSeen

LOST_SECONDS = 90.0
"""A machine that no living relay has seen for so long is lost."""

DOUBLED_SECONDS = 30.0
"""One that no relay has seen for so long is no second agent with the same keys: it is gone, or was stopped."""

Answers = Mapping[str, Sequence[AgentSeen] | str]
"""By the relay's name: whom it has seen, or why it did not answer."""


_APART_SECONDS = 2 * POLL_SECONDS + 10.0
"""Presences of one agent at several relays are so far apart at most: it makes a new one for each poll."""


@dataclass(frozen=True, slots=True)
class Sight:
    """A machine as a relay has seen it.

    Attributes:
        age: seconds since then.
        lain: seconds since the presence came.
        skew: how far its clock is ahead of ours, in seconds.
    """

    presence: Presence
    relay: str
    age: float
    lain: float
    skew: float


@dataclass(frozen=True, slots=True)
class Presences:
    """All machines that were asked for: each is in one of the first two.

    Attributes:
        present: they are there, and may be given orders.
        missing: why the others may not, in words.
        silent: relays that did not answer, and why.
        doubled: those of the missing whose keys two agents have, and which.
        offline: those of the missing that no relay has seen, or not for too long. Of the others something else is wrong.
        strangers: of all machines, what is wrong with another agent that a relay has seen under their name.
        newest: of all that a relay has seen, present or not, the newest presence that the machine itself signed.
    """

    present: Mapping[str, Presence]
    missing: Mapping[str, str]
    silent: Mapping[str, str]
    doubled: Mapping[str, str] = field(default_factory=dict)
    offline: frozenset[str] = frozenset()
    strangers: Mapping[str, str] = field(default_factory=dict)
    newest: Mapping[str, Sight] = field(default_factory=dict)


def merge_presences(
    machines: Iterable[PlannedMachine], answers: Answers, now: float, lost_seconds: float = LOST_SECONDS
) -> Presences:
    """Merge the relays' `answers`. `now` is this server's clock, seconds since 1970."""
    present: dict[str, Presence] = {}
    missing: dict[str, str] = {}
    doubled: dict[str, str] = {}
    offline: set[str] = set()
    strangers: dict[str, str] = {}
    sights: dict[str, Sight] = {}
    seen_under = _by_name(answers)
    for machine in machines:
        name = machine.name
        seen = seen_under.get(name.lower(), ())
        own, wrong = _told_apart(machine, seen, now)
        if wrong:
            strangers[name] = wrong
        newest = _newest(own, lost_seconds)
        if newest is None:
            missing[name] = wrong or _why_unseen(machine, answers)
            if not seen:
                offline.add(name)
            continue
        sights[name] = newest
        if twice := _why_doubled(own):
            missing[name] = doubled[name] = twice
        elif why := _why_unfit(newest, lost_seconds):
            missing[name] = why
            if newest.age >= lost_seconds:
                offline.add(name)
        else:
            present[name] = newest.presence
    silent = {relay: answer for relay, answer in answers.items() if isinstance(answer, str)}
    return Presences(present, missing, silent, doubled, frozenset(offline), strangers, sights)


def _by_name(answers: Answers) -> Mapping[str, Sequence[tuple[str, AgentSeen]]]:
    """Who was seen, and by which relay, under each name in lower case."""
    found: defaultdict[str, list[tuple[str, AgentSeen]]] = defaultdict(list)
    for relay, answer in answers.items():
        if not isinstance(answer, str):
            for seen in answer:
                found[seen.name.lower()].append((relay, seen))
    return found


def _told_apart(
    machine: PlannedMachine, seen_under_its_name: Sequence[tuple[str, AgentSeen]], now: float
) -> tuple[list[Sight], str]:
    """Its own presences, and what is wrong with the first that is another's; empty where there is none."""
    own: list[Sight] = []
    wrong = ""
    for relay, seen in seen_under_its_name:
        said = _opened(machine, seen)
        if isinstance(said, Presence):
            lain = max(0.0, seen.presence_age)
            own.append(Sight(said, relay, max(0.0, seen.age), lain, said.time + lain - now))
        else:
            wrong = wrong or f"{said}; if it was set up anew, compare 'waystation agent init' there and correct its key"
    return own, wrong


def _newest(sights: Sequence[Sight], lost_seconds: float) -> Sight | None:
    """The newest by the machine's own word, whichever relay brings it: one that shows an old presence as if it had just
    come has no say. Nor has one in what time has passed since: of those that are about as new, the one counts by
    which the machine's clock is least wrong.
    """
    living = [sight for sight in sights if sight.age < lost_seconds] or sights
    if not living:
        return None
    # Of one relay the last that came: an agent that was started again may have a clock that was set back.
    came_last = {sight.relay: sight for sight in sorted(living, key=lambda sight: -sight.lain)}
    living = list(came_last.values())
    newest = max(living, key=lambda sight: sight.presence.time)
    as_new = [sight for sight in living if newest.presence.time - sight.presence.time <= _APART_SECONDS]
    least_wrong = min(as_new, key=lambda sight: abs(sight.skew))
    return replace(least_wrong, presence=newest.presence, age=min(sight.age for sight in as_new))


def _why_doubled(sights: Sequence[Sight]) -> str:
    """Which two agents live with the keys of one; empty where there is one.

    Of two starts, the earlier was over when the later one began, where it is one agent that was started again: what it
    signed is from before. Only the machine's own signed words count, so no relay can make two of one.
    """
    last: dict[str, Presence] = {}
    for sight in sights:
        said = sight.presence
        if said.start and sight.age < DOUBLED_SECONDS and said.time >= last.get(said.start, said).time:
            last[said.start] = said
    for one, other in combinations(sorted(last.values(), key=lambda said: (said.started, said.start)), 2):
        if one.time > other.started and other.time > one.started:
            return (
                f"two agents live with its keys: {_named(one)}, and {_named(other)}; a home was copied: stop one of them, "
                "and make keys of its own for it ('waystation agent init')"
            )
    return ""


def _named(said: Presence) -> str:
    since = datetime.fromtimestamp(said.started, UTC).strftime("%Y-%m-%d %H:%M:%S")
    return f"one on {said.host or 'a machine without a name'} since {since} UTC (start {said.start[:16]})"


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
