"""Each kind of order on a real machine's folders: what it does, and what it refuses before anything ran."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from harness.orders_kit import DEPLOYMENT, Desk, desk_in, tree
from harness.origins import Origin, depot_with
from harness.packages import make_nupkg, noise
from harness.relays import Relay, running_relay

from agent import platform
from agent.config import AgentConfig
from agent.operations import Ended, Job, Operations
from agent.orders.orders import (
    Acquire,
    AcquireFacts,
    Action,
    CommandCheck,
    ControlService,
    PackageTree,
    RunScript,
    Settle,
    Survey,
    SurveyFacts,
    Switch,
    SwitchFacts,
    TimedCheck,
    Verify,
)
from agent.trees.installed import AgentState

WEB = {"bin/app": b"one", "data.bin": noise("web", 300_000)}
NEWER = {**WEB, "bin/app": b"two"}
SCRIPTS = {
    "deploy/env.sh": b'#!/bin/sh\nenv | sort > "$VAR_OUT"\npwd >> "$VAR_OUT"\n',
    "deploy/plain": b"echo no shebang\n",
    "check.sh": b'#!/bin/sh\ntest "$(pwd)" = "$1" && exit 0\necho "not $1 with $VERSION"\nexit 1\n',
    "count.sh": b'#!/bin/sh\necho run >> "$VAR_OUT"\n',
}


@dataclass
class Machine:
    folder: Path
    desk: Desk
    origin: Origin
    relay: Relay
    config: AgentConfig = field(default_factory=lambda: AgentConfig(name="web1"))
    progress: list[tuple[int, int]] = field(default_factory=list)
    count: int = 0

    @property
    def root(self) -> str:
        return str(self.folder / "srv")

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def state(self) -> AgentState:
        return AgentState(self.desk.home)

    def manifest(self, index: int) -> str:
        return self.origin.added[index].manifest.id

    @property
    def operations(self) -> Operations:
        return Operations(self.state, self.config, lambda: self.desk.pins, self.desk.sealing_key())

    async def perform(self, action: Action, *, barred: str = "", folder: Path | None = None) -> Ended:
        self.count += 1
        made = self.desk.order(action, f"x{self.count}", relays=(self.relay.url,))
        folder = folder or self.folder / "operations" / str(self.count)
        folder.mkdir(parents=True, exist_ok=True)
        job = Job(made, str(folder), lambda *_: None, lambda *told: self.progress.append(told), barred)
        return await self.operations.perform(job)

    def web(self, version: str = "1.0.0", label: str = "v1") -> PackageTree:
        return tree(self.manifest(0 if version == "1.0.0" else 1), self.root, version=version, label=label)

    @property
    def scripts(self) -> PackageTree:
        return tree(self.manifest(2), id="Acme.Scripts", label="scripts")

    async def acquired(self, *trees: PackageTree) -> AcquireFacts:
        ended = await self.perform(Acquire(trees or (self.web(), self.scripts), deadline=30.0))
        assert ended.state == "done", ended.reason
        assert isinstance(ended.facts, AcquireFacts)
        return ended.facts

    async def surveyed(self, *trees: PackageTree) -> SurveyFacts:
        ended = await self.perform(Survey(trees))
        assert isinstance(ended.facts, SurveyFacts)
        return ended.facts

    def script(self, path: str, **changes) -> RunScript:
        return msgspec.structs.replace(RunScript(self.manifest(2), path, {"VAR_OUT": str(self.out)}), **changes)


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    nupkgs = [
        make_nupkg(tmp_path, WEB),
        make_nupkg(tmp_path, NEWER, version="1.1.0"),
        make_nupkg(tmp_path, SCRIPTS, id="Acme.Scripts"),
    ]
    async with (
        depot_with(tmp_path / "origin", *nupkgs) as origin,
        running_relay(tmp_path / "origin" / "depot") as relay,
    ):
        yield Machine(tmp_path, desk_in(tmp_path, keys=origin.keys), origin, relay)


# --- acquire


async def test_trees_are_pulled_to_their_roots_under_their_labels(machine: Machine) -> None:
    web, scripts = (await machine.acquired()).trees

    assert os.path.dirname(web.path) == os.path.join(machine.root, "releases")
    assert os.path.basename(web.path).startswith("v1-")
    assert os.path.dirname(scripts.path) == os.path.join(machine.desk.home, "scripts", "releases")
    assert Path(web.path, "bin/app").read_bytes() == b"one"
    assert not web.already
    assert sum(web.from_relays.values()) > 0
    assert machine.progress
    assert machine.progress[-1][0] == machine.progress[-1][1]


async def test_the_same_again_asks_nobody(machine: Machine) -> None:
    first = await machine.acquired()
    machine.relay = Relay("http://127.0.0.1:1", 1, "")

    again = await machine.acquired()

    assert [each.already for each in again.trees] == [True, True]
    assert [each.path for each in again.trees] == [each.path for each in first.trees]


async def test_a_tree_that_lost_a_file_is_pulled_anew(machine: Machine) -> None:
    [first, _] = (await machine.acquired()).trees
    os.unlink(os.path.join(first.path, "bin/app"))

    [again] = (await machine.acquired(machine.web())).trees

    assert not again.already
    assert Path(again.path, "bin/app").read_bytes() == b"one"


async def test_a_package_that_no_pinned_key_signed_is_not_acquired(machine: Machine, tmp_path: Path) -> None:
    other = desk_in(tmp_path / "other")
    machine.desk.keys = other.keys

    ended = await machine.perform(Acquire((machine.web(),), deadline=30.0))

    assert ended.state == "failed"
    assert "signed" in ended.reason
    assert machine.state.trees() == []


async def test_what_was_pulled_without_a_signature_does_not_count_as_acquired(machine: Machine) -> None:
    await machine.acquired(machine.web())
    shutil.rmtree(os.path.join(machine.desk.home, "signatures"))

    [again] = (await machine.acquired(machine.web())).trees

    assert again.already
    assert machine.state.signature(machine.manifest(0)), "asked for, checked and kept"


async def test_a_manifest_of_another_package_is_not_acquired(machine: Machine) -> None:
    wrong = tree(machine.manifest(1), machine.root, version="1.0.0")

    ended = await machine.perform(Acquire((wrong,), deadline=30.0))

    assert ended.state == "failed"
    assert machine.state.trees() == []


async def test_the_deadline_ends_an_acquisition_and_says_so(machine: Machine) -> None:
    ended = await machine.perform(Acquire((machine.web(),), deadline=0.0))

    assert (ended.state, "not acquired within 0 s" in ended.reason) == ("failed", True)


async def test_too_little_room_is_told_before_a_byte_moves(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "free_bytes", lambda _: 1000)

    ended = await machine.perform(Acquire((machine.web(),), deadline=30.0))

    assert ended.state == "failed"
    assert "are free" in ended.reason
    assert machine.progress == []


# --- roots


@pytest.mark.parametrize("kind", ["relative", "outside", "dotted", "link"])
async def test_a_root_that_this_machine_does_not_allow_is_refused(machine: Machine, kind: str) -> None:
    allowed = machine.folder / "allowed"
    allowed.mkdir()
    (allowed / "link").symlink_to(machine.folder)
    machine.config = AgentConfig(name="web1", roots=(str(allowed),))
    root = {
        "relative": "srv",
        "outside": machine.root,
        "dotted": str(allowed / ".." / "srv"),
        "link": str(allowed / "link" / "srv"),
    }[kind]
    wanted = tree(machine.manifest(0), root)

    for action in (
        Acquire((wanted,), deadline=30.0),
        Survey((wanted,)),
        Switch(root, machine.manifest(0)),
        Settle(root, machine.manifest(0), "0" * 64),
    ):
        assert (await machine.perform(action)).state == "refused"

    assert machine.state.trees() == []
    assert not os.path.exists(os.path.join(root, "releases"))


async def test_an_allowed_root_is_used(machine: Machine) -> None:
    machine.config = AgentConfig(name="web1", roots=(str(machine.folder),))

    await machine.acquired()


# --- survey, switch, settle


async def test_a_survey_says_what_is_there_and_changes_nothing(machine: Machine) -> None:
    before = await machine.surveyed(machine.web())
    assert not os.path.exists(machine.root)
    [web, _] = (await machine.acquired()).trees
    await machine.perform(Switch(machine.root, machine.manifest(0)))

    after = await machine.surveyed(machine.web(), machine.web("1.1.0"))

    assert (before.trees[0].installed, before.trees[0].current_path, before.trees[0].settled) == (False, "", "")
    assert before.trees[0].free_bytes > 0
    assert [facts.installed for facts in after.trees] == [True, False]
    assert {facts.current_path for facts in after.trees} == {web.path}
    assert after.trees[1].current_version == "1.0.0"
    assert after.trees[0].file_system == after.trees[1].file_system != ""


async def test_switching_names_both_trees_and_is_safe_to_repeat(machine: Machine) -> None:
    [old] = (await machine.acquired(machine.web())).trees
    [new] = (await machine.acquired(machine.web("1.1.0", "v2"))).trees

    first = await machine.perform(Switch(machine.root, machine.manifest(0)))
    second = await machine.perform(Switch(machine.root, machine.manifest(1)))
    again = await machine.perform(Switch(machine.root, machine.manifest(1)))

    assert first.facts == SwitchFacts("", old.path)
    assert second.facts == SwitchFacts(old.path, new.path)
    assert again.facts == SwitchFacts(new.path, new.path)
    assert Path(machine.root, "current", "bin/app").read_bytes() == b"two"


async def test_what_is_not_installed_or_not_whole_is_not_switched_to(machine: Machine) -> None:
    assert (await machine.perform(Switch(machine.root, machine.manifest(0)))).state == "refused"
    [web] = (await machine.acquired(machine.web())).trees
    os.unlink(os.path.join(web.path, "data.bin"))

    ended = await machine.perform(Switch(machine.root, machine.manifest(0)))

    assert ended.state == "failed"
    assert "not whole" in ended.reason
    assert not os.path.lexists(os.path.join(machine.root, "current"))


def edit(path: str, name: str) -> None:
    """As long as before, and with the times of before."""
    file = Path(path, name)
    before = file.stat()
    file.write_bytes(b"X" * before.st_size)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


async def test_a_tree_that_was_edited_since_it_was_acquired_is_not_switched_to(machine: Machine) -> None:
    [web] = (await machine.acquired(machine.web())).trees
    edit(web.path, "bin/app")

    ended = await machine.perform(Switch(machine.root, machine.manifest(0)))

    assert ended.state == "failed"
    assert "bin/app: other content" in ended.reason
    assert platform.current_target(machine.root) is None


async def test_an_edited_tree_is_neither_installed_nor_settled(machine: Machine) -> None:
    [web] = (await machine.acquired(machine.web())).trees
    await machine.perform(Switch(machine.root, machine.manifest(0)))
    await machine.perform(Settle(machine.root, machine.manifest(0), "1" * 64))
    [facts] = (await machine.surveyed(machine.web())).trees
    assert (facts.installed, facts.settled) == (True, "1" * 64)

    edit(web.path, "bin/app")

    [facts] = (await machine.surveyed(machine.web())).trees
    assert (facts.installed, facts.settled, facts.current_path) == (False, "", web.path)
    [again] = (await machine.acquired(machine.web())).trees
    [facts] = (await machine.surveyed(machine.web())).trees
    assert (facts.installed, facts.settled, facts.current_path) == (True, "", web.path), "the edited one is current"
    assert again.path != web.path


async def test_what_a_damaged_tree_replaced_stays_what_is_gone_back_to(machine: Machine) -> None:
    paths = []
    for index, version in enumerate(("1.0.0", "1.1.0", "1.1.0")):
        [made] = (await machine.acquired(machine.web(version))).trees
        paths.append(made.path)
        await machine.perform(Switch(machine.root, machine.manifest(min(index, 1))))
        await machine.perform(Settle(machine.root, machine.manifest(min(index, 1)), f"{index}" * 64, keep=5))
        if index == 1:
            edit(made.path, "bin/app")

    settled = machine.state.settled(machine.root)

    assert settled is not None
    assert (settled.path, settled.before) == (paths[2], paths[0])
    assert [os.path.exists(path) for path in paths] == [True, False, True]


async def test_a_script_beside_which_something_was_changed_does_not_run(machine: Machine) -> None:
    _, scripts = (await machine.acquired()).trees
    edit(scripts.path, "check.sh")

    ended = await machine.perform(machine.script("count.sh"))

    assert ended.state == "refused"
    assert "check.sh: other content" in ended.reason
    assert not machine.out.exists()


async def test_settling_remembers_what_is_good_and_keeps_current_last_good_and_the_newest(machine: Machine) -> None:
    """Two packages take turns, so every settling has another tree that was good before."""
    paths = []
    for turn in range(4):
        index, version = turn % 2, ("1.0.0", "1.1.0")[turn % 2]
        if turn >= 2:
            # The tree of this package that is there is made unfit, so that another one is built beside it.
            record = machine.state.installed(machine.root, machine.manifest(index))
            assert record is not None
            os.unlink(os.path.join(record.path, "bin/app"))
        [made] = (await machine.acquired(machine.web(version, f"v{turn}"))).trees
        paths.append(made.path)
        await machine.perform(Switch(machine.root, machine.manifest(index)))
        ended = await machine.perform(Settle(machine.root, machine.manifest(index), f"{turn}" * 64, keep=1))
        assert ended.state == "done", ended.reason

    assert [os.path.exists(path) for path in paths] == [False, False, True, True]
    assert sorted(os.listdir(os.path.join(machine.root, "releases"))) == sorted(map(os.path.basename, paths[2:]))
    [facts] = (await machine.surveyed(machine.web("1.1.0"))).trees
    assert facts.settled == "3" * 64
    await machine.perform(Switch(machine.root, machine.manifest(0)))
    [facts] = (await machine.surveyed(machine.web())).trees
    assert facts.settled == "", "another tree is current than the one that was settled"


async def test_only_the_current_tree_can_be_settled(machine: Machine) -> None:
    await machine.acquired(machine.web())

    ended = await machine.perform(Settle(machine.root, machine.manifest(0), "0" * 64))

    assert ended.state == "failed"
    assert machine.state.settled(machine.root) is None


# --- scripts


async def test_a_script_sees_its_variables_and_the_base_and_nothing_else(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAYSTATION_TOKEN", "of the agent")
    await machine.acquired()

    ended = await machine.perform(machine.script("deploy/env.sh", root=machine.root))

    *lines, cwd = machine.out.read_text().splitlines()
    seen = dict(line.split("=", 1) for line in lines)
    assert ended.state == "done", ended.reason
    assert seen["WAYSTATION_OPERATION"].startswith(f"{DEPLOYMENT}/")
    assert seen["VAR_OUT"] == str(machine.out)
    assert "WAYSTATION_TOKEN" not in seen
    assert cwd == machine.root


async def test_without_a_root_it_starts_in_a_folder_of_its_own(machine: Machine) -> None:
    await machine.acquired()

    await machine.perform(machine.script("deploy/env.sh", root=str(machine.folder / "not there yet")))

    assert machine.out.read_text().splitlines()[-1].startswith(str(machine.folder / "operations"))


@pytest.mark.parametrize("how", ["edited", "link", "removed"])
async def test_a_script_that_is_not_as_it_was_signed_does_not_run(machine: Machine, how: str) -> None:
    _, scripts = (await machine.acquired()).trees
    path = Path(scripts.path, "count.sh")
    text = path.read_bytes()
    path.unlink()
    if how == "edited":
        path.write_bytes(text.replace(b"run", b"RUN"))
    elif how == "link":
        (machine.folder / "elsewhere").write_bytes(text)
        path.symlink_to(machine.folder / "elsewhere")

    ended = await machine.perform(machine.script("count.sh"))

    assert ended.state == "refused"
    assert not machine.out.exists()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"path": "nothing.sh"}, "holds no"),
        ({"path": "../../../../bin/sh"}, "holds no"),
        ({"path": "Acme.Scripts.nuspec"}, ""),
        ({"package": "0" * 64}, "not installed"),
        ({"path": "deploy/plain"}, "first line"),
        ({"variables": {"A=B": "x"}}, "illegal environment variable name"),
        ({"variables": {"VAR_A": "x\0y"}}, "null"),
        ({"secrets": {"SECRET_A": b"not sealed"}}, "cannot be opened"),
        ({"root": "relative"}, "absolute"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_script_that_cannot_be_run_as_asked_never_runs(machine: Machine, changes: dict, why: str) -> None:
    await machine.acquired()
    action = machine.script("count.sh")

    ended = await machine.perform(msgspec.structs.replace(action, **changes))

    assert ended.state == "refused"
    assert why in ended.reason
    assert not machine.out.exists()


async def test_a_script_of_a_package_that_nobody_vouches_for_does_not_run(machine: Machine) -> None:
    await machine.acquired()
    shutil.rmtree(os.path.join(machine.desk.home, "signatures"))

    ended = await machine.perform(machine.script("count.sh"))

    assert ended.state == "refused"
    assert "signed" in ended.reason
    assert not machine.out.exists()


async def test_scenario_33_a_secret_too_short_to_be_masked_is_refused(machine: Machine) -> None:
    await machine.acquired()
    machine.count = 41
    sealed = machine.desk.seal(f"{DEPLOYMENT}/0/web1/x42/1", {"SECRET_A": "abc"})

    ended = await machine.perform(machine.script("count.sh", secrets=sealed))

    assert ended.state == "refused"
    assert "SECRET_A" in ended.reason
    assert not machine.out.exists()


async def test_taken_up_again_it_is_collected_and_not_run_twice(machine: Machine) -> None:
    await machine.acquired()
    folder = machine.folder / "operations" / "one"
    first = await machine.perform(machine.script("count.sh"), folder=folder)
    shutil.rmtree(os.path.join(machine.desk.home, "scripts"))

    again = await machine.perform(machine.script("count.sh"), folder=folder, barred="its time was over")

    assert again == first
    assert machine.out.read_text() == "run\n"


@pytest.mark.parametrize("idempotent", [True, False])
async def test_an_unknown_outcome_is_repeated_only_where_the_step_allows_it(
    machine: Machine, *, idempotent: bool
) -> None:
    await machine.acquired()
    folder = machine.folder / "operations" / "one"
    (folder / "run-1").mkdir(parents=True)
    (folder / "run-1" / "begun").write_text("")

    ended = await machine.perform(machine.script("count.sh", idempotent=idempotent), folder=folder)

    assert ended.state == ("done" if idempotent else "unknown")
    assert machine.out.exists() is idempotent


async def test_what_never_began_does_not_begin_once_it_is_barred(machine: Machine) -> None:
    await machine.acquired()

    script = await machine.perform(machine.script("count.sh"), barred="its time was over")
    switch = await machine.perform(Switch(machine.root, machine.manifest(0)), barred="its time was over")

    assert (script.state, switch.state) == ("refused", "unknown")
    assert not machine.out.exists()
    assert not os.path.lexists(os.path.join(machine.root, "current"))


# --- services and health


async def test_a_service_that_does_not_start_is_a_failure_with_its_output(machine: Machine) -> None:
    manager = machine.folder / "sv"
    manager.write_text('#!/bin/sh\necho "cannot $1 $2"\nexit 5\n')
    manager.chmod(0o755)
    machine.config = AgentConfig(name="web1", service_command=(str(manager), "{action}", "{service}"))

    ended = await machine.perform(ControlService("webshop", "reload"))

    assert (ended.state, ended.exit_status) == ("failed", 5)
    assert ended.log_bytes > len("cannot reload webshop\n")


async def test_verify_says_what_each_check_said(machine: Machine) -> None:
    os.makedirs(machine.root)
    await machine.acquired()
    signed = machine.manifest(2)
    checks = (
        TimedCheck(CommandCheck(("check.sh", machine.root), signed), deadline=10.0),
        TimedCheck(CommandCheck(("check.sh", "elsewhere"), signed), deadline=0.3),
    )

    ended = await machine.perform(Verify(checks, root=machine.root, variables={"VERSION": "1.4.2"}))

    assert ended.state == "failed"
    assert ended.reason.count("exit status") == 1
    assert "(not elsewhere with 1.4.2)" in ended.reason
    assert len(ended.facts.checks) == 2


@pytest.mark.parametrize(
    ("package", "why"),
    [("", "not of a signed package"), ("0" * 64, "is not installed here"), ("web", "holds no 'check.sh'")],
)
async def test_a_check_runs_nothing_that_is_not_in_a_signed_package(machine: Machine, package: str, why: str) -> None:
    await machine.acquired()
    canary = machine.folder / "canary"
    named = machine.manifest(0) if package == "web" else package
    checks = (TimedCheck(CommandCheck(("check.sh" if named else "touch", str(canary)), named), deadline=5.0),)

    ended = await machine.perform(Verify(checks))

    assert ended.state == "refused"
    assert why in ended.reason
    assert not canary.exists()


async def test_a_mistake_of_ours_is_told_as_the_end(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(Operations, "survey", broken)

    ended = await machine.perform(Survey(()))

    assert (ended.state, ended.reason) == ("failed", "the agent failed: ZeroDivisionError: oops")
