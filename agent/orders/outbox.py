"""What an agent has to say, until the orchestrator has it: reports, and the output of scripts.

A final report is kept until it is acknowledged. It goes at once to the closest relay that takes it; one that is
not acknowledged is given to the other relays too, and again to one that lost its mail. Output is read from its file when
it is sent, so nothing of it is held in memory, and each relay gets it from where it has it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from relay.errors import ConflictError, WaystationError
from relay.protocol import messages
from relay.protocol.connection import Connection
from relay.protocol.mail_client import MailClient
from relay.support.persistence import Persistence

REPEAT_SECONDS = 30.0
"""A final report that is not acknowledged after that goes to the next relay as well."""
PERSISTENCE = Persistence(first_pause=0.3, longest_pause=15.0, spread=2 / 3)
"""Before all relays are tried again when none takes what there is to say."""
NOTES_MAX = 64
"""Letters that are sent once and not kept: progress and refusals. Of more than that the oldest are dropped."""
_LOG_BATCH = 16
"""Pieces of output in one request."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Kept:
    """A final report on its way, and how much of the output each relay has.

    Attributes:
        logged_to: bytes from the beginning that a relay has, by its URL.
        numbered: makes the final report anew, under another number.
    """

    deployment: str
    operation: str
    letter: messages.ReportLetter | None = None
    reported_to: set[str] = field(default_factory=set)
    sent_at: float = 0.0
    log: str = ""
    log_size: int = 0
    logged_to: dict[str, int] = field(default_factory=dict)
    numbered: Callable[[], messages.ReportLetter] | None = None


_Addressed = tuple[str, messages.ReportLetter]
"""A letter, and the deployment that it is about."""
Relays = Callable[[], Sequence[Connection]]
"""The relays to give mail to, the one to ask first in front."""


@dataclass(eq=False)
class Outbox:
    """Sends as the agent `name`, in two tasks of its own: reports never wait behind output."""

    name: str
    relays: Relays
    _kept: dict[str, _Kept] = field(default_factory=dict, init=False)
    _notes: dict[tuple[str, str], _Addressed] = field(default_factory=dict, init=False)
    _reports_wait: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _logs_wait: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    # --- what is said

    def note(self, deployment: str, letter: messages.ReportLetter, kind: str) -> None:
        """Send this once, unless a newer one of its kind about the same operation comes first."""
        self._notes.pop((letter.operation, kind), None)
        self._notes[letter.operation, kind] = (deployment, letter)
        while len(self._notes) > NOTES_MAX:
            del self._notes[next(iter(self._notes))]
        self._reports_wait.set()

    def final(
        self, deployment: str, letter: messages.ReportLetter, renumber: Callable[[], messages.ReportLetter]
    ) -> None:
        """Send this until it is acknowledged. `renumber` makes the same report under a number that was never used."""
        self._notes.pop((letter.operation, "progress"), None)
        kept = self._of(deployment, letter.operation)
        kept.letter, kept.numbered = letter, renumber
        self._reports_wait.set()

    def log(self, deployment: str, operation: str, path: str, size: int) -> None:
        """The output in `path` has `size` bytes now."""
        kept = self._of(deployment, operation)
        kept.log, kept.log_size = path, size
        self._logs_wait.set()

    def again(self, operation: str, relay: str) -> None:
        """Its order came once more, by this relay."""
        kept = self._kept.get(operation)
        if kept is not None and time.monotonic() - kept.sent_at > REPEAT_SECONDS:
            kept.reported_to.discard(relay)
            self._reports_wait.set()

    def acknowledged(self, operations: Iterable[str]) -> None:
        for operation in operations:
            self._kept.pop(operation, None)

    def lost(self, relay: str) -> None:
        """This relay begins anew: it has nothing of what it was given."""
        for kept in self._kept.values():
            kept.reported_to.discard(relay)
            kept.logged_to.pop(relay, None)
        self._reports_wait.set()
        self._logs_wait.set()

    def _of(self, deployment: str, operation: str) -> _Kept:
        return self._kept.setdefault(operation, _Kept(deployment, operation))

    # --- sending

    async def run(self) -> None:
        """Send, for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._work(self._reports_wait, self._send_reports))
            tasks.create_task(self._work(self._logs_wait, self._send_logs))

    async def _work(self, wakes: asyncio.Event, send: Callable[[], Awaitable[bool]]) -> None:
        failures = 0
        while True:
            wakes.clear()
            if await send():
                failures = 0
                with suppress(TimeoutError):
                    async with asyncio.timeout(REPEAT_SECONDS / 2):
                        await wakes.wait()
            else:
                failures += 1
                await asyncio.sleep(PERSISTENCE.pause(failures))

    async def flush(self, seconds: float) -> None:
        """Wait until everything that was said stands at some relay, or the time is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._unsent() or self._logs_lag():  # noqa: ASYNC110 - a look now and then, for a moment
                    await asyncio.sleep(0.02)

    # --- reports

    async def _send_reports(self) -> bool:
        """Whether there is nothing left that no relay has."""
        for relay in self.relays():
            if await self._give_reports(relay, self._unsent()) and not self._unsent():
                return await self._repeat()
        return not self._unsent()

    def _unsent(self) -> list[_Addressed]:
        """What no relay has yet."""
        new = [(kept.deployment, kept.letter) for kept in self._kept.values() if kept.letter and not kept.reported_to]
        return [*self._notes.values(), *new]

    async def _repeat(self) -> bool:
        """Give what was not acknowledged for a while to one more relay."""
        since = time.monotonic() - REPEAT_SECONDS
        for relay in self.relays():
            late = [
                (kept.deployment, kept.letter)
                for kept in self._kept.values()
                if kept.letter and kept.reported_to and kept.sent_at < since and relay.url not in kept.reported_to
            ]
            if late and await self._give_reports(relay, late):
                self._logs_wait.set()
        return True

    async def _give_reports(self, relay: Connection, letters: list[_Addressed]) -> bool:
        by_deployment: dict[str, list[messages.ReportLetter]] = {}
        for deployment, letter in letters:
            by_deployment.setdefault(deployment, []).append(letter)
        return all([await self._post_reports(relay, deployment, many) for deployment, many in by_deployment.items()])

    async def _post_reports(self, relay: Connection, deployment: str, letters: list[messages.ReportLetter]) -> bool:
        for start in range(0, len(letters), _LOG_BATCH):
            part = letters[start : start + _LOG_BATCH]
            try:
                await MailClient(relay).post_reports(
                    self.name, messages.ReportsRequest(deployment=deployment, reports=tuple(part))
                )
            except ConflictError:
                if len(part) == 1:
                    self._contradicted(part[0])
                elif not all([await self._post_reports(relay, deployment, [letter]) for letter in part]):
                    return False
            except WaystationError as error:
                _log.warning("agent.report_not_taken: %s", error, extra={"relay": relay.url})
                return False
            else:
                self._delivered(relay.url, part)
        return True

    def _delivered(self, relay: str, letters: list[messages.ReportLetter]) -> None:
        for letter in letters:
            kept = self._kept.get(letter.operation)
            if kept is not None and kept.letter is letter:
                kept.reported_to.add(relay)
                kept.sent_at = time.monotonic()
            self._drop_note(letter)

    def _contradicted(self, letter: messages.ReportLetter) -> None:
        """Another report has this number there: of this agent, before a crash made it forget. A note is not worth a word."""
        kept = self._kept.get(letter.operation)
        if kept is not None and kept.letter is letter and kept.numbered is not None:
            kept.letter = kept.numbered()
            self._reports_wait.set()
        self._drop_note(letter)

    def _drop_note(self, letter: messages.ReportLetter) -> None:
        for key in [key for key, (_, noted) in self._notes.items() if noted is letter]:
            del self._notes[key]

    # --- output

    def _log_lags(self, kept: _Kept) -> bool:
        return kept.log_size > max(kept.logged_to.values(), default=0)

    def _logs_lag(self) -> bool:
        return any(self._log_lags(kept) for kept in self._kept.values())

    async def _send_logs(self) -> bool:
        """Whether there is nothing left that no relay has."""
        for relay in self.relays():
            for kept in list(self._kept.values()):
                if not await self._give_log(relay, kept):
                    break
        return not self._logs_lag()

    async def _give_log(self, relay: Connection, kept: _Kept) -> bool:
        while self._wants_log(relay.url, kept):
            offset = kept.logged_to.get(relay.url, 0)
            pieces = await asyncio.to_thread(_pieces, kept.operation, kept.log, offset, kept.log_size)
            if not pieces:
                kept.log_size = offset
                return True
            try:
                await MailClient(relay).post_logs(
                    self.name, messages.LogsRequest(deployment=kept.deployment, pieces=tuple(pieces))
                )
            except ConflictError:
                # The output of a first run that was lost, where an operation was repeated: it stays as it is there.
                _log.warning("agent.log_contradicted", extra={"relay": relay.url, "operation": kept.operation})
            except WaystationError as error:
                _log.warning("agent.log_not_taken: %s", error, extra={"relay": relay.url})
                return False
            kept.logged_to[relay.url] = pieces[-1].offset + len(pieces[-1].data)
        return True

    def _wants_log(self, relay: str, kept: _Kept) -> bool:
        """Where the report is, the whole output should be; before, one relay is enough."""
        has = kept.logged_to.get(relay, 0)
        return has < kept.log_size and (self._log_lags(kept) or relay in kept.reported_to)


def _pieces(operation: str, path: str, offset: int, end: int) -> list[messages.LogPiece]:
    pieces: list[messages.LogPiece] = []
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            while offset < end and len(pieces) < _LOG_BATCH:
                data = file.read(min(messages.LOG_PIECE_MAX, end - offset))
                if not data:
                    break
                pieces.append(messages.LogPiece(operation=operation, offset=offset, data=data))
                offset += len(data)
    except OSError:
        return []
    return pieces
