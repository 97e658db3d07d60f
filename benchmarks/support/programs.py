"""Real programs for measurements: relays, nginx, commands; each ends with its context."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from relay.package.identity import NuGetVersion, PackageId, PackageRef
from relay.server.http.tokens import make_token

WAYSTATION = os.path.join(os.path.dirname(sys.executable), "waystation")


@dataclass(frozen=True, slots=True)
class Served:
    """A server that answers."""

    url: str
    pid: int

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@dataclass(frozen=True, slots=True)
class Timed:
    """One finished command."""

    seconds: float
    output: str


def run(
    words: Sequence[str],
    *,
    home: str | None = None,
    token: str | None = None,
    cwd: str | None = None,
    codes: Collection[int] = (0,),
) -> Timed:
    """Run a command to its end.

    Raises:
        RuntimeError: its exit status is not among `codes`; with what it printed.
    """
    ours = {"WAYSTATION_HOME": home, "WAYSTATION_TOKEN": token}
    environment = os.environ | {name: value for name, value in ours.items() if value}
    started = time.perf_counter()
    done = subprocess.run(words, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode not in codes:
        raise RuntimeError(f"{' '.join(words)} failed ({done.returncode}): {done.stderr[-2000:]}")
    return Timed(seconds, done.stdout)


def waystation(
    *words: str, home: str, before: Sequence[str] = (), token: str | None = None, codes: Collection[int] = (0,)
) -> tuple[float, Any]:
    """Run our own command with `--json`, behind the words `before`; its seconds and its document."""
    timed = run([*before, WAYSTATION, *words, "--json"], home=home, token=token, codes=codes)
    return timed.seconds, json.loads(timed.output)


def until_told(words: Sequence[str], *, home: str) -> tuple[float, float]:
    """Run a command; the seconds until its first line, and until its end.

    Raises:
        RuntimeError: it failed.
    """
    started = time.perf_counter()
    environment = os.environ | {"WAYSTATION_HOME": home}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        told = time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} failed ({process.returncode})")
    return told, time.perf_counter() - started


def pack(folder: str, id: str, version: str, nupkg: str) -> str:
    """Pack the files of a folder by our own command; the path of the nupkg."""
    run([WAYSTATION, "package", "pack", folder, "--id", id, "--version", version, "--output", nupkg])
    return nupkg


def add(home: str, *files: str) -> list[tuple[PackageRef, int]]:
    """Keys, and a depot with these nupkgs, by our own commands; what each is, and its bytes.

    Raises:
        RuntimeError: a file is no package.
    """
    waystation("trust", "init", home=home)
    told = waystation("package", "add", *files, home=home)[1]["packages"] if files else ()
    return [(ref(one["id"], one["version"]), int(one["size"])) for one in told]


def ref(id: str, version: str) -> PackageRef:
    """Raises `IdentityError`."""
    return PackageRef(PackageId.parse(id), NuGetVersion.parse(version))


def make_tokens(config: str, scopes: Mapping[str, Iterable[str]], **more: object) -> dict[str, str]:
    """A relay's configuration with a token for each name; the tokens' files, by name. `more`: its other settings."""
    files, records = {}, []
    for name, scope in scopes.items():
        text, record = make_token(tuple(scope), datetime.now(UTC), 1, name)
        records.append(msgspec.to_builtins(record))
        files[name] = f"{config}.{name}.token"
        with open(files[name], "w", encoding="ascii", opener=_private) as file:
            file.write(text)
    # All clients have one address here: each may open as many connections as it may from one of its own.
    limits = {"connections_per_address": 64 * len(scopes)}
    # As JSON, which quotes: an id such as 827792e0 is a number to who reads YAML 1.2, and no text that PyYAML would quote.
    Path(config).write_text(json.dumps({"tokens": records, "limits": limits} | more), encoding="utf-8")
    return files


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


@contextmanager
def started(words: Sequence[str]) -> Iterator[tuple[int, str]]:
    """A program that has printed a line, as long as the context lasts: its pid, and the line."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"{' '.join(words)} did not start")
            yield process.pid, line
        finally:
            process.terminate()


@contextmanager
def relay(store: str, *options: str, before: Sequence[str] = (), listen: str = "127.0.0.1:0") -> Iterator[Served]:
    """`waystation relay serve`, by default on a free port of loopback."""
    words = [*before, WAYSTATION, "relay", "serve", "--listen", listen, "--store", f"disk:{store}", *options]
    with started(words) as (pid, line):
        yield Served(line.split()[-1], pid)


@contextmanager
def nginx(folder: str, files: str) -> Iterator[Served]:
    """An nginx that serves `files`, its configuration in `folder`."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise RuntimeError("nginx is missing: install the package nginx-light")
    [port] = free_ports(1)
    config = os.path.join(folder, "nginx.conf")
    # Started by root, nginx would read the files as a user who may not.
    user = "user root;" if os.geteuid() == 0 else ""
    Path(config).write_text(_NGINX.format(folder=folder, files=files, port=port, user=user), encoding="utf-8")
    words = [program, "-c", config, "-p", folder, "-e", "stderr", "-g", "daemon off;"]
    # Its first notice comes when it listens.
    with started(["sh", "-c", f"exec {shlex.join(words)} 2>&1"]) as (pid, _):
        yield Served(f"http://127.0.0.1:{port}", pid)


def peak_memory(pid: int) -> int:
    """Bytes of the most resident memory that the process had so far (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="ascii"))
    if found is None:
        raise RuntimeError("this system does not tell a process's peak memory")
    return int(found[1]) * 1024


_NGINX = """\
{user}
worker_processes 1;
pid {folder}/nginx.pid;
error_log stderr notice;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{ listen 127.0.0.1:{port}; root {files}; }}
}}
"""


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1, free for TCP and UDP, that stay free while their owner is away.

    They lie below those that the kernel hands to outgoing connections (32768 and up, ip(7)).
    """
    ports: list[int] = []
    with ExitStack() as held:
        while len(ports) < count:
            port = random.randrange(20_000, 32_000)
            tcp = held.enter_context(socket.socket(type=socket.SOCK_STREAM))
            udp = held.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            with suppress(OSError):
                tcp.bind(("127.0.0.1", port))
                udp.bind(("127.0.0.1", port))
                ports.append(port)
    return ports
