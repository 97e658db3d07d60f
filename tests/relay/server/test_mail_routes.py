"""Mail over HTTP: who may, what is refused, how long a poll waits, and what a SIGKILL leaves."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import shutil
import time
from dataclasses import replace

import aiohttp
import msgspec
import pytest
from aiohttp import web
from harness.presences import KEYS, Keys
from harness.process import eventually
from harness.relays import CLIENT_LIMITS, RELAY_LIMITS, RelayProcess, mail_client, running_relay, small_server, token
from yarl import URL

from relay.audit.acts import RequestRefused
from relay.audit.event import Told
from relay.config import RelayConfig
from relay.errors import ConflictError, UnreachableError, UntrustedError
from relay.mail.letter_database import LetterDatabase
from relay.mail.mailbox import Mail
from relay.mail.presences import BREATH_SECONDS, FORGET_SECONDS, PER_NAME, PER_TOKEN, Identified, Presences
from relay.protocol import messages
from relay.protocol.connection import TokenRefusedError
from relay.protocol.mail_client import MailClient
from relay.server.app import RelayApp
from relay.server.http.access import iter_routes
from relay.server.http.connection import Limits
from relay.server.http.misuse import MOST
from relay.server.http.problems import PROBLEM_TYPE
from relay.server.http.tokens import SCOPES
from relay.server.packages import Transfer
from relay.stores.open import open_store

D = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
OTHER = "01ARZ3NDEKTSV4RRFFQ69G5FAW"
AGENT = {"name": "web1"}
TOKENS = {scope: token(scope) for scope in SCOPES}
ONE_TRY = replace(CLIENT_LIMITS, attempts=1)


def order(n=1, envelope=b"order", agent="web1"):
    return messages.OrderLetter(agent, f"{D}/{n}/{agent}/survey/1", envelope)


def reports(*numbers, envelope=b"report"):
    return messages.ReportsRequest(
        D, tuple(messages.ReportLetter(f"{D}/1/web1/survey/1", n, envelope) for n in numbers)
    )


def pieces(*offsets, data=b"output"):
    return messages.LogsRequest(D, tuple(messages.LogPiece(f"{D}/1/web1/survey/1", n, data) for n in offsets))


def poll(after=None, wait=0.0, name="web1", keys=KEYS, **said):
    return messages.PollRequest(keys.presence(name, **said), after, wait)


def b64(data):
    return base64.b64encode(data).decode()


@pytest.fixture
async def relay(tmp_path):
    async with running_relay(tmp_path / "relay") as running:
        yield running


@pytest.fixture
async def client(relay):
    async with relay.mail() as made:
        yield made


@pytest.fixture
async def session(relay):
    async with aiohttp.ClientSession(relay.url) as made:
        yield made


@contextlib.asynccontextmanager
async def waiting(coroutine):
    """A request that waits at the relay while the context lasts."""
    task = asyncio.create_task(coroutine)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def is_polling(client, name="web1"):
    async with asyncio.timeout(10):
        while not any(one.name == name and one.age == 0.0 for one in await client.agents()):
            await asyncio.sleep(0.01)


# --- the way of an order and back


async def test_an_order_comes_to_its_agent_and_reports_and_output_come_back(client):
    assert await client.post_orders(
        [order(1, b"one"), order(2, b"two"), order(1, agent="web2")]
    ) == messages.TakenAnswer(3)
    got = await client.poll("web1", poll())
    assert [(o.operation, o.envelope) for o in got.orders] == [
        (f"{D}/1/web1/survey/1", b"one"),
        (f"{D}/2/web1/survey/1", b"two"),
    ]
    cursor = messages.Cursor(got.epoch, got.orders[-1].number)
    assert await client.poll("web1", poll(cursor)) == messages.PollAnswer(got.epoch)

    assert await client.post_reports("web1", reports(1, 2)) == messages.TakenAnswer(2)
    assert await client.post_logs("web1", pieces(0, 6)) == messages.TakenAnswer(2)
    back = await client.reports(D, wait=0)
    assert [(r.agent, r.operation, r.report, r.envelope) for r in back.reports] == [
        ("web1", f"{D}/1/web1/survey/1", n, b"report") for n in (1, 2)
    ]
    output = await client.logs(D, wait=0)
    assert [(p.agent, p.offset, p.data) for p in output.pieces] == [("web1", 0, b"output"), ("web1", 6, b"output")]
    assert back.epoch == output.epoch == got.epoch
    assert (await client.reports(OTHER, wait=0)).reports == ()
    after = messages.Cursor(back.epoch, back.reports[0].number)
    assert [r.report for r in (await client.reports(D, after, wait=0)).reports] == [2]


async def test_names_of_agents_are_one_in_any_case(client):
    await client.post_orders([order(1, agent="Web1")])
    assert len((await client.poll("WEB1", poll())).orders) == 1
    await client.post_reports("wEb1", reports(1))
    assert (await client.reports(D, wait=0)).reports[0].agent == "web1"
    assert [one.name for one in await client.agents()] == ["web1"]


async def test_all_bytes_pass_as_they_are(client):
    every = bytes(range(256)) * 4
    await client.post_orders([order(1, every)])
    await client.post_logs("web1", pieces(0, data=every))
    assert (await client.poll("web1", poll())).orders[0].envelope == every
    assert (await client.logs(D, wait=0)).pieces[0].data == every


async def test_the_same_again_is_known_and_other_bytes_are_a_conflict(client):
    await client.post_orders([order()])
    assert await client.post_orders([order(), order(2)]) == messages.TakenAnswer(1, 1)
    with pytest.raises(ConflictError, match="another letter of the same operation"):
        await client.post_orders([order(3), order(1, b"other")])
    assert len((await client.poll("web1", poll())).orders) == 2
    await client.post_reports("web1", reports(1))
    with pytest.raises(ConflictError):
        await client.post_reports("web1", reports(1, envelope=b"other"))
    await client.post_logs("web1", pieces(0))
    with pytest.raises(ConflictError):
        await client.post_logs("web1", pieces(0, data=b"OUTPUT"))


async def test_more_orders_than_fit_into_one_request_are_sent_in_several(client):
    many = [order(n, bytes(60_000)) for n in range(200)]
    assert await client.post_orders(many) == messages.TakenAnswer(200)
    assert await client.post_orders([order(n, b"x", agent="web2") for n in range(600)]) == messages.TakenAnswer(600)
    assert await client.post_orders([]) == messages.TakenAnswer(0)
    seen, cursor = 0, None
    while got := await client.poll("web1", poll(cursor)):
        if not got.orders:
            break
        assert sum(len(o.envelope) for o in got.orders) <= messages.LETTERS_BYTES_MAX
        seen += len(got.orders)
        cursor = messages.Cursor(got.epoch, got.orders[-1].number)
    assert seen == 200


# --- waiting


async def test_a_waiting_poll_is_answered_as_soon_as_its_order_is_there(client):
    async with waiting(client.poll("web1", poll(wait=25))) as task:
        await is_polling(client)
        await client.post_orders([order(agent="web2")])
        await asyncio.sleep(0.1)
        assert not task.done(), "an order for somebody else woke it"
        await client.post_orders([order()])
        async with asyncio.timeout(10):
            assert len((await task).orders) == 1


async def test_waiting_readers_of_reports_and_logs_are_woken_all_of_them(client):
    read = [client.reports(D, wait=25), client.reports(D, wait=25), client.logs(D, wait=25)]
    tasks = [asyncio.create_task(one) for one in read]
    await asyncio.sleep(0.2)
    assert not any(task.done() for task in tasks)
    await client.post_reports("web1", reports(1))
    await client.post_logs("web1", pieces(0))
    async with asyncio.timeout(10):
        first, second, log = await asyncio.gather(*tasks)
    assert len(first.reports) == len(second.reports) == len(log.pieces) == 1


async def test_a_poll_that_finds_nothing_is_answered_empty_when_its_time_is_over(client):
    before = asyncio.get_running_loop().time()
    answer = await client.poll("web1", poll(wait=0.3))
    assert answer.orders == ()
    assert asyncio.get_running_loop().time() - before >= 0.3


async def test_a_relay_that_stops_answers_its_long_polls_at_once(tmp_path):
    async with contextlib.AsyncExitStack() as stack:
        relay = await stack.enter_async_context(
            running_relay(tmp_path / "relay", limits=Limits(drain_seconds=600.0, linger_seconds=0.2))
        )
        connection = relay.client()
        client = MailClient(connection)
        tasks = [
            asyncio.create_task(one)
            for one in (client.poll("web1", poll(wait=25)), client.reports(D, wait=25), client.logs(D, wait=25))
        ]
        await is_polling(client)
        await asyncio.sleep(0.2)
        stopping = asyncio.create_task(stack.aclose())
        async with asyncio.timeout(15):
            polled, reported, logged = await asyncio.gather(*tasks)
            await stopping
        await connection.close()
    assert (polled.orders, reported.reports, logged.pieces) == ((), (), ())


async def test_long_polls_do_not_count_among_the_connections_of_their_token(tmp_path):
    text, record = token("agent")
    _, other = token("order")
    limits = Limits(connections_per_identity=2, linger_seconds=0.2, drain_seconds=2.0)
    async with (
        running_relay(tmp_path / "r", tokens=[record, other], limits=limits) as relay,
        contextlib.AsyncExitStack() as stack,
    ):
        for n in range(6):
            client = await stack.enter_async_context(relay.mail(text))
            task = await stack.enter_async_context(waiting(client.poll(f"w{n}", poll(wait=25, name=f"w{n}"))))
            await asyncio.sleep(0.1)
            assert not task.done()
        assert await client.post_reports("w1", reports(1)) == messages.TakenAnswer(1)


async def test_too_many_long_polls_are_told_to_come_back(tmp_path):
    limits = Limits(long_polls=1, linger_seconds=0.2, drain_seconds=2.0)
    async with (
        running_relay(tmp_path / "r", limits=limits) as relay,
        relay.mail() as client,
        waiting(client.poll("web1", poll(wait=25))),
    ):
        await is_polling(client)
        with pytest.raises(UnreachableError) as refused:
            await client.poll("web2", poll(wait=25, name="web2"))
        assert refused.value.retry_after
        assert (await client.poll("web2", poll(name="web2"))).orders == (), "what need not wait is answered"


# --- presence


async def test_an_agent_is_there_while_it_polls_and_ages_when_it_went(client):
    assert await client.agents() == ()
    first, second = poll(wait=25), poll()
    async with waiting(client.poll("web1", first)):
        await is_polling(client)
        (seen,) = await client.agents()
        assert (seen.name, seen.presence, seen.age) == ("web1", first.presence, 0.0)
        assert seen.presence_age > 0.0
    async with asyncio.timeout(10):
        while not (seen := (await client.agents())[0]).age:
            await asyncio.sleep(0.01)
    assert seen.presence_age >= seen.age > 0.0
    await client.poll("web1", second)
    (again,) = await client.agents()
    assert again.presence == second.presence


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def who(name="web1", key="a", start=""):
    return Identified(name, key, key, start)


def test_ages_count_from_the_end_of_the_last_poll_and_from_the_last_presence():
    clock = Clock()
    presences = Presences(10, clock)
    with presences.polling(who("web1"), b"a"):
        clock.now += 20
        with presences.polling(who("web1"), b"b"):
            clock.now += 5
        clock.now += 1
        assert presences.all() == (messages.AgentSeen("web1", b"b", 0.0, 6.0),)
    clock.now += 4
    assert presences.all() == (messages.AgentSeen("web1", b"b", 4.0, 10.0),)
    clock.now += FORGET_SECONDS - 4
    assert len(presences.all()) == 1
    clock.now += 1
    assert presences.all() == ()


def test_too_many_agents_push_out_the_longest_absent_and_never_one_that_waits():
    clock = Clock()
    presences = Presences(3, clock)
    for name in "abc":
        clock.now += 1
        with presences.polling(who(name), b"x"):
            pass
    with presences.polling(who("d"), b"x"):
        assert [seen.name for seen in presences.all()] == ["b", "c", "d"]
        with presences.polling(who("e"), b"x"), presences.polling(who("f"), b"x"):
            with pytest.raises(UnreachableError), presences.polling(who("g"), b"x"):
                pass
            with presences.polling(who("d"), b"again"):
                assert [seen.name for seen in presences.all()] == ["d", "e", "f"]


def test_presences_are_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr("relay.mail.presences.PRESENCE_BYTES", 100)
    presences = Presences(10, Clock())
    with presences.polling(who("a"), bytes(60)):
        with pytest.raises(UnreachableError), presences.polling(who("b"), bytes(60)):
            pass
        with presences.polling(who("a"), bytes(90)):
            pass
    with presences.polling(who("b"), bytes(60)):
        assert [seen.name for seen in presences.all()] == ["b"]


# --- who may


def json(value):
    return msgspec.json.encode(value)


CALLS = {
    ("POST", messages.ORDERS): (messages.ORDERS, json(messages.OrdersRequest((order(),)))),
    ("POST", messages.POLL): (messages.POLL.format(**AGENT), json(poll())),
    ("GET", messages.AGENTS): (messages.AGENTS, None),
    ("POST", messages.REPORTS_IN): (messages.REPORTS_IN.format(**AGENT), json(reports(1))),
    ("GET", messages.REPORTS_OUT): (f"{messages.REPORTS_OUT}?deployment={D}", None),
    ("POST", messages.LOGS_IN): (messages.LOGS_IN.format(**AGENT), json(pieces(0))),
    ("GET", messages.LOGS_OUT): (f"{messages.LOGS_OUT}?deployment={D}", None),
}
NEEDS = {
    ("POST", messages.ORDERS): "order",
    ("POST", messages.POLL): "agent",
    ("GET", messages.AGENTS): "order",
    ("POST", messages.REPORTS_IN): "agent",
    ("GET", messages.REPORTS_OUT): "order",
    ("POST", messages.LOGS_IN): "agent",
    ("GET", messages.LOGS_OUT): "order",
}


async def call(session, method, path, body=None, bearer=None, kind=messages.JSON):
    headers = {"Content-Type": kind} if body is not None else {}
    if bearer:
        headers["Authorization"] = f"Bearer {bearer}"
    async with session.request(method, path, data=body, headers=headers) as response:
        answer = await response.read()
        assert response.status == 200 or response.headers["Content-Type"] == PROBLEM_TYPE
        return response.status, msgspec.json.decode(answer)


async def test_this_sweep_knows_every_route_of_mail_and_what_it_asks_for():
    store = await open_store("memory:")
    bare = RelayApp(Transfer(store), RelayConfig(), RELAY_LIMITS, None).build()
    whole = RelayApp(Transfer(store), RelayConfig(), RELAY_LIMITS, None, Mail(None)).build()
    routes = [{(r.method, r.path): r.scope for r in iter_routes(app)} for app in (bare, whole)]
    assert {key: scope for key, scope in routes[1].items() if key not in routes[0]} == NEEDS
    assert set(CALLS) == set(NEEDS)


@pytest.mark.parametrize("scope", [None, *SCOPES])
async def test_each_route_asks_for_its_own_scope_and_does_nothing_for_another(tmp_path, scope):
    bearer = TOKENS[scope][0] if scope else None
    async with (
        running_relay(tmp_path / "relay", tokens=[record for _, record in TOKENS.values()]) as relay,
        aiohttp.ClientSession(relay.url) as session,
        relay.mail(TOKENS["order"][0]) as watcher,
    ):
        for (method, path), (url, body) in CALLS.items():
            status, answer = await call(session, method, url, body, bearer)
            if NEEDS[method, path] == scope:
                assert status == 200, (path, answer)
            else:
                assert (status, answer["code"]) == ((403, "forbidden") if scope else (401, "unauthenticated")), path
        counts = len((await watcher.reports(D, wait=0)).reports), len((await watcher.logs(D, wait=0)).pieces)
        assert counts == ((1, 1) if scope == "agent" else (0, 0))
        assert len(await watcher.agents()) == (scope == "agent")
        async with relay.mail(TOKENS["agent"][0]) as agent:
            assert len((await agent.poll("web1", poll())).orders) == (scope == "order")


async def test_the_client_says_that_the_token_is_refused(tmp_path):
    async with (
        running_relay(tmp_path / "r", tokens=[TOKENS["agent"][1]]) as relay,
        relay.mail(TOKENS["agent"][0]) as client,
    ):
        with pytest.raises(TokenRefusedError):
            await client.post_orders([order()])


# --- hostile bodies


ORDER = '{"orders":[{"agent":"web1","operation":"x/1","envelope":"eA=="}]}'
BAD_BODIES = [
    ("POST", messages.ORDERS, "", 400),
    ("POST", messages.ORDERS, "{", 400),
    ("POST", messages.ORDERS, "[" * 100_000, 400),
    ("POST", messages.ORDERS, '{"orders":[]}', 400),
    ("POST", messages.ORDERS, '{"orders":null}', 400),
    ("POST", messages.ORDERS, ORDER.replace('"orders"', '"more":1,"orders"'), 400),
    ("POST", messages.ORDERS, ORDER.replace('"agent"', '"more":1,"agent"'), 400),
    ("POST", messages.ORDERS, ORDER.replace('"agent":"web1"', '"agent":"web1","agent":"web2"'), 400),
    ("POST", messages.ORDERS, ORDER.replace("web1", "../web1"), 400),
    ("POST", messages.ORDERS, ORDER.replace("web1", "web1\\n"), 400),
    ("POST", messages.ORDERS, ORDER.replace("web1", ""), 400),
    ("POST", messages.ORDERS, ORDER.replace("web1", "w" * 64), 400),
    ("POST", messages.ORDERS, ORDER.replace("web1", "\u00fcber"), 400),
    ("POST", messages.ORDERS, ORDER.replace("web1", "\\ud800"), 400),
    ("POST", messages.ORDERS, ORDER.replace("x/1", "/x"), 400),
    ("POST", messages.ORDERS, ORDER.replace("x/1", "x" * 256), 400),
    ("POST", messages.ORDERS, ORDER.replace("x/1", "x 1"), 400),
    ("POST", messages.ORDERS, ORDER.replace("eA==", ""), 400),
    ("POST", messages.ORDERS, ORDER.replace("eA==", "e"), 400),
    ("POST", messages.ORDERS, ORDER.replace("eA==", b64(bytes((64 << 10) + 1))), 400),
    ("POST", messages.ORDERS, '{"orders":[' + ",".join([ORDER[11:-2]] * 257) + "]}", 400),
    ("POST", messages.ORDERS, b'{"orders":[{"agent":"\xff\xfe","operation":"x","envelope":"eA=="}]}', 400),
    ("POST", messages.ORDERS, " " * (messages.JSON_MAX + 1), 413),
    ("POST", messages.POLL, '{"presence":""}', 400),
    ("POST", messages.POLL, '{"presence":"eA==","wait":26}', 400),
    ("POST", messages.POLL, '{"presence":"eA==","wait":-1}', 400),
    ("POST", messages.POLL, '{"presence":"eA==","wait":NaN}', 400),
    ("POST", messages.POLL, '{"presence":"eA==","wait":1e999}', 400),
    ("POST", messages.POLL, '{"presence":"eA==","after":{"epoch":"x","number":-1}}', 400),
    ("POST", messages.POLL, '{"presence":"eA==","after":{"epoch":"x","number":9007199254740992}}', 400),
    ("POST", messages.POLL, '{"presence":"eA==","after":{"epoch":"x","number":1.5}}', 400),
    ("POST", messages.POLL, '{"presence":"eA==","after":{"epoch":"' + "x" * 65 + '","number":1}}', 400),
    ("POST", messages.POLL, '{"presence":"' + "A" * (128 << 10) + '"}', 413),
    ("POST", messages.REPORTS_IN, '{"deployment":"x","reports":[]}', 400),
    ("POST", messages.REPORTS_IN, json(reports(1)).replace(D.encode(), D.lower().encode(), 1), 400),
    ("POST", messages.REPORTS_IN, json(reports(1)).replace(D.encode(), OTHER.encode(), 1), 400),
    ("POST", messages.REPORTS_IN, json(reports(1)).replace(b'"number":1', b'"number":-1'), 400),
    ("POST", messages.REPORTS_IN, json(reports(1)).replace(b'"number":1', b'"number":true'), 400),
    ("POST", messages.LOGS_IN, json(pieces(0)).replace(b'"offset":0', b'"offset":-1'), 400),
    ("POST", messages.LOGS_IN, json(pieces(0, data=bytes(messages.LOG_PIECE_MAX + 1))), 400),
    ("POST", messages.LOGS_IN, json(pieces(0)).replace(D.encode(), OTHER.encode(), 1), 400),
]


@pytest.mark.parametrize(("method", "path", "body", "status"), BAD_BODIES, ids=range(len(BAD_BODIES)))
async def test_a_body_that_is_not_the_protocols_is_refused_and_nothing_is_kept(
    client, session, method, path, body, status
):
    raw = body if isinstance(body, bytes) else body.encode()
    found, answer = await call(session, method, path.format(**AGENT), raw)
    assert (found, set(answer)) == (status, {"type", "title", "status", "code", "id"})
    assert (await client.poll("web1", poll())).orders == ()
    assert (await client.reports(D, wait=0)).reports == ()
    assert (await client.logs(D, wait=0)).pieces == ()
    assert [one.name for one in await client.agents()] == ["web1"]


async def test_the_bodies_above_are_refused_for_what_was_changed_in_them(session):
    assert (await call(session, "POST", messages.ORDERS, ORDER.encode()))[0] == 200
    assert (await call(session, "POST", messages.POLL.format(**AGENT), json(poll())))[0] == 200
    largest = messages.OrdersRequest((order(1, bytes(64 << 10)),))
    assert (await call(session, "POST", messages.ORDERS, json(largest)))[0] == 200
    longest = poll(messages.Cursor("x" * 64, 1), host="h" * 255, refused=tuple(["r" * 4000] * 8))
    assert (await call(session, "POST", messages.POLL.format(**AGENT), json(longest)))[0] == 200
    most = messages.OrdersRequest(tuple(order(n, b"x", agent="web3") for n in range(messages.LETTERS_MAX)))
    assert (await call(session, "POST", messages.ORDERS, json(most)))[0] == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/octet-stream"])
async def test_only_json_is_taken(session, kind):
    for (method, _), (url, body) in CALLS.items():
        if body is not None:
            status, answer = await call(session, method, url, body, kind=kind)
            assert (status, answer["code"]) == (415, "media_type")


@pytest.mark.parametrize("name", ["..%2fweb1", "w" * 64, "%00", "-web", "web%0a", "we%20b", "%c3%bc"])
async def test_a_path_with_a_name_that_no_agent_has_is_404(session, client, name):
    for path, body in ((messages.POLL, poll()), (messages.REPORTS_IN, reports(1)), (messages.LOGS_IN, pieces(0))):
        status, answer = await call(session, "POST", URL(path.format(name=name), encoded=True), json(body))
        assert (status, answer["code"]) == (404, "not_found")
    assert await client.agents() == ()


@pytest.mark.parametrize(
    "query",
    [
        "",
        "deployment=",
        "deployment=x",
        f"deployment={D.lower()}",
        f"deployment={D}%0a",
        f"deployment={D}&deployment={D}",
        f"deployment={D}&more=1",
        f"deployment={D}&after=-1",
        f"deployment={D}&after=x",
        f"deployment={D}&after=1.5",
        f"deployment={D}&after=9007199254740992",
        f"deployment={D}&after=" + "9" * 5000,
        f"deployment={D}&after=%D9%A3",
        f"deployment={D}&epoch=" + "x" * 65,
        f"deployment={D}&wait=26",
        f"deployment={D}&wait=-1",
        f"deployment={D}&wait=nan",
        f"deployment={D}&wait=inf",
        f"deployment={D}&wait=",
    ],
)
async def test_a_query_that_is_not_the_protocols_is_refused(session, query):
    for path in (messages.REPORTS_OUT, messages.LOGS_OUT):
        status, answer = await call(session, "GET", f"{path}?{query}")
        assert (status, answer["code"]) == (400, "bad_request")


async def test_a_cursor_from_nowhere_reads_from_the_beginning(client):
    await client.post_reports("web1", reports(1))
    for cursor in (messages.Cursor("elsewhere", 7), messages.Cursor("", 0)):
        assert len((await client.reports(D, cursor, wait=0)).reports) == 1


# --- strangers


@pytest.mark.parametrize(
    "changed",
    [
        lambda letter: b"x",
        lambda letter: letter.replace(b'"payload":"ey', b'"payload":"EY'),
        lambda letter: Keys().presence("web1", version="2")[:-10] + letter[-10:],
        lambda letter: KEYS.presence("web2"),
        lambda letter: letter.replace(b"presence+json", b"report+json"),
    ],
    ids=["no envelope", "no JSON", "another signature", "another name", "another type"],
)
async def test_a_presence_that_is_not_signed_by_its_own_key_is_refused_and_changes_nothing(client, session, changed):
    good = poll()
    await client.poll("web1", good)
    await client.post_orders([order()])
    bad = messages.PollRequest(changed(good.presence), None, 0.0)
    status, answer = await call(session, "POST", messages.POLL.format(**AGENT), json(bad))
    assert (status, answer["code"]) == (403, "forged")
    assert [seen.presence for seen in await client.agents()] == [good.presence]


async def test_a_presence_of_other_keys_stands_beside_the_one_that_was_there(client):
    """A relay cannot know which is right: those who ask can."""
    own, foreign = poll(), poll(keys=Keys())
    await client.poll("web1", own)
    await client.poll("web1", foreign)
    assert {seen.presence for seen in await client.agents()} == {own.presence, foreign.presence}


async def test_a_poll_is_answered_when_another_start_of_the_same_agent_comes(client):
    """So that two agents with the same keys are seen to live both."""
    async with waiting(client.poll("web1", poll(wait=25, start="1"))) as first:
        await is_polling(client)
        await client.poll("web1", poll(start="1"))
        await client.poll("web1", poll(keys=Keys(), start="3"))
        await asyncio.sleep(0.05)
        assert not first.done(), "neither itself nor a stranger is another start of it"
        await client.poll("web1", poll(start="2"))
        async with asyncio.timeout(10):
            assert (await first).orders == ()


async def test_a_token_that_is_bound_to_an_agent_is_of_no_use_as_another_one(tmp_path, caplog):
    text, record = token("agent", agent="Web1")
    shared, other = token("agent", "order")
    async with (
        running_relay(tmp_path / "r", tokens=[record, other]) as relay,
        relay.mail(text, limits=ONE_TRY) as bound,
        relay.mail(shared) as client,
    ):
        await client.post_orders([order(), order(agent="web2")])
        assert len((await bound.poll("web1", poll())).orders) == 1
        await bound.post_reports("WEB1", reports(1))
        for ask in (
            bound.poll("web2", poll(name="web2")),
            bound.post_reports("web2", reports(1)),
            bound.post_logs("web2", pieces(0)),
        ):
            with pytest.raises(TokenRefusedError):
                await ask
        assert [seen.name for seen in await client.agents()] == ["web1"]
        assert len((await client.reports(D, wait=0)).reports) == 1
    told = [entry.msg for entry in caplog.records if isinstance(entry.msg, Told)]
    assert {
        (each.fields["token"], each.fields["code"]) for each in told if each.name == RequestRefused.event_name()
    } == {(record.id, "other_agent")}
    assert {each.fields["path"] for each in told if "code" in each.fields} == {
        f"/v1/agents/web2/{what}" for what in ("poll", "reports", "logs")
    }


async def test_a_token_that_is_misused_over_and_over_is_limited_and_nobody_else_is(tmp_path):
    text, record = token("agent", agent="web1")
    shared, other = token("agent")
    async with (
        running_relay(tmp_path / "r", tokens=[record, other]) as relay,
        aiohttp.ClientSession(relay.url) as session,
    ):
        headers = {"Authorization": f"Bearer {text}", "Content-Type": messages.JSON}
        found = []
        for _ in range(MOST + 2):
            async with session.post(messages.POLL.format(name="web2"), data=b"{}", headers=headers) as response:
                found.append((response.status, "Retry-After" in response.headers))
        assert found[0] == (403, False)
        assert found[-1] == (429, True)
        async with relay.mail(text) as bound, relay.mail(shared) as client:
            await bound.poll("web1", poll())
            await client.poll("web2", poll(name="web2"))


async def test_forged_presences_keep_no_agent_that_is_known_from_polling_with_the_same_token(client, session):
    await client.poll("web1", poll())
    forged = json(messages.PollRequest(b"{}", None, 0.0))
    codes = [(await call(session, "POST", messages.POLL.format(**AGENT), forged))[1]["code"] for _ in range(MOST + 2)]
    assert (codes[0], codes[-1]) == ("forged", "too_many_refusals")
    assert (await client.poll("web1", poll())).orders == ()
    stranger = json(poll(keys=Keys()))
    assert (await call(session, "POST", messages.POLL.format(**AGENT), stranger))[0] == 429


def test_a_flood_of_strangers_under_its_name_does_not_push_an_agent_away():
    clock = Clock()
    presences = Presences(100, clock)
    with presences.polling(who(key="own"), b"own", "t1"):
        pass
    for n in range(50):
        with contextlib.suppress(UnreachableError), presences.polling(who(key=f"k{n}"), b"x", "t1"):
            pass
        with contextlib.suppress(UnreachableError), presences.polling(who(key=f"k{n}"), b"x", "t2"):
            pass
    told = [seen.presence for seen in presences.all()]
    assert b"own" in told
    assert len(told) <= 2 * PER_TOKEN
    clock.now += BREATH_SECONDS + 1
    with presences.polling(who(key="own"), b"own", "t1"):
        for n in range(50):
            with presences.polling(who(key=f"l{n}"), b"x", "t1"):
                assert b"own" in [seen.presence for seen in presences.all()]
            clock.now += BREATH_SECONDS + 1
    for n in range(50):
        with contextlib.suppress(UnreachableError), presences.polling(who(key=f"m{n}"), b"x", f"token {n}"):
            pass
    assert len(presences.all()) == PER_NAME


def test_an_agent_that_is_started_again_has_its_place_however_full_it_is():
    presences = Presences(100, Clock())
    with contextlib.ExitStack() as stack:
        with presences.polling(who(key="own", start="1"), b"1", "t1"):
            pass
        for n in range(PER_TOKEN - 1):
            stack.enter_context(presences.polling(who(key=f"k{n}"), b"x", "t1"))
        with pytest.raises(UnreachableError), presences.polling(who(key="stranger"), b"x", "t1"):
            pass
        with presences.polling(who(key="own", start="2"), b"2", "t1"):
            assert b"2" in [seen.presence for seen in presences.all()]


# --- room


async def test_mail_that_is_full_says_so_and_when_to_come_back(tmp_path):
    limits = Limits(mail_bytes_per_agent=2000, linger_seconds=0.2, drain_seconds=2.0)
    async with running_relay(tmp_path / "r", limits=limits) as relay, relay.mail() as client:
        await client.post_orders([order(1, bytes(1000))])
        async with aiohttp.ClientSession(relay.url) as session:
            body = json(messages.OrdersRequest((order(2, bytes(1000)),)))
            async with session.post(messages.ORDERS, data=body, headers={"Content-Type": messages.JSON}) as response:
                assert response.status == 507
                assert int(response.headers["Retry-After"]) >= 60
                assert (await response.json(content_type=None))["code"] == "store_full"
        async with relay.mail(limits=ONE_TRY) as hasty:
            with pytest.raises(UnreachableError, match="no space left") as refused:
                await hasty.post_orders([order(2, bytes(1000))])
            assert refused.value.retry_after >= 60
        assert len((await client.poll("web1", poll())).orders) == 1


async def test_bundles_in_flight_keep_no_order_poll_or_report_from_its_way(tmp_path):
    limits = Limits(bytes_in_flight=10, linger_seconds=0.2, drain_seconds=2.0)
    async with running_relay(tmp_path / "r", limits=limits) as relay, relay.client(limits=ONE_TRY) as packages:
        client = MailClient(packages)
        with pytest.raises(UnreachableError):
            await packages.missing((messages.ChunkRanges("ab" * 32, ((0, 1),)),))
        with pytest.raises(UnreachableError):
            await client.post_logs("web1", pieces(0))
        assert await client.post_orders([order()]) == messages.TakenAnswer(1)
        assert len((await client.poll("web1", poll())).orders) == 1
        assert await client.post_reports("web1", reports(1)) == messages.TakenAnswer(1)


async def test_agents_that_send_much_keep_no_order_from_its_way(tmp_path):
    limits = Limits(mail_bytes_in_flight=2000, linger_seconds=0.2, drain_seconds=2.0)
    async with running_relay(tmp_path / "r", limits=limits) as relay, relay.mail(limits=ONE_TRY) as client:
        sent, held = asyncio.Event(), asyncio.Event()

        async def half_a_body():
            yield b" " * 1900
            sent.set()
            await held.wait()

        async with aiohttp.ClientSession(relay.url) as session:
            request = session.post(
                messages.REPORTS_IN.format(**AGENT), data=half_a_body(), headers={"Content-Type": messages.JSON}
            )
            async with waiting(request):
                async with asyncio.timeout(10):
                    await sent.wait()  # A report that is there before it would have it refused.
                    while await taken(client.post_reports("web1", reports(1))):
                        await asyncio.sleep(0.01)
                assert await client.post_orders([order()]) == messages.TakenAnswer(1)
        async with asyncio.timeout(10):
            while not await taken(client.post_reports("web1", reports(1))):
                await asyncio.sleep(0.01)


async def taken(posting):
    try:
        await posting
    except UnreachableError:
        return False
    return True


# --- a relay that cannot be trusted


@pytest.mark.parametrize(
    "answer",
    [b"", b"[]", b'{"epoch":1}', b'{"epoch":"x","orders":[1],"reports":[{"number":"1"}]}', b"\xff", b"[" * 5000],
)
async def test_an_answer_that_is_not_the_protocols_is_untrusted(answer):
    async def say(request):
        return web.Response(body=answer, content_type=messages.JSON)

    async with (
        small_server([web.post(messages.POLL, say), web.get(messages.REPORTS_OUT, say)]) as url,
        mail_client(url, limits=CLIENT_LIMITS) as client,
    ):
        with pytest.raises(UntrustedError):
            await client.poll("web1", poll())
        with pytest.raises(UntrustedError):
            await client.reports(D, wait=0)


async def test_a_poll_is_sent_once_and_waits_as_long_as_it_asked_for():
    polls = 0

    async def busy(request):
        nonlocal polls
        polls += 1
        return web.Response(status=503)

    async def silent(request):
        await asyncio.sleep(30)

    async with (
        small_server([web.post("/v1/agents/busy/poll", busy), web.post("/v1/agents/slow/poll", silent)]) as url,
        mail_client(url, limits=replace(CLIENT_LIMITS, answer_seconds=0.2)) as client,
    ):
        with pytest.raises(UnreachableError):
            await client.poll("busy", poll())
        assert polls == 1
        before = asyncio.get_running_loop().time()
        with pytest.raises(UnreachableError, match="in time"):
            await client.poll("slow", poll(wait=0.5))
        assert asyncio.get_running_loop().time() - before >= 0.65


# --- a relay that is killed


@pytest.mark.processes
async def test_mail_is_there_after_sigkill_and_the_next_start(tmp_path):
    with RelayProcess(tmp_path) as relay:
        async with mail_client(relay.url) as client:
            posted = [client.post_orders([order(n, b"%d" % n)]) for n in range(40)]
            await asyncio.gather(*posted, client.post_reports("web1", reports(1)), client.post_logs("web1", pieces(0)))
            first = await client.poll("web1", poll())
        relay.kill()
    with RelayProcess(tmp_path) as relay:
        async with mail_client(relay.url) as client:
            assert await client.agents() == (), "presence is in memory only"
            again = await client.poll("web1", poll())
            assert again == first
            assert {o.envelope for o in again.orders} == {b"%d" % n for n in range(40)}
            cursor = messages.Cursor(first.epoch, first.orders[-1].number)
            assert (await client.poll("web1", poll(cursor))).orders == ()
            assert await client.post_orders([order(3, b"3"), order(40)]) == messages.TakenAnswer(1, 1)
            assert [o.operation for o in (await client.poll("web1", poll(cursor))).orders] == [order(40).operation]
            assert len((await client.reports(D, wait=0)).reports) == 1
            assert len((await client.logs(D, wait=0)).pieces) == 1


@pytest.mark.processes
async def test_killed_in_the_middle_of_posting_a_relay_has_all_that_it_acknowledged(tmp_path):
    acknowledged = set()

    async def post_on(client, sender):
        for n in range(10_000):
            letter = order(f"{sender}.{n}", b"x" * 500)
            await client.post_orders([letter])
            acknowledged.add(letter.operation)

    with RelayProcess(tmp_path) as relay:
        async with mail_client(relay.url, limits=ONE_TRY) as client:
            senders = [asyncio.create_task(post_on(client, sender)) for sender in range(8)]
            await eventually(lambda: len(acknowledged) > 300)
            relay.kill()
            ends = await asyncio.gather(*senders, return_exceptions=True)
    assert all(isinstance(end, UnreachableError) for end in ends), ends
    with RelayProcess(tmp_path) as relay:
        async with mail_client(relay.url) as client:
            found, cursor = [], None
            while orders := (got := await client.poll("web1", poll(cursor))).orders:
                found += [o.operation for o in orders]
                cursor = messages.Cursor(got.epoch, orders[-1].number)
    assert acknowledged <= set(found)
    assert len(found) == len(set(found))
    assert len(found) <= len(acknowledged) + len(senders), "more than was ever under way"


@pytest.mark.processes
async def test_a_relay_whose_mail_was_emptied_tells_its_readers(tmp_path):
    with RelayProcess(tmp_path) as relay:
        async with mail_client(relay.url) as client:
            await client.post_orders([order(1, b"one")])
            before = await client.poll("web1", poll())
        relay.stop()
    shutil.rmtree(tmp_path / "relay/state/mail")
    with RelayProcess(tmp_path) as relay:
        async with mail_client(relay.url) as client:
            await client.post_orders([order(2, b"two")])
            after = await client.poll("web1", poll(messages.Cursor(before.epoch, before.orders[-1].number)))
    assert after.epoch != before.epoch
    assert [o.envelope for o in after.orders] == [b"two"]


async def test_many_posts_at_once_are_few_commits(relay, client, monkeypatch):
    """Each commit is held for a moment, so that what is posted meanwhile must wait; the commits are then counted."""
    commits = []
    take = LetterDatabase.take

    def slow(self, requests, arrived):
        commits.append(len(requests))
        time.sleep(0.2)
        return take(self, requests, arrived)

    monkeypatch.setattr(LetterDatabase, "take", slow)
    await asyncio.gather(*(client.post_orders([order(n)]) for n in range(60)))
    assert 1 <= len(commits) <= 6
    assert sum(commits) == 60
    assert len((await client.poll("web1", poll())).orders) == 60


async def test_mail_is_counted(client, session):
    await client.post_orders([order()])
    await client.post_orders([order()])
    async with session.get(messages.METRICS) as response:
        text = await response.text()
    for words in (
        'waystation_mail_letters_total{kind="order",outcome="taken"}',
        'waystation_mail_letters_total{kind="order",outcome="known"}',
        "waystation_mail_kept_bytes 517",
        "waystation_agents",
    ):
        assert words in text
