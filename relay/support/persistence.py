"""Going on where something fails for a while: one way to pause, and to give up.

What is tried again, and what counts as a gain, is the caller's to say; the loop itself is stamina's.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final, TypeVar

import stamina

from relay.errors import UnreachableError

# Its default hooks import a metrics library and log; the last error is what the caller hears of.
stamina.instrumentation.set_on_retry_hooks([])

T = TypeVar("T")

ASKED_MAX: Final = 3600.0
"""Seconds. A longer pause that another side asks for is taken for this one."""
_SECONDS = re.compile(r"[0-9]+(\.[0-9]+)?", re.ASCII)


def is_unreachable(error: Exception) -> bool:
    return isinstance(error, UnreachableError)


def is_passing(status: int) -> bool:
    """Whether a later try may be answered with another HTTP status than this one."""
    return status >= 500 or status in {408, 425, 429}


def seconds_asked(retry_after: str | None, now: datetime | None = None) -> float | None:
    """How long the header `Retry-After` (RFC 9110, 10.2.3: seconds, or a date) asks to wait; None where it says nothing."""
    text = (retry_after or "").strip()
    if _SECONDS.fullmatch(text):
        return min(float(text), ASKED_MAX)
    try:
        then = parsedate_to_datetime(text)
    except (TypeError, ValueError, OverflowError):
        return None
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return max(0.0, min((then - (now or datetime.now(UTC))).total_seconds(), ASKED_MAX))


@dataclass(frozen=True, slots=True)
class Persistence:
    """How to go on with one thing that fails. Seconds."""

    first_pause: float = 0.2
    """After the first failure. It doubles with each one that follows without a gain."""
    longest_pause: float = 5.0
    longest_asked: float = 30.0
    """The longest pause that the other side may ask for."""
    failures: int | None = None
    """Failures in a row, without a gain between them, that are borne. None: any number."""
    patience: float = 0.0
    """A side that answers, and asks to be asked again later, is borne for so long without a gain, beyond `failures`."""
    spread: float = 0.0
    """Share of a pause of our own that chance takes off at most: so those that lost one relay do not come back at once."""

    def tries(
        self,
        may_help: Callable[[Exception], bool] = is_unreachable,
        *,
        gained: Callable[[], float] | None = None,
        seconds: float | None = None,
    ) -> AsyncIterator[stamina.Attempt]:
        """Contexts, each for one try. The last error is raised as it is.

        `may_help` says whether another try can help after an error; `gained`, how much was gained so far, a number that
        rises; `seconds`, for how long to try at most.
        """
        return aiter(stamina.retry_context(on=self._hook(may_help, gained), attempts=None, timeout=seconds))

    def blocking_tries(self, may_help: Callable[[Exception], bool] = is_unreachable) -> Iterator[stamina.Attempt]:
        """As `tries`, for who waits in a thread of its own."""
        return iter(stamina.retry_context(on=self._hook(may_help), attempts=None, timeout=None))

    def _hook(
        self, may_help: Callable[[Exception], bool], gained: Callable[[], float] | None = None
    ) -> Callable[[Exception], bool | float]:
        """What stamina asks after each failure: how long to pause, or False."""
        bearing = Bearing(self, gained)

        def wait(error: Exception) -> bool | float:
            pause = bearing.pause_after(error) if may_help(error) else None
            return False if pause is None else pause

        return wait

    def pause(self, failures: int = 1, asked: float = 0.0) -> float:
        """Seconds to wait after so many failures in a row, the other side having asked for `asked`."""
        # The bound on the exponent keeps the number finite, where tries have no end.
        own = min(self.first_pause * 2.0 ** min(failures - 1, 32), self.longest_pause)
        own *= random.uniform(1.0 - self.spread, 1.0)  # noqa: S311 - nothing is gained by guessing it
        return max(own, min(asked, self.longest_asked))

    async def call(
        self,
        what: Callable[[], Awaitable[T]],
        may_help: Callable[[Exception], bool] = is_unreachable,
        *,
        seconds: float | None = None,
    ) -> T:
        """What `what` returns, at last. As `tries`."""
        async for attempt in self.tries(may_help, seconds=seconds):
            with attempt:
                return await what()
        raise AssertionError("unreachable")  # pragma: no cover - the last try returns or raises


class Bearing:
    """How one thing that fails was borne so far."""

    def __init__(
        self,
        persistence: Persistence,
        gained: Callable[[], float] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._persistence = persistence
        self._gained = gained or (lambda: 0.0)
        self._most = self._gained()
        self._clock = clock
        self._failures = 0
        self._gained_at = clock()

    def gain(self) -> None:
        """It goes well: pauses and counts begin anew."""
        self._failures = 0
        self._gained_at = self._clock()

    @property
    def has_patience(self) -> bool:
        """Whether a side that asks for patience still gets it."""
        return self._clock() - self._gained_at <= self._persistence.patience

    def pause_after(self, error: Exception) -> float | None:
        """Seconds to wait before the next try; None: it is given up."""
        policy, gained = self._persistence, self._gained()
        if gained > self._most:
            self._most = gained
            self.gain()
        self._failures += 1
        asked: float | None = getattr(error, "retry_after", None)
        is_borne = policy.failures is None or self._failures <= policy.failures
        if not is_borne and (asked is None or not self.has_patience):
            return None
        return policy.pause(self._failures, asked or 0.0)
