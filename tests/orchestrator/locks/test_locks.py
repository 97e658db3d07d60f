"""The lock of a project in an environment: one winner, a name for the others, and nothing that outlives its process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.process import Talk

from orchestrator.journal.journal import Journal
from orchestrator.journal.tables import holders
from orchestrator.locks.locks import EnvironmentLockedError, Holder, hold, holder
from relay.errors import LockedError, StoreError

ULID = "01JD0000000000000000000000"


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal.open(str(tmp_path / "journal.db")) as opened:
        yield opened


def take(journal: Journal, environment: str = "production", project: str = "shop") -> None:
    with hold(journal, project, environment, operator="bob", label="1.4.3", why="deploy"):
        pass


TAKER = """
import os, sys
from orchestrator.journal.journal import Journal
from orchestrator.locks.locks import hold
from relay.errors import LockedError
path, name = sys.argv[1:]
with Journal.open(path) as journal:
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            with hold(journal, *line.strip().split(" in "), operator=name, label="1.4.2", why="deploy"):
                print("won", os.getpid(), flush=True)
                sys.stdin.readline()
        except LockedError as error:
            print("lost", error.holder.pid, error.exit_code, flush=True)
            sys.stdin.readline()
"""


def taker(journal: Journal, name: str) -> Talk:
    talk = Talk(Path(journal.path).parent, TAKER, journal.path, name)
    assert talk.hear() == "ready\n"
    return talk


def test_who_must_wait_is_told_for_whom_and_since_when(journal: Journal) -> None:
    before = time.time()
    with hold(journal, "shop", "production", operator="ann", label="1.4.2", why="deploy", deployment=ULID) as mine:
        with pytest.raises(EnvironmentLockedError) as told:
            take(journal)
        assert told.value.holder == mine == holder(journal, "shop", "production")
        assert mine == Holder(
            "shop", "production", "ann", socket.gethostname(), os.getpid(), mine.since, "1.4.2", "deploy", ULID
        )
        assert before <= mine.since <= time.time()
        for word in ("shop in production", "ann", socket.gethostname(), f"pid {os.getpid()}", "UTC", "deploy 1.4.2"):
            assert word in str(told.value)
        assert isinstance(told.value, LockedError)
        assert told.value.exit_code == 4
    assert holder(journal, "shop", "production") is None
    take(journal)


def test_environments_do_not_hold_each_other_up(journal: Journal) -> None:
    with hold(journal, "shop", "production", operator="ann", label="1", why="deploy"):
        for other in ("staging", "Production", "../production", "pro/duction", "ü" * 200):
            take(journal, other)
            assert holder(journal, "shop", other) is None
    folder = Path(f"{journal.path}.locks")
    assert all(path.parent == folder for path in folder.rglob("*")), "a name never leaves the folder"


def test_projects_do_not_hold_each_other_up(journal: Journal) -> None:
    with hold(journal, "shop", "production", operator="ann", label="1", why="deploy"):
        for other in ("desk", "Shop", "", "shop\0production"):
            with hold(journal, other, "production", operator="bob", label="2", why="deploy") as mine:
                assert holder(journal, other, "production") == mine
        with pytest.raises(EnvironmentLockedError, match="ann"):
            take(journal)


def test_an_error_inside_gives_the_lock_back(journal: Journal) -> None:
    with pytest.raises(ZeroDivisionError), hold(journal, "shop", "production", operator="ann", label="1", why="deploy"):
        raise ZeroDivisionError
    take(journal)


def test_of_twenty_starts_at_once_one_wins_and_the_others_name_it(journal: Journal) -> None:
    takers = [taker(journal, f"op{number}") for number in range(20)]
    for round in range(8):
        for each in takers:
            each.say(f"shop in environment {round}")
        told = [each.hear().split() for each in takers]
        won = [words for words in told if words[0] == "won"]
        lost = [words for words in told if words[0] == "lost"]
        assert len(won) == 1
        assert lost == [["lost", won[0][1], "4"]] * 19
        for each in takers:
            each.say("on")
    assert [each.end().code for each in takers] == [0] * 20


def test_a_kill_of_the_holder_frees_the_environment(journal: Journal) -> None:
    ann = taker(journal, "ann")
    ann.say("shop in production")
    pid = ann.process.pid
    assert ann.hear().split() == ["won", str(pid)]
    with pytest.raises(EnvironmentLockedError, match=f"pid {pid}"):
        take(journal)
    ann.process.kill()
    with journal.database.reading() as connection:
        left = connection.execute(holders.select()).all()
    assert [row.pid for row in left] == [pid], "the killed process' row must still be there"
    assert holder(journal, "shop", "production") is None
    with hold(journal, "shop", "production", operator="bob", label="1", why="deploy") as mine:
        assert holder(journal, "shop", "production") == mine
    with journal.database.reading() as connection:
        assert connection.execute(holders.select()).all() == []


def test_a_stopped_holder_still_holds(journal: Journal) -> None:
    ann = taker(journal, "ann")
    ann.say("shop in production")
    assert ann.hear().split()[0] == "won"
    os.kill(ann.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(EnvironmentLockedError, match="ann"):
            take(journal)
    finally:
        os.kill(ann.process.pid, signal.SIGCONT)
    ann.say("on")
    assert ann.end().code == 0
    take(journal)


def test_a_process_that_the_holder_started_does_not_hold_on(journal: Journal) -> None:
    with hold(journal, "shop", "production", operator="ann", label="1", why="deploy"):
        left_behind = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    take(journal)
    assert left_behind.poll() is None, "it must have been alive meanwhile"
    left_behind.communicate(b"\n", timeout=30)


def test_looking_never_takes_the_lock_from_those_who_want_it(journal: Journal) -> None:
    """`status` looks at the lock by trying it; a start at that moment must not fail because of it."""
    stop, looks = threading.Event(), 0

    def look() -> None:
        nonlocal looks
        with Journal.open(journal.path) as mine:
            while not stop.is_set():
                holder(mine, "shop", "production")
                looks += 1
                time.sleep(0.001)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        taken = 0
        while taken < 100 or (looks < 10 and watcher.is_alive()):
            take(journal)
            taken += 1
            time.sleep(0.001)
    finally:
        stop.set()
        watcher.join(30)
    assert looks >= 10, "nobody looked"


def test_a_lock_file_that_cannot_be_made_is_a_store_error(journal: Journal) -> None:
    Path(f"{journal.path}.locks").write_text("a file where the folder belongs")
    with pytest.raises(StoreError, match="the lock of shop in production"):
        take(journal)
    with pytest.raises(StoreError):
        holder(journal, "shop", "production")
