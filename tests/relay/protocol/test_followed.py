"""A value follows its files: replaced, rewritten, gone for a while."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from relay.errors import UsageError
from relay.protocol.credentials import may_be_shown, token_from
from relay.protocol.followed import Followed


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "token"
    made.write_text("first\n")
    return made


def by_rename(file: Path, text: str) -> None:
    other = file.with_name("new")
    other.write_text(text)
    other.rename(file)


def by_link(file: Path, text: str) -> None:
    """As systems that hand out secrets do: the name is a link, and leads to another file."""
    target = file.with_name(f"data-{text.strip()}")
    target.write_text(text)
    link = file.with_name("link")
    link.symlink_to(target)
    link.rename(file)


@pytest.mark.parametrize("replace", [Path.write_text, by_rename, by_link])
def test_a_token_that_is_replaced_is_the_next_to_be_shown(file: Path, replace: Callable[[Path, str], object]) -> None:
    token = token_from(str(file))
    assert token() == "first"
    replace(file, "other\r\n")
    assert token() == "other"
    replace(file, "third")
    assert token() == "third"


def test_a_change_of_the_same_length_under_the_same_time_is_seen(file: Path) -> None:
    token = token_from(str(file))
    before = file.stat()
    file.write_text("again\n")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert token() == "again"


@pytest.mark.parametrize("damage", ["", " \n", "two\nlines", "\0\0\0", "tökèn"])
def test_a_file_that_is_unusable_for_a_moment_changes_nothing(
    file: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    token = token_from(str(file))
    file.write_text(damage)
    assert [token() for _ in range(3)] == ["first"] * 3
    file.write_text("second")
    assert token() == "second"
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2, told
    assert told[0].startswith("file.not_read_again")
    assert told[1].startswith("file.read_again")
    assert "first" not in caplog.text
    assert "second" not in caplog.text


def test_a_file_that_is_gone_for_a_while_changes_nothing(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    token = token_from(str(file))
    file.rename(file.with_name("away"))
    assert token() == "first"
    file.mkdir()
    assert token() == "first"
    file.rmdir()
    file.with_name("away").rename(file)
    assert token() == "first"
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.WARNING, logging.INFO]


def test_a_settled_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, read = tmp_path / "file", []
    file.write_text("x")
    changed = file.stat().st_ctime
    monkeypatch.setattr("time.time_ns", lambda: int((changed + 60) * 1e9))
    followed = Followed("a file", [str(file)], lambda: read.append(1))
    for _ in range(5):
        followed()
    assert len(read) == 1
    followed.again()
    assert len(read) == 2


def test_the_first_reading_fails_aloud(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        token_from(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("scheme", "host", "named", "shown"),
    [
        ("https", "relay.example", "", True),
        ("http", "relay.example", "", False),
        ("http", "localhost", "", True),
        ("http", "127.9.9.9", "", True),
        ("http", "::1", "", True),
        ("http", "localhost.example", "", False),
        ("http", "10.1.0.5", "", False),
        ("http", "relay.example", "other.example, Relay.Example ", True),
        ("http", "evil.relay.example", "relay.example", False),
        ("http", "10.1.0.5", "10.0.0.0/8", True),
        ("http", "11.1.0.5", "10.0.0.0/8", False),
        ("http", "relay.example", "10.0.0.0/8,nonsense/x", False),
    ],
)
def test_a_token_goes_over_plain_http_only_to_this_machine_or_where_it_is_allowed_by_name(
    scheme: str, host: str, named: str, shown: bool
) -> None:
    assert may_be_shown(scheme, host, {"WAYSTATION_PLAIN_HTTP": named}.get) is shown
