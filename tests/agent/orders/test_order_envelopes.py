"""Letters: what is signed comes back as it was, and nothing that was not signed so is believed."""

from __future__ import annotations

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from harness.orders_kit import DEPLOYMENT, Desk, desk_in, new_signer, scoped, tree
from hypothesis import given
from hypothesis import strategies as st

from agent.orders.envelopes import (
    ScopeError,
    open_sealed,
    order_digest,
    seal,
    secret_context,
    sign_order,
    sign_presence,
    sign_report,
    verify_order,
    verify_presence,
    verify_report,
)
from agent.orders.keys import AgentIdentity, fingerprint_of
from agent.orders.orders import (
    ORDER_TYPE,
    REPORT_TYPE,
    Acknowledge,
    Acquire,
    Action,
    CommandCheck,
    ControlService,
    HttpCheck,
    Order,
    Presence,
    Report,
    RunScript,
    ServiceCheck,
    Settle,
    Stop,
    Survey,
    SurveyFacts,
    Switch,
    TcpCheck,
    TimedCheck,
    TreeFacts,
    Verify,
)
from relay.errors import SignatureError, UsageError
from relay.trust.envelopes import MalformedError, sign_document, unverified

ACTIONS: list[Action] = [
    Survey((tree("0" * 64, "/srv"),)),
    Acquire((tree("0" * 64, "/srv"), tree("1" * 64)), deadline=30.0),
    RunScript("0" * 64, "deploy/a.sh", {"MACHINE": "web1"}, {"SECRET_X": b"\x00\xff"}, "/srv", 3.0, idempotent=True),
    Switch("/srv", "0" * 64),
    ControlService("webshop", "restart"),
    Verify(
        tuple(
            TimedCheck(check)
            for check in (HttpCheck("http://x/"), TcpCheck("x", 1), CommandCheck(("true",)), ServiceCheck("x"))
        )
    ),
    Settle("/srv", "0" * 64, "1" * 64),
    Stop(f"{DEPLOYMENT}/1/web1/1-x/1"),
    Acknowledge((f"{DEPLOYMENT}/1/web1/1-x/1",), ends=True),
]


@pytest.fixture
def desk(tmp_path) -> Desk:
    return desk_in(tmp_path)


def presence(desk: Desk, **changes) -> Presence:
    said = Presence(1, "web1", desk.identity.signing_public, desk.identity.sealing_public, "0", "linux", "", 0.0)
    return msgspec.structs.replace(said, **changes)


def report(desk: Desk, **changes) -> Report:
    said = Report(1, f"{DEPLOYMENT}/1/web1/x/1", DEPLOYMENT, "web1", desk.identity.fingerprint, "0" * 64, 1, "done")
    return msgspec.structs.replace(said, **changes)


def signer_of(desk: Desk):
    from agent.orders.keys import load_report_signer

    return load_report_signer(desk.home)


# --- orders


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: type(action).__name__)
def test_an_order_comes_back_as_it_was_signed(desk: Desk, action: Action) -> None:
    order = desk.order(action)

    assert verify_order(desk.sign(order), desk.pins) == order


def test_the_same_order_has_the_same_bytes_and_digest(desk: Desk) -> None:
    order = desk.order()

    assert desk.sign(order) == desk.sign(order)
    assert len(order_digest(desk.sign(order))) == 64


@pytest.mark.parametrize("who", ["nobody we know", "the package key"])
def test_only_an_order_key_orders(desk: Desk, who: str) -> None:
    signer = new_signer() if who == "nobody we know" else desk.keys.signer

    with pytest.raises(SignatureError):
        verify_order(sign_order(desk.order(), signer), desk.pins)


def test_a_key_orders_in_its_environments_only(desk: Desk) -> None:
    envelope = desk.sign(desk.order(environment="test"))

    assert verify_order(envelope, scoped(desk.pins, "staging", "test")).environment == "test"
    with pytest.raises(ScopeError):
        verify_order(envelope, scoped(desk.pins, "staging"))
    with pytest.raises(ScopeError):
        verify_order(envelope, scoped(desk.pins, "TEST"))


@pytest.mark.parametrize("change", ["second signature", "white space", "other order", "escape", "twice"])
def test_nobody_on_the_way_can_give_an_order_other_bytes(desk: Desk, change: str) -> None:
    import json

    order = desk.order(environment="test")
    document = json.loads(desk.sign(order))
    match change:
        case "second signature":
            document["signatures"] += json.loads(sign_order(order, new_signer()))["signatures"]
            changed = json.dumps(document, separators=(",", ":"), sort_keys=True).encode()
        case "white space":
            changed = desk.sign(order) + b" "
        case "other order":
            changed = json.dumps(dict(reversed(document.items())), separators=(",", ":")).encode()
        case "escape":
            changed = desk.sign(order).replace(b"/vnd.", b"\\/vnd.")
        case _:
            changed = desk.sign(order).replace(b'{"payload"', b'{"payload":"eA==","payload"')

    assert changed != desk.sign(order)
    with pytest.raises(MalformedError):
        verify_order(changed, desk.pins)


@pytest.mark.parametrize(
    "payload",
    [b"", b"{}", b"[]", b"\xff", b'{"format":2}', b"[" * 5000],
    ids=["empty", "no fields", "a list", "no UTF-8", "another format", "deep"],
)
def test_what_is_signed_but_no_order_is_malformed(desk: Desk, payload: bytes) -> None:
    with pytest.raises(MalformedError):
        verify_order(sign_document(payload, ORDER_TYPE, desk.order_signer), desk.pins)


def test_a_field_that_nobody_checks_is_refused(desk: Desk) -> None:
    payload = msgspec.json.encode(desk.order()).replace(b'{"format":1', b'{"sudo":true,"format":1')

    with pytest.raises(MalformedError):
        verify_order(sign_document(payload, ORDER_TYPE, desk.order_signer), desk.pins)


def test_a_report_is_no_order(desk: Desk) -> None:
    payload = msgspec.json.encode(desk.order())

    with pytest.raises(SignatureError):
        verify_order(sign_document(payload, REPORT_TYPE, desk.order_signer), desk.pins)


def test_an_order_that_fits_into_no_envelope_is_refused_when_it_is_made(desk: Desk) -> None:
    with pytest.raises(UsageError):
        desk.sign(desk.order(RunScript("0" * 64, "x.sh", {"VAR_A": "x" * 70_000})))


# --- reports and presences


def test_a_report_comes_back_as_it_was_signed(desk: Desk) -> None:
    facts = SurveyFacts((TreeFacts("/srv", "0" * 64, 5, installed=True),))
    said = report(desk, facts=facts, exit_status=-9)

    assert verify_report(sign_report(said, signer_of(desk)), desk.identity) == said


def test_a_report_by_another_key_or_of_another_key_is_refused(desk: Desk) -> None:
    with pytest.raises(SignatureError):
        verify_report(sign_report(report(desk), new_signer()), desk.identity)
    with pytest.raises(SignatureError):
        verify_report(sign_report(report(desk, key="sha256:" + "0" * 64), signer_of(desk)), desk.identity)


def test_a_presence_counts_for_the_keys_that_it_shows(desk: Desk) -> None:
    envelope = sign_presence(presence(desk), signer_of(desk))

    assert verify_presence(envelope) == presence(desk)
    assert verify_presence(envelope, desk.identity.fingerprint) == presence(desk)
    with pytest.raises(SignatureError, match="expected"):
        verify_presence(envelope, "sha256:" + "0" * 64)


def test_a_presence_that_shows_anothers_key_is_refused(desk: Desk) -> None:
    with pytest.raises(SignatureError):
        verify_presence(sign_presence(presence(desk), new_signer()))


@given(st.binary(max_size=200))
def test_no_bytes_are_a_presence_or_an_error_of_another_kind(data: bytes) -> None:
    for read in (verify_presence, lambda envelope: unverified(envelope, Order)):
        with pytest.raises(SignatureError):
            read(data)


def test_the_fingerprint_is_over_both_keys() -> None:
    identity = AgentIdentity("a" * 64, "b" * 64)

    assert identity.fingerprint == fingerprint_of("a" * 64, "b" * 64)
    assert len({fingerprint_of(one, two) for one, two in [("a", "b"), ("b", "a"), ("a", "a"), ("ab", "")]}) == 4


# --- secrets


@given(st.binary(max_size=100))
def test_a_secret_opens_for_its_agent_operation_and_name_only(value: bytes) -> None:
    key, other = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    context = secret_context("op/1", "KEY")
    sealed = seal(value, key.public_key().public_bytes_raw().hex(), context)

    assert open_sealed(sealed, key, context) == value
    for wrong_key, wrong_context in [(other, context), (key, secret_context("op/1", "KEY2")), (key, "")]:
        with pytest.raises(SignatureError):
            open_sealed(sealed, wrong_key, wrong_context)


@given(st.data())
def test_a_sealed_secret_that_was_altered_does_not_open(data: st.DataObject) -> None:
    key = X25519PrivateKey.generate()
    sealed = bytearray(seal(b"value", key.public_key().public_bytes_raw().hex(), "c"))
    where = data.draw(st.integers(0, len(sealed) - 1))
    # The top bit of an X25519 point is ignored (RFC 7748, 5), but HPKE binds the encapsulated bytes into the key.
    sealed[where] ^= data.draw(st.integers(1, 255))

    with pytest.raises(SignatureError):
        open_sealed(bytes(sealed), key, "c")


@pytest.mark.parametrize("key", ["", "zz", "00" * 32, "ab" * 31])
def test_nothing_is_sealed_to_what_is_no_key(key: str) -> None:
    with pytest.raises(UsageError):
        seal(b"x", key, "c")


def test_the_same_secret_sealed_twice_differs() -> None:
    public = X25519PrivateKey.generate().public_key().public_bytes_raw().hex()

    assert seal(b"x", public, "c") != seal(b"x", public, "c")
