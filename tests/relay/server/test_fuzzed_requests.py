"""Requests of every route with something in them changed: none is answered with 500, and none breaks off.

What is changed knows the structure: fields of JSON and MessagePack, headers and payloads of bundles with their lengths
and digests made true again, words of paths and queries. Damage that knows nothing is part of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

import msgspec
import pytest
import xxhash
from harness.bundle_kit import bundle, damaged, edited
from harness.packages import Cut, cut_package, noise
from harness.presences import KEYS
from harness.relays import RELAY_LIMITS
from harness.seed import SOAK, chance

from relay.config import RelayConfig
from relay.encoding.bundle import Data, More, Span
from relay.encoding.codecs import ENCODINGS, Coding, encode
from relay.package import manifest as manifests
from relay.package.recipe import encode_recipe, opaque
from relay.protocol import messages
from relay.server import app
from relay.server.http.access import iter_routes

Frames = tuple[tuple[Data | More, bytes], ...]
"""Of a bundle: headers, each with what follows it."""
REQUESTS: Final = 100_000 if SOAK else 1_200
AT_ONCE: Final = 16
SOME_BYTES: Final = 64 << 10
"""Of an answer, which are read; the rest is cut off."""
PATIENCE: Final = 60.0
"""Seconds that a request may take: the longest that a relay lets anything wait, and more."""

HELD = cut_package({"lib/a.dll": noise("a", 90_000), "lib/b.dll": noise("b", 3_000)})
FRESH = cut_package({"lib/a.dll": edited(noise("a", 90_000), 1, 9), "lib/c.dll": noise("c", 5_000)}, version="2.0.0")
CUTS = {cut.manifest.id: cut for cut in (HELD, FRESH)}
DEPLOYMENT = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
LEASE = "0" * 32


@dataclass(frozen=True)
class Call:
    """One request. `body` is what its encoder makes bytes of."""

    method: str
    route: str
    words: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    type: str = ""
    body: Any = None
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def target(self) -> str:
        path = self.route
        for name, word in self.words.items():
            path = path.replace(f"{{{name}}}", quote(word, safe="", errors="surrogatepass"))
        return path + (f"?{urlencode(self.query, errors='surrogatepass')}" if self.query else "")


# --- good requests


def calls() -> list[Call]:
    """One or more for each route, which a relay takes."""
    held, fresh = HELD.manifest, FRESH.manifest
    every = {"manifest": held.id, "ranges": [[0, len(held.chunks)]]}
    name, ref = {"name": "web7"}, {"id": "acme.web", "version": "1.0.0"}
    document = {"manifest": manifests.to_wire(fresh.canonical), "signature": b"envelope"}
    operation = f"{DEPLOYMENT}/step/web7/run/1"
    of = {"manifest": f"sha256:{held.id}"}
    poll = {"presence": KEYS.presence("web7"), "after": {"epoch": "e", "number": 1}, "wait": 0.0}
    orders = {"orders": [{"agent": "web7", "operation": operation, "envelope": b"order"}]}
    reports = {"deployment": DEPLOYMENT, "reports": [{"operation": operation, "number": 1, "envelope": b"report"}]}
    logs = {"deployment": DEPLOYMENT, "pieces": [{"operation": operation, "offset": 0, "data": b"said"}]}
    read = {"deployment": DEPLOYMENT, "epoch": "e", "after": "0", "wait": "0"}
    wanted = {"want": [every], "encodings": list(ENCODINGS), "bases": [every], "goodput": 1e6}
    fetch = {"id": "acme.web", "version": "1.0.0", "manifest": held.id, "source": "http://127.0.0.1:9/", "rate": 1.0}
    recipe = manifests.to_wire(encode_recipe(opaque(held)))
    json, bytes = messages.JSON, messages.NUPKG_TYPE
    return [
        Call("GET", messages.HEALTH, query={"scope": "read"}),
        Call("GET", messages.METRICS),
        Call("PUT", messages.LINE, type="application/octet-stream", body=b"some bytes"),
        Call("GET", messages.LINE, query={"bytes": "10"}),
        Call("PUT", messages.MANIFEST, {"hex": fresh.id}, {}, messages.DOCUMENT_TYPE, document),
        Call(
            "PUT", messages.MANIFEST, {"hex": fresh.id}, {"base": f"sha256:{held.id}"}, messages.DOCUMENT_TYPE, document
        ),
        Call("GET", messages.MANIFEST, {"hex": held.id}, {"base": f"sha256:{held.id}"}),
        Call("POST", messages.MISSING, type=json, body={"want": [every], "lease": LEASE}),
        *[Call("PUT", messages.BUNDLE_IN, {}, {"lease": LEASE}, messages.BUNDLE_TYPE, frames) for frames in bundles()],
        Call("POST", messages.BUNDLE_OUT, type=json, body=wanted),
        Call("GET", messages.PACKAGES),
        Call("GET", messages.PACKAGE_ID, {"id": "acme.web"}),
        Call("GET", messages.PACKAGE, ref),
        Call("PUT", messages.PACKAGE, ref, {}, json, {"manifest": held.id}, (("Prefer", messages.PREFER_MINIMAL),)),
        Call("GET", messages.CHUNK, {"hex": held.chunk_id(0)}),
        Call("GET", messages.NUPKG, ref),
        Call("GET", messages.REBUILD, {"hex": held.nupkg.sha256}),
        Call("PUT", messages.REBUILD, {"hex": held.nupkg.sha256}, of, messages.RECIPE_TYPE, recipe),
        Call("GET", messages.BLOB, {"hex": held.nupkg.sha256}, of),
        Call("PUT", messages.BLOB, {"hex": held.nupkg.sha256}, of, bytes, b"blob"),
        Call("POST", messages.REPLICATIONS, type=json, body=fetch),
        Call("POST", messages.ORDERS, type=json, body=orders),
        Call("POST", messages.POLL, name, type=json, body=poll),
        Call("GET", messages.AGENTS),
        Call("POST", messages.REPORTS_IN, name, type=json, body=reports),
        Call("GET", messages.REPORTS_OUT, query=read),
        Call("POST", messages.LOGS_IN, name, type=json, body=logs),
        Call("GET", messages.LOGS_OUT, query=read),
    ]


def bundles() -> list[Frames]:
    """Frames: each encoding, payloads in one stretch and in some."""
    run, base = (FRESH.manifest, tuple(FRESH.indexes)), (HELD.manifest, tuple(HELD.indexes))
    found: list[Frames] = []
    for encoding in ENCODINGS:
        bases = (Span.of(base[0].id, base[1]),) if encoding in {"zstd-prefix", "hdiff"} else ()
        payload = b"".join(
            encode(Coding(encoding, 0 if encoding == "raw" else 3), FRESH.stream, HELD.stream if bases else b"")
        )
        header = Data((Span.of(run[0].id, run[1]),), bases, encoding, 0, 0)
        cuts = ((), (len(payload) // 2,), (len(payload) // 3, len(payload) - 1))
        found += [in_stretches(header, payload, each) for each in cuts]
    return found


def in_stretches(header: Data, payload: bytes, cuts: tuple[int, ...]) -> Frames:
    pieces = [payload[a:b] for a, b in pairwise([0, *cuts, len(payload)])]
    return made_true([(header, pieces[0]), *((More(0, 0), piece) for piece in pieces[1:])])


def made_true(frames: Sequence[tuple[Data | More, bytes]]) -> Frames:
    """With the lengths and digests of what is carried, and `more` wherever a stretch follows."""
    followed = [i + 1 < len(frames) and isinstance(frames[i + 1][0], More) for i in range(len(frames))]
    return tuple(
        (msgspec.structs.replace(header, length=len(data), xxh3=xxhash.xxh3_64_intdigest(data), more=more), data)
        for (header, data), more in zip(frames, followed, strict=True)
    )


# --- what is changed

ODD_TEXT = (
    "", " ", "\0", "/", "..", "%", "%2e%2e", "a" * 300, "é", "\u202e", "\ud800", "0" * 64, "f" * 64, "sha256:" + "0" * 64,
    HELD.manifest.id, f"sha256:{FRESH.manifest.id}", "-1", "1e999", "nan", "18446744073709551616", "web7", "read",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**53, 2**63 - 1, 2**64 - 1, 1.5, -0.0, 1e308, b"", b"\xff" * 9, [], {}, [[]], [[0, 0]],
    [[0, 1], [0, 1]], [[5, 2]], [[0, 2**62]], [[-1, 1]], {"manifest": HELD.manifest.id, "ranges": [[0, 1]]}, *ODD_TEXT,
)  # fmt: skip


def changed(call: Call, rng: random.Random) -> tuple[Call, bytes]:
    """A request with one to three changes, and the bytes of its body."""
    harms = 0
    for _ in range(rng.randint(1, 3)):
        match rng.randrange(10):
            case 0 if call.words:
                call = replace(call, words=_with_odd_word(call.words, rng))
            case 1:
                call = replace(call, query=_with_odd_word(call.query or {rng.choice(["base", "lease", "x"]): ""}, rng))
            case 2:
                call = replace(call, headers=(*call.headers, rng.choice(ODD_HEADERS)))
            case 3:
                call = replace(call, type=rng.choice(["", messages.JSON, messages.BUNDLE_TYPE, "text/plain;x=y"]))
            case 4 if call.body is None:
                call = replace(call, body=rng.randbytes(rng.randrange(200)))
            case 5 | 6 | 7 | 8 | 9 if isinstance(call.body, tuple):
                call = replace(call, body=with_odd_frame(call.body, rng))
            case 5 | 6 | 7 | 8 | 9 if isinstance(call.body, dict):
                call = replace(call, body=with_odd_value(call.body, rng))
            case _:
                harms += 1
    try:
        raw = to_bytes(call)
    except (TypeError, ValueError, OverflowError):
        # A change that cannot be said in this form.
        raw = b"\xff"
    return call, damaged(raw, rng) if harms else raw


ODD_HEADERS = (
    ("Expect", "100-continue"), ("Expect", "x"), ("Content-Encoding", "gzip"), ("Authorization", "Bearer x"),
    ("Range", "bytes=5-1"), ("If-None-Match", "*"), ("Prefer", "x"), ("Accept-Encoding", "br"), ("X", "y" * 4000),
    ("Connection", "upgrade"), ("Upgrade", "h2c"), ("Cookie", "a=b"), ("Transfer-Encoding", "gzip, chunked"),
)  # fmt: skip


def _with_odd_word(words: Mapping[str, str], rng: random.Random) -> dict[str, str]:
    return dict(words) | {rng.choice(list(words)): rng.choice(ODD_TEXT)}


def with_odd_value(value: Any, rng: random.Random) -> Any:
    """`value` with one place in it, at any depth, changed: replaced, taken out, doubled, or nested deep."""
    inside = (
        list(value.items() if isinstance(value, dict) else enumerate(value)) if isinstance(value, dict | list) else []
    )
    if not inside or rng.random() < 0.2:
        odd = rng.choice(ODD_VALUES)
        for _ in range(rng.choice([0, 0, 0, 1, 20])):
            odd = [odd]
        return odd
    key, inner = rng.choice(inside)
    copy = value.copy()
    way = rng.randrange(8)
    if way == 0:
        del copy[key]
    elif way == 1 and isinstance(copy, list):
        copy.insert(key, inner)
    elif way == 1:
        copy[rng.choice(ODD_TEXT)] = inner
    else:
        copy[key] = with_odd_value(inner, rng)
    return copy


def with_odd_frame(given: Frames, rng: random.Random) -> Frames:
    """Frames lost, doubled, moved, cut at other places, longer or shorter, or with a header that lies."""
    frames = list(given)
    at = rng.randrange(len(frames))
    header, data = frames[at]
    match rng.randrange(7):
        case 0:
            frames[at] = (header, damaged(data, rng))
        case 1:
            frames.append((More(0, 0), rng.randbytes(rng.choice([1, 1, 9]))))
        case 2:
            frames[at] = (header, data + rng.randbytes(rng.choice([1, 1, 9])))
        case 3:
            frames.insert(rng.randrange(len(frames) + 1), frames.pop(at))
        case 4:
            frames.insert(rng.randrange(len(frames) + 1), frames[at])
        case 5:
            cut = rng.randrange(len(data) + 1)
            frames[at : at + 1] = [(header, data[:cut]), (More(0, 0), data[cut:])]
        case _:
            lie = (_lie(made_true(frames)[at][0], rng), data)
            return (*made_true(frames[:at]), lie, *made_true(frames[at + 1 :]))
    return made_true(frames)


def _lie(header: Data | More, rng: random.Random) -> Data | More:
    held, fresh, none = (Span.of(id, [0]) for id in (HELD.manifest.id, FRESH.manifest.id, "0" * 64))
    lies: dict[str, list[Any]] = {
        "run": [(), (fresh,), (fresh, fresh), (held,), (none,), (Span(b"", ((0, 1),)),), (Span(fresh.manifest, ((0, 2**40),)),)],
        "bases": [(), (held,), (fresh,), (none,), (held,) * 9, (Span(held.manifest, ((9, 3),)),)],
        "encoding": [*ENCODINGS, "", "gzip"],
        "length": [0, 1, header.length - 1, header.length + 1, 2**31, 2**63],
        "xxh3": [0, 2**64 - 1],
        "more": [True, False],
    }  # fmt: skip
    name = rng.choice(header.__struct_fields__)
    return msgspec.structs.replace(header, **{name: rng.choice(lies[name])})


def to_bytes(call: Call) -> bytes:
    match call.body:
        case tuple():
            return bundle(list(call.body))
        case bytes() | None:
            return call.body or b""
        case _ if call.type == messages.DOCUMENT_TYPE:
            return msgspec.msgpack.encode(call.body)
        case _:
            return msgspec.json.encode(call.body)


# --- the relay, and how it answers


@dataclass
class World:
    port: int
    lease: str
    routes: set[tuple[str, str]]


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """A relay with a package, an offer under way, and room for little mail."""
    routes: set[tuple[str, str]] = set()
    build = app.RelayApp.build

    def noted(relay: app.RelayApp) -> Any:
        made = build(relay)
        routes.update((route.method, route.path) for route in iter_routes(made))
        return made

    monkeypatch.setattr(app.RelayApp, "build", noted)
    limits = replace(RELAY_LIMITS, connections_per_address=10_000, linger_seconds=0.05, drain_seconds=0.5)
    async with contextlib.AsyncExitStack() as stack:
        config = RelayConfig(listen="127.0.0.1:0", store=f"disk:{tmp_path / 'relay'}")
        running = await app.start(config, limits, stack)
        client = await stack.enter_async_context(_client(running.url))
        await _bring(client, HELD)
        offer = await client.offer(FRESH.manifest, b"", HELD.manifest)
        yield World(running.port, offer.lease, routes)


def _client(url: str) -> Any:
    from harness.relays import CLIENT_LIMITS

    from relay.protocol.client import RelayClient

    return RelayClient(url, limits=CLIENT_LIMITS)


async def _bring(client: Any, cut: Cut) -> None:
    lease = (await client.offer(cut.manifest, b"envelope")).lease
    frames = in_stretches(Data((Span.of(cut.manifest.id, list(cut.indexes)),), (), "raw", 0, 0), cut.stream, ())

    async def body() -> AsyncIterator[bytes]:
        yield bundle(list(frames))

    await client.put_bundle(lease, body())
    await client.publish(cut.manifest)


async def status_of(port: int, call: Call, body: bytes) -> int:
    """Of the answer; 0 where there was none."""
    lines = [f"{call.method} {call.target} HTTP/1.1", "Host: localhost", "Connection: close"]
    lines += [f"Content-Length: {len(body)}"] if body or call.method != "GET" else []
    lines += [f"Content-Type: {call.type}"] if call.type else []
    lines += [f"{name}: {value}" for name, value in call.headers]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with contextlib.suppress(ConnectionError, RuntimeError):
            writer.write("\r\n".join([*lines, "", ""]).encode("utf-8", "surrogatepass") + body)
        async with asyncio.timeout(PATIENCE):
            head = await reader.readline()
            while head.startswith(b"HTTP/1.1 100"):
                await reader.readline()
                head = await reader.readline()
            with contextlib.suppress(ConnectionError):
                await reader.read(SOME_BYTES)
        return int(head.split()[1]) if head.startswith(b"HTTP/1.") else 0
    finally:
        writer.close()


def with_lease(call: Call, lease: str) -> Call:
    """The good requests name no lease that is: the one that this relay gave stands in its place."""
    query = {name: lease if word == LEASE else word for name, word in call.query.items()}
    body = call.body | {"lease": lease} if isinstance(call.body, dict) and "lease" in call.body else call.body
    return replace(call, query=query, body=body)


async def test_the_requests_that_are_changed_are_good_ones_and_of_every_route(world: World) -> None:
    known = [with_lease(call, world.lease) for call in calls()]
    assert {(call.method, call.route) for call in known} == {route for route in world.routes if route[0] != "HEAD"}
    statuses = {(call.method, call.target): await status_of(world.port, call, to_bytes(call)) for call in known}
    # No nupkg can be made of chunks without a zip, and none was brought; its own peer it is not.
    lacking = {key for key, status in statuses.items() if status >= 300}
    assert {key[1].partition("?")[0].rpartition("/")[2] for key in lacking} <= {
        "nupkg",
        f"sha256:{HELD.manifest.nupkg.sha256}",
    }


async def test_no_request_whatever_it_holds_is_answered_with_500(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("ERROR")
    good, rng = [with_lease(call, world.lease) for call in calls()], chance("requests")
    seen: Counter[int] = Counter()

    async def work(count: int) -> None:
        for _ in range(count):
            call, body = changed(rng.choice(good), rng)
            status = await status_of(world.port, call, body)
            seen[status] += 1
            assert status != 500, f"{call} with {body[:2000]!r}"

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(work(REQUESTS // AT_ONCE))

    print(dict(sorted(seen.items())))
    assert seen[200] > REQUESTS // 50, "hardly anything was taken: what is changed is no longer good"
    assert seen[400] > REQUESTS // 50
    assert seen[0] < REQUESTS // 50, "many requests were not answered"
    assert not [record for record in caplog.records if record.exc_info], caplog.text
