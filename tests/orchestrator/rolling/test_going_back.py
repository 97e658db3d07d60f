"""Where a rollback leads, and what the steps on the server of the releases that one goes away from say of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from orchestrator.journal import events as ev
from orchestrator.plan.plan import (
    AcquirePlan,
    MachineStep,
    MachineTurn,
    Plan,
    PlannedMachine,
    PlannedPackage,
    PlannedPhase,
    PlannedRelay,
    PlannedStep,
    SecretSource,
    ServerRun,
    ServerStep,
)
from orchestrator.rolling.again import Attempt
from orchestrator.rolling.going_back import Past, WayBack, find_way_back, owed_undos, plan_back
from relay.errors import RefusedError


def record(
    number: int, label: str, state: ev.WrittenState = "succeeded", goal: ev.Goal = "deploy"
) -> ev.DeploymentRecord:
    return ev.DeploymentRecord(
        f"D{number}", "shop", label, "prod", goal, number, state, "", "ann", "ops", 1, number, None
    )


def past(*told: str) -> list[Past]:
    """Each is a label, with `!` behind it where it failed, `<` before it where it was a rollback, `~` where no step of it
    began, `=` where it was a stage.
    """
    found = []
    for number, text in enumerate(told, 1):
        label = text.strip("!<~=")
        goal: ev.Goal = "rollback" if "<" in text else "stage" if "=" in text else "deploy"
        found.append(
            Past(record(number, label, "failed" if set("!~") & set(text) else "succeeded", goal), "~" not in text)
        )
    return found


@pytest.mark.parametrize(
    ("told", "to", "expected"),
    [
        (("1.1", "1.2"), None, ("1.2", "1.1", ("D2",))),
        (("1.1", "1.2!"), None, ("1.2", "1.1", ("D2",))),
        (("1.1", "1.2!", "1.2!"), None, ("1.2", "1.1", ("D2", "D3"))),
        (("1.1", "1.2", "1.3~"), None, ("1.2", "1.1", ("D2",))),
        (("1.1", "1.2", "1.3="), None, ("1.2", "1.1", ("D2",))),
        (("1.0", "1.1", "1.2", "<1.1"), None, ("1.1", "1.0", ("D2", "D3", "D4"))),
        (("1.0", "1.1", "1.2", "<1.1", "1.2!"), None, ("1.2", "1.1", ("D5",))),
        (("1.0", "1.1", "1.2", "<1.1!"), None, ("1.1", "1.1", ("D3", "D4"))),
        (("1.1", "1.2", "1.1"), None, ("1.1", "1.2", ("D3",))),
        (("1.0", "1.1", "1.2"), "1.0", ("1.2", "1.0", ("D2", "D3"))),
    ],
)
def test_the_last_good_release_before_the_current_one_is_where_it_leads(
    told: tuple[str, ...], to: str | None, expected: tuple[str, str, tuple[str, ...]]
) -> None:
    assert find_way_back(past(*told), to) == WayBack(*expected)


@pytest.mark.parametrize(
    ("told", "to", "words"),
    [
        (("1.1",), None, "no release before 1.1"),
        (("1.1~",), None, "nothing was deployed"),
        (("1.1!", "1.2!"), None, "no release before 1.2"),
        (("1.1", "1.2"), "1.3", "never was good"),
        (("1.1", "1.2!"), "1.2", "never was good"),
        (("1.1", "1.2"), "1.2", "nothing to go back from"),
    ],
)
def test_where_there_is_no_way_back_it_says_so(told: tuple[str, ...], to: str | None, words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        find_way_back(past(*told), to)


# --- steps on the server


def server(number: int, name: str, back: object = "refuse", package: str = "") -> ServerStep:
    run = ServerRun(str(back), commands=(("true",),), secrets=("db",)) if back not in {"skip", "refuse"} else back
    return ServerStep(number, name, ServerRun(name, commands=(("true",),)), package=package, on_rollback=run)  # type: ignore[arg-type]


def machines(number: int, name: str, on_failure: str = "stop") -> MachineStep:
    turn = MachineTurn("web1", "/srv/shop", (), (), {}, "f")
    phases = (PlannedPhase(0, 1),)
    return MachineStep(number, name, (turn,), "rolling", phases, package="web", on_failure=on_failure)  # type: ignore[arg-type]


def plan(label: str, *steps: PlannedStep) -> Plan:
    return Plan(
        format=1,
        project="shop",
        label=label,
        environment="prod",
        packages={"web": PlannedPackage("Acme.Web", label), "sql": PlannedPackage("Acme.Sql", label)},
        scripts=None,
        relays=(PlannedRelay("fra", "https://fra.example:7443", "fra"),),
        feeds={},
        machines=(PlannedMachine("web1", "10.0.0.1", "fra", "sha256:1", ("web",), ("fra",)),),
        secrets={"db": SecretSource(env=f"DB_{label}")},
        machine_secrets=(),
        pre_acquire=(),
        acquire=AcquirePlan(),
        steps=steps,
    )


def ran(one: Plan, *numbers: int, names: Sequence[str] = ()) -> Attempt:
    """A deployment in which the steps of these numbers began, and (of a rollback) those of these names ended well."""
    told: list[ev.Event] = [ev.StepStarted(number, "") for number in numbers]
    told += [ev.StepEnded(number, ok=True, name=name) for number, name in enumerate(names, 1)]
    return Attempt("D", one, [ev.JournalEntry(at, "D", at, event) for at, event in enumerate(told, 1)])


WAY = WayBack("1.2", "1.1", ("D2",))


def names(one: Plan) -> list[str]:
    return [step.name for step in one.steps]


def test_each_step_that_began_is_undone_between_the_machines_it_stood_between_in_the_opposite_order() -> None:
    new = plan(
        "1.2",
        server(1, "expand", "u1"),
        machines(2, "backend"),
        server(3, "move data", "u3"),
        machines(4, "frontend"),
        server(5, "contract", "u5"),
        server(6, "report", "skip"),
    )
    old = plan(
        "1.1", server(1, "expand"), machines(2, "backend", "rollback"), machines(3, "frontend"), server(4, "report")
    )
    back = plan_back(old, WAY, [ran(new, 1, 2, 3, 4, 5, 6)])
    assert names(back) == [
        "contract of 1.2, undone",
        "frontend",
        "move data of 1.2, undone",
        "backend",
        "expand of 1.2, undone",
    ]
    assert [step.number for step in back.steps] == [1, 2, 3, 4, 5]
    assert [step.on_failure for step in back.steps if isinstance(step, MachineStep)] == ["stop", "ask"]
    assert back.label == "1.1"


def test_a_step_that_never_began_needs_no_undo_and_refuses_nothing() -> None:
    new = plan("1.2", server(1, "schema", "u1"), machines(2, "farm"), server(3, "contract"))
    assert names(plan_back(plan("1.1", machines(1, "farm")), WAY, [ran(new, 1, 2)])) == [
        "farm",
        "schema of 1.2, undone",
    ]


def test_a_step_that_refuses_is_named_with_what_a_person_can_do() -> None:
    new = plan("1.2", server(1, "schema"), machines(2, "farm"))
    with pytest.raises(RefusedError, match=r"step 1 \(schema\) of 1\.2 ran") as told:
        plan_back(plan("1.1", machines(1, "farm")), WAY, [ran(new, 1)])
    assert "release deploy 1.1" in told.value.hint


def test_over_several_releases_the_newest_is_undone_first_and_what_was_undone_once_is_not_again() -> None:
    first = plan("1.2", server(1, "schema", "u12"), machines(2, "farm"))
    second = plan("1.3", server(1, "schema", "u13"), machines(2, "farm"))
    old = plan("1.1", machines(1, "farm"))
    both = plan_back(old, WAY, [ran(first, 1, 2), ran(second, 1, 2)])
    assert names(both) == ["farm", "schema of 1.3, undone", "schema of 1.2, undone"]

    failed = ran(both, 1, 2, names=("farm", "schema of 1.3, undone"))
    again = plan_back(old, WAY, [ran(first, 1, 2), ran(second, 1, 2), failed])
    assert names(again) == ["farm", "schema of 1.2, undone"]

    anew = owed_undos([ran(second, 1), failed, ran(second, 1)], "1.1")
    assert [one.undo for one in anew] == ["schema of 1.3, undone"], "it ran again after it was undone"


def test_an_undo_has_the_package_and_the_secrets_of_the_release_that_it_undoes() -> None:
    new = plan("1.2", server(1, "schema", "u1", package="sql"), machines(2, "farm"))
    old = plan("1.1", machines(1, "farm"))
    back = plan_back(Plan(**{f: getattr(old, f) for f in old.__struct_fields__} | {"secrets": {}}), WAY, [ran(new, 1)])
    undo = back.steps[-1]
    assert isinstance(undo, ServerStep)
    assert back.packages[undo.package].version == "1.2"
    assert back.secrets == {"db": SecretSource(env="DB_1.2")}


def test_what_each_step_does_on_the_way_back_is_told_first() -> None:
    new = plan("1.2", server(1, "schema", "u1"), machines(2, "farm"), server(3, "report", "skip"))
    first, *told = plan_back(plan("1.1", machines(1, "farm")), WAY, [ran(new, 1, 2, 3)]).notes
    assert first == "going back from 1.2 to 1.1"
    assert "step 3 (report) of 1.2 stays as it is (on_rollback: skip)" in told
    assert any(line.startswith("step 1 (schema) of 1.2 is undone") for line in told)
    assert any(line.startswith("bytes: none where 1.1 still is") for line in told)
