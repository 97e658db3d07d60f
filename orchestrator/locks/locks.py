"""The lock of a project in an environment: one deployment at a time, and a name for those who must wait.

The kernel's lock on a file (`journal.db.locks/…`) says that it is held, and goes with its process, also at
kill -9. A row in the journal says by whom. Both change only inside a transaction that excludes all others, so that a
process which finds the file locked reads the row of the process that locked it, never an older one.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import sqlalchemy as sa

from agent.platform import lock_file
from orchestrator.acts import LockGivenBack, LockTaken
from orchestrator.journal.journal import Journal
from orchestrator.journal.tables import holders
from relay.audit.event import tell
from relay.errors import LockedError, StoreError
from relay.folders import make_folder


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a project's place in an environment. `since` is seconds since 1970; `deployment` is a ULID, empty where none runs yet."""

    project: str
    environment: str
    operator: str
    host: str
    pid: int
    since: float
    label: str
    why: str
    deployment: str = ""


class EnvironmentLockedError(LockedError):
    """Another process holds this project's place in the environment. `holder` says whose."""

    def __init__(self, holder: Holder) -> None:
        since = datetime.fromtimestamp(holder.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        what = f"{holder.why} {holder.label}".strip()
        super().__init__(
            f"{holder.project} in {holder.environment} is locked by {holder.operator} on {holder.host} (pid {holder.pid}) since {since}"
            f"{f': {what}' if what else ''}"
        )
        self.holder = holder


@contextmanager
def hold(
    journal: Journal, project: str, environment: str, *, operator: str, label: str, why: str, deployment: str = ""
) -> Iterator[Holder]:
    """Hold the project's place in the environment for the length of the block, at most until this process ends.

    Args:
        journal: whose lock it is; those of other journals are others.
        project: its name.
        environment: its name.
        operator: the person.
        label: of the release; empty where it is about none.
        why: one word or a few for those who must wait, e.g. "deploy".
        deployment: ULID of what runs under the lock.

    Raises:
        EnvironmentLockedError: another person holds it; a `LockedError` that names them.
        StoreError: the journal or the lock file cannot be written.
    """
    mine = Holder(
        project, environment, operator, socket.gethostname(), os.getpid(), time.time(), label, why, deployment
    )
    descriptor = _take(journal, mine)
    tell(LockTaken(operator, project, environment, why, label, deployment))
    try:
        yield mine
    finally:
        _give_back(journal, mine, descriptor)
        tell(LockGivenBack(operator, project, environment, deployment))


def holder(journal: Journal, project: str, environment: str) -> Holder | None:
    """Who holds it now; None where it is free, whatever a killed process left behind. Raises `StoreError`."""
    with journal.database.writing() as connection:  # inside it, no process can mistake this look for a holder
        return holder_in(connection, journal, project, environment)


def holder_in(connection: sa.Connection, journal: Journal, project: str, environment: str) -> Holder | None:
    """As `holder`, in the transaction of `connection`, which excludes all others. Raises `StoreError`."""
    descriptor = _lock(journal, project, environment)
    if descriptor is None:
        return _row(connection, project, environment)
    os.close(descriptor)
    return None


def take_file(journal: Journal, name: str, what: str) -> int | None:
    """The kernel's lock `name` of this journal, gone when the descriptor is closed; None where another has it.

    Args:
        journal: beside whose file the locks stand.
        name: any text.
        what: is locked, for people.

    Raises:
        StoreError: the file cannot be made.
    """
    folder = f"{journal.path}.locks"
    try:
        make_folder(folder, mode=0o700)
        # The names of things are free text; a file's name is not.
        return lock_file(os.path.join(folder, hashlib.sha256(name.encode()).hexdigest()[:32]))
    except OSError as error:
        raise StoreError(f"the lock of {what} in {folder} failed: {error.strerror or error}") from error


def _take(journal: Journal, mine: Holder) -> int:
    descriptor: int | None = None
    try:
        with journal.database.writing() as connection:
            descriptor = _lock(journal, mine.project, mine.environment)
            if descriptor is None:
                raise EnvironmentLockedError(_row(connection, mine.project, mine.environment))
            connection.execute(sa.delete(holders).where(_of(mine.project, mine.environment)))
            connection.execute(sa.insert(holders), asdict(mine))
    except BaseException:
        if descriptor is not None:
            os.close(descriptor)
        raise
    return descriptor


def _give_back(journal: Journal, mine: Holder, descriptor: int) -> None:
    # The file is the truth: where the row cannot be removed, it is a stale one that is never read.
    try:
        with suppress(StoreError), journal.database.writing() as connection:
            connection.execute(sa.delete(holders).where(_of(mine.project, mine.environment)))
            os.close(descriptor)
            descriptor = -1
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _lock(journal: Journal, project: str, environment: str) -> int | None:
    return take_file(journal, f"{project}\0{environment}", f"{project} in {environment}")


def _of(project: str, environment: str) -> sa.ColumnElement[bool]:
    return (holders.c.project == project) & (holders.c.environment == environment)


def _row(connection: sa.Connection, project: str, environment: str) -> Holder:
    row = connection.execute(sa.select(holders).where(_of(project, environment))).first()
    if row is None:  # the file was locked, but not with this module
        return Holder(project, environment, "somebody", "this host", 0, 0.0, "", "", "")
    return Holder(*tuple(row))
