"""What people decide is obeyed while a deployment runs, and what keeps it from being read stops the deployment."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from harness.process import eventually

from orchestrator.deployment import decisions
from orchestrator.deployment.context import StopToken
from orchestrator.deployment.decisions import CANCEL, decisions_obeyed
from orchestrator.journal.events import DecisionTaken
from orchestrator.journal.journal import Decision, Journal
from orchestrator.journal.recorder import Recorder
from relay.errors import StoreError

DEPLOYMENT = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
PLAN = msgspec.json.encode({"project": "shop", "label": "1", "environment": "production"})


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    monkeypatch.setattr(decisions, "DECISIONS_SECONDS", 0.01)
    with Journal.open(str(tmp_path / "journal.db")) as opened:
        opened.begin(DEPLOYMENT, PLAN, 1, "anna@host")
        yield opened


def tasks() -> set[asyncio.Task[object]]:
    return asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]


async def test_a_cancel_is_obeyed_recorded_and_told(journal: Journal) -> None:
    lines: list[str] = []
    stop = StopToken()
    async with decisions_obeyed(Recorder(journal, DEPLOYMENT, lines.append), stop, 0.0):
        journal.decide("production", DEPLOYMENT, CANCEL, {}, "anna@host")
        async with asyncio.timeout(60):
            await stop.wait()
        await eventually(lambda: lines == ["anna@host decided: cancel"])
    assert (stop.reason, stop.by_person) == ("cancelled by anna@host", True)
    assert isinstance(journal.entries(DEPLOYMENT)[-1].event, DecisionTaken)
    assert journal.pending_decisions(DEPLOYMENT) == []


async def test_the_deadline_stops_and_is_no_persons_word(journal: Journal) -> None:
    stop = StopToken()
    async with decisions_obeyed(Recorder(journal, DEPLOYMENT), stop, 0.01), asyncio.timeout(60):
        await stop.wait()
    assert (stop.reason, stop.by_person) == ("the deadline of 0 s is over", False)


@pytest.mark.parametrize("fails", [False, True])
async def test_the_watch_has_ended_when_the_block_ends(journal: Journal, *, fails: bool) -> None:
    """Also where the look at the journal takes a while to be given up."""
    looking, given_up = asyncio.Event(), []

    class Slow(Recorder):
        async def pending_decisions(self) -> list[Decision]:
            looking.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                await asyncio.sleep(0.01)
                given_up.append(True)
                raise
            return []

    before = tasks()
    try:
        async with decisions_obeyed(Slow(journal, DEPLOYMENT), StopToken(), 3600.0):
            await looking.wait()
            if fails:
                raise StoreError("no space left")
    except StoreError:
        assert fails
    assert given_up == [True]
    assert tasks() == before, "the watch outlives what it watches for"


async def test_a_journal_that_cannot_be_read_stops_the_deployment(journal: Journal) -> None:
    stop = StopToken()
    async with decisions_obeyed(Recorder(journal, DEPLOYMENT), stop, 0.0):
        with journal.database.writing() as connection:
            connection.exec_driver_sql("ALTER TABLE decisions RENAME TO gone")
        async with asyncio.timeout(60):
            await stop.wait()
    assert stop.reason.startswith("what people decide cannot be read: ")
    assert not stop.by_person


async def test_a_mistake_of_ours_in_the_watch_stops_the_deployment(journal: Journal) -> None:
    class Broken(Recorder):
        async def pending_decisions(self) -> list[Decision]:
            raise KeyError("a mistake")

    stop = StopToken()
    async with decisions_obeyed(Broken(journal, DEPLOYMENT), stop, 0.0), asyncio.timeout(60):
        await stop.wait()
    assert "a mistake" in stop.reason
