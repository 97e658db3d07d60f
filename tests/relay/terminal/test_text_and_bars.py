"""Text made safe to show, shares that make sense, and bars as rows."""

from __future__ import annotations

import json
import unicodedata

import hypothesis
import pytest
from hypothesis import strategies

from relay.terminal.bars import MOST_ROWS, Bars
from relay.terminal.text import printable, share

MARKS = (
    "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c\ufeff\u2028\u2029\x85\x7f\x9b\x1b\r\n\t\0"
)


@pytest.mark.parametrize("char", MARKS, ids=lambda char: f"U+{ord(char):04X}")
def test_what_drives_a_terminal_or_turns_text_around_is_shown_by_its_number(char: str) -> None:
    assert char not in printable(f"a{char}b")
    assert json.loads(f'"{printable(f"a{char}b")}"') == f"a{char}b"


def test_letters_of_every_script_stay_as_they_are() -> None:
    text = "żółw 猫 кот \u05d7\u05ea\u05d5\u05dc 🐈 ß \u0301"
    assert printable(text) == text


@hypothesis.given(strategies.text())
def test_nothing_but_glyphs_and_spaces_is_left_of_any_text(text: str) -> None:
    assert {unicodedata.category(char) for char in printable(text) if char != " "} <= {
        "Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm",
        "Sc", "Sk", "So",
    }  # fmt: skip
    assert printable(printable(text)) == printable(text)


def test_a_file_name_that_is_no_utf_8_can_be_shown() -> None:
    assert printable("a\udc80b") == r"a\udc80b"


def test_a_share_is_a_percentage_only_where_it_is_one() -> None:
    assert share(50, 200) == "25.0 %"
    assert share(200, 200) == "100.0 %"
    assert share(817, 200) == "all and 617 B"
    assert share(5, 0) == ""


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_bar_says_bytes_total_rate_and_the_time_that_is_left() -> None:
    bars = Bars(clock := Clock())
    show = bars.bar("fra Web 1.0.0")
    show(0, 40 << 20)
    clock.now += 2.0
    show(10 << 20, 40 << 20)
    [row] = bars.rows(79, 24)
    assert row.startswith("fra Web 1.0.0  ━")
    assert row.endswith("10.0 MiB of 40.0 MiB  5.0 MiB/s  0:06")
    show(40 << 20, 40 << 20)
    [row] = bars.rows(79, 24)
    assert "─" not in row
    assert row.endswith("  40.0 MiB of 40.0 MiB")


def test_a_bar_of_which_nothing_is_known_yet_waits() -> None:
    bars = Bars()
    bars.bar("web1")
    assert bars.rows(79, 24) == ["web1  " + "─" * 40 + "  waiting"]


def test_a_name_has_one_bar_however_often_it_is_asked_for() -> None:
    bars = Bars()
    bars.bar("web1")(1, 4)
    bars.bar("web1")(2, 4)
    assert len(bars.rows(79, 24)) == 1


@pytest.mark.parametrize("width", [20, 39, 79])
def test_no_row_is_wider_than_the_terminal_and_what_is_cut_has_a_mark(width: int) -> None:
    bars = Bars()
    bars.bar("a-relay-with-a-long-name Acme.Package.With.A.Longer.Name 1.2.3")(3 << 20, 5 << 20)
    [row] = bars.rows(width, 24)
    assert len(row) <= max(width, 26)
    assert "…" in row
    assert "3.0 MiB of 5.0 MiB" in row


def test_many_bars_leave_room_for_lines_and_are_summed_up() -> None:
    bars = Bars()
    for number in range(30):
        bars.bar(f"web{number:02}")(5 if number < 25 else 1, 5)
    rows = bars.rows(79, 24)
    assert len(rows) <= MOST_ROWS
    assert rows[-1] == "130 B of 150 B, 25 of 30 through"
    assert [row.split()[0] for row in rows[:-1]] == ["web25", "web26", "web27", "web28", "web29"]
    assert len(bars.rows(79, 5)) <= 2
