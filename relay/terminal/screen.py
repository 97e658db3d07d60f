"""Standard output and error as one place that people look at: lines, and on a terminal a display that stands below them.

All that a command prints goes through `say`, so that no line and no display can overwrite each other. A display is drawn
where standard error is a terminal that can move its cursor and nothing else writes there: a pipe behind standard output
may end at the same terminal (`| tee`), so there is none beside a pipe. Without a display there are lines alone, and no
control character. Lines are as long as they are: a terminal wraps them itself, and what is copied from it is whole.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol

import click

from relay.terminal.text import printable

if TYPE_CHECKING:
    from rich.text import Text

_A_SECOND: Final = 4
"""Times that a display is drawn anew; with each line as well."""
_PLAIN: Final = str.maketrans({"━": "=", "─": "-", "…": "~", "·": "."})
"""For terminals whose characters are not those of UTF-8."""


class Display(Protocol):
    """What stands below the lines.

    It is asked from any thread, a few times a second and after each line, and answers from what it knows: it waits for
    nothing. A row that is too long is cut with a mark, and so are rows beyond the height.
    """

    def rows(self, width: int, height: int) -> Sequence[str]:
        """The rows for a terminal of this size, from the top; no control characters are drawn."""


def say(*lines: str, aside: bool = False) -> None:
    """Print lines, on standard error where they are said `aside`. What they hold of other lines is escaped."""
    text = "\n".join(printable(line, keep="\t") for line in lines)
    if _below is not None and _is_same_terminal(aside=aside):
        _below.say(text)
    else:
        click.echo(text, err=aside)


def say_error(head: str, *lines: str) -> None:
    """Print lines on standard error, the first after a `head` that stands out where that can be."""
    first, *others = lines
    shown = click.style(head, fg="red", bold=True) if sys.stderr.isatty() and has_colours(os.environ) else head
    text = "\n  ".join([f"{shown}{printable(first)}", *map(printable, others)])
    click.echo(text, err=True)


def has_colours(environment: Mapping[str, str]) -> bool:
    """Whether a terminal may be given colours (no-color.org)."""
    return not environment.get("NO_COLOR") and environment.get("TERM", "") not in {"dumb", "unknown"}


@contextmanager
def showing(display: Display) -> Iterator[bool]:
    """Keep `display` below the lines while the block runs, where there is a terminal for it: gives whether there is.

    There is one at a time: beside another display a second one is not drawn.
    """
    global _below  # noqa: PLW0603 - a process has one standard output and one terminal
    if _below is not None or not _has_screen():
        yield False
        return
    _below = _Below(display)
    try:
        with _below.live:
            yield True
    finally:
        _below = None


def _has_screen() -> bool:
    if not sys.stderr.isatty():
        return False
    if os.name == "posix" and os.environ.get("TERM", "") in {"", "dumb", "unknown"}:
        return False
    try:
        mode = os.fstat(sys.stdout.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode))


def _is_same_terminal(*, aside: bool) -> bool:
    if aside:
        return True
    try:
        out, screen = (os.fstat(stream.fileno()) for stream in (sys.stdout, sys.stderr))
    except (OSError, ValueError):
        return False
    return sys.stdout.isatty() and (out.st_dev, out.st_ino) == (screen.st_dev, screen.st_ino)


class _Below:
    """A display that rich draws, and the lines above it."""

    def __init__(self, display: Display) -> None:
        from rich.console import Console
        from rich.live import Live

        class Terminal(Console):
            def show_cursor(self, show: bool = True) -> bool:  # noqa: ARG002, FBT001, FBT002 - as rich has it
                """Leave it: a command that is killed must leave a terminal with a cursor."""
                return False

        # A size that a shell has exported does not follow the window.
        variables = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES"}}
        self._display = display
        self._console = Terminal(stderr=True, force_terminal=True, soft_wrap=True, highlight=False, _environ=variables)
        # What libraries write to standard error goes above the display, too.
        self.live = Live(
            get_renderable=self._drawn,
            console=self._console,
            transient=True,
            refresh_per_second=_A_SECOND,
            redirect_stdout=False,
            redirect_stderr=True,
            vertical_overflow="crop",
        )

    def say(self, text: str) -> None:
        from rich.text import Text

        self._console.print(Text(text), soft_wrap=True)

    def _drawn(self) -> Text:
        from rich.text import Text

        width, height = self._console.size
        rows = _fitting(self._display.rows(width - 1, height - 1), width - 1, height - 1)
        text = "\n".join(rows)
        return Text(text if self._console.encoding.startswith("utf") else text.translate(_PLAIN), no_wrap=True)


def _fitting(rows: Sequence[str], width: int, height: int) -> list[str]:
    """What of the rows a terminal of this size can show, each cut with a mark where it is too long."""
    from rich.text import Text

    shown = [*rows] if len(rows) <= height else [*rows[: height - 1], f"… and {len(rows) - height + 1} more rows"]
    fitted = []
    for row in shown:
        text = Text(printable(row))
        text.truncate(max(width, 1), overflow="ellipsis")
        fitted.append(text.plain)
    return fitted


_below: _Below | None = None
"""The display of now. A process has one standard output and one terminal."""
