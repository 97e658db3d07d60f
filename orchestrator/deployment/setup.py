"""Set up a deployment: open its release, plan it, take the lock, find its packages, and begin in the journal."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import msgspec
from ulid import ULID

from orchestrator.deployment.context import DeploymentContext
from orchestrator.deployment.decisions import Desk, StopToken
from orchestrator.deployment.notify import Notifier
from orchestrator.deployment.recovery import settle
from orchestrator.deployment.server_runs import ServerRuns
from orchestrator.files.process import load_process
from orchestrator.fleet.endings import check_endings
from orchestrator.fleet.fleet import Fleet
from orchestrator.journal.events import DeploymentRecord, Goal, Resumed
from orchestrator.journal.recorder import Recorder, Tell
from orchestrator.journal.views import OpenBracket
from orchestrator.locks.locks import hold, holder
from orchestrator.locks.status import find_deployment
from orchestrator.paths import Paths, operator
from orchestrator.plan.leave_out import EVERYBODY, Selection, without
from orchestrator.plan.make_plan import make_plan
from orchestrator.plan.plan import FrozenFile, MachineStep, Plan, ServerRun, ServerStep
from orchestrator.releases.packages import ServerTrees, ensure_packages, ensure_scripts
from orchestrator.releases.release import author_of, open_release, unpack_release
from orchestrator.releases.what_differs import NO_FILES, Files
from orchestrator.replication.fill_relays import relays_filled
from orchestrator.replication.send import open_relay
from orchestrator.rolling.again import plan_again
from orchestrator.rolling.going_back import find_way_back, plan_back
from orchestrator.rolling.history import History
from orchestrator.rolling.past import attempt_of, chain_of, past_of, past_records
from orchestrator.trust.keyring import load_pins, load_signer
from orchestrator.trust.secrets import SecretStore
from relay.errors import RefusedError, UsageError
from relay.package.identity import NuGetVersion
from relay.support.private_files import make_private_folder
from relay.support.progress import Bar
from relay.support.together import told_if_slow

if TYPE_CHECKING:
    from securesystemslib.signer import Signer

    from orchestrator.depot.depot import Depot
    from orchestrator.files.environment import EnvironmentFile
    from orchestrator.journal.journal import Journal
    from relay.protocol.connection import Connection
    from relay.trust.keys import TrustPins


@dataclass(frozen=True, slots=True)
class DeployRequest:
    """What a person asked for.

    Attributes:
        label: of the release; empty where going back finds it.
        project: None where the label alone must be enough.
        adopt: answer for machines that are out, and take over from another orchestrator.
        force: every machine has its turn.
        goal: `stage` ends behind the barrier; `rollback` goes back to `label`, or to the last good one.
        selection: whom to leave out.
        waits: the process waits for people as long as they take.
        files: what is compared with what was frozen, where it goes on with what did not end.
    """

    label: str
    project: str | None
    environment: EnvironmentFile
    prompts: Mapping[str, str]
    adopt: bool = False
    force: bool = False
    goal: Goal = "deploy"
    selection: Selection = EVERYBODY
    waits: bool = True
    files: Files = NO_FILES


@dataclass(frozen=True, slots=True)
class RetryRequest:
    """What a person wants tried again.

    Attributes:
        deployment: its ULID; None: the newest, in `environment` where one is named.
        machines: just these; none named: all that are not through.
        adopt: take over from another orchestrator. Machines that are out are answered for in any case.
    """

    deployment: str | None
    environment: str | None
    machines: tuple[str, ...] = ()
    adopt: bool = False
    waits: bool = True
    files: Files = NO_FILES


@dataclass(frozen=True, slots=True)
class _Planned:
    """A plan before its packages are found.

    Attributes:
        adopts: brackets that are open do not keep it from starting.
        scripts: folder of frozen scripts that it was planned with, where it is an older plan.
        newest: ULID of the newest deployment that it was planned upon, where that matters.
    """

    plan: Plan
    goal: Goal
    adopts: bool
    scripts: str = ""
    newest: str = ""


@asynccontextmanager
async def set_up(
    paths: Paths, journal: Journal, request: DeployRequest | RetryRequest, *, tell: Tell, bar: Bar
) -> AsyncIterator[tuple[DeploymentContext, list[OpenBracket]]]:
    """All that a deployment works with, and the brackets that it answers for. It has begun in the journal, and holds the
    lock of its project there until the block ends. Raises as `orchestrator.deployment.deployment.deploy`.
    """
    from orchestrator.depot.depot import open_depot

    pins = load_pins(paths.trust)
    ulid = str(ULID())
    folder = paths.deployment(ulid)
    async with AsyncExitStack() as stack:
        unless_begun = stack.enter_context(ExitStack())
        unless_begun.callback(shutil.rmtree, folder, ignore_errors=True)
        planned = _planned(paths, journal, request, pins, folder)
        plan = planned.plan
        secrets = SecretStore(plan.secrets, plan.machine_secrets)
        secrets.check()
        # Contacts nothing; a token, an authority or a proxy that cannot be used is found before anything begins.
        clients = {relay.name: await stack.enter_async_context(open_relay(relay)) for relay in plan.relays}
        place = (plan.project, plan.environment)
        held = hold(journal, *place, operator=operator(), label=plan.label, why=planned.goal, deployment=ulid)
        stack.enter_context(held)
        _check_newest(journal, planned)
        brackets = await settle(paths, journal, plan, adopt=planned.adopts, tell=tell)
        depot = await stack.enter_async_context(open_depot(paths.depot))
        signer = load_signer(paths.trust, "package")
        with told_if_slow(
            tell, "waiting for packages: they are taken from their feeds, or looked through in the depot"
        ):
            packages = await ensure_packages(depot, plan.packages, plan.feeds, secrets, signer, bar, pins=pins)
        await ensure_scripts(depot, plan.scripts, pins)
        plan = msgspec.structs.replace(plan, packages=packages, notes=(*plan.notes, *depot.notes))

        order_signer = load_signer(paths.trust, "order")
        recorder = Recorder(journal, ulid, tell)
        with told_if_slow(tell, "waiting for relays: they are asked whether their tokens and certificates last"):
            warnings = await check_endings(plan)
        for words in warnings:
            tell(f"warning: {words}")
        runs = ServerRuns(folder, secrets, recorder)
        if planned.scripts:
            await asyncio.to_thread(shutil.copytree, planned.scripts, os.path.join(folder, "scripts"))
        await asyncio.to_thread(runs.freeze, _server_scripts(plan))
        fence = journal.claim(*place)
        journal.begin(ulid, msgspec.json.encode(plan), fence, operator(), goal=planned.goal)
        unless_begun.pop_all()
        ground = _Ground(paths, plan, planned.goal, recorder, runs, secrets, depot, clients, fence, order_signer, bar)
        # What only brings packages neither takes a machine out nor answers for one.
        yield await ground.context(stack, History(), waits=request.waits), [] if planned.goal == "stage" else brackets


@asynccontextmanager
async def take_up(
    paths: Paths, journal: Journal, deployment: str, *, tell: Tell, bar: Bar, waits: bool
) -> AsyncIterator[tuple[DeploymentContext, list[OpenBracket]]]:
    """The same for a deployment whose process died or left: its plan is the frozen one, and no file is read again.

    Raises:
        UsageError: it has ended.
        LockedError: it runs, or another one does there.
        NotFoundError: there is none.
        StoreError: the journal could not be read or written.
    """
    from orchestrator.depot.depot import open_depot

    plan = msgspec.json.decode(journal.plan(deployment), type=Plan)
    async with AsyncExitStack() as stack:
        clients = {relay.name: await stack.enter_async_context(open_relay(relay)) for relay in plan.relays}
        place = (plan.project, plan.environment)
        held = hold(journal, *place, operator=operator(), label=plan.label, why="resume", deployment=deployment)
        stack.enter_context(held)
        record = journal.deployment(deployment)
        _check_unfinished(record)
        history = History(journal.entries(deployment))
        for machine, why in history.left_by_rule.items():
            plan = without(plan, machine, why)
        secrets = SecretStore(plan.secrets, plan.machine_secrets)
        secrets.check()
        depot = await stack.enter_async_context(open_depot(paths.depot))
        recorder = Recorder(journal, deployment, tell)
        order_signer = load_signer(paths.trust, "order")
        fence = journal.claim(*place)
        resumed = Resumed(operator(), socket.gethostname(), os.getpid(), fence)
        journal.take_up(deployment, fence, operator(), resumed)
        # Those that others of the project left open as well: they count as out, and it may have died before it said that it
        # adopts them.
        brackets = [each for each in journal.open_brackets(plan.environment) if each.project == plan.project]
        runs = ServerRuns(paths.deployment(deployment), secrets, recorder)
        ground = _Ground(paths, plan, record.goal, recorder, runs, secrets, depot, clients, fence, order_signer, bar)
        yield await ground.context(stack, history, waits=waits), [] if record.goal == "stage" else brackets


def _check_unfinished(record: DeploymentRecord) -> None:
    if record.state != "running":
        raise UsageError(
            f"the deployment of {record.label} into {record.environment} has ended: {record.state}",
            hint="'waystation release deploy' begins another one",
        )


def find_unfinished(journal: Journal, request: DeployRequest | RetryRequest) -> DeploymentRecord | None:
    """The deployment that did not end and that is asked for again; None where everything there has ended.

    One that runs is found as well: that it is locked is told by who tries to take it up.

    Raises:
        RefusedError: something else is unfinished there.
        StoreError: the journal cannot be read.
    """
    if isinstance(request, RetryRequest):
        asked = journal.deployment(find_deployment(journal, request.deployment, request.environment))
        project, environment = asked.project, asked.environment
    else:
        project, environment = request.project or "", request.environment.value.environment
    running = journal.deployments(environment, state="running", limit=None)
    unfinished = [each for each in running if project in {"", each.project}]
    same = next((each for each in unfinished if _is_same(each, request)), None)
    dead = [each for each in unfinished if holder(journal, each.project, environment) is None]
    if same is None and dead:
        other = dead[0]
        raise RefusedError(
            f"the deployment of {other.label} of {other.project} into {environment} did not end",
            hint=f"'waystation release resume {other.deployment}' goes on with it; after 'waystation release cancel' it "
            "comes to its end that way",
        )
    return same


def goes_on(journal: Journal, request: DeployRequest, versions: Mapping[str, str]) -> bool:
    """Whether what is asked for did not end, with these versions of its packages: then no release is made for it.

    Whoever repeats a command may have edited files meanwhile, and only what was frozen counts. Raises as
    `find_unfinished`, and `IdentityError`: no version.
    """
    found = find_unfinished(journal, request)
    if found is None:
        return False
    packages = msgspec.json.decode(journal.plan(found.deployment), type=Plan).packages
    return packages.keys() == versions.keys() and all(
        NuGetVersion.parse(version) == NuGetVersion.parse(packages[name].version) for name, version in versions.items()
    )


def _is_same(record: DeploymentRecord, request: DeployRequest | RetryRequest) -> bool:
    if isinstance(request, RetryRequest):
        return False
    return record.goal == request.goal and request.label in {"", record.label}


@dataclass(frozen=True)
class _Ground:
    """What a deployment stands on once its lock is held."""

    paths: Paths
    plan: Plan
    goal: Goal
    recorder: Recorder
    runs: ServerRuns
    secrets: SecretStore
    depot: Depot
    clients: Mapping[str, Connection]
    fence: int
    signer: Signer
    bar: Bar

    async def context(self, stack: AsyncExitStack, history: History, *, waits: bool) -> DeploymentContext:
        plan, recorder = self.plan, self.recorder
        folder, pins = self.paths.deployment(recorder.deployment), partial(load_pins, self.paths.trust)
        fleet = Fleet(
            plan,
            self.clients,
            signer=self.signer,
            journal=recorder.journal.id,
            folder=folder,
            recorder=recorder,
            fence=self.fence,
        )
        stop = StopToken()
        return DeploymentContext(
            plan=plan,
            recorder=recorder,
            fleet=await stack.enter_async_context(fleet),
            runs=self.runs,
            secrets=self.secrets,
            depot=self.depot,
            trees=ServerTrees(self.paths.depot, pins(), os.path.join(folder, "packages")),
            notifier=Notifier(plan.notify, self.secrets, self.signer),
            filler=await stack.enter_async_context(relays_filled(plan, self.depot, recorder, self.bar)),
            bar=self.bar,
            history=history,
            desk=Desk(recorder, plan, pins, stop, history, waits=waits),
            stop=stop,
            goal=self.goal,
            by_rule=dict(history.left_by_rule),
            unsure=set(history.unsure),
        )


# --- the plan


def _planned(
    paths: Paths, journal: Journal, request: DeployRequest | RetryRequest, pins: TrustPins, folder: str
) -> _Planned:
    if isinstance(request, RetryRequest):
        make_private_folder(os.path.dirname(folder))
        make_private_folder(folder)
        return _planned_again(paths, journal, request)
    if request.goal == "rollback":
        return _planned_back(journal, request, pins, folder)
    plan = _plan(journal, request, request.label, pins, folder)
    return _Planned(plan, request.goal, request.adopt or request.goal == "stage")


def _planned_again(paths: Paths, journal: Journal, request: RetryRequest) -> _Planned:
    """The plan that was frozen, not the files as they are now."""
    found = find_deployment(journal, request.deployment, request.environment)
    chain = chain_of(journal, found)
    plan, goal = plan_again(chain, request.machines), journal.deployment(chain[0].deployment).goal
    folders = [os.path.join(paths.deployment(attempt.deployment), "scripts") for attempt in reversed(chain)]
    scripts = next(filter(os.path.isdir, folders), "")
    newest = past_records(journal, plan.project, plan.environment)[-1].deployment
    return _Planned(plan, goal, adopts=True, scripts=scripts, newest=newest)


def _planned_back(journal: Journal, request: DeployRequest, pins: TrustPins, folder: str) -> _Planned:
    environment = request.environment.value.environment
    past = past_of(journal, request.project, environment)
    way = find_way_back(past, request.label or None)
    since = [attempt_of(journal, deployment) for deployment in way.since]
    request = replace(request, project=past[-1].record.project)
    plan = plan_back(_plan(journal, request, way.target, pins, folder), way, since)
    return _Planned(plan, "rollback", adopts=True, newest=past[-1].record.deployment)


def _check_newest(journal: Journal, planned: _Planned) -> None:
    """Under the lock: what was planned upon is still what happened last."""
    if planned.newest:
        of_project = past_records(journal, planned.plan.project, planned.plan.environment)
        if of_project[-1].deployment != planned.newest:
            raise RefusedError("another deployment has ended there just now", hint="Look at it, then say it again")


def _plan(journal: Journal, request: DeployRequest, label: str, pins: TrustPins, folder: str) -> Plan:
    """Unpack the release into the deployment's folder, and plan with what it holds."""
    record = journal.release(request.project, label)
    keys = pins.order_keys(request.environment.value.environment)
    release = open_release(record.document, record.envelope, keys)
    make_private_folder(os.path.dirname(folder))
    make_private_folder(folder)
    files = {sha256: journal.release_file(sha256) for sha256 in {file.sha256 for file in release.files}}
    process = unpack_release(release, files, os.path.join(folder, "process"))
    plan = make_plan(
        load_process(process),
        request.environment,
        label=release.label,
        packages=release.packages,
        scripts=release.scripts,
        prompts=request.prompts,
        people={key.name for key in keys if key.name},
        author=author_of(record.envelope, keys),
        selection=request.selection,
    )
    return msgspec.structs.replace(plan, force=request.force)


def _server_scripts(plan: Plan) -> list[FrozenFile]:
    """Every script of the plan that runs on the server."""
    runs: list[ServerRun | None] = [run for step in plan.pre_acquire for run in (step.run, step.undo)]
    for step in plan.steps:
        if isinstance(step, ServerStep):
            runs += [step.run, step.on_rollback if isinstance(step.on_rollback, ServerRun) else None]
        elif isinstance(step, MachineStep):
            runs += [phase.gate.check for phase in step.phases if phase.gate is not None]
            if step.rotation is not None:
                runs += [step.rotation.before, step.rotation.after, step.rotation.probe]
    return [run.script for run in runs if run is not None and run.script is not None]
