"""What an agent says: signed presences, progress, refusals and ends. The outbox brings them on their way."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import re
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from agent import platform
from agent.acts import OperationEnded, OrderRefused, ReportNotKept
from agent.operations import Ended, last_run
from agent.orders.acceptance import Refused
from agent.orders.envelopes import sign_presence, sign_report
from agent.orders.journal import OperationJournal, OperationRecord
from agent.orders.keys import AgentIdentity
from agent.orders.orders import PROJECT_FENCES, SEALED_ACTIONS, STALL_LIMITS, Presence, Report, deployment_of
from agent.orders.outbox import COPIES, Outbox
from agent.runs.runner import OUTPUT
from relay.audit.event import tell
from relay.errors import StoreError, UsageError
from relay.protocol import messages

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

RUNNING_AFTER = 0.5
"""Seconds before an operation that is not over says that it runs; a shorter one only says its end."""
PROGRESS_SECONDS = 1.0
_REASON_MAX = 4096
_REFUSED_SHOWN = 8
_FENCES_SHOWN = 100
"""A presence has its bounds."""
_REFUSAL_NUMBERS = 1 << 52


@dataclass(frozen=True, slots=True)
class Author:
    """The agent in whose name reports are signed."""

    name: str
    site: str
    identity: AgentIdentity
    signer: CryptoSigner


@dataclass(eq=False)
class Reporter:
    """Writes and signs what there is to say, and gives it to the outbox. `clock` gives seconds since 1970."""

    author: Author
    journal: OperationJournal
    outbox: Outbox
    clock: Callable[[], float]
    _version: str = field(default_factory=partial(importlib.metadata.version, "waystation"), init=False)
    _number: int = field(default=0, init=False)
    _start: str = field(default_factory=partial(secrets.token_hex, 8), init=False)
    _started: float = field(init=False)

    def __post_init__(self) -> None:
        self._started = self.clock()

    def presence(self) -> bytes:
        """An envelope that says: this agent is there now."""
        refused = [f"{each.code}: {each.operation}: {each.text}"[:200] for each in self.journal.refusals()]
        presence = Presence(
            format=1,
            name=self.author.name,
            signing=self.author.identity.signing_public,
            sealing=self.author.identity.sealing_public,
            version=self._version,
            system=platform.system_name(),
            site=self.author.site,
            time=self.clock(),
            fences=self.journal.highest_fences(),
            project_fences=self.journal.project_fences(_FENCES_SHOWN),
            refused=tuple(refused[-_REFUSED_SHOWN:]),
            understands=(SEALED_ACTIONS, PROJECT_FENCES, STALL_LIMITS),
            start=self._start,
            started=self._started,
            host=socket.gethostname()[:255],
        )
        return sign_presence(presence, self.author.signer)

    # --- of one operation

    async def follow(self, record: OperationRecord, progress: Callable[[], tuple[int, int, str]]) -> None:
        """Report that it runs, and its (bytes done, bytes of the whole, what it waits for) whenever they change, until this is
        cancelled.
        """
        await asyncio.sleep(RUNNING_AFTER)
        told: tuple[int, int, str] | None = None
        # Its first word shows that the order was heard, so it goes to more than one relay.
        kind, copies = "running", COPIES
        while True:
            now = progress()
            if now != told:
                told = now
                report = self._report(record.operation, record.digest, self._next_number(), Ended("running", now[2]))
                report = msgspec.structs.replace(report, done=now[0], whole=now[1])
                self.outbox.note(record.deployment, self._letter(report), kind, copies=copies)
                kind, copies = "progress", 1
            await asyncio.sleep(PROGRESS_SECONDS)

    async def finish(self, record: OperationRecord, ended: Ended, *, durable: bool) -> None:
        """Keep how it ended, as the journal's `finish` does, and report it until that is acknowledged."""
        tell(_ended(record, ended))
        report = self._report(record.operation, record.digest, self._next_number(), ended)
        envelope = self._letter(report).envelope
        try:
            await asyncio.to_thread(self.journal.finish, record, report, envelope, durable=durable)
        except StoreError as error:
            tell(ReportNotKept(record.operation, str(error)))
        self.send_final(record)

    def send_final(self, record: OperationRecord) -> None:
        """Report its end until that is acknowledged."""
        report, envelope = record.report, record.envelope
        if report is None or envelope is None:
            return
        letter = messages.ReportLetter(operation=record.operation, number=report.number, envelope=envelope)
        if report.log_bytes:
            path = os.path.join(last_run(record.folder), OUTPUT)
            self.outbox.log(record.deployment, record.operation, path, report.log_bytes)
        self.outbox.final(record.deployment, letter, lambda: self._renumbered(record))

    def answer_again(self, record: OperationRecord, relay: str) -> None:
        """Its order came once more, by this relay."""
        if record.report is None:
            return
        if not record.acknowledged:
            self.outbox.again(record.operation, relay)
        elif self.outbox.may_say_again(record.operation) and (envelope := self.journal.report(record)):
            letter = messages.ReportLetter(operation=record.operation, number=record.report.number, envelope=envelope)
            self.outbox.note(record.deployment, letter, "again")

    def _renumbered(self, record: OperationRecord) -> messages.ReportLetter:
        """The same end under a new number: a relay holds something else under the old one."""
        assert record.report is not None  # noqa: S101 - only a final report is ever renumbered
        report = msgspec.structs.replace(record.report, number=self._next_number(record.report.number))
        letter = self._letter(report)
        with suppress(StoreError):
            self.journal.finish(record, report, letter.envelope, durable=False)
        return letter

    # --- of orders and relays

    async def refuse(self, refused: Refused, claimed: str, relay: str) -> None:
        """Note that an order was not obeyed, and report that. `claimed` is the operation that the relay named with it."""
        operation = claimed if refused.order is None else refused.order.operation
        is_new = await asyncio.to_thread(
            self.journal.refuse,
            refused.code,
            refused.text,
            operation=operation,
            digest=refused.digest,
            relay=relay,
            now=self.clock(),
        )
        if is_new:
            tell(OrderRefused(operation, refused.code, refused.text, refused.digest, relay))
        if not self.outbox.may_say_again(refused.digest):
            return
        deployment = deployment_of(operation)
        if not (re.search(messages.OPERATION_ID, operation) and re.search(messages.DEPLOYMENT_ID, deployment)):
            return
        # No report of the operation itself ever has such a number: a forged order must not take the place of its reports.
        number = _REFUSAL_NUMBERS | int(refused.digest[:12], 16)
        report = self._report(operation, refused.digest, number, Ended("refused", f"{refused.code}: {refused.text}"))
        self.outbox.note(deployment, self._letter(report), f"refused {refused.digest}")

    # --- making reports

    def _next_number(self, above: int = 0) -> int:
        """By the clock, so that it rises across restarts without being kept anywhere."""
        self._number = max(self._number + 1, above + 1, int(self.clock() * 1000))
        return self._number

    def _report(self, operation: str, digest: str, number: int, ended: Ended) -> Report:
        return Report(
            format=1,
            operation=operation,
            deployment=deployment_of(operation),
            agent=self.author.name,
            key=self.author.identity.fingerprint,
            order=digest,
            number=number,
            state=ended.state,
            reason=ended.reason[:_REASON_MAX],
            exit_status=ended.exit_status,
            started=ended.started,
            ended=ended.ended,
            log_bytes=ended.log_bytes,
            log_sha256=ended.log_sha256,
            facts=ended.facts,
        )

    def _letter(self, report: Report) -> messages.ReportLetter:
        try:
            envelope = sign_report(report, self.author.signer)
        except UsageError:
            # The end must be reported, also where all that was found out does not fit.
            envelope = sign_report(msgspec.structs.replace(report, facts=None), self.author.signer)
        return messages.ReportLetter(operation=report.operation, number=report.number, envelope=envelope)


def _ended(record: OperationRecord, ended: Ended) -> OperationEnded:
    # What a check saw, and was told to see, may be the value of a variable.
    why = "" if record.action == "verify" else ended.reason
    seconds = max(0.0, ended.ended - ended.started)
    return OperationEnded(record.operation, record.action, ended.state, ended.exit_status, seconds, why)
