"""What runs on the server: as it was planned, in the environment that is promised and no other, at most once, to its end."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from harness.logs import printed
from harness.process import eventually

from agent.orders.operation_id import OperationId
from agent.runs import runs
from agent.runs.scripts import base_environment
from orchestrator.deployment.server_runs import ServerRuns
from orchestrator.journal.events import Event, ServerRunDispatched, ServerRunEnded
from orchestrator.journal.recorder import Recorder
from orchestrator.plan.plan import FrozenFile, SecretSource, ServerRun
from orchestrator.releases.release import FileChangedError
from orchestrator.trust.secrets import SecretStore
from relay.errors import RefusedError

DEPLOYMENT = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
BEFORE = OperationId.of(DEPLOYMENT, 1, "web1", "before")
SECRET = "s3cr3t-of-the-balancer"


class Heard(Recorder):
    """A recorder that keeps what it hears here."""

    def __init__(self, runs: Path) -> None:
        self.deployment = DEPLOYMENT
        self.events: list[Event] = []
        self._runs = runs

    async def record(self, *events: Event) -> None:
        for event in events:
            if isinstance(event, ServerRunDispatched):
                # What is to be journaled must not have begun.
                name = event.operation.removeprefix(f"{DEPLOYMENT}/").replace("/", "~")
                assert not (self._runs / name / "begun").exists()
        self.events += events


@dataclass
class Server:
    """A deployment's own folder, a project with scripts, and what was recorded."""

    folder: Path
    project: Path

    def __post_init__(self) -> None:
        (self.project / "lb").mkdir(parents=True)
        token = self.project / "lb/token"
        token.write_text(SECRET + "\n")
        token.chmod(0o600)
        self.secrets = SecretStore({"lb-token": SecretSource(file=str(token))})
        self.heard = Heard(self.folder / "runs")
        self.runs = self.again()

    def again(self) -> ServerRuns:
        """As another process would have it."""
        return ServerRuns(str(self.folder), self.secrets, self.heard)

    def script(self, text: str, name: str = "out.sh") -> FrozenFile:
        path = self.project / "lb" / name
        path.write_text(textwrap.dedent(text))
        return FrozenFile(str(self.project), f"lb/{name}", hashlib.sha256(path.read_bytes()).hexdigest())

    async def run(self, text: str, operation: OperationId = BEFORE, extra=None, name: str = "out.sh", **more):
        script = self.script(text, name)
        self.runs.freeze([script])
        return await self.runs.run(ServerRun("take out", script, **more), operation, extra or {})

    def files(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}

    def kinds(self) -> list[tuple[str, str]]:
        events = self.heard.events
        return [(event.kind().rpartition("_")[2], event.operation.removeprefix(f"{DEPLOYMENT}/")) for event in events]

    @property
    def ended(self) -> list[ServerRunEnded]:
        return [event for event in self.heard.events if isinstance(event, ServerRunEnded)]


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path / "deployment", tmp_path / "project")


def log(result) -> str:
    return printed(Path(result.log_path).read_bytes()).decode()


def runner_of(folder: Path) -> int:
    """The process that has this folder as its last argument."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if os.fsencode(folder) in command:
                return int(entry.name)
    raise AssertionError(f"no runner works in {folder}")


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- what it sees


async def test_the_environment_is_what_is_promised_and_nothing_else(server: Server, monkeypatch) -> None:
    monkeypatch.setenv("OPERATORS_PASSWORD", "hunter2")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    run = ServerRun(
        "show", None, (("env", "-0"),), variables={"VAR_PORT": "8080", "MACHINE": "web1"}, secrets=("lb-token",)
    )
    result = await server.runs.run(run, BEFORE, {"OUTCOME": "deployed", "MACHINE": "web2"})
    assert result.ok
    seen = dict(line.split("=", 1) for line in log(result).split("\0") if line)
    assert re.fullmatch("[0-9a-f]{32}", seen.pop("WAYSTATION_RUN"))
    assert seen == {
        **base_environment(),
        "VAR_PORT": "8080",
        "MACHINE": "web2",
        "OUTCOME": "deployed",
        "DEPLOYMENT": DEPLOYMENT,
        "ATTEMPT": "1",
        "SECRET_LB_TOKEN": "********",
    }
    assert "OPERATORS_PASSWORD" not in seen
    assert "PATH" in seen


async def test_a_script_gets_its_secret_and_no_variable_takes_its_place(server: Server) -> None:
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    result = await server.run(
        '#!/bin/sh\nprintf %s "$SECRET_LB_TOKEN" | sha256sum\n',
        extra={"SECRET_LB_TOKEN": "not this"},
        secrets=("lb-token",),
    )
    assert log(result).split() == [digest, "-"]


async def test_a_secret_is_in_no_file_no_log_and_no_result(server: Server) -> None:
    result = await server.run(
        """\
        #!/bin/sh
        echo "the token is $SECRET_LB_TOKEN"
        printf %s "$SECRET_LB_TOKEN" | base64
        printf %s "$SECRET_LB_TOKEN" | cut -c1-9 | tr -d '\\n'; sleep 0.05; printf %s "$SECRET_LB_TOKEN" | cut -c10-
        echo "$SECRET_LB_TOKEN" >&2
        exit 3
        """,
        secrets=("lb-token",),
    )
    assert result.exit_status == 3
    assert log(result).count("********") >= 4
    assert SECRET not in repr(result) + repr(server.heard.events) + repr(server.runs) + repr(vars(server.runs))
    import base64

    forms = [SECRET.encode(), base64.b64encode(SECRET.encode()), SECRET.encode()[:20]]
    files = server.files()
    assert len(files) > 5
    assert [path for path, data in files.items() if any(each in data for each in forms)] == []
    assert not any(path.endswith("/token") for path in files), "the secret's file beside the script was copied"


async def test_nobody_else_may_look_into_the_folders(server: Server) -> None:
    result = await server.run("#!/bin/sh\necho hello\n")
    folders = [path for path in server.folder.rglob("*") if path.is_dir()]
    copies = list((server.folder / "scripts").rglob("*.sh"))
    assert len(folders) >= 5
    assert copies
    assert [path for path in (*folders, *copies, Path(result.log_path)) if path.stat().st_mode & 0o077] == []


async def test_a_script_finds_what_stands_beside_it(server: Server) -> None:
    (server.project / "lb/common.sh").write_text("greet() { echo hello from $1; }\n")
    (server.project / "lb/helper").write_text("#!/bin/sh\necho helped\n")
    (server.project / "lb/helper").chmod(0o755)
    result = await server.run("#!/bin/sh\n. ./common.sh\ngreet $MACHINE\n./helper\n", extra={"MACHINE": "web1"})
    assert log(result) == "hello from web1\nhelped\n"


async def test_a_script_that_no_interpreter_is_known_for_is_not_started(server: Server) -> None:
    unknown = server.script("echo\n", "x.unknown")
    server.runs.freeze([unknown])
    result = await server.runs.run(ServerRun("x", unknown), BEFORE, {})
    assert not result.ok
    assert "cannot tell how to start 'x.unknown'" in result.reason


# --- frozen


async def test_what_is_edited_after_the_freeze_does_not_run(server: Server) -> None:
    script = server.script("#!/bin/sh\necho planned\n")
    server.runs.freeze([script])
    server.script("#!/bin/sh\necho edited\n")
    assert log(await server.runs.run(ServerRun("x", script), BEFORE, {})) == "planned\n"
    server.again().freeze([script])
    assert log(await server.runs.run(ServerRun("x", script), BEFORE, {})) == "planned\n"


def test_what_was_edited_before_the_freeze_is_refused(server: Server) -> None:
    script, other = server.script("#!/bin/sh\necho planned\n"), server.script("#!/bin/sh\n", "in.sh")
    server.script("#!/bin/sh\necho edited\n")
    with pytest.raises(FileChangedError, match=r"lb/out\.sh has .*Plan and deploy again"):
        server.runs.freeze([other, script])


async def test_a_copy_that_was_altered_does_not_run(server: Server) -> None:
    script = server.script("#!/bin/sh\necho planned\n")
    server.runs.freeze([script])
    [copy] = (server.folder / "scripts").rglob("out.sh")
    copy.write_text("#!/bin/sh\necho evil\n")
    result = await server.runs.run(ServerRun("x", script), BEFORE, {})
    assert not result.ok
    assert "planned was" in result.reason
    assert not Path(result.log_path).exists()
    with pytest.raises(FileChangedError):
        server.again().freeze([script])


async def test_a_script_that_was_not_frozen_does_not_run(server: Server) -> None:
    result = await server.runs.run(ServerRun("x", server.script("#!/bin/sh\n")), BEFORE, {})
    assert not result.ok
    assert "copy of the script lb/out.sh is gone" in result.reason


def test_scripts_of_one_folder_are_copied_once_and_together(server: Server) -> None:
    scripts = [server.script("#!/bin/sh\n", name) for name in ("out.sh", "in.sh", ".state.sh")]
    (server.project / "lb/also.sh").symlink_to("in.sh")
    server.runs.freeze([*scripts, FrozenFile(str(server.project), "lb/also.sh", scripts[0].sha256)])
    [snapshot] = (server.folder / "scripts").iterdir()
    assert {path.name for path in snapshot.iterdir()} == {"out.sh", "in.sh", ".state.sh", "also.sh"}


def test_too_much_beside_a_script_is_refused_and_nothing_is_left(server: Server) -> None:
    script = server.script("#!/bin/sh\n")
    (server.project / "lb/huge").write_bytes(bytes(5 << 20))
    with pytest.raises(RefusedError, match="folder of its own"):
        server.runs.freeze([script])
    assert server.files() == {}


# --- ends


async def test_a_success_is_heard_before_and_after(server: Server) -> None:
    result = await server.run("#!/bin/sh\nexit 0\n")
    assert (result.ok, result.exit_status, result.reason) == (True, 0, "")
    assert (result.state, result.operation) == ("done", BEFORE)
    assert server.kinds() == [("dispatched", "1/web1/before/1"), ("ended", "1/web1/before/1")]
    [outcome, *_] = server.ended
    assert outcome.state == "done"
    assert 0 < outcome.started <= outcome.ended


async def test_a_failure_is_tried_again_as_often_as_planned(server: Server) -> None:
    result = await server.run("#!/bin/sh\necho try $ATTEMPT\nexit 7\n", attempts=3, delay=0.01)
    assert (result.ok, result.exit_status, result.operation.attempt, result.state) == (False, 7, 3, "failed")
    assert "'take out' on the server (attempt 3 of 3)" in result.reason
    assert "7" in result.reason
    assert result.log_path in result.reason
    assert log(result) == "try 3\n"
    assert server.kinds() == [(kind, f"1/web1/before/{n}") for n in (1, 2, 3) for kind in ("dispatched", "ended")]


async def test_trying_again_ends_with_the_first_success(server: Server) -> None:
    result = await server.run('#!/bin/sh\n[ "$ATTEMPT" = 2 ]\n', attempts=5, delay=0.01)
    assert (result.ok, result.operation) == (True, replace(BEFORE, attempt=2))


async def test_a_later_run_of_the_same_operation_is_a_new_attempt(server: Server) -> None:
    text = "#!/bin/sh\necho $ATTEMPT\n"
    assert [log(await server.run(text)) for _ in range(3)] == ["1\n", "2\n", "3\n"]
    assert log(await server.run(text, operation=OperationId.of(DEPLOYMENT, 1, "web1", "before-2"))) == "1\n"


async def test_at_its_time_limit_a_hanging_script_is_killed_with_its_children(server: Server) -> None:
    result = await server.run(
        """\
        #!/bin/sh
        sleep 600 & echo $!
        setsid sleep 600 & sleep 0.1; pgrep -f 'sleep 600' -P $! ; echo $!
        sleep 600
        """,
        timeout=1.0,
    )
    assert (result.ok, result.state, result.operation) == (False, "failed", BEFORE)
    assert "time limit of 1 s" in result.reason
    children = [int(line) for line in log(result).split()]
    assert len(children) >= 2
    assert not any(lives(pid) for pid in children)


async def test_a_script_that_stalls_fails_and_is_repeated_as_often_as_declared(server: Server, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    result = await server.run(
        f"#!/bin/sh\necho run >> {counter}\nexec sleep 600\n", stall=0.3, attempts=2, delay=0.01, timeout=60.0
    )
    assert (result.ok, result.state) == (False, "failed")
    assert "printed nothing for 0.3 s" in result.reason
    assert counter.read_text().splitlines() == ["run"] * 2


async def test_commands_run_one_after_another_until_one_fails(server: Server) -> None:
    commands = (("echo", "one; echo not a shell"), ("sh", "-c", "echo two; exit 4"), ("echo", "three"))
    result = await server.runs.run(ServerRun("x", None, commands), BEFORE, {})
    assert (result.ok, result.exit_status, result.operation) == (False, 4, BEFORE)
    assert "sh (command 2 of 3)" in result.reason
    assert log(result) == "one; echo not a shell\ntwo\n"
    [outcome, *_] = server.ended
    assert outcome.log_bytes == Path(result.log_path).stat().st_size
    result = await server.runs.run(ServerRun("x", None, commands[::2]), BEFORE, {})
    assert (result.ok, log(result)) == (True, "one; echo not a shell\nthree\n")


async def test_commands_share_one_time_limit(server: Server) -> None:
    commands = (("sleep", "0.6"), ("sleep", "600"))
    result = await server.runs.run(ServerRun("x", None, commands, timeout=1.0), BEFORE, {})
    assert "time limit of" in result.reason
    [outcome, *_] = server.ended
    assert "0." in outcome.reason, "the second had only what the first left"


async def test_a_program_that_is_not_there_is_a_failure_with_a_reason(server: Server) -> None:
    result = await server.runs.run(ServerRun("x", None, (("no-such-program",),)), BEFORE, {})
    assert (result.ok, result.exit_status, result.state) == (False, None, "failed")
    assert "could not be started" in result.reason


async def test_a_secret_that_cannot_be_read_fails_the_run_before_it_starts(server: Server) -> None:
    (server.project / "lb/token").chmod(0o644)
    result = await server.run("#!/bin/sh\necho ran\n", secrets=("lb-token",))
    assert not result.ok
    assert "open to others" in result.reason
    assert not Path(result.log_path).exists()


async def test_a_journal_that_cannot_be_written_keeps_the_script_from_starting(server: Server) -> None:
    async def no(*events: Event) -> None:
        raise RefusedError("the journal is full")

    server.heard.record = no
    with pytest.raises(RefusedError, match="journal is full"):
        await server.run(f"#!/bin/sh\ntouch {server.project}/ran\n")
    await asyncio.sleep(0.1)
    assert not (server.project / "ran").exists()


# --- cancelled, taken up


async def test_a_power_cut_leaves_the_folder_of_each_attempt_that_was_started(server: Server, monkeypatch) -> None:
    """Without it the attempt would count as never begun, and its script would run a second time."""
    in_doubt: list[str] = []
    started: list[str] = []

    def make(path: str, mode: int, *, dir_fd: int | None = None) -> None:
        real_mkdir(path, mode, dir_fd=dir_fd)
        in_doubt.append(os.path.join("" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}"), path))

    def sync(descriptor: int) -> None:
        synced = os.readlink(f"/proc/self/fd/{descriptor}")
        in_doubt[:] = [path for path in in_doubt if os.path.dirname(path) != synced]

    def launch(folder: str, *rest: object) -> None:
        started.append(folder)
        assert all(not folder.startswith(path) for path in in_doubt)
        real_launch(folder, *rest)

    real_mkdir, real_launch = os.mkdir, runs.launch
    monkeypatch.setattr(os, "mkdir", make)
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(runs, "launch", launch)
    assert (await server.run("true")).ok
    assert (await server.runs.run(ServerRun("again", commands=(("true",), ("true",))), BEFORE, {})).ok
    assert len(started) == 3


async def test_a_script_outlives_who_awaits_it_and_is_awaited_before_a_repeat(server: Server) -> None:
    go, out = server.project / "go", server.project / "out"
    text = f"#!/bin/sh\necho began $ATTEMPT >> {out}\nwhile [ ! -e {go} ]; do sleep 0.02; done\necho ended $ATTEMPT >> {out}\n"
    task = asyncio.create_task(server.run(text))
    await eventually(out.exists)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    again = asyncio.create_task(server.run(text))
    await asyncio.sleep(0.3)
    assert out.read_text() == "began 1\n"
    go.touch()
    assert (await again).operation == replace(BEFORE, attempt=2)
    assert out.read_text() == "began 1\nended 1\nbegan 2\nended 2\n"


async def test_after_a_kill_another_process_takes_the_run_up(server: Server) -> None:
    go, out = server.project / "go", server.project / "out"
    script = server.script(
        f"#!/bin/sh\necho began\ntouch {out}\nwhile [ ! -e {go} ]; do sleep 0.02; done\necho ended\nexit 5\n"
    )
    server.runs.freeze([script])
    program = f"""
import asyncio
from agent.orders.operation_id import OperationId
from orchestrator.journal.events import Event, ServerRunDispatched, ServerRunEnded
from orchestrator.journal.recorder import Recorder
from orchestrator.plan.plan import FrozenFile, ServerRun
from orchestrator.trust.secrets import SecretStore
from orchestrator.deployment.server_runs import ServerRuns
from orchestrator.journal.recorder import Recorder
class Silent(Recorder):
    async def record(self, *events): pass
runs = ServerRuns({str(server.folder)!r}, SecretStore({{}}), Silent(None, {DEPLOYMENT!r}))
asyncio.run(runs.run(ServerRun("x", {script!r}), OperationId.parse({str(BEFORE)!r}), {{}}))
"""
    engine = await asyncio.to_thread(subprocess.Popen, [sys.executable, "-c", program])
    try:
        await eventually(out.exists)
    finally:
        engine.kill()
        assert engine.wait() == -signal.SIGKILL
    run = ServerRun("x", script)
    assert await server.runs.take_up(run, OperationId.of(DEPLOYMENT, 1, "web2", "before"), {}) is None
    task = asyncio.create_task(server.runs.take_up(run, BEFORE, {}))
    await asyncio.sleep(0.1)
    assert not task.done()
    go.touch()
    result = await task
    assert result is not None
    assert (result.exit_status, result.operation, result.state) == (5, BEFORE, "failed")
    assert log(result) == "began\nended\n"
    assert server.kinds() == [("ended", "1/web1/before/1")]
    again = await server.again().take_up(run, BEFORE, {})
    assert again == result, "it is told again, and nothing is begun"
    assert log(result) == "began\nended\n"


@pytest.mark.parametrize(("idempotent", "states"), [(False, ["unknown"]), (True, ["unknown", "done"])])
async def test_an_unknown_outcome_is_repeated_only_where_that_is_allowed(
    server: Server, idempotent: bool, states: list[str]
) -> None:
    began = server.project / "began"
    text = f"#!/bin/sh\n[ $ATTEMPT = 2 ] && exit 0\necho $$ > {began}.new\nmv {began}.new {began}\nsleep 600\n"
    task = asyncio.create_task(server.run(text, attempts=3, delay=0.01, idempotent=idempotent))
    await eventually(began.exists)
    runner = runner_of(server.folder / "runs" / "1~web1~before~1")
    os.kill(runner, signal.SIGKILL)
    result = await task
    assert [outcome.state for outcome in server.ended] == states
    assert result.ok == idempotent
    if idempotent:
        assert not lives(int(began.read_text())), "what may still run is ended before a repeat"
    else:
        assert "is unknown" in result.reason
        await asyncio.to_thread(runs.stop, str(server.folder / "runs" / "1~web1~before~1"))
    await eventually(lambda: not lives(int(began.read_text())))
