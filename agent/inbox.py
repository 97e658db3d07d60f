"""What becomes of a letter with an order: it is judged, written down, and only then obeyed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from agent.acts import OperationBroke, OperationUnreadable, OrderAccepted
from agent.orders.acceptance import Accepted, Known, Me, Refused, judge, why_barred
from agent.orders.envelopes import open_order, signer_of
from agent.orders.journal import OperationJournal
from agent.orders.orders import Acknowledge, Order, Stop, action_name
from agent.reporter import Reporter
from agent.scheduler import Scheduler
from relay.audit.event import tell
from relay.errors import StoreError, WaystationError
from relay.protocol.followed import Current
from relay.protocol.messages import NumberedOrder
from relay.trust.envelopes import unverified
from relay.trust.keys import TrustPins


@dataclass(eq=False)
class Inbox:
    """Takes letters from any relay, one after another; an order that two relays bring is one order.

    `pins` gives the keys that are believed now, `clock` seconds since 1970.
    """

    me: Me
    pins: Current[TrustPins]
    journal: OperationJournal
    scheduler: Scheduler
    reporter: Reporter
    clock: Callable[[], float]
    _taking: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    def take_up(self) -> None:
        """Go on with what was under way when the process before this one ended."""
        for record in self.journal.unacknowledged():
            self.reporter.send_final(record)
        for record in self.journal.unfinished():
            try:
                envelope = self.journal.envelope(record)
                order = open_order(unverified(envelope, Order), self.me.sealing)
            except WaystationError as error:
                tell(OperationUnreadable(record.operation, str(error)))
                continue
            barred = why_barred(order, envelope, self.pins(), self.journal.memory(), self.clock())
            self.scheduler.start(record, order, barred=barred)

    async def forget(self) -> None:
        """Remove what is over and too old to be replayed. Raises `StoreError`."""
        async with self._taking:
            await asyncio.to_thread(self.journal.forget, self.clock())

    async def take(self, letter: NumberedOrder, relay: str) -> bool:
        """Obey, answer or refuse what this relay brought. Whether it is an order to this agent, obeyed now or before."""
        async with self._taking:
            verdict = judge(letter.envelope, self.pins(), self.me, self.journal.memory(), self.clock())
            try:
                match verdict:
                    case Refused():
                        await self.reporter.refuse(verdict, letter.operation, relay)
                    case Known():
                        self.reporter.answer_again(self.journal.operations[verdict.operation], relay)
                    case Accepted(order=order, digest=digest):
                        await self._obey(order, digest, letter.envelope)
                        tell(_accepted(order, digest, letter.envelope, relay))
            except StoreError as error:
                # Not obeyed: without a note of it, it could be done twice.
                text = f"this machine cannot write it down: {error.message}"
                order_of = verdict.order if isinstance(verdict, Accepted) else None
                await self.reporter.refuse(Refused("disk", text, verdict.digest, order_of), letter.operation, relay)
            except Exception as error:
                # No letter may end the agent: it would be read again at every start.
                tell(OperationBroke(letter.operation, type(error).__name__), error)
                text = f"the agent failed over it: {type(error).__name__}"
                await self.reporter.refuse(Refused("internal", text, verdict.digest), letter.operation, relay)
            return not isinstance(verdict, Refused)

    async def _obey(self, order: Order, digest: str, envelope: bytes) -> None:
        match order.action:
            case Stop() as action:
                await asyncio.to_thread(self.journal.lead, order)
                self.scheduler.stop(action.operation, order.environment)
            case Acknowledge() as action:
                await asyncio.to_thread(self.journal.lead, order)
                await asyncio.to_thread(self._acknowledge, action, order)
                if action.ends:
                    await self.scheduler.end(order.deployment)
            case _:
                record = await asyncio.to_thread(self.journal.accept, order, digest, envelope)
                self.scheduler.start(record, order)

    def _acknowledge(self, action: Acknowledge, order: Order) -> None:
        mine = [operation for operation in action.operations if self._is_of(operation, order.environment)]
        self.journal.acknowledge(mine)
        self.reporter.outbox.acknowledged(mine)
        if action.ends:
            self.journal.close(order.environment, order.deployment)
            self.scheduler.operations.prune_scripts()

    def _is_of(self, operation: str, environment: str) -> bool:
        """A key that may order in one environment has no say about the others."""
        record = self.journal.operations.get(operation)
        return record is not None and record.environment == environment


def _accepted(order: Order, digest: str, envelope: bytes, relay: str) -> OrderAccepted:
    key, action = signer_of(envelope), action_name(order.action)
    return OrderAccepted(order.operation, action, order.environment, order.fence, key, digest, relay)
