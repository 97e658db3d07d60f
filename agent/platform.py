"""All that differs by operating system stands here, behind plain functions. Linux is tested; elsewhere the portable way.

A test forbids platform questions anywhere else in `agent/`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import stat
import sys

from relay.support.durable import sync_folder

with contextlib.suppress(ImportError):  # Windows has none
    import fcntl

TYPE_CHECKING = False  # `typing` costs the runner's start more than all the rest of this module
if TYPE_CHECKING:
    import asyncio
    import subprocess
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import NoReturn

IS_LINUX = sys.platform.startswith("linux")

# Windows has none of these three, and no links in their sense to guard against.
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_NO_HANG = getattr(os, "O_NONBLOCK", 0)
_NOT_INHERITED = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)

UTF8 = ("-X", "utf8")
"""Options of Python for processes of ours: names of files are UTF-8, whatever the locale is that scripts shall see."""

# --- files


def open_for_reading(path: str) -> int:
    """A descriptor of the regular file `path`; follows no link in its last name, and hangs on no FIFO.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    descriptor = os.open(path, os.O_RDONLY | _NO_LINK | _NO_HANG | _NOT_INHERITED)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_for_writing(path: str) -> int:
    """A descriptor of the file `path`, made where it is not there; follows no link in its last name. Raises `OSError`."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | _NO_LINK | _NOT_INHERITED, 0o644)


def read_at(descriptor: int, length: int, offset: int) -> bytes:
    """Up to `length` bytes from `offset`; fewer where the file ends. Raises `OSError`."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, length, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.read(descriptor, length)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """All of `data` at `offset`. Raises `OSError`."""
    while data:
        if hasattr(os, "pwrite"):
            written = os.pwrite(descriptor, data, offset)
        else:
            os.lseek(descriptor, offset, os.SEEK_SET)
            written = os.write(descriptor, data)
        data, offset = data[written:], offset + written


def set_mode(path: str, *, executable: bool) -> None:
    """Readable by all, writable by the owner; folders count as executable. Raises `OSError`."""
    os.chmod(path, 0o755 if executable else 0o644)


def has_mode(found: os.stat_result, *, executable: bool) -> bool:
    """Whether all may read it (and execute it, where it is executable), as `set_mode` left it, and not everybody write.

    What a group may write is the administrator's affair. Where files have no such bits, nothing is lost.
    """
    if not hasattr(os, "geteuid"):
        return True
    return found.st_mode & 0o557 == (0o555 if executable else 0o444)


def free_bytes(folder: str) -> int:
    """Bytes that may still be written where `folder` lies. Raises `OSError`."""
    if hasattr(os, "statvfs"):
        room = os.statvfs(folder)
        return room.f_bavail * room.f_frsize
    import shutil

    return shutil.disk_usage(folder).free


# --- durability


def sync_tree(root: str, files: Iterable[str], folders: Iterable[str]) -> None:
    """Make everything below `root` durable: the given files, and the folders that name them.

    On Linux one `syncfs` does it for all (since 5.8 it reports write errors); elsewhere each is synced by itself.

    Raises:
        OSError: something could not be written; the tree must not be used.
    """
    if IS_LINUX and _syncfs is not None:
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if _syncfs(descriptor) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), root)
        finally:
            os.close(descriptor)
        return
    for path in files:
        with open(path, "r+b", buffering=0) as file:
            os.fsync(file.fileno())
    for folder in folders:
        sync_folder(folder)


# --- the tree in use


def point_current(root: str, target: str) -> None:
    """Let `root/current` name the folder `target` (relative to `root`), in one step: a new link, renamed over the old.

    Raises:
        FileExistsError: something that is no link has this name; it is untouched.
        OSError: it names what it named before.
    """
    current = os.path.join(root, "current")
    if os.path.lexists(current) and not os.path.islink(current):
        raise FileExistsError(errno.EEXIST, "it is no link", current)
    temporary = os.path.join(root, f".current-{os.getpid()}")
    if os.path.lexists(temporary):
        os.unlink(temporary)
    os.symlink(target, temporary)
    try:
        os.rename(temporary, current)
    except OSError:
        os.unlink(temporary)
        raise
    sync_folder(root)


def current_target(root: str) -> str | None:
    """What `root/current` names, or None where there is no such link."""
    try:
        return os.readlink(os.path.join(root, "current"))
    except OSError:
        return None


# --- locks


def lock_file(path: str) -> int | None:
    """Take the exclusive lock on `path` (made where needed), or None where another process has it.

    The lock goes with the returned descriptor, also when its process is killed.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK | _NOT_INHERITED, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The process that had the lock may have removed the file meanwhile: a lock on what has no name guards nothing.
        if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def is_locked(path: str) -> bool:
    """Whether another process has the lock on `path`, or another descriptor of this one.

    To ask is to share the lock for a moment: a process that wants to take it then must try twice.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | _NO_LINK | _NOT_INHERITED)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


# --- processes


def start_detached(
    argv: Sequence[str], environment: Mapping[str, str], *, complaints: str = os.devnull, hears: int | None = None
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, which no signal to ours reaches; it hears nothing and says nothing.

    What Python itself complains of there is appended to the file `complaints`. The descriptor `hears`, if there is one,
    is its standard input. Raises `OSError`.
    """
    import subprocess

    descriptor = _open_complaints(complaints)
    try:
        return subprocess.Popen(
            argv,
            env=environment,
            cwd="/",
            stdin=subprocess.DEVNULL if hears is None else hears,
            stdout=subprocess.DEVNULL,
            stderr=descriptor,
            start_new_session=True,
        )
    finally:
        os.close(descriptor)


CAN_FORK = IS_LINUX
"""Whether `fork_detached` works. Other systems have fork as well; what their libraries make of it was never tried."""


def fork_detached(work: Callable[[], object], wakes: Wakes, *, complaints: str) -> int:
    """Do `work` in a fork of this process, and answer its process id: it ends with the work, and comes back never.

    Only for a process that `start_detached` started, that has one thread, and no descriptors but its standard ones and
    `wakes`. The fork then is what `start_detached` would make: a session of its own, no signal handled or blocked that
    was not at the start, no input, output that leads nowhere, complaints in their file.

    Raises:
        OSError: there is no fork.
    """
    descriptor = _open_complaints(complaints)
    try:
        # A signal to the new process must not meet the handlers of this one: it waits until they are gone.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            return os.fork() or _work_detached(work, wakes, descriptor, before)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    finally:
        os.close(descriptor)


def _work_detached(work: Callable[[], object], wakes: Wakes, complaints: int, mask: Iterable[int]) -> NoReturn:
    status = 1
    try:
        os.setsid()
        os.dup2(1, 0)  # standard output leads nowhere, and so does its twin for reading
        os.dup2(complaints, 2)
        os.close(complaints)
        wakes.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        work()
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def _open_complaints(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_LINK | _NOT_INHERITED, 0o600)


class LastArgument:
    """The last argument of this process as `ps` and others see it: what forks do can be written there (Linux; else not).

    It lies in our own memory, where the kernel reads it each time that a process asks (proc_pid_cmdline(5)); there is
    as much room as it had at the start.
    """

    def __init__(self) -> None:
        """Find it, and make it empty."""
        given = os.fsencode(sys.argv[-1])
        self._room, self._at = len(given), 0
        if IS_LINUX and (fields := _process_fields("self")):
            at = int(fields[_ARGUMENTS_END]) - 1 - self._room
            if at > 0 and ctypes.string_at(at, self._room) == given:
                self._at = at
        self.show("")

    def show(self, text: str) -> None:
        """From now on it is `text`, or as much of that as there is room for."""
        if self._at:
            ctypes.memmove(self._at, os.fsencode(text)[: self._room].ljust(self._room, b"\0"), self._room)


def start_leader(argv: Sequence[str], environment: Mapping[str, str], output: int, errors: int | None = None) -> int:
    """Start `argv` as the leader of a new session and group, in this process's folder, and answer its process id.

    `output` takes what it prints, and `errors` what it prints as errors (without it, `output` too); its standard input is empty, and no signal is blocked or ignored.

    Raises:
        OSError: it could not be started, and nothing ran.
    """
    return os.posix_spawnp(
        argv[0],
        list(argv),
        environment,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, output, 1),
            (os.POSIX_SPAWN_DUP2, output if errors is None else errors, 2),
        ],
        setsid=True,
        setsigmask=(),
        setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
    )


def adopt_orphans() -> None:
    """Become the parent of every descendant whose parent ends, so that none gets out of sight (Linux; else nothing)."""
    if IS_LINUX and _libc is not None:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def ended_children() -> dict[int, int]:
    """Every child that ended since the last call: its exit status, negative for the signal that ended it."""
    ended: dict[int, int] = {}
    while True:
        try:
            child, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if not child:
            return ended
        ended[child] = os.waitstatus_to_exitcode(status)


def descendants(of: int) -> dict[int, int]:
    """Every living process below the process `of`, with its group. Linux only; elsewhere none is seen."""
    children: dict[int, list[tuple[int, int]]] = {}
    for name in os.listdir("/proc") if IS_LINUX else ():
        if name.isdecimal() and (fields := _process_fields(name)):
            children.setdefault(int(fields[1]), []).append((int(name), int(fields[2])))
    found: dict[int, int] = {}
    below = [of]
    while below:
        new = dict(children.pop(below.pop(), ()))
        found |= new
        below += new
    return found


def end_tree(leader: int, *, at_once: bool = False) -> None:
    """Ask the group of `leader`, and every other descendant of this process, to end (or end them `at_once`).

    `leader` is a child of this process that was not waited for, or 0 if it was.
    """
    number = signal.SIGKILL if at_once else signal.SIGTERM
    below = descendants(os.getpid())
    if leader:
        _send(os.killpg, leader, number)
    for process, group in below.items():
        if group != leader or not leader:
            _send(os.kill, process, number)


def has_tree(leader: int) -> bool:
    """Whether `leader` (0: it ended) or any descendant of this process lives."""
    return bool(leader) or bool(descendants(os.getpid()))


def process_mark(process: int) -> str:
    """What tells this process from a later one with the same number; empty if it ended, or the system cannot tell."""
    fields = _process_fields(str(process)) if IS_LINUX else []
    return f"{process} {fields[_START_TIME].decode()}" if fields else ""


def end_marked(mark: str) -> bool:
    """End the process with this mark, its group and all below it, at once. False if it ended before."""
    process = int(mark.partition(" ")[0] or 0)
    if not process or process_mark(process) != mark:
        return False
    for other in descendants(process):
        _send(os.kill, other, signal.SIGKILL)
    _send(os.killpg, process, signal.SIGKILL)
    return True


def signal_name(number: int) -> str:
    """Such as "SIGKILL"."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Wakes:
    """What the system tells this process, as a descriptor to wait for: a child ended, or it is asked to end itself."""

    def __init__(self) -> None:
        """From now on this process does not end by SIGTERM or SIGINT; only its main thread may call this."""
        self.asked_to_end = False
        self.descriptor, self._told = os.pipe()
        os.set_blocking(self.descriptor, False)
        os.set_blocking(self._told, False)
        signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)

    def _end(self, *_: object) -> None:
        self.asked_to_end = True

    def close(self) -> None:
        """From now on signals do what they do in a Python that was just started."""
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.set_wakeup_fd(-1)
        os.close(self.descriptor)
        os.close(self._told)

    def wait(self, others: Iterable[int], seconds: float | None) -> list[int]:
        """Wait until the system tells something, one of `others` can be read (those, in their order) or the time is over."""
        others, poll = list(others), select.poll()
        for descriptor in (self.descriptor, *others):
            poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(None if seconds is None else max(0.0, seconds) * 1000)}
        if self.descriptor in ready:
            os.read(self.descriptor, 4096)
        return [descriptor for descriptor in others if descriptor in ready]


def _process_fields(name: str) -> list[bytes]:
    """State, parent, group, … of a living process by /proc/PID/stat (proc_pid_stat(5)); none of one that ended."""
    try:
        with open(f"/proc/{name}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in {b"Z", b"X"} else fields


_START_TIME = 19  # of those fields; starttime, field 22 of the file, in ticks since the machine started
_ARGUMENTS_END = 46  # arg_end, field 49: the address behind the last argument's final null


def _send(how: Callable[[int, int], None], to: int, number: int) -> None:
    # It may have ended meanwhile, or belong to another user now.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        how(to, number)


# --- services

SERVICE_COMMAND = ("systemctl", "{action}", "{service}")
"""The machine's own service manager; actions are start, stop, restart, reload and is-active."""


def service_command(action: str, service: str, template: Sequence[str] = ()) -> list[str]:
    """The command that does `action` to `service`: by `template` (words with {action} and {service}), else the usual one."""
    return [word.replace("{action}", action).replace("{service}", service) for word in (template or SERVICE_COMMAND)]


# --- this machine and this process


def system_name() -> str:
    """The operating system and the kind of processor, such as "linux x86_64": for people."""
    machine = os.uname().machine if hasattr(os, "uname") else os.environ.get("PROCESSOR_ARCHITECTURE", "")
    return f"{sys.platform} {machine}".strip()


def on_termination(loop: asyncio.AbstractEventLoop, stop: Callable[[], object]) -> None:
    """Call `stop` in `loop` when this process is asked to end (SIGTERM, SIGINT), in place of ending it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, stop)
        except NotImplementedError:  # Windows' loops
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop))


# --- the system's own library


def _load_libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None, use_errno=True)
    except OSError:
        return None


_PR_SET_CHILD_SUBREAPER = 36
_libc = _load_libc() if IS_LINUX else None
_syncfs = getattr(_libc, "syncfs", None)
