"""`orchestrator/fleet/log_reader.py`: what scripts printed is told once, line by line, with where it is from."""

from __future__ import annotations

from pathlib import Path

from orchestrator.fleet.log_reader import LogLine, LogReader


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
