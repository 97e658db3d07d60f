"""A deployment, from its first step to its last: pre-acquisition, acquisition, steps.

Whatever happens on the way, what pre-acquisition opened is undone, the end is written down, and every bracket that is
still open is listed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

from agent.orders.operation_id import SERVER
from orchestrator.deployment.acquisition import acquire
from orchestrator.deployment.context import DeploymentContext, DeploymentFailedError, undo_step
from orchestrator.deployment.decisions import WaitsForPeopleError, decisions_obeyed
from orchestrator.deployment.setup import DeployRequest, RetryRequest, find_unfinished, set_up, take_up
from orchestrator.deployment.steps import StepsOutcome, run_steps
from orchestrator.deployment.what_was_left import what_was_left
from orchestrator.files.values import NotificationKind
from orchestrator.fleet.endings import check_endings
from orchestrator.fleet.fences import older_agents, other_orchestrators, seen_of
from orchestrator.journal.events import (
    BracketAdopted,
    FinalState,
    Left,
    Note,
    Notified,
    PreAcquireEnded,
    PreAcquireStarted,
    Refused,
    outcome_of,
)
from orchestrator.locks.locks import holder
from orchestrator.paths import operator
from orchestrator.releases.what_differs import NO_FILES, Files, what_differs
from relay.errors import NotFoundError, RefusedError, StoreError, UnreachableError, WaystationError
from relay.support.together import together, told_if_slow

if TYPE_CHECKING:
    from orchestrator.fleet.presence import Presences
    from orchestrator.journal.journal import Journal
    from orchestrator.journal.recorder import Tell
    from orchestrator.journal.views import OpenBracket
    from orchestrator.paths import Paths
    from orchestrator.plan.plan import Plan, PreAcquire
    from relay.support.progress import Bar

ACKNOWLEDGE_SECONDS: Final = 10.0
"""For a relay to take an agent's acknowledgement at the end. An agent that gets none keeps its results for longer."""


@dataclass(frozen=True, slots=True)
class Result:
    """How it ended.

    Attributes:
        state: `waiting`: it did not end, and goes on when people have decided and it is resumed.
        reason: why it failed or was cancelled, or what it waits for; of what succeeded, which machines it left.
        left: machines whose turn failed, within what their step allows.
        excluded: machines that were left out, on purpose or by rule, and why.
        out: machines that are left out of their rotation.
        behind: relays that have not got everything.
    """

    state: FinalState | Literal["waiting"]
    reason: str = ""
    left: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    out: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()


async def deploy(
    paths: Paths,
    journal: Journal,
    request: DeployRequest | RetryRequest,
    *,
    begun: Callable[[str, Plan], None],
    tell: Tell,
    bar: Bar,
) -> tuple[str, Result]:
    """Run a release in an environment, from plan to end. The deployment's ULID, and how it ended.

    Args:
        paths: of this orchestrator.
        journal: where the release is, and where the deployment is recorded.
        request: what a person asked for.
        begun: called with ULID and plan once the deployment stands in the journal.
        tell: shows what happens, line by line.
        bar: makes a progress bar for what moves bytes.

    Raises:
        PlanError: mistakes in the files; nothing was contacted.
        LockedError: another deployment of the project runs there.
        RefusedError: brackets of an earlier one are open, or a secret cannot be read; nothing was started.
        NotFoundError: no such release or package.
        StoreError: the journal could not be written: what it could not take did not happen.
    """
    if (unfinished := find_unfinished(journal, request)) is not None:
        tell(f"the deployment of {unfinished.label} into {unfinished.environment} did not end: it goes on")
        return await resume(
            paths,
            journal,
            unfinished.deployment,
            begun=begun,
            tell=tell,
            bar=bar,
            waits=request.waits,
            files=request.files,
        )
    async with set_up(paths, journal, request, tell=tell, bar=bar) as (context, brackets):
        begun(context.recorder.deployment, context.plan)
        return context.recorder.deployment, await _roll_out(context, brackets, adopt=request.adopt)


async def resume(
    paths: Paths,
    journal: Journal,
    deployment: str,
    *,
    begun: Callable[[str, Plan], None],
    tell: Tell,
    bar: Bar,
    waits: bool = True,
    adopt: bool = False,
    files: Files = NO_FILES,
) -> tuple[str, Result]:
    """Go on with a deployment whose process died or left, by its frozen plan and its journal alone.

    Args and what is raised as `deploy`; `waits`: whether to wait for people; `files`: what is told of where it differs.

    Raises:
        UsageError: it has ended.
    """
    async with take_up(paths, journal, deployment, tell=tell, bar=bar, waits=waits) as (context, brackets):
        begun(deployment, context.plan)
        different = await asyncio.to_thread(what_differs, paths, journal, deployment, files)
        for line in (*different, *what_was_left(context.plan, context.history)):
            tell(line)
        return deployment, await _roll_out(context, brackets, adopt=adopt)


async def _roll_out(context: DeploymentContext, brackets: Iterable[OpenBracket], *, adopt: bool) -> Result:
    """The recipe. Errors of the road and refusals become the reason of its end; what was done before is passed over."""
    undo = _Undo(context)
    context.desk.notify = partial(_notify, context)
    context.desk.kill = partial(_kill, context)
    with _open_things_told(context, undo):
        try:
            async with decisions_obeyed(context.desk, context.stop, _seconds_left(context)):
                try:
                    await _name_those_left_out(context)
                    await _adopt(context, brackets)
                    await _pre_acquire(context, undo)
                    if context.plan.pre_acquire:
                        # Relays that were beyond reach before, behind a VPN say.
                        await check_endings(context.plan)
                    await _meet(context, adopt=adopt)
                    facts = await acquire(context)
                    await undo.those_until_acquired()
                    # Nothing but acquisition was asked for: no machine is touched, and what was opened is undone below.
                    outcome = StepsOutcome() if context.goal == "stage" else await run_steps(context, facts)
                except WaitsForPeopleError:
                    raise
                except WaystationError as error:
                    outcome = StepsOutcome(failed=[str(error)])
            # The undo may close the way to relays, a VPN say.
            await _last_words(context)
            not_undone = await undo.everything("; ".join(outcome.failed))
            result = _result_of(context, outcome, not_undone)
            await _close(context, result)
        except WaitsForPeopleError as error:
            return Result("waiting", error.message, out=tuple(sorted(context.out)))
    return result


def _seconds_left(context: DeploymentContext) -> float | None:
    """Until the deadline of the whole; None where it has none."""
    if not context.plan.deadline:
        return None
    spent = time.time() - context.history.began if context.history.entries else 0.0
    return max(0.0, context.plan.deadline - spent)


async def _kill(context: DeploymentContext) -> None:
    """End what runs: on machines, and on the server but for what puts a machine back."""
    await together([context.fleet.stop_all(), context.runs.stop_all(spared=("after",))])


@contextmanager
def _open_things_told(context: DeploymentContext, undo: _Undo) -> Iterator[None]:
    """A person who leaves in the middle reads what stays open. The journal has all of it."""
    try:
        yield
    except asyncio.CancelledError:
        if context.out:
            context.recorder.tell(Note(f"still out of their rotation: {', '.join(sorted(context.out))}"))
        if undo.owed:
            context.recorder.tell(Note(f"not undone: {', '.join(step.run.name for step in undo.owed)}"))
        raise


def _result_of(context: DeploymentContext, outcome: StepsOutcome, not_undone: Sequence[str]) -> Result:
    stop = context.stop
    reasons = [stop.reason, *(why for why in outcome.failed if why != stop.reason)]
    reason = "; ".join(filter(None, reasons))
    state: FinalState = "cancelled" if stop.by_person else "failed" if reason else "succeeded"
    excluded = context.plan.excluded
    if not_undone and state == "succeeded":
        state, reason = "failed", f"all steps are done, but this could not be undone: {', '.join(not_undone)}"
    if state == "succeeded":
        failed = [f"not deployed: {', '.join(sorted(outcome.left))}"] if outcome.left else []
        away = (
            [f"left out: {', '.join(f'{name} ({why})' for name, why in sorted(excluded.items()))}"] if excluded else []
        )
        reason = "; ".join([*failed, *away])
    out, behind = tuple(sorted(context.out)), tuple(sorted(context.filler.behind))
    return Result(state, reason, tuple(sorted(outcome.left)), tuple(sorted(excluded)), out, behind)


# --- before the first byte


async def _name_those_left_out(context: DeploymentContext) -> None:
    """Whoever a person left out is named first of all."""
    excluded = context.plan.excluded
    if excluded and not context.history.entries:
        await context.recorder.record(*(Left(name, why, operator()) for name, why in sorted(excluded.items())))


async def _adopt(context: DeploymentContext, brackets: Iterable[OpenBracket]) -> None:
    """Brackets that this deployment will close: their machines are out, and go first."""
    machines = {machine.name for machine in context.plan.machines}
    for bracket in brackets:
        is_mine = bracket.owner == context.recorder.deployment
        if bracket.machine in machines and not is_mine:
            await context.recorder.record(
                BracketAdopted(bracket.machine, bracket.rotation, bracket.owner, bracket.label)
            )
        context.out.add(bracket.machine)


async def _pre_acquire(context: DeploymentContext, undo: _Undo) -> None:
    """One after another. An undo is owed from the moment that its step may have begun."""
    history = context.history
    if history.given_up:
        opened = [step for step in context.plan.pre_acquire if step.run.name in history.pre_acquired]
        undo.owed += [step for step in opened if step.undo is not None]
        raise DeploymentFailedError(history.given_up)
    for step in context.plan.pre_acquire:
        past = history.pre_acquired.get(step.run.name)
        if past is None and history.barrier is not None:
            # It was undone before; what it was open for is done.
            continue
        if past is None:
            await context.desk.free()
            if context.stop.reason:
                raise DeploymentFailedError(context.stop.reason)
            await context.recorder.record(PreAcquireStarted(step.run.name, undo_due=step.undo is not None))
        if step.undo is not None:
            undo.owed.append(step)
        if past:
            continue
        operation = context.operation(0, SERVER, f"pre-{step.run.name}")
        begun = history.server_run(0, operation.action)
        result = await context.runs.run(step.run, operation, {}, begun=begun)
        await context.recorder.record(
            PreAcquireEnded(step.run.name, ok=result.ok, undo_due=step.undo is not None, reason=result.reason)
        )
        if not result.ok:
            raise DeploymentFailedError(f"{step.run.name} failed before a byte moved: {result.reason}")


@dataclass
class _Undo:
    """What pre-acquisition opened, and is to be closed in the opposite order."""

    context: DeploymentContext
    owed: list[PreAcquire] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    async def those_until_acquired(self) -> None:
        await self._undo([step for step in self.owed if step.until == "acquired"])

    async def everything(self, why: str) -> list[str]:
        """Undo all that is left, `why` being why the deployment fails; the names of those that failed."""
        await self._undo(list(self.owed), why)
        return self.failed

    async def _undo(self, steps: Sequence[PreAcquire], why: str = "") -> None:
        for step in reversed(steps):
            self.owed.remove(step)
            action = self.context.operation(0, SERVER, f"undo-{step.run.name}").action
            begun = self.context.history.server_run(0, action)
            if not await undo_step(step, self.context.runs, self.context.recorder, begun, why):
                self.failed.append(step.run.name)


async def _meet(context: DeploymentContext, *, adopt: bool) -> None:
    """Every machine must be there, with a clock that is right, and know of no other orchestrator that is at work.

    Behind the barrier one that is away is its turn's matter, as it is where it goes away in the middle.

    Raises:
        DeploymentFailedError: a machine is not there, or its clock is wrong.
        RefusedError: another orchestrator's deployment is not over.
    """
    with told_if_slow(context.recorder.say, "waiting for relays: they are asked which machines are there"):
        here = await context.fleet.presences()
    if context.history.barrier is not None:
        for name in sorted(here.missing):
            context.recorder.tell(Note(f"it cannot be given orders: {here.missing[name]}", name))
    elif reasons := [reason for name in sorted(here.missing) if (reason := await _missing(context, here, name))]:
        raise DeploymentFailedError(f"not every machine can be given orders: {'; '.join(reasons)}")
    plan, journal = context.plan, context.recorder.journal
    seen = seen_of(here.present, plan.project, plan.environment)
    foreign = other_orchestrators(seen, journal.id)
    if foreign and not adopt:
        raise RefusedError(
            f"another orchestrator has not finished here: {'; '.join(foreign)}",
            hint="End that deployment first, or take over with --adopt: it can order nothing any more then",
        )
    leading = await asyncio.to_thread(_leading_others, journal, plan)
    if older := older_agents(here.present, plan.environment, leading.keys()):
        raise RefusedError(
            f"{', '.join(leading.values())} leads in {plan.environment}, and agents of an older version take orders of one "
            f"project at a time there: {', '.join(older)}",
            hint="Wait until it has ended, or bring these agents up to date",
        )
    await _claim(context, [fence.fence for fences in seen.values() for fence in fences])
    context.refused_before = {name: presence.refused for name, presence in here.present.items()}


async def _missing(context: DeploymentContext, here: Presences, machine: str) -> str:
    """Why the deployment cannot go on without it; empty where it does."""
    why = here.missing[machine]
    if machine not in here.offline or context.plan.acquire.offline is None:
        return f"{machine}: {why}"
    refused = await context.leave_out(machine, why)
    return f"{machine}: {why}; {refused}" if refused else ""


def _leading_others(journal: Journal, plan: Plan) -> dict[str, str]:
    """Other projects' deployments in this environment whose process lives: their names for people, by ULID."""
    running = journal.deployments(plan.environment, state="running", limit=None)
    others = {
        record.deployment: f"{record.project} {record.label}" for record in running if record.project != plan.project
    }
    projects = {record.project for record in running if record.deployment in others}
    held = [holder(journal, project, plan.environment) for project in sorted(projects)]
    return {one.deployment: others[one.deployment] for one in held if one is not None and one.deployment in others}


async def _claim(context: DeploymentContext, seen: list[int]) -> None:
    """A fence above all that any agent has seen shuts out, from the first order on, the orchestrator that led before."""
    if seen and max(seen) >= context.fleet.fence:
        plan = context.plan
        context.fleet.fence = await context.recorder.claim(plan.project, plan.environment, seen)


# --- the end


async def _last_words(context: DeploymentContext) -> None:
    """Wait for the last output of machines, and let agents forget what is on disk here."""
    if context.refused_before is not None:
        with told_if_slow(context.recorder.say, "waiting for the last output, and for relays to take the last word"):
            await _note_refusals(context, context.refused_before)
            await context.fleet.logs_arrived()
            await together([_acknowledge(context, machine.name) for machine in context.plan.machines])


async def _close(context: DeploymentContext, result: Result) -> None:
    """Tell the plan's receivers, and write the end down."""
    await context.desk.close()
    if result.out:
        await _notify(context, "rotation_open", result.reason, result)
    await _notify(context, "finished" if result.state == "succeeded" else "failed", result.reason, result)
    assert result.state != "waiting"  # noqa: S101 - it would not have ended
    await context.recorder.end(result.state, result.reason)


async def _note_refusals(context: DeploymentContext, before: Mapping[str, Sequence[str]]) -> None:
    """Letters that agents refused meanwhile and that were not ours show that another can write into the mail."""
    here = await context.fleet.presences()
    for name, presence in here.present.items():
        for text in presence.refused:
            if text not in before.get(name, ()) and not await asyncio.to_thread(_is_of_ours, context, text):
                await context.recorder.record(Refused(name, text))


def _is_of_ours(context: DeploymentContext, refusal: str) -> bool:
    """Whether it is about a letter of this deployment, or about one of an earlier deployment that a relay brought late."""
    code, _, rest = refusal.partition(": ")
    deployment = rest.partition("/")[0]
    if deployment == context.recorder.deployment:
        return True
    if code != "fenced_off":
        return False
    try:
        # Only what was signed by an order key comes so far that its fence is looked at.
        context.recorder.journal.deployment(deployment)
    except NotFoundError:
        return False
    return True


async def _acknowledge(context: DeploymentContext, machine: str) -> None:
    try:
        async with asyncio.timeout(ACKNOWLEDGE_SECONDS):
            await context.fleet.acknowledge(machine, ends=True)
    except StoreError:
        raise
    except (UnreachableError, TimeoutError) as error:
        why = getattr(error, "message", f"no relay took the acknowledgement within {ACKNOWLEDGE_SECONDS:.0f} s")
        await context.recorder.record(Note(f"it keeps its results for now: {why}", machine))


async def _notify(
    context: DeploymentContext, event: NotificationKind, reason: str, result: Result | None = None
) -> None:
    """Tell the plan's receivers; without a result, of what happens on the way."""
    state = outcome_of(result.state, result.reason) if result is not None and result.state != "waiting" else event
    news = {
        "event": event,
        "project": context.plan.project,
        "label": context.plan.label,
        "environment": context.plan.environment,
        "deployment": context.recorder.deployment,
        "state": state,
        "reason": reason,
        "out": sorted(context.out),
        "behind": list(result.behind) if result is not None else [],
    }
    if targets := context.notifier.targets(event):
        with told_if_slow(context.recorder.say, f"waiting for {targets} to take the news"):
            errors = await context.notifier.notify(news)
        await context.recorder.record(*(Notified(event, targets, error) for error in errors or [""]))
