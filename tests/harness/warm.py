"""A warm process: it imports all of Waystation once, then forks a child for each command that a test starts.

A command costs its own work that way, and not the start of an interpreter with its hundreds of modules. Each child is
a process in its own right: its own id, files, environment, session and exit status. `harness/process.py` starts this
file, and speaks with it: one connection a command, a request with three descriptors, then the id, then how it ended.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import io
import json
import os
import pkgutil
import selectors
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HOUSES = ("relay", "agent", "orchestrator", "benchmarks")
LAZY = (
    "aiohttp.web", "cryptography.hazmat.primitives.asymmetric.ed25519", "dns.asyncresolver", "hdiffpatch", "rich.live",
    "rich.progress", "rich.table", "securesystemslib.signer", "sqlalchemy.dialects.sqlite", "uvloop", "yaml",
)  # fmt: skip
"""What our functions import when they are called."""
REQUEST_BYTES = 1 << 20
TELL_WHERE = signal.SIGUSR2
"""Makes a child tell on its standard error what each of its threads does."""


@dataclass(frozen=True)
class Task:
    """What a child is asked to be."""

    argv: list[str]
    code: str
    """Python to run in place of the command `waystation`."""
    cwd: str
    environment: dict[str, str]
    new_session: bool
    descriptors: list[int]
    """Of its standard input, output and error."""


def warm_up() -> None:
    for house in HOUSES:
        package = importlib.import_module(house)
        for found in pkgutil.walk_packages(package.__path__, f"{house}."):
            if not found.name.endswith("__main__"):
                importlib.import_module(found.name)
    for name in LAZY:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a process with threads must not fork"
    gc.collect()
    gc.freeze()


def serve(listener: socket.socket, life: int) -> Task | None:
    """Fork children until `life` ends, and with it all of them; in a child, what it is asked to be."""
    woken, waker = socket.socketpair()
    for each in (listener, woken, waker):
        each.setblocking(False)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        for each in (listener, woken, life):
            selector.register(each, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if woken in ready:
                with contextlib.suppress(BlockingIOError):
                    woken.recv(4096)
                reap(children)
            if life in ready:
                for pid in children:
                    os.kill(pid, signal.SIGKILL)
                return None
            if listener in ready:
                connection, _ = listener.accept()
                connection.setblocking(True)
                task = receive(connection)
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    return task
                children[pid] = connection
                connection.send(json.dumps(pid).encode())
                for descriptor in task.descriptors:
                    os.close(descriptor)


def receive(connection: socket.socket) -> Task:
    data, descriptors, _, _ = socket.recv_fds(connection, REQUEST_BYTES, 3)
    return Task(**json.loads(data), descriptors=list(descriptors))


def reap(children: dict[int, socket.socket]) -> None:
    """Tell of each child that has ended its status and the processor time that it took."""
    while children:
        pid, status, used = os.wait4(-1, os.WNOHANG)
        if pid == 0:
            return
        with children.pop(pid) as connection, contextlib.suppress(OSError):
            connection.send(json.dumps([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime]).encode())


def become(task: Task) -> None:
    """Take on what a fresh interpreter would have: session, descriptors, environment, folder, arguments, streams."""
    if task.new_session:
        os.setsid()
    for number, descriptor in enumerate(task.descriptors):
        os.dup2(descriptor, number)
    os.closerange(3, max(map(int, os.listdir("/proc/self/fd"))) + 1)
    os.chdir(task.cwd)
    os.environ.clear()
    os.environ.update(task.environment)
    sys.argv[:] = task.argv
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8")
    sys.stdout = sys.__stdout__ = _writer(1, "strict")
    sys.stderr = sys.__stderr__ = _writer(2, "backslashreplace", line_buffering=True)
    faulthandler.register(TELL_WHERE, file=sys.stderr)


def _writer(descriptor: int, errors: str, *, line_buffering: bool = False) -> io.TextIOWrapper:
    raw = io.FileIO(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), "utf-8", errors, line_buffering=line_buffering or os.isatty(descriptor)
    )


def run_to_the_end(main: Callable[[], object]) -> int:
    """Run `main` and all that waits for an interpreter's end; the exit status."""
    code = 0
    try:
        main()
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        if code and isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        code = 120
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    return code


def main() -> None:
    sys.path[:0] = [str(Path(__file__).parents[1])]
    warm_up()
    with socket.socket(fileno=int(sys.argv[1])) as listener:
        task = serve(listener, life=0)
    if task is not None:
        become(task)
        os._exit(run_to_the_end(lambda: _act(task)))


def _act(task: Task) -> None:
    from relay.main import main as waystation

    if task.code:
        exec(compile(task.code, "<a test's>", "exec"), {"__name__": "__main__"})  # noqa: S102 - our own
    else:
        waystation()


if __name__ == "__main__":
    main()
