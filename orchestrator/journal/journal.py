"""The orchestrator's journal: releases, deployments and what happened in them, in one SQLite file.

Append-only: triggers refuse to change an entry, a release or a plan (`orchestrator/journal/tables.py`). What a method returned from
is on the disk. Several processes may have it open at once: a deployment writes, `status` reads, `decide` adds a row
(`orchestrator/journal/sqlite.py` says how). Beside the file stand SQLite's own (`-wal`, `-shm`) and the folder
`journal.db.locks` (`orchestrator/locks/locks.py`).
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Self

import msgspec
import sqlalchemy as sa

from agent.platform import lock_file
from orchestrator.acts import Decided, FenceClaimed, ReleaseCreated
from orchestrator.journal import chain, tables
from orchestrator.journal.events import (
    BRACKET_KINDS,
    DecisionTaken,
    DeploymentRecord,
    Event,
    Goal,
    JournalEntry,
    Started,
    WrittenState,
    decode,
)
from orchestrator.journal.sqlite import Database
from orchestrator.journal.trail import tell_facts
from orchestrator.journal.views import BracketEvent, OpenBracket, bracket_after
from orchestrator.journal.views import open_brackets as fold_brackets
from relay.audit.event import tell
from relay.errors import ConflictError, LockedError, NotFoundError, RefusedError, StoreError, UntrustedError, UsageError

FORMAT: Final = 3
"""Of the tables and of the kinds of entries. A journal of a higher one is refused, never half understood."""
FENCE_MAX: Final = (1 << 53) - 1
"""The highest fence that an order can carry (agent/orders/orders.py)."""


@dataclass(frozen=True, slots=True)
class StoredRelease:
    """A release's document and the DSSE envelope over it, as they were added."""

    document: bytes
    envelope: bytes


@dataclass(frozen=True, slots=True)
class Decision:
    """What a person told a deployment. `at` is seconds since 1970; `envelope` is what they signed, empty where nothing:
    who they are, only that tells (`orchestrator/people/statement.py`).
    """

    number: int
    environment: str
    deployment: str
    at: float
    operator: str
    kind: str
    data: dict[str, Any]
    envelope: bytes = b""


@dataclass(frozen=True, slots=True)
class Head:
    """A row by its number, and its hash; empty of an entry that is older than the chain."""

    number: int
    hash: str


@dataclass(frozen=True, slots=True)
class Heads:
    """The last entry and decision of a journal, and the last entry of some deployments."""

    entries: Head
    decisions: Head
    of_deployments: dict[str, Head]


@dataclass(frozen=True, slots=True)
class ChainReport:
    """What the two chains turned out to be."""

    entries: chain.Checked
    decisions: chain.Checked

    @property
    def is_whole(self) -> bool:
        """Whether all is as it was written."""
        return self.entries.wrong is None and self.decisions.wrong is None and self.entries.has_kept


_LISTED = tuple(column for column in tables.deployments.c if column.name not in {"number", "plan"})


class Journal:
    """An open journal. Made by `open`; a context manager.

    `path` is that of its file, absolute. `id` has 32 hex digits and is made with the file: orders carry it, so that agents
    tell two orchestrators apart. Every method but `close` raises `StoreError` where the file cannot be read or written
    (`full`: no space left) or is damaged; nothing was written then.
    """

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self.database = database
        self.path = database.path
        self.id = ""
        self._given_clock = clock

    def _clock(self) -> float:
        return float(self._given_clock())  # as it comes back from a column of this type

    @classmethod
    def open(cls, location: str, *, clock: Callable[[], float] = time.time) -> Journal:
        """Open the journal, making it where there is none.

        Args:
            location: path of the file, or a `sqlite:///` URL.
            clock: seconds since 1970.

        Raises:
            UsageError: a URL of another kind of database.
            RefusedError: the journal has a newer format than this version reads.
            LockedError: the journal has an older format, and an older Waystation works with it now.
            StoreError: the file cannot be made or read, is damaged, or is no journal.
        """
        journal = cls(Database(_path_of(location)), clock)
        try:
            journal._prepare()
        except BaseException:
            journal.close()
            raise
        return journal

    def close(self) -> None:
        """Give the file back. Twice is once."""
        self.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- releases

    def add_release(
        self,
        project: str,
        label: str,
        document: bytes,
        envelope: bytes,
        files: Mapping[str, bytes],
        operator: str,
    ) -> bool:
        """Keep a release and its files (by the SHA-256 of their bytes, hex). False where it was there already.

        Raises:
            ConflictError: the label stands for another document of this project.
            UntrustedError: a file has other bytes than its name says.
            StoreError: see the class.
        """
        for sha256, data in files.items():
            if hashlib.sha256(data).hexdigest() != sha256:
                raise UntrustedError(f"a file of release {label} has other bytes than its name {sha256[:16]}… says")
        with self.database.writing() as connection:
            same = (tables.releases.c.project == project) & (tables.releases.c.label == label)
            held = connection.execute(sa.select(tables.releases.c.document).where(same)).scalar_one_or_none()
            if held is not None and held != document:
                raise ConflictError(
                    f"release {label} of {project} stands for something else already",
                    hint="a label is never used twice; choose another",
                )
            for sha256, data in files.items():
                connection.execute(
                    sa.insert(tables.release_files).prefix_with("OR IGNORE", dialect="sqlite"),
                    {"sha256": sha256, "data": data},
                )
            if held is None:
                row = {"project": project, "label": label, "document": document, "envelope": envelope}
                connection.execute(sa.insert(tables.releases), row | {"created": self._clock(), "operator": operator})
        tell(ReleaseCreated(operator, project, label, hashlib.sha256(document).hexdigest(), held is None))
        return held is None

    def release(self, project: str | None, label: str) -> StoredRelease:
        """One release; without a project the only one of that label.

        Raises:
            NotFoundError: there is none.
            UsageError: several projects have this label.
            StoreError: see the class.
        """
        query = sa.select(tables.releases).where(tables.releases.c.label == label)
        if project is not None:
            query = query.where(tables.releases.c.project == project)
        with self.database.reading() as connection:
            rows = connection.execute(query).all()
        if not rows:
            raise NotFoundError(f"there is no release {label}{f' of {project}' if project is not None else ''}")
        if len(rows) > 1:
            projects = ", ".join(sorted(row.project for row in rows))
            raise UsageError(f"several projects have a release {label}: {projects}", hint="name the project")
        row = rows[0]
        return StoredRelease(row.document, row.envelope)

    def release_file(self, sha256: str) -> bytes:
        """The file with this hash, checked.

        Raises:
            NotFoundError: no release has it.
            StoreError: it is damaged; see also the class.
        """
        query = sa.select(tables.release_files.c.data).where(tables.release_files.c.sha256 == sha256)
        with self.database.reading() as connection:
            data: bytes | None = connection.execute(query).scalar_one_or_none()
        if data is None:
            raise NotFoundError(f"no release has a file {sha256[:16]}…")
        if hashlib.sha256(data).hexdigest() != sha256:
            raise self.database.damaged(f"the release file {sha256[:16]}… has other bytes than its name says")
        return data

    # --- fences

    def claim(self, project: str, environment: str, seen: Iterable[int] = ()) -> int:
        """The next fence of a project in an environment: above every one that was claimed here and all that agents have
        `seen`.

        No two claims are equal, also of different processes.

        Raises:
            RefusedError: there is no higher fence.
            StoreError: see the class.
        """
        column = tables.fences.c
        # That of no project is older than the fences of projects, and below all of them.
        held = sa.select(column.project, column.fence).where(
            column.environment == environment, column.project.in_([project, ""])
        )
        with self.database.writing() as connection:
            known: dict[str, int] = {row.project: row.fence for row in connection.execute(held)}
            fence = max([0, *known.values(), *seen]) + 1
            if fence > FENCE_MAX:
                raise RefusedError(
                    f"the fences of {project} in {environment} are used up: an agent has seen {fence - 1}"
                )
            if project in known:
                mine = (column.environment == environment) & (column.project == project)
                connection.execute(sa.update(tables.fences).where(mine).values(fence=fence))
            else:
                row = {"environment": environment, "project": project, "fence": fence}
                connection.execute(sa.insert(tables.fences), row)
        tell(FenceClaimed(project, environment, fence))
        return fence

    # --- deployments

    def begin(
        self, deployment: str, plan: bytes, fence: int, operator: str, *, host: str = "", goal: Goal = "deploy"
    ) -> int:
        """Keep the frozen plan (JSON of `orchestrator.plan.plan.Plan`) of a new deployment, and its entry `started`.

        `deployment` is its ULID, `host` by default this one. Gives the number of the entry.

        Raises:
            ConflictError: this ULID has a plan already.
            ValueError: `plan` is not the JSON of a plan.
            StoreError: see the class.
        """
        head = msgspec.json.decode(plan, type=_PlanHead)
        started = Started(operator, host or socket.gethostname(), os.getpid(), fence, goal)
        row = {
            "deployment": deployment,
            "project": head.project,
            "label": head.label,
            "environment": head.environment,
            "goal": goal,
            "plan": plan,
            "fence": fence,
            "state": "running",
            "reason": "",
            "operator": operator,
            "host": started.host,
            "pid": started.pid,
            "started": self._clock(),
        }
        with self.database.writing() as connection:
            if _is_there(connection, deployment):
                raise ConflictError(f"deployment {deployment} has begun already")
            connection.execute(sa.insert(tables.deployments), row)
            number = self._add(connection, deployment, (started,), tables.of_deployment(row))
        tell_facts(deployment, (started,), project=head.project, label=head.label, environment=head.environment)
        return number

    def append(self, deployment: str, *events: Event, orders: Mapping[str, bytes] | None = None) -> int:
        """Add entries in this order, all or none, on the disk on return. Gives the number of the last.

        `orders` are envelopes by operation, kept in the same commit: see `orders`.

        Raises:
            ConflictError: another order has the name of one of `orders`.
            NotFoundError: there is no such deployment.
            ValueError: no events, or a text that no file can hold (half of a surrogate pair).
            StoreError: see the class.
        """
        if not events:
            raise ValueError("nothing to append")
        with self.database.writing() as connection:
            number = self.append_in(connection, deployment, *events)
            _keep_orders(connection, deployment, orders or {})
        tell_facts(deployment, events)
        return number

    def keep_order(self, deployment: str, operation: str, envelope: bytes) -> None:
        """Keep an order of which nothing else is written down, on the disk on return.

        Raises:
            NotFoundError: there is no such deployment.
            ConflictError: another order has this name.
            StoreError: see the class.
        """
        with self.database.writing() as connection:
            if not _is_there(connection, deployment):
                raise NotFoundError(f"there is no deployment {deployment}")
            _keep_orders(connection, deployment, {operation: envelope})

    def order(self, operation: str) -> bytes | None:
        """The envelope that was kept for an operation. Raises `StoreError`."""
        query = sa.select(tables.orders.c.envelope).where(tables.orders.c.operation == operation)
        with self.database.reading() as connection:
            envelope: bytes | None = connection.execute(query).scalar_one_or_none()
        return envelope

    def ordered(self, deployment: str) -> set[str]:
        """All operations of a deployment that an order was kept for. Raises `StoreError`."""
        query = sa.select(tables.orders.c.operation).where(tables.orders.c.deployment == deployment)
        with self.database.reading() as connection:
            return set(connection.execute(query).scalars())

    def append_in(self, connection: sa.Connection, deployment: str, *events: Event) -> int:
        """As `append`, in the transaction of `connection`; the caller tells them once it is committed."""
        if not _is_there(connection, deployment):
            raise NotFoundError(f"there is no deployment {deployment}")
        return self._add(connection, deployment, events)

    def entries(self, deployment: str, after: int = 0) -> list[JournalEntry]:
        """What happened in a deployment after the entry `after`, in order. Raises `StoreError`."""
        query = sa.select(tables.entries).where(
            tables.entries.c.deployment == deployment, tables.entries.c.number > after
        )
        with self.database.reading() as connection:
            rows = connection.execute(query.order_by(tables.entries.c.number)).all()
        return [_entry(row) for row in rows]

    def deployment(self, deployment: str) -> DeploymentRecord:
        """Raises `NotFoundError`, `StoreError`."""
        with self.database.reading() as connection:
            row = connection.execute(sa.select(*_LISTED).where(tables.deployments.c.deployment == deployment)).first()
        if row is None:
            raise NotFoundError(f"there is no deployment {deployment}")
        return DeploymentRecord(*row)

    def deployments(
        self,
        environment: str | None = None,
        *,
        state: WrittenState | None = None,
        limit: int | None = 50,
    ) -> list[DeploymentRecord]:
        """The newest deployments first. `state` is the written one. Raises `StoreError`."""
        query = sa.select(*_LISTED).order_by(tables.deployments.c.number.desc()).limit(limit)
        if environment is not None:
            query = query.where(tables.deployments.c.environment == environment)
        if state is not None:
            query = query.where(tables.deployments.c.state == state)
        with self.database.reading() as connection:
            return [DeploymentRecord(*row) for row in connection.execute(query)]

    def plan(self, deployment: str) -> bytes:
        """The plan as it was frozen. Raises `NotFoundError`, `StoreError`."""
        query = sa.select(tables.deployments.c.plan).where(tables.deployments.c.deployment == deployment)
        with self.database.reading() as connection:
            plan: bytes | None = connection.execute(query).scalar_one_or_none()
        if plan is None:
            raise NotFoundError(f"there is no deployment {deployment}")
        return plan

    def set_state(self, deployment: str, state: WrittenState, reason: str = "", *events: Event) -> None:
        """Let a deployment end, or run again; `events` are added in the same commit.

        Raises:
            NotFoundError: there is no such deployment.
            StoreError: see the class.
        """
        ended = None if state == "running" else self._clock()
        self._change(deployment, {"state": state, "reason": reason, "ended": ended}, events)

    def take_up(self, deployment: str, fence: int, operator: str, *events: Event, host: str = "") -> None:
        """Another process goes on with a deployment: it is running, under this fence, of this process.

        `events` (a `resumed`) are added in the same commit.

        Raises:
            NotFoundError: there is no such deployment.
            StoreError: see the class.
        """
        holder = {"fence": fence, "operator": operator, "host": host or socket.gethostname(), "pid": os.getpid()}
        self._change(deployment, holder | {"state": "running", "reason": "", "ended": None}, events)

    def brackets(self, environment: str | None = None) -> list[tuple[DeploymentRecord, list[JournalEntry]]]:
        """All that was ever said of rotations, by deployment: what `orchestrator.journal.views.open_brackets` folds.

        Raises `StoreError`.
        """
        with self.database.reading() as connection:
            return _brackets(connection, environment)

    def open_brackets(self, environment: str | None = None) -> list[OpenBracket]:
        """The brackets that are open now, oldest first. Raises `StoreError`."""
        with self.database.reading() as connection:
            return open_brackets_in(connection, environment)

    # --- decisions

    def decide(
        self,
        environment: str,
        deployment: str,
        kind: str,
        data: Mapping[str, Any],
        operator: str,
        envelope: bytes = b"",
    ) -> int:
        """Leave a decision for a deployment; gives its number. `data` is JSON, `envelope` what was signed.

        People use `orchestrator.people.sign.decide`: nobody obeys what is not signed.

        Raises:
            NotFoundError: there is no such deployment.
            ConflictError: this very envelope is there already.
            StoreError: see the class.
        """
        row = {"environment": environment, "deployment": deployment, "kind": kind, "operator": operator}
        text, signed = msgspec.json.encode(dict(data)).decode(), envelope or None
        with self.database.writing() as connection:
            if not _is_there(connection, deployment):
                raise NotFoundError(f"there is no deployment {deployment}")
            same = sa.select(sa.literal(1)).where(tables.decisions.c.envelope == signed)
            if signed and connection.execute(same).first() is not None:
                raise ConflictError("this decision is in the journal already: what is signed once counts once")
            values = row | {"data": text, "at": self._clock(), "envelope": signed}
            number = self._chain(connection, tables.decisions, [values])
        tell(Decided(operator, environment, deployment, kind))
        return number

    def pending_decisions(self, deployment: str) -> list[Decision]:
        """Decisions for this deployment that were not taken up yet, oldest first. Raises `StoreError`."""
        column = tables.decisions.c
        query = sa.select(tables.decisions).where(column.taken.is_(None), column.deployment == deployment)
        with self.database.reading() as connection:
            rows = connection.execute(query.order_by(column.number)).all()
        return [_decision(row) for row in rows]

    def take_decision(self, number: int) -> bool:
        """Take a decision up, once: it is marked, and its deployment gets the entry `decision_taken`, in one commit.

        False where it was taken before.

        Raises:
            NotFoundError: there is no such decision.
            StoreError: see the class.
        """
        this = tables.decisions.c.number == number
        with self.database.writing() as connection:
            row = connection.execute(sa.select(tables.decisions).where(this)).first()
            if row is None:
                raise NotFoundError(f"there is no decision {number}")
            if row.taken is not None:
                return False
            connection.execute(sa.update(tables.decisions).where(this).values(taken=self._clock()))
            decision = _decision(row)
            taken = DecisionTaken(number, decision.operator, decision.kind, decision.data)
            self._add(connection, decision.deployment, (taken,))
        tell_facts(decision.deployment, (taken,))
        return True

    # --- the chain

    def verify(self, kept: str | None = None) -> ChainReport:
        """Walk all entries and decisions, and find the first that is not what was written.

        `kept` is a head that somebody kept: it must still be the hash of an entry. Raises `StoreError`.
        """
        with self.database.reading() as connection:
            entries, decisions = (self._check(connection, table, kept) for table in tables.CHAINED)
        return ChainReport(entries, decisions)

    def heads(self, deployments: Iterable[str] = ()) -> Heads:
        """Where the chains end now, and the last entry of each of these deployments. Raises `StoreError`."""
        column = tables.entries.c
        with self.database.reading() as connection:
            entries, decisions = (self._head(connection, table) for table in tables.CHAINED)
            of = {}
            for deployment in deployments:
                query = sa.select(column.number, column.hash).where(column.deployment == deployment)
                last = connection.execute(query.order_by(column.number.desc()).limit(1)).first()
                if last is not None:
                    of[deployment] = Head(last.number, last.hash or "")
        return Heads(entries, decisions, of)

    def _check(self, connection: sa.Connection, table: sa.Table, kept: str | None) -> chain.Checked:
        start = chain.start_of(self.id)
        rows = tables.chained_rows(connection, table)
        highest = tables.highest_number(connection, table)
        if table is tables.decisions:
            kept = None
        try:
            return chain.check(rows, start, tables.base_of(connection, table, start), highest, kept=kept)
        except ValueError as error:
            raise self.database.damaged(f"where the chain of its {table.name} begins cannot be read") from error

    def _head(self, connection: sa.Connection, table: sa.Table) -> Head:
        return Head(*tables.head_of(connection, table, chain.start_of(self.id)))

    # --- inside

    def _change(self, deployment: str, values: dict[str, Any], events: tuple[Event, ...]) -> None:
        this = tables.deployments.c.deployment == deployment
        with self.database.writing() as connection:
            done = connection.execute(sa.update(tables.deployments).where(this).values(values))
            if not done.rowcount:
                raise NotFoundError(f"there is no deployment {deployment}")
            self._add(connection, deployment, events)
        tell_facts(deployment, events)

    def _add(
        self,
        connection: sa.Connection,
        deployment: str,
        events: tuple[Event, ...],
        begins: Mapping[str, Any] | None = None,
    ) -> int:
        """Entries at the end of the chain, and what they mean for open brackets; gives the number of the last.

        `begins` are columns of the deployment that the first one begins.
        """
        if not events:
            return 0
        at = self._clock()
        rows = [
            {"deployment": deployment, "at": at, "kind": one.kind(), "data": msgspec.json.encode(one).decode()}
            for one in events
        ]
        rows[0] |= begins or {}
        last = self._chain(connection, tables.entries, rows)
        for number, event in enumerate(events, last - len(events) + 1):
            if isinstance(event, BracketEvent):
                _move_bracket(connection, JournalEntry(number, deployment, at, event), event)
        return last

    def _chain(self, connection: sa.Connection, table: sa.Table, rows: list[dict[str, Any]]) -> int:
        return tables.add_chained(connection, table, chain.start_of(self.id), rows)

    def _prepare(self) -> None:
        with self.database.reading() as connection:
            found = self._read_meta(connection)
        if found != FORMAT:
            with self.database.writing() as connection:
                found = self._read_meta(connection)
                if not found:  # no other process was faster
                    self._create(connection)
                elif found < FORMAT:
                    self._migrate(connection)
                self._read_meta(connection)

    def _read_meta(self, connection: sa.Connection) -> int:
        """Take the id; gives the format, 0 where the file is still empty."""
        there = tables.names(connection)
        if not there:
            return 0
        if "meta" not in there:
            raise StoreError(f"{self.path} is not a journal: it is a database of something else")
        meta = {str(key): str(value) for key, value in connection.execute(sa.select(tables.meta))}
        found, id = meta.get("format", ""), meta.get("id", "")
        if not re.fullmatch(r"[0-9]{1,9}", found, re.ASCII) or not re.fullmatch(r"[0-9a-f]{32}", id, re.ASCII):
            raise self.database.damaged("its format or its id cannot be read")
        if int(found) > FORMAT:
            raise RefusedError(
                f"the journal {self.path} has format {found}, and this Waystation reads up to {FORMAT}",
                hint="a newer version wrote it: use that one",
            )
        if int(found) < 1:
            raise self.database.damaged(f"there never was a format {found}")
        self.id = id
        return int(found)

    def _migrate(self, connection: sa.Connection) -> None:
        """Bring a journal of an older format up to this one. What older versions have under way must end first."""
        folder = f"{self.path}.locks"
        with suppress(FileNotFoundError):
            for name in os.listdir(folder):
                descriptor = lock_file(os.path.join(folder, name))
                if descriptor is None:
                    raise LockedError(
                        f"{self.path} is in use by an older Waystation, which works in one of its environments",
                        hint="let that end, and call again: the journal is brought up to this version then",
                    )
                os.close(descriptor)  # no older one can take it before this transaction ends, nor use it afterwards
        tables.migrate(connection, self.id)
        for bracket in fold_brackets(_brackets(connection, None)):
            _keep_bracket(connection, bracket)
        connection.execute(sa.update(tables.meta).where(tables.meta.c.key == "format").values(value=str(FORMAT)))

    def _create(self, connection: sa.Connection) -> None:
        tables.create(connection)
        meta = {"format": str(FORMAT), "id": secrets.token_hex(16), "created": str(self._clock())}
        connection.execute(sa.insert(tables.meta), [{"key": key, "value": value} for key, value in meta.items()])


class _PlanHead(msgspec.Struct, frozen=True):
    """What the list of deployments shows of a plan."""

    project: str
    label: str
    environment: str


def _path_of(location: str) -> str:
    if "://" not in location:
        return os.path.abspath(location)
    path = location.removeprefix("sqlite:///")
    if path == location or not path:
        raise UsageError(f"{location.partition('://')[0]}:// is no journal", hint="a path, or sqlite:///PATH")
    return os.path.abspath(path)


# --- entries and what is kept beside them


def open_brackets_in(connection: sa.Connection, environment: str | None) -> list[OpenBracket]:
    """The brackets that are open now, oldest first, in the transaction of `connection`."""
    query = sa.select(tables.open_brackets.c.data).order_by(tables.open_brackets.c.number)
    if environment is not None:
        query = query.where(tables.open_brackets.c.environment == environment)
    return [_bracket(data) for data in connection.execute(query).scalars()]


def _move_bracket(connection: sa.Connection, entry: JournalEntry, event: BracketEvent) -> None:
    of_this = sa.select(*_LISTED).where(tables.deployments.c.deployment == entry.deployment)
    record = DeploymentRecord(*connection.execute(of_this).one())
    column = tables.open_brackets.c
    this = (
        (column.environment == record.environment)
        & (column.rotation == event.rotation)
        & (column.machine == event.machine)
    )
    data = connection.execute(sa.select(column.data).where(this)).scalar_one_or_none()
    before = None if data is None else _bracket(data)
    after = bracket_after(before, record, entry, event)
    if after != before:
        connection.execute(sa.delete(tables.open_brackets).where(this))
        if after is not None:
            _keep_bracket(connection, after)


def _keep_bracket(connection: sa.Connection, bracket: OpenBracket) -> None:
    row = {
        "environment": bracket.environment,
        "rotation": bracket.rotation,
        "machine": bracket.machine,
        "number": bracket.number,
        "data": msgspec.json.encode(bracket).decode(),
    }
    connection.execute(sa.insert(tables.open_brackets), row)


def _brackets(connection: sa.Connection, environment: str | None) -> list[tuple[DeploymentRecord, list[JournalEntry]]]:
    query = (
        sa.select(tables.entries, *(column.label(f"of_{column.name}") for column in _LISTED))
        .join(tables.deployments, tables.deployments.c.deployment == tables.entries.c.deployment)
        .where(tables.entries.c.kind.in_(BRACKET_KINDS))
        .order_by(tables.entries.c.number)
    )
    if environment is not None:
        query = query.where(tables.deployments.c.environment == environment)
    rows = connection.execute(query).all()
    found: dict[str, tuple[DeploymentRecord, list[JournalEntry]]] = {}
    for row in rows:
        if row.deployment not in found:
            found[row.deployment] = (DeploymentRecord(*row[len(tables.entries.c) :]), [])
        found[row.deployment][1].append(_entry(row))
    return list(found.values())


def _bracket(data: str) -> OpenBracket:
    try:
        return msgspec.json.decode(data, type=OpenBracket)
    except msgspec.DecodeError as error:
        raise StoreError(f"an open bracket of the journal cannot be read: {error}") from error


# --- rows


def _is_there(connection: sa.Connection, deployment: str) -> bool:
    query = "SELECT 1 FROM deployments WHERE deployment = ?"
    return connection.exec_driver_sql(query, (deployment,)).first() is not None


def _keep_orders(connection: sa.Connection, deployment: str, orders: Mapping[str, bytes]) -> None:
    for operation, envelope in orders.items():
        query = "SELECT envelope FROM orders WHERE operation = ?"
        kept = connection.exec_driver_sql(query, (operation,)).scalar_one_or_none()
        if kept is None:
            row = (operation, deployment, envelope)
            connection.exec_driver_sql("INSERT INTO orders (operation, deployment, envelope) VALUES (?, ?, ?)", row)
        elif kept != envelope:
            raise ConflictError(f"another order has the name {operation}")


def _entry(row: sa.Row[Any]) -> JournalEntry:
    return JournalEntry(row.number, row.deployment, row.at, decode(row.data))


def _decision(row: sa.Row[Any]) -> Decision:
    try:
        data = msgspec.json.decode(row.data, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise StoreError(f"decision {row.number} of the journal cannot be read: {error}") from error
    return Decision(
        row.number, row.environment, row.deployment, row.at, row.operator, row.kind, data, row.envelope or b""
    )
