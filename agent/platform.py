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
import time

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


_LOST_SECONDS = 2.0
"""How long what was lost is looked for, while some of it is still found."""
RUN = "WAYSTATION_RUN"
"""A variable in the environment of all that a run starts: its value names the run on this machine."""


class ProcessTree:
    """All that one run starts, to be ended as a whole: also what left session and group, or lost its parents.

    On Linux all of it is found below this process, which becomes the parent of every orphan among it. Where this process
    may make a cgroup (version 2) below its own, all is born in one, and one write ends it. Whoever comes later, when this
    process was lost, finds it by that cgroup and by `RUN` in its environment (`end_lost`). Elsewhere only the group of the
    leader is known.
    """

    def __init__(self, name: str) -> None:
        """`name` is of hex digits, and no other run's on this machine."""
        self.name = name
        self._leader = 0
        self._started = ""
        self._cgroup = _make_cgroup(name)
        if IS_LINUX and _libc is not None:
            _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def start(self, argv: Sequence[str], environment: Mapping[str, str], output: int, errors: int) -> int:
        """Start its leader, as `start_leader` does, and answer its process id. Raises `OSError`: nothing ran."""
        environment = {**environment, RUN: self.name}
        leader = _start_in_cgroup(self._cgroup, argv, environment, output, errors) if self._cgroup else None
        if leader is None:
            self.close()
            leader = start_leader(argv, environment, output, errors)
        self._leader, self._started = leader, process_mark(leader)
        return leader

    @property
    def mark(self) -> str:
        """What `end_lost` needs to know of it."""
        return f"{self._started}\n{self._cgroup}"

    def reap(self) -> int | None:
        """Take the exit statuses of all children that ended; that of the leader, once, when it is among them."""
        ended = ended_children()
        if not self._leader or self._leader not in ended:
            return None
        leader, self._leader = self._leader, 0
        return ended[leader]

    def is_alive(self) -> bool:
        """Whether anything of it lives."""
        return bool(self._leader or descendants(os.getpid()) or _is_populated(self._cgroup))

    def end(self, *, at_once: bool = False) -> None:
        """Ask all of it to end, or end it `at_once`."""
        if at_once:
            _kill_cgroup(self._cgroup)
        number = signal.SIGKILL if at_once else signal.SIGTERM
        below = descendants(os.getpid())
        if self._leader:
            _send(os.killpg, self._leader, number)
        for process, group in below.items():
            if group != self._leader or not self._leader:
                _send(os.kill, process, number)

    def close(self) -> None:
        """Give back what it took of the system; what lives of it lives on."""
        _remove_cgroup(self._cgroup)
        self._cgroup = ""


def end_lost(name: str, mark: str = "") -> bool:
    """End at once all that can be found of the tree with this name, whose own process was lost. False: there was nothing.

    `mark` is what its process wrote down of it, if it came to that.
    """
    leader, _, cgroup = mark.partition("\n")
    if os.path.basename(cgroup) != _cgroup_name(name):
        cgroup = ""
    found = False
    until = time.monotonic() + _LOST_SECONDS
    while ((processes := _lost(name, leader)) or _is_populated(cgroup)) and time.monotonic() < until:
        found = True
        _kill_cgroup(cgroup)
        for process in processes:
            _send(os.kill, process, signal.SIGKILL)
        time.sleep(0.01)  # until they are gone; and one of them may have started another between two looks
    _remove_cgroup(cgroup)
    return found


def _lost(name: str, leader: str) -> set[int]:
    """Processes of the tree `name`: with its name in their environment, and those of the leader's group and below it."""
    wanted = f"{RUN}={name}".encode()
    processes = [int(each) for each in os.listdir("/proc") if each.isdecimal()] if IS_LINUX else []
    found = {each for each in processes if wanted in _environment_of(each) and process_mark(each)}
    number = int(leader.partition(" ")[0] or 0)
    if number and process_mark(number) == leader:
        found |= {number, *descendants(number)}
        found |= {each for each in processes if (fields := _process_fields(str(each))) and int(fields[2]) == number}
    return found - {os.getpid()}


def _environment_of(process: int) -> list[bytes]:
    try:
        with open(f"/proc/{process}/environ", "rb") as file:
            return file.read().split(b"\0")
    except OSError:  # it ended, or is another user's
        return []


def process_mark(process: int) -> str:
    """What tells this process from a later one with the same number; empty if it ended, or the system cannot tell."""
    fields = _process_fields(str(process)) if IS_LINUX else []
    return f"{process} {fields[_START_TIME].decode()}" if fields else ""


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


# --- cgroups (version 2, Linux)

_CGROUP_PREFIX = "waystation-"
_SETTLED_SECONDS = 60.0
"""A cgroup of a run without processes that is older than this is one that was left over."""
_CLONE3 = 435
_CLONE_INTO_CGROUP = 0x200000000
_AT_EXEC = b"!"
_found_cgroup: str | None = None


def prepare_trees() -> None:
    """Do once for many trees what each would do by itself, and remove cgroups of runs that left nothing behind."""
    own = _own_cgroup()
    with contextlib.suppress(OSError):
        for name in os.listdir(own) if own else ():
            path = os.path.join(own, name)
            if name.startswith(_CGROUP_PREFIX) and time.time() - os.stat(path).st_mtime > _SETTLED_SECONDS:
                _remove_cgroup(path)


def _own_cgroup() -> str:
    """The folder of the cgroup that this process is in; empty where there is none that we may make others below."""
    global _found_cgroup  # noqa: PLW0603 - asked once, by the fork server for all its forks
    if _found_cgroup is None:
        try:
            _found_cgroup = _find_cgroup() if IS_LINUX else ""
        except (OSError, ValueError):
            _found_cgroup = ""
        if not os.access(_found_cgroup, os.W_OK):
            _found_cgroup = ""
    return _found_cgroup


def _find_cgroup() -> str:
    with open("/proc/self/cgroup", encoding="utf-8") as file:
        own = next((line[3:].rstrip("\n") for line in file if line.startswith("0::")), "")
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            root, mounted_at = left.split(" ")[3:5]
            if right.startswith("cgroup2 ") and (root == "/" or f"{own}/".startswith(f"{root}/")):
                return mounted_at + (own if root == "/" else own.removeprefix(root)).rstrip("/")
    return ""


def _cgroup_name(name: str) -> str:
    return _CGROUP_PREFIX + name


def _make_cgroup(name: str) -> str:
    """A cgroup for the tree of this name; empty where there can be none."""
    if not (own := _own_cgroup()):
        return ""
    path = os.path.join(own, _cgroup_name(name))
    # Never one that is there: in a cgroup that was once ended, the kernel ends whatever is born into it.
    _remove_cgroup(path)
    try:
        os.mkdir(path, 0o755)
    except OSError:
        return ""
    return path


def _remove_cgroup(cgroup: str) -> None:
    """Unless something lives in it."""
    if cgroup:
        with contextlib.suppress(OSError):
            os.rmdir(cgroup)


def _is_populated(cgroup: str) -> bool:
    """Whether a process lives in it, or below it."""
    if not cgroup:
        return False
    try:
        with open(os.path.join(cgroup, "cgroup.events"), "rb") as file:
            return b"populated 1" in file.read()
    except OSError:
        return False


def _kill_cgroup(cgroup: str) -> None:
    if not cgroup:
        return
    # Since Linux 5.14; before that what else is known of the tree must do.
    with contextlib.suppress(OSError), open(os.path.join(cgroup, "cgroup.kill"), "wb", buffering=0) as file:
        file.write(b"1")


def _start_in_cgroup(
    cgroup: str, argv: Sequence[str], environment: Mapping[str, str], output: int, errors: int
) -> int | None:
    """As `start_leader`, but the process is born in `cgroup`. None where this kernel or its rules do not allow that.

    To move a process into a cgroup takes the kernel ten milliseconds and more; to fork it there (clone3(2)) takes none.
    Python has no such fork. This process must have one thread, and what the fork does before its `exec` is little.

    Raises:
        OSError: it could not be started, and nothing ran.
    """
    if _forking_libc is None:
        return None
    folder = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | _NOT_INHERITED)
    reading, writing = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        wanted = (ctypes.c_uint64 * 11)(_CLONE_INTO_CGROUP, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, folder)
        child = _forking_libc.syscall(_CLONE3, ctypes.byref(wanted), ctypes.sizeof(wanted))
        if child == 0:
            _become(argv, environment, output, errors, writing)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(folder)
        os.close(writing)
    with open(reading, "rb", buffering=0) as file:
        told = file.read() if child > 0 else b""
    if told == _AT_EXEC:
        return int(child)
    if child > 0:
        os.waitpid(child, 0)
    if not told:  # where a cgroup above was once ended, the kernel ends it at its birth: nothing of it ran
        return None
    number = int(told.lstrip(_AT_EXEC))
    raise OSError(number, os.strerror(number), argv[0])


def _become(argv: Sequence[str], environment: Mapping[str, str], output: int, errors: int, told: int) -> NoReturn:
    """In the fork: become the program. `told` hears that it comes to that, and the error's number where it fails."""
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(errors, 2)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.write(told, _AT_EXEC)
        os.execvpe(argv[0], list(argv), environment)  # noqa: S606 - a shell is what nobody asked for
    except OSError as error:
        os.write(told, _AT_EXEC + str(error.errno).encode())
    finally:
        os._exit(127)


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
_forking_libc = ctypes.PyDLL(None) if _libc is not None else None
"""The same; its calls keep the interpreter to themselves, as one that returns twice must."""
_syncfs = getattr(_libc, "syncfs", None)
