"""An event is one line, whatever its fields hold: nothing from outside forges one, drives a terminal or fills a disk."""

from __future__ import annotations

import json
import shlex
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.audit.shown import ITEMS_MAX, TEXT_MAX, as_json, as_pairs, harmless

HOSTILE = "a\nb\r\x1b[2J\x00\x85\u2028\u2029\u202e\u2066\u200f\ufeff\ud800 c"
TOKEN = "wst_0a1b2c3d_Zm9vYmFyYmF6cXV4Zm9vYmFyYmF6cXV4Zm9vYmFyYmF6_deadbeef"


@given(st.text())
def test_what_is_shown_is_one_line_that_can_be_seen_and_is_bounded(text: str) -> None:
    shown = harmless(text)
    assert shown.isprintable()
    assert len(shown) <= TEXT_MAX
    assert harmless(shown) == shown, "made harmless once, it is not made so again"


@given(st.text(), st.text())
def test_json_lines_are_read_back_as_they_were_shown(one: str, other: str) -> None:
    line = as_json({"event": one, "many": (other, one)})
    assert line.splitlines() == [line]
    assert json.loads(line) == {"event": harmless(one), "many": [harmless(other), harmless(one)]}


@given(st.text(alphabet=st.characters(exclude_characters="'")))
def test_pairs_are_read_back_as_shells_read_them(text: str) -> None:
    line = as_pairs("a.b", {"key": text, "next": "x"})
    assert line.splitlines() == [line]
    if "$" not in text and "`" not in text:
        assert shlex.split(line)[-1] == "next=x", "the field does not run into the next one"


def test_marks_and_controls_are_told_by_their_number() -> None:
    assert harmless(HOSTILE) == "a\\nb\\r\\u001b[2J\\u0000\\u0085\\u2028\\u2029\\u202e\\u2066\\u200f\\ufeff\\ud800 c"


@pytest.mark.parametrize(
    "text",
    [TOKEN, f"Bearer {TOKEN}", f"/v1/{TOKEN}/x", f"x={TOKEN}\n{TOKEN}", quote(TOKEN), "é" * (TEXT_MAX - 30) + TOKEN],
)
def test_a_token_is_masked_wherever_it_stands(text: str) -> None:
    shown = harmless(text)
    assert "Zm9v" not in shown
    assert "wst_0a1b2c3d_***" in shown, "its id says whose it was"


def test_a_password_in_a_url_is_masked() -> None:
    assert harmless("no answer from https://ann:s3cret@proxy:3128/x") == "no answer from https://***@proxy:3128/x"


def test_lists_are_bounded() -> None:
    shown = json.loads(as_json({"all": tuple(map(str, range(1000)))}))["all"]
    assert len(shown) == ITEMS_MAX + 1
    assert shown[-1] == f"… {1000 - ITEMS_MAX} more"


def test_numbers_and_truths_stay_what_they_are() -> None:
    assert json.loads(as_json({"a": True, "b": 3, "c": 1.23456, "d": None})) == {
        "a": True,
        "b": 3,
        "c": 1.235,
        "d": None,
    }
    assert as_pairs("x", {"a": True, "b": 3, "c": "", "d": "a b", "e": 'q"'}) == 'x a=true b=3 c="" d="a b" e="q\\""'
