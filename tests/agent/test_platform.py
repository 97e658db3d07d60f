"""What differs by operating system, asked of the real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness.process import eventually

from agent import platform

needs_linux = pytest.mark.skipif(not platform.IS_LINUX, reason="needs Linux: processes are seen by /proc")


def in_a_process(code: str, *arguments: str) -> str:
    """What `code` prints in a process of its own: it may take signals and children for itself."""
    command = [sys.executable, "-c", f"import os, sys, time\nfrom agent import platform\n{code}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "1000"], start_new_session=True)


# --- locks


def test_whether_a_lock_is_taken_can_be_asked_without_taking_it(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    assert not platform.is_locked(path)
    held = platform.lock_file(path)
    assert held is not None
    assert platform.is_locked(path)
    os.close(held)
    assert not platform.is_locked(path)
    assert platform.lock_file(path) is not None


def test_a_lock_goes_with_its_process_and_not_with_the_processes_that_it_started(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    code = (
        "platform.lock_file(sys.argv[1])\n"
        "print(platform.start_leader(['sleep', '1000'], {'PATH': os.environ['PATH']}, os.open(os.devnull, os.O_WRONLY)))\n"
        "assert platform.lock_file(sys.argv[1]) is None"
    )
    child = int(in_a_process(code, path))
    try:
        assert not platform.is_locked(path)
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


# --- processes


def test_a_leader_has_its_own_session_the_given_environment_and_an_empty_input() -> None:
    code = (
        "reading, writing = os.pipe()\n"
        "shown = 'import os, sys; print(os.getsid(0) == os.getpid(), dict(os.environb), sys.stdin.read())'\n"
        "child = platform.start_leader([sys.executable, '-c', shown], {'A': '1', 'LC_ALL': 'C'}, writing)\n"
        "os.waitpid(child, 0)\nprint(os.read(reading, 1000).decode())"
    )
    assert in_a_process(code).strip() == "True {b'A': b'1', b'LC_ALL': b'C'}"


def test_a_program_that_does_not_exist_is_an_error_and_no_child() -> None:
    code = (
        "try: platform.start_leader(['/no/such/program'], {}, 1)\n"
        "except FileNotFoundError as error: print(error.filename)\n"
        "print(platform.ended_children())"
    )
    assert in_a_process(code).split() == ["/no/such/program", "{}"]


def test_ended_children_are_told_once_with_their_status() -> None:
    code = (
        "environment = {'PATH': os.environ['PATH']}\n"
        "one = platform.start_leader(['sh', '-c', 'exit 3'], environment, 1)\n"
        "two = platform.start_leader(['sh', '-c', 'kill -9 $$'], environment, 1)\n"
        "ended = {}\n"
        "while len(ended) < 2: ended |= platform.ended_children()\n"
        "print(ended[one], ended[two], platform.ended_children())"
    )
    assert in_a_process(code).split() == ["3", "-9", "{}"]


@needs_linux
async def test_descendants_are_seen_also_in_another_session_and_not_when_they_ended() -> None:
    code = (
        "import subprocess; print(subprocess.Popen(['sleep', '1000'], start_new_session=True).pid, flush=True); input()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    try:
        below = platform.descendants(os.getpid())
        assert {child.pid, grandchild} <= set(below)
        assert below[grandchild] == grandchild
        assert platform.descendants(child.pid) == {grandchild: grandchild}
    finally:
        os.kill(grandchild, signal.SIGKILL)
        # It is a zombie now: its parent does not ask for it.
        await eventually(lambda: grandchild not in platform.descendants(os.getpid()))
        child.communicate(b"\n")


@needs_linux
def test_who_adopts_orphans_sees_and_ends_them_and_who_does_not_loses_them() -> None:
    code = (
        "if sys.argv[1] == 'adopt': platform.adopt_orphans()\n"
        "script = 'setsid sleep 1000 & echo $!'\n"
        "reading, writing = os.pipe()\n"
        "leader = platform.start_leader(['sh', '-c', script], {'PATH': os.environ['PATH']}, writing)\n"
        "orphan = int(os.read(reading, 100))\nos.waitpid(leader, 0)\n"
        "seen = orphan in platform.descendants(os.getpid())\n"
        "while platform.has_tree(0): platform.end_tree(0, at_once=True); platform.ended_children()\n"
        "print(orphan, seen, bool(platform.process_mark(orphan)))"
    )
    assert in_a_process(code, "adopt").split()[1:] == ["True", "False"]
    orphan, *seen = in_a_process(code, "not").split()
    os.kill(int(orphan), signal.SIGKILL)
    assert seen == ["False", "True"]


@needs_linux
def test_a_mark_means_this_process_and_no_later_one_with_its_number() -> None:
    child = sleeper()
    mark = platform.process_mark(child.pid)
    assert mark == platform.process_mark(child.pid)
    number, _, started = mark.partition(" ")
    assert not platform.end_marked(f"{number} {int(started) - 1}")
    assert child.poll() is None
    assert platform.end_marked(mark)
    assert child.wait() == -signal.SIGKILL
    assert platform.process_mark(child.pid) == ""
    assert not platform.end_marked(mark)


@pytest.mark.parametrize("mark", ["", " ", "1"])
def test_a_mark_that_says_nothing_ends_nobody(mark: str) -> None:
    assert not platform.end_marked(mark)


def test_wakes_tell_of_a_child_that_ended_and_of_being_asked_to_end() -> None:
    code = (
        "import signal\nwakes = platform.Wakes()\n"
        "child = platform.start_leader(['true'], {'PATH': os.environ['PATH']}, 1)\n"
        "assert wakes.wait([], 60) == []\n"
        "print(child in platform.ended_children() or 'not yet', wakes.asked_to_end)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\nwakes.wait([], 60)\nprint(wakes.asked_to_end)\n"
        "reading, writing = os.pipe()\nos.write(writing, b'x')\nprint(wakes.wait([reading], 60) == [reading], wakes.wait([], 0))"
    )
    assert in_a_process(code).split() == ["True", "False", "True", "True", "[]"]


def test_signals_have_names() -> None:
    assert platform.signal_name(signal.SIGTERM) == "SIGTERM"
    assert platform.signal_name(250) == "signal 250"


# --- services


def test_a_service_command_is_the_machines_own_or_a_setting() -> None:
    assert platform.service_command("restart", "web@1.service") == ["systemctl", "restart", "web@1.service"]
    assert platform.service_command("stop", "web", ["sv", "{action}", "/service/{service}"]) == [
        "sv", "stop", "/service/web",
    ]  # fmt: skip
