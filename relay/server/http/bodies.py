"""What a request may carry and name, and how an answer is written: bounded in bytes, in time, in depth.

aiohttp (3.14) by itself bounds neither a half-sent body nor its inflated size.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Final, TypeVar

import msgspec
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from relay.errors import IdentityError
from relay.package.identity import NuGetVersion, PackageId, PackageRef, Sha256, parse_digest
from relay.protocol import messages
from relay.server.http.callers import IDENTITY
from relay.server.http.connection import ACKS_ARE_COUNTED, GuardedHandler, Ledger, Limits, address_key
from relay.server.http.problems import HttpRefusal
from relay.support.byte_budget import ByteBudget
from relay.support.json_bounds import JsonTooDeepError, check_depth, repeats_a_key

T = TypeVar("T")

PIECE: Final = 256 << 10
"""Bytes. What is written is handed on in pieces of at most this size."""
IMMUTABLE: Final = "public, max-age=31536000, immutable"
"""`Cache-Control` of what a digest names."""


def _ledger_of(request: web.BaseRequest, limits: Limits) -> Ledger:
    protocol = request.protocol
    return protocol.ledger if isinstance(protocol, GuardedHandler) else Ledger(limits)


def budget_of(request: web.BaseRequest, limits: Limits) -> ByteBudget:
    """The bytes in flight of this relay, for handlers that hold more than a piece of a body at a time."""
    return _ledger_of(request, limits).budget


def share_of(request: web.BaseRequest, limits: Limits) -> int:
    """Bytes that an answer's pieces are to have: what one connection may take, as each that does not read holds one."""
    return _ledger_of(request, limits).share()


async def body_pieces(request: web.Request, limits: Limits, cap: int) -> AsyncGenerator[bytes, None]:
    """The body as it comes, of at most `cap` bytes in all.

    The minimum rate is judged over the sum of what the peer sends in all its bodies, because they share its line, and
    only over time in which we were the ones who waited.

    Raises:
        HttpRefusal: 413 above `cap` (before reading, where the length was told), 415 for any Content-Encoding, 408
            below the minimum rate.
        web.RequestPayloadError: the body breaks its framing.
        ConnectionError: the peer has gone.
    """
    if "Content-Encoding" in request.headers:
        raise HttpRefusal(415, "content_coding")
    if (request.content_length or 0) > cap:
        raise HttpRefusal(413, "too_large")
    identity = request.get(IDENTITY)
    rate = limits.body_min_rate if identity else limits.body_min_rate_anonymous
    peer = f"token {identity.id}" if identity else f"address {address_key(request.remote or '')}"
    clock, window = asyncio.get_running_loop().time, limits.body_window_seconds
    received = 0
    judged_from = clock()
    meter = _ledger_of(request, limits).meter(peer)
    while True:
        piece = await _next_piece(request, window / 8)
        now = clock()
        if piece is not None:
            received += len(piece)
            meter.add(now, len(piece))
        if received > cap:
            raise HttpRefusal(413, "too_large")
        if piece == b"":
            return
        if now - judged_from >= window and meter.total(now) < rate * window:
            raise HttpRefusal(408, "too_slow")
        if piece is not None:
            yield piece
            judged_from += clock() - now


async def _next_piece(request: web.Request, patience: float) -> bytes | None:
    """What has come; empty at the body's end, None when nothing came within `patience` seconds."""
    try:
        async with asyncio.timeout(patience):
            return await request.content.readany()
    except TimeoutError:
        return None


def check_media_type(request: web.Request, expected: str) -> None:
    """Raises `HttpRefusal`: 415, the body is of another type."""
    if request.content_type != expected:
        raise HttpRefusal(415, "media_type")


async def read_body(request: web.Request, limits: Limits, cap: int) -> bytes:
    """The whole body, counted against the bytes in flight while it comes. Raises as `body_pieces`, and 503 (busy)."""
    collected = bytearray()
    with budget_of(request, limits).place() as place:
        async for piece in body_pieces(request, limits, cap):
            place.take(len(piece))
            collected += piece
    return bytes(collected)


async def read_json(request: web.Request, limits: Limits, type: type[T], cap: int = messages.JSON_MAX) -> T:
    """The body, of `cap` bytes at most, as a `type`, which says itself whether it forbids unknown fields.

    Only `application/json` is taken: a web page can send anything else to a loopback relay without asking first.

    Raises:
        HttpRefusal: 415 for another media type, 400 for malformed JSON or for fields that `type` does not take; and as
            `body_pieces`.
    """
    check_media_type(request, messages.JSON)
    raw = await read_body(request, limits, min(limits.json_bytes, cap))
    return await parse_json_aside(raw, type, limits.json_depth)


async def parse_json_aside(raw: bytes, type: type[T], depth: int) -> T:
    """As `parse_json`; large documents, which everybody else on this thread would feel, in another one."""
    if len(raw) > 64 << 10:
        return await asyncio.to_thread(parse_json, raw, type, depth)
    return parse_json(raw, type, depth)


def parse_json(raw: bytes, type: type[T], depth: int) -> T:
    """JSON as a `type`: nested at most `depth` deep, without a key that stands twice in one object.

    Raises:
        HttpRefusal: 400.
    """
    try:
        check_depth(raw, depth)
        value = msgspec.json.decode(raw, type=type)
    except msgspec.ValidationError as error:
        raise HttpRefusal(400, "bad_fields") from error
    except (JsonTooDeepError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HttpRefusal(400, "bad_json") from error
    # After decoding: the text is known to be JSON, and of the size that `type` allows.
    if repeats_a_key(raw):
        raise HttpRefusal(400, "bad_json")
    return value


async def write_guarded(writer: AbstractStreamWriter, data: bytes | bytearray | memoryview, limits: Limits) -> None:
    """Write and wait until the peer has taken all but the last piece, or some of that.

    A peer that stops reading is cut off by the connection's `StallWatch`; a timeout around the write does it where the
    system does not count acknowledged bytes.

    Raises:
        ConnectionError: the peer has gone, or was cut off.
    """
    view = memoryview(data)
    for start in range(0, len(view), PIECE):
        # The kernel may take megabytes without a pause: others get their turn between two pieces.
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(None if ACKS_ARE_COUNTED else limits.write_stall_seconds):
                await writer.write(view[start : start + PIECE])
                # By itself aiohttp waits only where more than 64 KiB were written: a piece more would be held for each.
                await writer.drain()
        except TimeoutError as error:
            raise ConnectionResetError("the peer does not read") from error


async def stream(
    request: web.Request,
    pieces: AsyncGenerator[bytes, None],
    limits: Limits,
    headers: Mapping[str, str],
    length: int | None = None,
) -> web.StreamResponse:
    """An answer piece by piece. It begins when its first piece is there, so that absence is told as a problem.

    Raises as `pieces` does, and as `write_guarded`.
    """
    response = web.StreamResponse(headers=headers)
    response.content_length = length
    async with aclosing(pieces):
        # Under one name, so that the first piece is not held until the last.
        piece = await anext(pieces, b"")
        writer = await response.prepare(request)
        assert writer is not None  # noqa: S101 - only an answer that was sent already has none
        await write_guarded(writer, piece, limits)
        async for piece in pieces:
            await write_guarded(writer, piece, limits)
    await response.write_eof()
    return response


def json_answer(answer: msgspec.Struct, status: int = 200) -> web.Response:
    """A struct of the protocol as an answer."""
    return web.Response(body=msgspec.json.encode(answer), content_type=messages.JSON, status=status)


# --- names in a path: one that names nothing possible names nothing that is here


def or_404(parse: Callable[[str], T], text: str) -> T:
    """Raises `HttpRefusal`: 404, `text` does not parse."""
    try:
        return parse(text)
    except IdentityError as error:
        raise HttpRefusal(404, "not_found") from error


def digest_of(request: web.Request) -> Sha256:
    """Raises as `or_404`."""
    return or_404(parse_digest, request.match_info["hex"])


def package_of(request: web.Request) -> PackageRef:
    """Raises as `or_404`."""
    id = or_404(PackageId.parse, request.match_info["id"])
    return PackageRef(id, or_404(NuGetVersion.parse, request.match_info["version"]))
