"""The shape of the journal's database: its tables, and triggers for the rules that no statement may break.

Numbers only grow (AUTOINCREMENT). Times are seconds since 1970, `data` is JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import sqlalchemy as sa

from orchestrator.journal import chain

_all = sa.MetaData()
meta = sa.Table(
    "meta",
    _all,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
releases = sa.Table(
    "releases",
    _all,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("project", sa.Text, nullable=False),
    sa.Column("label", sa.Text, nullable=False),
    sa.Column("document", sa.LargeBinary, nullable=False),
    sa.Column("envelope", sa.LargeBinary, nullable=False),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("operator", sa.Text, nullable=False),
    sa.UniqueConstraint("project", "label"),
    sqlite_autoincrement=True,
)
release_files = sa.Table(
    "release_files",
    _all,
    sa.Column("sha256", sa.Text, primary_key=True),
    sa.Column("data", sa.LargeBinary, nullable=False),
)
deployments = sa.Table(
    "deployments",
    _all,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("deployment", sa.Text, nullable=False, unique=True),
    sa.Column("project", sa.Text, nullable=False),
    sa.Column("label", sa.Text, nullable=False),
    sa.Column("environment", sa.Text, nullable=False, index=True),
    sa.Column("goal", sa.Text, nullable=False),
    sa.Column("plan", sa.LargeBinary, nullable=False),
    sa.Column("fence", sa.Integer, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("operator", sa.Text, nullable=False),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("started", sa.Float, nullable=False),
    sa.Column("ended", sa.Float),
    sqlite_autoincrement=True,
)
entries = sa.Table(
    "entries",
    _all,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("deployment", sa.Text, sa.ForeignKey(deployments.c.deployment), nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("kind", sa.Text, nullable=False, index=True),
    sa.Column("data", sa.Text, nullable=False),
    sa.Column("hash", sa.Text),
    sa.Index("entries_of_deployment", "deployment", "number"),
    sqlite_autoincrement=True,
)
orders = sa.Table(
    "orders",
    _all,
    sa.Column("operation", sa.Text, primary_key=True),
    sa.Column("deployment", sa.Text, sa.ForeignKey(deployments.c.deployment), nullable=False, index=True),
    sa.Column("envelope", sa.LargeBinary, nullable=False),
)
"""Orders as they left: the same order after a crash is the same bytes. Their entry `dispatched` has their digest."""
decisions = sa.Table(
    "decisions",
    _all,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("environment", sa.Text, nullable=False),
    sa.Column("deployment", sa.Text, sa.ForeignKey(deployments.c.deployment)),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("operator", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("data", sa.Text, nullable=False),
    sa.Column("taken", sa.Float),
    sa.Column("envelope", sa.LargeBinary),
    sa.Column("hash", sa.Text),
    sa.Index("decisions_that_wait", "environment", sqlite_where=sa.text("taken IS NULL")),
    sqlite_autoincrement=True,
)
fences = sa.Table(
    "fences",
    _all,
    sa.Column("environment", sa.Text, primary_key=True),
    sa.Column("project", sa.Text, primary_key=True),
    sa.Column("fence", sa.Integer, nullable=False),
)
"""The highest of each project in an environment. That of no project (an empty name) is from before projects had their own,
and is the floor of all of them.
"""
holders = sa.Table(
    "holders",
    _all,
    sa.Column("project", sa.Text, primary_key=True),
    sa.Column("environment", sa.Text, primary_key=True),
    sa.Column("operator", sa.Text, nullable=False),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("since", sa.Float, nullable=False),
    sa.Column("label", sa.Text, nullable=False),
    sa.Column("why", sa.Text, nullable=False),
    sa.Column("deployment", sa.Text, nullable=False),
)
"""Who holds, or held, the lock of a project in an environment; `orchestrator/locks/locks.py` writes and reads it."""
open_brackets = sa.Table(
    "open_brackets",
    _all,
    sa.Column("environment", sa.Text, primary_key=True),
    sa.Column("rotation", sa.Text, primary_key=True),
    sa.Column("machine", sa.Text, primary_key=True),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("data", sa.Text, nullable=False),
)
"""What `orchestrator.journal.views.open_brackets` makes of all entries, kept as they are written: `data` is JSON of an
`OpenBracket`, `number` that of its entry.
"""
leases = sa.Table(
    "leases",
    _all,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("machine", sa.Text, nullable=False),
    sa.Column("environment", sa.Text, nullable=False, index=True),
    sa.Column("project", sa.Text, nullable=False),
    sa.Column("label", sa.Text, nullable=False),
    sa.Column("deployment", sa.Text, nullable=False),
    sa.Column("operator", sa.Text, nullable=False),
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("since", sa.Float, nullable=False),
)
"""Who turns, or turned, a machine; `orchestrator/locks/leases.py` writes and reads it."""
promises = sa.Table(
    "promises",
    _all,
    sa.Column("deployment", sa.Text, primary_key=True),
    sa.Column("environment", sa.Text, nullable=False, index=True),
    sa.Column("rotation", sa.Text, nullable=False),
    sa.Column("min_in_service", sa.Integer, nullable=False),
    sa.Column("machines", sa.Text, nullable=False),
)
"""How many of its machines a deployment keeps in service while it turns others; `orchestrator/locks/leases.py`."""

_GUARDS: Final = {
    "entries_stay": ("UPDATE ON entries", "an entry is never changed"),
    "entries_are_kept": ("DELETE ON entries", "an entry is never removed"),
    "releases_stay": ("UPDATE ON releases", "a release is never changed"),
    "releases_are_kept": ("DELETE ON releases", "a release is never removed"),
    "plans_stay": (
        "UPDATE OF deployment, project, label, environment, goal, plan, started ON deployments",
        "a plan is never changed",
    ),
    "deployments_are_kept": ("DELETE ON deployments", "a deployment is never removed"),
    "decisions_end": ("UPDATE ON decisions WHEN OLD.taken IS NOT NULL", "a decision is taken once"),
    "decisions_are_kept": ("DELETE ON decisions", "a decision is never removed"),
    "orders_stay": ("UPDATE ON orders", "an order is never changed"),
    "orders_are_kept": ("DELETE ON orders", "an order is never removed"),
    "fences_rise": ("UPDATE ON fences WHEN NEW.fence <= OLD.fence", "a fence only rises"),
    "fences_are_kept": ("DELETE ON fences", "a fence only rises"),
}
"""Triggers, by name: before what, and what they say. They guard against statements of ours that are wrong."""


def create(connection: sa.Connection) -> None:
    """Make everything, in the transaction of `connection`."""
    _all.create_all(connection, checkfirst=False)
    _guard(connection, *_GUARDS)


def _guard(connection: sa.Connection, *names: str) -> None:
    for name in names:
        before, told = _GUARDS[name]
        connection.exec_driver_sql(f"CREATE TRIGGER {name} BEFORE {before} BEGIN SELECT RAISE(ABORT, '{told}'); END")


def names(connection: sa.Connection) -> set[str]:
    """Of all tables that the file holds."""
    found = connection.exec_driver_sql("SELECT name FROM sqlite_schema WHERE type = 'table'").scalars()
    return {str(name) for name in found if not str(name).startswith("sqlite_")}


# --- the chain

CHAINED: Final = (entries, decisions)
"""Tables whose rows carry a hash over the row before (`orchestrator.journal.chain`)."""
_OF_DEPLOYMENT: Final = ("project", "label", "environment", "goal", "plan", "started")
"""Columns of a deployment that stand in the hash of its entry `started`, as they never change either."""


def content(row: Mapping[str, Any]) -> dict[str, Any]:
    """What of a row of `CHAINED` its hash is over: all but the hash, and when a decision was taken."""
    return {name: value for name, value in row.items() if name not in {"hash", "taken"}}


def add_chained(connection: sa.Connection, table: sa.Table, start: str, rows: list[dict[str, Any]]) -> int:
    """Put rows in at the end of a chain that begins with `start`; the number of the last.

    A row of `entries` may have columns of its deployment beside its own, as `chained_rows` gives them.
    """
    head, hash, highest = _end_of(connection, table, start)
    number = max(head, highest)
    ready = []
    for row in rows:
        number += 1
        hash = chain.link(hash, row | {"number": number})
        ready.append({name: value for name, value in row.items() if name in table.c} | {"number": number, "hash": hash})
    # As text: to compile such a statement and to convert its values would take longer than the rest of an append.
    names = ready[0].keys()
    words = f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"  # noqa: S608
    connection.exec_driver_sql(words, [tuple(row.values()) for row in ready])
    return number


def head_of(connection: sa.Connection, table: sa.Table, start: str) -> tuple[int, str]:
    """Number and hash of the last row."""
    return _end_of(connection, table, start)[:2]


def highest_number(connection: sa.Connection, table: sa.Table) -> int:
    """The number of the newest row that a table ever had (AUTOINCREMENT remembers it); 0 where there never was one."""
    return _end_of(connection, table, "")[2]


def _end_of(connection: sa.Connection, table: sa.Table, start: str) -> tuple[int, str, int]:
    last = f"SELECT number, hash FROM {table.name} ORDER BY number DESC LIMIT 1"  # noqa: S608 - one of CHAINED
    highest = "SELECT seq FROM sqlite_sequence WHERE name = ?"
    query = f"SELECT ({highest}), number, hash FROM (SELECT 1) LEFT JOIN ({last})"  # noqa: S608
    ever, number, hash = connection.exec_driver_sql(query, (table.name,)).one()
    if hash is None:
        base = base_of(connection, table, start)
        number, hash = base.number, base.hash
    return number, hash, ever or 0


def base_of(connection: sa.Connection, table: sa.Table, start: str) -> chain.Base:
    """Where the chain of a table begins to stand beside its rows. Raises `ValueError` where that cannot be read."""
    text = connection.execute(sa.select(meta.c.value).where(meta.c.key == _base_key(table))).scalar_one_or_none()
    if text is None:
        return chain.Base(0, start)
    number, _, hash = text.partition(" ")
    return chain.Base(int(number), hash)


def chained_rows(connection: sa.Connection, table: sa.Table) -> Iterator[chain.Link]:
    """All rows of a table, with what their hashes are over, in order."""
    columns = [column for column in table.c if column.name in _columns(connection, table)]
    query = sa.select(*columns).order_by(table.c.number)
    if table is entries:
        of = [deployments.c[name].label(f"deployment_{name}") for name in _OF_DEPLOYMENT]
        begins = (deployments.c.deployment == entries.c.deployment) & (entries.c.kind == "started")
        query = sa.select(*columns, *of).outerjoin(deployments, begins).order_by(table.c.number)
    for row in connection.execute(query).mappings():
        words = dict(row)
        yield chain.Link(row["number"], content(words), words.get("hash"))


def of_deployment(row: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of a deployment, as they stand in the hash of its entry `started`."""
    return {f"deployment_{name}": row[name] for name in _OF_DEPLOYMENT}


def _base_key(table: sa.Table) -> str:
    return f"chain of {table.name}"


# --- older files


def migrate(connection: sa.Connection, id: str) -> None:
    """Bring a file of an older format to this one's shape, in the transaction of `connection`; `id` is the journal's."""
    for step in _MIGRATIONS:
        step(connection, id)


def _chain_rows(connection: sa.Connection, id: str) -> None:
    """Rows carry hashes from here on; one hash is kept over all that were there before."""
    start = chain.start_of(id)
    for table in CHAINED:
        if "hash" in _columns(connection, table):
            continue
        number, hash = 0, start
        for row in chained_rows(connection, table):
            number, hash = row.number, chain.link(hash, row.content)
        connection.execute(sa.insert(meta), {"key": _base_key(table), "value": f"{number} {hash}"})
        connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN hash TEXT")


def _by_project(connection: sa.Connection, _id: str) -> None:
    """Locks and fences are of projects: the fence of an environment goes on as the floor of all of them.

    Nobody may hold a lock.
    """
    if "project" in _columns(connection, fences):
        return
    known = connection.exec_driver_sql("SELECT environment, fence FROM fences").all()
    connection.exec_driver_sql("DROP TABLE fences")  # and its triggers
    connection.exec_driver_sql("DROP TABLE holders")
    _all.create_all(connection, tables=[fences, holders, open_brackets, leases, promises], checkfirst=False)
    _guard(connection, "fences_rise", "fences_are_kept")
    for environment, fence in known:
        connection.execute(sa.insert(fences), {"environment": environment, "project": "", "fence": fence})


def _keep_orders(connection: sa.Connection, _id: str) -> None:
    """Orders stand in the journal. Those of older deployments stay in their files."""
    if "orders" not in names(connection):
        _all.create_all(connection, tables=[orders], checkfirst=False)
        _guard(connection, "orders_stay", "orders_are_kept")


def _sign_decisions(connection: sa.Connection, _id: str) -> None:
    """Decisions carry what a person signed."""
    if "envelope" not in _columns(connection, decisions):
        connection.exec_driver_sql("ALTER TABLE decisions ADD COLUMN envelope BLOB")


def _columns(connection: sa.Connection, table: sa.Table) -> set[str]:
    found = connection.exec_driver_sql("SELECT name FROM pragma_table_info(?)", (table.name,)).scalars()
    return {str(name) for name in found}


_MIGRATIONS: Final[tuple[Callable[[sa.Connection, str], None], ...]] = (
    _by_project,
    _chain_rows,
    _sign_decisions,
    _keep_orders,
)
"""In this order; each looks for itself whether it was done."""
