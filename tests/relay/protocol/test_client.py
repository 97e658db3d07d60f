from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import pytest
from aiohttp import web
from harness.dns import FixedNames
from harness.packages import cut_package, encode_run, noise
from harness.relays import CLIENT_LIMITS, running_relay, small_server, token

from relay.encoding.bundle import BundleWriter, Data, Received, Span, Whole, data_header
from relay.encoding.choose_bases import Held
from relay.errors import (
    ConflictError,
    FrameError,
    ManifestError,
    NotFoundError,
    RefusedError,
    StoreError,
    UnreachableError,
    UntrustedError,
    UsageError,
)
from relay.package import manifest as manifests
from relay.package.identity import NuGetVersion, PackageId
from relay.protocol import messages
from relay.protocol.client import RelayClient
from relay.protocol.connection import (
    ClientLimits,
    LeaseLostError,
    MissingChunksError,
    TokenRefusedError,
    TooSlowError,
)
from relay.protocol.credentials import token_from
from relay.stores.memory import MemoryChunks

CUT = cut_package({f"lib/{i}.dll": noise(i, 70_000 + i) for i in range(4)} | {"readme.txt": b"text " * 500})
MANIFEST = CUT.manifest
NEXT = cut_package({f"lib/{i}.dll": noise(i, 70_000 + i) for i in range(4)} | {"readme.txt": b"new"}, version="1.0.1")
REBUILT = cut_package({"lib/0.dll": noise("other", 70_000)})
HURRY = replace(CLIENT_LIMITS, answer_seconds=0.3, window_seconds=0.3, window_bytes=1000, attempts=1)
PATIENCE = 30.0


def run_of(places, cut=CUT):
    encoding, payload = encode_run([cut.chunk(i).data for i in places], "zstd")
    return data_header((Span.of(cut.manifest.id, places),), encoding, payload), payload


def bundle(*parts) -> bytes:
    writer = BundleWriter()
    made = [writer.start()]
    for head, payload in parts:
        made += [writer.frame(head), payload]
    return b"".join([*made, writer.end()])


async def pieces(data: bytes, size: int = 50_000):
    for at in range(0, len(data), size):
        yield data[at : at + size]


async def bring(client, cut=CUT, base=None):
    offer = await client.offer(cut.manifest, b"envelope", base)
    if offer.missing:
        await client.put_bundle(offer.lease, pieces(bundle(run_of(list(cut.indexes), cut))))
    await client.publish(cut.manifest)


async def received(client, indexes, manifest=MANIFEST):
    async with asyncio.timeout(PATIENCE):
        return [event async for event in client.stream(manifest, indexes)]


@pytest.fixture
async def relay(tmp_path):
    async with running_relay(tmp_path / "relay", site="north") as running:
        yield running


@pytest.fixture
async def client(relay):
    async with relay.client() as made:
        yield made


# --- with a real relay


async def test_health_tells_versions_site_and_rates(client):
    answer = await client.health()
    assert (answer.status, answer.site) == ("ok", "north")
    assert messages.VERSION in answer.versions
    assert answer.cpu.sha256 > 0


async def test_a_package_goes_there_and_comes_back_verified(client):
    await bring(client)
    pointer = await client.package(MANIFEST.package.id, MANIFEST.package.version)
    assert (pointer.manifest, pointer.signature, pointer.size) == (MANIFEST.id, b"envelope", MANIFEST.nupkg.size)
    assert await client.packages() == await client.packages(MANIFEST.package.id) == [pointer]
    document = await client.manifest(MANIFEST.id)
    assert (document.manifest.canonical, document.signature) == (MANIFEST.canonical, b"envelope")
    events = await received(client, [3, 0, 1])
    assert [event.index for event in events[:-1]] == [3, 0, 1]
    assert all(event.chunk.id == MANIFEST.chunk_id(event.index) for event in events[:-1])
    assert events[-1] == Whole(3)


async def test_what_is_not_there_is_not_found(client):
    await client.health()
    with pytest.raises(NotFoundError, match=r"Acme\.Web 1\.0\.0"):
        await client.package(MANIFEST.package.id, MANIFEST.package.version)
    with pytest.raises(NotFoundError):
        await client.manifest(MANIFEST.id)
    with pytest.raises(NotFoundError):
        await received(client, [0])
    assert await client.packages(PackageId.parse("Nothing")) == []


async def test_a_manifest_as_a_difference_costs_little_both_ways(relay, client):
    many = {f"content/{i}.txt": noise(i, 200) for i in range(300)} | {f"{i}.dll": noise(i, 66_000) for i in range(20)}
    old, new = cut_package(many), cut_package(many | {"content/7.txt": b"new"}, version="1.0.1")
    await bring(client, old)
    async with relay.client() as whole, relay.client() as difference:
        await whole.offer(new.manifest, b"")
        await difference.offer(new.manifest, b"", old.manifest)
        assert difference.traffic.sent < whole.traffic.sent / 5
    async with relay.client() as whole, relay.client() as difference:
        assert (await whole.manifest(new.manifest.id)).manifest.canonical == new.manifest.canonical
        assert (await difference.manifest(new.manifest.id, old.manifest)).manifest.canonical == new.manifest.canonical
        assert difference.traffic.received < whole.traffic.received / 5


async def test_a_base_that_the_relay_does_not_hold_is_no_harm_in_asking(client):
    await bring(client)
    assert (await client.manifest(MANIFEST.id, NEXT.manifest)).manifest.id == MANIFEST.id


async def test_publishing_too_early_names_what_is_missing(client):
    offer = await client.offer(MANIFEST, b"")
    await client.put_bundle(offer.lease, pieces(bundle(run_of([0, 1]))))
    with pytest.raises(MissingChunksError) as caught:
        await client.publish(MANIFEST)
    assert caught.value.missing == ((2, len(MANIFEST.chunks)),)
    answer = await client.missing([messages.ChunkRanges(manifest=MANIFEST.id, ranges=((0, 3),))], offer.lease)
    assert answer == messages.MissingAnswer((messages.ChunkRanges(manifest=MANIFEST.id, ranges=((2, 3),)),))


async def test_a_manifest_that_the_relay_does_not_keep_is_told_as_unknown(client):
    await bring(client)
    asked = [messages.ChunkRanges(manifest=id, ranges=((0, 3),)) for id in (MANIFEST.id, NEXT.manifest.id)]
    assert (await client.missing(asked)).unknown == (NEXT.manifest.id,)


async def test_other_bytes_under_the_same_name_are_a_conflict(client):
    await bring(client)
    with pytest.raises(ConflictError, match="other bytes"):
        await client.offer(REBUILT.manifest, b"")


async def test_a_lease_that_is_not_known_is_told_as_lost(client):
    await client.offer(MANIFEST, b"")
    for lease in ("0" * 32, "junk"):
        with pytest.raises(LeaseLostError):
            await client.put_bundle(lease, pieces(bundle(run_of([0]))))
    ask = [messages.ChunkRanges(manifest=MANIFEST.id, ranges=((0, 1),))]
    with pytest.raises(LeaseLostError):
        await client.missing(ask, "0" * 32)


async def test_an_error_of_the_bundles_own_source_comes_out_as_itself(client):
    offer = await client.offer(MANIFEST, b"")

    async def failing():
        yield bundle(run_of([0]))[:1000]
        raise StoreError("the depot's disk")

    with pytest.raises(StoreError, match="the depot's disk"):
        await client.put_bundle(offer.lease, failing())


@pytest.mark.parametrize("full", [True, False])
async def test_a_store_that_fails_under_an_upload_is_told_and_reading_goes_on(monkeypatch, full):
    """507 asks to come back much later; 500 is the medium. Nobody who reads meanwhile is stuck."""
    failed = []

    async def put_many(self, chunks):
        failed.append(len(chunks))
        raise StoreError("the medium", full=full)

    async with running_relay("memory:") as relay, relay.client() as client:
        await bring(client, NEXT)
        lease = (await client.offer(MANIFEST, b"")).lease
        with monkeypatch.context() as patch:
            patch.setattr(MemoryChunks, "put_many", put_many)
            with pytest.raises(UnreachableError) as caught:
                await client.put_bundle(lease, pieces(bundle(run_of([4]))))
            assert failed
            assert len(await received(client, [0, 1], NEXT.manifest)) == 3
        assert (caught.value.retry_after or 0.0) >= 60.0 or not full
        await bring(client)
        assert len(await received(client, list(CUT.indexes))) == len(CUT.indexes) + 1


async def test_what_the_client_counts_is_what_crossed_the_line(client):
    await bring(client)
    assert client.traffic.sent > 4 * 70_000
    before = client.traffic.received
    await received(client, list(CUT.indexes))
    payloads = len(bundle(run_of(list(CUT.indexes))))
    assert payloads < client.traffic.received - before < payloads + 4000


async def test_a_connection_serves_many_requests(client, monkeypatch):
    """Also bundles: a client that read its bundle to the end does not connect anew."""
    made = 0
    connect = asyncio.get_running_loop().create_connection

    async def counting(*args, **options):
        nonlocal made
        made += 1
        return await connect(*args, **options)

    await client.health()
    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", counting, raising=False)
    await bring(client)
    for _ in range(5):
        await received(client, [0, 1])
    assert made <= 1


async def test_leaving_a_stream_early_ends_the_request(client):
    await bring(client)
    stream = client.stream(MANIFEST, [0, 1, 2])
    assert isinstance(await anext(stream), Received)
    await stream.aclose()
    assert len(await received(client, [0])) == 2


async def test_a_stream_that_is_cancelled_is_cancelled(client):
    """No chunk that waits inside may swallow it."""
    await client.offer(MANIFEST, b"")  # all chunks are arriving now: the relay makes the reader wait

    async def read():
        async for _ in client.stream(MANIFEST, [0, 1]):
            pass

    task = asyncio.create_task(read())
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(PATIENCE):
            await task


async def test_tokens_are_asked_for_and_scopes_kept(tmp_path):
    write, record = token("write")
    agent, other = token("agent")
    async with running_relay(tmp_path / "relay", tokens=[record, other]) as relay:
        async with relay.client(write) as client:
            await bring(client)
        for bearer, match in (
            (None, "wants a token"),
            (agent, "refuses this token"),
            ("wst_nonsense", "refuses this token"),
        ):
            async with relay.client(bearer) as client:
                with pytest.raises(TokenRefusedError, match=match):
                    await client.offer(NEXT.manifest, b"")
        async with relay.client(agent) as client:
            assert len(await received(client, [0])) == 2
        async with relay.client() as client:
            assert (await client.health()).status == "ok"


async def test_wait_until_ready_waits_for_a_relay_that_comes_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    async with RelayClient(f"http://127.0.0.1:{port}", limits=CLIENT_LIMITS) as client:
        waiting = asyncio.create_task(client.wait_until_ready(PATIENCE))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        async with running_relay(tmp_path / "relay", port=port):
            await waiting
        with pytest.raises(UnreachableError):
            await client.wait_until_ready(0.5)


async def test_a_connection_goes_where_the_name_leads_under_the_relays_name():
    seen = []

    async def health(request):
        seen.append(request.headers["Host"])
        return healthy()

    async with small_server([web.get(messages.HEALTH, health)]) as url:
        port = url.rpartition(":")[2]
        async with RelayClient(
            f"http://relay.example:{port}", names=FixedNames("127.0.0.1"), limits=CLIENT_LIMITS
        ) as client:
            await client.health()
    assert seen == [f"relay.example:{port}"]


@pytest.mark.parametrize("allowed", [False, True])
async def test_no_token_goes_over_plain_http_to_a_relay_that_is_not_named(allowed):
    """The name leads to this machine, but that is only what a name server says."""
    seen = []

    async def health(request):
        seen.append(request.headers.get("Authorization"))
        return healthy() if seen[-1] else web.Response(status=401)

    async with small_server([web.get(messages.HEALTH, health)]) as url:
        far = url.replace("127.0.0.1", "relay.example")
        how = {"token": "wst_secret", "names": FixedNames("127.0.0.1"), "limits": CLIENT_LIMITS, "plain_http": allowed}
        async with RelayClient(far, **how) as client:
            if allowed:
                await client.health()
            else:
                with pytest.raises(TokenRefusedError, match="none is sent over plain http") as caught:
                    await client.health()
                assert "plain_http" in caught.value.hint
    assert seen == ["Bearer wst_secret" if allowed else None]


async def test_a_token_that_is_replaced_while_it_is_refused_is_read_again_at_once(tmp_path):
    file, seen = tmp_path / "token", []
    file.write_text("old")

    async def health(request):
        seen.append(request.headers["Authorization"])
        file.write_text("new")
        return healthy() if seen[-1] == "Bearer new" else web.Response(status=401)

    async with (
        small_server([web.get(messages.HEALTH, health)]) as url,
        RelayClient(url, token=token_from(str(file)), limits=CLIENT_LIMITS) as client,
    ):
        await client.health()
    assert seen == ["Bearer old", "Bearer new"]


async def test_a_token_that_stays_as_it_is_is_not_shown_twice(tmp_path):
    file, seen = tmp_path / "token", []
    file.write_text("old")

    async def health(request):
        seen.append(request.headers["Authorization"])
        return web.Response(status=401)

    async with (
        small_server([web.get(messages.HEALTH, health)]) as url,
        RelayClient(url, token=token_from(str(file)), limits=CLIENT_LIMITS) as client,
    ):
        with pytest.raises(TokenRefusedError, match="unknown, revoked or has ended"):
            await client.health()
    assert seen == ["Bearer old"]


async def test_where_something_else_accepts_connections_the_next_try_goes_to_another_address():
    """A stale address is somebody else's by now."""

    async def close(_reader, writer):
        writer.close()

    async with small_server([web.get(messages.HEALTH, answering(lambda _: healthy()))]) as url:
        port = int(url.rpartition(":")[2])
        async with await asyncio.start_server(close, "127.0.0.2", port):
            stale_first = FixedNames("127.0.0.2", "127.0.0.1")
            async with RelayClient(f"http://relay.test:{port}", names=stale_first, limits=CLIENT_LIMITS) as client:
                assert (await client.health()).status == "ok"


# --- with relays that misbehave


def healthy():
    answer = messages.HealthAnswer(status="ok", versions=(1,), time=0.0)
    return web.Response(body=msgspec.json.encode(answer), content_type=messages.JSON)


@contextlib.asynccontextmanager
async def misbehaving(path, handler, limits=CLIENT_LIMITS, **options):
    async with (
        small_server([web.route("*", path, handler)]) as url,
        RelayClient(url, limits=limits, **options) as client,
    ):
        async with asyncio.timeout(PATIENCE):
            yield client


def answering(response):
    async def handler(request):
        await request.read()
        made = response(request)
        return await made if asyncio.iscoroutine(made) else made

    return handler


async def forever(request, piece, pause=0.0, content_type=messages.JSON):
    response = web.StreamResponse(headers={"Content-Type": content_type})
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        while True:
            await response.write(piece)
            await asyncio.sleep(pause)
    return response


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(status):
    followed = []

    async def other(request):
        followed.append(request.path)
        return healthy()

    handler = answering(lambda _: web.Response(status=status, headers={"Location": "/other"}))
    async with (
        small_server([web.get(messages.HEALTH, handler), web.get("/other", other)]) as url,
        RelayClient(url, limits=CLIENT_LIMITS) as client,
    ):
        with pytest.raises(RefusedError):
            await client.health()
    assert followed == []


async def test_503_with_retry_after_is_tried_again_after_that_time():
    seen = []

    def busy_once(_request):
        seen.append(asyncio.get_running_loop().time())
        return web.Response(status=503, headers={"Retry-After": "1"}) if len(seen) == 1 else healthy()

    async with misbehaving(messages.HEALTH, answering(busy_once)) as client:
        assert (await client.health()).status == "ok"
    assert len(seen) == 2
    assert seen[1] - seen[0] >= 1.0


@pytest.mark.parametrize("after", ["2", None, "soon", "-5", "inf", "nan"])
async def test_a_relay_that_stays_busy_is_unreachable_with_its_own_word_of_when(after):
    headers = {"Retry-After": after} if after else {}
    handler = answering(lambda _: web.Response(status=503, headers=headers))
    async with misbehaving(messages.HEALTH, handler, replace(CLIENT_LIMITS, attempts=1)) as client:
        with pytest.raises(UnreachableError) as caught:
            await client.health()
    if after == "2":
        assert caught.value.retry_after == 2.0
    else:
        assert caught.value.retry_after is None or 0.0 <= caught.value.retry_after <= 3600.0


@pytest.mark.parametrize("status", [400, 404, 409, 413])
async def test_a_refusal_is_not_tried_again(status):
    seen = []

    def refuse(_request):
        seen.append(1)
        return web.Response(status=status)

    async with misbehaving(messages.HEALTH, answering(refuse)) as client:
        with pytest.raises(RefusedError):
            await client.health()
    assert len(seen) == 1


async def test_401_wants_a_token():
    async with misbehaving(messages.HEALTH, answering(lambda _: web.Response(status=401))) as client:
        with pytest.raises(TokenRefusedError, match="wants a token"):
            await client.health()


async def test_a_token_goes_into_the_header_and_nowhere_else():
    seen = {}

    def note(request):
        seen.update(auth=request.headers.get("Authorization"), path=request.raw_path)
        return healthy()

    async with misbehaving(messages.HEALTH, answering(note), token="secret-token") as client:
        await client.health()
    assert seen == {"auth": "Bearer secret-token", "path": messages.HEALTH}


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>log in here</html>", b"[" * 100_000, b'{"status":"ok"}', b'{"status":"odd"}', b"\xff\xfe", b"null"],
)
async def test_an_answer_that_is_not_the_protocols_is_untrusted(body):
    async with misbehaving(messages.HEALTH, answering(lambda _: web.Response(body=body))) as client:
        with pytest.raises(UntrustedError):
            await client.health()


async def test_endless_json_is_refused_at_its_bound(monkeypatch):
    monkeypatch.setattr(messages, "JSON_MAX", 1 << 20)
    handler = answering(lambda request: forever(request, b" " * 60_000))
    async with misbehaving(messages.HEALTH, handler) as client:
        with pytest.raises(UntrustedError, match="more than"):
            await client.health()
        assert client.traffic.received < 4 << 20


async def test_an_endless_problem_document_is_refused_at_its_bound():
    async def handler(request):
        response = web.StreamResponse(status=500)
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b" " * 60_000)

    async with misbehaving(messages.HEALTH, handler) as client:
        with pytest.raises(UntrustedError, match="more than"):
            await client.health()


async def test_a_compressed_answer_is_not_inflated():
    import zlib

    bomb = zlib.compress(b" " * (64 << 20))
    handler = answering(lambda _: web.Response(body=bomb, headers={"Content-Encoding": "deflate"}))
    async with misbehaving(messages.HEALTH, handler) as client:
        with pytest.raises(UntrustedError):
            await client.health()
        assert client.traffic.received < len(bomb) + 2000


async def test_a_body_below_the_minimum_rate_is_too_slow():
    handler = answering(lambda request: forever(request, b" ", pause=0.02))
    async with misbehaving(messages.HEALTH, handler, HURRY) as client:
        with pytest.raises(TooSlowError):
            await client.health()


async def test_a_body_that_stands_still_is_too_slow():
    handler = answering(lambda request: forever(request, b" ", pause=3600))
    async with misbehaving(messages.HEALTH, handler, HURRY) as client:
        with pytest.raises(TooSlowError):
            await client.health()


async def test_a_slow_reader_of_ours_is_no_fault_of_the_relay(relay):
    async with relay.client() as sender:
        await bring(sender)
    async with relay.client(limits=replace(HURRY, window_seconds=0.2)) as client:
        seen = 0
        async for _ in client.stream(MANIFEST, [0, 1, 2]):
            await asyncio.sleep(0.3)
            seen += 1
    assert seen == 4


async def test_a_relay_that_never_answers_is_unreachable():
    async def handler(request):
        await asyncio.sleep(3600)

    async with misbehaving(messages.HEALTH, handler, HURRY) as client:
        with pytest.raises(UnreachableError, match="in time"):
            await client.health()


async def test_a_relay_that_takes_a_bundle_and_never_answers_is_unreachable():
    async def handler(request):
        await request.read()
        await asyncio.sleep(3600)

    async with misbehaving(messages.BUNDLE_IN, handler, HURRY) as client:
        with pytest.raises(UnreachableError, match="takes no more"):
            await client.put_bundle("0" * 32, pieces(bundle(run_of([0]))))


async def test_a_relay_that_stops_reading_a_bundle_is_unreachable():
    async def handler(request):
        await request.content.readany()
        await asyncio.sleep(3600)

    async def endless():
        while True:
            yield bytes(64 << 10)

    async with misbehaving(messages.BUNDLE_IN, handler, HURRY) as client:
        with pytest.raises(UnreachableError, match="takes no more"):
            await client.put_bundle("0" * 32, endless())


async def test_an_upload_may_take_longer_than_an_answer_as_long_as_it_moves():
    async def handler(request):
        await request.read()
        return web.Response(body=b'{"stored":1,"held":0}')

    async def slow():
        for _ in range(8):
            await asyncio.sleep(HURRY.answer_seconds / 3)
            yield b"piece"

    async with misbehaving(messages.BUNDLE_IN, handler, HURRY) as client:
        assert (await client.put_bundle("0" * 32, slow())).stored == 1


async def test_a_relay_that_hangs_up_is_unreachable():
    async def handler(request):
        request.transport.abort()
        await asyncio.sleep(1)

    async with misbehaving(messages.HEALTH, handler) as client:
        with pytest.raises(UnreachableError):
            await client.health()


async def test_nobody_there_is_unreachable_and_says_why():
    async with RelayClient("http://127.0.0.1:1", limits=CLIENT_LIMITS) as client:
        with pytest.raises(UnreachableError, match="refused"):
            await client.health()


async def test_something_that_speaks_no_http_is_no_relay():
    async def handle(reader, writer):
        await reader.read(100)
        writer.write(b"220 mail.example ESMTP\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with RelayClient(f"http://127.0.0.1:{port}", limits=CLIENT_LIMITS) as client:
            with pytest.raises((UntrustedError, UnreachableError)):
                await client.health()


# --- bundles that lie


def bundle_server(body, content_type=messages.BUNDLE_TYPE):
    return answering(lambda _: web.Response(body=body, content_type=content_type))


async def test_a_bundle_of_another_media_type_is_refused():
    async with misbehaving(messages.BUNDLE_OUT, bundle_server(bundle(run_of([0])), "text/html")) as client:
        with pytest.raises(FrameError, match="text/html"):
            await received(client, [0])


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (bundle(run_of([0]))[:-1], "cut off"),
        (bundle(run_of([0]))[:30_000], "cut off"),
        (bundle(run_of([1])), "not asked for"),
        (bundle(run_of([0]), run_of([0])), "twice"),
        (bundle(run_of([0])) + b"more", "after the end"),
        (b"<html>", "not a bundle|cut off"),
        (b"", "cut off"),
        (bundle(run_of([0], NEXT)), "not known"),
    ],
    ids=["no end", "cut", "unasked", "twice", "a tail", "a page", "empty", "another package"],
)
async def test_a_bundle_that_breaks_the_protocol_is_refused(body, match):
    async with misbehaving(messages.BUNDLE_OUT, bundle_server(body)) as client:
        with pytest.raises(FrameError, match=match):
            await received(client, [0])


async def test_chunks_before_the_lie_are_handed_out():
    async with misbehaving(messages.BUNDLE_OUT, bundle_server(bundle(run_of([0]))[:-1])) as client:
        stream = client.stream(MANIFEST, [0])
        assert (await anext(stream)).index == 0
        with pytest.raises(FrameError):
            await anext(stream)


async def test_an_endless_payload_is_refused():
    head, payload = run_of([0])
    writer = BundleWriter()
    start = writer.start() + writer.frame(Data(head.run, (), "raw", 66 << 20, 0))

    async def endless(request):
        response = web.StreamResponse(headers={"Content-Type": messages.BUNDLE_TYPE})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            await response.write(start)
            while True:
                await response.write(payload)
        return response

    async with misbehaving(messages.BUNDLE_OUT, answering(endless)) as client:
        with pytest.raises(FrameError):
            await received(client, [0])


async def test_the_same_chunk_without_end_is_refused():
    head, payload = run_of([0])
    frame = BundleWriter().frame(head) + payload

    async def endless(request):
        response = web.StreamResponse(headers={"Content-Type": messages.BUNDLE_TYPE})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            await response.write(BundleWriter().start())
            while True:
                await response.write(frame)
        return response

    async with misbehaving(messages.BUNDLE_OUT, answering(endless)) as client:
        with pytest.raises(FrameError, match="twice"):
            await received(client, [0])
        assert client.traffic.received < 20 * len(frame)


# --- answers that lie


def document_server(document, **headers):
    packed = document if isinstance(document, bytes) else msgspec.msgpack.encode(document)
    return answering(lambda _: web.Response(body=packed, headers=headers))


MANIFESTS = "/v1/manifests/{name}"


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"\xc1",
        b"\x91" * 5000,
        b"\x81\xa2\xff\xfe\x01",
        b"\x82\xa8manifest\xc4\x00\xa9signature\xa1\xff",
        messages.Document(b"junk"),
        messages.Document(manifests.to_wire(NEXT.manifest.canonical)),
        messages.Document(manifests.to_wire(MANIFEST.canonical, NEXT.manifest.canonical)),
    ],
)
async def test_a_manifest_that_is_not_the_one_asked_for_is_refused(document):
    async with misbehaving(MANIFESTS, document_server(document)) as client:
        with pytest.raises(ManifestError):
            await client.manifest(MANIFEST.id)


async def test_a_relay_that_claims_a_base_which_was_not_given_is_not_believed():
    made = messages.Document(manifests.to_wire(MANIFEST.canonical, NEXT.manifest.canonical))
    async with misbehaving(MANIFESTS, document_server(made, **{"Waystation-Base": "1"})) as client:
        with pytest.raises(ManifestError):
            await client.manifest(MANIFEST.id)
        assert (await client.manifest(MANIFEST.id, NEXT.manifest)).manifest.id == MANIFEST.id


@pytest.mark.parametrize("missing", [((0, 10**18),), ((-1, 2),), ((0, 2), (1, 2)), ((0, 1),) * 9])
async def test_missing_ranges_that_cannot_be_are_refused(missing):
    offer = msgspec.json.encode({"lease": "0" * 32, "expires_in": 1.0, "missing": missing})
    async with misbehaving(MANIFESTS, answering(lambda _: web.Response(body=offer))) as client:
        with pytest.raises(FrameError):
            await client.offer(MANIFEST, b"")
    early = msgspec.json.encode({"code": "missing_chunks", "missing": missing})
    path = "/v1/packages/{id}/{version}"
    async with misbehaving(path, answering(lambda _: web.Response(status=409, body=early))) as client:
        with pytest.raises(FrameError):
            await client.publish(MANIFEST)


async def test_a_package_answer_with_impossible_names_is_untrusted():
    answer = messages.PackageAnswer(
        id="../x", version="1.0.0", manifest="ab" * 32, nupkg_sha256="", size=1, published=""
    )
    handler = answering(lambda _: web.Response(body=msgspec.json.encode(answer)))
    async with misbehaving("/v1/packages/{id}/{version}", handler) as client:
        with pytest.raises(UntrustedError):
            await client.package(PackageId.parse("Acme.Web"), NuGetVersion.parse("1.0.0"))


# --- what is refused before anything is tried


@pytest.mark.parametrize(
    "url",
    [
        "relay.example",
        "ftp://relay.example",
        "http://",
        "http://relay.example/path",
        "http://relay.example/?token=x",
        "http://relay.example/#part",
        "http://user:secret@relay.example",
        "http://user:secret@relay.example/path",
        "http://user:secret@[::1",
        "ftp://user:secret@relay.example",
        "http://relay.example:port",
        "http://[::1",
        "",
    ],
)
def test_a_url_that_names_no_relay_is_a_usage_error_and_no_secret_is_shown(url):
    with pytest.raises(UsageError) as caught:
        RelayClient(url)
    assert "secret" not in str(caught.value)


def test_a_token_comes_from_the_file_then_from_the_environment(tmp_path):
    file = tmp_path / "token"
    file.write_text("  from-file\n")
    environment = {"WAYSTATION_TOKEN": " from-environment "}.get
    assert token_from(str(file), environment)() == "from-file"
    assert token_from(None, environment)() == "from-environment"
    assert token_from(None, {}.get)() is None
    file.write_text("\n")
    with pytest.raises(UsageError, match="empty"):
        token_from(str(file), environment)
    with pytest.raises(UsageError):
        token_from(str(tmp_path / "none"), environment)


# --- what comes from outside, and how far it is believed


async def test_a_relay_may_build_on_nothing_but_what_it_was_offered():
    """Neither on the manifest that is being read, nor on chunks of a known one that are not held."""
    held = SimpleNamespace(held=(Held(NEXT.manifest, ((0, 1),)),))
    for base in (Span.of(MANIFEST.id, [0]), Span.of(NEXT.manifest.id, [1])):
        header, payload = run_of([1])
        lie = msgspec.structs.replace(header, encoding="zstd-prefix", bases=(base,))

        async def answer(request, frame=(lie, payload)):
            return web.Response(body=bundle(frame), content_type=messages.BUNDLE_TYPE)

        async with (
            small_server([web.post(messages.BUNDLE_OUT, answer)]) as url,
            RelayClient(url, limits=CLIENT_LIMITS) as client,
        ):
            with pytest.raises(FrameError, match="never offered"):
                [event async for event in client.stream(MANIFEST, [1], bases=held)]


async def test_an_answer_that_our_own_code_stumbles_over_is_untrusted(relay, monkeypatch, caplog):
    async with relay.client() as client:
        await bring(client)

        def stumble(*_):
            raise KeyError("a name from outside")

        monkeypatch.setattr("relay.protocol.client.parse_wire", stumble)
        with pytest.raises(UntrustedError, match=r"cannot be read \(KeyError\)"):
            await client.manifest(MANIFEST.id)
        monkeypatch.setattr("relay.protocol.client.BundleDecoder.feed", stumble)
        with pytest.raises(UntrustedError, match=r"cannot be read \(KeyError\)"):
            await received(client, [0])
    assert [record.message for record in caplog.records if record.exc_info] == ["client.stumbled"] * 2


async def test_a_fault_of_this_machine_is_not_blamed_on_the_relay(relay, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    async with relay.client() as client:
        await bring(client)
        monkeypatch.setattr("relay.protocol.client.parse_wire", fail)
        with pytest.raises(OSError, match="Input/output"):
            await client.manifest(MANIFEST.id)


@pytest.mark.parametrize("ends", ["1e300", "-1e300", "1e999", "253402300800"])
async def test_a_moment_that_no_calendar_knows_is_untrusted(ends):
    async def answer(request):
        token = f'{{"what":"token","ends":{ends}}}'
        text = f'{{"status":"ok","versions":[1],"time":0,"token":{token}}}'
        return web.Response(text=text, content_type="application/json")

    async with (
        small_server([web.get(messages.HEALTH, answer)]) as url,
        RelayClient(url, limits=CLIENT_LIMITS) as client,
    ):
        with pytest.raises(UntrustedError):
            await client.health()


async def test_the_time_that_a_silent_relay_took_already_counts_as_away() -> None:
    async with RelayClient("http://127.0.0.1:1", limits=CLIENT_LIMITS) as client, asyncio.timeout(PATIENCE / 2):
        client.waiting_since -= 2 * PATIENCE
        with pytest.raises(UnreachableError):
            await client.wait_until_ready(PATIENCE)


async def test_all_tries_of_a_small_request_share_their_time() -> None:
    hanging = asyncio.Event()

    async def hang(_request: web.Request) -> web.Response:
        await hanging.wait()
        return healthy()

    async with small_server([web.get(messages.HEALTH, hang)]) as url:
        limits = replace(CLIENT_LIMITS, answer_seconds=0.2, attempts=10_000, tries_seconds=0.5)
        async with RelayClient(url, limits=limits) as client, asyncio.timeout(PATIENCE):
            with pytest.raises(UnreachableError):
                await client.health()
        hanging.set()


def test_limits_within_a_patience_are_never_longer_and_leave_a_busy_relay_its_moment() -> None:
    assert (CLIENT_LIMITS.within(8.0).tries_seconds, ClientLimits().within(8.0).answer_seconds) == (8.0, 8.0)
    assert ClientLimits().within(0.2).answer_seconds == 5.0
    assert ClientLimits().within(600.0).answer_seconds == ClientLimits().answer_seconds
