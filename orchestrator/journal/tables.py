"""The shape of the journal's database: its tables, and triggers for the rules that no statement may break.

Numbers only grow (AUTOINCREMENT). Times are seconds since 1970, `data` is JSON.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

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
    sa.Index("entries_of_deployment", "deployment", "number"),
    sqlite_autoincrement=True,
)
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
"""Who holds, or held, the lock of a project in an environment; `orchestrator/journal/locks.py` writes and reads it."""
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
"""Who turns, or turned, a machine; `orchestrator/journal/leases.py` writes and reads it."""
promises = sa.Table(
    "promises",
    _all,
    sa.Column("deployment", sa.Text, primary_key=True),
    sa.Column("environment", sa.Text, nullable=False, index=True),
    sa.Column("rotation", sa.Text, nullable=False),
    sa.Column("min_in_service", sa.Integer, nullable=False),
    sa.Column("machines", sa.Text, nullable=False),
)
"""How many of its machines a deployment keeps in service while it turns others; `orchestrator/journal/leases.py`."""

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
    "fences_rise": ("UPDATE ON fences WHEN NEW.fence <= OLD.fence", "a fence only rises"),
    "fences_are_kept": ("DELETE ON fences", "a fence only rises"),
}
"""Triggers, by name: before what, and what they say. They guard against statements of ours that are wrong."""


def create(connection: sa.Connection) -> None:
    """Make everything, in the transaction of `connection`."""
    _all.create_all(connection, checkfirst=False)
    _guard(connection, *_GUARDS)


def migrate(connection: sa.Connection) -> None:
    """Give the tables of format 1 or 2 the shape of format 3, in the transaction of `connection`.

    The fence of an environment goes on as the floor of all its projects. Nobody may hold a lock.
    """
    known = connection.exec_driver_sql("SELECT environment, fence FROM fences").all()
    connection.exec_driver_sql("DROP TABLE fences")  # and its triggers
    connection.exec_driver_sql("DROP TABLE holders")
    _all.create_all(connection, tables=[fences, holders, open_brackets, leases, promises], checkfirst=False)
    _guard(connection, "fences_rise", "fences_are_kept")
    connection.exec_driver_sql("ALTER TABLE decisions ADD COLUMN envelope BLOB")
    for environment, fence in known:
        connection.execute(sa.insert(fences), {"environment": environment, "project": "", "fence": fence})


def _guard(connection: sa.Connection, *names: str) -> None:
    for name in names:
        before, told = _GUARDS[name]
        connection.exec_driver_sql(f"CREATE TRIGGER {name} BEFORE {before} BEGIN SELECT RAISE(ABORT, '{told}'); END")


def names(connection: sa.Connection) -> set[str]:
    """Of all tables that the file holds."""
    found = connection.exec_driver_sql("SELECT name FROM sqlite_schema WHERE type = 'table'").scalars()
    return {str(name) for name in found if not str(name).startswith("sqlite_")}
