"""The journal: what was acknowledged is there, nothing is ever changed, and many processes may use it at once."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import msgspec
import pytest
from harness.process import Talk
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.orders.orders import AcquireFacts, SurveyFacts, SwitchFacts, TreeFacts, TreePulled
from orchestrator.journal import events as ev
from orchestrator.journal import sqlite, tables
from orchestrator.journal.journal import FENCE_MAX, FORMAT, Journal
from orchestrator.journal.views import open_brackets
from relay.errors import ConflictError, LockedError, NotFoundError, RefusedError, StoreError, UntrustedError, UsageError

ULID = "01JD0000000000000000000000"
OTHER = "01JD0000000000000000000001"
PLAN = b'{"format":1,"project":"shop","label":"1.4.2","environment":"production","steps":[]}'
ENVELOPE = b'{"payload":"","signatures":[]}'
HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
OPERATION = f"{ULID}/1/web1/2-switch/1"
HEX = "ab" * 32

ONE_OF_EACH: tuple[ev.Event, ...] = (
    ev.Started("ann", "host", 1, 7, "stage"),
    ev.Resumed("bob", "host", 2, 8, reopens=True),
    ev.Note("a note with 'quotes', ü and \x00", machine="web1", step=1),
    ev.Notified("failed", "chat", "refused"),
    ev.DecisionTaken(1, "ann", "retry", {"machine": "web1", "deep": [1, None, {"a": 2.5}]}),
    ev.Ended("failed", "because"),
    ev.PreAcquireStarted("vpn", undo_due=True),
    ev.PreAcquireEnded("vpn", ok=True, undo_due=True),
    ev.UndoStarted("vpn"),
    ev.UndoEnded("vpn", ok=False, reason="exit 1"),
    ev.Surveyed("web1", SurveyFacts((TreeFacts("/srv/webshop", HEX, 10, installed=False),))),
    ev.Replicated("fra", "Acme.Web", "1.4.2", 1000, 200, 9, 3, 0.5, (ev.LineBytes("origin → fra", 200),), 1),
    ev.RelayBehind("iad", "Acme.Web", "1.4.2", "it cannot be reached"),
    ev.Acquired("web1", AcquireFacts((TreePulled("Acme.Web", "1.4.2", "/p", already=False, tree_bytes=5),))),
    ev.Barrier(("web1",), {"web2": "away"}),
    ev.StepStarted(1, "web farm"),
    ev.StepEnded(1, ok=False, reason="web1"),
    ev.TurnStarted("web1", 1),
    ev.TurnEnded("web1", 1, "left_out", failure=True, stop_roll=True, bracket_open=True, reason="verify"),
    ev.BracketOpened("web1", "web", 1),
    ev.BracketClosed("web1", "web", "put_back"),
    ev.BracketAdopted("web1", "web", OTHER),
    ev.TurnDid("web1", 1, "act 1", "failed", "exit 1"),
    ev.AskOpened("2/sign off", 2, "sign off", "?", 1800.0),
    ev.AskAnswered("2/sign off", 3, "ann", "approve", "because"),
    ev.AskClosed("2/sign off", "expired", "nobody came", late=True),
    ev.MachineAsked("web1", 1, "verify", ("retry", "fail")),
    ev.MachineDecided("web1", 1, "retry", 4, "bob", "again"),
    ev.Paused("by ann", "ann"),
    ev.Unpaused("ann", "mended"),
    ev.Left("web2", "in repair", "ann"),
    ev.Dispatched(OPERATION, "web1", HEX),
    ev.Reported(OPERATION, "web1", "done", facts=SwitchFacts("/a", "/b")),
    ev.ServerRunDispatched(f"{ULID}/1/web1/before/1", "out.py", "web1"),
    ev.ServerRunEnded(f"{ULID}/1/web1/before/1", "failed", "web1", "exit status 3", 3),
    ev.Refused("web1", "fence", OPERATION),
    ev.TurnDid("web1", 1, "ask", "done", answer="retry"),
    ev.GatePassed(1, 1, "canary"),
    ev.AskOpened("1/canary", 1, "canary", "Is it good?", 900.0),
    ev.AskAnswered("1/canary", 3, "anna", "approve", "it is"),
    ev.AskClosed("1/canary", "approved", "anna agreed", late=True),
    ev.MachineAsked("web1", 1, "verify: 500", ("retry", "fail")),
    ev.MachineDecided("web1", 1, "retry", 4, "anna", "once more"),
    ev.Paused("look", "anna"),
    ev.Unpaused("anna", "all is well"),
    ev.Left("web7", "offline"),
)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "home" / "journal.db")


@pytest.fixture
def journal(path: str) -> Iterator[Journal]:
    with Journal.open(path) as opened:
        opened.begin(ULID, PLAN, 1, "ann")
        yield opened


def raw(path: str) -> sqlite3.Connection:
    """The file without any of our code, as a person with `sqlite3` would open it."""
    return sqlite3.connect(path, isolation_level=None)


def child(code: str, path: str, *words: object) -> Talk:
    """A process of its own that runs `code` with the path of a journal, and `words`, in sys.argv."""
    return Talk(Path(path).parents[1], code, path, *words)


# --- what stays


def test_every_kind_of_entry_comes_back_as_it_went_in(journal: Journal) -> None:
    assert {type(event) for event in ONE_OF_EACH} == set(get_args(ev.Event)), "a kind is missing in this test"
    numbers = [journal.append(ULID, event) for event in ONE_OF_EACH]
    entries = journal.entries(ULID)[1:]
    assert [entry.event for entry in entries] == list(ONE_OF_EACH)
    assert [entry.number for entry in entries] == numbers
    assert journal.entries(ULID, after=numbers[-2]) == [entries[-1]]


def test_a_reopened_journal_is_the_same_journal(path: str) -> None:
    with Journal.open(path, clock=lambda: 1000.5) as first:
        id = first.id
        first.begin(ULID, PLAN, first.claim("shop", "production"), "ann", host="deploy1", goal="stage")
        first.add_release("shop", "1.4.2", b"document", ENVELOPE, {HELLO: b"hello"}, "ann")
        decision = first.decide("production", ULID, "retry", {"machine": "web1"}, "bob")
    with Journal.open(path) as again:
        assert again.id == id
        assert len(id) == 32
        assert again.plan(ULID) == PLAN
        (found,) = again.deployments("production")
        assert found == again.deployment(ULID)
        assert (found.deployment, found.project, found.label, found.environment) == (
            ULID,
            "shop",
            "1.4.2",
            "production",
        )
        assert (found.goal, found.fence, found.state, found.operator) == ("stage", 1, "running", "ann")
        assert (found.host, found.pid, found.started, found.ended) == ("deploy1", os.getpid(), 1000.5, None)
        assert again.entries(ULID)[0].event == ev.Started("ann", "deploy1", os.getpid(), 1, "stage")
        assert again.release("shop", "1.4.2").document == b"document"
        assert again.release(None, "1.4.2").envelope == ENVELOPE
        assert again.release_file(HELLO) == b"hello"
        (waiting,) = again.pending_decisions(ULID)
        assert (waiting.number, waiting.kind, waiting.data, waiting.operator, waiting.at) == (
            decision,
            "retry",
            {"machine": "web1"},
            "bob",
            1000.5,
        )


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET data = '{}'",
        "DELETE FROM entries",
        "UPDATE releases SET document = x''",
        "DELETE FROM releases",
        "UPDATE deployments SET plan = x''",
        "UPDATE deployments SET environment = 'staging'",
        "DELETE FROM deployments",
        "UPDATE decisions SET kind = 'other'",
        "DELETE FROM decisions",
        "UPDATE fences SET fence = 1",
        "DELETE FROM fences",
    ],
)
def test_what_is_written_can_be_neither_changed_nor_removed(journal: Journal, statement: str) -> None:
    journal.add_release("shop", "1.4.2", b"document", ENVELOPE, {}, "ann")
    journal.take_decision(journal.decide("production", ULID, "retry", {}, "ann"))
    journal.claim("shop", "production", [41])
    before = journal.entries(ULID)
    with raw(journal.path) as connection, pytest.raises(sqlite3.IntegrityError, match=r"never|only rises|once"):
        connection.execute(statement)
    assert journal.entries(ULID) == before
    assert journal.plan(ULID) == PLAN
    assert journal.claim("shop", "production") == 43


def test_numbers_only_grow_over_all_deployments(journal: Journal) -> None:
    journal.begin(OTHER, PLAN, 2, "ann")
    numbers = [journal.append(deployment, ev.Note("x")) for deployment in (ULID, OTHER, OTHER, ULID)]
    assert numbers == sorted(set(numbers))
    assert numbers[0] > journal.entries(OTHER)[0].number


def test_several_entries_go_in_together_or_not_at_all(journal: Journal) -> None:
    before = journal.entries(ULID)
    with pytest.raises(UnicodeEncodeError):
        journal.append(ULID, ev.Note("fine"), ev.Note("\ud800"))
    assert journal.entries(ULID) == before
    number = journal.append(ULID, ev.Note("one"), ev.Note("two"))
    assert [entry.number for entry in journal.entries(ULID)[-2:]] == [number - 1, number]


def test_a_deployment_that_never_began_takes_no_entry(journal: Journal) -> None:
    for refused in (
        lambda: journal.append(OTHER, ev.Note("x")),
        lambda: journal.set_state(OTHER, "failed"),
        lambda: journal.take_up(OTHER, 2, "ann"),
        lambda: journal.plan(OTHER),
        lambda: journal.deployment(OTHER),
        lambda: journal.decide("production", OTHER, "retry", {}, "ann"),
    ):
        with pytest.raises(NotFoundError, match=OTHER):
            refused()
    assert journal.entries(OTHER) == []


def test_a_deployment_begins_once(journal: Journal) -> None:
    with pytest.raises(ConflictError):
        journal.begin(ULID, PLAN, 2, "bob")
    assert journal.deployment(ULID).operator == "ann"
    with pytest.raises(ValueError, match="project"):
        journal.begin(OTHER, b"{}", 2, "bob")
    assert len(journal.deployments()) == 1


def test_a_deployment_ends_and_is_taken_up_with_its_entries_in_one_commit(journal: Journal) -> None:
    journal.set_state(ULID, "failed", "web1", ev.Ended("failed", "web1"))
    ended = journal.deployment(ULID)
    assert (ended.state, ended.reason) == ("failed", "web1")
    assert ended.ended is not None
    assert journal.deployments(state="running") == []
    journal.take_up(ULID, 9, "bob", ev.Resumed("bob", "host2", 5, 9, reopens=True), host="host2")
    again = journal.deployment(ULID)
    assert (again.state, again.reason, again.ended, again.fence, again.operator, again.host) == (
        "running",
        "",
        None,
        9,
        "bob",
        "host2",
    )
    assert [type(entry.event) for entry in journal.entries(ULID)] == [ev.Started, ev.Ended, ev.Resumed]


def test_lists_show_the_newest_first_and_no_more_than_asked(journal: Journal) -> None:
    for index in range(5):
        plan = PLAN.replace(b"production", b"staging" if index % 2 else b"production")
        journal.begin(f"01JD000000000000000000010{index}", plan, index, "ann")
    assert [one.deployment[-1] for one in journal.deployments(limit=2)] == ["4", "3"]
    assert [one.deployment[-1] for one in journal.deployments("staging")] == ["3", "1"]


def test_brackets_are_gathered_over_all_deployments_of_an_environment(journal: Journal) -> None:
    journal.append(ULID, ev.BracketOpened("web1", "web", 1), ev.Note("not of it"))
    journal.begin(OTHER, PLAN.replace(b"production", b"staging"), 2, "ann")
    journal.append(OTHER, ev.BracketOpened("web9", "web", 1))
    journal.append(ULID, ev.BracketClosed("web1", "web", "deployed"))
    found = journal.brackets()
    assert [(record, [entry.event.kind() for entry in entries]) for record, entries in found] == [
        (journal.deployment(ULID), ["bracket_opened", "bracket_closed"]),
        (journal.deployment(OTHER), ["bracket_opened"]),
    ]
    assert journal.brackets("staging") == found[1:]


# --- releases


def test_a_label_stands_for_one_document_for_ever(journal: Journal) -> None:
    assert journal.add_release("shop", "1.4.2", b"document", ENVELOPE, {HELLO: b"hello"}, "ann")
    assert not journal.add_release("shop", "1.4.2", b"document", ENVELOPE, {HELLO: b"hello"}, "bob")
    with pytest.raises(ConflictError, match=r"1\.4\.2"):
        journal.add_release("shop", "1.4.2", b"other", ENVELOPE, {}, "bob")
    assert journal.release("shop", "1.4.2").document == b"document"
    with raw(journal.path) as connection:
        assert connection.execute("SELECT label, operator FROM releases").fetchall() == [("1.4.2", "ann")]


def test_a_label_of_two_projects_must_be_named_with_its_project(journal: Journal) -> None:
    journal.add_release("shop", "1", b"a", ENVELOPE, {}, "ann")
    journal.add_release("desk", "1", b"b", ENVELOPE, {}, "ann")
    with pytest.raises(UsageError, match="desk, shop"):
        journal.release(None, "1")
    assert journal.release("desk", "1").document == b"b"
    with pytest.raises(NotFoundError):
        journal.release("desk", "2")


def test_a_release_file_is_what_its_hash_says(journal: Journal) -> None:
    with pytest.raises(UntrustedError):
        journal.add_release("shop", "1", b"a", ENVELOPE, {HELLO: b"other"}, "ann")
    with pytest.raises(NotFoundError):
        journal.release("shop", "1")
    with pytest.raises(NotFoundError):
        journal.release_file(HELLO)
    journal.add_release("shop", "1", b"a", ENVELOPE, {HELLO: b"hello"}, "ann")
    with raw(journal.path) as connection:
        assert connection.execute("UPDATE release_files SET data = x'00'").rowcount == 1
    with pytest.raises(StoreError, match="damaged"):
        journal.release_file(HELLO)


# --- fences


def test_a_fence_is_above_all_that_was_claimed_or_seen(journal: Journal) -> None:
    assert [
        journal.claim("shop", "a"),
        journal.claim("shop", "a", [7, 3]),
        journal.claim("shop", "a", [2]),
        journal.claim("shop", "b"),
    ] == [1, 8, 9, 1]


def test_projects_have_fences_of_their_own(journal: Journal) -> None:
    assert [journal.claim(*place) for place in (("shop", "a"), ("desk", "a"), ("shop", "a"), ("shop", "b"))] == [
        1,
        1,
        2,
        1,
    ]
    assert journal.claim("desk", "a", [40]) == 41
    assert journal.claim("shop", "a") == 3


def test_a_fence_that_no_order_can_carry_is_refused(journal: Journal) -> None:
    with pytest.raises(RefusedError, match="used up"):
        journal.claim("shop", "a", [FENCE_MAX])
    with pytest.raises(RefusedError, match="used up"):
        journal.claim("shop", "a", [1 << 80])
    assert journal.claim("shop", "a", [FENCE_MAX - 1]) == FENCE_MAX


# --- decisions


def test_a_decision_is_taken_once_and_its_entry_comes_with_it(journal: Journal) -> None:
    number = journal.decide("production", ULID, "retry", {"machine": "web1"}, "bob")
    assert journal.take_decision(number)
    assert not journal.take_decision(number)
    assert journal.pending_decisions(ULID) == []
    taken = [entry.event for entry in journal.entries(ULID)[1:]]
    assert taken == [ev.DecisionTaken(number, "bob", "retry", {"machine": "web1"})]
    with pytest.raises(NotFoundError):
        journal.take_decision(number + 1)


def test_decisions_wait_for_those_whom_they_concern(journal: Journal) -> None:
    journal.begin(OTHER, PLAN, 2, "ann")
    mine = journal.decide("production", ULID, "a", {}, "bob")
    theirs = journal.decide("production", OTHER, "b", {}, "bob")
    later = journal.decide("production", ULID, "c", {}, "bob")
    assert [one.number for one in journal.pending_decisions(ULID)] == [mine, later]
    assert [one.number for one in journal.pending_decisions(OTHER)] == [theirs]
    assert journal.take_decision(theirs)
    assert journal.entries(OTHER)[-1].event == ev.DecisionTaken(theirs, "bob", "b", {})


# --- the file


def test_a_commit_is_synced_and_readers_do_not_wait(journal: Journal) -> None:
    for transaction in (journal.database.reading, journal.database.writing):
        with transaction() as connection:
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2, "2 is FULL"
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    with journal.database.writing() as connection:
        row = {"deployment": ULID, "at": 0.0, "kind": "note", "data": msgspec.json.encode(ev.Note("half")).decode()}
        connection.execute(tables.entries.insert(), row)
        with Journal.open(journal.path) as reader:
            assert len(reader.entries(ULID)) == 1
    assert len(journal.entries(ULID)) == 2


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not here: nobody can see the syncs")
def test_each_append_is_synced_before_it_returns(journal: Journal, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    code = (
        "import os, sys; from orchestrator.journal.journal import Journal; from orchestrator.journal.events import Note\n"
        "journal = Journal.open(sys.argv[1])\n"
        "for i in range(5):\n"
        "    journal.append(sys.argv[2], Note('x')); os.write(1, b'acknowledged')\n"
    )
    traced = ["strace", "-f", "-e", "trace=fsync,fdatasync,write", "-o", str(trace), sys.executable, "-c", code]
    done = subprocess.run([*traced, journal.path, ULID], stdout=subprocess.PIPE, timeout=60)
    if done.returncode != 0 or not trace.exists():
        pytest.skip("strace may not trace here")
    told = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines() if "sync(" in line or "acknow" in line]
    places = [index for index, line in enumerate(told) if "acknow" in line]
    assert len(places) == 5
    assert all("sync(" in told[place - 1] for place in places), told


def test_the_file_is_for_its_owner_only(journal: Journal) -> None:
    for name in (journal.path, f"{journal.path}-wal", f"{journal.path}-shm"):
        assert stat.S_IMODE(os.stat(name).st_mode) == 0o600, name


def test_the_location_is_a_path_or_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Journal.open("home/journal.db") as journal:
        assert journal.path == str(tmp_path / "home" / "journal.db")
    with Journal.open(f"sqlite:///{tmp_path}/home/journal.db") as same:
        assert same.id == journal.id
    for wrong in ("postgresql://host/db", "sqlite://", "sqlite:///", "sqlite://host/x"):
        with pytest.raises(UsageError):
            Journal.open(wrong)


def aged(path: str, format: str, *statements: str) -> None:
    """Give a journal the shape of an older format."""
    with raw(path) as connection:
        for table in ("fences", "holders", "open_brackets", "leases", "promises"):
            connection.execute(f"DROP TABLE {table}")
        connection.execute("CREATE TABLE fences (environment TEXT PRIMARY KEY, fence INTEGER NOT NULL)")
        connection.execute(
            "CREATE TABLE holders (environment TEXT PRIMARY KEY, operator TEXT, host TEXT, pid INTEGER, since FLOAT, "
            "label TEXT, why TEXT, deployment TEXT)"
        )
        connection.execute(
            "CREATE TRIGGER fences_are_kept BEFORE DELETE ON fences BEGIN SELECT RAISE(ABORT, 'a fence only rises'); END"
        )
        for table, column in (("decisions", "envelope"), ("decisions", "hash"), ("entries", "hash")):
            connection.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        connection.execute("UPDATE meta SET value = ? WHERE key = 'format'", (format,))
        for statement in statements:
            connection.execute(statement)


@pytest.mark.parametrize("format", ["1", "2"])
def test_a_journal_of_before_goes_on_with_its_fences_and_brackets(path: str, format: str) -> None:
    with Journal.open(path) as journal:
        journal.begin(ULID, PLAN, 7, "ann")
        journal.append(ULID, ev.BracketOpened("web1", "web", 1), ev.BracketOpened("web2", "web", 1))
        journal.append(ULID, ev.BracketClosed("web1", "web", "deployed"))
        was_open = journal.open_brackets()
    aged(path, format, "INSERT INTO fences VALUES ('production', 7)")
    for _ in range(2):
        with Journal.open(path) as journal:
            assert journal.open_brackets() == was_open
            assert journal.open_brackets("staging") == []
    with Journal.open(path) as journal:
        assert [(one.machine, one.project) for one in was_open] == [("web2", "shop")]
        assert journal.claim("desk", "production") == 8, "no fence of a project is below that of the environment"
        assert journal.claim("shop", "production") == 8
        assert journal.claim("shop", "staging") == 1
        assert journal.deployment(ULID).fence == 7
    with raw(path) as connection:
        assert connection.execute("SELECT value FROM meta WHERE key = 'format'").fetchall() == [(str(FORMAT),)]
        with pytest.raises(sqlite3.IntegrityError, match="only rises"):
            connection.execute("DELETE FROM fences")


def test_a_journal_that_an_older_version_works_with_is_left_as_it_is_until_that_ends(path: str) -> None:
    Journal.open(path).close()
    aged(path, "2")
    Path(f"{path}.locks").mkdir()
    with Path(f"{path}.locks/production").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LockedError, match="older Waystation"):
            Journal.open(path)
        with raw(path) as connection:
            assert connection.execute("SELECT value FROM meta WHERE key = 'format'").fetchall() == [("2",)]
    Journal.open(path).close()


bracket_events = st.builds(
    lambda kind, machine: {
        "open": ev.BracketOpened(machine, "web", 1),
        "close": ev.BracketClosed(machine, "web", "deployed"),
        "adopt": ev.BracketAdopted(machine, "web", ULID),
    }[kind],
    st.sampled_from(["open", "close", "adopt"]),
    st.sampled_from(["web1", "web2"]),
)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([ULID, OTHER]), st.lists(bracket_events, min_size=1, max_size=4)), max_size=12)
)
def test_the_open_brackets_that_are_kept_are_those_of_the_entries(story: list[tuple[str, list[ev.Event]]]) -> None:
    with TemporaryDirectory() as folder, Journal.open(f"{folder}/journal.db") as journal:
        journal.begin(ULID, PLAN, 1, "ann")
        journal.begin(OTHER, PLAN.replace(b'"shop"', b'"desk"'), 1, "ann")
        for deployment, events in story:
            journal.append(deployment, *events)
            assert journal.open_brackets("production") == open_brackets(journal.brackets("production"))


def test_a_journal_of_a_newer_format_is_refused_and_untouched(path: str) -> None:
    Journal.open(path).close()
    with raw(path) as connection:
        connection.execute("UPDATE meta SET value = ? WHERE key = 'format'", (str(FORMAT + 1),))
        connection.execute("DROP TABLE entries")
    before = Path(path).read_bytes()
    with pytest.raises(RefusedError, match=f"format {FORMAT + 1}.*reads up to {FORMAT}"):
        Journal.open(path)
    assert Path(path).read_bytes() == before


def test_a_journal_of_format_2_is_read_on_and_takes_signed_decisions(path: str) -> None:
    """As an older Waystation made it: decisions had no envelopes."""
    with Journal.open(path) as journal:
        journal.begin(ULID, PLAN, 1, "ann")
        journal.decide("production", ULID, "cancel", {}, "ann")
    aged(path, "2")
    with Journal.open(path) as journal, Journal.open(path) as other:
        number = journal.decide("production", ULID, "pause", {}, "ann", b"signed")
        old, new = other.pending_decisions(ULID)
        assert (old.kind, old.envelope) == ("cancel", b"")
        assert (new.number, new.envelope) == (number, b"signed")


def test_an_envelope_is_kept_once(journal: Journal) -> None:
    journal.decide("production", ULID, "pause", {}, "ann", b"signed")
    with pytest.raises(ConflictError, match="what is signed once counts once"):
        journal.decide("production", ULID, "pause", {}, "ann", b"signed")
    assert len(journal.pending_decisions(ULID)) == 1


@pytest.mark.parametrize(("key", "value"), [("format", "0"), ("format", "one"), ("id", ""), ("id", "../..")])
def test_a_journal_with_a_senseless_head_is_damaged(path: str, key: str, value: str) -> None:
    Journal.open(path).close()
    with raw(path) as connection:
        connection.execute("UPDATE meta SET value = ? WHERE key = ?", (value, key))
    with pytest.raises(StoreError, match="damaged"):
        Journal.open(path)


def test_another_programs_database_is_not_taken_for_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with raw(str(path)) as connection:
        connection.execute("CREATE TABLE things (x)")
    with pytest.raises(StoreError, match="not a journal"):
        Journal.open(str(path))


def test_a_file_that_is_no_database_is_told_clearly(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    path.write_bytes(b"this is a text, not a database\n" * 1000)
    with pytest.raises(StoreError, match="damaged"):
        Journal.open(str(path))
    with pytest.raises(StoreError):
        Journal.open(str(tmp_path))  # a folder
    with pytest.raises(StoreError, match="cannot be made"):
        Journal.open(str(path / "below" / "journal.db"))


def check(journal: Journal) -> None:
    with journal.database.reading() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check(3)").scalars().all() == ["ok"]


def use_all(path: str) -> None:
    with Journal.open(path) as journal:
        for record in journal.deployments():
            journal.entries(record.deployment)
            journal.plan(record.deployment)
        journal.brackets()
        journal.pending_decisions(ULID)
        with suppress(NotFoundError):
            journal.release("shop", "1")
        journal.append(ULID, ev.Note("after"))
        journal.claim("shop", "production")


def test_damage_anywhere_is_a_store_error_and_never_anything_else(path: str, tmp_path: Path) -> None:
    with Journal.open(path) as journal:
        journal.begin(ULID, PLAN, 1, "ann")
        journal.append(ULID, *(ev.Note("text " * 100) for _ in range(200)))
        journal.add_release("shop", "1", b"d" * 9000, ENVELOPE, {HELLO: b"hello"}, "ann")
    whole, told = Path(path).read_bytes(), []
    for seed in range(60):
        chance = random.Random(seed)
        hurt = bytearray(whole)
        if seed % 3 == 0:
            hurt = hurt[: chance.randrange(1, len(hurt))]
        else:
            start = chance.randrange(0, 4096 if seed % 3 == 1 else len(hurt))
            length = chance.choice([1, 16, 4096])
            hurt[start : start + length] = chance.randbytes(min(length, len(hurt) - start))
        sick = tmp_path / f"sick-{seed}.db"
        sick.write_bytes(hurt)
        try:
            use_all(str(sick))
        except (StoreError, RefusedError) as error:
            told.append(str(error))
    assert len(told) > 20, "the damage must be one that is met"
    assert [text for text in told if "INSERT" in text or "SELECT" in text] == []


def test_an_entry_of_an_unknown_kind_is_not_passed_over(journal: Journal) -> None:
    with raw(journal.path) as connection:
        row = (ULID, 0.0, "later", '{"kind":"later"}')
        connection.execute("INSERT INTO entries (deployment, at, kind, data) VALUES (?, ?, ?, ?)", row)
    with pytest.raises(StoreError, match="later"):
        journal.entries(ULID)


def test_a_full_disk_is_told_and_loses_nothing(journal: Journal) -> None:
    acknowledged = journal.append(ULID, ev.Note("kept"))
    with journal.database.writing() as connection:  # SQLite's own fault injection; the pool holds this one connection
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")

    def fill() -> None:
        nonlocal acknowledged
        for _ in range(100):
            acknowledged = journal.append(ULID, ev.Note("x" * 2000))

    with pytest.raises(StoreError, match="no space left") as told:
        fill()
    assert told.value.full
    assert journal.entries(ULID)[-1].number == acknowledged
    with journal.database.writing() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count=100000")
    assert journal.append(ULID, ev.Note("x" * 2000)) > acknowledged


# --- several at once


def test_an_append_waits_for_another_process_that_writes(journal: Journal) -> None:
    other = raw(journal.path)
    other.execute("BEGIN IMMEDIATE")
    numbers: list[int] = []
    writer = threading.Thread(target=lambda: numbers.append(journal.append(ULID, ev.Note("patient"))))
    writer.start()
    writer.join(0.4)
    assert writer.is_alive(), "the other process' transaction must hold it up"
    assert numbers == []
    other.execute("COMMIT")
    writer.join(10)
    assert journal.entries(ULID)[-1].number == numbers[0]


def test_a_busy_that_sqlite_itself_does_not_wait_for_is_waited_for(journal: Journal) -> None:
    other, hasty = raw(journal.path), sqlite3.connect(journal.path, isolation_level=None, timeout=0)
    other.execute("BEGIN IMMEDIATE")
    tries = 0

    def begin() -> None:
        nonlocal tries
        tries += 1
        if tries == 3:
            other.execute("COMMIT")
        hasty.execute("BEGIN IMMEDIATE")

    sqlite._patiently(begin)
    assert tries == 3
    assert hasty.in_transaction
    with pytest.raises(sqlite3.OperationalError) as told:
        sqlite._patiently(begin)  # what is not "busy" is told at once
    assert told.value.sqlite_errorcode == sqlite3.SQLITE_ERROR
    assert tries == 4
    hasty.close()


def test_a_journal_that_is_held_for_ever_is_told_as_busy(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.2)
    other = raw(journal.path)
    other.execute("BEGIN IMMEDIATE")
    with Journal.open(journal.path) as impatient:
        with pytest.raises(StoreError, match="busy"):
            impatient.append(ULID, ev.Note("x"))
        assert len(impatient.entries(ULID)) == 1, "reading goes on"
        other.execute("COMMIT")
        impatient.append(ULID, ev.Note("now"))
    other.close()


def release(children: list[Talk]) -> None:
    """Let all go on at one time, once each has said that it is ready."""
    for each in children:
        assert each.hear() == "ready\n"
    for each in children:
        each.say("go")


WRITER = """
import sys
from orchestrator.journal.journal import Journal
from orchestrator.journal.events import Note
path, deployment, name, count = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
with Journal.open(path) as journal:
    print(journal.id)
    for i in range(int(count)):
        print(journal.append(deployment, Note(f"{name} {i}")), journal.claim("shop", "production"),
              journal.decide("production", deployment, name, {"i": i}, name), flush=True)
"""


def test_no_write_of_many_processes_is_lost_and_no_fence_is_given_twice(journal: Journal) -> None:
    count, names = 25, "abcd"
    writers = [child(WRITER, journal.path, ULID, name, count) for name in names]
    release(writers)
    done = [writer.end() for writer in writers]
    told = [each.out.split("\n")[2:-1] for each in done]
    assert [each.code for each in done] == [0] * len(names)
    rows = [[int(word) for word in line.split()] for lines in told for line in lines]
    assert len(rows) == count * len(names)
    for column in range(3):
        assert len({row[column] for row in rows}) == len(rows)
    entries = journal.entries(ULID)[1:]
    texts = [entry.event.text for entry in entries if isinstance(entry.event, ev.Note)]
    assert {entry.number for entry in entries} == {row[0] for row in rows}
    for name in names:
        assert [text for text in texts if text.startswith(name)] == [f"{name} {i}" for i in range(count)]
    assert len(journal.pending_decisions(ULID)) == len(rows)


def test_processes_that_make_the_journal_at_once_make_one(path: str) -> None:
    makers = [child(WRITER, path, ULID, "x", 0) for _ in range(6)]
    release(makers)
    done = [maker.end() for maker in makers]
    assert len({each.out for each in done}) == 1
    assert [each.code for each in done] == [0] * 6


def test_a_decision_is_taken_by_one_of_many_threads(journal: Journal) -> None:
    numbers = [journal.decide("production", ULID, "retry", {}, "ann") for _ in range(10)]
    taken: list[int] = []

    def take() -> None:
        taken.extend(number for number in numbers if journal.take_decision(number))

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(taken) == numbers
    assert len(journal.entries(ULID)) == 1 + len(numbers)


# --- kill -9

APPENDER = """
import os, sys
from orchestrator.journal.journal import Journal
from orchestrator.journal.events import Note
path, deployment, name = sys.argv[1:]
journal = Journal.open(path)
i = 0
while True:
    number = journal.append(deployment, Note(f"{name} {i} " + "x" * (i % 7 * 300)))
    os.write(1, b"%d\\n" % number)
    i += 1
"""


def test_what_was_acknowledged_before_a_kill_is_there(path: str) -> None:
    with Journal.open(path) as journal:
        journal.begin(ULID, PLAN, 1, "ann")
    chance, acknowledged, rounds = random.Random(4), [], 12
    for number in range(rounds):
        appender = child(APPENDER, path, ULID, number)
        appender.hear(chance.randrange(1, 150))
        time.sleep(chance.random() * 0.004)
        told = appender.process.kill().out
        acknowledged += [int(line) for line in told.splitlines(keepends=True) if line.endswith("\n")]
        with Journal.open(path) as journal:
            check(journal)
            entries = journal.entries(ULID)[1:]
        there = {entry.number for entry in entries}
        assert set(acknowledged) <= there
        assert len(there) - len(acknowledged) <= number + 1, "at most one per kill was written and not told"
        mine = [entry.event.text for entry in entries if isinstance(entry.event, ev.Note)]
        mine = [text.split()[1] for text in mine if text.startswith(f"{number} ")]
        assert mine == [str(i) for i in range(len(mine))]


DIES_INSIDE = """
import os, signal, sys
from orchestrator.journal import journal, tables
from orchestrator.journal.events import Note
def die(real):
    def dying(*args):
        real(*args)
        os.kill(os.getpid(), signal.SIGKILL)
    return dying
path, deployment, where = sys.argv[1:]
if where == "create":
    tables.create = die(tables.create)
opened = journal.Journal.open(path)
opened._add = die(opened._add)
opened.append(deployment, Note("never"), Note("told"))
"""


def test_a_process_killed_inside_a_commit_leaves_nothing_of_it(journal: Journal) -> None:
    assert child(DIES_INSIDE, journal.path, ULID, "append").end().code == -signal.SIGKILL
    assert len(journal.entries(ULID)) == 1
    journal.append(ULID, ev.Note("on"))


def test_a_process_killed_while_it_makes_the_journal_leaves_room_for_the_next(path: str) -> None:
    assert child(DIES_INSIDE, path, ULID, "create").end().code == -signal.SIGKILL
    assert os.path.exists(path)
    with Journal.open(path) as journal:
        journal.begin(ULID, PLAN, 1, "ann")
        assert journal.claim("shop", "production") == 1
