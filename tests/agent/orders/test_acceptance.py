"""May this order be obeyed: one row for every reason why not, and proof that no other bytes ever get through."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import msgspec
import pytest
from harness.orders_kit import DEPLOYMENT, JOURNAL, OTHER, Desk, desk_in, fence_seen, new_signer, scoped
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.orders.acceptance import Accepted, Known, Me, Memory, Refused, Verdict, fenced_off, judge
from agent.orders.envelopes import order_digest, sign_order
from agent.orders.orders import SKEW_SECONDS, Order, RunScript, TcpCheck, TimedCheck, Verify

NOW = 1_800_000_000.0
NOTHING = Memory()


@cache
def _desk() -> Desk:
    return desk_in(Path(mkdtemp()))


@pytest.fixture
def desk() -> Desk:
    return _desk()


def order(**changes) -> Order:
    return _desk().order(not_before=NOW, not_after=NOW + 3600, **changes)


def verdict(envelope: bytes, memory: Memory = NOTHING, now: float = NOW, **changes) -> Verdict:
    desk = _desk()
    me = changes.get("me", Me("web1", desk.identity.fingerprint))
    return judge(envelope, changes.get("pins", desk.pins), me, memory, now)


def refusal(envelope: bytes, memory: Memory = NOTHING, now: float = NOW, **changes) -> Refused:
    found = verdict(envelope, memory, now, **changes)
    assert isinstance(found, Refused)
    assert found.text
    assert found.digest == order_digest(envelope)
    return found


def test_a_good_order_is_accepted(desk: Desk) -> None:
    envelope = desk.sign(order())

    assert verdict(envelope) == Accepted(order(), order_digest(envelope))


def test_names_of_agents_are_compared_lower_cased(desk: Desk) -> None:
    assert isinstance(verdict(desk.sign(order(agent="WEB1"))), Accepted)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"agent": "web2"}, "other_agent"),
        ({"key": "sha256:" + "0" * 64}, "other_key"),
        ({"deployment": OTHER}, "operation"),
        ({"operation": f"{OTHER}/0/web1/survey/1"}, "operation"),
        ({"operation": f"{DEPLOYMENT}x/0/web1/survey/1"}, "operation"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_order_for_somebody_or_something_else_is_refused(desk: Desk, changes: dict, code: str) -> None:
    found = refusal(desk.sign(msgspec.structs.replace(order(), **changes)))

    assert found.code == code
    assert found.order is not None, "its signature is good, so what it says of itself is known"


@pytest.mark.parametrize(
    ("now", "code"),
    [
        (NOW - SKEW_SECONDS - 1, "too_early"),
        (NOW - SKEW_SECONDS + 1, None),
        (NOW, None),
        (NOW + 3600 + SKEW_SECONDS - 1, None),
        (NOW + 3600 + SKEW_SECONDS + 1, "expired"),
    ],
)
def test_the_window_has_the_skew_on_both_sides(desk: Desk, now: float, code: str | None) -> None:
    found = verdict(desk.sign(order()), now=now)

    assert (found.code if isinstance(found, Refused) else None) == code


@pytest.mark.parametrize(
    ("fence", "journal", "code"),
    [
        (4, JOURNAL, "fenced_off"),
        (4, "f" * 32, "fenced_off"),
        (5, JOURNAL, None),
        (5, "f" * 32, "other_journal"),
        (6, JOURNAL, None),
        (6, "f" * 32, None),
    ],
)
def test_the_fence_lets_only_who_leads_order(desk: Desk, fence: int, journal: str, code: str | None) -> None:
    memory = Memory(fences={("test", ""): fence_seen(5), ("other", ""): fence_seen(99)})
    found = verdict(desk.sign(order(fence=fence, journal=journal)), memory)

    assert (found.code if isinstance(found, Refused) else None) == code


def test_a_fence_counts_in_its_own_environment_only(desk: Desk) -> None:
    memory = Memory(fences={("production", ""): fence_seen(9)})

    assert isinstance(verdict(desk.sign(order(environment="test", fence=1)), memory), Accepted)
    assert fenced_off(order(environment="production", fence=1), memory.fences) is not None


def test_a_clock_that_fell_behind_what_was_obeyed_is_told(desk: Desk) -> None:
    memory = Memory(newest=NOW + 1000)

    assert refusal(desk.sign(order()), memory).code == "clock"
    assert isinstance(verdict(desk.sign(order()), Memory(newest=NOW + SKEW_SECONDS - 1)), Accepted)


@pytest.mark.parametrize(
    ("project", "fence", "is_refused"),
    [
        ("shop", 5, False),
        ("shop", 4, True),
        ("desk", 3, False),  # the fences of another project shut out nobody here
        ("desk", 2, True),  # what came of no project is above all of them
        ("", 8, True),  # and must be above all of them
        ("", 9, False),
        ("", 10, False),
    ],
)
def test_projects_shut_out_their_own_and_who_speaks_for_the_environment_is_heard_by_all(
    project: str, fence: int, is_refused: bool
) -> None:
    memory = Memory(
        fences={
            ("test", ""): fence_seen(3),
            ("test", "shop"): fence_seen(5),
            ("test", "news"): fence_seen(9),
            ("other", "shop"): fence_seen(99),
        }
    )
    judged = verdict(_desk().sign(order(project=project, fence=fence)), memory)
    assert isinstance(judged, Refused if is_refused else Accepted)
    assert not isinstance(judged, Refused) or judged.code == "fenced_off"


def test_another_journal_does_not_share_a_fence_of_the_project(desk: Desk) -> None:
    memory = Memory(fences={("test", "shop"): fence_seen(5), ("test", "desk"): fence_seen(5, "f" * 32)})

    assert refusal(desk.sign(order(project="desk", fence=5)), memory).code == "other_journal"
    assert isinstance(verdict(desk.sign(order(project="shop", fence=5)), memory), Accepted)
    assert isinstance(verdict(desk.sign(order(project="desk", fence=6)), memory), Accepted)


def test_the_same_bytes_again_are_known_even_when_all_else_has_changed(desk: Desk) -> None:
    envelope = desk.sign(order())
    known = {order().operation: order_digest(envelope)}
    memory = Memory(known=known, fences={("test", ""): fence_seen(99)}, newest=NOW + 9000)

    assert verdict(envelope, memory, NOW + 99_999) == Known(order().operation, order_digest(envelope))


def test_other_bytes_under_a_known_name_are_refused(desk: Desk) -> None:
    memory = Memory(known={order().operation: "0" * 64})

    assert refusal(desk.sign(order()), memory).code == "altered"


def test_a_replay_of_what_was_forgotten_is_refused_whatever_the_clock_says(desk: Desk) -> None:
    memory = Memory(forgotten=NOW + 3600)

    assert refusal(desk.sign(order()), memory).code == "expired"
    assert isinstance(verdict(desk.sign(msgspec.structs.replace(order(), not_after=NOW + 3601)), memory), Accepted)


def test_a_key_out_of_scope_and_a_foreign_key_are_told_apart(desk: Desk) -> None:
    assert refusal(desk.sign(order()), pins=scoped(desk.pins, "production")).code == "scope"
    assert refusal(sign_order(order(), new_signer())).code == "forged"
    assert refusal(sign_order(order(), desk.keys.signer)).code == "forged"


FIELDS: list[tuple[str, Callable[[object], object]]] = [
    ("operation", lambda _: f"{DEPLOYMENT}/0/web1/survey/2"),
    ("environment", lambda _: "production"),
    ("project", lambda _: "desk"),
    ("fence", lambda value: value + 1),
    ("journal", lambda _: "f" * 32),
    ("agent", lambda _: "WEB1"),
    ("not_before", lambda value: value + 1),
    ("not_after", lambda value: value + 1),
    ("relays", lambda _: ["http://evil:1"]),
    ("action", lambda _: {"type": "survey", "trees": [{"id": "x", "version": "1", "manifest": "0" * 64}]}),
]


@pytest.mark.parametrize(("field", "change"), FIELDS, ids=[field for field, _ in FIELDS])
def test_no_field_can_be_changed_on_the_way(desk: Desk, field: str, change: Callable[[object], object]) -> None:
    document = json.loads(desk.sign(order()))
    payload = json.loads(base64.b64decode(document["payload"]))
    payload[field] = change(payload.get(field))
    document["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    changed = json.dumps(document).encode()

    assert refusal(changed).code == "forged"
    # The change itself was of a kind that a signer could have made.
    resigned = desk.sign(msgspec.convert(payload, Order))
    assert isinstance(verdict(resigned), Accepted)


@pytest.mark.long
@settings(max_examples=300)
@given(st.data())
def test_a_changed_envelope_is_never_accepted_and_never_an_error(data: st.DataObject) -> None:
    action = RunScript("0" * 64, "x.sh", {"VAR_A": "b"})
    envelope = bytearray(_desk().sign(order(action=action)))
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, len(envelope) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "put"])):
            case "flip":
                envelope[where] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del envelope[where : where + data.draw(st.integers(1, 20))]
            case "put":
                envelope[where:where] = data.draw(st.binary(max_size=20))
        if not envelope:
            break

    if bytes(envelope) != _desk().sign(order(action=action)):
        assert isinstance(verdict(bytes(envelope)), Refused)


@pytest.mark.parametrize("name", ["PATH", "LD_PRELOAD", "BASH_ENV", "PYTHONPATH", "OUTCOME", "VAR_", "VAR_a", "XVAR_A"])
def test_an_order_puts_nothing_into_an_environment_that_could_run_what_nobody_signed(name: str) -> None:
    for action in (
        RunScript("0" * 64, "x.sh", {name: "/tmp/evil"}),
        RunScript("0" * 64, "x.sh", {}, {name: b"sealed"}),
        Verify((TimedCheck(TcpCheck("127.0.0.1", 1)),), variables={name: "/tmp/evil"}),
    ):
        judged = verdict(_desk().sign(order(action=action)))
        assert isinstance(judged, Refused)
        assert judged.code == "malformed"


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_no_bytes_at_all_are_accepted_or_an_error(data: bytes) -> None:
    assert isinstance(verdict(data), Refused)


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(1, (1 << 53) - 1),
)
def test_no_numbers_are_an_error(not_before: float, not_after: float, fence: int) -> None:
    envelope = _desk().sign(_desk().order(not_before=not_before, not_after=not_after, fence=fence))

    found = verdict(envelope, Memory(fences={("test", ""): fence_seen(5)}), time.time())

    assert isinstance(found, Accepted | Refused)


def test_the_memory_is_not_changed_by_judging(desk: Desk) -> None:
    memory = Memory()
    verdict(desk.sign(order()), memory)

    assert memory == replace(Memory())
