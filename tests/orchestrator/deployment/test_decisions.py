"""What people decide is obeyed while a deployment runs, once, and only where it counts; what cannot be read stops it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.people_kit import DEPLOYMENT, GATE, SIGN_OFF, Office
from harness.process import eventually

from orchestrator.deployment import decisions
from orchestrator.deployment.decisions import Desk, StopToken, WaitsForPeopleError, decisions_obeyed
from orchestrator.journal import events as ev
from orchestrator.journal.journal import Decision
from orchestrator.journal.recorder import Recorder
from orchestrator.people.asks import planned_asks
from orchestrator.people.sign import decide
from orchestrator.people.statement import Approve, Cancel, Decide, GoOn, Pause, Reject, Saying
from orchestrator.rolling.history import History
from relay.errors import StoreError

ASKS = {GATE: (2, "canary looks good"), SIGN_OFF: (3, "sign off")}


class Engine:
    """A desk over a journal, as a process has it; another one over the same journal is the process that resumes."""

    def __init__(
        self, office: Office, recorder: type[Recorder] = Recorder, *, waits: bool = True, shift: float = 0.0
    ) -> None:
        self.office, self.lines, self.stop = office, list[str](), StopToken()
        self.recorder = recorder(office.journal, DEPLOYMENT, self.lines.append)
        history = History(office.journal.entries(DEPLOYMENT))
        self.desk = Desk(
            self.recorder,
            office.plan,
            lambda: office.pins,
            self.stop,
            history,
            waits=waits,
            clock=lambda: time.time() + shift,
        )

    def asked(self, ask: str) -> asyncio.Task[str]:
        step, name = ASKS[ask]
        planned = planned_asks(self.office.plan)[ask]
        return asyncio.create_task(self.desk.ask(step, name, planned, planned.text))

    def about(self, machine: str) -> asyncio.Task[ev.MachineDecided | None]:
        return asyncio.create_task(self.desk.decide(machine, 2, "verify: 500", ("retry", "exclude", "fail")))

    @property
    def told(self) -> list[ev.Event]:
        return [entry.event for entry in self.office.journal.entries(DEPLOYMENT)]

    async def until(self, kind: type[ev.Event], count: int = 1) -> None:
        await eventually(lambda: sum(isinstance(event, kind) for event in self.told) >= count)


def says(office: Office, person: str, saying: Saying) -> int:
    return decide(office.journal, office.paths(person), DEPLOYMENT, saying)


@pytest.fixture
def office(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Office]:
    monkeypatch.setattr(decisions, "DECISIONS_SECONDS", 0.01)
    office = Office(tmp_path)
    yield office
    office.journal.close()


async def test_a_cancel_is_obeyed_recorded_and_told(office: Office) -> None:
    engine = Engine(office)
    async with decisions_obeyed(engine.desk, engine.stop, None):
        says(office, "anna", Cancel())
        async with asyncio.timeout(60):
            await engine.stop.wait()
        await eventually(lambda: engine.lines == ["anna decided: cancel"])
    assert (engine.stop.reason, engine.stop.by_person) == ("cancelled by anna", True)
    assert isinstance(engine.told[-1], ev.DecisionTaken)
    assert office.journal.pending_decisions(DEPLOYMENT) == []
    assert Engine(office).stop.by_person, "and the process that resumes knows it"


async def test_the_deadline_stops_and_is_no_persons_word(office: Office) -> None:
    engine = Engine(office)
    async with decisions_obeyed(engine.desk, engine.stop, 0.01), asyncio.timeout(60):
        await engine.stop.wait()
    assert (engine.stop.reason, engine.stop.by_person) == ("its deadline is over", False)


# --- questions


async def test_scenario_19_a_gate_waits_through_restarts_for_as_many_listed_people_as_it_needs(office: Office) -> None:
    first = Engine(office)
    async with decisions_obeyed(first.desk, first.stop, None):
        asked = first.asked(GATE)
        await first.until(ev.AskOpened)
        says(office, "clara", Approve(GATE))  # who made the release
        await eventually(lambda: any("clara" in str(event) for event in first.told if isinstance(event, ev.Note)))
        says(office, "anna", Approve(GATE, "I looked"))
        await first.until(ev.AskAnswered)
        asked.cancel()  # its process dies here
    says(office, "ben", Approve(GATE))
    second = Engine(office)
    async with decisions_obeyed(second.desk, second.stop, None), asyncio.timeout(60):
        assert await second.asked(GATE) == ""
    assert sum(isinstance(event, ev.AskOpened) for event in second.told) == 1, "one gate asks one question"
    answers = [event for event in second.told if isinstance(event, ev.AskAnswered)]
    assert [answer.by for answer in answers] == ["anna", "ben"]
    third = Engine(office)
    async with asyncio.timeout(60):
        assert await third.asked(GATE) == "", "what was settled is not asked again"


async def test_a_no_is_a_no_with_its_reason(office: Office) -> None:
    engine = Engine(office)
    async with decisions_obeyed(engine.desk, engine.stop, None), asyncio.timeout(60):
        asked = engine.asked(GATE)
        says(office, "ben", Reject(GATE, "errors rise"))
        assert "errors rise" in await asked
    again = Engine(office)
    assert "errors rise" in await again.asked(GATE)


async def test_what_expired_while_no_process_looked_is_applied_and_shown_as_late(office: Office) -> None:
    first = Engine(office)
    asked = first.asked(GATE)
    await first.until(ev.AskOpened)
    asked.cancel()
    much_later = Engine(office, shift=5 * 3600)
    async with decisions_obeyed(much_later.desk, much_later.stop, None), asyncio.timeout(60):
        assert await much_later.asked(GATE)
    [closed] = [event for event in much_later.told if isinstance(event, ev.AskClosed)]
    assert (closed.outcome, closed.late) == ("expired", True)


# --- machines


async def test_an_answer_for_one_machine_is_not_applied_to_another_nor_to_a_later_question(office: Office) -> None:
    engine = Engine(office)
    async with decisions_obeyed(engine.desk, engine.stop, None), asyncio.timeout(60):
        web1, web2 = engine.about("web1"), engine.about("web2")
        await engine.until(ev.MachineAsked, 2)
        says(office, "anna", Decide("web2", 2, "exclude"))
        decided = await web2
        assert decided is not None
        assert (decided.what, decided.by) == ("exclude", "anna")
        assert not web1.done()
        says(office, "anna", Decide("web1", 2, "rollback"))  # not among what may be decided
        says(office, "anna", Decide("web1", 2, "retry"))
        said = await web1
        assert said is not None
        assert said.what == "retry"
        engine.recorder.later("web1", ev.TurnDid("web1", 2, "ask", "done", answer="retry"))
        again = engine.about("web1")
        await engine.until(ev.MachineAsked, 3)
        await asyncio.sleep(0.05)
        assert not again.done(), "the word on the first question is no word on the second"
        engine.stop.request("its deadline is over")
        assert await again is None


async def test_what_a_person_said_of_a_machine_is_known_to_the_process_that_resumes(office: Office) -> None:
    first = Engine(office)
    asked = first.about("web1")
    await first.until(ev.MachineAsked)
    says(office, "anna", Decide("web1", 2, "exclude", "its disk is bad"))
    await first.desk.obey()
    asked.cancel()
    second = Engine(office)
    said = await second.about("web1")
    assert said is not None
    assert (said.what, said.why) == ("exclude", "its disk is bad")


# --- pauses


async def test_a_pause_holds_what_is_new_through_a_restart_until_a_person_lets_it_go_on(office: Office) -> None:
    first = Engine(office)
    says(office, "anna", Pause("a customer calls"))
    async with decisions_obeyed(first.desk, first.stop, None):
        free = asyncio.create_task(first.desk.free())
        await first.until(ev.Paused)
        assert not free.done()
        free.cancel()
    second = Engine(office)
    async with decisions_obeyed(second.desk, second.stop, None), asyncio.timeout(60):
        free = asyncio.create_task(second.desk.free())
        await eventually(lambda: bool(second.lines))
        assert not free.done()
        says(office, "ben", GoOn())
        await free
    assert any(isinstance(event, ev.Unpaused) and event.by == "ben" for event in second.told)


@pytest.mark.parametrize("what", ["ask", "machine", "pause"])
async def test_who_does_not_wait_leaves_once_nothing_but_people_is_waited_for(office: Office, what: str) -> None:
    engine = Engine(office, waits=False)
    async with decisions_obeyed(engine.desk, engine.stop, None), asyncio.timeout(60):
        waiting: asyncio.Task[object]
        with engine.desk.turn():
            match what:
                case "ask":
                    waiting = asyncio.create_task(
                        engine.desk.ask(3, "sign off", planned_asks(office.plan)[SIGN_OFF], "?")
                    )
                case "machine":
                    waiting = asyncio.create_task(_turn(engine))
                case _:
                    await engine.desk.pause("look")
                    waiting = asyncio.create_task(engine.desk.free())
            await asyncio.sleep(0.1)
            assert not waiting.done(), "another turn is under way"
        with pytest.raises(WaitsForPeopleError):
            await waiting


async def _turn(engine: Engine) -> object:
    with engine.desk.turn():
        return await engine.about("web1")


# --- what goes wrong


async def test_at_the_end_nothing_that_was_decided_is_left_lying(office: Office) -> None:
    engine = Engine(office)
    says(office, "anna", Approve(GATE))
    await engine.desk.obey()
    assert len(office.journal.pending_decisions(DEPLOYMENT)) == 1, "it may be asked yet"
    await engine.desk.close()
    assert office.journal.pending_decisions(DEPLOYMENT) == []
    assert any(isinstance(event, ev.Note) and "anna" in event.text for event in engine.told)


async def test_a_row_that_nobody_signed_is_noted_and_changes_nothing(office: Office) -> None:
    engine = Engine(office)
    office.journal.decide("staging", DEPLOYMENT, "cancel", {"now": True}, "anna", b"")
    await engine.desk.obey()
    assert engine.stop.reason == ""
    assert any(isinstance(event, ev.Note) and "does not count" in event.text for event in engine.told)
    assert office.journal.pending_decisions(DEPLOYMENT) == []


@pytest.mark.parametrize("fails", [False, True])
async def test_the_watch_has_ended_when_the_block_ends(office: Office, *, fails: bool) -> None:
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

    engine = Engine(office, Slow)
    before = asyncio.all_tasks()
    try:
        async with decisions_obeyed(engine.desk, engine.stop, 3600.0):
            await looking.wait()
            if fails:
                raise StoreError("no space left")
    except StoreError:
        assert fails
    assert given_up == [True]
    assert asyncio.all_tasks() == before, "the watch outlives what it watches for"


async def test_a_journal_that_cannot_be_read_stops_the_deployment(office: Office) -> None:
    engine = Engine(office)
    async with decisions_obeyed(engine.desk, engine.stop, None):
        with office.journal.database.writing() as connection:
            connection.exec_driver_sql("ALTER TABLE decisions RENAME TO gone")
        async with asyncio.timeout(60):
            await engine.stop.wait()
    assert engine.stop.reason.startswith("what people decide cannot be read: ")
    assert not engine.stop.by_person


async def test_a_mistake_of_ours_in_the_watch_stops_the_deployment(office: Office) -> None:
    class Broken(Recorder):
        async def pending_decisions(self) -> list[Decision]:
            raise KeyError("a mistake")

    engine = Engine(office, Broken)
    async with decisions_obeyed(engine.desk, engine.stop, None), asyncio.timeout(60):
        await engine.stop.wait()
    assert "a mistake" in engine.stop.reason
