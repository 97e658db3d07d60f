"""One SQLite file, used by several processes at once: short transactions, patience, and errors in our words.

Writers are BEGIN IMMEDIATE, one after another; readers see one unchanging view and never wait (WAL). A commit is on
the disk: `synchronous=FULL` syncs the WAL at each (https://www.sqlite.org/pragma.html#pragma_synchronous). The locks need
a local file system.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import sqlalchemy as sa
from sqlalchemy import event

from relay.errors import StoreError
from relay.support.private_files import make_private_file

BUSY_SECONDS: Final = 30.0
"""How long a transaction waits for those of other processes."""

_READS: Final = "waystation_reads"


class Database:
    """The file at `path`, made where there is none. Blocking; usable from any thread."""

    def __init__(self, path: str) -> None:
        """Open the file.

        Raises:
            StoreError: it cannot be made or read, or is no database.
        """
        self.path = path
        self._engine = sa.create_engine(
            sa.URL.create("sqlite", database=path), hide_parameters=True, connect_args={"timeout": BUSY_SECONDS}
        )
        self._writer = threading.Lock()
        event.listen(self._engine, "connect", _on_connect)
        event.listen(self._engine, "begin", _on_begin)
        self._readers = self._engine.execution_options(**{_READS: True})
        # Plans are for this user's eyes.
        make_private_file(path)
        try:
            self._use_wal()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the file back. Twice is once."""
        self._engine.dispose()

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """One transaction that no other overlaps: committed and on the disk at its end, undone by an exception.

        Raises:
            StoreError: it was not committed; `full` where there is no space left.
        """
        with self._telling(), self._writer, self._engine.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """One unchanging view of everything. Raises `StoreError`."""
        with self._telling(), self._readers.begin() as connection:
            yield connection

    def damaged(self, how: str) -> StoreError:
        """The error for a file that holds what we never wrote."""
        return StoreError(f"{self.path} is damaged: {how}", hint="put a good copy of it into its place")

    def _use_wal(self) -> None:
        with self._telling():
            raw = self._engine.raw_connection()
            try:
                cursor = raw.cursor()
                _patiently(lambda: cursor.execute("PRAGMA journal_mode=WAL"))
                mode = cursor.fetchone()
            finally:
                raw.close()
        if mode != ("wal",):
            raise StoreError(f"{self.path} cannot be used: SQLite has no WAL on its file system")

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.DBAPIError as error:
            raise self._told(error.orig or error) from error
        except (sqlite3.Error, sa.exc.SQLAlchemyError) as error:
            raise self._told(error) from error
        except UnicodeDecodeError as error:
            raise self.damaged(f"a text in it is none: {error.reason}") from error

    def _told(self, error: BaseException) -> StoreError:
        match _code(error):
            case sqlite3.SQLITE_FULL:
                return StoreError(f"{self.path} cannot be written: no space left", full=True)
            case sqlite3.SQLITE_BUSY:
                return StoreError(f"{self.path} was busy for {BUSY_SECONDS:g} s: another process holds it")
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                return self.damaged(str(error))
            case _:
                return StoreError(f"{self.path} failed: {error}")


def _on_connect(connection: sqlite3.Connection, _record: object) -> None:
    # Python's own BEGIN comes late and is never IMMEDIATE: transactions are begun below, as SQLAlchemy's page on SQLite
    # tells ("Serializable isolation").
    connection.isolation_level = None
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _on_begin(connection: sa.Connection) -> None:
    if connection.get_execution_options().get(_READS):
        _patiently(lambda: _begin_reading(connection))
    else:
        _patiently(lambda: connection.exec_driver_sql("BEGIN IMMEDIATE"))


def _begin_reading(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN")
    try:
        connection.exec_driver_sql("SELECT 1 FROM sqlite_schema LIMIT 1").all()  # the view begins with the first read
    except sa.exc.DBAPIError:
        connection.exec_driver_sql("ROLLBACK")
        raise


def _patiently(act: Callable[[], object]) -> None:
    """SQLite does not wait everywhere that it can be busy: not while another process recovers the WAL, or closes it last.

    https://www.sqlite.org/wal.html, "Sometimes Queries Return SQLITE_BUSY In WAL Mode".
    """
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            act()
            return
        except (sa.exc.DBAPIError, sqlite3.Error) as error:
            if _code(getattr(error, "orig", error)) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.005)


def _code(error: BaseException | None) -> int:
    """SQLite's primary result code; 0 where the error is not SQLite's."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
