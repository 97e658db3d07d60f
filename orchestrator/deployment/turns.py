"""One machine's turn in a step, as it happens: `orchestrator/rolling/turn.py` decides, here it is done.

A turn that an earlier process began is folded anew from its journal. What that process had under way is taken up: the
same order goes out again and is answered with what became of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import cast, get_args

from msgspec.structs import replace

from agent.checks.run_checks import run_checks
from agent.orders.operation_id import OperationId
from agent.orders.orders import (
    CommandCheck,
    ControlService,
    HttpCheck,
    OpenAction,
    Report,
    RunScript,
    Settle,
    SurveyFacts,
    Switch,
    TcpCheck,
    TimedCheck,
    TreeFacts,
    Verify,
)
from orchestrator.deployment.context import DeploymentContext
from orchestrator.deployment.server_runs import RunResult
from orchestrator.deployment.tries import Tries
from orchestrator.journal.events import (
    BracketClosed,
    BracketOpened,
    Note,
    Reported,
    TurnDid,
    TurnEnded,
)
from orchestrator.plan.plan import (
    OLD_VERSION,
    MachineStep,
    MachineTurn,
    Plan,
    PlannedCheck,
    ScriptAction,
    ServerRun,
    ServiceAction,
    SwitchAction,
)
from orchestrator.rolling import turn
from orchestrator.rolling.turn import (
    Act,
    After,
    Ask,
    Back,
    Before,
    Done,
    End,
    Redo,
    Turn,
    TurnOutcome,
    VerifyOld,
    word_of,
)
from relay.errors import StoreError, WaystationError
from relay.support.together import together, told_if_slow

SILENCE_SECONDS = 15.0
"""After which a turn says what it is at."""


class MachineTurnRunner:
    """What one step does on one machine."""

    def __init__(
        self, context: DeploymentContext, step: MachineStep, planned: MachineTurn, facts: Mapping[str, SurveyFacts]
    ) -> None:
        self._context = context
        self._step = step
        self._turn = planned
        self._facts = tree_facts(context.plan, step, planned, facts.get(planned.machine))
        # A turn that an earlier process began is no other one because its bracket is closed meanwhile.
        has_begun = context.history.turn(step.number, planned.machine) is not None
        is_out, is_forced = planned.machine in context.out, context.plan.force or has_begun
        self.shape = turn.shape_of(step, planned, self._facts, is_out=is_out, is_forced=is_forced)
        self.variables = {**planned.variables, "DEPLOYMENT": context.recorder.deployment}
        self._tries = Tries()
        self._is_closed = False

    async def run(self) -> TurnOutcome:
        machine, number = self._turn.machine, self._step.number
        with self._context.desk.turn():
            state = await self._begin()
            while not isinstance(do := state.do, End):
                done = await self._do_told(do, state)
                self._context.recorder.later(machine, did_of(machine, number, do, done))
                state = turn.did(state, done)
                self._tries.next(keep=done.how == "lost" or isinstance(do, Ask))
                self._tell_what_was_missed(state)
                if isinstance(do, Ask) and isinstance(state.do, Act | turn.Verify | Back):
                    # Whatever a person has done meanwhile: it must be out before anything is done on it.
                    state = await self._out_again(state)
        result = do.result
        await self._context.recorder.record(
            TurnEnded(
                machine,
                number,
                result.outcome,
                failure=result.failure,
                stop_roll=result.stop_roll,
                bracket_open=result.bracket_open,
                reason=result.reason,
            )
        )
        if self._is_closed:
            self._context.out.discard(machine)
        return result

    async def _begin(self) -> Turn:
        """Where the turn stands: at its beginning, or where an earlier process left it."""
        machine, number = self._turn.machine, self._step.number
        past = self._context.history.turn(number, machine)
        state = turn.begin(self.shape)
        if past is None:  # that it begins was recorded together with its lease
            return state
        for did in past.did:
            if did.do != word_of(state.do):
                raise StoreError(f"the journal has {did.do!r} of {machine} where {word_of(state.do)!r} was to be done")
            state = turn.did(state, done_of(did))
        self._tries = Tries(past)
        self._context.recorder.tell(Note(f"its turn goes on with {self._words_of(state.do)}", machine))
        if turn.is_out(state) and not isinstance(state.do, After | Ask | End):
            state = await self._out_again(state)
        return state

    async def _out_again(self, state: Turn) -> Turn:
        """`before` once more, for the balancer may have forgotten what it was told."""
        rotation = self._step.rotation
        if rotation is None or not state.is_open:
            return state
        operation = self._operation("before")
        if begun := self._tries.begun(operation.action):
            # Whoever went on before us died in just this: it is seen through, and its end written down.
            last = self._operation("before", begun[-1])
            await self._context.runs.take_up(rotation.before, last, self.variables)
        result = await self._context.runs.run(rotation.before, operation, self.variables)
        return state if result.ok else turn.interrupted(state, _done(result))

    def _tell_what_was_missed(self, state: Turn) -> None:
        """Say what an operation has come to that was under way when an earlier process died."""
        for action, how in self._tries.missed():
            words = "" if isinstance(state.do, End) else f"; going on with {self._words_of(state.do)}"
            self._context.recorder.tell(Note(f"{action} {how} while nobody watched{words}", self._turn.machine))

    def _words_of(self, do: turn.Do) -> str:
        return self._turn.actions[do.index].name if isinstance(do, Act | Redo) else word_of(do)

    async def _do_told(self, do: turn.Do, state: Turn) -> Done:
        if isinstance(do, Ask):
            return await self._ask(do, state)
        words = f"{self._turn.machine}: still at {self._words_of(do)}"
        with told_if_slow(self._context.recorder.say, words, SILENCE_SECONDS):
            return await self._do(do)

    async def _ask(self, ask: Ask, state: Turn) -> Done:
        """What a person says; where the deployment is stopped meanwhile, that nobody did."""
        reason = "; ".join(state.reasons)
        said = await self._context.desk.decide(self._turn.machine, self._step.number, reason, ask.choices)
        if said is None:
            return Done("stopped", self._context.stop.reason)
        return Done("done", answer=cast("turn.Answer", said.what))

    async def _do(self, do: turn.Do) -> Done:
        try:
            match do:
                case Before():
                    return await self._before()
                case Act(index):
                    return await self._act(index)
                case turn.Verify():
                    return await self._verify("verify", checks_of_new(self._turn))
                case VerifyOld():
                    return await self._verify("verify-old", checks_of_old(self._turn, self._facts))
                case turn.Settle():
                    return await self._settle()
                case After(outcome):
                    return await self._after(outcome)
                case Back():
                    return await self._back()
                case Redo(index):
                    return await self._redo(index)
                case Ask() | End():
                    raise AssertionError("nothing to do here")
        except StoreError:
            # What the journal could not take must not happen.
            raise
        except WaystationError as error:
            return Done("lost", str(error))

    # --- the bracket

    async def _before(self) -> Done:
        rotation = self._step.rotation
        assert rotation is not None  # noqa: S101 - only such a step has a bracket
        machine = self._turn.machine
        opened = BracketOpened(machine, rotation.name, self._step.number)
        if self._tries.begun("before"):
            await self._context.recorder.record(opened)
        else:  # with the attempt that is recorded before it starts
            self._context.recorder.later(machine, opened)
        self._context.out.add(machine)
        result = await self._here(rotation.before, "before", {})
        if result.ok:
            self._context.recorder.tell(Note(f"out of {rotation.name}", machine))
        return _done(result)

    async def _after(self, outcome: str) -> Done:
        rotation = self._step.rotation
        assert rotation is not None  # noqa: S101 - only such a step has a bracket
        result = await self._here(rotation.after, "after", {"OUTCOME": outcome})
        if result.ok:
            self._context.recorder.later(self._turn.machine, BracketClosed(self._turn.machine, rotation.name, outcome))
            self._is_closed = True
        return _done(result)

    async def _here(self, what: ServerRun, name: str, extra: Mapping[str, str]) -> RunResult:
        operation, begun = self._operation(name), self._tries.begun(name)
        seen = {**self.variables, **extra}
        result = await self._context.runs.run(what, operation, seen, begun=begun, goes_on=True)
        (self._context.unsure.discard if result.ok else self._context.unsure.add)(self._turn.machine)
        return result

    # --- on the machine

    async def _act(self, index: int) -> Done:
        action = self._turn.actions[index]
        if isinstance(action, SwitchAction):
            return await self._order("switch", lambda _: self._switch(self._new_manifest), name=f"{index + 1}-switch")
        return await self._perform(action, f"{index + 1}-{action.name}", {})

    async def _back(self) -> Done:
        facts = self._facts
        assert facts is not None  # noqa: S101 - nothing goes back where nothing was found
        return await self._order("switch", lambda _: self._switch(facts.current_manifest), name="back-switch")

    async def _redo(self, index: int) -> Done:
        """What followed the switch, on the version that runs again."""
        action = self._turn.actions[index]
        if isinstance(action, SwitchAction):
            return turn.DONE
        old = {"VERSION": self._facts.current_version} if self._facts is not None else {}
        return await self._perform(action, f"back-{index + 1}-{action.name}", old)

    @property
    def _new_manifest(self) -> str:
        return self._context.plan.packages[self._step.package].manifest

    def _switch(self, manifest: str) -> Switch:
        return Switch(self._turn.root, manifest)

    async def _perform(self, action: ScriptAction | ServiceAction, name: str, extra: Mapping[str, str]) -> Done:
        def order(operation: OperationId) -> OpenAction:
            return self._action(action, operation, extra)

        def again(done: Done) -> bool:
            return done.how == "failed" or (done.how == "unknown" and action.idempotent)

        if isinstance(action, ScriptAction):
            # Its secrets are sealed by what the machine says of itself, and an earlier process may have heard that.
            await self._context.fleet.see(self._turn.machine)
        return await self._order(
            action.name, order, name=name, attempts=action.attempts, delay=action.delay, again=again
        )

    async def _order(
        self,
        words: str,
        order: Callable[[OperationId], OpenAction],
        *,
        name: str,
        attempts: int = 1,
        delay: float = 0.0,
        again: Callable[[Done], bool] = lambda _done: False,
    ) -> Done:
        """Order it as often as it may be tried. What was begun before is taken up, and counts as a try where it ran."""
        made = 0
        while True:
            made += 1
            report = await self._tries.order(
                self._context.fleet, self._operation(name), order, words=words, goes_on=True
            )
            done = done_by(report)
            if made >= attempts or not again(done):
                return done
            await asyncio.sleep(delay)

    def _operation(self, name: str, attempt: int = 1) -> OperationId:
        return self._context.operation(self._step.number, self._turn.machine, name, attempt)

    def _action(
        self, action: ScriptAction | ServiceAction, operation: OperationId, extra: Mapping[str, str]
    ) -> OpenAction:
        match action:
            case ServiceAction():
                return ControlService(action.service, action.action, action.timeout, action.idempotent)
            case ScriptAction():
                scripts = self._context.plan.scripts
                assert scripts is not None  # noqa: S101 - made with the release wherever a machine runs a script
                # Only this machine can open the secrets, and only in this operation.
                sealing = self._context.fleet.presence(self._turn.machine).sealing
                return RunScript(
                    package=scripts.manifest,
                    path=action.path,
                    variables={**self.variables, **action.variables, **extra, "ATTEMPT": str(operation.attempt)},
                    secrets=self._context.secrets.sealed(action.secrets, sealing, str(operation)),
                    root=self._turn.root,
                    timeout=action.timeout,
                    idempotent=action.idempotent,
                    stall=action.stall,
                )

    async def _settle(self) -> Done:
        what = Settle(self._turn.root, self._new_manifest, self._turn.fingerprint, self._step.keep)
        return await self._order("settle", lambda _: what, name="settle")

    async def _verify(self, name: str, checks: Checks) -> Done:
        async def perform(order: Verify) -> Done:
            # Of an agent that was restarted meanwhile: to look once more changes nothing.
            return await self._order(name, lambda _: order, name=name, attempts=2, again=lambda it: it.how == "unknown")

        return await make_checks(perform, self._context.plan, checks, self._turn.root, self.variables)


# --- the journal


def did_of(machine: str, step: int, do: turn.Do, done: Done) -> TurnDid:
    """What the journal keeps of a part of a turn."""
    return TurnDid(machine, step, word_of(do), done.how, done.reason, done.answer or "")


def done_of(did: TurnDid) -> Done:
    """The same for the fold. Raises `StoreError`: no words of this version."""
    if did.how not in get_args(turn.DoneState) or did.answer not in {"", *get_args(turn.Answer)}:
        raise StoreError(
            f"the journal has {did.how!r} {did.answer!r} of {did.machine}, which this version does not know"
        )
    answer = cast("turn.Answer", did.answer) if did.answer else None
    return Done(cast("turn.DoneState", did.how), did.reason, answer)


# --- the checks of one machine


Checks = Sequence[tuple[PlannedCheck, TimedCheck]]
"""As they were planned, and what is asked now."""


def checks_of_new(planned: MachineTurn) -> Checks:
    """Is the version of this release well?"""
    return [(each, each.check) for each in planned.verify]


def checks_of_old(planned: MachineTurn, facts: TreeFacts | None) -> Checks:
    """Is the version well that `facts` found there?"""
    return [(each, _for_old(each.for_old, facts)) for each in planned.verify]


async def make_checks(
    perform: Callable[[Verify], Awaitable[Done]],
    plan: Plan,
    checks: Checks,
    root: str,
    variables: Mapping[str, str],
) -> Done:
    """Those of the machine, by what `perform` orders, and those of the server at once; the first that fails is the reason."""
    here = [check for planned, check in checks if planned.on_server]
    there = tuple(check for planned, check in checks if not planned.on_server)
    scripts = plan.scripts.manifest if plan.scripts else ""

    async def ask() -> Done:
        signed = tuple(_signed(timed, scripts) for timed in there)
        return await perform(Verify(signed, root, dict(variables)))

    results = await together(([ask()] if there else []) + ([_check_here(here)] if here else []))
    return next((done for done in results if not done.ok), turn.DONE)


def _signed(timed: TimedCheck, scripts: str) -> TimedCheck:
    """A machine's command names the package that its script is signed in."""
    if not isinstance(timed.check, CommandCheck):
        return timed
    return replace(timed, check=replace(timed.check, package=scripts))


async def _check_here(checks: Sequence[TimedCheck]) -> Done:
    result = await run_checks(checks)
    return turn.DONE if result.ok else Done("failed", "; ".join(result.texts))


def tree_facts(plan: Plan, step: MachineStep, planned: MachineTurn, found: SurveyFacts | None) -> TreeFacts | None:
    """What was found under this turn's root; None where nothing is deployed, or the machine was not asked."""
    if not step.package or found is None:
        return None
    manifest = plan.packages[step.package].manifest
    return next((tree for tree in found.trees if tree.root == planned.root and tree.manifest == manifest), None)


def _for_old(check: TimedCheck, facts: TreeFacts | None) -> TimedCheck:
    """The check with the version that the machine had before."""
    version = facts.current_version if facts is not None else ""

    def filled(text: str) -> str:
        return text.replace(OLD_VERSION, version)

    what = check.check
    match what:
        case HttpCheck():
            expect, contains = (None if text is None else filled(text) for text in (what.expect, what.contains))
            what = replace(what, url=filled(what.url), expect=expect, contains=contains)
        case TcpCheck():
            what = replace(what, host=filled(what.host))
        case CommandCheck():
            what = replace(what, argv=tuple(map(filled, what.argv)))
    return replace(check, check=what)


def _done(result: RunResult) -> Done:
    return turn.DONE if result.ok else Done("failed", result.reason)


def done_by(report: Report | Reported) -> Done:
    """What a final report says."""
    match report.state:
        case "done":
            return turn.DONE
        case "failed" | "stopped" | "refused" | "unknown" as state:
            return Done(state, report.reason)
        case "running":
            return Done("unknown", "its last report says that it runs")
