"""A relay that lies: it answers as an honest one would, out of a real store, and spoils one kind of answer in one way.

It speaks HTTP by hand over a plain socket, because no library would send what some attacks consist of.
"""

from __future__ import annotations

import asyncio
import os
import stat
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import parse_qs, urlsplit

import msgspec
import xxhash
from securesystemslib.signer import Signer

from harness.origins import Origin
from harness.packages import Cut
from relay.config import RelayConfig
from relay.encoding.bundle import MAGIC, BundleWriter, Data, End, Failed, Header, Missing, Span
from relay.errors import NotFoundError
from relay.package.identity import ManifestId, NuGetVersion, PackageId, PackageRef
from relay.package.manifest import Manifest, from_wire, to_wire
from relay.protocol import messages
from relay.server.app import RelayApp
from relay.server.http.connection import Limits
from relay.server.packages import Transfer
from relay.support.zstd import zstd
from relay.trust.envelopes import PackageStatement, sign_package

Kind = Literal["health", "package", "manifest", "bundle"]

SENT_MAX = 1 << 30
"""Bytes. An endless answer that nobody has broken off until then ends by itself, and the test fails."""
_U32 = struct.Struct("<I")


@dataclass(frozen=True)
class Reply:
    """One honest answer."""

    body: bytes
    content_type: str
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()

    def head(self, *framing: str) -> bytes:
        lines = [f"HTTP/1.1 {self.status} -", f"Content-Type: {self.content_type}"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        return "\r\n".join([*lines, *framing, "", ""]).encode()


@dataclass(frozen=True)
class Scene:
    """What an attacker has at hand: everything but the keys."""

    origin: Origin
    manifest: Manifest
    """Of the package that is asked for."""
    older: Manifest
    """Of another version of it, signed."""
    foreign: Manifest
    """Of another package, signed."""
    forged: Cut
    """Of the same id and version, with other content; signed by nobody who is pinned."""
    signatures: Mapping[ManifestId, bytes]
    """The honest envelopes, by manifest."""
    foreign_key_signature: bytes
    """What a key that is not pinned says of the right manifest."""
    order_key_signature: bytes
    """What the pinned order key says of the right manifest: that key may not."""


Wire = Callable[[bytes], Awaitable[None]]
"""Sends bytes; raises `ConnectionError` once the reader has gone."""

Play = Callable[[Scene, Reply, Wire], Awaitable[None]]
"""Sends the spoilt answer, head and all."""


@dataclass(frozen=True)
class Attack:
    """Which answer is spoilt, and how."""

    name: str
    on: Kind
    play: Play
    slow: bool = False
    """Needs time rather than bytes."""
    late: bool = False
    """Comes when every chunk is there and verified: nothing is left to ask of anybody else."""

    def __str__(self) -> str:
        return self.name


class EvilRelay:
    """Answers on loopback. Count `played` to prove that the attack took place."""

    def __init__(self, scene: Scene, attack: Attack | None) -> None:
        self.scene = scene
        self.attack = attack
        self.played = 0
        self.sent = 0
        self.asked: list[Kind] = []
        self.authorizations: list[str] = []
        self.url = ""
        self.broken: Exception | None = None
        self._transfer = Transfer(scene.origin.depot.store)
        self._app = RelayApp(self._transfer, RelayConfig(), Limits(), None)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def send(data: bytes) -> None:
            self.sent += len(data)
            if self.sent > SENT_MAX:
                raise ConnectionError("nobody stopped it")
            writer.write(data)
            await writer.drain()

        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await self._answer(head, reader, send)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            # Cancelled only where the loop ends; asyncio's own server would call that an error.
            pass
        except Exception as error:
            # A mistake of ours must not pass for an attack that was refused.
            self.broken = error
        finally:
            writer.close()

    async def _answer(self, head: bytes, reader: asyncio.StreamReader, send: Wire) -> None:
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.authorizations += [headers["authorization"]] if "authorization" in headers else []
        _, target, _ = first.split(" ")
        kind, reply = await self._honest(target, body)
        self.asked.append(kind)
        if self.attack is not None and self.attack.on == kind and reply.status == 200:
            self.played += 1
            await self.attack.play(self.scene, reply, send)
            # What was spoilt may have no end of its own.
            raise ConnectionError
        await send(reply.head(f"Content-Length: {len(reply.body)}") + reply.body)

    async def _honest(self, target: str, body: bytes) -> tuple[Kind, Reply]:
        parts = urlsplit(target)
        if parts.path == messages.HEALTH:
            answer = messages.HealthAnswer(status="ok", versions=(1,), time=0.0)
            return "health", Reply(msgspec.json.encode(answer), messages.JSON)
        if parts.path.startswith("/v1/manifests/"):
            id = ManifestId(parts.path.rpartition(":")[2])
            base = parse_qs(parts.query).get("base", [""])[0].removeprefix("sha256:")
            try:
                document, used = await self._transfer.document(id, ManifestId(base) if base else None)
            except NotFoundError:
                return "manifest", _not_found()
            headers = (("Waystation-Base", "1"),) if used else ()
            return "manifest", Reply(msgspec.msgpack.encode(document), messages.DOCUMENT_TYPE, 200, headers)
        if parts.path.startswith("/v1/packages/"):
            _, _, _, id, version = parts.path.split("/")
            try:
                pointer = self.scene.origin.depot.catalog.get(
                    PackageRef(PackageId.parse(id), NuGetVersion.parse(version))
                )
            except NotFoundError:
                return "package", _not_found()
            return "package", Reply(msgspec.json.encode(await self._app._package_answer(pointer)), messages.JSON)
        request = msgspec.json.decode(body, type=messages.BundleRequest)
        wanted = await self._transfer.wanted(request)
        pieces = [bytes(piece) async for piece in self._transfer.give(wanted)]
        return "bundle", Reply(b"".join(pieces), messages.BUNDLE_TYPE)


def _not_found() -> Reply:
    return Reply(b'{"code":"not_found"}', "application/problem+json", 404)


@asynccontextmanager
async def evil_relay(scene: Scene, attack: Attack | None) -> AsyncIterator[EvilRelay]:
    relay = EvilRelay(scene, attack)
    server = await asyncio.start_server(relay.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    relay.url = f"http://127.0.0.1:{port}"
    try:
        yield relay
    finally:
        server.close()
    if relay.broken is not None:
        raise relay.broken


async def make_scene(origin: Origin, forged: Cut, thief: Signer, order_key: Signer) -> Scene:
    """`origin` was made with the package, another version of it, and another package."""
    manifest, older, foreign = (added.manifest for added in origin.added)
    statement = PackageStatement(
        id=str(manifest.package.id),
        version=manifest.package.version.normalized,
        manifest=manifest.id,
        nupkg_sha256=manifest.nupkg.sha256,
    )
    signatures = {each.id: await origin.signature(each) for each in (manifest, older, foreign)}
    by_thief, by_order = sign_package(statement, thief), sign_package(statement, order_key)
    return Scene(origin, manifest, older, foreign, forged, signatures, by_thief, by_order)


# --- bundles, taken apart and put together again

Frame = tuple[Header, bytes]


def frames_of(bundle: bytes) -> list[Frame]:
    """Headers with their payloads, the end frame left out."""
    assert bundle.startswith(MAGIC)
    at, found = len(MAGIC), []
    while True:
        (length,) = _U32.unpack_from(bundle, at)
        header = msgspec.msgpack.decode(bundle[at + 4 : at + 4 + length], type=Header)
        at += 4 + length
        if isinstance(header, End):
            return found
        size = header.length if isinstance(header, Data) else 0
        found.append((header, bundle[at : at + size]))
        at += size


def bundle_of(frames: Iterable[Frame], *, end: bool = True) -> bytes:
    """With an end frame that fits: the attacker can count, too."""
    writer = BundleWriter()
    pieces = [writer.start()]
    for header, payload in frames:
        assert not isinstance(header, End)
        pieces += [writer.frame(header), payload]
    return b"".join([*pieces, writer.end()] if end else pieces)


def frame(header: Data | Missing | Failed, payload: bytes = b"") -> bytes:
    return BundleWriter().frame(header) + payload


def raw(run: tuple[Span, ...], data: bytes) -> Frame:
    """A well-made frame: length and XXH3-64 are right, whatever the bytes are."""
    return Data(run, (), "raw", len(data), xxhash.xxh3_64_intdigest(data)), data


def zstandard(run: tuple[Span, ...], payload: bytes) -> Frame:
    return Data(run, (), "zstd", len(payload), xxhash.xxh3_64_intdigest(payload)), payload


def _data(frames: Sequence[Frame]) -> list[tuple[Data, bytes]]:
    return [(header, payload) for header, payload in frames if isinstance(header, Data)]


def flipped(data: bytes, at: float = 0.5) -> bytes:
    index = int(len(data) * at)
    return data[:index] + bytes([data[index] ^ 0x10]) + data[index + 1 :]


# --- ways to play


def body(change: Callable[[Scene, bytes], bytes]) -> Play:
    """The honest answer with another body, well framed."""

    async def play(scene: Scene, reply: Reply, send: Wire) -> None:
        spoilt = change(scene, reply.body)
        assert spoilt != reply.body, "the attack changed nothing"
        await send(reply.head(f"Content-Length: {len(spoilt)}", "Connection: close") + spoilt)

    return play


def frames(change: Callable[[Scene, list[tuple[Data, bytes]]], Iterable[Frame]]) -> Play:
    """Other frames, in a bundle that is right in itself."""
    return body(lambda scene, bundle: bundle_of(change(scene, _data(frames_of(bundle)))))


def in_place_of(kind: str, data: bytes, status: int = 200, *headers: tuple[str, str]) -> Play:
    """Something else altogether."""

    async def play(scene: Scene, reply: Reply, send: Wire) -> None:
        other = Reply(data, kind, status, headers)
        await send(other.head(f"Content-Length: {len(data)}", "Connection: close") + data)

    return play


def endless(start: Callable[[Scene, Reply], bytes], again: Callable[[Scene, Reply], bytes]) -> Play:
    """A chunked body that starts somehow, and then goes on until the reader has enough."""

    async def play(scene: Scene, reply: Reply, send: Wire) -> None:
        await send(reply.head("Transfer-Encoding: chunked"))
        await send(_http_chunk(start(scene, reply)))
        more = _http_chunk(again(scene, reply))
        while True:
            await send(more)

    return play


def slow(cut: Callable[[bytes], int], at_a_time: int = 1) -> Play:
    """The honest answer; from some byte on, a few bytes now and then."""

    async def play(scene: Scene, reply: Reply, send: Wire) -> None:
        at = cut(reply.body)
        await send(reply.head(f"Content-Length: {len(reply.body)}") + reply.body[:at])
        for start in range(at, len(reply.body), at_a_time):
            await send(reply.body[start : start + at_a_time])
            await asyncio.sleep(0.05)

    return play


def cut(where: float) -> Play:
    """The connection ends in the middle of the body."""

    async def play(scene: Scene, reply: Reply, send: Wire) -> None:
        await send(reply.head(f"Content-Length: {len(reply.body)}") + reply.body[: int(len(reply.body) * where)])

    return play


async def no_answer(scene: Scene, reply: Reply, send: Wire) -> None:
    """Close as soon as the question is there."""


async def no_body(scene: Scene, reply: Reply, send: Wire) -> None:
    await send(reply.head(f"Content-Length: {len(reply.body)}"))


async def silence(scene: Scene, reply: Reply, send: Wire) -> None:
    await asyncio.sleep(60)


async def endless_headers(scene: Scene, reply: Reply, send: Wire) -> None:
    await send(b"HTTP/1.1 200 OK\r\n")
    while True:
        await send(b"".join(b"X-%d: %s\r\n" % (n, b"y" * 100) for n in range(1000)))


async def endless_header_line(scene: Scene, reply: Reply, send: Wire) -> None:
    await send(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        await send(b"y" * 65536)


async def endless_continue(scene: Scene, reply: Reply, send: Wire) -> None:
    while True:
        await send(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
        await asyncio.sleep(0.01)


async def not_http(scene: Scene, reply: Reply, send: Wire) -> None:
    await send(b"SSH-2.0-OpenSSH_9.2p1\r\n" + os.urandom(1000))


def _http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data) if data else b""


# --- attacks on bundles


def _flip_and_say_so(scene: Scene, found: list[tuple[Data, bytes]]) -> Iterable[Frame]:
    """One byte of one file differs, and every checksum of the frame is right."""
    (first, payload), *rest = found
    return [raw(first.run, flipped(zstd.decompress(payload))), *rest]


def _swap_two_chunks(scene: Scene, found: list[tuple[Data, bytes]]) -> Iterable[Frame]:
    (a, of_a), (b, of_b), *rest = found
    return [(replace_run(a, b.run), of_a), (replace_run(b, a.run), of_b), *rest]


def replace_run(header: Data, run: tuple[Span, ...]) -> Data:
    return msgspec.structs.replace(header, run=run)


def _not_asked_for(scene: Scene, found: list[tuple[Data, bytes]]) -> Iterable[Frame]:
    """A good chunk of the same package that no agent asks for: a part of the container."""
    last = len(scene.manifest.chunks) - 1
    assert last not in scene.manifest.tree_chunks
    (_, payload), *_ = found
    return [zstandard((Span.of(scene.manifest.id, [last]),), payload), *found]


def _of_another_package(scene: Scene, found: list[tuple[Data, bytes]]) -> Iterable[Frame]:
    (first, payload), *rest = found
    return [(replace_run(first, (Span.of(scene.foreign.id, [0]),)), payload), *rest]


def _span_bomb(scene: Scene, found: list[tuple[Data, bytes]]) -> Iterable[Frame]:
    everything = Span(bytes.fromhex(scene.manifest.id), ((0, len(scene.manifest.chunks)),))
    return [raw((everything,) * 20_000, b"x"), *found]


def _unwanted_encoding(name: str) -> Callable[[Scene, list[tuple[Data, bytes]]], Iterable[Frame]]:
    def change(scene: Scene, found: list[tuple[Data, bytes]]) -> Iterable[Frame]:
        (first, payload), *rest = found
        return [(msgspec.structs.replace(first, encoding=name), payload), *rest]

    return change


def _with_bases(scene: Scene, found: list[tuple[Data, bytes]]) -> Iterable[Frame]:
    (first, payload), *rest = found
    return [(msgspec.structs.replace(first, bases=first.run), payload), *rest]


def _on_base(of: Callable[[Scene], ManifestId]) -> Callable[[Scene, list[tuple[Data, bytes]]], Iterable[Frame]]:
    """A difference from a chunk that is well known, and that the machine never said it holds."""

    def change(scene: Scene, found: list[tuple[Data, bytes]]) -> Iterable[Frame]:
        (first, payload), *rest = found
        base = (Span.of(of(scene), [0]),)
        return [(msgspec.structs.replace(first, bases=base, encoding="zstd-prefix"), payload), *rest]

    return change


def _zstd_bomb(scene: Scene, found: list[tuple[Data, bytes]]) -> Iterable[Frame]:
    (first, _), *rest = found
    return [zstandard(first.run, zstd.compress(bytes(64 << 20))), *rest]


def _window_bomb(scene: Scene, found: list[tuple[Data, bytes]]) -> Iterable[Frame]:
    """A frame that asks for a window of 2 GiB before it says anything."""
    (first, payload), *rest = found
    window_2_gib = (31 - 10) << 3
    return [zstandard(first.run, b"\x28\xb5\x2f\xfd\x00" + bytes([window_2_gib]) + payload[6:]), *rest]


def _huge_payload(scene: Scene, found: list[tuple[Data, bytes]]) -> Iterable[Frame]:
    """Empty zstd blocks: they inflate to nothing for as long as one likes to read them."""
    (first, _), *rest = found
    blocks = b"\x28\xb5\x2f\xfd\x00\x58" + bytes(3) * (8 << 20)
    return [zstandard(first.run, blocks), *rest]


def _header_length(length: int) -> Play:
    return body(lambda scene, bundle: MAGIC + _U32.pack(length) + bundle[len(MAGIC) :])


def _first_frame(scene: Scene, reply: Reply) -> bytes:
    header, payload = frames_of(reply.body)[0]
    assert not isinstance(header, End)
    return frame(header, payload)


def _missing_frame(reason: Literal["absent", "arriving"]) -> Callable[[Scene, Reply], bytes]:
    def make(scene: Scene, reply: Reply) -> bytes:
        run = tuple(span for header, _ in _data(frames_of(reply.body)) for span in header.run)
        return frame(Missing(run, reason))

    return make


def _all_missing(reason: Literal["absent", "arriving"]) -> Play:
    return frames(lambda scene, found: [(Missing(tuple(s for h, _ in found for s in h.run), reason), b"")])


def _late(
    play: Callable[[Scene, list[tuple[Data, bytes]]], Iterable[Frame]],
) -> Callable[[Scene, list[tuple[Data, bytes]]], Iterable[Frame]]:
    """The first two chunks are good, so that the next relay has only the rest to give."""

    def change(scene: Scene, found: list[tuple[Data, bytes]]) -> Iterable[Frame]:
        return [*found[:2], *play(scene, found[2:])]

    return change


def _swap_halves(scene: Scene, bundle: bytes) -> bytes:
    half = len(bundle) // 2
    return bundle[half:] + bundle[:half]


def _start(scene: Scene, reply: Reply) -> bytes:
    return MAGIC


HTML = b"<!doctype html><html><title>Sign in</title><body>Please sign in to the guest network.</body></html>"

BUNDLE_ATTACKS = [
    Attack("a flipped bit in a payload", "bundle", body(lambda scene, bundle: flipped(bundle))),
    Attack("a flipped bit in a late payload", "bundle", body(lambda scene, bundle: flipped(bundle, 0.95))),
    Attack("a flipped bit with all checksums made right", "bundle", frames(_flip_and_say_so)),
    Attack("the same after two good chunks", "bundle", frames(_late(_flip_and_say_so))),
    Attack("a flipped bit in the first frame's header", "bundle", body(lambda s, b: b[:14] + flipped(b[14:20]) + b[20:])),
    Attack("a flipped bit in the magic", "bundle", body(lambda scene, bundle: flipped(bundle[:8]) + bundle[8:])),
    Attack("a body that is cut off", "bundle", cut(0.5)),
    Attack("a head without a body", "bundle", no_body),
    Attack("a bundle that ends within a frame", "bundle", body(lambda scene, bundle: bundle[: len(bundle) // 2])),
    Attack("an empty body", "bundle", body(lambda scene, bundle: b"")),
    Attack("no end frame", "bundle", body(lambda scene, bundle: bundle_of(frames_of(bundle), end=False)), late=True),
    Attack("an end frame of another bundle", "bundle", body(lambda s, b: bundle_of(frames_of(b), end=False) + bundle_of([])[8:]), late=True),
    Attack("bytes after the end", "bundle", body(lambda scene, bundle: bundle + b"more"), late=True),
    Attack("two halves swapped", "bundle", body(_swap_halves)),
    Attack("two chunks swapped", "bundle", frames(_swap_two_chunks)),
    Attack("a chunk that was not asked for", "bundle", frames(_not_asked_for)),
    Attack("a chunk of another package", "bundle", frames(_of_another_package)),
    Attack("chunks left out without a word", "bundle", frames(lambda scene, found: found[:-1])),
    Attack("nothing at all, well framed", "bundle", frames(lambda scene, found: [])),
    Attack("chunks said to be absent", "bundle", _all_missing("absent")),
    Attack("chunks said to arrive, for ever", "bundle", _all_missing("arriving"), slow=True),
    Attack("an abort", "bundle", frames(lambda scene, found: [*found[:1], (Failed("internal"), b"")])),
    Attack("an unknown encoding", "bundle", frames(_unwanted_encoding("lzma"))),
    Attack("an encoding that was not offered", "bundle", frames(_unwanted_encoding("hdiff"))),
    Attack("bases that nobody named", "bundle", frames(_with_bases)),
    Attack("a base of the very package", "bundle", frames(_on_base(lambda scene: scene.manifest.id))),
    Attack("a base of the very package, late", "bundle", frames(_late(_on_base(lambda scene: scene.manifest.id)))),
    Attack("a base of another package", "bundle", frames(_on_base(lambda scene: scene.foreign.id))),
    Attack("a base of a version before", "bundle", frames(_on_base(lambda scene: scene.older.id))),
    Attack("a zstd bomb", "bundle", frames(_zstd_bomb)),
    Attack("a zstd window of 2 GiB", "bundle", frames(_window_bomb)),
    Attack("a payload of empty blocks", "bundle", frames(_huge_payload)),
    Attack("a header that names everything 20,000 times", "bundle", frames(_span_bomb)),
    Attack("a frame header of 4 GiB", "bundle", _header_length(0xFFFFFFFF)),
    Attack("a frame header of nothing", "bundle", _header_length(0)),
    Attack("the same frame without end", "bundle", endless(lambda s, r: MAGIC + _first_frame(s, r), _first_frame)),
    Attack("an endless payload", "bundle", endless(lambda s, r: MAGIC + _first_frame(s, r), lambda s, r: bytes(65536))),
    Attack("endless noise", "bundle", endless(lambda s, r: b"", lambda s, r: os.urandom(65536))),
    Attack("missing frames without end", "bundle", endless(_start, _missing_frame("arriving"))),
    Attack("empty missing frames without end", "bundle", endless(_start, lambda s, r: frame(Missing((), "arriving")))),
    Attack("endless headers", "bundle", endless_headers),
    Attack("a header line without end", "bundle", endless_header_line),
    Attack("endless interim answers", "bundle", endless_continue, slow=True),
    Attack("one byte at a time", "bundle", slow(lambda whole: 0), slow=True),
    Attack("one byte at a time after two thirds", "bundle", slow(lambda whole: len(whole) * 2 // 3), slow=True),
    Attack("silence", "bundle", silence, slow=True),
    Attack("a sign-in page with status 200", "bundle", in_place_of("text/html", HTML)),
    Attack("a sign-in page that calls itself a bundle", "bundle", in_place_of(messages.BUNDLE_TYPE, HTML)),
    Attack("a redirect", "bundle", in_place_of("text/html", b"", 307, ("Location", "http://127.0.0.1:9/"))),
    Attack("no content", "bundle", in_place_of(messages.BUNDLE_TYPE, b"", 204)),
    Attack("an inner error", "bundle", in_place_of("application/problem+json", b'{"code":"internal"}', 500)),
    Attack("busy for ever", "bundle", in_place_of("application/problem+json", b"{}", 503, ("Retry-After", "0")), slow=True),
    Attack("busy for a year", "bundle", in_place_of("application/problem+json", b"{}", 503, ("Retry-After", "31536000")), slow=True),
    Attack("a close in place of an answer", "bundle", no_answer),
    Attack("another protocol", "bundle", not_http),
]  # fmt: skip


# --- attacks on manifests


def _document(change: Callable[[Scene, bytes], bytes]) -> Play:
    """The manifest document with another canonical text in it."""

    def spoil(scene: Scene, packed: bytes) -> bytes:
        document = msgspec.msgpack.decode(packed, type=messages.Document)
        canonical = change(scene, from_wire(document.manifest))
        return msgspec.msgpack.encode(messages.Document(to_wire(canonical), document.signature))

    return body(spoil)


def _manifest_bomb(scene: Scene, packed: bytes) -> bytes:
    return msgspec.msgpack.encode(messages.Document(zstd.compress(bytes(512 << 20)), b""))


MANIFEST_ATTACKS = [
    Attack("a flipped bit in the manifest's text", "manifest", _document(lambda scene, text: flipped(text))),
    Attack("a flipped bit in the manifest as it travels", "manifest", body(lambda scene, packed: flipped(packed))),
    Attack("an altered manifest", "manifest", _document(lambda s, t: t.replace(b'"executable":true,', b""))),
    Attack("another path in the manifest", "manifest", _document(lambda s, t: t.replace(b"bin/app", b"bin/apq"))),
    Attack("another version's manifest", "manifest", _document(lambda scene, text: scene.older.canonical)),
    Attack("another package's manifest", "manifest", _document(lambda scene, text: scene.foreign.canonical)),
    Attack("a forged manifest", "manifest", _document(lambda scene, text: scene.forged.manifest.canonical)),
    Attack("an empty manifest", "manifest", _document(lambda scene, text: b"{}")),
    Attack("a manifest nested without end", "manifest", _document(lambda scene, text: b"[" * 1_000_000)),
    Attack("a manifest of 512 MiB in 50 KiB", "manifest", body(_manifest_bomb)),
    Attack("half a manifest", "manifest", body(lambda scene, packed: packed[: len(packed) // 2])),
    Attack("a manifest document of nothing", "manifest", body(lambda scene, packed: b"")),
    Attack("a manifest document nested without end", "manifest", in_place_of(messages.DOCUMENT_TYPE, b"\x91" * 1_000_000)),
    Attack("an endless manifest", "manifest", endless(lambda s, r: r.body, lambda s, r: bytes(65536))),
    Attack("a manifest cut off", "manifest", cut(0.5)),
    Attack("a manifest one byte at a time", "manifest", slow(lambda whole: 0), slow=True),
    Attack("a sign-in page in place of the manifest", "manifest", in_place_of("text/html", HTML)),
    Attack("a close in place of the manifest", "manifest", no_answer),
    Attack("endless headers before the manifest", "manifest", endless_headers),
    Attack("a redirect of the manifest", "manifest", in_place_of("text/html", b"", 301, ("Location", "/elsewhere"))),
]  # fmt: skip


# --- attacks on the pointer and its signature


def _pointer(change: Callable[[Scene, messages.PackageAnswer], messages.PackageAnswer]) -> Play:
    def spoil(scene: Scene, packed: bytes) -> bytes:
        return msgspec.json.encode(change(scene, msgspec.json.decode(packed, type=messages.PackageAnswer)))

    return body(spoil)


def _signed(signature: Callable[[Scene, bytes], bytes]) -> Play:
    return _pointer(lambda scene, answer: msgspec.structs.replace(answer, signature=signature(scene, answer.signature)))


POINTER_ATTACKS = [
    Attack("no signature", "package", _signed(lambda scene, signature: b"")),
    Attack("a flipped bit in the signature", "package", _signed(lambda scene, signature: flipped(signature, 0.97))),
    Attack("a flipped bit in the signed text", "package", _signed(lambda scene, signature: flipped(signature, 0.2))),
    Attack("half a signature", "package", _signed(lambda scene, signature: signature[: len(signature) // 2])),
    Attack("another key's signature", "package", _signed(lambda scene, _: scene.foreign_key_signature)),
    Attack("the order key's signature", "package", _signed(lambda scene, _: scene.order_key_signature)),
    Attack("another version's valid signature", "package", _signed(lambda scene, _: scene.signatures[scene.older.id])),
    Attack("another package's valid signature", "package", _signed(lambda scene, _: scene.signatures[scene.foreign.id])),
    Attack("a signature of 1 MiB", "package", _signed(lambda scene, signature: signature + b" " * (1 << 20))),
    Attack("a pointer nested without end", "package", in_place_of(messages.JSON, b"[" * 1_000_000)),
    Attack("a pointer that is no JSON", "package", body(lambda scene, packed: packed[:-1])),
    Attack("a pointer with a digest that climbs", "package", body(lambda s, p: p.replace(s.manifest.id.encode(), b"../../etc/passwd"))),
    Attack("an endless pointer", "package", endless(lambda s, r: r.body[:-1], lambda s, r: b" " * 65536)),
    Attack("a pointer one byte at a time", "package", slow(lambda whole: 0), slow=True),
    Attack("a sign-in page in place of the pointer", "package", in_place_of("text/html", HTML)),
    Attack("silence in place of the pointer", "package", silence, slow=True),
    Attack("a close in place of the pointer", "package", no_answer),
    Attack("a pointer said to be elsewhere", "package", in_place_of("text/html", b"", 302, ("Location", "http://127.0.0.1:9/"))),
    Attack("a pointer said not to be there", "package", in_place_of("application/problem+json", b"{}", 404)),
    Attack("a problem without end", "package", in_place_of("application/problem+json", b"x" * (2 << 20), 500)),
    Attack("another protocol in place of the pointer", "package", not_http),
]  # fmt: skip

ATTACKS = [*BUNDLE_ATTACKS, *MANIFEST_ATTACKS, *POINTER_ATTACKS]


# --- what a machine holds


@dataclass(frozen=True)
class Held:
    """A machine as it is found: releases, what `current` names, and what the agent has on record."""

    releases: tuple[str, ...]
    current: str | None
    records: tuple[str, ...] = field(default=())


def held(home: str, root: str) -> Held:
    releases = os.path.join(root, "releases")
    names = sorted(name for name in os.listdir(releases) if not name.startswith(".")) if os.path.isdir(releases) else []
    current = os.path.join(root, "current")
    records = os.path.join(home, "trees")
    return Held(
        tuple(names),
        os.readlink(current) if os.path.lexists(current) else None,
        tuple(sorted(os.listdir(records))) if os.path.isdir(records) else (),
    )


def tree_of(path: str) -> dict[str, tuple[bytes, bool]]:
    """Every file: its bytes, and whether it may be executed."""
    found = {}
    for folder, _, files in os.walk(path):
        for name in files:
            file = os.path.join(folder, name)
            with open(file, "rb") as handle:
                found[os.path.relpath(file, path)] = (handle.read(), bool(os.stat(file).st_mode & stat.S_IXUSR))
    return found
