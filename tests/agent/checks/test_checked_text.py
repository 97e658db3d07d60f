"""Text as a person reads it: what is the same to the eye is the same to a check, and nothing else is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.checks.checked_text import contains, plain, read_text, trimmed

LINES = "Version 1.4.2\nmit Grüßen\n"


@pytest.mark.parametrize(
    "data",
    [
        LINES.encode(),
        LINES.encode("utf-8-sig"),
        LINES.encode("utf-16"),
        LINES.encode("utf-32"),
        LINES.replace("\n", "\r\n").encode(),
        LINES.replace("\n", "\r").encode(),
        LINES.replace("ü", "u\N{COMBINING DIAERESIS}").encode(),
        LINES.replace("\n", " \t\n").encode() + b"\n\n",
    ],
)
def test_what_looks_the_same_is_the_same(data: bytes) -> None:
    assert trimmed(read_text(data)) == trimmed(LINES)


@pytest.mark.parametrize(
    "charset", ["utf-16", "utf-16-le", "UTF-16LE", "latin1", "iso-8859-1", "windows-1252", "cp437"]
)
def test_bytes_are_read_in_the_charset_that_was_declared(charset: str) -> None:
    codec = "utf-16-le" if charset == "utf-16" else charset
    assert read_text(LINES.encode(codec), charset) == LINES


@pytest.mark.parametrize("charset", ["", "hex", "rot13", "undefined", "idna", "no-such", "a\0b", "us-ascii", "'utf-8'"])
def test_a_charset_that_is_none_counts_as_utf_8(charset: str) -> None:
    assert read_text(LINES.encode(), charset) == LINES


def test_a_mark_wins_over_what_was_declared() -> None:
    assert read_text(LINES.encode("utf-8-sig"), "utf-16") == LINES


@given(st.binary(max_size=200), st.none() | st.text(max_size=20))
def test_any_bytes_are_read_whatever_charset_is_declared(data: bytes, charset: str | None) -> None:
    text = read_text(data, charset)
    assert "\r" not in text
    assert contains(text, text.strip())


def test_a_space_at_the_end_of_a_part_was_meant() -> None:
    assert not contains("version 1.4.20", "1.4.2 ")
    assert contains("version 1.4.2 (stable)", "1.4.2 ")


@pytest.mark.parametrize("part", ["a\nb", "a\nb\n", "a  \nb", "a \nb", "\nb\n"])
def test_a_part_of_several_lines_is_found_whatever_their_ends_look_like(part: str) -> None:
    assert contains(plain("a  \r\nb\t\r\n"), plain(part))


@pytest.mark.parametrize(
    ("text", "part"), [("1.4.20", "1.4.2"), ("x1.4.2", "1.4.2"), ("1.4. 2", "1.4.2"), ("", "1.4.2")]
)
def test_other_text_stays_other_text(text: str, part: str) -> None:
    assert trimmed(text) != trimmed(part)
