"""What mail needs of a relay: orders out, reports and output back, and which agents are there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import msgspec

from relay.errors import ConflictError
from relay.protocol import messages
from relay.protocol.connection import Connection, Request

T = TypeVar("T")


REMEMBERED = 4096
"""Letters of each relay."""


class Brought:
    """The letters that one relay brought of late: what it brings again is no news."""

    def __init__(self) -> None:
        self._letters: dict[bytes, None] = {}

    def is_news(self, letter: bytes) -> bool:
        """Whether it brings this for the first time; from now on it has."""
        digest = hashlib.sha256(letter).digest()
        if digest in self._letters:
            return False
        self._letters[digest] = None
        if len(self._letters) > REMEMBERED:
            del self._letters[next(iter(self._letters))]
        return True


class MailClient:
    """The mail of one relay, over a connection that others may use, too."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def post_orders(self, orders: Sequence[messages.OrderLetter]) -> messages.TakenAnswer:
        """Hand over signed orders, any number of them; they are durable there on return. Posting again is harmless.

        Raises:
            ConflictError: the relay holds another letter under one of these operations. Nothing of the request with
                that order was taken; orders before it may have been, where there were more than fit into one request.
        """
        answers = [
            await self._post(messages.ORDERS, messages.OrdersRequest(orders=part)) for part in _requests_of(orders)
        ]
        return messages.TakenAnswer(
            taken=sum(answer.taken for answer in answers), known=sum(answer.known for answer in answers)
        )

    async def poll(self, name: str, request: messages.PollRequest) -> messages.PollAnswer:
        """As the agent `name`: be there, and wait for orders. Not retried here: the next poll is the next try."""
        sent = Request("POST", messages.POLL.format(name=name), msgspec.json.encode(request))
        return await self._wait(sent, request.wait, messages.PollAnswer)

    async def agents(self) -> tuple[messages.AgentSeen, ...]:
        """The agents that poll there, or did within a day."""
        request = Request("GET", messages.AGENTS, answer_max=messages.AGENTS_BODY_MAX)
        return (await self._connection.ask(request, messages.AgentsAnswer)).agents

    async def post_reports(self, name: str, request: messages.ReportsRequest) -> messages.TakenAnswer:
        """As the agent `name`. Durable there on return; posting again is harmless.

        Raises:
            ConflictError: the relay holds another report of this agent under one of these operations and numbers;
                nothing of this request was taken.
        """
        return await self._post(messages.REPORTS_IN.format(name=name), request)

    async def post_logs(self, name: str, request: messages.LogsRequest) -> messages.TakenAnswer:
        """As `post_reports`, for output. Pieces of other lengths at the same offset do not contradict each other."""
        return await self._post(messages.LOGS_IN.format(name=name), request)

    async def reports(
        self, deployment: str, after: messages.Cursor | None = None, wait: float = messages.POLL_SECONDS
    ) -> messages.ReportsAnswer:
        """Reports of a deployment after the cursor, oldest first; none when `wait` seconds brought none. Not retried."""
        return await self._read(messages.REPORTS_OUT, messages.ReportsAnswer, deployment, after, wait)

    async def logs(
        self, deployment: str, after: messages.Cursor | None = None, wait: float = messages.POLL_SECONDS
    ) -> messages.LogsAnswer:
        """As `reports`, for output."""
        return await self._read(messages.LOGS_OUT, messages.LogsAnswer, deployment, after, wait)

    async def _post(
        self, path: str, request: messages.OrdersRequest | messages.ReportsRequest | messages.LogsRequest
    ) -> messages.TakenAnswer:
        try:
            return await self._connection.ask(Request("POST", path, msgspec.json.encode(request)), messages.TakenAnswer)
        except ConflictError:
            raise ConflictError(
                f"relay {self._connection.url} holds another letter of the same operation; nothing of this request was taken"
            ) from None

    async def _read(self, path: str, answer: type[T], deployment: str, after: messages.Cursor | None, wait: float) -> T:
        cursor = {} if after is None else {"epoch": after.epoch, "after": str(after.number)}
        params = {"deployment": deployment, "wait": str(wait), **cursor}
        return await self._wait(Request("GET", path, params=params), wait, answer)

    async def _wait(self, request: Request, seconds: float, answer: type[T]) -> T:
        """What the relay may take `seconds` to answer. Not retried."""
        patience = seconds + self._connection.limits.answer_seconds
        return await self._connection.ask(replace(request, answer_seconds=patience, attempts=1), answer)


def _requests_of(orders: Sequence[messages.OrderLetter]) -> Iterator[tuple[messages.OrderLetter, ...]]:
    """`orders` in their order, in as many requests as they need."""
    part: list[messages.OrderLetter] = []
    size = 0
    for order in orders:
        if part and (len(part) == messages.LETTERS_MAX or size + len(order.envelope) > messages.LETTERS_BYTES_MAX):
            yield tuple(part)
            part, size = [], 0
        part.append(order)
        size += len(order.envelope)
    if part:
        yield tuple(part)
