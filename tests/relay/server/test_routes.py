"""Every route of the relay, swept: who may not call it is told so, and nothing changes."""

from __future__ import annotations

import os

import aiohttp
import msgspec
import pytest
from harness.packages import cut_package, encode_run, noise
from harness.relays import RELAY_LIMITS, running_relay, token
from yarl import URL

from relay.config import RelayConfig
from relay.encoding.bundle import BundleWriter, Span, data_header
from relay.package import manifest as manifests
from relay.protocol import messages
from relay.server.app import RelayApp
from relay.server.http.access import OPEN, iter_routes
from relay.server.http.problems import PROBLEM_TYPE
from relay.server.http.tokens import SCOPES
from relay.server.packages import Transfer
from relay.stores.open import open_store

HELD = cut_package({"lib/a.dll": noise("a", 70_000)})
FRESH = cut_package({"lib/b.dll": noise("b", 70_000)}, version="2.0.0")
GRANTS = {"read": {"read"}, "write": {"write", "read"}, "agent": {"agent", "read"}, "order": {"order"}}
TOKENS = {scope: token(scope) for scope in SCOPES}


def bundle(cut):
    encoding, payload = encode_run([cut.chunk(i).data for i in cut.indexes], "zstd")
    header = data_header((Span.of(cut.manifest.id, list(cut.indexes)),), encoding, payload)
    writer = BundleWriter()
    return writer.start() + writer.frame(header) + payload + writer.end()


def json(value):
    return msgspec.json.encode(value), messages.JSON


def calls(lease):
    """For each route a request that would succeed with the right token, and change something where it can."""
    every = messages.ChunkRanges(manifest=HELD.manifest.id, ranges=((0, len(HELD.manifest.chunks)),))
    document = msgspec.msgpack.encode(messages.Document(manifests.to_wire(FRESH.manifest.canonical), b"envelope"))
    held = {"id": "acme.web", "version": "1.0.0", "hex": HELD.manifest.id}
    return {
        ("GET", messages.HEALTH): (messages.HEALTH, None),
        ("GET", messages.METRICS): (messages.METRICS, None),
        ("PUT", messages.LINE): (messages.LINE, (b"some bytes", "application/octet-stream")),
        ("GET", messages.LINE): (f"{messages.LINE}?bytes=10", None),
        ("PUT", messages.MANIFEST): (
            messages.MANIFEST.format(hex=FRESH.manifest.id),
            (document, messages.DOCUMENT_TYPE),
        ),
        ("GET", messages.MANIFEST): (messages.MANIFEST.format(**held), None),
        ("POST", messages.MISSING): (messages.MISSING, json(messages.MissingRequest(want=(every,), lease=lease))),
        ("PUT", messages.BUNDLE_IN): (f"{messages.BUNDLE_IN}?lease={lease}", (bundle(HELD), messages.BUNDLE_TYPE)),
        ("POST", messages.BUNDLE_OUT): (messages.BUNDLE_OUT, json(messages.BundleRequest(want=(every,)))),
        ("GET", messages.PACKAGES): (messages.PACKAGES, None),
        ("GET", messages.PACKAGE_ID): (messages.PACKAGE_ID.format(**held), None),
        ("GET", messages.PACKAGE): (messages.PACKAGE.format(**held), None),
        ("PUT", messages.PACKAGE): (
            messages.PACKAGE.format(**held),
            json(messages.PublishRequest(manifest=HELD.manifest.id)),
        ),
        ("GET", messages.CHUNK): (messages.CHUNK.format(hex=HELD.manifest.chunk_id(0)), None),
    }


ORDER = [
    ("PUT", messages.BUNDLE_IN),
    ("PUT", messages.PACKAGE),
    ("PUT", messages.MANIFEST),
]
"""What must have happened before the reading routes find something."""


async def routes():
    store = await open_store("memory:")
    config = RelayConfig(tokens=[msgspec.to_builtins(record) for _, record in TOKENS.values()])
    return list(iter_routes(RelayApp(Transfer(store), config, RELAY_LIMITS, None).build()))


def snapshot(folder):
    """Every file of the store and what is in it; locks and the temporary folder apart."""
    found = {}
    for path, _, names in os.walk(folder):
        if os.path.basename(path) == "tmp":
            continue
        for name in names:
            if not name.endswith("lock"):
                with open(os.path.join(path, name), "rb") as file:
                    found[os.path.join(path, name)] = file.read()
    return found


@pytest.fixture
async def relay(tmp_path):
    records = [record for _, record in TOKENS.values()]
    async with running_relay(tmp_path / "relay", tokens=records) as running:
        yield running


@pytest.fixture
async def session(relay):
    async with aiohttp.ClientSession(relay.url) as made:
        yield made


async def call(session, method, request, bearer=None):
    path, body = request
    headers = {"Content-Type": body[1]} if body else {}
    if bearer:
        headers["Authorization"] = f"Bearer {bearer}"
    data = body[0] if body else None
    async with session.request(method, path, data=data, headers=headers) as response:
        return response.status, response.headers, await response.read()


async def offer_held(relay):
    async with relay.client(TOKENS["write"][0]) as client:
        return (await client.offer(HELD.manifest, b"envelope")).lease


async def test_this_sweep_knows_every_route():
    found = {(route.method, route.path) for route in await routes()}
    assert found == set(calls("0" * 32))


async def test_only_health_is_open():
    assert [route.path for route in await routes() if route.scope == OPEN] == [messages.HEALTH]


async def test_every_route_that_changes_something_asks_for_write():
    for route in await routes():
        reads = route.method == "GET" or (route.method, route.path) == ("POST", messages.BUNDLE_OUT)
        assert route.scope == (OPEN if route.path == messages.HEALTH else "read" if reads else "write")


@pytest.mark.parametrize(
    "bearer",
    [None, "nonsense", "wst_00000000_" + "A" * 43 + "_00000000", token("write")[0]],
    ids=["none", "nonsense", "unknown", "of another relay"],
)
async def test_without_a_valid_token_every_route_answers_401_and_nothing_changes(relay, session, tmp_path, bearer):
    requests = calls(await offer_held(relay))
    before = snapshot(tmp_path)
    for route in await routes():
        status, headers, body = await call(session, route.method, requests[route.method, route.path], bearer)
        if route.scope == OPEN:
            assert status == 200
            continue
        assert (status, headers["Content-Type"]) == (401, PROBLEM_TYPE), route
        assert headers["WWW-Authenticate"] == "Bearer"
        assert msgspec.json.decode(body)["code"] == "unauthenticated"
        assert not bearer or bearer.encode() not in body
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("scope", SCOPES)
async def test_with_a_wrong_scope_every_route_answers_403_and_nothing_changes(relay, session, tmp_path, scope):
    requests = calls(await offer_held(relay))
    before = snapshot(tmp_path)
    swept = 0
    for route in await routes():
        if route.scope == OPEN or route.scope in GRANTS[scope]:
            continue
        swept += 1
        status, headers, body = await call(session, route.method, requests[route.method, route.path], TOKENS[scope][0])
        assert (status, headers["Content-Type"]) == (403, PROBLEM_TYPE), route
        assert msgspec.json.decode(body)["code"] == "forbidden"
    assert swept or scope == "write"
    assert snapshot(tmp_path) == before


async def test_with_the_right_scope_the_same_requests_succeed(relay, session, tmp_path):
    """So that the refusals above were about the token and nothing else."""
    requests = calls(await offer_held(relay))
    before = snapshot(tmp_path)
    for key in ORDER:
        status, _, body = await call(session, key[0], requests[key], TOKENS["write"][0])
        assert status == 200, (key, body)
    assert snapshot(tmp_path) != before
    for route in await routes():
        for scope in SCOPES:
            if route.scope == OPEN or route.scope in GRANTS[scope]:
                bearer = TOKENS[scope][0]
                status, _, body = await call(session, route.method, requests[route.method, route.path], bearer)
                assert status == 200, (route, scope, body)


async def test_a_token_in_the_url_is_refused_everywhere(relay, session):
    requests = calls(await offer_held(relay))
    text = TOKENS["write"][0]
    for route in await routes():
        path, body = requests[route.method, route.path]
        status, _, answer = await call(session, route.method, (f"{path.partition('?')[0]}?access_token={text}", body))
        if route.scope != OPEN:
            assert status == 400, route
        assert text.encode() not in answer


@pytest.mark.parametrize(
    "path",
    [
        "/v1/manifests/sha256:xyz",
        "/v1/manifests/sha256:" + "AB" * 32,
        "/v1/chunks/..%2f..%2fetc%2fpasswd",
        "/v1/chunks/" + "ab" * 33,
        "/v1/packages/..%2fx/1.0.0",
        "/v1/packages/acme.web/..%2f1.0.0",
        "/v1/packages/acme.web/not-a-version",
        "/v1/packages/%00",
        "/v1",
        "/",
        "/v2/packages",
    ],
)
async def test_a_path_that_names_nothing_possible_is_404_and_not_echoed(session, path):
    async with session.get(
        URL(path, encoded=True), headers={"Authorization": f"Bearer {TOKENS['read'][0]}"}
    ) as response:
        body = await response.read()
        assert response.status == 404
        assert response.headers["Content-Type"] == PROBLEM_TYPE
    assert b"passwd" not in body
    assert b"version" not in body


@pytest.mark.parametrize(
    ("method", "path", "kind", "body", "status"),
    [
        ("PUT", messages.MANIFEST, messages.JSON, b"{}", 415),
        ("PUT", messages.MANIFEST, messages.DOCUMENT_TYPE, b"", 400),
        ("PUT", messages.MANIFEST, messages.DOCUMENT_TYPE, b"\xc1", 400),
        ("PUT", messages.MANIFEST, messages.DOCUMENT_TYPE, b"\x91" * 5000, 400),
        ("PUT", messages.MANIFEST, messages.DOCUMENT_TYPE, b"\x81\xa2\xff\xfe\x01", 400),
        ("PUT", messages.MANIFEST, messages.DOCUMENT_TYPE, b"\x81\xa8manifest\xa2\xff\xfe", 400),
        ("PUT", messages.MANIFEST, messages.DOCUMENT_TYPE, b"\x81\xa8manifest\xc4\x02\xff\xfe", 400),
        ("PUT", messages.BUNDLE_IN, messages.JSON, b"{}", 415),
        ("PUT", messages.BUNDLE_IN, messages.BUNDLE_TYPE, b"junk", 400),
        ("PUT", messages.BUNDLE_IN, messages.BUNDLE_TYPE, b"", 400),
        ("POST", messages.BUNDLE_OUT, messages.JSON, b'{"want":[]', 400),
        ("POST", messages.BUNDLE_OUT, messages.JSON, b'{"want":[],"more":1}', 400),
        ("POST", messages.BUNDLE_OUT, messages.JSON, b'{"want":[],"encodings":["raw"]}', 400),
        (
            "POST",
            messages.BUNDLE_OUT,
            messages.JSON,
            b'{"want":[{"manifest":"' + b"ab" * 32 + b'","ranges":[[0,1]]}]}',
            404,
        ),
        ("POST", messages.MISSING, messages.JSON, b'{"want":[{"manifest":"' + b"AB" * 32 + b'","ranges":[]}]}', 400),
        ("POST", messages.MISSING, "text/plain", b'{"want":[]}', 415),
        ("POST", messages.MISSING, messages.JSON, b'{"want":[],"want":[]}', 400),
        ("PUT", messages.PACKAGE, messages.JSON, b'{"manifest":"' + b"ab" * 32 + b'"}', 404),
        ("PUT", messages.PACKAGE, messages.JSON, b'{"manifest":"x"}', 400),
        ("PUT", messages.PACKAGE, messages.JSON, b"[" * 100_000, 400),
    ],
)
async def test_a_body_that_is_not_the_protocols_is_refused_and_nothing_changes(
    relay, session, tmp_path, method, path, kind, body, status
):
    requests = calls(await offer_held(relay))
    before = snapshot(tmp_path)
    found, headers, _ = await call(session, method, (requests[method, path][0], (body, kind)), TOKENS["write"][0])
    assert (found, headers["Content-Type"]) == (status, PROBLEM_TYPE)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "ranges", ["[[0,1000000000]]", "[[0,1],[0,1]]", "[[-1,1]]", "[[1,1]]", "[[0,18446744073709551615]]"]
)
async def test_ranges_that_cannot_be_are_refused(relay, session, ranges):
    await offer_held(relay)
    body = f'{{"want":[{{"manifest":"{HELD.manifest.id}","ranges":{ranges}}}]}}'.encode()
    for path in (messages.MISSING, messages.BUNDLE_OUT):
        assert (await call(session, "POST", (path, (body, messages.JSON)), TOKENS["write"][0]))[0] == 400


async def test_a_lease_that_ended_is_told_apart_from_what_is_not_there(relay, session):
    await offer_held(relay)
    for path, kind, body in (
        (f"{messages.BUNDLE_IN}?lease={'0' * 32}", messages.BUNDLE_TYPE, bundle(HELD)),
        (f"{messages.BUNDLE_IN}?lease=..", messages.BUNDLE_TYPE, bundle(HELD)),
        (messages.BUNDLE_IN, messages.BUNDLE_TYPE, bundle(HELD)),
    ):
        status, _, answer = await call(session, "PUT", (path, (body, kind)), TOKENS["write"][0])
        assert (status, msgspec.json.decode(answer)["code"]) == (404, "unknown_lease")
