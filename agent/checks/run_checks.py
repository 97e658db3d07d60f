"""Is it well? Checks of what runs, each repeated until it has held for as long as asked, or its deadline has passed.

Used by agents and, for checks `from: server`, by the orchestrator.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from agent import platform
from agent.checks.checked_text import contains, plain, read_text, trimmed
from agent.orders.orders import CommandCheck, HttpCheck, ServiceCheck, TcpCheck, TimedCheck
from relay.protocol.credentials import system_trust
from relay.terminal.text import printable

if TYPE_CHECKING:
    from aiohttp import ClientSession

BODY_MAX = 1 << 20
"""Bytes of an HTTP answer that are read; a longer one fails the check."""
LAST_TRY = 0.05
"""Seconds that must be left for another try: one without time would only hide what the last one found."""
PAUSE_MIN, PAUSE_MAX = 0.05, 1.0
"""Seconds between two tries: short at first, when most services come up, and then no burden."""
_SHOWN_CHARS = 200
_OUTPUT_KEPT = 4096


@dataclass(frozen=True, slots=True)
class Said:
    """How one try went. `text` is for people, one line."""

    ok: bool
    text: str


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What each check said last, in their order; and what those said that did not hold."""

    texts: tuple[str, ...]
    failed: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.failed


async def run_checks(
    checks: Sequence[TimedCheck],
    *,
    environment: Mapping[str, str] | None = None,
    service_command: Sequence[str] | None = None,
    folder: str | None = None,
) -> CheckResult:
    """Make all `checks` at once; it takes as long as the slowest. Never raises for what is checked.

    Args:
        checks: what must hold.
        environment: of commands; by default `agent.runs.scripts.base_environment`.
        service_command: how the service manager is called (`{action}` and `{service}` are filled in); by default the
            system's.
        folder: that commands are started in; by default the present one.
    """
    async with AsyncExitStack() as stack:
        tester = _Tester(stack, environment, service_command, folder)
        said = await asyncio.gather(*(_hold(check, tester) for check in checks))
    return CheckResult(tuple(each.text for each in said), tuple(each.text for each in said if not each.ok))


async def _hold(timed: TimedCheck, tester: _Tester) -> Said:
    """Try until it held for `lasting` seconds without a break."""
    end = time.monotonic() + timed.deadline
    held_since: float | None = None
    pause = PAUSE_MIN
    said = Said(ok=False, text=f"{_name(timed.check)}: there was no time for a single try")
    tried = False
    while (left := end - time.monotonic()) > (LAST_TRY if tried else 0.0):
        tried = True
        said = await tester.test(timed.check, min(timed.timeout, left))
        now = time.monotonic()
        held_since = (held_since or now) if said.ok else None
        if held_since is not None and now - held_since >= timed.lasting:
            return said
        # The last try of a long hold must come at its end, not a pause later.
        rest = timed.lasting - (now - held_since) if held_since is not None else pause
        await asyncio.sleep(max(0.0, min(pause, rest, end - now)))
        pause = min(pause * 1.5, PAUSE_MAX)
    if said.ok:
        return Said(ok=False, text=f"{said.text}; well, but not for {timed.lasting:g} s within {timed.deadline:g} s")
    return Said(ok=False, text=f"{said.text}; given up after {timed.deadline:g} s")


@dataclass(eq=False)
class _Tester:
    """Makes single tries."""

    stack: AsyncExitStack
    environment: Mapping[str, str] | None
    service_command: Sequence[str] | None
    folder: str | None
    session: ClientSession | None = None

    async def test(self, check: HttpCheck | TcpCheck | CommandCheck | ServiceCheck, seconds: float) -> Said:
        """One try that takes at most `seconds`."""
        name = _name(check)
        try:
            async with asyncio.timeout(seconds):
                match check:
                    case HttpCheck():
                        said = await self._http(check)
                    case TcpCheck():
                        said = await _tcp(check)
                    case CommandCheck():
                        said = await self._command(check.argv)
                    case ServiceCheck():
                        said = await self._service(check)
        except TimeoutError:
            said = Said(ok=False, text=f"no answer within {seconds:.3g} s")
        # A try may die of anything: what is checked is not proven well, and the reason is kept for people.
        except Exception as error:
            said = Said(ok=False, text=_one_line(str(error)) or type(error).__name__)
        return Said(said.ok, f"{name}: {said.text}")

    async def _http(self, check: HttpCheck) -> Said:
        session = self._http_session()
        # What this system trusts now: aiohttp's own context is of the time when the agent was started.
        trust = system_trust() if check.url.startswith("https:") else True
        async with session.get(check.url, allow_redirects=False, ssl=trust) as response:
            if response.status != check.status:
                return Said(ok=False, text=f"status {response.status}, expected {check.status}")
            body = bytearray()
            async for piece in response.content.iter_any():
                body += piece
                if len(body) > BODY_MAX:
                    return Said(ok=False, text=f"answers with more than {BODY_MAX} bytes")
            declared = response.charset
        return judge_body(check, read_text(bytes(body), declared))

    def _http_session(self) -> ClientSession:
        if self.session is None:
            import aiohttp

            from relay.network.addresses import connector

            # Each try is a visitor of its own: new connection, no cookies, no proxy, nothing remembered.
            self.session = aiohttp.ClientSession(
                connector=connector(fresh=True),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
                headers={"Accept-Encoding": "identity"},
            )
            self.stack.push_async_callback(self.session.close)
        return self.session

    async def _service(self, check: ServiceCheck) -> Said:
        said = await self._command(platform.service_command("is-active", check.name, self.service_command or ()))
        return said if not said.ok else Said(ok=True, text="active")

    async def _command(self, argv: Sequence[str]) -> Said:
        from agent.runs.scripts import base_environment

        environment = base_environment() if self.environment is None else dict(self.environment)
        environment[platform.RUN] = secrets.token_hex(16)
        async with _output() as (output, writer):
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=writer,
                stderr=writer,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
            )
            writer.close()
            try:
                status = await process.wait()
            except asyncio.CancelledError:
                await asyncio.shield(asyncio.to_thread(_kill, process, environment[platform.RUN]))
                await asyncio.shield(process.wait())
                raise
            await output.end()
        last = output.last_line()
        return Said(status == 0, _ending(status) + (f" ({last})" if last else ""))


class _Tail:
    """Reads a pipe so that the writer never waits, and keeps the end."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self._kept = b""
        self._task = asyncio.create_task(self._read(stream))

    async def _read(self, stream: asyncio.StreamReader) -> None:
        while piece := await stream.read(1 << 16):
            self._kept = (self._kept + piece)[-_OUTPUT_KEPT:]

    async def end(self) -> None:
        """The command is over; a daemon that it left may hold the pipe open, and is not waited for."""
        await asyncio.wait({self._task}, timeout=0.2)

    def stop(self) -> None:
        self._task.cancel()

    def last_line(self) -> str:
        lines = [line for line in read_text(self._kept).splitlines() if line.strip()]
        return _one_line(lines[-1]) if lines else ""


@asynccontextmanager
async def _output() -> AsyncIterator[tuple[_Tail, IO[bytes]]]:
    """A pipe of our own: with asyncio's, a command is not over before the last process that inherited the pipe is."""
    reader, writer = (os.fdopen(end, mode, buffering=0) for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
    stream = asyncio.StreamReader()
    with writer:
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), reader
        )
        tail = _Tail(stream)
        try:
            yield tail, writer
        finally:
            tail.stop()
            transport.close()


def _kill(process: asyncio.subprocess.Process, run: str) -> None:
    """It, its group and what it started."""
    with suppress(ProcessLookupError):
        if not platform.end_lost(run, platform.process_mark(process.pid)):
            process.kill()


async def _tcp(check: TcpCheck) -> Said:
    from relay.network.addresses import open_connection

    _, writer = await open_connection(check.host, check.port)
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return Said(ok=True, text="accepts connections")


def judge_body(check: HttpCheck, text: str) -> Said:
    """Whether an answer's body is what the check expects: pure."""
    shown = f"{_one_line(text)!r}"
    if check.expect is not None and trimmed(text) != trimmed(plain(check.expect)):
        return Said(ok=False, text=f"says {shown}, expected {check.expect[:_SHOWN_CHARS]!r}")
    if check.contains is not None and not contains(text, plain(check.contains)):
        return Said(ok=False, text=f"says {shown}, expected it to contain {check.contains[:_SHOWN_CHARS]!r}")
    return Said(ok=True, text=f"status {check.status}" + (f", says {shown}" if check.expect is not None else ""))


def _name(check: HttpCheck | TcpCheck | CommandCheck | ServiceCheck) -> str:
    match check:
        case HttpCheck():
            return _one_line(check.url)
        case TcpCheck():
            return f"{check.host}:{check.port}"
        case CommandCheck():
            return _one_line(" ".join(check.argv))
        case ServiceCheck():
            return f"service {check.name}"


def _ending(status: int) -> str:
    return f"ended by signal {-status}" if status < 0 else f"exit status {status}"


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))[:_SHOWN_CHARS]
