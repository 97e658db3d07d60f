from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from relay.errors import (
    ArchiveError,
    ChunkInvalid,
    ChunkMissing,
    ConflictError,
    FrameError,
    IdentityError,
    LockedError,
    ManifestError,
    NotFoundError,
    SignatureError,
    StoreError,
    UnreachableError,
    UsageError,
    WaystationError,
)
from relay.protocol.credentials import is_loopback
from relay.server.http.access import (
    OPEN,
    Access,
    RouteInfo,
    add,
    check_routes,
    guarded_app,
    host_name,
    iter_routes,
)
from relay.server.http.bodies import parse_json
from relay.server.http.connection import Ledger, Limits, Meter, StallWatch, address_key, bytes_for_encoders
from relay.server.http.listen import start_guarded
from relay.server.http.problems import PROBLEM_TYPE, TITLES, HttpRefusal, problem, problem_of, tell_problem, verdict_of
from relay.server.http.tokens import TokenSet, make_token
from relay.support.json_bounds import repeats_a_key

# --- problems


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (IdentityError("id", "canary", "x"), 400, None),
        (FrameError("canary"), 400, None),
        (ManifestError("canary"), 400, None),
        (ArchiveError("overlap", "canary"), 400, None),
        (UsageError("canary"), 400, None),
        (ChunkInvalid("canary", "f"), 422, None),
        (SignatureError("canary"), 422, None),
        (NotFoundError("canary"), 404, None),
        (ChunkMissing("canary"), 404, None),
        (ConflictError("canary"), 409, None),
        (LockedError("canary"), 409, None),
        (StoreError("canary", full=True), 507, 60.0),
        (StoreError("canary"), 500, None),
        (UnreachableError("canary"), 503, 2.0),
        (UnreachableError("canary", retry_after=7.0), 503, 7.0),
        (WaystationError("canary"), 500, None),
        (ZeroDivisionError("canary"), 500, None),
        (web.HTTPNotFound(text="canary"), 404, None),
        (web.HTTPMethodNotAllowed("canary", ["GET"]), 405, None),
        (web.HTTPTeapot(text="canary") if hasattr(web, "HTTPTeapot") else web.HTTPGone(text="canary"), None, None),
    ],
)
def test_every_error_has_its_status_and_tells_nothing_of_itself(
    error: Exception, status: int | None, retry: float | None
) -> None:
    verdict = verdict_of(error)
    assert status in {None, verdict.status}
    assert verdict.retry_after == retry
    response = problem_of(error)
    assert response.content_type == PROBLEM_TYPE
    document = json.loads(response.body)
    assert document["status"] == response.status == verdict.status
    assert document["title"] == TITLES[document["code"]]
    assert document["type"].endswith(document["code"])
    assert "canary" not in repr(response.headers) + response.body.decode()
    assert ("Retry-After" in response.headers) == (retry is not None)


def test_the_id_of_a_problem_leads_to_its_cause_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    errors = (ZeroDivisionError("the reason"), FrameError("bad\nline \x1b[1m forged"))
    answers = [problem_of(error) for error in errors]
    ids = [json.loads(answer.body)["id"] for answer in answers]
    assert len(set(ids)) == 2
    for answer in answers:
        tell_problem(make_mocked_request("GET", "/"), answer)
    for id, record in zip(ids, caplog.records, strict=True):
        assert id in record.getMessage()
        assert "\n" not in record.getMessage()
        assert "\x1b" not in record.getMessage()
    assert caplog.records[0].exc_info is not None
    assert caplog.records[1].exc_info is None


def test_retry_after_is_spread_but_never_earlier_than_asked() -> None:
    seen = {int(problem(503, "busy", retry_after=20.0).headers["Retry-After"]) for _ in range(200)}
    assert min(seen) >= 20
    assert max(seen) <= 30
    assert len(seen) > 3


def test_a_problem_carries_further_members_but_they_cannot_replace_its_own() -> None:
    document = json.loads(problem(409, "missing_chunks", extra={"missing": [[0, 3]], "title": "x"}).body)
    assert document["missing"] == [[0, 3]]
    assert document["title"] == TITLES["missing_chunks"]


# --- JSON


class Note(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: str
    numbers: tuple[int, ...] = ()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.mark.long
@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", '"', "\\", "é", "{", "}", ":", "a:"]), json_values)), st.booleans()
)
def test_a_repeated_key_is_found_however_it_is_spelled(pairs: list[tuple[str, object]], ascii_only: bool) -> None:
    members = ", ".join(f"{json.dumps(k, ensure_ascii=ascii_only)} : {json.dumps(v)}" for k, v in pairs)
    raw = f'[{{"x": {{{members}}}}}, {{"x": 1}}]'.encode()
    assert repeats_a_key(raw) == (len({key for key, _ in pairs}) < len(pairs))


def test_one_key_in_two_spellings_is_a_repeated_key() -> None:
    assert repeats_a_key(b'{"a": 1, "\\u0061": 2}')
    assert repeats_a_key('{"é": 1, "\\u00e9": 2}'.encode())
    assert not repeats_a_key(b'{"a": {"a": ["a", "a"]}, "b": {"a": 1}}')


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b'{"text": "a"',
        b'\xef\xbb\xbf{"text": "a"}',
        b'{"text": "a", "text": "b"}',
        b'{"text": "a", "numbers": [NaN]}',
        b'{"text": "a", "numbers": [1e400]}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xed\xa0\x80"}',
        b'{"text": "\xff"}',
        b'{"text": "a", "numbers": [99999999999999999999999999999999999999999.5]}',
        b'{"text": "a"} {}',
        b'{"text": "a", "more": 1}',
        b'{"text": 1}',
        b"[" * 1_000_000,
        b"[" * 1_000_000 + b"]" * 1_000_000,
        b'{"a":' * 17 + b"1" + b"}" * 17,
        b'"' + b'\\"' * 500_000,
        b'{"text": "a", "x": ' + b"[" * 16 + b"]" * 16 + b"}",
    ],
    ids=lambda raw: raw[:30].decode("latin-1"),
)
def test_json_that_is_not_exactly_what_the_type_says_is_a_400(raw: bytes) -> None:
    with pytest.raises(HttpRefusal) as refused:
        parse_json(raw, Note, 16)
    assert refused.value.status == 400


def test_good_json_is_read() -> None:
    assert parse_json(b'{"text": "[[[\\"{", "numbers": [1, 2]}', Note, 2) == Note('[[["{', (1, 2))


# --- connections


class LedgerMachine(RuleBasedStateMachine):
    """Connections come, show identities, poll and go, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = Limits(connections=8, connections_per_address=3, connections_per_identity=2, long_polls=2)
        self.ledger = Ledger(self.limits)
        self.open: list = []
        self.polls: list = []

    @rule(address=st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"]))
    def connect(self, address: str) -> None:
        full = (
            sum(not t.polling for t in self.open) >= self.limits.connections
            or sum(t.address == address and t.identity is None and not t.polling for t in self.open) >= 3
        )
        ticket = self.ledger.admit(address)
        assert (ticket is None) == full
        if ticket is not None:
            self.open.append(ticket)

    @rule(pick=st.integers(0, 99), id=st.sampled_from("abc"))
    def identify(self, pick: int, id: str) -> None:
        if not self.open:
            return
        ticket = self.open[pick % len(self.open)]
        if ticket.polling:
            return
        full = sum(t.identity == id and not t.polling for t in self.open) >= 2
        if ticket.identity == id or not full:
            ticket.identify(id)
            return
        with pytest.raises(HttpRefusal) as refused:
            ticket.identify(id)
        assert refused.value.status == 429

    @rule(pick=st.integers(0, 99))
    def poll(self, pick: int) -> None:
        waiting = [t for t in self.open if not t.polling]
        if not waiting:
            return
        poll = waiting[pick % len(waiting)].long_poll()
        try:
            poll.__enter__()
        except UnreachableError:
            assert len(self.polls) >= 2
        else:
            self.polls.append(poll)

    @rule()
    def poll_ends(self) -> None:
        if self.polls:
            self.polls.pop(0).__exit__(None, None, None)

    @rule(pick=st.integers(0, 99))
    def leave(self, pick: int) -> None:
        polling = [t for t in self.open if not t.polling]
        if polling:
            ticket = polling[pick % len(polling)]
            self.open.remove(ticket)
            ticket.release()
            ticket.release()

    @invariant()
    def the_books_are_right(self) -> None:
        counted = [t for t in self.open if not t.polling]
        assert self.ledger.total == len(counted)
        assert self.ledger.polling == len(self.open) - len(counted)
        assert sum(self.ledger.by_address.values()) == sum(t.identity is None for t in counted)
        assert sum(self.ledger.by_identity.values()) == sum(t.identity is not None for t in counted)
        assert 0 not in self.ledger.by_address.values()


TestLedger = LedgerMachine.TestCase
TestLedger.pytestmark = [pytest.mark.long]


def test_a_connection_that_is_lost_while_it_polls_leaves_no_trace() -> None:
    ledger = Ledger(Limits())
    ticket = ledger.admit("10.0.0.1")
    assert ticket is not None
    with ticket.long_poll():
        assert (ledger.total, ledger.polling) == (0, 1)
        ticket.release()
    assert (ledger.total, ledger.polling) == (0, 0)
    assert not ledger.by_address


def test_each_connection_leaves_less_for_encoders_and_gives_it_back() -> None:
    limits = Limits(connections=10_000, connections_per_address=10_000)
    ledger, told = Ledger(limits), list[int]()
    ledger.left_for_encoders = told.append
    tickets = [ledger.admit("10.0.0.1") for _ in range(2_000)]
    assert told == sorted(told, reverse=True)
    assert told[0] == bytes_for_encoders(limits.memory_bytes, 1) == told[100], "some connections cost them nothing"
    assert told[-1] == bytes_for_encoders(limits.memory_bytes, 100_000) > 0, "they always have enough for one run"
    for ticket in tickets:
        assert ticket is not None
        ticket.release()
    assert told[-1] == bytes_for_encoders(limits.memory_bytes, 0)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1", "::ffff:10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("local", "local", True),
    ],
)
def test_what_one_peer_can_own_is_one_address(one: str, other: str, same: bool) -> None:
    assert (address_key(one) == address_key(other)) == same


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(0, 1000)), max_size=60))
def test_a_meter_never_undercounts_its_window(steps: list[tuple[float, int]]) -> None:
    meter, now, sent = Meter(10.0), 0.0, []
    for pause, size in steps:
        now += pause
        meter.add(now, size)
        sent.append((now, size))
        assert meter.total(now) >= sum(s for t, s in sent if t >= now - 10.0)
        assert meter.total(now) <= sum(s for t, s in sent if t >= now - 12.0)


def test_who_reads_nothing_has_stalled_when_the_time_is_over() -> None:
    watch = StallWatch(Limits(write_stall_seconds=30.0, write_min_rate=1024.0))
    assert not watch.stalled(0.0, 100_000, 500)
    assert not watch.stalled(29.9, 100_000, 500)
    assert watch.stalled(30.0, 100_000, 500)


def test_who_reads_a_byte_now_and_then_has_stalled_too() -> None:
    watch = StallWatch(Limits(write_stall_seconds=30.0, write_min_rate=1024.0))
    assert not any(watch.stalled(t, 100_000, int(t)) for t in range(30))
    assert watch.stalled(30.0, 100_000, 30)


def test_who_reads_slowly_but_steadily_is_left_alone() -> None:
    watch = StallWatch(Limits(write_stall_seconds=30.0, write_min_rate=1024.0))
    assert not any(watch.stalled(float(t), 100_000, t * 1100) for t in range(0, 3600, 7))


def test_a_buffer_that_emptied_in_between_starts_anew() -> None:
    watch = StallWatch(Limits(write_stall_seconds=30.0, write_min_rate=1024.0))
    assert not watch.stalled(0.0, 10, 0)
    assert not watch.stalled(20.0, 0, 0)
    assert not watch.stalled(35.0, 10, 0)
    assert watch.stalled(65.0, 10, 0)


# --- hosts


@pytest.mark.parametrize(
    "header", ["", "a b", "a/b", "a@b", "[::1", "::1", "a:b", "a:123456", "ä.example", "a,b", "a\tb"]
)
def test_a_malformed_host_is_a_400(header: str) -> None:
    with pytest.raises(HttpRefusal) as refused:
        host_name(header)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("header", "loopback"),
    [
        ("localhost", True),
        ("LOCALHOST:8080", True),
        ("127.0.0.1:1", True),
        ("127.9.9.9", True),
        ("[::1]:80", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("2130706433", False),
        ("0.0.0.0", False),
        ("[::]", False),
        ("10.0.0.1", False),
    ],
)
def test_only_loopback_names_are_loopback(header: str, loopback: bool) -> None:
    assert is_loopback(host_name(header)) == loopback


# --- routes and start


async def nothing(request: web.Request) -> web.Response:
    return web.Response()


def test_every_route_is_listed_with_its_scope() -> None:
    app = guarded_app(Access(TokenSet([])))
    add(app, "GET", "/v1/health", nothing, OPEN)
    add(app, "PUT", "/v1/{id}", nothing, "write")
    check_routes(app)
    assert list(iter_routes(app)) == [RouteInfo("GET", "/v1/health", OPEN), RouteInfo("PUT", "/v1/{id}", "write")]


def test_a_route_without_or_with_an_unknown_scope_is_refused_at_start_up() -> None:
    app = guarded_app(Access(TokenSet([])))
    with pytest.raises(UsageError):
        add(app, "GET", "/a", nothing, "admin")
    app.router.add_get("/past-the-guard", nothing)
    with pytest.raises(UsageError, match="/past-the-guard"):
        check_routes(app)
    with pytest.raises(UsageError):
        check_routes(web.Application())


async def test_beyond_loopback_nothing_listens_without_tokens() -> None:
    with pytest.raises(UsageError, match="access control"):
        await start_guarded(guarded_app(Access(TokenSet([]))), "0.0.0.0", 0, Limits())
    _, record = make_token(["read"], datetime.now(UTC))
    running = await start_guarded(guarded_app(Access(TokenSet([record]))), "0.0.0.0", 0, Limits())
    assert re.fullmatch(r"http://0\.0\.0\.0:\d+", running.url)
    await running.stop()
    await running.stop()


async def test_an_address_in_use_is_told_as_such_and_may_be_free_later() -> None:
    running = await start_guarded(guarded_app(Access(TokenSet([]))), "127.0.0.1", 0, Limits())
    with pytest.raises(UnreachableError, match="cannot listen"):
        await start_guarded(guarded_app(Access(TokenSet([]))), "127.0.0.1", running.port, Limits())
    await running.stop()


@pytest.mark.parametrize("host", ["192.0.2.1", "relay.invalid"])
async def test_an_interface_or_a_name_that_is_not_there_yet_is_worth_another_try(host: str) -> None:
    _, record = make_token(["read"], datetime.now(UTC))
    with pytest.raises(UnreachableError, match=f"cannot listen on {host}:0"):
        await start_guarded(guarded_app(Access(TokenSet([record]))), host, 0, Limits())


def test_taking_away_the_last_token_does_not_open_the_relay() -> None:
    _, record = make_token(["read"], datetime.now(UTC))
    access = Access(TokenSet([record]))
    access.tokens = TokenSet([])
    assert access.required


@pytest.mark.processes
def test_without_the_c_parser_the_relay_refuses_to_start() -> None:
    program = "from relay.server.http.listen import check_c_parser\ncheck_c_parser()"
    for switch, expected in (("1", 1), ("", 0)):
        result = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "AIOHTTP_NO_EXTENSIONS": switch},
            capture_output=True,
            text=True,
        )
        assert result.returncode == expected, result.stderr
        assert ("C parser" in result.stderr) == bool(expected)


@pytest.mark.processes
async def test_a_small_limit_of_open_files_is_raised() -> None:
    program = (
        "import resource\n"
        "from relay.server.http.connection import Limits\n"
        "from relay.server.http.listen import raise_open_files\n"
        "_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))\n"
        "raised = raise_open_files(Limits())\n"
        "assert raised == resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256, raised\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
