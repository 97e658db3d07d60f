"""Running a script so that it outlives us: start it, watch it, collect its end, stop it. By any process, at any time.

The script belongs to a runner (`agent.runs.runner`), a process of its own that keeps everything in one folder per operation.
Used by the agent for scripts and services, and by the orchestrator for what runs on the server.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, Protocol

import msgspec
from msgspec import Meta

from agent import platform
from agent.runs.fork_server import ForkServer
from agent.runs.runner import BEGUN, COMPLAINTS, EXIT, LEADER, LOCK, OUTPUT, SPEC, STOP
from agent.runs.secret_forms import SHORTEST
from relay.errors import StoreError, UsageError
from relay.folders import make_folder
from relay.support.durable import sync_folder, write_durably

_LOOK_FIRST, _LOOK_SHARE, _LOOK_MAX = 0.001, 0.05, 0.01
"""Seconds between two looks at a folder, hence how late an end is seen, and output: a share of the time that was waited,
so that a script of a moment costs a moment, and one of hours no processor.
"""
_LOCK_LOOK_SECONDS: Final = 0.25
_START_SECONDS: Final = 5.0
"""A runner that did not begin by then (and is not our child) is not coming."""
_PIECE_BYTES: Final = 65536

OnOutput = Callable[[int, bytes], Awaitable[None] | None]
"""Takes a piece of output and its offset in the whole."""
RunState = Literal["new", "running", "ended", "unknown"]


class RunSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to run. It is written to disk: it names secrets, and holds none.

    Attributes:
        argv: the program and its arguments; the program is looked up in the PATH of the given environment.
        cwd: absolute folder that it is started in.
        timeout: seconds, more than 0.
        stall: seconds without output after which it is ended; None: never.
        secret_names: variables of the environment whose values are masked in the output.
        grace: seconds between TERM and KILL.
        head_bytes, tail_bytes: of longer output only that much of its beginning and end is kept.
    """

    argv: tuple[str, ...]
    cwd: str
    timeout: float
    secret_names: tuple[str, ...] = ()
    grace: float = 10.0
    head_bytes: int = 5_000_000
    tail_bytes: int = 5_000_000
    stall: float | None = None


class Outcome(msgspec.Struct, frozen=True):
    """How a run ended.

    Attributes:
        state: `done`: exit status 0. `failed`: another one, one of its limits, or it could not be started. `stopped`:
            it was asked for. `unknown`: it began, and its runner was lost before the end; it may even still run.
        exit_status: of the script, negative for the signal that ended it; None if there is none.
        reason: a sentence for a person; empty when done.
        started, ended: seconds since 1970; 0 where that is not known.
        output_bytes: size of the output as it is kept.
    """

    state: Literal["done", "failed", "stopped", "unknown"]
    exit_status: int | None
    reason: str
    started: float
    ended: float
    output_bytes: int


def launch(folder: str, spec: RunSpec, environment: Mapping[str, str]) -> None:
    """Run `spec` in `folder` (made if needed, private), at most once: again is harmless, also at the same time.

    The script sees exactly `environment`, and `agent.platform.RUN`. It runs on when this process ends.

    Raises:
        UsageError: the spec is wrong, or a secret is missing or shorter than 4 characters; nothing was started.
        StoreError: the folder cannot be written, or no process can be started; nothing was started.
    """
    _check(spec, environment)
    folder = os.path.abspath(folder)
    try:
        if not os.path.isdir(folder):
            make_folder(folder, mode=0o700)
            sync_folder(os.path.dirname(folder))
        if _has(folder, BEGUN) or _has(folder, EXIT):
            return
        written = {**msgspec.to_builtins(spec), "environment": sorted(environment), "run": _name_of(folder)}
        _write_spec(os.path.join(folder, SPEC), msgspec.json.encode(written))
        _forget_ended()
        _children.append((folder, _start(folder, environment)))
    except ValueError as error:
        raise UsageError(f"this cannot be run: {error}") from error
    except OSError as error:
        raise StoreError(f"cannot start a runner in {folder}: {error}") from error


async def watch(folder: str, on_output: OnOutput | None = None) -> Outcome:
    """Wait for the end, however it comes, and hand over the output as it grows. Stops nothing.

    Raises:
        StoreError: it never began, and no runner is there to begin it; `launch` it again. Or the folder is unreadable.
    """
    folder = os.path.abspath(folder)  # noqa: ASYNC240 - contacts no disk
    began = time.monotonic()
    give_up = began + _START_SECONDS
    look_at_lock = 0.0
    offset = 0
    while True:
        result = _result(folder)
        offset = await _tell(folder, on_output, offset)
        if result:
            return result
        if time.monotonic() >= look_at_lock:
            starting = _is_starting(folder, give_up)
            state = state_of(folder)
            if state == "unknown":
                await _tell(folder, on_output, offset)
                return _lost(folder)
            if state == "new" and not starting:
                raise StoreError(f"the run in {folder} never began{_complaint(folder)}")
            look_at_lock = time.monotonic() + _LOCK_LOOK_SECONDS
        await asyncio.sleep(min(max((time.monotonic() - began) * _LOOK_SHARE, _LOOK_FIRST), _LOOK_MAX))


def state_of(folder: str) -> RunState:
    """Where a run stands. "new": it did not begin (yet); "unknown": it began, and its runner was lost."""
    # In this order: what begins after the first look has the lock at the second, or its result at the third.
    begun = _has(folder, BEGUN)
    locked = platform.is_locked(os.path.join(folder, LOCK))
    if _has(folder, EXIT):
        return "ended"
    if locked:
        return "running"
    return "unknown" if begun else "new"


def stop(folder: str) -> None:
    """Ask for the end: TERM to all its processes, the grace, KILL. `watch` tells when it came. Also before it begins.

    Of an unknown run (its runner was lost) all that can be found of it is ended at once: then it may be repeated.

    Raises:
        StoreError: the folder cannot be written, or does not exist.
    """
    state = state_of(folder)
    if state == "ended":
        return
    try:
        write_durably(os.path.join(folder, STOP), b"", mode=0o600)
        if state == "unknown":
            platform.end_lost(_name_of(os.path.abspath(folder)), _text(folder, LEADER))
    except FileNotFoundError:
        if not os.path.isdir(folder):
            raise StoreError(f"there is no run in {folder}") from None
    except OSError as error:
        raise StoreError(f"cannot stop the run in {folder}: {error}") from error


# --- the runner as our child

_CODE_FOLDER: Final = str(Path(__file__).resolve().parents[2])
# Without Python's tidying up at the end: it would take a sixth of the processor time that a runner needs in all.
_START: Final = "import sys; sys.path.append(sys.argv[1]); from agent.runs.runner import main; main(sys.argv[2]); import os; os._exit(0)"


class _Child(Protocol):
    """A runner that this process started."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """None while it lives. Its parent must ask, or it stays as a zombie."""


_children: list[tuple[str, _Child]] = []
_fork_server: Final = ForkServer(_CODE_FOLDER)


def _start(folder: str, environment: Mapping[str, str]) -> _Child:
    """A runner for the folder: forked off by the fork server, or else a fresh interpreter. Raises `OSError`, `ValueError`."""
    if runner := _fork_server.start(folder, environment):
        return runner
    command = [sys.executable, *platform.UTF8, "-I", "-S", "-c", _START, _CODE_FOLDER, folder]
    return platform.start_detached(command, environment, complaints=os.path.join(folder, COMPLAINTS))


def _forget_ended() -> None:
    _children[:] = [(folder, child) for folder, child in _children if child.poll() is None]


def _is_starting(folder: str, give_up: float) -> bool:
    """Whether a runner may still begin here: one of ours that lives, or one of another process, for a while."""
    ours = [child for of, child in _children if of == folder]
    return any(child.poll() is None for child in ours) if ours else time.monotonic() < give_up


# --- the folder


class _Exit(msgspec.Struct, frozen=True):
    """As the runner wrote it."""

    status: int | None
    cause: Literal["", "timed_out", "stalled", "stopped"]
    reason: str
    started: float
    ended: float
    output_bytes: Annotated[int, Meta(ge=0)]


def _result(folder: str) -> Outcome | None:
    """The end as it was recorded, or None as long as there is none. Raises `StoreError`."""
    path = os.path.join(folder, EXIT)
    try:
        with open(path, "rb") as file:
            return _outcome(msgspec.json.decode(file.read(), type=_Exit))
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise StoreError(f"the result {path} cannot be read: {error}") from error


def _outcome(found: _Exit) -> Outcome:
    state: Literal["done", "failed", "stopped"] = "done" if found.status == 0 else "failed"
    if found.cause:
        state = "stopped" if found.cause == "stopped" else "failed"
    reason = found.reason
    if state == "failed" and not reason and found.status is not None:
        ended_by = f"it was ended by {platform.signal_name(-found.status)}"
        reason = ended_by if found.status < 0 else f"it ended with exit status {found.status}"
    return Outcome(state, found.status, reason, found.started, found.ended, found.output_bytes)


def _lost(folder: str) -> Outcome:
    """Of a run whose runner was lost."""
    try:
        began = float(_text(folder, BEGUN) or 0)
    except ValueError:  # the machine went down while it was written
        began = 0.0
    reason = "it began, but its runner was lost before the end: whether it did its work is unknown"
    return Outcome("unknown", None, reason, began, 0.0, _size(folder))


async def _tell(folder: str, on_output: OnOutput | None, offset: int) -> int:
    """Hand over what came after `offset`; where it ends now."""
    while on_output is not None and (piece := _piece(folder, offset)):
        answer = on_output(offset, piece)
        if inspect.isawaitable(answer):
            await answer
        offset += len(piece)
    return offset


def _piece(folder: str, offset: int) -> bytes:
    if _size(folder) <= offset:
        return b""
    with open(os.path.join(folder, OUTPUT), "rb") as file:
        file.seek(offset)
        return file.read(_PIECE_BYTES)


def _name_of(folder: str) -> str:
    """What all processes of the run in this folder have in their environment."""
    return hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]


def _write_spec(path: str, data: bytes) -> None:
    """As a whole, but not synced: after a power cut it is not read. What had begun is unknown, the rest is launched again."""
    temporary = f"{path}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
    os.replace(temporary, path)


def _size(folder: str) -> int:
    try:
        return os.stat(os.path.join(folder, OUTPUT)).st_size
    except FileNotFoundError:
        return 0


def _has(folder: str, name: str) -> bool:
    return os.path.exists(os.path.join(folder, name))


def _text(folder: str, name: str) -> str:
    try:
        with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _complaint(folder: str) -> str:
    """The last line of what Python said there."""
    lines = _text(folder, COMPLAINTS).strip().splitlines()
    return f": {lines[-1]}" if lines else ""


def _check(spec: RunSpec, environment: Mapping[str, str]) -> None:
    if not spec.argv or not spec.argv[0]:
        raise UsageError("nothing to run: expected a program and its arguments")
    if not os.path.isabs(spec.cwd):
        raise UsageError(f"a run's folder must be absolute, not {spec.cwd!r}")
    if not spec.timeout > 0 or not spec.grace >= 0:
        raise UsageError(f"a run needs a time limit of more than 0 s (not {spec.timeout}) and a grace of at least 0 s")
    if spec.stall is not None and not spec.stall > 0:
        raise UsageError(f"a run cannot be ended after {spec.stall} s without output")
    if any("\0" in text for text in (*spec.argv, spec.cwd, *environment, *environment.values())):
        raise UsageError("an argument, folder or variable of a run has a null character in it")
    for name in spec.secret_names:
        if name not in environment:
            raise UsageError(f"the secret {name} is not in the environment of the run")
        if len(environment[name]) < SHORTEST:
            raise UsageError(
                f"the secret {name} must have at least {SHORTEST} characters: a shorter one cannot be masked"
            )
