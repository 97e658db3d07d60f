"""Real programs for measurements: relays, nginx, commands; each ends with its context."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

WAYSTATION = os.path.join(os.path.dirname(sys.executable), "waystation")


@dataclass(frozen=True, slots=True)
class Served:
    """A server that answers."""

    url: str
    pid: int


@dataclass(frozen=True, slots=True)
class Timed:
    """One finished command."""

    seconds: float
    output: str


def run(words: Sequence[str], *, home: str | None = None, cwd: str | None = None) -> Timed:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed; with what it printed.
    """
    environment = dict(os.environ, **({"WAYSTATION_HOME": home} if home else {}))
    started = time.perf_counter()
    done = subprocess.run(words, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed ({done.returncode}): {done.stderr[-2000:]}")
    return Timed(seconds, done.stdout)


def waystation(*words: str, home: str) -> tuple[float, Any]:
    """Run our own command with `--json`; its seconds and its document."""
    timed = run([WAYSTATION, *words, "--json"], home=home)
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


@contextmanager
def relay(store: str, *options: str) -> Iterator[Served]:
    """`waystation relay serve` on a free port of loopback."""
    words = [WAYSTATION, "relay", "serve", "--listen", "127.0.0.1:0", "--store", f"disk:{store}", *options]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError("the relay did not start")
            yield Served(line.split()[-1], process.pid)
        finally:
            process.send_signal(signal.SIGTERM)


@contextmanager
def nginx(folder: str, files: str) -> Iterator[Served]:
    """An nginx that serves `files`, its configuration and logs in `folder`."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise RuntimeError("nginx is missing: install the package nginx-light")
    port = free_port()
    config = os.path.join(folder, "nginx.conf")
    with open(config, "w", encoding="utf-8") as file:
        file.write(_NGINX.format(folder=folder, files=files, port=port, user=_user_line()))
    words = [program, "-c", config, "-p", folder, "-e", os.path.join(folder, "error.log"), "-g", "daemon off;"]
    with subprocess.Popen(words) as process:
        try:
            _wait_for_port(port)
            yield Served(f"http://127.0.0.1:{port}", process.pid)
        finally:
            process.send_signal(signal.SIGTERM)


def peak_memory(pid: int) -> int:
    """Bytes of the most resident memory that the process had so far (Linux)."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell a process's peak memory")


_NGINX = """\
{user}
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
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


def _user_line() -> str:
    """Started by root, nginx would read the files as nobody, who may not."""
    return "user root;" if os.geteuid() == 0 else ""


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait_for_port(port: int) -> None:
    import socket

    for _ in range(100):
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"nothing listens on port {port}")
