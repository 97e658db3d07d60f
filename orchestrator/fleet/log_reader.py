"""What scripts printed, read again for people: one file an operation, its lines in order."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_PIECE = 256 << 10
_FRAME = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (stdout|stderr) ([FP]) ")
"""Before each line, see `agent.runs.runner.framed`; logs of older agents have none."""


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of output.

    Attributes:
        operation: step~machine~action~attempt, as its file is called.
        time: when it was printed, in UTC by the clock of the machine; empty where this is not known.
        stream: stdout or stderr; empty where this is not known.
    """

    operation: str
    text: str
    time: str = ""
    stream: str = ""

    @property
    def where(self) -> str:
        """For people: machine and action."""
        _, machine, action, attempt = (*self.operation.split("~"), "", "", "", "")[:4]
        return f"{machine} {action}" + (f" (attempt {attempt})" if attempt not in {"", "1"} else "")

    def as_json(self) -> str:
        """One document a line, so that a reader who follows has each as it comes."""
        told = {"operation": self.operation, "text": self.text, "time": self.time, "stream": self.stream}
        return json.dumps({"format": 1} | told)

    def __str__(self) -> str:
        """For people: what was printed as an error has a mark. Two spaces stand before the text."""
        mark = " stderr" if self.stream == "stderr" else ""
        return f"{self.time} {self.where}{mark}  {self.text}".lstrip()


class LogReader:
    """Follows the log files of a deployment. Blocking, small."""

    def __init__(self, folder: str, machine: str | None, told: Mapping[str, int] | None = None) -> None:
        """Read below `folder`; only what is of `machine`, where one is given. Of each operation the first `told` lines are
        passed over: log files only grow, so that these are always the same.
        """
        self._passed_over = dict(told or {})
        self._folder = folder
        self._machine = machine
        self._read: dict[str, int] = {}
        self._rest: dict[str, bytes] = {}
        self._parts: dict[tuple[str, bytes], tuple[bytes, bytes]] = {}
        """By file and stream, of a line that goes on: its time, and its text so far."""

    def news(self, *, final: bool = True) -> Iterator[LogLine]:
        """Lines that came since the last call and were not told before. A last line without an end waits for it, but where this is the `final`
        call.
        """
        for line in self._read_on(final=final):
            left = self._passed_over.get(line.operation, 0)
            if left:
                self._passed_over[line.operation] = left - 1
            else:
                yield line

    def _read_on(self, *, final: bool) -> Iterator[LogLine]:
        for name in self._names():
            with open(os.path.join(self._folder, name), "rb") as file:
                file.seek(self._read.get(name, 0))
                while piece := file.read(_PIECE):
                    self._read[name] = self._read.get(name, 0) + len(piece)
                    *lines, rest = (self._rest.pop(name, b"") + piece).split(b"\n")
                    for line in lines:
                        yield from self._told(name, line)
                    self._rest[name] = rest
            if final:
                yield from self._ends(name)

    def _told(self, name: str, line: bytes) -> Iterator[LogLine]:
        """The line that ends in this one of the file, where one does."""
        found = _FRAME.match(line)
        if found is None:
            yield _line(name, line)
            return
        stream, text = found[2], line[found.end() :]
        time, before = self._parts.pop((name, stream), (found[1], b""))
        if found[3] == b"P":
            self._parts[name, stream] = (time, before + text)
        else:
            yield _line(name, before + text, time, stream)

    def _ends(self, name: str) -> Iterator[LogLine]:
        """What has no end of its own."""
        if rest := self._rest.pop(name, b""):
            yield from self._told(name, rest)
        for key in [key for key in self._parts if key[0] == name]:
            time, text = self._parts.pop(key)
            yield _line(name, text, time, key[1])

    def _names(self) -> list[str]:
        """In the order in which they were begun."""
        try:
            names = [name for name in os.listdir(self._folder) if name.endswith(".log")]
        except FileNotFoundError:
            return []
        mine = [name for name in names if self._machine is None or f"~{self._machine.lower()}~" in name.lower()]
        return sorted(mine, key=lambda name: os.stat(os.path.join(self._folder, name)).st_mtime_ns)


def _line(name: str, text: bytes, time: bytes = b"", stream: bytes = b"") -> LogLine:
    told = text.rstrip(b"\r").decode(errors="replace")
    return LogLine(name.removesuffix(".log"), told, time.decode(), stream.decode())
