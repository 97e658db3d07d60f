"""A forked runner is no other than one that was started alone, and nothing depends on who forked it, or whether it lives."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness.logs import printed
from harness.process import eventually

from agent import platform
from agent.runs import fork_server, runs
from agent.runs.fork_server import ForkServer
from agent.runs.runs import RunSpec, launch, state_of, watch
from agent.runs.scripts import base_environment
from deploy.demo.programs import end_what_is_left
from relay.errors import StoreError, UsageError

pytestmark = pytest.mark.skipif(not platform.CAN_FORK, reason="there are fork servers on Linux only")

SECRET = "cörrect-horse-battery"


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServer]:
    """A fork server for the test alone."""
    made = ForkServer(runs._CODE_FOLDER)
    monkeypatch.setattr(runs, "_fork_server", made)
    yield made
    made._end()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "operations" / "one"


def started(folder: Path, script: str, **variables: str) -> runs._Child:
    """The runner of `script`, which did not begin before."""
    again(folder, script, **variables)
    return [child for of, child in runs._children if of == str(folder)][-1]


def again(folder: Path, script: str, **variables: str) -> None:
    """Launch it, also when somebody else did."""
    secrets = tuple(name for name in variables if name.startswith("SECRET"))
    spec = RunSpec(("sh", "-c", script), "/", 60.0, secret_names=secrets)
    launch(str(folder), spec, {**base_environment(), **variables})


def pid_of(server: ForkServer) -> int:
    assert server._process is not None
    return server._process.pid


def status_of(process: int) -> dict[str, str]:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def children_of(process: int) -> list[tuple[int, str]]:
    """Each child and its state, zombies too."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process:
            found.append((int(path.parent.name), fields[0]))
    return found


def lives(process: int) -> bool:
    return bool(platform.process_mark(process))


# --- what it is


async def test_all_runners_of_a_process_come_from_one_fork_server_and_none_stays_as_a_zombie(
    tmp_path: Path, ours: ForkServer
) -> None:
    parents = set()
    for number in range(10):
        child = started(tmp_path / str(number), f"while [ ! -e {tmp_path}/go ]; do sleep 0.02; done")
        parents.add(int(status_of(child.pid)["PPid"]))
    assert parents == {pid_of(ours)}
    assert len(children_of(pid_of(ours))) == 10
    (tmp_path / "go").touch()
    for number in range(10):
        assert (await watch(str(tmp_path / str(number)))).state == "done"
    await eventually(lambda: not children_of(pid_of(ours)))


def seen_of(process: int, folder: Path) -> dict[str, object]:
    """All that a runner could have of whoever started it."""
    status, at = status_of(process), Path(f"/proc/{process}")
    names = ("Umask", "Uid", "Gid", "Groups", "SigBlk", "SigIgn", "SigCgt", "ShdPnd", "CapEff", "NoNewPrivs", "Threads")
    files = sorted(os.readlink(path).partition(":")[0].replace(str(folder), "") for path in (at / "fd").iterdir())
    session = (at / "stat").read_text().rpartition(")")[2].split()[2:4]
    return {
        **{name: status[name] for name in names},
        "leads": session == [str(process)] * 2,
        "files": files,
        "standard": [os.readlink(at / "fd" / str(number)).replace(str(folder), "") for number in range(3)],
        "cwd": os.readlink(at / "cwd"),
        "limits": (at / "limits").read_text(),
        "oom": (at / "oom_score_adj").read_text(),
        "last argument": (at / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")[-1].replace(bytes(folder), b""),
        "nice": os.getpriority(os.PRIO_PROCESS, process),
        "on": os.sched_getaffinity(process),
    }


async def test_a_forked_runner_has_all_that_one_of_its_own_has_and_nothing_else(
    tmp_path: Path, ours: ForkServer
) -> None:
    seen = {}
    for way in ("forked", "alone"):
        folder = tmp_path / way
        ours._works = way == "forked"
        child = started(
            folder,
            "env | grep -v ^WAYSTATION_RUN= | sort; umask; echo all told; exec sleep 1000",
            VAR_A="ä b=c",
            LC_ALL="C",
        )
        assert isinstance(child, fork_server.Runner) is ours._works
        await eventually((folder / "leader").exists)
        await eventually(lambda at=folder: (at / "output").read_bytes().endswith(b"all told\n"))
        seen[way] = seen_of(child.pid, folder), printed((folder / "output").read_bytes())
        runs.stop(str(folder))
        assert (await watch(str(folder))).state == "stopped"
    assert seen["forked"] == seen["alone"]
    assert "VAR_A=ä b=c" in seen["forked"][1].decode()
    assert seen["forked"][0]["leads"]
    assert seen["forked"][0]["last argument"] == b""  # it is the folder


async def test_a_secret_is_in_no_file_and_on_no_command_line(folder: Path, ours: ForkServer) -> None:
    child = started(folder, "echo $SECRET_A; exec sleep 1000", SECRET_A=SECRET)
    await eventually(lambda: (folder / "output").exists() and (folder / "output").stat().st_size > 0)
    shown = {path: path.read_bytes() for path in folder.iterdir()}
    for process in (child.pid, pid_of(ours)):
        for name in ("cmdline", "environ"):
            path = Path(f"/proc/{process}/{name}")
            shown[path] = path.read_bytes()
    assert [path for path, content in shown.items() if SECRET.encode() in content] == []
    assert printed((folder / "output").read_bytes()) == b"********\n"
    script = int((folder / "leader").read_text().split()[0])
    assert SECRET.encode() in Path(f"/proc/{script}/environ").read_bytes(), "it was looked for in vain"
    runs.stop(str(folder))
    await watch(str(folder))


async def test_one_runs_secrets_are_unknown_to_the_script_of_the_next(tmp_path: Path) -> None:
    started(tmp_path / "one", "true", SECRET_A=SECRET, VAR_A="1")
    await watch(str(tmp_path / "one"))
    launch(str(tmp_path / "two"), RunSpec(("/usr/bin/env",), "/", 60.0), {"B": "2"})
    await watch(str(tmp_path / "two"))
    lines = printed((tmp_path / "two" / "output").read_bytes()).splitlines()
    assert [line for line in lines if not line.startswith(b"WAYSTATION_RUN=")] == [b"B=2"]


async def test_a_program_is_looked_up_where_the_run_says_and_not_where_its_launcher_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "only-here").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name, environment in (("without", {}), ("with", {"PATH": str(tmp_path / "bin")})):
        launch(str(tmp_path / name), RunSpec(("only-here",), "/", 60.0), environment)
    assert "could not be started" in (await watch(str(tmp_path / "without"))).reason
    assert (await watch(str(tmp_path / "with"))).state == "done"


async def test_a_large_environment_arrives_whole(folder: Path) -> None:
    """Larger than what a socket takes at once."""
    many = {f"VAR_{number}": str(number % 10) * 100_000 for number in range(8)}
    started(folder, 'for n in 0 1 2 3 4 5 6 7; do eval "printf %s \\"\\$VAR_$n\\""; done', **many)
    assert (await watch(str(folder))).state == "done"
    assert printed((folder / "output").read_bytes()).decode() == "".join(many.values())


async def test_who_looks_for_a_folder_on_command_lines_finds_the_runner_of_a_script_in_it(folder: Path) -> None:
    child = started(folder, "exec sleep 1000")
    await eventually((folder / "leader").exists)
    await end_what_is_left(folder.parent)
    assert not lives(child.pid)
    assert (await watch(str(folder))).state == "stopped"


# --- many, and again


async def test_fifty_launched_at_once_run_once_each(tmp_path: Path, ours: ForkServer) -> None:
    calls = []
    with ThreadPoolExecutor(100) as threads:
        for _ in range(2):  # twice each
            for number in range(50):
                given = threads.submit(again, tmp_path / str(number), f"echo run >> {tmp_path}/counter-{number}")
                calls.append(given)
    assert [call.exception() for call in calls] == [None] * 100
    assert ours._process is not None
    outcomes = await asyncio.gather(*(watch(str(tmp_path / str(number))) for number in range(50)))
    assert {outcome.state for outcome in outcomes} == {"done"}
    assert {(tmp_path / f"counter-{number}").read_text() for number in range(50)} == {"run\n"}
    await eventually(lambda: not children_of(pid_of(ours)))


async def test_a_runner_that_broke_before_it_began_is_told_at_once(folder: Path, ours: ForkServer) -> None:
    (folder / "output").mkdir(parents=True)
    started(folder, "true")
    with pytest.raises(StoreError, match="never began: IsADirectoryError"):
        await watch(str(folder))
    assert lives(pid_of(ours))


async def test_what_the_fork_server_cannot_do_is_told_as_ever_and_it_goes_on(folder: Path, ours: ForkServer) -> None:
    (folder / "runner.log").mkdir(parents=True)
    with pytest.raises(StoreError, match="Is a directory"):
        started(folder, "true")
    with pytest.raises(UsageError):
        launch(str(folder.parent / "two"), RunSpec(("true",), "/", 1.0), {"A=B": "1"})
    first = pid_of(ours)
    (folder / "runner.log").rmdir()
    assert isinstance(started(folder, "true"), fork_server.Runner)
    assert (await watch(str(folder))).state == "done"
    assert pid_of(ours) == first


# --- without it


async def test_where_no_fork_server_can_be_a_runner_is_started_alone_and_it_is_not_tried_again(
    tmp_path: Path, ours: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def command() -> list[str]:
        tried.append(1)
        return ["false"]

    monkeypatch.setattr(ours, "_command", command)
    for number in range(3):
        assert isinstance(started(tmp_path / str(number), "exit 3"), subprocess.Popen)
        assert (await watch(str(tmp_path / str(number)))).exit_status == 3
    assert len(tried) == 1
    assert ours._process is None


async def test_a_fork_server_that_was_killed_is_replaced_and_its_runners_live_on(
    tmp_path: Path, ours: ForkServer
) -> None:
    wait = f"while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; exit 7"
    old = started(tmp_path / "old", wait)
    first = pid_of(ours)
    os.kill(first, signal.SIGKILL)
    await eventually(lambda: not lives(first))
    assert isinstance(started(tmp_path / "between", "exit 8"), subprocess.Popen)
    assert isinstance(started(tmp_path / "new", "exit 9"), fork_server.Runner)
    assert pid_of(ours) != first
    assert lives(old.pid)
    assert first not in dict(children_of(os.getpid())), "it stays as a zombie"
    (tmp_path / "go").touch()
    outcomes = [await watch(str(tmp_path / name)) for name in ("old", "between", "new")]
    assert [outcome.exit_status for outcome in outcomes] == [7, 8, 9]


async def test_a_fork_server_that_does_not_answer_is_left(
    tmp_path: Path, ours: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(tmp_path / "one", "true")
    first = pid_of(ours)
    monkeypatch.setattr(fork_server, "_ANSWER_SECONDS", 0.5)
    os.kill(first, signal.SIGSTOP)
    assert isinstance(started(tmp_path / "two", f"echo run >> {tmp_path}/counter"), subprocess.Popen)
    assert not Path(f"/proc/{first}").exists()
    assert (await watch(str(tmp_path / "two"))).state == "done"
    assert (tmp_path / "counter").read_text() == "run\n"


async def test_a_fork_server_asked_to_end_ends_and_its_runners_do_not(folder: Path, ours: ForkServer) -> None:
    child = started(folder, "exec sleep 1000")
    await eventually((folder / "leader").exists)
    os.kill(pid_of(ours), signal.SIGTERM)
    await eventually(lambda: not lives(pid_of(ours)))
    assert lives(child.pid)
    os.kill(child.pid, signal.SIGTERM)
    assert (await watch(str(folder))).state == "stopped"


# --- killed at any moment

LAUNCHER = """
import os, sys
from agent.runs import runs
from agent.runs.scripts import base_environment
folder = sys.argv[1]
for number in range(1000):
    spec = runs.RunSpec(("sh", "-c", f"echo run >> {folder}/counter-{number}"), "/", 60.0)
    runs.launch(f"{folder}/{number}", spec, base_environment())
    print(runs._fork_server._process.pid, flush=True)
"""


@pytest.mark.parametrize("seed", range(6))
async def test_a_launcher_that_is_killed_takes_its_fork_server_with_it_and_no_runner(tmp_path: Path, seed: int) -> None:
    """Killed at any moment of a launch; what it launched is launched again by another."""
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path)], stdout=subprocess.PIPE)
    assert launcher.stdout is not None
    its_fork_server = int(launcher.stdout.readline())
    assert lives(its_fork_server)
    await asyncio.sleep(random.Random(seed).random() * 0.1)
    launcher.kill()
    launcher.communicate()
    await eventually(lambda: not lives(its_fork_server))
    begun = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert begun
    for path in begun:
        again(path, f"echo run >> {tmp_path}/counter-{path.name}")
        assert (await watch(str(path))).state == "done"
        assert (tmp_path / f"counter-{path.name}").read_text() == "run\n"


async def test_a_fork_server_that_is_killed_at_any_moment_costs_no_run_and_repeats_none(
    tmp_path: Path, ours: ForkServer
) -> None:
    """Also between a request and its answer: then two runners are started, and one of them runs the script."""
    killed, alone, took, chance = set(), 0, {}, random.Random(1)

    def kill() -> None:
        if process := ours._process:
            process.send_signal(signal.SIGKILL)
            killed.add(process.pid)

    def launch(number: int) -> None:
        nonlocal alone
        ours._works = True  # also when one was killed before it answered first
        begun = time.monotonic()
        alone += isinstance(
            started(tmp_path / str(number), f"echo run >> {tmp_path}/counter-{number}"), subprocess.Popen
        )
        took[number % 4] = time.monotonic() - begun

    # By turns, undisturbed: one that must start a fork server, one that finds it; then each of them with a kill at a moment
    # within the time that it just took, however slow the machine is today.
    for number in range(60):
        if number % 4 < 2:
            launch(number)
            continue
        within = took[1 if number % 4 == 2 else 0]
        killer = threading.Timer(chance.random() * within, kill)
        killer.start()
        launch(number)
        killer.join()
    assert len(killed) > 5, "no fork server was killed"
    assert 0 < alone < 60
    for number in range(60):
        assert (await watch(str(tmp_path / str(number)))).state == "done"
        assert state_of(str(tmp_path / str(number))) in {"ended", "running"}
    await eventually(lambda: not any(platform.is_locked(str(tmp_path / str(n) / "lock")) for n in range(60)))
    assert {(tmp_path / f"counter-{number}").read_text() for number in range(60)} == {"run\n"}
    assert not killed & dict(children_of(os.getpid())).keys() - {pid_of(ours) if ours._process else 0}
