"""What an agent does by order: each kind of order, from the decision to obey to how it ended.

Nothing here knows of relays' mail or of other orders: `agent/scheduler.py` decides what runs when.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from agent import platform
from agent.acts import (
    OperationBroke,
    PullBegun,
    PullEnded,
    PullFailed,
    PullWaits,
    ScriptEnded,
    ScriptStarted,
    ServiceControlled,
    Settled,
    Switched,
)
from agent.checks.run_checks import run_checks
from agent.config import AgentConfig
from agent.orders.envelopes import open_sealed, secret_context
from agent.orders.orders import (
    Acknowledge,
    Acquire,
    AcquireFacts,
    CommandCheck,
    ControlService,
    Facts,
    Order,
    PackageTree,
    RunScript,
    SealedAction,
    Settle,
    State,
    Stop,
    Survey,
    SurveyFacts,
    Switch,
    SwitchFacts,
    TimedCheck,
    TreeFacts,
    TreePulled,
    Verify,
    VerifyFacts,
)
from agent.relays.sources import Sources
from agent.runs import runs
from agent.runs.runner import OUTPUT
from agent.runs.runs import RunSpec
from agent.runs.scripts import base_environment, command_for
from agent.trees import pull as story
from agent.trees.installed import AgentState, TreeRecord
from agent.trees.pull import Pulled, PullRequest, check_signature, switch_to
from agent.trees.tree import damage_in, is_whole
from relay.audit.event import tell
from relay.errors import SignatureError, StoreError, UsageError, WaystationError
from relay.package.identity import ManifestId, NuGetVersion, PackageId, PackageRef
from relay.protocol.followed import Current
from relay.support.persistence import Bearing, Persistence
from relay.support.progress import Progress
from relay.trust.keys import TrustPins

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

SCRIPTS_KEPT = 20
"""Packages of scripts that stay when a deployment has ended."""
_REASON_CHARS = 2000
_TEXT_CHARS = 400
"""Of one check's words: those of 64 checks must fit into a report."""
_PERSISTENCE = Persistence(first_pause=0.5, longest_pause=5.0, spread=0.5)
"""With relays of which none can give a tree now: those that lost one relay do not come back to it at once."""
Output = Callable[[str, int], None]
"""Called as output grows: (path of the file that it is in, bytes that it has)."""


class NotRunError(WaystationError):
    """A rule of this machine says no, before anything ran."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How an operation ended; what a report says of it. Seconds since 1970; 0 where that is not known."""

    state: State
    reason: str = ""
    exit_status: int | None = None
    started: float = 0.0
    ended: float = 0.0
    log_bytes: int = 0
    log_sha256: str = ""
    facts: Facts | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One order to perform.

    Attributes:
        folder: the operation's own, private.
        barred: why it must not begin any more, where it was accepted before a restart; else empty.
    """

    order: Order
    folder: str
    on_output: Output
    on_progress: Progress
    barred: str = ""


@dataclass(frozen=True)
class Operations:
    """All that operations need of this machine.

    `relays`, given by hand, stand in place of DNS and the configured list; an order's own follow in any case.
    """

    state: AgentState
    config: AgentConfig
    pins: Current[TrustPins | None]
    sealing: X25519PrivateKey
    relays: Sequence[str] = ()
    token_file: str | None = None

    async def perform(self, job: Job) -> Ended:
        """Do it. Every failure is in what is returned; only being cancelled is raised."""
        if job.barred and not isinstance(job.order.action, RunScript | ControlService):
            return Ended("unknown", f"this agent was restarted while it was under way, and now {job.barred}")
        try:
            match job.order.action:
                case Survey() as action:
                    return Ended("done", facts=await asyncio.to_thread(self.survey, action))
                case Acquire() as action:
                    return await self._acquire(action, job)
                case RunScript() as action:
                    return await self._run(job, partial(self._script, action, job), idempotent=action.idempotent)
                case ControlService() as action:
                    return await self._run(job, partial(self._service, action, job), idempotent=action.idempotent)
                case Switch() as action:
                    return Ended("done", facts=await asyncio.to_thread(self._switch, action, job.order.operation))
                case Verify() as action:
                    return await self._verify(action)
                case Settle() as action:
                    await asyncio.to_thread(self._settle, action, job.order.operation)
                    return Ended("done")
                case Stop() | Acknowledge() | SealedAction():
                    raise AssertionError("about other operations, or not opened: not for here")
        except (NotRunError, UsageError) as error:
            return Ended("refused", str(error)[:_REASON_CHARS])
        except WaystationError as error:
            return Ended("failed", str(error)[:_REASON_CHARS])
        # A mistake of ours is the end of the operation, too: the orchestrator would wait for one for ever.
        except Exception as error:
            tell(OperationBroke(job.order.operation, type(error).__name__), error)
            return Ended("failed", f"the agent failed: {type(error).__name__}: {error}"[:_REASON_CHARS])

    def prune_scripts(self) -> None:
        """Remove old packages of scripts; blocking."""
        self.state.prune(self.state.scripts_root, SCRIPTS_KEPT, ())

    # --- what is here

    def survey(self, action: Survey) -> SurveyFacts:
        """What stands under each asked root. Changes nothing; blocking."""
        return SurveyFacts(tuple(self._tree_facts(asked) for asked in action.trees))

    def _tree_facts(self, asked: PackageTree) -> TreeFacts:
        root = self._root(asked.root)
        record = self.state.installed(root, ManifestId(asked.manifest))
        whole = record is not None and self._is_whole(record)
        current = self._current(root)
        settled = self.state.settled(root)
        there = _existing_parent(root)
        facts = TreeFacts(
            root=asked.root,
            manifest=asked.manifest,
            free_bytes=platform.free_bytes(there),
            installed=whole,
            file_system=str(os.stat(there).st_dev),
        )
        if current is None:
            return facts
        good = settled is not None and settled.path == current.path
        if good and current.manifest == asked.manifest:
            # The newest tree of it may be another one, built beside this one because this one was damaged.
            good = whole if current == record else self._is_whole(current)
        return msgspec.structs.replace(
            facts,
            current_manifest=current.manifest,
            current_package=current.package,
            current_version=current.version,
            current_path=current.path,
            settled=settled.fingerprint if good and settled is not None else "",
        )

    def _is_whole(self, record: TreeRecord) -> bool:
        manifest = self.state.manifest(record)
        return manifest is not None and is_whole(record.path, manifest)

    def _current(self, root: str) -> TreeRecord | None:
        """The record of the tree that `current` names; None where it names nothing of ours."""
        path = _current_path(root)
        return next((record for record in self.state.trees() if record.path == path), None)

    # --- trees

    async def _acquire(self, action: Acquire, job: Job) -> Ended:
        wanted = [self._request(tree) for tree in action.trees]
        pulled: list[TreePulled] = []
        try:
            async with asyncio.timeout(action.deadline):
                for request in wanted:
                    before = sum(each.tree_bytes for each in pulled)
                    pulled.append(await self._pull(request, action, job, before))
        except TimeoutError:
            return Ended("failed", f"not acquired within {action.deadline:g} s; what came is kept")
        return Ended("done", facts=AcquireFacts(tuple(pulled)))

    def _request(self, tree: PackageTree) -> PullRequest:
        package = PackageRef(PackageId.parse(tree.id), NuGetVersion.parse(tree.version))
        return PullRequest(
            package,
            self._root(tree.root),
            digest=ManifestId(tree.manifest),
            label=tree.label,
            signed=True,
        )

    async def _pull(self, request: PullRequest, action: Acquire, job: Job, before: int) -> TreePulled:
        """One tree. Where no relay can be reached, or has it yet, they are asked again until nothing came for `stall`."""
        most = 0

        def heard(done: int, whole: int) -> None:
            nonlocal most
            most = max(most, done)
            job.on_progress(before + done, before + whole)

        operation, package = job.order.operation, request.package
        tell(PullBegun(operation, str(package.id), package.version.normalized, request.root))
        result = await asyncio.to_thread(story.installed, request, self.state, self.pins())
        bearing = Bearing(replace(_PERSISTENCE, patience=action.stall), gained=lambda: most)
        while result is None:
            try:
                result = await self._pull_once(request, action, job, heard)
            except WaystationError as error:
                pause = bearing.pause_after(error)
                if pause is None or not bearing.has_patience or not story.may_come(error):
                    tell(PullFailed(operation, str(package.id), package.version.normalized, error.message))
                    raise
                tell(PullWaits(job.order.operation, error.message))
                await asyncio.sleep(pause)
        pulled = _tree_pulled(result)
        tell(_pull_ended(operation, pulled))
        return pulled

    async def _pull_once(self, request: PullRequest, action: Acquire, job: Job, heard: Progress) -> Pulled:
        path = Path(self.state.home) / "relays.json"
        given = (*self.relays, *job.order.relays) if self.relays else ()
        config = msgspec.structs.replace(self.config, relays=(*self.config.relays, *job.order.relays))
        async with Sources(config, path, relays=given, token_file=self.token_file) as sources:
            return await story.pull(
                request, self.state, sources, self.pins(), progress=heard, stall_seconds=action.stall
            )

    def _switch(self, action: Switch, operation: str) -> SwitchFacts:
        root = self._root(action.root)
        record = self._installed(root, action.manifest)
        manifest = self.state.manifest(record)
        damage = "its manifest is lost" if manifest is None else damage_in(record.path, manifest)
        if damage:
            raise StoreError(f"the tree {record.path} is not whole any more ({damage})", hint="Acquire it again")
        before = _current_path(root)
        switch_to(record)
        tell(Switched(operation, root, before, record.path))
        return SwitchFacts(before=before, after=record.path)

    def _settle(self, action: Settle, operation: str) -> None:
        root = self._root(action.root)
        record = self._installed(root, action.manifest)
        if _current_path(root) != record.path:
            current = _current_path(root) or "nothing"
            raise StoreError(f"current of {root} names {current}, not {record.path}: it is not settled")
        settled = self.state.settle(record, action.fingerprint)
        tell(Settled(operation, root, record.path))
        self.state.prune(root, action.keep, {record.path, settled.before})

    def _installed(self, root: str, manifest: str) -> TreeRecord:
        record = self.state.installed(root, ManifestId(manifest))
        if record is None:
            raise NotRunError(f"no tree of sha256:{manifest[:16]}… is installed under {root}", hint="Acquire it first")
        return record

    def _root(self, text: str) -> str:
        """The root that an order names, if it may name it. Raises `NotRunError`."""
        if not text:
            return self.state.scripts_root
        if not os.path.isabs(text) or "\0" in text:
            raise NotRunError(f"a root must be an absolute folder, not {text[:200]!r}")
        root = os.path.abspath(text)
        allowed = [os.path.realpath(folder) for folder in self.config.roots]
        # By its real path: a link inside an allowed folder must not lead out of it.
        if allowed and not any(_is_below(os.path.realpath(root), folder) for folder in allowed):
            raise NotRunError(f"{root} is not under a root that this machine's agent.yaml allows")
        return root

    # --- scripts and services

    async def _run(self, job: Job, prepare: Callable[[], tuple[RunSpec, dict[str, str]]], *, idempotent: bool) -> Ended:
        """Start what `prepare` gives, at most once; or take it up where it is, if it was started before."""
        folder = last_run(job.folder)
        state = await asyncio.to_thread(runs.state_of, folder)
        if state == "unknown" and idempotent:
            await asyncio.to_thread(runs.stop, folder)
            folder, state = _next_run(folder), "new"
        if state == "new":
            if job.barred:
                raise NotRunError(f"it did not begin before this agent was restarted, and now {job.barred}")
            spec, environment = await asyncio.to_thread(prepare)
            await asyncio.to_thread(runs.launch, folder, spec, environment)
            tell(_begun(job.order))
        ended = await _watch(folder, job.on_output)
        seconds = max(0.0, ended.ended - ended.started)
        tell(ScriptEnded(job.order.operation, ended.state, ended.exit_status, seconds, ended.log_bytes))
        return ended

    def _script(self, action: RunScript, job: Job) -> tuple[RunSpec, dict[str, str]]:
        command = self._script_command(action.package, action.path)
        secrets = self._secrets(action, job.order.operation)
        environment = base_environment() | action.variables | secrets
        environment["WAYSTATION_OPERATION"] = job.order.operation
        root = self._root(action.root) if action.root else ""
        cwd = root if os.path.isdir(root) else job.folder
        spec = RunSpec(tuple(command), cwd, action.timeout, secret_names=tuple(secrets), stall=action.stall)
        return spec, environment

    def _script_command(self, package: str, path: str) -> list[str]:
        """How a script of a signed package is started."""
        script = self._verified_script(package, path)
        try:
            return command_for(script, self.config.interpreters)
        except OSError as error:
            raise NotRunError(f"{script} cannot be read: {error.strerror}") from error

    def _verified_script(self, package: str, path: str) -> str:
        """The script in the tree of its signed package, every byte of which was just compared with the manifest.

        A script may use what lies beside it.
        """
        record = self.state.find(package)
        manifest = None if record is None else self.state.manifest(record)
        if record is None or manifest is None:
            raise NotRunError(f"the package sha256:{package[:16]}… is not installed here", hint="Acquire it first")
        try:
            check_signature(manifest, self.state.signature(manifest.id), self.pins())
        except SignatureError as error:
            raise NotRunError(f"{manifest.package} holds the script, but {error.message}") from error
        if path not in manifest.tree_paths:
            raise NotRunError(f"{manifest.package} holds no {path!r}")
        script = os.path.join(record.path, path)
        if damage := damage_in(record.path, manifest):
            what = (
                f"{script} is not as it was signed" if damage.startswith(f"{path}: ") else f"{script} cannot be trusted"
            )
            raise NotRunError(f"{what}: {record.path} was changed ({damage})", hint="Acquire its package again")
        return script

    def _secrets(self, action: RunScript, operation: str) -> dict[str, str]:
        opened = {}
        for name, sealed in action.secrets.items():
            try:
                value = open_sealed(sealed, self.sealing, secret_context(operation, name))
            except SignatureError as error:
                raise NotRunError(f"the secret {name} cannot be opened: {error.message}") from error
            opened[name] = os.fsdecode(value)
        return opened

    def _service(self, action: ControlService, job: Job) -> tuple[RunSpec, dict[str, str]]:
        command = platform.service_command(action.action, action.name, self.config.service_command)
        return RunSpec(tuple(command), job.folder, action.timeout), base_environment()

    # --- health

    async def _verify(self, action: Verify) -> Ended:
        root = self._root(action.root) if action.root else ""
        checks = [await asyncio.to_thread(self._runnable, timed) for timed in action.checks]
        result = await run_checks(
            checks,
            environment=base_environment() | action.variables,
            service_command=self.config.service_command,
            folder=root if os.path.isdir(root) else None,  # noqa: ASYNC240 - one look at a local folder
        )
        texts = tuple(text[:_TEXT_CHARS] for text in result.texts)
        return Ended(
            "done" if result.ok else "failed", "; ".join(result.failed)[:_REASON_CHARS], facts=VerifyFacts(texts)
        )

    def _runnable(self, timed: TimedCheck) -> TimedCheck:
        """A command as the script of its signed package; other checks as they are. Raises `NotRunError`."""
        check = timed.check
        if not isinstance(check, CommandCheck):
            return timed
        if not check.package:
            raise NotRunError(f"{check.argv[0][:200]!r} is not of a signed package, and nothing else is run here")
        command = self._script_command(check.package, check.argv[0])
        return msgspec.structs.replace(timed, check=CommandCheck((*command, *check.argv[1:])))


def _begun(order: Order) -> ScriptStarted | ServiceControlled:
    match order.action:
        case RunScript(package=package, path=path):
            return ScriptStarted(order.operation, package, path)
        case ControlService(name=name, action=action):
            return ServiceControlled(order.operation, name, action)
    raise AssertionError("nothing else is run")


def _pull_ended(operation: str, pulled: TreePulled) -> PullEnded:
    return PullEnded(
        operation=operation,
        package=pulled.package,
        version=pulled.version,
        tree=pulled.path,
        already=pulled.already,
        bytes=pulled.tree_bytes,
        from_disk=pulled.from_disk_bytes,
        from_relays=tuple(f"{relay} {count}" for relay, count in pulled.from_relays.items()),
        wire_bytes=pulled.wire_bytes,
        seconds=pulled.seconds,
    )


async def _watch(folder: str, on_output: Output) -> Ended:
    path = os.path.join(folder, OUTPUT)
    digest, seen = hashlib.sha256(), 0

    def hear(offset: int, piece: bytes) -> None:
        nonlocal seen
        digest.update(piece)
        seen = offset + len(piece)
        on_output(path, seen)

    outcome = await runs.watch(folder, hear)
    return Ended(
        outcome.state,
        outcome.reason,
        outcome.exit_status,
        outcome.started,
        outcome.ended,
        log_bytes=seen,
        log_sha256=digest.hexdigest() if seen else "",
    )


def last_run(folder: str) -> str:
    """The runner's folder of the newest run in an operation's folder, whether it is there or not."""
    runs = [int(name[4:]) for name in os.listdir(folder) if name.startswith("run-") and name[4:].isdecimal()]
    return os.path.join(folder, f"run-{max(runs, default=1)}")


def _next_run(folder: str) -> str:
    head, _, number = folder.rpartition("-")
    return f"{head}-{int(number) + 1}"


def _tree_pulled(result: Pulled) -> TreePulled:
    return TreePulled(
        package=result.package,
        version=result.version,
        path=result.tree,
        already=result.already,
        tree_bytes=result.tree_bytes,
        from_disk_bytes=result.from_disk_bytes,
        resumed_bytes=result.resumed_bytes,
        from_relays={name: tally["payload_bytes"] for name, tally in result.from_relays.items()},
        encodings=result.encodings,
        fallbacks=result.fallbacks,
        wire_bytes=result.wire_bytes,
        seconds=result.seconds,
    )


def _current_path(root: str) -> str:
    """The folder that `current` names; empty where there is none."""
    target = platform.current_target(root)
    return "" if target is None else os.path.normpath(os.path.join(root, target))


def _existing_parent(path: str) -> str:
    while not os.path.isdir(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


def _is_below(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder
