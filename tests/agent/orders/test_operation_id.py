"""An operation's id is read back as it was written, and no other text is one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.orders.operation_id import SERVER, OperationId
from relay.errors import UsageError

DEPLOYMENT = "01ARZ3NDEKTSV4RRFFQ69G5FAV"


@given(st.integers(0, 999), st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z"), st.text(), st.integers(1, 99))
def test_an_id_is_read_back_whatever_an_action_is_called(step: int, machine: str, name: str, attempt: int) -> None:
    operation = OperationId.of(DEPLOYMENT, step, machine, name, attempt)
    assert OperationId.parse(str(operation)) == operation
    assert "/" not in operation.file_name
    assert len(str(operation)) <= 200


def test_names_of_actions_become_words() -> None:
    assert (
        str(OperationId.of(DEPLOYMENT, 2, "web1", "3-restart the app!")) == f"{DEPLOYMENT}/2/web1/3-restart-the-app/1"
    )
    assert str(OperationId.of(DEPLOYMENT, 0, SERVER, "open vpn: part 1/2")).endswith("/server/open-vpn-part-1-2/1")
    assert OperationId.of(DEPLOYMENT, 2, "web1", "üß").action == "action"
    assert OperationId.of(DEPLOYMENT, 2, "web1", "switch").file_name == "2~web1~switch~1"


@pytest.mark.parametrize("action", ["1-configure_", "x" * 64, "a..b"])
def test_ids_that_earlier_versions_wrote_are_read_as_they_are(action: str) -> None:
    text = f"{DEPLOYMENT}/1/web1/{action}/2"
    assert OperationId.parse(text).action == action
    assert str(OperationId.parse(text)) == text


def test_an_operation_of_the_server_concerns_no_machine() -> None:
    assert OperationId.of(DEPLOYMENT, 1, SERVER, "tell").machine == ""
    assert OperationId.of(DEPLOYMENT, 1, "web1", "before").machine == "web1"


@pytest.mark.parametrize(
    "text",
    [
        "",
        DEPLOYMENT,
        f"{DEPLOYMENT}/1/web1",
        f"{DEPLOYMENT}/1/web1/before",
        f"{DEPLOYMENT}/1/web1/before/1/2",
        f"{DEPLOYMENT}/1/we b/before/1",
        f"{DEPLOYMENT}/01/web1/before/1",
        f"{DEPLOYMENT}/1/web1/before/-1",
        f"{DEPLOYMENT}/1/web1/before/1\n",
        f"{DEPLOYMENT}/../../etc/1",
        f"{DEPLOYMENT}/1/web1/~/1",
        f"{DEPLOYMENT}/1/web1/{'x' * 200}/1",
        f"{DEPLOYMENT}/\u0661/web1/before/1",
    ],
)
def test_no_other_text_is_an_operation(text: str) -> None:
    assert OperationId.find(text) is None
    with pytest.raises(UsageError, match="is no operation"):
        OperationId.parse(text)
