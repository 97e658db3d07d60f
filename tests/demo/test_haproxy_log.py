"""Lines that HAProxy 2.6.12 wrote itself (haproxy-2.6.log: servers died, came back, were drained, tracked and disabled),
read by the demo's log reader.
"""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path

import pytest
from harness.haproxy_reader import by_server_and_status, failed_requests, were_out

sys.path.append(str(Path(__file__).parents[2] / "deploy" / "demo"))

from haproxy_log import (
    Log,
    LogError,
    Moment,
    fewest_in_service,
    most_out_at_once,
    parse,
    rotation,
    since,
)

LINES = Path(__file__).with_name("haproxy-2.6.log").read_text().splitlines()
SERVERS = ("web1", "web2", "web3", "web4")
STAMP = "<5>2026-11-23T05:00:00.000001+00:00"


@pytest.fixture
def log() -> Log:
    return parse(LINES, SERVERS)


def clock(moment: Moment) -> str:
    return "" if moment.at is None else f"{moment.at:%M:%S.%f}"[:-3]


def test_every_moment_of_rotation_is_the_one_that_haproxy_told(log: Log):
    told = [(clock(moment), " ".join(sorted(moment.out))) for moment in rotation(log)]
    assert told == [
        ("", ""),
        # No check had passed yet.
        ("11:27.520", "web1"),
        ("11:27.542", "web1 web2"),
        ("11:27.592", "web1 web2 web3"),
        ("11:27.797", "web1 web2"),
        ("11:27.824", "web2"),
        ("11:27.849", ""),
        # The application said 404: HAProxy calls that stopping. web3 is what is found of another server.
        ("11:30.554", "web3"),
        ("11:30.573", "web1 web3"),
        ("11:31.064", "web1"),
        ("11:31.083", ""),
        # Drained by order, while the server it follows was drained and came back.
        ("11:31.636", "web3"),
        ("11:32.240", ""),
        # Maintenance: of the server that it follows, then of its own, then the one ended and the other.
        ("11:32.543", "web3"),
        ("11:33.502", ""),
        # Maintenance, drained in it, ready.
        ("11:33.966", "web1"),
        ("11:34.977", ""),
        # Drained, maintenance in it, ready.
        ("11:35.331", "web1"),
        ("11:36.074", ""),
        # Killed.
        ("11:36.500", "web1"),
        ("11:36.571", "web1 web3"),
        ("11:37.071", "web1 web2 web3"),
        ("11:37.576", "web1 web2 web3 web4"),
        ("11:37.856", "web1 web3 web4"),
        ("11:37.856", "web1 web2 web3 web4"),
        ("11:37.856", "web1 web3 web4"),
    ]


def test_the_most_that_were_out_and_the_fewest_in_service_are_of_the_worst_moment(log: Log):
    assert (most_out_at_once(log), fewest_in_service(log)) == (4, 0)
    assert were_out(rotation(log)) == set(SERVERS)
    calm = parse([line for line in LINES if "05:11:3" in line and "05:11:36" not in line and "05:11:37" not in line])
    assert (most_out_at_once(calm), fewest_in_service(calm)) == (2, 0)
    assert were_out(rotation(calm)) == {"web1", "web3"}


def test_requests_are_counted_by_server_and_status(log: Log):
    assert by_server_and_status(log) == {
        ("web3", 200): 1,
        ("web1", 504): 1,
        ("web3", 504): 1,
        ("web3", 502): 1,
        ("web1", 503): 2,
        ("web3", 503): 1,
        ("<NOSRV>", 503): 1,
    }
    assert [(request.status, request.termination) for request in failed_requests(log)] == [
        (504, "sH--"),
        (504, "sH--"),
        (502, "SH--"),
        (503, "SC--"),
        (503, "SC--"),
        (503, "SC--"),
        (503, "SC--"),
    ]


def test_a_request_begins_as_long_before_its_line_as_it_took(log: Log):
    slow = next(request for request in log.requests if request.status == 504)
    assert f"{slow.at:%M:%S.%f}" == "11:28.710665"
    assert f"{slow.ended:%M:%S.%f}" == "11:29.712665"


def test_a_drained_server_that_dies_and_comes_back_is_out_until_it_is_ready():
    recorded = [
        "Server web/web1 enters drain state. 2 active and 0 backup servers online. 0 sessions requeued, 0 total in queue.",
        'Server web/web1 is DOWN, reason: Layer4 connection problem, info: "Connection refused", check duration: 0ms.',
        "Server web/web1 remains in forced drain mode.",
        "Server web/web1 is UP, reason: Layer7 check passed, code: 200, check duration: 1ms. 2 active and 0 backup",
        "Server web/web1 remains in forced drain mode.",
        "Server web/web1 is UP (leaving forced drain).",
    ]
    told = [rotation(parse([f"{STAMP} {line}" for line in recorded[: n + 1]]))[-1].out for n in range(len(recorded))]
    assert told == [{"web1"}] * 5 + [set()]


def test_a_server_that_is_told_to_be_ready_while_it_is_down_stays_out_until_it_is_up():
    recorded = [
        "Server web/web1 was DOWN and now enters maintenance.",
        "Server web/web1 is UP/READY (leaving forced maintenance).",
        "Server web/web1 enters drain state. 2 active and 0 backup servers left.",
        "Server web/web1 is DOWN (leaving forced drain).",
        "Server web/web1 is UP, reason: Layer7 check passed, code: 200",
    ]
    told = [rotation(parse([f"{STAMP} {line}" for line in recorded[: n + 1]]))[-1].out for n in range(len(recorded))]
    assert told == [{"web1"}, set(), {"web1"}, {"web1"}, set()]


def test_a_log_that_is_cut_begins_as_the_part_before_ended(log: Log):
    moments = [moment for moment in rotation(log) if moment.at is not None]
    for before, moment in zip([rotation(log)[0], *moments], moments, strict=False):
        assert moment.at is not None
        if before.at == moment.at:
            continue
        rest = since(log, moment.at)
        assert rotation(rest)[0].out == before.out
        assert rotation(rest)[-1].out == moments[-1].out
        assert all(request.at >= moment.at for request in rest.requests)


def test_other_backends_and_other_lines_are_left_out():
    assert parse(LINES, backend="nothing") == Log({}, (), ())
    assert set(parse(LINES, backend="other").start) == {"a"}
    assert parse(["", "no line of HAProxy", f"{STAMP} Proxy web started."]) == Log({}, (), ())


def test_a_server_that_nobody_mentions_counts_when_it_is_named():
    assert fewest_in_service(parse([], ("web1", "web2"))) == 2


def test_a_sentence_that_nobody_knows_is_refused_and_not_taken_for_nothing():
    with pytest.raises(LogError, match="takes a nap"):
        parse([f"{STAMP} Server web/web1 takes a nap"])


@pytest.mark.parametrize("termination", ["CD--", "SD--", "LR--"])
def test_an_answer_that_was_cut_failed_whatever_its_status(termination: str):
    line = (
        f"{STAMP} 127.0.0.1:1 [23/Nov/2026:05:00:00.000] shop web/web1 0/0/0/1/2 200 9 - - {termination} "
        '1/1/0/0/0 0/0 "GET / HTTP/1.1"'
    )
    [request] = failed_requests(parse([line]))
    assert request.ended == datetime.fromisoformat("2026-11-23T05:00:00.000001+00:00")
