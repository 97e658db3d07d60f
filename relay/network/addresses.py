"""How a host is connected to: all of its addresses, one soon after the other, until one takes the connection (RFC 8305).

The race is aiohttp's (aiohappyeyeballs); here stands how every client of ours asks for it.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Final

import aiohappyeyeballs
import aiohttp
from aiohttp.abc import AbstractResolver

STAGGER: Final = 0.25
"""Seconds after which the next address is tried beside those that are silent. One that refuses is left at once."""
KEEP_SECONDS: Final = 10.0
"""An idle connection is kept for so long: less than servers keep it."""


def connector(
    resolver: AbstractResolver | None = None,
    *,
    tls: ssl.SSLContext | None = None,
    limit: int = 100,
    fresh: bool = False,
) -> aiohttp.TCPConnector:
    """What connects for a session: it tries every address of a host.

    The families take turns; the one whose address stands first begins.

    Args:
        resolver: looks names up; by default the system's.
        tls: whom to trust; by default the system's authorities.
        limit: connections at once.
        fresh: every request looks the name up anew, and has a connection of its own.
    """
    return aiohttp.TCPConnector(
        resolver=resolver,
        ssl=tls or True,
        limit=limit,
        force_close=fresh,
        keepalive_timeout=None if fresh else KEEP_SECONDS,
        # The cache turns the order of the addresses round with each connection: only the system's look-ups are worth that.
        use_dns_cache=resolver is None and not fresh,
        happy_eyeballs_delay=STAGGER,
        interleave=1,
    )


async def open_connection(host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A plain connection. Raises `OSError`: of the look-up, or of all addresses together."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    connected = await aiohappyeyeballs.start_connection(found, happy_eyeballs_delay=STAGGER, interleave=1)
    return await asyncio.open_connection(sock=connected)
