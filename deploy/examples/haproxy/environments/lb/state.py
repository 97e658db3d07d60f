#!/usr/bin/env python3
"""`probe`: does $MACHINE get requests? Exit code 0: yes; 1: no; 2: cannot tell. It changes nothing."""

from __future__ import annotations

import sys

IN_SERVICE, OUT, CANNOT_TELL = 0, 1, 2

try:
    import haproxy
    from haproxy import RotationError, Settings
except ImportError as error:
    # Python's own exit code for this would be 1, and that means "out".
    print(f"haproxy.py must lie beside this script: {error}", file=sys.stderr)
    sys.exit(CANNOT_TELL)


def tell(settings: Settings) -> int:
    seen = [balancer.look() for balancer in settings.balancers]
    said = ", ".join(
        f"{server.status} at {balancer.name}" for balancer, server in zip(settings.balancers, seen, strict=True)
    )
    in_service = {server.in_service for server in seen}
    if len(in_service) > 1:
        raise RotationError(f"The balancers disagree about {settings.server}, {said}: put it in or take it out at all")
    print(f"{settings.server}: {said}")
    return IN_SERVICE if in_service == {True} else OUT


if __name__ == "__main__":
    sys.exit(haproxy.run(tell, otherwise=CANNOT_TELL))
