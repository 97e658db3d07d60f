"""What is remembered of each relay and the line to it, and how it is learnt: from the bundles that are sent anyway."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from relay.encoding.planner import FIRST_FLIGHT, Line, class_of
from relay.errors import IdentityError, StoreError
from relay.package.identity import ManifestId, PackageId, parse_digest
from relay.stores.contract import Documents

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 8
"""Bundles in flight to one relay, at most."""
IN_FLIGHT = 8 << 20
"""Bytes of bundles that may be under way together, beside what a long line holds by itself."""
_FORGET_SECONDS: Final = 30 * 86400.0
"""A line that was not used for so long may be another one by now."""
_INFORMATIVE: Final = 16 << 10
"""Bytes. What is shorter says more of the round trip than of the line."""
_SOLID: Final = 256 << 10
"""Bytes from which on a bundle counts fully."""
_WAITED: Final = 0.25
"""Share of its time that a bundle may wait for its encoder and still measure the line."""
_OPEN: Final = 1.25
"""What a new connection may have carried at most, against at least, from which on it says little."""
_LASTING: Final = 4.0
"""Round trips from which on a bundle says more of the line than of its distance."""
_SURELY: Final = 1.25
"""Times as fast as it seems that a line may be, and one connection still surely fills it."""
_FLIGHT: Final = 256 << 10
"""Bytes that one connection keeps in flight without trouble."""
_FAR: Final = 0.010
"""Seconds of round trip from which on more connections can be faster than two."""


class Remembered(msgspec.Struct, frozen=True):
    """One line, as it is written down. Bytes per second and seconds; `at` is seconds since 1970."""

    url: str
    goodput: float
    round_trip: float
    at: float
    samples: int = 0


class Lines:
    """The lines of one depot or relay, kept among its documents."""

    def __init__(self, documents: Documents, *, clock: Callable[[], float] = time.time) -> None:
        self._documents = documents
        self._clock = clock

    async def recall(self, url: str) -> Remembered | None:
        """What is known of the line to `url`; None where nothing is, or it is too old, or damaged."""
        try:
            raw = await self._documents.read(_name(url))
            found = None if raw is None else msgspec.json.decode(raw, type=Remembered)
        except (StoreError, msgspec.DecodeError, UnicodeDecodeError) as error:
            log.warning("line to %s: what was remembered cannot be read: %s", url, error)
            return None
        if found is None or found.url != url or not 0 <= self._clock() - found.at < _FORGET_SECONDS:
            return None
        return found if 0 < found.goodput < math.inf and 0 <= found.round_trip < math.inf else None

    async def remember(self, url: str, meter: Meter) -> None:
        """Keep what `meter` learnt; nothing where it learnt nothing. A store that cannot be written is no trouble."""
        if meter.line.goodput is None or not meter.samples:
            return
        before = await self.recall(url)
        samples = (before.samples if before else 0) + meter.samples
        told = Remembered(url, meter.line.goodput, meter.line.round_trip, self._clock(), samples)
        await self._write(_name(url), msgspec.json.encode(told))

    async def recall_sent(self, url: str, package: PackageId) -> ManifestId | None:
        """The version of `package` that was brought to `url` last: a guess of what it holds, to be confirmed by itself."""
        try:
            raw = await self._documents.read(_sent_name(url, package))
            return None if raw is None else ManifestId(parse_digest(raw.decode()))
        except (StoreError, IdentityError, UnicodeDecodeError):
            return None

    async def remember_sent(self, url: str, package: PackageId, manifest: ManifestId) -> None:
        """`url` lists this version of `package` now."""
        if await self.recall_sent(url, package) != manifest:
            await self._write(_sent_name(url, package), manifest.encode())

    async def _write(self, name: str, data: bytes) -> None:
        try:
            await self._documents.write(name, data)
        except StoreError as error:
            log.warning("%s cannot be remembered: %s", name, error)


def _name(url: str) -> str:
    return f"state/lines/{hashlib.sha256(url.encode()).hexdigest()[:32]}"


def _sent_name(url: str, package: PackageId) -> str:
    return f"state/sent/{hashlib.sha256(url.encode()).hexdigest()[:32]}/{package.key}"


@dataclass(frozen=True, slots=True)
class Flight:
    """A bundle on its way: when it began, and how busy the line had been by then."""

    began: float
    area: float
    is_first: bool


class Meter:
    """Learns a line's goodput from bundles, several of which may be under way at a time."""

    def __init__(self, line: Line, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.line = line
        self.samples = 0
        self.is_sure = line.goodput is not None
        """Whether what is known of the line is more than a guess from a few bytes."""
        self.is_open = False
        """Whether that came from a connection that found its pace only, and may be far too much."""
        self._clock = clock
        self._active = 0
        self._area = 0.0
        self._seen_at = clock()

    def round_trip(self, seconds: float) -> None:
        """A small request took so long: no line is longer than its shortest answer."""
        known = self.line.round_trip
        self.line = replace(self.line, round_trip=min(known, seconds) if known else seconds)

    def begin(self, *, is_first: bool = False) -> Flight:
        """The first byte of a bundle goes. `is_first`: of its connection, which has to find its pace."""
        self._advance(+1)
        return Flight(self._seen_at, self._area, is_first)

    def end(self, flight: Flight, size: int, waited: float) -> None:
        """It was answered. `size`: its bytes; `waited`: seconds in which it had nothing to send, or was held back."""
        self._advance(-1)
        whole = self._seen_at - flight.began
        if size < _INFORMATIVE or whole <= 0:
            return
        self.samples += 1
        together = (self._area - flight.area) / whole
        least, most = (together * size / seconds for seconds in self._carrying(flight, size, whole))
        known = self.line.goodput
        if known is None or (not self.is_sure and most > known):
            goodput, self.is_open = most, most > _OPEN * least and self.line.round_trip >= _FAR
        elif waited > _WAITED * whole:
            # The encoder was slower than the line, which carried what was buffered meanwhile: between the two lies the line.
            busy = max(whole - waited, 0.1 * whole) / whole
            goodput = max(known, least / math.sqrt(busy))
        elif self.is_open and not flight.is_first:
            # The first that really says how fast the line is, if it carried bytes for longer than it waited for its answer.
            goodput = least if whole > _LASTING * self.line.round_trip else (known + least) / 2
            self.is_open = False
        else:
            # What is known already, if it may be so; else what is nearest to it.
            found = min(max(known, least), most)
            goodput = known + (0.5 if size >= _SOLID else 0.25) * (found - known)
        self.is_sure = self.is_sure or size >= _SOLID
        self.line = replace(self.line, goodput=max(goodput, 1.0))

    def drop(self, flight: Flight) -> None:
        """It broke off: it measures nothing."""
        del flight
        self._advance(-1)

    def _carrying(self, flight: Flight, size: int, whole: float) -> tuple[float, float]:
        """Seconds of `whole` in which the line carried bytes: at most, and at least.

        The answer takes a round trip. A new connection takes some more to find its pace; how many, depends on what stands
        between: on a line that is kept busy from the start, none.
        """
        answer = whole - min(self.line.round_trip, 0.5 * whole)
        if not flight.is_first:
            return answer, answer
        flight_size = size if self.line.goodput is None else min(size, 2 * self.line.goodput * self.line.round_trip)
        trips = max(1.0, math.log2(flight_size / FIRST_FLIGHT + 1) - 1)
        return answer, whole - min(trips * self.line.round_trip, 0.75 * whole)

    def _advance(self, change: int) -> None:
        now = self._clock()
        self._area += self._active * (now - self._seen_at)
        self._seen_at = now
        self._active += change


def connections_for(line: Line) -> int:
    """How many bundles to begin with at a time: one on a line that is thin or not known, more on a fast and long one."""
    if line.goodput is None or line.kind.connections == 1:
        return 1
    return max(line.kind.connections, min(CONNECTIONS_MAX, math.ceil(line.rate * line.round_trip / _FLIGHT)))


class Connections:
    """How many bundles may be in flight: one more while that makes a long line faster, half of them after a failure."""

    def __init__(self, line: Line) -> None:
        self.number = connections_for(line)
        self._best = 0.0
        self._bundles = 0
        self._settled = False

    def after(self, line: Line, size: int = 0) -> None:
        """A bundle of `size` bytes was answered, and `line` is what is known since.

        What is in flight can cross twice: so it is no more than the line needs to be kept busy, and some bundles.
        """
        self._bundles += 1
        in_flight = IN_FLIGHT + 2 * line.rate * line.round_trip
        most = max(2, min(CONNECTIONS_MAX, int(in_flight / max(size, 1))))
        self.number = min(self.number, most)
        if self._bundles < self.number or line.goodput is None:
            return
        self._bundles = 0
        # Runs side by side reach those who wait behind the relay one after another: one, where one fills the line.
        fills = class_of(_SURELY * line.rate).connections == 1
        self.number = 1 if fills else min(most, max(self.number, connections_for(line)))
        if self._settled or line.kind.connections == 1 or line.round_trip < _FAR:
            return
        if line.goodput > 1.08 * self._best and self.number < most:
            self._best, self.number = line.goodput, self.number + 1
        else:
            self._settled = True

    def failed(self) -> None:
        """The line broke: be modest."""
        self.number = max(1, self.number // 2)
        self._settled = True
