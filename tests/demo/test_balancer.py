"""No request is lost while servers leave and enter a real HAProxy by the scripts of deploy/examples/haproxy.

And the proof that this would be seen: without waiting for the last request, or for UP, requests are lost here.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from harness.haproxy_reader import failed_requests, were_out
from harness.seed import SOAK

from benchmarks.support.programs import free_ports

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "deploy" / "demo"
EXAMPLE = ROOT / "deploy" / "examples" / "haproxy"
LB = EXAMPLE / "environments" / "lb"
RESTART = DEMO / "webapp" / "ops" / "restart.py"
SCRIPT_SECONDS = 60.0

sys.path.append(str(DEMO))  # As the demo's modules find each other when it runs.

import haproxy_log  # noqa: E402
from balancer import BACKEND, Balancer, Checking, haproxy  # noqa: E402
from load import Load, Summary  # noqa: E402
from webapp import folder as webapp  # noqa: E402

needs_haproxy = pytest.mark.skipif(
    haproxy() is None, reason="haproxy is not installed: what the rotation scripts promise is NOT proved"
)

soak = pytest.mark.skipif(not SOAK, reason="the long run: WAYSTATION_SOAK=1")

# --- scripts and machines


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


async def run(script: Path, variables: dict[str, str]) -> Done:
    """A script as the server starts it: a process with the variables that it is owed, and no others."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        script,
        env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"} | variables,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), SCRIPT_SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return Done(process.returncode or 0, out.decode(), err.decode())


@dataclass(frozen=True)
class Machine:
    """A machine with the webshop in `root`, as an agent would have installed it."""

    name: str
    root: Path
    port: int
    boot: float
    work: float

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def install(self, version: str) -> None:
        tree = self.root / "releases" / version
        if not tree.exists():
            webapp.make(tree, version)

    def switch(self, version: str) -> None:
        link = self.root / "next"
        link.symlink_to(self.root / "releases" / version)
        link.rename(self.root / "current")

    async def restart(self) -> None:
        done = await run(
            RESTART,
            {
                "ROOT": str(self.root),
                "MACHINE": self.name,
                "VAR_PORT": str(self.port),
                "VAR_BOOT_SECONDS": str(self.boot),
                "VAR_WORK_SECONDS": str(self.work),
            },
        )
        assert done.code == 0, done

    def pid(self) -> int:
        return int((self.root / "shared" / "webshop.pid").read_text())

    def end(self) -> None:
        with suppress(OSError, ValueError):
            os.kill(self.pid(), signal.SIGKILL)


@dataclass(frozen=True)
class Farm:
    machines: Sequence[Machine]
    balancer: Balancer
    began: datetime

    def variables(self, machine: Machine) -> dict[str, str]:
        """What before, after and probe see."""
        return {
            "MACHINE": machine.name,
            "VAR_BACKEND": BACKEND,
            "VAR_HAPROXY": self.balancer.page,
            "SECRET_LB_TOKEN": self.balancer.token,
        }

    async def script(self, name: str, machine: Machine, **more: str) -> Done:
        return await run(LB / name, self.variables(machine) | more)

    async def must(self, name: str, machine: Machine, **more: str) -> Done:
        done = await self.script(name, machine, **more)
        assert done.code == 0, done
        return done

    def log(self) -> haproxy_log.Log:
        """What HAProxy wrote since everything was up."""
        return haproxy_log.since(self.balancer.log(), self.began)


@asynccontextmanager
async def farm(
    folder: Path, count: int, *, checking: Checking | None = None, boot: float = 0.0, work: float = 0.05
) -> AsyncIterator[Farm]:
    """`count` machines with version 1.0.0 behind a HAProxy that says UP of all of them; 2.0.0 lies ready on each."""
    machines = [
        Machine(f"web{number}", folder / f"web{number}", port, boot, work)
        for number, port in enumerate(free_ports(count), 1)
    ]
    try:
        for machine in machines:
            machine.install("1.0.0")
            machine.install("2.0.0")
            machine.switch("1.0.0")
        await asyncio.gather(*(machine.restart() for machine in machines))
        addresses = {machine.name: machine.address for machine in machines}
        async with Balancer(folder / "lb", addresses, checking=checking) as balancer:
            await balancer.until_up()
            began = datetime.now(UTC)
            await asyncio.sleep(0.05)  # HAProxy's own clock for a request is rounded to milliseconds.
            yield Farm(machines, balancer, began)
    finally:
        for machine in machines:
            machine.end()


async def roll(machines: Sequence[Machine], window: int, turn: Callable[[Machine], Awaitable[None]]) -> None:
    """The sliding window: the next begins when any ends."""
    places = asyncio.Semaphore(window)

    async def take_turn(machine: Machine) -> None:
        async with places:
            await turn(machine)

    async with asyncio.TaskGroup() as group:
        for machine in machines:
            group.create_task(take_turn(machine))


async def release(farm: Farm, window: int, turn: Callable[[Machine], Awaitable[None]]) -> Summary:
    """Roll 2.0.0 out while people shop."""
    async with Load(f"{farm.balancer.url}/", clients=24, rate=120) as load:
        await load.until(100)
        await roll(farm.machines, window, turn)
        await load.until(load.summary().requests + 100)
    await farm.balancer.until_quiet()
    return load.summary()


# --- nothing is lost


@needs_haproxy
@pytest.mark.parametrize("window", [pytest.param(1, marks=soak), 2], ids=["one-at-a-time", "two-at-a-time"])
async def test_no_request_is_lost_while_six_servers_are_released(tmp_path: Path, window: int):
    async with farm(tmp_path, 6) as six:
        before = {machine.name: machine.pid() for machine in six.machines}

        async def turn(machine: Machine) -> None:
            await six.must("out.py", machine)
            assert (await six.script("state.py", machine)).code == 1
            machine.switch("2.0.0")
            await machine.restart()
            await six.must("in.py", machine, OUTCOME="deployed")
            assert (await six.script("state.py", machine)).code == 0

        seen = await release(six, window, turn)
        log = six.log()

    assert not seen.kinds
    assert failed_requests(log) == ()
    assert seen.requests == len(log.requests) > 200, "HAProxy and the clients counted the same requests"
    assert seen.kept > 100
    assert seen.requests - seen.kept > 100
    assert set(seen.versions) == {"1.0.0", "2.0.0"}
    assert set(seen.seconds[-1].versions) == {"2.0.0"}
    assert haproxy_log.most_out_at_once(log) == window
    assert haproxy_log.fewest_in_service(log) == 6 - window
    assert were_out(haproxy_log.rotation(log)) == {machine.name for machine in six.machines}
    assert all(before[machine.name] != machine.pid() for machine in six.machines), "each was really restarted"


@needs_haproxy
async def test_a_server_that_is_slow_to_end_its_requests_is_waited_for(tmp_path: Path):
    async with farm(tmp_path, 2, work=0.8) as two:
        one = two.machines[0]
        async with Load(f"{two.balancer.url}/", clients=16, rate=16) as load:
            await load.until(8)
            done = await two.script("out.py", one, VAR_DRAIN_SECONDS="0")
            assert done.code == 1
            assert re.search(r"web1 still works on [1-9]\d* requests after 0 s .*: raise the variable", done.err)
            await two.must("out.py", one)
            await one.restart()
            await two.must("in.py", one, OUTCOME="not_started")
            await load.until(load.summary().requests + 8)
        assert not load.summary().kinds


# --- and what is lost otherwise


def assert_the_log_agrees(log: haproxy_log.Log, seen: Summary) -> None:
    """Where a kept connection breaks under a client's later request, HAProxy hangs up and writes nothing."""
    silent = seen.kinds.get("cut", 0)
    assert len(failed_requests(log)) == seen.failed - silent
    assert len(log.requests) == seen.requests - silent


@needs_haproxy
async def test_requests_are_lost_without_taking_servers_out_and_that_is_seen(tmp_path: Path):
    async with farm(tmp_path, 6, boot=0.5) as six:

        async def turn(machine: Machine) -> None:
            machine.switch("2.0.0")
            await machine.restart()

        seen = await release(six, 1, turn)
        log = six.log()
    assert seen.failed >= 3
    assert seen.kinds.get("status 503", 0) >= 3
    assert_the_log_agrees(log, seen)


@needs_haproxy
async def test_requests_are_lost_without_waiting_for_the_last_session_and_that_is_seen(tmp_path: Path):
    async with farm(tmp_path, 6, work=0.4) as six:

        async def turn(machine: Machine) -> None:
            await six.balancer.ask(f"set server {BACKEND}/{machine.name} state drain")
            os.kill(machine.pid(), signal.SIGKILL)
            machine.switch("2.0.0")
            await machine.restart()
            await six.must("in.py", machine, OUTCOME="deployed")

        seen = await release(six, 1, turn)
        log = six.log()
    assert seen.failed >= 3
    assert_the_log_agrees(log, seen)


@needs_haproxy
async def test_requests_are_lost_without_waiting_for_up_and_that_is_seen(tmp_path: Path):
    """Two servers: the second is taken out while HAProxy has not yet found the first again."""
    async with farm(tmp_path, 2, checking=Checking(interval=200, rise=10, fall=2), boot=0.8) as two:

        async def turn(machine: Machine) -> None:
            await two.must("out.py", machine)
            machine.switch("2.0.0")
            await machine.restart()
            await two.balancer.ask(f"set server {BACKEND}/{machine.name} state ready")

        seen = await release(two, 1, turn)
        log = two.log()
    assert haproxy_log.fewest_in_service(log) == 0
    assert seen.kinds.get("status 503", 0) > 20
    assert_the_log_agrees(log, seen)


@needs_haproxy
async def test_the_same_two_servers_lose_nothing_when_up_is_waited_for(tmp_path: Path):
    async with farm(tmp_path, 2, checking=Checking(interval=200, rise=10, fall=2), boot=0.8) as two:

        async def turn(machine: Machine) -> None:
            await two.must("out.py", machine)
            machine.switch("2.0.0")
            await machine.restart()
            await two.must("in.py", machine, OUTCOME="deployed")

        seen = await release(two, 1, turn)
        assert haproxy_log.fewest_in_service(two.log()) == 1
    assert not seen.kinds


# --- each script's word


@pytest.fixture
async def quiet(tmp_path: Path) -> AsyncIterator[Farm]:
    """Two servers without visitors."""
    async with farm(tmp_path, 2, work=0.0) as two:
        yield two


@needs_haproxy
@pytest.mark.parametrize(
    ("state", "road"),
    [
        ("drain", "page"),
        ("maint", "runtime-api-socket"),
        ("drain", "runtime-api-tcp"),
        pytest.param("maint", "page", marks=soak),
        pytest.param("drain", "runtime-api-socket", marks=soak),
        pytest.param("maint", "runtime-api-tcp", marks=soak),
    ],
)
async def test_a_server_goes_out_and_in_by_every_road_and_twice_is_as_once(quiet: Farm, road: str, state: str):
    one, other = quiet.machines
    async with runtime_api_over_tcp(quiet.balancer) as tcp:
        address = {"page": quiet.balancer.page, "runtime-api-socket": str(quiet.balancer.runtime_api)}.get(road, tcp)
        more = {"VAR_HAPROXY": address, "VAR_HAPROXY_OUT": state}
        for _ in range(2):
            await quiet.must("out.py", one, **more)
            assert await quiet.balancer.statuses() == {one.name: state.upper(), other.name: "UP"}
            assert (await quiet.script("state.py", one, **more)).code == 1
        for _ in range(2):
            await quiet.must("in.py", one, **more)
            assert await quiet.balancer.statuses() == {one.name: "UP", other.name: "UP"}
            assert (await quiet.script("state.py", one, **more)).code == 0


async def until_status(farm: Farm, machine: Machine, status: str) -> None:
    async with asyncio.timeout(10):
        while (await farm.balancer.statuses())[machine.name] != status:
            await asyncio.sleep(0.05)


@asynccontextmanager
async def runtime_api_over_tcp(balancer: Balancer) -> AsyncIterator[str]:
    """HAProxy's socket at a port, as `stats socket ipv4@…` would offer it."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await balancer.ask((await reader.readline()).decode().rstrip())).encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(carry, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@needs_haproxy
async def test_the_scripts_work_wherever_they_are_copied_with_the_file_beside_them(quiet: Farm, tmp_path: Path):
    elsewhere = tmp_path / "frozen" / "1"
    elsewhere.mkdir(parents=True)
    for path in LB.glob("*.py"):
        shutil.copyfile(path, elsewhere / path.name)
    elsewhere.chmod(0o500)
    for name, code in (("out.py", 0), ("state.py", 1), ("in.py", 0), ("state.py", 0)):
        assert (await run(elsewhere / name, quiet.variables(quiet.machines[0]))).code == code


@needs_haproxy
async def test_a_server_that_is_dead_is_not_told_to_be_in(quiet: Farm):
    one = quiet.machines[0]
    await quiet.must("out.py", one)
    one.end()
    await until_status(quiet, one, "DOWN")
    done = await quiet.script("in.py", one, OUTCOME="deployed", VAR_UP_SECONDS="2")
    assert done.code == 1
    assert re.search(r"says DOWN of web1 and not UP after 2 s \(last check: .*\): look at its health check", done.err)
    assert (await quiet.script("state.py", one)).code == 1


@needs_haproxy
async def test_a_server_that_died_in_maintenance_is_not_taken_for_up_before_it_was_checked(quiet: Farm):
    one = quiet.machines[0]
    await quiet.must("out.py", one, VAR_HAPROXY_OUT="maint")
    one.end()
    done = await quiet.script("in.py", one, VAR_HAPROXY_OUT="maint", VAR_UP_SECONDS="2")
    assert (done.code, "says DOWN" in done.err) == (1, True)


@needs_haproxy
async def test_a_dead_server_can_be_taken_out_and_stays_out_when_it_comes_back(quiet: Farm):
    one = quiet.machines[0]
    one.end()
    await quiet.must("out.py", one)
    await quiet.must("out.py", one)
    await one.restart()
    await until_status(quiet, one, "DRAIN")


@needs_haproxy
async def test_after_every_outcome_but_exclusion_the_server_is_in_again(quiet: Farm):
    for outcome in ("", "deployed", "not_started", "kept_old", "rolled_back", "put_back"):
        await quiet.must("out.py", quiet.machines[0])
        await quiet.must("in.py", quiet.machines[0], OUTCOME=outcome)
        assert set((await quiet.balancer.statuses()).values()) == {"UP"}, outcome


@needs_haproxy
async def test_an_excluded_server_stays_out_and_an_unknown_outcome_changes_nothing(quiet: Farm):
    one = quiet.machines[0]
    await quiet.must("out.py", one)
    await quiet.must("in.py", one, OUTCOME="excluded")
    assert (await quiet.balancer.statuses())[one.name] == "DRAIN"
    done = await quiet.script("in.py", one, OUTCOME="perfect")
    assert (done.code, "OUTCOME is 'perfect'" in done.err) == (2, True)
    assert (await quiet.balancer.statuses())[one.name] == "DRAIN"


@needs_haproxy
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"SECRET_LB_TOKEN": "wrong"}, "refuses user waystation .*: check the secret lb_token"),
        ({"SECRET_LB_TOKEN": ""}, "SECRET_LB_TOKEN is not set: .*secrets: \\[lb_token\\]"),
        ({"MACHINE": "nope"}, "knows no server nope in backend web"),
        ({"VAR_BACKEND": "nope"}, "knows no server web1 in backend nope"),
        ({"VAR_HAPROXY": "http://127.0.0.1:1/stats"}, "cannot be reached at .*Connection refused"),
        ({"VAR_HAPROXY": "/nowhere/admin.sock"}, "cannot be reached at /nowhere/admin.sock .*No such file"),
        ({"VAR_HAPROXY": ""}, "VAR_HAPROXY is not set"),
        ({"VAR_HAPROXY": "lb"}, "VAR_HAPROXY holds 'lb': expected"),
        ({"MACHINE": "web1; shutdown"}, "MACHINE is 'web1; shutdown': expected a name"),
        ({"VAR_DRAIN_SECONDS": "long"}, "VAR_DRAIN_SECONDS is 'long': expected seconds"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_what_is_wrong_is_told_in_one_sentence_and_nobody_takes_it_for_an_answer(
    quiet: Farm, change: dict[str, str], said: str
):
    for name in ("out.py", "in.py", "state.py"):
        done = await quiet.script(name, quiet.machines[0], **change)
        assert done.code == 2 if name == "state.py" else done.code in {1, 2}
        assert re.search(said, done.err), done
        assert done.err.count("\n") == 1
        assert quiet.balancer.token not in done.err
    assert set((await quiet.balancer.statuses()).values()) == {"UP"}


@needs_haproxy
async def test_an_error_of_the_runtime_api_which_comes_as_plain_text_is_one(quiet: Farm):
    socket = str(quiet.balancer.runtime_api)
    for change in ({"VAR_BACKEND": "nope"}, {"MACHINE": "nope"}):
        done = await quiet.script("out.py", quiet.machines[0], VAR_HAPROXY=socket, **change)
        assert done.code == 1
        assert "nope" in done.err


@needs_haproxy
async def test_two_balancers_are_both_told_and_their_disagreement_is_no_answer(quiet: Farm, tmp_path: Path):
    one = quiet.machines[0]
    async with Balancer(tmp_path / "lb2", {m.name: m.address for m in quiet.machines}) as second:
        await second.until_up()
        both = {"VAR_HAPROXY": f"{quiet.balancer.runtime_api}, {second.runtime_api}"}
        await quiet.must("out.py", one, **both)
        assert [(await each.statuses())[one.name] for each in (quiet.balancer, second)] == ["DRAIN", "DRAIN"]
        await quiet.must("in.py", one, VAR_HAPROXY=str(second.runtime_api))
        done = await quiet.script("state.py", one, **both)
        assert (done.code, "disagree about web1" in done.err) == (2, True)


async def test_a_probe_without_the_file_beside_it_cannot_tell(tmp_path: Path):
    shutil.copyfile(LB / "state.py", tmp_path / "state.py")
    assert (await run(tmp_path / "state.py", {})).code == 2


# --- the application


async def test_the_webshop_finishes_what_runs_when_it_is_ended(tmp_path: Path):
    machine = Machine("web1", tmp_path / "web1", free_ports(1)[0], 0.0, 1.0)
    machine.install("1.0.0")
    machine.switch("1.0.0")
    try:
        await machine.restart()
        reader, writer = await asyncio.open_connection("127.0.0.1", machine.port)
        idle, idle_writer = await asyncio.open_connection("127.0.0.1", machine.port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.sleep(0.2)
        os.kill(machine.pid(), signal.SIGTERM)
        assert await idle.read() == b"", "a connection without a request is closed at once"
        answer = (await reader.read()).decode()
        assert answer.startswith("HTTP/1.1 200 OK\r\n")
        assert "Connection: close\r\n" in answer
        assert answer.endswith("\r\n\r\nThe shop, version 1.0.0, on web1\n")
        for each in (writer, idle_writer):
            each.close()
    finally:
        machine.end()


async def test_a_package_that_is_broken_listens_and_says_so(tmp_path: Path):
    machine = Machine("web1", tmp_path / "web1", free_ports(1)[0], 0.0, 0.0)
    webapp.make(machine.root / "releases" / "3.0.0", "3.0.0", broken=True)
    machine.switch("3.0.0")
    try:
        await machine.restart()
        async with Load(f"http://{machine.address}/version", clients=2, rate=50) as load:
            await load.until(10)
        assert set(load.summary().kinds) == {"status 500"}
    finally:
        machine.end()


# --- the load tells what it sees


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", "cut"),
        (b"HTTP/1.1 200 OK\r\nX-Version: 1\r\nContent-Length: 10\r\n\r\nshort", "cut"),
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n", "status 503"),
        (b"nonsense\r\n\r\n", "garbled"),
        (None, "timeout"),
    ],
    ids=["no-answer", "half-an-answer", "503", "no-http", "silence"],
)
async def test_each_kind_of_failure_is_counted_as_what_it_is(answer: bytes | None, kind: str):
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if answer is None:
            await reader.read()
        else:
            writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with Load(f"http://127.0.0.1:{port}/", clients=4, rate=40, timeout=0.5) as load:
            await load.until(8)
    seen = load.summary()
    assert set(seen.kinds) == {kind}
    assert seen.failed == seen.requests == sum(second.failed for second in seen.seconds)


async def test_nobody_behind_the_address_is_a_failure_and_not_the_end_of_the_load():
    [port] = free_ports(1)
    async with Load(f"http://127.0.0.1:{port}/", clients=4, rate=40) as load:
        await load.until(8)
    assert set(load.summary().kinds) == {"refused"}


async def test_half_of_the_clients_keep_their_connection_and_half_do_not():
    connections: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(0)
        number = len(connections) - 1
        with suppress(asyncio.IncompleteReadError, OSError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                connections[number] += 1
                writer.write(b"HTTP/1.1 200 OK\r\nX-Version: 1\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with Load(f"http://127.0.0.1:{port}/", clients=4, rate=80) as load:
            await load.until(40)
        await asyncio.sleep(0.1)
    seen = load.summary()
    assert seen.failed == 0
    assert seen.versions == {"1": seen.requests}
    kept = sorted(count for count in connections if count > 1)
    assert len(kept) == 2
    assert sum(kept) == seen.kept
    assert connections.count(1) == seen.requests - seen.kept


# --- the example as it stands


def test_the_example_makes_a_plan_that_names_its_scripts_and_its_secret():
    from orchestrator.files.environment import load_environment
    from orchestrator.files.process import load_process
    from orchestrator.plan.make_plan import make_plan
    from orchestrator.plan.plan import MachineStep, PlannedPackage

    plan = make_plan(
        load_process(str(EXAMPLE / "release.yaml")),
        load_environment(str(EXAMPLE / "environments" / "production.yaml")),
        label="1.0.0",
        packages={"web": PlannedPackage("Acme.Web", "1.0.0")},
        scripts=None,
        prompts={},
    )
    [step] = plan.steps
    assert isinstance(step, MachineStep)
    assert step.rotation is not None
    assert step.rotation.probe is not None
    for run_, name in zip((step.rotation.before, step.rotation.after, step.rotation.probe), SCRIPTS, strict=True):
        assert run_.script is not None
        assert Path(run_.script.folder, run_.script.path) == LB / name
        assert run_.secrets == ("lb_token",)
    assert set(servers_of((EXAMPLE / "haproxy.cfg").read_text())) == {turn.machine for turn in step.turns}
    assert {"VAR_HAPROXY", "VAR_BACKEND", "VAR_DRAIN_SECONDS", "VAR_UP_SECONDS"} <= set(step.turns[0].variables)


SCRIPTS = ("out.py", "in.py", "state.py")


def servers_of(configuration: str) -> dict[str, str]:
    return dict(re.findall(r"^    server (\S+) (\S+)$", configuration, re.MULTILINE))


@needs_haproxy
async def test_the_example_configuration_serves_and_its_page_is_used_over_tls(tmp_path: Path):
    import trustme

    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "lb.pem"))
    text = (EXAMPLE / "haproxy.cfg").read_text()
    names = list(servers_of(text))
    shop, page, *ports = free_ports(2 + len(names))
    machines = [Machine(name, tmp_path / name, port, 0.0, 0.0) for name, port in zip(names, ports, strict=True)]
    changes = {
        "bind :80\n": f"bind 127.0.0.1:{shop}\n",
        "bind :8404 ": f"bind 127.0.0.1:{page} ",
        "/etc/haproxy/lb.example.net.pem": str(tmp_path / "lb.pem"),
        "/run/haproxy/admin.sock": str(tmp_path / "admin.sock"),
    } | {address: f"127.0.0.1:{port}" for address, port in zip(servers_of(text).values(), ports, strict=True)}
    for old, new in changes.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "haproxy.cfg").write_text(text)
    program = haproxy()
    assert program is not None
    try:
        for machine in machines:
            machine.install("1.0.0")
            machine.switch("1.0.0")
        await asyncio.gather(*(machine.restart() for machine in machines))
        process = await asyncio.create_subprocess_exec(
            *(program, "-db", "-f", tmp_path / "haproxy.cfg"),
            env={"LB_TOKEN": "a long one"},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            variables = {
                "MACHINE": names[0],
                "VAR_BACKEND": "web",
                "VAR_HAPROXY": f"https://127.0.0.1:{page}/stats",
                "VAR_HAPROXY_CA_FILE": str(tmp_path / "ca.pem"),
                "SECRET_LB_TOKEN": "a long one",
            }
            async with asyncio.timeout(10):
                while (await run(LB / "state.py", variables)).code != 0:
                    assert process.returncode is None, "HAProxy does not take the example"
                    await asyncio.sleep(0.1)
            for name, code in (("out.py", 0), ("state.py", 1), ("in.py", 0), ("state.py", 0)):
                assert (await run(LB / name, variables)).code == code
            stranger = await run(LB / "out.py", variables | {"VAR_HAPROXY_CA_FILE": ""})
            assert (stranger.code, "certificate" in stranger.err) == (1, True)
        finally:
            process.kill()
            await process.wait()
    finally:
        for machine in machines:
            machine.end()
