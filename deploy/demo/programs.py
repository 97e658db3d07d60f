"""Commands that run to their end and services that stay, none of which outlives the demo."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import TypeVar

T = TypeVar("T")

_STOP_SECONDS = 5.0


def program(name: str) -> Path | None:
    """Where a program is; None where it is not installed."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin:/sbin")
    return Path(found) if found else None


class DemoError(Exception):
    """The demo cannot go on; the message is for people."""


@dataclass(frozen=True, slots=True)
class Command:
    """A program with its arguments, and the variables of the environment that belong to it."""

    program: Path
    arguments: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """As one would type it, the program by its bare name."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.variables]
        return " ".join([*variables, self.program.name, *map(shlex.quote, self.arguments)])

    def environment(self) -> dict[str, str]:
        """The surroundings without what would make the demo another one: settings of ours, and proxies."""
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith("WAYSTATION_") and not k.lower().endswith("_proxy")
        }
        return kept | dict(self.variables)


class Processes:
    """All processes of the demo, in sessions of their own: Ctrl-C reaches the demo alone, and that ends them in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._services: dict[str, Process] = {}
        self._begun: dict[str, int] = {}
        """Where the log of a service begins that was started last."""

    async def run(self, command: Command, folder: Path | None = None, say: Callable[[str], None] | None = None) -> str:
        """Run to the end, in the demo's folder or another. Returns standard output.

        `say` gets each line as it comes, those of standard error, too. Raises `DemoError` for an exit code not 0.
        """
        lines = []
        with TemporaryFile() as errors:
            stderr = STDOUT if say else errors.fileno()
            process = await self._spawn(command, stdout=PIPE, stderr=stderr, folder=folder)
            try:
                assert process.stdout is not None  # noqa: S101 - it is a pipe
                async for line in process.stdout:
                    lines.append(line.decode())
                    if say:
                        say(lines[-1])
                await process.wait()
            finally:
                await end(process, signal.SIGKILL)
            errors.seek(0)
            told = errors.read().decode(errors="replace").strip() or "".join(lines).strip()
        if process.returncode:
            raise DemoError(f"exit code {process.returncode}: {command}\n{told[-2000:]}")
        return "".join(lines)

    async def run_and_kill(self, command: Command, moment: str, folder: Path, say: Callable[[str], None]) -> int:
        """Run until it prints a line with `moment` in it, then SIGKILL. Returns its process id.

        Raises `DemoError` where it ends before.
        """
        process = await self._spawn(command, stdout=PIPE, stderr=STDOUT, folder=folder)
        try:
            assert process.stdout is not None  # noqa: S101 - it is a pipe
            async for line in process.stdout:
                say(line.decode())
                if moment in line.decode():
                    return process.pid
            raise DemoError(f"it ended before {moment!r}: {command}")
        finally:
            await end(process, signal.SIGKILL)

    async def start(self, name: str, command: Command) -> None:
        """Start a service under `name`; what it prints goes to the end of its log."""
        with self.log(name).open("ab") as log:
            self._begun[name] = log.tell()
            self._services[name] = await self._spawn(command, stdout=log.fileno(), stderr=STDOUT)

    def log(self, name: str) -> Path:
        """The file that takes what the service prints."""
        return self.folder / "logs" / f"{name}.log"

    async def until_said(self, name: str, what: bytes, seconds: float = 20.0) -> None:
        """Return once the service has printed it. Raises `DemoError`."""

        async def said() -> bool:
            if self._services[name].returncode is not None:
                raise DemoError(f"{name} ended at its start")
            return what in self.log(name).read_bytes()[self._begun[name] :]

        await until(said, seconds, f"{name} is not ready")

    async def kill(self, name: str) -> int:
        """SIGKILL: nothing of it is left on return. Returns its process id."""
        process = self._services.pop(name)
        await end(process, signal.SIGKILL)
        return process.pid

    async def close(self) -> None:
        """End every service."""
        await asyncio.gather(*(end(process, signal.SIGTERM) for process in self._services.values()))
        self._services.clear()

    async def _spawn(self, command: Command, *, stdout: int, stderr: int, folder: Path | None = None) -> Process:
        return await asyncio.create_subprocess_exec(
            command.program,
            *command.arguments,
            cwd=folder or self.folder,
            env=command.environment(),
            stdin=DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            limit=1 << 24,
        )


async def end_what_is_left(folder: Path) -> None:
    """End every process that names `folder` on its command line: applications that agents started live on by design."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for _ in range(int(_STOP_SECONDS / 0.05)):
            left = _naming(folder)
            for id in left:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(id, number)
            if not left:
                return
            await asyncio.sleep(0.05)


def _naming(folder: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int(entry.name) != os.getpid() and os.fsencode(folder) + b"/" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


async def end(process: Process, number: signal.Signals) -> None:
    """End a process by a signal, and by SIGKILL where that does not help."""
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        process.send_signal(number)
    try:
        await asyncio.wait_for(process.wait(), _STOP_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()


async def until(is_so: Callable[[], Awaitable[bool]], seconds: float, otherwise: str) -> None:
    """Return once it is so. Raises `DemoError` after `seconds`, with what is `otherwise`."""
    try:
        async with asyncio.timeout(seconds):
            while not await is_so():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise DemoError(f"{otherwise} after {seconds:g} s") from None


async def in_thread(call: Callable[..., T], *arguments: object) -> T:
    """Run in a thread, and let it come to its end even when its caller is cancelled: it writes in the folder."""
    work = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        raise
