"""What an agent has to say, until the orchestrator has it: reports, and the output of scripts.

A final report is kept until it is acknowledged. It goes at once to the two closest relays that take it, as one of them may
keep it to itself; one that is not acknowledged is given to the others too, and again to one that lost its mail. Output is
read from its file when it is sent, so nothing of it is held in memory, and each relay gets it from where it has it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from agent.acts import ReportNotTaken
from agent.orders.lanes import Lanes, Relays
from relay.audit.event import tell
from relay.errors import ConflictError, WaystationError
from relay.protocol import messages
from relay.protocol.connection import Connection
from relay.protocol.mail_client import MailClient

COPIES = 2
"""Relays that get a report at once."""
REPEAT_SECONDS = 30.0
"""A final report that is not acknowledged after that goes to the next relay as well. No letter is said again sooner."""
NOTES_MAX = 64
"""Letters that are sent once and not kept: progress and refusals. Of more than that the oldest are dropped."""
LOG_SECONDS = 0.1
"""Output waits so long for more of it: what comes in a moment is one letter, and of a short script it follows the end."""
_LOG_BATCH = 16
"""Pieces of output in one request."""


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

    def is_due(self, relay: str, place: int, now: float) -> bool:
        """Whether its report is to go to this relay, which is so many places behind the first."""
        if self.letter is None or relay in self.reported_to:
            return False
        is_late = bool(self.reported_to) and now - self.sent_at > REPEAT_SECONDS
        return is_late or (place < COPIES and len(self.reported_to) < COPIES)


@dataclass(slots=True)
class _Note:
    """A letter that is sent once, to `copies` relays."""

    deployment: str
    letter: messages.ReportLetter
    copies: int
    given_to: set[str] = field(default_factory=set)

    def is_due(self, relay: str, place: int) -> bool:
        return relay not in self.given_to and place < self.copies


_Addressed = tuple[str, messages.ReportLetter]
"""A letter, and the deployment that it is about."""


@dataclass(eq=False)
class Outbox:
    """Sends as the agent `name`, in tasks of its own: reports never wait behind output, nor behind a relay that hangs."""

    name: str
    relays: Relays
    _kept: dict[str, _Kept] = field(default_factory=dict, init=False)
    _notes: dict[tuple[str, str], _Note] = field(default_factory=dict, init=False)
    _said: dict[str, float] = field(default_factory=dict, init=False)
    """Letters that were said again, by name, and when."""
    _reports: Lanes = field(init=False)
    _logs: Lanes = field(init=False)
    _log_timer: asyncio.TimerHandle | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Nothing is sent before it runs."""
        self._reports = Lanes(self.relays, self._has_reports, self._give_reports, REPEAT_SECONDS / 2)
        self._logs = Lanes(self.relays, self._has_logs, self._give_logs, REPEAT_SECONDS / 2)

    # --- what is said

    def note(self, deployment: str, letter: messages.ReportLetter, kind: str, *, copies: int = COPIES) -> None:
        """Send this once, unless a newer one of its kind about the same operation comes first."""
        self._notes.pop((letter.operation, kind), None)
        self._notes[letter.operation, kind] = _Note(deployment, letter, copies)
        while len(self._notes) > NOTES_MAX:
            del self._notes[next(iter(self._notes))]
        self._reports.wake()

    def final(
        self, deployment: str, letter: messages.ReportLetter, renumber: Callable[[], messages.ReportLetter]
    ) -> None:
        """Send this until it is acknowledged. `renumber` makes the same report under a number that was never used."""
        for kind in ("running", "progress"):
            self._notes.pop((letter.operation, kind), None)
        kept = self._of(deployment, letter.operation)
        kept.letter, kept.numbered = letter, renumber
        self._reports.wake()

    def log(self, deployment: str, operation: str, path: str, size: int) -> None:
        """The output in `path` has `size` bytes now."""
        kept = self._of(deployment, operation)
        kept.log, kept.log_size = path, size
        if self._log_timer is None:
            self._log_timer = asyncio.get_running_loop().call_later(LOG_SECONDS, self._send_logs)

    def _send_logs(self) -> None:
        self._log_timer = None
        self._logs.wake()

    def again(self, operation: str, relay: str) -> None:
        """Its order came once more, by this relay."""
        kept = self._kept.get(operation)
        if kept is not None and time.monotonic() - kept.sent_at > REPEAT_SECONDS:
            kept.reported_to.discard(relay)
            self._reports.wake()

    def may_say_again(self, what: str) -> bool:
        """Whether what may have been said before is to be said now: not where a relay asks for it all the time."""
        now = time.monotonic()
        if now - self._said.get(what, -REPEAT_SECONDS) < REPEAT_SECONDS:
            return False
        self._said.pop(what, None)
        self._said[what] = now
        while len(self._said) > NOTES_MAX:
            del self._said[next(iter(self._said))]
        return True

    def acknowledged(self, operations: Iterable[str]) -> None:
        for operation in operations:
            self._kept.pop(operation, None)

    def lost(self, relay: str) -> None:
        """This relay begins anew: it has nothing of what it was given."""
        for kept in self._kept.values():
            kept.reported_to.discard(relay)
            kept.logged_to.pop(relay, None)
        self._reports.wake()
        self._logs.wake()

    def _of(self, deployment: str, operation: str) -> _Kept:
        return self._kept.setdefault(operation, _Kept(deployment, operation))

    # --- sending

    async def run(self) -> None:
        """Send, for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._reports.run())
            tasks.create_task(self._logs.run())

    async def flush(self, seconds: float) -> None:
        """Wait until everything that was said stands at some relay, or the time is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._is_unsaid() or self._logs_lag():  # noqa: ASYNC110 - a look now and then, for a moment
                    await asyncio.sleep(0.02)

    def _is_unsaid(self) -> bool:
        """Whether there is something that no relay has."""
        return any(not note.given_to for note in self._notes.values()) or any(
            kept.letter and not kept.reported_to for kept in self._kept.values()
        )

    # --- reports

    def _has_reports(self, relay: str, place: int) -> bool:
        return bool(self._due(relay, place))

    def _due(self, relay: str, place: int) -> list[_Addressed]:
        """What this relay is to get: ends first, as they are waited for."""
        now = time.monotonic()
        ends = [(k.deployment, k.letter) for k in self._kept.values() if k.letter and k.is_due(relay, place, now)]
        return ends + [(note.deployment, note.letter) for note in self._notes.values() if note.is_due(relay, place)]

    async def _give_reports(self, relay: Connection, place: int) -> bool:
        by_deployment: dict[str, list[messages.ReportLetter]] = {}
        for deployment, letter in self._due(relay.url, place):
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
                    return False
                if not all([await self._post_reports(relay, deployment, [letter]) for letter in part]):
                    return False
            except WaystationError as error:
                if not self._reports.fails(relay.url):
                    tell(ReportNotTaken(relay.url, "report", str(error)))
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
                # Where the report is, the whole output should be.
                self._logs.wake()
        sent = {id(letter) for letter in letters}
        wanted = min(COPIES, len(self.relays()))
        for key, note in list(self._notes.items()):
            if id(note.letter) in sent:
                note.given_to.add(relay)
                if len(note.given_to) >= min(note.copies, wanted):
                    del self._notes[key]

    def _contradicted(self, letter: messages.ReportLetter) -> None:
        """Another report has this number there: of this agent, before a crash made it forget. A note is not worth a word."""
        kept = self._kept.get(letter.operation)
        if kept is not None and kept.letter is letter and kept.numbered is not None:
            kept.letter = kept.numbered()
        for key in [key for key, note in self._notes.items() if note.letter is letter]:
            del self._notes[key]

    # --- output

    def _log_lags(self, kept: _Kept) -> bool:
        return kept.log_size > max(kept.logged_to.values(), default=0)

    def _logs_lag(self) -> bool:
        return any(self._log_lags(kept) for kept in self._kept.values())

    def _has_logs(self, relay: str, place: int) -> bool:
        return any(self._wants_log(relay, place, kept) for kept in self._kept.values())

    async def _give_logs(self, relay: Connection, place: int) -> bool:
        return all([await self._give_log(relay, place, kept) for kept in list(self._kept.values())])

    async def _give_log(self, relay: Connection, place: int, kept: _Kept) -> bool:
        while self._wants_log(relay.url, place, kept):
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
                tell(ReportNotTaken(relay.url, "output", f"{kept.operation}: other output is there"))
            except WaystationError as error:
                if not self._logs.fails(relay.url):
                    tell(ReportNotTaken(relay.url, "output", str(error)))
                return False
            kept.logged_to[relay.url] = pieces[-1].offset + len(pieces[-1].data)
        return True

    def _wants_log(self, relay: str, place: int, kept: _Kept) -> bool:
        """Where the report is, the whole output should be; before, the first relay is enough."""
        has = kept.logged_to.get(relay, 0)
        return has < kept.log_size and (relay in kept.reported_to or (not place and self._log_lags(kept)))


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
