"""Which relays an agent polls, from where at each, and when again at one that failed."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from agent.acts import PollBroke, RelayBack, RelayLeft
from agent.disk import read_json, replace_file
from agent.inbox import Inbox
from agent.relays.sources import Sources
from agent.reporter import Reporter
from agent.trees.installed import CURSORS
from relay.audit.event import tell
from relay.errors import UnreachableError, UntrustedError, WaystationError
from relay.protocol import messages
from relay.protocol.client import RelayClient
from relay.protocol.mail_client import Brought, MailClient
from relay.support.persistence import Persistence

POLLED = 2
"""Relays that are polled at one time."""
PERSISTENCE = Persistence(first_pause=0.75, longest_pause=15.0, spread=2 / 3)
"""Of an agent with a relay that failed."""

FRUITLESS_BORNE = 1
"""Polls in a row that a relay answers early and with nothing new: one that is about to stop does that once."""


class FruitlessError(UnreachableError):
    """A relay that does not let polls wait, and has nothing new to say."""

    def __init__(self, url: str) -> None:
        super().__init__(f"{url} answers polls at once, and with nothing new")


@dataclass(eq=False)
class MailRelays:
    """The relays that carry mail, as `sources` ranks them: which of them are polled, and which just failed."""

    sources: Sources
    _polled: set[str] = field(default_factory=set, init=False)
    _fails: dict[str, int] = field(default_factory=dict, init=False)
    _down_until: dict[str, float] = field(default_factory=dict, init=False)
    _fruitless: dict[str, int] = field(default_factory=dict, init=False)
    """Polls in a row that brought nothing and were not kept waiting, by relay."""

    def for_mail(self) -> list[RelayClient]:
        """All of them: those that are polled first, those that just failed last."""
        return sorted(self._ranked(), key=lambda relay: (relay.url not in self._polled, self._is_down(relay.url)))

    def is_wanted(self, relay: RelayClient) -> bool:
        """Whether it is among the closest that did not just fail."""
        return any(relay.url == wanted.url for wanted in self._wanted())

    def take(self) -> RelayClient | None:
        """The closest that is not polled; from now on it is."""
        relay = next((relay for relay in self._wanted() if relay.url not in self._polled), None)
        if relay is not None:
            self._polled.add(relay.url)
        return relay

    def let_go(self, relay: RelayClient) -> None:
        """It is not polled any more."""
        self._polled.discard(relay.url)

    def served(self, relay: RelayClient) -> None:
        """It kept a poll waiting as it should, or brought something new."""
        if self._fails.pop(relay.url, None):
            tell(RelayBack(relay.url))
        for known in (self._down_until, self._fruitless):
            known.pop(relay.url, None)

    def was_fruitless(self, relay: RelayClient) -> None:
        """It answered early, and with nothing new. Raises `FruitlessError` where that is its habit."""
        count = self._fruitless[relay.url] = self._fruitless.get(relay.url, 0) + 1
        if count > FRUITLESS_BORNE:
            raise FruitlessError(relay.url)

    def failed(self, relay: RelayClient, error: WaystationError) -> None:
        """Leave it alone for a while, longer each time in a row."""
        fails = self._fails[relay.url] = self._fails.get(relay.url, 0) + 1
        self._down_until[relay.url] = time.monotonic() + PERSISTENCE.pause(fails)
        self.sources.failed(relay.url, error)
        if fails == 1:
            tell(RelayLeft(relay.url, error.message))

    def _ranked(self) -> list[RelayClient]:
        return [source for source in self.sources.in_order() if isinstance(source, RelayClient)]

    def _wanted(self) -> list[RelayClient]:
        return [relay for relay in self._ranked() if not self._is_down(relay.url)][:POLLED]

    def _is_down(self, url: str) -> bool:
        return time.monotonic() < self._down_until.get(url, 0.0)


class Cursors:
    """How far the mail of each relay was taken, kept in a file. Without it mail is read from its beginning again."""

    def __init__(self, home: str) -> None:
        """Read them; blocking."""
        self._path = os.path.join(home, CURSORS)
        self._by_url = read_json(self._path, dict[str, messages.Cursor]) or {}

    def get(self, url: str) -> messages.Cursor | None:
        return self._by_url.get(url)

    async def advance(self, url: str, answer: messages.PollAnswer) -> None:
        """All that the answer brought stands in the journal: no later start need see it again."""
        before = self._by_url.get(url)
        same = before.number if before is not None and before.epoch == answer.epoch else 0
        cursor = messages.Cursor(answer.epoch, max((letter.number for letter in answer.orders), default=same))
        if cursor != before:
            self._by_url[url] = cursor
            with suppress(OSError):
                await asyncio.to_thread(replace_file, self._path, msgspec.json.encode(self._by_url))


@dataclass(eq=False)
class Poller:
    """Polls, and hands what comes to the inbox.

    `on_ready` is called with the relay's URL once, when the first poll was answered.
    """

    relays: MailRelays
    cursors: Cursors
    inbox: Inbox
    reporter: Reporter
    on_ready: Callable[[str], None] | None
    _brought: dict[str, Brought] = field(default_factory=dict, init=False)

    async def run(self) -> None:
        """Poll, for ever."""
        async with asyncio.TaskGroup() as slots:
            for _ in range(POLLED):
                slots.create_task(self._poll())

    async def _poll(self) -> None:
        """Poll one relay after another."""
        while True:
            relay = self.relays.take()
            if relay is None:
                await asyncio.sleep(_spread(0.3, 0.9))
                continue
            try:
                await self._poll_relay(relay)
            except WaystationError as error:
                self.relays.failed(relay, error)
            except Exception as error:
                # Whatever a relay answers, the agent goes on with the others.
                tell(PollBroke(relay.url, type(error).__name__), error)
                self.relays.failed(relay, UntrustedError(f"the agent failed over it: {type(error).__name__}"))
            finally:
                self.relays.let_go(relay)

    async def _poll_relay(self, relay: RelayClient) -> None:
        """Poll as long as it answers and is among the closest. The first poll is answered at once: it proves the road."""
        wait = 0.0
        while True:
            asked = time.monotonic()
            answer = await self._ask(relay, wait)
            seconds = time.monotonic() - asked
            is_news = await self._take(answer, relay)
            if is_news or (wait and seconds > wait / 2):
                self.relays.served(relay)
            if not self.relays.is_wanted(relay):
                return
            if wait and not is_news and seconds <= wait / 2:
                # It may be about to stop: the process that answers next may know nothing of before.
                self.relays.was_fruitless(relay)
                await asyncio.sleep(_spread(0.1, 0.3))
                wait = 0.0
            else:
                wait = messages.POLL_SECONDS

    async def _take(self, answer: messages.PollAnswer, relay: RelayClient) -> bool:
        """Whether there was a good letter in it that this relay did not bring before."""
        brought, before = self._brought.setdefault(relay.url, Brought()), self.cursors.get(relay.url)
        has_lost_mail = before is None or before.epoch != answer.epoch
        is_news = False
        for letter in answer.orders:
            is_new = brought.is_news(letter.envelope)
            if is_new or has_lost_mail:
                is_good = await self.inbox.take(letter, relay.url)
                is_news = is_news or (is_new and is_good)
        await self.cursors.advance(relay.url, answer)
        return is_news

    async def _ask(self, relay: RelayClient, wait: float) -> messages.PollAnswer:
        cursor = self.cursors.get(relay.url)
        request = messages.PollRequest(presence=self.reporter.presence(), after=cursor, wait=wait)
        answer = await MailClient(relay).poll(self.reporter.author.name, request)
        if self.on_ready is not None:
            self.on_ready(relay.url)
            self.on_ready = None
        if cursor is not None and cursor.epoch != answer.epoch:
            self.reporter.outbox.lost(relay.url)
        return answer


def _spread(least: float, most: float) -> float:
    return random.uniform(least, most)  # noqa: S311 - spreads load, guards nothing
