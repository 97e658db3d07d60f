"""What becomes of a letter with an order: it is judged, written down, and only then acted on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from agent.orders.acceptance import Accepted, Known, Me, Refused, judge, why_barred
from agent.orders.envelopes import order_digest
from agent.orders.journal import OperationJournal
from agent.orders.orders import Acknowledge, Order, Stop
from agent.reporter import Reporter
from agent.scheduler import Scheduler
from relay.errors import StoreError, WaystationError
from relay.protocol.followed import Current
from relay.protocol.messages import NumberedOrder
from relay.trust.keys import TrustPins

_log = logging.getLogger(__name__)


class Inbox:
    """Takes letters from any relay, one after another; an order that two relays bring is one order."""

    def __init__(
        self,
        me: Me,
        pins: Current[TrustPins],
        journal: OperationJournal,
        scheduler: Scheduler,
        reporter: Reporter,
        clock: Callable[[], float],
    ) -> None:
        """`pins` gives the keys that are believed now, `clock` seconds since 1970."""
        self._me = me
        self._pins = pins
        self._journal = journal
        self._scheduler = scheduler
        self._reporter = reporter
        self._clock = clock
        self._taking = asyncio.Lock()

    def take_up(self) -> None:
        """Go on with what was under way when the process before this one ended."""
        for record in self._journal.unacknowledged():
            self._reporter.send_final(record)
        for record in self._journal.unfinished():
            try:
                order, envelope = self._journal.order(record), self._journal.envelope(record)
            except WaystationError as error:
                _log.error("agent.operation_unreadable", extra={"operation": record.operation, "reason": str(error)})
                continue
            barred = why_barred(order, envelope, self._pins(), self._journal.memory(), self._clock())
            self._scheduler.start(record, order, barred=barred)

    async def forget(self) -> None:
        """Remove what is over and too old to be replayed. Raises `StoreError`."""
        async with self._taking:
            await asyncio.to_thread(self._journal.forget, self._clock())

    async def take(self, letter: NumberedOrder, relay: str) -> None:
        """Obey, answer or refuse what this relay brought."""
        async with self._taking:
            verdict = judge(letter.envelope, self._pins(), self._me, self._journal.memory(), self._clock())
            try:
                match verdict:
                    case Refused():
                        await self._reporter.refuse(verdict, letter.operation, relay)
                    case Known():
                        self._reporter.answer_again(self._journal.operations[verdict.operation], relay)
                    case Accepted(order=order, digest=digest):
                        await self._obey(order, digest, letter.envelope)
            except StoreError as error:
                # Not obeyed: without a note of it, it could be done twice.
                text = f"this machine cannot write it down: {error.message}"
                order_of = verdict.order if isinstance(verdict, Accepted | Refused) else None
                await self._reporter.refuse(Refused("disk", text, verdict.digest, order_of), letter.operation, relay)
            except Exception as error:
                # One letter must not end the agent, whatever is wrong with it: it would be read again at every start.
                _log.exception("agent.letter_failed", extra={"operation": letter.operation, "relay": relay})
                text = f"the agent failed over it: {type(error).__name__}"
                await self._reporter.refuse(
                    Refused("internal", text, order_digest(letter.envelope)), letter.operation, relay
                )

    async def _obey(self, order: Order, digest: str, envelope: bytes) -> None:
        match order.action:
            case Stop() as action:
                await asyncio.to_thread(self._journal.lead, order)
                self._scheduler.stop(action.operation, order.environment)
            case Acknowledge() as action:
                await asyncio.to_thread(self._journal.lead, order)
                await asyncio.to_thread(self._acknowledge, action, order)
            case _:
                record = await asyncio.to_thread(self._journal.accept, order, digest, envelope)
                self._scheduler.start(record, order)

    def _acknowledge(self, action: Acknowledge, order: Order) -> None:
        mine = [operation for operation in action.operations if self._is_of(operation, order.environment)]
        self._journal.acknowledge(mine)
        self._reporter.outbox.acknowledged(mine)
        if action.ends:
            self._journal.close(order.environment, order.deployment)
            self._scheduler.deployment_ended()

    def _is_of(self, operation: str, environment: str) -> bool:
        """Those who may order in one environment have no say about the others."""
        record = self._journal.operations.get(operation)
        return record is not None and record.environment == environment
