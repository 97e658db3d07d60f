"""`orchestrator/fleet/log_reader.py`: what scripts printed is told once, line by line, with where it is from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from orchestrator.fleet.log_reader import LogLine, LogReader
from orchestrator.fleet.told_lines import ToldLines
from relay.errors import UsageError


def test_lines_are_told_with_machine_and_action(tmp_path: Path) -> None:
    (tmp_path / "1~web1~2-restart~1.log").write_bytes(b"one\r\ntwo\n")

    lines = list(LogReader(str(tmp_path), None).news())

    assert [(line.where, line.text) for line in lines] == [("web1 2-restart", "one"), ("web1 2-restart", "two")]


def test_a_repeated_attempt_is_told_apart() -> None:
    assert LogLine("1~web1~before~2", "").where == "web1 before (attempt 2)"


def test_what_was_told_is_not_told_again(tmp_path: Path) -> None:
    log = tmp_path / "1~web1~before~1.log"
    reader = LogReader(str(tmp_path), None)
    log.write_bytes(b"first\n")
    assert [line.text for line in reader.news()] == ["first"]

    with log.open("ab") as file:
        file.write(b"second\n")

    assert [line.text for line in reader.news()] == ["second"]
    assert list(reader.news()) == []


def test_lines_that_were_told_by_another_are_passed_over_and_none_is_missing(tmp_path: Path) -> None:
    """Also where the two streams are told in another order than they began."""
    at = b"2026-12-01T00:12:03.123Z"
    log = tmp_path / "1~web1~before~1.log"
    log.write_bytes(at + b" stdout P ha\n" + at + b" stderr F no\n")
    (tmp_path / "1~web2~before~1.log").write_bytes(b"other\n")
    first = list(LogReader(str(tmp_path), "web1").news(final=False))
    with log.open("ab") as file:
        file.write(at + b" stdout F lf\n")
    later = LogReader(str(tmp_path), "web1", Counter(line.operation for line in first))
    assert [line.text for line in [*first, *later.news()]] == ["no", "half"]
    assert list(later.news()) == []


LINES = [LogLine("1~web1~before~1", f"line {n} ü") for n in range(5)]


def test_a_file_of_told_lines_goes_on_where_a_kill_left_it(tmp_path: Path) -> None:
    path = tmp_path / "told"
    with ToldLines(str(path)) as told:
        for line in LINES:
            told.add(line)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with ToldLines(str(path)) as again:
            there = again.counts["1~web1~before~1"]
            for line in LINES[there:]:
                again.add(line)
        assert path.read_bytes() == whole


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    for text in ("my notes\n", '{"operation": 1}\n', "[]\n"):
        path.write_text(text)
        with pytest.raises(UsageError, match="no 'release log --to' wrote"):
            ToldLines(str(path))
        assert path.read_text() == text


def test_only_the_machine_that_is_asked_for_is_told(tmp_path: Path) -> None:
    (tmp_path / "1~web1~before~1.log").write_bytes(b"mine\n")
    (tmp_path / "1~web11~before~1.log").write_bytes(b"another's\n")

    assert [line.text for line in LogReader(str(tmp_path), "WEB1").news()] == ["mine"]


def test_a_deployment_without_output_has_no_lines(tmp_path: Path) -> None:
    assert list(LogReader(str(tmp_path / "none"), None).news()) == []


def test_a_last_line_without_an_end_is_told(tmp_path: Path) -> None:
    (tmp_path / "1~web1~before~1.log").write_bytes(b"whole\nhalf")

    assert [line.text for line in LogReader(str(tmp_path), None).news()] == ["whole", "half"]


def test_a_line_that_is_still_being_written_waits_for_its_end(tmp_path: Path) -> None:
    log = tmp_path / "1~web1~before~1.log"
    reader = LogReader(str(tmp_path), None)
    log.write_bytes(b"one\nha")
    assert [line.text for line in reader.news(final=False)] == ["one"]

    with log.open("ab") as file:
        file.write(b"lf\n")

    assert [line.text for line in reader.news(final=False)] == ["half"]


def test_a_line_has_the_time_when_it_was_printed_and_errors_have_a_mark(tmp_path: Path) -> None:
    said = b"2026-12-01T00:12:03.123Z stdout F in order\n2026-12-01T00:12:04.000Z stderr F not so\n"
    (tmp_path / "1~web1~before~1.log").write_bytes(said)

    lines = list(LogReader(str(tmp_path), None).news())

    assert [(line.text, line.time, line.stream) for line in lines] == [
        ("in order", "2026-12-01T00:12:03.123Z", "stdout"),
        ("not so", "2026-12-01T00:12:04.000Z", "stderr"),
    ]
    assert list(map(str, lines)) == [
        "2026-12-01T00:12:03.123Z web1 before  in order",
        "2026-12-01T00:12:04.000Z web1 before stderr  not so",
    ]


def test_a_line_that_came_in_parts_is_one_line_also_where_the_other_stream_spoke_between(tmp_path: Path) -> None:
    at = b"2026-12-01T00:12:03.123Z"
    reader = LogReader(str(tmp_path), None)
    log = tmp_path / "1~web1~before~1.log"
    log.write_bytes(at + b" stdout P ha\n" + at + b" stderr F no\n")
    assert [line.text for line in reader.news(final=False)] == ["no"]

    with log.open("ab") as file:
        file.write(at + b" stdout F lf\n" + at + b" stdout P rest\n")

    assert [(line.text, line.stream) for line in reader.news()] == [("half", "stdout"), ("rest", "stdout")]


def test_a_script_that_prints_such_a_beginning_is_believed_in_nothing(tmp_path: Path) -> None:
    forged = b"2026-12-01T00:12:03.123Z stdout F 2020-01-01T00:00:00.000Z stderr F forged\n"
    (tmp_path / "1~web1~before~1.log").write_bytes(forged)
    [line] = LogReader(str(tmp_path), None).news()
    assert (line.text, line.stream) == ("2020-01-01T00:00:00.000Z stderr F forged", "stdout")
