"""What ends before a deployment does is found before it begins."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from orchestrator.fleet.endings import judge
from relay.errors import RefusedError
from relay.protocol.messages import Ending, HealthAnswer

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
OVER = NOW + timedelta(hours=3)


def health(token: timedelta | None = None, certificate: timedelta | None = None, *others: Ending) -> HealthAnswer:
    def ends(after: timedelta) -> float:
        return (NOW + after).timestamp()

    return HealthAnswer(
        "ok",
        (1,),
        0.0,
        token=None if token is None else Ending("token", "8e1d3c4f", "releases", ends(token)),
        certificate=None if certificate is None else Ending("certificate", ends=ends(certificate)),
        endings=others,
    )


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (health(token=timedelta(hours=2)), "relay fra: its token 8e1d3c4f at 2026-03-01 14:00 UTC"),
        (health(token=timedelta(hours=3)), "its token"),
        (health(token=timedelta(days=-1)), "its token"),
        (health(certificate=timedelta(minutes=1)), "relay fra: its certificate at 2026-03-01 12:01 UTC"),
        ("relay https://fra refuses this token: it is unknown, revoked or has ended", "refuses this token"),
    ],
)
def test_a_deployment_does_not_begin_with_what_ends_before_its_deadline(answer: HealthAnswer | str, why: str) -> None:
    with pytest.raises(RefusedError, match=why) as caught:
        judge([("iad", health()), ("fra", answer)], NOW, OVER)
    assert "2026-03-01 15:00 UTC" in str(caught.value)


def test_everything_that_is_wrong_is_named_at_once() -> None:
    with pytest.raises(RefusedError, match=r"fra: .*iad: "):
        judge([("fra", health(timedelta(0))), ("iad", health(None, timedelta(0)))], NOW, OVER)


def test_what_ends_within_two_weeks_is_a_warning_and_silence_is_none() -> None:
    agents = Ending("token", "5f0c1a2b", "machines", (NOW + timedelta(days=4)).timestamp())
    answers = [
        ("far", health(timedelta(days=15), timedelta(days=80))),
        ("fra", health(timedelta(days=13, hours=1), timedelta(days=80), agents)),
        ("gone", None),
    ]
    assert judge(answers, NOW, OVER) == [
        "relay fra: token 8e1d3c4f (releases) ends in 13 days (2026-03-14)",
        "relay fra: token 5f0c1a2b (machines) ends in 4 days (2026-03-05)",
    ]
