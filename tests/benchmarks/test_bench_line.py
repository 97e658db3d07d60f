"""`waystation bench line`: through a real relay process, through a line with known properties."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from harness.process import run
from harness.relays import RelayProcess
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.cli import bench
from benchmarks.line import SIZES, Plan, fits, measure_line, parse_connections
from benchmarks.lines.network import CountingProxy, Line, ThreadedProxy
from relay.errors import UnreachableError, UsageError
from relay.protocol.client import RelayClient
from relay.protocol.connection import TokenRefusedError


def line(*words: object) -> Result:
    return CliRunner().invoke(bench, ["line", *map(str, words)])


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory):
    home = tmp_path_factory.mktemp("relay")
    with RelayProcess(home, "--store", f"disk:{home / 'store'}") as served:
        yield served


def test_the_document_has_every_cell_and_both_ends(relay) -> None:
    done = line("--relay", relay.url, "--seconds", "1", "--connections", "1,2", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["format"] == 1
    assert document["relay"] == relay.url
    assert 0 < document["round_trip"]["low"] <= document["round_trip"]["median"] <= document["round_trip"]["high"]
    cells = {(cell["direction"], cell["connections"], cell["size"]): cell for cell in document["cells"]}
    assert set(cells) == {(way, n, size) for way in ("up", "down") for n in (1, 2) for size in SIZES}
    assert cells["up", 1, SIZES[0]]["goodput"]["median"] > 0
    for end in ("relay_cpu", "own_cpu"):
        assert document[end]["sha256"] > 0


def test_people_get_tables_and_progress_apart(relay) -> None:
    done = line("--relay", relay.url, "--seconds", "1", "--connections", "1")
    assert done.exit_code == 0, done.output
    assert "round trip" in done.stdout
    for word in (
        "to the relay, Mbit/s",
        "from the relay, Mbit/s",
        "64.0 KiB each",
        "sha256",
        "zstd decode",
        "  NAME:\n",
        "prefer: ",
    ):
        assert word in done.stdout
    assert "1 x 64.0 KiB to the relay: " in done.stderr
    assert "1 x 64.0 KiB to the relay: " not in done.stdout


async def test_goodput_is_that_of_the_line_and_so_is_the_round_trip(relay) -> None:
    """Wide margins: the line is 100 times slower than this machine, and as far away as another continent."""
    slow = Line(rate=1_000_000, latency=0.05)
    async with (
        CountingProxy("127.0.0.1", relay.port, up=slow, down=slow) as proxy,
        RelayClient(f"http://127.0.0.1:{proxy.port}") as client,
    ):
        report = await measure_line(client, 4.0, Plan((1,), (500_000,)))
    assert report.round_trip.low >= 0.1
    assert report.round_trip.median < 1.0
    for cell in report.cells:
        assert cell.goodput is not None
        assert 300_000 < cell.goodput.median <= 1_050_000


async def test_a_slow_line_is_not_filled_beyond_the_time_that_was_given(relay) -> None:
    slow = Line(rate=500_000)
    async with CountingProxy("127.0.0.1", relay.port, up=slow, down=slow) as proxy:
        async with RelayClient(f"http://127.0.0.1:{proxy.port}") as client:
            heard: list[str] = []
            report = await measure_line(client, 2.0, Plan((1, 8)), heard.append)
        largest = max(SIZES)
        assert [cell.goodput for cell in report.cells if cell.size == largest] == [None] * 4
        assert any("no time for it" in text for text in heard)
        assert proxy.counts.total < largest


def test_several_connections_are_used_at_once(relay) -> None:
    with ThreadedProxy("127.0.0.1", relay.port) as proxy:
        done = line("--relay", f"http://127.0.0.1:{proxy.port}", "--seconds", "0.5", "--connections", "4")
        assert done.exit_code == 0, done.output
        assert 4 <= proxy.connections <= 5


def test_a_relay_that_goes_away_is_told_as_such(relay) -> None:
    with ThreadedProxy("127.0.0.1", relay.port, up=Line(rate=2_000_000)) as proxy, ThreadPoolExecutor(1) as pool:
        passed = pool.submit(proxy.wait_for, 400_000, direction="up")
        passed.add_done_callback(lambda _: proxy.cut())
        done = line("--relay", f"http://127.0.0.1:{proxy.port}", "--seconds", "5", "--connections", "2")
        passed.result(10)
    assert isinstance(done.exception, UnreachableError)


def test_a_token_that_may_not_write_is_told_as_such(tmp_path: Path) -> None:
    config, file = tmp_path / "relay.yaml", tmp_path / "token"
    made = run(tmp_path, "relay", "token", "read", "--config", config)
    file.write_text(made.out)
    config.write_text(config.read_text() + f"\nlisten: 127.0.0.1:0\nstore: disk:{tmp_path / 'store'}\n")
    with RelayProcess(tmp_path, "--config", config) as served:
        done = line("--relay", served.url, "--token-file", file, "--seconds", "1")
    assert isinstance(done.exception, TokenRefusedError)


@pytest.mark.parametrize("text", ["", "0", "65", "1,x", "-1", "1,,2"])
def test_numbers_of_connections_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_connections(text)


def test_numbers_of_connections_are_sorted_and_told_once() -> None:
    assert parse_connections("8,1,2,8") == (1, 2, 8)


def test_no_time_is_refused() -> None:
    done = line("--relay", "http://127.0.0.1:1", "--seconds", "0")
    assert done.exit_code == 2
    assert "such as 90s" in done.output


@given(
    amount=st.integers(1, 1 << 30),
    goodput=st.floats(1e3, 1e10),
    trip=st.floats(0, 1),
    share=st.floats(0, 60),
    more=st.floats(0, 60),
)
def test_more_time_never_drops_a_cell(amount: int, goodput: float, trip: float, share: float, more: float) -> None:
    assert not fits(amount, goodput, trip, share) or fits(amount, goodput, trip, share + more)


def test_where_nothing_is_known_it_is_tried() -> None:
    assert fits(1 << 30, None, 1.0, 0.0)
    assert not fits(1 << 20, 1e6, 0.0, 0.1)


def test_help_has_an_example() -> None:
    assert "Example: waystation bench line --relay" in " ".join(line("--help").output.split())
