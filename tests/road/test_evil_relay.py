"""What a lying relay gains: nothing. It is left, it is named, the next one gives the rest, and the tree is the signed one."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.evil_relay import (
    ATTACKS,
    Attack,
    EvilRelay,
    Reply,
    Scene,
    Wire,
    body,
    bundle_of,
    evil_relay,
    frames_of,
    held,
    in_place_of,
    make_scene,
    replace_run,
    slow,
    tree_of,
)
from harness.origins import Keys, Origin, depot_with, trust_keys
from harness.packages import SMALL, SMALL_TREE, cut_package, make_nupkg, noise
from harness.relays import RELAY_LIMITS
from harness.seed import SOAK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.config import AgentConfig
from agent.relays.health import Average, Health
from agent.relays.memory import State, load_state, save_state
from agent.relays.sources import Sources
from agent.trees.installed import AgentState
from agent.trees.pull import Pulled, PullRequest, parse_request, pull
from orchestrator.depot.depot import Added, open_depot
from orchestrator.trust.keyring import load_signer
from relay.config import RelayConfig
from relay.encoding.bundle import Data
from relay.encoding.planner import LINES
from relay.errors import UnreachableError, UntrustedError, WaystationError
from relay.package.identity import NuGetVersion, PackageId, PackageRef
from relay.protocol.connection import ClientLimits
from relay.server.app import RelayApp
from relay.server.http.listen import Running, start_guarded
from relay.server.packages import Transfer

LIMITS = ClientLimits(connect_seconds=3, answer_seconds=3, window_seconds=1.5, window_bytes=2000, attempts=1)
STALL = 1.0
SENT_BOUND = 100 << 20
"""Bytes. A relay that would send for ever is left before that."""
FILES = {
    "bin/app": b"\x7fELF" + noise("app", 300_000),
    "bin/lib.dll": noise("lib", 150_000),
    "net8/lib.dll": noise("lib", 150_000),
    "data/big.bin": noise("big", 3_000_000),
    "data/zeros.bin": bytes(1 << 20),
    "data/empty": b"",
    "a/b/c/d/e/deep.txt": b"deep",
    **{f"text/{n}.txt": noise(n, 2_000) for n in range(40)},
}
TREE = {path: (data, path == "bin/app") for path, data in FILES.items()}
OLDER = {**FILES, "bin/lib.dll": noise("older", 150_000)}
FORGED = {**FILES, "bin/app": b"\x7fELF" + noise("forged", 300_000)}


@dataclass
class Machine:
    """A machine with another package installed already, and `current` naming it."""

    home: str
    root: str
    scene: Scene

    @property
    def relays_file(self) -> Path:
        return Path(self.home) / "relays.json"

    def prefer(self, *urls: str) -> None:
        """Make the agent believe that it measured them just now, each ten times as fast as the next."""
        now = time.time()
        healths = {
            url: Health(latency=Average(0.001 * 10**n, 0.01, 50, now), last_checked=now) for n, url in enumerate(urls)
        }
        save_state(self.relays_file, State(current=urls[0], healths=healths))

    async def pull(self, *urls: str, request: PullRequest | None = None) -> Pulled:
        state = AgentState(self.home)
        request = request or parse_request("Acme.Web", "1.0.0", self.root, None, switch=True)
        sources = Sources(AgentConfig(name="m1"), self.relays_file, relays=urls, limits=LIMITS)
        async with sources:
            return await pull(request, state, sources, self.scene.origin.keys.pins, stall_seconds=STALL)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An origin's folder, made once: every test opens it again in its own loop."""
    folder = tmp_path_factory.mktemp("origin")

    async def prepare() -> None:
        async with depot_with(folder, *nupkgs):
            pass

    nupkgs = [
        make_nupkg(folder, FILES),
        make_nupkg(folder, OLDER, version="0.9.0"),
        make_nupkg(folder, {"readme.txt": b"another"}, id="Acme.Other"),
    ]
    asyncio.run(prepare())
    trust_keys(folder / "thief")
    return folder


@dataclass
class Stage:
    """An honest relay and a machine; evil relays are put beside them."""

    scene: Scene
    honest: Running
    machine: Machine
    stack: AsyncExitStack

    async def evil(self, attack: Attack | None) -> EvilRelay:
        return await self.stack.enter_async_context(evil_relay(self.scene, attack))


async def _open_stage(prepared: Path, folder: Path, stack: AsyncExitStack) -> Stage:
    trust = str(prepared / "trust")
    depot = await stack.enter_async_context(open_depot(f"disk:{prepared / 'depot'}"))
    pins = AgentState(trust).pins()
    assert pins is not None
    origin = Origin(depot, Keys(trust, pins, load_signer(trust, "package")), [])
    for name in (("Acme.Web", "1.0.0"), ("Acme.Web", "0.9.0"), ("Acme.Other", "1.0.0")):
        pointer = depot.catalog.get(PackageRef(PackageId.parse(name[0]), NuGetVersion.parse(name[1])))
        origin.added.append(Added(pointer, await depot.manifest(pointer), new=False, chunks_stored=0, unread=()))
    thief, order_key = load_signer(str(prepared / "thief"), "package"), load_signer(trust, "order")
    scene = await make_scene(origin, cut_package(FORGED), thief, order_key)
    transfer = Transfer(depot.store)
    await transfer.load()
    # The whole relay but for its measuring of the CPU, which would take most of each test's time.
    app = RelayApp(transfer, RelayConfig(), RELAY_LIMITS, None).build()
    honest = await start_guarded(app, "127.0.0.1", 0, RELAY_LIMITS)
    stack.push_async_callback(honest.stop)
    machine = Machine(str(folder / "home"), str(folder / "root"), scene)
    await machine.pull(honest.url, request=parse_request("Acme.Other", "1.0.0", machine.root, None, switch=True))
    return Stage(scene, honest, machine, stack)


@pytest.fixture
async def stage(prepared: Path, tmp_path: Path) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        yield await _open_stage(prepared, tmp_path, stack)


def test_the_attacks_have_names_of_their_own() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 80


def test_the_package_comes_in_one_request() -> None:
    """So that an attack on a bundle meets all the chunks that it needs."""
    assert sum(map(len, FILES.values())) < min(line.segment for line in LINES)


async def test_without_an_attack_this_relay_is_a_good_one(stage: Stage) -> None:
    good = await stage.evil(None)

    result = await stage.machine.pull(good.url)

    assert tree_of(result.tree) == TREE
    assert not result.failed
    assert {"package", "manifest", "bundle"} <= set(good.asked)


@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if not attack.late], ids=str)
async def test_scenario_09_a_lying_relay_is_named_and_the_next_one_gives_the_rest(stage: Stage, attack: Attack) -> None:
    evil = await stage.evil(attack)
    stage.machine.prefer(evil.url, stage.honest.url)

    result = await stage.machine.pull(evil.url, stage.honest.url)

    assert evil.played, "the attack did not take place"
    assert list(result.failed) == [evil.url]
    assert tree_of(result.tree) == TREE
    assert os.path.samefile(os.path.join(stage.machine.root, "current"), result.tree)
    given = sum(tally["bytes"] for tally in result.from_relays.values())
    assert stage.honest.url in result.from_relays
    assert given == sum(
        {c.id: c.size for c in map(stage.scene.manifest.chunks.__getitem__, stage.scene.manifest.tree_chunks)}.values()
    )


@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if attack.late], ids=str)
async def test_who_lies_when_all_is_there_is_named_all_the_same(stage: Stage, attack: Attack) -> None:
    evil = await stage.evil(attack)

    result = await stage.machine.pull(evil.url)

    assert evil.played, "the attack did not take place"
    assert list(result.failed) == [evil.url]
    assert tree_of(result.tree) == TREE
    assert not load_state(stage.machine.relays_file).healths[evil.url].ok


@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if not attack.late], ids=str)
async def test_scenario_09_a_lying_relay_alone_changes_nothing_on_the_machine(stage: Stage, attack: Attack) -> None:
    evil = await stage.evil(attack)
    stage.machine.prefer(evil.url)
    before = held(stage.machine.home, stage.machine.root)
    assert before.current is not None

    with pytest.raises(WaystationError) as caught:
        await stage.machine.pull(evil.url)

    assert evil.played, "the attack did not take place"
    assert evil.sent < SENT_BOUND
    assert evil.url in str(caught.value)
    assert isinstance(caught.value, UntrustedError | UnreachableError) or "not to be there" in attack.name
    assert held(stage.machine.home, stage.machine.root) == before

    result = await stage.machine.pull(stage.honest.url)

    assert tree_of(result.tree) == TREE
    assert not result.failed


JUST_ABOVE = [
    Attack("a trickle just above the minimum rate", "bundle", slow(lambda whole: 0, at_a_time=150)),
    Attack("a trickle after two thirds", "bundle", slow(lambda whole: len(whole) * 2 // 3, at_a_time=150)),
]


@pytest.mark.parametrize("attack", JUST_ABOVE, ids=str)
async def test_a_relay_that_is_only_just_fast_enough_is_left_where_another_one_is_faster_by_far(
    stage: Stage, attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At this rate it would take minutes, and no limit of ours would ever end it."""
    monkeypatch.setattr("relay.transfer.download.WINDOW_SECONDS", 0.4)
    evil = await stage.evil(attack)
    stage.machine.prefer(evil.url, stage.honest.url)

    result = await stage.machine.pull(evil.url, stage.honest.url)

    assert evil.played, "the attack did not take place"
    assert "bytes in a second" in result.failed[evil.url]
    assert tree_of(result.tree) == TREE
    kept = load_state(stage.machine.relays_file)
    assert kept.current == stage.honest.url
    assert kept.healths[evil.url].ok, "it is slow, and that is all"
    assert (kept.healths[evil.url].goodput or 0) < 10_000


async def test_an_answer_that_has_every_chunk_and_no_end_is_not_waited_for(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.transfer.download.END_SECONDS", 0.2)
    evil = await stage.evil(Attack("all but the end", "bundle", slow(lambda whole: len(whole) - 30)))
    stage.machine.prefer(evil.url, stage.honest.url)

    result = await stage.machine.pull(evil.url, stage.honest.url)

    assert evil.played, "the attack did not take place"
    assert "does not end its answer" in result.failed[evil.url]
    assert list(result.from_relays) == [evil.url]
    assert tree_of(result.tree) == TREE


async def test_what_was_good_before_the_lie_is_kept(stage: Stage) -> None:
    evil = await stage.evil(_attack("the same after two good chunks"))
    stage.machine.prefer(evil.url, stage.honest.url)

    result = await stage.machine.pull(evil.url, stage.honest.url)

    assert result.from_relays[evil.url]["chunks"] >= 2
    assert result.from_relays[stage.honest.url]["chunks"] >= 2


@pytest.mark.parametrize("attack", [a for a in ATTACKS if "altered" in a.name or "forged" in a.name], ids=str)
async def test_a_digest_is_believed_over_any_relay(stage: Stage, attack: Attack) -> None:
    evil = await stage.evil(attack)
    stage.machine.prefer(evil.url, stage.honest.url)
    digest = f"sha256:{stage.scene.manifest.id}"
    request = parse_request("Acme.Web", "1.0.0", stage.machine.root, digest, switch=False)

    result = await stage.machine.pull(evil.url, stage.honest.url, request=request)

    assert evil.played
    assert evil.url in result.failed
    assert tree_of(result.tree) == TREE


async def test_a_digest_of_another_package_is_no_way_round_its_name(stage: Stage) -> None:
    digest = f"sha256:{stage.scene.foreign.id}"
    before = held(stage.machine.home, stage.machine.root)

    with pytest.raises(UntrustedError, match=r"is of Acme\.Other"):
        await stage.machine.pull(
            stage.honest.url, request=parse_request("Acme.Web", "1.0.0", stage.machine.root, digest, switch=True)
        )

    assert held(stage.machine.home, stage.machine.root) == before


async def test_what_stands_beside_the_signature_counts_for_nothing(stage: Stage) -> None:
    def elsewhere(scene: Scene, packed: bytes) -> bytes:
        forged = scene.forged.manifest
        assert scene.manifest.id.encode() in packed
        return packed.replace(b'"manifest":"' + scene.manifest.id.encode(), b'"manifest":"' + forged.id.encode())

    evil = await stage.evil(Attack("a forged pointer under the right signature", "package", body(elsewhere)))

    result = await stage.machine.pull(evil.url)

    assert evil.played
    assert tree_of(result.tree) == TREE


async def test_every_lie_puts_the_relay_out_until_it_passes_again(stage: Stage) -> None:
    evil = await stage.evil(_attack("a flipped bit with all checksums made right"))
    stage.machine.prefer(evil.url, stage.honest.url)
    await stage.machine.pull(evil.url, stage.honest.url)

    health = load_state(stage.machine.relays_file).healths[evil.url]

    assert not health.ok
    assert "other bytes" in health.reason


async def test_good_chunks_before_a_lie_do_not_wash_it_away(stage: Stage) -> None:
    evil = await stage.evil(_attack("the same after two good chunks"))
    stage.machine.prefer(evil.url, stage.honest.url)
    await stage.machine.pull(evil.url, stage.honest.url)

    kept = load_state(stage.machine.relays_file)

    assert not kept.healths[evil.url].ok
    assert kept.current == stage.honest.url


async def test_a_relay_that_merely_lacks_chunks_is_not_counted_ill(stage: Stage) -> None:
    evil = await stage.evil(_attack("chunks said to be absent"))
    stage.machine.prefer(evil.url, stage.honest.url)
    await stage.machine.pull(evil.url, stage.honest.url)

    assert load_state(stage.machine.relays_file).healths[evil.url].fails == 0


async def test_a_redirect_takes_the_token_nowhere(stage: Stage) -> None:
    elsewhere = await stage.evil(None)
    to = in_place_of("text/html", b"", 307, ("Location", f"{elsewhere.url}/v1/packages/acme.web/1.0.0"))
    evil = await stage.evil(Attack("a redirect to a listener", "package", to))
    token_file = Path(stage.machine.home) / "token"
    token_file.write_text("wst_secret")
    sources = Sources(
        AgentConfig(name="m1", token_file=str(token_file)),
        stage.machine.relays_file,
        relays=[evil.url],
        limits=LIMITS,
    )
    request = parse_request("Acme.Web", "1.0.0", stage.machine.root, None, switch=False)

    with pytest.raises(WaystationError):
        async with sources:
            await pull(request, AgentState(stage.machine.home), sources, stage.scene.origin.keys.pins)

    assert evil.played
    assert evil.authorizations, "the token was not even sent to the relay that it is for"
    assert elsewhere.asked == []


async def test_a_base_that_was_never_named_is_not_believed(stage: Stage) -> None:
    """The machine holds 0.9.0 and names it as base; the relay says it used it, and did not."""
    old = parse_request("Acme.Web", "0.9.0", stage.machine.root, None, switch=False)
    await stage.machine.pull(stage.honest.url, request=old)

    async def other_base(scene: Scene, reply: Reply, send: Wire) -> None:
        assert ("Waystation-Base", "1") in reply.headers, "no base was asked for"
        plain = Reply(reply.body, reply.content_type)
        await send(plain.head(f"Content-Length: {len(reply.body)}") + reply.body)

    evil = await stage.evil(Attack("the base denied", "manifest", other_base))
    stage.machine.prefer(evil.url, stage.honest.url)

    result = await stage.machine.pull(evil.url, stage.honest.url)

    assert evil.played
    assert evil.url in result.failed
    assert tree_of(result.tree) == TREE


ENDLESS = [
    attack
    for attack in ATTACKS
    if not attack.slow and re.search(r"endless|without end|bomb|window|4 GiB|512 MiB|20,000|empty blocks", attack.name)
]
RSS_MAX = 300 << 20
"""Bytes. An agent that pulls takes about 70 MB; manifests may take 16 MiB, several times over while they are read."""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc: the memory taken is NOT measured")
@pytest.mark.parametrize("attack", ENDLESS, ids=str)
async def test_what_never_ends_takes_neither_memory_nor_the_line_without_bound(stage: Stage, attack: Attack) -> None:
    """The agent is a process of its own, so that what it takes can be seen."""
    evil = await stage.evil(attack)
    words = ["--root", stage.machine.root, "--home", stage.machine.home, "--relay", evil.url]
    Path(stage.machine.home, "trust.json").write_bytes(Path(stage.scene.origin.keys.pins_file).read_bytes())
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _MEASURED, "agent", "pull", "Acme.Web", "1.0.0", *words,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip

    output, errors = await asyncio.wait_for(process.communicate(), 150)

    assert evil.played, "the attack did not take place"
    assert process.returncode == 1, errors.decode()
    assert evil.url.encode() in errors
    assert b"Traceback" not in errors
    peak = int(re.findall(rb"peak (\d+)", output)[-1])
    assert peak < RSS_MAX, f"{peak >> 20} MiB"
    assert evil.sent < SENT_BOUND


_MEASURED = """
import atexit, re
# Not ru_maxrss: that begins with what the process that started this one had.
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) << 10
atexit.register(lambda: print("peak", peak(), flush=True))
import relay.main
relay.main.main()
"""


# --- the property


@st.composite
def mutations(draw: st.DrawFn) -> tuple[str, list[tuple[str, float, int, bytes]]]:
    kind = draw(st.sampled_from(["package", "manifest", "bundle", "bundle"]))
    step = st.tuples(
        st.sampled_from(["flip", "insert", "delete", "double", "cut", "swap"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 3000),
        st.binary(min_size=1, max_size=8),
    )
    return kind, draw(st.lists(step, min_size=1, max_size=4))


def mutated(data: bytes, steps: list[tuple[str, float, int, bytes]]) -> bytes:
    for what, where, size, some in steps:
        if not data:
            break
        at = int(len(data) * where)
        piece = data[at : at + size]
        match what:
            case "flip":
                data = data[:at] + bytes([data[at] ^ (size % 255 + 1)]) + data[at + 1 :]
            case "insert":
                data = data[:at] + some + data[at:]
            case "delete":
                data = data[:at] + data[at + size :]
            case "double":
                data = data[:at] + piece + data[at:]
            case "cut":
                data = data[:at]
            case "swap":
                rest = data[at + size :]
                data = data[:at] + rest[:size] + piece + rest[size:]
    return data


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of a few small chunks: an example takes milliseconds."""
    folder = tmp_path_factory.mktemp("small")
    nupkgs = [
        make_nupkg(folder, SMALL),
        make_nupkg(folder, {**SMALL, "a.bin": noise("old", 70_000)}, version="0.9.0"),
        make_nupkg(folder, {"readme.txt": b"another"}, id="Acme.Other"),
    ]

    async def prepare() -> None:
        async with depot_with(folder, *nupkgs):
            pass

    asyncio.run(prepare())
    trust_keys(folder / "thief")
    return folder


@settings(
    max_examples=200 if SOAK else 10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(mutation=mutations())
def test_whatever_the_bytes_the_tree_is_the_signed_one_or_nothing_changed(
    small: Path, tmp_path_factory: pytest.TempPathFactory, mutation: tuple[str, list[tuple[str, float, int, bytes]]]
) -> None:
    kind, steps = mutation

    async def spoil(scene: Scene, reply: Reply, send: Wire) -> None:
        spoilt = mutated(reply.body, steps)
        await send(reply.head(f"Content-Length: {len(spoilt)}", "Connection: close") + spoilt)

    async def example() -> None:
        async with AsyncExitStack() as stack:
            stage = await _open_stage(small, tmp_path_factory.mktemp("machine"), stack)
            evil = await stage.evil(Attack("random", kind, spoil))  # type: ignore[arg-type]
            machine = stage.machine
            before = held(machine.home, machine.root)
            try:
                result = await machine.pull(evil.url)
            except (UntrustedError, UnreachableError):
                assert held(machine.home, machine.root) == before
                result = await machine.pull(stage.honest.url)
            assert evil.played
            assert tree_of(result.tree) == SMALL_TREE

    asyncio.run(example())


@settings(
    max_examples=200 if SOAK else 10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(order=st.permutations(range(3)), runs=st.permutations(range(3)), drop=st.integers(0, 3))
def test_however_frames_are_shuffled_no_byte_stands_in_a_wrong_place(
    small: Path, tmp_path_factory: pytest.TempPathFactory, order: list[int], runs: list[int], drop: int
) -> None:
    """Frames in another order, payloads under other names, some left out: each bundle is right in itself."""

    def shuffle(scene: Scene, bundle: bytes) -> bytes:
        found = [(header, payload) for header, payload in frames_of(bundle) if isinstance(header, Data)]
        assert len(found) >= 3
        head = [(found[runs[i]][0].run, *found[order[i]]) for i in range(3)]
        return bundle_of([*((replace_run(h, run), p) for run, h, p in head[drop:]), *found[3:]])

    async def play(scene: Scene, reply: Reply, send: Wire) -> None:
        spoilt = shuffle(scene, reply.body)
        await send(reply.head(f"Content-Length: {len(spoilt)}", "Connection: close") + spoilt)

    async def example() -> None:
        async with AsyncExitStack() as stack:
            stage = await _open_stage(small, tmp_path_factory.mktemp("machine"), stack)
            evil = await stage.evil(Attack("shuffled", "bundle", play))
            machine = stage.machine
            before = held(machine.home, machine.root)
            is_honest = order == runs and drop == 0
            try:
                result = await machine.pull(evil.url)
            except (UntrustedError, UnreachableError):
                assert not is_honest
                assert held(machine.home, machine.root) == before
                result = await machine.pull(stage.honest.url)
            assert evil.played
            assert tree_of(result.tree) == SMALL_TREE

    asyncio.run(example())


def _attack(name: str) -> Attack:
    return next(attack for attack in ATTACKS if attack.name == name)
