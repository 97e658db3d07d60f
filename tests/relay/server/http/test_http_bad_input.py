"""Bad and slow input against a real server, over raw sockets: a client library would mend half of it before sending."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import re
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
import trustme
from aiohttp import web

from relay.errors import NotFoundError
from relay.package.identity import parse_digest
from relay.server.http.access import DRAINING, IDENTITY, OPEN, Access, add, guarded_app, iter_routes, long_poll
from relay.server.http.bodies import body_pieces, read_json, write_guarded
from relay.server.http.connection import Limits
from relay.server.http.listen import Running, start_guarded
from relay.server.http.problems import PROBLEM_TYPE, TITLES
from relay.server.http.tokens import TokenSet, make_token

CANARY = b"canary7f3a"
CAP = 1 << 20
PATIENCE = 20.0
"""Seconds after which a test gives up waiting. No test depends on its length."""
LIMITS = Limits(linger_seconds=0.2, tls_shutdown_seconds=0.5, drain_seconds=5.0)
NOW = datetime.now(UTC)
WRITE, WRITE_RECORD = make_token(["write"], NOW)
AGENT, AGENT_RECORD = make_token(["agent"], NOW)
EXPIRED, EXPIRED_RECORD = make_token(["write"], NOW - timedelta(days=2), days=1)
UNKNOWN, _ = make_token(["write"], NOW)
TOKENS = TokenSet([WRITE_RECORD, AGENT_RECORD, EXPIRED_RECORD])


class Note(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: str


@dataclass
class Seen:
    """What the handlers saw."""

    bodies: list[int] = field(default_factory=list)
    started: int = 0
    errors: list[BaseException] = field(default_factory=list)
    identities: list[str | None] = field(default_factory=list)


def tiny_app(limits: Limits, tokens: TokenSet, seen: Seen) -> web.Application:
    app = guarded_app(Access(tokens))

    async def upload(request: web.Request) -> web.Response:
        seen.started += 1
        size = 0
        try:
            async for piece in body_pieces(request, limits, CAP):
                size += len(piece)
        except BaseException as error:
            seen.errors.append(error)
            raise
        seen.bodies.append(size)
        return web.json_response({"size": size})

    async def download(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        writer = await response.prepare(request)
        seen.started += 1
        try:
            while True:
                await write_guarded(writer, bytes(64 << 10), limits)
        except BaseException as error:
            seen.errors.append(error)
            raise

    async def lump(request: web.Request) -> web.Response:
        seen.started += 1
        return web.Response(body=bytes(24 << 20))

    async def note(request: web.Request) -> web.Response:
        return web.json_response({"size": len((await read_json(request, limits, Note)).text)})

    async def chunk(request: web.Request) -> web.Response:
        raise NotFoundError(f"no chunk {parse_digest(request.match_info['hex'])}")

    async def health(request: web.Request) -> web.Response:
        identity = request.get(IDENTITY)
        seen.identities.append(identity.id if identity else None)
        return web.json_response({"remote": request.remote})

    async def boom(request: web.Request) -> web.Response:
        raise ZeroDivisionError(f"because of {request.path_qs}")

    async def halfway(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half")
        raise ZeroDivisionError

    async def poll(request: web.Request) -> web.Response:
        seen.started += 1
        with long_poll(request):
            await request.app[DRAINING].wait()
        return web.json_response({"news": False})

    async def no_answer(request: web.Request) -> web.Response:
        return None  # type: ignore[return-value]

    add(app, "PUT", "/up", upload, "write")
    add(app, "GET", "/down", download, "read")
    add(app, "GET", "/lump", lump, "read")
    add(app, "POST", "/note", note, "write")
    add(app, "GET", "/v1/chunks/{hex}", chunk, "read")
    add(app, "GET", "/health", health, OPEN)
    add(app, "GET", "/boom", boom, OPEN)
    add(app, "GET", "/halfway", halfway, OPEN)
    add(app, "POST", "/poll", poll, "agent")
    add(app, "GET", "/no-answer", no_answer, OPEN)
    return app


@dataclass
class Server:
    running: Running
    seen: Seen

    @property
    def port(self) -> int:
        return self.running.port


@contextlib.asynccontextmanager
async def serving(
    limits: Limits = LIMITS, tokens: TokenSet = TOKENS, context: ssl.SSLContext | None = None
) -> AsyncIterator[Server]:
    seen = Seen()
    running = await start_guarded(
        tiny_app(limits, tokens, seen), "127.0.0.1", 0, limits, ssl_context=context and (lambda: context)
    )
    try:
        yield Server(running, seen)
    finally:
        await running.stop()
        assert running.ledger.total == 0
        assert running.ledger.budget.used == 0


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as made:
        yield made


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """Of a problem document, which must be a whole and valid one."""
        document = json.loads(self.body)
        assert self.headers["content-type"] == PROBLEM_TYPE
        assert document["status"] == self.status
        assert document["title"] == TITLES[document["code"]]
        assert re.fullmatch(r"[0-9a-f]{16}", document["id"])
        return document["code"]


def parse_answers(raw: bytes) -> list[Answer]:
    answers = []
    while raw:
        head, _, raw = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        size = int(headers.get("content-length", 0))
        answers.append(Answer(int(first.split()[1]), headers, raw[:size]))
        raw = raw[size:]
    return answers


async def until(condition) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the server closes: a connection that stays open fails the test."""
    collected = b""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(PATIENCE):
            while piece := await reader.read(1 << 16):
                collected += piece
    return collected


async def exchange(port: int, *parts: bytes, pause: float = 0.0, eof: bool = False) -> list[Answer]:
    """Send the parts, read until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        reading = asyncio.create_task(read_to_end(reader))
        # uvloop says RuntimeError where asyncio says ConnectionError: the server has closed.
        with contextlib.suppress(ConnectionError, RuntimeError):
            for part in parts:
                writer.write(part)
                await writer.drain()
                if pause:
                    await asyncio.sleep(pause)
            if eof:
                writer.write_eof()
        raw = await reading
        assert CANARY not in raw
        assert b"aiohttp" not in raw
        return parse_answers(raw)
    finally:
        writer.close()


def head(request: str, *headers: str, token: str | None = WRITE, close: bool = True) -> bytes:
    lines = [f"{request} HTTP/1.1", "Host: relay.example"]
    if token:
        lines.append(f"Authorization: Bearer {token}")
    if close:
        lines.append("Connection: close")
    return "\r\n".join([*lines, *headers, "", ""]).encode("utf-8", "surrogateescape")


async def one(port: int, *parts: bytes, **options) -> Answer:
    answers = await exchange(port, *parts, **options)
    assert len(answers) == 1, answers
    return answers[0]


async def assert_serves(port: int) -> None:
    assert (await one(port, head("GET /health"))).status == 200


# --- rows 1 and 2: malformed HTTP

START = b"PUT /up HTTP/1.1\r\nHost: relay.example\r\nAuthorization: Bearer " + WRITE.encode() + b"\r\n"


@pytest.mark.parametrize(
    "raw",
    [
        START + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\nX: canary7f3a\r\n\r\n0\r\n\r\n",
        START + b"Content-Length: +3\r\nX: canary7f3a\r\n\r\nabc",
        START + b"Content-Length: -1\r\n\r\nabc",
        START + b"Content-Length: 0x3\r\n\r\nabc",
        START + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        START + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
        START + "Content-Length: ٣\r\n\r\nabc".encode(),
        START + b"Content-Length: canary7f3a\r\n\r\nabc",
        START + b"Content-Length: 99999999999999999999999999\r\n\r\nabc",
        START + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        START + b"Transfer-Encoding: chunked, canary7f3a\r\n\r\n0\r\n\r\n",
        START + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /canary7f3a HTTP/1.1\nHost: a\n\n",
        b"GET /health HTTP/1.1\r\nHost: a\nX: canary7f3a\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nX: a\r\n canary7f3a\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nX: canary7f3a\x00\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nX: canary7f3a\rb\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\ncanary7f3a : b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\n: canary7f3a\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: canary7f3a/x\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /canary7f3a\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET canary7f3a HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http:canary7f3a HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /health HTTP/canary7f3a\r\nHost: a\r\n\r\n",
        b"get /health HTTP/1.1\r\nHost: a\r\n\r\n",
        b"canary7f3a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03canary7f3a",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x00" * 64,
    ],
)
async def test_malformed_http_is_a_400_that_echoes_nothing_and_the_end_of_the_connection(
    server: Server, raw: bytes
) -> None:
    answers = await exchange(server.port, raw)
    assert [answer.status for answer in answers] == [400]
    assert answers[0].code in {"bad_request", "bad_host", "bad_body"}
    assert not server.seen.bodies
    await assert_serves(server.port)


@pytest.mark.parametrize("version", [b" HTTP/2.0", b" HTTP/0.9", b""])
async def test_another_version_of_http_is_a_505_that_does_not_repeat_it(server: Server, version: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /canary7f3a" + version + b"\r\nHost: a\r\n\r\n")
    raw = await read_to_end(reader)
    writer.close()
    assert raw.startswith(b"HTTP/1.1 505 ")
    assert not any(echo in raw for echo in (b"2.0", b"0.9", CANARY))
    (answer,) = parse_answers(raw)
    assert answer.code == "http_version"
    assert answer.headers["connection"] == "close"


async def test_a_body_that_breaks_its_framing_half_way_is_a_400_and_is_not_stored(server: Server) -> None:
    start = START + b"Transfer-Encoding: chunked\r\n\r\n"
    answers = await exchange(server.port, start + b"3\r\nabc\r\n", b"canary7f3a\r\n", pause=0.2)
    assert answers[0].status == 400
    assert answers[0].code == "bad_body"
    assert server.seen.started == 1
    assert not server.seen.bodies


async def test_malformed_http_is_not_written_into_the_log_as_an_error(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    await exchange(server.port, b"GET /health HTTP/1.1\r\nHost: a\r\nX: canary7f3a\x00\r\n\r\n")
    start = START + b"Transfer-Encoding: chunked\r\n\r\n"
    await exchange(server.port, start + b"3\r\nabc\r\n", b"canary7f3a\r\n", pause=0.2)
    assert caplog.records
    assert all(record.levelname == "WARNING" and record.exc_info is None for record in caplog.records)
    assert all("\n" not in record.getMessage() for record in caplog.records)
    assert "canary7f3a" not in caplog.text


# --- row 4: too much


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /" + b"canary7f3a" * 900 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"X: canary7f3a\r\n" * 200 + b"\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"canary7f3a" * 900 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"canary7f3a" * 900 + b": x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer " + b"canary7f3a" * 100_000 + b"\r\n\r\n",
        b"A" * 1024 + b" /health HTTP/1.1\r\nHost: a\r\n\r\n",
        b"A" * 1_000_000,
    ],
    ids=["target", "headers", "value", "name", "token", "method", "no end"],
)
async def test_too_long_a_request_is_refused_before_it_is_held(server: Server, raw: bytes) -> None:
    answer = await one(server.port, raw)
    assert answer.status in {400, 414, 431}
    assert answer.code in {"bad_request", "header_too_large"}
    await assert_serves(server.port)


async def test_pipelined_requests_are_all_answered_in_bounded_memory(server: Server) -> None:
    count = 2_000
    flood = head("GET /health", token=None, close=False) * count
    answers = await exchange(server.port, flood, head("GET /health", token=None))
    assert [answer.status for answer in answers] == [200] * (count + 1)


async def test_a_body_of_one_byte_chunks_is_counted(server: Server) -> None:
    answer = await one(
        server.port, head("PUT /up", "Transfer-Encoding: chunked"), b"1\r\nx\r\n" * 100_000, b"0\r\n\r\n"
    )
    assert answer.status == 200
    assert server.seen.bodies == [100_000]


# --- row 5: slow clients

SLOW = replace(
    LIMITS,
    header_seconds=0.5,
    keepalive_seconds=0.5,
    body_window_seconds=0.5,
    body_min_rate=1000.0,
    body_min_rate_anonymous=16_000.0,
    write_stall_seconds=0.6,
    tls_handshake_seconds=0.5,
)


async def drip(writer: asyncio.StreamWriter, data: bytes, pause: float) -> None:
    with contextlib.suppress(ConnectionError, RuntimeError):
        while True:
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(pause)


@pytest.mark.parametrize(
    "first", [b"", b"GET /health HTTP/1.1\r\n", head("GET /health", close=False) + b"GET / HTTP/1.1\r\n"]
)
async def test_silence_and_dripping_headers_end_the_connection(first: bytes) -> None:
    limits = SLOW if len(first) > 50 else replace(SLOW, keepalive_seconds=PATIENCE * 2)
    async with serving(limits) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(first)
        dripping = asyncio.create_task(drip(writer, b"X: y\r\n" if first else b"", 0.05))
        raw = await read_to_end(reader)
        dripping.cancel()
        writer.close()
        assert [answer.status for answer in parse_answers(raw)] == ([200] if len(first) > 50 else [])


@pytest.mark.parametrize("data", [b"", b"1\r\nx\r\n"])
async def test_a_body_below_the_minimum_rate_is_a_408(data: bytes) -> None:
    async with serving(SLOW) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(head("PUT /up", "Transfer-Encoding: chunked", close=False) + b"3\r\nabc\r\n")
        dripping = asyncio.create_task(drip(writer, data, 0.05))
        (answer,) = parse_answers(await read_to_end(reader))
        dripping.cancel()
        writer.close()
        assert (answer.status, answer.code) == (408, "too_slow")
        assert answer.headers["connection"] == "close"
        assert not server.seen.bodies


async def test_a_peer_without_identity_owes_a_higher_rate_and_one_above_it_is_left_alone() -> None:
    # 400 bytes each 0.1 s: above the 1,000 B/s of a peer with identity, below the 16,000 B/s of one without.
    chunks = [b"190\r\n" + bytes(400) + b"\r\n"] * 15 + [b"0\r\n\r\n"]
    start = head("PUT /up", "Transfer-Encoding: chunked", close=True)
    async with serving(SLOW) as server:
        answer = await one(server.port, start, *chunks, pause=0.1)
        assert answer.status == 200
        assert server.seen.bodies == [6000]
    open_start = b"PUT /up HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with serving(SLOW, tokens=TokenSet([])) as server:
        answer = (await exchange(server.port, open_start, *chunks, pause=0.1))[0]
        assert (answer.status, answer.code) == (408, "too_slow")


async def test_the_rate_is_judged_over_all_bodies_of_a_peer_together() -> None:
    """Two uploads share a thin line: the one that waits is not cut off while the other one moves."""
    async with serving(SLOW) as server:
        reader, waiting = await asyncio.open_connection("127.0.0.1", server.port)
        waiting.write(head("PUT /up", "Transfer-Encoding: chunked") + b"3\r\nabc\r\n")
        chunks = [b"190\r\n" + bytes(400) + b"\r\n"] * 15 + [b"0\r\n\r\n"]
        moving = await one(server.port, head("PUT /up", "Transfer-Encoding: chunked"), *chunks, pause=0.1)
        waiting.write(b"0\r\n\r\n")
        (answer,) = parse_answers(await read_to_end(reader))
        waiting.close()
        assert (moving.status, answer.status) == (200, 200)
        assert sorted(server.seen.bodies) == [3, 6000]


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def open_and_send(port: int, data: bytes) -> socket.socket:
    """A client that never reads."""
    sock = socket.socket()
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", port))
    await loop.sock_sendall(sock, data)
    return sock


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not count acknowledged bytes")
async def test_clients_that_never_read_are_cut_off_and_cost_little_memory() -> None:
    async with serving(replace(SLOW, write_stall_seconds=1.0)) as server:
        before = resident_bytes()
        deaf = [await open_and_send(server.port, head("GET /down")) for _ in range(30)]
        await until(lambda: server.seen.started == 30)
        most = 0
        async with asyncio.timeout(PATIENCE):
            while server.running.ledger.total:
                most = max(most, resident_bytes() - before)
                await asyncio.sleep(0.05)
        assert all(isinstance(error, ConnectionError | asyncio.CancelledError) for error in server.seen.errors)
        assert len(server.seen.errors) == 30
        assert most < 48 << 20
        for sock in deaf:
            sock.close()
        await assert_serves(server.port)


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not count acknowledged bytes")
async def test_a_whole_answer_that_nobody_reads_does_not_keep_its_connection() -> None:
    """The handler is done long ago; a transport that only closes would wait for its buffer for ever."""
    async with serving(SLOW) as server:
        deaf = await open_and_send(server.port, head("GET /lump"))
        await until(lambda: server.seen.started == 1)
        assert server.running.ledger.total == 1
        await until(lambda: server.running.ledger.total == 0)
        deaf.close()


async def test_a_client_that_reads_in_time_gets_everything() -> None:
    async with serving(SLOW) as server:
        answer = await one(server.port, head("GET /lump"))
        assert (answer.status, len(answer.body)) == (200, 24 << 20)


# --- rows 6 and 7: names


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chunks/../../etc/passwd",
        "/v1/chunks/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/v1/chunks/..%2f..%2fetc/passwd",
        "//etc/passwd",
        "/v1/chunks/%5c..%5c..",
        "/v1/chunks/%00",
        "/v1/chunks/x;x=.jsp",
        "/v1/chunks/\udcc0\udcae\udcc0\udcae",
        "/%2F%2F..%2F..%2Fetc/passwd",
        "/health/../boom/../canary7f3a",
        "/health;canary7f3a",
        "/HEALTH",
        "/health/",
    ],
)
async def test_a_path_that_leads_elsewhere_leads_nowhere(server: Server, path: str) -> None:
    answer = await one(server.port, head(f"GET {path}"))
    assert answer.status in {400, 404}
    assert answer.code in {"not_found", "untrusted", "bad_request"}


@pytest.mark.parametrize(
    "name", ["A" * 64, "a" * 63, "a" * 65, "sha1:" + "a" * 40, "a" * 64 + "%0a", "%D9%A3" * 64, "canary7f3a"]
)
async def test_a_bad_digest_is_a_400_and_an_absent_one_a_404(server: Server, name: str) -> None:
    assert (await one(server.port, head(f"GET /v1/chunks/{name}"))).status == 400
    assert (await one(server.port, head(f"GET /v1/chunks/{'a' * 64}"))).status == 404


# --- rows 11 and 12: bodies


async def test_a_body_said_to_be_too_long_is_refused_before_it_is_read(server: Server) -> None:
    answer = await one(server.port, head("PUT /up", f"Content-Length: {10**13}", close=False), b"x" * 1000)
    assert (answer.status, answer.code) == (413, "too_large")
    assert answer.headers["connection"] == "close"
    assert server.seen.started == 1
    assert not server.seen.bodies


async def test_a_body_of_just_the_cap_is_taken_and_one_byte_more_is_not(server: Server) -> None:
    assert (await one(server.port, head("PUT /up", f"Content-Length: {CAP}"), bytes(CAP))).status == 200
    assert (await one(server.port, head("PUT /up", f"Content-Length: {CAP + 1}"), bytes(CAP + 1))).status == 413
    assert server.seen.bodies == [CAP]


async def test_an_endless_body_is_refused_at_the_cap(server: Server) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(head("PUT /up", "Transfer-Encoding: chunked", close=False))
    dripping = asyncio.create_task(drip(writer, b"10000\r\n" + bytes(0x10000) + b"\r\n", 0))
    (answer,) = parse_answers(await read_to_end(reader))
    dripping.cancel()
    writer.close()
    assert (answer.status, answer.code) == (413, "too_large")
    assert not server.seen.bodies


async def test_a_body_shorter_than_said_is_not_stored(server: Server) -> None:
    answers = await exchange(server.port, head("PUT /up", "Content-Length: 1000"), b"x" * 10, eof=True)
    await until(lambda: server.seen.errors)
    assert isinstance(server.seen.errors[0], ConnectionError | asyncio.CancelledError)
    assert not server.seen.bodies
    assert all(answer.status == 400 for answer in answers)


async def test_a_body_longer_than_said_ends_the_connection(server: Server) -> None:
    answers = await exchange(server.port, head("PUT /up", "Content-Length: 3", close=False), b"abc\x00canary7f3a")
    assert [answer.status for answer in answers] in ([200, 400], [400])
    assert all(size == 3 for size in server.seen.bodies)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "identity", "gzip, gzip", "canary7f3a"])
async def test_a_coded_body_is_a_415(server: Server, coding: str) -> None:
    answer = await one(server.port, head("PUT /up", f"Content-Encoding: {coding}", "Content-Length: 3"), b"abc")
    assert (answer.status, answer.code) == (415, "content_coding")
    assert not server.seen.bodies


async def test_an_unknown_expectation_is_refused_without_naming_it(server: Server) -> None:
    answer = await one(server.port, head("PUT /up", "Expect: canary7f3a", "Content-Length: 3"), b"abc")
    assert (answer.status, answer.code) == (417, "expectation")
    answer = await one(server.port, head("GET /nowhere", "Expect: canary7f3a"))
    assert (answer.status, answer.code) == (417, "expectation")


async def test_a_known_expectation_is_met(server: Server) -> None:
    answers = await exchange(server.port, head("PUT /up", "Expect: 100-continue", "Content-Length: 3"), b"abc")
    assert [answer.status for answer in answers] == [100, 200]


@pytest.mark.parametrize(
    ("kind", "body", "status", "code"),
    [
        ("application/json", b'{"text": "abc"}', 200, None),
        ("application/json; charset=utf-8", b'{"text": "abc"}', 200, None),
        ("text/plain", b'{"text": "abc"}', 415, "media_type"),
        ("application/x-www-form-urlencoded", b'{"text": "abc"}', 415, "media_type"),
        ("application/json", b'{"text": "canary7f3a", "text": "b"}', 400, "bad_json"),
        ("application/json", b'{"canary7f3a": 1}', 400, "bad_fields"),
        ("application/json", b"[" * 1_000_000, 400, "bad_json"),
        ("application/json", b"", 400, "bad_json"),
        ("application/json", b'{"text": "' + b"x" * (17 << 20) + b'"}', 413, "too_large"),
        ("application/json", b'{"text": "' + b"x" * (15 << 20) + b'"}', 200, None),
    ],
    ids=["good", "charset", "plain", "form", "twice", "field", "deep", "empty", "large", "nearly"],
)
async def test_json_is_bounded_typed_and_named_as_such(
    server: Server, kind: str, body: bytes, status: int, code: str | None
) -> None:
    answer = await one(server.port, head("POST /note", f"Content-Type: {kind}", f"Content-Length: {len(body)}"), body)
    assert answer.status == status
    if code:
        assert answer.code == code


async def test_bodies_beyond_the_bytes_in_flight_are_put_off() -> None:
    async with serving(replace(LIMITS, bytes_in_flight=100_000)) as server:
        body = b'{"text": "' + b"x" * 200_000 + b'"}'
        start = head("POST /note", "Content-Type: application/json", f"Content-Length: {len(body)}")
        answer = await one(server.port, start, body)
        assert (answer.status, answer.code) == (503, "busy")
        assert int(answer.headers["retry-after"]) >= 2


# --- row 18: tokens


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        ([], 401),
        (["Bearer wst_00000000_canary7f3a_00000000"], 401),
        ([f"Bearer {UNKNOWN}"], 401),
        ([f"Bearer {EXPIRED}"], 401),
        ([f"Bearer {WRITE[:-1]}{'0' if WRITE[-1] != '0' else '1'}"], 401),
        (["Basic Y2FuYXJ5N2YzYQ=="], 401),
        ([f"Bearer {AGENT}"], 403),
        ([f"Bearer {WRITE}", f"Bearer {WRITE}"], 400),
        ([f"Bearer {WRITE}"], 200),
    ],
    ids=["none", "wrong", "unknown", "expired", "crc", "basic", "scope", "two", "good"],
)
async def test_only_a_valid_token_of_the_scope_lets_a_body_in(
    server: Server, authorization: list[str], status: int
) -> None:
    headers = [f"Authorization: {value}" for value in authorization]
    answer = await one(server.port, head("PUT /up", "Content-Length: 3", *headers, token=None), b"abc")
    assert answer.status == status
    assert server.seen.started == (status == 200)
    assert (answer.headers.get("www-authenticate") == "Bearer") == (status == 401)
    if status != 200:
        assert answer.code in {"unauthenticated", "forbidden", "misplaced_token"}


async def test_a_token_in_the_url_is_refused_on_every_route(server: Server) -> None:
    for path in ("/up", "/health", "/nowhere"):
        answer = await one(server.port, head(f"PUT {path}?t={WRITE}", "Content-Length: 3"), b"abc")
        assert (answer.status, answer.code) == (400, "misplaced_token")
        assert WRITE.encode() not in answer.body
    assert not server.seen.bodies


async def test_no_route_answers_without_the_scope_that_it_declares(server: Server) -> None:
    """The sweep: every route, without a token and with one of every kind."""
    may = {None: set(), WRITE: {"read", "write"}, AGENT: {"read", "agent"}, EXPIRED: set()}
    swept = 0
    for route in iter_routes(tiny_app(LIMITS, TOKENS, Seen())):
        path = route.path.replace("{hex}", "a" * 64)
        for token, scopes in may.items():
            if route.scope in scopes | {OPEN}:
                continue
            answer = await one(server.port, head(f"{route.method} {path}", token=token))
            assert answer.status == (401 if token in {None, EXPIRED} else 403), (route, token)
            swept += 1
    assert swept >= 15
    assert server.seen == Seen()


async def test_a_token_taken_away_ends_its_use_on_an_open_connection() -> None:
    seen = Seen()
    app = tiny_app(LIMITS, TOKENS, seen)
    running = await start_guarded(app, "127.0.0.1", 0, LIMITS)
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    question = head(f"GET /v1/chunks/{'a' * 64}", close=False)
    writer.write(question)
    assert b" 404 " in await reader.readuntil(b"\r\n")
    from relay.server.http.access import ACCESS

    app[ACCESS].tokens = TokenSet([])
    writer.write(question)
    async with asyncio.timeout(PATIENCE):
        await reader.readuntil(b" 401 ")
    writer.close()
    await running.stop()


async def test_an_open_route_knows_who_asks_and_does_not_mind_a_bad_token(server: Server) -> None:
    for token in (WRITE, EXPIRED, None):
        assert (await one(server.port, head("GET /health", token=token))).status == 200
    assert server.seen.identities == [WRITE_RECORD.id, None, None]


# --- row 20: methods and forged origins


@pytest.mark.parametrize("method", ["TRACE", "PATCH", "DELETE", "OPTIONS", "PROPFIND", "HEAD"])
async def test_a_method_that_a_path_does_not_have_is_a_405(server: Server, method: str) -> None:
    raw = head(f"{method} /up", "X: canary7f3a")
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(raw)
    answer = await read_to_end(reader)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert CANARY not in answer
    assert b"Allow: PUT" in answer


@pytest.mark.parametrize("target", ["canary7f3a.example:443", "/up", "relay.example:443"])
async def test_connect_is_refused(server: Server, target: str) -> None:
    answer = (await exchange(server.port, head(f"CONNECT {target}"), b"canary7f3a"))[0]
    assert answer.status in {400, 404, 405}


async def test_headers_that_claim_another_origin_or_method_change_nothing(server: Server) -> None:
    claims = (
        "X-HTTP-Method-Override: PUT",
        "X-Forwarded-For: 10.1.2.3",
        "Forwarded: for=10.1.2.3",
        "X-Original-URL: /health",
        "X-Rewrite-URL: /health",
    )
    assert (await one(server.port, head("GET /up", *claims))).status == 405
    assert (await one(server.port, head("PUT /up", *claims, token=None))).status == 401
    answer = await one(server.port, head("GET /health", *claims))
    assert json.loads(answer.body) == {"remote": "127.0.0.1"}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:9400", 200),
        ("[::1]:9400", 200),
        ("canary7f3a.example", 421),
        ("localhost.canary7f3a.example", 421),
        ("canary7f3a@localhost", 400),
    ],
)
async def test_a_relay_without_tokens_answers_for_loopback_names_only(host: str, status: int) -> None:
    async with serving(tokens=TokenSet([])) as server:
        answer = await one(server.port, f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        assert answer.status == status
        answer = await one(
            server.port, b"PUT /up HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc"
        )
        assert answer.status == 200


async def test_a_whole_url_as_target_must_name_the_same_host(server: Server) -> None:
    assert (await one(server.port, head("GET http://relay.example/health"))).status == 200
    answer = await one(server.port, head("GET http://canary7f3a.example/health"))
    assert (answer.status, answer.code) == (400, "bad_host")


# --- failures of ours


async def test_an_unexpected_error_is_a_500_that_tells_only_its_id(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await one(server.port, head("GET /boom?canary7f3a"))
    assert (answer.status, answer.code) == (500, "internal")
    (record,) = [record for record in caplog.records if json.loads(answer.body)["id"] in record.getMessage()]
    assert record.exc_info is not None


async def test_a_handler_without_an_answer_is_a_500(server: Server) -> None:
    answer = await one(server.port, head("GET /no-answer"))
    assert (answer.status, answer.code) == (500, "internal")


async def test_an_answer_that_broke_off_cannot_be_taken_for_a_whole_one(server: Server) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(head("GET /halfway"))
    raw = await read_to_end(reader)
    writer.close()
    assert not raw.endswith(b"0\r\n\r\n")
    assert b"problem" not in raw


# --- connections

FEW = replace(LIMITS, connections_per_address=5, connections_per_identity=3, connections=12)


async def still_open(reader: asyncio.StreamReader) -> bool:
    try:
        return await asyncio.wait_for(reader.read(1), 0.3) != b""
    except TimeoutError:
        return True
    except ConnectionError:
        return False


async def test_a_flood_of_connections_is_cut_at_once_and_the_place_is_free_again_after() -> None:
    async with serving(FEW) as server:
        flood = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(20)]
        for _, writer in flood[::2]:
            writer.write(b"GET /hea")
        alive = await asyncio.gather(*(still_open(reader) for reader, _ in flood))
        assert sum(alive) == 5
        assert server.running.ledger.total == 5
        for _, writer in flood:
            writer.close()
        await until(lambda: server.running.ledger.total == 0)
        await assert_serves(server.port)


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str | None) -> Answer:
    writer.write(head("GET /health", token=token, close=False))
    async with asyncio.timeout(PATIENCE):
        raw = await reader.readuntil(b"\r\n\r\n")
        size = int(re.search(rb"Content-Length: (\d+)", raw)[1])
        return parse_answers(raw + await reader.readexactly(size))[0]


async def test_a_connection_that_showed_an_identity_counts_for_it_and_not_for_its_address() -> None:
    async with serving(FEW) as server:
        ledger = server.running.ledger
        known = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(3)]
        assert [(await ask(*pair, WRITE)).status for pair in known] == [200] * 3
        assert (dict(ledger.by_identity), ledger.total) == ({WRITE_RECORD.id: 3}, 3)
        more = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(5)]
        assert [(await ask(*pair, None)).status for pair in more] == [200] * 5
        refused = await ask(*more[0], WRITE)
        assert (refused.status, refused.code) == (429, "too_many_connections")
        assert (await ask(*more[1], AGENT)).status == 200
        assert (await ask(*known[0], WRITE)).status == 200
        for _, writer in known + more:
            writer.close()
        await until(lambda: ledger.total == 0 and not ledger.by_identity and not ledger.by_address)


async def test_a_long_poll_counts_apart() -> None:
    async with serving(FEW) as server:
        ledger = server.running.ledger
        pairs = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(3)]
        for _, writer in pairs:
            writer.write(head("POST /poll", token=AGENT, close=False))
        await until(lambda: ledger.polling == 3)
        assert ledger.total == 0
        for _, writer in pairs:
            writer.close()
        await until(lambda: ledger.polling == 0)
        assert ledger.total == 0


# --- TLS


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    ours, theirs = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(ours)
    authority.configure_trust(theirs)
    return ours, theirs


async def test_requests_over_tls_are_answered(contexts) -> None:
    ours, theirs = contexts
    async with serving(context=ours) as server:
        assert server.running.url.startswith("https://")
        for _ in range(5):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", server.port, ssl=theirs, server_hostname="localhost"
            )
            body = bytes(500_000)
            writer.write(head("PUT /up", f"Content-Length: {len(body)}") + body)
            (answer,) = parse_answers(await read_to_end(reader))
            assert json.loads(answer.body) == {"size": len(body)}
            writer.close()
        await until(lambda: server.running.ledger.total == 0)


async def test_a_request_that_comes_with_the_last_handshake_message_is_not_lost(contexts) -> None:
    """TLS 1.3 lets a client send its request at once; both arrive in one segment here."""
    ours, theirs = contexts
    async with serving(context=ours) as server:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = theirs.wrap_bio(incoming, outgoing, server_hostname="localhost")
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                writer.write(outgoing.read())
                incoming.write(await reader.read(1 << 16))
        client.write(head("GET /health"))
        writer.write(outgoing.read())
        incoming.write(await read_to_end(reader))
        assert client.read(1 << 16).startswith(b"HTTP/1.1 200 ")
        writer.close()


async def test_a_silent_or_babbling_tls_peer_is_counted_and_cut_off(contexts) -> None:
    async with serving(replace(SLOW, connections_per_address=4), context=contexts[0]) as server:
        pairs = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(6)]
        pairs[0][1].write(b"GET / HTTP/1.1\r\n\r\n")
        await until(lambda: server.running.ledger.total > 0)
        assert server.running.ledger.total <= 4
        for reader, _ in pairs:
            await read_to_end(reader)
        await until(lambda: server.running.ledger.total == 0)
        for _, writer in pairs:
            writer.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not count acknowledged bytes")
async def test_a_tls_client_that_never_reads_is_cut_off(contexts) -> None:
    ours, theirs = contexts
    async with serving(SLOW, context=ours) as server:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", server.port, ssl=theirs, server_hostname="localhost"
        )
        writer.write(head("GET /down"))
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.pause_reading()
        await until(lambda: server.seen.errors)
        await until(lambda: server.running.ledger.total == 0)
        writer.transport.abort()


# --- the end (P22)


async def test_stopping_lets_a_running_upload_end_and_answers_polls_at_once() -> None:
    seen = Seen()
    running = await start_guarded(tiny_app(LIMITS, TOKENS, seen), "127.0.0.1", 0, LIMITS)
    idle_reader, idle = await asyncio.open_connection("127.0.0.1", running.port)
    up_reader, up = await asyncio.open_connection("127.0.0.1", running.port)
    poll_reader, poll = await asyncio.open_connection("127.0.0.1", running.port)
    up.write(head("PUT /up", "Content-Length: 6", close=False) + b"abc")
    poll.write(head("POST /poll", token=AGENT, close=False))
    await until(lambda: seen.started == 2)
    stopping = asyncio.create_task(running.stop())
    assert await read_to_end(idle_reader) == b""
    (answer,) = parse_answers(await read_to_end(poll_reader))
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", running.port)
    assert not stopping.done()
    up.write(b"def")
    (answer,) = parse_answers(await read_to_end(up_reader))
    assert (answer.status, json.loads(answer.body)) == (200, {"size": 6})
    assert answer.headers["connection"] == "close"
    await stopping
    for writer in (idle, up, poll):
        writer.close()


async def test_stopping_cuts_what_does_not_end_in_time() -> None:
    seen = Seen()
    limits = replace(LIMITS, drain_seconds=0.3)
    running = await start_guarded(tiny_app(limits, TOKENS, seen), "127.0.0.1", 0, limits)
    deaf = [await open_and_send(running.port, head("GET /down")) for _ in range(2)]
    await until(lambda: seen.started == 2)
    async with asyncio.timeout(PATIENCE):
        await running.stop()
    assert len(seen.errors) == 2
    assert running.ledger.total == 0
    for sock in deaf:
        sock.close()


async def test_stopping_cuts_a_tls_handshake_that_is_not_done(contexts) -> None:
    async with serving(replace(LIMITS, tls_handshake_seconds=PATIENCE * 2), context=contexts[0]) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        await until(lambda: server.running.ledger.total == 1)
        await server.running.stop()
        assert await read_to_end(reader) == b""
        writer.close()


# --- the other event loop


@pytest.mark.parametrize(
    "promise",
    [
        test_clients_that_never_read_are_cut_off_and_cost_little_memory,
        test_a_whole_answer_that_nobody_reads_does_not_keep_its_connection,
        test_the_rate_is_judged_over_all_bodies_of_a_peer_together,
        test_a_flood_of_connections_is_cut_at_once_and_the_place_is_free_again_after,
        test_a_connection_that_showed_an_identity_counts_for_it_and_not_for_its_address,
        test_requests_over_tls_are_answered,
        test_a_request_that_comes_with_the_last_handshake_message_is_not_lost,
        test_a_silent_or_babbling_tls_peer_is_counted_and_cut_off,
        test_a_tls_client_that_never_reads_is_cut_off,
        test_stopping_lets_a_running_upload_end_and_answers_polls_at_once,
        test_stopping_cuts_what_does_not_end_in_time,
    ],
)
def test_the_promise_holds_under_uvloop_too(promise, contexts) -> None:
    uvloop = pytest.importorskip("uvloop", reason="uvloop is not for this platform")
    uvloop.run(promise(contexts) if "contexts" in inspect.signature(promise).parameters else promise())
