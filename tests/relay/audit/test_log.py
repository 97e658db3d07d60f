"""Where events go: key=value on a terminal, JSON lines elsewhere, and nothing that they meet there stops the process."""

from __future__ import annotations

import io
import json
import logging
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.trail import events, names

from agent import acts as agent_acts
from orchestrator import acts as orchestrator_acts
from relay.audit import acts
from relay.audit.event import Caller, Event, tell
from relay.audit.log import log_to_file, log_to_stderr

READY = acts.RelayReady("http://127.0.0.1:1", "fra")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def all_events() -> Iterator[type[Event]]:
    for module in (acts, agent_acts, orchestrator_acts):
        yield from (
            each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__
        )


@pytest.mark.parametrize(("stream", "form"), [(Terminal, "text"), (io.StringIO, "json")])
@pytest.mark.parametrize("given", [None, "text", "json"])
def test_a_terminal_has_pairs_and_everything_else_json_unless_it_is_said(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], form: str, given: str | None
) -> None:
    err = stream()
    monkeypatch.setattr(sys, "stderr", err)
    with log_to_stderr("info", given):  # type: ignore[arg-type]
        tell(READY)
    line = err.getvalue()
    if (given or form) == "json":
        (event,) = events(line)
        assert event | {"time": ""} == {
            "time": "",
            "level": "info",
            "event": "relay.ready",
            "url": "http://127.0.0.1:1",
            "site": "fra",
        }
    else:
        assert line.endswith(" info    relay.ready url=http://127.0.0.1:1 site=fra\n")


def test_the_level_bounds_what_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with log_to_stderr("warning", "json"):
        tell(READY)
        tell(acts.StoreReadOnly("fsync failed"))
    tell(acts.StoreReadOnly("after its end"))
    assert names(capsys.readouterr().err) == ["relay.store_read_only"]


def test_what_repeats_is_counted_and_told_at_the_latest_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    merged: list[str] = []
    event = acts.RequestRefused(Caller("192.0.2.1"), "GET", "/a", 401, "unauthenticated", "0", "")
    with log_to_stderr("info", "json", merged.append):
        for _ in range(313):
            tell(event)
    first, more = events(capsys.readouterr().err)
    assert (first["path"], first["address"]) == ("/a", "192.0.2.1")
    assert (more["level"], more["message"], more["more"]) == ("warning", "312 more like this in 60 s", 312)
    assert merged == ["relay.request_refused"] * 312


def test_what_libraries_say_is_one_line_too_and_has_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with log_to_stderr("info", "json"):
        try:
            raise ValueError("a\nb")
        except ValueError:
            logging.getLogger("aiohttp.server").exception("bad %s", "\x1b[1m\nforged")
    (event,) = events(capsys.readouterr().err)
    assert (event["event"], event["logger"]) == ("log", "aiohttp.server")
    assert event["message"] == "bad \\u001b[1m\\nforged"
    assert event["trace"].endswith("ValueError: a\\nb\\n")


def test_a_file_is_its_owners_alone_and_grows(tmp_path: Path) -> None:
    path = tmp_path / "home" / "events.jsonl"
    with log_to_file(str(path)):
        pass
    assert not path.exists(), "a command that does nothing leaves nothing"
    for _ in range(2):
        with log_to_file(str(path)):
            tell(READY)
    assert names(path.read_text()) == ["relay.ready"] * 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.rename(path.with_suffix(".1"))
    with log_to_file(str(path)):
        tell(READY)
    assert names(path.read_text()) == ["relay.ready"]


def test_a_file_that_cannot_be_written_stops_nothing_and_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "events.jsonl").mkdir()
    with log_to_file(str(tmp_path / "events.jsonl")):
        tell(READY)
        tell(READY)
    assert capsys.readouterr().err.count("warning: no events are kept in ") == 1


def test_every_event_has_a_name_of_its_own_and_says_when_it_is_told() -> None:
    found = list(all_events())
    assert len(found) > 50
    assert len({each.event_name() for each in found}) == len(found)
    for each in found:
        assert each.__doc__ is not None
        assert each.__doc__.endswith((".", ")")), each
        for name in each.alike or ():
            assert name in {*each.__struct_fields__, *Caller.__struct_fields__}, each


def test_no_event_has_a_field_that_its_line_has_already() -> None:
    reserved = {"time", "level", "event", "trace", "more"}
    assert [each for each in all_events() if reserved.intersection(each.__struct_fields__)] == []


@pytest.mark.processes
def test_a_line_is_whole_where_several_processes_write(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    children = []
    for number in range(3):
        pid = os.fork()
        if not pid:
            with log_to_file(str(path)):
                for _ in range(50):
                    tell(acts.StoreReadOnly(str(number) * 300))
            os._exit(0)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
    lines = path.read_text().splitlines()
    assert len(lines) == 150
    assert all(set(json.loads(line)["why"]) <= set("012") for line in lines)
