"""The network laboratory: lines have the rate and the latency that they say, and nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.lines import laboratory
from benchmarks.lines.forwarder import Way, forward
from benchmarks.lines.laboratory import (
    Laboratory,
    LaboratoryError,
    Link,
    chain,
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


def run(lab: Laboratory, place: str, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A program at a place, to its end."""
    return subprocess.run([*lab.inside(place), *words], capture_output=True, text=True, check=False)


def start(lab: Laboratory, place: str, words: Sequence[str]) -> subprocess.Popen[str]:
    """A program at a place that has printed a line."""
    process = subprocess.Popen([*lab.inside(place), *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


@contextlib.contextmanager
def sink(lab: Laboratory, place: str) -> Iterator[None]:
    """A server at a place that counts what it gets."""
    with start(lab, place, [sys.executable, "-c", SERVER, lab.address(place)]) as process:
        yield
        process.kill()


def send(lab: Laboratory, place: str, to: str, size: int) -> tuple[float, float]:
    """Seconds of the handshake, and of all."""
    done = run(lab, place, [sys.executable, "-c", CLIENT, lab.address(to), str(size)])
    assert done.returncode == 0, done.stderr
    trip, seconds = done.stdout.split()
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


def test_only_namespaces_of_dead_laboratories_are_left_over() -> None:
    names = ["waystation-12-1-origin", "waystation-13-1-origin", "waystation-x-1-a", "vpn", "waystation-12-1-a b"]
    assert leftovers(names, [13, 1]) == ["waystation-12-1-origin"]


def test_why_not_tells_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(laboratory, "_PATH", str(tmp_path))
    assert "iproute2" in Laboratory.why_not()


def test_where_none_can_be_built_it_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(laboratory, "_PATH", str(tmp_path))
    with pytest.raises(LaboratoryError, match="iproute2"), Laboratory(QUICK):
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
def test_a_line_has_the_rate_and_the_latency_that_it_says() -> None:
    """Wide margins: a machine that is busy makes it slower, and nothing makes it faster."""
    with Laboratory(Line(rate=1_000_000, latency=0.04)) as lab, sink(lab, "site1"):
        trip, seconds = send(lab, "origin", "site1", 1_000_000)
        passed = lab.passed("origin", "site1")
    assert 0.08 <= trip < 0.4
    assert 0.9 < seconds < 5.0
    # The payload, and 52 bytes of headers for each packet of at most 1,500.
    assert 1_030_000 < passed < 1_150_000


@needs_laboratory
def test_a_wide_line_is_wider() -> None:
    """The same as above, a hundred times: what was slow there was the line and not this machine."""
    with Laboratory(Line(rate=100_000_000, latency=0.04)) as lab, sink(lab, "site1"):
        _, seconds = send(lab, "origin", "site1", 1_000_000)
    assert seconds < 0.9


@needs_laboratory
def test_each_line_of_a_chain_carries_what_passes_it_once() -> None:
    with Laboratory(chain(3, QUICK)) as lab:
        with sink(lab, "site3"):
            send(lab, "origin", "site3", 400_000)
        far = [lab.passed(*hop) for hop in (("origin", "site1"), ("site1", "site2"), ("site2", "site3"))]
        with sink(lab, "site1"):
            send(lab, "origin", "site1", 400_000)
        assert lab.passed("origin", "site1") > 2 * 400_000
        assert lab.passed("site1", "site2") == far[1]
    assert all(400_000 < passed < 480_000 for passed in far)


@needs_laboratory
def test_a_line_that_carries_nothing_counts_nothing() -> None:
    with Laboratory(QUICK) as lab:
        time.sleep(0.3)
        assert lab.passed("origin", "site1") == 0
        assert lab.passed("site1", "origin") == 0


@needs_laboratory
def test_places_see_nothing_of_this_machines_networks() -> None:
    with Laboratory(QUICK) as lab, socket.create_server(("127.0.0.1", 0)) as server:
        code = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)"
        assert "ConnectionRefusedError" in run(lab, "origin", [sys.executable, "-c", code]).stderr


@needs_laboratory
def test_two_laboratories_stand_side_by_side() -> None:
    with Laboratory(QUICK) as first, Laboratory(QUICK) as second:
        with sink(first, "site1"), sink(second, "site1"):
            send(first, "origin", "site1", 100_000)
        assert first.passed("origin", "site1") > 100_000
        assert second.passed("origin", "site1") == 0


@needs_laboratory
def test_nothing_is_left_when_it_is_over() -> None:
    before = set(namespaces())
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    with Laboratory(star(2, QUICK)) as lab:
        inside = [start(lab, site, [sys.executable, "-c", stubborn]) for site in ("site1", "site2")]
        assert len(set(namespaces()) - before) == 3
    for process in inside:
        with process:
            assert process.wait(10) == -signal.SIGKILL
    assert set(namespaces()) <= before


@needs_laboratory
def test_nothing_is_left_when_building_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(namespaces())
    monkeypatch.setattr(laboratory, "tbf_words", lambda _: "no-such-qdisc")
    monkeypatch.setattr(Laboratory, "why_not", staticmethod(lambda: ""))
    with pytest.raises(LaboratoryError, match="no-such-qdisc"), Laboratory(QUICK):
        pass
    assert set(namespaces()) <= before


CRASH = """
import subprocess, time
from benchmarks.lines.laboratory import Laboratory
from benchmarks.lines.network import Line

with Laboratory(Line()) as lab:
    program = subprocess.Popen([*lab.inside("site1"), "sleep", "600"])
    print(lab.namespace("site1"), program.pid, flush=True)
    time.sleep(600)
"""


@needs_laboratory
def test_what_a_killed_laboratory_left_is_removed_by_the_next() -> None:
    killed = subprocess.Popen([sys.executable, "-c", CRASH], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    name, pid = killed.stdout.readline().split()
    killed.kill()
    killed.wait()
    killed.stdout.close()  # Not read to its end: the program inside holds it open.
    assert name in namespaces(), "nothing was left: the test proves nothing"
    os.kill(int(pid), 0)
    with Laboratory(QUICK):
        assert name not in namespaces()
    with (
        contextlib.suppress(ProcessLookupError, FileNotFoundError),
        open(f"/proc/{pid}/stat", encoding="ascii") as file,
    ):
        assert file.read().rpartition(")")[2].split()[0] == "Z", "its program still runs"
