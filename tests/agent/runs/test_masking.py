"""Secrets leave the stream, whatever pieces it comes in, and nothing else does."""

from __future__ import annotations

import base64
import json
import urllib.parse
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.runs.masking import MASK, Masker, patterns_of
from relay.errors import UsageError

ALPHABET = "ab1\n+/ é"
SECRETS = st.lists(st.text(ALPHABET, min_size=4, max_size=9), max_size=3)


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[str], bytes, list[int]]:
    """Secrets, a stream that is full of them and their beginnings, and where it is cut."""
    secrets = draw(SECRETS)
    forms = [form for secret in secrets for form in sorted(patterns_of(secret))]
    parts = st.binary(max_size=3) | st.text(ALPHABET, max_size=5).map(str.encode)
    if forms:
        parts |= st.sampled_from(forms)
        parts |= st.builds(lambda form, size: form[:size], st.sampled_from(forms), st.integers(1, 8))
    stream = b"".join(draw(st.lists(parts, max_size=8)))
    return secrets, stream, sorted(draw(st.lists(st.integers(0, len(stream)), max_size=8)))


def in_pieces(masker: Masker, stream: bytes, cuts: list[int]) -> bytes:
    edges = [0, *cuts, len(stream)]
    return b"".join(masker.feed(stream[start:end]) for start, end in pairwise(edges)) + masker.close()


def by_definition(secrets: list[str], stream: bytes) -> bytes:
    """The slow, obvious way: find all occurrences, join those that overlap, replace each."""
    spans = sorted(
        (start, start + len(form))
        for secret in secrets
        for form in patterns_of(secret)
        for start in range(len(stream))
        if stream.startswith(form, start)
    )
    out, position = b"", 0
    for start, end in spans:
        if start >= position:
            out += stream[position:start] + MASK
        position = max(position, end)
    return out + stream[position:]


@given(streams())
@example((["abab1"], b"ababab1abab", [4, 5, 6]))
@example((["aaaa"], b"aaaaaaaaa", [1, 4, 8]))
def test_any_split_gives_what_one_write_gives(case: tuple[list[str], bytes, list[int]]) -> None:
    secrets, stream, cuts = case
    assert in_pieces(Masker(secrets), stream, cuts) == by_definition(secrets, stream)


@given(streams())
def test_no_form_of_a_secret_is_shown(case: tuple[list[str], bytes, list[int]]) -> None:
    secrets, stream, cuts = case
    shown = in_pieces(Masker(secrets), stream, cuts)
    between = shown.split(MASK)
    assert not any(form in part for secret in secrets for form in patterns_of(secret) for part in between)


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5).map(sorted))
def test_nothing_else_is_changed(stream: bytes, cuts: list[int]) -> None:
    secret = "Zq#7!Zq#7!Zq#7!Zq#7!"
    if not any(form in stream for form in patterns_of(secret)):
        assert in_pieces(Masker([secret]), stream, cuts) == stream
    assert in_pieces(Masker([]), stream, cuts) == stream


@given(streams(), st.data())
def test_a_flush_at_any_time_never_shows_a_secret_whole_nor_loses_a_byte_that_is_none(
    case: tuple[list[str], bytes, list[int]], data: st.DataObject
) -> None:
    secrets, stream, cuts = case
    masker = Masker(secrets)
    shown = b""
    for start, end in pairwise([0, *cuts, len(stream)]):
        shown += masker.feed(stream[start:end])
        if data.draw(st.booleans()):
            shown += masker.flush()
            assert masker.held == 0
    shown += masker.close()
    between = shown.split(MASK)
    assert not any(form in part for secret in secrets for form in patterns_of(secret) for part in between)
    # What no flush can take for a secret is all there, in its order.
    theirs = set(MASK).union(*(form for secret in secrets for form in patterns_of(secret)))
    assert [byte for byte in shown if byte not in theirs] == [byte for byte in stream if byte not in theirs]


@given(streams())
def test_no_more_than_the_longest_pattern_is_held_back(case: tuple[list[str], bytes, list[int]]) -> None:
    secrets, stream, cuts = case
    masker = Masker(secrets)
    longest = max((len(form) for secret in secrets for form in patterns_of(secret)), default=1)
    for start, end in pairwise([0, *cuts, len(stream)]):
        masker.feed(stream[start:end])
        assert masker.held < longest


def test_what_cannot_become_a_secret_is_shown_at_once() -> None:
    masker = Masker(["hunter2!"])
    assert masker.feed(b"Password: ") == b"Password: "
    assert masker.held == 0


def test_the_beginning_of_a_secret_waits_and_is_then_taken_for_one() -> None:
    masker = Masker(["hunter2!"])
    assert masker.feed(b"it is hunte") == b"it is "
    assert masker.flush() == MASK
    assert masker.feed(b"r2! and") == b" and"


def test_two_letters_of_a_secret_are_shown_after_a_while_but_never_the_rest() -> None:
    masker = Masker(["hunter2!"])
    assert masker.feed(b"oh") == b"o"
    assert masker.flush() == b"h"
    assert masker.feed(b"unter2! and") == MASK + b" and"


def test_of_two_secrets_that_overlap_neither_shows_its_end() -> None:
    assert in_pieces(Masker(["abcdef", "defghi"]), b"<abcdefghi>", [5]) == b"<" + MASK + b">"


@given(st.text(min_size=4, max_size=40), st.binary(max_size=5), st.binary(max_size=5))
def test_base64_is_masked_at_every_alignment_and_in_both_alphabets(secret: str, before: bytes, after: bytes) -> None:
    inner = before + secret.encode("utf-8", "surrogateescape") + after if secret.isprintable() else secret.encode()
    for coded in (base64.b64encode(inner), base64.urlsafe_b64encode(inner), base64.b64encode(inner).rstrip(b"=")):
        shown = in_pieces(Masker([secret]), coded, [len(coded) // 2])
        assert MASK in shown
        # Of the secret, at most the characters that it shares with its neighbours are left.
        left = len(shown) - len(MASK)
        assert left <= -(-len(before) * 4 // 3) + -(-len(after) * 4 // 3) + 4


def test_base64_in_lines_is_masked() -> None:
    secret = "".join(f"{number:04}" for number in range(60))
    assert base64.encodebytes(secret.encode()).count(b"\n") > 3
    shown = in_pieces(Masker([secret]), base64.encodebytes(secret.encode()), [10, 100])
    assert set(shown) <= set(MASK + b"\n")


@given(st.text(min_size=4, max_size=20).filter(lambda text: text.isprintable()))
def test_url_coding_is_masked_as_every_usual_writer_does_it(secret: str) -> None:
    for text in (
        urllib.parse.quote(secret),
        urllib.parse.quote(secret, safe=""),
        urllib.parse.quote_plus(secret),
        urllib.parse.quote(secret, safe="!*'()"),
        urllib.parse.urlencode({"k": secret})[2:],
    ):
        assert in_pieces(Masker([secret]), f"<{text}>".encode(), [3]) == b"<" + MASK + b">"


def test_each_line_of_a_secret_is_masked_also_inside_other_text() -> None:
    secret = "-----BEGIN KEY-----\nMIIBVgIBADANBg\nab\nkqhkiG9w0BAQ\n-----END KEY-----\n"
    shown = in_pieces(Masker([secret]), json.dumps({"key": secret}).encode(), [30])
    assert shown == b'{"key": "********\\n********\\nab\\n********\\n********\\n"}'
    assert in_pieces(Masker([secret]), f"<{secret}>".encode(), [20, 21]) == b"<" + MASK + b">"


@pytest.mark.parametrize("secret", ["", "a", "abc", "äöü"])
def test_a_secret_under_four_characters_is_refused(secret: str) -> None:
    with pytest.raises(UsageError, match="at least 4 characters"):
        Masker(["long enough", secret])
