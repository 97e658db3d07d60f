"""`waystation agent serve`: be there, accept orders, act on them once, and say what became of them.

The agent polls the two closest relays at one time. An order that both bring is one order: its operation is written down
before anything acts, and whatever comes under the same id later is answered, not repeated. What changes the machine
(scripts, services, switching, settling) is done one after another; looking and pulling goes on beside it. Being killed at
any moment costs nothing: runners live on by themselves, and the journal says what was begun.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import random
import re
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from agent import platform
from agent.operations import Ended, Job, Operations, last_run
from agent.orders.acceptance import Accepted, Known, Me, Refused, fenced_off, judge, out_of_time
from agent.orders.envelopes import order_digest, sign_presence, sign_report, verify_order
from agent.orders.journal import Entry, Journal
from agent.orders.keys import AgentIdentity, load_agent_identity, load_report_signer, load_sealing_key
from agent.orders.orders import Acknowledge, ControlService, Order, Presence, Report, RunScript, Settle, Stop, Switch
from agent.orders.outbox import Outbox
from agent.relays.sources import Sources
from agent.trees.installed import AgentState
from relay.errors import LockedError, SignatureError, StoreError, UsageError, WaystationError
from relay.protocol import messages
from relay.protocol.client import RelayClient
from relay.protocol.connection import ClientLimits
from relay.protocol.mail_client import MailClient

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

POLLED = 2
"""Relays polled at one time."""
LIMITS = ClientLimits(connect_seconds=5.0, answer_seconds=15.0, attempts=1)
"""Of letters: what one relay does not take soon, another does."""
RUNNING_AFTER = 0.5
"""Seconds before an operation that is not over says that it runs; a shorter one only says its end."""
PROGRESS_SECONDS = 1.0
PAUSE_MIN, PAUSE_MAX = 0.5, 10.0
"""Seconds before a relay that failed is polled again; doubled each time, and jittered."""
TEND_SECONDS = 60.0
STOP_SECONDS = 1.0
"""For letters on their way, when the agent is stopped."""
SCRIPTS_KEPT = 20
"""Packages of scripts that stay when a deployment has ended."""
_REFUSED_SHOWN = 8
_SETTLED_ACTIONS = (Switch, Settle)
"""Repeated later, they could undo what came after them: their results are kept durably."""
_ONE_AT_A_TIME = (RunScript, ControlService, Switch, Settle)
_RUNS = (RunScript, ControlService)
_REFUSAL_NUMBERS = 1 << 52
_STOPS_KEPT = 1024

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Running:
    """An operation under way. `begun`: it has its turn."""

    entry: Entry
    order: Order
    begun: bool = False
    stopped: bool = False
    done: int = 0
    whole: int = 0
    number: int = 0
    task: asyncio.Task[None] | None = None


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
        """Read what it is and whom it believes.

        Args:
            home: the agent's own folder.
            relays: given by hand, in place of what DNS and the configuration say.
            token_file: in place of the configuration's.
            on_ready: told (name, relay's URL) once, when the first poll was answered.
            clock: seconds since 1970.
            limits: of the letters' roads.

        Raises:
            UsageError: the configuration cannot be used, or there is no trust.json.
            NotFoundError: the agent has no keys yet.
            RefusedError: a key file is open to others.
        """
        self._home = home
        self._state = AgentState(home)
        self._config = self._state.config()
        self._given = tuple(relays)
        self._token_file = token_file
        self._on_ready: Callable[[str, str], None] | None = on_ready
        self._clock = clock
        self._limits = limits
        pins = self._state.pins()
        if pins is None:
            raise UsageError(
                f"{home} holds no trust.json, so every order would be refused",
                hint="Put the origin's trust.json beside agent.yaml, or use 'agent init --trust FILE'",
            )
        self._pins = pins
        self._identity: AgentIdentity = load_agent_identity(home)
        self._signer: CryptoSigner = load_report_signer(home)
        self._me = Me(name_of(self._config.name), self._identity.fingerprint)
        self._operations = Operations(
            self._state, self._config, pins, load_sealing_key(home), relays=self._given, token_file=token_file
        )
        self._version = importlib.metadata.version("waystation")
        self._random = random.Random()  # noqa: S311 - spreads load, guards nothing
        self._journal: Journal
        self._sources: Sources
        self._tasks: asyncio.TaskGroup
        self._outbox = Outbox(self._me.name, self._letter_relays)
        self._taking = asyncio.Lock()
        self._turn = asyncio.Lock()
        self._running: dict[str, _Running] = {}
        self._stops: dict[str, str] = {}
        self._cursors: dict[str, messages.Cursor] = {}
        self._polled: dict[int, str] = {}
        self._fails: dict[str, int] = {}
        self._down_until: dict[str, float] = {}

    # --- the story

    async def serve(self, stop: asyncio.Event) -> None:
        """Until `stop` is set. Runners are left alone then: whoever serves next collects their results.

        Raises:
            LockedError: another process serves this home.
            StoreError: the journal cannot be read.
        """
        lock = await asyncio.to_thread(_take_lock, self._home)
        try:
            self._journal = await asyncio.to_thread(self._open_journal)
            self._cursors = await asyncio.to_thread(_load_cursors, self._cursor_path)
            async with Sources(
                self._config,
                Path(self._home) / "relays.json",
                relays=self._given,
                token_file=self._token_file,
                limits=self._limits,
            ) as self._sources:
                await self._work(stop)
        finally:
            os.close(lock)

    def _open_journal(self) -> Journal:
        journal = Journal(self._home)
        journal.sweep()
        journal.forget(self._clock())
        return journal

    async def _work(self, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as self._tasks:
            tasks = [self._tasks.create_task(each) for each in self._standing()]
            self._take_up()
            await stop.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_SECONDS):
                    while not self._outbox.is_empty:  # noqa: ASYNC110 - a look now and then, for a moment
                        await asyncio.sleep(0.02)
            for task in (*tasks, *(running.task for running in self._running.values() if running.task)):
                task.cancel()

    def _standing(self) -> list[Coroutine[Any, Any, None]]:
        return [*(self._poll(slot) for slot in range(POLLED)), self._outbox.run(), self._tend(), _warm_up()]

    def _take_up(self) -> None:
        """What was under way when the process before this one ended."""
        if not self._letter_relays():
            _log.warning("agent.no_relay: no relay that carries orders is known (%s)", "; ".join(self._sources.notes))
        for entry in self._journal.unacknowledged():
            self._say_final(entry)
        for entry in self._journal.unfinished():
            try:
                order = self._journal.order(entry)
                barred = self._barred(entry, order)
            except WaystationError as error:
                _log.error("agent.operation_unreadable", extra={"operation": entry.operation, "reason": str(error)})
                continue
            self._start(entry, order, barred=barred)

    def _barred(self, entry: Entry, order: Order) -> str:
        """Why an order that was accepted long ago must not begin any more; empty where it may."""
        try:
            verify_order(self._journal.envelope(entry), self._pins)
        except SignatureError as error:
            return f"its signature counts no more ({error.message})"
        found = out_of_time(order, self._journal.memory(), self._clock()) or fenced_off(order, self._journal.fences)
        return "" if found is None else found[1]

    async def _tend(self) -> None:
        """What is due now and then."""
        looked = time.monotonic()
        while True:
            await asyncio.sleep(TEND_SECONDS * self._random.uniform(0.8, 1.2))
            try:
                if time.monotonic() - looked >= self._sources.ttl:
                    looked = time.monotonic()
                    await self._sources.look_again()
                await self._sources.measure()
                async with self._taking:
                    await asyncio.to_thread(self._journal.forget, self._clock())
            except WaystationError as error:
                _log.warning("agent.tending_failed", extra={"reason": str(error)})

    # --- relays

    def _letter_relays(self) -> list[RelayClient]:
        """Those that are polled in front, and those that just failed last."""
        polled = set(self._polled.values())
        relays = [source for source in self._sources.in_order() if isinstance(source, RelayClient)]
        return sorted(relays, key=lambda relay: (relay.url not in polled, self._is_down(relay.url)))

    def _is_down(self, url: str) -> bool:
        return time.monotonic() < self._down_until.get(url, 0.0)

    def _wanted(self) -> list[RelayClient]:
        """The relays to poll: the closest that did not just fail."""
        relays = [source for source in self._sources.in_order() if isinstance(source, RelayClient)]
        return [relay for relay in relays if not self._is_down(relay.url)][:POLLED]

    async def _poll(self, slot: int) -> None:
        """Poll one relay after another, for ever."""
        while True:
            others = {url for other, url in self._polled.items() if other != slot}
            relay = next((relay for relay in self._wanted() if relay.url not in others), None)
            if relay is None:
                await asyncio.sleep(self._random.uniform(0.3, 0.9))
                continue
            self._polled[slot] = relay.url
            try:
                await self._poll_relay(relay)
            except WaystationError as error:
                self._failed(relay.url, error)
            finally:
                self._polled.pop(slot, None)

    async def _poll_relay(self, relay: RelayClient) -> None:
        """For as long as it answers and is among the closest. The first poll is answered at once: it proves the road."""
        wait = 0.0
        while True:
            asked = time.monotonic()
            cursor = self._cursors.get(relay.url)
            request = messages.PollRequest(presence=self._presence(), after=cursor, wait=wait)
            answer = await MailClient(relay).poll(self._me.name, request)
            self._answered(relay.url)
            if cursor is not None and cursor.epoch != answer.epoch:
                self._outbox.lost(relay.url)
            for letter in answer.orders:
                await self._take(letter, relay.url)
            await self._advance(relay.url, answer)
            if not any(relay.url == wanted.url for wanted in self._wanted()):
                return
            if wait and not answer.orders and time.monotonic() - asked < 1.0:
                # Nothing, and at once: it is about to stop. Who answers next may know nothing of before.
                await asyncio.sleep(self._random.uniform(0.1, 0.3))
                wait = 0.0
            else:
                wait = messages.POLL_SECONDS

    def _answered(self, url: str) -> None:
        self._fails.pop(url, None)
        self._down_until.pop(url, None)
        if self._on_ready is not None:
            self._on_ready(self._me.name, url)
            self._on_ready = None

    def _failed(self, url: str, error: WaystationError) -> None:
        fails = self._fails[url] = self._fails.get(url, 0) + 1
        pause = min(PAUSE_MIN * 2 ** (fails - 1), PAUSE_MAX) * self._random.uniform(0.5, 1.5)
        self._down_until[url] = time.monotonic() + pause
        self._sources.failed(url, error)
        if fails == 1:
            _log.warning("agent.poll_failed: %s", error, extra={"relay": url})

    @property
    def _cursor_path(self) -> str:
        return os.path.join(self._home, "cursors.json")

    async def _advance(self, url: str, answer: messages.PollAnswer) -> None:
        """Everything up to here was taken, and stands in the journal: no later start need see it again."""
        before = self._cursors.get(url)
        same = before.number if before is not None and before.epoch == answer.epoch else 0
        cursor = messages.Cursor(answer.epoch, max((letter.number for letter in answer.orders), default=same))
        if cursor != before:
            self._cursors[url] = cursor
            await asyncio.to_thread(_save_cursors, self._cursor_path, dict(self._cursors))

    def _presence(self) -> bytes:
        refused = [f"{each.code}: {each.operation}: {each.text}"[:200] for each in self._journal.refusals()]
        presence = Presence(
            format=1,
            name=self._me.name,
            signing=self._identity.signing_public,
            sealing=self._identity.sealing_public,
            version=self._version,
            system=platform.system_name(),
            site=self._config.site or "",
            time=self._clock(),
            fences=dict(self._journal.fences),
            refused=tuple(refused[-_REFUSED_SHOWN:]),
        )
        return sign_presence(presence, self._signer)

    # --- orders

    async def _take(self, letter: messages.NumberedOrder, relay: str) -> None:
        """Judge it, write it down, and only then act."""
        async with self._taking:
            verdict = judge(letter.envelope, self._pins, self._me, self._journal.memory(), self._clock())
            try:
                match verdict:
                    case Refused():
                        await self._refuse(verdict, letter.operation, relay)
                    case Known():
                        self._answer_again(self._journal.entries[verdict.operation], relay)
                    case Accepted(order=Order(action=Stop() as action) as order):
                        await asyncio.to_thread(self._journal.lead, order)
                        self._stop(action, order)
                    case Accepted(order=Order(action=Acknowledge() as action) as order):
                        await asyncio.to_thread(self._journal.lead, order)
                        await asyncio.to_thread(self._acknowledge, action, order)
                    case Accepted(order=order, digest=digest):
                        entry = await asyncio.to_thread(self._journal.accept, order, digest, letter.envelope)
                        self._start(entry, order)
            except StoreError as error:
                # Not obeyed: without a note of it, it could be done twice.
                text = f"this machine cannot write it down: {error.message}"
                order_of = verdict.order if isinstance(verdict, Accepted | Refused) else None
                await self._refuse(Refused("disk", text, verdict.digest, order_of), letter.operation, relay)
            except Exception as error:
                # Whatever is wrong with one letter must not end the agent: it would be read again at every start.
                _log.exception("agent.letter_failed", extra={"operation": letter.operation, "relay": relay})
                text = f"the agent failed over it: {type(error).__name__}"
                await self._refuse(Refused("internal", text, order_digest(letter.envelope)), letter.operation, relay)

    async def _refuse(self, refused: Refused, claimed: str, relay: str) -> None:
        operation = claimed if refused.order is None else refused.order.operation
        news = await asyncio.to_thread(
            self._journal.refuse,
            refused.code,
            refused.text,
            operation=operation,
            digest=refused.digest,
            relay=relay,
            now=self._clock(),
        )
        if news:
            _log.warning("agent.order_refused: %s", refused.text, extra={"operation": operation, "relay": relay})
        deployment = operation.partition("/")[0]
        if not (re.search(messages.OPERATION_ID, operation) and re.search(messages.DEPLOYMENT_ID, deployment)):
            return
        # A number that no report of the operation itself ever has: whoever forges a letter must not keep the true
        # operation from being reported.
        report = self._report(
            operation,
            refused.digest,
            _REFUSAL_NUMBERS | int(refused.digest[:12], 16),
            Ended("refused", f"{refused.code}: {refused.text}"),
        )
        kind = f"refused {refused.digest}"
        self._outbox.note(deployment, self._letter(report), kind)

    def _answer_again(self, entry: Entry, relay: str) -> None:
        if entry.report is None:
            return
        if entry.acknowledged:
            envelope = self._journal.report(entry)
            if envelope:
                letter = messages.ReportLetter(operation=entry.operation, number=entry.report.number, envelope=envelope)
                self._outbox.note(entry.deployment, letter, "again")
        else:
            self._outbox.again(entry.operation, relay)

    def _acknowledge(self, action: Acknowledge, order: Order) -> None:
        mine = [op for op in action.operations if self._is_of(op, order.environment)]
        self._journal.acknowledge(mine)
        self._outbox.acknowledged(mine)
        if action.ends:
            self._journal.close(order.environment, order.deployment)
            self._state.prune(self._state.scripts_root, SCRIPTS_KEPT, ())

    def _is_of(self, operation: str, environment: str) -> bool:
        """Who may order in one environment has no say about the others."""
        entry = self._journal.entries.get(operation)
        return entry is not None and entry.environment == environment

    # --- stopping

    def _stop(self, action: Stop, order: Order) -> None:
        running = self._running.get(action.operation)
        if running is None:
            if action.operation not in self._journal.entries:
                # It came before what it is to stop, by another relay.
                self._stops[action.operation] = order.environment
                while len(self._stops) > _STOPS_KEPT:
                    del self._stops[next(iter(self._stops))]
        elif running.order.environment == order.environment:
            self._stop_running(running)

    def _stop_running(self, running: _Running) -> None:
        if running.stopped:
            return
        running.stopped = True
        action = running.order.action
        if isinstance(action, _RUNS) and running.begun:
            self._tasks.create_task(self._stop_run(running))
        elif running.task is not None and not (isinstance(action, _SETTLED_ACTIONS) and running.begun):
            running.task.cancel()

    async def _stop_run(self, running: _Running) -> None:
        from agent.runs import runs

        while running.task is not None and not running.task.done():
            try:
                await asyncio.to_thread(runs.stop, last_run(running.entry.folder))
                return
            except StoreError:
                # It is just being started: there is no folder yet.
                await asyncio.sleep(0.05)

    # --- operations

    def _start(self, entry: Entry, order: Order, *, barred: str = "") -> None:
        running = _Running(entry, order)
        running.stopped = self._stops.pop(entry.operation, None) == order.environment
        self._running[entry.operation] = running
        running.task = self._tasks.create_task(self._operate(running, barred))

    async def _operate(self, running: _Running, barred: str) -> None:
        began = self._clock()
        telling = self._tasks.create_task(self._tell_progress(running))
        try:
            ended = await self._perform(running, barred)
        except asyncio.CancelledError:
            if not running.stopped:
                raise  # the agent ends; whoever serves next takes it up
            _obeyed_cancel()
            ended = Ended("stopped", "it was stopped" if running.begun else "it was stopped before it began")
        finally:
            telling.cancel()
        del self._running[running.entry.operation]
        await self._finish(running, ended, ended.started or began, ended.ended or self._clock())

    async def _perform(self, running: _Running, barred: str) -> Ended:
        if running.stopped:
            return Ended("stopped", "it was stopped before it began")
        job = Job(
            running.order,
            running.entry.folder,
            on_output=lambda offset, data, path: self._hear(running.entry, offset, data, path),
            on_progress=lambda done, whole: _set_progress(running, done, whole),
            barred=barred,
        )
        if not isinstance(running.order.action, _ONE_AT_A_TIME):
            running.begun = True
            return await self._operations.perform(job)
        async with self._turn:
            if await self._may_begin(running):
                running.begun = True
                return await self._operations.perform(job)
        why = fenced_off(running.order, self._journal.fences)
        return Ended("refused", "fenced_off: " + (why[1] if why else ""))

    async def _may_begin(self, running: _Running) -> bool:
        """Whether it still may, now that its turn has come; what runs already is only followed."""
        if fenced_off(running.order, self._journal.fences) is None:
            return True
        if not isinstance(running.order.action, _RUNS):
            return False
        from agent.runs import runs

        return await asyncio.to_thread(runs.state_of, last_run(running.entry.folder)) != "new"

    def _hear(self, entry: Entry, offset: int, data: bytes, path: str) -> None:
        self._outbox.log(entry.deployment, entry.operation, path, offset + len(data))

    async def _finish(self, running: _Running, ended: Ended, started: float, ended_at: float) -> None:
        entry = running.entry
        running.number = self._next_number(running)
        report = self._report(entry.operation, entry.digest, running.number, ended, started, ended_at)
        letter = self._letter(report)
        durable = isinstance(running.order.action, _SETTLED_ACTIONS)
        try:
            await asyncio.to_thread(self._journal.finish, entry, report, letter.envelope, durable=durable)
        except StoreError as error:
            _log.error("agent.report_not_kept", extra={"operation": entry.operation, "reason": str(error)})
        self._say_final(entry)

    # --- reports

    async def _tell_progress(self, running: _Running) -> None:
        await asyncio.sleep(RUNNING_AFTER)
        told: tuple[int, int] | None = None
        while True:
            now = (running.done, running.whole)
            if now != told:
                told = now
                running.number = self._next_number(running)
                ended = Ended("running")
                report = self._report(running.entry.operation, running.entry.digest, running.number, ended)
                report = msgspec.structs.replace(report, done=running.done, whole=running.whole)
                self._outbox.note(running.entry.deployment, self._letter(report), "progress")
            await asyncio.sleep(PROGRESS_SECONDS)

    def _next_number(self, running: _Running) -> int:
        """By the clock, so that it rises across restarts without being kept anywhere."""
        return max(running.number + 1, int(self._clock() * 1000))

    def _report(
        self, operation: str, digest: str, number: int, ended: Ended, started: float = 0.0, ended_at: float = 0.0
    ) -> Report:
        return Report(
            format=1,
            operation=operation,
            deployment=operation.partition("/")[0],
            agent=self._me.name,
            key=self._me.key,
            order=digest,
            number=number,
            state=ended.state,
            reason=ended.reason[:4096],
            exit_status=ended.exit_status,
            started=started,
            ended=ended_at,
            log_bytes=ended.log_bytes,
            log_sha256=ended.log_sha256,
            facts=ended.facts,
        )

    def _letter(self, report: Report) -> messages.ReportLetter:
        try:
            envelope = sign_report(report, self._signer)
        except UsageError:
            # The end must be told, also where all that was found out does not fit.
            envelope = sign_report(msgspec.structs.replace(report, facts=None), self._signer)
        return messages.ReportLetter(operation=report.operation, number=report.number, envelope=envelope)

    def _say_final(self, entry: Entry) -> None:
        report, envelope = entry.report, entry.envelope
        if report is None or envelope is None:
            return
        letter = messages.ReportLetter(operation=entry.operation, number=report.number, envelope=envelope)
        if report.log_bytes:
            from agent.runs.runner import OUTPUT

            path = os.path.join(last_run(entry.folder), OUTPUT)
            self._outbox.log(entry.deployment, entry.operation, path, report.log_bytes)
        self._outbox.final(entry.deployment, letter, lambda: self._renumbered(entry))

    def _renumbered(self, entry: Entry) -> messages.ReportLetter:
        """The same end under a new number: a relay holds something else under the old one."""
        assert entry.report is not None  # noqa: S101 - only a final report is ever renumbered
        report = msgspec.structs.replace(entry.report, number=max(entry.report.number + 1, int(self._clock() * 1000)))
        letter = self._letter(report)
        with suppress(StoreError):
            self._journal.finish(entry, report, letter.envelope, durable=False)
        return letter


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


def _set_progress(running: _Running, done: int, whole: int) -> None:
    running.done, running.whole = done, whole


def _obeyed_cancel() -> None:
    """The cancelling was meant for what this task did, not for the task."""
    task = asyncio.current_task()
    if task is not None:
        task.uncancel()


async def _warm_up() -> None:
    """Load what the first order needs, before it comes."""


def _load_cursors(path: str) -> dict[str, messages.Cursor]:
    """None where there are none: then mail is read from its beginning, and what is known is answered again."""
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(1 << 20), type=dict[str, messages.Cursor])
    except (OSError, ValueError, RecursionError):
        return {}


def _save_cursors(path: str, cursors: dict[str, messages.Cursor]) -> None:
    temporary = f"{path}.tmp"
    with suppress(OSError):
        with open(temporary, "wb") as file:
            file.write(msgspec.json.encode(cursors))
        os.replace(temporary, path)
