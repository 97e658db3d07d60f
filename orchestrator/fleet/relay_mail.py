"""Letters of one deployment at several relays: out to every relay that is named, in from all of them at once.

Only the roads are known here: relays that are down, come back, or lost their mail. What letters say, and whether it is
to be believed, is the reader's (`orchestrator/fleet/fleet.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from orchestrator.fleet.presence import Answers
from relay.errors import UnreachableError, WaystationError
from relay.protocol import messages
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
        close: for letters on their way, when the room is closed.
    """

    first: float = 0.2
    longest: float = 5.0
    ask: float = 10.0
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

    async def agents(self) -> Answers:
        """Ask every relay at once who is there; a relay that does not answer in time is answered for."""
        names = list(self._relays)
        return dict(zip(names, await asyncio.gather(*map(self._ask, names)), strict=True))

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
        async def read(after: messages.Cursor | None, wait: float) -> messages.Cursor:
            answer = await self._relays[relay].reports(self._deployment, after, wait)
            await self._reader.take_reports(relay, answer.reports)
            return _cursor(after, answer.epoch, [letter.number for letter in answer.reports])

        await self._read(relay, read)

    async def _read_pieces(self, relay: str) -> None:
        async def read(after: messages.Cursor | None, wait: float) -> messages.Cursor:
            answer = await self._relays[relay].logs(self._deployment, after, wait)
            await self._reader.take_pieces(relay, answer.pieces)
            return _cursor(after, answer.epoch, [letter.number for letter in answer.pieces])

        await self._read(relay, read)

    async def _read(
        self, relay: str, read: Callable[[messages.Cursor | None, float], Awaitable[messages.Cursor]]
    ) -> None:
        """Long poll after long poll. The cursor moves only when everything before it was taken."""
        after: messages.Cursor | None = None
        bearing = Bearing(self._persistence)
        wait = 0.0  # at first, and after trouble, the epoch is asked for at once: what was posted may be gone
        loop = asyncio.get_running_loop()
        while True:
            asked = loop.time()
            try:
                seen = await read(after, wait)
            except WaystationError as error:
                await self._reader.take_trouble(relay, error)
                # Never given up: the policy has no number of failures.
                await asyncio.sleep(bearing.pause_after(error) or 0.0)
                wait = 0.0
                continue
            if after is not None and seen.epoch != after.epoch:
                self._reader.lose_mail(relay)
            if wait and seen.number == (after.number if after else 0) and loop.time() - asked < 1.0:
                # Nothing, and at once: a relay that is about to stop, or one that does not wait as it should.
                await asyncio.sleep(self._persistence.pause())
            bearing.gain()
            after, wait = seen, messages.POLL_SECONDS


def _cursor(after: messages.Cursor | None, epoch: str, numbers: list[int]) -> messages.Cursor:
    same = after.number if after is not None and after.epoch == epoch else 0
    return messages.Cursor(epoch=epoch, number=max(numbers, default=same))
