"""`waystation …` as a person, a script or an init system calls it: a process of its own, ended through its own handle.

Most are forked from a warm process (`harness/warm.py`); `cold` ones start an interpreter, for tests of just that.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, Self

from harness.paths import ROOT
from harness.warm import TELL_WHERE

WAYSTATION = Path(sys.executable).with_name("waystation")
"""The command as it is installed beside this interpreter."""
SECONDS = 120.0
"""After which a command counts as hung: generous, as a machine may do much else."""


AUDIT_EVENT = "waystation.process"
"""Raised, as `sys.audit` knows it, where a child of the warm process is started."""


class Warm:
    """The warm process of this test process. It ends, with all that it started, when this one does."""

    def __init__(self) -> None:
        self.started = 0
        self.cpu_seconds = 0.0
        """That its children took, of those that have ended."""
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        self._address = os.path.join(self._folder.name, "socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self._address)
            listener.listen(128)
            self._process = subprocess.Popen(
                # -P: the folder of this file, in which a `dns` lies, is none to import from.
                [sys.executable, "-P", Path(__file__).with_name("warm.py"), str(listener.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                cwd=ROOT,
                start_new_session=True,
            )

    def start(self, request: dict[str, object], descriptors: Sequence[int]) -> tuple[int, socket.socket]:
        """Its id, and the connection over which its end is told."""
        sys.audit(AUDIT_EVENT)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(SECONDS)
        connection.connect(self._address)
        socket.send_fds(connection, [json.dumps(request).encode()], descriptors)
        self.started += 1
        return json.loads(connection.recv(100)), connection


@cache
def warm() -> Warm:
    return Warm()


def forked_seconds() -> float:
    """Of processor time, in children of the warm process that have ended."""
    return warm().cpu_seconds if warm.cache_info().currsize else 0.0


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The document that it printed, after it ended well."""
        assert self.code == 0, f"exit code {self.code}: {self.err}"
        return json.loads(self.out)


class _Child:
    """A child of the warm process, with as much of `subprocess.Popen` as `Process` asks for."""

    def __init__(self, request: dict[str, object], descriptors: Sequence[int]) -> None:
        self.returncode: int | None = None
        self.pid, self._connection = warm().start(request, descriptors)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("waystation", timeout)
            with self._connection:
                told = self._connection.recv(100)
            assert told, "the warm process is gone"
            self.returncode, spent = json.loads(told)
            warm().cpu_seconds += spent
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            # It may end right now: then there is nobody to tell.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Process:
    """`waystation …` under way. What it prints goes to files, so that it never waits for a reader."""

    def __init__(
        self,
        home: Path,
        *words: object,
        cwd: os.PathLike[str] | str | None = None,
        under: Sequence[object] = (),
        cold: bool = False,
        new_session: bool = False,
        code: str = "",
        stdin: int | None = None,
        terminal: int | None = None,
        **more: str,
    ) -> None:
        """Start it.

        Args:
            home: its $WAYSTATION_HOME.
            words: of the command.
            cwd: the folder that it starts in.
            under: a program and its arguments that start it in its turn, without forking.
            cold: it starts as an interpreter of its own. So it does where `more` says how Python starts.
            new_session: it gets no signal that is meant for the group of the tests.
            code: Python to run in place of the command, with `words` as its arguments.
            stdin: the descriptor that it reads; nothing by default.
            terminal: the descriptor of one that it prints to, all of it, in place of the files.
            more: environment.
        """
        self.words = list(map(str, words))
        self._out: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - read when the command has ended
        self._err: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        argv = [*map(str, under), "-c" if code else str(WAYSTATION), *self.words]
        folder, variables = os.fspath(cwd or os.getcwd()), environment(home, **more)
        self._process: _Child | subprocess.Popen[bytes]
        with open(os.devnull, "rb") as nothing:
            outputs = [self._out.fileno(), self._err.fileno()] if terminal is None else [terminal, terminal]
            descriptors = [nothing.fileno() if stdin is None else stdin, *outputs]
            if under or cold or any(name.startswith("PYTHON") for name in more):
                streams = dict(zip(("stdin", "stdout", "stderr"), descriptors, strict=True))
                self._process = subprocess.Popen(
                    argv, cwd=folder, env=variables, **streams, start_new_session=new_session
                )
            else:
                request = {"argv": argv, "code": code, "cwd": folder, "environment": variables}
                request["new_session"] = new_session
                self._process = _Child(request, descriptors)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    @property
    def is_alive(self) -> bool:
        return self.returncode is None

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return _content(self._out)

    @property
    def err(self) -> str:
        return _content(self._err)

    def wait_for_line(self, start: str, seconds: float = SECONDS) -> str:
        """Wait until it has printed a line that starts so; the line.

        Raises:
            AssertionError: it ended first.
        """

        def line() -> str:
            return next((each for each in self.out.splitlines(keepends=True) if each.startswith(start)), "")

        wait_for(lambda: line().endswith("\n") or not self.is_alive, seconds)
        found = line()
        assert found, f"{self}: ended with {self.returncode}\n{self.out}{self.err}"
        return found.strip()

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def terminate(self) -> None:
        """Ask it to stop, and do not wait."""
        self.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> None:
        """Wait for its end, and let it be where it does not come.

        Raises:
            subprocess.TimeoutExpired: it still runs after `seconds`.
        """
        self._process.wait(seconds)

    def result(self, seconds: float = SECONDS) -> Done:
        """Wait for its end.

        Raises:
            AssertionError: it has not ended after `seconds`; with what its threads do.
        """
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            if isinstance(self._process, _Child):
                self.send_signal(TELL_WHERE)
                time.sleep(1.0)
            self.end()
            raise AssertionError(f"{self}: not ended after {seconds:.0f} s\n{self.out}{self.err}") from None
        except BaseException:
            self.end()
            raise
        return Done(code, self.out, self.err)

    def stop(self) -> Done:
        """SIGTERM, as an operator would."""
        self.terminate()
        return self.result()

    def kill(self) -> Done:
        """SIGKILL, and wait until the kernel has taken everything back."""
        self.send_signal(signal.SIGKILL)
        done = self.result()
        assert done.code == -signal.SIGKILL, f"there was nothing left to kill: {done}"
        return done

    def end(self) -> None:
        """Make sure that it is gone, however it went."""
        self.send_signal(signal.SIGKILL)
        self._process.wait(SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def __repr__(self) -> str:
        return f"waystation {' '.join(self.words)}"


def _content(file: IO[bytes]) -> str:
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()


def run(home: Path, *words: object, **how: Any) -> Done:
    """Run a command to its end; `how` as for `Process`."""
    return Process(home, *words, **how).result()


def forked(home: Path, code: str, *arguments: object, stdin: int | None = None) -> Process:
    """Python code in a child of the warm process, all modules of ours loaded; `arguments` are its `sys.argv[1:]`."""
    return Process(home, *arguments, code=code, stdin=stdin)


class Talk:
    """Python code in a child of the warm process, spoken with line by line: it reads what `say` says."""

    def __init__(self, home: Path, code: str, *arguments: object) -> None:
        reads, writes = os.pipe()
        try:
            self.process = forked(home, code, *arguments, stdin=reads)
        finally:
            os.close(reads)
        self._says = open(writes, "w")  # noqa: SIM115 - closed by `end`
        self._heard = 0

    def say(self, line: str) -> None:
        self._says.write(f"{line}\n")
        self._says.flush()

    def hear(self, count: int = 1) -> str:
        """The next `count` whole lines that it prints, as they are; fewer once it has ended."""

        def lines() -> list[str]:
            return self.process.out[self._heard :].splitlines(keepends=True)[:count]

        wait_for(lambda: sum(line.endswith("\n") for line in lines()) == count or not self.process.is_alive)
        heard = "".join(lines())
        self._heard += len(heard)
        return heard

    def end(self) -> Done:
        """Say no more, and wait for its end."""
        with contextlib.suppress(BrokenPipeError):
            self._says.close()
        return self.process.result()


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WAYSTATION_") and k != "NO_COLOR"}
    return kept | {"WAYSTATION_HOME": str(home)} | more


def wait_for(holds: Callable[[], bool], seconds: float = SECONDS, pause: float = 0.005) -> None:
    """Look again and again until the function `holds` says True.

    Raises:
        TimeoutError: it still does not after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s")
        time.sleep(pause)


async def eventually(holds: Callable[[], bool], seconds: float = SECONDS) -> None:
    """Wait until the function `holds` says True; an assertion error after `seconds`."""
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)
