"""What tests ask of HAProxy's log beside what the demo does. `haproxy_log` is the demo's module."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from haproxy_log import Log, Moment, Request


def were_out(moments: tuple[Moment, ...]) -> frozenset[str]:
    """Every server that was out of rotation at some moment of `haproxy_log.rotation`."""
    return frozenset[str]().union(*(moment.out for moment in moments))


def by_server_and_status(log: Log) -> Counter[tuple[str, int]]:
    """How many requests each server answered with each status."""
    return Counter((request.server, request.status) for request in log.requests)


def failed_requests(log: Log) -> tuple[Request, ...]:
    """Requests that did not get a whole answer of the application's own: 5xx, or cut."""
    return tuple(
        request
        for request in log.requests
        if request.status < 0 or request.status >= 500 or not request.termination.startswith("--")
    )
