"""The handlers of mail and presence over one `Mail`: who waits, for how long, and with how many bytes in hand."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

import msgspec
from aiohttp import web

from relay.audit.acts import OrderPosted, OrderTaken, ReportPosted
from relay.audit.event import Caller, tell
from relay.errors import SignatureError
from relay.mail.letters import Box, Kind, Letter, MailLimits, Numbered
from relay.mail.mailbox import Mail
from relay.mail.presences import Identified, Presences, check_signature, claimed
from relay.protocol import messages
from relay.server import metrics
from relay.server.http.access import DRAINING, Routes, long_poll
from relay.server.http.bodies import body_pieces, budget_of, check_media_type, json_answer, parse_json_aside
from relay.server.http.callers import IDENTITY, caller_of
from relay.server.http.connection import Limits
from relay.server.http.misuse import Misuse
from relay.server.http.problems import HttpRefusal
from relay.support.byte_budget import ByteBudget
from relay.support.together import News, any_of

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
        self._misuse = Misuse()
        self._starts: News[tuple[str, str]] = News()
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

    # --- who calls

    def _agent(self, request: web.Request) -> str:
        """The agent in the path, lower-cased. Nothing is read of a request that comes with another one's token."""
        name = request.match_info["name"]
        if not _AGENT_NAME.fullmatch(name):
            raise HttpRefusal(404, "not_found")
        agent = name.lower()
        identity = request.get(IDENTITY)
        if identity is not None and identity.agent.lower() not in {"", agent}:
            self._misuse.count(identity.id, "other_agent")
            raise HttpRefusal(403, "other_agent")
        return agent

    async def _identified(self, request: web.Request, agent: str, presence: bytes) -> Identified:
        """Whose presence it is, by the signature of the key that it names."""
        token = _token_id(request)
        try:
            who = claimed(presence)
            if who.name != agent:
                raise SignatureError(f"a presence of {who.name} as {agent}")
            if who not in self._presences:
                self._misuse.check(token, "forged")
            # Aside: beside others who wait, a moment of a processor for each poll would add up.
            await asyncio.to_thread(check_signature, presence, who)
        except SignatureError as error:
            self._misuse.count(token, "forged")
            raise HttpRefusal(403, "forged") from error
        return who

    # --- posting

    async def post_orders(self, request: web.Request) -> web.StreamResponse:
        async with self._body(request, self._order_budget, messages.OrdersRequest) as body:
            return await self._post(
                request,
                [
                    Letter("order", order.agent.lower(), order.agent.lower(), order.operation, 0, order.envelope)
                    for order in body.orders
                ],
            )

    async def post_reports(self, request: web.Request) -> web.StreamResponse:
        agent = self._agent(request)
        async with self._body(request, self._agent_budget, messages.ReportsRequest) as body:
            _check_operations(body.deployment, body.reports)
            return await self._post(
                request,
                [
                    Letter("report", body.deployment, agent, report.operation, report.number, report.envelope)
                    for report in body.reports
                ],
            )

    async def post_logs(self, request: web.Request) -> web.StreamResponse:
        agent = self._agent(request)
        async with self._body(request, budget_of(request, self._limits), messages.LogsRequest) as body:
            _check_operations(body.deployment, body.pieces)
            return await self._post(
                request,
                [
                    Letter("log", body.deployment, agent, piece.operation, piece.offset, piece.data)
                    for piece in body.pieces
                ],
            )

    async def _post(self, request: web.Request, letters: Sequence[Letter]) -> web.Response:
        taken = await self._mail.post(letters)
        _tell_posted(caller_of(request), letters, are_known=not taken.taken)
        metrics.LETTERS.labels(letters[0].kind, "taken").inc(taken.taken)
        metrics.LETTERS.labels(letters[0].kind, "known").inc(taken.known)
        metrics.MAIL_BYTES.set(self._mail.kept_bytes)
        return json_answer(taken)

    # --- reading

    async def poll(self, request: web.Request) -> web.StreamResponse:
        agent = self._agent(request)
        async with self._body(request, self._agent_budget, messages.PollRequest, messages.POLL_BODY_MAX) as body:
            pass
        who = await self._identified(request, agent, body.presence)
        is_new = who not in self._presences
        with self._presences.polling(who, body.presence, _token_id(request)):
            metrics.AGENTS.set(len(self._presences))
            if is_new:
                # An earlier start of it that still waits, and lives, shows itself anew: then they are two.
                self._starts.tell([(agent, who.signing)])
            other_start = self._starts.of((agent, who.signing))
            found = await self._wait(request, ("order", agent), body.after, body.wait, other_start)
        for numbered in found:
            tell(OrderTaken(caller_of(request), agent, numbered.letter.operation))
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
        self,
        request: web.Request,
        box: Box,
        after: messages.Cursor | None,
        seconds: float,
        enough: asyncio.Event | None = None,
    ) -> list[Numbered]:
        """What is in `box` after the cursor, as soon as there is something; nothing when the time is over, the relay
        is about to stop, or it is `enough`.
        """
        enough = enough or asyncio.Event()
        draining = request.app[DRAINING]
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            news = self._mail.news.of(box)
            found = await self._mail.read(box, after)
            patience = deadline - asyncio.get_running_loop().time()
            if found or patience <= 0 or draining.is_set() or enough.is_set():
                return found
            with long_poll(request):
                await any_of(patience, news.wait(), draining.wait(), enough.wait())

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


def _token_id(request: web.Request) -> str:
    identity = request.get(IDENTITY)
    return "" if identity is None else identity.id


def _tell_posted(by: Caller, letters: Sequence[Letter], *, are_known: bool) -> None:
    """Each order, and of reports the first of each operation. Output says nothing that its report does not."""
    for letter in letters:
        if letter.kind == "order":
            tell(OrderPosted(by, letter.agent, letter.operation, are_known))
        elif letter.kind == "report":
            tell(ReportPosted(by, letter.agent, letter.operation))


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
