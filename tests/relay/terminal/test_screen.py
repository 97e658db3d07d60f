"""Lines and what stands below them on a real pseudo-terminal; an emulator says what a person sees."""

from __future__ import annotations

import ast
import os
import signal
from pathlib import Path

import pytest
from harness.paths import ROOT
from harness.process import Process, wait_for
from harness.terminal import Terminal, survive

LINES = [f"  {number:5.1f} s  machine-{number:02}: " + "x" * (number * 5) for number in range(30)]
TALK = """
import sys, time
from relay.support.console import progress_bars, say
count, pause = int(sys.argv[1]), float(sys.argv[2])
with progress_bars() as bar:
    shows = [bar(f"machine-{i:02}") for i in range(count)]
    for show in shows:
        show(0, 5 << 20)
    for i, show in enumerate(shows):
        show(1 << 20, 5 << 20)
        say(f"  {i:5.1f} s  machine-{i:02}: " + "x" * (i * 5), aside=i % 3 == 0)
        print("a library's word", file=sys.stderr) if i == 0 else None
        time.sleep(pause)
        show(5 << 20, 5 << 20)
    say("the end")
"""
HOSTILE = """
from relay.support.console import progress_bars, say
from relay.terminal.screen import say_error
evil = "a\\x1b[2Jb\\rc\\u202ed\\x07e\\u2066f\\x9b1Ag\\u200fh\\nforged"
say(evil)
with progress_bars() as bar:
    bar(evil)(1, 2)
    say(evil)
    say(evil, aside=True)
say_error("error", evil, evil)
"""


@pytest.mark.parametrize("columns", [80, 120, 30])
@pytest.mark.parametrize("count", [1, 6, 30])
def test_every_line_is_to_be_read_in_order_whatever_stands_below(tmp_path: Path, columns: int, count: int) -> None:
    with Terminal(columns) as terminal:
        assert Process(tmp_path, count, "0.005", code=TALK, terminal=terminal.slave, TERM="xterm").result().code == 0
        terminal.close()
        assert survive([*LINES[:count], "the end"], terminal.lines, columns) == []
        assert "a library's word" in terminal.lines
        assert terminal.lines[-1] == "the end"
        assert "5.0 MiB of 5.0 MiB" in terminal.raw.decode() or f"{5 * count}.0 MiB of" in terminal.raw.decode()


def test_a_window_that_is_made_smaller_and_larger_loses_no_line(tmp_path: Path) -> None:
    with Terminal(120, 30) as terminal:
        talking = Process(tmp_path, 30, "0.03", code=TALK, terminal=terminal.slave, TERM="xterm")
        for columns, rows, line in ((60, 12, "machine-08"), (40, 5, "machine-14"), (100, 40, "machine-20")):
            wait_for(lambda line=line: f"{line}: " in terminal.raw.decode(errors="replace"))
            terminal.resize(columns, rows)
        assert talking.result().code == 0
        terminal.close()
        # Not how they are wrapped, which depends on when the window changed: that each is there, and in order.
        heads = [line.split(":")[0] for line in LINES]
        text = "\n".join(terminal.lines)
        places = [text.find(f"{head}:") for head in heads]
        assert min(places) >= 0
        assert places == sorted(places)


def test_a_command_that_is_killed_leaves_its_lines_and_a_cursor(tmp_path: Path) -> None:
    with Terminal() as terminal:
        talking = Process(tmp_path, 30, "0.05", code=TALK, terminal=terminal.slave, TERM="xterm")
        wait_for(lambda: b"machine-05: " in terminal.raw)
        talking.send_signal(signal.SIGKILL)
        talking.result()
        terminal.close()
        assert survive(LINES[:5], terminal.lines, 80) == []
        assert not terminal.cursor_hidden


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"TERM": ""}], ids=str)
def test_a_terminal_that_cannot_move_its_cursor_gets_lines_alone(tmp_path: Path, variables: dict[str, str]) -> None:
    with Terminal() as terminal:
        assert Process(tmp_path, 6, "0", code=TALK, terminal=terminal.slave, **variables).result().code == 0
        terminal.close()
        assert b"\x1b" not in terminal.raw
        assert "━" not in terminal.raw.decode()
        assert survive([*LINES[:6], "the end"], terminal.lines, 80) == []


def test_no_colour_is_used_where_none_is_wanted(tmp_path: Path) -> None:
    for variables, is_red in (({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True)):
        with Terminal() as terminal:
            command = Process(tmp_path, "package", "show", "No.Such", "1.0.0", terminal=terminal.slave,
                              **{"TERM": "xterm"} | variables)  # fmt: skip
            assert command.result().code == 1
            terminal.close()
            assert (b"\x1b[31m" in terminal.raw) == is_red
            assert terminal.lines[0].startswith("error (refused): ")


def test_beside_a_pipe_nothing_is_drawn_as_its_reader_may_write_to_the_same_terminal(tmp_path: Path) -> None:
    code = f"import os\nreads, writes = os.pipe()\nos.dup2(writes, 1)\n{TALK}"
    with Terminal() as terminal:
        assert Process(tmp_path, 6, "0", code=code, terminal=terminal.slave, TERM="xterm").result().code == 0
        terminal.close()
        assert b"\x1b" not in terminal.raw


def test_away_from_a_terminal_there_are_lines_as_long_as_they_are_and_no_control_character(tmp_path: Path) -> None:
    done = Process(tmp_path, 30, "0", code=TALK, COLUMNS="40").result()
    assert [*done.out.splitlines(), *done.err.splitlines()] == [
        *(line for number, line in enumerate(LINES) if number % 3),
        "the end",
        LINES[0],
        "a library's word",
        *LINES[3::3],
    ]
    assert "\x1b" not in done.out + done.err


def test_nothing_that_is_said_or_drawn_drives_the_terminal_or_looks_like_another_line(tmp_path: Path) -> None:
    with Terminal() as terminal:
        assert Process(tmp_path, code=HOSTILE, terminal=terminal.slave, TERM="xterm", NO_COLOR="1").result().code == 0
        terminal.close()
        text = terminal.raw.decode()
        assert not {"\u202e", "\u2066", "\u200f", "\x9b", "\x07"} & set(text)
        assert "\x1b[2J" not in text
        assert not [line for line in terminal.lines if line.startswith("forged")]
        assert [r"\u001b[2Jb\rc\u202ed\u0007e\u2066f\u009b1Ag\u200fh\nforged" in line for line in terminal.lines] == [
            True
        ] * 5


# --- one way out

OTHERS = {"echo", "secho", "print"}
ALLOWED = {
    "relay/terminal/screen.py": "it is that way",
    "relay/engines/engine_process.py": "a process whose standard output is a pipe to its parent",
}


@pytest.mark.parametrize("house", ["relay", "agent", "orchestrator"])
def test_all_that_is_printed_goes_through_the_screen(house: str) -> None:
    found = []
    for path in sorted((ROOT / house).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name in ALLOWED:
                continue
            if called.rpartition(".")[2] in OTHERS and called.partition(".")[0] in {"click", "print"}:
                found.append(f"{name}:{node.lineno}: {called}")
            if called.startswith(("sys.stdout.w", "sys.stderr.w", "sys.stdout.buffer")):
                found.append(f"{name}:{node.lineno}: {called}")
    assert found == []
    assert os.path.isdir(ROOT / house)
