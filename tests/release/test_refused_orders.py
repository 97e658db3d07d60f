"""Orders that must not be obeyed, put straight into a relay's mail by somebody who may post orders there.

Whoever has a relay's `order` token can make agents read anything. Nothing of it may run, and people must learn of it.
The control comes first: the same order, untouched and signed by the order key, runs. So each refusal below is for the
one thing that differs.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from harness.farm import Agent, Farm
from harness.process import Done, Process, run, wait_for
from harness.relays import RelayProcess

from agent.orders.envelopes import open_order, sign_order
from agent.orders.orders import Order, Presence, RunScript
from orchestrator.trust.keyring import init_trust, load_signer
from relay.protocol import messages
from relay.protocol.connection import Connection
from relay.protocol.mail_client import MailClient
from relay.support.private_files import read_sealing_key
from relay.trust.envelopes import unverified
from relay.trust.keys import OrderKey, encode_pins, keyid_of, parse_pins

CANARY = """#!/bin/sh
echo "$DEPLOYMENT $STEP ${VAR_EXTRA:-}" >> {ran}/$MACHINE
"""
HOLD = """#!/bin/sh
touch {ran}/holds-$RELEASE
while [ -e {ran}/hold-$RELEASE ]; do sleep 0.02; done
"""
ATTACK = "01JD00000000000000000000ZZ"
"""A deployment that nobody ever began."""


class World:
    """Two machines, a relay that wants tokens, and an attacker who has one for orders."""

    def __init__(self, farm: Farm, ran: Path) -> None:
        self.farm = farm
        self.ran = ran
        self.tokens: dict[str, str] = {}
        self._letters = 0
        self._versions = 0

    # --- what is usual

    def write_release(self) -> None:
        farm = self.farm
        farm.write_script("ops/canary.sh", CANARY.replace("{ran}", str(self.ran)))
        farm.write_script("ops/hold.sh", HOLD.format(ran=self.ran))
        farm.write_process(
            packages={"web": "Acme.Web"},
            steps=[
                {"name": "hold", "run_on": "server", "script": "ops/hold.sh"},
                {
                    "name": "farm",
                    "roles": ["web"],
                    "deploy": "web",
                    "to": f"{farm.folder}/srv/${{machine.name}}",
                    "apply": [{"name": "canary", "script": "ops/canary.sh"}, "switch"],
                },
            ],
        )
        token = {"file": str(farm.folder / "origin.token")}
        farm.write_environment(relays={"fra": {"url": farm.urls["fra"], "site": "fra", "token": token}})

    def words(self, label: str, *, new: bool = True) -> tuple[str, ...]:
        """To deploy a version under a label: a new one, or the last again."""
        self._versions += new
        version = f"1.0.{self._versions}"
        if new:
            self.farm.add_package("Acme.Web", version, {"version.txt": version})
        return ("release", "deploy", label, "--environment", "production", "--package", f"web={version}")

    @contextmanager
    def held(self, label: str) -> Iterator[Process]:
        """A deployment that waits on the server, after acquisition and before any machine; afterwards it may go on."""
        (self.ran / f"hold-{label}").touch()
        deploying = self.farm.start(*self.words(label))
        try:
            wait_for(lambda: (self.ran / f"holds-{label}").exists() or not deploying.is_alive, 60.0)
            assert deploying.is_alive, deploying.result()
            yield deploying
        finally:
            (self.ran / f"hold-{label}").unlink()
            deploying.send_signal(signal.SIGCONT)

    def counts(self) -> dict[str, int]:
        """How many scripts ran on each machine."""
        paths = {name: self.ran / name for name in self.farm.agents}
        return {name: len(path.read_text().splitlines()) for name, path in paths.items() if path.exists()}

    # --- what is not

    def recorded(self, agent: str = "web1") -> tuple[bytes, Order]:
        """The envelope of the newest script that this agent was truly ordered to run."""
        paths = (self.farm.agents[agent].home / "operations").glob("*/order")
        key = read_sealing_key(str(self.farm.agents[agent].home / "sealing.key"))
        orders = [(open_order(unverified(path.read_bytes(), Order), key), path.read_bytes()) for path in paths]
        genuine = [
            (o.not_before, o, e) for o, e in orders if isinstance(o.action, RunScript) and o.deployment != ATTACK
        ]
        _, order, envelope = max(genuine, key=lambda each: each[0])
        return envelope, order

    def order(self, agent: str = "web1", **changes: Any) -> Order:
        """A good order to run the canary once more, under a name of its own."""
        self._letters += 1
        _, genuine = self.recorded(agent)
        made = msgspec.structs.replace(
            genuine,
            operation=f"{ATTACK}/1/{agent}/canary-{self._letters}/1",
            deployment=ATTACK,
            not_before=time.time(),
            not_after=time.time() + 600,
        )
        return msgspec.structs.replace(made, **changes)

    def sign(self, order: Order, trust: Path | None = None) -> bytes:
        return sign_order(order, load_signer(str(trust or self.farm.home / "trust"), "order"))

    def post(self, *envelopes: bytes, agent: str = "web1", deployment: str = ATTACK) -> messages.TakenAnswer:
        """Into the relay's mail, each under a name that was never used."""
        letters = []
        for envelope in envelopes:
            self._letters += 1
            operation = f"{deployment}/9/{agent}/letter-{self._letters}/1"
            letters.append(messages.OrderLetter(agent=agent, operation=operation, envelope=envelope))

        async def send() -> messages.TakenAnswer:
            async with Connection(self.farm.urls["fra"], token=self.tokens["attacker"]) as relay:
                return await MailClient(relay).post_orders(letters)

        return asyncio.run(send())

    def presences(self, agent: str) -> list[float]:
        """When those that live under this name said last, at the relay, that they are there."""

        async def ask() -> list[float]:
            async with Connection(self.farm.urls["fra"], token=self.tokens["attacker"]) as relay:
                seen = await MailClient(relay).agents()
            return [unverified(each.presence, Presence).time for each in seen if each.name == agent and each.age == 0.0]

        return asyncio.run(ask())

    def agent_status(self, agent: str) -> Any:
        home = self.farm.agents[agent].home
        return run(self.farm.home, "agent", "status", "--home", home, "--limit", "200", "--json").json

    def refused(self, *envelopes: bytes, agent: str = "web1", deployment: str = ATTACK) -> list[Any]:
        """Post them; nothing may run, and each must be refused."""
        before = self.counts()
        self.post(*envelopes, agent=agent, deployment=deployment)
        wanted = [hashlib.sha256(envelope).hexdigest() for envelope in envelopes]
        path = self.farm.agents[agent].home / "refusals.jsonl"
        wait_for(lambda: path.exists() and all(each in path.read_text() for each in wanted), 30.0)
        status = self.agent_status(agent)
        found = {each["digest"]: each for each in status["refusals"]}
        told = [found[each] for each in wanted]
        ran = {each["operation"] for each in status["operations"]}
        assert not ran.intersection(each["operation"] for each in told if each["code"] != "altered")
        assert self.counts() == before
        return told


def add_relay(farm: Farm) -> tuple[RelayProcess, dict[str, str]]:
    """A relay that asks for tokens; they are written beside it, and returned by whose they are."""
    config = farm.folder / "relay.yaml"
    config.write_text("listen: 127.0.0.1:0\n")
    tokens = {}
    for name, scopes in {"origin": ("write", "order"), "agents": ("read", "agent"), "attacker": ("order",)}.items():
        made = farm.do("relay", "token", *scopes, "--config", config, "--name", name)
        tokens[name] = made.out.strip().splitlines()[-1]
        path = farm.folder / f"{name}.token"
        path.touch(mode=0o600)
        path.write_text(tokens[name] + "\n")
    return farm.add_relay("fra", "--config", config), tokens


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("refused")
    (folder / "ran").mkdir()
    with Farm(folder / "farm") as farm:
        made = World(farm, folder / "ran")
        _, made.tokens = add_relay(farm)
        pin_staging_key(farm, folder / "staging")
        for name in ("web1", "web2"):
            farm.add_agent(name, token_file=str(farm.folder / "agents.token")).start()
        made.write_release()
        # Two, so that there is a fence to be behind.
        for label in ("first", "second"):
            farm.do(*made.words(label))
        yield made


def pin_staging_key(farm: Farm, folder: Path) -> None:
    """Let agents know a second order key, of people who may order in `staging` alone. It lies in `folder`."""
    [staging] = init_trust(str(folder)).order
    path = farm.home / "trust" / "trust.json"
    pins = parse_pins(path.read_bytes())
    scoped = OrderKey(keyid=keyid_of(staging.public), public=staging.public, environments=("staging",))
    path.write_bytes(encode_pins(msgspec.structs.replace(pins, order=(*pins.order, scoped))))


def payload_of(envelope: bytes) -> Any:
    return json.loads(base64.b64decode(json.loads(envelope)["payload"]))


def with_payload(envelope: bytes, payload: bytes) -> bytes:
    """The same signature around another text."""
    return json.dumps(json.loads(envelope) | {"payload": base64.b64encode(payload).decode()}).encode()


# --- the control


def test_the_same_order_untouched_and_well_signed_runs_once(world: World) -> None:
    before = world.counts()
    order = world.order(action=with_variable(world.recorded()[1], "VAR_EXTRA", "control"))
    envelope = world.sign(order)
    world.post(envelope)
    wait_for(lambda: world.counts()["web1"] == before["web1"] + 1)
    # Twice more by other names, and once more after a restart: the same order is the same order.
    world.post(envelope, envelope)
    agent = world.farm.agents["web1"]
    agent.stop()
    world.post(envelope)
    agent.start()
    world.refused(b"the relay's mail was read up to here")
    assert world.counts() == before | {"web1": before["web1"] + 1}
    assert (world.ran / "web1").read_text().count("control") == 1


def with_variable(order: Order, name: str, value: str) -> RunScript:
    assert isinstance(order.action, RunScript)
    return msgspec.structs.replace(order.action, variables={**order.action.variables, name: value})


# --- replayed


def test_a_recorded_order_of_a_deployment_that_is_over_runs_nothing(world: World) -> None:
    before = world.counts()
    for agent in ("web1", "web2"):
        envelope, order = world.recorded(agent)
        assert order.deployment == world.farm.status()["summary"]["deployment"]
        world.post(envelope, envelope, agent=agent)
        world.refused(b"the relay's mail was read up to here, " + agent.encode(), agent=agent)
    assert world.counts() == before


# --- altered

ALTERED: Mapping[str, Callable[[Any], Any]] = {
    "format": lambda value: value + 1,
    "operation": lambda value: value.replace("canary", "changed"),
    "deployment": lambda value: "01JD00000000000000000000ZY",
    "environment": lambda value: "staging",
    "fence": lambda value: value + 1,
    "journal": lambda value: "f" * 32,
    "agent": lambda value: "web2",
    "key": lambda value: "sha256:" + "0" * 64,
    "not_before": lambda value: value - 1,
    "not_after": lambda value: value + 1e6,
    "relays": lambda value: [*value, "http://127.0.0.1:1"],
    "project": lambda value: "desk",
    "action": lambda value: value | {"type": "switch"},
}
ALTERED_ACTION: Mapping[str, Callable[[Any], Any]] = {
    "package": lambda value: "0" * 64,
    "path": lambda value: "ops/other.sh",
    "variables": lambda value: value | {"LD_PRELOAD": "/tmp/evil.so"},
    "root": lambda value: "/",
    "timeout": lambda value: (value or 600.0) + 1,
    "idempotent": lambda value: not value,
    "stall": lambda value: (value or 0.0) + 1.0,
    "secrets": lambda value: {"SECRET_X": "AAAA"},
}


def test_an_order_with_any_field_altered_is_refused_as_forged(world: World) -> None:
    envelope = world.sign(world.order())
    payload = payload_of(envelope)
    assert set(ALTERED) == set(Order.__struct_fields__), "a field that nobody alters here"
    assert set(ALTERED_ACTION) == set(RunScript.__struct_fields__), "a field that nobody alters here"
    altered = [payload | {name: change(payload[name])} for name, change in ALTERED.items()]
    for name, change in ALTERED_ACTION.items():
        altered.append(payload | {"action": payload["action"] | {name: change(payload["action"].get(name))}})
    assert all(each != payload for each in altered)
    told = world.refused(*(with_payload(envelope, json.dumps(each).encode()) for each in altered))
    assert {each["code"] for each in told} == {"forged"}
    assert all("sign" in each["text"] for each in told), told


def test_an_order_without_its_own_signature_is_refused(world: World) -> None:
    envelope = json.loads(world.sign(world.order()))
    other = json.loads(world.sign(world.order()))
    [signature] = envelope["signatures"]
    bad = base64.b64decode(signature["sig"])
    flipped = base64.b64encode(bytes([bad[0] ^ 1]) + bad[1:]).decode()
    told = world.refused(
        json.dumps(envelope | {"signatures": []}).encode(),
        json.dumps(envelope | {"signatures": [signature | {"sig": flipped}]}).encode(),
        json.dumps(envelope | {"signatures": other["signatures"]}).encode(),
        json.dumps(envelope | {"payloadType": "application/vnd.waystation.report+json"}).encode(),
        base64.b64decode(envelope["payload"]),
        b"\x00\xff nothing at all",
    )
    assert {each["code"] for each in told} <= {"forged", "malformed"}


def test_another_order_under_an_id_that_was_obeyed_is_refused_even_where_the_key_signed_it(world: World) -> None:
    _, genuine = world.recorded()
    again = msgspec.structs.replace(genuine, action=with_variable(genuine, "VAR_EXTRA", "altered"))
    [told] = world.refused(world.sign(again))
    assert told["code"] == "altered"
    assert told["operation"] == genuine.operation
    assert "altered" not in (world.ran / "web1").read_text()


# --- expired, foreign, fenced off

HOUR = 3600.0


WRONG: Mapping[str, tuple[Callable[[Order], Mapping[str, Any]], str]] = {
    "expired": (
        lambda good: {"not_before": good.not_before - 3 * HOUR, "not_after": good.not_after - 3 * HOUR},
        "over",
    ),
    "too_early": (
        lambda good: {"not_before": good.not_before + 2 * HOUR, "not_after": good.not_after + 2 * HOUR},
        "future",
    ),
    "other_agent": (lambda good: {"agent": "web2"}, "for web2"),
    "other_key": (lambda good: {"key": "sha256:" + "0" * 64}, "with the key"),
    "operation": (lambda good: {"deployment": "01JD00000000000000000000ZY"}, "not of the deployment"),
    "fenced_off": (lambda good: {"fence": good.fence - 1}, "is behind"),
    "other_journal": (lambda good: {"journal": "f" * 32}, "another journal"),
}
"""By the code of its refusal: what differs from a good order, and what a person must read of it."""


def test_orders_that_are_stale_or_foreign_are_refused_each_with_its_reason(world: World) -> None:
    made = []
    for change, _ in WRONG.values():
        good = world.order()
        made.append(world.sign(msgspec.structs.replace(good, **change(good))))
    told = world.refused(*made)
    assert [each["code"] for each in told] == list(WRONG)
    shown = run(world.farm.home, "agent", "status", "--home", world.farm.agents["web1"].home).out
    for each, (_, text) in zip(told, WRONG.values(), strict=True):
        assert text in each["text"]
        assert each["code"] in shown
        assert each["text"] in shown


def test_an_order_for_another_machine_is_refused_where_it_was_not_sent(world: World) -> None:
    envelope, _ = world.recorded("web2")
    [told] = world.refused(envelope, agent="web1")
    assert told["code"] == "other_agent"


def test_orders_by_keys_that_have_no_say_here_are_refused(world: World, tmp_path: Path) -> None:
    init_trust(str(tmp_path / "stranger"))
    by_stranger, by_staging, by_package_key = world.refused(
        world.sign(world.order(), tmp_path / "stranger"),
        world.sign(world.order(), world.farm.folder.parent / "staging"),
        sign_order(world.order(), load_signer(str(world.farm.home / "trust"), "package")),
    )
    assert by_stranger["code"] == "forged"
    assert by_staging["code"] == "scope"
    assert "production" in by_staging["text"]
    assert by_package_key["code"] == "forged"


# --- what the deployment under attack says


def test_release_status_tells_what_agents_refused_while_it_runs_and_afterwards(world: World) -> None:
    with world.held("attacked") as deploying:
        deployment = world.farm.status()["summary"]["deployment"]
        forged = with_payload(world.sign(world.order()), json.dumps(payload_of(world.recorded()[0])).encode())
        mine = next(each for each in orders_of(world, "web1") if each.deployment == deployment)
        altered = world.sign(msgspec.structs.replace(mine, not_after=mine.not_after + 1))
        invented = msgspec.structs.replace(
            mine, operation=f"{deployment}/2/web1/invented/1", not_after=mine.not_before - HOUR
        )
        expired = world.sign(invented)
        told = world.refused(forged, altered, expired, deployment=deployment)
        assert [each["code"] for each in told] == ["forged", "altered", "expired"]
        reasons = [each["text"] for each in told]
        wait_for(lambda: all(reason in world.farm.do("release", "status").out for reason in reasons), 30.0, 0.5)
    done = deploying.result()
    assert done.code == 0, done.out + done.err
    document = json.dumps(world.farm.status(), ensure_ascii=False)
    for each in told:
        assert f"{each['code']}: {each['text']}" in document
        assert each["text"] in done.out, "who watches was not told"


def orders_of(world: World, agent: str) -> list[Order]:
    paths = (world.farm.agents[agent].home / "operations").glob("*/order")
    return [unverified(path.read_bytes(), Order) for path in paths]


# --- old and other orchestrators


def test_another_orchestrator_is_refused_unless_it_adopts_and_the_old_one_is_fenced_off_when_it_wakes(
    world: World,
) -> None:
    before = world.counts()
    other = another_orchestrator(world)
    with world.held("asleep") as asleep:
        asleep.send_signal(signal.SIGSTOP)
        old = world.farm.status()["summary"]["deployment"]

        words = world.words("taken-over")
        refused = run_as(other, world, *words)
        assert refused.code == 1, refused.out + refused.err
        assert "another orchestrator has not finished here" in refused.out + refused.err
        assert old in refused.out + refused.err
        assert "--adopt" in refused.out + refused.err
        assert world.counts() == before

        adopted = run_as(other, world, *words, "--adopt")
        assert adopted.code == 0, adopted.out + adopted.err
        once_more = {name: count + 1 for name, count in before.items()}
        assert world.counts() == once_more
        current = {name: world.farm.current(name) for name in world.farm.agents}
    done = asleep.result()

    assert done.code == 1, done.out + done.err
    assert world.counts() == once_more, "the old orchestrator ran something"
    assert {name: world.farm.current(name) for name in world.farm.agents} == current
    assert "fenced_off" in done.out
    status = world.farm.status()
    assert status["summary"]["deployment"] == old
    assert status["summary"]["state"] == "failed"
    refusals = [each for each in status["refusals"] if each["operation"].startswith(f"{old}/2/")]
    assert {each["machine"] for each in refusals} == {"web1", "web2"}
    assert all("is behind" in each["reason"] for each in refusals)
    assert "is behind" in world.farm.do("release", "status").out
    for agent in ("web1", "web2"):
        told = [each for each in world.agent_status(agent)["refusals"] if each["operation"].startswith(f"{old}/2/")]
        assert {each["code"] for each in told} == {"fenced_off"}


def another_orchestrator(world: World) -> Path:
    """A host with the same keys and packages, and a journal of its own."""
    home = world.farm.folder / "other-origin"
    shutil.copytree(world.farm.home, home, ignore=shutil.ignore_patterns("journal.db*", "deployments", "*.lock"))
    return home


def run_as(home: Path, world: World, *words: str) -> Done:
    # The depot is the first one's: versions are added there.
    depot = f"disk:{world.farm.home / 'depot'}"
    return world.farm.call(*words, "--depot", depot, WAYSTATION_HOME=str(home))


# --- clocks

SHIFTED = "import sys, time; del sys.argv[1]; real = time.time; time.time = lambda: real() + {shift}; from relay.main import main; main()"


@pytest.mark.parametrize(("shift", "side"), [(600, "ahead of"), (-600, "behind")])
def test_a_machine_whose_clock_is_wrong_is_refused_before_anything_starts(world: World, shift: int, side: str) -> None:
    before, orders = world.counts(), len(orders_of(world, "web1"))
    agent = world.farm.agents["web2"]
    agent.stop()
    start_with_clock(agent, shift)
    try:
        label = f"skewed-{side.split(maxsplit=1)[0]}"
        done = world.farm.call(*world.words(label, new=False))
    finally:
        agent.stop()
        agent.start()
    assert done.code == 1, done.out + done.err
    assert "web2: its clock is " in done.out
    assert f" s {side} this server's" in done.out
    assert "web1: " not in done.out
    assert world.counts() == before
    assert not (world.ran / f"holds-{label}").exists()
    assert len(orders_of(world, "web1")) == orders, "somebody was given orders"


def start_with_clock(agent: Agent, shift: int) -> None:
    """`agent serve` with a clock that is `shift` seconds off."""
    usual = agent.how
    agent.how = {"under": (sys.executable, "-c", SHIFTED.format(shift=shift))}
    agent.start()
    agent.how = usual


# --- a copied home


def test_a_machine_whose_home_was_copied_is_refused_and_both_are_named(world: World) -> None:
    before, orders = world.counts(), len(orders_of(world, "web1"))
    agent = world.farm.agents["web2"]
    home = world.farm.folder / "copied"
    shutil.copytree(agent.home, home, ignore=shutil.ignore_patterns("serve.lock"))
    copied_at = time.time()
    copy = replace(agent, home=home, process=None)
    copy.start()
    try:
        # The first one is called to show itself again.
        wait_for(lambda: sum(at > copied_at for at in world.presences("web2")) == 2, 30.0)
        done = world.farm.call(*world.words("copied", new=False))
    finally:
        copy.stop()
    assert done.code == 1, done.out + done.err
    assert "web2: two agents live with its keys: one on " in done.out
    assert done.out.count(" (start ") == 2
    assert world.counts() == before
    assert len(orders_of(world, "web1")) == orders, "somebody was given orders"
