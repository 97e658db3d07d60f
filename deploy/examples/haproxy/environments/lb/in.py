#!/usr/bin/env python3
"""`after`: put $MACHINE back into $VAR_BACKEND, and come back when HAProxy says UP. Safe to repeat.

What happened to the machine is $OUTCOME. An excluded machine stays out; after all else it runs a version that was
verified, or a person wants it in.
"""

from __future__ import annotations

import sys

import haproxy
from haproxy import RotationError, Settings

PUT_IN = {"", "deployed", "not_started", "kept_old", "rolled_back", "put_back"}
LEAVE_OUT = {"excluded"}


def put_in(settings: Settings) -> int:
    if settings.outcome in LEAVE_OUT:
        return leave_out(settings)
    if settings.outcome not in PUT_IN:
        raise RotationError(
            f"OUTCOME is {settings.outcome!r}: expected one of {', '.join(sorted(PUT_IN | LEAVE_OUT)).strip(', ')}",
            haproxy.USAGE,
        )
    for balancer in settings.balancers:
        if balancer.look().status == "no check":
            raise RotationError(
                f"HAProxy at {balancer.name} does not check {settings.server}, so it cannot say that it is up: "
                "add 'check' to its server line"
            )
        balancer.order("ready")
    for balancer in settings.balancers:
        # UP and nothing behind it: "UP 1/3" comes right after maintenance, before any check was made.
        seen, up = haproxy.wait(balancer, settings.up_seconds, lambda seen: seen.status == "UP")
        if not up:
            raise RotationError(
                f"HAProxy at {balancer.name} says {seen.status} of {settings.server} and not UP after "
                f"{settings.up_seconds:g} s (last check: {seen.check}): look at its health check, then run this again"
            )
        print(f"{settings.server} is in at {balancer.name}: {seen.status}, {seen.check}")
    return haproxy.DONE


def leave_out(settings: Settings) -> int:
    for balancer in settings.balancers:
        balancer.order(settings.out_state)
        seen = balancer.look()
        if seen.in_service:
            raise RotationError(
                f"HAProxy says {seen.status} although it was told to take the server out: run this again"
            )
        print(f"{settings.server} stays out at {balancer.name}: {seen.status}")
    return haproxy.DONE


if __name__ == "__main__":
    sys.exit(haproxy.run(put_in))
