"""One script, run at most once, by a small process of its own that outlives the one that started it.

The process is `main(FOLDER)` below, forked off by `agent.runs.fork_server` or else `python -I -S -c …`; `agent.runs.runs` starts and
watches it. All that it knows and says stands in the folder, so it needs no other process: agent and orchestrator may be
killed and come back.

    spec.json    what to run (`agent.runs.runs.RunSpec`); names of secrets, never a value
    lock         held (flock) while the runner lives
    begun        durable before the script is started, and made only once: this alone makes "at most once"
    leader       where all that it starts is found, as `agent.platform.ProcessTree.mark` names it
    output       what it printed, masked, as lines with time and stream (`framed`); it only grows
    stop         it is asked to end
    exit.json    how it ended; durable after the output is

The end is the end of the script's own process. A daemon that it left behind lives on, and the runner stays to read what
it still prints, so that it never meets a closed pipe.

Start-up time is paid by every script of every deployment (without a fork server by all, else by the first of a process): only
cheap modules of the standard library are imported, and all of them at the start, because an update may replace the files
of a runner that lives for hours.
"""

from __future__ import annotations

import contextlib
import json
import os
import time

from agent import platform
from agent.runs.masking import Masker
from relay.support.durable import sync_folder, write_durably

TYPE_CHECKING = False  # `typing` costs more than all the rest of this module
if TYPE_CHECKING:
    from typing import Any

SPEC, LOCK, BEGUN, LEADER, OUTPUT, STOP, EXIT = "spec.json", "lock", "begun", "leader", "output", "stop", "exit.json"
COMPLAINTS = "runner.log"
"""What Python itself says when the runner breaks; empty else."""

_READ_BYTES = 65536
_PIPE_BYTES = 1 << 20
"""No pipe holds more (pipe(7)): what the script itself wrote lies in the first that many bytes after its end."""
_LINGER_SECONDS = 0.01
"""For what the script's own helpers still print right after its end, such as the `tee` of a shell script."""
_HOLD_SECONDS = 0.5
"""How long output may be held back because it could become a secret."""
_LOOK_SECONDS = 0.2
"""How often it looks for `stop`. A file, not a signal: that could hit another process that has the number now."""
_LOCK_TRIES = 400
_STOPPED = "it was stopped"
_GIVE_UP_SECONDS = 5.0
"""After KILL: what still lives then cannot be killed."""


def main(folder: str) -> None:
    """Run what stands in `folder` (absolute), unless it was begun before or another runner has it."""
    if not _take(folder):
        return
    with open(os.path.join(folder, SPEC), "rb") as file:
        spec = json.load(file)
    run = _Run(folder, spec)
    if os.path.exists(os.path.join(folder, STOP)):
        run.cause = "stopped"
        run.record("it was stopped before it began")
        return
    run.begin()
    if not run.start():
        return
    run.follow()
    run.read_on()


def _take(folder: str) -> bool:
    """Take the folder's lock for this process's life; False if another runner has it, or had.

    To ask whether it is locked is to share the lock for a moment, hence more than one try.
    """
    for _ in range(_LOCK_TRIES):
        taken = platform.lock_file(os.path.join(folder, LOCK)) is not None
        if any(os.path.exists(os.path.join(folder, name)) for name in (BEGUN, EXIT)):
            return False
        if taken:
            return True
        time.sleep(0.005)
    return False


class _Run:
    """The only run of a folder. `cause` of its end: "timed_out", "stalled", "stopped", or empty for an end of its own."""

    def __init__(self, folder: str, spec: dict[str, Any]) -> None:
        self.folder, self.spec = folder, spec
        self.environment = {name: os.environ[name] for name in spec["environment"]}
        self.wakes = platform.Wakes()
        self.output = Output(os.path.join(folder, OUTPUT), spec["head_bytes"], spec["tail_bytes"])
        self.started = time.time()
        self.streams: dict[int, Stream] = {}
        self.printed = 0.0
        self.tree: platform.ProcessTree
        self.status: int | None = None
        self.cause = ""

    def begin(self) -> None:
        """From here on the script counts as run, even if this process dies at once."""
        descriptor = os.open(os.path.join(self.folder, BEGUN), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(descriptor, f"{self.started}\n".encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_folder(self.folder)

    def start(self) -> bool:
        """Start the script; if it cannot be started, that is recorded as its end."""
        printed = [self.open_stream(name) for name in (b"stdout", b"stderr")]
        try:
            os.chdir(self.spec["cwd"])
            self.tree = platform.ProcessTree(self.spec["run"])
            self.tree.start(self.spec["argv"], self.environment, *printed)
        except OSError as error:
            about = f" ({error.filename})" if error.filename else ""
            self.record(f"it could not be started: {error.strerror}{about}")
            return False
        finally:
            for descriptor in printed:
                os.close(descriptor)
            os.chdir("/")
        with contextlib.suppress(OSError), open(os.path.join(self.folder, LEADER), "w", encoding="utf-8") as file:
            file.write(self.tree.mark)
        return True

    def open_stream(self, name: bytes) -> int:
        """What the script writes to."""
        reads, writes = os.pipe()
        os.set_blocking(reads, False)
        secrets = (self.environment[secret] for secret in self.spec["secret_names"])
        self.streams[reads] = Stream(name, Masker(secrets))
        return writes

    def follow(self) -> None:
        """Read what it prints until it ends, or end it when its time is over or it is asked to; then record that."""
        self.printed = time.monotonic()
        deadline, stall = self.printed + self.spec["timeout"], self.spec["stall"] or float("inf")
        while not self.cause:
            self.pump(min(_LOOK_SECONDS, min(deadline, self.printed + stall) - time.monotonic()))
            if self.reap():
                break
            if self.wakes.asked_to_end or os.path.exists(os.path.join(self.folder, STOP)):
                self.cause = "stopped"
            elif time.monotonic() >= deadline:
                self.cause = "timed_out"
            elif time.monotonic() >= self.printed + stall:
                self.cause = "stalled"
        reason = ""
        if self.cause:
            reason = {
                "timed_out": f"its time limit of {self.spec['timeout']:g} s was over",
                "stalled": f"it stalled: it printed nothing for {stall:g} s",
                "stopped": _STOPPED,
            }[self.cause]
            if not self.end_all():
                reason += "; some of its processes could not be killed"
        self.drain()
        self.record(reason)

    def end_all(self) -> bool:
        """TERM to every process, then, when the grace is over, KILL until none is left. False if one stays."""
        self.tree.end()
        kill_at = time.monotonic() + self.spec["grace"]
        while self.tree.is_alive():
            now = time.monotonic()
            if now >= kill_at + _GIVE_UP_SECONDS:
                return False
            if now >= kill_at:
                self.tree.end(at_once=True)
            self.pump(0.02)
            self.reap()
        return True

    def pump(self, seconds: float) -> None:
        """Take over what was printed, waiting no longer than that for it or for a signal."""
        now = time.monotonic()
        self.output.write(*(stream.let_go(now) for stream in self.streams.values()))
        due = min((stream.due(now) for stream in self.streams.values()), default=seconds)
        for pipe in self.wakes.wait(self.streams, min(seconds, due)):
            self.take(pipe)

    def take(self, pipe: int) -> int:
        """Read once; how many bytes came. At the end of the stream the pipe is closed."""
        stream = self.streams[pipe]
        try:
            data = os.read(pipe, _READ_BYTES)
        except BlockingIOError:
            return 0
        self.output.write(stream.take(data, time.monotonic()))
        if data:
            self.printed = time.monotonic()
        else:
            self.output.write(stream.close())
            os.close(pipe)
            del self.streams[pipe]
        return len(data)

    def drain(self) -> None:
        """After the end: what lies in the pipes, and what comes in a blink."""
        taken, until = 0, time.monotonic() + _LINGER_SECONDS
        while self.streams and taken < len(self.streams) * _PIPE_BYTES:
            got = sum(self.take(pipe) for pipe in list(self.streams))
            taken += got
            if not got:
                if time.monotonic() >= until:
                    break
                self.wakes.wait(self.streams, until - time.monotonic())
        self.output.write(*(stream.close() for stream in self.streams.values()))

    def reap(self) -> bool:
        """Take exit statuses; whether the script's own is among them."""
        status = self.tree.reap()
        if status is None:
            return False
        self.status = status
        return True

    def record(self, reason: str) -> None:
        """Put down how it ended, for good. On a full disk that waits for room: the end is known, and must not get lost."""
        result = {
            "status": self.status,
            "cause": self.cause,
            "reason": reason,
            "started": self.started,
            "ended": time.time(),
            "output_bytes": self.output.close(),
        }
        while os.path.isdir(self.folder):  # once it is removed, the end is not waited for
            with contextlib.suppress(OSError):
                write_durably(os.path.join(self.folder, EXIT), json.dumps(result).encode(), mode=0o600)
                return
            time.sleep(1)

    def read_on(self) -> None:
        """Stay as long as a process may still print; that is thrown away."""
        while self.streams and not self.wakes.asked_to_end:
            for pipe in self.wakes.wait(self.streams, None):
                with contextlib.suppress(BlockingIOError):
                    if not os.read(pipe, _READ_BYTES):
                        os.close(pipe)
                        del self.streams[pipe]
            self.reap()
        self.tree.close()


class Stream:
    """One of the two that a script prints to: bytes come in, masked lines of the log go out."""

    def __init__(self, name: bytes, masker: Masker) -> None:
        self._name = name
        self._masker = masker
        self._since: float | None = None

    def take(self, data: bytes, now: float) -> bytes:
        """What may be shown of `data`; the rest is held back since `now`."""
        shown = self._masker.feed(data)
        if not self._masker.held:
            self._since = None
        elif shown or self._since is None:
            self._since = now
        return framed(self._name, shown, time.time())

    def due(self, now: float) -> float:
        """Seconds until `let_go` has something to do."""
        return float("inf") if self._since is None else max(0.0, self._since + _HOLD_SECONDS - now)

    def let_go(self, now: float) -> bytes:
        """What was held back for long enough."""
        if self._since is None or now < self._since + _HOLD_SECONDS:
            return b""
        self._since = None
        return framed(self._name, self._masker.flush(), time.time())

    def close(self) -> bytes:
        """The end: nothing comes after it."""
        return framed(self._name, self._masker.close(), time.time())


def framed(stream: bytes, data: bytes, at: float) -> bytes:
    """`data` as lines of a log: time, stream, `F` for a line that ends there or `P` for one that goes on, and its text.

    It is the form that Kubernetes gives to the output of containers (CRI). Pure.
    """
    if not data:
        return b""
    seconds, milliseconds = divmod(int(at * 1000), 1000)
    head = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)).encode() + b".%03dZ %b " % (milliseconds, stream)
    end = data.rfind(b"\n") + 1
    whole, rest = data[:end], data[end:]
    lines = head + b"F " + whole[:-1].replace(b"\n", b"\n" + head + b"F ") + b"\n" if whole else b""
    return lines + (head + b"P " + rest + b"\n" if rest else b"")


class Output:
    """The file of what a script printed: only its head and tail when it is too long."""

    def __init__(self, path: str, head: int, tail: int) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._cut = HeadAndTail(head, tail)
        self._written = 0
        self._lost = 0

    def write(self, *pieces: bytes) -> None:
        """What the streams gave."""
        for piece in pieces:
            self._write(self._cut.add(piece))

    def close(self) -> int:
        """Write the end, durably; how many bytes the file has."""
        self._write(self._cut.end())
        if self._lost:
            self._write(b"\n[%d bytes of output could not be written]\n" % self._lost)
        with contextlib.suppress(OSError):
            os.fsync(self._file)
        os.close(self._file)
        return self._written

    def _write(self, data: bytes) -> None:
        # A full disk costs output, never the script: it is not to blame, and half of a script is worse than no log.
        try:
            while data:
                count = os.write(self._file, data)
                self._written += count
                data = data[count:]
        except OSError:
            self._lost += len(data)


class HeadAndTail:
    """Pure: of a stream the first `head` bytes at once, and at its end the last `tail`, with a line on what is missing."""

    def __init__(self, head: int, tail: int) -> None:
        self._room, self._tail_bytes = head, tail
        self._tail = bytearray()
        self._left_out = 0

    def add(self, data: bytes) -> bytes:
        """What of `data` belongs to the head."""
        first, rest = data[: self._room], data[self._room :]
        self._room -= len(first)
        self._tail += rest
        excess = len(self._tail) - self._tail_bytes
        if excess > 0:
            del self._tail[:excess]
            self._left_out += excess
        return first

    def end(self) -> bytes:
        """The tail."""
        said = b"\n[%d bytes of output are left out here]\n" % self._left_out if self._left_out else b""
        return said + bytes(self._tail)
