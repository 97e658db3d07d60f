"""What scripts printed, read again for people: one file an operation, its lines in order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

_PIECE = 256 << 10


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of output. `operation` is step~machine~action~attempt, as its file is called."""

    operation: str
    text: str

    @property
    def where(self) -> str:
        """For people: machine and action."""
        _, machine, action, attempt = (*self.operation.split("~"), "", "", "", "")[:4]
        return f"{machine} {action}" + (f" (attempt {attempt})" if attempt not in {"", "1"} else "")


class LogReader:
    """Follows the log files of a deployment. Blocking, small."""

    def __init__(self, folder: str, machine: str | None) -> None:
        """Read below `folder`; only what is of `machine`, where one is given."""
        self._folder = folder
        self._machine = machine
        self._read: dict[str, int] = {}
        self._rest: dict[str, bytes] = {}

    def news(self, *, final: bool = True) -> Iterator[LogLine]:
        """Lines that came since the last call. A last line without an end waits for it, but where this is the `final`
        call.
        """
        for name in self._names():
            operation = name.removesuffix(".log")
            with open(os.path.join(self._folder, name), "rb") as file:
                file.seek(self._read.get(name, 0))
                while piece := file.read(_PIECE):
                    self._read[name] = self._read.get(name, 0) + len(piece)
                    *lines, rest = (self._rest.pop(name, b"") + piece).split(b"\n")
                    yield from (LogLine(operation, _text(line)) for line in lines)
                    self._rest[name] = rest
            if final and (rest := self._rest.pop(name, b"")):
                yield LogLine(operation, _text(rest))

    def _names(self) -> list[str]:
        """In the order in which they were begun."""
        try:
            names = [name for name in os.listdir(self._folder) if name.endswith(".log")]
        except FileNotFoundError:
            return []
        mine = [name for name in names if self._machine is None or f"~{self._machine.lower()}~" in name.lower()]
        return sorted(mine, key=lambda name: os.stat(os.path.join(self._folder, name)).st_mtime_ns)


def _text(line: bytes) -> str:
    return line.rstrip(b"\r").decode(errors="replace")
