"""A script runs at most once, outlives whoever started it, and its end is never guessed."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from harness.logs import printed
from harness.process import eventually
from harness.seed import SOAK
from hypothesis import given
from hypothesis import strategies as st

from agent import platform
from agent.runs import runs
from agent.runs.masking import MASK
from agent.runs.runner import HeadAndTail, Output
from agent.runs.runs import Outcome, RunSpec, launch, state_of, stop, watch
from agent.runs.scripts import base_environment
from relay.errors import StoreError, UsageError

SECONDS = 20.0
"""More than anything here takes; a promise that is broken must not hang the suite."""


def spec(script: str, *, timeout: float = 60.0, cwd: str = "/", **more) -> RunSpec:
    return RunSpec(("sh", "-c", script), cwd, timeout, **more)


async def ran(folder: Path, script: str, environment: dict[str, str] | None = None, **more) -> Outcome:
    launch(str(folder), spec(script, **more), {**base_environment(), **(environment or {})})
    return await watch(str(folder))


def output(folder: Path) -> bytes:
    return printed((folder / "output").read_bytes())


def runner_of(folder: Path) -> int:
    """The runner's process: the last one that this process started for the folder."""
    return [child.pid for of, child in runs._children if of == str(folder)][-1]


def run_of(folder: Path) -> dict[str, str]:
    """What stands in the environment of all that runs there, beside what was given."""
    return {platform.RUN: json.loads((folder / "spec.json").read_text())["run"]}


def lives(process: int) -> bool:
    return bool(platform.process_mark(process))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "operations" / "one"


# --- what a script sees, and what is seen of it


async def test_a_script_that_ends_well_is_done(folder: Path) -> None:
    before = time.time()
    outcome = await ran(folder, "echo out; echo err >&2")
    assert (outcome.state, outcome.exit_status, outcome.reason) == ("done", 0, "")
    assert before <= outcome.started <= outcome.ended <= time.time()
    assert output(folder) == b"out\nerr\n"
    assert outcome.output_bytes == (folder / "output").stat().st_size
    assert state_of(str(folder)) == "ended"
    assert (folder / "runner.log").read_text() == ""


async def test_each_line_has_the_time_and_the_stream_that_it_was_printed_to(folder: Path) -> None:
    before = time.time()
    await ran(folder, "printf 'one\ntwo\nha'; sleep 0.1; echo lf; sleep 0.1; echo wrong >&2")
    lines = [line.split(b" ", 3) for line in (folder / "output").read_bytes().splitlines()]
    assert [(stream, tag, text) for _, stream, tag, text in lines] == [
        (b"stdout", b"F", b"one"),
        (b"stdout", b"F", b"two"),
        (b"stdout", b"P", b"ha"),
        (b"stdout", b"F", b"lf"),
        (b"stderr", b"F", b"wrong"),
    ]
    times = [datetime.fromisoformat(at.decode()).timestamp() for at, *_ in lines]
    assert times == sorted(times)
    assert before - 0.001 <= times[0] <= times[-1] <= time.time()


async def test_an_exit_status_is_a_failure_that_says_so(folder: Path) -> None:
    outcome = await ran(folder, "exit 3")
    assert (outcome.state, outcome.exit_status, outcome.reason) == ("failed", 3, "it ended with exit status 3")


async def test_a_signal_is_a_failure_that_names_it(folder: Path) -> None:
    outcome = await ran(folder, "kill -SEGV $$")
    assert (outcome.state, outcome.exit_status) == ("failed", -signal.SIGSEGV)
    assert "SIGSEGV" in outcome.reason


async def test_a_script_sees_exactly_its_environment_its_folder_and_an_empty_input(folder: Path) -> None:
    code = "import os, sys; print(dict(sorted(os.environb.items())), os.getcwd(), sys.stdin.read(), os.getsid(0) == os.getpid())"
    environment = {"LC_ALL": "C", "VAR_A": "ä b"}
    run = RunSpec((sys.executable, "-c", code), str(folder.parent.parent), 60.0)
    launch(str(folder), run, environment)
    assert (await watch(str(folder))).state == "done"
    expected = {name.encode(): value.encode() for name, value in (environment | run_of(folder)).items()}
    assert output(folder).decode() == f"{expected} {folder.parent.parent}  True\n"


async def test_python_adds_nothing_to_a_scripts_environment(folder: Path) -> None:
    """An interpreter without a locale sets LC_CTYPE for itself (PEP 538): a script must not inherit that."""
    launch(str(folder), RunSpec(("/usr/bin/env",), "/", 60.0), {"A": "1"})
    assert (await watch(str(folder))).state == "done"
    (run,) = run_of(folder).values()
    assert output(folder).decode() == f"A=1\n{platform.RUN}={run}\n"


async def test_signals_that_python_ignores_are_not_ignored_in_a_script(folder: Path) -> None:
    outcome = await ran(folder, "kill -PIPE $$; echo survived")
    assert outcome.exit_status == -signal.SIGPIPE


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (RunSpec(("/no/such/program",), "/", 60.0), "/no/such/program"),
        (RunSpec(("true",), "/no/such/folder", 60.0), "/no/such/folder"),
    ],
)
async def test_what_cannot_be_started_has_failed(folder: Path, run: RunSpec, text: str) -> None:
    launch(str(folder), run, base_environment())
    outcome = await watch(str(folder))
    assert (outcome.state, outcome.exit_status) == ("failed", None)
    assert "could not be started: No such file" in outcome.reason
    assert text in outcome.reason


@pytest.mark.parametrize(
    "run",
    [
        RunSpec((), "/", 1.0),
        RunSpec(("true",), "relative", 1.0),
        RunSpec(("true",), "/", 0.0),
        RunSpec(("true",), "/", float("nan")),
        RunSpec(("true", "a\0b"), "/", 1.0),
        RunSpec(("true",), "/", 1.0, secret_names=("SECRET_MISSING",)),
        RunSpec(("true",), "/", 1.0, secret_names=("SECRET_SHORT",)),
    ],
)
def test_a_wrong_spec_is_refused_before_anything_is_made(folder: Path, run: RunSpec) -> None:
    with pytest.raises(UsageError):
        launch(str(folder), run, {**base_environment(), "SECRET_SHORT": "abc"})
    assert not folder.exists()


async def test_nobody_else_can_read_a_run(folder: Path) -> None:
    await ran(folder, "echo hello")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in folder.iterdir()} <= {0, 0o044}
    assert stat.S_IMODE((folder / "output").stat().st_mode) == 0o600


async def test_output_comes_in_pieces_that_make_the_whole_from_any_offset(folder: Path) -> None:
    pieces: list[tuple[int, bytes]] = []

    async def keep(offset: int, piece: bytes) -> None:
        await asyncio.sleep(0)
        pieces.append((offset, piece))

    launch(str(folder), spec("seq 20000; sleep 0.1; seq 20000 30000"), base_environment())
    await watch(str(folder), keep)
    assert b"".join(piece for _, piece in pieces) == (folder / "output").read_bytes()
    assert [offset for offset, _ in pieces] == [
        sum(len(piece) for _, piece in pieces[:index]) for index in range(len(pieces))
    ]


# --- at most once


async def test_a_script_runs_once_however_often_it_is_launched(folder: Path) -> None:
    for _ in range(3):
        outcome = await ran(folder, f"echo run >> {folder.parent}/counter; exit 4")
        assert outcome.exit_status == 4
    assert (folder.parent / "counter").read_text() == "run\n"


async def test_launched_by_several_at_the_same_time_it_runs_once(tmp_path: Path) -> None:
    """The race is real: for most folders, more than one runner was started."""
    code = (
        "import os, sys, time\nfrom agent.runs import runs\n"
        "started = 0\nreal = runs._start\n"
        "def start(*a):\n    global started\n    started += 1\n    return real(*a)\n"
        "runs._start = start\n"
        "real(sys.argv[1], {})\n"  # whatever the first one has to do is done
        "print(flush=True)\nbegin = float(input())\n"
        "for n in range(10):\n"
        "    while time.time() < begin + n / 50: pass\n"
        "    counter = f'{sys.argv[1]}/counter-{n}'\n"
        "    spec = runs.RunSpec(('sh', '-c', f'echo run >> {counter}'), '/', 60.0)\n"
        "    runs.launch(f'{sys.argv[1]}/{n}', spec, {'PATH': os.environ['PATH']})\n"
        "print(started)\n"
    )
    launchers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    assert [launcher.stdout.readline() for launcher in launchers if launcher.stdout] == ["\n"] * 3
    begin = f"{time.time() + 0.1}\n"
    with ThreadPoolExecutor() as threads:
        started = [int(said) for said, _ in threads.map(lambda launcher: launcher.communicate(begin), launchers)]
    assert sum(started) > 10, "nobody raced"
    for number in range(10):
        assert (await watch(str(tmp_path / str(number)))).state == "done"
        await eventually(lambda at=number: not platform.is_locked(str(tmp_path / str(at) / "lock")))
        assert (tmp_path / f"counter-{number}").read_text() == "run\n"


async def test_a_runner_that_is_killed_at_any_moment_leaves_the_truth(tmp_path: Path) -> None:
    """SIGKILL at moments from before its start to after its end: the script ran at most once, and "done" means done."""
    seen = []
    for number in range(40):
        one, counter, finished = (tmp_path / f"{name}-{number}" for name in ("run", "counter", "finished"))
        in_the_middle = number % 5 == 4
        run = spec(f"echo run >> {counter}; sleep {1 if in_the_middle else 0.02}; touch {finished}")
        launch(str(one), run, base_environment())
        if in_the_middle:
            await eventually(counter.exists)
        else:
            await asyncio.sleep(max(0, number - 15) * 0.002)
        with suppress(ProcessLookupError):  # it may have come to its end
            os.kill(runner_of(one), signal.SIGKILL)
        await eventually(lambda at=one: not platform.is_locked(str(at / "lock")))
        state = state_of(str(one))
        launch(str(one), run, base_environment())
        outcome = await watch(str(one))
        if state == "new":
            assert outcome.state == "done"
        if state == "unknown":
            assert (outcome.state, outcome.exit_status) == ("unknown", None)
        if outcome.state == "done":
            assert finished.exists()
            assert counter.read_text() == "run\n"
        else:
            assert outcome.state == "unknown"
            assert not counter.exists() or counter.read_text() == "run\n"
        seen.append(state)
    assert "unknown" in seen, "no runner was killed between begin and end"
    assert "new" in seen, "no runner was killed before it began"


async def test_of_an_unknown_run_the_script_can_be_ended_before_it_is_repeated(folder: Path) -> None:
    launch(str(folder), spec(f"echo $$ > {folder}/pid; exec sleep 1000"), base_environment())
    await eventually(lambda: (folder / "pid").exists() and (folder / "pid").read_text() != "")
    script = int((folder / "pid").read_text())
    await eventually(lambda: (folder / "leader").exists() and (folder / "leader").read_text() != "")
    os.kill(runner_of(folder), signal.SIGKILL)
    assert (await watch(str(folder))).state == "unknown"
    assert lives(script)
    stop(str(folder))
    await eventually(lambda: not lives(script))
    assert (await watch(str(folder))).state == "unknown"


async def test_a_runner_that_breaks_before_it_begins_is_told_and_can_be_launched_again(folder: Path) -> None:
    (folder / "output").mkdir(parents=True)
    launch(str(folder), spec("true"), base_environment())
    with pytest.raises(StoreError, match="never began: IsADirectoryError"):
        await watch(str(folder))
    (folder / "output").rmdir()
    assert (await ran(folder, "true")).state == "done"


async def test_a_run_that_nobody_launched_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_START_SECONDS", 0.0)
    assert state_of(str(folder)) == "new"
    with pytest.raises(StoreError, match="never began"):
        await watch(str(folder))
    with pytest.raises(StoreError, match="there is no run"):
        stop(str(folder))


# --- it outlives its parent


async def test_a_script_outlives_whoever_started_it_and_its_end_is_collected_by_another(folder: Path) -> None:
    code = (
        "import sys, time\nfrom agent.runs import runs\nfrom agent.runs.scripts import base_environment\n"
        "spec = runs.RunSpec(('sh', '-c', sys.argv[2]), '/', 60.0)\n"
        "runs.launch(sys.argv[1], spec, base_environment())\nprint('launched', flush=True)\ntime.sleep(1000)\n"
    )
    script = f"echo before; while [ ! -e {folder.parent}/go ]; do sleep 0.02; done; echo after; exit 7"
    parent = subprocess.Popen([sys.executable, "-c", code, str(folder), script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"launched\n"
    await eventually(lambda: (folder / "output").exists() and output(folder) == b"before\n")
    parent.kill()
    assert parent.wait() == -signal.SIGKILL
    parent.stdout.close()
    assert state_of(str(folder)) == "running"
    (folder.parent / "go").touch()
    outcome = await watch(str(folder))
    assert (outcome.state, outcome.exit_status) == ("failed", 7)
    assert output(folder) == b"before\nafter\n"


# --- the end


DEAF = "trap '' TERM; echo $$ > {folder}/deaf; while :; do sleep 0.05; done"


async def test_a_time_limit_ends_the_whole_tree_also_who_left_the_group_and_ignores_term(folder: Path) -> None:
    folder.mkdir(parents=True)
    deaf = DEAF.format(folder=folder)
    script = f'setsid sh -c "{deaf.replace("$", chr(92) + "$")}" & sleep 1000 & while :; do sleep 0.05; done'
    outcome = await ran(folder, script, timeout=1.0, grace=0.4)
    assert (outcome.state, outcome.exit_status) == ("failed", -signal.SIGTERM)
    assert outcome.reason == "its time limit of 1 s was over"
    process = int((folder / "deaf").read_text())
    assert not lives(process)
    # It heard TERM, and waited for KILL: else this proves nothing.
    assert outcome.ended - outcome.started >= 1.4


ESCAPE = "(setsid sh -c 'setsid sh -c \"trap : TERM; echo \\$\\$ > {0}.new; mv {0}.new {0}; while :; do sleep 0.05; done\" & exit' &)"
"""Twice a session of its own, twice an orphan, deaf to TERM: it writes down who it is."""


async def escaped(folder: Path, name: str = "escaped") -> int:
    await eventually((folder / name).exists)
    return int((folder / name).read_text())


async def test_what_left_session_and_parents_ends_with_its_script_at_its_time_limit(folder: Path) -> None:
    folder.mkdir(parents=True)
    outcome = await ran(folder, ESCAPE.format(folder / "escaped") + "; sleep 1000", timeout=1.0, grace=0.2)
    assert (outcome.state, outcome.reason) == ("failed", "its time limit of 1 s was over")
    assert not lives(await escaped(folder))


async def test_what_left_session_and_parents_ends_with_its_script_when_that_is_stopped(folder: Path) -> None:
    launch(str(folder), spec(ESCAPE.format(folder / "escaped") + "; sleep 1000", grace=0.2), base_environment())
    process = await escaped(folder)
    assert lives(process)
    stop(str(folder))
    assert (await watch(str(folder))).state == "stopped"
    assert not lives(process)


async def test_what_a_lost_runner_left_behind_is_ended_before_a_repeat_and_nothing_else(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    script = ESCAPE.format("{0}/escaped") + "; touch {0}/ready; exec sleep 1000"
    for each in (one, other):
        launch(str(each), spec(script.format(each)), base_environment())
    processes = [await escaped(each) for each in (one, other)]
    await eventually(lambda: (one / "leader").exists() and (one / "leader").read_text() != "")
    os.kill(runner_of(one), signal.SIGKILL)
    assert (await watch(str(one))).state == "unknown"
    stop(str(one))
    assert [lives(process) for process in processes] == [False, True]
    stop(str(other))
    assert (await watch(str(other))).state == "stopped"
    assert not lives(processes[1])


async def test_a_daemon_that_a_step_left_outlives_a_stop_that_comes_too_late(folder: Path) -> None:
    outcome = await ran(
        folder, "setsid sh -c 'echo $$ > $0/daemon; exec sleep 1000' " + str(folder) + " >/dev/null 2>&1 &"
    )
    assert outcome.state == "done"
    process = await escaped(folder, "daemon")
    stop(str(folder))
    await eventually(lambda: not platform.is_locked(str(folder / "lock")))
    assert lives(process)
    os.kill(process, signal.SIGKILL)


async def test_a_tree_that_ends_when_asked_is_not_waited_for(folder: Path) -> None:
    script = f"trap 'echo bye; exit 5' TERM; touch {folder}/ready; while :; do sleep 0.02; done"
    launch(str(folder), spec(script, grace=1000.0), base_environment())
    await eventually((folder / "ready").exists)
    stop(str(folder))
    outcome = await watch(str(folder))
    assert (outcome.state, outcome.exit_status, outcome.reason) == ("stopped", 5, "it was stopped")
    # The shell says of its `sleep` that it was terminated, on the other stream: which comes first is open.
    assert b"bye" in output(folder).splitlines()


async def test_what_prints_nothing_for_too_long_is_ended_as_stalled(folder: Path) -> None:
    outcome = await ran(folder, "echo one; sleep 1000", stall=0.5, grace=0.2)
    assert (outcome.state, outcome.exit_status) == ("failed", -signal.SIGTERM)
    assert outcome.reason == "it stalled: it printed nothing for 0.5 s"
    assert output(folder) == b"one\n"


async def test_what_goes_on_printing_on_either_stream_does_not_stall(folder: Path) -> None:
    """Also where it prints no whole line, and where what it prints is held back because it could become a secret."""
    script = "for i in 1 2 3 4 5 6 7 8; do printf s; sleep 0.2; printf e >&2; sleep 0.2; done"
    outcome = await ran(folder, script, {"SECRET_A": "ssssssssss"}, secret_names=("SECRET_A",), stall=2.0)
    assert outcome.state == "done"
    assert outcome.ended - outcome.started > 2.0, "it was over before it could stall"


async def test_a_stall_limit_of_none_is_none_and_one_below_is_refused(folder: Path) -> None:
    assert (await ran(folder, "sleep 0.3", stall=None)).state == "done"
    with pytest.raises(UsageError, match="without output"):
        launch(str(folder) + "-2", spec("true", stall=0.0), base_environment())


async def test_a_process_hears_term_once(folder: Path) -> None:
    """Many programs take a second TERM for "do not clean up"."""
    code = (
        "import os, signal, sys, time\nheard = []\nsignal.signal(signal.SIGTERM, lambda *_: heard.append(1))\n"
        f"open({str(folder / 'ready')!r}, 'w').close()\n"
        "while not heard: time.sleep(0.01)\n"
        "time.sleep(0.3)\nprint(len(heard), flush=True)\n"
    )
    run = RunSpec((sys.executable, "-c", code), "/", 60.0)
    launch(str(folder), run, base_environment())
    await eventually((folder / "ready").exists)
    stop(str(folder))
    assert (await watch(str(folder))).state == "stopped"
    assert output(folder) == b"1\n"


async def test_anybody_can_stop_a_run(folder: Path) -> None:
    launch(str(folder), spec(f"touch {folder}/ready; sleep 1000"), base_environment())
    await eventually((folder / "ready").exists)
    code = "import sys; from agent.runs import runs; runs.stop(sys.argv[1])"
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == 0
    assert (await watch(str(folder))).state == "stopped"


async def test_a_runner_that_is_asked_to_end_stops_its_script(folder: Path) -> None:
    launch(str(folder), spec(f"touch {folder}/ready; sleep 1000"), base_environment())
    await eventually((folder / "ready").exists)
    os.kill(runner_of(folder), signal.SIGTERM)
    outcome = await watch(str(folder))
    assert (outcome.state, outcome.exit_status) == ("stopped", -signal.SIGTERM)


async def test_stopped_before_it_begins_it_never_runs(folder: Path) -> None:
    folder.mkdir(parents=True)
    stop(str(folder))
    outcome = await ran(folder, f"touch {folder}/ran")
    assert (outcome.state, outcome.exit_status) == ("stopped", None)
    assert not (folder / "ran").exists()
    assert not (folder / "begun").exists()


async def test_a_stop_after_the_end_changes_nothing(folder: Path) -> None:
    outcome = await ran(folder, "true")
    stop(str(folder))
    assert await watch(str(folder)) == outcome


async def test_a_daemon_lives_on_prints_into_nothing_and_does_not_delay_the_end(folder: Path) -> None:
    wait = f"while [ ! -e {folder}/go ]; do sleep 0.02; done"
    # Without a reader, the first line would end it by SIGPIPE.
    outcome = await ran(folder, f"({wait}; seq 100000; echo x; touch {folder}/survived) & echo started")
    assert (outcome.state, output(folder)) == ("done", b"started\n")
    assert platform.is_locked(str(folder / "lock"))
    (folder / "go").touch()
    await eventually((folder / "survived").exists)
    await eventually(lambda: not platform.is_locked(str(folder / "lock")))
    assert output(folder) == b"started\n"
    assert outcome.output_bytes == (folder / "output").stat().st_size


async def test_what_was_printed_right_before_the_end_is_all_there(folder: Path) -> None:
    """The script is long gone when its runner (which is stopped here) reads the first of 300 kB that lie in the pipe."""
    wait = "while not os.path.exists(sys.argv[1] + '/go'): time.sleep(0.01)"
    code = (
        "import fcntl, os, sys, time\n"
        "fcntl.fcntl(1, 1031, 1 << 20)  # F_SETPIPE_SZ\n"
        f"open(sys.argv[1] + '/ready', 'w').close()\n{wait}\nos.write(1, b'0123456789' * 30_000)\n"
    )
    launch(str(folder), RunSpec((sys.executable, "-c", code, str(folder)), "/", 60.0), base_environment())
    await eventually(lambda: (folder / "ready").exists() and (folder / "leader").exists())
    script = int((folder / "leader").read_text().split()[0])
    os.kill(runner_of(folder), signal.SIGSTOP)
    (folder / "go").touch()
    await eventually(lambda: not lives(script))
    assert output(folder) == b""
    os.kill(runner_of(folder), signal.SIGCONT)
    outcome = await watch(str(folder))
    assert output(folder) == b"0123456789" * 30_000
    assert outcome.state == "done"


async def test_much_output_is_all_there(folder: Path) -> None:
    await ran(folder, "seq 200000")
    assert output(folder) == b"".join(b"%d\n" % number for number in range(1, 200001))


async def test_a_script_may_close_its_output_and_go_on(folder: Path) -> None:
    outcome = await ran(folder, "echo said; exec >&- 2>&-; sleep 0.1; exit 9")
    assert (outcome.exit_status, output(folder)) == (9, b"said\n")


# --- output


async def test_of_long_output_head_and_tail_are_kept(folder: Path) -> None:
    outcome = await ran(folder, "seq 100000; echo end", head_bytes=1000, tail_bytes=500)
    head, _, tail = re.split(rb"(\n\[\d+ bytes of output are left out here\]\n)", (folder / "output").read_bytes())
    assert (len(head), len(tail)) == (1000, 500)
    assert printed(head).startswith(b"1\n2\n3\n")
    assert printed(tail).endswith(b"\n100000\nend\n")
    assert outcome.output_bytes == (folder / "output").stat().st_size


async def test_scenario_33_more_output_than_is_kept_stalls_no_script_and_is_masked_to_its_last_line(
    folder: Path,
) -> None:
    """A gigabyte in the long run."""
    size, secret = (1 << 30) if SOAK else 12 << 20, "corréct-horse/9"
    line = "a line of a log, as long as they are, and then $SECRET_A, and a little more"
    script = f'yes "{line}" | head -c {size}; echo; printf "the last: $SECRET_A"'
    outcome = await ran(folder, script, {"SECRET_A": secret}, timeout=3600.0, stall=60.0, secret_names=("SECRET_A",))
    assert (outcome.state, outcome.reason) == ("done", "")
    kept = (folder / "output").read_bytes()
    assert len(kept) < 11_000_000
    assert secret.encode() not in kept
    assert printed(kept[-1000:]).endswith(b"the last: ********")


def test_ten_megabytes_are_kept() -> None:
    run = RunSpec(("true",), "/", 1.0)
    assert (run.head_bytes, run.tail_bytes) == (5_000_000, 5_000_000)


@given(st.binary(max_size=60), st.integers(0, 20), st.integers(0, 20), st.lists(st.integers(0, 60)).map(sorted))
def test_head_and_tail_do_not_depend_on_pieces(data: bytes, head: int, tail: int, cuts: list[int]) -> None:
    cut = HeadAndTail(head, tail)
    shown = b"".join(cut.add(data[start:end]) for start, end in pairwise([0, *cuts, len(data)]) if start <= end)
    shown = shown[:head]
    ending = cut.end()
    left_out = len(data) - head - tail
    if left_out <= 0:
        assert shown + ending == data
    else:
        expected = data[:head] + b"\n[%d bytes of output are left out here]\n" % left_out + data[len(data) - tail :]
        assert shown + ending == expected


def test_a_full_disk_costs_output_and_not_the_script() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full, a file on which every write fails")
    kept = Output("/dev/full", 100, 100)
    kept.write(b"x" * 150)
    assert kept.close() == 0


# --- secrets


async def test_scenario_33_secrets_never_reach_the_disk_in_any_form(folder: Path) -> None:
    secret, key = "corréct-horse/9", "-----BEGIN-----\nMIIBVgIBADANBg\nkqhkiG9w0BAQEF\n-----END-----"
    code = (
        "import base64, os, sys, time, urllib.parse\n"
        "secret, key = os.environ['SECRET_A'], os.environ['SECRET_KEY']\n"
        "out = sys.stdout\n"
        "def say(text): out.write(text); out.flush(); time.sleep(0.02)\n"
        "say('plain ' + secret + '\\n')\n"
        "for letter in secret: say(letter)\n"
        "say('\\n')\n"
        "say(secret[:7]); time.sleep(1.2); say(secret[7:] + '\\n')\n"
        "say(secret[:2]); time.sleep(1.2); say(secret[2:] + '\\n')\n"
        "for before in ('', 'x', 'xy'):\n"
        "    for code in (base64.b64encode, base64.urlsafe_b64encode):\n"
        "        say(code((before + secret + 'tail').encode()).decode() + '\\n')\n"
        "say(urllib.parse.quote(secret, safe='') + '\\n' + urllib.parse.quote_plus(secret) + '\\n')\n"
        "say(key + '\\n'); say(key.replace('\\n', '|') + '\\n')\n"
        "sys.stderr.write('on the other stream ' + secret)\n"
    )
    run = RunSpec((sys.executable, "-c", code), "/", 60.0, secret_names=("SECRET_A", "SECRET_KEY"))
    environment = {**base_environment(), "SECRET_A": secret, "SECRET_KEY": key, "PYTHONIOENCODING": "utf-8"}
    launch(str(folder), run, environment)
    assert (await watch(str(folder))).state == "done"

    on_disk = {path.name: path.read_bytes() for path in folder.iterdir()}
    inner = base64.b64encode(b"x" + secret.encode())[2:-4]
    forms = [secret.encode(), base64.b64encode(secret.encode())[:-2], inner, *(line.encode() for line in key.split())]
    forms += [urllib.parse.quote(secret, safe="").encode(), secret[3:].encode(), secret[:7].encode()]
    for name, content in on_disk.items():
        assert not [form for form in forms if form in content], name
    said = printed(on_disk["output"])
    assert said.startswith(b"plain ********\n********\n********\nco********\n")
    assert said.endswith(b"on the other stream ********")
    assert b"********|********|********|********\n" in said
    assert said.count(MASK) >= 17


async def test_scenario_33_a_quiet_scripts_last_line_is_seen_though_it_has_no_end_and_could_become_a_secret(
    folder: Path,
) -> None:
    go = folder.parent / "go"
    script = f"printf 'your name, te'; while [ ! -e {go} ]; do sleep 0.02; done; echo ' is taken'"
    seen = bytearray()

    def see(_: int, piece: bytes) -> None:
        seen.extend(piece)
        if printed(bytes(seen)).endswith(b"te"):
            go.touch()  # only now the script goes on

    environment = {**base_environment(), "SECRET_A": "tea-for-two"}
    launch(str(folder), spec(script, secret_names=("SECRET_A",)), environment)
    async with asyncio.timeout(SECONDS):
        outcome = await watch(str(folder), see)
    assert outcome.state == "done"
    assert printed(bytes(seen)) == b"your name, te is taken\n"


async def test_scenario_33_a_scripts_last_bytes_are_not_lost_with_its_end(folder: Path) -> None:
    environment = {"SECRET_A": "tea-for-two"}
    await ran(folder, "printf 'it is tea-for-t'", environment, secret_names=("SECRET_A",))
    assert output(folder) == b"it is tea-for-t"


# --- damage


async def test_a_runner_whose_folder_was_removed_does_not_stay(folder: Path) -> None:
    launch(str(folder), spec(f"while [ ! -e {folder.parent}/go ]; do sleep 0.02; done"), base_environment())
    await eventually((folder / "leader").exists)
    runner = runner_of(folder)
    shutil.rmtree(folder)
    (folder.parent / "go").touch()
    await eventually(lambda: not lives(runner))


async def test_a_damaged_result_is_an_error_and_never_a_guess(folder: Path) -> None:
    await ran(folder, "true")
    (folder / "exit.json").write_bytes(b'{"status": ')
    with pytest.raises(StoreError, match="cannot be read"):
        await watch(str(folder))


async def test_the_spec_says_what_was_run_and_holds_no_value_of_a_variable(folder: Path) -> None:
    await ran(folder, "true", {"VAR_A": "a value", "SECRET_A": "another value"}, secret_names=("SECRET_A",))
    written = json.loads((folder / "spec.json").read_bytes())
    assert re.fullmatch("[0-9a-f]{32}", written.pop("run"))
    assert written.pop("environment") == sorted({*base_environment(), "VAR_A", "SECRET_A"})
    assert msgspec.convert(written, RunSpec) == spec("true", secret_names=("SECRET_A",))
    assert b"value" not in (folder / "spec.json").read_bytes()


async def test_a_runner_takes_its_lock_though_somebody_asks_for_it_all_the_time(folder: Path, tmp_path: Path) -> None:
    """To ask whether a lock is taken is to share it for a moment: a runner must not take that for another runner."""
    folder.mkdir(parents=True)
    lock = str(folder / "lock")
    held = platform.lock_file(lock)
    assert held is not None
    launch(str(folder), spec("true"), base_environment())
    await asyncio.sleep(0.2)
    assert runs._is_starting(str(folder), 0.0)
    os.close(held)
    assert (await watch(str(folder))).state == "done"
