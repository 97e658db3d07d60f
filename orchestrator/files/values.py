"""The small values that process and environment share: names, durations, shares of machines."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from msgspec import Meta

from relay.package.identity import ID_MAX

Name = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}$",
        description="a name of letters, digits, '_', '.' and '-', at most 63 characters",
    ),
]
VariableName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z_][A-Za-z0-9_-]{0,62}$",
        description="a variable's name: letters, digits, '_' and '-', at most 63 characters",
    ),
]
MachineName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$",
        description="a machine's name: letters, digits, '.', '_' and '-', at most 63 characters",
    ),
]
PersonName = Annotated[
    str,
    Meta(
        pattern=r"^[a-z][a-z0-9._-]{0,62}$",
        description="a person's name: small letters, digits, '.', '_' and '-', a letter first, at most 63 characters",
    ),
]
PackageName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*$",
        max_length=ID_MAX,
        description="a package id such as Acme.Web",
    ),
]
ProjectName = Annotated[
    str,
    Meta(
        # It becomes the end of a package id, that of the project's scripts.
        pattern=r"^[A-Za-z0-9_]+([.-][A-Za-z0-9_]+)*$",
        max_length=60,
        description="a project's name: words of letters, digits and '_' with single '.' or '-' between, at most 60 characters",
    ),
]
Title = Annotated[
    str,
    Meta(pattern=r"^[^\x00-\x1f\x7f]{1,100}$", description="a name of 1 to 100 printable characters"),
]
Text = Annotated[str, Meta(min_length=1, max_length=4096, description="text of 1 to 4096 characters")]
ScriptPath = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=1024,
        description="the path of a script, relative to the folder of this file, with '/' between its parts",
    ),
]
Command = Annotated[
    tuple[Annotated[str, Meta(max_length=4096, description="text")], ...],
    Meta(min_length=1, max_length=64, description="a command as a list: [program, argument, ...]"),
]
Duration = Annotated[
    str, Meta(pattern=r"^[0-9]{1,6}(ms|s|m|h|d)$", description="a duration such as 500ms, 90s, 2m, 1h or 7d")
]
Rate = (
    Annotated[str, Meta(pattern=r"^[0-9]{1,6}(kbit|Mbit|Gbit)$", description="a rate such as 50Mbit")]
    | Annotated[int, Meta(ge=1, le=1_000_000)]
)
"""Of a line; a bare number is in Mbit/s."""
Percent = Annotated[str, Meta(pattern=r"^[0-9]{1,3}%$", description="a percentage such as 25%")]
Share = Annotated[int, Meta(ge=0, le=100_000)] | Percent
"""So many machines, or so many of a hundred."""

DURATION_MAX: Final = 7 * 86400.0
"""Seconds: what an order may carry."""
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_RATES: Final = {"kbit": 125, "Mbit": 125_000, "Gbit": 125_000_000}
"""Bytes per second."""

NotificationKind = Literal["waiting", "paused", "failed", "finished", "rotation_open"]
"""What receivers of notifications can ask for."""


def seconds(duration: str) -> float:
    """A `Duration` in seconds. Raises `ValueError` where it is none."""
    match = re.fullmatch(r"([0-9]+)(ms|s|m|h|d)", duration)
    if match is None:
        raise ValueError(f"not a duration: {duration[:40]!r}")
    return int(match[1]) * _UNITS[match[2]]


def bytes_per_second(rate: int | str) -> float:
    """A `Rate` in bytes per second. Raises `ValueError` where it is none."""
    match = re.fullmatch(r"([0-9]+)(kbit|Mbit|Gbit)", rate if isinstance(rate, str) else f"{rate}Mbit")
    if match is None:
        raise ValueError(f"not a rate: {rate!r:.40}")
    return float(int(match[1]) * _RATES[match[2]])


def least_of(share: int | str, whole: int) -> int:
    """How many of `whole` machines are at least so many of a hundred: rounded up."""
    return share if isinstance(share, int) else -(-whole * _percent(share) // 100)


def most_of(share: int | str, whole: int) -> int:
    """How many of `whole` machines are at most so many of a hundred: rounded down, to 0 if need be."""
    return share if isinstance(share, int) else whole * _percent(share) // 100


def part_of(share: int | str, whole: int) -> int:
    """How many of `whole` machines: a number as it is, a percentage rounded down, but at least 1 of it.

    0 and `0%` give 0, and the caller says what that means.
    """
    if isinstance(share, int):
        return share
    return max(1, most_of(share, whole)) if _percent(share) else 0


def _percent(share: str) -> int:
    return int(share.removesuffix("%"))
