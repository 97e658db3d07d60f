"""Going back: to which release, and what the steps on the server of those that one goes away from say of it. Pure.

Going back mirrors what was done. Machines go through the steps of the release that one goes back to, the last one first.
Of the releases that one goes away from, each step on the server that began is undone as it says (`on_rollback`): after
the machines of the steps that followed it are back, before those of the steps that it followed. Steps on the server of the
release that one goes back to are not run: what they did stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from orchestrator.journal.events import DeploymentRecord, JournalEntry, StepEnded, StepStarted
from orchestrator.plan.forecast import forecast
from orchestrator.plan.plan import MachineStep, Plan, PlannedStep, ServerRun, ServerStep
from orchestrator.rolling.again import Attempt
from relay.errors import RefusedError


@dataclass(frozen=True, slots=True)
class Past:
    """A deployment of a project in an environment. `began`: some step of it did."""

    record: DeploymentRecord
    began: bool


def some_step_began(entries: Iterable[JournalEntry]) -> bool:
    """Whether a deployment went beyond its barrier."""
    return any(isinstance(entry.event, StepStarted) for entry in entries)


# --- to which release


@dataclass(frozen=True, slots=True)
class WayBack:
    """From which label to which; `since`: ULIDs of what began there since the latter was good, the oldest first."""

    current: str
    target: str
    since: tuple[str, ...]


def find_way_back(past: Sequence[Past], to: str | None) -> WayBack:
    """Where a rollback leads, by the deployments of one project in one environment, the oldest first.

    A release was good where a deployment of it succeeded, on all machines or not. By default the last good one before the
    current counts; one that was gone away from does not count any more until it is deployed again. Where going back has
    failed, it leads to the same release again.

    Raises:
        RefusedError: there is none, or `to` is none.
    """
    begun = [one.record for one in past if one.began and one.record.goal != "stage"]
    if not begun:
        raise RefusedError("nothing was deployed there yet, so there is nothing to go back from")
    good = _good_labels(begun)
    last = begun[-1]
    if to is None:
        is_stuck = last.goal == "rollback" and last.state != "succeeded"
        candidates = [label for label in good if label != last.label or is_stuck]
        if not candidates:
            raise RefusedError(f"no release before {last.label} was good there", hint="Deploy one by its label")
        to = candidates[-1]
    succeeded = [number for number, record in enumerate(begun) if record.label == to and record.state == "succeeded"]
    if not succeeded:
        known = ", ".join(good) or "none"
        raise RefusedError(f"{to} never was good there (good were: {known})", hint=f"Deploy it: 'release deploy {to}'")
    since = begun[succeeded[-1] + 1 :]
    if not since:
        raise RefusedError(f"{to} is what was deployed there last, and it is good: there is nothing to go back from")
    return WayBack(last.label, to, tuple(record.deployment for record in since))


def _good_labels(begun: Sequence[DeploymentRecord]) -> list[str]:
    """Labels that were good, the last one last; without those that were gone away from."""
    good: list[str] = []
    for record in begun:
        if record.goal == "rollback" and record.label in good:
            del good[good.index(record.label) + 1 :]
        elif record.state == "succeeded":
            good = [*(label for label in good if label != record.label), record.label]
    return good


# --- what the steps on the server say


@dataclass(frozen=True, slots=True)
class Owed:
    """A step on the server of a release that one goes away from. It began, and was not undone yet."""

    plan: Plan
    step: ServerStep

    @property
    def undo(self) -> str:
        """What its undo is called, as a step of the way back."""
        return _undo_name(self.step.name, self.plan.label)


def _undo_name(step: str, label: str) -> str:
    return f"{step} of {label}, undone"


def owed_undos(since: Sequence[Attempt], target: str) -> list[Owed]:
    """All that is to be undone on the way back from these deployments, the last that began first."""
    owed: dict[str, Owed] = {}
    for attempt in since:
        steps = {step.number: step for step in attempt.plan.steps if isinstance(step, ServerStep)}
        for entry in attempt.entries:
            match entry.event:
                case StepStarted(step=number) if number in steps and attempt.plan.label != target:
                    one = Owed(attempt.plan, steps[number])
                    owed.pop(one.undo, None)
                    owed[one.undo] = one
                case StepEnded(name=name, ok=True, skipped=False):
                    owed.pop(name, None)
    return list(reversed(owed.values()))


def plan_back(plan: Plan, way: WayBack, since: Sequence[Attempt]) -> Plan:
    """The plan of the release that one goes back to, made a plan of going back.

    Raises:
        RefusedError: a step says that nobody may go back from it.
    """
    owed = owed_undos(since, way.target)
    _check_refusals(owed, way)
    turned = [_asking(step) for step in reversed(plan.steps) if isinstance(step, MachineStep)]
    slots: list[list[Owed]] = [[] for _ in range(len(turned) + 1)]
    for one in owed:
        if isinstance(one.step.on_rollback, ServerRun):
            slots[_slot(one, [step.name for step in turned])].append(one)
    steps: list[PlannedStep] = [*map(_undo_step, slots[0])]
    for step, behind in zip(turned, slots[1:], strict=True):
        steps += [step, *map(_undo_step, behind)]
    packages, secrets = dict(plan.packages), dict(plan.secrets)
    for one in owed:
        if isinstance(run := one.step.on_rollback, ServerRun):
            secrets = {name: one.plan.secrets[name] for name in run.secrets if name in one.plan.secrets} | secrets
            if one.step.package:
                packages[_package_name(one)] = one.plan.packages[one.step.package]
    numbered = tuple(replace(step, number=number) for number, step in enumerate(steps, 1))
    plan = replace(plan, steps=numbered, packages=packages, secrets=secrets)
    return replace(plan, notes=(*_notes(plan, way, owed), *plan.notes))


def _check_refusals(owed: Sequence[Owed], way: WayBack) -> None:
    refusing = [one for one in owed if one.step.on_rollback == "refuse"]
    if refusing:
        named = ", ".join(f"step {one.step.number} ({one.step.name}) of {one.plan.label}" for one in refusing)
        raise RefusedError(
            f"nobody may go back from {way.current} to {way.target}: {named} ran, and on_rollback is refuse",
            hint=f"Say in the next release what going back means for it (on_rollback: skip, or a script), or deploy the "
            f"older one by its name, whatever that step did: 'waystation release deploy {way.target}'",
        )


def _slot(one: Owed, turned: Sequence[str]) -> int:
    """Behind which of the machines' steps it is undone (0: before all): the last of those that followed it."""
    followed = False
    after = 0
    for step in one.plan.steps:
        if step.number == one.step.number:
            followed = True
        elif followed and isinstance(step, MachineStep) and step.name in turned:
            after = max(after, turned.index(step.name) + 1)
    return after


def _asking(step: MachineStep) -> MachineStep:
    """A machine that fails on the way back is a person's: its old version is what one goes away from."""
    return replace(step, on_failure="ask") if step.on_failure == "rollback" else step


def _undo_step(one: Owed) -> ServerStep:
    run = one.step.on_rollback
    assert isinstance(run, ServerRun)  # noqa: S101 - only such have one
    package = _package_name(one) if one.step.package else ""
    return ServerStep(one.step.number, one.undo, run, package=package)


def _package_name(one: Owed) -> str:
    return f"{one.step.package} of {one.plan.label}"


def _notes(plan: Plan, way: WayBack, owed: Sequence[Owed]) -> Iterable[str]:
    yield f"going back from {way.current} to {way.target}"
    for one in owed:
        run = one.step.on_rollback
        name = f"step {one.step.number} ({one.step.name}) of {one.plan.label}"
        if isinstance(run, ServerRun):
            what = run.script.path if run.script is not None else "its commands"
            yield f"{name} is undone: {what} (on_rollback)"
        else:
            yield f"{name} stays as it is (on_rollback: skip)"
    if not owed:
        yield f"no step on the server ran since {way.target}: nothing is undone there"
    yield f"steps on the server of {way.target} are not run again"
    whole = forecast(plan)
    relays, room = sum(one.at_most for one in whole.relays), sum(one.at_most for one in whole.room)
    yield (
        f"bytes: none where {way.target} still is, else at most {relays:,} to relays and {room:,} on machines; "
        "every machine is asked before one moves"
    )
