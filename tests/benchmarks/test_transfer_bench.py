"""`waystation bench transfer`, and the tables made with it: honest repeats, and verdicts that follow from the figures."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from harness.packages import make_nupkg, noise
from harness.process import run
from harness.relays import RelayProcess
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import cascades, memory, transfer
from benchmarks.cli import bench
from benchmarks.line import Cell, LineReport, Spread
from benchmarks.lines.laboratory import Laboratory
from benchmarks.lines.network import Line
from benchmarks.support.programs import peak_memory
from benchmarks.transfer import (
    ENCODINGS,
    HOPELESS,
    PLANNED,
    Case,
    Shape,
    Trial,
    Tried,
    hopeless,
    parse_encodings,
    parse_shape,
)
from relay.errors import UsageError, WaystationError
from relay.protocol.messages import CpuRates

WHY_NOT = Laboratory.why_not()
needs_laboratory = pytest.mark.skipif(bool(WHY_NOT), reason=f"no network laboratory: {WHY_NOT}")
ID = "Acme.Measured"
PART_BYTES = 300_000
"""Of noise, in each version."""


def bench_transfer(*words: object) -> Result:
    return CliRunner().invoke(bench, ["transfer", *map(str, words)])


def measured(*words: object) -> Any:
    done = bench_transfer(*words, "--json")
    assert done.exit_code == 0, f"{done.output} {done.exception}"
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two versions that differ in a few bytes of noise."""
    folder = tmp_path_factory.mktemp("packages")
    part = noise("part", PART_BYTES)
    new = part[:150_000] + b"a few others" + part[150_012:]
    return (
        make_nupkg(folder, {"lib/a.dll": part}, ID, "1.0.0"),
        make_nupkg(folder, {"lib/a.dll": new}, ID, "1.1.0"),
    )


def check_document(document: Any, repeat: int, encodings: Sequence[str]) -> dict[str, Any]:
    """Every repeat sent everything that it had to; its rows by encoding."""
    assert document["format"] == 1
    assert (document["id"], document["version"], document["base"]) == (ID, "1.1.0", "1.0.0")
    rows = {row["encoding"]: row for row in document["rows"]}
    assert list(rows) == [PLANNED, *encodings]
    for row in rows.values():
        trials = row["trials"]
        assert len(trials) == repeat
        assert all(trial["seconds"] > 0 and trial["payload_bytes"] > 0 for trial in trials), "sent nothing"
        assert {one["chunks"] for trial in trials for one in trial["encodings"]} == {
            trials[0]["encodings"][0]["chunks"]
        }
    return rows


@needs_laboratory
def test_each_repeat_sends_all_over_again_in_the_encoding_that_was_asked_for(files: tuple[str, str]) -> None:
    old, new = files
    encodings = ("zstd-prefix",)
    document = measured(new, "--base", old, "--line", "50,4", "--encodings", ",".join(encodings), "--repeat", "2")
    rows = check_document(document, 2, encodings)
    assert document["made_of"] == "network namespaces"
    trials = rows["zstd-prefix"]["trials"]
    assert [one["encoding"] for trial in trials for one in trial["encodings"]] == ["zstd-prefix", "zstd-prefix"]
    # The relay holds the version before, and nothing of the new one.
    assert trials[0]["payload_bytes"] == trials[1]["payload_bytes"] < PART_BYTES / 10
    assert document["verdict"] in ("within", "alike", "BEYOND")


def test_a_package_of_the_depot_goes_over_a_line_like_the_one_to_a_relay_which_gets_no_package(
    files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("WAYSTATION_HOME", str(home))
    monkeypatch.setattr(transfer, "LINE_SECONDS", 0.5)
    assert run(home, "trust", "init").code == 0
    assert run(home, "package", "add", *files).code == 0
    with RelayProcess(tmp_path / "relay", "--store", f"disk:{tmp_path / 'store'}") as relay:
        words = (ID, "1.1.0", "--base", "1.0.0", "--relay", relay.url, "--encodings", "zstd:3", "--repeat", "1")
        document = measured(*words)
        status = run(home, "relay", "status", "--relay", relay.url, "--json").json
    check_document(document, 1, ("zstd:3",))
    assert status["packages"] == []
    assert document["shape"]["round_trip"] > 0


def test_people_get_a_table_and_without_root_a_shaped_proxy_stands_in_and_is_told(
    files: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Laboratory, "why_not", staticmethod(lambda: "this is a test"))
    done = bench_transfer(files[1], "--line", "50,4", "--encodings", "zstd:3,hdiff", "--repeat", "1")
    assert done.exit_code == 0, f"{done.output} {done.exception}"
    for words in (
        f"{ID} 1.1.0",
        "the relay holds nothing of it",
        "a shaped proxy, as this is a test",
        "    limit: 38Mbit",
    ):
        assert words in done.stdout
    # There is nothing to build on, so it is left out.
    assert "hdiff" not in done.stdout
    assert "zstd:3: " in done.stderr
    assert "zstd:3: " not in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("{new}",),
        ("{new}", "--line", "10,50", "--relay", "http://127.0.0.1:1"),
        ("{new}", "--line", "0,50"),
        ("{new}", "--line", "10"),
        ("{new}", "--line", "fast"),
        ("{new}", "--line", "10,50", "--encodings", "gzip"),
        ("{new}", "--line", "10,50", "--encodings", "hdiff"),
        ("nowhere.nupkg", "--line", "10,50"),
        ("a", "b", "c", "--line", "10,50"),
        ("{new}", "--base", "{new}", "--line", "10,50"),
    ],
)
def test_what_cannot_be_measured_is_refused(files: tuple[str, str], words: Sequence[str]) -> None:
    done = bench_transfer(*(word.format(new=files[1]) for word in words))
    assert isinstance(done.exception, UsageError), done.output


def test_a_file_that_is_no_package_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "broken.nupkg").write_bytes(b"PK")
    done = bench_transfer(tmp_path / "broken.nupkg", "--line", "10,50")
    assert isinstance(done.exception, WaystationError)


# --- words and figures


@given(rate=st.integers(1, 10_000), trip=st.integers(0, 1000))
def test_a_line_is_what_was_typed(rate: int, trip: int) -> None:
    shape = parse_shape(f"{rate},{trip}")
    assert shape == Shape(rate * 125_000, trip / 1000)
    assert shape.line.latency == pytest.approx(trip / 2000)


def test_encodings_are_named_once_and_all_means_those_of_the_table() -> None:
    assert parse_encodings("all") == ENCODINGS
    assert parse_encodings("raw, zstd:3,raw") == ("raw", "zstd:3")


def test_a_line_like_a_measured_one_carries_the_best_goodput_to_the_relay_and_tcp_s_headers() -> None:
    cpu = CpuRates(1.0, 1.0, 1.0)
    spread = Spread(0.05, 0.05, 0.05, 1)
    cells = (
        Cell("up", 1, 1, Spread(1e6, 1e6, 1e6, 1)),
        Cell("up", 4, 1, Spread(2e6, 2e6, 2e6, 1)),
        Cell("down", 4, 1, Spread(9e6, 9e6, 9e6, 1)),
        Cell("up", 4, 2, None),
    )
    shape = Shape.like(LineReport("http://relay", spread, cells, None, cpu, 1.0))
    assert 2.0e6 < shape.rate < 2.1e6
    assert shape.round_trip == 0.05


def case(planned: float, forced: dict[str, float], *, untried: dict[str, float] | None = None) -> Case:
    rows = [Tried(name, (Trial(seconds, 1, 1, ()),)) for name, seconds in {PLANNED: planned, **forced}.items()]
    rows += [Tried(name, at_least=seconds) for name, seconds in (untried or {}).items()]
    return Case(ID, "1.1.0", "1.0.0", 1000, Shape(1e6, 0.05), tuple(rows))


SECONDS = st.floats(0.1, 100)


@given(planned=SECONDS, forced=st.lists(SECONDS, min_size=2, max_size=6))
def test_the_verdict_is_that_of_the_promise(planned: float, forced: list[float]) -> None:
    found = case(planned, {f"zstd:{n + 1}": seconds for n, seconds in enumerate(forced)})
    best, slowest = min(forced), max(forced)
    assert (found.verdict == "BEYOND") == (planned / best > 1.1 and slowest > 1.2 * best)
    assert (found.verdict == "within") == (planned / best <= 1.1)


def test_what_was_not_tried_counts_as_slow_as_its_bytes_are() -> None:
    assert case(1.5, {"zstd:3": 1.0}).verdict == "alike"
    assert case(1.5, {"zstd:3": 1.0}, untried={"raw": 9.0}).verdict == "BEYOND"
    assert case(1.5, {}, untried={"raw": 9.0}).verdict == "within"


@given(size=st.integers(0, 1 << 40), rate=st.floats(1e3, 1e10), best=SECONDS)
def test_only_what_is_far_beyond_the_best_is_not_tried(size: int, rate: float, best: float) -> None:
    found = hopeless(size, Shape(rate, 0.05), best)
    assert (found is None) == (size / rate <= HOPELESS * best)
    assert hopeless(size, Shape(rate, 0.05), None) is None


# --- cascades


def test_a_rooted_tree_hangs_on_the_origin_by_one_line() -> None:
    hangs = cascades.above(cascades.rooted(8, Line()))
    assert [site for site, place in hangs.items() if place == "origin"] == ["site1"]
    below = [sum(place == f"site{n}" for place in hangs.values()) for n in range(1, 9)]
    assert below == [2, 2, 2, 1, 0, 0, 0, 0]


def send(egress: int, last: float) -> cascades.Send:
    return cascades.Send(egress, {"site1": last / 2, "site2": last}, {"site1": "", "site2": "site1"}, {})


@pytest.mark.parametrize(("egress", "last", "held"), [(105, 1.3, [True] * 3), (106, 1.4, [False] * 3)])
def test_cascades_are_held_to_one_site_alone(egress: int, last: float, held: list[bool]) -> None:
    courses = [
        cascades.Course("one site", send(100, 1.0), send(100, 1.0)),
        cascades.Course("chain of 4", send(egress, last), send(egress, 9.0)),
    ]
    assert [check.held for check in cascades.judge(courses)] == held
    assert cascades.judge(courses[1:]) == []


# --- memory


def test_the_large_package_s_next_version_has_other_parts_changed_parts_and_equal_ones(tmp_path: Path) -> None:
    memory.mixed_files(str(tmp_path / "old"), 75_000_000)
    memory.mixed_files(str(tmp_path / "new"), 75_000_000, is_next=True)
    names = sorted(os.path.relpath(path, tmp_path / "old") for path in (tmp_path / "old").rglob("*.bin"))
    assert len(names) > 10
    equal = [(tmp_path / "old" / name).read_bytes() == (tmp_path / "new" / name).read_bytes() for name in names]
    assert 0 < sum(equal) < len(names)
    assert sum((tmp_path / "old" / name).stat().st_size for name in names) == 75_000_000


def test_a_process_s_peak_is_seen(tmp_path: Path) -> None:
    size = random.Random(0).randrange(60, 80) * 1_000_000
    program = f"print('said'); x = bytearray({size}); x[::4096] = bytes(len(x[::4096]))"
    said, peak = memory.with_peak(sys.executable, "-c", program, home=str(tmp_path))
    assert said == "said"
    assert size < peak < size + 60_000_000
    assert peak_memory(os.getpid()) > 0


def test_a_process_that_fails_is_an_error_and_no_peak(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no luck"):
        memory.with_peak(sys.executable, "-c", "import sys; sys.exit('no luck')", home=str(tmp_path))
