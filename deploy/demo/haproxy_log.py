"""What HAProxy's own log says: which servers were in rotation at each moment, and what became of each request. Pure.

It reads `log … format timed` or `format iso` with `option httplog`
(https://docs.haproxy.org/2.6/configuration.html#8.2.3). The sentences about servers are those of HAProxy 2.6's
src/server.c; one that is not known is refused, as it might have been the one that took a server out.

Not all that fails is in the log: where a kept connection to a server breaks under a client's later request, HAProxy hangs
up on the client, who shall ask again, and writes no line (measured; src/http_ana.c, abort_keep_alive). So compare the
number of requests with what the clients counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal

Admin = Literal["ready", "drain", "maint"]


class LogError(ValueError):
    """A line that should say something about a server or request, and cannot be read."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A server in HAProxy's eyes: what people ordered, and what its checks found."""

    admin: Admin = "ready"
    up: bool = True

    @property
    def in_rotation(self) -> bool:
        return self.up and self.admin == "ready"


@dataclass(frozen=True, slots=True)
class Change:
    """A sentence about a server; None is what it leaves as it was."""

    at: datetime
    server: str
    admin: Admin | None
    up: bool | None
    text: str


@dataclass(frozen=True, slots=True)
class Request:
    """A request that has ended.

    Attributes:
        at: when it had come in whole.
        ended: when the last byte of the answer had left.
        server: `<NOSRV>` where HAProxy found none.
        status: what the client got; -1 where it got nothing.
        termination: HAProxy's four letters; `----` is an ordinary end.
    """

    at: datetime
    ended: datetime
    server: str
    status: int
    termination: str
    line: str


@dataclass(frozen=True, slots=True)
class Log:
    """What was read of one backend. `start` is how each of its servers stood before the first change."""

    start: dict[str, Standing]
    changes: tuple[Change, ...]
    requests: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class Moment:
    """From `at` until the next moment these servers were out of rotation. The first is the start: it has no time."""

    at: datetime | None
    out: frozenset[str]


# --- reading


def parse(lines: Iterable[str], servers: Iterable[str] = (), backend: str = "web") -> Log:
    """Read HAProxy's lines about one backend; all others are left out.

    `servers` are those of its configuration; without them the servers that the log names. Each stands in rotation at
    first, as HAProxy has it until a check fails.

    Raises:
        LogError: a sentence about a server of this backend that is not known.
    """
    changes: list[Change] = []
    requests: list[Request] = []
    for line in lines:
        stamped = _STAMPED.fullmatch(line.rstrip())
        if stamped is None:
            continue
        at, text = datetime.fromisoformat(stamped["at"]), stamped["text"]
        if sentence := _SENTENCE.fullmatch(text):
            if sentence["backend"] == backend:
                changes.append(_change(at, sentence["server"], sentence["what"]))
        elif (told := _REQUEST.match(text)) and told["backend"] == backend:
            requests.append(_request(at, told, text))
    names = set(servers) or {change.server for change in changes} | {r.server for r in requests} - {"<NOSRV>"}
    return Log({name: Standing() for name in sorted(names)}, tuple(changes), tuple(requests))


def _change(at: datetime, server: str, what: str) -> Change:
    for pattern, admin, up in _CHANGES:
        if found := pattern.match(what):
            words = found.groupdict()
            told_up = words["up"] == "UP" if "up" in words else up
            told_admin = _ADMIN[words["admin"]] if "admin" in words else admin
            return Change(at, server, told_admin, told_up, what)
    raise LogError(f"HAProxy says of server {server}: {what!r}, which may take it out or not")


def _request(ended: datetime, told: re.Match[str], text: str) -> Request:
    at = ended - timedelta(milliseconds=int(told["active"]))
    return Request(at, ended, told["server"], int(told["status"]), told["termination"], text)


_STAMPED = re.compile(r"(?:<\d+>)?(?P<at>\d{4}-\d\d-\d\dT\S+) (?P<text>.*)")
_SENTENCE = re.compile(r"(?:Backup )?Server (?P<backend>[^/\s]+)/(?P<server>\S+) (?P<what>.+)")
_REQUEST = re.compile(
    r"\S+ \[[^]]+\] \S+ (?P<backend>[^/\s]+)/(?P<server>\S+) "
    # TR/Tw/Tc/Tr/Ta: times in ms, -1 where it did not come so far; a '+' stands before what still grew.
    r"-?\d+/-?\d+/-?\d+/-?\d+/\+?(?P<active>\d+) (?P<status>-?\d+) \+?\d+ \S+ \S+ (?P<termination>\S{4}) "
)
_ADMIN: dict[str, Admin] = {"READY": "ready", "DRAIN": "drain"}
_SAID: tuple[tuple[str, Admin | None, bool | None], ...] = (
    (r"(?:\('[^']*'\) )?is (?P<up>UP|DOWN)/(?P<admin>READY|DRAIN) \((?:leaving|resolves)", None, None),
    (r"is (?P<up>UP|DOWN) \(leaving (?:forced )?drain\)", "ready", None),
    (r"enters drain state", "drain", None),
    (r"(?:is going DOWN for|was DOWN and now enters) maintenance", "maint", None),
    (r"(?:\('[^']*'\) )?(?:is leaving|remains|resolves).* (?:drain mode|maintenance)", None, None),
    (r"is (?:DOWN|stopping)\b", None, False),
    (r"is UP\b", None, True),
)
_CHANGES = tuple((re.compile(pattern), admin, up) for pattern, admin, up in _SAID)

# --- what it means


def rotation(log: Log) -> tuple[Moment, ...]:
    """Who was out of rotation, from change to change."""
    standing = dict(log.start)
    moments = [Moment(None, _out(standing))]
    for change in log.changes:
        standing[change.server] = _after(standing.get(change.server, Standing()), change)
        if (out := _out(standing)) != moments[-1].out:
            moments.append(Moment(change.at, out))
    return tuple(moments)


def _after(standing: Standing, change: Change) -> Standing:
    return Standing(
        standing.admin if change.admin is None else change.admin, standing.up if change.up is None else change.up
    )


def _out(standing: dict[str, Standing]) -> frozenset[str]:
    return frozenset(name for name, stands in standing.items() if not stands.in_rotation)


def since(log: Log, at: datetime) -> Log:
    """The part from `at` on, which begins as the part before it ended."""
    start = dict(log.start)
    for change in log.changes:
        if change.at < at:
            start[change.server] = _after(start.get(change.server, Standing()), change)
    return replace(
        log,
        start=start,
        changes=tuple(change for change in log.changes if change.at >= at),
        requests=tuple(request for request in log.requests if request.at >= at),
    )


def most_out_at_once(log: Log) -> int:
    """The most servers that were out of rotation at one moment."""
    return max(len(moment.out) for moment in rotation(log))


def fewest_in_service(log: Log) -> int:
    """The fewest servers that were in rotation at one moment."""
    return len(log.start) - most_out_at_once(log)
