"""What measurements say alike: their command lines, figures in words, promises, and text or one document."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from relay.support.console import print_json


class Check(msgspec.Struct, frozen=True):
    """One promise: what was seen, the most that it may be, and where that comes from; `most` None: it is not known."""

    promise: str
    seen: float
    most: float | None
    why: str = ""

    @property
    def held(self) -> bool:
        return self.most is not None and self.seen <= self.most

    def __str__(self) -> str:
        seen = f"{self.seen:,}" if isinstance(self.seen, int) else f"{self.seen:,.3f}"
        most = "-" if self.most is None else f"{self.most:,}"
        return f"{mark(held=self.held)}  {self.promise}: {seen} of {most}" + (f" ({self.why})" if self.why else "")


def mark(*, held: bool) -> str:
    """The word before a promise."""
    return "held  " if held else "BROKEN"


def documents(checks: Iterable[Check]) -> list[dict[str, Any]]:
    """Promises for programs."""
    return [msgspec.to_builtins(check) | {"held": check.held} for check in checks]


def parser(name: str, text: str | None) -> argparse.ArgumentParser:
    """The command line of `python -m benchmarks.NAME`, described by the measurement's own text."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=text, formatter_class=form)


def add_json(command: argparse.ArgumentParser) -> None:
    """`--json`, as `as_json`."""
    command.add_argument("--json", action="store_true", dest="as_json", help="print one document in place of text")


def add_folder(command: argparse.ArgumentParser) -> None:
    """`--folder`, where large files may lie."""
    command.add_argument("--folder", help="where to work [default: the system's temporary folder]")


def numbers(text: str) -> tuple[float, ...]:
    """Of an argument, with commas between."""
    return tuple(float(word) for word in text.split(","))


def show(text: str, document: object, *, as_json: bool) -> None:
    """The result for people, or for programs."""
    if as_json:
        print_json(document)
    else:
        print(text)


def tell(text: str) -> None:
    """How far the measurement is."""
    print(text, file=sys.stderr, flush=True)


def spread(values: Sequence[float], form: str) -> str:
    """The median, and how far the values lay apart."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def mega(count: float) -> str:
    """Bytes as MB."""
    return f"{count / 1e6:.1f} MB"
