"""Checks: what counts as well, for how long it must be so, and what a try must never do."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from harness.process import eventually
from harness.relays import small_server
from hypothesis import given
from hypothesis import strategies as st

from agent.checks.checked_text import contains as holds
from agent.checks.checked_text import plain, read_text
from agent.checks.run_checks import BODY_MAX, judge_body, run_checks
from agent.orders.orders import CommandCheck, HttpCheck, ServiceCheck, TcpCheck, TimedCheck


class Site:
    """A web server whose answers the test decides."""

    def __init__(self) -> None:
        self.url = ""
        self.status = 200
        self.body = b"1.2.3\n"
        self.type = "text/plain"
        self.hits = 0
        self.well_from = 1
        """The first hit that is answered as above; those before it get 503."""
        self.ill_at: set[int] = set()
        self.headers: list[dict[str, str]] = []

    async def answer(self, request: web.Request) -> web.Response:
        self.hits += 1
        self.headers.append(dict(request.headers))
        if self.hits < self.well_from or self.hits in self.ill_at:
            return web.Response(status=503, text="not yet")
        return web.Response(
            status=self.status, body=self.body, headers={"Set-Cookie": "seen=1", "Content-Type": self.type}
        )


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    made = Site()

    async def away(_: web.Request) -> web.Response:
        raise web.HTTPFound("/version")

    async def slow(_: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    routes = [web.get("/version", made.answer), web.get("/away", away), web.get("/slow", slow)]
    async with small_server(routes) as url:
        made.url = url
        yield made


def http(
    site: Site, path: str = "/version", *, deadline: float = 0.3, lasting: float = 0.0, **more: object
) -> TimedCheck:
    return TimedCheck(HttpCheck(site.url + path, **more), lasting=lasting, deadline=deadline, timeout=5.0)


def command(*argv: str, deadline: float = 5.0, timeout: float = 5.0) -> TimedCheck:
    return TimedCheck(CommandCheck(argv), deadline=deadline, timeout=timeout)


@pytest.mark.parametrize(
    ("body", "type"),
    [
        (b"\xef\xbb\xbf1.2.3 \xc3\xbc\r\n", "text/plain"),
        ("1.2.3 ü".encode("utf-16"), "text/plain"),
        ("1.2.3 ü\r\n".encode("utf-16-be"), "text/plain; charset=UTF-16BE"),
        (b"1.2.3 \xfc", "text/plain; charset=ISO-8859-1"),
        (b"1.2.3 \xfc  \n\n", 'text/plain; charset="windows-1252"'),
        (b"1.2.3 u\xcc\x88", "text/plain; charset=no-such-thing"),
    ],
)
async def test_a_body_is_compared_as_a_person_would_read_it(site: Site, body: bytes, type: str) -> None:
    site.body, site.type = body, type
    for asked in ({"expect": "1.2.3 ü\n"}, {"contains": "2.3 ü"}):
        result = await run_checks([http(site, **asked)])
        assert result.ok, result.texts
    wrong = await run_checks([http(site, expect="1.2.3 u")])
    assert "says '1.2.3 ü', expected '1.2.3 u'" in wrong.texts[0]


async def test_the_expected_body_counts_without_its_white_space(site: Site) -> None:
    result = await run_checks([http(site, expect="1.2.3")])

    assert result.ok
    assert "says '1.2.3'" in result.texts[0]


async def test_another_body_is_told_with_what_was_expected(site: Site) -> None:
    result = await run_checks([http(site, expect="1.2.4")])

    assert not result.ok
    assert "says '1.2.3', expected '1.2.4'" in result.texts[0]


async def test_it_is_tried_until_it_is_well(site: Site) -> None:
    site.well_from = 3

    assert (await run_checks([http(site, deadline=10.0)])).ok
    assert site.hits == 3


async def test_a_break_begins_the_holding_anew(site: Site) -> None:
    site.ill_at = {3}

    result = await run_checks([http(site, lasting=0.4, deadline=10.0)])

    assert result.ok
    assert site.hits > 5, "the two good tries before the break must not count"


async def test_well_for_too_short_a_time_is_not_well(site: Site) -> None:
    result = await run_checks([http(site, lasting=5.0, deadline=0.4)])

    assert not result.ok
    assert "not for 5 s" in result.texts[0]


async def test_a_redirect_is_not_followed(site: Site) -> None:
    result = await run_checks([http(site, "/away")])

    assert "status 302, expected 200" in result.texts[0]
    assert site.hits == 0


async def test_the_expected_status_may_be_any(site: Site) -> None:
    assert (await run_checks([http(site, "/away", status=302)])).ok


async def test_an_endless_body_is_not_read(site: Site) -> None:
    site.body = b"x" * (BODY_MAX + 1)

    assert "more than" in (await run_checks([http(site)])).texts[0]


async def test_no_proxy_of_the_environment_and_no_cookie_is_used(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")

    assert (await run_checks([http(site, lasting=0.1, deadline=5.0)])).ok
    assert site.hits >= 2
    assert not any("Cookie" in headers for headers in site.headers)


async def test_a_try_that_hangs_is_cut_at_the_deadline(site: Site) -> None:
    async with asyncio.timeout(10):
        result = await run_checks([http(site, "/slow", deadline=0.2)])

    assert "no answer within" in result.texts[0]


async def test_who_is_not_there_is_told_with_the_address() -> None:
    result = await run_checks([TimedCheck(TcpCheck("127.0.0.1", 1), deadline=0.1)])

    assert not result.ok
    assert "127.0.0.1:1" in result.texts[0]


async def test_an_open_port_is_well(site: Site) -> None:
    port = int(site.url.rpartition(":")[2])

    assert (await run_checks([TimedCheck(TcpCheck("127.0.0.1", port), deadline=2.0)])).ok


async def test_all_checks_must_hold_and_each_says_its_own(site: Site) -> None:
    result = await run_checks([http(site), command("false", deadline=0.1)])

    assert not result.ok
    assert "status 200" in result.texts[0]
    assert "exit status 1" in result.texts[1]


async def test_a_command_says_why_with_its_last_line() -> None:
    result = await run_checks(
        [command("sh", "-c", "echo first; echo 'queue is\x1b[31m full' >&2; exit 3", deadline=0.2)]
    )

    assert not result.ok
    assert "exit status 3 (queue is" in result.texts[0]
    assert "\x1b" not in result.texts[0]


async def test_a_command_sees_nothing_of_our_environment_but_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_THING", "hunter2")

    assert (await run_checks([command("sh", "-c", 'test -z "$SECRET_THING" && test -n "$PATH"')])).ok


async def test_a_command_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    script = f"sleep 300 & echo $! > {tmp_path}/child; echo $$ > {tmp_path}/self; wait"

    result = await run_checks([command("sh", "-c", script, deadline=1.0, timeout=1.0)])

    assert "no answer within" in result.texts[0]
    pids = [int((tmp_path / name).read_text()) for name in ("child", "self")]
    await eventually(lambda: not any(_lives(pid) for pid in pids))


async def test_a_daemon_that_a_command_leaves_is_not_waited_for(tmp_path: Path) -> None:
    async with asyncio.timeout(20):
        result = await run_checks([command("sh", "-c", f"sleep 300 & echo $! > {tmp_path}/child; exit 0")])

    child = int((tmp_path / "child").read_text())
    lived = _lives(child)
    os.kill(child, 9)
    assert result.ok
    assert lived, "it was killed, or never there"


async def test_a_command_that_does_not_exist_is_a_failed_check_not_an_error() -> None:
    result = await run_checks([command("/no/such/program", deadline=0.1)])

    assert not result.ok
    assert "/no/such/program" in result.texts[0]


async def test_a_chatty_command_does_not_wait_for_its_reader() -> None:
    code = "import sys\nfor _ in range(200): sys.stdout.write('x' * 10000)\nprint('\\nlast')"

    result = await run_checks([command(sys.executable, "-c", code, deadline=20.0, timeout=20.0)])

    assert result.ok
    assert "(last)" in result.texts[0]


async def test_a_service_is_asked_for_by_the_configured_command(tmp_path: Path) -> None:
    manager = tmp_path / "sv"
    manager.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ntest "$2" = webshop\n')
    manager.chmod(0o755)
    template = [str(manager), "{action}", "{service}"]

    well = await run_checks([TimedCheck(ServiceCheck("webshop"), deadline=5.0)], service_command=template)
    ill = await run_checks([TimedCheck(ServiceCheck("other"), deadline=0.05)], service_command=template)

    assert (well.ok, ill.ok) == (True, False)
    assert (tmp_path / "asked").read_text().splitlines()[0] == "is-active webshop"


@given(st.binary(max_size=300), st.none() | st.text(max_size=20), st.none() | st.text(max_size=20))
def test_no_body_is_an_error_and_every_verdict_is_one_line(
    body: bytes, expect: str | None, contains: str | None
) -> None:
    said = judge_body(HttpCheck("http://h/", expect=expect, contains=contains), read_text(body))

    assert said.text.isprintable()
    if said.ok and contains is not None:
        assert holds(read_text(body), plain(contains))


def _lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in {b"Z", b"X"}
    except OSError:
        return False
