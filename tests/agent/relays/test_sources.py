"""Relays and stores as one ordered list: whom to ask first, with which token, and what is remembered of them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web
from harness.origins import Origin, depot_with
from harness.packages import make_nupkg, noise
from harness.relays import Relay, running_relay, small_server, token

from agent.config import AgentConfig
from agent.relays.health import FAILS_OUT, PROBE_ILL_MAX, PROBE_WELL, Average, Health
from agent.relays.memory import State, load_state, save_state
from agent.relays.sources import Sources, StoreSource
from agent.trees.installed import AgentState
from agent.trees.pull import Pulled, parse_request, pull
from relay.errors import FrameError, NotFoundError, StoreError, UnreachableError, UntrustedError, UsageError
from relay.package.identity import NuGetVersion, PackageId
from relay.protocol.connection import ClientLimits, TokenRefusedError
from relay.transfer.download import OvertakenError, RequestTiming

LIMITS = ClientLimits(connect_seconds=2, answer_seconds=5, window_seconds=5, window_bytes=1, attempts=1)
FILES = {"bin/app.dll": noise("app", 200_000), "data/big.bin": noise("big", 3_000_000), "readme.txt": b"Read me."}


@dataclass
class Machine:
    folder: Path
    origin: Origin
    clock: float = field(default_factory=time.time)

    @property
    def home(self) -> str:
        return str(self.folder / "home")

    @property
    def relays_file(self) -> Path:
        return Path(self.home) / "relays.json"

    def sources(self, *relays: str, config: AgentConfig | None = None, token_file: str | None = None) -> Sources:
        return Sources(
            config or AgentConfig(name="m1"),
            self.relays_file,
            relays=relays,
            token_file=token_file,
            limits=LIMITS,
            clock=lambda: self.clock,
        )

    async def pull(self, sources: Sources) -> Pulled:
        request = parse_request("acme.web", "1.0", str(self.folder / "root"), None, switch=False)
        async with sources:
            return await pull(request, AgentState(self.home), sources, self.origin.keys.pins)


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    async with depot_with(tmp_path / "origin", make_nupkg(tmp_path, FILES)) as origin:
        yield Machine(tmp_path, origin)


@pytest.fixture
def store(machine: Machine) -> Path:
    return machine.folder / "origin" / "depot"


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in folder.rglob("*")}


def content(path: str) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}


# --- stores as sources


async def test_a_store_on_a_shared_file_system_is_a_source_like_any_relay(machine: Machine, store: Path) -> None:
    before = everything(store)

    result = await machine.pull(machine.sources(f"disk:{store}"))

    assert content(result.tree) == FILES
    assert list(result.from_relays) == [f"disk:{store}"]
    assert result.wire_bytes == 0
    assert everything(store) == before, "something was written to the shared store"


async def test_a_store_in_the_configuration_is_ranked_and_remembered(machine: Machine, store: Path) -> None:
    config = AgentConfig(name="m1", relays=(f"disk:{store}",))

    await machine.pull(machine.sources(config=config))

    kept = load_state(machine.relays_file)
    assert kept.current == f"disk:{store}"
    assert kept.healths[f"disk:{store}"].goodput


async def test_a_share_that_is_not_mounted_is_left_and_nothing_is_made_there(machine: Machine, store: Path) -> None:
    mount = machine.folder / "mnt"
    mount.mkdir()
    gone = f"disk:{mount}/waystation"

    result = await machine.pull(machine.sources(gone, f"disk:{store}"))

    assert content(result.tree) == FILES
    assert "there is no store" in result.failed[gone]
    assert list(mount.iterdir()) == []


async def test_a_store_that_lost_a_chunk_gives_the_rest(machine: Machine, store: Path) -> None:
    copy = machine.folder / "copy"
    shutil.copytree(store, copy)
    lost = machine.origin.added[0].manifest.chunk_id(1)
    (store / "chunks" / lost[:2] / lost).unlink()
    now = machine.clock
    healths = {
        f"disk:{path}": Health(latency=Average(seconds, 0.01, 50, now), last_checked=now)
        for path, seconds in ((store, 0.001), (copy, 1.0))
    }
    save_state(machine.relays_file, State(current=f"disk:{store}", healths=healths))

    result = await machine.pull(machine.sources(f"disk:{store}", f"disk:{copy}"))

    assert content(result.tree) == FILES
    assert "lacks 1 chunks" in result.failed[f"disk:{store}"]
    assert result.from_relays[f"disk:{store}"]["chunks"] >= 1
    assert result.from_relays[f"disk:{copy}"]["chunks"] >= 1


async def test_a_store_with_a_rotten_chunk_is_not_believed(machine: Machine, store: Path) -> None:
    rotten = machine.origin.added[0].manifest.chunk_id(0)
    path = store / "chunks" / rotten[:2] / rotten
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(bytes(data))

    with pytest.raises(UnreachableError, match="lacks 1 chunks"):
        await machine.pull(machine.sources(f"disk:{store}"))

    assert path.exists(), "a reader has put a file of a shared store aside"


async def test_a_store_without_the_package_says_so(machine: Machine, store: Path) -> None:
    source = StoreSource(f"disk:{store}")

    with pytest.raises(NotFoundError, match=r"Acme\.Other 1\.0"):
        await source.package(PackageId.parse("Acme.Other"), NuGetVersion.parse("1.0"))
    await source.close()


async def test_a_damaged_pointer_in_a_store_is_told_as_such(machine: Machine, store: Path) -> None:
    (store / "packages" / "acme.web" / "1.0.0").chmod(0o600)
    (store / "packages" / "acme.web" / "1.0.0").write_bytes(b"{")

    with pytest.raises(NotFoundError):
        await machine.pull(machine.sources(f"disk:{store}"))


# --- tokens


@pytest.fixture
async def guarded(machine: Machine) -> AsyncIterator[tuple[Relay, str]]:
    text, record = token("read")
    async with running_relay(machine.folder / "origin" / "depot", tokens=[record]) as relay:
        yield relay, text


async def test_a_token_is_read_from_the_file_that_the_configuration_names(
    machine: Machine, guarded: tuple[Relay, str]
) -> None:
    relay, text = guarded
    file = machine.folder / "token"
    file.write_text(f"{text}\n")
    config = AgentConfig(name="m1", relays=(relay.url,), token_file=str(file))

    assert content((await machine.pull(machine.sources(config=config))).tree) == FILES


async def test_a_token_is_read_from_the_environment(
    machine: Machine, guarded: tuple[Relay, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    relay, text = guarded
    monkeypatch.setenv("WAYSTATION_TOKEN", text)

    assert content((await machine.pull(machine.sources(relay.url))).tree) == FILES


async def test_the_command_lines_token_wins(
    machine: Machine, guarded: tuple[Relay, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    relay, text = guarded
    (machine.folder / "good").write_text(text)
    (machine.folder / "bad").write_text("wst_wrong")
    config = AgentConfig(name="m1", token_file=str(machine.folder / "bad"))

    result = await machine.pull(machine.sources(relay.url, config=config, token_file=str(machine.folder / "good")))

    assert content(result.tree) == FILES


@pytest.mark.parametrize("given", ["", "wst_wrong"])
async def test_without_the_right_token_the_relay_says_what_it_wants(
    machine: Machine, guarded: tuple[Relay, str], given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay, _ = guarded
    monkeypatch.setenv("WAYSTATION_TOKEN", given)

    with pytest.raises(UnreachableError, match="token") as caught:
        await machine.pull(machine.sources(relay.url))

    assert relay.url in str(caught.value)
    assert "wst_wrong" not in str(caught.value)


@pytest.mark.parametrize("what", ["missing", "empty", "folder"])
def test_a_token_file_that_holds_none_is_refused_at_once(machine: Machine, what: str) -> None:
    file = machine.folder / "token"
    if what == "empty":
        file.write_text(" \n")
    if what == "folder":
        file.mkdir()

    with pytest.raises(UsageError, match="token"):
        machine.sources("http://127.0.0.1:1", token_file=str(file))


async def test_each_relay_is_asked_with_its_own_token_and_one_that_refuses_it_is_not_among_the_fastest(
    machine: Machine, guarded: tuple[Relay, str]
) -> None:
    """The relay of another site has a list of its own: fail-over must not end there with a token of the first."""
    site, text = guarded
    other_text, record = token("agent")
    (machine.folder / "site").write_text(text)
    (machine.folder / "other").write_text(text)
    shutil.copytree(machine.folder / "origin" / "depot", machine.folder / "copy", ignore=lambda *_: {"lock"})
    async with running_relay(machine.folder / "copy", tokens=[record]) as other:
        config = AgentConfig(
            name="m1",
            relays=(site.url, other.url),
            token_file=str(machine.folder / "site"),
            tokens={other.url: str(machine.folder / "other")},
        )
        async with machine.sources(config=config) as sources:
            failed = await sources.measure(everything=True)
            first, last = sources.ranking()
            assert (first.source.url, first.usable) == (site.url, True)
            assert (last.source.url, last.usable) == (other.url, False)
            assert "refuses this token" in last.why
            assert "refuses this token" in failed[other.url]
            assert sources.endings()[0].id == text.split("_")[1]

            (machine.folder / "other").write_text(other_text)
            await sources.measure()  # not due by the clock, but its token is another one
            assert all(ranked.usable for ranked in sources.ranking())
        async with machine.sources(config=config) as sources:
            sources.failed(site.url, UnreachableError("gone"))
            result = await pull(
                parse_request("acme.web", "1.0", str(machine.folder / "root"), None, switch=False),
                AgentState(machine.home),
                sources,
                machine.origin.keys.pins,
            )
    assert content(result.tree) == FILES
    assert not result.failed


@pytest.mark.parametrize("status", [401, 403])
async def test_a_relay_that_refuses_our_token_in_a_pull_is_out_at_once(machine: Machine, status: int) -> None:
    lost = "http://127.0.0.1:1"

    async def refuse(_request: web.Request) -> web.Response:
        return web.Response(status=status)

    async with small_server([web.get("/v1/health", refuse)]) as url, machine.sources(url, lost) as sources:
        await sources.measure()
        assert not sources.healths[url].ok
        sources.failed(lost, TokenRefusedError("refused", status=status))
        assert not sources.healths[lost].ok


# --- whom to ask


@dataclass
class Asked:
    """A server that answers for its health, or does not."""

    well: bool = True
    times: int = 0

    async def health(self, request: web.Request) -> web.Response:
        self.times += 1
        if not self.well:
            raise web.HTTPServiceUnavailable
        return web.json_response({"status": "ok", "versions": [1], "time": 0})


@pytest.fixture
async def servers() -> AsyncIterator[list[tuple[str, Asked]]]:
    async with AsyncExitStack() as stack:
        found = []
        for _ in range(5):
            asked = Asked()
            url = await stack.enter_async_context(small_server([web.get("/v1/health", asked.health)]))
            found.append((url, asked))
        yield found


async def test_relays_are_measured_only_when_their_time_has_come(
    machine: Machine, servers: list[tuple[str, Asked]]
) -> None:
    url, asked = servers[0]
    times = []
    for ahead in (0, 1, PROBE_WELL / 4, PROBE_WELL * 1.3):
        machine.clock += ahead
        async with machine.sources(url) as sources:
            await sources.measure()
        times.append(asked.times)

    assert times == [1, 1, 1, 2]


async def test_at_most_three_are_measured_at_the_start_of_a_pull(
    machine: Machine, servers: list[tuple[str, Asked]]
) -> None:
    async with machine.sources(*(url for url, _ in servers)) as sources:
        await sources.measure()

    assert sum(asked.times for _, asked in servers) == 3


async def test_all_are_measured_when_a_person_asks(machine: Machine, servers: list[tuple[str, Asked]]) -> None:
    async with machine.sources(*(url for url, _ in servers)) as sources:
        await sources.measure(everything=True)

    assert [asked.times for _, asked in servers] == [1] * 5


async def test_one_that_just_failed_is_asked_last_but_asked(machine: Machine, servers: list[tuple[str, Asked]]) -> None:
    (ill, asked), (well, _) = servers[:2]
    asked.well = False
    fast = Average(0.0001, 0.01, 50, machine.clock)
    save_state(machine.relays_file, State(current=ill, healths={ill: Health(latency=fast)}))

    async with machine.sources(ill, well) as sources:
        failed = await sources.measure()
        order = [source.name for source in sources.in_order()]

    assert list(failed) == [ill]
    assert order == [well, ill]


async def test_an_ill_one_that_passes_twice_in_a_row_is_well(
    machine: Machine, servers: list[tuple[str, Asked]]
) -> None:
    url, asked = servers[0]
    asked.well = False
    for _ in range(FAILS_OUT):
        async with machine.sources(url) as sources:
            await sources.measure(everything=True)
    assert not load_state(machine.relays_file).healths[url].ok
    asked.well, asked.times = True, 0
    machine.clock += PROBE_ILL_MAX * 2

    async with machine.sources(url) as sources:
        await sources.measure()
        assert sources.healths[url].ok

    assert asked.times == 2


async def test_an_ill_one_that_passes_once_is_still_ill(machine: Machine) -> None:
    """It answers the first question and not the second."""
    answers = [True, False]

    async def health(request: web.Request) -> web.Response:
        if not answers.pop(0):
            raise web.HTTPServiceUnavailable
        return web.json_response({"status": "ok", "versions": [1], "time": 0})

    async with small_server([web.get("/v1/health", health)]) as url:
        save_state(
            machine.relays_file, State(healths={url: Health(ok=False, fails=3, out_since=1.0, last_checked=1.0)})
        )
        async with machine.sources(url) as sources:
            await sources.measure()
            assert not sources.healths[url].ok

    assert answers == []


async def test_wrong_bytes_put_a_relay_out_at_once_and_a_bad_road_does_not(machine: Machine) -> None:
    lying, lost = "http://127.0.0.1:1", "http://127.0.0.1:2"
    async with machine.sources(lying, lost) as sources:
        sources.failed(lying, FrameError("other bytes"))
        sources.failed(lost, UnreachableError("cannot be reached"))

        assert not sources.healths[lying].ok
        assert sources.healths[lost].ok
        assert [ranked.source.url for ranked in sources.ranking()] == [lost, lying]


# --- what is remembered


async def test_what_was_measured_is_kept(machine: Machine, servers: list[tuple[str, Asked]]) -> None:
    url, _ = servers[0]
    async with machine.sources(url) as sources:
        sources.succeeded(url, RequestTiming(first_byte=0.25, goodput=1e6))

    kept = load_state(machine.relays_file)

    assert kept.current == url
    assert kept.healths[url].first_byte == pytest.approx(0.25)
    assert kept.healths[url].goodput == pytest.approx(1e6)


async def test_what_is_no_longer_a_relay_is_forgotten_by_the_next_ordinary_run(machine: Machine) -> None:
    a, b = "http://127.0.0.1:1", "http://127.0.0.1:2"
    save_state(machine.relays_file, State(healths={a: Health(fails=1), b: Health(fails=1)}))

    async with machine.sources(config=AgentConfig(relays=(a,))):
        pass

    assert load_state(machine.relays_file).healths.keys() == {a}


async def test_what_cannot_be_kept_does_not_spoil_a_pull(machine: Machine, store: Path) -> None:
    machine.relays_file.mkdir(parents=True)

    result = await machine.pull(machine.sources(f"disk:{store}"))

    assert content(result.tree) == FILES


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b'{"format": 9}', b"[" * 100_000])
async def test_a_damaged_memory_is_as_good_as_none(machine: Machine, store: Path, damage: bytes) -> None:
    os.makedirs(machine.home)
    machine.relays_file.write_bytes(damage)

    assert content((await machine.pull(machine.sources(f"disk:{store}"))).tree) == FILES


async def test_agents_without_a_name_spread_by_their_hosts(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise every machine that was never named would choose the same relay among equals."""
    urls = [f"http://127.0.0.1:{n}" for n in range(1, 9)]
    first = set()
    for number in range(8):
        monkeypatch.setattr("socket.gethostname", lambda number=number: f"host-{number}")
        async with machine.sources(config=AgentConfig(relays=tuple(urls))) as sources:
            first.add(sources.ranking()[0].source.url)

    assert len(first) > 1


@pytest.mark.parametrize("text", ["ftp://x", "https://u:p@x", "nonsense", "disk:"])
def test_what_is_no_relay_is_refused_before_anything_is_asked(machine: Machine, text: str) -> None:
    with pytest.raises(UsageError):
        machine.sources(text)


def test_the_two_ways_to_fail_are_told_apart() -> None:
    """What the tests above rely on."""
    assert issubclass(FrameError, UntrustedError)
    assert issubclass(StoreError, UnreachableError)


async def test_a_bad_moment_of_a_relay_counts_for_no_more_than_ten_times_slower(machine: Machine) -> None:
    slow, silent = "http://slow.example.net:7400", "http://silent.example.net:7400"
    sources = machine.sources(config=AgentConfig(name="m1", relays=(slow, silent)))
    async with sources:
        sources.overtaken(slow, OvertakenError(slow, "another", 500_000.0, 2e6))
        sources.overtaken(silent, OvertakenError(silent, "another", 0.0, 2e6))

        assert sources.goodput(slow) == pytest.approx(500_000.0)
        assert sources.goodput(silent) == pytest.approx(200_000.0)
        assert sources.healths[silent].fails == 1
