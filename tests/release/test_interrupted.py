"""A deployment whose engine is killed, that is called twice at once, that a person or its deadline ends.

The script on the machines waits for a word of the test, so that whatever is done to the engine is done in mid-flight.
"""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.farm import Farm
from harness.process import Process, wait_for

from agent import platform

SECONDS = 60.0
OPENED = ("vpn open", "vpn is there")


class World:
    """Two machines, one at a time; each test has an environment of its own, and folders of its own on the machines."""

    def __init__(self, farm: Farm) -> None:
        self.farm = farm
        self.name = ""

    def set_up(self, name: str, opening: str = "true", strategy: object = "rolling", **process: object) -> None:
        """The files of one test, whose release is called as it is. `opening` is a part of what opens the VPN.

        The script on machines gets the secrets that `process` declares.
        """
        secrets = process.get("secrets") or {}
        assert isinstance(secrets, dict)
        self.name = name
        self.folder.mkdir()
        root = f"{self.folder}/srv/${{machine.name}}"
        words = {"go": self.folder / "go", "diary": self.diary}
        for path, text in {
            "environments/lb/before.sh": _waiting("before", self.folder / "go-before", self.diary),
            "environments/lb/after.sh": f"#!/bin/sh\necho $MACHINE after $OUTCOME $DEPLOYMENT >> {self.diary}\n",
            "deploy/configure.sh": _waiting("configure", **words),
            "deploy/check.sh": '#!/bin/sh\ngrep -qx "$1" "$ROOT/current/version.txt"\n',
        }.items():
            self.farm.write_script(path, text)
        (self.folder / "go-before").touch()
        self.farm.write_process(
            packages={"web": "Acme.Web"},
            pre_acquire=[
                {
                    "name": "open vpn",
                    "commands": [["sh", "-c", f"{opening}; echo vpn open >> {self.diary}"]],
                    "undo": {"commands": [["sh", "-c", f"echo vpn closed >> {self.diary}"]]},
                },
                {"name": "look", "commands": [["sh", "-c", f"echo vpn is there >> {self.diary}"]]},
            ],
            steps=[
                {
                    "name": "web farm",
                    "roles": ["web"],
                    "deploy": "web",
                    "to": root,
                    "strategy": strategy,
                    "rotation": "web",
                    "apply": [
                        "switch",
                        {
                            "name": "configure",
                            "script": "deploy/configure.sh",
                            "timeout": "60s",
                            "secrets": list(secrets),
                        },
                    ],
                    "verify": [{"command": ["deploy/check.sh", "${package.version}"]}],
                }
            ],
            **process,
        )
        self.farm.write_environment(
            name,
            rotation={"web": {"before": "lb/before.sh", "after": "lb/after.sh", "timeout": "60s"}},
            secrets={each: {"file": str(self.farm.folder / each)} for each in secrets},
        )

    @property
    def folder(self) -> Path:
        return self.farm.folder / self.name

    @property
    def diary(self) -> Path:
        return self.folder / "diary"

    @property
    def lines(self) -> list[str]:
        """Of the diary, without deployments."""
        text = self.diary.read_text() if self.diary.exists() else ""
        return [" ".join(word for word in line.split() if len(word) != 26) for line in text.splitlines()]

    def deployments(self, what: str) -> list[str]:
        """The deployments whose scripts wrote this down."""
        lines = [line.split() for line in self.diary.read_text().splitlines()]
        return [line[-1] for line in lines if " ".join(line[:-1]) == what]

    def begin(self) -> Process:
        """Make the release, and deploy it."""
        return self.deploy("--package", "web=1.0.0")

    def deploy(self, *words: object) -> Process:
        return self.farm.start("release", "deploy", self.name, "-e", self.name, *words)

    def until(self, line: str, count: int = 1) -> None:
        wait_for(lambda: self.lines.count(line) >= count, seconds=SECONDS)

    def go(self) -> None:
        """The scripts on the machines may end."""
        (self.folder / "go").touch()

    def family(self, what: str, machine: str) -> list[int]:
        """Those of a waiting script and its child that live."""
        pids = (self.folder / f"{what}-{machine}").read_text().split()
        return [int(pid) for pid in pids if platform.process_mark(int(pid))]

    def cancel(self, *words: object) -> None:
        self.farm.do("release", "cancel", "-e", self.name, *words)

    @property
    def status(self) -> Any:
        return self.farm.do("release", "status", "-e", self.name, "--json").json

    @property
    def out(self) -> list[str]:
        open_ = self.farm.do("rotation", "list", "-e", self.name, "--json").json["open"]
        return [bracket["machine"] for bracket in open_]


def _waiting(what: str, go: Path, diary: Path) -> str:
    """A script that begins, waits for the file `go` (with a child in a session of its own), and ends."""
    family = f"{diary.parent}/{what}-$MACHINE"
    return (
        f"#!/bin/sh\necho $MACHINE {what} begins $DEPLOYMENT >> {diary}\n"
        f"[ -e {go} ] || {{ setsid sleep 600 & echo $! $$ > {family}; }}\n"
        f"until [ -e {go} ]; do sleep 0.02; done\n[ ! -e {family} ] || kill $!\n"
        f"echo $MACHINE {what} ends $DEPLOYMENT >> {diary}\n"
    )


def turn(machine: str) -> list[str]:
    """The whole of a turn that went well."""
    return [
        *(f"{machine} {what} {end}" for what in ("before", "configure") for end in ("begins", "ends")),
        f"{machine} after deployed",
    ]


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    with Farm(tmp_path_factory.mktemp("interrupted")) as farm:
        farm.add_relay("fra")
        for name in ("web1", "web2"):
            farm.add_agent(name).start()
        farm.add_package("Acme.Web", "1.0.0", {"version.txt": "1.0.0\n"})
        yield farm


@pytest.fixture
def world(farm: Farm) -> World:
    return World(farm)


# --- killed


def test_scenario_21_after_kill_9_the_same_deploy_goes_on_and_the_script_that_runs_is_taken_up(world: World) -> None:
    world.set_up("killed")
    engine = world.begin()
    world.until("web1 configure begins")
    engine.kill()

    status = world.status
    first = status["summary"]["deployment"]
    assert status["summary"]["state"] == "interrupted"
    assert [bracket["machine"] for bracket in status["brackets"]] == ["web1"]
    assert [machine["name"] for machine in status["machines"] if machine["stage"] == "in flight"] == ["web1"]
    told = world.farm.do("release", "status", "-e", "killed").out
    assert "interrupted" in told
    assert "web1 is out of web since" in told
    assert "opened by killed" in told

    # The script still runs on web1. Who goes on waits for it there.
    heir = world.deploy()
    world.until("web1 before ends", 2)
    world.go()
    done = heir.result()
    assert done.code == 0, done.out + done.err
    assert "did not end: it goes on" in done.out
    assert "web1 was at" in done.out, "what it found is said"
    assert world.lines.count("web1 configure begins") == world.lines.count("web1 configure ends") == 1
    assert world.lines[-6:] == [*turn("web2"), "vpn closed"]
    assert world.lines.count("vpn open") == world.lines.count("vpn closed") == 1
    assert set(world.deployments("web1 after deployed")) == {first}

    assert world.out == []
    states = {
        each["deployment"]: each["state"]
        for each in world.farm.do("release", "history", "-e", "killed", "--json").json["deployments"]
    }
    assert states == {first: "succeeded"}
    again = world.deploy().result()
    assert again.code == 0, "a lock or a bracket remained: " + again.err


def test_what_ended_while_nobody_watched_is_told_and_not_done_again(world: World) -> None:
    world.set_up("unwatched")
    engine = world.begin()
    world.until("web1 configure begins")
    engine.send_signal(signal.SIGHUP)
    left = engine.result()
    assert "release resume" in left.err, "a terminal that closes says how to go on"
    world.go()
    world.until("web1 configure ends")
    done = world.farm.call("release", "resume", "-e", "unwatched")
    assert done.code == 0, done.out + done.err
    assert "web1: configure ended with 0 while nobody watched; going on with verify" in done.out
    assert world.lines.count("web1 configure begins") == 1


@pytest.mark.parametrize("by", ["resume", "deploy"])
def test_scenario_24_what_was_edited_between_crash_and_resume_is_named_and_does_not_count(
    world: World, by: str
) -> None:
    name = f"edited-{by}"
    world.set_up(name)
    engine = world.begin()
    world.until("web1 configure begins")
    engine.kill()
    world.go()
    project = world.farm.project
    for path in (project / "release.yaml", project / "environments" / f"{name}.yaml"):
        path.write_text(
            path.read_text().replace("strategy: rolling", "strategy: parallel").replace("timeout: 60s", "timeout: 50s")
        )
    (project / "deploy/configure.sh").write_text("#!/bin/sh\nexit 1\n")
    (project / "environments/lb/after.sh").write_text("#!/bin/sh\nexit 1\n")
    again = ("resume",) if by == "resume" else ("deploy", name, "--package", "web=1.0.0")
    done = world.farm.call("release", *again, "-e", name)
    assert done.code == 0, done.out + done.err
    told = [line.partition(" s  ")[2] for line in done.out.splitlines() if "what was frozen counts" in line]
    assert [line.partition(":")[0] for line in told] == [
        f"release.yaml is not what {name} was made of",
        f"deploy/configure.sh is not what {name} was made of",
        f"environments/{name}.yaml has changed since, in rotation web",
    ]
    frozen_ran = [line for line in world.lines if " before " not in line]
    assert frozen_ran == [*OPENED, *turn("web1")[2:], *turn("web2")[2:], "vpn closed"]


def test_what_lies_elsewhere_or_cannot_be_read_any_more_keeps_nobody_from_going_on(world: World) -> None:
    world.set_up("mistaken")
    engine = world.begin()
    world.until("web1 configure begins")
    engine.kill()
    for number, spoil in enumerate(("release.yaml", "environments/mistaken.yaml")):
        path = world.farm.project / spoil
        path.write_text("machines: [\n")
        engine = world.farm.start("release", "resume", "-e", "mistaken")
        wait_for(lambda n=number: world.lines.count("web1 before ends") == n + 2, seconds=SECONDS)
        assert f"{spoil} " in engine.out
        assert engine.out.count("what was frozen counts") == number + 1
        engine.kill()
    world.go()
    done = world.farm.call("release", "resume", "-e", "mistaken", cwd=world.folder)
    assert done.code == 0, done.out + done.err
    assert "frozen" not in done.out, "nothing is compared where there is no such process"


def test_another_release_is_refused_while_one_is_unfinished_and_cancel_lets_it_end(world: World) -> None:
    world.set_up("unfinished")
    world.farm.do("release", "create", "other", "--package", "web=1.0.0")
    engine = world.begin()
    world.until("web1 configure begins")
    engine.kill()
    refused = world.farm.call("release", "deploy", "other", "-e", "unfinished")
    assert refused.code == 1
    assert "release resume" in refused.err
    assert "release cancel" in refused.err
    newer = world.farm.call("release", "deploy", "unfinished", "-e", "unfinished", "--package", "web=1.0.1")
    assert newer.code != 0, "with another version it is another release, not this one that goes on"
    world.farm.do("release", "cancel", "-e", "unfinished")
    world.go()
    ended = world.farm.call("release", "resume", "-e", "unfinished")
    assert ended.code == 130, ended.out + ended.err
    assert world.lines.count("web1 configure begins") == 1
    assert [line for line in world.lines if line.startswith("web2")] == [], "nothing new starts"
    assert world.lines[-2:] == ["web1 after deployed", "vpn closed"]
    assert world.out == []
    nothing = world.farm.call("release", "resume", "-e", "unfinished")
    assert nothing.code != 0
    assert "has ended" in nothing.err


def test_a_machine_in_flight_comes_to_its_end_after_a_resume_in_a_pause_and_nothing_new_starts(world: World) -> None:
    world.set_up("paused")
    engine = world.begin()
    world.until("web1 configure begins")
    engine.kill()
    world.farm.do("release", "pause", "-e", "paused", "-m", "the network is being changed")
    world.go()
    heir = world.farm.start("release", "resume", "-e", "paused")
    world.until("web1 after deployed")
    wait_for(lambda: "lets it go on" in heir.out)
    assert [line for line in world.lines if line.startswith("web2")] == []
    assert world.out == []
    world.farm.do("release", "go-on", "-e", "paused")
    done = heir.result()
    assert done.code == 0, done.out + done.err
    assert world.lines[-6:] == [*turn("web2"), "vpn closed"]


def test_closing_a_machine_waits_for_the_before_that_a_killed_engine_left_running(world: World) -> None:
    world.set_up("orphan")
    (world.folder / "go-before").unlink()
    engine = world.begin()
    world.until("web1 before begins")
    engine.kill()

    closing = world.farm.start("rotation", "close", "web1", "-e", "orphan", "--force", "-m", "nothing was there before")
    with pytest.raises(subprocess.TimeoutExpired):  # time enough for one that does not wait
        closing.wait(2.0)
    (world.folder / "go-before").touch()
    done = closing.result()
    assert done.code == 0, done.err
    assert world.lines == [*OPENED, "web1 before begins", "web1 before ends", "web1 after put_back"]
    assert world.out == []


def test_resume_takes_up_the_before_that_a_killed_engine_left_running(world: World) -> None:
    world.set_up("heir")
    (world.folder / "go-before").unlink()
    world.go()
    engine = world.begin()
    world.until("web1 before begins")
    engine.kill()

    heir = world.farm.start("release", "resume", "-e", "heir")
    with pytest.raises(subprocess.TimeoutExpired):  # time enough for one that does not wait
        heir.wait(2.0)
    (world.folder / "go-before").touch()
    done = heir.result()
    assert done.code == 0, done.out + done.err
    assert world.lines == [*OPENED, *turn("web1"), *turn("web2"), "vpn closed"]


# --- twice at once


def test_scenario_28_of_two_deployments_at_once_exactly_one_runs_and_whoever_else_comes_hears_who_holds(
    world: World,
) -> None:
    world.set_up("twice")
    world.farm.do("release", "create", "twice", "--package", "web=1.0.0")
    both = [world.deploy(), world.deploy()]
    wait_for(lambda: any(not each.is_alive for each in both), seconds=SECONDS)
    [loser] = [each for each in both if not each.is_alive]
    [winner] = [each for each in both if each is not loser]
    lost = loser.result()
    world.until("web1 configure begins")
    adopting = world.deploy("--adopt").result()
    closing = world.farm.call("rotation", "close", "web1", "-e", "twice")
    for refused in (lost, adopting, closing):
        assert refused.code == 4, refused.err
        assert f"(pid {winner.pid})" in refused.err
        assert "deploy twice" in refused.err

    world.go()
    done = winner.result()
    assert done.code == 0, done.err
    assert world.lines == [*OPENED, *turn("web1"), *turn("web2"), "vpn closed"]


# --- cancelled


def _interrupt(engine: Process) -> str:
    """Ctrl-C, and what is said of it at once."""
    engine.send_signal(signal.SIGINT)
    wait_for(lambda: "\n" in engine.err)
    return engine.err


def test_scenario_30_ctrl_c_lets_the_machine_in_flight_come_to_its_end_and_starts_no_other(world: World) -> None:
    world.set_up("cancelled")
    engine = world.begin()
    world.until("web1 configure begins")
    assert "come to their end" in _interrupt(engine)
    world.go()
    done = engine.result()
    assert done.code == 130, done.out + done.err
    assert world.lines == [*OPENED, *turn("web1"), "vpn closed"]
    summary = world.status["summary"]
    assert summary["state"] == "cancelled"
    assert summary["reason"].count("cancelled by") == 1
    assert world.out == []


def test_scenario_30_ctrl_c_twice_leaves_at_once_and_says_what_is_open(world: World) -> None:
    world.set_up("left")
    engine = world.begin()
    world.until("web1 configure begins")
    assert "once more leaves now" in _interrupt(engine)
    engine.send_signal(signal.SIGINT)
    done = engine.result()  # the script still waits: who waited for it would hang here
    assert done.code == 130, done.out + done.err
    assert "web1 configure ends" not in world.lines
    assert "still out of their rotation: web1" in done.out + done.err
    assert "not undone: open vpn" in done.out + done.err
    assert world.status["summary"]["state"] == "interrupted"
    assert world.out == ["web1"]

    world.go()
    world.until("web1 configure ends")
    closed = world.farm.call("rotation", "close", "web1", "-e", "left")
    assert closed.code == 0, closed.err
    assert world.lines[-1] == "web1 after put_back"


def test_scenarios_10_and_30_ctrl_c_before_acquisition_undoes_what_was_opened_and_opens_nothing_more(
    world: World,
) -> None:
    folder = world.farm.folder / "early"
    waits = f"echo vpn opens >> {folder}/diary; until [ -e {folder}/go ]; do sleep 0.02; done"
    world.set_up("early", opening=waits)
    engine = world.begin()
    world.until("vpn opens")
    _interrupt(engine)
    world.go()
    assert engine.result().code == 130
    assert world.lines == ["vpn opens", "vpn open", "vpn closed"]
    assert not (world.folder / "srv").exists()


def test_scenario_30_a_cancel_during_before_lets_that_machine_come_to_its_end(world: World) -> None:
    world.set_up("while-out")
    (world.folder / "go-before").unlink()
    world.go()
    engine = world.begin()
    world.until("web1 before begins")
    world.cancel("-m", "wrong version")
    wait_for(lambda: "decided: cancel" in engine.out)
    (world.folder / "go-before").touch()
    done = engine.result()
    assert done.code == 130, done.out + done.err
    assert world.lines == [*OPENED, *turn("web1"), "vpn closed"]
    assert world.status["summary"]["state"] == "cancelled"
    assert world.out == []


def test_scenario_30_cancel_now_kills_before_with_its_children_and_puts_the_machine_back(world: World) -> None:
    world.set_up("now-while-out")
    (world.folder / "go-before").unlink()
    engine = world.begin()
    world.until("web1 before begins")
    wait_for((world.folder / "before-web1").exists)
    assert len(world.family("before", "web1")) == 2
    world.cancel("--now")
    done = engine.result()
    assert done.code == 130, done.out + done.err
    assert world.family("before", "web1") == []
    assert world.lines == [*OPENED, "web1 before begins", "web1 after not_started", "vpn closed"]
    assert world.status["summary"]["state"] == "cancelled"
    assert world.out == []


def test_scenario_30_cancel_now_kills_the_script_on_a_machine_with_its_children_and_lists_the_machine(
    world: World,
) -> None:
    world.set_up("now")
    engine = world.begin()
    world.until("web1 configure begins")
    wait_for((world.folder / "configure-web1").exists)
    assert len(world.family("configure", "web1")) == 2
    world.cancel("--now")
    done = engine.result()
    assert done.code == 130, done.out + done.err
    assert world.family("configure", "web1") == []
    assert "web1 configure ends" not in world.lines
    assert world.lines[-1] == "vpn closed"
    assert [line for line in world.lines if line.startswith("web2")] == []
    # It was switched, and nobody knows how far its script came.
    assert world.out == ["web1"]
    assert "still out: web1" in done.err
    assert world.status["summary"]["state"] == "cancelled"


def test_scenario_30_a_cancel_at_a_gate_ends_it_there(world: World) -> None:
    gate = {"name": "look", "ask": "Is it good?"}
    world.set_up("gated", strategy={"rolling": {"phases": [{"machines": 1, "gate": gate}, {"window": 1}]}})
    world.go()
    engine = world.begin()
    wait_for(lambda: "'look' waits for" in engine.out or not engine.is_alive)
    world.cancel()
    done = engine.result()
    assert done.code == 130, done.out + done.err
    assert world.lines == [*OPENED, *turn("web1"), "vpn closed"]
    assert world.status["summary"]["state"] == "cancelled"
    assert world.out == []


# --- paused


def test_a_pause_lets_nothing_new_start_until_a_person_lets_it_go_on(world: World) -> None:
    world.set_up("resting")
    engine = world.begin()
    world.until("web1 configure begins")
    world.farm.do("release", "pause", "-e", "resting", "-m", "the network is being changed")
    wait_for(lambda: "decided: pause" in engine.out or not engine.is_alive)
    world.go()
    wait_for(lambda: "paused: the network is being changed" in engine.out or not engine.is_alive)
    assert world.lines == [*OPENED, *turn("web1")], "what was in flight came to its end, and nothing else began"
    assert "the network is being changed" in world.farm.do("release", "status", "-e", "resting").out
    engine.kill()

    # Nobody looks, and it stays paused.
    heir = world.farm.call("release", "resume", "-e", "resting", "--no-wait")
    assert heir.code == 3, heir.out + heir.err
    assert world.lines == [*OPENED, *turn("web1")]
    world.farm.do("release", "go-on", "-e", "resting")
    done = world.farm.call("release", "resume", "-e", "resting")
    assert done.code == 0, done.out + done.err
    assert world.lines == [*OPENED, *turn("web1"), *turn("web2"), "vpn closed"]


# --- what it prints


def test_scenario_33_a_secret_is_masked_in_the_log_while_its_script_still_runs(world: World) -> None:
    password, key = "corréct-horse/9", "-----BEGIN-----\nMIIBVgIBADANBgxy\nkqhkiG9w0BAQEFzz\n-----END-----"
    for name, value in (("password", password), ("app_key", key), ("pin", "123")):
        file = world.farm.folder / name
        file.touch(mode=0o600)
        file.write_text(value)
    world.set_up("short", secrets={"pin": {"available_to": ["web"]}})
    refused = world.begin().result()
    assert refused.code in {1, 2}
    assert "pin" in refused.err
    assert world.lines == [], "three characters cannot be masked"

    world.set_up("masked", secrets={name: {"available_to": ["web"]} for name in ("password", "app_key")})
    world.farm.write_script(
        "deploy/configure.sh",
        f"""#!{sys.executable}
import base64, os, pathlib, sys, time
password, key = os.environ["SECRET_PASSWORD"], os.environ["SECRET_APP_KEY"]
def say(text):
    sys.stdout.write(text)
    sys.stdout.flush()
say("whole " + password + "\\n")
say("split " + password[:6])
time.sleep(0.2)
say(password[6:] + "\\n")
say("base64 " + base64.b64encode(password.encode()).decode() + "\\n")
say(key + "\\n")
say("the last: " + password)
while not pathlib.Path({str(world.folder / "go")!r}).exists():
    time.sleep(0.02)
say(" and then its end")
""",
    )
    engine = world.begin()

    def log() -> str:
        return world.farm.call("release", "log", "web1", "-e", "masked").out

    wait_for(lambda: "the last: ********" in log() or not engine.is_alive)
    assert engine.is_alive, f"what is seen was seen while it ran: {engine.out}{engine.err}"
    world.go()
    done = engine.result()
    assert done.code == 0, done.out + done.err
    told = log()
    for shown in ("whole ********", "split ********", "base64 ****", "the last: ******** and then its end"):
        assert shown in told, told
    kept = b"".join(path.read_bytes() for path in (world.farm.home / "deployments").rglob("*.log"))
    for form in (password, password[:6], base64.b64encode(password.encode()).decode()[:12], *key.split("\n")[1:3]):
        assert form not in told + done.out + done.err
        assert form.encode() not in kept


# --- another machine under a known name


def test_scenario_38_a_machine_that_was_made_anew_under_its_name_is_not_accepted_silently(world: World) -> None:
    known = world.farm.add_agent("web9")
    world.set_up("reimaged")
    world.go()
    home = world.farm.folder / "reimaged-home"
    relay = ("--relay", world.farm.urls["fra"], "--trust", world.farm.home / "trust" / "trust.json", "--json")
    made = world.farm.do("agent", "init", "--home", home, "--name", "web9", "--site", "fra", *relay).json
    with Process(home, "agent", "serve", "--home", home) as stranger:
        wait_for(lambda: " ready at " in stranger.out + stranger.err or not stranger.is_alive)
        try:
            refused = world.begin().result()
        finally:
            stranger.stop()
            world.farm.agents.pop("web9")
    assert refused.code == 1, refused.out + refused.err
    told = refused.out + refused.err
    assert f"web9: it has the key {made['fingerprint']}" in told, "the fingerprint that was presented"
    assert known.key in told, "the one that was expected"
    assert "web1 before begins" not in world.lines


# --- too late


def test_after_its_deadline_nothing_starts_any_more_and_everything_is_undone(world: World) -> None:
    world.set_up("late", deadline="5s")
    engine = world.begin()
    world.until("web1 configure begins")
    with pytest.raises(subprocess.TimeoutExpired):  # it is over by then, as it ran before
        engine.wait(5.2)
    world.go()
    done = engine.result()
    assert done.code == 1, done.out + done.err
    assert "deadline" in world.status["summary"]["reason"]
    assert world.lines == [*OPENED, *turn("web1"), "vpn closed"]
    assert not os.path.exists(world.folder / "srv/web2/current")
