"""Mail: orders for agents, reports and logs for who ordered. A relay keeps it, and reads the envelopes as little as any
other bytes.

What `Mail.post` returned from is durable. One writer takes everything that waits, writes it as one document, and then
answers all of it at once (group commit): under load there are few documents and few fsyncs, and alone a letter waits
for nobody. In memory stands where each letter is; the letters themselves stand on disk, the newest of them also in a
small cache, because they are read within moments by those who wait for them.

Numbers rise per relay and are never given twice within one epoch. The epoch changes when mail was lost (the folder was
emptied, a document is damaged): readers then begin anew, and know that something may be gone.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from bisect import bisect_right
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import attrgetter
from typing import Final, Literal, TypeAlias
from weakref import WeakValueDictionary

import msgspec
from xxhash import xxh3_64_digest

from relay.errors import ConflictError, StoreError, WaystationError
from relay.protocol import messages
from relay.stores.contract import Documents

KEPT_SECONDS = 24 * 3600.0
"""How long a letter is kept after it came; at least, because documents go as a whole."""
TEND_SECONDS = 600.0
"""How often old documents are looked for."""
COMMIT_BYTES = 8 << 20
"""Letters in one document, or one request of more."""
LETTER_CHARGE = 512
"""Bytes that each letter counts for beside its own: what remembering it costs."""
MERGE_COUNT = 256
"""So many small documents become one."""
MERGE_BELOW = 1 << 20
"""Bytes of a document that counts as small."""
CACHE_BYTES = 32 << 20
"""Letters kept in memory, the last ones that were written or read."""
RETRY_SECONDS = 60.0
"""`Retry-After` where mail is full."""

Kind: TypeAlias = Literal["order", "report", "log"]
Box: TypeAlias = tuple[Kind, str]
"""What is read together: the orders for one agent, the reports or the logs of one deployment."""

SHARES: Final[Mapping[Kind, float]] = {"order": 1.0, "report": 7 / 8, "log": 3 / 4}
"""How full mail may become by letters of a kind: logs never take the room of reports, nor both that of orders."""

_FOLDER: Final = "state/mail/letters"
_STATE: Final = "state/mail/state"
_DAMAGED: Final = "state/mail/damaged"
_DIGEST_BYTES: Final = 8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MailLimits:
    """How much mail a relay keeps. Bytes count `LETTER_CHARGE` for each letter."""

    bytes: int = 1 << 30
    letters: int = 500_000
    bytes_per_agent: int = 16 << 20
    """Of orders for one agent."""
    bytes_per_deployment: int = 512 << 20
    """Of reports and logs of one deployment."""


class Letter(msgspec.Struct, frozen=True, array_like=True):
    """One letter. Names of agents are lower-cased.

    Attributes:
        box: the agent that an order is for; else the deployment.
        agent: whom an order is for; else who wrote it.
        part: a report's number, a log's offset; 0 for orders.
    """

    kind: Kind
    box: str
    agent: str
    operation: str
    part: int
    data: bytes

    @property
    def key(self) -> bytes:
        """What may stand for one content only: an order's operation; the agent's report of a number; the agent's piece
        of a log by offset and length (an agent that sends again may have more to say by then, and cuts it elsewhere).
        """
        author = "" if self.kind == "order" else self.agent
        length = len(self.data) if self.kind == "log" else 0
        return hashlib.sha256(f"{self.kind}\0{author}\0{self.operation}\0{self.part}\0{length}".encode()).digest()

    @property
    def check(self) -> bytes:
        return hashlib.sha256(self.agent.encode() + b"\0" + self.data).digest()

    @property
    def charge(self) -> int:
        return len(self.data) + LETTER_CHARGE


class Numbered(msgspec.Struct, frozen=True, array_like=True):
    """A letter and its number at this relay."""

    number: int
    letter: Letter


class _Content(msgspec.Struct, frozen=True, array_like=True):
    """A document. `arrived` is when its newest letter came, seconds since 1970."""

    arrived: float
    letters: tuple[Numbered, ...]


class _State(msgspec.Struct, frozen=True):
    """`number`: none up to here is given again, also where no document shows it any more."""

    epoch: str
    number: int


@dataclass(slots=True, eq=False)
class _Document:
    """A document in the store; its name says its highest number."""

    name: str
    arrived: float
    size: int = 0
    entries: list[_Entry] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Entry:
    """Where a letter stands. `document` changes when documents are merged, and is None when the letter has gone."""

    number: int
    box: Box
    key: bytes
    charge: int
    document: _Document | None


@dataclass(slots=True)
class _Waiting:
    """A request on its way to the next document."""

    letters: tuple[Letter, ...]
    answer: asyncio.Future[messages.TakenAnswer]


@dataclass(slots=True)
class _Batch:
    """What the next document will hold, and who waits for it."""

    letters: list[Numbered] = field(default_factory=list)
    answers: list[tuple[asyncio.Future[messages.TakenAnswer], messages.TakenAnswer]] = field(default_factory=list)
    size: int = 0


class Mail:
    """The mail of one relay."""

    def __init__(
        self, documents: Documents, limits: MailLimits | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.epoch = secrets.token_hex(16)
        self._documents = documents
        self._limits = limits or MailLimits()
        self._clock = clock
        self._last = 0
        self._checks: dict[bytes, bytes] = {}
        self._boxes: dict[Box, list[_Entry]] = {}
        self._kept: dict[str, _Document] = {}
        self._used: Counter[tuple[str, str]] = Counter()
        self._recent = _Recent()
        self._queue: deque[_Waiting] = deque()
        self._writer: asyncio.Task[None] | None = None
        self._tender: asyncio.Task[None] | None = None
        self._tend_at = clock() + TEND_SECONDS
        self._rest_until = 0.0
        # Weak: what nobody waits for any more is forgotten by itself.
        self._news: WeakValueDictionary[Box, asyncio.Event] = WeakValueDictionary()

    @property
    def kept_letters(self) -> int:
        """How many are kept."""
        return self._used["letters", ""]

    @property
    def kept_bytes(self) -> int:
        """How much they count for."""
        return self._used["bytes", ""]

    async def load(self) -> None:
        """Take up what an earlier process wrote. What is damaged is put aside, and changes the epoch.

        Raises:
            StoreError: the store cannot be listed.
        """
        lost = not await self._load_state()
        for name in await self._documents.list(_FOLDER):
            lost |= not await self._load_document(name)
        for entries in self._boxes.values():
            entries.sort(key=attrgetter("number"))
        if lost:
            await self._renew_epoch()
        await self._retire()

    async def close(self) -> None:
        """Wait for what is being written. Twice is once."""
        running = [task for task in (self._writer, self._tender) if task is not None]
        await asyncio.gather(*running, return_exceptions=True)

    # --- posting

    async def post(self, letters: Sequence[Letter]) -> messages.TakenAnswer:
        """All of `letters` are durable on return, or none of them was taken.

        A caller that is cancelled may find them taken all the same.

        Raises:
            ConflictError: one of them has the name of another letter that is kept.
            StoreError: the medium failed, or (`full`) there is no room for them; then perhaps later.
        """
        waiting = _Waiting(tuple(letters), asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._commit_all())
        return await waiting.answer

    async def _commit_all(self) -> None:
        while self._queue:
            batch = self._gather()
            try:
                if batch.letters:
                    await self._commit(batch)
            except Exception as error:
                # Whatever it was, those who wait must hear of it; it is raised where they wait.
                self._forget_pending(batch)
                for answer, _ in batch.answers:
                    _fail(answer, error)
            else:
                for answer, taken in batch.answers:
                    if not answer.done():
                        answer.set_result(taken)
        self._tend()

    def _gather(self) -> _Batch:
        batch = _Batch()
        while self._queue and batch.size < COMMIT_BYTES:
            waiting = self._queue.popleft()
            try:
                fresh = self._judge(waiting.letters)
            except WaystationError as error:
                _fail(waiting.answer, error)
                continue
            for letter in fresh:
                self._last += 1
                batch.letters.append(Numbered(self._last, letter))
                batch.size += letter.charge
            taken = messages.TakenAnswer(taken=len(fresh), known=len(waiting.letters) - len(fresh))
            batch.answers.append((waiting.answer, taken))
        return batch

    def _judge(self, letters: Sequence[Letter]) -> list[Letter]:
        """Those of a request that are new; their names and their room are taken from now on. Raises as `post`."""
        fresh: list[Letter] = []
        checks: dict[bytes, bytes] = {}
        for letter in letters:
            key, check = letter.key, letter.check
            held = self._checks.get(key) or checks.get(key)
            if held is None:
                checks[key] = check
                fresh.append(letter)
            elif held != check:
                raise ConflictError(f"{letter.kind} {letter.operation}: another letter has this name")
        more: Counter[tuple[str, str]] = Counter()
        for letter in fresh:
            more.update(_accounts(letter.kind, letter.box, letter.charge))
        for letter in fresh:
            self._check_room(letter, more)
        self._checks.update(checks)
        self._used.update(more)
        return fresh

    def _check_room(self, letter: Letter, more: Mapping[tuple[str, str], int]) -> None:
        for account in _accounts(letter.kind, letter.box, letter.charge):
            if self._used[account] + more[account] > self._limit(account) * SHARES[letter.kind]:
                raise StoreError(
                    f"no room for more mail ({' '.join(account).strip()})", full=True, retry_after=RETRY_SECONDS
                )

    def _limit(self, account: tuple[str, str]) -> int:
        limits = self._limits
        match account[0]:
            case "bytes":
                return limits.bytes
            case "letters":
                return limits.letters
            case "agent":
                return limits.bytes_per_agent
            case _:
                return limits.bytes_per_deployment

    async def _commit(self, batch: _Batch) -> None:
        content = _Content(self._clock(), tuple(batch.letters))
        document = _Document(_name(content), content.arrived)
        try:
            await self._write(document, content)
        except StoreError:
            # It may be there all the same, and would come up after the next start.
            await self._remove(document.name)
            raise
        self._kept[document.name] = document
        for numbered in batch.letters:
            self._index(numbered, document)
        for box in {(numbered.letter.kind, numbered.letter.box) for numbered in batch.letters}:
            event = self._news.pop(box, None)
            if event is not None:
                event.set()

    async def _write(self, document: _Document, content: _Content) -> None:
        body = msgspec.msgpack.encode(content)
        document.size = len(body)
        await self._documents.write(document.name, xxh3_64_digest(body) + body)
        self._recent.put(document.name, content)

    def _index(self, numbered: Numbered, document: _Document) -> None:
        letter = numbered.letter
        entries = self._boxes.setdefault((letter.kind, letter.box), [])
        box = entries[0].box if entries else (letter.kind, letter.box)
        entry = _Entry(numbered.number, box, letter.key, letter.charge, document)
        entries.append(entry)
        document.entries.append(entry)

    def _forget_pending(self, batch: _Batch) -> None:
        for numbered in batch.letters:
            letter = numbered.letter
            del self._checks[letter.key]
            self._used.subtract(_accounts(letter.kind, letter.box, letter.charge))

    # --- reading

    def news(self, box: Box) -> asyncio.Event:
        """Set as soon as something new is in `box`. Take it first, then read, then wait."""
        event = self._news.get(box)
        if event is None:
            event = self._news[box] = asyncio.Event()
        return event

    async def read(self, box: Box, after: messages.Cursor | None) -> list[Numbered]:
        """Letters of `box` after the cursor, oldest first: as many as fit into one answer.

        A cursor of another epoch, or beyond what was ever given (the store is an older copy), counts as none.

        Raises:
            StoreError: the medium failed.
        """
        if self._clock() >= self._tend_at:
            self._tend()
        known = after is not None and after.epoch == self.epoch and after.number <= self._last
        number = after.number if after is not None and known else 0
        found = []
        for entry in self._next(box, number):
            letter = await self._letter(entry)
            if letter is not None:
                found.append(Numbered(entry.number, letter))
        return found

    def _next(self, box: Box, number: int) -> list[_Entry]:
        entries = self._boxes.get(box, [])
        size = 0
        chosen: list[_Entry] = []
        begin = bisect_right(entries, number, key=attrgetter("number"))
        for entry in entries[begin : begin + messages.LETTERS_MAX]:
            size += entry.charge - LETTER_CHARGE
            if chosen and size > messages.LETTERS_BYTES_MAX:
                break
            chosen.append(entry)
        return chosen

    async def _letter(self, entry: _Entry) -> Letter | None:
        """None where it has gone meanwhile."""
        while (document := entry.document) is not None:
            found = _find(self._recent.get(document.name), entry.number)
            if found is not None:
                return found
            raw = await self._documents.read(document.name)
            content = _parse(raw)
            if content is not None and entry.document is document:
                self._recent.put(document.name, content)
            found = _find(content, entry.number)
            if found is not None:
                return found
            if entry.document is document:
                await self._lose(document, raw or b"")
        return None

    # --- what an earlier process wrote

    async def _load_state(self) -> bool:
        """False where there is none (any more)."""
        try:
            state = msgspec.json.decode(await self._documents.read(_STATE) or b"", type=_State)
        except (msgspec.DecodeError, UnicodeDecodeError, StoreError):
            return False
        self.epoch, self._last = state.epoch, state.number
        return True

    async def _load_document(self, name: str) -> bool:
        """False where it is damaged."""
        try:
            raw = await self._documents.read(name)
        except StoreError as error:
            log.warning("mail: %s cannot be read and is passed over: %s", name, error)
            return False
        number = name.rpartition("/")[2].partition(".")[0]
        if number.isascii() and number.isdigit():
            self._last = max(self._last, int(number))
        content = _parse(raw)
        if content is None:
            await self._put_aside(name, raw or b"")
            return False
        # A clock that was wrong, or an older copy of the store, must not keep mail for ever.
        document = _Document(name, min(content.arrived, self._clock()), len(raw or b""))
        for numbered in content.letters:
            letter = numbered.letter
            self._last = max(self._last, numbered.number)
            # A letter stands twice where a merge was cut off, or where a write that failed was there all the same.
            if letter.key not in self._checks:
                self._checks[letter.key] = letter.check
                self._used.update(_accounts(letter.kind, letter.box, letter.charge))
                self._index(numbered, document)
        if not document.entries:
            await self._remove(name)
            return True
        self._kept[name] = document
        return True

    async def _put_aside(self, name: str, raw: bytes) -> None:
        log.warning("mail: %s is damaged; it is put aside under %s, and readers begin anew", name, _DAMAGED)
        try:
            await self._documents.write(f"{_DAMAGED}/{name.rpartition('/')[2]}", raw)
        except StoreError as error:
            log.warning("mail: %s stays where it is: %s", name, error)
            return
        await self._remove(name)

    async def _renew_epoch(self) -> None:
        self.epoch = secrets.token_hex(16)
        await self._write_state()

    async def _write_state(self) -> None:
        try:
            await self._documents.write(_STATE, msgspec.json.encode(_State(self.epoch, self._last)))
        except StoreError as error:
            # Without it the next start begins a new epoch, which costs readers a second look and nothing else.
            log.warning("mail: its state cannot be written: %s", error)

    async def _lose(self, document: _Document, raw: bytes) -> None:
        """A document that was whole is damaged or gone."""
        self._drop(document)
        await self._put_aside(document.name, raw)
        await self._renew_epoch()

    # --- tending: old documents go, small ones become one

    def _tend(self) -> None:
        now = self._clock()
        if now < self._rest_until or (self._tender is not None and not self._tender.done()):
            return
        small = sum(document.size < MERGE_BELOW for document in self._kept.values())
        if now >= self._tend_at or small >= MERGE_COUNT:
            self._tend_at = now + TEND_SECONDS
            self._tender = asyncio.create_task(self._tend_all())

    async def _tend_all(self) -> None:
        try:
            await self._retire()
            await self._merge()
        except StoreError as error:
            self._rest_until = self._clock() + TEND_SECONDS
            log.warning("mail: tending is put off: %s", error)

    async def _retire(self) -> None:
        """Let go of documents whose time is over."""
        over = self._clock() - KEPT_SECONDS
        old = [document for document in self._kept.values() if document.arrived <= over]
        if not old:
            return
        # The highest number is written down first, lest it be given again after a restart.
        await self._write_state()
        for document in old:
            self._drop(document)
            await self._remove(document.name)

    def _drop(self, document: _Document) -> None:
        if self._kept.pop(document.name, None) is None:
            return
        self._recent.drop(document.name)
        for entry in document.entries:
            entry.document = None
            del self._checks[entry.key]
            self._used.subtract(_accounts(entry.box[0], entry.box[1], entry.charge))
        for box in {entry.box for entry in document.entries}:
            kept = [entry for entry in self._boxes[box] if entry.document is not None]
            if kept:
                self._boxes[box] = kept
            else:
                del self._boxes[box]
        self._used += Counter()  # forgets the accounts that are empty

    async def _merge(self) -> None:
        """Write the oldest small documents as one, then remove them. Cut off between the two, letters stand twice."""
        group, contents = [], []
        for document in self._oldest_small():
            raw = await self._documents.read(document.name)
            content = _parse(raw)
            if content is not None:
                group.append(document)
                contents.append(content)
            elif document.name in self._kept:
                await self._lose(document, raw or b"")
        if len(group) < 2:
            return
        letters = sorted((n for content in contents for n in content.letters), key=attrgetter("number"))
        content = _Content(max(document.arrived for document in group), tuple(letters))
        generation = 1 + max(_generation(document.name) for document in group)
        merged = _Document(_name(content, generation), content.arrived)
        await self._write(merged, content)
        self._kept[merged.name] = merged
        for document in group:
            for entry in document.entries:
                if entry.document is document:
                    entry.document = merged
                    merged.entries.append(entry)
            self._kept.pop(document.name, None)
            self._recent.drop(document.name)
        for document in group:
            await self._remove(document.name)

    def _oldest_small(self) -> list[_Document]:
        """Those that are to be merged; none while they are few."""
        small = sorted(
            (document for document in self._kept.values() if document.size < MERGE_BELOW), key=attrgetter("name")
        )
        sizes = accumulate(document.size for document in small[:MERGE_COUNT])
        within = [document for document, size in zip(small, sizes, strict=False) if size <= COMMIT_BYTES]
        return within if len(small) >= MERGE_COUNT else []

    async def _remove(self, name: str) -> None:
        try:
            await self._documents.remove(name)
        except StoreError as error:
            # It comes up at the next start and is then old, or known.
            log.warning("mail: %s cannot be removed: %s", name, error)


class _Recent:
    """The last documents that were written or read, by name."""

    def __init__(self) -> None:
        self._contents: OrderedDict[str, _Content] = OrderedDict()
        self._size = 0

    def get(self, name: str) -> _Content | None:
        content = self._contents.get(name)
        if content is not None:
            self._contents.move_to_end(name)
        return content

    def put(self, name: str, content: _Content) -> None:
        self.drop(name)
        self._contents[name] = content
        self._size += _size(content)
        while self._size > CACHE_BYTES:
            self.drop(next(iter(self._contents)))

    def drop(self, name: str) -> None:
        content = self._contents.pop(name, None)
        if content is not None:
            self._size -= _size(content)


def _size(content: _Content) -> int:
    return sum(numbered.letter.charge for numbered in content.letters)


def _accounts(kind: Kind, box: str, charge: int) -> dict[tuple[str, str], int]:
    """What a letter counts towards."""
    whose = "agent" if kind == "order" else "deployment"
    return {("bytes", ""): charge, ("letters", ""): 1, (whose, box): charge}


def _name(content: _Content, generation: int = 0) -> str:
    """By the highest number; a merged document never has the name of one of those it stands for."""
    return f"{_FOLDER}/{content.letters[-1].number:016d}" + (f".{generation}" if generation else "")


def _generation(name: str) -> int:
    return int(name.partition(".")[2] or 0)


def _parse(raw: bytes | None) -> _Content | None:
    """None where there is none, or it is damaged."""
    if raw is None or xxh3_64_digest(raw[_DIGEST_BYTES:]) != raw[:_DIGEST_BYTES]:
        return None
    try:
        return msgspec.msgpack.decode(raw[_DIGEST_BYTES:], type=_Content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _find(content: _Content | None, number: int) -> Letter | None:
    letters = content.letters if content is not None else ()
    at = bisect_right(letters, number, key=attrgetter("number")) - 1
    return letters[at].letter if at >= 0 and letters[at].number == number else None


def _fail(answer: asyncio.Future[messages.TakenAnswer], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
