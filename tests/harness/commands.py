"""`waystation …` as a person or a script calls it: a process of its own, its words, its exit code, what it prints."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAYSTATION = Path(sys.executable).with_name("waystation")
"""The command as it is installed beside this interpreter."""
SECONDS = 60.0
"""After which a command counts as hung."""


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


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WAYSTATION_") and k != "NO_COLOR"}
    return kept | {"WAYSTATION_HOME": str(home)} | more


def begin(home: Path, *words: object, cwd: str | None = None, **more: str) -> subprocess.Popen[str]:
    """Start a command; its output goes to pipes. `more` is added to its environment."""
    return subprocess.Popen(
        [WAYSTATION, *map(str, words)],
        cwd=cwd,
        env=environment(home, **more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = SECONDS) -> Done:
    try:
        out, err = process.communicate(timeout=seconds)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return Done(process.returncode, out, err)


def run(home: Path, *words: object, **more: str) -> Done:
    """Run a command to its end."""
    return finish(begin(home, *words, **more))


class Serving:
    """A relay in a process of its own, started by `command` (which ends in `relay serve …`), that said it is ready."""

    def __init__(self, home: Path, command: Sequence[object], more: Mapping[str, str]) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.log = home / f"relay-{time.monotonic_ns()}.log"
        self.said = ""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                list(map(str, command)),
                env=environment(home, **more),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        if not self.said.startswith("relay ready at "):
            self.process.kill()
            rest = self.process.communicate()[0]
            raise AssertionError(f"the relay did not start: {self.said}{rest}{self.log.read_text()}")

    @property
    def url(self) -> str:
        return self.said.split()[-1]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def terminate(self) -> None:
        """Ask it to stop, and do not wait."""
        self.process.terminate()

    def end(self, seconds: float = SECONDS) -> Done:
        """Wait for its end."""
        done = finish(self.process, seconds)
        return Done(done.code, self.said + done.out, self.log.read_text())

    def stop(self) -> Done:
        """SIGTERM, as an operator would."""
        self.terminate()
        return self.end()

    def kill(self) -> None:
        """SIGKILL, and wait until the kernel has taken everything back."""
        self.process.kill()
        assert self.end().code == -signal.SIGKILL, "there was nothing left to kill"


@contextlib.contextmanager
def serving(home: Path, *options: object, under: Sequence[object] = (), **more: str) -> Iterator[Serving]:
    """`waystation relay serve` on a free port of loopback (unless `options` say otherwise), as a process of its own.

    Args:
        home: its $WAYSTATION_HOME, and where its log goes.
        options: of the command.
        under: a program and its arguments that start it in its turn, without forking.
        more: environment.
    """
    listen = () if {"--listen", "--config"} & set(options) else ("--listen", "127.0.0.1:0")
    relay = Serving(home, [*under, WAYSTATION, "relay", "serve", *listen, *options], more)
    try:
        relay.wait_until_ready()
        yield relay
    finally:
        if relay.is_alive:
            relay.process.kill()
            relay.process.communicate()


def wait_for(holds: Any, seconds: float = 20.0, pause: float = 0.002) -> None:
    """Look again and again until the function `holds` says True; an assertion error after `seconds`."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(pause)
