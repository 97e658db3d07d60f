"""Connections to where a host's name leads now, and an end of those that lead elsewhere.

A connection that is used for months would otherwise keep the first address that its name had.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import Final

from aiohttp.abc import AbstractResolver, ResolveResult

from relay.errors import UnreachableError
from relay.network.names import KeptNames, Names, ask_system

PATIENCE: Final = 1.0
"""Seconds that a request waits for a name that is looked up again, where there is a connection to use."""


class Way(AbstractResolver):
    """The way to one host, as aiohttp asks for it, and whether the connections that took it still lead there."""

    def __init__(self, host: str, names: Names | None = None) -> None:
        """`names` looks `host` up; the system's resolver does so without it, and for every other host (a proxy)."""
        self._host = host
        self._system = KeptNames(ask_system)
        self._names: Names = names or self._system
        self._taken: set[str] = set()
        self._turns = 0

    def turn(self) -> None:
        """The next connection begins with another address: what accepts connections is not yet the host that is meant."""
        self._turns += 1

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """For a new connection. Raises `OSError`, as aiohttp knows it."""
        try:
            addresses = await (self._names if host == self._host else self._system).addresses(host)
        except UnreachableError as error:
            raise OSError(None, error.message) from error
        if not addresses:
            raise OSError(None, "it has no address")
        if host == self._host:
            self._taken.update(addresses)
            first = self._turns % len(addresses)
            addresses = (*addresses[first:], *addresses[:first])
        return [_result(host, address, port) for address in addresses if _is_of(address, family)]

    async def leads_elsewhere(self) -> bool:
        """Whether connections may lead to an address that the host no longer has: then they are to be made anew. A
        look-up is awaited for a moment only, and one that fails changes nothing.
        """
        if not self._taken:
            return False
        try:
            async with asyncio.timeout(PATIENCE):
                addresses = await self._names.addresses(self._host)
        except (TimeoutError, UnreachableError):
            return False
        if not addresses or self._taken <= set(addresses):
            return False
        self._taken.clear()
        return True

    async def close(self) -> None:
        """As aiohttp wants it; there is nothing to close."""


def _result(host: str, address: str, port: int) -> ResolveResult:
    return ResolveResult(
        hostname=host,
        host=address,
        port=port,
        family=socket.AF_INET6 if ":" in address else socket.AF_INET,
        proto=socket.IPPROTO_TCP,
        flags=socket.AI_NUMERICHOST,
    )


def _is_of(address: str, family: socket.AddressFamily) -> bool:
    version = ipaddress.ip_address(address.partition("%")[0]).version
    return family in {socket.AF_UNSPEC, socket.AF_INET6 if version == 6 else socket.AF_INET}
