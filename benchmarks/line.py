"""What the line to a relay carries, and what both ends can do: round trip, goodput both ways, CPU rates.

Goodput depends on how much is sent at once and by how many connections: each pair of these is a cell, and each cell
gets an equal share of the time that is left. A cell that would take much longer than its share is left out, and said
to be. Bytes are noise, so nothing on the way compresses them.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from benchmarks.support.conclusion import Conclusion, of_line
from relay.errors import UsageError
from relay.protocol import messages
from relay.protocol.client import RelayClient
from relay.support.console import size as bytes_of
from relay.support.console import table
from relay.support.together import together
from relay.transfer.cpu_rates import measure_rates

Direction = Literal["up", "down"]
"""`up` is to the relay."""

SIZES = (64 << 10, 1 << 20, 16 << 20)
"""Bytes of one transfer."""
_TRIPS = 10
_ROUNDS_MAX = 5
_OVER = 3.0
"""A cell may take so many times its share."""


class Spread(msgspec.Struct, frozen=True):
    """A median, and how far the samples lay apart."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))


class Cell(msgspec.Struct, frozen=True):
    """Goodput of `connections` transfers of `size` bytes at once, in bytes a second; None where there was no time."""

    direction: Direction
    connections: int
    size: int
    goodput: Spread | None


class LineReport(msgspec.Struct, frozen=True):
    """Everything that was measured. The round trip is in seconds: one small question over a connection that is open."""

    relay: str
    round_trip: Spread
    cells: tuple[Cell, ...]
    relay_cpu: messages.CpuRates | None
    own_cpu: messages.CpuRates
    seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure: each direction with each number of connections and each size, smallest first."""

    connections: tuple[int, ...]
    sizes: tuple[int, ...] = SIZES

    def cells(self) -> list[tuple[Direction, int, int]]:
        return [
            (direction, connections, size)
            for size in sorted(self.sizes)
            for connections in sorted(self.connections)
            for direction in ("up", "down")
        ]


def parse_connections(text: str) -> tuple[int, ...]:
    """Numbers of connections, as in "1,2,4,8". Raises `UsageError`: no such list, or a number not from 1 to 64."""
    try:
        numbers = tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        numbers = ()
    if not numbers or numbers[0] < 1 or numbers[-1] > 64:
        raise UsageError(f"--connections {text!r}: expected numbers from 1 to 64, for example 1,2,4,8")
    return numbers


def fits(amount: int, goodput: float | None, trip: float, share: float) -> bool:
    """Whether `amount` bytes at the best goodput seen so far, in bytes a second, stay near a share of the time.

    Where nothing is known yet, it is tried.
    """
    return goodput is None or trip + amount / goodput <= _OVER * share


async def measure_line(
    client: RelayClient, seconds: float, plan: Plan, tell: Callable[[str], None] = lambda _: None
) -> LineReport:
    """Measure for about `seconds`; `tell` hears of each figure as it is known.

    Raises:
        UnreachableError: the road, or a relay that stops in the middle.
        RefusedError: the token is none that may read and write.
    """
    began = time.perf_counter()
    own = await asyncio.to_thread(measure_rates)
    health = await client.health()
    trip = Spread.of([await _seconds(client.health()) for _ in range(_TRIPS)])
    tell(f"round trip {_milli(trip)}")
    cells: list[Cell] = []
    best: dict[Direction, float] = {}
    todo = plan.cells()
    for number, (direction, connections, size) in enumerate(todo):
        share = max(0.0, seconds - (time.perf_counter() - began)) / (len(todo) - number)
        goodput = None
        if fits(connections * size, best.get(direction), trip.median, share):
            goodput = await _goodput(client, direction, connections, size, share)
            best[direction] = max(best.get(direction, 0.0), goodput.median)
        cells.append(Cell(direction, connections, size, goodput))
        tell(_line_of(cells[-1]))
    return LineReport(client.url, trip, tuple(cells), health.cpu, own, time.perf_counter() - began)


async def _goodput(client: RelayClient, direction: Direction, connections: int, size: int, share: float) -> Spread:
    """Rounds of `connections` transfers at once, until the share of time is used."""
    transfer = client.measure_up if direction == "up" else client.measure_down
    # Opened before, so that no handshake is measured.
    await _at_once(client.measure_down, 1, connections)
    found: list[float] = []
    deadline = time.perf_counter() + share
    while not found or (time.perf_counter() < deadline and len(found) < _ROUNDS_MAX):
        found.append(connections * size / await _seconds(_at_once(transfer, size, connections)))
    return Spread.of(found)


async def _at_once(transfer: Callable[[int], Coroutine[Any, Any, float]], size: int, times: int) -> None:
    await together([transfer(size) for _ in range(times)])


async def _seconds(work: Awaitable[object]) -> float:
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


def conclusion_of(report: LineReport) -> Conclusion:
    """What follows for packages that are sent to this relay."""
    goodput: dict[int, float] = {}
    for cell in report.cells:
        if cell.direction == "up" and cell.goodput is not None:
            goodput[cell.connections] = max(goodput.get(cell.connections, 0.0), cell.goodput.median)
    return of_line(report.relay, goodput)


# --- words


def text_of(report: LineReport) -> str:
    """The report for people."""
    parts = [f"{report.relay}: round trip {_milli(report.round_trip)}"]
    for direction, name in (("up", "to the relay"), ("down", "from the relay")):
        cells = [cell for cell in report.cells if cell.direction == direction]
        sizes = sorted({cell.size for cell in cells})
        found = {(cell.connections, cell.size): cell.goodput for cell in cells}
        rows = [
            [str(number), *(_median(found[number, size]) for size in sizes)]
            for number in sorted({cell.connections for cell in cells})
        ]
        headers = ["connections", *(f"{bytes_of(size)} each" for size in sizes)]
        parts.append(f"{name}, Mbit/s of goodput:\n{table(headers, rows, right=frozenset(range(len(headers))))}")
    ends = (report.own_cpu, report.relay_cpu)
    rows = [[name.replace("_", " "), *(_rate(end, name) for end in ends)] for name in _RATES]
    cores = ["cores", *("-" if end is None else str(end.cores) for end in ends)]
    parts.append(table(["one core, MB/s", "here", "relay"], [*rows, cores], right=frozenset({1, 2})))
    if any(cell.goodput is None for cell in report.cells):
        parts.append("-: no time for it; give more by --seconds")
    parts.append(conclusion_of(report).text)
    return "\n\n".join(parts)


_RATES = tuple(name for name in messages.CpuRates.__struct_fields__ if name != "cores")


def _rate(rates: messages.CpuRates | None, name: str) -> str:
    value = 0.0 if rates is None else float(getattr(rates, name))
    return f"{value / 1e6:.0f}" if value else "-"


def _median(goodput: Spread | None) -> str:
    return "-" if goodput is None else _mega(goodput.median)


def _mega(rate: float) -> str:
    """Bytes a second as Mbit/s, without a unit."""
    value = 8 * rate / 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _milli(trip: Spread) -> str:
    return f"{trip.median * 1000:.1f} ms ({trip.low * 1000:.1f} to {trip.high * 1000:.1f}, {trip.samples} times)"


def _line_of(cell: Cell) -> str:
    way = "to the relay" if cell.direction == "up" else "from the relay"
    words = f"{cell.connections} x {bytes_of(cell.size)} {way}:"
    if cell.goodput is None:
        return f"{words} no time for it"
    low, high, samples = _mega(cell.goodput.low), _mega(cell.goodput.high), cell.goodput.samples
    return f"{words} {_mega(cell.goodput.median)} Mbit/s ({low} to {high}, {samples} times)"
