"""`waystation agent serve`: be there, accept orders, act on them once, and say what became of them.

An operation is written down before anything acts, and what comes under its id later is answered, not repeated. The agent
may be killed at any moment: runners live on by themselves, and the journal says what was begun.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from agent import platform
from agent.acts import AgentReady, AgentStarted, AgentStopped, HomeDamaged, NoRelay, TendingFailed
from agent.inbox import Inbox
from agent.operations import Operations
from agent.orders.acceptance import Me
from agent.orders.journal import OperationJournal
from agent.orders.keys import load_agent_identity, load_report_signer, load_sealing_key
from agent.orders.outbox import Outbox
from agent.poller import Cursors, MailRelays, Poller
from agent.relays.sources import Sources
from agent.reporter import Author, Reporter
from agent.scheduler import Scheduler
from agent.trees.installed import AgentState
from relay.audit.event import tell
from relay.errors import LockedError, UsageError, WaystationError
from relay.protocol import messages
from relay.protocol.connection import ClientLimits
from relay.protocol.credentials import EndingsTold

LIMITS = ClientLimits(connect_seconds=5.0, answer_seconds=15.0, attempts=1)
"""Of connections that carry letters: what one relay does not take soon, another does."""
TEND_SECONDS = 60.0
STOP_SECONDS = 1.0
"""Letters on their way have so long when the agent is stopped."""


class Service:
    """One agent that serves, from its lock to its last word."""

    def __init__(
        self,
        home: str,
        *,
        relays: Sequence[str] = (),
        token_file: str | None = None,
        on_ready: Callable[[str, str], None] = lambda _name, _relay: None,
        clock: Callable[[], float] = time.time,
        limits: ClientLimits = LIMITS,
    ) -> None:
        """Read what this agent is and which keys it believes.

        Args:
            home: the agent's own folder.
            relays: given by hand, in place of what DNS and the configuration say.
            token_file: in place of the configuration's.
            on_ready: called with (name, relay's URL) once, when the first poll was answered.
            clock: seconds since 1970.
            limits: of connections that carry letters.

        Raises:
            UsageError: the configuration cannot be used, or there is no trust.json.
            NotFoundError: the agent has no keys yet.
            RefusedError: a key file is open to others.
        """
        state = AgentState(home)
        config, pins = state.config(), state.followed_pins()
        for damage in state.damages():
            tell(HomeDamaged(damage))
        self._home = home
        self._pins = pins
        self._on_ready = on_ready
        self._clock = clock
        self._open_sources = partial(
            Sources, config, Path(home) / "relays.json", relays=relays, token_file=token_file, limits=limits
        )
        identity = load_agent_identity(home)
        self._author = Author(name_of(config.name), config.site or "", identity, load_report_signer(home))
        self._sealing = load_sealing_key(home)
        self._operations = Operations(state, config, pins, self._sealing, relays=relays, token_file=token_file)

    async def serve(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set. Runners are left alone then: the next process collects their results.

        Raises:
            LockedError: another process serves this home.
            StoreError: the journal cannot be read.
            UsageError: a relay cannot be asked, as a proxy or an authority cannot be used.
        """
        lock = await asyncio.to_thread(_take_lock, self._home)
        try:
            journal = await asyncio.to_thread(self._open_journal)
            cursors = await asyncio.to_thread(Cursors, self._home)
            async with self._open_sources() as sources:
                sources.in_order()  # Opens them, which contacts none: a mistake in their settings ends the start.
                await self._work(journal, cursors, sources, stop)
        finally:
            os.close(lock)

    def _open_journal(self) -> OperationJournal:
        journal = OperationJournal(self._home)
        journal.sweep()
        journal.forget(self._clock())
        return journal

    async def _work(self, journal: OperationJournal, cursors: Cursors, sources: Sources, stop: asyncio.Event) -> None:
        relays, name, key = MailRelays(sources), self._author.name, self._author.identity.fingerprint
        tell(AgentStarted(importlib.metadata.version("waystation"), os.getpid(), name, key, self._home))
        outbox = Outbox(name, relays.for_mail)
        reporter = Reporter(self._author, journal, outbox, self._clock)
        async with asyncio.TaskGroup() as tasks:
            scheduler = Scheduler(self._operations, journal, reporter, tasks, self._clock)
            me = Me(name, key, self._sealing)
            inbox = Inbox(me, self._pins, journal, scheduler, reporter, self._clock)
            poller = Poller(relays, cursors, inbox, reporter, self._tell_ready)
            always = (poller.run(), outbox.run(), _look_for_relays(sources), _tend(sources, inbox))
            standing = [tasks.create_task(each) for each in always]
            if not relays.for_mail():
                tell(NoRelay(tuple(sources.notes) or ("none is configured",)))
            inbox.take_up()
            await stop.wait()
            await outbox.flush(STOP_SECONDS)
            for task in standing:
                task.cancel()
            tell(AgentStopped(scheduler.leave()))

    def _tell_ready(self, relay: str) -> None:
        tell(AgentReady(relay))
        self._on_ready(self._author.name, relay)


async def _look_for_relays(sources: Sources) -> None:
    """Ask DNS again whenever its answers have come to their end."""
    while True:
        await asyncio.sleep(sources.ttl * random.uniform(1.0, 1.1))  # noqa: S311 - spreads load, guards nothing
        await sources.look_again()


async def _tend(sources: Sources, inbox: Inbox) -> None:
    """Do what is due now and then."""
    told = EndingsTold()
    while True:
        await asyncio.sleep(TEND_SECONDS * random.uniform(0.8, 1.2))  # noqa: S311 - spreads load, guards nothing
        try:
            await sources.measure()
            told.tell(sources.endings(), datetime.now(UTC))
            await inbox.forget()
        except WaystationError as error:
            tell(TendingFailed(str(error)))


def name_of(configured: str) -> str:
    """The agent's name: as configured, else of the host. Raises `UsageError` where relays would not take it."""
    import socket

    name = configured or socket.gethostname()
    if not re.search(messages.AGENT_NAME, name):
        raise UsageError(f"{name!r} is no name for an agent", hint="Set 'name' in agent.yaml: letters, digits, . _ -")
    return name


def lock_path(home: str) -> str:
    """What `agent serve` holds locked."""
    return os.path.join(home, "serve.lock")


def _take_lock(home: str) -> int:
    for _ in range(20):
        lock = platform.lock_file(lock_path(home))
        if lock is not None:
            return lock
        # 'agent status' may be looking whether it is taken.
        time.sleep(0.01)
    raise LockedError(f"another 'agent serve' works in {home}", hint="One agent a home: stop the other one first")
