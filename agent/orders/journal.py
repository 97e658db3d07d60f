"""What an agent was ordered and what became of it, on its disk before it acts.

<home>/operations/<hash of the id>/order         the envelope as it came, durable before anything acts
<home>/operations/<hash of the id>/report        the final report as it was signed
<home>/operations/<hash of the id>/acknowledged  the orchestrator has it
<home>/operations/<hash of the id>/run-<n>/      the runner's folder (scripts and services)
<home>/journal.json                              fences, and what is remembered of orders that are forgotten
<home>/refusals.jsonl                            orders that were not obeyed, and why

Blocking, small files. One process writes (`agent serve` holds a lock); `agent status` reads beside it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from agent.disk import disk_errors, remove_folder, replace_file
from agent.orders.acceptance import Code, Memory, highest
from agent.orders.envelopes import order_digest
from agent.orders.orders import SKEW_SECONDS, FenceSeen, Order, Report, action_name
from relay.errors import StoreError
from relay.folders import make_folder
from relay.support.durable import sync_folder, write_durably
from relay.terminal.text import printable
from relay.trust.envelopes import ENVELOPE_MAX, MalformedError, unverified

KEPT_SECONDS = 30 * 86400.0
"""How long the result of an operation is kept that no orchestrator ever acknowledged."""
REFUSALS_MAX = 200
_FORGOTTEN_AT_ONCE = 256
_FILE_MAX = 16 << 20


@dataclass(slots=True)
class OperationRecord:
    """One accepted operation. `report` is the final one, `envelope` as it was signed; None while it is not over."""

    operation: str
    digest: str
    deployment: str
    environment: str
    project: str
    action: str
    folder: str
    not_before: float
    not_after: float
    report: Report | None = None
    envelope: bytes | None = None
    acknowledged: bool = False


class Refusal(msgspec.Struct, frozen=True):
    """An order that was not obeyed. `operation` is the id in it, or the one under which the relay brought it."""

    at: float
    code: str
    text: str
    operation: str
    digest: str
    relay: str = ""


class _Kept(msgspec.Struct, frozen=True):
    """journal.json. `fences` are by environment, the highest of each: all that format 1 has, and what an older agent reads."""

    format: int = 1
    newest: float = 0.0
    forgotten: float = 0.0
    fences: dict[str, FenceSeen] = {}
    projects: dict[str, dict[str, FenceSeen]] = {}


class OperationJournal:
    """Everything accepted so far, and what of it is not over."""

    def __init__(self, home: str) -> None:
        """Read what is there; changes nothing.

        Raises:
            StoreError: the disk does not give it.
        """
        self._home = home
        self._folder = os.path.join(home, "operations")
        self.operations: dict[str, OperationRecord] = {}
        # Never changed, only replaced: a presence reads it while a thread writes an order down.
        self.fences: dict[tuple[str, str], FenceSeen] = {}
        self._newest = self._forgotten = 0.0
        self._refused: dict[str, Refusal] = {}
        with disk_errors(home):
            self._load()

    def memory(self) -> Memory:
        """What judging the next order needs."""
        known = {record.operation: record.digest for record in self.operations.values()}
        return Memory(known, self.fences, self._newest, self._forgotten)

    # --- operations

    def accept(self, order: Order, digest: str, envelope: bytes) -> OperationRecord:
        """Write the order down, durably. Only then may anything act on it.

        Raises:
            StoreError: it is not written down, and must not be obeyed.
        """
        record = _record_of(order, digest, self._folder_of(order.operation))
        try:
            with disk_errors(record.folder):
                if not os.path.isdir(self._folder):
                    make_folder(self._folder, mode=0o700)
                    sync_folder(self._home)
                os.mkdir(record.folder, 0o700)
                write_durably(os.path.join(record.folder, "order"), envelope, mode=0o600)
                sync_folder(self._folder)
        except StoreError:
            remove_folder(record.folder)
            raise
        self._remember(record, order)
        return record

    def envelope(self, record: OperationRecord) -> bytes:
        """The order's envelope. Raises `StoreError`."""
        with disk_errors(record.folder):
            return _read(os.path.join(record.folder, "order"))

    def report(self, record: OperationRecord) -> bytes:
        """The final report's envelope; empty where it cannot be read."""
        try:
            return record.envelope or _read(os.path.join(record.folder, "report"))
        except OSError:
            return b""

    def finish(self, record: OperationRecord, report: Report, envelope: bytes, *, durable: bool) -> None:
        """Keep the final report. `durable` where it could not be made again: a runner keeps its own result.

        Raises:
            StoreError: it is not kept; what it says is true all the same.
        """
        record.report, record.envelope = report, envelope
        path = os.path.join(record.folder, "report")
        with disk_errors(record.folder):
            if durable:
                write_durably(path, envelope, mode=0o600)
            else:
                replace_file(path, envelope)

    def newest(self, count: int) -> list[OperationRecord]:
        """The last ones, the newest first."""
        ordered = sorted(
            self.operations.values(), key=lambda record: (record.not_before, record.operation), reverse=True
        )
        return ordered[:count]

    def unfinished(self) -> list[OperationRecord]:
        """Operations without a final report, in the order in which they were sent."""
        return sorted(
            (record for record in self.operations.values() if record.report is None),
            key=lambda record: (record.not_before, record.operation),
        )

    def unacknowledged(self) -> list[OperationRecord]:
        return [record for record in self.operations.values() if record.report is not None and not record.acknowledged]

    def acknowledge(self, operations: Collection[str]) -> None:
        """The orchestrator has these results."""
        for record in [record for record in self.unacknowledged() if record.operation in operations]:
            record.acknowledged, record.envelope = True, None
            # Lost in a crash, the result is sent once more, which does no harm.
            with suppress(OSError):
                replace_file(os.path.join(record.folder, "acknowledged"), b"")

    def forget(self, now: float) -> None:
        """Remove what is over, known to the orchestrator and too old to be replayed.

        Raises:
            StoreError: nothing was removed.
        """
        old = [record for record in list(self.operations.values()) if _may_go(record, now)][:_FORGOTTEN_AT_ONCE]
        if not old:
            return
        self._forgotten = max(self._forgotten, *(record.not_after for record in old))
        self._save()
        for record in old:
            del self.operations[record.operation]
            remove_folder(record.folder)

    # --- fences

    def lead(self, order: Order) -> None:
        """Raise the fence by an order that is not itself written down. Raises `StoreError`."""
        if self._raise_fence(order):
            self._save()
        self._newest = max(self._newest, order.not_before)

    def close(self, environment: str, deployment: str) -> None:
        """This deployment has ended. Raises `StoreError`."""
        ended = [
            key
            for key, seen in self.fences.items()
            if (key[0], seen.deployment, seen.open) == (environment, deployment, True)
        ]
        if ended:
            self.fences = self.fences | {key: msgspec.structs.replace(self.fences[key], open=False) for key in ended}
            self._save()

    def highest_fences(self) -> dict[str, FenceSeen]:
        """By environment, of whichever project."""
        fences = self.fences
        found = {environment: highest(fences, environment) for environment, _ in fences}
        return {environment: seen for environment, seen in found.items() if seen is not None}

    def project_fences(self, most: int | None = None) -> dict[str, dict[str, FenceSeen]]:
        """By environment and project. Of more than `most`, the lowest that are over are left out; they count as seen of all
        projects there, so that nobody claims a fence below them.
        """
        kept = sorted(self.fences.items(), key=lambda one: (not one[1].open, -one[1].fence))
        found: dict[str, dict[str, FenceSeen]] = {}
        for (environment, project), seen in kept[:most]:
            found.setdefault(environment, {})[project] = seen
        for (environment, _), seen in kept[len(kept) if most is None else most :]:
            of_all = found.setdefault(environment, {})
            if "" not in of_all or of_all[""].fence < seen.fence:
                of_all[""] = seen
        return found

    # --- refusals

    def refuse(self, code: Code | str, text: str, *, operation: str, digest: str, relay: str, now: float) -> bool:
        """Note an order that was not obeyed; False where the same envelope was noted before."""
        if digest in self._refused:
            return False
        refusal = Refusal(now, code, _printable(text, 500), _printable(operation, 255), digest, _printable(relay, 255))
        self._refused[digest] = refusal
        # A note that cannot be written must not keep the agent from refusing.
        with suppress(OSError):
            self._note(refusal)
        return True

    def refusals(self) -> list[Refusal]:
        """The newest, oldest first."""
        return list(self._refused.values())[-REFUSALS_MAX:]

    def _note(self, refusal: Refusal) -> None:
        path = os.path.join(self._home, "refusals.jsonl")
        if len(self._refused) > 2 * REFUSALS_MAX:
            self._refused = {each.digest: each for each in self.refusals()}
            replace_file(path, b"".join(msgspec.json.encode(each) + b"\n" for each in self._refused.values()))
            return
        with open(path, "ab") as file:
            file.write(msgspec.json.encode(refusal) + b"\n")

    # --- inside

    def _folder_of(self, operation: str) -> str:
        return os.path.join(self._folder, hashlib.sha256(operation.encode()).hexdigest()[:40])

    def _remember(self, record: OperationRecord, order: Order) -> None:
        self.operations[record.operation] = record
        self._newest = max(self._newest, record.not_before)
        # Not saved: the order itself says it, for as long as it is kept.
        self._raise_fence(order)

    def _raise_fence(self, order: Order) -> bool:
        key = (order.environment, order.project)
        seen = self.fences.get(key)
        if seen is not None and seen.fence >= order.fence:
            return False
        self.fences = self.fences | {key: FenceSeen(order.fence, order.journal, order.deployment, open=True)}
        return True

    def _save(self) -> None:
        kept = _Kept(2, self._newest, self._forgotten, self.highest_fences(), self.project_fences())
        with disk_errors(self._home):
            write_durably(os.path.join(self._home, "journal.json"), msgspec.json.encode(kept), mode=0o600)

    def _load(self) -> None:
        with suppress(FileNotFoundError):
            kept = _parse_kept(_read(os.path.join(self._home, "journal.json")), self._home)
            self._newest, self._forgotten = kept.newest, kept.forgotten
            # An older agent wrote what it knew of all projects together.
            by_environment = (
                kept.projects if kept.format > 1 else {name: {"": seen} for name, seen in kept.fences.items()}
            )
            self.fences = {
                (environment, project): seen
                for environment, projects in by_environment.items()
                for project, seen in projects.items()
            }
        for name in _names(self._folder):
            if not name.startswith("."):
                self._load_record(os.path.join(self._folder, name))
        with suppress(FileNotFoundError):
            for line in _read(os.path.join(self._home, "refusals.jsonl")).splitlines():
                with suppress(ValueError):
                    refusal = msgspec.json.decode(line, type=Refusal)
                    self._refused[refusal.digest] = refusal

    def _load_record(self, folder: str) -> None:
        try:
            envelope = _read(os.path.join(folder, "order"))
            order = unverified(envelope, Order)
        except (FileNotFoundError, NotADirectoryError, MalformedError):
            # A crash came before it was written down whole: so nothing ever acted on it.
            return
        record = _record_of(order, order_digest(envelope), folder)
        record.acknowledged = os.path.exists(os.path.join(folder, "acknowledged"))
        with suppress(FileNotFoundError, MalformedError):
            record.envelope = _read(os.path.join(folder, "report"))
            record.report = unverified(record.envelope, Report)
        self._remember(record, order)

    def sweep(self) -> None:
        """Remove what a crash left: orders that were not written down whole, and what was being removed."""
        kept = {record.folder for record in self.operations.values()}
        for name in _names(self._folder):
            path = os.path.join(self._folder, name)
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)


def _record_of(order: Order, digest: str, folder: str) -> OperationRecord:
    return OperationRecord(
        operation=order.operation,
        digest=digest,
        deployment=order.deployment,
        environment=order.environment,
        project=order.project,
        action=action_name(order.action),
        folder=folder,
        not_before=order.not_before,
        not_after=order.not_after,
    )


def _may_go(record: OperationRecord, now: float) -> bool:
    if record.report is None:
        return False
    age = now - record.not_after
    return age > 2 * SKEW_SECONDS if record.acknowledged else age > KEPT_SECONDS


def _parse_kept(data: bytes, home: str) -> _Kept:
    try:
        return msgspec.json.decode(data, type=_Kept)
    except (ValueError, RecursionError) as error:
        # To begin anew would forget who leads, and let an old orchestrator back in.
        raise StoreError(
            f"{home}/journal.json is damaged: {error}",
            hint="Restore it; or remove it, if no older orchestrator can still send orders",
        ) from error


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(max(_FILE_MAX, ENVELOPE_MAX))


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _printable(text: str, limit: int) -> str:
    return printable(text)[:limit]
