"""What an agent is ordered to do is read by that agent, in that operation, and by no other one."""

from __future__ import annotations

import base64
import zlib
from pathlib import Path

import msgspec
import pytest
from harness.orders_kit import SURVEY, Desk, desk_in

from agent.orders.acceptance import Accepted, Me, Memory, Refused, judge
from agent.orders.envelopes import action_context, open_order, seal, seal_action
from agent.orders.journal import OperationJournal
from agent.orders.orders import Acknowledge, ControlService, OpenAction, RunScript, SealedAction, Switch
from relay.errors import SignatureError
from relay.trust.envelopes import ENVELOPE_MAX, MalformedError

SCRIPT = RunScript("ab" * 32, "deploy/configure.sh", {"VAR_DB": "db-of-production"}, {"SECRET_KEY": b"sealed"})


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return desk_in(tmp_path)


def sealed(desk: Desk, action: OpenAction = SCRIPT, **changes: str) -> SealedAction:
    order = desk.order(action)
    return seal_action(
        action, changes.get("key", desk.identity.sealing_public), changes.get("operation", order.operation)
    )


def judged(desk: Desk, action: SealedAction) -> Accepted | Refused:
    me = Me("web1", desk.identity.fingerprint, desk.sealing_key())
    order = desk.order(action)
    verdict = judge(desk.sign(order), desk.pins, me, Memory(), order.not_before)
    assert isinstance(verdict, Accepted | Refused)
    return verdict


@pytest.mark.parametrize(
    "action", [SURVEY, SCRIPT, Switch("/srv", "ab" * 32), ControlService("x", "stop"), Acknowledge(())]
)
def test_what_was_sealed_is_what_is_accepted(desk: Desk, action: OpenAction) -> None:
    verdict = judged(desk, sealed(desk, action))
    assert isinstance(verdict, Accepted)
    assert verdict.order.action == action


def test_the_envelope_shows_neither_script_nor_variables(desk: Desk) -> None:
    envelope = desk.sign(desk.order(sealed(desk)))
    payload = base64.b64decode(msgspec.json.decode(envelope)["payload"])
    assert b'"type":"sealed"' in payload
    for word in (b"configure", b"VAR_DB", b"production", b"SECRET_KEY", b"abab"):
        assert word not in payload


def test_it_opens_with_no_other_key_and_in_no_other_operation(desk: Desk, tmp_path: Path) -> None:
    other = desk_in(tmp_path / "other")
    for wrong in (
        sealed(desk, key=other.identity.sealing_public),
        sealed(desk, operation=f"{desk.order().operation}1"),
        SealedAction("script", b"x"),
    ):
        verdict = judged(desk, wrong)
        assert isinstance(verdict, Refused)
        assert verdict.code == "sealed"


def test_what_is_sealed_and_no_action_is_malformed(desk: Desk) -> None:
    context = action_context(desk.order().operation)
    for plain in (b"no zlib", zlib.compress(b"{}"), zlib.compress(bytes(2 << 20)), zlib.compress(b"[" * 5000)):
        box = seal(plain, desk.identity.sealing_public, context)
        verdict = judged(desk, SealedAction("survey", box))
        assert isinstance(verdict, Refused)
        assert verdict.code == "malformed"
    renamed = msgspec.structs.replace(sealed(desk), kind="survey")
    with pytest.raises(MalformedError, match="no 'survey', but a 'script'"):
        open_order(desk.order(renamed), desk.sealing_key())
    with pytest.raises(SignatureError, match="no key"):
        open_order(desk.order(sealed(desk)), None)


def test_the_journal_keeps_it_sealed_and_knows_its_kind(desk: Desk) -> None:
    verdict = judged(desk, sealed(desk))
    assert isinstance(verdict, Accepted)
    envelope = desk.sign(desk.order(sealed(desk)))
    record = OperationJournal(desk.home).accept(verdict.order, verdict.digest, envelope)
    assert record.action == "script"
    [kept] = OperationJournal(desk.home).operations.values()
    assert kept.action == "script"


def test_an_order_is_no_longer_for_being_sealed(desk: Desk) -> None:
    """What fitted into an envelope in clear fits into it sealed."""
    action = RunScript("ab" * 32, "x", variables={f"VAR_{n}": f"{n * 7919:060d}" for n in range(400)})
    clear, closed = (desk.sign(desk.order(each)) for each in (action, sealed(desk, action)))
    assert len(closed) <= len(clear) <= ENVELOPE_MAX
