"""Which agents are there: what their polls said last, and how long ago. In memory only: after a restart the next polls
say it again.

A relay knows no agent's keys, so it cannot tell who of two that come under one name is the right one. It keeps them apart:
a presence takes the place of another one only where both are signed by the same key, of the same start of the agent. Those
who ask compare keys. Under one name a token keeps few presences, and those of agents that poll now are never let go
of: a stranger can stand beside an agent, and not in its place.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from relay.errors import UnreachableError
from relay.protocol import messages
from relay.trust.envelopes import unverified, verify_document
from relay.trust.keys import public_key

FORGET_SECONDS: Final = 24 * 3600.0
"""How long an agent that polls no more is told of."""
PRESENCE_BYTES: Final = 32 << 20
"""Bytes of all presences together."""
PER_NAME: Final = 16
"""Presences under one name."""
PER_TOKEN: Final = 4
"""Presences under one name of those who come with one token."""
BREATH_SECONDS: Final = 10.0
"""An agent that polled so lately has only taken a breath: no other one takes its place."""

_Hex = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class _Claimed(msgspec.Struct, frozen=True):
    """What a relay reads of a presence."""

    name: str
    signing: _Hex
    sealing: _Hex
    start: Annotated[str, Meta(max_length=64)] = ""


@dataclass(frozen=True, slots=True)
class Identified:
    """Whose presence it is: an agent's name (lower-cased), its keys, and the word of its start."""

    name: str
    signing: str
    sealing: str
    start: str


def claimed(presence: bytes) -> Identified:
    """Whose it says that it is.

    Raises:
        MalformedError: it is no presence.
    """
    said = unverified(presence, _Claimed)
    return Identified(said.name.lower(), said.signing, said.sealing, said.start)


def check_signature(presence: bytes, who: Identified) -> None:
    """Whether the key that it names signed it: that its sender has that key, and no more.

    Raises:
        SignatureError: it did not.
    """
    verify_document(presence, (public_key(who.signing),), messages.PRESENCE_TYPE)


@dataclass(slots=True)
class _Seen:
    presence: bytes
    token: str
    came: float
    left: float
    polls: int = 0
    """How many are waiting now."""


class Presences:
    """The agents of one relay, by name, keys and start."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._seen: dict[Identified, _Seen] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len({who.name for who in self._seen})

    def __contains__(self, who: object) -> bool:
        return who in self._seen

    @contextlib.contextmanager
    def polling(self, who: Identified, presence: bytes, token: str = "") -> Iterator[None]:
        """While the agent waits at this relay. `token` is the id of the one that it came with.

        Raises:
            UnreachableError: there are too many agents here, or too many under this name.
        """
        now = self._clock()
        if who not in self._seen:
            self._make_room_beside(who, token, now)
        self._make_room(who, len(presence), now)
        seen = self._seen.setdefault(who, _Seen(b"", token, now, now))
        self._bytes += len(presence) - len(seen.presence)
        seen.presence, seen.came = presence, now
        seen.polls += 1
        try:
            yield
        finally:
            seen.polls -= 1
            seen.left = self._clock()

    def all(self) -> tuple[messages.AgentSeen, ...]:
        """By name."""
        now = self._clock()
        self._forget(now)
        return tuple(
            messages.AgentSeen(
                name=who.name,
                presence=seen.presence,
                age=0.0 if seen.polls else now - seen.left,
                presence_age=now - seen.came,
            )
            for who, seen in sorted(self._seen.items(), key=lambda one: (one[0].name, one[1].came))
        )

    def _make_room_beside(self, who: Identified, token: str, now: float) -> None:
        """For one more under its name: the place of one that polls no more, first of itself, which was started again;
        where its token has too many places, of one of those.
        """
        beside = {other: seen for other, seen in self._seen.items() if other.name == who.name}
        own = {other: seen for other, seen in beside.items() if seen.token == token}
        for those, most in ((own, PER_TOKEN), (beside, PER_NAME)):
            if len(those) < most:
                continue
            absent = [
                (other.signing != who.signing, seen.left, id(seen), other)
                for other, seen in those.items()
                if not seen.polls and (other.signing == who.signing or now - seen.left > BREATH_SECONDS)
            ]
            if not absent:
                raise UnreachableError(f"too many agents are at this relay as {who.name}")
            self._remove(min(absent)[3])
            return

    def _make_room(self, who: Identified, size: int, now: float) -> None:
        if self._fits(who, size):
            return
        self._forget(now)
        absent = [(seen.left, id(seen), other) for other, seen in self._seen.items() if not seen.polls and other != who]
        for _, _, other in sorted(absent, key=lambda one: one[:2]):
            if self._fits(who, size):
                return
            self._remove(other)
        if not self._fits(who, size):
            raise UnreachableError("too many agents are at this relay")

    def _fits(self, who: Identified, size: int) -> bool:
        before = self._seen.get(who)
        more = size - (len(before.presence) if before else 0)
        return len(self._seen) + (before is None) <= self._most and self._bytes + more <= PRESENCE_BYTES

    def _forget(self, now: float) -> None:
        absent = {who: seen.left for who, seen in self._seen.items() if not seen.polls}
        for who in [who for who, left in absent.items() if now - left > FORGET_SECONDS]:
            self._remove(who)

    def _remove(self, who: Identified) -> None:
        self._bytes -= len(self._seen.pop(who).presence)
