"""A real HAProxy that hides nothing: it tries each request once, at one server, and writes down what came of it.

Its statistics page is what the rotation scripts of deploy/examples/haproxy use: a token is needed to take a
server out. Its runtime API is for the owner of the process alone: there an independent witness looks in.
"""

from __future__ import annotations

import asyncio
import csv
import os
import secrets
import signal
import socket
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import haproxy_log
from programs import DemoError, end, program, until

BACKEND = "web"
_START_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Checking:
    """How HAProxy finds out who is there: GET /health every `interval` milliseconds, `rise` times well to be UP, `fall`
    times badly to be DOWN.
    """

    interval: int = 200
    rise: int = 2
    fall: int = 2


def haproxy() -> Path | None:
    """The program; None where it is not installed."""
    return program("haproxy")


class Balancer:
    """HAProxy in front of `servers`, their addresses `HOST:PORT` by name. An asynchronous context manager.

    Attributes:
        token: the password of the statistics page; it also stands in `token_file`, mode 0600.
        log_file: what HAProxy writes of servers and requests.
    """

    def __init__(self, folder: Path, servers: Mapping[str, str], *, checking: Checking | None = None) -> None:
        self.servers = dict(servers)
        self.token = secrets.token_urlsafe(24)
        self.token_file = folder / "lb.token"
        self.log_file = folder / "haproxy.log"
        self._folder = folder
        self._checking = checking or Checking()
        self._ports = (0, 0)
        self._process: Process | None = None

    @property
    def url(self) -> str:
        """Where visitors find the application."""
        return f"http://127.0.0.1:{self._ports[0]}"

    @property
    def page(self) -> str:
        """The statistics page: `haproxy` among the environment's variables."""
        return f"http://127.0.0.1:{self._ports[1]}/stats"

    @property
    def runtime_api(self) -> Path:
        """The socket of the runtime API."""
        return self._folder / "haproxy.sock"

    async def __aenter__(self) -> Self:
        found = haproxy()
        if found is None:
            raise DemoError("haproxy is not installed (Debian: apt-get install haproxy)")
        self._folder.mkdir(parents=True, exist_ok=True)
        self.token_file.touch(mode=0o600)
        self.token_file.write_text(self.token)
        # HAProxy inherits bound sockets, so that no port can be taken by others in between.
        listening = [socket.create_server(("127.0.0.1", 0)) for _ in self._ports]
        try:
            self._ports = (listening[0].getsockname()[1], listening[1].getsockname()[1])
            await self._start(found, [each.fileno() for each in listening])
        finally:
            for each in listening:
                each.close()
        try:
            await until(self._answers, _START_SECONDS, "HAProxy does not answer")
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop()

    # --- what it says

    async def ask(self, command: str) -> str:
        """Its answer on the runtime API. Raises `OSError`."""
        # By a descriptor of its folder: the address of a socket holds 107 bytes, and temporary folders may be deep.
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            reader, writer = await asyncio.open_unix_connection(f"/proc/self/fd/{folder}/{self.runtime_api.name}")
        finally:
            os.close(folder)
        try:
            writer.write(f"{command}\n".encode())
            return (await reader.read()).decode()
        finally:
            writer.close()

    async def statuses(self) -> dict[str, str]:
        """What it says of each server at this moment: `UP`, `DOWN`, `DRAIN`, …"""
        return {row["svname"]: row["status"] for row in await self._rows(f"{BACKEND} 4 -1")}

    async def until_up(self, seconds: float = 20.0) -> None:
        """Return once it says `UP` of all servers. Raises `DemoError`."""

        async def all_are_up() -> bool:
            statuses = await self.statuses()
            return all(statuses.get(name) == "UP" for name in self.servers)

        await until(all_are_up, seconds, "HAProxy does not say UP of all servers")

    async def until_quiet(self, seconds: float = 5.0) -> None:
        """Return once every visitor has gone: a request's line is written after its answer. Raises `DemoError`."""

        async def all_have_gone() -> bool:
            return not any(int(row["scur"]) for row in await self._rows("shop 1 -1"))

        await until(all_have_gone, seconds, "there are still visitors")

    def log(self) -> haproxy_log.Log:
        """All that it has written so far. Raises `haproxy_log.LogError`."""
        with self.log_file.open(encoding="utf-8", errors="replace") as lines:
            return haproxy_log.parse(lines, self.servers, BACKEND)

    async def _rows(self, which: str) -> list[dict[str, str]]:
        text = await self.ask(f"show stat {which}")
        return list(csv.DictReader(text.strip().removeprefix("# ").splitlines()))

    # --- the process

    async def _start(self, haproxy: Path, descriptors: list[int]) -> None:
        settings = self._folder / "haproxy.cfg"
        settings.write_text(self._configuration(*descriptors))
        with self.log_file.open("ab") as log, (self._folder / "haproxy.err").open("ab") as errors:
            self._process = await asyncio.create_subprocess_exec(
                haproxy,
                "-db",  # In the foreground.
                "-f",
                settings.name,
                cwd=self._folder,
                env={**os.environ, "LB_TOKEN": self.token},
                stdin=DEVNULL,
                stdout=log.fileno(),
                stderr=errors.fileno(),
                pass_fds=descriptors,
                start_new_session=True,
            )

    async def _answers(self) -> bool:
        if self._process is None or self._process.returncode is not None:
            told = (self._folder / "haproxy.err").read_text(errors="replace")[-2000:]
            raise DemoError(f"HAProxy ended at its start:\n{told}")
        with suppress(OSError):
            return bool(await self.ask("show info"))
        return False

    async def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await end(process, signal.SIGTERM)

    def _configuration(self, shop: int, operators: int) -> str:
        check = f"inter {self._checking.interval}ms rise {self._checking.rise} fall {self._checking.fall}"
        servers = "\n".join(f"    server {name} {address}" for name, address in self.servers.items())
        return f"""\
global
    # One thread: where two want to write at once, HAProxy drops a line.
    nbthread 1
    log stdout format timed local0
    stats socket unix@{self.runtime_api.name} mode 600 level admin

defaults
    mode http
    log global
    option httplog
    # What fails is seen: nothing is tried again, nothing is tried elsewhere.
    retries 0
    no option redispatch
    timeout connect 2s
    timeout client 60s
    timeout server 60s
    timeout http-keep-alive 60s

userlist operators
    user waystation insecure-password "${{LB_TOKEN}}"

frontend shop
    bind fd@{shop}
    default_backend {BACKEND}

backend {BACKEND}
    balance roundrobin
    option httpchk GET /health
    default-server check {check}
{servers}

frontend operators
    bind fd@{operators}
    option dontlog-normal
    stats enable
    stats uri /stats
    stats http-request auth realm HAProxy unless {{ http_auth(operators) }}
    stats admin if TRUE
"""
