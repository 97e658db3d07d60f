"""Machines and rotations that several projects share: who may start, given what others have. Pure."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.journal.views import OpenBracket
from orchestrator.locks.leases import Elsewhere, Promise, Turning
from orchestrator.plan.plan import PlannedPhase
from orchestrator.rolling import rolling, shared
from orchestrator.rolling.rolling import Roll, RotationState
from orchestrator.rolling.shared import Own

WEBS = ("web1", "web2", "web3", "web4")
OWN = Own("shop", "web")
ALL_IN = RotationState(frozenset(WEBS), frozenset())


def roll(window: int = 4, min_in_service: int = 0) -> Roll:
    return Roll(WEBS, (PlannedPhase(0, window),), min_in_service)


def turned(*machines: str) -> dict[str, Turning]:
    return {
        name: Turning("k", name, "production", "desk", "2.0", "D", "ann", "host", 1, 1_800_000_000.0)
        for name in machines
    }


def bracket(machine: str, project: str = "desk", rotation: str = "web") -> OpenBracket:
    return OpenBracket(machine, rotation, "production", "D", "2.0", 1_800_000_000.0, 1, 1, project=project)


def starts(now: Roll, elsewhere: Elsewhere, service: RotationState = ALL_IN, own: Own = OWN) -> list[str]:
    return shared.starts(now, service, own, elsewhere)


def test_what_nobody_else_has_starts_as_ever() -> None:
    for now, many in ((roll(), 4), (roll(2), 2), (roll(4, 2), 2), (roll(1, 3), 1)):
        assert starts(now, Elsewhere()) == list(WEBS[:many])


def test_a_machine_that_another_turns_does_not_start_and_does_not_keep_the_others() -> None:
    assert starts(roll(2), Elsewhere(turning=turned("web1"))) == ["web2", "web3"]


def test_who_is_in_flight_elsewhere_counts_as_out() -> None:
    assert starts(roll(4, 2), Elsewhere(turning=turned("web1"))) == ["web2"]
    assert starts(roll(4, 2), Elsewhere(turning=turned("web1", "web4"))) == []


def test_who_is_out_by_anybodys_bracket_counts_as_out_whatever_a_probe_says() -> None:
    for project in ("shop", "desk"):
        elsewhere = Elsewhere(brackets=(bracket("web1", project), bracket("web2", project)))
        assert starts(roll(4, 2), elsewhere) == (["web1", "web2"] if project == "shop" else [])
    elsewhere = Elsewhere(brackets=(bracket("web1", rotation="api"),))
    assert starts(roll(4, 2), elsewhere) == ["web2", "web3"], "it is out of another rotation, but not touched either"


def test_a_bracket_of_another_project_keeps_that_machine_and_nothing_else() -> None:
    assert starts(roll(), Elsewhere(brackets=(bracket("web2"),))) == ["web1", "web3", "web4"]
    assert starts(roll(), Elsewhere(brackets=(bracket("web2"),)), own=Own("shop", "")) == ["web1", "web3", "web4"]


def test_no_start_breaks_what_another_deployment_has_promised() -> None:
    promise = Promise("D", "web", 3, frozenset(WEBS))
    assert starts(roll(), Elsewhere(promises=(promise,))) == ["web1"]
    assert starts(roll(), Elsewhere(promises=(promise,), turning=turned("web1"))) == []
    assert (
        starts(replace(roll(), started=("web4",), in_flight=frozenset({"web4"})), Elsewhere(promises=(promise,))) == []
    )
    assert starts(roll(), Elsewhere(promises=(replace(promise, rotation="api"),))) == list(WEBS)
    few = replace(promise, machines=frozenset({"web1", "web2", "web3"}))
    assert starts(roll(), Elsewhere(promises=(few,))) == ["web4"], "what is not of it may start"


def test_a_machine_that_is_out_already_may_start_whatever_is_promised() -> None:
    promise = Promise("D", "web", 4, frozenset(WEBS))
    elsewhere = Elsewhere(brackets=(bracket("web2", "shop"),), promises=(promise,))
    assert starts(roll(), elsewhere) == ["web2"]


def test_who_waits_reads_for_whom() -> None:
    elsewhere = Elsewhere(brackets=(bracket("web1"),), turning=turned("web2", "web3", "web4"))
    why = rolling.why_waiting(roll(), shared.seen(roll(), ALL_IN, OWN, elsewhere))
    assert "web1 is out of web since 2027-01-15 08:00 UTC, by 2.0 of desk" in why
    assert "web2 is being turned by 2.0 of desk since 2027-01-15 08:00 UTC" in why
    promise = Promise("D", "web", 4, frozenset(WEBS))
    why = rolling.why_waiting(roll(), shared.seen(roll(), ALL_IN, OWN, Elsewhere(promises=(promise,))))
    assert why == "4 in service, of which another deployment of web (D) keeps 4"


def test_what_the_living_have_is_waited_for_and_what_the_dead_left_is_not() -> None:
    now = roll()
    assert not shared.is_patient(now, OWN, Elsewhere())
    assert shared.is_patient(now, OWN, Elsewhere(turning=turned("web4")))
    assert not shared.is_patient(now, OWN, Elsewhere(turning=turned("web9")))
    assert not shared.is_patient(now, OWN, Elsewhere(brackets=(bracket("web1"),)))
    assert shared.is_patient(now, OWN, Elsewhere(brackets=(bracket("web1"),), alive=frozenset({"D"})))
    assert not shared.is_patient(now, OWN, Elsewhere(brackets=(bracket("web1", "shop"),), alive=frozenset({"D"})))


def test_what_the_dead_left_is_refused_by_name_with_its_command() -> None:
    elsewhere = Elsewhere(brackets=(bracket("web1"), bracket("web9"), bracket("web2", "shop")))
    (told,) = shared.why_refused(OWN, frozenset(WEBS), elsewhere)
    for words in (
        "web1 is out of web since",
        "2.0 of desk",
        "'waystation rotation close web1 --environment production'",
    ):
        assert words in told
    assert shared.why_refused(OWN, frozenset(WEBS), replace(elsewhere, alive=frozenset({"D"}))) == []
