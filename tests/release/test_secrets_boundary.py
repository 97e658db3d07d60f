"""Where secrets are, and where they are not, looked for from outside: on every disk, on the wire, in every process.

The search unwraps what programs wrap: base64 in base64, zip, zstd, the rows of SQLite. That it finds what is there is
shown by markers: values that are no secrets and take the same roads.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import os
import re
import socket
import sqlite3
import sys
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from harness.farm import Farm
from harness.process import Done, Process, run, wait_for
from harness.trail import events

from agent.orders.envelopes import open_order, open_sealed, secret_context
from agent.orders.orders import Order, RunScript
from relay.errors import SignatureError
from relay.support.private_files import read_sealing_key
from relay.support.zstd import zstd

LB_TOKEN = "lb/Token+0f=the&server?1"
LB_PIN = "pin~of+the/Balancer=2"
APP_KEY = "app/Key+0f=the&machine?3"
MARKER = "marker-in-a-variable-4711"
OPERATION_MARKER = "1-the-action-configure"
FILE_MARKER = "marker-in-a-package-4712"
LOG_MARKER = "marker-in-the-output-4713"
DEPTH = 4
"""Wrappings that are opened inside each other."""

BEFORE = """#!{python}
import base64, os, sys, time, urllib.parse
from pathlib import Path
token, pin = os.environ["SECRET_LB_TOKEN"], os.environ["SECRET_LB_PIN"]
Path({proofs!r}, "before-" + os.environ["MACHINE"]).touch()
print({log_marker!r}, token, base64.b64encode(token.encode()).decode(), urllib.parse.quote(token, safe=""), pin)
sys.stdout.write("split: " + pin[:7]); sys.stdout.flush(); time.sleep(0.1); sys.stdout.write(pin[7:] + " end\\n")
sys.stdout.flush()
for _ in range(3000):
    if Path({proofs!r}, "go-on").exists():
        sys.exit(0)
    time.sleep(0.01)
sys.exit("nobody let it go on")
"""
MACHINE = """#!{python}
import base64, hashlib, os, sys, time, urllib.parse
from pathlib import Path
key = os.environ["SECRET_APP_KEY"]
Path({proofs!r}, "machine-" + os.environ["MACHINE"]).write_text(hashlib.sha256(key.encode()).hexdigest())
print({log_marker!r}, key, base64.b64encode(key.encode()).decode(), urllib.parse.quote(key, safe=""), key.encode())
print("in more: " + base64.urlsafe_b64encode(b"xy" + key.encode()).decode(), file=sys.stderr)
sys.stdout.write("split: " + key[:9]); sys.stdout.flush(); time.sleep(0.1); sys.stdout.write(key[9:] + " end\\n")
sys.stdout.flush()
for _ in range(3000):
    if Path({proofs!r}, "machine-may-end").exists():
        sys.exit(0)
    time.sleep(0.01)
sys.exit("nobody let it end")
"""
PLAIN = """#!/bin/sh
env | grep -c '^SECRET_' > {proofs}/secrets-of-$MACHINE
exit 0
"""


# --- looking


def forms_of(secret: str) -> list[bytes]:
    """A value as it is, in hex, in the parts of base64 that hold it at any alignment, and coded for URLs."""
    raw = secret.encode()
    forms = {raw, raw.hex().encode(), raw.hex().upper().encode(), quote(secret, safe="").encode()}
    forms |= {quote(secret).encode(), json.dumps(secret)[1:-1].encode()}
    for lead in range(3):
        coded = base64.b64encode(b"\0" * lead + raw)
        # The first and last characters depend on what stands beside it.
        sure = coded[4 if lead else 0 : len(coded) - 4]
        forms |= {sure, sure.translate(bytes.maketrans(b"+/", b"-_"))}
    return sorted(forms)


_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{24,}={0,2}")
_FRAME = b"\x28\xb5\x2f\xfd"


def peeled(data: bytes, depth: int = DEPTH) -> Iterator[bytes]:
    """`data`, and everything that can be unwrapped from it."""
    yield data
    if depth == 0:
        return
    for inner in _unwrapped(data):
        yield from peeled(inner, depth - 1)


def _unwrapped(data: bytes) -> Iterator[bytes]:
    if b"PK\x03\x04" in data:
        with suppress(zipfile.BadZipFile), zipfile.ZipFile(io.BytesIO(data)) as archive:
            yield from (archive.read(name) for name in archive.namelist())
    for match in re.finditer(re.escape(_FRAME), data):
        with suppress(zstd.ZstdError):
            yield zstd.ZstdDecompressor().decompress(data[match.start() :], max_length=8 << 20)
    for match in _BASE64.finditer(data):
        text = match[0].translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
        with suppress(binascii.Error):
            yield base64.b64decode(text[: len(text) - (len(text) % 4 == 1)] + b"==")


def holds(data: bytes, secret: str) -> bool:
    forms = forms_of(secret)
    return any(form in layer for layer in peeled(data) for form in forms)


def files_below(*folders: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file, its name and its content; databases also row by row, as a page may cut a value in two."""
    for folder in folders:
        assert folder.exists(), folder
        for path in sorted(folder.rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            yield path, os.fsencode(path) + b"\n" + path.read_bytes()
            if path.suffix == ".db":
                yield path, _rows(path)


def _rows(path: Path) -> bytes:
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = [row for name in tables for row in database.execute(f'SELECT * FROM "{name}"')]  # noqa: S608
    return b"\n".join(cell if isinstance(cell, bytes) else str(cell).encode() for row in rows for cell in row)


def places_of(secret: str, *folders: Path) -> list[Path]:
    return [path for path, data in files_below(*folders) if holds(data, secret)]


@dataclass(frozen=True)
class Seen:
    pid: int
    parent: int
    cmdline: bytes
    environ: bytes = field(repr=False)
    """Not shown where a test fails: it holds what the environment of the tests holds."""


def processes() -> dict[int, Seen]:
    """Everything that runs now."""
    found = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            folder = Path("/proc", name)
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(name)] = Seen(
                int(name), parent, (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
            )
    return found


def is_below(process: Seen, ancestor: int, all_of_them: Mapping[int, Seen]) -> bool:
    """Whether `ancestor` is `process`'s parent, or its parent's, and so on."""
    while process.parent in all_of_them:
        if process.parent == ancestor:
            return True
        process = all_of_them[process.parent]
    return False


class Tap:
    """A line that keeps every byte of both directions, one stream for each direction of each connection."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.streams: list[bytearray] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def bytes(self) -> bytes:
        return b"\n".join(map(bytes, self.streams))

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                for source, sink in ((client, server), (server, client)):
                    kept = bytearray()
                    self.streams.append(kept)
                    threading.Thread(target=self._carry, args=(source, sink, kept), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, kept: bytearray) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                kept += data
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.close()


# --- the world


@dataclass
class World:
    """Two machines, `web1` with a secret and `work1` without, and one deployment that has gone through."""

    farm: Farm
    tap: Tap
    vault: Path
    proofs: Path
    told: dict[str, str] = field(default_factory=dict)
    """Everything that commands printed, by what they were."""
    during: dict[str, dict[int, Seen]] = field(default_factory=dict)
    """The processes while the server's script ran, and while the machine's did."""
    on_disk: dict[str, list[Path]] = field(default_factory=dict)
    """Where the machine's secret was on any disk while its script ran."""
    deploying: int = 0

    @property
    def folder(self) -> Path:
        return self.farm.folder

    def note(self, what: str, done: Done) -> Done:
        self.told[what] = done.out + done.err
        return done

    def pid_of_agent(self, name: str) -> int:
        return self.farm.agents[name].pid


def write_release(farm: Farm, vault: Path, proofs: Path, **of_web: Any) -> None:
    made = {"python": sys.executable, "proofs": str(proofs), "log_marker": LOG_MARKER}
    farm.write_script("environments/lb/out.py", BEFORE.format(**made))
    farm.write_script("environments/lb/in.sh", '#!/bin/sh\ntest "$SECRET_LB_TOKEN"\n')
    farm.write_script("ops/configure.py", MACHINE.format(**made))
    farm.write_script("ops/work.sh", PLAIN.format(proofs=proofs))
    farm.write_process(
        variables={"marker": MARKER},
        secrets={"app_key": {"available_to": ["web"]}, "server_only": {"available_to": "server"}},
        packages={"web": "Acme.Web"},
        steps=[
            {
                "name": "web",
                "roles": ["web"],
                "deploy": "web",
                "to": f"{farm.folder}/srv/${{machine.name}}",
                "rotation": "web",
                "apply": [
                    {"name": OPERATION_MARKER[2:], "script": "ops/configure.py", "secrets": ["app_key"]},
                    "switch",
                ],
            }
            | of_web,
            {
                "name": "work",
                "roles": ["worker"],
                "deploy": "web",
                "to": f"{farm.folder}/srv/${{machine.name}}",
                "apply": [{"name": "work", "script": "ops/work.sh"}, "switch"],
            },
        ],
    )
    farm.write_environment(
        machines={"work1": {"roles": ["worker"]}},
        rotation={"web": {"before": "lb/out.py", "after": "lb/in.sh", "secrets": ["lb_token", "lb_pin"]}},
        secrets={
            "lb_token": {"file": str(vault / "lb.token")},
            "lb_pin": {"env": "LB_PIN"},
            "app_key": {"file": str(vault / "app.key")},
            "server_only": {"file": str(vault / "lb.token")},
        },
    )


def write_vault(folder: Path) -> Path:
    folder.mkdir()
    for name, value in (("lb.token", LB_TOKEN), ("app.key", APP_KEY)):
        (folder / name).write_text(value + "\n")
        (folder / name).chmod(0o600)
    return folder


def roll_through(world: World) -> None:
    """One deployment, stopped in the server's script and in the machine's to look around."""
    words = ("release", "deploy", "1.0.0", "--environment", "production", "--package", "web=1.0.0")
    process = world.farm.start(*words, LB_PIN=LB_PIN)
    world.deploying = process.pid
    try:
        _wait(world.proofs / "before-web1", process)
        world.during["server"] = processes()
        (world.proofs / "go-on").touch()
        _wait(world.proofs / "machine-web1", process)
        world.during["machine"] = processes()
        world.on_disk["machine"] = places_of(APP_KEY, *everywhere(world))
        (world.proofs / "machine-may-end").touch()
    except BaseException:
        process.end()
        raise
    finally:
        done = world.note("deploy", process.result())
    assert done.code == 0, done.out + done.err


def _wait(path: Path, process: Process) -> None:
    wait_for(lambda: path.exists() or not process.is_alive, 60.0)
    assert process.is_alive, "the deployment was over before its script ran"


def ask_people(world: World) -> None:
    """Two more deployments that people decide: a retry and a gate, then a machine that goes back."""
    farm, ill = world.farm, world.folder / "ill"
    farm.write_script("ops/verify.sh", f"#!/bin/sh\necho {LOG_MARKER} verify; test ! -e {ill}\n")
    farm.write_script("ops/look.sh", f"#!/bin/sh\necho {LOG_MARKER} look\n")
    gate = {"name": "looks good", "check": "ops/look.sh", "ask": "Is it good?", "approvers": ["anna"]}
    write_release(
        farm,
        world.vault,
        world.proofs,
        strategy={"rolling": {"phases": [{"machines": 1, "gate": gate}]}},
        verify=[{"command": ["ops/verify.sh"], "deadline": "1s"}],
        on_failure="ask",
    )
    farm.do("trust", "person", "anna")
    anna = ("--as", "anna", "-m", "I looked")
    for version in ("1.1.0", "1.2.0"):
        farm.add_package("Acme.Web", version, {"about.txt": f"{version} {FILE_MARKER}\n"})
        ill.touch()
        words = ("deploy", version, "--environment", "production", "--package", f"web={version}")
        _people(world, 3, *words, "--no-wait")
        if version == "1.1.0":
            ill.unlink()
            _people(world, 0, "decide", "web1", "retry", *anna)
            _people(world, 3, "resume", "--no-wait")
            _people(world, 0, "approve", "looks good", *anna)
            _people(world, 0, "resume")
        else:
            _people(world, 0, "decide", "web1", "rollback", *anna)
            ill.unlink()
            _people(world, 1, "resume")


def _people(world: World, code: int, *words: str) -> None:
    done = world.note(" ".join(("release", *words)), world.farm.call("release", *words, LB_PIN=LB_PIN))
    assert done.code == code, f"{words}: {done.code}\n{done.out}\n{done.err}"


def ask_everybody(world: World) -> None:
    """All that commands say of it afterwards."""
    farm = world.farm
    for words in (
        ("release", "status"),
        ("release", "log"),
        ("release", "history"),
        ("rotation", "list"),
        ("release", "plan", "--environment", "production", "--package", "web=1.0.0"),
    ):
        for more in ((), ("--json",)):
            world.note(" ".join((*words, *more)), farm.do(*words, *more, LB_PIN=LB_PIN))
    for agent in farm.agents.values():
        for more in ((), ("--json",)):
            done = run(farm.home, "agent", "status", "--home", agent.home, *more)
            world.note(f"agent status of {agent.name} {more}", done)
        world.told[f"log of {agent.name}"] = agent.said


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("secrets")
    with Farm(folder / "farm", cold=True) as farm:
        relay = farm.add_relay("fra")
        tap = Tap(relay.port)
        farm.urls["fra"] = tap.url
        (proofs := folder / "proofs").mkdir()
        made = World(farm, tap, write_vault(folder / "vault"), proofs)
        farm.add_package("Acme.Web", "1.0.0", {"about.txt": FILE_MARKER + "\n" + "x" * 4000})
        for name in ("web1", "work1"):
            farm.add_agent(name).start()
        write_release(farm, made.vault, proofs)
        roll_through(made)
        ask_people(made)
        ask_everybody(made)
        yield made
        tap.close()


def everywhere(world: World) -> list[Path]:
    """Every disk of the farm. The vault, where secrets live, is elsewhere."""
    return [world.folder]


# --- the search itself


def test_the_search_finds_what_takes_the_same_roads_and_is_no_secret(world: World) -> None:
    wire = world.tap.bytes
    assert holds(wire, OPERATION_MARKER), "an order"
    assert holds(wire, FILE_MARKER), "a package's content"
    assert holds(wire, LOG_MARKER), "a script's output"
    assert folders_with(world, OPERATION_MARKER) >= {"origin", "machines", "relay-fra"}
    found = places_of(MARKER, *everywhere(world))
    assert folders_with(world, MARKER) >= {"origin", "project"}
    assert any(path.name == "journal.db" for path in found)
    assert folders_with(world, FILE_MARKER) >= {"origin", "relay-fra", "srv", "Acme.Web.1.0.0.nupkg"}


def folders_with(world: World, value: str) -> set[str]:
    return {path.relative_to(world.folder).parts[0] for path in places_of(value, *everywhere(world))}


def test_variables_of_orders_are_read_by_no_relay_and_on_no_line(world: World) -> None:
    """Nor do they lie on a machine, where the order is kept as it came."""
    assert not holds(world.tap.bytes, MARKER)
    assert folders_with(world, MARKER).isdisjoint({"relay-fra", "machines"})


@pytest.mark.parametrize("coded", [lambda raw: raw, base64.b64encode, base64.urlsafe_b64encode, bytes.hex, quote])
def test_the_search_knows_every_form_of_a_value(coded: Any) -> None:
    for lead in (b"", b"a", b"ab"):
        made = coded(lead + LB_TOKEN.encode() + b"tail")
        data = b"noise " + (made if isinstance(made, bytes) else made.encode()) + b" noise"
        assert holds(data, LB_TOKEN)
        assert holds(b'{"payload":"' + base64.b64encode(b'{"x":"' + base64.b64encode(data) + b'"}') + b'"}', LB_TOKEN)
    assert not holds(b"noise", LB_TOKEN)


# --- the server's


@pytest.mark.parametrize("secret", [LB_TOKEN, LB_PIN], ids=["from a file", "from the environment"])
def test_scenario_05_a_server_secret_is_on_no_disk_and_on_no_wire(world: World, secret: str) -> None:
    assert places_of(secret, *everywhere(world)) == []
    assert not holds(world.tap.bytes, secret)


@pytest.mark.parametrize(
    "secret", [LB_TOKEN, LB_PIN, APP_KEY], ids=["from a file", "from the environment", "machine's"]
)
def test_scenario_05_no_command_prints_a_secret(world: World, secret: str) -> None:
    assert len(world.told) > 12
    assert [what for what, text in world.told.items() if holds(text.encode(), secret)] == []


@pytest.mark.parametrize("secret", [LB_TOKEN, LB_PIN], ids=["from a file", "from the environment"])
def test_a_server_secret_is_known_to_no_process_but_the_engine_and_its_script(world: World, secret: str) -> None:
    for running in world.during.values():
        assert [each for each in running.values() if holds(each.cmdline, secret)] == []
    running = world.during["server"]
    knowing = {each.pid: each for each in running.values() if holds(each.environ, secret)}
    mine = {pid for pid, each in knowing.items() if pid == world.deploying or is_below(each, world.deploying, running)}
    assert set(knowing) == mine
    assert any(b"out.py" in each.cmdline for each in knowing.values()), "the script itself was not looked at"
    for name in world.farm.agents:
        assert world.pid_of_agent(name) in running
    assert world.farm.relays["fra"].pid in running
    later = world.during["machine"]
    assert {pid for pid, each in later.items() if holds(each.environ, LB_TOKEN)} == set()


def test_the_output_of_a_server_script_is_masked(world: World) -> None:
    log = world.told["release log"]
    line = next(line for line in log.splitlines() if LOG_MARKER in line and "before" in line)
    assert line.split(LOG_MARKER)[1].split() == ["********"] * 4
    assert "split: ******** end" in log


def test_a_machine_script_that_asks_for_a_server_secret_is_refused_by_name_before_anything_is_contacted(
    world: World, tmp_path: Path
) -> None:
    process = world.farm.project / "release.yaml"
    good, bytes_before = process.read_text(), len(world.tap.bytes)
    process.write_text(good.replace("- app_key\n", "- server_only\n"))
    try:
        assert process.read_text() != good
        for words in (("plan", "2.0.0"), ("deploy", "2.0.0")):
            done = world.farm.call(
                "release", *words, "--environment", "production", "--package", "web=1.0.0", LB_PIN=LB_PIN
            )
            said = done.out + done.err
            assert done.code == 2, said
            assert "server_only" in said
            assert re.search(r"release\.yaml:\d+", said), said
            assert "server" in said.split("server_only", 1)[1]
    finally:
        process.write_text(good)
    grown = world.tap.bytes[bytes_before:]
    assert b"/v1/orders" not in grown
    assert b"/v1/offers" not in grown


# --- the machine's


def test_a_machine_secret_reaches_its_script(world: World) -> None:
    proof = (world.proofs / "machine-web1").read_text()
    assert proof == hashlib.sha256(APP_KEY.encode()).hexdigest()
    assert (world.proofs / "secrets-of-work1").read_text().strip() == "0"


def test_a_machine_secret_is_on_no_disk_while_its_script_runs_nor_after(world: World) -> None:
    assert world.on_disk["machine"] == []
    assert places_of(APP_KEY, *everywhere(world)) == []


def test_a_machine_secret_crosses_no_wire_in_the_clear(world: World) -> None:
    assert not holds(world.tap.bytes, APP_KEY)


def test_a_machine_secret_is_known_to_no_process_but_its_script(world: World) -> None:
    running = world.during["machine"]
    assert [each for each in running.values() if holds(each.cmdline, APP_KEY)] == []
    knowing = {each.pid: each for each in running.values() if holds(each.environ, APP_KEY)}
    agent = world.pid_of_agent("web1")
    assert agent not in knowing
    assert {pid for pid, each in knowing.items() if not is_below(each, agent, running)} == set()
    assert any(b"configure.py" in each.cmdline for each in knowing.values()), "the script itself was not looked at"


def test_scenario_33_a_machine_script_that_prints_its_secret_gives_stars(world: World) -> None:
    log = world.told["release log"]
    line = next(line for line in log.splitlines() if LOG_MARKER in line and "configure" in line)
    # Python's repr of the bytes shows the value between b' and '.
    assert line.split(LOG_MARKER)[1].split() == ["********"] * 3 + ["b'********'"]
    assert "split: ******** end" in log
    assert re.search(r"in more: \S{0,5}\*{8}\S{0,5}$", log, re.MULTILINE), log


def test_what_an_order_on_the_wire_says_opens_for_its_agent_in_its_operation_alone(world: World) -> None:
    keys = {name: read_sealing_key(str(agent.home / "sealing.key")) for name, agent in world.farm.agents.items()}
    found = {each.operation: each for each in orders_on(world.tap.bytes) if OPERATION_MARKER in each.operation}
    order = found[min(found)]  # of the first deployment
    assert "/web1/" in order.operation
    action = open_order(order, keys["web1"]).action
    assert isinstance(action, RunScript)
    assert action.variables["VAR_MARKER"] == MARKER
    with pytest.raises(SignatureError):
        open_order(order, keys["work1"])
    with pytest.raises(SignatureError):
        open_order(msgspec.structs.replace(order, operation=order.operation[:-1] + "2"), keys["web1"])
    sealed = action.secrets["SECRET_APP_KEY"]
    assert open_sealed(sealed, keys["web1"], secret_context(order.operation, "SECRET_APP_KEY")).decode() == APP_KEY
    with pytest.raises(SignatureError):
        open_sealed(sealed, keys["web1"], secret_context(order.operation, "SECRET_LB_TOKEN"))


def orders_on(data: bytes) -> Iterable[Order]:
    for layer in peeled(data):
        if layer.startswith(b'{"action":'):
            with suppress(msgspec.MsgspecError):
                yield msgspec.json.decode(layer, type=Order)


# --- the audit trail of the release


def trails(world: World) -> dict[str, str]:
    """Every line of the events of this farm, by whose they are."""
    relay = world.farm.relays["fra"].process
    assert relay is not None
    said = {name: agent.process.err for name, agent in world.farm.agents.items() if agent.process is not None}
    return {"relay": relay.err, **said, "orchestrator": (world.farm.home / "events.jsonl").read_text()}


def test_the_events_of_a_whole_release_say_who_did_what(world: World) -> None:
    told = {who: events(text) for who, text in trails(world).items()}
    begun, *_ = [event for event in told["orchestrator"] if event["event"] == "deployment.started"]
    mine = [event for event in told["orchestrator"] if event.get("deployment") == begun["deployment"]]
    assert begun["operator"] == mine[0]["operator"]
    assert [
        event["event"].partition(".")[2] for event in mine if event.get("machine", "web1") == "web1"
    ] == ORCHESTRATED
    assert [event["event"].partition(".")[2] for event in told["web1"]][: len(ON_WEB1)] == ON_WEB1
    here = [f"{event['event'].partition('.')[2]} {event.get('agent', '')}".strip() for event in told["relay"]]
    assert set(here) == AT_THE_RELAY
    assert {event["address"] for event in told["relay"] if "address" in event} == {"127.0.0.1"}
    [keys] = [event for event in told["orchestrator"] if event["event"] == "orchestrator.keys_made"]
    accepted = [event for event in told["web1"] if event["event"] == "agent.order_accepted"]
    accepted = [event for event in accepted if event["operation"].startswith(begun["deployment"])]
    assert {event["key"] for event in accepted} == {keys["order_key"]}, "whose order it was"
    sent = {
        event["order"] for event in mine if event["event"] == "deployment.dispatched" and event["machine"] == "web1"
    }
    assert sent == {event["order"] for event in accepted if event["action"] != "acknowledge"}


def test_no_event_holds_the_value_of_a_secret_or_a_variable(world: World) -> None:
    for who, text in trails(world).items():
        for value in (LB_TOKEN, LB_PIN, APP_KEY, MARKER, LOG_MARKER):
            assert not holds(text.encode(), value), who


ORCHESTRATED = [
    "lock_taken", "started",
    *("dispatched", "reported", "surveyed"),
    *("dispatched", "replicated", "replicated", "reported", "acquired", "barrier"),
    *("step_started", "turn_started", "bracket_opened", "server_run_dispatched", "server_run_ended"),
    *("turn_did", "dispatched", "reported") * 3,
    *("turn_did", "server_run_dispatched", "server_run_ended", "bracket_closed", "turn_did", "turn_ended", "step_ended"),
    *("step_started", "step_ended"),
    "ended", "lock_given_back",
]  # fmt: skip
ON_WEB1 = [
    "started", "ready",
    *("order_accepted", "operation_ended"),
    *("order_accepted", "pull_begun", "pull_ended", "pull_begun", "pull_ended", "operation_ended"),
    *("order_accepted", "script_started", "script_ended", "operation_ended"),
    *("order_accepted", "switched", "operation_ended"),
    *("order_accepted", "settled", "operation_ended"),
    "order_accepted",
]  # fmt: skip
AT_THE_RELAY = {
    "started", "ready", "package_offered", "package_published",
    *(f"{what} {agent}" for agent in ("web1", "work1") for what in ("order_posted", "order_taken", "report_posted")),
}  # fmt: skip
