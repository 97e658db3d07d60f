"""What differs by operating system, asked of the real one."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness.process import eventually

from agent import platform

needs_linux = pytest.mark.skipif(not platform.IS_LINUX, reason="needs Linux: processes are seen by /proc")
needs_cgroup = pytest.mark.skipif(
    not platform._own_cgroup(), reason="there is no cgroup of version 2 that may be used: trees in one are NOT tested"
)


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


NAME = secrets.token_hex(16)
ESCAPES = {
    "another session": "setsid sleep 1000 & echo $!",
    "another group": "set -m; sleep 1000 & echo $!",
    "an orphan": "(setsid sh -c 'sleep 1000 & echo $!' &); sleep 1000",
    "an orphan's orphan": "(setsid sh -c '(setsid sh -c \"sleep 1000 & echo \\$!\" &) & exit' &); exit",
    "deaf": "sh -c \"trap '' TERM; (trap '' TERM; setsid sleep 1000 & echo \\$!); sleep 1000\"",
    "an environment without its mark": "env -i setsid sleep 1000 & echo $!",
}
"""Scripts that print the process id of one that tries to get away."""
TREE = (
    "platform._found_cgroup = None if sys.argv[2] == 'cgroup' else ''\n"
    "reading, writing = os.pipe()\n"
    f"tree = platform.ProcessTree({NAME!r})\n"
    "tree.start(['sh', '-c', sys.argv[1]], {'PATH': os.environ['PATH']}, writing, os.open(os.devnull, os.O_WRONLY))\n"
    "escaped = int(os.read(reading, 100))\n"
)
ALL_WAYS = pytest.mark.parametrize(
    "way", [pytest.param("cgroup", marks=needs_cgroup), pytest.param("proc", marks=needs_linux)]
)


@ALL_WAYS
@pytest.mark.parametrize("script", ESCAPES.values(), ids=ESCAPES)
def test_all_that_a_tree_started_ends_with_it_wherever_it_went(way: str, script: str) -> None:
    code = TREE + (
        "was_there = bool(platform.process_mark(escaped))\n"
        "tree.end()\ntime.sleep(0.05)\n"
        "while tree.is_alive(): tree.end(at_once=True); tree.reap(); time.sleep(0.01)\n"
        "print(was_there, bool(platform.process_mark(escaped)))\ntree.close()"
    )
    assert in_a_process(code, script, way).split() == ["True", "False"]


@ALL_WAYS
@pytest.mark.parametrize("script", [ESCAPES["another session"], ESCAPES["an orphan"], ESCAPES["an orphan's orphan"]])
def test_a_tree_whose_own_process_was_lost_is_found_by_who_comes_later(way: str, script: str) -> None:
    code = TREE + "print(escaped, tree.mark, sep='\\n', flush=True)\nos.kill(os.getpid(), 9)"
    command = [sys.executable, "-c", f"import os, sys, time\nfrom agent import platform\n{code}", script, way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    escaped, leader, cgroup = done.stdout.split("\n")[:3]
    mark = f"{leader}\n{cgroup}"
    assert platform.process_mark(int(escaped))
    assert not platform.end_lost("cd34" * 8, f"\n{cgroup}")
    assert platform.process_mark(int(escaped)), "another name must end nothing"
    assert platform.end_lost(NAME, mark)
    assert not platform.process_mark(int(escaped))
    assert not platform.end_lost(NAME, mark)


@needs_cgroup
def test_what_hides_its_mark_and_lost_its_runner_is_found_by_its_cgroup() -> None:
    script = "(env -i setsid sh -c 'sleep 1000 & echo $!' &)"
    code = TREE + "print(escaped, tree.mark, sep='\\n', flush=True)\nos.kill(os.getpid(), 9)"
    command = [sys.executable, "-c", f"import os, sys, time\nfrom agent import platform\n{code}", script, "cgroup"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    escaped, leader, cgroup = done.stdout.split("\n")[:3]
    assert os.path.isdir(cgroup)
    assert platform.end_lost(NAME, f"{leader}\n{cgroup}")
    assert not platform.process_mark(int(escaped))
    assert not os.path.exists(cgroup)


@needs_cgroup
def test_where_the_kernel_ends_what_is_born_in_a_cgroup_a_tree_starts_without_one() -> None:
    """Linux does so where the parent's cgroup was once ended as a whole."""
    code = (
        "above = os.path.join(platform._own_cgroup(), 'ended-' + sys.argv[1])\nos.mkdir(above)\n"
        "def put(path, text):\n    with open(path, 'w') as file: file.write(text)\n"
        "try:\n    put(above + '/cgroup.kill', '1')\nexcept OSError: pass\n"
        "before = platform._own_cgroup()\nput(above + '/cgroup.procs', '0')\nplatform._found_cgroup = None\n"
        "tree = platform.ProcessTree(sys.argv[1])\n"
        "tree.start(['sh', '-c', 'exit 3'], {'PATH': os.environ['PATH']}, 1, 2)\n"
        "while (status := tree.reap()) is None: time.sleep(0.01)\nprint(status)\ntree.close()\n"
        "put(before + '/cgroup.procs', '0')\nos.rmdir(above)\n"
    )
    assert in_a_process(code, NAME) == "3\n"


@ALL_WAYS
def test_what_a_tree_left_lives_on_when_nobody_ends_it(way: str) -> None:
    code = TREE + (
        "while tree.reap() is None: time.sleep(0.01)\ntree.close()\n"
        "print(escaped, bool(platform.process_mark(escaped)))"
    )
    escaped, *lives = in_a_process(code, "setsid sleep 1000 & echo $!", way).split()
    try:
        assert lives == ["True"]
        assert platform.process_mark(int(escaped))
    finally:
        assert platform.end_lost(NAME)


@ALL_WAYS
def test_a_trees_leader_is_as_any_leader_and_knows_its_run(way: str) -> None:
    shown = (
        "import os, signal, sys; print(os.getsid(0) == os.getpid(), dict(os.environb), sys.stdin.read(), os.getcwd(), "
        "signal.pthread_sigmask(signal.SIG_BLOCK, []), sorted(os.listdir('/proc/self/fd'))[:4])"
    )
    code = (
        "import signal\nwakes = platform.Wakes()\n"
        "platform._found_cgroup = None if sys.argv[2] == 'cgroup' else ''\nos.chdir('/tmp')\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\nreading, writing = os.pipe()\n"
        f"tree = platform.ProcessTree({NAME!r})\n"
        "tree.start([sys.executable, '-c', sys.argv[1]], {'A': '1', 'LC_ALL': 'C'}, writing, writing)\n"
        "while tree.reap() is None: wakes.wait([], 1)\n"
        "print(os.read(reading, 1000).decode(), bool(tree.mark.split(chr(10))[1]), sep='|')\n"
        "tree.start(['sh', '-c', 'kill -HUP $$; exit 3'], {'PATH': os.environ['PATH']}, 1, 2)\n"
        "while (status := tree.reap()) is None: wakes.wait([], 1)\nprint(status)\n"
        "try: tree.start(['/no/such/program'], {}, 1, 2)\n"
        "except FileNotFoundError as error: print(error.filename, platform.ended_children())\ntree.close()\n"
    )
    first, second, third = in_a_process(code, shown, way).rstrip("\n").replace("\n|", "|").split("\n")
    run = {"A": "1", "LC_ALL": "C", platform.RUN: NAME}
    of_it = {name.encode(): value.encode() for name, value in run.items()}
    assert first == f"True {of_it}  /tmp set() ['0', '1', '2', '3']|{way == 'cgroup'}"
    assert (second, third) == ("-1", "/no/such/program {}")


@needs_linux
def test_a_mark_means_this_process_and_no_later_one_with_its_number() -> None:
    child = sleeper()
    mark = platform.process_mark(child.pid)
    assert mark == platform.process_mark(child.pid)
    number, _, started = mark.partition(" ")
    assert not platform.end_lost(NAME, f"{number} {int(started) - 1}\n")
    assert child.poll() is None
    assert platform.end_lost(NAME, f"{mark}\n")
    assert child.wait() == -signal.SIGKILL
    assert platform.process_mark(child.pid) == ""
    assert not platform.end_lost(NAME, mark)


@pytest.mark.parametrize("mark", ["", "\n", " ", "1", "\n/sys/fs/cgroup", "\n/", "\nwaystation-ab12"])
def test_a_mark_that_says_nothing_ends_nobody(mark: str) -> None:
    assert not platform.end_lost(NAME, mark)


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
