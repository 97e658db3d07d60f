"""The lease of a machine while it turns: one deployment at a time, whichever project, and a name for those who wait.

As with `orchestrator/locks/locks.py`, the kernel's lock on a file says that it is held, and goes with its process, also
at kill -9; a row says by whom. A row alone says nothing: where its file is free, it is of the past. Leases are taken
inside a transaction that excludes all others, together with the decision that the machine may turn: so what one
deployment decides, the next one sees, whatever process it is in.

Nobody holds one lease while waiting for another, so no two deployments can wait for each other.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Final

import msgspec
import sqlalchemy as sa

from orchestrator.journal.events import Event
from orchestrator.journal.journal import Journal, open_brackets_in
from orchestrator.journal.tables import leases, promises
from orchestrator.journal.trail import tell_facts
from orchestrator.journal.views import OpenBracket
from orchestrator.locks.locks import holder_in, take_file

LOOK_SECONDS: Final = 0.25
"""Between two looks whether a machine is free."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """The deployment that wants machines: what those read who wait for it."""

    project: str
    environment: str
    label: str
    deployment: str
    operator: str


@dataclass(frozen=True, slots=True)
class Turning:
    """A machine, and who turns it. `key` is the fingerprint of its agent, `since` seconds since 1970."""

    key: str
    machine: str
    environment: str
    project: str
    label: str
    deployment: str
    operator: str
    host: str
    pid: int
    since: float

    def __str__(self) -> str:
        return f"{self.machine} is being turned by {self.label} of {self.project} since {since_text(self.since)}"


@dataclass(frozen=True, slots=True)
class Promise:
    """While its `deployment` turns machines, it keeps `min_in_service` of these `machines` in service in `rotation`."""

    deployment: str
    rotation: str
    min_in_service: int
    machines: frozenset[str]


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What other deployments have in an environment.

    Attributes:
        brackets: all that are open there, one's own too.
        turning: machines that others turn, by their names here.
        promises: of those who turn some.
        alive: deployments that answer for a bracket and whose process lives.
    """

    brackets: tuple[OpenBracket, ...] = ()
    turning: Mapping[str, Turning] = field(default_factory=dict)
    promises: tuple[Promise, ...] = ()
    alive: frozenset[str] = frozenset()


class Lease:
    """A machine that is ours to turn, until `release`, or until this process ends."""

    def __init__(self, turning: Turning, descriptor: int) -> None:
        self.turning = turning
        self._descriptor = descriptor

    @property
    def machine(self) -> str:
        return self.turning.machine

    def release(self) -> None:
        """Give it back. Twice is once. Nothing is written: without its file the row is of the past."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Claimed:
    """The leases that were taken, in the order of the decision, and what else was known then."""

    leases: tuple[Lease, ...]
    elsewhere: Elsewhere


async def claim(
    journal: Journal,
    tenant: Tenant,
    machines: Mapping[str, str],
    decide: Callable[[Elsewhere], Sequence[str]],
    *,
    promise: Promise | None = None,
    entry: Callable[[str], Event] | None = None,
) -> Claimed:
    """Decide which machines turn now, and take their leases, as one: no other process decides meanwhile.

    Args:
        journal: where the leases stand.
        tenant: who wants them.
        machines: fingerprints of the agents, by machine.
        decide: which of `machines` to take, none that others turn. Pure and quick; it may be asked several times.
        promise: what others have to respect from now on, as long as one of the machines turns.
        entry: made of each machine that is taken, and added to the deployment in the same commit.

    Raises:
        StoreError: nothing was taken.
    """
    return await _undone_by_cancel(lambda: _claim(journal, tenant, machines, decide, promise, entry))


@asynccontextmanager
async def machine(
    journal: Journal, tenant: Tenant, name: str, key: str, tell: Callable[[str], None]
) -> AsyncIterator[Lease]:
    """Turn one machine, once nobody else does. Who waits is told for whom; to be cancelled ends the wait.

    Args:
        journal: where the lease stands.
        tenant: who wants it.
        name: of the machine.
        key: fingerprint of its agent.
        tell: hears for whom it waits.

    Raises:
        StoreError: it was not taken.
    """

    def decide(elsewhere: Elsewhere) -> Sequence[str]:
        return () if name in elsewhere.turning else (name,)

    told = ""
    while not (claimed := await claim(journal, tenant, {name: key}, decide)).leases:
        words = str(claimed.elsewhere.turning[name])
        if words != told:
            told = words
            tell(f"waiting: {words}")
        await asyncio.sleep(LOOK_SECONDS)
    (lease,) = claimed.leases
    try:
        yield lease
    finally:
        lease.release()


# --- inside one transaction


async def _undone_by_cancel(take: Callable[[], Claimed]) -> Claimed:
    """In a thread. What a thread takes after its caller was cancelled is given back."""
    taking = asyncio.ensure_future(asyncio.to_thread(take))
    try:
        return await asyncio.shield(taking)
    except asyncio.CancelledError:
        taking.add_done_callback(_release_all)
        raise


def _release_all(taking: asyncio.Future[Claimed]) -> None:
    if not taking.cancelled() and taking.exception() is None:
        for lease in taking.result().leases:
            lease.release()


def _claim(
    journal: Journal,
    tenant: Tenant,
    machines: Mapping[str, str],
    decide: Callable[[Elsewhere], Sequence[str]],
    promise: Promise | None,
    entry: Callable[[str], Event] | None,
) -> Claimed:
    taken: dict[str, Lease] = {}
    try:
        with journal.database.writing() as connection:
            elsewhere = _elsewhere(connection, journal, tenant, machines)
            while True:
                wanted = decide(elsewhere)
                hidden = _take(journal, tenant, {name: machines[name] for name in wanted}, taken)
                if hidden is None:
                    break
                elsewhere = replace(elsewhere, turning={**elsewhere.turning, hidden.machine: hidden})
            events = tuple(entry(name) for name in wanted) if entry is not None else ()
            if wanted:
                _keep(connection, [lease.turning for lease in taken.values()], tenant, promise)
            if events:
                journal.append_in(connection, tenant.deployment, *events)
    except BaseException:
        for lease in taken.values():
            lease.release()
        raise
    if events:
        tell_facts(tenant.deployment, events)
    return Claimed(tuple(taken[name] for name in wanted), elsewhere)


def _take(journal: Journal, tenant: Tenant, wanted: Mapping[str, str], taken: dict[str, Lease]) -> Turning | None:
    """Take all, in the order of their names; where one has a holder that left no row, none, and who has it."""
    for name in sorted(wanted):
        row = _row(tenant, name, wanted[name])
        descriptor = _file(journal, row.key, name)
        if descriptor is None:
            for lease in taken.values():
                lease.release()
            taken.clear()
            return replace(row, project="somebody", label="something", deployment="", since=0.0)
        taken[name] = Lease(row, descriptor)
    return None


def _row(tenant: Tenant, name: str, key: str) -> Turning:
    return Turning(
        key=key,
        machine=name,
        environment=tenant.environment,
        project=tenant.project,
        label=tenant.label,
        deployment=tenant.deployment,
        operator=tenant.operator,
        host=socket.gethostname(),
        pid=os.getpid(),
        since=time.time(),
    )


def _file(journal: Journal, key: str, name: str) -> int | None:
    return take_file(journal, f"machine\0{key}", name)


def _living(connection: sa.Connection, journal: Journal) -> list[Turning]:
    """Who turns machines now. Rows of the past are removed."""
    found = []
    for row in connection.execute(sa.select(leases)).all():
        one = Turning(*row)
        descriptor = _file(journal, one.key, one.machine)
        if descriptor is None:
            found.append(one)
        else:
            os.close(descriptor)
            connection.execute(sa.delete(leases).where(leases.c.key == one.key))
    return found


def _elsewhere(connection: sa.Connection, journal: Journal, tenant: Tenant, machines: Mapping[str, str]) -> Elsewhere:
    living = _living(connection, journal)
    turned = {row.key: row for row in living}
    names = {row.machine: row for row in living if row.environment == tenant.environment}
    # One machine may have a name in several environments.
    names |= {name: turned[key] for name, key in machines.items() if key in turned}
    others = {name: row for name, row in names.items() if row.deployment != tenant.deployment}
    brackets = tuple(open_brackets_in(connection, tenant.environment))
    return Elsewhere(
        brackets=brackets,
        turning=others,
        promises=_promises(connection, tenant, {row.deployment for row in living}),
        alive=_alive(connection, journal, tenant, brackets),
    )


def _alive(
    connection: sa.Connection, journal: Journal, tenant: Tenant, brackets: Sequence[OpenBracket]
) -> frozenset[str]:
    projects = {bracket.project for bracket in brackets} - {tenant.project}
    holders = [holder_in(connection, journal, project, tenant.environment) for project in sorted(projects)]
    return frozenset(one.deployment for one in holders if one is not None and one.deployment)


def _promises(connection: sa.Connection, tenant: Tenant, living: set[str]) -> tuple[Promise, ...]:
    found = []
    for row in connection.execute(sa.select(promises)).all():
        if row.deployment not in living:
            connection.execute(sa.delete(promises).where(promises.c.deployment == row.deployment))
        elif row.environment == tenant.environment and row.deployment != tenant.deployment:
            names = frozenset(msgspec.json.decode(row.machines, type=list[str]))
            found.append(Promise(row.deployment, row.rotation, row.min_in_service, names))
    return tuple(found)


def _keep(connection: sa.Connection, rows: Sequence[Turning], tenant: Tenant, promise: Promise | None) -> None:
    for row in rows:
        connection.execute(sa.insert(leases).prefix_with("OR REPLACE", dialect="sqlite"), asdict(row))
    connection.execute(sa.delete(promises).where(promises.c.deployment == tenant.deployment))
    if promise is not None:
        values = {
            "deployment": tenant.deployment,
            "environment": tenant.environment,
            "rotation": promise.rotation,
            "min_in_service": promise.min_in_service,
            "machines": msgspec.json.encode(sorted(promise.machines)).decode(),
        }
        connection.execute(sa.insert(promises), values)


def since_text(seconds: float) -> str:
    """A moment (seconds since 1970) for people: without its day, where that is today."""
    moment = datetime.fromtimestamp(seconds, UTC)
    is_today = moment.date() == datetime.fromtimestamp(time.time(), UTC).date()
    return moment.strftime("%H:%M UTC" if is_today else "%Y-%m-%d %H:%M UTC")
