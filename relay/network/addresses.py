"""How a host is connected to: all of its addresses, one soon after the other, until one takes the connection (RFC 8305).

The race is aiohttp's (aiohappyeyeballs); here stands how every client of ours asks for it.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence
from typing import Final

import aiohappyeyeballs
import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

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


class KnownAddresses(AbstractResolver):
    """Answers with what another resolver found for one host; for every other, a proxy's say, the system is asked."""

    def __init__(self, host: str, addresses: Sequence[str]) -> None:
        self._host = host
        self._addresses = tuple(addresses)
        self._system: AbstractResolver = aiohttp.ThreadedResolver()

    def turn(self) -> None:
        """Begin with another address from now on: what the first connected to gave no answer."""
        self._addresses = (*self._addresses[1:], *self._addresses[:1])

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        if host != self._host:
            return await self._system.resolve(host, port, family)
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self._addresses
        ]

    async def close(self) -> None:
        await self._system.close()
