"""What to write down after a measurement: settings for an environment file, with the reason for each. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from relay.encoding.planner import Prefer, class_of
from relay.support.console import size as bytes_of

ROOM: Final = 0.8
"""Of what the line carries: the rest is for others on it."""
WITHIN: Final = 1.1
"""Times that differ by less are about the same, as `prefer: bytes` has it."""
_NEARLY: Final = 0.98
"""What saves less than the rest saves nothing."""
_ONE_FILLS: Final = 0.8


class Conclusion(msgspec.Struct, frozen=True):
    """What follows. `settings` is YAML to paste into an environment; `limit` as it stands there."""

    prefer: Prefer
    limit: str
    because: tuple[str, ...]
    settings: str

    @property
    def text(self) -> str:
        """For people."""
        return "\n".join(["conclusion:", *(f"  {words}" for words in self.because), "", self.settings])


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one encoding did over the line, the median of its transfers."""

    encoding: str
    seconds: float
    payload_bytes: int


def of_line(url: str, goodput: Mapping[int, float]) -> Conclusion:
    """Of a line to a relay: bytes per second to it by the number of connections, at least one."""
    best = max(goodput.values())
    kind, number = class_of(best), min(count for count, rate in goodput.items() if rate >= _ONE_FILLS * best)
    fills = "one connection fills it" if number == 1 else f"it takes {number} connections to fill it"
    prefer: Prefer = "bytes" if kind.spares != "work" else "time"
    why = {
        "bytes": "bytes are what takes time on it, so they are worth some work",
        "time": "processors are what takes time on it; 'bytes' where others pay for what crosses",
    }
    because = (f"a {kind.name} line: {_mbit(best)} to the relay; {fills}", f"prefer: {prefer}, as {why[prefer]}")
    return _conclusion(url, best, prefer, because)


def of_transfer(url: str, rate: float, planned: Outcome, forced: Sequence[Outcome]) -> Conclusion:
    """Of a package over a line of `rate` bytes per second: as it was planned, and in every encoding that was tried."""
    fastest = min([planned, *forced], key=lambda one: one.seconds)
    alike = [one for one in (planned, *forced) if one.seconds <= WITHIN * fastest.seconds]
    fewest = min(alike, key=lambda one: (one.payload_bytes, one.seconds))
    because = [f"the soonest: {_told(fastest)}"]
    if fewest.payload_bytes < _NEARLY * fastest.payload_bytes:
        because.append(f"the fewest bytes of what is about as fast: {_told(fewest)}")
    else:
        because.append("nothing that is about as fast takes fewer bytes")
    # The same bytes that came later by themselves say how far repeats lie apart, and nothing of the plan.
    is_the_same = abs(planned.payload_bytes - fastest.payload_bytes) <= (1 - _NEARLY) * fastest.payload_bytes
    is_late = planned.seconds > WITHIN * fastest.seconds and not is_the_same
    prefer: Prefer = "time" if is_late and fastest.payload_bytes > planned.payload_bytes else "bytes"
    if is_late:
        because.append(f"what was planned came {planned.seconds / fastest.seconds:.2f} times as late: {_told(planned)}")
        because.append(f"for this package: package replicate --encoding {fastest.encoding}")
    return _conclusion(url, rate, prefer, because)


def rate_text(rate: float) -> str:
    """Bytes per second as an environment has it, rounded down."""
    bits = max(1000, int(rate * 8))
    return f"{bits // 1_000_000}Mbit" if bits >= 10_000_000 else f"{bits // 1000}kbit"


def _conclusion(url: str, rate: float, prefer: Prefer, because: Sequence[str]) -> Conclusion:
    limit = rate_text(ROOM * rate)
    settings = (
        "# in the environment file; the relay's other keys stay as they are\n"
        "relays:\n"
        "  NAME:\n"
        f'    url: "{url}"\n'
        f"    prefer: {prefer}\n"
        f"    limit: {limit}    # leaves a fifth to others on the line; leave it out where there are none"
    )
    return Conclusion(prefer, limit, tuple(because), settings)


def _told(one: Outcome) -> str:
    return f"{one.encoding}, {one.seconds:.2f} s, {bytes_of(one.payload_bytes)}"


def _mbit(rate: float) -> str:
    return f"{rate * 8 / 1e6:,.3g} Mbit/s"
