"""Orders of one machine, as they were tried: what an earlier process began is taken up before anything is begun anew."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from agent.orders.operation_id import OperationId
from orchestrator.journal.events import Reported
from orchestrator.rolling.history import Begun, TurnHistory
from relay.errors import UnreachableError

if TYPE_CHECKING:
    from agent.orders.orders import OpenAction, Report
    from orchestrator.fleet.fleet import Fleet

_NOTHING = TurnHistory()


class Tries:
    """The operations of one machine in one step.

    An order that was kept goes out as it was: the agent answers with what became of it. One that it refuses never began,
    as the fence or the time of the process that made it has passed; it is given anew, under its next attempt.
    """

    def __init__(self, past: TurnHistory = _NOTHING, *, again: bool = False) -> None:
        """Take up what `past` says was begun; with `again`, what ended other than well is begun anew."""
        self._begun = [one for one in past.begun if not (again and _failed(one))]
        self._attempts = dict(past.attempts)
        self._since = time.time()
        self._missed: list[tuple[str, str]] = []

    async def order(
        self,
        fleet: Fleet,
        operation: OperationId,
        action: Callable[[OperationId], OpenAction],
        *,
        words: str = "",
        on_progress: Callable[[Report], None] | None = None,
        patience: float = 0.0,
        goes_on: bool = False,
    ) -> Report | Reported:
        """One try: what became of the next attempt at `operation`. Raises as `orchestrator.fleet.fleet.Fleet.perform`.

        `words` name it to people, where it ended while nobody watched.
        """
        for attempt, begun in self._next(operation.action):
            if begun is not None and isinstance(begun.ending, Reported):
                if begun.ending.state == "refused":
                    continue
                return begun.ending
            this = replace(operation, attempt=attempt)
            try:
                report = await fleet.perform(this, action(this), on_progress, patience=patience, goes_on=goes_on)
            except UnreachableError:
                # It may have left, and may run there: whoever tries again must hear of it before anything else begins.
                self._begun.append(Begun(this))
                raise
            # An earlier process may have written an order down and died before it said so anywhere else.
            if report.state == "refused" and (begun is not None or not fleet.gave(this)):
                continue
            if begun is not None:
                self._miss(words, report)
            return report
        raise AssertionError("there is always a next attempt")

    def begun(self, action: str) -> tuple[int, ...]:
        """Which attempts at this action an earlier process began."""
        return tuple(one.operation.attempt for one in self._begun if one.operation.action == action)

    def next(self, *, keep: bool) -> None:
        """What was begun belonged to what is done now, unless it may still be under way (`keep`)."""
        if not keep:
            self._begun.clear()

    def missed(self) -> list[tuple[str, str]]:
        """What ended while nobody watched, told once: its words, and how it ended."""
        told, self._missed = self._missed, []
        return told

    def _next(self, action: str) -> Iterator[tuple[int, Begun | None]]:
        for one in [one for one in self._begun if one.operation.action == action]:
            self._begun.remove(one)
            yield one.operation.attempt, one
        while True:
            self._attempts[action] = self._attempts.get(action, 0) + 1
            yield self._attempts[action], None

    def _miss(self, words: str, report: Report) -> None:
        if words and report.ended and report.ended < self._since:
            how = "ended with 0" if report.exit_status == 0 else f"ended as {report.state}"
            self._missed.append((words, how))


def _failed(begun: Begun) -> bool:
    return begun.ending is not None and begun.ending.state != "done"
