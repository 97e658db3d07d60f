"""Letters of one deployment at several relays: out to every relay that is named, in from all of them at once.

Only the roads are known here: relays that are down, come back, or lost their mail. What letters say, and whether it is
to be believed, is the reader's (`orchestrator/fleet/fleet.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from orchestrator.fleet.presence import Answers
from relay.errors import UnreachableError, WaystationError
from relay.protocol import messages
from relay.protocol.mail_client import Brought
from relay.support.persistence import Bearing, Persistence

if TYPE_CHECKING:
    from relay.protocol.mail_client import MailClient


class MailReader(Protocol):
    """Who takes what comes in."""

    async def take_reports(self, relay: str, reports: Sequence[messages.NumberedReport]) -> None: ...

    async def take_pieces(self, relay: str, pieces: Sequence[messages.NumberedPiece]) -> None: ...

    async def take_trouble(self, relay: str, error: WaystationError) -> None:
        """A relay could not be read or written to. It will be tried again."""

    def lose_mail(self, relay: str) -> None:
        """The relay has forgotten letters; perhaps also those that were posted to it."""


@dataclass(frozen=True, slots=True)
class Pauses:
    """Seconds.

    Attributes:
        first: after a relay failed; it doubles up to `longest`.
        ask: for one relay to say who is there.
        grace: for the others to say so, when what has come is enough.
        close: for letters on their way, when the room is closed.
    """

    first: float = 0.2
    longest: float = 5.0
    ask: float = 10.0
    grace: float = 1.0
    close: float = 1.0


class Posting:
    """A letter on its way to several relays, until it is cancelled: a relay that is down may come back."""

    def __init__(self, to: str) -> None:
        self._to = to
        self._tasks: set[asyncio.Task[str]] = set()

    def add(self, task: asyncio.Task[str]) -> None:
        self._tasks.add(task)

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def taken(self, patience: float, or_else: asyncio.Future[Any] | None = None) -> None:
        """Return when the first relay has it, or `or_else` is done.

        Raises:
            UnreachableError: every relay says no, or none took it for `patience` seconds.
        """
        deadline = asyncio.get_running_loop().time() + patience
        pending: set[asyncio.Future[Any]] = {*self._tasks}
        refusals: list[str] = []
        while pending:
            left = max(0.0, deadline - asyncio.get_running_loop().time())
            others = {or_else} if or_else is not None else set()
            done, _ = await asyncio.wait(pending | others, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if done & others:
                return
            if not done:
                raise UnreachableError(f"no relay has taken an order for {self._to} for {patience:.0f} s")
            answers: list[str] = [post.result() for post in done]
            if "" in answers:
                return
            refusals += answers
            pending -= done
        raise UnreachableError(f"no relay takes an order for {self._to}: {'; '.join(sorted(refusals))}")


class Mailroom:
    """Use it as an async context manager. Reports and output are read at every relay while it is open."""

    def __init__(
        self, deployment: str, relays: Mapping[str, MailClient], reader: MailReader, pauses: Pauses | None = None
    ) -> None:
        self._deployment = deployment
        self._relays = relays
        self._reader = reader
        self._pauses = pauses or Pauses()
        self._persistence = Persistence(self._pauses.first, self._pauses.longest, longest_asked=60.0, spread=0.5)
        self._group = asyncio.TaskGroup()
        self._reading: list[asyncio.Task[None]] = []
        self._posting: set[asyncio.Task[str]] = set()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        for name in self._relays:
            self.spawn(self._read_reports(name))
            self.spawn(self._read_pieces(name))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._posting and kind is None:
            await asyncio.wait(self._posting, timeout=self._pauses.close)
        for task in (*self._reading, *self._posting):
            task.cancel()
        await self._group.__aexit__(kind, error, trace)

    def spawn(self, task: Coroutine[Any, Any, None]) -> None:
        """Let `task` run for as long as the room is open."""
        self._reading.append(self._group.create_task(task))

    async def agents(self, is_enough: Callable[[Answers], bool] = lambda _: False) -> Answers:
        """Ask every relay at once who is there. A relay that does not answer in time, or only a moment after there was
        enough without it, is answered for.
        """
        asking = {asyncio.create_task(self._ask(name)): name for name in self._relays}
        answers: dict[str, tuple[messages.AgentSeen, ...] | str] = {}
        pending = set(asking)
        try:
            while pending:
                patience = self._pauses.grace if answers and is_enough(answers) else None
                done, pending = await asyncio.wait(pending, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    break
                answers |= {asking[task]: task.result() for task in done}
        finally:
            for task in pending:
                task.cancel()
        return {name: answers.get(name, f"no answer for {self._pauses.grace:.0f} s") for name in self._relays}

    def post(self, relays: Iterable[str], letter: messages.OrderLetter) -> Posting:
        """Begin to post `letter` to all of these; see `Posting.taken`."""
        posting = Posting(letter.agent)
        for relay in relays:
            self.post_again(posting, relay, letter)
        return posting

    def post_again(self, posting: Posting, relay: str, letter: messages.OrderLetter) -> None:
        """To one more relay, or to one that forgot it."""
        if relay in self._relays:
            task = self._group.create_task(self._post(relay, letter))
            self._posting.add(task)
            task.add_done_callback(self._posting.discard)
            posting.add(task)

    # --- one relay

    async def _ask(self, relay: str) -> tuple[messages.AgentSeen, ...] | str:
        try:
            async with asyncio.timeout(self._pauses.ask):
                return await self._relays[relay].agents()
        except TimeoutError:
            return f"no answer for {self._pauses.ask:.0f} s"
        except WaystationError as error:
            return error.message

    async def _post(self, relay: str, letter: messages.OrderLetter) -> str:
        """Until the relay has it (empty), or says no (why)."""
        async for attempt in self._persistence.tries():
            with attempt:
                try:
                    await self._relays[relay].post_orders([letter])
                except WaystationError as error:
                    await self._reader.take_trouble(relay, error)
                    if isinstance(error, UnreachableError):
                        raise
                    return f"{relay}: {error.message}"
        return ""

    async def _read_reports(self, relay: str) -> None:
        brought = Brought()

        async def read(after: messages.Cursor | None, wait: float) -> _Read:
            answer = await self._relays[relay].reports(self._deployment, after, wait)
            await self._reader.take_reports(relay, answer.reports)
            news = [brought.is_news(letter.envelope) for letter in answer.reports]
            return _Read(_cursor(after, answer.epoch, [letter.number for letter in answer.reports]), any(news))

        await self._read(relay, read)

    async def _read_pieces(self, relay: str) -> None:
        brought = Brought()

        async def read(after: messages.Cursor | None, wait: float) -> _Read:
            answer = await self._relays[relay].logs(self._deployment, after, wait)
            await self._reader.take_pieces(relay, answer.pieces)
            news = [brought.is_news(b"%s %d %s" % (p.operation.encode(), p.offset, p.data)) for p in answer.pieces]
            return _Read(_cursor(after, answer.epoch, [letter.number for letter in answer.pieces]), any(news))

        await self._read(relay, read)

    async def _read(self, relay: str, read: Callable[[messages.Cursor | None, float], Awaitable[_Read]]) -> None:
        """Long poll after long poll. The cursor moves only when everything before it was taken."""
        after: messages.Cursor | None = None
        bearing = Bearing(self._persistence)
        wait = 0.0  # at first, and after trouble, the epoch is asked for at once: what was posted may be gone
        fruitless = 0
        loop = asyncio.get_running_loop()
        while True:
            asked = loop.time()
            try:
                seen, is_news = await read(after, wait)
            except WaystationError as error:
                await self._reader.take_trouble(relay, error)
                # Never given up: the policy has no number of failures.
                await asyncio.sleep(bearing.pause_after(error) or 0.0)
                wait = 0.0
                continue
            if after is not None and seen.epoch != after.epoch:
                self._reader.lose_mail(relay)
            if is_news or (wait and loop.time() - asked > wait / 2):
                fruitless = 0
            elif wait:
                # Nothing new, and at once: a relay that is about to stop, or one that does not wait as it should.
                fruitless += 1
                await asyncio.sleep(self._persistence.pause(fruitless))
            bearing.gain()
            after, wait = seen, messages.POLL_SECONDS


class _Read(NamedTuple):
    """How far one answer brought a reader, and whether there was something in it that this relay did not bring before."""

    cursor: messages.Cursor
    is_news: bool


def _cursor(after: messages.Cursor | None, epoch: str, numbers: list[int]) -> messages.Cursor:
    same = after.number if after is not None and after.epoch == epoch else 0
    return messages.Cursor(epoch=epoch, number=max(numbers, default=same))
