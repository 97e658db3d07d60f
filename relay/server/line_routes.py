"""The handlers that measure the line: they take bytes and forget them, and send bytes that mean nothing."""

from __future__ import annotations

import re
import time

from aiohttp import web

from relay.protocol import messages
from relay.server.http.access import Routes
from relay.server.http.bodies import body_pieces, json_answer, stream
from relay.server.http.connection import Limits
from relay.server.http.problems import HttpRefusal
from relay.support.incompressible import noise_pieces

_BYTES = re.compile(r"[0-9]{1,9}", re.ASCII)


class LineRoutes:
    """They hold one piece at a time and store nothing; the minimum rates of other bodies and answers hold here, too."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def routes(self) -> Routes:
        """As `Routed`."""
        return (("PUT", messages.LINE, self.take, "write"), ("GET", messages.LINE, self.give, "read"))

    async def take(self, request: web.Request) -> web.StreamResponse:
        """Count a body of any media type. Raises as `body_pieces`."""
        began, received = time.perf_counter(), 0
        async for piece in body_pieces(request, self._limits, messages.LINE_BYTES_MAX):
            received += len(piece)
        return json_answer(messages.LineAnswer(bytes=received, seconds=time.perf_counter() - began))

    async def give(self, request: web.Request) -> web.StreamResponse:
        """Send as many bytes as were asked for."""
        size = _size(request)
        headers = {"Content-Type": "application/octet-stream", "Cache-Control": "no-store, no-transform"}
        return await stream(request, noise_pieces(size), self._limits, headers, size)


def _size(request: web.Request) -> int:
    """Raises `HttpRefusal`: 400, no number from 1 to the limit."""
    text = request.query.get("bytes", "")
    if not _BYTES.fullmatch(text) or not 1 <= int(text) <= messages.LINE_BYTES_MAX:
        raise HttpRefusal(400, "bad_request")
    return int(text)
