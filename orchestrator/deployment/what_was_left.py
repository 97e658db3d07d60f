"""What a deployment left whose process died or went away, in sentences. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from agent.orders.operation_id import OperationId
from orchestrator.journal.views import machines_asked, operations, turns
from orchestrator.people.asks import open_asks
from orchestrator.plan.plan import MachineStep, Plan
from orchestrator.rolling.history import History


def what_was_left(plan: Plan, history: History) -> Iterator[str]:
    """Where it stands, one sentence each."""
    entries = history.entries
    if history.cancelled_by:
        yield f"it was cancelled by {history.cancelled_by}: it comes to its end"
    if history.paused is not None:
        yield f"it is paused: {history.paused.reason}"
    if history.barrier is None:
        yield f"{len(history.acquired)} of {len(plan.machines)} machines have everything"
    done = [step.name for step in plan.steps if step.number in history.steps]
    if done:
        yield f"done already: {', '.join(done)}"
    under_way = {
        one.machine: OperationId.parse(one.operation).action
        for one in operations(entries).values()
        if one.result is None
    }
    names = {step.number: step.name for step in plan.steps if isinstance(step, MachineStep)}
    for turn in turns(entries).values():
        if turn.ended is None:
            at = f" at {under_way[turn.machine]!r}" if turn.machine in under_way else ""
            yield f"{turn.machine} was{at} in step {turn.step} ({names.get(turn.step, '')})"
    for asked in open_asks(entries):
        yield f"{asked.name!r} is asked: {asked.text}"
    for waiting in machines_asked(entries):
        yield f"{waiting.machine} waits for a person: {waiting.reason}"
