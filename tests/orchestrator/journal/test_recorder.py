"""What a recorder promises: on the disk before it returns, in order, and nothing is kept for ever."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.process import eventually

from agent.orders.operation_id import OperationId
from orchestrator.fleet.order_book import OrderBook
from orchestrator.journal import recorder as recorders
from orchestrator.journal.events import BracketOpened, Dispatched, Event, Note, Reported, TurnDid
from orchestrator.journal.journal import Journal
from orchestrator.journal.recorder import Recorder
from relay.errors import ConflictError, StoreError

DEPLOYMENT = "01J9ZZZZZZZZZZZZZZZZZZZZZ0"
SWITCH = OperationId.of(DEPLOYMENT, 1, "web1", "switch")
LEAVES = Dispatched(str(SWITCH), "web1", "a" * 64)
DONE = Reported(str(SWITCH), "web1", "done")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    tmp_path.chmod(0o700)
    with Journal.open(str(tmp_path / "journal.db")) as opened:
        plan = {"project": "webshop", "label": "1.4.2", "environment": "production"}
        opened.begin(DEPLOYMENT, json.dumps(plan).encode(), 1, "me")
        yield opened


def written(journal: Journal) -> list[Event]:
    """What another process reads, without `started`."""
    with Journal.open(journal.path) as other:
        return [entry.event for entry in other.entries(DEPLOYMENT)][1:]


def commits(journal: Journal) -> int:
    """Entries of one commit have one time."""
    return len({entry.at for entry in journal.entries(DEPLOYMENT)}) - 1


async def test_what_was_kept_for_later_comes_before_what_follows_in_one_commit(journal: Journal) -> None:
    recorder = Recorder(journal, DEPLOYMENT)
    did = TurnDid("web1", 1, "switch", "done")
    recorder.later("web1", DONE)
    recorder.later("web1", did)
    recorder.later("web2", TurnDid("web2", 1, "switch", "done"))
    await recorder.record(LEAVES)
    assert written(journal) == [DONE, did, LEAVES], "another machine's is not due"
    assert commits(journal) == 1


async def test_nothing_is_kept_for_longer_than_a_moment(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorders, "LATER_SECONDS", 0.01)
    recorder = Recorder(journal, DEPLOYMENT)
    recorder.later("web1", DONE)
    assert written(journal) == []
    await eventually(lambda: written(journal) == [DONE], 20.0)


async def test_the_end_of_a_deployment_leaves_nothing_unwritten(journal: Journal) -> None:
    recorder = Recorder(journal, DEPLOYMENT)
    recorder.later("web1", DONE)
    await recorder.end("failed", "why")
    assert [event.kind() for event in written(journal)] == ["reported", "ended"]


async def test_many_at_once_are_few_commits_and_each_is_on_the_disk_when_it_returns(journal: Journal) -> None:
    recorder = Recorder(journal, DEPLOYMENT)
    notes = [Note(f"note {number}") for number in range(20)]

    async def one(note: Note) -> None:
        await recorder.record(note)
        assert note in written(journal)

    await asyncio.gather(*(one(note) for note in notes))
    assert written(journal) == notes, "in the order in which they came"
    assert commits(journal) < len(notes)


async def test_one_that_cannot_be_written_takes_none_of_the_others_with_it(journal: Journal) -> None:
    recorder = Recorder(journal, DEPLOYMENT)
    before, after = Note("before"), Note("after")
    results = await asyncio.gather(
        recorder.record(Note("first")),  # is under way alone: the others are the next commit
        recorder.record(before),
        recorder.record(Note("half a pair: \ud800")),
        recorder.record(after),
        return_exceptions=True,
    )
    assert [isinstance(result, Exception) for result in results] == [False, False, True, False]
    assert written(journal) == [Note("first"), before, after]


async def test_what_was_kept_is_written_with_the_next_where_the_disk_was_full(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    recorder = Recorder(journal, DEPLOYMENT, told.append)

    def full(*_: object, **__: object) -> int:
        raise StoreError("no space left", full=True)

    recorder.later("web1", DONE)
    with monkeypatch.context() as patched:
        patched.setattr(journal, "append", full)
        with pytest.raises(StoreError):
            await recorder.record(LEAVES)
    assert written(journal) == []
    assert told == []
    opened = BracketOpened("web1", "web", 1)
    await recorder.record(opened)
    assert written(journal) == [DONE, opened]


async def test_who_is_cancelled_while_it_is_written_finds_it_written(journal: Journal) -> None:
    recorder = Recorder(journal, DEPLOYMENT)
    recording = asyncio.create_task(recorder.record(Note("one")))
    await asyncio.sleep(0)
    recording.cancel()
    with pytest.raises(asyncio.CancelledError):
        await recording
    await recorder.record(Note("two"))
    assert written(journal) == [Note("one"), Note("two")]


# --- orders


async def test_an_order_is_kept_with_the_entry_that_says_that_it_leaves(journal: Journal) -> None:
    recorder = Recorder(journal, DEPLOYMENT)
    assert recorder.order(SWITCH) is None
    await recorder.dispatch(LEAVES, b"envelope")
    assert written(journal) == [LEAVES]
    with Journal.open(journal.path) as other:
        again = Recorder(other, DEPLOYMENT)
        assert again.order(SWITCH) == b"envelope"
        assert again.ordered() == {str(SWITCH)}


async def test_another_order_of_the_same_name_is_refused_and_leaves_no_entry(journal: Journal) -> None:
    recorder = Recorder(journal, DEPLOYMENT)
    await recorder.dispatch(LEAVES, b"envelope")
    await recorder.dispatch(LEAVES, b"envelope")
    with pytest.raises(ConflictError):
        await recorder.dispatch(LEAVES, b"another")
    with pytest.raises(ConflictError):
        await recorder.keep_order(SWITCH, b"another")
    assert recorder.order(SWITCH) == b"envelope"
    assert written(journal) == [LEAVES, LEAVES]


async def test_an_order_is_never_changed_nor_removed(journal: Journal) -> None:
    await Recorder(journal, DEPLOYMENT).keep_order(SWITCH, b"envelope")
    for statement in ("UPDATE orders SET envelope = x'00'", "DELETE FROM orders"):
        with pytest.raises(StoreError), journal.database.writing() as connection:
            connection.exec_driver_sql(statement)
    assert journal.order(str(SWITCH)) == b"envelope"


async def test_an_order_that_an_older_version_kept_in_a_file_is_found_there(journal: Journal, tmp_path: Path) -> None:
    (tmp_path / "orders").mkdir()
    (tmp_path / "orders" / f"{SWITCH.file_name}.json").write_bytes(b"older")
    book = OrderBook(Recorder(journal, DEPLOYMENT), str(tmp_path / "orders"))
    assert book.has(SWITCH)
    assert book.find(SWITCH) == b"older"
    other = OperationId.of(DEPLOYMENT, 1, "web2", "switch")
    assert not book.has(other)
    assert book.find(other) is None


async def test_an_order_whose_sender_was_cancelled_while_it_was_written_is_that_order(
    journal: Journal, tmp_path: Path
) -> None:
    book = OrderBook(Recorder(journal, DEPLOYMENT), str(tmp_path / "orders"))
    sending = asyncio.create_task(book.dispatch(SWITCH, b"envelope", LEAVES))
    await asyncio.sleep(0)
    sending.cancel()
    assert book.find(SWITCH) == b"envelope"
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert book.find(SWITCH) == b"envelope"
