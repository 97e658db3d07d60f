"""`/v1/line`: bytes both ways, counted, bounded, and kept nowhere."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import zlib

import aiohttp
import msgspec
import pytest
from aiohttp import web
from harness.relays import CLIENT_LIMITS, running_relay, small_server, token

from relay.errors import RefusedError, UnreachableError, UntrustedError
from relay.protocol import messages
from relay.protocol.client import RelayClient
from relay.protocol.connection import TokenRefusedError
from relay.support.incompressible import PIECE, noise


@pytest.fixture
async def relay(tmp_path):
    async with running_relay(tmp_path / "relay") as running:
        yield running


def files(folder):
    return sorted(os.path.join(path, name) for path, _, names in os.walk(folder) for name in names)


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, (1 << 20) + 3, 3 << 20])
def test_noise_has_the_length_that_was_asked_for(size):
    assert sum(map(len, noise(size))) == size


def test_noise_does_not_compress():
    data = b"".join(noise(3 << 20))
    assert len(zlib.compress(data, 9)) >= len(data)


async def test_what_is_sent_to_the_line_is_counted_and_nothing_is_stored(relay, tmp_path):
    before = files(tmp_path / "relay")
    async with aiohttp.ClientSession(relay.url) as session, session.put(messages.LINE, data=b"x" * 300_000) as response:
        answer = msgspec.json.decode(await response.read(), type=messages.LineAnswer)
    assert response.status == 200
    assert answer.bytes == 300_000
    assert answer.seconds > 0
    assert files(tmp_path / "relay") == before


async def test_the_line_sends_exactly_as_many_bytes_as_were_asked_for(relay):
    async with aiohttp.ClientSession(relay.url) as session:
        for size in (1, PIECE + 1, 5_000_000):
            async with session.get(messages.LINE, params={"bytes": str(size)}) as response:
                assert response.content_length == size
                assert len(await response.read()) == size


@pytest.mark.parametrize(
    "query",
    ["", "?bytes=", "?bytes=0", "?bytes=-1", "?bytes=1e3", "?bytes=%D9%A3", f"?bytes={messages.LINE_BYTES_MAX + 1}"],
)
async def test_a_number_of_bytes_that_cannot_be_is_refused(relay, query):
    async with aiohttp.ClientSession(relay.url) as session, session.get(f"{messages.LINE}{query}") as response:
        assert response.status == 400
        assert (await response.json(content_type=None))["code"] == "bad_request"


async def test_a_transfer_above_the_limit_is_refused_also_where_no_length_was_told(relay):
    told = {"Content-Length": str(messages.LINE_BYTES_MAX + 1)}
    async with (
        aiohttp.ClientSession(relay.url) as session,
        session.put(messages.LINE, data=b"", headers=told) as response,
    ):
        assert response.status == 413
    # The client tells no length: it sends in chunks.
    async with relay.client() as client:
        with pytest.raises(RefusedError, match="413"):
            await client.measure_up(messages.LINE_BYTES_MAX + 1)


async def test_the_largest_transfer_passes_both_ways(relay):
    async with relay.client() as client:
        assert await client.measure_up(messages.LINE_BYTES_MAX) > 0
        assert client.traffic.sent >= messages.LINE_BYTES_MAX
        assert await client.measure_down(messages.LINE_BYTES_MAX) > 0
        assert client.traffic.received >= messages.LINE_BYTES_MAX


async def test_a_reader_may_fetch_from_the_line_and_not_send(tmp_path):
    text, record = token("read")
    async with running_relay(tmp_path / "relay", tokens=[record]) as relay, relay.client(text) as client:
        assert await client.measure_down(1000) > 0
        with pytest.raises(TokenRefusedError):
            await client.measure_up(1000)


async def test_a_relay_that_miscounts_is_not_believed():
    async def short(request):
        return web.Response(body=b"x" * 99)

    async def lie(request):
        await request.read()
        return web.Response(body=msgspec.json.encode(messages.LineAnswer(bytes=99, seconds=1.0)))

    routes = [web.get(messages.LINE, short), web.put(messages.LINE, lie)]
    async with small_server(routes) as url, RelayClient(url, limits=CLIENT_LIMITS) as client:
        with pytest.raises(UntrustedError, match="99"):
            await client.measure_down(100)
        with pytest.raises(UntrustedError, match="99"):
            await client.measure_up(100)


async def test_a_relay_that_takes_nothing_is_unreachable_in_the_end():
    held = asyncio.Event()

    async def deaf(request):
        await held.wait()
        return web.Response()

    limits = dataclasses.replace(CLIENT_LIMITS, answer_seconds=0.5)
    async with small_server([web.put(messages.LINE, deaf)]) as url, RelayClient(url, limits=limits) as client:
        with pytest.raises(UnreachableError):
            await client.measure_up(50 << 20)
        held.set()
