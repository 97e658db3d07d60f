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
