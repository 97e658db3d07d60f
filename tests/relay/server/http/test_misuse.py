"""Misuse is limited, and forgotten after a minute."""

from __future__ import annotations

import pytest

from relay.server.http import misuse
from relay.server.http.misuse import MOST, WINDOW_SECONDS, Misuse
from relay.server.http.problems import HttpRefusal


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


TOKEN = "1234abcd"


def count(one: Misuse, times: int, token: str = TOKEN, code: str = "forged") -> int:
    """How often it was one too many, and told when to come back."""
    refused = 0
    for _ in range(times):
        try:
            one.count(token, code)
        except HttpRefusal as error:
            refused += (error.status, 0.0 < (error.retry_after or 0.0) <= WINDOW_SECONDS) == (429, True)
    return refused


def test_a_token_is_limited_for_the_rest_of_a_minute() -> None:
    clock = Clock()
    one = Misuse(clock)
    assert count(one, MOST + 5) == 5
    clock.now += WINDOW_SECONDS
    assert count(one, MOST) == 0


def test_other_tokens_and_other_reasons_are_not_limited() -> None:
    one = Misuse()
    assert count(one, MOST + 1) == 1
    assert count(one, MOST, token="") == 0
    assert count(one, MOST, code="other_agent") == 0


def test_what_is_counted_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(misuse, "TOKENS_MAX", 3)
    one = Misuse()
    for n in range(10):
        count(one, MOST + 1, token=str(n))
    assert [token for token in map(str, range(10)) if is_limited(one, token)] == ["7", "8", "9"]


def is_limited(one: Misuse, token: str) -> bool:
    try:
        one.check(token, "forged")
    except HttpRefusal:
        return True
    return False
