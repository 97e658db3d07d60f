from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading

import pytest

from benchmarks.lines.network import BURST_SECONDS, PIECE, CountingProxy, Line, ThreadedProxy

PAYLOAD = os.urandom(1 << 20)


@contextlib.asynccontextmanager
async def echo_server():
    """Sends back what it gets; `seen` collects what arrived."""
    seen = bytearray()
    writers = []

    async def serve(reader, writer):
        writers.append(writer)
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(PIECE):
                seen.extend(piece)
                writer.write(piece)
                await writer.drain()
            writer.write_eof()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], seen
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


@contextlib.asynccontextmanager
async def proxied(**lines):
    async with echo_server() as (port, seen), CountingProxy("127.0.0.1", port, **lines) as proxy:
        yield proxy, seen


async def send_and_read_all(port, payload):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    reading = asyncio.ensure_future(reader.read())
    writer.write(payload)
    writer.write_eof()
    answer = await reading
    writer.close()
    await writer.wait_closed()
    return answer


# --- what passes is what is counted


async def test_bytes_pass_unchanged_and_are_counted_exactly():
    async with proxied() as (proxy, _):
        assert await send_and_read_all(proxy.port, PAYLOAD) == PAYLOAD
        assert (proxy.counts.up, proxy.counts.down) == (len(PAYLOAD), len(PAYLOAD))


async def test_each_connection_is_counted_and_the_sum_is_the_proxys():
    async with proxied() as (proxy, _):
        sizes = [1, 1000, 300_000]
        answers = await asyncio.gather(*(send_and_read_all(proxy.port, PAYLOAD[:size]) for size in sizes))
        assert [len(answer) for answer in answers] == sizes
        assert proxy.connections == len(sizes)
        assert proxy.counts.total == 2 * sum(sizes)


@pytest.mark.parametrize("line", [Line(rate=20e6), Line(latency=0.005), Line(rate=20e6, latency=0.005, window=1)])
async def test_a_shaped_line_changes_no_byte(line):
    async with proxied(up=line, down=line) as (proxy, _):
        assert await send_and_read_all(proxy.port, PAYLOAD) == PAYLOAD
        assert proxy.counts.total == 2 * len(PAYLOAD)


async def test_one_side_may_end_while_the_other_still_sends():
    async def serve(reader, writer):
        received = await reader.read()
        writer.write(PAYLOAD + received)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with CountingProxy("127.0.0.1", port) as proxy:
            assert await send_and_read_all(proxy.port, b"last") == PAYLOAD + b"last"


async def test_a_wait_ends_when_so_many_bytes_have_passed():
    async with proxied() as (proxy, seen):
        waiting = asyncio.ensure_future(proxy.wait_for(300_000, direction="up"))
        await asyncio.sleep(0)
        assert not waiting.done()
        await send_and_read_all(proxy.port, PAYLOAD[:299_999])
        assert not waiting.done()
        await send_and_read_all(proxy.port, b"!")
        await waiting
        await proxy.wait_for(1)
        assert len(seen) == 300_000


async def test_a_slow_receiver_holds_the_sender_back():
    stall = asyncio.Event()

    async def serve(reader, writer):
        await stall.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1024)
    async with server, CountingProxy("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(bytes(32 << 20))
        before = -1
        while before != proxy.counts.up:
            before = proxy.counts.up
            await asyncio.sleep(0.2)
        # The server's own buffer may grow to a few MiB; the proxy adds no heap of its own.
        assert 0 < proxy.counts.up < 16 << 20
        stall.set()
        writer.transport.abort()


# --- faults


async def test_a_cut_resets_what_is_open_and_refuses_what_is_new():
    async with proxied() as (proxy, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        await proxy.cut()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.close()


async def test_a_restored_line_is_the_same_address_and_carries_again():
    async with proxied() as (proxy, _):
        port = proxy.port
        await proxy.cut()
        await proxy.cut()
        proxy.restore()
        proxy.restore()
        assert proxy.port == port
        assert await send_and_read_all(port, b"again") == b"again"


async def test_a_paused_line_holds_everything_and_loses_nothing():
    async with proxied() as (proxy, seen):
        proxy.pause()
        sending = asyncio.ensure_future(send_and_read_all(proxy.port, PAYLOAD))
        await asyncio.sleep(0.1)
        assert not seen
        assert not sending.done()
        proxy.resume()
        assert await sending == PAYLOAD


async def test_a_pause_holds_what_an_open_connection_sends():
    async with proxied() as (proxy, seen):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        for turn in range(1, 4):
            proxy.pause()
            writer.write(b"x")
            await asyncio.sleep(0.05)
            assert len(seen) == turn - 1
            proxy.resume()
            assert await reader.readexactly(1) == b"x"
        writer.close()


async def test_a_line_without_a_server_is_reset():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    async with CountingProxy("127.0.0.1", port) as proxy:
        with pytest.raises(ConnectionError):
            await send_and_read_all(proxy.port, b"hello")


async def test_a_reset_by_one_side_reaches_the_other():
    was_reset = asyncio.get_running_loop().create_future()

    async def serve(reader, writer):
        with contextlib.closing(writer):
            try:
                await reader.read()
                was_reset.set_result(False)
            except ConnectionResetError:
                was_reset.set_result(True)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, CountingProxy("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"x")
        await proxy.wait_for(1)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()
        assert await asyncio.wait_for(was_reset, 30)


async def test_the_end_of_the_proxy_leaves_no_waiter_behind():
    async with proxied() as (proxy, _):
        waiting = asyncio.ensure_future(proxy.wait_for(1))
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await waiting


# --- rates, by arithmetic


def test_a_slow_line_is_cut_into_fine_pieces():
    assert Line().piece == PIECE
    assert Line(rate=1e9).piece == PIECE
    assert Line(rate=500_000).piece == 10_000
    assert Line(rate=1).piece == 1024


@pytest.mark.parametrize("rate", [4 << 20, 16 << 20])
async def test_no_line_is_faster_than_its_rate(rate):
    async with proxied(up=Line(rate=rate)) as (proxy, _):
        loop = asyncio.get_running_loop()
        start = loop.time()
        await send_and_read_all(proxy.port, PAYLOAD)
        # A lower bound by arithmetic, and no upper one: the machine may be slow.
        assert loop.time() - start >= len(PAYLOAD) / rate - BURST_SECONDS


async def test_a_line_can_be_shaped_while_it_carries():
    async with proxied(up=Line(rate=1.0)) as (proxy, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        proxy.shape(up=Line())
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        writer.close()


async def test_a_line_has_latency_in_both_directions():
    async with proxied(up=Line(latency=0.05), down=Line(latency=0.03)) as (proxy, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        loop = asyncio.get_running_loop()
        for least in (0.16, 0.08):  # The first round trip carries the handshake too.
            start = loop.time()
            writer.write(b"x")
            await reader.readexactly(1)
            assert loop.time() - start >= least * 0.95
        writer.close()


@pytest.mark.parametrize("values", [{"rate": 0}, {"rate": -1.0}, {"latency": -1}, {"window": 0}])
def test_a_line_that_cannot_be_is_refused(values):
    with pytest.raises(ValueError, match="not a line"):
        Line(**values)


# --- from a thread that blocks


@pytest.fixture
def blocking_echo():
    def serve():
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            with client, contextlib.suppress(OSError):
                while piece := client.recv(PIECE):
                    client.sendall(piece)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_threaded_proxy_serves_a_caller_that_blocks(blocking_echo):
    with ThreadedProxy("127.0.0.1", blocking_echo) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port)) as client:
            client.sendall(b"hello")
            assert client.recv(5, socket.MSG_WAITALL) == b"hello"
            proxy.wait_for(10)
            assert (proxy.counts.up, proxy.counts.down) == (5, 5)
            with pytest.raises(TimeoutError):
                proxy.wait_for(11, timeout=0.01)
            proxy.cut()
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", proxy.port))
        proxy.restore()
        proxy.shape(up=Line(rate=1e6))
        proxy.pause()
        proxy.resume()
        with socket.create_connection(("127.0.0.1", proxy.port)) as client:
            client.sendall(b"0123456789")
            proxy.wait_for(15, direction="up")
        assert proxy.connections == 2
