"""The benchmark of deployments measures what it says: shown on a journal that is known, and by a tiny run of it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from harness.process import Process, run
from harness.seed import SOAK

from benchmarks import rollout
from benchmarks.rollout import measure
from benchmarks.support.farm import ENVIRONMENT, SCRIPT, STEPS, Deployed, Farm, StepKind, chosen, deploy, farm
from orchestrator.journal.events import (
    Dispatched,
    Event,
    JournalEntry,
    Reported,
    ServerRunDispatched,
    ServerRunEnded,
    StepEnded,
    StepStarted,
    TurnEnded,
    TurnStarted,
)
from orchestrator.journal.journal import Journal

MACHINES, WINDOW, SECONDS = (200, 20, 2.0) if SOAK else (4, 2, 0.2)
"""Of the deployment over many machines: how many, how many at a time, and what the script of each sleeps."""

# --- by arithmetic


def entries_of(*told: tuple[float, Event]) -> list[JournalEntry]:
    return [JournalEntry(number, "D", at, event) for number, (at, event) in enumerate(told, 1)]


def two_turns(number: int, gap: float) -> list[JournalEntry]:
    """Machine a, then b, `gap` seconds later: each 1.5 s of `before` and a script."""
    told: list[tuple[float, Event]] = [(10.0, StepStarted(number, "s"))]
    for machine, at in (("a", 10.0), ("b", 10.0 + gap)):
        before, script = f"D/{number}/{machine}/before/1", f"D/{number}/{machine}/1-quick.sh/1"
        told += [
            (at, TurnStarted(machine, number)),
            (at + 0.1, ServerRunDispatched(before, "before", machine)),
            (at + 0.5, ServerRunEnded(before, "done", machine)),
            (at + 0.6, Dispatched(script, machine, "0" * 64)),
            (at + 1.4, Reported(script, machine, "done")),
            (at + 1.5, TurnEnded(machine, number, "deployed")),
        ]
    return entries_of(*told, (10.0 + gap + 1.5, StepEnded(number, ok=True)))


def own_time_of(operation: str) -> float:
    return 0.3 if "before" in operation else 0.5


def test_overhead_is_the_steps_time_without_that_of_its_scripts() -> None:
    found = measure(StepKind("s", 1), 3, two_turns(3, gap=1.5), own_time_of)
    assert found.machines == 2
    assert found.whole == pytest.approx(3.0)
    assert found.scripts == pytest.approx(1.6)
    assert found.overhead == pytest.approx(0.7)
    assert found.turns == pytest.approx((0.7, 0.7))
    assert found.parts == {"before": pytest.approx((0.1, 0.1)), "quick": pytest.approx((0.3, 0.3))}


def test_in_a_window_scripts_run_beside_each_other_and_count_so() -> None:
    found = measure(StepKind("s", 2), 3, two_turns(3, gap=0.0), own_time_of)
    assert found.overhead == pytest.approx((1.5 - 1.6 / 2) / 2)
    assert measure(StepKind("s", None), 3, two_turns(3, gap=0.0), own_time_of).overhead == pytest.approx(found.overhead)
    assert found.turns == pytest.approx((0.7, 0.7))


def test_another_steps_entries_do_not_count() -> None:
    mixed = [*two_turns(2, gap=5.0), *two_turns(3, gap=1.5), *two_turns(4, gap=9.0)]
    kind = StepKind("s", 1)
    assert measure(kind, 3, mixed, own_time_of) == measure(kind, 3, two_turns(3, gap=1.5), own_time_of)


def test_a_scripts_own_time_is_what_it_printed(tmp_path: Path) -> None:
    (tmp_path / "3~a~before~1.log").write_text("1700000000000000000\n1700000000250000000\n")
    assert rollout.own_time(str(tmp_path), "D/3/a/before/1") == pytest.approx(0.25)
    assert rollout.own_time(str(tmp_path), "D/3/a/1-switch/1") == 0.0
    assert rollout.own_time(str(tmp_path), "D/3/a/verify/1") == 0.0


@pytest.mark.parametrize("printed", [None, "", "1700000000000000000\n", "1\n2\n3\n"])
def test_a_script_that_did_not_say_both_times_is_an_error_and_not_overhead(tmp_path: Path, printed: str | None) -> None:
    if printed is not None:
        (tmp_path / "3~a~before~1.log").write_text(printed)
    with pytest.raises(RuntimeError, match="not two"):
        rollout.own_time(str(tmp_path), "D/3/a/before/1")


def test_an_order_is_asked_for_when_its_turn_begins_and_other_steps_do_not_count() -> None:
    mixed = [*two_turns(2, gap=5.0), *two_turns(3, gap=1.5)]
    first, second = rollout.trips(mixed, 3, lambda operation: 10.9 if "/a/" in operation else 12.4)
    assert (first.posted, first.acted, first.done) == pytest.approx((0.6, 0.9, 1.4))
    assert (second.posted, second.acted, second.done) == pytest.approx((0.6, 0.9, 1.4))


def test_median_and_percentile_are_of_the_values_given() -> None:
    values = [number / 1000 for number in range(100, 0, -1)]
    assert (rollout.middle(values), rollout.p95(values)) == ("50.5", "96.0")
    assert rollout.p95([0.002]) == "2.0"


# --- a tiny run

KINDS = STEPS[:-1]


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Farm, Deployed]]:
    with farm(str(tmp_path_factory.mktemp("rollout")), 2, KINDS) as made:
        yield made, deploy(made)


def test_every_step_runs_on_every_machine_and_every_script_says_its_time(deployed: tuple[Farm, Deployed]) -> None:
    for kind, found in zip(KINDS, rollout.measure_steps(*deployed), strict=True):
        assert found.machines == len(found.turns) == 2
        expected = {f"long-{kind.sleeps}" if kind.sleeps else "quick"}
        expected |= {"before", "after"} if kind.bracket else set()
        expected |= {"switch", "verify", "settle"} if kind.deploys else set()
        assert set(found.parts) == expected
        assert all(len(values) == 2 for values in found.parts.values())
        # A sleep is never shorter than it was asked for: the scripts' time is not counted as ours.
        assert found.scripts >= 2 * kind.sleeps
        assert all(0 < seconds < found.whole for seconds in found.turns)


def test_steps_are_chosen_by_their_numbers() -> None:
    assert chosen("1,6") == (STEPS[0], STEPS[5])


def test_a_step_with_window_one_has_one_machine_at_a_time(deployed: tuple[Farm, Deployed]) -> None:
    narrow = [number for number, kind in enumerate(KINDS, 1) if kind.window == 1]
    events = [entry.event for entry in deployed[1].entries]
    for number in narrow:
        told = [type(e) for e in events if isinstance(e, TurnStarted | TurnEnded) and e.step == number]
        assert told == [TurnStarted, TurnEnded] * 2


def test_the_agents_are_many_at_the_relay_and_each_has_a_journal_of_its_own(deployed: tuple[Farm, Deployed]) -> None:
    made, _ = deployed

    async def seen() -> set[str]:
        from relay.protocol.connection import Connection
        from relay.protocol.mail_client import MailClient

        token = Path(made.tokens["origin"]).read_text().strip()
        async with Connection(made.relay.url, token=token) as connection:
            return {agent.name for agent in await MailClient(connection).agents()}

    assert asyncio.run(seen()) == set(made.machines)
    for name in made.machines:
        assert list((Path(made.folder) / "agents" / name / "operations").iterdir())


def test_an_order_is_made_then_acted_on_then_answered(deployed: tuple[Farm, Deployed]) -> None:
    made, deployment = deployed
    logs = made.logs(deployment.ulid)
    for number in (1, 3):
        found = rollout.trips(deployment.entries, number, lambda operation: rollout._stamps(logs, operation)[0])
        assert len(found) == len(made.machines)
        for trip in found:
            assert 0 < trip.posted < trip.acted < trip.done


# --- many machines


def test_scenario_43_many_machines_turn_within_their_window_and_the_engine_stays_small(tmp_path: Path) -> None:
    """How long it takes counts in the long run alone."""
    with rollout.farm(str(tmp_path), MACHINES, KINDS) as farm:
        script = Path(farm.project, "deploy", "many.sh")
        script.write_text(SCRIPT.format(seconds=SECONDS))
        step = {"name": "many", "roles": ["web"], "strategy": {"rolling": {"window": WINDOW}}, "on_failure": "stop"}
        process = {"format": 1, "project": "bench", "steps": [step | {"apply": [{"script": "deploy/many.sh"}]}]}
        Path(farm.project, "release.yaml").write_text(yaml.safe_dump(process))
        home = Path(farm.home)
        created = run(home, "release", "create", "many", "-e", ENVIRONMENT, cwd=farm.project)
        assert created.code == 0, created.err
        files = 0
        with Process(home, "release", "deploy", "many", "-e", ENVIRONMENT, cwd=farm.project) as engine:
            memory = 0
            while engine.is_alive:
                try:
                    files = max(files, len(os.listdir(f"/proc/{engine.pid}/fd")))
                    memory = max(memory, rollout.resident(engine.pid))
                except (OSError, IndexError):
                    continue  # it ends right now
                time.sleep(0.05)
            done = engine.result()
        assert done.code == 0, done.out + done.err
        began = time.monotonic()
        status = run(home, "release", "status", "--json").json
        status_seconds = time.monotonic() - began
        with Journal.open(str(home / "journal.db")) as journal:
            entries = journal.entries(status["summary"]["deployment"])
    assert {machine["outcome"] for machine in status["machines"]} == {"deployed"}
    assert len(status["machines"]) == MACHINES
    flying, most = 0, 0
    for entry in entries:
        flying += isinstance(entry.event, TurnStarted) - isinstance(entry.event, TurnEnded)
        most = max(most, flying)
    assert most == WINDOW
    [start] = [entry.at for entry in entries if isinstance(entry.event, StepStarted)]
    [end] = [entry.at for entry in entries if isinstance(entry.event, StepEnded)]
    ideal = MACHINES / WINDOW * SECONDS
    print(f"{MACHINES} machines, {WINDOW} at a time: {end - start:.1f} s of {ideal:.1f} s ideally")
    print(f"the engine: {files} open files, {memory / 2**20:.0f} MiB; status in {status_seconds:.2f} s")
    assert files < 256
    assert memory < 256 << 20
    if SOAK:
        assert end - start <= ideal * 1.1
        assert status_seconds < 1.0
