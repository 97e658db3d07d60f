"""Events of a deployment as lines for people. Pure; what came from elsewhere is made printable where it is printed."""

from __future__ import annotations

from agent.orders.operation_id import action_of
from orchestrator.journal.events import (
    Acquired,
    AskAnswered,
    AskClosed,
    AskOpened,
    Barrier,
    BracketAdopted,
    BracketClosed,
    BracketOpened,
    DecisionTaken,
    Ended,
    Event,
    GatePassed,
    Left,
    MachineAsked,
    MachineDecided,
    Note,
    Notified,
    Paused,
    PreAcquireEnded,
    PreAcquireStarted,
    Refused,
    RelayBehind,
    Replicated,
    Reported,
    Resumed,
    ServerRunEnded,
    Started,
    StepEnded,
    StepStarted,
    TurnEnded,
    TurnStarted,
    UndoEnded,
    UndoStarted,
    Unpaused,
    outcome_of,
)
from relay.support.console import size


def line(event: Event) -> str:
    """What a person who watches should read of it; empty where it is for the journal alone."""
    match event:
        case Started(operator=who, host=host):
            return f"begun by {who} on {host}"
        case Note(text=text, machine=machine):
            return f"{machine}: {text}" if machine else text
        case Notified(event=what, error=error):
            return f"the receiver of {what!r} could not be told: {error}" if error else ""
        case DecisionTaken(operator=who, what=what):
            return f"{who} decided: {what}"
        case PreAcquireStarted(name=name):
            return f"before acquisition: {name}"
        case PreAcquireEnded(name=name, ok=ok, reason=reason):
            return "" if ok else f"{name} failed: {reason}"
        case UndoStarted(name=name):
            return f"undoing: {name}"
        case UndoEnded(name=name, ok=ok, reason=reason):
            return f"undone: {name}" if ok else f"undoing {name} failed: {reason}"
        case Replicated(relay=relay, package=package, version=version, wire_bytes=wire):
            return f"relay {relay} has {package} {version}" + (f" ({size(wire)} over the line)" if wire else " already")
        case RelayBehind(relay=relay, package=package, version=version, reason=reason):
            return f"warning: relay {relay} has not got {package} {version}: {reason}"
        case Acquired(machine=machine, facts=facts):
            fetched = sum(sum(tree.from_relays.values()) for tree in facts.trees)
            return f"{machine} has everything, verified ({size(fetched)} from relays)"
        case Left(machine=machine, reason=reason, by=by):
            return f"{machine} is left out{f' by {by}' if by else ''}: {reason}"
        case Barrier(machines=machines):
            return f"everything is everywhere: {len(machines)} machine{'s' if len(machines) != 1 else ''}"
        case Ended(state=state, reason=reason):
            return f"{outcome_of(state, reason)}: {reason}" if reason else state
        case _:
            return _of_people(event) or _of_steps(event)


def _of_people(event: Event) -> str:
    match event:
        case AskOpened(name=name, text=text):
            return f"{name!r} asks: {text}"
        case AskAnswered(ask=ask, by=by, verdict=verdict, why=why):
            said = "says yes" if verdict == "approve" else "says no"
            return f"{by} {said} to {ask.partition('/')[2]!r}" + (f": {why}" if why else "")
        case AskClosed(ask=ask, outcome=outcome, reason=reason, late=late):
            return f"{ask.partition('/')[2]!r} is {outcome}: {reason}" + (" (late: nobody looked then)" if late else "")
        case MachineAsked(machine=machine, reason=reason, choices=choices):
            what = f"'waystation release decide {machine} {' | '.join(choices)}'"
            return f"{machine} waits for a person: {reason}; {what}"
        case MachineDecided(machine=machine, what=what, by=by, why=why):
            return f"{machine}: {by} decided {what}" + (f": {why}" if why else "")
        case Paused(reason=reason, by=by):
            return f"paused{f' by {by}' if by else ''}: {reason}"
        case Unpaused(by=by, why=why):
            return f"{by} lets it go on" + (f": {why}" if why else "")
        case GatePassed(name=name):
            return f"gate {name!r} is passed"
        case Resumed(operator=who, host=host):
            return f"taken up by {who} on {host}"
        case _:
            return ""


def _of_steps(event: Event) -> str:
    match event:
        case StepStarted(step=step, name=name):
            return f"step {step}: {name}"
        case StepEnded(step=step, name=name, skipped=True, reason=reason):
            return f"step {step} ({name}) is skipped: {reason}"
        case StepEnded(step=step, name=name, ok=ok, reason=reason):
            return "" if ok else f"step {step} ({name}) failed: {reason}"
        case TurnStarted(machine=machine):
            return f"{machine}: its turn begins"
        case TurnEnded(machine=machine, outcome=outcome, reason=reason, bracket_open=is_open):
            told = f"{machine}: {outcome.replace('_', ' ')}" + (f": {reason}" if reason else "")
            return told + ("; it is left out of its rotation" if is_open else "")
        case BracketOpened(machine=machine, rotation=rotation):
            # `before` has not run yet; that it did is told when it has.
            return f"{machine}: to be taken out of {rotation}"
        case BracketClosed(machine=machine, rotation=rotation, outcome=outcome):
            return f"{machine}: back in {rotation} ({outcome})"
        case BracketAdopted(machine=machine, rotation=rotation, opened_by=by, label=label):
            return f"{machine}: its bracket in {rotation}, opened by {label or by}, is adopted"
        case (
            Reported(machine=machine, operation=operation, state=state, reason=reason)
            | ServerRunEnded(machine=machine, operation=operation, state=state, reason=reason)
        ) if state != "done":
            head = f"{machine}: " if machine else ""
            return f"{head}{action_of(operation)} {state}" + (f": {reason}" if reason else "")
        case Refused(machine=machine, reason=reason):
            return f"{machine} refused an order: {reason}"
        case _:
            return ""
