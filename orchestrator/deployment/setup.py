"""Set up a deployment: find the release, make the plan, take the lock, begin in the journal, and let it roll out."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
from ulid import ULID

from orchestrator.deployment.context import Engine, JournalHooks, Tell
from orchestrator.deployment.deployment import Result, roll_out
from orchestrator.deployment.notify import notify
from orchestrator.deployment.packages import (
    build_scripts_package,
    ensure_packages,
    ref_of,
    server_tree,
    wanted_packages,
)
from orchestrator.deployment.recovery import settle
from orchestrator.deployment.releases import Release, freeze_release, open_release, unpack_release
from orchestrator.deployment.server_runs import ServerRuns
from orchestrator.files.environment import EnvironmentFile
from orchestrator.files.process import ProcessFile, load_process, machine_scripts, server_scripts
from orchestrator.files.script_files import OnDisk
from orchestrator.fleet.fleet import Fleet
from orchestrator.journal.events import Event
from orchestrator.journal.journal import Journal
from orchestrator.journal.locks import hold
from orchestrator.paths import Places, operator
from orchestrator.plan.make_plan import make_plan
from orchestrator.plan.plan import FrozenFile, MachineStep, Plan, PlannedPackage, ServerRun
from orchestrator.replication.send import Bar, open_relay
from orchestrator.trust.secrets import SecretStore
from relay.errors import NotFoundError, UsageError
from relay.support.private_files import make_private_folder

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

    from orchestrator.depot.depot import Depot
    from relay.trust.keys import TrustPins


# --- a release


async def create_release(
    places: Places,
    journal: Journal,
    label: str,
    process: ProcessFile,
    versions: Mapping[str, str],
    *,
    environment: EnvironmentFile | None,
    prompts: Mapping[str, str],
    bar: Bar,
) -> tuple[Release, bool]:
    """Freeze and sign process, scripts and versions under `label`; False where just this was there already.

    With an environment, packages that the depot lacks are taken from its feeds now; else when it is deployed.

    Raises:
        PlanError: a mistake in the files (with an environment: in both).
        NotFoundError: a package is neither in the depot nor in a feed.
        ConflictError: the label stands for something else.
    """
    from orchestrator.depot.depot import open_depot
    from orchestrator.trust.keyring import load_signer

    packages = wanted_packages(process, versions)
    package_signer, order_signer = load_signer(places.trust, "package"), load_signer(places.trust, "order")
    secret_files: frozenset[str] = frozenset()
    async with open_depot(places.depot) as depot:
        if environment is not None:
            plan = make_plan(process, environment, label=label, packages=packages, scripts=None, prompts=prompts)
            secrets = SecretStore(plan.secrets, plan.machine_secrets)
            secret_files = secrets.files
            packages = await ensure_packages(depot, plan.packages, plan.feeds, secrets, package_signer, bar)
        else:
            packages = await _those_here(depot, process, packages, package_signer)
        scripts = await build_scripts_package(
            process.folder, machine_scripts(process), process.value.project, depot, package_signer
        )
    frozen = await asyncio.to_thread(
        lambda: freeze_release(
            process.text.decode(),
            process.name,
            project=process.value.project,
            label=label,
            packages=packages,
            scripts=scripts,
            server_files=_frozen(process, server_scripts(process)),
            machine_files=_frozen(process, machine_scripts(process)),
            signer=order_signer,
            leave_out=secret_files,
        )
    )
    new = journal.add_release(process.value.project, label, frozen.document, frozen.envelope, frozen.files, operator())
    return msgspec.json.decode(frozen.document, type=Release), new


async def _those_here(
    depot: Depot, process: ProcessFile, packages: Mapping[str, PlannedPackage], signer: CryptoSigner
) -> dict[str, PlannedPackage]:
    """Fill in what the depot has; what comes from a feed may wait for the deployment."""
    lacking = [name for name in process.value.packages if name not in packages]
    if lacking:
        names = " ".join(f"--package {name}=VERSION" for name in lacking)
        raise UsageError(
            f"a release needs a version of each of its packages: {', '.join(lacking)}", hint=f"Give {names}"
        )
    for name in packages:
        if name not in process.value.packages:
            known = ", ".join(process.value.packages)
            raise UsageError(f"--package {name}: {process.name} has no such package", hint=f"It has: {known}")
    waiting = {n: p for n, p in packages.items() if p.feed and depot.catalog.find(ref_of(p)) is None}
    here = {name: package for name, package in packages.items() if name not in waiting}
    return waiting | await ensure_packages(depot, here, {}, SecretStore({}), signer)


def _frozen(process: ProcessFile, paths: Iterable[str]) -> list[FrozenFile]:
    files = OnDisk()
    return [FrozenFile(process.folder, path, files.script(process.folder, path)) for path in paths]


# --- a deployment


@dataclass(frozen=True, slots=True)
class Wish:
    """What a person asked for. `project` is None where the label alone must be enough."""

    label: str
    project: str | None
    environment: EnvironmentFile
    prompts: Mapping[str, str]
    adopt: bool = False


async def deploy(
    places: Places, journal: Journal, wish: Wish, *, begun: Callable[[str, Plan], None], tell: Tell, bar: Bar
) -> tuple[str, Result]:
    """Run a release in an environment, from plan to end. The deployment's ULID, and how it ended.

    `begun` is called once it stands in the journal.

    Raises:
        PlanError: mistakes in the files; nothing was contacted.
        LockedError: another deployment runs there.
        RefusedError: brackets of an earlier one are open, or a secret cannot be read; nothing was started.
        NotFoundError: no such release or package.
    """
    pins = _pins(places)
    record = journal.release(wish.project, wish.label)
    release = open_release(record.document, record.envelope, pins.order_keys(wish.environment.value.environment))
    ulid = str(ULID())
    folder = places.deployment(ulid)
    try:
        return ulid, await _deploy(places, journal, wish, pins, release, ulid, begun=begun, tell=tell, bar=bar)
    except BaseException:
        if not _has_begun(journal, ulid):
            shutil.rmtree(folder, ignore_errors=True)
        raise


async def _deploy(
    places: Places,
    journal: Journal,
    wish: Wish,
    pins: TrustPins,
    release: Release,
    ulid: str,
    *,
    begun: Callable[[str, Plan], None],
    tell: Tell,
    bar: Bar,
) -> Result:
    from orchestrator.depot.depot import open_depot
    from orchestrator.trust.keyring import load_signer

    plan = _plan(release, journal, wish, places.deployment(ulid))
    secrets = SecretStore(plan.secrets, plan.machine_secrets)
    secrets.check()
    with hold(journal, plan.environment, operator=operator(), label=plan.label, why="deploy", deployment=ulid):
        brackets = await settle(places, journal, plan.environment, adopt=wish.adopt)
        async with AsyncExitStack() as stack:
            depot = await stack.enter_async_context(open_depot(places.depot))
            signer = load_signer(places.trust, "package")
            packages = await ensure_packages(depot, plan.packages, plan.feeds, secrets, signer, bar)
            plan = _planned(release, packages, wish, places.deployment(ulid))
            engine = await _engine(stack, places, journal, plan, ulid, secrets, depot, pins, tell, bar)
            begun(ulid, plan)
            return await roll_out(engine, brackets, adopt=wish.adopt)


def _plan(release: Release, journal: Journal, wish: Wish, folder: str) -> Plan:
    """Unpack the release into the deployment's folder, and plan with what it holds."""
    make_private_folder(os.path.dirname(folder))
    make_private_folder(folder)
    files = {sha256: journal.release_file(sha256) for sha256 in set(release.sha256_of.values())}
    unpack_release(release, files, os.path.join(folder, "process"))
    return _planned(release, release.packages, wish, folder)


def _planned(release: Release, packages: Mapping[str, PlannedPackage], wish: Wish, folder: str) -> Plan:
    return make_plan(
        load_process(os.path.join(folder, "process", release.process_name)),
        wish.environment,
        label=release.label,
        packages=packages,
        scripts=release.scripts,
        prompts=wish.prompts,
    )


def _has_begun(journal: Journal, ulid: str) -> bool:
    try:
        journal.deployment(ulid)
    except NotFoundError:
        return False
    return True


async def _engine(
    stack: AsyncExitStack,
    places: Places,
    journal: Journal,
    plan: Plan,
    ulid: str,
    secrets: SecretStore,
    depot: Depot,
    pins: TrustPins,
    tell: Tell,
    bar: Bar,
) -> Engine:
    """Everything that the deployment works with, and its beginning in the journal."""
    from orchestrator.trust.keyring import load_signer

    folder = places.deployment(ulid)
    order_signer = load_signer(places.trust, "order")

    async def note(*events: Event) -> None:
        await engine.note(*events)

    hooks = JournalHooks(note)
    runs = ServerRuns(folder, secrets, {}, hooks.before_run, hooks.after_run)
    await asyncio.to_thread(runs.freeze, frozen_files(plan))
    fence = journal.claim(plan.environment)
    journal.begin(ulid, msgspec.json.encode(plan), fence, operator())
    clients = {relay.name: await stack.enter_async_context(open_relay(relay)) for relay in plan.relays}
    fleet = Fleet(plan, ulid, clients, signer=order_signer, journal=journal.id, folder=folder, hooks=hooks, fence=fence)
    engine = Engine(
        plan=plan,
        deployment=ulid,
        journal=journal,
        fleet=fleet,
        runs=runs,
        secrets=secrets,
        depot=depot,
        tell=tell,
        bar=bar,
        open_relay=open_relay,
        notify=lambda event: notify(plan.notify, secrets, order_signer, event),
        server_tree=lambda package: server_tree(places.depot, package, pins, os.path.join(folder, "packages")),
        operator=operator(),
        fence=fence,
    )
    await stack.enter_async_context(fleet)
    return engine


def frozen_files(plan: Plan) -> list[FrozenFile]:
    """Every script of the plan that runs on the server."""
    return [run.script for run in server_runs_of(plan) if run.script is not None]


def server_runs_of(plan: Plan) -> list[ServerRun]:
    runs: list[ServerRun | None] = [run for step in plan.pre_acquire for run in (step.run, step.undo)]
    for step in plan.steps:
        if not isinstance(step, MachineStep):
            runs.append(step.run)
        elif step.rotation is not None:
            runs += [step.rotation.before, step.rotation.after, step.rotation.probe]
    return [run for run in runs if run is not None]


def _pins(places: Places) -> TrustPins:
    from relay.trust.keys import parse_pins

    path = os.path.join(places.trust, "trust.json")
    try:
        with open(path, "rb") as file:
            return parse_pins(file.read(1 << 20))
    except OSError as error:
        raise NotFoundError(f"{path}: {error.strerror}", hint="'waystation trust init' makes it") from error
