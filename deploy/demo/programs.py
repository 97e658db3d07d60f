"""Commands that run to their end and services that stay, none of which outlives the demo."""

from __future__ import annotations

import asyncio
import os
import random
import shlex
import signal
import socket
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_STOP_SECONDS = 5.0


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

    async def run(self, command: Command, folder: Path | None = None) -> str:
        """Run to the end, in the demo's folder or another. Returns standard output; raises `DemoError` for an exit code
        not 0.
        """
        process = await self._spawn(command, stdout=PIPE, stderr=PIPE, folder=folder)
        try:
            output, errors = await process.communicate()
        finally:
            await _end(process, signal.SIGKILL)
        if process.returncode:
            told = (errors.decode(errors="replace").strip() or output.decode(errors="replace").strip())[-2000:]
            raise DemoError(f"exit code {process.returncode}: {command}\n{told}")
        return output.decode()

    async def follow(self, command: Command, say: Callable[[str], None], folder: Path) -> None:
        """Run to the end in `folder`, and say each line as it comes. Raises `DemoError` for an exit code not 0."""
        process = await self._spawn(command, stdout=PIPE, stderr=STDOUT, folder=folder)
        last: deque[str] = deque(maxlen=20)
        try:
            assert process.stdout is not None  # noqa: S101 - it is a pipe
            async for line in process.stdout:
                last.append(line.decode(errors="replace").rstrip())
                say(last[-1])
            await process.wait()
        finally:
            await _end(process, signal.SIGKILL)
        if process.returncode:
            raise DemoError("\n".join([f"exit code {process.returncode}: {command}", *last]))

    async def start(self, name: str, command: Command) -> None:
        """Start a service under `name`; what it prints goes to the end of its log."""
        with self.log(name).open("ab") as log:
            self._services[name] = await self._spawn(command, stdout=log.fileno(), stderr=STDOUT)

    def log(self, name: str) -> Path:
        """The file that takes what the service prints."""
        return self.folder / "logs" / f"{name}.log"

    def is_running(self, name: str) -> bool:
        return self._services[name].returncode is None

    async def kill(self, name: str) -> int:
        """SIGKILL: nothing of it is left on return. Returns its process id."""
        process = self._services.pop(name)
        await _end(process, signal.SIGKILL)
        return process.pid

    async def close(self) -> None:
        """End every service."""
        await asyncio.gather(*(_end(process, signal.SIGTERM) for process in self._services.values()))
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
        )


async def end_what_is_left(folder: Path) -> None:
    """End every process that names `folder` on its command line: applications that agents started live on by design."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for _ in range(int(_STOP_SECONDS / 0.05)):
            left = _naming(folder)
            if not left:
                return
            for id in left:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(id, number)
            await asyncio.sleep(0.05)


def _naming(folder: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int(entry.name) != os.getpid() and os.fsencode(folder) + b"/" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


async def _end(process: Process, number: signal.Signals) -> None:
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        process.send_signal(number)
    try:
        await asyncio.wait_for(process.wait(), _STOP_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()


async def together(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All at once; the first that fails ends the others, and its error is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as errors:
        raise _first(errors) from None
    return [task.result() for task in tasks]


async def in_thread(call: Callable[..., T], *arguments: object) -> T:
    """Run in a thread, and let it come to its end even when nobody waits for it any more: it writes in the folder."""
    work = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        raise


def _first(error: BaseException) -> BaseException:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1, free for TCP and UDP, that stay free while their owner is away.

    They lie below those that the kernel hands to outgoing connections (32768 and up, ip(7)).
    """
    ports: list[int] = []
    with ExitStack() as held:
        while len(ports) < count:
            port = random.randrange(20_000, 32_000)  # noqa: S311 - no secret
            tcp = held.enter_context(socket.socket(type=socket.SOCK_STREAM))
            udp = held.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            with suppress(OSError):
                tcp.bind(("127.0.0.1", port))
                udp.bind(("127.0.0.1", port))
                ports.append(port)
    return ports
