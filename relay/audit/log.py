"""Where events go, and in which form: key=value for a person at a terminal, one JSON document a line for everything else.

A process has one log. What libraries log stands in it too, as the event `log`.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Final, Literal, TypeVar

import click

from relay.audit.event import Told
from relay.audit.repeats import Repeats
from relay.audit.shown import Value, as_json, as_pairs, clock, harmless
from relay.terminal.screen import say

Form = Literal["text", "json"]
TRACE_MAX: Final = 4000
"""Characters of a traceback: its end, which says most."""
MESSAGE_MAX: Final = 2000
"""Of what a library says."""
LEVELS: Final = ("debug", "info", "warning", "error")
_Command = TypeVar("_Command", bound=Callable[..., object])


def log_options(command: _Command) -> _Command:
    """`--log-level` and `--log-format`, for what serves."""
    form = click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        metavar="text|json",
        help="Events as key=value, or one JSON document a line. [default: text on a terminal, json elsewhere]",
    )
    level = click.option(
        "--log-level",
        type=click.Choice(LEVELS),
        metavar="LEVEL",
        default="info",
        show_default=True,
        help="What is told: debug, info, warning or error, and what is graver.",
    )
    return level(form(command))


@contextmanager
def log_to_stderr(
    level: str, form: Form | None, on_merged: Callable[[str], None] = lambda _event: None
) -> Iterator[None]:
    """The log of a process that serves, until the block ends. `on_merged` hears the name of each event that was only counted."""
    shown: Form = form or ("text" if sys.stderr.isatty() else "json")
    with _logging_to(_Merged(_Lines(sys.stderr, shown), on_merged), level.upper()):
        yield


@contextmanager
def log_to_file(path: str) -> Iterator[None]:
    """The log of a command, added to a file of JSON lines that is its owner's alone. It is made with the first event."""
    with _logging_to(_Merged(_File(path), lambda _event: None), "INFO"):
        yield


@contextmanager
def _logging_to(handler: logging.Handler, level: str) -> Iterator[None]:
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(level)
    try:
        yield
    finally:
        root.setLevel(before)
        root.removeHandler(handler)
        handler.close()


class _Merged(logging.Handler):
    """In front of the handler that writes: events that repeat are counted, and told once a minute."""

    def __init__(self, target: logging.Handler, on_merged: Callable[[str], None]) -> None:
        super().__init__()
        self._target, self._on_merged = target, on_merged
        self._repeats = Repeats()
        self._timer: threading.Timer | None = None
        self._closed = False

    def emit(self, record: logging.LogRecord) -> None:
        told = record.msg
        if isinstance(told, Told) and not self._repeats.admits(told, time.monotonic()):
            self._on_merged(told.name)
        else:
            self._target.handle(record)
        self._set_timer()

    def close(self) -> None:
        """Tell what was counted. Twice is once."""
        with self._held():
            if self._timer is not None:
                self._timer.cancel()
            self._closed = True
            self._tell_due(float("inf"))
        self._target.close()
        super().close()

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The lock that is held around `emit`, too."""
        self.acquire()
        try:
            yield
        finally:
            self.release()

    def _set_timer(self) -> None:
        due = self._repeats.next_due()
        if due is not None and self._timer is None and not self._closed:
            self._timer = threading.Timer(max(0.0, due - time.monotonic()), self._on_time)
            self._timer.daemon = True
            self._timer.start()

    def _on_time(self) -> None:
        with self._held():
            self._timer = None
            self._tell_due(time.monotonic())
            self._set_timer()

    def _tell_due(self, now: float) -> None:
        for told in self._repeats.due(now):
            level = {"levelno": told.level, "levelname": logging.getLevelName(told.level)}
            self._target.handle(logging.makeLogRecord({"msg": told, **level}))


class _Lines(logging.StreamHandler[TextIOWrapper]):
    """One line for each record."""

    def __init__(self, stream: object, form: Form) -> None:
        super().__init__(stream)  # type: ignore[arg-type] # the standard error is one where it is no test's
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        name, fields = _fields_of(record)
        head = {"time": clock(record.created), "level": record.levelname.lower()}
        if self._form == "json":
            return as_json({**head, "event": name, **fields})
        return f"{head['time']} {head['level']:7} {as_pairs(name, fields)}"


class _File(_Lines):
    """Opened for each line, so that it can be moved away at any time; what cannot be written is told once, and stops nothing."""

    def __init__(self, path: str) -> None:
        super().__init__(sys.stderr, "json")
        self._path = path
        self._failed = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record).encode("utf-8", "backslashreplace") + b"\n"
            os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                # One write: lines of processes that write at the same time do not mix.
                os.write(file, line)
            finally:
                os.close(file)
        except OSError as error:
            if not self._failed:
                self._failed = True
                say(f"warning: no events are kept in {self._path}: {error.strerror}", aside=True)


def _fields_of(record: logging.LogRecord) -> tuple[str, dict[str, Value]]:
    trace: dict[str, Value] = {"trace": _trace(record.exc_info)} if record.exc_info else {}
    if isinstance(record.msg, Told):
        return record.msg.name, {**record.msg.fields, **trace}
    return "log", {"logger": record.name, "message": harmless(record.getMessage(), MESSAGE_MAX), **trace}


def _trace(raised: logging._SysExcInfoType) -> Value:
    return harmless("".join(traceback.format_exception(*raised))[-TRACE_MAX:], 2 * TRACE_MAX)
