"""A terminal that people would sit at: a real pseudo-terminal, and an emulator (pyte) that says what is to be seen on it."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import pyte

from harness.process import Done, Process

SCROLLBACK = 100_000


class Terminal:
    """Use as a context manager. It has a width and a height, and keeps what scrolls out at its top."""

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        self.columns = columns
        self.master, self.slave = pty.openpty()
        self.raw = bytearray()
        """All that was written to it."""
        self._screen = pyte.HistoryScreen(columns, rows, history=SCROLLBACK, ratio=0.5)
        self._stream = pyte.ByteStream(self._screen)
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._set_size(columns, rows)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing more is written: wait until all that was has been drawn."""
        if self.slave >= 0:
            os.close(self.slave)
            self.slave = -1
            self._reader.join(60.0)
            os.close(self.master)

    def run(self, home: Path, *words: object, **how: Any) -> Done:
        """A command whose output is this terminal, to its end."""
        return self.start(home, *words, **how).result()

    def start(self, home: Path, *words: object, **how: Any) -> Process:
        return Process(home, *words, terminal=self.slave, **{"TERM": "xterm-256color"} | how)

    def resize(self, columns: int, rows: int) -> None:
        """As a window does: lines are not wrapped anew, and nothing is cut off that was not beyond the edge."""
        with self._lock:
            row = self._keep_top(self._screen.lines - rows)
            self.columns = columns
            self._screen.resize(rows, columns)
            self._screen.cursor_position(row + 1, 1)
            self._set_size(columns, rows)

    @property
    def lines(self) -> list[str]:
        """Everything to be seen on it, what scrolled away first; without spaces at the ends."""
        with self._lock:
            rows = [*self._screen.history.top, *(self._screen.buffer[y] for y in range(self._screen.lines))]
            texts = [_text(row, self.columns) for row in rows]
        while texts and not texts[-1]:
            texts.pop()
        return texts

    @property
    def screen(self) -> list[str]:
        """What the window itself shows."""
        with self._lock:
            return [line.rstrip() for line in self._screen.display]

    @property
    def cursor_hidden(self) -> bool:
        with self._lock:
            return bool(self._screen.cursor.hidden)

    def _keep_top(self, fewer: int) -> int:
        """The emulator cuts so many rows off at the top; a terminal lets empty ones go, and scrolls the others away.

        Gives the row that the cursor then stands in.
        """
        if fewer <= 0:
            return self._screen.cursor.y
        screen, row = self._screen, self._screen.cursor.y
        scrolled = max(0, row + 1 - (screen.lines - fewer))
        screen.history.top.extend(screen.buffer[y] for y in range(scrolled))
        screen.cursor_position(1, 1)
        screen.insert_lines(fewer - scrolled)
        return row - scrolled

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self.master, 65536)
            except OSError:  # the last writer is gone
                return
            if not data:
                return
            with self._lock:
                self.raw += data
                self._stream.feed(data)


def _text(row: Mapping[int, Any], columns: int) -> str:
    return "".join(row[x].data for x in range(columns)).rstrip()


def wrapped(line: str, columns: int) -> list[str]:
    """A line as a terminal of this width shows it."""
    return [line[at : at + columns].rstrip() for at in range(0, max(len(line), 1), columns)]


def survive(told: list[str], shown: list[str], columns: int, same: Callable[[str], str] = str) -> list[str]:
    """Those of the lines `told` that are not to be read among the rows `shown`, in this order; `same` makes two alike."""
    rows, at, lost = [same(row) for row in shown], 0, []
    for line in told:
        wanted = [same(row) for row in wrapped(line, columns)]
        found = next((i for i in range(at, len(rows)) if rows[i : i + len(wanted)] == wanted), None)
        if found is None:
            lost.append(line)
        else:
            at = found + len(wanted)
    return lost
