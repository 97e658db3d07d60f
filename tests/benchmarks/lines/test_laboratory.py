"""The network laboratory: lines have the rate and the latency that they say, and nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.lines import laboratory
from benchmarks.lines.forwarder import Way, forward
from benchmarks.lines.laboratory import (
    Laboratory,
    LaboratoryError,
    Link,
    Passed,
    chain,
    hub,
    leftovers,
    next_hops,
    star,
    tree,
)
from benchmarks.lines.network import Line

WHY_NOT = Laboratory.why_not()
needs_laboratory = pytest.mark.skipif(bool(WHY_NOT), reason=f"no network laboratory: {WHY_NOT}")

QUICK = Line(rate=12_500_000, latency=0.001)

SERVER = """
import socket, sys
with socket.create_server((sys.argv[1], 7000)) as server:
    print("ready", flush=True)
    while True:
        connection, _ = server.accept()
        with connection:
            count = 0
            while piece := connection.recv(1 << 18):
                count += len(piece)
            connection.sendall(str(count).encode())
"""
CLIENT = """
import socket, sys, time
with socket.socket() as connection:
    began = time.perf_counter()
    connection.connect((sys.argv[1], 7000))
    trip = time.perf_counter() - began
    connection.sendall(bytes(int(sys.argv[2])))
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(99).decode() == sys.argv[2]
print(trip, time.perf_counter() - began)
"""


@contextlib.asynccontextmanager
async def sink(lab: Laboratory, place: str) -> AsyncIterator[None]:
    """A server at a place that counts what it gets."""
    words = [sys.executable, "-c", SERVER, lab.address(place)]
    process = await lab.start(place, words, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    yield
    process.kill()
    await process.wait()


async def send(lab: Laboratory, place: str, to: str, size: int) -> tuple[float, float]:
    """Seconds of the handshake, and of all."""
    words = [sys.executable, "-c", CLIENT, lab.address(to), str(size)]
    trip, seconds = (await lab.run(place, words)).split()
    return float(trip), float(seconds)


def namespaces() -> list[str]:
    if not os.path.isdir("/run/netns"):
        return []
    return [name for name in os.listdir("/run/netns") if name.startswith("waystation-")]


# --- shapes


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12))
def test_every_place_is_reached_by_its_hops(parents: list[int]) -> None:
    links = [Link(f"p{parent % (n + 1)}", f"p{n + 1}", Line()) for n, parent in enumerate(parents)]
    hops = next_hops(links)
    for start, ways in hops.items():
        assert set(ways) == set(hops) - {start}
        for to in ways:
            here, passed = start, []
            while here != to:
                passed.append(here)
                assert len(passed) <= len(links), "a circle"
                here = links[hops[here][to]].other(here)


@pytest.mark.parametrize(
    "links",
    [
        (),
        (Link("a", "a", Line()),),
        (Link("a", "b", Line()), Link("a", "b", Line())),
        (Link("a", "b", Line()), Link("b", "c", Line()), Link("c", "a", Line())),
        (Link("a", "b", Line()), Link("c", "d", Line())),
        (Link("a", "b", Line()), Link("c", "d", Line()), Link("d", "c", Line())),
        (Link("a b", "c", Line()),),
        (Link("../a", "c", Line()),),
    ],
)
def test_links_that_are_no_tree_are_refused(links: Sequence[Link]) -> None:
    with pytest.raises(ValueError, match=r"no tree|no name"):
        Laboratory(links)


def test_the_shapes_are_what_their_names_say() -> None:
    line = Line(rate=1.0, latency=0.5)
    assert [(k.near, k.far) for k in chain(3, line)] == [("origin", "site1"), ("site1", "site2"), ("site2", "site3")]
    assert {k.near for k in star(3, line)} == {"origin"}
    assert [k.near for k in tree(6, line)] == ["origin", "origin", "site1", "site1", "site2", "site2"]
    assert {(k.near, k.line.latency) for k in hub(2, line)} == {("core", 0.25)}


def test_only_namespaces_of_dead_laboratories_are_left_over() -> None:
    names = ["waystation-12-1-origin", "waystation-13-1-origin", "waystation-x-1-a", "vpn", "waystation-12-1-a b"]
    assert leftovers(names, [13, 1]) == ["waystation-12-1-origin"]


def test_why_not_tells_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(laboratory, "_PATH", str(tmp_path))
    assert "iproute2" in Laboratory.why_not()


async def test_where_none_can_be_built_it_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(laboratory, "_PATH", str(tmp_path))
    with pytest.raises(LaboratoryError, match="iproute2"):
        async with Laboratory(QUICK):
            pass


# --- the forwarder


def test_packets_come_out_whole_in_order_and_not_before_their_time() -> None:
    here, source = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    there, target = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stop, stopped = socket.socketpair()
    source.setblocking(False)
    packets = [bytes([n]) * (n * 700 + 1) for n in range(20)]
    ways = [Way(0.05, source.fileno(), target.fileno()), Way(0.0, target.fileno(), source.fileno())]
    target.setblocking(False)
    thread = threading.Thread(target=forward, args=(ways, stopped.fileno()))
    with here, source, there, target, stop, stopped:
        thread.start()
        began = time.monotonic()
        for packet in packets:
            here.send(packet)
        got = [there.recv(1 << 17) for _ in packets]
        assert time.monotonic() - began >= 0.05
        there.send(b"back")
        assert here.recv(99) == b"back"
        stop.close()
        thread.join(10)
        assert not thread.is_alive()
    assert got == packets


# --- real lines


@needs_laboratory
async def test_a_line_has_the_rate_and_the_latency_that_it_says() -> None:
    """Wide margins: a machine that is busy makes it slower, and nothing makes it faster."""
    async with Laboratory(Line(rate=1_000_000, latency=0.04)) as lab, sink(lab, "site1"):
        trip, seconds = await send(lab, "origin", "site1", 1_000_000)
        passed = await lab.passed("origin", "site1")
    assert 0.08 <= trip < 0.4
    assert 0.9 < seconds < 5.0
    # The payload, and 52 bytes of headers for each packet of at most 1,500.
    assert 1_030_000 < passed.bytes < 1_150_000
    assert passed.packets > 1_000_000 / 1500


@needs_laboratory
async def test_a_wide_line_is_wider() -> None:
    """The same as above, a hundred times: what was slow there was the line and not this machine."""
    async with Laboratory(Line(rate=100_000_000, latency=0.04)) as lab, sink(lab, "site1"):
        _, seconds = await send(lab, "origin", "site1", 1_000_000)
    assert seconds < 0.9


@needs_laboratory
async def test_the_ways_of_a_line_may_differ() -> None:
    link = Link("origin", "site1", QUICK, back=Line(rate=500_000, latency=0.001))
    async with Laboratory([link]) as lab:
        async with sink(lab, "site1"):
            _, there = await send(lab, "origin", "site1", 500_000)
        async with sink(lab, "origin"):
            _, back = await send(lab, "site1", "origin", 500_000)
    assert back > 0.9
    assert there < back


@needs_laboratory
async def test_each_line_of_a_chain_carries_what_passes_it_once() -> None:
    async with Laboratory(chain(3, QUICK)) as lab:
        async with sink(lab, "site3"):
            await send(lab, "origin", "site3", 400_000)
        far = [await lab.passed(*hop) for hop in (("origin", "site1"), ("site1", "site2"), ("site2", "site3"))]
        async with sink(lab, "site1"):
            await send(lab, "origin", "site1", 400_000)
        assert (await lab.passed("origin", "site1")).bytes > 2 * 400_000
        assert await lab.passed("site1", "site2") == far[1]
    assert all(400_000 < passed.bytes < 480_000 for passed in far)


@needs_laboratory
async def test_at_a_hub_all_that_a_place_sends_shares_its_access() -> None:
    async with Laboratory(hub(2, QUICK)) as lab:
        for site in ("site1", "site2"):
            async with sink(lab, site):
                await send(lab, "origin", site, 300_000)
        assert 600_000 < (await lab.passed("origin", "core")).bytes < 700_000
        assert 300_000 < (await lab.passed("core", "site2")).bytes < 350_000
        async with sink(lab, "site2"):
            await send(lab, "site1", "site2", 300_000)
        assert (await lab.passed("origin", "core")).bytes < 700_000


@needs_laboratory
async def test_a_line_that_carries_nothing_counts_nothing() -> None:
    async with Laboratory(QUICK) as lab:
        await asyncio.sleep(0.3)
        assert await lab.passed("origin", "site1") == Passed(0, 0, 0)
        assert await lab.passed("site1", "origin") == Passed(0, 0, 0)


@needs_laboratory
async def test_places_see_nothing_of_this_machines_networks() -> None:
    async with Laboratory(QUICK) as lab:
        with socket.create_server(("127.0.0.1", 0)) as server:
            code = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)"
            with pytest.raises(LaboratoryError, match="ConnectionRefusedError"):
                await lab.run("origin", [sys.executable, "-c", code])


@needs_laboratory
async def test_two_laboratories_stand_side_by_side() -> None:
    async with Laboratory(QUICK) as first, Laboratory(QUICK) as second:
        async with sink(first, "site1"), sink(second, "site1"):
            await send(first, "origin", "site1", 100_000)
        assert (await first.passed("origin", "site1")).bytes > 100_000
        assert (await second.passed("origin", "site1")).bytes == 0


@needs_laboratory
async def test_a_program_that_fails_says_why() -> None:
    async with Laboratory(QUICK) as lab:
        with pytest.raises(LaboratoryError, match="no luck"):
            await lab.run("origin", [sys.executable, "-c", "import sys; sys.exit('no luck')"])


@needs_laboratory
async def test_nothing_is_left_when_it_is_over() -> None:
    before = set(namespaces())
    async with Laboratory(star(2, QUICK)) as lab:
        polite = await lab.start("site1", ["sleep", "600"])
        stubborn = await lab.start(
            "site2",
            [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); print(); time.sleep(600)"],
            stdout=asyncio.subprocess.PIPE,
        )
        assert stubborn.stdout is not None
        await asyncio.sleep(0.1)
        apart = subprocess.Popen([*lab.inside("site1"), "sleep", "600"])
        assert len(set(namespaces()) - before) == 3
    assert await polite.wait() == -signal.SIGTERM
    assert await stubborn.wait() == -signal.SIGKILL
    assert apart.wait(10) == -signal.SIGKILL
    assert set(namespaces()) <= before


@needs_laboratory
async def test_nothing_is_left_when_building_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(namespaces())
    monkeypatch.setattr(laboratory, "tbf_words", lambda _: "no-such-qdisc")
    monkeypatch.setattr(Laboratory, "why_not", staticmethod(lambda: ""))
    with pytest.raises(LaboratoryError, match="no-such-qdisc"):
        async with Laboratory(QUICK):
            pass
    assert set(namespaces()) <= before


CRASH = """
import asyncio
from benchmarks.lines.laboratory import Laboratory
from benchmarks.lines.network import Line

async def main():
    async with Laboratory(Line()) as lab:
        program = await lab.start("site1", ["sleep", "600"])
        print(lab.namespace("site1"), program.pid, flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@needs_laboratory
async def test_what_a_killed_laboratory_left_is_removed_by_the_next() -> None:
    killed = subprocess.Popen([sys.executable, "-c", CRASH], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    name, pid = killed.stdout.readline().split()
    killed.kill()
    killed.wait()
    killed.stdout.close()  # Not read to its end: the program inside holds it open.
    assert name in namespaces(), "nothing was left: the test proves nothing"
    os.kill(int(pid), 0)
    async with Laboratory(QUICK):
        assert name not in namespaces()
    with (
        contextlib.suppress(ProcessLookupError, FileNotFoundError),
        open(f"/proc/{pid}/stat", encoding="ascii") as file,
    ):
        assert file.read().rpartition(")")[2].split()[0] == "Z", "its program still runs"
