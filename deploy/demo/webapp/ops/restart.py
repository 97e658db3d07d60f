#!/usr/bin/env python3
"""On the machine: end the webshop that runs, start the one of $ROOT/current, come back when it listens. Safe to repeat.

ROOT; ADDRESS and VAR_PORT, where it listens; MACHINE, its name. VAR_WORK_SECONDS and VAR_BOOT_SECONDS (0) make it slow,
VAR_START_SECONDS (20) is how long it may take.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

STOP_SECONDS = 15.0
"""For finishing what runs; then it is killed."""
KILL_SECONDS = 5.0


def stop(pid_file: Path) -> None:
    """End whoever holds the pid file. Its lock, not the number in it, says whether there is one: numbers are reused."""
    with pid_file.open("a+", encoding="ascii") as file:
        for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
            if is_free(file.fileno(), 0.0):
                return
            file.seek(0)
            pid = int(file.read() or 0)
            if pid:
                print(f"{number.name} to {pid}", flush=True)
                os.kill(pid, number)
            if is_free(file.fileno(), seconds):
                return
    sys.exit(f"the old one does not end: {pid_file} stays locked")


def is_free(descriptor: int, seconds: float) -> bool:
    """Whether nobody holds the lock, now or before the time is over. It is not kept."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            return True


def start(root: Path, pid_file: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start the current one in a session of its own, with its own log, and with nothing of our environment."""
    # Its own tree and not `current`: what runs stays one version, wherever the link points later.
    tree = (root / "current").resolve(strict=True)
    command = [
        sys.executable,
        str(tree / "app" / "server.py"),
        f"--listen={address()}:{port()}",
        f"--pid-file={pid_file}",
        f"--name={os.environ.get('MACHINE', '')}",
        f"--work={os.environ.get('VAR_WORK_SECONDS', '0')}",
        f"--boot={os.environ.get('VAR_BOOT_SECONDS', '0')}",
    ]
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR") if name in os.environ}
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=tree,
            env=kept | {"PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def until_it_listens(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + float(os.environ.get("VAR_START_SECONDS", "20"))
    while process.poll() is None:
        try:
            socket.create_connection((address(), port()), timeout=1).close()
            return
        except OSError:
            if time.monotonic() >= deadline:
                process.kill()
                sys.exit(f"it does not listen at {address()}:{port()}")
        time.sleep(0.02)
    told = log.read_text(errors="replace").splitlines()[-10:]
    sys.exit("\n".join([f"it ended with {process.returncode} at its start:", *told]))


def address() -> str:
    return os.environ.get("ADDRESS", "127.0.0.1")


def port() -> int:
    return int(os.environ["VAR_PORT"])


def main() -> None:
    root = Path(os.environ["ROOT"])
    shared = root / "shared"
    shared.mkdir(exist_ok=True)
    pid_file, log = shared / "webshop.pid", shared / "webshop.log"
    stop(pid_file)
    process = start(root, pid_file, log)
    until_it_listens(process, log)
    print(f"webshop runs at {address()}:{port()}, process {process.pid}")


if __name__ == "__main__":
    main()
