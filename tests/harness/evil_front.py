"""A relay that is evil as a whole: an honest one stands behind it, and it spoils one kind of answer in one way.

It takes part in everything (packages, uploads, mail), so whole releases run over it. Ways are data: a new one is a line in
`WAYS`. `played` proves that a way took place.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import threading
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import msgspec

from harness.evil_relay import bundle_of, frames_of, not_http
from relay.encoding.bundle import Data, Missing
from relay.protocol import messages

_BODY_MAX = 1 << 30


@dataclass(frozen=True)
class Asked:
    """One request."""

    kind: str
    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    @property
    def seconds(self) -> float:
        """How long it may be kept waiting."""
        if self.kind == "poll":
            return msgspec.json.decode(self.body, type=messages.PollRequest).wait
        query = parse_qs(urlsplit(self.target).query)
        return float(query.get("wait", ["0"])[0])


@dataclass(frozen=True)
class Said:
    """One honest answer."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def head(self, *framing: str) -> bytes:
        lines = [f"HTTP/1.1 {self.status} -", *(f"{name}: {value}" for name, value in self.headers), *framing]
        return "\r\n".join([*lines, "", ""]).encode()

    @property
    def whole(self) -> bytes:
        return self.head(f"Content-Length: {len(self.body)}") + self.body

    def json(self, type: Any) -> Any:
        return msgspec.json.decode(self.body, type=type)


@dataclass
class Scene:
    """What a way has at hand while it answers one request."""

    asked: Asked
    ask: Callable[[Asked], Awaitable[Said]]
    """The honest relay behind."""
    send: Callable[[bytes], Awaitable[None]]
    kept: dict[str, Any]
    """What it remembers from one request to the next."""

    async def honest(self) -> Said:
        return await self.ask(self.asked)

    async def say(self, document: object) -> None:
        """An answer in JSON."""
        body = msgspec.json.encode(document)
        await self.send(Said(200, (("Content-Type", messages.JSON),), body).whole)


@dataclass(frozen=True)
class Way:
    """How it is evil."""

    name: str
    on: str
    """Kinds of requests that are answered so, parted by spaces; `all` is every one."""
    play: Callable[[Scene], Awaitable[None]]
    ends_alone: str = ""
    """What is said of it where it is the only relay; empty where a release succeeds all the same."""

    def __str__(self) -> str:
        return self.name

    def meets(self, asked: Asked) -> bool:
        return self.on == "all" or asked.kind in self.on.split()


def kind_of(method: str, target: str) -> str:
    """A word for what is asked."""
    path = urlsplit(target).path
    match path.strip("/").split("/"):
        case ["metrics"]:
            return "metrics"
        case ["v1", "agents", _, what]:
            return {"poll": "poll", "reports": "report", "logs": "output"}[what]
        case ["v1", "packages", _, _]:
            return "package" if method == "GET" else "publish"
        case ["v1", "manifests", _]:
            return "manifest" if method == "GET" else "offer"
        case ["v1", "bundle"]:
            return "bundle" if method == "POST" else "upload"
        case ["v1", what, *_]:
            return what
    return "other"


class EvilFront:
    """Use as a context manager; it lives in a thread of its own.

    `way` may be changed at any time: it takes hold of requests that are kept waiting, too. So what turns evil meets the poll
    of every agent that is there.
    """

    def __init__(self, port: int, way: Way | None = None) -> None:
        """`port`: of the honest relay, on loopback."""
        self._way = way
        self._turned = asyncio.Event()
        """Replaced where the way is another one."""
        self.played = 0
        self.counts: dict[str, int] = {}
        """Requests, by kind."""
        self.in_hand: list[Asked] = []
        """Requests that are not answered yet."""
        self._behind = port
        self._kept: dict[str, Any] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self.start(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self.stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def start(self) -> int:
        """Listen in the running loop, for who is in it already; the port."""
        self._serving_in = asyncio.get_running_loop()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._serving: set[asyncio.Task[None]] = set()
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self.port

    async def stop(self) -> None:
        self._server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def way(self) -> Way | None:
        return self._way

    @way.setter
    def way(self, way: Way | None) -> None:
        self._way = way
        self._serving_in.call_soon_threadsafe(self._turn)

    def _turn(self) -> None:
        self._turned.set()
        self._turned = asyncio.Event()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def send(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            while (asked := await _read_request(reader)) is not None:
                self.counts[asked.kind] = self.counts.get(asked.kind, 0) + 1
                self.in_hand.append(asked)
                try:
                    await self._answer(asked, send)
                finally:
                    self.in_hand.remove(asked)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._serving.discard(task)
            writer.close()

    async def _answer(self, asked: Asked, send: Callable[[bytes], Awaitable[None]]) -> None:
        while True:
            way, turned = self._way, self._turned
            if way is not None and way.meets(asked):
                self.played += 1
                return await way.play(Scene(asked, self._ask, send, self._kept))
            if (said := await self._honest(asked, turned)) is not None:
                return await send(said.whole)

    async def _honest(self, asked: Asked, turned: asyncio.Event) -> Said | None:
        """None where it was still kept waiting when the way became another one."""
        if not asked.seconds:
            return await self._ask(asked)
        answer, turn = asyncio.create_task(self._ask(asked)), asyncio.create_task(turned.wait())
        try:
            await asyncio.wait({answer, turn}, return_when=asyncio.FIRST_COMPLETED)
            return answer.result() if answer.done() else None
        finally:
            answer.cancel()
            turn.cancel()

    async def _ask(self, asked: Asked) -> Said:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._behind, limit=1 << 20)
        try:
            kept = [(n, v) for n, v in asked.headers if n.lower() not in _OF_A_HOP]
            head = [f"{asked.method} {asked.target} HTTP/1.1", *(f"{name}: {value}" for name, value in kept)]
            head += ["Connection: close", f"Content-Length: {len(asked.body)}", "", ""]
            writer.write("\r\n".join(head).encode() + asked.body)
            await writer.drain()
            return await _read_answer(reader)
        finally:
            writer.close()


_OF_A_HOP = {"connection", "content-length", "transfer-encoding", "expect"}


async def _read_head(reader: asyncio.StreamReader) -> tuple[str, list[tuple[str, str]]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
    return first, [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]


async def _read_request(reader: asyncio.StreamReader) -> Asked | None:
    try:
        first, headers = await _read_head(reader)
    except asyncio.IncompleteReadError:
        return None
    method, target, _ = first.split(" ")
    return Asked(kind_of(method, target), method, target, tuple(headers), await _read_body(reader, headers, "0"))


async def _read_answer(reader: asyncio.StreamReader) -> Said:
    first, headers = await _read_head(reader)
    body = await _read_body(reader, headers, "")
    return Said(int(first.split(" ")[1]), tuple((n, v) for n, v in headers if n.lower() not in _OF_A_HOP), body)


async def _read_body(reader: asyncio.StreamReader, headers: Iterable[tuple[str, str]], size: str) -> bytes:
    """`size`: where no header says it; empty: until the end."""
    named = {name.lower(): value for name, value in headers}
    if named.get("transfer-encoding", "").lower() != "chunked":
        size = named.get("content-length", size)
        return await (reader.readexactly(int(size)) if size else reader.read())
    pieces = []
    while length := int(await reader.readuntil(b"\r\n"), 16):
        pieces.append((await reader.readexactly(length + 2))[:-2])
    await reader.readexactly(2)
    return b"".join(pieces)


# --- ways to treat any answer


async def hang(scene: Scene) -> None:
    """As a process that is stopped: it takes what is sent, and says nothing."""
    await asyncio.sleep(3600)


async def close(scene: Scene) -> None:
    raise ConnectionError


async def break_off(scene: Scene) -> None:
    """The connection ends in the middle."""
    said = await scene.honest()
    await scene.send(said.whole[: len(said.head()) + len(said.body) // 2])
    raise ConnectionError


async def refuse(scene: Scene) -> None:
    await scene.send(Said(500, (("Content-Type", "application/problem+json"),), b'{"code":"internal"}').whole)


async def speak_something_else(scene: Scene) -> None:
    await not_http(None, None, scene.send)  # type: ignore[arg-type]
    raise ConnectionError


def trickle(at: float, bytes_per_second: int) -> Callable[[Scene], Awaitable[None]]:
    """The honest answer; from some share of it on, so slowly."""

    async def play(scene: Scene) -> None:
        said = await scene.honest()
        start = int(len(said.body) * at)
        await scene.send(said.head(f"Content-Length: {len(said.body)}") + said.body[:start])
        step = max(1, bytes_per_second // 10)
        for begin in range(start, len(said.body), step):
            await scene.send(said.body[begin : begin + step])
            await asyncio.sleep(0.1)

    return play


async def all_but_the_end(scene: Scene) -> None:
    said = await scene.honest()
    await scene.send(said.head(f"Content-Length: {len(said.body)}") + said.body[:-30])
    await asyncio.sleep(3600)


# --- ways with bundles


def _frames(change: Callable[[Data, bytes], tuple[Data, bytes]]) -> Callable[[Scene], Awaitable[None]]:
    """Another first frame, in a bundle that is right in itself."""

    async def play(scene: Scene) -> None:
        said = await scene.honest()
        found = frames_of(said.body)
        at = next((at for at, (header, _) in enumerate(found) if isinstance(header, Data)), None)
        if at is not None:
            header, payload = found[at]
            assert isinstance(header, Data)
            found[at] = change(header, payload)
        await scene.send(replace(said, body=bundle_of(found)).whole)

    return play


def _on_itself(header: Data, payload: bytes) -> tuple[Data, bytes]:
    return msgspec.structs.replace(header, bases=header.run, encoding="zstd-prefix"), payload


async def always_arriving(scene: Scene) -> None:
    said = await scene.honest()
    run = tuple(span for header, _ in frames_of(said.body) if isinstance(header, Data) for span in header.run)
    await asyncio.sleep(0.05)
    await scene.send(replace(said, body=bundle_of([(Missing(run, "arriving"), b"")])).whole)


# --- ways with mail


async def replay_letters(scene: Scene) -> None:
    """At once, whatever was brought before."""
    request = msgspec.json.decode(scene.asked.body, type=messages.PollRequest)
    asked = replace(scene.asked, body=msgspec.json.encode(msgspec.structs.replace(request, wait=0.0)))
    answer = (await scene.ask(asked)).json(messages.PollAnswer)
    known = scene.kept.setdefault(scene.asked.target, {})
    known.update((letter.envelope, letter) for letter in answer.orders)
    scene.kept["number"] = number = scene.kept.get("number", 1000) + 1000
    letters = [msgspec.structs.replace(each, number=number + n) for n, each in enumerate(known.values())]
    await scene.say(messages.PollAnswer(answer.epoch, tuple(letters[-messages.LETTERS_MAX :])))


def at_once(make: Callable[[Scene], object]) -> Callable[[Scene], Awaitable[None]]:
    async def play(scene: Scene) -> None:
        await scene.say(make(scene))

    return play


def _another_epoch(scene: Scene) -> messages.PollAnswer:
    return messages.PollAnswer(os.urandom(16).hex(), ())


def _last_number(scene: Scene) -> messages.PollAnswer:
    return messages.PollAnswer("e", (messages.NumberedOrder((1 << 53) - 1, "x", b"no letter"),))


def _forged(scene: Scene) -> messages.PollAnswer:
    noise = (os.urandom(200) for _ in range(20))
    number = random.randrange(1 << 40)
    orders = (messages.NumberedOrder(number + n, f"operation-{number}-{n}", each) for n, each in enumerate(noise))
    return messages.PollAnswer("e", tuple(orders))


def _taken(scene: Scene) -> messages.TakenAnswer:
    """Nothing is passed on."""
    body = msgspec.json.decode(scene.asked.body)
    return messages.TakenAnswer(len(body.get("reports") or body.get("pieces") or body.get("orders")))


async def alter_reports(scene: Scene) -> None:
    request = msgspec.json.decode(scene.asked.body, type=messages.ReportsRequest)
    reports = [msgspec.structs.replace(each, envelope=each.envelope.replace(b'"', b"'", 1)) for each in request.reports]
    body = msgspec.json.encode(msgspec.structs.replace(request, reports=tuple(reports)))
    await scene.send((await scene.ask(replace(scene.asked, body=body))).whole)


def _no_reports(scene: Scene) -> messages.ReportsAnswer:
    return messages.ReportsAnswer("e")


def _no_agents(scene: Scene) -> messages.AgentsAnswer:
    return messages.AgentsAnswer(())


_LATE = r"\(acquire: deadline\), so no step began: web1: .*; web2: "
"""It names who is waited for."""
_UNSEEN = "not every machine can be given orders: web1: "
WAYS = [
    Way("a base that was never offered", "bundle", _frames(_on_itself), "never offered"),
    Way("a trickle just above the minimum rate", "bundle", trickle(0.0, 1200), _LATE),
    Way("a trickle after two thirds", "bundle", trickle(0.67, 1200), _LATE),
    Way("a bundle that is silent", "bundle", hang, _LATE),
    Way("a bundle that has everything but its end", "bundle", all_but_the_end),
    Way("chunks that arrive for ever", "bundle", always_arriving, _LATE),
    Way("bundles that break off", "bundle", break_off, _LATE),
    Way("bundles refused", "bundle", refuse, _LATE),
    Way("a manifest that is silent", "manifest", hang, _LATE),
    Way("a manifest that trickles", "manifest", trickle(0.0, 1200)),
    Way("polls answered at once with letters of before", "poll", replay_letters),
    Way("polls answered at once in another epoch", "poll", at_once(_another_epoch), _LATE),
    Way("polls answered at once with the last of all numbers", "poll", at_once(_last_number), _LATE),
    Way("polls answered at once with forged letters", "poll", at_once(_forged), _LATE),
    Way("polls answered at once with nothing", "poll", at_once(lambda _: messages.PollAnswer("e")), _LATE),
    Way("polls refused", "poll", refuse, _LATE),
    Way("reports taken and kept", "report", at_once(_taken), _LATE),
    Way("reports altered", "report", alter_reports, _LATE),
    Way("reports without an answer", "report", hang, _LATE),
    Way("reports hidden from their readers", "reports", at_once(_no_reports), _LATE),
    Way("output taken and kept", "output", at_once(_taken)),
    Way("output without an answer", "output", hang),
    Way("orders taken and kept", "orders", at_once(_taken), _LATE),
    Way("orders without an answer", "orders", hang, _LATE),
    Way("agents that were never seen", "agents", at_once(_no_agents), _UNSEEN),
    Way("agents without an answer", "agents", hang, _UNSEEN),
    Way("offers without an answer", "offer", hang, _LATE),
    Way("uploads without an answer", "upload", hang, _LATE),
    Way("health without an answer", "health", hang),
    Way("everything without an answer", "all", hang, _UNSEEN),
    Way("everything refused", "all", refuse, _UNSEEN),
    Way("everything broken off", "all", close, _UNSEEN),
    Way("another protocol", "all", speak_something_else, _UNSEEN),
]  # fmt: skip


def way(name: str) -> Way:
    return next(each for each in WAYS if each.name == name)


def mutations(chance: random.Random, kinds: Iterable[str]) -> Way:
    """A way that is drawn: every answer of these kinds is changed in a few places, each time in others."""

    async def play(scene: Scene) -> None:
        said = await scene.honest()
        await scene.send(replace(said, body=mutated(chance, said.body)).whole)

    named = " ".join(kinds)
    return Way(f"mutations of {named}", named, play)


def mutated(chance: random.Random, data: bytes) -> bytes:
    """One to four changes: of bits and bytes, of stretches, of numbers and words in JSON."""
    for _ in range(chance.randint(1, 4)):
        if not data:
            return chance.randbytes(8)
        data = chance.choice(_STEPS)(chance, data)
    return data


def _stretch(chance: random.Random, data: bytes) -> tuple[int, int]:
    start = chance.randrange(len(data))
    return start, min(len(data), start + chance.randrange(1, 300))


def _flip(chance: random.Random, data: bytes) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]


def _insert(chance: random.Random, data: bytes) -> bytes:
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.randbytes(chance.randrange(1, 9)) + data[at:]


def _delete(chance: random.Random, data: bytes) -> bytes:
    start, end = _stretch(chance, data)
    return data[:start] + data[end:]


def _double(chance: random.Random, data: bytes) -> bytes:
    start, end = _stretch(chance, data)
    return data[:end] + data[start:]


def _cut(chance: random.Random, data: bytes) -> bytes:
    return data[: chance.randrange(len(data))]


def _other_number(chance: random.Random, data: bytes) -> bytes:
    found = list(re.finditer(rb"-?[0-9]+(\.[0-9]+)?", data))
    if not found:
        return _flip(chance, data)
    at = chance.choice(found)
    return data[: at.start()] + chance.choice(_NUMBERS) + data[at.end() :]


def _other_word(chance: random.Random, data: bytes) -> bytes:
    """One string of the answer, or something that is none, in place of another."""
    found = list(re.finditer(rb'"[^"\\]*"', data))
    if not found:
        return _insert(chance, data)
    at, words = chance.choice(found), [*(each[0] for each in found), *_WORDS]
    return data[: at.start()] + chance.choice(words) + data[at.end() :]


_STEPS = (_flip, _insert, _delete, _double, _cut, _other_number, _other_word)
_NUMBERS = (b"0", b"-1", b"9007199254740991", b"9223372036854775808", b"1e308", b"1e999", b"0.5", b"9" * 5000)
_WORDS = (b'""', b"null", b"[]", b"{}", b"true", b'"\\u0000"', b'"\\u202e"', b'"' + b"A" * 300 + b'"', b"1")
