"""Make a release: find its packages, pack its scripts for machines, freeze and sign all of it, and keep it in the journal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec

from orchestrator.files.process import ProcessFile, machine_scripts, server_scripts
from orchestrator.files.script_files import OnDisk
from orchestrator.paths import Paths, operator
from orchestrator.plan.make_plan import make_plan
from orchestrator.plan.plan import FrozenFile, Plan, PlannedPackage
from orchestrator.releases.packages import (
    build_scripts_package,
    ensure_packages,
    known_packages,
    wanted_packages,
)
from orchestrator.releases.release import Release, freeze_release
from orchestrator.trust.keyring import load_person_signer, load_signer, people_in
from orchestrator.trust.secrets import SecretStore
from relay.errors import UsageError

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

    from orchestrator.depot.depot import Depot
    from orchestrator.files.environment import EnvironmentFile
    from orchestrator.journal.journal import Journal
    from relay.support.progress import Bar


async def plan_release(
    paths: Paths,
    process: ProcessFile,
    environment: EnvironmentFile,
    label: str,
    versions: Mapping[str, str],
    prompts: Mapping[str, str],
) -> Plan:
    """What a deployment of the files as they are would do. Raises `PlanError`; contacts nothing."""
    packages = await known_packages(paths.depot, wanted_packages(process, versions))
    return make_plan(
        process,
        environment,
        label=label,
        packages=packages,
        scripts=None,
        prompts=prompts,
        people=people_in(paths.trust, environment.value.environment),
        author=paths.person or None,
    )


async def create_release(
    paths: Paths,
    journal: Journal,
    label: str,
    process: ProcessFile,
    versions: Mapping[str, str],
    *,
    environment: EnvironmentFile | None,
    prompts: Mapping[str, str],
    bar: Bar,
    tell: Callable[[str], None],
) -> tuple[Release, bool]:
    """Freeze and sign process, scripts and versions under `label`, by the key of `paths.person`. The release; False where
    just this was there already (and stays that of who made it first).

    What had to be brought back into the depot for it is told, a sentence each.

    With an environment, packages that the depot lacks are taken from its feeds now; else when it is deployed.

    Raises:
        PlanError: a mistake in the files (with an environment: in both).
        NotFoundError: a package is neither in the depot nor in a feed.
        ConflictError: the label stands for something else.
    """
    from orchestrator.depot.depot import open_depot

    packages = wanted_packages(process, versions)
    package_signer = load_signer(paths.trust, "package")
    order_signer = load_person_signer(paths.trust, paths.person, paths.keys)
    secret_files: frozenset[str] = frozenset()
    async with open_depot(paths.depot) as depot:
        if environment is not None:
            plan = make_plan(
                process,
                environment,
                label=label,
                packages=packages,
                scripts=None,
                prompts=prompts,
                people=people_in(paths.trust, environment.value.environment),
                author=paths.person,
            )
            secrets = SecretStore(plan.secrets, plan.machine_secrets)
            secret_files = secrets.files
            packages = await ensure_packages(depot, plan.packages, plan.feeds, secrets, package_signer, bar)
        else:
            packages = await _those_here(depot, process, packages, package_signer)
        scripts = await build_scripts_package(
            process.folder, machine_scripts(process), process.value.project, depot, package_signer
        )
        for note in depot.notes:
            tell(note)
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
    waiting = {n: p for n, p in packages.items() if p.feed and depot.catalog.find(p.ref) is None}
    here = {name: package for name, package in packages.items() if name not in waiting}
    return waiting | await ensure_packages(depot, here, {}, SecretStore({}), signer)


def _frozen(process: ProcessFile, paths: Iterable[str]) -> list[FrozenFile]:
    files = OnDisk()
    return [FrozenFile(process.folder, path, files.script(process.folder, path)) for path in paths]
