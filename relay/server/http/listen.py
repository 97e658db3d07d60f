"""A relay that listens: every connection, request and answer goes through the limits of `connection.py`, the rules of
`access.py` and the problem documents of `problems.py`; in the end running requests are let through.

aiohttp (3.14) by itself drops the rest of an upload when it is told to shut down, and falls back to a parser that most
request-smuggling advisories are about.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from aiohttp import HttpVersion11, http_parser, web
from aiohttp.http_parser import RawRequestMessage
from aiohttp.typedefs import Handler

from relay.audit.acts import RelayDraining
from relay.audit.event import tell
from relay.errors import UnreachableError, UsageError, WaystationError
from relay.protocol.credentials import is_loopback
from relay.protocol.followed import Current
from relay.server.http.access import ACCESS, DRAINING, SPOKEN, VERSION, HostRule, check_request, check_routes
from relay.server.http.connection import CountedTls, GuardedHandler, Ledger, Limits, Plain
from relay.server.http.problems import problem_middleware

_NEVER: Final = frozenset({errno.EACCES, errno.EPERM, errno.EAFNOSUPPORT, errno.EINVAL})
"""No right to the port, no such family of addresses. A missing address (EADDRNOTAVAIL) may come with its interface."""


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

    async def stop(self) -> int:
        """Take no new connection, let running requests end for `drain_seconds`, then cut what is left: how many that was.

        Twice is once.
        """
        if not self._draining.is_set():
            tell(RelayDraining(len(self._handlers()), self.ledger.limits.drain_seconds))
        self._listener.close()
        self._draining.set()
        waiting, self.ledger.handshakes = self.ledger.handshakes, set()
        for handler in waiting:
            handler.abort()
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.ledger.limits.drain_seconds
        while (handlers := self._handlers()) and clock() < deadline:
            for handler in handlers:
                handler.drain()
            await asyncio.sleep(0.05)
        handlers = self._handlers()
        for handler in handlers:
            handler.abort()
        await self._runner.cleanup()
        return len(handlers)

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
            this user or system can never listen on.
        UnreachableError: the address cannot be listened on now: it is in use, or its interface or name is not there yet.
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
        server.request_factory = partial(_make_request, make=server.request_factory)
        ledger = Ledger(limits)
        factory = _connection_factory(server, ledger, ssl_context)
        listener = await asyncio.get_running_loop().create_server(factory, host, port, backlog=1024)
    except BaseException as error:
        await runner.cleanup()
        if isinstance(error, OSError):
            raise _cannot_listen(host, port, error) from error
        raise
    return Running(runner, listener, ledger, app[DRAINING], "https" if ssl_context else "http")


def _cannot_listen(host: str, port: int, error: OSError) -> WaystationError:
    """What trying again may mend is no mistake of usage: an init system starts a relay again for it."""
    kind = UsageError if error.errno in _NEVER and not isinstance(error, socket.gaierror) else UnreachableError
    return kind(f"cannot listen on {host}:{port}: {error.strerror or error}")


def _make_request(
    message: RawRequestMessage,
    *rest: Any,  # noqa: ANN401 - handed on as it is
    make: Callable[..., web.BaseRequest],
) -> web.BaseRequest:
    """Aiohttp begins its answer with the request's own version, whatever that is; ours begins with one that is spoken."""
    request = make(message if message.version in SPOKEN else message._replace(version=HttpVersion11), *rest)
    request[VERSION] = message.version
    return request


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
            read_bufsize=ledger.share() // 4,
            auto_decompress=False,
            access_log=None,
        )

    return (lambda: Plain(handler())) if context is None else (lambda: CountedTls(handler(), context()))
