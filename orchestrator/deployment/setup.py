"""Set up a deployment: open its release, plan it, take the lock, find its packages, and begin in the journal."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
from ulid import ULID

from orchestrator.deployment.context import DeploymentContext
from orchestrator.deployment.notify import Notifier
from orchestrator.deployment.packages import ServerTrees, ensure_packages, ensure_scripts
from orchestrator.deployment.recovery import settle
from orchestrator.deployment.releases import Release, open_release, unpack_release
from orchestrator.deployment.server_runs import ServerRuns
from orchestrator.files.process import load_process
from orchestrator.fleet.endings import check_endings
from orchestrator.fleet.fleet import Fleet
from orchestrator.journal.locks import hold
from orchestrator.journal.recorder import Recorder, Tell
from orchestrator.paths import Paths, operator
from orchestrator.plan.make_plan import make_plan
from orchestrator.plan.plan import FrozenFile, MachineStep, Plan, ServerRun, ServerStep
from orchestrator.replication.fill_relays import relays_filled
from orchestrator.replication.send import open_relay
from orchestrator.trust.keyring import load_pins, load_signer
from orchestrator.trust.secrets import SecretStore
from relay.support.private_files import make_private_folder
from relay.support.progress import Bar
from relay.support.together import told_if_slow

if TYPE_CHECKING:
    from orchestrator.files.environment import EnvironmentFile
    from orchestrator.journal.journal import Journal
    from orchestrator.journal.views import OpenBracket


@dataclass(frozen=True, slots=True)
class DeployRequest:
    """What a person asked for. `project` is None where the label alone must be enough."""

    label: str
    project: str | None
    environment: EnvironmentFile
    prompts: Mapping[str, str]
    adopt: bool = False
    force: bool = False


@asynccontextmanager
async def set_up(
    paths: Paths, journal: Journal, request: DeployRequest, *, tell: Tell, bar: Bar
) -> AsyncIterator[tuple[DeploymentContext, list[OpenBracket]]]:
    """All that a deployment works with, and the brackets that it answers for. It has begun in the journal, and holds the
    lock of its project there until the block ends. Raises as `orchestrator.deployment.deployment.deploy`.
    """
    from orchestrator.depot.depot import open_depot

    pins = load_pins(paths.trust)
    record = journal.release(request.project, request.label)
    release = open_release(record.document, record.envelope, pins.order_keys(request.environment.value.environment))
    ulid = str(ULID())
    folder = paths.deployment(ulid)
    async with AsyncExitStack() as stack:
        unless_begun = stack.enter_context(ExitStack())
        unless_begun.callback(shutil.rmtree, folder, ignore_errors=True)
        plan = _plan(release, journal, request, folder)
        secrets = SecretStore(plan.secrets, plan.machine_secrets)
        secrets.check()
        # Contacts nothing; a token, an authority or a proxy that cannot be used is found before anything begins.
        clients = {relay.name: await stack.enter_async_context(open_relay(relay)) for relay in plan.relays}
        place = (plan.project, plan.environment)
        held = hold(journal, *place, operator=operator(), label=plan.label, why="deploy", deployment=ulid)
        stack.enter_context(held)
        brackets = await settle(paths, journal, plan, adopt=request.adopt, tell=tell)
        depot = await stack.enter_async_context(open_depot(paths.depot))
        signer = load_signer(paths.trust, "package")
        with told_if_slow(
            tell, "waiting for packages: they are taken from their feeds, or looked through in the depot"
        ):
            packages = await ensure_packages(depot, plan.packages, plan.feeds, secrets, signer, bar, pins=pins)
        await ensure_scripts(depot, plan.scripts, pins)
        plan = msgspec.structs.replace(plan, packages=packages, notes=(*plan.notes, *depot.notes), force=request.force)

        order_signer = load_signer(paths.trust, "order")
        recorder = Recorder(journal, ulid, tell)
        with told_if_slow(tell, "waiting for relays: they are asked whether their tokens and certificates last"):
            warnings = await check_endings(plan)
        for words in warnings:
            tell(f"warning: {words}")
        runs = ServerRuns(folder, secrets, recorder)
        await asyncio.to_thread(runs.freeze, _server_scripts(plan))
        fence = journal.claim(*place)
        journal.begin(ulid, msgspec.json.encode(plan), fence, operator())
        unless_begun.pop_all()
        fleet = Fleet(
            plan, clients, signer=order_signer, journal=journal.id, folder=folder, recorder=recorder, fence=fence
        )
        context = DeploymentContext(
            plan=plan,
            recorder=recorder,
            fleet=await stack.enter_async_context(fleet),
            runs=runs,
            secrets=secrets,
            depot=depot,
            trees=ServerTrees(paths.depot, pins, os.path.join(folder, "packages")),
            notifier=Notifier(plan.notify, secrets, order_signer),
            filler=await stack.enter_async_context(relays_filled(plan, depot, recorder, bar)),
            bar=bar,
        )
        yield context, brackets


def _plan(release: Release, journal: Journal, request: DeployRequest, folder: str) -> Plan:
    """Unpack the release into the deployment's folder, and plan with what it holds."""
    make_private_folder(os.path.dirname(folder))
    make_private_folder(folder)
    files = {sha256: journal.release_file(sha256) for sha256 in {file.sha256 for file in release.files}}
    process = unpack_release(release, files, os.path.join(folder, "process"))
    return make_plan(
        load_process(process),
        request.environment,
        label=release.label,
        packages=release.packages,
        scripts=release.scripts,
        prompts=request.prompts,
    )


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
