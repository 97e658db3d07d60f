"""What happens in one deployment: into the journal first, then, as lines, to the people who watch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from orchestrator.journal.event_text import line
from orchestrator.journal.events import DecisionTaken, Ended, Event, FinalState, Note
from orchestrator.journal.journal import Decision, Journal
from orchestrator.paths import operator

Tell = Callable[[str], None]
"""Shows a line to the people who watch."""


class Recorder:
    """The record of one deployment. Every method raises `StoreError`, and then nothing was written or told."""

    def __init__(self, journal: Journal, deployment: str, tell: Tell = lambda _line: None) -> None:
        """`deployment` is a ULID that has begun in the journal, or begins before the first event."""
        self.deployment = deployment
        self.journal = journal
        self._tell = tell
        self._later: dict[str, list[Event]] = {}

    def later(self, machine: str, event: Event) -> None:
        """Keep an event of this machine for the next one that is recorded of it: both come into one commit.

        For what only matters once something follows from it.
        """
        self._later.setdefault(machine, []).append(event)

    async def record(self, *events: Event) -> None:
        """Append events; they are durable on return."""
        machines = dict.fromkeys(getattr(event, "machine", "") for event in events)
        kept = [event for machine in machines for event in self._later.pop(machine, ())]
        await asyncio.to_thread(self.journal.append, self.deployment, *kept, *events)
        self.tell(*events)

    async def claim(self, project: str, environment: str, seen: list[int]) -> int:
        """Go on with a fence above all that agents have `seen`; the new fence."""
        fence = await asyncio.to_thread(self.journal.claim, project, environment, seen)
        note = Note(f"agents have seen fence {max(seen)}: this deployment goes on with {fence}")
        await asyncio.to_thread(self.journal.take_up, self.deployment, fence, operator(), note)
        self.tell(note)
        return fence

    async def pending_decisions(self) -> list[Decision]:
        """What people decided of this deployment, and was not taken up yet."""
        return await asyncio.to_thread(self.journal.pending_decisions, self.deployment)

    async def take(self, decision: Decision) -> None:
        """Mark a decision as taken up; one that another process took is passed over."""
        if await asyncio.to_thread(self.journal.take_decision, decision.number):
            self.tell(DecisionTaken(decision.number, decision.operator, decision.kind, decision.data))

    async def end(self, state: FinalState, reason: str) -> None:
        """Write down how the deployment ended."""
        ended = Ended(state, reason)
        await asyncio.to_thread(self.journal.set_state, self.deployment, state, reason, ended)
        self.tell(ended)

    def say(self, words: str) -> None:
        """Tell the people who watch; the journal does not keep it."""
        self._tell(words)

    def tell(self, *events: Event) -> None:
        """Show events that are in the journal already, or that only the people who watch should hear of."""
        for event in events:
            if text := line(event):
                self._tell(text)
