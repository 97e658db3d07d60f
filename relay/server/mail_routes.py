"""The handlers of mail and presence over one `Mail`: who waits, for how long, and with how many bytes in hand."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

import msgspec
from aiohttp import web

from relay.mail.letters import Box, Kind, Letter, MailLimits, Numbered
from relay.mail.mailbox import Mail
from relay.mail.presences import Presences
from relay.protocol import messages
from relay.server import metrics
from relay.server.http.access import DRAINING, Routes, long_poll
from relay.server.http.bodies import body_pieces, budget_of, check_media_type, json_answer, parse_json_aside
from relay.server.http.connection import Limits
from relay.server.http.problems import HttpRefusal
from relay.support.byte_budget import ByteBudget
from relay.support.together import any_of

T = TypeVar("T")

_AGENT_NAME = re.compile(messages.AGENT_NAME, re.ASCII)


def mail_limits_of(limits: Limits) -> MailLimits:
    """The limits that concern what is kept."""
    return MailLimits(
        bytes=limits.mail_bytes,
        letters=limits.mail_letters,
        bytes_per_agent=limits.mail_bytes_per_agent,
        bytes_per_deployment=limits.mail_bytes_per_deployment,
    )


class MailRoutes:
    """The handlers of mail.

    Orders have bytes in flight of their own, and so have polls and reports: neither bundles nor agents that send much
    keep an order from its way. Output counts with the bundles.
    """

    def __init__(self, mail: Mail, limits: Limits) -> None:
        self._mail = mail
        self._limits = limits
        self._presences = Presences(limits.agents)
        self._order_budget = ByteBudget(limits.mail_bytes_in_flight)
        self._agent_budget = ByteBudget(limits.mail_bytes_in_flight)
        metrics.MAIL_BYTES.set(mail.kept_bytes)

    def routes(self) -> Routes:
        """As `Routed`."""
        return (
            ("POST", messages.ORDERS, self.post_orders, "order"),
            ("POST", messages.POLL, self.poll, "agent"),
            ("GET", messages.AGENTS, self.agents, "order"),
            ("POST", messages.REPORTS_IN, self.post_reports, "agent"),
            ("GET", messages.REPORTS_OUT, self.reports, "order"),
            ("POST", messages.LOGS_IN, self.post_logs, "agent"),
            ("GET", messages.LOGS_OUT, self.logs, "order"),
        )

    # --- posting

    async def post_orders(self, request: web.Request) -> web.StreamResponse:
        async with self._body(request, self._order_budget, messages.OrdersRequest) as body:
            return await self._post(
                [
                    Letter("order", order.agent.lower(), order.agent.lower(), order.operation, 0, order.envelope)
                    for order in body.orders
                ]
            )

    async def post_reports(self, request: web.Request) -> web.StreamResponse:
        agent = _agent(request)
        async with self._body(request, self._agent_budget, messages.ReportsRequest) as body:
            _check_operations(body.deployment, body.reports)
            return await self._post(
                [
                    Letter("report", body.deployment, agent, report.operation, report.number, report.envelope)
                    for report in body.reports
                ]
            )

    async def post_logs(self, request: web.Request) -> web.StreamResponse:
        agent = _agent(request)
        async with self._body(request, budget_of(request, self._limits), messages.LogsRequest) as body:
            _check_operations(body.deployment, body.pieces)
            return await self._post(
                [
                    Letter("log", body.deployment, agent, piece.operation, piece.offset, piece.data)
                    for piece in body.pieces
                ]
            )

    async def _post(self, letters: Sequence[Letter]) -> web.Response:
        taken = await self._mail.post(letters)
        metrics.LETTERS.labels(letters[0].kind, "taken").inc(taken.taken)
        metrics.LETTERS.labels(letters[0].kind, "known").inc(taken.known)
        metrics.MAIL_BYTES.set(self._mail.kept_bytes)
        return json_answer(taken)

    # --- reading

    async def poll(self, request: web.Request) -> web.StreamResponse:
        agent = _agent(request)
        async with self._body(request, self._agent_budget, messages.PollRequest, messages.POLL_BODY_MAX) as body:
            pass
        with self._presences.polling(agent, body.presence):
            metrics.AGENTS.set(len(self._presences))
            found = await self._wait(request, ("order", agent), body.after, body.wait)
        orders = tuple(messages.NumberedOrder(n.number, n.letter.operation, n.letter.data) for n in found)
        return json_answer(messages.PollAnswer(self._mail.epoch, orders))

    async def agents(self, request: web.Request) -> web.StreamResponse:  # noqa: ARG002 - the signature of a handler
        return json_answer(messages.AgentsAnswer(self._presences.all()))

    async def reports(self, request: web.Request) -> web.StreamResponse:
        reports = tuple([messages.NumberedReport(*found) for found in await self._read(request, "report")])
        return json_answer(messages.ReportsAnswer(self._mail.epoch, reports))

    async def logs(self, request: web.Request) -> web.StreamResponse:
        pieces = tuple([messages.NumberedPiece(*found) for found in await self._read(request, "log")])
        return json_answer(messages.LogsAnswer(self._mail.epoch, pieces))

    async def _read(self, request: web.Request, kind: Kind) -> list[tuple[int, str, str, int, bytes]]:
        """Number, agent, operation, part and data of what was asked for."""
        query = _query(request)
        after = messages.Cursor(query.epoch, query.after)
        found = await self._wait(request, (kind, query.deployment), after, query.wait)
        return [(n.number, n.letter.agent, n.letter.operation, n.letter.part, n.letter.data) for n in found]

    async def _wait(
        self, request: web.Request, box: Box, after: messages.Cursor | None, seconds: float
    ) -> list[Numbered]:
        """What is in `box` after the cursor, as soon as there is something; nothing when the time is over or the relay
        is about to stop.
        """
        draining = request.app[DRAINING]
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            news = self._mail.news.of(box)
            found = await self._mail.read(box, after)
            patience = deadline - asyncio.get_running_loop().time()
            if found or patience <= 0 or draining.is_set():
                return found
            with long_poll(request):
                await any_of(patience, news.wait(), draining.wait())

    @contextlib.asynccontextmanager
    async def _body(
        self, request: web.Request, budget: ByteBudget, type: type[T], cap: int | None = None
    ) -> AsyncIterator[T]:
        """The JSON body as a `type`, its bytes counted in `budget` until the context ends.

        Raises:
            HttpRefusal: as `read_json`.
            UnreachableError: too much is in flight (503).
        """
        check_media_type(request, messages.JSON)
        most = min(self._limits.json_bytes, cap or self._limits.json_bytes)
        raw = bytearray()
        with budget.place() as place:
            async for piece in body_pieces(request, self._limits, most):
                place.take(len(piece))
                raw += piece
            yield await parse_json_aside(bytes(raw), type, self._limits.json_depth)


def _agent(request: web.Request) -> str:
    name = request.match_info["name"]
    if not _AGENT_NAME.fullmatch(name):
        raise HttpRefusal(404, "not_found")
    return name.lower()


def _query(request: web.Request) -> messages.ReadQuery:
    words = dict(request.query)
    if len(words) != len(request.query):
        raise HttpRefusal(400, "bad_request")
    try:
        return msgspec.convert(words, messages.ReadQuery, strict=False)
    except msgspec.ValidationError as error:
        raise HttpRefusal(400, "bad_request") from error


def _check_operations(deployment: str, letters: Sequence[messages.ReportLetter | messages.LogPiece]) -> None:
    if not all(letter.operation.startswith(f"{deployment}/") for letter in letters):
        raise HttpRefusal(400, "bad_fields")
