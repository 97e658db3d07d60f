"""History is a chain of hashes: whatever is changed in it, or removed from it, is found, and by its number."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.paths import ROOT
from harness.process import Done, run
from harness.seed import chance

from orchestrator.journal import events as ev
from orchestrator.journal.journal import FORMAT, Journal

ULID = "01JD0000000000000000000000"
OTHER = "01JD0000000000000000000001"
PLAN = b'{"format":1,"project":"shop","label":"1.4.2","environment":"production","steps":[]}'
OLD = """
CREATE TABLE meta ("key" TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE releases (number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, project TEXT NOT NULL, label TEXT NOT NULL,
    document BLOB NOT NULL, envelope BLOB NOT NULL, created FLOAT NOT NULL, operator TEXT NOT NULL, UNIQUE (project, label));
CREATE TABLE release_files (sha256 TEXT NOT NULL PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE deployments (number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, deployment TEXT NOT NULL UNIQUE,
    project TEXT NOT NULL, label TEXT NOT NULL, environment TEXT NOT NULL, goal TEXT NOT NULL, plan BLOB NOT NULL,
    fence INTEGER NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL, operator TEXT NOT NULL, host TEXT NOT NULL,
    pid INTEGER NOT NULL, started FLOAT NOT NULL, ended FLOAT);
CREATE TABLE entries (number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, deployment TEXT NOT NULL REFERENCES
    deployments (deployment), at FLOAT NOT NULL, kind TEXT NOT NULL, data TEXT NOT NULL);
CREATE TABLE decisions (number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, environment TEXT NOT NULL, deployment TEXT
    REFERENCES deployments (deployment), at FLOAT NOT NULL, operator TEXT NOT NULL, kind TEXT NOT NULL, data TEXT NOT NULL,
    taken FLOAT);
CREATE TABLE fences (environment TEXT NOT NULL PRIMARY KEY, fence INTEGER NOT NULL);
CREATE TABLE holders (environment TEXT NOT NULL PRIMARY KEY, operator TEXT NOT NULL, host TEXT NOT NULL,
    pid INTEGER NOT NULL, since FLOAT NOT NULL, label TEXT NOT NULL, why TEXT NOT NULL, deployment TEXT NOT NULL);
CREATE TRIGGER entries_stay BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'an entry is never changed'); END;
CREATE TRIGGER entries_are_kept BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'an entry is never removed'); END;
INSERT INTO meta VALUES ('format', '2'), ('id', 'aabbccddeeff00112233445566778899'), ('created', '1.0');
INSERT INTO deployments VALUES (1, '01JD0000000000000000000000', 'shop', '1.4.2', 'production', 'deploy',
    X'7b7d', 1, 'running', '', 'ann', 'host', 1, 1.0, NULL);
INSERT INTO entries VALUES
    (1, '01JD0000000000000000000000', 1.0, 'started', '{"kind":"started","operator":"ann","host":"h","pid":1,"fence":1}'),
    (2, '01JD0000000000000000000000', 2.0, 'note', '{"kind":"note","text":"one"}'),
    (3, '01JD0000000000000000000000', 3.0, 'note', '{"kind":"note","text":"two"}');
INSERT INTO decisions VALUES (1, 'production', '01JD0000000000000000000000', 4.0, 'ann', 'cancel', '{}', NULL);
"""
"""A journal of format 2, as its tables were."""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "home" / "journal.db")


@pytest.fixture
def journal(path: str) -> Iterator[Journal]:
    with Journal.open(path, clock=lambda: 7) as opened:
        opened.begin(ULID, PLAN, 1, "ann")
        opened.append(ULID, *(ev.Note(f"note {n} \x00 ü") for n in range(4)))
        opened.begin(OTHER, PLAN, 2, "ann")
        opened.take_decision(opened.decide("production", OTHER, "retry", {"machine": "web1"}, "bob"))
        opened.decide("production", ULID, "cancel", {}, "bob")
        opened.set_state(OTHER, "failed", "because", ev.Ended("failed", "because"))
        yield opened


def tamper(path: str, *statements: str) -> None:
    """As somebody would who has the file: our triggers do not keep them from it."""
    with sqlite3.connect(path) as connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            assert connection.execute(statement).rowcount != 0, f"it changed nothing: {statement}"
        for _, sql in triggers:
            connection.execute(sql)


def wrong_entry(journal: Journal) -> int | None:
    wrong = journal.verify().entries.wrong
    return wrong and wrong.number


def test_what_nobody_touched_is_whole_and_each_hash_is_over_the_one_before(journal: Journal, path: str) -> None:
    report = journal.verify()
    assert report.is_whole
    assert (report.entries.rows, report.decisions.rows) == (8, 2)
    # By hand, as docs/protocol.md tells it.
    with sqlite3.connect(path) as connection:
        rows = connection.execute(
            "SELECT number, deployment, at, kind, data, hash FROM entries ORDER BY number"
        ).fetchall()
        plans = dict(connection.execute("SELECT deployment, plan FROM deployments").fetchall())
    before = hashlib.sha256(journal.id.encode()).hexdigest()
    for number, deployment, at, kind, data, hash in rows:
        words = {"at": at, "data": data, "deployment": deployment, "kind": kind, "number": number}
        if kind == "started":
            of = {"project": "shop", "label": "1.4.2", "environment": "production", "goal": "deploy", "started": 7.0}
            of["plan"] = hashlib.sha256(plans[deployment]).hexdigest()
            words |= {f"deployment_{name}": value for name, value in of.items()}
        text = json.dumps(words, sort_keys=True, separators=(",", ":"))
        before = hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()
        assert before == hash
    assert report.entries.head == before


@pytest.mark.parametrize(
    ("statement", "entry"),
    [
        ('UPDATE entries SET data = \'{"kind":"note","text":"x"}\' WHERE number = 3', 3),
        ("UPDATE entries SET at = at + 1 WHERE number = 4", 4),
        ("UPDATE entries SET kind = 'ended' WHERE number = 5", 5),
        ("UPDATE entries SET hash = NULL WHERE number = 2", 2),
        ("UPDATE entries SET deployment = '01JD0000000000000000000001' WHERE number = 2", 2),
        ("DELETE FROM entries WHERE number = 4", 4),
        ("DELETE FROM entries WHERE number >= 7", 7),
        ("DELETE FROM entries", 1),
        ("UPDATE entries SET number = number + 10 WHERE number >= 6", 6),
        ("UPDATE deployments SET plan = X'7b7d' WHERE deployment = '01JD0000000000000000000001'", 6),
        ("UPDATE deployments SET label = '1.4.3' WHERE deployment = '01JD0000000000000000000000'", 1),
        ("INSERT INTO entries (deployment, at, kind, data) VALUES ('01JD0000000000000000000000', 1, 'note', '{}')", 9),
    ],
)
def test_the_first_entry_that_is_wrong_is_named(journal: Journal, path: str, statement: str, entry: int) -> None:
    tamper(path, statement)
    assert wrong_entry(journal) == entry
    assert not journal.verify().is_whole


def test_a_removed_end_stays_known_when_more_is_written(journal: Journal, path: str) -> None:
    tamper(path, "DELETE FROM entries WHERE number >= 7")
    journal.append(ULID, ev.Note("later"), ev.Note("and later"))
    assert wrong_entry(journal) == 7
    assert [entry.number for entry in journal.entries(ULID)][-2:] == [9, 10]


@pytest.mark.parametrize(
    ("statement", "decision"),
    [
        ("UPDATE decisions SET operator = 'eve' WHERE number = 1", 1),
        ("UPDATE decisions SET kind = 'pause' WHERE number = 2", 2),
        ("DELETE FROM decisions WHERE number = 2", 2),
    ],
)
def test_decisions_are_a_chain_as_well(journal: Journal, path: str, statement: str, decision: int) -> None:
    tamper(path, statement)
    report = journal.verify()
    assert report.entries.wrong is None
    assert report.decisions.wrong is not None
    assert report.decisions.wrong.number == decision


def test_whoever_makes_all_hashes_anew_is_found_by_one_that_was_kept(
    journal: Journal, path: str, tmp_path: Path
) -> None:
    kept = journal.heads().entries.hash
    journal.append(ULID, ev.Note("later"))
    assert journal.verify(kept).is_whole
    # A second journal with the same id and another past has no fault in itself.
    forged = str(tmp_path / "forged.db")
    with Journal.open(forged, clock=lambda: 7) as other:
        other.begin(ULID, PLAN, 1, "eve")
        other.append(ULID, *(ev.Note(f"n {n}") for n in range(9)))
        assert other.verify().is_whole
        assert not other.verify(kept).is_whole


def test_any_one_changed_character_is_found_at_its_entry(journal: Journal, path: str) -> None:
    draw = chance("chain")
    journal.append(ULID, *(ev.Note(f"text {n} of many") for n in range(30)))
    for _ in range(8):
        number = draw.randrange(1, 39)
        column = draw.choice(["data", "hash", "kind"])
        with sqlite3.connect(path) as connection:
            (text,) = connection.execute(f"SELECT {column} FROM entries WHERE number = ?", (number,)).fetchone()  # noqa: S608
        at = draw.randrange(len(text))
        changed = text[:at] + ("x" if text[at] != "x" else "y") + text[at + 1 :]
        put = f"UPDATE entries SET {column} = '{{}}' WHERE number = {number}"  # noqa: S608
        tamper(path, put.format(changed.replace("'", "''")))
        assert wrong_entry(journal) == number, f"{column} of {number}"
        tamper(path, put.format(text.replace("'", "''")))
    assert journal.verify().is_whole


# --- journals from before


@pytest.fixture
def old(path: str) -> str:
    Path(path).parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.executescript(OLD)
    return path


def test_an_older_journal_is_chained_from_its_next_start_on(old: str) -> None:
    with Journal.open(old) as journal:
        assert journal.verify().is_whole
        journal.append(ULID, ev.Note("three"))
        journal.decide("production", ULID, "cancel", {}, "bob")
        assert [entry.number for entry in journal.entries(ULID)] == [1, 2, 3, 4]
    with Journal.open(old) as again:
        report = again.verify()
        assert report.is_whole
        assert (report.entries.rows, report.decisions.rows) == (4, 2)
    with sqlite3.connect(old) as connection:
        hashes = connection.execute("SELECT hash IS NULL FROM entries ORDER BY number").fetchall()
        assert [row[0] for row in hashes] == [1, 1, 1, 0]
        assert connection.execute("SELECT value FROM meta WHERE key = 'format'").fetchone() == (str(FORMAT),)


@pytest.mark.parametrize(
    ("statement", "entry"),
    [
        ('UPDATE entries SET data = \'{"kind":"note","text":"x"}\' WHERE number = 2', 3),
        ("DELETE FROM entries WHERE number = 3", 3),
        ("DELETE FROM entries WHERE number = 1", 3),
        ("UPDATE entries SET at = 9 WHERE number = 4", 4),
        ("DELETE FROM entries WHERE number = 4", 4),
        ("DELETE FROM entries WHERE number = 5", 5),
        ("UPDATE deployments SET plan = X'7b' WHERE number = 1", 3),
    ],
)
def test_what_is_older_than_the_chain_is_guarded_as_one(old: str, statement: str, entry: int) -> None:
    with Journal.open(old) as journal:
        journal.append(ULID, ev.Note("three"), ev.Note("four"))
        tamper(old, statement)
        assert wrong_entry(journal) == entry


@pytest.mark.processes
def test_many_processes_that_open_it_at_once_migrate_it_once(old: str) -> None:
    code = (
        "import sys; from orchestrator.journal.journal import Journal; from orchestrator.journal.events import Note\n"
        "sys.stdin.readline()\n"
        "with Journal.open(sys.argv[1]) as journal:\n"
        "    journal.append(sys.argv[2], *(Note(str(n)) for n in range(10)))"
    )
    at_once = [
        subprocess.Popen([sys.executable, "-c", code, old, ULID], stdin=subprocess.PIPE, cwd=ROOT) for _ in range(3)
    ]
    for process in at_once:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    for process in at_once:
        process.communicate(timeout=60)
    assert [process.returncode for process in at_once] == [0] * 3
    with Journal.open(old) as journal:
        report = journal.verify()
        assert report.is_whole
        assert report.entries.rows == 33


# --- the command


def history(tmp_path: Path, *words: str) -> Done:
    return run(tmp_path, "release", "history", "--journal", str(tmp_path / "home" / "journal.db"), *words)


@pytest.mark.processes
def test_the_command_says_whether_history_is_whole_and_where_not(journal: Journal, path: str, tmp_path: Path) -> None:
    done = history(tmp_path, "--verify")
    assert (done.code, done.err) == (0, "")
    assert "8 entries and 2 decisions are as they were written" in done.out
    listed = history(tmp_path, "--json").json
    kept = listed["chain"]["entries"]["hash"]
    assert kept in done.out
    assert {each["deployment"]: each["last"]["number"] for each in listed["deployments"]} == {ULID: 5, OTHER: 8}
    assert next(each for each in listed["deployments"] if each["deployment"] == OTHER)["last"]["hash"] == kept
    assert history(tmp_path, "--verify", "--head", kept).code == 0
    strange = history(tmp_path, "--verify", "--head", "0" * 64)
    assert (strange.code, "0" * 64 in strange.out) == (1, True)
    assert history(tmp_path, "--head", kept).code == 2

    tamper(path, "UPDATE entries SET at = 8 WHERE number = 3")
    done = history(tmp_path, "--verify")
    assert done.code == 1
    assert done.out.startswith("entry 3 is the first that is wrong: ")
    told = history(tmp_path, "--verify", "--json")
    assert told.code == 1
    document = json.loads(told.out)
    assert (document["whole"], document["entries"]["wrong"]["number"]) == (False, 3)
