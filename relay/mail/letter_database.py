"""The letters of one relay in one SQLite file on its own disk. Blocking: one thread writes, another one reads.

A commit is on the disk when it returns: `synchronous=FULL` syncs the write-ahead log at each
(https://www.sqlite.org/pragma.html#pragma_synchronous). A number is never given twice: `AUTOINCREMENT` remembers the
highest one, also when its letter has gone (https://www.sqlite.org/autoinc.html).
"""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Final

from relay.errors import ConflictError, StoreError, WaystationError
from relay.folders import make_folder
from relay.mail.letters import Account, Box, Letter, MailLimits, Numbered, accounts, charges, check_room
from relay.protocol import messages
from relay.support.durable import sync_folder
from relay.support.private_files import make_private_file

FILE: Final = "letters.db"
DAMAGED: Final = "damaged"
"""Folder beside the file into which a damaged one is put."""
RETIRE_COUNT: Final = 500
"""Letters that are let go in one transaction: those who post wait no longer than for one."""
LOG_BYTES: Final = 64 << 20
"""The write-ahead log is cut back to so much."""

_SCHEMA: Final = """
BEGIN IMMEDIATE;
CREATE TABLE relay (format INTEGER NOT NULL, epoch TEXT NOT NULL);
CREATE TABLE letters (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL, box TEXT NOT NULL, agent TEXT NOT NULL, operation TEXT NOT NULL, part INTEGER NOT NULL,
    name BLOB NOT NULL UNIQUE, "check" BLOB NOT NULL, arrived REAL NOT NULL, charge INTEGER NOT NULL, data BLOB NOT NULL
);
CREATE INDEX boxes ON letters (kind, box, number, charge);
CREATE INDEX arrivals ON letters (arrived);
INSERT INTO relay VALUES (1, lower(hex(randomblob(16))));
COMMIT;
"""
_INSERT: Final = """
INSERT INTO letters (number, kind, box, agent, operation, part, name, "check", arrived, charge, data)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_READ: Final = """
SELECT number, kind, box, agent, operation, part, data, "check" FROM letters
WHERE kind = ? AND box = ? AND number > ? ORDER BY number LIMIT ?
"""
_OLDEST: Final = "SELECT number FROM letters WHERE arrived <= ? ORDER BY arrived LIMIT ?"


class DamagedError(StoreError):
    """The file holds what SQLite never wrote."""


class LetterDatabase:
    """The file in `folder`, made where there is none; without a folder, letters that go with the process."""

    def __init__(self, folder: str | None, limits: MailLimits) -> None:
        """Open the file.

        Raises:
            DamagedError: it is no database, or a damaged one.
            StoreError: it cannot be made or read.
        """
        self._limits = limits
        self._path = os.path.join(folder, FILE) if folder else ":memory:"
        self.used: Counter[Account] = Counter()
        """What is kept, by account."""
        if folder:
            # Letters are for those who have a token.
            make_private_file(self._path)
        with self._telling():
            self._writer = self._connect()
            self._reader = self._connect() if folder else self._writer
            try:
                self.epoch = self._begin()
                self._count()
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Give the file back. Twice is once."""
        with suppress(sqlite3.Error):
            self._reader.close()
            self._writer.close()

    def take(self, requests: Sequence[Sequence[Letter]], arrived: float) -> list[list[Letter] | Exception]:
        """All requests in one transaction: for each its letters that were new, or why none of it was taken.

        Raises:
            StoreError: nothing of any request was taken.
        """
        pending: Counter[Account] = Counter()
        taken: list[list[Letter] | Exception] = []
        with self._transaction():
            for letters in requests:
                try:
                    taken.append(fresh := self._take_one(letters, arrived, pending))
                    pending += charges(fresh)
                except WaystationError as error:
                    taken.append(error)
        self.used += pending
        return taken

    def read(self, box: Box, after: int) -> tuple[list[Numbered], list[int]]:
        """Letters of `box` with higher numbers, oldest first: as many as fit into one answer, one at least.

        Returns:
            The letters, and the numbers of those among them whose bytes are not what was posted.

        Raises:
            DamagedError: the file is damaged.
            StoreError: the medium failed.
        """
        found: list[Numbered] = []
        damaged: list[int] = []
        size = 0
        with self._telling(), closing(self._reader.execute(_READ, (*box, after, messages.LETTERS_MAX))) as rows:
            for number, *fields, check in rows:
                letter = Letter(*fields)
                size += len(letter.data)
                if letter.check != check:
                    damaged.append(number)
                elif found and size > messages.LETTERS_BYTES_MAX:
                    break
                else:
                    found.append(Numbered(number, letter))
        return found, damaged

    def last(self) -> int:
        """The highest number that was ever given."""
        with self._telling():
            return self._last(self._reader)

    def retire(self, over: float) -> int:
        """Let go of some letters that arrived by then, the oldest first. How many went; 0 when all have."""
        with self._telling():
            old = [number for (number,) in self._writer.execute(_OLDEST, (over, RETIRE_COUNT))]
        self.forget(old)
        return len(old)

    def forget(self, numbers: Sequence[int]) -> None:
        """Let go of these letters, and give their room back to the file system."""
        with self._telling():
            gone = []
            with self._transaction():
                for number in numbers:
                    gone += self._writer.execute(
                        "DELETE FROM letters WHERE number = ? RETURNING kind, box, charge", (number,)
                    ).fetchall()
            for kind, box, charge in gone:
                self.used.subtract(accounts(kind, box, charge))
            self.used += Counter()  # forgets the accounts that are empty
            # As a script: the pragma frees one page a step, and `execute` takes a single one.
            self._writer.executescript("PRAGMA incremental_vacuum")

    def adopt(self, letters: Sequence[Numbered], arrived: float) -> None:
        """Take letters with the numbers that they have. Known ones stay as they are."""
        with self._transaction():
            for numbered in letters:
                if self._held(numbered.letter) is None:
                    self._insert(numbered.letter, arrived, numbered.number)
        self._count()

    def go_on(self, epoch: str, last: int = 0) -> None:
        """The epoch is `epoch` from here on, and no number up to `last` is given again."""
        with self._transaction():
            self._writer.execute("UPDATE relay SET epoch = ?", (epoch,))
            if last > self._last(self._writer):
                self._writer.execute("DELETE FROM sqlite_sequence WHERE name = 'letters'")
                self._writer.execute("INSERT INTO sqlite_sequence VALUES ('letters', ?)", (last,))
        self.epoch = epoch

    def forgive_clock(self, now: float) -> None:
        """A clock that was ahead must not keep mail for ever."""
        with self._transaction():
            self._writer.execute("UPDATE letters SET arrived = ? WHERE arrived > ?", (now, now))

    def _connect(self) -> sqlite3.Connection:
        # Python's own transactions begin late: ours are begun where they begin.
        connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        for pragma in (
            "auto_vacuum=INCREMENTAL", "journal_mode=WAL", "synchronous=FULL", f"journal_size_limit={LOG_BYTES}",
        ):  # fmt: skip
            connection.execute(f"PRAGMA {pragma}").fetchall()
        return connection

    def _begin(self) -> str:
        """The epoch; a new file gets its tables and its first one."""
        if self._writer.execute("SELECT 1 FROM sqlite_schema WHERE name = 'relay'").fetchone() is None:
            self._writer.executescript(_SCHEMA)
        format, epoch = self._writer.execute("SELECT format, epoch FROM relay").fetchone() or (0, "")
        if format != 1:
            raise StoreError(
                f"{self._path} has format {format}, and this version knows 1", hint="Use the newer version"
            )
        return str(epoch)

    def _last(self, connection: sqlite3.Connection) -> int:
        row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'letters'").fetchone()
        return int(row[0]) if row else 0

    def _count(self) -> None:
        self.used = Counter()
        rows = self._writer.execute("SELECT kind, box, SUM(charge), COUNT(*) FROM letters GROUP BY kind, box")
        for kind, box, charge, count in rows:
            self.used += accounts(kind, box, charge, count)

    def _take_one(self, letters: Sequence[Letter], arrived: float, pending: Counter[Account]) -> list[Letter]:
        """The new ones of one request, or none of it. Raises `ConflictError` and `StoreError`."""
        fresh: list[Letter] = []
        self._writer.execute("SAVEPOINT request")
        try:
            for letter in letters:
                held = self._held(letter)
                if held is None:
                    self._insert(letter, arrived)
                    fresh.append(letter)
                elif held != letter.check:
                    raise ConflictError(f"{letter.kind} {letter.operation}: another letter has this name")
            more = charges(fresh)
            check_room(fresh, lambda account: self.used[account] + pending[account] + more[account], self._limits)
        except WaystationError:
            self._writer.execute("ROLLBACK TO request")
            raise
        finally:
            with suppress(sqlite3.Error):  # the error that ended the transaction is the one to tell
                self._writer.execute("RELEASE request")
        return fresh

    def _held(self, letter: Letter) -> bytes | None:
        """The check of the letter that has this one's name."""
        row = self._writer.execute('SELECT "check" FROM letters WHERE name = ?', (letter.key,)).fetchone()
        return row[0] if row else None

    def _insert(self, letter: Letter, arrived: float, number: int | None = None) -> None:
        fields = (letter.kind, letter.box, letter.agent, letter.operation, letter.part)
        self._writer.execute(_INSERT, (number, *fields, letter.key, letter.check, arrived, letter.charge, letter.data))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        # The connection as a context commits what was begun in it, or rolls it back.
        with self._telling(), self._writer:
            self._writer.execute("BEGIN IMMEDIATE")
            yield

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """SQLite's errors in our words."""
        try:
            yield
        except sqlite3.Error as error:
            match getattr(error, "sqlite_errorcode", 0) & 0xFF:
                case sqlite3.SQLITE_FULL:
                    raise StoreError(f"{self._path} cannot be written: no space left", full=True) from error
                case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                    raise DamagedError(f"{self._path} is damaged: {error}") from error
                case _:
                    raise StoreError(f"{self._path} failed: {error}") from error


def put_aside(folder: str) -> None:
    """Move the file in `folder` to the damaged ones, in the place of what was put there last. Raises `StoreError`."""
    try:
        make_folder(os.path.join(folder, DAMAGED), mode=0o700)
        for name in (FILE, f"{FILE}-wal", f"{FILE}-shm"):
            with suppress(FileNotFoundError):
                os.replace(os.path.join(folder, name), os.path.join(folder, DAMAGED, name))
        sync_folder(folder)
    except OSError as error:
        raise StoreError(f"the damaged mail in {folder} cannot be put aside: {error.strerror}") from error
