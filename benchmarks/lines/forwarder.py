"""Latency in user space: carries packets from one descriptor to another, each after the same number of seconds.

Run: python -m benchmarks.lines.forwarder SECONDS:FROM:TO …   (numbers of open descriptors, one packet a read)

It ends when its standard input does, so it does not outlive the laboratory that started it. A packet that cannot be
handed over is lost, as on any line.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

PACKET_MAX = 10 + 65_535
"""Bytes: the header that TUN puts before a packet (virtio_net_hdr), and the largest IP packet."""
_AT_ONCE = 64
"""Packets read from one side before the others have their turn."""


@dataclass(slots=True)
class Way:
    """One direction of one line.

    Attributes:
        latency: seconds.
        source: descriptor to read from, not blocking.
        sink: descriptor to write to, not blocking.
        underway: packets and when they are due, on the monotonic clock.
    """

    latency: float
    source: int
    sink: int
    underway: deque[tuple[float, bytes]] = field(default_factory=deque)

    def take(self) -> None:
        """Read what has come."""
        with contextlib.suppress(OSError):  # Nothing more now, or the device is down.
            for _ in range(_AT_ONCE):
                packet = os.read(self.source, PACKET_MAX)
                self.underway.append((time.monotonic() + self.latency, packet))

    def deliver(self) -> None:
        """Write what is due."""
        while self.underway and self.underway[0][0] <= time.monotonic():
            _, packet = self.underway.popleft()
            with contextlib.suppress(OSError):
                os.write(self.sink, packet)


def forward(ways: Sequence[Way], end: int) -> None:
    """Carry packets until descriptor `end` can be read from, or is closed at its other side."""
    by_source = {way.source: way for way in ways}
    while True:
        due = min((way.underway[0][0] for way in ways if way.underway), default=None)
        patience = None if due is None else max(0.0, due - time.monotonic())
        # select and not epoll: its timeouts are in microseconds.
        readable, _, _ = select.select([*by_source, end], [], [], patience)
        if end in readable:
            return
        for source in readable:
            by_source[source].take()
        for way in ways:
            way.deliver()


def main(words: Sequence[str]) -> None:
    """Forward as the command line says."""
    ways = []
    for word in words:
        latency, source, sink = word.split(":")
        ways.append(Way(float(latency), int(source), int(sink)))
        os.set_blocking(int(source), False)
    # What is measured beside it must not make the line slower than it says. Without the right to it, it stays as it is.
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    forward(ways, sys.stdin.fileno())


if __name__ == "__main__":
    main(sys.argv[1:])
