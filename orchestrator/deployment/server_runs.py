"""What runs on the server: scripts as they were planned, or commands, each by a runner that outlives us.

    <folder>/scripts/<key>/                      a script's folder as it was when the deployment began
    <folder>/runs/<step>~<machine>~<action>~<attempt>/   one attempt (`agent.runs.runs`), or one such folder per command in it
    <folder>/logs/<step>~<machine>~<action>~<attempt>.log    what it printed, masked

`folder` is the deployment's own. Each attempt is an operation of its own, numbered on for ever: nothing that was begun
is ever begun again, and a later `run` of the same operation takes the next number.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from agent.orders.operation_id import OperationId
from agent.runs import runs
from agent.runs.runs import Outcome, RunSpec
from agent.runs.scripts import base_environment, command_for
from orchestrator.fleet.logs import LogFile
from orchestrator.journal.events import ServerRunDispatched, ServerRunEnded
from orchestrator.releases.release import FileChangedError, check_script, read_beside, write_snapshot
from orchestrator.trust.secrets import variable_of
from relay.errors import StoreError, UsageError, WaystationError
from relay.folders import make_folder
from relay.support.durable import sync_folder
from relay.support.together import together

if TYPE_CHECKING:
    from orchestrator.journal.recorder import Recorder
    from orchestrator.plan.plan import FrozenFile, ServerRun
    from orchestrator.trust.secrets import SecretStore

PROBE: Final = "probe"
"""Action of a look at a rotation. It changes nothing, so it is not recorded."""

_LOOK_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class RunResult:
    """What came of a run.

    Attributes:
        ok: it ended with 0.
        exit_status: of the last attempt; negative for the signal that ended it, None where there is none.
        reason: a sentence for a person; empty where it is ok.
        log_path: what the last attempt printed; there is no file where it printed nothing.
        state: as an agent's report has it: `unknown` means that it began, and its end was not seen.
        operation: id of the last attempt.
    """

    ok: bool
    exit_status: int | None
    reason: str
    log_path: str
    state: Literal["done", "failed", "stopped", "unknown"]
    operation: OperationId


class ServerRuns:
    """The server's own scripts and commands of one deployment."""

    def __init__(self, folder: str, secrets: SecretStore, recorder: Recorder) -> None:
        """Work below `folder`, which belongs to one deployment and is made where it is not there.

        `recorder` has an attempt before anything of it is started, and its end before anything follows from that.
        """
        self._folder = os.path.abspath(folder)
        self._secrets = secrets
        self._recorder = recorder
        self._running: set[OperationId] = set()

    async def stop_all(self, *, spared: Collection[str] = ()) -> None:
        """End what runs now, but for these actions: TERM, and KILL where that does not do. What awaits it hears of it."""
        running = [operation for operation in self._running if operation.action not in spared]
        folders = [folder for operation in running for folder in _runners(self.run_folder(operation))]
        await together([asyncio.to_thread(runs.stop, folder) for folder in folders])

    # --- scripts

    def freeze(self, files: Iterable[FrozenFile]) -> None:
        """Copy each script and what stands beside it: from here on nothing that is edited there changes what runs.

        What was copied before stays as it is. Blocking.

        Raises:
            FileChangedError: a script is not the one that was planned.
            RefusedError: its folder holds too much, or cannot be read.
            StoreError: our own folder cannot be written.
        """
        by_folder: dict[str, list[FrozenFile]] = {}
        for file in files:
            by_folder.setdefault(self._snapshot(file), []).append(file)
        for snapshot, files_there in by_folder.items():
            if not os.path.isdir(snapshot):
                self._copy(files_there, snapshot)
            for file in files_there:
                self._frozen(file)

    def _snapshot(self, file: FrozenFile) -> str:
        """One for all scripts of a folder, as they may use each other and what else is there."""
        source = os.path.dirname(os.path.join(file.folder, file.path))
        key = hashlib.sha256(os.fsencode(source)).hexdigest()[:16]
        return os.path.join(self._folder, "scripts", key)

    def _copy(self, files: Iterable[FrozenFile], snapshot: str) -> None:
        found = {each.name: each for file in files for each in read_beside(file, self._secrets.files)}
        temporary = f"{snapshot}.incoming"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            self._make_folder("scripts")
            os.mkdir(temporary, 0o700)
            write_snapshot(temporary, found.values())
            # As a whole or not at all: a crash must not leave half of what a script needs.
            os.rename(temporary, snapshot)
            sync_folder(os.path.dirname(snapshot))
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise StoreError(f"cannot keep a copy of scripts in {snapshot}: {error.strerror}") from error

    def _frozen(self, file: FrozenFile) -> str:
        """The path of the copy. Raises `FileChangedError` where it is not there or not what was planned."""
        path = os.path.join(self._snapshot(file), os.path.basename(file.path))
        try:
            with open(path, "rb") as opened:
                check_script(file, opened.read())
        except OSError as error:
            raise FileChangedError(f"the copy of the script {file.path} is gone: {error.strerror}") from error
        return path

    # --- running

    async def run(
        self,
        run: ServerRun,
        operation: OperationId,
        extra: Mapping[str, str],
        *,
        begun: Collection[int] = (),
        goes_on: bool = False,
    ) -> RunResult:
        """Run it until it succeeds or its attempts are used up.

        If an earlier attempt of the same operation still runs (it outlived the process that started it), its end is
        awaited first. Only a failure is repeated; an unknown outcome only where the run is idempotent. If the task that
        awaits this is cancelled, what runs runs on.

        Args:
            run: what to run; its script was frozen.
            operation: its id; the attempt is the next that never was.
            extra: variables that are only known now; they win over those of the run. ATTEMPT and DEPLOYMENT are set
                where neither names them.
            begun: the attempts at it that a process which died recorded: the last of them is taken up.
            goes_on: where it is done well, the caller records at once what follows from that: so its end comes into the
                same commit, before it.

        Raises:
            StoreError: our own folder or the journal cannot be written.
        """
        made = len(begun)
        last = replace(operation, attempt=max(begun, default=0))
        if begun and (found := await self.take_up(run, last, extra)) is not None:
            if found.ok or made >= run.attempts or not _may_repeat(run, found):
                return found
            await asyncio.sleep(run.delay)
        while True:
            made += 1
            await self._end_of_last(operation)
            attempt = await asyncio.to_thread(self._next_attempt, operation)
            await self._record(attempt, ServerRunDispatched(str(attempt), attempt.action, attempt.machine))
            result = await self._attempt(run, attempt, extra, made, goes_on=goes_on)
            if made >= run.attempts or not _may_repeat(run, result):
                return result
            await asyncio.sleep(run.delay)

    async def take_up(self, run: ServerRun, operation: OperationId, extra: Mapping[str, str]) -> RunResult | None:
        """What became of this attempt, awaiting its end; None where it was never begun.

        For what a dead process left. Nothing is begun a second time; of commands, those that never began are.
        The end is recorded (again, where the crash came right after it). Raises as `run` does.
        """
        if operation.attempt not in await asyncio.to_thread(self._attempts, operation):
            return None
        return await self._attempt(run, operation, extra, 1)

    async def _attempt(
        self, run: ServerRun, operation: OperationId, extra: Mapping[str, str], made: int, *, goes_on: bool = False
    ) -> RunResult:
        log = os.path.join(self._folder, "logs", f"{operation.file_name}.log")
        self._running.add(operation)
        try:
            outcome = await self._follow(run, operation, extra, log)
        finally:
            self._running.discard(operation)
        ended = ServerRunEnded(
            str(operation),
            outcome.state,
            operation.machine,
            reason=outcome.reason,
            exit_status=outcome.exit_status,
            started=outcome.started,
            ended=outcome.ended,
            log_bytes=outcome.output_bytes,
        )
        if goes_on and outcome.state == "done":
            self._recorder.later(operation.machine, ended)
        else:
            await self._record(operation, ended)
        ok = outcome.state == "done"
        return RunResult(
            ok=ok,
            exit_status=outcome.exit_status,
            reason="" if ok else _reason(run, outcome, made, log),
            log_path=log,
            state=outcome.state,
            operation=operation,
        )

    async def _record(self, operation: OperationId, event: ServerRunDispatched | ServerRunEnded) -> None:
        if operation.action != PROBE:
            await self._recorder.record(event)

    async def _follow(self, run: ServerRun, operation: OperationId, extra: Mapping[str, str], log: str) -> Outcome:
        """Start what did not begin yet of an attempt, and see all of it through."""
        folder = self.run_folder(operation)
        try:
            environment = await asyncio.to_thread(self._environment, run, operation, extra)
            series = await asyncio.to_thread(self._series, run, folder)
        except WaystationError as error:
            return Outcome("failed", None, str(error), 0.0, 0.0, 0)
        names = tuple(variable_of(name) for name in run.secrets)
        spent, printed, output = 0.0, 0, self._open_log(log)
        outcome = Outcome("done", 0, "", 0.0, 0.0, 0)
        for number, (place, cwd, argv) in enumerate(series, 1):
            left = max(run.timeout - spent, 0.001)
            spec = RunSpec(argv=argv, cwd=cwd, timeout=left, secret_names=names, stall=run.stall)
            outcome = await _see_through(place, spec, environment, output, printed)
            spent += max(outcome.ended - outcome.started, 0.0)
            printed += outcome.output_bytes
            if outcome.state != "done":
                about = f"{argv[0]} (command {number} of {len(series)}): " if len(series) > 1 else ""
                outcome = msgspec.structs.replace(outcome, reason=about + outcome.reason)
                break
        return msgspec.structs.replace(outcome, output_bytes=printed)

    def _environment(self, run: ServerRun, operation: OperationId, extra: Mapping[str, str]) -> dict[str, str]:
        """The whole of what it sees: nothing else of our own environment than where programs, home and language are."""
        given = {"DEPLOYMENT": operation.deployment, "ATTEMPT": str(operation.attempt), **run.variables, **extra}
        # Secrets last: what is masked must be what it sees.
        return {**base_environment(), **given, **self._secrets.environment(run.secrets)}

    def _series(self, run: ServerRun, folder: str) -> list[tuple[str, str, tuple[str, ...]]]:
        """The runner's folder, the working folder, and the command line of each process, in order."""
        if run.script is not None:
            script = self._frozen(run.script)
            return [(folder, os.path.dirname(script), tuple(command_for(script, {})))]
        return [(os.path.join(folder, str(number)), folder, argv) for number, argv in enumerate(run.commands, 1)]

    # --- folders

    def run_folder(self, operation: OperationId) -> str:
        """Of one attempt."""
        return os.path.join(self._folder, "runs", operation.file_name)

    def _open_log(self, path: str) -> LogFile:
        try:
            self._make_folder("logs")
            return LogFile(path)
        except OSError as error:
            raise StoreError(f"cannot write the log {path}: {error.strerror}") from error

    def _make_folder(self, name: str) -> None:
        """One of our three, for this user alone; once it is there, a power cut leaves it. Raises `OSError`."""
        for made in make_folder(os.path.join(self._folder, name), mode=0o700):
            sync_folder(os.path.dirname(made))

    def _attempts(self, operation: OperationId) -> list[int]:
        """Numbers of the attempts that have a folder, in order."""
        all_of_it = operation.file_name.rpartition("~")[0]
        found = (name.rpartition("~") for name in _names(os.path.join(self._folder, "runs")))
        return sorted(int(number) for first, _, number in found if first == all_of_it and number.isdecimal())

    def _next_attempt(self, operation: OperationId) -> OperationId:
        """The id of an attempt that never was, its folder made. Raises `StoreError`.

        An attempt without a folder counts as never begun: so a power cut after its start must not take the folder away.
        """
        number = max(self._attempts(operation), default=0)
        try:
            self._make_folder("runs")
            while True:
                number += 1
                attempt = replace(operation, attempt=number)
                with contextlib.suppress(FileExistsError):
                    os.mkdir(self.run_folder(attempt), 0o700)
                    sync_folder(os.path.join(self._folder, "runs"))
                    return attempt
        except OSError as error:
            raise StoreError(f"cannot begin {operation}: {error.strerror}") from error

    async def _end_of_last(self, operation: OperationId) -> None:
        """Nothing of the last attempt runs any more: what has a runner is awaited, what lost its runner is ended."""
        for number in (await asyncio.to_thread(self._attempts, operation))[-1:]:
            for folder in _runners(self.run_folder(replace(operation, attempt=number))):
                if await _until_ended(folder) == "unknown":
                    await asyncio.to_thread(runs.stop, folder)


async def _see_through(
    folder: str, spec: RunSpec, environment: Mapping[str, str], output: LogFile, base: int
) -> Outcome:
    """One process from its start (or from where it is) to its end."""

    def take(offset: int, piece: bytes) -> None:
        # A full disk costs the log (the runner's own file may still have it), never the run.
        with contextlib.suppress(OSError):
            output.take(base + offset, piece)

    try:
        # Harmless where it has begun.
        await asyncio.to_thread(runs.launch, folder, spec, environment)
        return await runs.watch(folder, take)
    except (UsageError, StoreError) as error:
        return Outcome("failed", None, str(error), 0.0, 0.0, 0)


async def _until_ended(folder: str) -> runs.RunState:
    while (state := await asyncio.to_thread(runs.state_of, folder)) == "running":  # noqa: ASYNC110 - its runner ends it
        await asyncio.sleep(_LOOK_SECONDS)
    return state


def _may_repeat(run: ServerRun, result: RunResult) -> bool:
    return result.state == "failed" or (result.state == "unknown" and run.idempotent)


def _reason(run: ServerRun, outcome: Outcome, made: int, log: str) -> str:
    of = f" (attempt {made} of {run.attempts})" if run.attempts > 1 else ""
    see = f"; see {log}" if outcome.output_bytes else ""
    return f"{run.name!r} on the server{of}: {outcome.reason}{see}"


def _runners(attempt: str) -> list[str]:
    """The folders of an attempt's processes: its own, or of commands those that are numbered in it."""
    return [os.path.join(attempt, name) for name in sorted(_names(attempt)) if name.isdigit()] or [attempt]


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
