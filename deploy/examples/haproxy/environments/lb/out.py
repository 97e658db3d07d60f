#!/usr/bin/env python3
"""`before`: take $MACHINE out of $VAR_BACKEND, and come back when it works on nothing any more. Safe to repeat.

It ends with 0 only when HAProxy itself says that the server gets no new requests and has none left.
"""

from __future__ import annotations

import sys

import haproxy
from haproxy import RotationError, Server, Settings


def take_out(settings: Settings) -> int:
    # All of them first: while one is waited for, the others already send nothing new.
    for balancer in settings.balancers:
        balancer.look()
        balancer.order(settings.out_state)
    for balancer in settings.balancers:
        seen, empty = haproxy.wait(balancer, settings.drain_seconds, is_empty)
        if not empty:
            raise RotationError(
                f"{settings.server} still works on {seen.sessions} requests after {settings.drain_seconds:g} s at "
                f"{balancer.name}: raise the variable drain_seconds, or end them"
            )
        print(f"{settings.server} is out at {balancer.name}: {seen.status}, no sessions")
    return haproxy.DONE


def is_empty(seen: Server) -> bool:
    """Raises `RotationError` where the order did not last."""
    if seen.in_service:
        raise RotationError(
            f"HAProxy says {seen.status} although it was told to take the server out: it was reloaded, or somebody "
            "else put it in; run this again"
        )
    return seen.sessions == 0


if __name__ == "__main__":
    sys.exit(haproxy.run(take_out))
