"""What every command shares: running the loop, JSON or text, lines and bars that people see."""

from __future__ import annotations

import asyncio
import codecs
import io
import locale
import os
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from relay.support.progress import Bar
from relay.terminal.bars import Bars
from relay.terminal.screen import say, say_error, showing
from relay.terminal.text import printable, share, size

__all__ = ["printable", "say", "say_error", "share", "showing", "size"]

T = TypeVar("T")

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document in place of text.")
token_file_option = click.option(
    "--token-file", metavar="FILE", help="File with the relay's bearer token. [default: the token in $WAYSTATION_TOKEN]"
)
ca_file_option = click.option(
    "--ca-file",
    metavar="FILE",
    help="The authority that signs the relay's certificate (PEM), where it is a private one.",
)


def require_utf8() -> None:
    """Start this process anew, in Python's UTF-8 mode, where the locale says that file names are something else.

    Names of files are UTF-8 on every machine, or a package would be another one in another locale. It is an option of
    this process and nothing in its environment: scripts see the locale as it is.
    """
    is_asked_for = "utf8" in sys._xoptions  # noqa: SLF001 - documented; who says utf8=0 would be started for ever
    if not sys.flags.utf8_mode and sys.getfilesystemencoding() != "utf-8" and not is_asked_for:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606 - itself, once more


def let_output_pass() -> None:
    """What a terminal cannot show is replaced from now on: no output fails for the sake of an arrow.

    A terminal gets the characters of its locale, a file or pipe UTF-8; the variable PYTHONIOENCODING wins over both.
    """
    shown = _encoding_of_terminals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=shown if stream.isatty() else None, errors="replace")


def _encoding_of_terminals() -> str | None:
    """By the locale; None where it stays as it is: it was chosen, or Python has no such codec."""
    if "PYTHONIOENCODING" in os.environ:
        return None
    try:
        named = codecs.lookup(locale.getencoding()).name
    except LookupError:
        return None
    # The locale C says of a terminal only that it was not asked: those of today show UTF-8.
    return None if named == "ascii" else named


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` on uvloop where there is one; SIGINT cancels it and what it holds is given back."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def print_json(document: object) -> None:
    """One JSON document on standard output."""
    import msgspec

    say(*msgspec.json.format(msgspec.json.encode(document), indent=2).decode().split("\n"))


@contextmanager
def progress_bars() -> Iterator[Bar]:
    """Gives what makes bars: they stand below the lines while the block runs, where there is a terminal for them."""
    bars = Bars()
    with showing(bars):
        yield bars.bar


def table(headers: list[str], rows: list[list[str]], *, right: frozenset[int] = frozenset()) -> str:
    """Plain columns, for people and for `grep`. Cells are made printable."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    lines = []
    for row in [headers, *rows]:
        cells = [
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
