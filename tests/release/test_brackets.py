"""Every row of the bracket table, as a farm sees it: each machine of one rolling deployment meets its own fate.

The diary is what the scripts of the rotation, the scripts on the machines and the application itself wrote down, in the
order in which it happened.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from harness.farm import Farm
from harness.process import Done

FATES = {
    "web1": "before_fails",
    "web2": "before_hangs",
    "web3": "configure_fails",
    "web4": "start_fails",
    "web5": "says_another_version",
    "web6": "well",
    "web7": "breaks_the_old_version",
}
LEFT_OUT = ["web4", "web5", "web7"]


class Application(ThreadingHTTPServer):
    """What runs on all machines: says of each the version that was started there, and writes down that it was asked."""

    def __init__(self, srv: Path, diary: Path) -> None:
        self.srv, self.diary = srv, diary
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _Handler(BaseHTTPRequestHandler):
    server: Application

    def do_GET(self) -> None:
        machine = self.path.strip("/")
        try:
            said = (self.server.srv / machine / "running").read_text().strip()
        except FileNotFoundError:
            said = "nothing runs"
        with self.server.diary.open("a") as diary:
            diary.write(f"{machine} says {said}\n")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(said.encode())

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class Story:
    """What was done, one after another, and what was seen after each."""

    farm: Farm
    diary: Path
    done: dict[str, Done] = field(default_factory=dict)
    told: dict[str, list[str]] = field(default_factory=dict)
    """The diary of each deed."""
    seen: dict[str, Any] = field(default_factory=dict)
    current: dict[str, dict[str, str]] = field(default_factory=dict)
    """By deed, the version that `current` names on each machine."""

    def tell(self, deed: str, *words: object) -> Done:
        self.diary.write_text("")
        done = self.done[deed] = self.farm.call(*words)
        self.told[deed] = self.diary.read_text().splitlines()
        self.current[deed] = {name: self.version(name) for name in self.farm.agents}
        return done

    def deploy(self, deed: str, label: str, *words: object, environment: str = "production") -> Done:
        return self.tell(deed, "release", "deploy", label, "--environment", environment, *words)

    def version(self, machine: str) -> str:
        try:
            return (self.farm.agents[machine].root / "current" / "version.txt").read_text().strip()
        except FileNotFoundError:
            return ""

    def of(self, machine: str, deed: str = "fates") -> list[str]:
        """What happened on one machine; what is said twice in a row counts once, as a check asks until it is content."""
        lines = [line.split(" ", 1)[1] for line in self.told[deed] if line.split()[0] == machine]
        return [line for at, line in enumerate(lines) if at == 0 or lines[at - 1] != line]


def write_scripts(farm: Farm, diary: Path) -> None:
    srv = farm.folder / "srv"
    farm.write_script(
        "environments/lb/out.sh",
        "#!/bin/sh\n"
        f'echo "$MACHINE before" >> {diary}\n'
        'case "$VAR_FATE" in\n'
        "before_fails) exit 3 ;;\n"
        f"before_hangs) setsid sleep 600 & echo $! > {farm.folder}/child; echo $$ > {farm.folder}/hangs; sleep 600 ;;\n"
        "esac\n",
    )
    farm.write_script(
        "environments/lb/in.sh",
        "#!/bin/sh\n"
        f'echo "$MACHINE after $OUTCOME, attempt $ATTEMPT" >> {diary}\n'
        f'[ "$VAR_FATE" != after_fails ] || [ -e {farm.folder}/balancer-is-well ]\n',
    )
    farm.write_script(
        "deploy/configure.sh",
        "#!/bin/sh\n"
        f'echo "$MACHINE configure" >> {diary}\n'
        'case "$VAR_FATE" in\n'
        "configure_fails) exit 1 ;;\n"
        f"breaks_the_old_version) rm {srv}/$MACHINE/running; exit 1 ;;\n"
        "esac\n",
    )
    farm.write_script(
        "deploy/start.sh",
        "#!/bin/sh\n"
        f'echo "$MACHINE start" >> {diary}\n'
        '[ "$VAR_FATE" != start_fails ] || exit 1\n'
        f"cp {srv}/$MACHINE/current/version.txt {srv}/$MACHINE/running\n"
        f'[ "$VAR_FATE" != says_another_version ] || echo 0.9.0 > {srv}/$MACHINE/running\n',
    )


def write_process(farm: Farm, port: int, **rolling: object) -> None:
    farm.write_process(
        packages={"web": "Acme.Web"},
        variables={"fate": "well"},
        steps=[
            {
                "name": "web farm",
                "roles": ["web"],
                "deploy": "web",
                "to": f"{farm.folder}/srv/${{machine.name}}",
                "strategy": {"rolling": rolling},
                "rotation": "web",
                "apply": [{"script": "deploy/configure.sh"}, "switch", {"script": "deploy/start.sh"}],
                "verify": [
                    {
                        "http": f"http://127.0.0.1:{port}/${{machine.name}}",
                        "expect": "${package.version}",
                        "deadline": "3s",
                    }
                ],
                "on_failure": "stop",
            }
        ],
    )


def write_environment(farm: Farm, fates: dict[str, str], name: str = "production", **rotation: object) -> None:
    machines = {machine: {"variables": {"fate": fate}} for machine, fate in fates.items()}
    farm.write_environment(
        name,
        machines=machines,
        rotation={"web": {"before": "lb/out.sh", "after": "lb/in.sh", "timeout": "3s", **rotation}},
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Farm, Path, Application]]:
    """Seven machines on which 1.0.0 runs well."""
    folder = tmp_path_factory.mktemp("brackets")
    diary = folder / "diary"
    diary.write_text("")
    with Farm(folder) as farm, Application(folder / "srv", diary) as application:
        threading.Thread(target=application.serve_forever, daemon=True).start()
        farm.add_relay("fra")
        agents = [farm.add_agent(name) for name in FATES]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda agent: agent.start(), agents))
        for version in ("1.0.0", "1.1.0"):
            farm.add_package("Acme.Web", version, {"version.txt": f"{version}\n"})
        write_scripts(farm, diary)
        write_process(farm, application.port, window=7, max_failures=6)
        write_environment(farm, {})
        done = farm.deploy("1.0.0", "--package", "web=1.0.0")
        assert done.code == 0, done.out + done.err
        yield farm, diary, application
        application.shutdown()


@pytest.fixture(scope="module")
def story(world: tuple[Farm, Path, Application]) -> Story:
    """All fates in one deployment; then machines are put back, by their script and by hand, and the last is adopted;
    then, in an environment of their own, two machines whose balancer does not take them back.
    """
    farm, diary, application = world
    story = Story(farm, diary)
    write_environment(farm, FATES)
    story.deploy("fates", "1.1.0", "--package", "web=1.1.0")
    story.seen["status"] = farm.status()
    story.seen["told"] = farm.do("release", "status").out
    story.seen["open"] = farm.do("rotation", "list", "--json").json["open"]
    story.seen["listed"] = farm.do("rotation", "list").out

    write_environment(farm, {})
    story.deploy("refused", "1.1.0")
    story.tell("not well", "rotation", "close", "web4", "--json")
    story.tell("no reason", "rotation", "close", "web4", "--force")
    story.tell("put back", "rotation", "close", "web4", "--force", "-m", "the old one will do until noon")
    story.tell("by hand", "rotation", "close", "web5", "--by-hand", "-m", "looked at it myself")
    story.tell("none", "rotation", "close", "web6")
    story.seen["open then"] = farm.do("rotation", "list", "--json").json["open"]
    write_process(farm, application.port, window=1)
    story.deploy("adopted", "1.1.0-again", "--package", "web=1.1.0", "--adopt")
    story.seen["open at last"] = farm.do("rotation", "list", "--json").json["open"]

    for name in ("web2", "web3", "web4", "web5", "web6"):
        farm.agents.pop(name).stop()
    write_process(farm, application.port, window=1, max_failures=5)
    write_environment(farm, {"web1": "after_fails"}, "other", retry={"attempts": 3, "delay": "100ms"})
    story.deploy("after fails", "1.0.0-other", "--package", "web=1.0.0", environment="other")
    story.seen["status after"] = farm.status()
    story.seen["open after"] = farm.do("rotation", "list", "--environment", "other", "--json").json["open"]
    story.tell("not put back", "rotation", "close", "web1")
    story.seen["open still"] = farm.do("rotation", "list", "--environment", "other", "--json").json["open"]
    (farm.folder / "balancer-is-well").touch()
    story.tell("put back later", "rotation", "close", "web1")
    return story


# --- the rows


def test_scenario_13_where_before_fails_nothing_is_deployed_and_the_old_version_goes_back(story: Story) -> None:
    assert story.of("web1") == ["before", "says 1.0.0", "after not_started, attempt 1"]
    assert story.current["fates"]["web1"] == "1.0.0"


def test_scenario_14_where_before_hangs_it_is_killed_with_its_children_at_its_time_limit(story: Story) -> None:
    assert story.of("web2") == ["before", "says 1.0.0", "after not_started, attempt 1"]
    for name in ("hangs", "child"):
        pid = int((story.farm.folder / name).read_text())
        assert not os.path.exists(f"/proc/{pid}"), f"{name} outlived its time limit"
    assert story.current["fates"]["web2"] == "1.0.0"


def test_scenario_16_a_failure_before_the_switch_keeps_the_old_version_and_verifies_it_before_it_goes_back(
    story: Story,
) -> None:
    assert story.of("web3") == ["before", "configure", "says 1.0.0", "after kept_old, attempt 1"]
    assert story.current["fates"]["web3"] == "1.0.0"


def test_a_failure_after_the_switch_leaves_the_machine_out(story: Story) -> None:
    assert story.of("web4") == ["before", "configure", "start"]
    assert story.current["fates"]["web4"] == "1.1.0"


def test_scenario_17_where_verify_sees_another_version_the_machine_is_left_out(story: Story) -> None:
    assert story.of("web5") == ["before", "configure", "start", "says 0.9.0"]


def test_where_the_old_version_is_ill_too_the_machine_is_left_out(story: Story) -> None:
    assert story.of("web7") == ["before", "configure", "says nothing runs"]


def test_the_machine_that_is_well_is_deployed_and_goes_back(story: Story) -> None:
    assert story.of("web6") == ["before", "configure", "start", "says 1.1.0", "after deployed, attempt 1"]
    assert story.current["fates"]["web6"] == "1.1.0"


# --- what people are told


def test_a_deployment_within_its_failures_ends_with_5_and_names_who_was_not_deployed_and_who_is_out(
    story: Story,
) -> None:
    done = story.done["fates"]
    assert done.code == 5, done.out + done.err
    [named] = [line for line in done.err.splitlines() if line.startswith("not deployed: ")]
    assert sorted(named.removeprefix("not deployed: ").split(", ")) == sorted(set(FATES) - {"web6"})
    out = [line.split()[2] for line in done.err.splitlines() if line.startswith("still out: ")]
    assert sorted(out) == LEFT_OUT


def test_a_machine_is_told_as_out_only_when_before_has_run(story: Story) -> None:
    lines = story.done["fates"].out.splitlines()
    to_be = {line.split()[2].rstrip(":") for line in lines if line.endswith(": to be taken out of web")}
    out = {line.split()[2].rstrip(":") for line in lines if line.endswith(": out of web")}
    assert to_be == set(FATES)
    assert out == set(FATES) - {"web1", "web2"}, "before_fails and before_hangs"


def test_what_failed_is_told_by_its_name(story: Story) -> None:
    machines = {machine["name"]: machine for machine in story.seen["status"]["machines"]}
    assert "(configure)" in machines["web3"]["reason"]
    assert story.seen["status"]["summary"]["state"] == "done with exclusions"
    assert "not deployed: web1" in story.seen["status"]["summary"]["reason"]


def test_status_tells_of_each_machine_how_its_turn_ended_and_why(story: Story) -> None:
    machines = {machine["name"]: machine for machine in story.seen["status"]["machines"]}
    assert {name: machine["outcome"] for name, machine in machines.items()} == {
        "web1": "not_started",
        "web2": "not_started",
        "web3": "kept_old",
        "web4": "left_out",
        "web5": "left_out",
        "web6": "deployed",
        "web7": "left_out",
    }
    assert "exit status 3" in machines["web1"]["reason"]
    assert "time" in machines["web2"]["reason"]
    assert "0.9.0" in machines["web5"]["reason"]
    assert [name for name, machine in machines.items() if machine["out_since"]] == LEFT_OUT
    assert "web4 is out of web since" in story.seen["told"]


def test_rotation_list_says_since_when_and_by_which_release_a_machine_is_out(story: Story) -> None:
    assert sorted(bracket["machine"] for bracket in story.seen["open"]) == LEFT_OUT
    status = story.seen["status"]["summary"]
    for bracket in story.seen["open"]:
        assert bracket["label"] == "1.1.0"
        assert bracket["rotation"] == "web"
        assert status["started"] < bracket["since"] < status["ended"]
    assert all(word in story.seen["listed"] for word in ("web4", "1.1.0", "UTC"))


# --- what is open stays open until somebody closes it


def test_the_next_deployment_is_refused_while_machines_are_out(story: Story) -> None:
    done = story.done["refused"]
    assert done.code == 1
    assert all(name in done.err for name in LEFT_OUT)
    assert "--adopt" in done.err
    assert "rotation close" in done.err
    assert story.told["refused"] == []


def test_rotation_close_leaves_a_machine_out_whose_checks_do_not_hold(story: Story) -> None:
    """1.1.0 is current on web4, and what runs there says 1.0.0."""
    done = story.done["not well"]
    assert done.code == 1
    told = json.loads(done.out)
    assert (told["machine"], told["closed"]) == ("web4", False)
    assert "expected '1.1.0'" in told["checks"]
    assert set(story.of("web4", "not well")) == {"says 1.0.0"}
    assert [bracket["machine"] for bracket in story.seen["open"] if bracket["machine"] == "web4"] == ["web4"]


def test_a_person_who_puts_back_what_is_not_well_says_why(story: Story) -> None:
    assert story.done["no reason"].code == 2
    assert "reason" in story.done["no reason"].err
    assert story.told["no reason"] == []


def test_rotation_close_by_force_runs_after_and_the_journal_keeps_what_was_found_and_why(story: Story) -> None:
    done = story.done["put back"]
    assert done.code == 0, done.err
    assert "not well" in done.out
    assert story.of("web4", "put back") == ["says 1.0.0", "after put_back, attempt 1"]
    earlier = story.seen["status"]["summary"]["deployment"]
    notes = [note["text"] for note in story.farm.do("release", "status", earlier, "--json").json["notes"]]
    (refused,) = [note for note in notes if "could not put it back: it is not well" in note]
    (forced,) = [note for note in notes if "by force" in note]
    assert "expected '1.1.0'" in refused
    assert "expected '1.1.0'" in forced
    assert forced.endswith(": the old one will do until noon")


def test_rotation_close_by_hand_runs_nothing(story: Story) -> None:
    assert story.done["by hand"].code == 0, story.done["by hand"].err
    assert story.told["by hand"] == []
    assert [bracket["machine"] for bracket in story.seen["open then"]] == ["web7"]
    earlier = story.seen["status"]["summary"]["deployment"]
    assert "looked at it myself" in story.farm.do("release", "status", earlier).out


def test_a_machine_that_is_in_cannot_be_closed(story: Story) -> None:
    assert story.done["none"].code == 1
    assert "web6 has no open bracket" in story.done["none"].err


def test_an_adopted_machine_goes_first_and_is_closed_by_its_turn(story: Story) -> None:
    done = story.done["adopted"]
    assert done.code == 0, done.out + done.err
    begun = [line.split()[0] for line in story.told["adopted"] if line.endswith(" before")]
    # web6 has all of this already.
    assert begun == ["web7", "web1", "web2", "web3", "web4", "web5"]
    assert story.of("web7", "adopted")[-1] == "after deployed, attempt 1"
    assert story.seen["open at last"] == []
    assert set(story.current["adopted"].values()) == {"1.1.0"}


# --- after


def test_scenario_18_a_failing_after_is_retried_and_then_stops_the_roll_whatever_max_failures_allows(
    story: Story,
) -> None:
    done = story.done["after fails"]
    assert done.code == 1, done.out + done.err
    tries = [f"after deployed, attempt {attempt}" for attempt in (1, 2, 3)]
    assert story.of("web1", "after fails") == ["before", "configure", "start", "says 1.0.0", *tries]
    assert story.of("web7", "after fails") == []
    assert "still out: web1" in done.err


def test_scenario_18_where_after_failed_the_new_version_stays_and_the_rotation_counts_as_unknown(story: Story) -> None:
    assert story.current["after fails"]["web1"] == "1.0.0"
    machines = {machine["name"]: machine for machine in story.seen["status after"]["machines"]}
    assert machines["web1"]["outcome"] == "rotation_unknown"
    assert machines["web7"]["outcome"] == ""
    assert story.seen["status after"]["summary"]["state"] == "failed"
    [bracket] = story.seen["open after"]
    assert (bracket["machine"], bracket["label"]) == ("web1", "1.0.0-other")
    assert bracket["since"] > story.seen["status after"]["summary"]["started"], "since when, and by which release"


def test_a_machine_that_could_not_be_put_back_stays_listed_and_may_be_closed_again(story: Story) -> None:
    assert story.done["not put back"].code == 1
    assert "could not be put back" in story.done["not put back"].err
    assert [bracket["machine"] for bracket in story.seen["open still"]] == ["web1"]
    done = story.done["put back later"]
    assert done.code == 0, done.err
    # Its checks hold first: 1.0.0 runs well there.
    assert [line.split(",")[0] for line in story.told["put back later"]] == ["web1 says 1.0.0", "web1 after put_back"]
