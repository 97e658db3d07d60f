"""Mail: orders for agents, reports and logs for those who ordered. A relay keeps it, and reads the envelopes as little as
any other bytes.

What `Mail.post` returned from is durable. One writer takes all requests that wait, and commits them as one transaction
(group commit): under load there are few syncs, and alone a letter waits for no other.

Numbers rise per relay and are never given twice within one epoch. The epoch changes when mail was lost (the folder was
emptied, the file or a letter is damaged): readers then begin anew, and know that something may be gone.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from relay.audit.acts import MailLost
from relay.audit.event import tell
from relay.errors import StoreError
from relay.mail.letter_database import DamagedError, LetterDatabase, put_aside
from relay.mail.letters import Box, Letter, MailLimits, Numbered
from relay.protocol import messages
from relay.support.together import News

KEPT_SECONDS = 24 * 3600.0
"""How long a letter is kept after it came; at least, because old letters are looked for now and then."""
TEND_SECONDS = 600.0
"""How often old letters are looked for."""
COMMIT_BYTES = 8 << 20
"""Letters in one transaction, or one request of more."""

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)


_Waiting = tuple[tuple[Letter, ...], asyncio.Future[messages.TakenAnswer]]
"""A request on its way to the next transaction, and its answer."""


class Mail:
    """The mail of one relay."""

    def __init__(
        self, folder: str | None, limits: MailLimits | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        """Mail in `folder`, on the relay's own disk; without one, in memory. `load` it, and `close` it."""
        self._folder = folder
        self._limits = limits or MailLimits()
        self._clock = clock
        self._loaded = False
        self._queue: deque[_Waiting] = deque()
        self._writer: asyncio.Task[None] | None = None
        self._tender: asyncio.Task[None] | None = None
        self._tend_at = clock() + TEND_SECONDS
        # In memory there is one connection, and so one thread. Else those who read wait for no commit.
        self._writing = ThreadPoolExecutor(1, "mail-write")
        self._reading = ThreadPoolExecutor(1, "mail-read") if folder else self._writing
        self.news: News[Box] = News()
        """Tells of boxes with something new in them."""

    @property
    def epoch(self) -> str:
        """Numbers mean something within it only."""
        return self._database.epoch

    @property
    def kept_bytes(self) -> int:
        """How much the kept letters count for."""
        return self._database.used["bytes", ""] if self._loaded else 0

    async def load(self) -> None:
        """Take up what an earlier process wrote. A damaged file is put aside, and changes the epoch.

        Raises:
            StoreError: the folder cannot be used.
        """
        self._database = await self._write(self._open)
        self._loaded = True
        await self._retire()

    async def adopt(self, letters: Sequence[Numbered], arrived: float) -> None:
        """Take letters of an earlier store with the numbers that they have there. Raises `StoreError`."""
        await self._write(lambda: self._database.adopt(letters, min(arrived, self._clock())))

    async def go_on(self, epoch: str, last: int) -> None:
        """Stand for an earlier store: its epoch goes on, and none of its numbers is given again. Raises `StoreError`."""
        await self._write(lambda: self._database.go_on(epoch, last))

    async def close(self) -> None:
        """Wait for what is being written. Twice is once."""
        running = [task for task in (self._writer, self._tender) if task is not None]
        await asyncio.gather(*running, return_exceptions=True)
        await asyncio.to_thread(self._end)

    # --- posting

    async def post(self, letters: Sequence[Letter]) -> messages.TakenAnswer:
        """All of `letters` are durable on return, or none of them was taken.

        A caller that is cancelled may find them taken all the same.

        Raises:
            ConflictError: one of them has the name of another letter that is kept.
            StoreError: the medium failed, or (`full`) there is no room for them; then perhaps later.
        """
        answer: asyncio.Future[messages.TakenAnswer] = asyncio.get_running_loop().create_future()
        self._queue.append((tuple(letters), answer))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._commit_all())
        return await answer

    async def _commit_all(self) -> None:
        while self._queue:
            batch = self._gather()
            for (letters, answer), taken in zip(batch, await self._commit(batch), strict=True):
                if isinstance(taken, Exception):
                    if not answer.done():
                        answer.set_exception(taken)
                    continue
                self.news.tell({(letter.kind, letter.box) for letter in taken})
                if not answer.done():
                    answer.set_result(messages.TakenAnswer(len(taken), len(letters) - len(taken)))
        self._tend()

    def _gather(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        size = 0
        while self._queue and size < COMMIT_BYTES:
            batch.append(self._queue.popleft())
            size += sum(letter.charge for letter in batch[-1][0])
        return batch

    async def _commit(self, batch: Sequence[_Waiting]) -> list[list[Letter] | Exception]:
        try:
            return await self._write(lambda: self._database.take([letters for letters, _ in batch], self._clock()))
        except Exception as error:
            # Whatever it was, it is raised where its requests wait.
            return [error] * len(batch)

    # --- reading

    async def read(self, box: Box, after: messages.Cursor | None) -> list[Numbered]:
        """Letters of `box` after the cursor, oldest first: as many as fit into one answer.

        A cursor of another epoch, or beyond what was ever given (the file is an older copy), counts as none.

        Raises:
            StoreError: the medium failed.
        """
        self._tend()
        found, damaged = await self._run(self._reading, lambda: self._read(box, after))
        if damaged:
            await self._write(lambda: self._lose(damaged))
        return found

    def _read(self, box: Box, after: messages.Cursor | None) -> tuple[list[Numbered], list[int]]:
        known = after is not None and after.epoch == self.epoch and after.number <= self._database.last()
        return self._database.read(box, after.number if after is not None and known else 0)

    # --- damage, and old letters

    def _open(self) -> LetterDatabase:
        try:
            database = LetterDatabase(self._folder, self._limits)
            database.forgive_clock(self._clock())
        except DamagedError as error:
            if self._folder is None:
                raise
            tell(MailLost(str(error)))
            put_aside(self._folder)
            database = LetterDatabase(self._folder, self._limits)
        return database

    def _lose(self, numbers: Sequence[int]) -> None:
        tell(MailLost(f"letters {', '.join(map(str, numbers))} are damaged, and let go"))
        self._database.forget(numbers)
        self._database.go_on(secrets.token_hex(16))

    def _reopen(self) -> None:
        self._database.close()
        self._database = self._open()

    def _tend(self) -> None:
        now = self._clock()
        if now >= self._tend_at and (self._tender is None or self._tender.done()):
            self._tend_at = now + TEND_SECONDS
            self._tender = asyncio.create_task(self._tend_all())

    async def _tend_all(self) -> None:
        try:
            await self._retire()
        except StoreError as error:
            log.warning("mail: old letters stay for now: %s", error)

    async def _retire(self) -> None:
        over = self._clock() - KEPT_SECONDS
        while await self._write(lambda: self._database.retire(over)):
            pass

    # --- threads

    async def _write(self, job: Callable[[], T]) -> T:
        return await self._run(self._writing, job)

    async def _run(self, thread: ThreadPoolExecutor, job: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(thread, job)
        except DamagedError:
            await loop.run_in_executor(self._writing, self._reopen)
            raise

    def _end(self) -> None:
        self._reading.shutdown()
        self._writing.shutdown()
        if self._loaded:
            self._database.close()
