"""A relay that listens: every connection, request and answer goes through the limits of `connection.py`, the rules of
`access.py` and the problem documents of `problems.py`; in the end running requests are let through.

aiohttp (3.14) by itself drops the rest of an upload when it is told to shut down, and falls back to a parser that most
request-smuggling advisories are about.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import sys
from collections.abc import Callable
from functools import partial

from aiohttp import http_parser, web
from aiohttp.typedefs import Handler

from relay.errors import UsageError
from relay.protocol.credentials import is_loopback
from relay.protocol.followed import Current
from relay.server.http.access import ACCESS, DRAINING, HostRule, check_request, check_routes
from relay.server.http.connection import CountedTls, GuardedHandler, Ledger, Limits
from relay.server.http.problems import problem_middleware


def check_c_parser() -> None:
    """The parser in Python that aiohttp falls back to is the one that most request-smuggling advisories are about.

    Raises:
        UsageError: the C parser is not in use.
    """
    if os.environ.get("AIOHTTP_NO_EXTENSIONS") or http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise UsageError(
            "aiohttp's C parser is not in use; the relay does not serve without it",
            hint="Install aiohttp with its extensions, and unset AIOHTTP_NO_EXTENSIONS",
        )


def raise_open_files(limits: Limits) -> int:
    """Lift this process's soft limit of open files towards what `limits` needs; the limit that holds now, or 0 where
    the system has none.
    """
    if sys.platform == "win32":
        return 0
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.connections + limits.long_polls + 1024
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft


class Running:
    """A relay that listens."""

    def __init__(
        self, runner: web.AppRunner, listener: asyncio.Server, ledger: Ledger, draining: asyncio.Event, scheme: str
    ) -> None:
        self._runner = runner
        self._listener = listener
        self._draining = draining
        self.ledger = ledger
        host, self.port = listener.sockets[0].getsockname()[:2]
        self.url = f"{scheme}://[{host}]:{self.port}" if ":" in host else f"{scheme}://{host}:{self.port}"

    async def stop(self) -> None:
        """Take no new connection, let running requests end for `drain_seconds`, then cut what is left. Twice is once."""
        self._listener.close()
        self._draining.set()
        for handler in list(self.ledger.handshakes):
            handler.abort()
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.ledger.limits.drain_seconds
        while (handlers := self._handlers()) and clock() < deadline:
            for handler in handlers:
                handler.drain()
            await asyncio.sleep(0.05)
        for handler in self._handlers():
            handler.abort()
        await self._runner.cleanup()

    def _handlers(self) -> list[GuardedHandler]:
        server = self._runner.server
        return [c for c in server.connections if isinstance(c, GuardedHandler)] if server else []


async def start_guarded(
    app: web.Application,
    host: str,
    port: int,
    limits: Limits,
    *,
    ssl_context: Current[ssl.SSLContext] | None = None,
    allowed_hosts: HostRule | None = None,
) -> Running:
    """Serve `app` (of `guarded_app`) on `host`:`port` (0: any free one).

    `ssl_context` is asked for each new connection. Without access control it listens on loopback only, and answers for
    loopback names only. A handler is cancelled when its peer goes away: work that others wait for, too, must be shielded.

    Raises:
        UsageError: no C parser, a route without a scope, a listener beyond loopback without tokens, or an address that
            cannot be listened on.
    """
    check_c_parser()
    check_routes(app)
    if not app[ACCESS].required:
        if not is_loopback(host):
            raise UsageError(
                "beyond loopback a relay does not listen without access control",
                hint="Make a token with: waystation relay token SCOPE",
            )
        allowed_hosts = allowed_hosts or is_loopback
    # Nothing runs any more when this timeout begins: `Running.stop` has drained before.
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        server = runner.server
        assert server is not None  # noqa: S101 - set up one line above
        inner = partial(check_request, handler=server.request_handler, allowed_hosts=allowed_hosts)
        server.request_handler = partial(_answer, handler=inner)
        ledger = Ledger(limits)
        factory = _connection_factory(server, ledger, ssl_context)
        listener = await asyncio.get_running_loop().create_server(factory, host, port, backlog=1024)
    except BaseException as error:
        await runner.cleanup()
        if isinstance(error, OSError):
            raise UsageError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
        raise
    return Running(runner, listener, ledger, app[DRAINING], "https" if ssl_context else "http")


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    response = await problem_middleware(request, handler)
    if isinstance(request.protocol, GuardedHandler) and request.protocol.draining:
        response.force_close()
    return response


def _connection_factory(
    server: web.Server, ledger: Ledger, context: Current[ssl.SSLContext] | None
) -> Callable[[], asyncio.BaseProtocol]:
    limits = ledger.limits

    def handler() -> GuardedHandler:
        return GuardedHandler(
            server,
            ledger,
            keepalive_timeout=limits.keepalive_seconds,
            lingering_time=limits.linger_seconds,
            max_line_size=limits.line_bytes,
            max_field_size=limits.line_bytes,
            max_headers=limits.headers,
            auto_decompress=False,
            access_log=None,
        )

    return handler if context is None else lambda: CountedTls(handler(), context())
