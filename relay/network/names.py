"""Where names lead, for as long as that may be kept: for processes that live longer than an answer of DNS.

This module imports no aiohttp: way.py is how connections take what is found here.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Protocol

from relay.errors import UnreachableError

SYSTEM_SECONDS: Final = 10.0
"""For which an answer of the system's resolver is kept: it does not tell how long the name server wants it kept."""
LEAST_SECONDS: Final = 1.0
"""For which every answer is kept, also one that a name server wants kept for none."""
FAILED_SECONDS: Final = 5.0
"""After which a name that could not be looked up is asked for again, where it was known before."""


class Names(Protocol):
    """Looks host names up."""

    async def addresses(self, host: str) -> Sequence[str]:
        """IP addresses in the order in which to try them, none where it has none. A fresh answer is not asked for again.

        Raises:
            UnreachableError: no server answers.
        """


LookUp = Callable[[str], Awaitable[tuple[Sequence[str], float]]]
"""Asks for a host's addresses, and for how many seconds they may be kept. Raises as `Names.addresses`."""


class KeptNames:
    """Answers of a look-up, each kept for as long as it may be.

    Where nothing answers any more, the last good answer counts: DNS that fails moves no connection.
    """

    def __init__(self, look_up: LookUp, clock: Callable[[], float] = time.monotonic) -> None:
        self._look_up = look_up
        self._clock = clock
        self._kept: dict[str, tuple[Sequence[str], float]] = {}
        self._asking: dict[str, asyncio.Task[Sequence[str]]] = {}

    def remember(self, host: str, addresses: Sequence[str]) -> None:
        """A good answer of an earlier time, where there was one."""
        if addresses:
            self._kept.setdefault(host, (addresses, 0.0))

    async def addresses(self, host: str) -> Sequence[str]:
        """As `Names`. All who ask at one time wait for one look-up, which none of them ends."""
        kept, until = self._kept.get(host, ((), 0.0))
        if self._clock() < until:
            return kept
        if host not in self._asking:
            task = self._asking[host] = asyncio.create_task(self._ask(host))
            task.add_done_callback(lambda done: self._asked(host, done))
        return await asyncio.shield(self._asking[host])

    async def _ask(self, host: str) -> Sequence[str]:
        try:
            found, seconds = await self._look_up(host)
        except UnreachableError:
            if host not in self._kept:
                raise
            found, seconds = self._kept[host][0], FAILED_SECONDS
        self._kept[host] = found, self._clock() + max(seconds, LEAST_SECONDS)
        return found

    def _asked(self, host: str, done: asyncio.Task[Sequence[str]]) -> None:
        self._asking.pop(host, None)
        if not done.cancelled():
            done.exception()  # seen: the ones who waited may have left


async def ask_system(host: str) -> tuple[Sequence[str], float]:
    """The system's resolver, as `LookUp`."""
    try:
        answers = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UnreachableError(error.strerror or str(error)) from error
    return tuple(dict.fromkeys(_text_of(answer[4]) for answer in answers)), SYSTEM_SECONDS


def _text_of(place: tuple[Any, ...]) -> str:
    """Of a socket's address: a link-local one of IPv6 keeps its interface."""
    scope = place[3] if len(place) == 4 else 0
    return f"{place[0]}%{scope}" if scope and "%" not in place[0] else place[0]
