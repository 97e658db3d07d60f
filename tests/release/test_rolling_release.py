"""What a rolling step promises while it goes on: how many are in flight, who is next, how many stay in service.

A diary holds what `before` and `after` wrote down, in the order in which it happened: a machine is in flight between the
two. Slow machines are slow until something has happened, so that no test depends on how fast this machine is.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from harness.farm import Farm
from harness.process import Done

FIVE = ("web1", "web2", "web3", "web4", "web5")
THREE = FIVE[:3]


@dataclass
class Rolled:
    """One deployment."""

    done: Done
    diary: list[tuple[str, str, int]]
    """(machine, "before" or "after OUTCOME", how many machines the balancer had in service right then)."""
    status: Any

    @property
    def begun(self) -> list[str]:
        return [machine for machine, what, _ in self.diary if what == "before"]

    @property
    def in_flight(self) -> list[set[str]]:
        """After each line of the diary."""
        flying: set[str] = set()
        seen = []
        for machine, what, _ in self.diary:
            flying = flying | {machine} if what == "before" else flying - {machine}
            seen.append(flying)
        return seen

    def at(self, machine: str, what: str) -> int:
        [found] = [at for at, line in enumerate(self.diary) if line[0] == machine and line[1].split()[0] == what]
        return found

    @property
    def outcomes(self) -> dict[str, str]:
        return {machine["name"]: machine["outcome"] for machine in self.status["machines"]}


class Farmyard:
    """Five machines that have nothing yet, and a balancer that is a folder: it serves the machines named in it."""

    def __init__(self, farm: Farm) -> None:
        self.farm = farm
        self.diary = farm.folder / "diary"
        self.balancer = farm.folder / "balancer"
        self.balancer.mkdir()
        note = f'echo "$MACHINE $WHAT|$(ls {self.balancer} | wc -l)" >> {self.diary}\n'
        farm.write_script(
            "environments/lb/out.sh",
            f'#!/bin/sh\nrm -f {self.balancer}/$MACHINE\nWHAT=before\n{note}[ "$VAR_WORK" != before-fails ]\n',
        )
        farm.write_script(
            "environments/lb/in.sh",
            f'#!/bin/sh\nWHAT="after $OUTCOME"\n{note}touch {self.balancer}/$MACHINE {farm.folder}/$MACHINE-through\n',
        )
        farm.write_script(
            "environments/lb/state.sh",
            f"#!/bin/sh\n[ ! -e {farm.folder}/nobody-can-tell ] || exit 2\n[ -e {self.balancer}/$MACHINE ]\n",
        )
        farm.write_script(
            "deploy/work.sh",
            "#!/bin/sh\n"
            'case "$VAR_WORK" in\n'
            "fails) exit 1 ;;\n"
            f"waits-for-*) until [ -e {farm.folder}/${{VAR_WORK#waits-for-}}-through ]; do sleep 0.02; done ;;\n"
            "esac\n",
        )

        farm.write_script("deploy/check.sh", '#!/bin/sh\ngrep -qx "$1" "$ROOT/current/version.txt"\n')

    def roll(
        self,
        environment: str,
        machines: tuple[str, ...],
        rolling: dict[str, Any],
        work: dict[str, str] | None = None,
        probe: dict[str, str] | None = None,
        out: tuple[str, ...] = (),
        version: str = "1.0.0",
        words: tuple[str, ...] = (),
    ) -> Rolled:
        """Deploy into an environment of its own; all but the machines `out` are in service at its beginning."""
        self.diary.write_text("")
        for machine in FIVE:
            (self.farm.folder / f"{machine}-through").unlink(missing_ok=True)
            if machine in machines and machine not in out:
                (self.balancer / machine).touch()
            else:
                (self.balancer / machine).unlink(missing_ok=True)
        root = f"{self.farm.folder}/srv/{environment}/${{machine.name}}"
        self.farm.write_process(
            packages={"web": "Acme.Web"},
            variables={"work": "is-quick"},
            steps=[
                {
                    "name": "web farm",
                    "roles": ["web"],
                    "deploy": "web",
                    "to": root,
                    "strategy": {"rolling": rolling},
                    "rotation": "web",
                    "apply": [{"script": "deploy/work.sh", "timeout": "30s"}, "switch"],
                    "verify": [{"command": ["deploy/check.sh", "${package.version}"]}],
                }
            ],
        )
        self.farm.write_environment(
            environment,
            machines={
                name: {
                    "roles": ["web"] if name in machines else ["idle"],
                    "variables": {"work": (work or {}).get(name, "is-quick")},
                }
                for name in FIVE
            },
            rotation={"web": {"before": "lb/out.sh", "after": "lb/in.sh", **(probe or {})}},
        )
        label = f"{environment}-{version}"
        done = self.farm.call("release", "deploy", label, "-e", environment, "--package", f"web={version}", *words)
        lines = [line.rpartition("|") for line in self.diary.read_text().splitlines()]
        diary = [(*line.split(" ", 1), int(count)) for line, _, count in lines]
        return Rolled(done, diary, self.farm.status() if done.code != 2 else None)  # type: ignore[arg-type]

    def roll_over_an_old_one(
        self, environment: str, machines: tuple[str, ...], rolling: dict[str, Any], work: dict[str, str]
    ) -> Rolled:
        """The same onto machines on which an earlier version runs well."""
        first = self.roll(environment, machines, {"window": "100%"})
        assert first.done.code == 0, first.done.out + first.done.err
        return self.roll(environment, machines, rolling, work, version="1.1.0")


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farmyard]:
    with Farm(tmp_path_factory.mktemp("rolling")) as farm:
        farm.add_relay("fra")
        agents = [farm.add_agent(name) for name in FIVE]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda agent: agent.start(), agents))
        for version in ("1.0.0", "1.1.0"):
            farm.add_package("Acme.Web", version, {"version.txt": f"{version}\n"})
        yield Farmyard(farm)


# --- the window


@pytest.fixture(scope="module")
def phased(yard: Farmyard) -> Rolled:
    """One machine first, then two at a time; web2 is not through before web4 is."""
    phases = [{"machines": 1}, {"window": 2}]
    return yard.roll("phased", FIVE, {"phases": phases}, work={"web2": "waits-for-web4"})


def test_the_first_phase_is_through_before_the_second_begins(phased: Rolled) -> None:
    assert phased.done.code == 0, phased.done.out + phased.done.err
    assert [line[:2] for line in phased.diary[:2]] == [("web1", "before"), ("web1", "after deployed")]


def test_scenario_03_never_more_machines_are_in_flight_than_the_window_has_places(phased: Rolled) -> None:
    assert max(len(flying) for flying in phased.in_flight) == 2


def test_scenario_03_the_window_slides_the_next_machine_starts_when_any_ends(phased: Rolled) -> None:
    slow_end = phased.at("web2", "after")
    # Of a window that moved on as a whole, web4 would wait for web2, which waits for web4.
    assert phased.at("web3", "after") < phased.at("web4", "before") < phased.at("web4", "after") < slow_end
    # Two start at one moment, so which of them writes first is nobody's promise.
    assert [phased.begun[0], *sorted(phased.begun[1:3]), *phased.begun[3:]] == list(FIVE)


def test_the_effective_numbers_are_printed(phased: Rolled) -> None:
    assert "1 machine, 1 at a time, then 4 machines, 2 at a time" in phased.done.out


# --- failures


def test_a_failure_that_is_allowed_lets_the_others_go_on_and_is_told_by_5_and_the_machines_name(yard: Farmyard) -> None:
    rolled = yard.roll_over_an_old_one("one-may-fail", THREE, {"max_failures": 1}, work={"web2": "fails"})
    assert rolled.done.code == 5, rolled.done.out + rolled.done.err
    assert rolled.begun == list(THREE)
    assert rolled.outcomes == {"web1": "deployed", "web2": "kept_old", "web3": "deployed"}
    assert "not deployed: web2" in rolled.done.err.splitlines()
    assert "done with exclusions: not deployed: web2" in rolled.done.out
    assert rolled.status["summary"]["state"] == "done with exclusions"
    assert " done with exclusions " in yard.farm.do("release", "history").out


@pytest.mark.parametrize(
    "words",
    [
        ("release", "log", "nosuch"),
        ("release", "history", "--environment", "nosuch"),
        ("rotation", "list", "--environment", "nosuch"),
        ("release", "status", "--environment", "nosuch"),
    ],
    ids=" ".join,
)
def test_a_name_that_nothing_has_is_an_error_and_not_an_empty_answer(
    yard: Farmyard, phased: Rolled, words: tuple[str, ...]
) -> None:
    assert phased.done.code == 0
    done = yard.farm.call(*words)
    assert (done.code, done.out) == (1, "")
    assert "nosuch" in done.err
    assert yard.farm.do("release", "log", "WEB1").code == 0


@pytest.mark.parametrize(("fails", "outcome"), [("before-fails", "not_started"), ("fails", "kept_old")])
def test_scenarios_13_and_16_a_failure_before_the_switch_puts_the_machine_back_and_stops_the_roll(
    yard: Farmyard, fails: str, outcome: str
) -> None:
    rolled = yard.roll_over_an_old_one(f"stopped-{fails}", THREE, {"window": 1}, work={"web2": fails})
    assert rolled.done.code == 1, rolled.done.out + rolled.done.err
    assert rolled.begun == ["web1", "web2"]
    assert rolled.outcomes == {"web1": "deployed", "web2": outcome, "web3": ""}
    assert rolled.diary[-1][:2] == ("web2", f"after {outcome}")
    assert {path.name for path in yard.balancer.iterdir()} == set(THREE), "all are in service"
    assert yard.farm.do("rotation", "list", "-e", f"stopped-{fails}", "--json").json["open"] == []
    assert rolled.status["summary"]["state"] == "failed"
    assert "web2" in rolled.status["summary"]["reason"]


def test_machines_in_flight_come_to_their_end_when_another_stops_the_roll(yard: Farmyard) -> None:
    rolled = yard.roll_over_an_old_one(
        "two-in-flight", FIVE, {"window": 2}, work={"web1": "waits-for-web2", "web2": "fails"}
    )
    assert rolled.done.code == 1, rolled.done.out + rolled.done.err
    assert sorted(rolled.begun) == ["web1", "web2"]
    assert rolled.outcomes["web1"] == "deployed"
    assert rolled.diary[-1][:2] == ("web1", "after deployed")


def test_a_machine_on_which_nothing_ran_before_is_left_out_when_it_fails(yard: Farmyard) -> None:
    rolled = yard.roll("nothing-before", THREE, {"window": 1}, work={"web1": "fails"})
    assert rolled.done.code == 1, rolled.done.out + rolled.done.err
    assert rolled.outcomes == {"web1": "left_out", "web2": "", "web3": ""}
    assert [line[:2] for line in rolled.diary] == [("web1", "before")], "nothing is there that could be put back"


# --- who is in service


@pytest.fixture(scope="module")
def probed(yard: Farmyard) -> Rolled:
    """Four of five must stay; the probe says that web3 is out."""
    rolling = {"window": 3, "min_in_service": 4}
    return yard.roll("probed", FIVE, rolling, probe={"probe": "lb/state.sh"}, out=("web3",))


def test_a_machine_that_the_probe_finds_out_of_service_goes_first(probed: Rolled) -> None:
    assert probed.done.code == 0, probed.done.out + probed.done.err
    assert probed.begun == ["web3", "web1", "web2", "web4", "web5"]


def test_the_machines_in_service_never_become_fewer_than_the_minimum_whatever_the_window_allows(probed: Rolled) -> None:
    assert len(probed.begun) == 5
    assert min(count for _, _, count in probed.diary) == 4
    assert max(len(flying) for flying in probed.in_flight) == 1
    assert "in fact at most 1 at a time" in probed.done.out


def test_a_probe_that_cannot_tell_twice_pauses_the_roll_until_a_person_lets_it_go_on(yard: Farmyard) -> None:
    blind = yard.farm.folder / "nobody-can-tell"
    blind.touch()
    rolled = yard.roll(
        "blind", THREE, {"window": 1, "min_in_service": 1}, probe={"probe": "lb/state.sh"}, words=("--no-wait",)
    )
    assert rolled.done.code == 3, rolled.done.out + rolled.done.err
    assert rolled.begun == [], "nobody guesses who is in service"
    assert rolled.status["summary"]["state"] == "paused"
    assert "cannot tell whether web1, web2, web3" in rolled.status["paused"]["reason"]
    assert "go-on" in yard.farm.do("release", "status", "-e", "blind").out
    blind.unlink()
    still = yard.farm.call("release", "resume", "-e", "blind", "--no-wait")
    assert still.code == 3, "that it can tell now is for a person to see"
    yard.farm.do("release", "go-on", "-e", "blind", "-m", "the balancer is back")
    done = yard.farm.call("release", "resume", "-e", "blind")
    assert done.code == 0, done.out + done.err
    assert {machine["outcome"] for machine in yard.farm.status()["machines"]} == {"deployed"}


def test_a_minimum_that_cannot_be_kept_is_refused_before_anything_starts(yard: Farmyard) -> None:
    rolled = yard.roll("impossible", FIVE, {"window": 2, "min_in_service": 5})
    assert rolled.done.code == 2
    assert "min_in_service" in rolled.done.err
    assert rolled.diary == []
