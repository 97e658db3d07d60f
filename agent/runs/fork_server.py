"""A process that has a runner's modules loaded and forks off runners: to start an interpreter for each is most of its cost.

It is a child of the process that launches (`ForkServer`, here), started by its first launch, in a session of its own. It has
one thread, and hears its parent by a socket that is its standard input: what goes through that is never in a file or on a
command line.

    → 4 bytes, big-endian: how many bytes follow; then the run's folder and each NAME=VALUE of the runner's environment,
      with a null byte between them
    ← one line: the runner, as `agent.platform.process_mark` names it; its number alone if it ended before. Or "-": none

It ends with that socket, hence with its parent, however that ends. Runners live on then: they are like those that their
parent started itself. Whether they run at all, and at most once, is decided by their folder alone: so whenever an answer
is missing, the parent may start one more.
"""

from __future__ import annotations

import encodings.ascii  # noqa: F401 - a runner writes in that, and shall find it loaded
import gc
import os
import sys

from agent import platform
from agent.runs import runner

TYPE_CHECKING = False  # `typing` costs more than all the rest of this module
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Mapping, Sequence
    from socket import socket

_HEAD_BYTES = 4
_NONE = "-"
_ANSWER_SECONDS = 10.0
"""An answer is not waited for longer: what shall make a launch cheaper must not make it hang."""
_NAME_BYTES = 4096
"""Room for a folder's path (PATH_MAX) on the command line of each runner."""

# --- the process

_PARENT = 0


def serve() -> None:
    """Fork off runners until the parent is gone."""
    shown, wakes = platform.LastArgument(), platform.Wakes()
    platform.prepare_trees()
    gc.freeze()  # so that no fork touches, and thereby copies, what is never garbage
    while not wakes.asked_to_end:
        asked = wakes.wait([_PARENT], None)
        platform.ended_children()
        if asked and not _answer(shown, wakes):
            return


def _answer(shown: platform.LastArgument, wakes: platform.Wakes) -> bool:
    """Do what the parent asks for. False if it is gone."""
    request = _read(int.from_bytes(_read(_HEAD_BYTES) or b"", "big"))
    if not request:
        return False
    folder, *variables = request.split(b"\0")
    path = os.fsdecode(folder)

    def run() -> None:
        shown.show(path)
        os.environb.clear()
        os.environb.update((name, value) for name, _, value in (each.partition(b"=") for each in variables))
        runner.main(path)

    try:
        child = platform.fork_detached(run, wakes, complaints=os.path.join(path, runner.COMPLAINTS))
    except OSError:  # the parent meets the same, and tells it
        answer = _NONE
    else:
        answer = platform.process_mark(child) or str(child)
    try:
        os.write(_PARENT, f"{answer}\n".encode())
    except BrokenPipeError:
        return False
    return True


def _read(count: int) -> bytes | None:
    """Exactly so many bytes, or None where the stream ends before."""
    data = b""
    while len(data) < count:
        piece = os.read(_PARENT, count - len(data))
        if not piece:
            return None
        data += piece
    return data


# --- its parent


class Runner:
    """A runner that was forked off. Its exit status is not ours to take."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self.pid = int(mark.partition(" ")[0])

    def poll(self) -> int | None:
        """None while it lives."""
        return None if platform.process_mark(self.pid) == self._mark else 0


class ForkServer:
    """The fork server of this process, if it needs one; any thread may ask."""

    def __init__(self, code_folder: str) -> None:
        """`code_folder` is where the packages of ours lie. Nothing is started yet."""
        import threading

        self._code_folder = code_folder
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket | None = None
        self._works = platform.CAN_FORK
        """Whether to start one: what never answered is not tried again."""

    def start(self, folder: str, environment: Mapping[str, str]) -> Runner | None:
        """Fork off a runner for `folder`. None if there is none, or if that is not known: then another one is harmless."""
        if any("=" in name or not name for name in environment):
            return None
        texts = [folder, *(f"{name}={value}" for name, value in environment.items())]
        with self._lock:
            answer = self._ask(b"\0".join(map(os.fsencode, texts))) if self._works else _NONE
        return None if answer == _NONE else Runner(answer)

    def _ask(self, request: bytes) -> str:
        is_new = self._socket is None
        line = b""
        try:
            line = self._exchange(self._socket or self._begin(), request)
        except OSError:
            pass
        finally:
            # Also where this thread was interrupted: the next request would take this answer for its own.
            if not line.endswith(b"\n"):
                self._works = not is_new
                self._end()
        return line.decode().strip() if line.endswith(b"\n") else _NONE

    def _begin(self) -> socket:
        """Start it. Raises `OSError`."""
        import atexit
        import socket

        from agent.runs.scripts import base_environment

        self._socket, other = socket.socketpair()
        with other:
            self._socket.settimeout(_ANSWER_SECONDS)
            self._process = platform.start_detached(self._command(), base_environment(), hears=other.fileno())
        # It would end by itself, but where no init takes its exit status, it would stay as a zombie.
        atexit.unregister(self._end)
        atexit.register(self._end)
        return self._socket

    def _command(self) -> Sequence[str]:
        start = "import sys; sys.path.append(sys.argv[1]); import agent.runs.runner; from agent.runs.fork_server import serve; serve()"
        return [sys.executable, *platform.UTF8, "-I", "-S", "-c", start, self._code_folder, " " * _NAME_BYTES]

    def _exchange(self, to: socket, request: bytes) -> bytes:
        """What it answers, up to the end of the line, or less where it ended before. Raises `OSError`."""
        to.sendall(len(request).to_bytes(_HEAD_BYTES, "big") + request)
        with to.makefile("rb") as answers:
            return answers.readline()

    def _end(self) -> None:
        """Leave it. It may have stopped without an end, and must not stay as a zombie either."""
        if self._socket:
            self._socket.close()
        if self._process:
            self._process.kill()
            self._process.wait()
        self._socket = self._process = None
