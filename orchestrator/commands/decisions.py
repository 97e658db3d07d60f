"""`waystation release approve | reject | decide | pause | go-on | cancel`: what people say of deployments that have not ended.

Each leaves a signed row in the journal, also while no process runs the deployment, and refuses what it would refuse.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

import click

from orchestrator.commands.options import (
    answer,
    check_installed,
    journal_option,
    keys_option,
    open_journal,
    paths_of,
    person_option,
    time_text,
    trust_option,
)
from relay.errors import NotFoundError, RefusedError, UsageError
from relay.support.console import json_option, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from orchestrator.journal.events import DeploymentRecord, JournalEntry
    from orchestrator.journal.journal import Journal
    from orchestrator.journal.views import WaitingMachine
    from orchestrator.paths import Paths
    from orchestrator.people.asks import OpenAsk
    from orchestrator.people.statement import Saying, SignedDecision
    from orchestrator.plan.plan import Plan

_WHY_MAX = 2000

_deployment_option = click.option("--deployment", metavar="ULID", help="Of this deployment only.")
_environment_option = click.option("--environment", "-e", metavar="NAME", help="Only of this environment.")
_why_option = click.option("-m", "--message", default="", help="Why, for the record.")


def _at_desk(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say who decides and where the journal is, and, for its first argument, a desk."""

    @functools.wraps(command)
    def opened(
        *,
        person: str | None,
        keys_folder: str | None,
        trust_folder: str | None,
        journal: str | None,
        as_json: bool,
        **typed: object,
    ) -> None:
        check_installed()
        paths = paths_of(trust=trust_folder, journal=journal, person=person, keys=keys_folder)
        with open_journal(paths) as held:
            desk = _Desk(held, paths)
            command(desk, **typed)
        answer({"format": 1, "decisions": desk.told}, "\n".join(desk.lines), as_json=as_json)

    found: Callable[..., None] = opened
    for option in (json_option, journal_option, trust_option, keys_option, person_option):
        found = option(found)
    return found


# --- questions


@click.command(epilog="Example: waystation release approve 'canary looks good' -m 'error rate is flat' --as anna")
@click.argument("gate")
@_why_option
@_deployment_option
@_environment_option
@_at_desk
def approve(desk: _Desk, gate: str, message: str, deployment: str | None, environment: str | None) -> None:
    """Say yes to a question: GATE is the name of the gate or of the step that asks, or STEP/NAME."""
    from orchestrator.people.statement import Approve

    _answer_gate(desk, gate, deployment, environment, lambda ask: Approve(ask, _why(message)))


@click.command(epilog="Example: waystation release reject 'canary looks good' -m 'error rate doubled' --as anna")
@click.argument("gate")
@_why_option
@_deployment_option
@_environment_option
@_at_desk
def reject(desk: _Desk, gate: str, message: str, deployment: str | None, environment: str | None) -> None:
    """Say no to a question, and why (-m): nothing new starts after it. GATE as in `approve`."""
    from orchestrator.people.statement import Reject

    if not message.strip():
        raise RefusedError("a no needs its reason, for those who read it", hint="Give it with -m")
    _answer_gate(desk, gate, deployment, environment, lambda ask: Reject(ask, _why(message)))


def _answer_gate(
    desk: _Desk, gate: str, deployment: str | None, environment: str | None, say: Callable[[str], Saying]
) -> None:
    from orchestrator.people.asks import planned_asks
    from orchestrator.people.judging import Answer, answer_of, judge, why_not

    running = desk.running(deployment, environment)
    one, asked = _find_gate(gate, running)
    planned = planned_asks(one.plan).get(asked.ask)
    if planned is None:
        raise NotFoundError(f"the plan of {one.name} has no question {asked.ask!r}")
    by = desk.acting(one)
    if reason := why_not(planned, one.plan.author, by):
        raise RefusedError(reason)
    now = time.time()
    if asked.at and now > asked.at and planned.on_expiry != "pause":
        raise RefusedError(
            f"the time of {asked.ask!r} is over since {time_text(asked.at)}, and then: {planned.on_expiry}"
        )
    # Of all that was said by now: as the deployment will judge it.
    said = [answer_of(decision) for decision in desk.signed(one) if _asks(decision) == asked.ask]
    answers = [*asked.answers, *(each for each in said if each is not None)]
    if (judged := judge(planned, one.plan.author, answers, now=now, at=asked.at)).state != "waiting":
        raise RefusedError(f"{asked.ask!r} is settled already, {judged.state}: {judged.reason}")
    saying = say(asked.ask)
    number = desk.write(one, saying)
    mine = Answer(by, "reject" if saying.kind == "reject" else "approve", now, saying.why, number)
    judged = judge(planned, one.plan.author, [*answers, mine], now=now, at=asked.at)
    state = {"ask": asked.ask, "state": judged.state, "needed": judged.needed, "waits_for": judged.waits_for}
    words = {
        "waiting": f"{judged.needed} more must agree: {', '.join(judged.waits_for) or 'anybody who may decide there'}",
        "approved": f"approved: {judged.reason}",
        "rejected": f"rejected: {judged.reason}",
        "expired": judged.reason,
    }[judged.state]
    desk.tell(one, number, saying, by, f"{asked.ask}: {words}", state)


def _asks(decision: SignedDecision) -> str:
    from orchestrator.people.statement import Approve, Reject

    said = decision.saying
    return said.ask if isinstance(said, Approve | Reject) else ""


def _find_gate(gate: str, running: Iterable[_Running]) -> tuple[_Running, OpenAsk]:
    every = [(one, asked) for one in running for asked in one.asks]
    found = [(one, asked) for one, asked in every if gate in _names(one.plan, asked)]
    known = "; ".join(f"{asked.ask!r} of {one.name}" for one, asked in (found or every)) or "nothing"
    if not found:
        raise NotFoundError(f"no question {gate!r} is open", hint=f"Open now: {known}")
    if len(found) > 1:
        raise RefusedError(
            f"several questions {gate!r} are open: {known}", hint="Name it as STEP/NAME, with --deployment where needed"
        )
    return found[0]


def _names(plan: Plan, asked: OpenAsk) -> set[str]:
    """All that a person may call it: its own name, and behind the number or the name of its step."""
    steps = {step.name for step in plan.steps if step.number == asked.step}
    return {asked.name, asked.ask, *(f"{step}/{asked.name}" for step in steps)}


# --- machines


@click.command(epilog="Example: waystation release decide web2 retry -m 'disk was full' --as anna")
@click.argument("machine")
@click.argument("what")
@_why_option
@_deployment_option
@_environment_option
@_at_desk
def decide(desk: _Desk, machine: str, what: str, message: str, deployment: str | None, environment: str | None) -> None:
    """Say what is to be done with MACHINE, which waits for a person: retry, rollback, put-back, exclude or fail."""
    from orchestrator.people.statement import Decide, MachineChoice

    choice = next((known for known in get_args(MachineChoice) if known == what), None)
    if choice is None:
        raise UsageError(f"{what!r} cannot be decided", hint=f"Expected one of {', '.join(get_args(MachineChoice))}")
    one, waiting = _find_machine(machine, desk.running(deployment, environment))
    if what not in waiting.choices:
        raise RefusedError(
            f"{waiting.machine} cannot be decided so: {what} is none of {', '.join(waiting.choices)}",
            hint=waiting.reason,
        )
    by = desk.acting(one)
    for decision in desk.signed(one):
        said = decision.saying
        if isinstance(said, Decide) and (said.machine, said.step) == (waiting.machine, waiting.step):
            raise RefusedError(f"{decision.by} decided {said.what} of {waiting.machine} already")
    saying = Decide(waiting.machine, waiting.step, choice, _why(message))
    number = desk.write(one, saying)
    state = {"machine": waiting.machine, "step": waiting.step, "what": what}
    desk.tell(one, number, saying, by, f"{waiting.machine}: {what}", state)


def _find_machine(machine: str, running: Iterable[_Running]) -> tuple[_Running, WaitingMachine]:
    every = [(one, waiting) for one in running for waiting in one.machines]
    found = [(one, waiting) for one, waiting in every if waiting.machine.lower() == machine.lower()]
    known = "; ".join(f"{waiting.machine} of {one.name} ({waiting.reason})" for one, waiting in found or every)
    if not found:
        raise NotFoundError(f"{machine!r} waits for nobody's word", hint=f"Those that do: {known or 'none'}")
    if len(found) > 1:
        raise RefusedError(f"{machine} waits in several deployments: {known}", hint="Name one with --deployment")
    return found[0]


# --- deployments


@click.command(epilog="Example: waystation release pause --environment production -m 'network is being changed'")
@click.argument("deployment", required=False)
@click.option("--environment", "-e", metavar="NAME", help="Everything that is under way there.")
@_why_option
@_at_desk
def pause(desk: _Desk, deployment: str | None, environment: str | None, message: str) -> None:
    """Let nothing new start until `go-on`; what is in flight comes to its end. DEPLOYMENT is a ULID."""
    from orchestrator.people.statement import Pause

    _say_to_all(desk, deployment, environment, Pause(_why(message)), paused=False)


@click.command(name="go-on", epilog="Example: waystation release go-on --environment production")
@click.argument("deployment", required=False)
@click.option("--environment", "-e", metavar="NAME", help="Everything that is paused there.")
@_why_option
@_at_desk
def go_on(desk: _Desk, deployment: str | None, environment: str | None, message: str) -> None:
    """Let a paused deployment go on. DEPLOYMENT is a ULID."""
    from orchestrator.people.statement import GoOn

    _say_to_all(desk, deployment, environment, GoOn(_why(message)), paused=True)


def _say_to_all(desk: _Desk, deployment: str | None, environment: str | None, saying: Saying, *, paused: bool) -> None:
    """To one deployment, or to all of an environment whose state this changes: `paused` is the state of before."""
    found = desk.running(deployment, environment)
    chosen = [one for one in found if one.is_paused(desk.signed(one)) == paused]
    if not chosen:
        which = "is paused" if paused else "is under way that is not paused already"
        raise RefusedError(f"nothing {which}" + (f" in {environment}" if environment else ""))
    if deployment is None and environment is None:
        chosen = [_the_only(chosen)]
    # All may be said to, or none is.
    people = [desk.acting(one) for one in chosen]
    for one, by in zip(chosen, people, strict=True):
        desk.tell(one, desk.write(one, saying), saying, by, one.name, {})


@click.command(epilog="Example: waystation release cancel -m 'wrong version'")
@click.argument("deployment", required=False)
@_environment_option
@click.option("--now", is_flag=True, help="Kill what is in flight; without it, that comes to its end.")
@_why_option
@_at_desk
def cancel(desk: _Desk, deployment: str | None, environment: str | None, now: bool, message: str) -> None:
    """End a deployment: nothing new starts. DEPLOYMENT is a ULID. No bracket stays open without being listed."""
    from orchestrator.people.statement import Cancel

    one = _the_only(desk.running(deployment, environment))
    by = desk.acting(one)
    saying = Cancel(now, _why(message))
    desk.tell(one, desk.write(one, saying), saying, by, one.name, {"now": now})


def _the_only(found: list[_Running]) -> _Running:
    if len(found) > 1:
        names = "; ".join(one.name for one in found)
        raise RefusedError(f"{len(found)} deployments are under way: {names}", hint="Name one by its ULID")
    return found[0]


# --- what they share


@dataclass(frozen=True)
class _Running:
    """A deployment that has not ended, and what it waits for."""

    record: DeploymentRecord
    plan: Plan
    entries: list[JournalEntry] = field(repr=False)

    @property
    def name(self) -> str:
        """For people."""
        of = self.record
        return f"{of.project} {of.label} in {of.environment} ({of.deployment})"

    @property
    def asks(self) -> tuple[OpenAsk, ...]:
        from orchestrator.people.asks import open_asks

        return open_asks(self.entries)

    @property
    def machines(self) -> tuple[WaitingMachine, ...]:
        from orchestrator.journal.views import machines_asked

        return machines_asked(self.entries)

    def is_paused(self, waiting: Iterable[SignedDecision]) -> bool:
        """Whether it is, once the decisions that wait are taken up."""
        from orchestrator.journal.views import is_paused
        from orchestrator.people.statement import GoOn, Pause

        said = [isinstance(each.saying, Pause) for each in waiting if isinstance(each.saying, Pause | GoOn)]
        return said[-1] if said else is_paused(self.entries)


class _Desk:
    """An open journal, and a person before it."""

    def __init__(self, journal: Journal, paths: Paths) -> None:
        self._journal = journal
        self._paths = paths
        self.told: list[dict[str, Any]] = []
        self.lines: list[str] = []

    def running(self, deployment: str | None, environment: str | None) -> list[_Running]:
        """Those that have not ended, the oldest first; at least one.

        Raises:
            NotFoundError: there is no such deployment, or none has not ended.
            RefusedError: the one that was named has ended, or is elsewhere.
        """
        from orchestrator.locks.status import check_environment

        if deployment is not None:
            record = self._journal.deployment(deployment.upper())
            if record.state != "running":
                raise RefusedError(f"{record.project} {record.label} in {record.environment} has ended: {record.state}")
            if environment not in {None, record.environment}:
                raise RefusedError(f"{record.deployment} is in {record.environment}, not in {environment}")
            return [self._open(record)]
        check_environment(self._journal, environment)
        records = self._journal.deployments(environment, state="running", limit=None)
        if not records:
            raise NotFoundError("no deployment is under way" + (f" in {environment}" if environment else ""))
        return [self._open(record) for record in reversed(records)]

    def _open(self, record: DeploymentRecord) -> _Running:
        import msgspec

        from orchestrator.plan.plan import Plan

        plan = msgspec.json.decode(self._journal.plan(record.deployment), type=Plan)
        return _Running(record, plan, self._journal.entries(record.deployment))

    def acting(self, one: _Running) -> str:
        """The person, as decisions in this environment name them. Raises as `orchestrator.people.sign.acting`."""
        from orchestrator.people.sign import acting

        return acting(self._paths, one.record.environment).by

    def signed(self, one: _Running) -> list[SignedDecision]:
        """What was said to it and waits to be taken up, of what counts."""
        from orchestrator.people.statement import SignedDecision, read_decision, used_statements
        from orchestrator.trust.keyring import load_pins

        pins, used = load_pins(self._paths.trust), used_statements(one.entries)
        rows = self._journal.pending_decisions(one.record.deployment)
        read = [read_decision(row, pins, one.plan, used) for row in rows]
        return [decision for decision in read if isinstance(decision, SignedDecision)]

    def write(self, one: _Running, saying: Saying) -> int:
        from orchestrator.people.sign import decide

        return decide(self._journal, self._paths, one.record.deployment, saying)

    def tell(self, one: _Running, number: int, saying: Saying, by: str, words: str, state: dict[str, Any]) -> None:
        """What was written, and when it counts."""
        from orchestrator.locks.status import deployment_view

        # By the lock: a deployment that is written as running may have lost its process.
        is_alive = deployment_view(self._journal, one.record.deployment).is_alive
        when = "taken up at once" if is_alive else "taken up when the deployment is resumed: waystation release resume"
        self.lines.append(printable(f"{saying.kind} by {by}: {words}; {when}"))
        document = {"deployment": one.record.deployment, "decision": number, "kind": saying.kind, "by": by}
        self.told.append(document | {"is_alive": is_alive} | state)


def _why(message: str) -> str:
    """Why, as the record has it. Raises `UsageError`."""
    why = message.strip()
    if len(why) > _WHY_MAX or not _is_text(why):
        raise UsageError(f"-m: expected at most {_WHY_MAX} characters of text")
    return why


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
