"""One pull from beginning to end: what is taken from where, what is refused before anything moves, and what a fault leaves."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.origins import Origin, depot_with
from harness.packages import make_nupkg, noise
from harness.process import eventually
from harness.relays import Relay, running_relay

from agent import platform
from agent.config import AgentConfig
from agent.relays.memory import load_state
from agent.relays.sources import Sources
from agent.trees.installed import AgentState
from agent.trees.pull import Pulled, parse_request, pull
from agent.trees.tree import IncomingTree, TreeHoldings
from benchmarks.lines.network import CountingProxy, Line
from relay.encoding.bundle import Places
from relay.errors import (
    IdentityError,
    LockedError,
    NotFoundError,
    RefusedError,
    SignatureError,
    StoreError,
    UnreachableError,
)
from relay.protocol.client import RelayClient
from relay.protocol.connection import ClientLimits
from relay.transfer.encoder_pool import PayloadReader

LIMITS = ClientLimits(connect_seconds=2, answer_seconds=5, window_seconds=5, window_bytes=1, attempts=1)
FILES = {
    "bin/app": b"#!/bin/sh\nexit 0\n",
    "data/big.bin": noise("big", 6_000_000),
    "data/empty": b"",
    "lib.dll": noise("lib", 100_000),
}
NEWER = {**FILES, "lib.dll": noise("newer", 100_000)}


@dataclass
class Machine:
    home: str
    root: str
    relay: Relay
    origin: Origin

    @property
    def state(self) -> AgentState:
        return AgentState(self.home)

    async def pull(self, version: str = "1.0.0", *, switch: bool = False, digest: str | None = None) -> Pulled:
        request = parse_request("Acme.Web", version, self.root, digest, switch=switch)
        path = Path(self.home) / "relays.json"
        async with Sources(AgentConfig(name="m1"), path, relays=[self.relay.url], limits=LIMITS) as sources:
            return await pull(request, self.state, sources, self.origin.keys.pins)

    def releases(self) -> list[str]:
        folder = os.path.join(self.root, "releases")
        return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    nupkgs = [make_nupkg(tmp_path, FILES), make_nupkg(tmp_path, NEWER, version="1.1.0")]
    async with (
        depot_with(tmp_path / "origin", *nupkgs) as origin,
        running_relay(tmp_path / "origin" / "depot") as relay,
    ):
        yield Machine(str(tmp_path / "home"), str(tmp_path / "root"), relay, origin)


def content(path: str) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}


async def test_every_byte_of_the_tree_is_accounted_for(machine: Machine) -> None:
    first = await machine.pull()
    second = await machine.pull("1.1.0")
    [tally] = first.from_relays.values()
    [delta] = second.from_relays.values()

    assert tally["bytes"] == first.tree_bytes == sum(map(len, FILES.values()))
    assert delta["bytes"] + second.from_disk_bytes == second.tree_bytes
    assert delta["bytes"] < 110_000
    assert second.wire_bytes < 120_000
    assert content(second.tree) == NEWER


async def test_a_package_folder_comes_whole_and_again_as_a_difference(machine: Machine, tmp_path: Path) -> None:
    files = {"package/start.js": b"run()", "package/lib.bin": noise("code", 300_000), "a/b": b"x"}
    await machine.origin.add(make_nupkg(tmp_path, files, version="2.0.0"))
    await machine.origin.add(make_nupkg(tmp_path, files | {"package/start.js": b"ran()"}, version="2.0.1"))

    assert content((await machine.pull("2.0.0")).tree) == files
    following = await machine.pull("2.0.1")

    assert content(following.tree) == files | {"package/start.js": b"ran()"}
    assert following.from_disk_bytes > 300_000
    assert sum(tally["bytes"] for tally in following.from_relays.values()) < 2_000


async def test_the_same_again_is_done_already(machine: Machine) -> None:
    first = await machine.pull(switch=True)

    again = await machine.pull(switch=True)

    assert again.already
    assert again.tree == first.tree
    assert (first.switched, again.switched) == (True, False)
    assert again.from_relays == {}
    assert machine.releases() == [os.path.basename(first.tree)]


async def test_current_names_what_was_switched_to_and_only_that(machine: Machine) -> None:
    first = await machine.pull(switch=True)
    await machine.pull("1.1.0")
    assert os.path.samefile(os.path.join(machine.root, "current"), first.tree)

    second = await machine.pull("1.1.0", switch=True)

    assert os.path.samefile(os.path.join(machine.root, "current"), second.tree)
    assert not os.path.isabs(os.readlink(os.path.join(machine.root, "current"))), "the root could not be moved"


@pytest.mark.parametrize("name", ["current/kept.txt", "current"], ids=["folder", "file"])
async def test_what_is_no_link_and_named_current_is_told_and_left_alone(machine: Machine, name: str) -> None:
    kept = Path(machine.root, name)
    kept.parent.mkdir(parents=True)
    kept.write_text("x")

    with pytest.raises(RefusedError, match="is no link"):
        await machine.pull(switch=True)

    assert kept.read_text() == "x"
    assert [name for name in os.listdir(machine.root) if name.startswith(".current")] == []
    assert (await machine.pull()).already, "the tree itself was not kept"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder to another user")
async def test_a_root_that_another_user_could_replace_gets_no_tree_and_no_switch(machine: Machine) -> None:
    await machine.pull()
    Path(machine.root).chmod(0o777)
    with pytest.raises(RefusedError, match="everybody can write"):
        await machine.pull(switch=True)
    Path(machine.root).chmod(0o755)
    os.chown(machine.root, 12345, 12345)

    with pytest.raises(RefusedError, match="another user"):
        await machine.pull("1.1.0")

    assert len(machine.releases()) == 1
    assert not os.path.lexists(os.path.join(machine.root, "current"))


async def test_a_tree_that_was_removed_is_built_again(machine: Machine) -> None:
    first = await machine.pull()
    shutil.rmtree(first.tree)

    again = await machine.pull()

    assert not again.already
    assert content(again.tree) == FILES


async def test_a_tree_that_was_edited_does_not_count_as_there(machine: Machine) -> None:
    first = await machine.pull()
    Path(first.tree, "lib.dll").write_bytes(b"edited")

    again = await machine.pull()

    assert not again.already
    assert again.tree != first.tree
    assert content(again.tree) == FILES
    assert sum(tally["bytes"] for tally in again.from_relays.values()) < 110_000, "what is whole was fetched again"
    assert Path(first.tree, "lib.dll").read_bytes() == b"edited", "a file was changed in place"
    assert (await machine.pull()).tree == again.tree


async def test_files_beside_the_packages_own_do_not_matter(machine: Machine) -> None:
    first = await machine.pull()
    Path(first.tree, "app.log").write_text("started")

    assert (await machine.pull()).already


async def test_two_roots_share_bytes_and_nothing_else(machine: Machine, tmp_path: Path) -> None:
    await machine.pull()
    machine.root = str(tmp_path / "second")

    result = await machine.pull()

    assert result.from_relays == {}
    assert result.from_disk_bytes == result.tree_bytes
    assert content(result.tree) == FILES


async def test_a_crash_between_the_tree_and_its_record_is_made_good(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AgentState, "record", fail)
        with pytest.raises(KeyboardInterrupt):
            await machine.pull()
    assert machine.state.trees() == []
    [kept] = [name for name in machine.releases() if not name.startswith(".")]

    result = await machine.pull()

    assert os.path.basename(result.tree) == kept
    assert result.from_relays == {}
    assert machine.releases() == [kept]


async def test_a_crash_after_the_record_leaves_nothing_behind(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(IncomingTree, "clear", IncomingTree.close)
        result = await machine.pull()
    assert len(machine.releases()) == 2, "the crash was not staged"

    assert (await machine.pull()).already

    assert machine.releases() == [os.path.basename(result.tree)]


# --- refused before anything moves


async def test_without_pins_and_digest_nothing_is_even_asked(machine: Machine) -> None:
    asked = []

    class Watched(Sources):
        async def measure(self, *, everything: bool = False) -> dict[str, str]:
            asked.append(everything)
            return await super().measure(everything=everything)

    request = parse_request("Acme.Web", "1.0.0", machine.root, None, switch=False)
    async with Watched(AgentConfig(), Path(machine.home) / "relays.json", relays=[machine.relay.url]) as sources:
        with pytest.raises(SignatureError, match=r"trust\.json"):
            await pull(request, machine.state, sources, None)

    assert asked == []
    assert not os.path.exists(machine.root)


async def test_with_a_digest_no_pins_are_needed(machine: Machine) -> None:
    request = parse_request(
        "Acme.Web", "1.0.0", machine.root, f"sha256:{machine.origin.added[0].manifest.id}", switch=False
    )
    async with Sources(AgentConfig(), Path(machine.home) / "relays.json", relays=[machine.relay.url]) as sources:
        result = await pull(request, machine.state, sources, None)

    assert content(result.tree) == FILES


async def test_what_no_relay_has_is_told_with_the_next_step(machine: Machine) -> None:
    with pytest.raises(NotFoundError, match="replicate") as caught:
        await machine.pull("9.9.9")

    assert "Acme.Web 9.9.9" in str(caught.value)
    assert machine.relay.url in str(caught.value)
    assert load_state(Path(machine.home) / "relays.json").healths[machine.relay.url].fails == 0, "absence is an answer"


@pytest.mark.parametrize(("id", "version"), [("../x", "1.0"), ("Acme.Web", "1.x"), ("", "1.0"), ("a b", "1.0")])
def test_what_is_no_package_name_is_refused_at_the_edge(id: str, version: str) -> None:
    with pytest.raises(IdentityError):
        parse_request(id, version, "/srv", None, switch=False)


@pytest.mark.parametrize("digest", ["sha256:abc", "md5:" + "0" * 32, "sha256:" + "g" * 64])
def test_what_is_no_digest_is_refused_at_the_edge(digest: str) -> None:
    with pytest.raises(IdentityError):
        parse_request("Acme.Web", "1.0", "/srv", digest, switch=False)


async def test_a_second_pull_at_the_same_time_is_refused_and_the_first_goes_on(machine: Machine) -> None:
    manifest = machine.origin.added[0].manifest
    first = IncomingTree(machine.root, manifest, "1.0.0-A")

    with pytest.raises(LockedError):
        await machine.pull()

    first.close()
    assert content((await machine.pull()).tree) == FILES


# --- the disk


@pytest.mark.parametrize("where", ["write_at", "sync_tree"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
async def test_a_disk_that_fails_is_no_fault_of_a_relays_and_leaves_nothing(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    calls = []

    def fail(*_: object) -> None:
        calls.append(where)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(platform, where, fail)
        with pytest.raises(StoreError, match=os.strerror(number)) as caught:
            await machine.pull()

    assert calls
    assert caught.value.full is (number == errno.ENOSPC)
    assert machine.releases() == []
    assert machine.state.trees() == []
    assert load_state(Path(machine.home) / "relays.json").healths[machine.relay.url].ok
    assert load_state(Path(machine.home) / "relays.json").healths[machine.relay.url].fails == 0
    assert content((await machine.pull()).tree) == FILES


async def test_too_little_room_is_told_before_a_chunk_moves(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = RelayClient.stream
    monkeypatch.setattr(RelayClient, "stream", lambda *args: asked.append(args) or real(*args))
    monkeypatch.setattr(platform, "free_bytes", lambda folder: 1 << 20)

    with pytest.raises(StoreError, match="1 MiB are free"):
        await machine.pull()

    assert asked == []
    assert machine.releases() == []


async def test_a_home_that_is_full_costs_the_record_and_not_the_tree(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("agent.trees.installed.write_durably", fail)
        with pytest.raises(StoreError, match="No space left"):
            await machine.pull()

    result = await machine.pull()

    assert result.from_relays == {}
    assert content(result.tree) == FILES


async def test_a_pull_that_is_cancelled_goes_on_from_there(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    real = IncomingTree.write

    def slow(self: IncomingTree, chunk) -> None:
        started.append(1)
        real(self, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(IncomingTree, "write", slow)
        task = asyncio.create_task(machine.pull())
        await eventually(lambda: len(started) > 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    result = await machine.pull()

    assert content(result.tree) == FILES
    assert machine.releases() == [os.path.basename(result.tree)]


async def test_progress_ends_at_the_whole(machine: Machine) -> None:
    told: list[tuple[int, int]] = []
    request = parse_request("Acme.Web", "1.0.0", machine.root, None, switch=False)
    async with Sources(AgentConfig(), Path(machine.home) / "relays.json", relays=[machine.relay.url]) as sources:
        await pull(
            request,
            machine.state,
            sources,
            machine.origin.keys.pins,
            progress=lambda done, whole: told.append((done, whole)),
        )

    assert told[-1][0] == told[-1][1] == sum(map(len, FILES.values()))
    assert [done for done, _ in told] == sorted(done for done, _ in told)


async def test_a_relay_that_cannot_be_reached_is_named(machine: Machine) -> None:
    async with Sources(AgentConfig(), Path(machine.home) / "relays.json", relays=["http://127.0.0.1:1"]) as sources:
        request = parse_request("Acme.Web", "1.0.0", machine.root, None, switch=False)
        with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:1"):
            await pull(request, machine.state, sources, machine.origin.keys.pins)


# --- differences from installed trees

CODE = {f"lib/{i}.dll": noise(f"code {i}", 300_000) + b"text " * 20_000 for i in range(6)}
REBUILT = {path: data[:100_000] + b"changed" + data[100_000:] for path, data in CODE.items()}
THIN = Line(rate=1.25e6, latency=0.025)
DELTAS = {"zstd-prefix", "hdiff"}


@dataclass
class Far(Machine):
    """A machine behind a line of its own."""

    url: str = ""

    async def pull(self, version: str = "1.0.0", *, switch: bool = False, digest: str | None = None) -> Pulled:
        request = parse_request("Acme.Code", version, self.root, digest, switch=switch)
        path = Path(self.home) / "relays.json"
        async with Sources(AgentConfig(name="m1"), path, relays=[self.url], limits=LIMITS) as sources:
            return await pull(request, self.state, sources, self.origin.keys.pins)


@asynccontextmanager
async def far_machine(tmp_path: Path, line: Line | None) -> AsyncIterator[Far]:
    nupkgs = [
        make_nupkg(tmp_path, CODE, id="Acme.Code"),
        make_nupkg(tmp_path, REBUILT, id="Acme.Code", version="1.1.0"),
    ]
    async with (
        depot_with(tmp_path / "origin", *nupkgs) as origin,
        running_relay(tmp_path / "origin" / "depot") as relay,
        CountingProxy("127.0.0.1", relay.port, up=line, down=line) as proxy,
    ):
        yield Far(str(tmp_path / "home"), str(tmp_path / "root"), relay, origin, f"http://127.0.0.1:{proxy.port}")


def encodings(pulled: Pulled) -> set[str]:
    return {each.encoding for each in pulled.encodings}


async def test_on_a_thin_line_the_next_version_comes_as_a_difference_from_the_installed_one(tmp_path: Path) -> None:
    async with far_machine(tmp_path, THIN) as far:
        first = await far.pull()
        second = await far.pull("1.1.0")
    assert encodings(first) == {"zstd"}
    assert encodings(second) <= DELTAS
    assert content(second.tree) == REBUILT
    assert second.wire_bytes < 30_000 < first.wire_bytes
    assert (second.fallbacks, second.failed) == (0, {})
    [told] = second.encodings
    [tally] = second.from_relays.values()
    assert (told.chunks, told.stream_bytes, told.payload_bytes) == (
        tally["chunks"],
        tally["bytes"],
        tally["payload_bytes"],
    )


async def test_at_lan_speed_the_next_version_comes_in_its_stored_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How fast this machine happens to be is not the question.
    monkeypatch.setattr(Sources, "goodput", lambda self, name: 100e6)
    async with far_machine(tmp_path, None) as far:
        await far.pull()
        second = await far.pull("1.1.0")
    assert encodings(second) == {"zstd"}
    assert [each.chunks for each in second.encodings] == [len(REBUILT)]
    assert content(second.tree) == REBUILT


async def test_an_edited_file_is_no_base_and_the_others_are(tmp_path: Path) -> None:
    async with far_machine(tmp_path, THIN) as far:
        first = await far.pull()
        Path(first.tree, "lib/0.dll").write_bytes(b"edited by somebody")
        second = await far.pull("1.1.0")
    assert content(second.tree) == REBUILT
    assert second.fallbacks == 0
    assert 300_000 < sum(each.payload_bytes for each in second.encodings) < 400_000


async def test_a_base_that_changes_after_it_was_named_costs_a_plain_run_from_the_same_relay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt: list[str] = []
    load = TreeHoldings.load

    async def load_too_late(self: TreeHoldings, places: Places) -> list[bytes]:
        Path(first.tree, "lib/0.dll").write_bytes(b"edited at this very moment")
        spoilt.append(first.tree)
        return await load(self, places)

    async with far_machine(tmp_path, THIN) as far:
        first = await far.pull()
        monkeypatch.setattr(TreeHoldings, "load", load_too_late)
        second = await far.pull("1.1.0")
    assert spoilt
    assert content(second.tree) == REBUILT
    assert second.fallbacks >= 1
    assert second.failed == {}
    assert "zstd" in encodings(second)


async def test_a_relay_that_sends_wrong_differences_is_asked_plainly_and_nothing_wrong_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lies = 0
    made = PayloadReader.stretches

    async def lying(self: PayloadReader, least: int, patience: float | None) -> AsyncIterator[tuple[bytes, bool]]:
        nonlocal lies
        payload = b"".join([stretch async for stretch, _ in made(self, least, patience)])
        if self._payload.spec.bases:
            lies += 1
            payload = payload[:-20] + bytes(byte ^ 0x55 for byte in payload[-20:])
        yield payload, False

    monkeypatch.setattr(PayloadReader, "stretches", lying)
    async with far_machine(tmp_path, THIN) as far:
        await far.pull()
        second = await far.pull("1.1.0")
    assert lies
    assert second.fallbacks == lies
    assert second.failed == {}
    assert content(second.tree) == REBUILT


async def test_a_part_of_another_installed_package_is_a_base(tmp_path: Path) -> None:
    """An application carries its libraries, cut and gathered otherwise than in their own packages."""
    small = {f"lib/{i}.xml": noise(f"small {i}", 9_000) for i in range(30)}
    bundled = {f"app/{path}": data for path, data in small.items()} | {"app/main.txt": b"main"}
    nupkgs = [make_nupkg(tmp_path, small, id="Acme.Lib"), make_nupkg(tmp_path, bundled, id="Acme.App")]
    async with (
        depot_with(tmp_path / "origin", *nupkgs) as origin,
        running_relay(tmp_path / "origin" / "depot") as relay,
        CountingProxy("127.0.0.1", relay.port, up=THIN, down=THIN) as proxy,
    ):
        state, path = AgentState(str(tmp_path / "home")), tmp_path / "home" / "relays.json"
        pulled = []
        for id in ("Acme.Lib", "Acme.App"):
            request = parse_request(id, "1.0.0", str(tmp_path / id), None, switch=False)
            url = f"http://127.0.0.1:{proxy.port}"
            async with Sources(AgentConfig(name="m1"), path, relays=[url], limits=LIMITS) as sources:
                pulled.append(await pull(request, state, sources, origin.keys.pins))
    assert content(pulled[1].tree) == bundled
    assert encodings(pulled[1]) <= DELTAS
    assert sum(each.payload_bytes for each in pulled[1].encodings) < 10_000
