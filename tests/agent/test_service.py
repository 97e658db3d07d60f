"""The agent that serves: orders come by real relays, are obeyed once, and their ends are told whatever dies between."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from harness.logs import printed
from harness.orders_kit import DEPLOYMENT, JOURNAL, OTHER, Desk, desk_in, new_signer, tree
from harness.origins import Origin, depot_with
from harness.packages import make_nupkg
from harness.process import Done, Process, eventually, run
from harness.relays import Relay, running_relay
from harness.trail import troubles

from agent.orders.envelopes import order_digest, sign_order, sign_report, verify_presence, verify_report
from agent.orders.journal import OperationJournal
from agent.orders.keys import load_report_signer
from agent.orders.orders import (
    FINAL,
    Acknowledge,
    Acquire,
    Action,
    ControlService,
    Order,
    Report,
    RunScript,
    Settle,
    Stop,
    Survey,
    Switch,
)
from agent.service import Service
from relay.errors import LockedError, UsageError
from relay.protocol import messages
from relay.protocol.client import RelayClient
from relay.protocol.mail_client import MailClient

SCRIPTS = {
    "count.sh": b'#!/bin/sh\necho run >> "$VAR_CANARY"\necho "hello from $WAYSTATION_OPERATION"\n',
    "slow.sh": b'#!/bin/sh\necho begin >> "$VAR_CANARY"\nsleep 30\necho end >> "$VAR_CANARY"\n',
    "secret.sh": b'#!/bin/sh\nprintf %s "$SECRET_KEY" > "$VAR_CANARY"\necho "key $SECRET_KEY"\n',
    "fail.sh": b"#!/bin/sh\necho oh no\nexit 3\n",
    "wait.sh": (
        b'#!/bin/sh\necho first half\necho begin >> "$VAR_CANARY"\n'
        b'while [ ! -e "$VAR_GO" ]; do sleep 0.02; done\necho second half\necho end >> "$VAR_CANARY"\nexit 7\n'
    ),
    "loud.sh": b'#!/bin/sh\ni=0\nwhile [ $i -lt 3000 ]; do echo "line $i of much output"; i=$((i+1)); done\n',
}


class Reader:
    """Reads reports and output of the deployment at every relay that it knows, as the orchestrator does."""

    def __init__(self, desk: Desk, *clients: RelayClient) -> None:
        self.desk = desk
        self.clients = list(clients)
        self.reports: list[Report] = []
        self.log: dict[str, bytearray] = {}

    async def read(self) -> None:
        reports: list[Report] = []
        log: dict[str, bytearray] = {}
        for client in self.clients:
            letters = (await MailClient(client).reports(DEPLOYMENT, None, 0)).reports
            reports += [verify_report(letter.envelope, self.desk.identity) for letter in letters]
            for piece in (await MailClient(client).logs(DEPLOYMENT, None, 0)).pieces:
                whole = log.setdefault(piece.operation, bytearray())
                whole.extend(bytes(max(0, piece.offset + len(piece.data) - len(whole))))
                whole[piece.offset : piece.offset + len(piece.data)] = piece.data
        self.reports, self.log = reports, log

    async def whole_log(self, report: Report) -> bytes:
        async with asyncio.timeout(20):
            while len(self.log.get(report.operation, b"")) < report.log_bytes:
                await self.read()
        return printed(bytes(self.log.get(report.operation, b"")))

    def finals(self, operation: str) -> list[Report]:
        return [report for report in self.reports if report.operation == operation and report.state in FINAL]


@dataclass
class Place:
    """A relay, an origin with a package of scripts, and the agent's desk."""

    folder: Path
    origin: Origin
    relay: Relay
    desk: Desk
    client: RelayClient
    reader: Reader
    stack: AsyncExitStack
    services: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def manifest(self) -> str:
        return self.origin.added[0].manifest.id

    @property
    def canary(self) -> Path:
        return self.folder / "canary"

    @property
    def journal(self) -> OperationJournal:
        return OperationJournal(self.desk.home)

    def service(self, *relays: str, **options) -> Service:
        return Service(self.desk.home, relays=relays or [self.relay.url], **options)

    @asynccontextmanager
    async def another_relay(self, store: str = "second") -> AsyncIterator[tuple[Relay, RelayClient]]:
        """A second relay, without packages; its mail is read too."""
        async with running_relay(self.folder / store) as relay, relay.client() as client:
            self.reader.clients.append(client)
            yield relay, client
            self.reader.clients.remove(client)

    async def post(self, order: Order, envelope: bytes | None = None, client: RelayClient | None = None) -> bytes:
        envelope = envelope or self.desk.sign(order)
        letter = messages.OrderLetter(self.desk.name, order.operation, envelope)
        await MailClient(client or self.client).post_orders([letter])
        return envelope

    async def result(self, operation: str, digest: str | None = None) -> Report:
        found: list[Report] = []
        async with asyncio.timeout(30):
            while not found:
                await self.reader.read()
                finals = self.reader.finals(operation)
                found = [report for report in finals if digest is None or report.order == digest]
                await asyncio.sleep(0.01)
        return found[0]

    async def obey(self, action: Action, name: str, **changes) -> Report:
        order = self.desk.order(action, name, **changes)
        envelope = await self.post(order)
        return await self.result(order.operation, order_digest(envelope))

    async def acquired(self) -> None:
        report = await self.obey(Acquire((tree(self.manifest, id="Acme.Scripts"),), deadline=30.0), "acquire")
        assert report.state == "done", report.reason

    def script(self, path: str, **changes) -> RunScript:
        return msgspec.structs.replace(
            RunScript(self.manifest, path, {"VAR_CANARY": str(self.canary)}, timeout=60.0), **changes
        )

    async def command(self, *words: str) -> Done:
        told = ("agent", words[0], "--home", self.desk.home, *words[1:])
        return await asyncio.to_thread(run, self.folder / "h", *told)

    def runs(self) -> list[str]:
        return self.canary.read_text().splitlines() if self.canary.exists() else []


@asynccontextmanager
async def serving(service: Service) -> AsyncIterator[asyncio.Task[None]]:
    """The service at work in this process; asked to stop at the end."""
    stop = asyncio.Event()
    task = asyncio.create_task(service.serve(stop))
    try:
        yield task
    finally:
        stop.set()
        async with asyncio.timeout(20):
            await asyncio.gather(task, return_exceptions=True)


async def killed(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    nupkg = make_nupkg(tmp_path, SCRIPTS, id="Acme.Scripts")
    async with AsyncExitStack() as stack:
        origin = await stack.enter_async_context(depot_with(tmp_path / "origin", nupkg))
        relay = await stack.enter_async_context(running_relay(tmp_path / "origin" / "depot"))
        desk = desk_in(tmp_path, keys=origin.keys)
        client = await stack.enter_async_context(relay.client())
        yield Place(tmp_path, origin, relay, desk, client, Reader(desk, client), stack)


# --- the road


async def test_an_order_is_obeyed_once_and_its_end_told_with_all_of_its_output(place: Place) -> None:
    async with serving(place.service()):
        await place.acquired()
        report = await place.obey(place.script("count.sh"), "1-count", step=1)

        output = await place.reader.whole_log(report)

    assert (report.state, report.exit_status, report.reason) == ("done", 0, "")
    assert place.runs() == ["run"]
    assert output == f"hello from {report.operation}\n".encode()


async def test_much_output_comes_whole(place: Place) -> None:
    async with serving(place.service()):
        await place.acquired()
        report = await place.obey(place.script("loud.sh"), "1-loud", step=1)
        output = await place.reader.whole_log(report)

    lines = output.decode().splitlines()
    assert lines == [f"line {n} of much output" for n in range(3000)]


async def test_a_script_that_fails_says_its_exit_status(place: Place) -> None:
    async with serving(place.service()):
        await place.acquired()
        report = await place.obey(place.script("fail.sh"), "1-fail", step=1)

    assert (report.state, report.exit_status) == ("failed", 3)


async def test_the_same_order_again_is_answered_and_not_run(place: Place) -> None:
    order = place.desk.order(place.script("count.sh"), "1-count", step=1)
    async with place.another_relay() as (second, other), serving(place.service(place.relay.url, second.url)):
        await place.acquired()
        envelope = await place.post(order)
        await place.result(order.operation)
        await place.post(order, envelope, other)
        # Whatever came by the second relay was taken before this one is answered.
        await place.post(place.desk.order(Survey(()), "again"), client=other)
        await place.result(f"{DEPLOYMENT}/0/web1/again/1")

    assert place.runs() == ["run"]


async def test_a_secret_reaches_the_script_and_no_file_of_ours_and_no_log(place: Place) -> None:
    operation = f"{DEPLOYMENT}/1/web1/1-secret/1"
    sealed = place.desk.seal(operation, {"SECRET_KEY": "correct horse battery"})
    async with serving(place.service()):
        await place.acquired()
        report = await place.obey(place.script("secret.sh", secrets=sealed), "1-secret", step=1)
        output = await place.reader.whole_log(report)

    assert place.canary.read_text() == "correct horse battery"
    assert output == b"key ********\n"
    kept = [path for path in Path(place.desk.home).rglob("*") if path.is_file()]
    assert not [path for path in kept if b"correct horse" in path.read_bytes()]


async def test_a_secret_sealed_for_another_operation_is_not_opened(place: Place) -> None:
    sealed = place.desk.seal(f"{DEPLOYMENT}/1/web1/other/1", {"SECRET_KEY": "correct horse battery"})
    async with serving(place.service()):
        await place.acquired()
        report = await place.obey(place.script("secret.sh", secrets=sealed), "1-secret", step=1)

    assert report.state == "refused"
    assert "SECRET_KEY" in report.reason
    assert place.runs() == []


async def test_an_agent_shows_itself_signed_with_the_fences_that_it_obeys(place: Place) -> None:
    async with serving(place.service()):
        await place.obey(Survey(()), "survey")
        seen: list[messages.AgentSeen] = []
        async with asyncio.timeout(20):
            while not seen or not verify_presence(seen[0].presence).fences:
                await place.obey(Survey(()), f"again-{time.monotonic_ns()}")
                seen = list(await MailClient(place.client).agents())

    presence = verify_presence(seen[0].presence, place.desk.identity.fingerprint)
    assert presence.name == "web1"
    assert presence.fences["test"].fence == 1
    assert presence.fences["test"].open
    assert abs(presence.time - time.time()) < 60


async def test_ready_is_told_once_when_the_first_relay_has_answered(place: Place) -> None:
    told: list[tuple[str, str]] = []
    async with serving(place.service(on_ready=lambda *words: told.append(words))):
        await eventually(lambda: bool(told))
        await place.obey(Survey(()), "survey")

    assert told == [("web1", place.relay.url)]


async def test_a_dead_relay_is_left_for_the_next(place: Place) -> None:
    relays = ("http://127.0.0.1:1", place.relay.url)
    async with place.another_relay() as (second, other), serving(place.service(*relays, second.url)):
        order = place.desk.order(Survey(()), "survey")
        await place.post(order, client=other)

        assert (await place.result(order.operation)).state == "done"


async def test_a_final_report_outlives_the_relay_that_took_the_order(place: Place) -> None:
    """The relay dies while the script runs: the end is told at another one."""
    dying = AsyncExitStack()
    relay, client = await dying.enter_async_context(place.another_relay("dying"))
    async with serving(place.service(relay.url, place.relay.url)):
        await place.acquired()
        order = place.desk.order(place.script("slow.sh", timeout=2.0), "1-slow", step=1)
        await place.post(order, client=client)
        await eventually(lambda: place.runs() == ["begin"])
        await dying.aclose()
        report = await place.result(order.operation)

    assert report.state == "failed"


async def test_results_are_kept_until_they_are_acknowledged(place: Place) -> None:
    async with serving(place.service()):
        report = await place.obey(Survey(()), "survey")
        assert [entry.operation for entry in place.journal.unacknowledged()] == [report.operation]

        await place.post(place.desk.order(Acknowledge((report.operation,), ends=True), "acknowledge"))
        await eventually(lambda: place.journal.unacknowledged() == [])
        await eventually(lambda: not place.journal.fences["test", ""].open)

    assert report.operation in place.journal.operations, "too young to be forgotten"


async def test_a_relay_that_lost_its_mail_is_told_again(place: Place, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        relays = AsyncExitStack()
        relay = await relays.enter_async_context(running_relay(tmp_path / "store"))
        client = await relays.enter_async_context(relay.client())
        async with serving(place.service(relay.url)):
            order = place.desk.order(Survey(()), "survey")
            await place.post(order, client=client)
            reader = Reader(place.desk, client)
            async with asyncio.timeout(20):
                while not reader.finals(order.operation):
                    await reader.read()
            await relays.aclose()
            again = await stack.enter_async_context(running_relay(tmp_path / "empty", port=relay.port))
            reader = Reader(place.desk, await stack.enter_async_context(again.client()))
            async with asyncio.timeout(30):
                while not reader.finals(order.operation):
                    await reader.read()
                    await asyncio.sleep(0.05)


async def test_a_report_that_nobody_acknowledges_is_given_to_the_next_relay_too(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.orders.outbox.REPEAT_SECONDS", 0.1)
    async with place.another_relay() as (second, other), serving(place.service(place.relay.url, second.url)):
        await place.acquired()
        report = await place.obey(place.script("count.sh"), "1-count", step=1)
        readers = [Reader(place.desk, place.client), Reader(place.desk, other)]
        for reader in readers:
            async with asyncio.timeout(20):
                while not reader.finals(report.operation):
                    await reader.read()
        outputs = [await reader.whole_log(report) for reader in readers]

    assert outputs[0] == outputs[1] != b""


async def test_a_final_report_whose_number_is_taken_is_told_under_another(place: Place) -> None:
    """As after a power cut: a relay holds a report of this agent that the agent itself has forgotten."""
    order = place.desk.order(Survey(()), "survey")
    async with place.another_relay() as (second, other), serving(place.service(second.url)) as task:
        await place.post(order, client=other)
        await eventually(lambda: place.journal.operations.get(order.operation) is not None)
        await eventually(lambda: place.journal.operations[order.operation].report is not None)
        await killed(task)
    kept = place.journal.operations[order.operation].report
    assert kept is not None
    forgotten = sign_report(msgspec.structs.replace(kept, reason="forgotten"), load_report_signer(place.desk.home))
    letter = messages.ReportLetter(operation=order.operation, number=kept.number, envelope=forgotten)
    await MailClient(place.client).post_reports(
        "web1", messages.ReportsRequest(deployment=DEPLOYMENT, reports=(letter,))
    )

    async with serving(place.service()):
        numbers: set[int] = set()
        async with asyncio.timeout(20):
            while len(numbers) < 2:
                await place.reader.read()
                numbers = {report.number for report in place.reader.finals(order.operation)}

    assert kept.number in numbers
    assert place.journal.operations[order.operation].report.number == max(numbers)


# --- refusals: nothing runs, and everybody can see why


@dataclass(frozen=True)
class Bad:
    name: str
    code: str

    def make(self, place: Place, order: Order) -> bytes:
        sign, desk = place.desk.sign, place.desk
        changed = msgspec.structs.replace
        match self.name:
            case "altered":
                return sign(order).replace(b'"payload":"ey', b'"payload":"eY')
            case "foreign signer":
                return sign_order(order, new_signer())
            case "package key":
                return sign_order(order, desk.keys.signer)
            case "expired":
                return sign(changed(order, not_before=time.time() - 9000, not_after=time.time() - 8000))
            case "too early":
                return sign(changed(order, not_before=time.time() + 8000, not_after=time.time() + 9000))
            case "other agent":
                return sign(changed(order, agent="web2"))
            case "other key":
                return sign(changed(order, key="sha256:" + "0" * 64))
            case "fenced off":
                return sign(changed(order, fence=4))
            case "other journal":
                return sign(changed(order, fence=5, journal="f" * 32))
            case "other deployment's name":
                return sign(changed(order, deployment=OTHER))
            case "garbage":
                return b"\x00\xff not an envelope"
        raise AssertionError(self.name)


BAD = [
    Bad("altered", "forged"),
    Bad("foreign signer", "forged"),
    Bad("package key", "forged"),
    Bad("expired", "expired"),
    Bad("too early", "too_early"),
    Bad("other agent", "other_agent"),
    Bad("other key", "other_key"),
    Bad("fenced off", "fenced_off"),
    Bad("other journal", "other_journal"),
    Bad("other deployment's name", "operation"),
    Bad("garbage", "forged"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
async def test_a_bad_order_runs_nothing_and_says_why(place: Place, bad: Bad) -> None:
    place.desk.fence = 5
    async with serving(place.service()):
        await place.acquired()
        good = place.desk.order(place.script("count.sh"), "1-count", step=1)
        envelope = bad.make(place, good)
        await place.post(good, envelope)
        report = await place.result(good.operation, order_digest(envelope))
        await place.obey(Survey(()), "after")

        assert report.state == "refused"
        assert report.reason.startswith(f"{bad.code}: ")
        assert place.runs() == [], "it ran"
        [refusal] = place.journal.refusals()
        assert (refusal.code, refusal.operation, refusal.relay) == (bad.code, good.operation, place.relay.url)
        assert good.operation not in place.journal.operations


async def test_a_forged_letter_does_not_keep_the_true_one_from_its_result(place: Place) -> None:
    async with place.another_relay() as (second, other), serving(place.service(place.relay.url, second.url)):
        await place.acquired()
        order = place.desk.order(place.script("count.sh"), "1-count", step=1)
        forged = sign_order(order, new_signer())
        await place.post(order, forged)
        await place.result(order.operation, order_digest(forged))

        true = await place.post(order, client=other)
        report = await place.result(order.operation, order_digest(true))

    assert report.state == "done"
    assert place.runs() == ["run"]


async def test_an_old_orchestrator_that_wakes_is_refused(place: Place) -> None:
    async with serving(place.service()):
        await place.acquired()
        await place.obey(Survey(()), "newer", fence=9)
        report = await place.obey(place.script("count.sh"), "1-count", step=1)

    assert report.reason.startswith("fenced_off: ")
    assert place.runs() == []


async def test_what_waited_for_its_turn_is_fenced_off_by_a_newer_deployment(place: Place) -> None:
    async with serving(place.service()):
        await place.acquired()
        running = place.desk.order(place.script("slow.sh", timeout=60.0), "1-slow", step=1)
        queued = place.desk.order(place.script("count.sh"), "2-count", step=1)
        await place.post(running)
        await eventually(lambda: place.runs() == ["begin"])
        await place.post(queued)
        await eventually(lambda: queued.operation in place.journal.operations)
        newer = place.desk.order(Survey(()), "newer", fence=9)
        await place.post(newer)
        assert (await place.result(newer.operation)).state == "done", "looking must not wait behind a script"
        await place.post(place.desk.order(Stop(running.operation), "stop", fence=9))

        stopped, refused = await place.result(running.operation), await place.result(queued.operation)

    assert stopped.state == "stopped"
    assert refused.state == "refused"
    assert refused.reason.startswith("fenced_off: ")
    assert place.runs() == ["begin"]


# --- stopping


async def test_a_queued_script_that_is_stopped_never_runs(place: Place) -> None:
    async with serving(place.service()):
        await place.acquired()
        running = place.desk.order(place.script("slow.sh"), "1-slow", step=1)
        queued = place.desk.order(place.script("count.sh"), "2-count", step=1)
        await place.post(running)
        await eventually(lambda: place.runs() == ["begin"])
        await place.post(queued)
        await place.post(place.desk.order(Stop(queued.operation), "stop-2"))
        report = await place.result(queued.operation)
        await place.post(place.desk.order(Stop(running.operation), "stop-1"))
        await place.result(running.operation)

    assert (report.state, report.reason) == ("stopped", "it was stopped before it began")
    assert place.runs() == ["begin"]


async def test_a_stop_that_comes_first_counts(place: Place) -> None:
    async with serving(place.service()):
        await place.acquired()
        order = place.desk.order(place.script("count.sh"), "1-count", step=1)
        await place.post(place.desk.order(Stop(order.operation), "stop"))
        await place.obey(Survey(()), "between")
        await place.post(order)
        report = await place.result(order.operation)

    assert report.state == "stopped"
    assert place.runs() == []


async def test_who_orders_in_another_environment_stops_nothing_here(place: Place) -> None:
    async with serving(place.service()):
        await place.acquired()
        running = place.desk.order(place.script("slow.sh", timeout=2.0), "1-slow", step=1)
        await place.post(running)
        await eventually(lambda: place.runs() == ["begin"])
        await place.post(place.desk.order(Stop(running.operation), "stop", environment="elsewhere"))
        report = await place.result(running.operation)

    assert report.state == "failed", "its own time limit ended it, not the stop"


# --- surviving


async def test_a_script_that_runs_while_the_agent_dies_is_collected_by_the_next(place: Place) -> None:
    action = place.script("slow.sh", timeout=2.0)
    order = place.desk.order(action, "1-slow", step=1)
    async with serving(place.service()) as task:
        await place.acquired()
        await place.post(order)
        await eventually(lambda: place.runs() == ["begin"])
        await killed(task)

    assert place.journal.operations[order.operation].report is None
    async with serving(place.service()):
        report = await place.result(order.operation)

    assert report.state == "failed"
    assert place.runs() == ["begin"]


async def test_an_order_that_was_written_down_and_never_begun_is_begun_by_the_next(place: Place) -> None:
    async with serving(place.service()):
        await place.acquired()
    order = place.desk.order(place.script("count.sh"), "1-count", step=1)
    envelope = place.desk.sign(order)
    place.journal.accept(order, order_digest(envelope), envelope)

    async with serving(place.service()):
        report = await place.result(order.operation)

    assert report.state == "done"
    assert place.runs() == ["run"]


async def test_an_order_whose_time_was_over_before_it_began_never_begins(place: Place) -> None:
    async with serving(place.service()):
        await place.acquired()
    long_ago = {"not_before": time.time() - 9000, "not_after": time.time() - 8000}
    late = place.desk.order(place.script("count.sh"), "1-count", step=1, **long_ago)
    switch = place.desk.order(Switch("/srv/x", place.manifest), "2-switch", step=1, **long_ago)
    for order in (late, switch):
        envelope = place.desk.sign(order)
        place.journal.accept(order, order_digest(envelope), envelope)

    async with serving(place.service()):
        report, switched = await place.result(late.operation), await place.result(switch.operation)

    assert report.state == "refused"
    assert "its time was over" in report.reason
    assert switched.state == "unknown", "it may have been done or not: nobody guesses"
    assert place.runs() == []


async def test_a_final_report_that_nobody_took_is_told_after_a_restart(place: Place) -> None:
    order = place.desk.order(Survey(()), "survey")
    async with place.another_relay() as (second, other), serving(place.service(second.url)) as task:
        await place.post(order, client=other)
        await eventually(lambda: place.journal.operations.get(order.operation) is not None)
        await eventually(lambda: place.journal.operations[order.operation].report is not None)
        await killed(task)
    kept = place.journal.operations[order.operation].envelope

    async with serving(place.service()):
        report = await place.result(order.operation)

    assert kept is not None
    assert report == verify_report(kept, place.desk.identity)


async def test_two_agents_do_not_serve_one_home(place: Place) -> None:
    async with serving(place.service()):
        await place.obey(Survey(()), "survey")
        with pytest.raises(LockedError):
            await place.service().serve(asyncio.Event())


async def test_an_agent_that_believes_nobody_does_not_start(place: Place) -> None:
    os.unlink(os.path.join(place.desk.home, "trust.json"))

    with pytest.raises(UsageError, match=r"trust\.json"):
        place.service()


async def test_a_full_disk_refuses_the_order_and_runs_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[str] = []

    def full(path: str, data: bytes, **_: object) -> None:
        failed.append(path)
        raise OSError(28, "No space left on device")

    async with serving(place.service()):
        await place.acquired()
        with monkeypatch.context() as patch:
            patch.setattr("agent.orders.journal.write_durably", full)
            report = await place.obey(place.script("count.sh"), "1-count", step=1)
        again = await place.obey(place.script("count.sh"), "1-count", step=1, attempt=2)

    assert failed
    assert report.reason.startswith("disk: ")
    assert again.state == "done"
    assert place.runs() == ["run"]


# --- as a process


@dataclass
class AgentProcess:
    """Awaited in a thread: the relay that it talks to lives in our loop."""

    process: Process
    said: str

    async def kill(self) -> None:
        await asyncio.to_thread(self.process.kill)

    async def stop(self) -> Done:
        return await asyncio.to_thread(self.process.stop)


@asynccontextmanager
async def agent_process(place: Place) -> AsyncIterator[AgentProcess]:
    """`waystation agent serve`, ready."""
    words = ("agent", "serve", "--home", place.desk.home, "--relay", place.relay.url)
    with Process(place.folder / "h", *words) as process:
        yield AgentProcess(process, await asyncio.to_thread(process.wait_for_line, "agent "))


async def test_killed_while_a_script_runs_the_agent_loses_nothing_of_it(place: Place) -> None:
    """The script ends while no agent lives; the next one tells its end, its exit status and all of its output."""
    go = place.folder / "go"
    order = place.desk.order(place.script("wait.sh", variables=_variables(place, VAR_GO=go)), "1-wait", step=1)
    async with agent_process(place) as first:
        await place.acquired()
        await place.post(order)
        await eventually(lambda: place.runs() == ["begin"])
        await first.kill()
    assert place.journal.operations[order.operation].report is None
    go.touch()
    await eventually(lambda: place.runs() == ["begin", "end"])

    async with agent_process(place):
        report = await place.result(order.operation)
        output = await place.reader.whole_log(report)

    assert (report.state, report.exit_status) == ("failed", 7)
    assert output == b"first half\nsecond half\n"
    assert place.runs() == ["begin", "end"]


async def test_killed_and_started_while_a_script_runs_the_agent_follows_it(place: Place) -> None:
    go = place.folder / "go"
    order = place.desk.order(place.script("wait.sh", variables=_variables(place, VAR_GO=go)), "1-wait", step=1)
    async with agent_process(place) as first:
        await place.acquired()
        await place.post(order)
        await eventually(lambda: place.runs() == ["begin"])
        await first.kill()
    async with agent_process(place) as second:
        await place.obey(Survey(()), "alive")
        go.touch()
        report = await place.result(order.operation)
        output = await place.reader.whole_log(report)
        done = await second.stop()

    assert (report.state, report.exit_status) == ("failed", 7)
    assert output == b"first half\nsecond half\n"
    assert place.runs() == ["begin", "end"]
    assert (done.code, troubles(done.err)) == (0, [])


async def test_killed_again_and_again_a_script_still_runs_once(place: Place) -> None:
    """Kills at moments that nobody chose: before, while and after the order is written down and its script started."""
    async with agent_process(place):
        await place.acquired()
    orders = [place.desk.order(place.script("count.sh"), f"1-count-{n}", step=1) for n in range(4)]
    for number, order in enumerate(orders):
        async with agent_process(place) as agent:
            await place.post(order)
            await asyncio.sleep(0.03 * number)
            await agent.kill()
    async with agent_process(place):
        reports = [await place.result(order.operation) for order in orders]

    assert [report.state for report in reports] == ["done"] * len(orders)
    assert place.runs() == ["run"] * len(orders)


async def test_a_stopped_agent_leaves_the_script_alone(place: Place) -> None:
    go = place.folder / "go"
    order = place.desk.order(place.script("wait.sh", variables=_variables(place, VAR_GO=go)), "1-wait", step=1)
    async with agent_process(place) as agent:
        await place.acquired()
        await place.post(order)
        await eventually(lambda: place.runs() == ["begin"])
        assert agent.said == f"agent web1 ready at {place.relay.url}"
        assert (await agent.stop()).code == 0
    go.touch()

    await eventually(lambda: place.runs() == ["begin", "end"])


async def test_status_tells_what_was_ordered_refused_and_who_leads(place: Place) -> None:
    forged = place.desk.order(place.script("count.sh"), "2-forged", step=1)
    envelope = sign_order(forged, new_signer())
    async with agent_process(place):
        await place.acquired()
        await place.obey(place.script("fail.sh"), "1-fail", step=1)
        await place.post(forged, envelope)
        await place.result(forged.operation, order_digest(envelope))
        found = (await place.command("status", "--json")).json
        text = await place.command("status")
        second = await place.command("serve")
    after = (await place.command("status", "--json")).json

    states = {each["operation"].split("/")[3]: (each["state"], each["exit_status"]) for each in found["operations"]}
    assert states == {"acquire": ("done", None), "1-fail": ("failed", 3)}
    [refusal] = found["refusals"]
    assert (refusal["code"], refusal["operation"]) == ("forged", forged.operation)
    assert found["fences"]["test"] == {"fence": 1, "journal": JOURNAL, "deployment": DEPLOYMENT, "open": True}
    assert (found["serving"], after["serving"]) == (True, False)
    assert text.code == 0
    assert "is serving" in text.out
    assert "forged" in text.out
    assert (second.code, "another 'agent serve'" in second.err) == (4, True)
    assert place.runs() == []


def _variables(place: Place, **more: object) -> dict[str, str]:
    return {"VAR_CANARY": str(place.canary)} | {name: str(value) for name, value in more.items()}


# --- services


async def test_a_service_is_controlled_by_the_configured_command(place: Place) -> None:
    manager = place.folder / "sv"
    manager.write_text(f'#!/bin/sh\necho "$1 $2" >> {place.canary}\n')
    manager.chmod(0o755)
    config = Path(place.desk.home, "agent.yaml")
    config.write_text(f'{config.read_text()}service_command: [{manager}, "{{action}}", "{{service}}"]\n')

    async with serving(place.service()):
        report = await place.obey(ControlService("webshop", "restart"), "3-restart", step=1)

    assert report.state == "done"
    assert place.runs() == ["restart webshop"]


def test_every_kind_of_action_has_a_name_in_the_journal(tmp_path: Path) -> None:
    desk = desk_in(tmp_path)
    journal = OperationJournal(desk.home)
    kinds: Iterable[tuple[Action, str]] = [
        (Survey(()), "survey"),
        (Settle("/srv", "0" * 64, "0" * 64), "settle"),
        (ControlService("a", "start"), "service"),
    ]
    for action, name in kinds:
        order = desk.order(action, name)
        envelope = desk.sign(order)
        assert journal.accept(order, order_digest(envelope), envelope).action == name
