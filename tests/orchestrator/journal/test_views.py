"""The fold over a journal's entries: what `status`, lists, `rotation list` and a resume are told."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from agent.orders.orders import AcquireFacts, SurveyFacts, SwitchFacts, TreeFacts, TreePulled
from orchestrator.journal import events as ev
from orchestrator.journal import views
from orchestrator.journal.events import DeploymentRecord, JournalEntry
from orchestrator.journal.journal import Journal
from orchestrator.journal.ledger import ledger
from orchestrator.plan.plan import (
    AcquirePlan,
    MachineStep,
    MachineTurn,
    Plan,
    PlannedMachine,
    PlannedPhase,
    PreAcquire,
    ServerRun,
    ServerStep,
)

ULID = "01JD0000000000000000000000"
OTHER = "01JD0000000000000000000001"
HEX = "ab" * 32
ROOT = "/srv/webshop"


def record(deployment: str = ULID, **changes: object) -> DeploymentRecord:
    made = DeploymentRecord(
        deployment, "shop", "1.4.2", "production", "deploy", 7, "running", "", "ann", "host", 1, 100.0, None
    )
    return replace(made, **changes)


def entries(*events: ev.Event, deployment: str = ULID, first: int = 1) -> list[JournalEntry]:
    """Entry N happened at second 1000 + N."""
    return [JournalEntry(number, deployment, 1000.0 + number, event) for number, event in enumerate(events, first)]


def operation(machine: str, action: str, step: int = 1, attempt: int = 1) -> str:
    return f"{ULID}/{step}/{machine}/{action}/{attempt}"


def plan(*machines: str) -> Plan:
    turns = tuple(MachineTurn(name, ROOT, (), (), {}, HEX) for name in machines)
    return Plan(
        format=1,
        project="shop",
        label="1.4.2",
        environment="production",
        packages={},
        scripts=None,
        relays=(),
        feeds={},
        machines=tuple(PlannedMachine(name, name, "fra", HEX, (), ()) for name in machines),
        secrets={},
        machine_secrets=(),
        pre_acquire=(PreAcquire(ServerRun("vpn"), ServerRun("vpn down")), PreAcquire(ServerRun("check"))),
        acquire=AcquirePlan(),
        steps=(
            ServerStep(1, "schema", ServerRun("migrate")),
            MachineStep(2, "web farm", turns, "rolling", (PlannedPhase(0, 1),)),
        ),
    )


def surveyed(machine: str, version: str = "1.4.1") -> ev.Surveyed:
    tree = TreeFacts(ROOT, HEX, 10**9, installed=False, current_version=version, current_path=f"{ROOT}/releases/old")
    scripts = TreeFacts("", HEX, 10**9, installed=False, current_version="9")
    return ev.Surveyed(machine, SurveyFacts((tree, scripts)))


def acquired(machine: str, *, already: bool = False, **bytes: int) -> ev.Acquired:
    tree = TreePulled(
        "Acme.Web",
        "1.4.2",
        f"{ROOT}/releases/new",
        already=already,
        tree_bytes=1000,
        from_disk_bytes=bytes.get("disk", 0),
        from_relays={name: count for name, count in bytes.items() if name in {"fra", "iad"}},
        wire_bytes=bytes.get("wire", 0),
    )
    return ev.Acquired(machine, AcquireFacts((tree,)))


def switched(machine: str, after: str, before: str = f"{ROOT}/releases/old", attempt: int = 1) -> ev.Reported:
    done = operation(machine, "2-switch", 2, attempt)
    return ev.Reported(done, machine, "done", facts=SwitchFacts(before, after))


def machine(view: views.DeploymentView, name: str) -> views.MachineView:
    return next(one for one in view.machines if one.name == name)


def look(*events: ev.Event, of: Plan | None = None, is_alive: bool = True) -> views.DeploymentView:
    return views.view(record(), entries(*events), is_alive=is_alive, plan=of)


STARTED = ev.Started("ann", "host", 1, 7)


# --- states


def test_a_running_deployment_without_an_engine_is_interrupted() -> None:
    assert views.summary(record(), (), is_alive=True).state == "running"
    assert views.summary(record(), (), is_alive=False).state == "interrupted"
    assert views.summary(record(state="failed"), (), is_alive=False).state == "failed"


def test_before_anything_happened_the_plan_is_shown() -> None:
    view = look(STARTED, of=plan("web1", "web2"))
    assert view.stage == "pre_acquire"
    assert [(step.number, step.name, step.state, step.machines) for step in view.steps] == [
        (1, "schema", "waiting", 0),
        (2, "web farm", "waiting", 2),
    ]
    assert [(one.name, one.stage) for one in view.machines] == [("web1", "waiting"), ("web2", "waiting")]
    assert [(one.name, one.state, one.undo) for one in view.pre_acquire] == [
        ("vpn", "waiting", "none"),
        ("check", "waiting", "none"),
    ]


def test_the_stage_follows_what_began() -> None:
    story: list[ev.Event] = [STARTED]
    stages = []
    for event in (
        ev.PreAcquireStarted("vpn", undo_due=True),
        ev.Dispatched(operation("web1", "survey", 0), "web1", HEX),
        ev.Barrier(("web1",)),
        ev.StepStarted(1, "schema"),
    ):
        story.append(event)
        stages.append(look(*story).stage)
    assert stages == ["pre_acquire", "acquisition", "steps", "steps"]
    assert views.view(record(state="succeeded"), entries(*story), is_alive=False).stage == "ended"


def test_a_step_that_is_retried_keeps_its_beginning_and_loses_its_end() -> None:
    story = (ev.StepStarted(2, "web farm"), ev.StepEnded(2, ok=False, reason="web1"), ev.StepStarted(2, "web farm"))
    (failed,) = look(*story[:2]).steps
    assert (failed.state, failed.started, failed.ended, failed.reason) == ("failed", 1001.0, 1002.0, "web1")
    (again,) = look(*story).steps
    assert (again.state, again.started, again.ended, again.reason) == ("running", 1001.0, None, "")
    assert look(ev.StepEnded(1, ok=True, skipped=True)).steps[0].state == "skipped"


def test_an_undo_is_owed_until_it_ended() -> None:
    story = (
        ev.PreAcquireStarted("vpn", undo_due=True),
        ev.PreAcquireEnded("vpn", ok=True, undo_due=True),
        ev.PreAcquireStarted("key", undo_due=True),
        ev.PreAcquireStarted("plain", undo_due=False),
        ev.UndoStarted("key"),
        ev.UndoEnded("key", ok=False, reason="exit status 1"),
        ev.UndoStarted("vpn"),
        ev.UndoEnded("vpn", ok=True),
    )
    looks = [look(*story[:length]).pre_acquire for length in range(len(story) + 1)]
    assert [[one.name for one in steps if one.undo in {"due", "running"}] for steps in looks] == [
        [],
        ["vpn"],
        ["vpn"],
        ["vpn", "key"],
        ["vpn", "key"],
        ["vpn", "key"],
        ["vpn"],
        ["vpn"],
        [],
    ]
    view = look(*story)
    assert [(one.name, one.state, one.undo) for one in view.pre_acquire] == [
        ("vpn", "done", "done"),
        ("key", "running", "failed"),
        ("plain", "running", "none"),
    ]
    assert "the undo of 'key' failed: exit status 1" in [note.text for note in view.notes]


# --- machines


def test_a_machine_is_followed_from_survey_to_the_end_of_its_turn() -> None:
    story: list[ev.Event] = [STARTED]
    seen = []
    for event in (
        surveyed("web1"),
        ev.Dispatched(operation("web1", "acquire", 0), "web1", HEX),
        ev.Reported(operation("web1", "acquire", 0), "web1", "done"),
        acquired("web1"),
        ev.TurnStarted("web1", 2),
        ev.BracketOpened("web1", "web", 2),
        ev.Dispatched(operation("web1", "2-switch", 2), "web1", HEX),
        switched("web1", f"{ROOT}/releases/new"),
        ev.BracketClosed("web1", "web", "deployed"),
        ev.TurnEnded("web1", 2, "deployed"),
    ):
        story.append(event)
        one = machine(look(*story, of=plan("web1")), "web1")
        seen.append((one.stage, one.doing, one.version, one.outcome, one.since, one.out_since))
    assert seen == [
        ("surveyed", "", "1.4.1", "", None, None),
        ("acquiring", "acquire", "1.4.1", "", None, None),
        ("acquiring", "", "1.4.1", "", None, None),
        ("acquired", "", "1.4.1", "", None, None),
        ("in flight", "", "1.4.1", "", 1006.0, None),
        ("in flight", "", "1.4.1", "", 1006.0, 1007.0),
        ("in flight", "2-switch", "1.4.1", "", 1006.0, 1007.0),
        ("in flight", "", "1.4.2", "", 1006.0, 1007.0),
        ("in flight", "", "1.4.2", "", 1006.0, None),
        ("through", "", "1.4.2", "deployed", None, None),
    ]


def test_a_machine_that_was_switched_back_has_its_old_version() -> None:
    new, old = f"{ROOT}/releases/new", f"{ROOT}/releases/old"
    story = (surveyed("web1"), acquired("web1"), switched("web1", new), switched("web1", old, new, 2))
    assert machine(look(*story[:3]), "web1").version == "1.4.2"
    assert machine(look(*story), "web1").version == "1.4.1"
    assert machine(look(switched("web1", "/elsewhere/releases/x")), "web1").version == "unknown"


def test_a_failure_counts_until_a_later_turn_of_the_step_makes_it_good() -> None:
    story = (
        ev.TurnStarted("web1", 2),
        ev.TurnEnded("web1", 2, "left_out", failure=True, bracket_open=True, reason="verify failed"),
        ev.TurnStarted("web1", 2),
        ev.TurnEnded("web1", 2, "deployed"),
    )
    bad = machine(look(*story[:2], of=plan("web1")), "web1")
    assert (bad.stage, bad.outcome, bad.failure, bad.reason) == ("through", "left_out", True, "verify failed")
    retried = look(*story[:3])
    assert (machine(retried, "web1").stage, machine(retried, "web1").since) == ("in flight", 1003.0)
    good = machine(look(*story), "web1")
    assert (good.outcome, good.failure) == ("deployed", False)
    assert views.turns(entries(*story))[2, "web1"].begun == 2


def test_a_turn_that_a_resume_begins_again_is_in_flight_since_its_first_beginning() -> None:
    story = (ev.TurnStarted("web1", 2), ev.Resumed("bob", "host", 2, 8), ev.TurnStarted("web1", 2))
    assert machine(look(*story), "web1").since == 1001.0
    assert views.turns(entries(*story))[2, "web1"].begun == 1


def test_excluded_machines_are_shown_with_the_reason() -> None:
    view = look(surveyed("web2"), ev.Barrier(("web1",), {"web2": "offline"}), of=plan("web1", "web2"))
    assert machine(view, "web2").stage == "excluded"
    assert [(one.machine, one.reason, one.by) for one in view.left] == [("web2", "offline", "")]


def test_who_is_left_out_is_shown_once_with_who_did_it_also_where_the_plan_knows_no_turn_of_it() -> None:
    said = (ev.Left("web3", "new kernel", "ann"), ev.Left("web2", "offline: unseen"))
    view = look(*said, surveyed("web1"), ev.Barrier(("web1",), {"web2": "offline: unseen"}), of=plan("web1"))
    assert [(one.machine, one.reason, one.by) for one in view.left] == [
        ("web3", "new kernel", "ann"),
        ("web2", "offline: unseen", ""),
    ]
    assert (machine(view, "web3").stage, machine(view, "web3").reason) == ("excluded", "new kernel")


def test_refusals_decisions_and_untold_receivers_are_shown_with_their_reasons() -> None:
    view = look(
        ev.Refused("web1", "the fence 3 is below 7", operation("web1", "verify")),
        ev.DecisionTaken(4, "bob", "retry", {"machine": "web1"}),
        ev.Notified("failed", "chat", "connection refused"),
        ev.Notified("finished", "chat"),
        ev.Note("clock of web1 differs", "web1"),
    )
    assert view.refusals == (views.RefusalView(1001.0, "web1", "the fence 3 is below 7", operation("web1", "verify")),)
    assert view.decisions == (views.DecisionView(1002.0, "bob", "retry", {"machine": "web1"}),)
    assert [note.text for note in view.notes] == [
        "chat was not told of 'failed': connection refused",
        "clock of web1 differs",
    ]
    assert view.last == 5


# --- operations


def test_a_resume_is_told_what_was_dispatched_and_what_ended() -> None:
    first, second = operation("web1", "1-configure"), operation("web1", "2-switch")
    before = operation("web1", "before")
    known = views.operations(
        entries(
            ev.ServerRunDispatched(before, "out.py", "web1"),
            ev.ServerRunEnded(before, "done", "web1"),
            ev.Dispatched(first, "web1", HEX),
            ev.Dispatched(second, "web1", HEX),
            ev.Reported(first, "web1", "failed", "exit status 3", 3),
            ev.Reported(second, "web1", "running"),
        )
    )
    assert [(one.operation, one.result.state if one.result else None, one.since) for one in known.values()] == [
        (before, "done", 1001.0),
        (first, "failed", 1003.0),
        (second, None, 1004.0),
    ]
    assert known[second].order == HEX


def test_an_order_sent_again_is_the_same_and_a_server_run_begun_again_is_not() -> None:
    id = operation("web1", "verify")
    sent, ended = ev.Dispatched(id, "web1", HEX), ev.Reported(id, "web1", "done")
    (waiting,) = views.operations(entries(sent, sent)).values()
    assert (waiting.since, waiting.result) == (1001.0, None)
    assert look(sent, ended, sent).running == ()
    before = operation("web1", "before")
    begun, over = ev.ServerRunDispatched(before, "out.py", "web1"), ev.ServerRunEnded(before, "unknown", "web1")
    assert [one.operation for one in look(begun, over, begun).running] == [before]


# --- the ledger


def test_the_ledger_adds_up_where_bytes_came_from() -> None:
    counted = ledger(
        entries(
            ev.Replicated("fra", "Acme.Web", "1.4.2", 5000, 300),
            ev.Replicated("iad", "Acme.Web", "1.4.2", 5000, 400),
            ev.Replicated("fra", "Acme.Schema", "1.0.0", 50, 60),
            ev.Replicated("fra", "Acme.Web", "1.4.2", 5000, 10),  # again, after a resume
            acquired("web1", disk=700, fra=250, iad=50, wire=320),
            acquired("web2", already=True),
            acquired("web1", already=True),  # again, after a resume
        )
    )
    assert [(one.relay, one.package, one.wire_bytes) for one in counted.replicated] == [
        ("fra", "Acme.Web", 310),
        ("iad", "Acme.Web", 400),
        ("fra", "Acme.Schema", 60),
    ]
    assert counted.to_relays == {"fra": 370, "iad": 400}
    assert counted.from_relays == {"fra": 250, "iad": 50}
    assert (counted.from_disk_bytes, counted.wire_bytes, counted.tree_bytes) == (700, 320, 2000)
    assert (counted.machines, counted.already) == (2, 1)


# --- brackets


def test_an_open_bracket_outlives_its_deployment_and_says_since_when_and_by_whom() -> None:
    first = (record(state="failed"), entries(ev.BracketOpened("web1", "web", 2), ev.Ended("failed")))
    second = (record(OTHER, label="1.4.3"), entries(STARTED, deployment=OTHER, first=10))
    (found,) = views.open_brackets([second, first])
    assert found == views.OpenBracket("web1", "web", "production", ULID, "1.4.2", 1001.0, 2, 1, project="shop")
    assert found.owner == ULID


def test_a_bracket_is_closed_by_whichever_deployment_put_the_machine_in() -> None:
    first = (record(), entries(ev.BracketOpened("web1", "web", 2), ev.BracketOpened("web2", "web", 2)))
    closed = entries(ev.BracketClosed("web1", "web", "put_back"), deployment=OTHER, first=10)
    assert [one.machine for one in views.open_brackets([(record(OTHER), closed), first])] == ["web2"]
    elsewhere = (record(OTHER, environment="staging"), closed)
    assert [one.machine for one in views.open_brackets([elsewhere, first])] == ["web1", "web2"]


def test_an_adopted_bracket_keeps_its_story_and_gets_another_owner() -> None:
    first = (record(state="failed"), entries(ev.BracketOpened("web1", "web", 2)))
    adopted = entries(ev.BracketAdopted("web1", "web", ULID), deployment=OTHER, first=10)
    second = (record(OTHER, label="1.4.3"), adopted)
    (found,) = views.open_brackets([first, second])
    assert (found.label, found.since, found.deployment, found.owner) == ("1.4.2", 1001.0, ULID, OTHER)
    assert views.view(*first, is_alive=False, brackets=[found]).brackets == ()
    view = views.view(*second, is_alive=True, brackets=[found])
    assert view.brackets == (found,)
    closing = entries(ev.BracketClosed("web1", "web", "deployed"), deployment=OTHER, first=20)
    assert views.open_brackets([first, (second[0], adopted + closing)]) == []


def test_opening_again_does_not_make_a_machine_younger() -> None:
    twice = entries(ev.BracketOpened("web1", "web", 2), ev.BracketOpened("web1", "web", 2))
    assert [one.since for one in views.open_brackets([(record(), twice)])] == [1001.0]
    assert [
        one.rotation
        for one in views.open_brackets(
            [
                (
                    record(),
                    entries(
                        ev.BracketOpened("web1", "web", 2),
                        ev.BracketOpened("web1", "api", 2),
                        ev.BracketClosed("web1", "web", "x"),
                    ),
                )
            ]
        )
    ] == ["api"]


bracket_events = st.builds(
    lambda kind, machine, rotation: {
        "open": ev.BracketOpened(machine, rotation, 1),
        "close": ev.BracketClosed(machine, rotation, "deployed"),
        "adopt": ev.BracketAdopted(machine, rotation, ULID),
    }[kind],
    st.sampled_from(["open", "close", "adopt"]),
    st.sampled_from(["web1", "web2"]),
    st.sampled_from(["web", "api"]),
)


@given(st.lists(st.tuples(st.sampled_from([ULID, OTHER]), bracket_events), max_size=30), st.randoms())
def test_what_is_open_is_what_was_opened_and_not_closed_since(
    story: list[tuple[str, ev.BracketOpened | ev.BracketClosed | ev.BracketAdopted]], chance: random.Random
) -> None:
    model: dict[tuple[str, str], float] = {}
    told: dict[str, list[JournalEntry]] = {ULID: [], OTHER: []}
    for number, (deployment, event) in enumerate(story, 1):
        told[deployment].append(JournalEntry(number, deployment, 1000.0 + number, event))
        place = (event.machine, event.rotation)
        if isinstance(event, ev.BracketOpened):
            model.setdefault(place, 1000.0 + number)
        elif isinstance(event, ev.BracketClosed):
            model.pop(place, None)
    pairs = [(record(deployment), lines) for deployment, lines in told.items()]
    chance.shuffle(pairs)
    assert {(one.machine, one.rotation): one.since for one in views.open_brackets(pairs)} == model


# --- any story

SOME: Sequence[ev.Event] = (
    STARTED,
    ev.Resumed("bob", "host", 2, 8),
    ev.Note("x", "web1"),
    ev.Notified("failed", "chat", "no"),
    ev.DecisionTaken(1, "ann", "retry", {}),
    ev.Ended("failed", "x"),
    ev.PreAcquireStarted("vpn", undo_due=True),
    ev.PreAcquireEnded("vpn", ok=False, undo_due=False),
    ev.UndoStarted("vpn"),
    ev.UndoEnded("other", ok=False),
    surveyed("web1"),
    ev.Replicated("fra", "a", "1", 1, 1),
    acquired("web1", fra=1),
    ev.Barrier(("web1",), {"web9": "x"}),
    ev.StepStarted(7, "unplanned"),
    ev.StepEnded(2, ok=True),
    ev.TurnStarted("web1", 2),
    ev.TurnEnded("web1", 2, "deployed"),
    ev.TurnEnded("web3", 3, "left_out", failure=True),
    ev.BracketOpened("web1", "web", 2),
    ev.BracketClosed("web1", "web", "deployed"),
    ev.BracketAdopted("web2", "web", OTHER),
    ev.Dispatched("of-another-form", "web1", HEX),
    ev.Dispatched(operation("web1", "acquire", 0), "web1", HEX),
    ev.Reported(operation("web1", "acquire", 0), "web1", "failed"),
    switched("web1", "relative"),
    ev.ServerRunDispatched(operation("web1", "before"), "x"),
    ev.ServerRunEnded(operation("web1", "after"), "unknown"),
    ev.Refused("web1", "x"),
)


@given(st.lists(st.sampled_from(SOME), max_size=40), st.booleans(), st.booleans())
def test_every_story_can_be_told_and_printed(story: list[ev.Event], alive: bool, planned: bool) -> None:
    view = look(*story, of=plan("web1", "web2") if planned else None, is_alive=alive)
    printed = msgspec.json.decode(msgspec.json.encode(view))
    assert printed["format"] == 1
    assert printed["last"] == len(story)
    assert len({one.name for one in view.machines}) == len(view.machines)


@given(st.lists(st.sampled_from(SOME), max_size=25))
def test_a_story_told_twice_by_a_resume_opens_nothing_new(story: list[ev.Event]) -> None:
    once, twice = ([one.machine for one in look(*told).brackets] for told in (story, story + story))
    assert twice == once
    known, again = (views.operations(entries(*told)) for told in (story, story + story))
    assert {id for id, one in known.items() if one.order and one.result} == {
        id for id, one in again.items() if one.order and one.result
    }


# --- with the journal


def test_status_reads_what_the_engine_wrote(tmp_path: Path) -> None:
    ticks = itertools.count(100)
    with Journal.open(str(tmp_path / "journal.db"), clock=lambda: float(next(ticks))) as journal:
        journal.begin(ULID, msgspec.json.encode(plan("web1")), 1, "ann")
        journal.append(ULID, ev.TurnStarted("web1", 2), ev.BracketOpened("web1", "web", 2))
        journal.set_state(ULID, "cancelled", "by ann", ev.Ended("cancelled", "by ann"))
        opened = views.open_brackets(journal.brackets("production"))
        frozen = msgspec.json.decode(journal.plan(ULID), type=Plan)
        view = views.view(journal.deployment(ULID), journal.entries(ULID), is_alive=False, plan=frozen, brackets=opened)
    assert (view.summary.state, view.summary.reason, view.stage) == ("cancelled", "by ann", "ended")
    assert [(one.machine, one.label, one.deployment, one.step) for one in view.brackets] == [("web1", "1.4.2", ULID, 2)]
    assert machine(view, "web1").out_since == view.brackets[0].since
