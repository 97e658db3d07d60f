"""Every address of a host is tried, whichever is dead: by sessions, by plain connections, and from outside by an agent."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import aiohttp
import pytest
from aiohttp import web
from harness.dns import FixedNames
from harness.relays import small_server

from relay.network.addresses import connector, open_connection
from relay.network.way import Way

DEAD = "127.0.0.9"


@contextlib.asynccontextmanager
async def listening(address):
    """A web server at this one address; its port."""

    async def where(request):
        return web.Response(text=request.transport.get_extra_info("sockname")[0])

    async with small_server([web.get("/", where)], address) as url:
        yield int(url.rpartition(":")[2])


async def text_of(url, resolver):
    async with aiohttp.ClientSession(connector=connector(resolver)) as session, session.get(url) as response:
        return await response.text()


@pytest.mark.parametrize(
    ("known", "living"),
    [
        ((DEAD, "127.0.0.1"), "127.0.0.1"),
        (("127.0.0.1", DEAD), "127.0.0.1"),
        (("::1", "127.0.0.1"), "127.0.0.1"),
        ((DEAD, "::1"), "::1"),
        (("::1", DEAD, "127.0.0.8", "127.0.0.7", "127.0.0.1"), "127.0.0.1"),
    ],
)
async def test_the_address_that_lives_is_found_among_the_dead(known, living):
    async with listening(living) as port:
        assert await text_of(f"http://relay.test:{port}/", Way("relay.test", FixedNames(*known))) == living


async def test_an_address_that_is_silent_does_not_hold_the_others_up(monkeypatch):
    """As a host does that is gone, behind a router that says nothing."""
    loop, asked = asyncio.get_running_loop(), []
    connect = loop.sock_connect

    async def sock_connect(sock, address):
        asked.append(address[0])
        await (asyncio.sleep(3600) if address[0] == DEAD else connect(sock, address))

    monkeypatch.setattr(loop, "sock_connect", sock_connect)
    async with listening("127.0.0.1") as port, asyncio.timeout(30):
        resolver = Way("relay.test", FixedNames(DEAD, "127.0.0.1"))
        assert await text_of(f"http://relay.test:{port}/", resolver) == "127.0.0.1"
    assert asked == [DEAD, "127.0.0.1"]


async def test_when_all_are_dead_it_says_so():
    with pytest.raises(aiohttp.ClientConnectorError):
        await text_of("http://relay.test:1/", Way("relay.test", FixedNames(DEAD, "127.0.0.1", "::1")))


async def test_only_the_host_itself_is_at_the_known_addresses():
    """A proxy's name, say, is another host's."""
    resolver = Way("relay.test", FixedNames(DEAD))
    assert [one["host"] for one in await resolver.resolve("relay.test", 80)] == [DEAD]
    assert {one["host"] for one in await resolver.resolve("localhost", 80)} <= {"127.0.0.1", "::1"}


async def test_a_plain_connection_tries_every_address_too(monkeypatch):
    def infos(*found):
        families = {True: socket.AF_INET6, False: socket.AF_INET}

        async def getaddrinfo(host, port, **_):
            return [(families[":" in one], socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (one, port)) for one in found]

        return getaddrinfo

    async with listening("127.0.0.1") as port:
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", infos("::1", DEAD, "127.0.0.1"))
        _, writer = await open_connection("relay.test", port)
        assert writer.get_extra_info("peername")[0] == "127.0.0.1"
        writer.close()
        await writer.wait_closed()
