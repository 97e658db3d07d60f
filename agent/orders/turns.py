"""Whose turn it is to change this machine: one operation at a time, and one orchestrator's deployment at a time.

Deployments of one journal lease the machine there, so that here only their operations must not overlap. Those of two
journals meet nowhere but here: while one turns this machine, what another one orders to be changed waits. A turn is over
when its tree is settled, when its deployment ends, or when it was silent for so long that nobody is at it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

from agent.orders.orders import Order, Settle, action_name

SILENT_SECONDS: Final = 60.0
"""Between two operations of one turn the server does something; after more than this the machine is free for others."""


@dataclass(eq=False, slots=True)
class _Waiter:
    order: Order


@dataclass(eq=False)
class Turns:
    """In the order in which they asked, but for those that have to wait for another deployment."""

    silent_seconds: float = SILENT_SECONDS
    _queue: list[_Waiter] = field(default_factory=list, init=False)
    _runs: Order | None = field(default=None, init=False)
    _held: Order | None = field(default=None, init=False)
    """The last order of the deployment that turns this machine."""
    _beside: Counter[str] = field(default_factory=Counter, init=False)
    """Operations that change nothing and keep the turn of their deployment, by that."""
    _until: float = field(default=0.0, init=False)
    _news: asyncio.Condition = field(default_factory=asyncio.Condition, init=False)

    @asynccontextmanager
    async def one(self, order: Order, waits: Callable[[str], None]) -> AsyncIterator[None]:
        """The block changes the machine, and nothing else does meanwhile. `waits` hears for what it waits, and when no more."""
        waiter = _Waiter(order)
        self._queue.append(waiter)
        try:
            while words := self._why_not(waiter):
                waits(words)
                await self._changed(order)
            self._runs = self._held = order
        finally:
            self._queue.remove(waiter)
            waits("")
            await self._tell()
        try:
            yield
        finally:
            self._runs = None
            self._keep(order)
            if isinstance(order.action, Settle):
                self._held = None
            await self._tell()

    @asynccontextmanager
    async def beside(self, order: Order) -> AsyncIterator[None]:
        """The block changes nothing. Where it belongs to the turn, that goes on."""
        if self._held is None or self._held.deployment != order.deployment:
            yield
            return
        self._beside[order.deployment] += 1
        try:
            yield
        finally:
            self._beside[order.deployment] -= 1
            self._keep(order)

    async def end(self, deployment: str) -> None:
        """This deployment has ended."""
        if self._held is not None and self._held.deployment == deployment:
            self._held = None
            await self._tell()

    # --- inside

    def _why_not(self, waiter: _Waiter) -> str:
        """Why it must wait; empty where it may begin."""
        if self._runs is not None:
            return f"it waits: {_words(self._runs)} runs on this machine"
        if self._is_held_off(waiter.order):
            assert self._held is not None  # noqa: S101 - by whom it is held off
            return f"it waits: this machine is turned by {_deployment(self._held)}, of another orchestrator"
        before = self._queue[: self._queue.index(waiter)]
        first = next((other.order for other in before if not self._is_held_off(other.order)), None)
        return "" if first is None else f"it waits: {_words(first)} comes first"

    def _is_held_off(self, order: Order) -> bool:
        held = self._held
        if held is None or held.journal == order.journal:
            return False
        return self._beside[held.deployment] > 0 or asyncio.get_running_loop().time() < self._until

    def _keep(self, order: Order) -> None:
        if self._held is not None and self._held.deployment == order.deployment:
            self._until = asyncio.get_running_loop().time() + self.silent_seconds

    async def _changed(self, order: Order) -> None:
        """Wait for news; who is held off, for the end of the silence, too."""
        silence = max(0.01, self._until - asyncio.get_running_loop().time()) if self._is_held_off(order) else None
        with suppress(TimeoutError):
            async with asyncio.timeout(silence), self._news:
                await self._news.wait()

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()


def _words(order: Order) -> str:
    return f"{action_name(order.action)} of {_deployment(order)}"


def _deployment(order: Order) -> str:
    return f"deployment {order.deployment}" + (f" ({order.project} in {order.environment})" if order.project else "")
