"""What a site is sent for a pair: found, counted at a proxy, judged; and an application beside its libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from harness.packages import cut_package, make_nupkg, noise

from benchmarks import application, pairs
from benchmarks.pairs import THIN, Ours, Packed, Report, Way, changed, find, judge_first, judge_next
from benchmarks.peers import BOUND, Comparison, Sent
from benchmarks.support.programs import add
from benchmarks.support.report import Check

LIBRARY = noise("lib", 200_000)
EDITED = LIBRARY[:100_000] + b"changed" + LIBRARY[100_000:]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Two versions of one package, of which one library has seven bytes more, and a package of one version."""
    made = tmp_path / "packages"
    made.mkdir()
    same = {"lib/other.dll": noise("other", 300_000)}
    make_nupkg(made, {"lib/web.dll": LIBRARY} | same, version="1.9.0")
    make_nupkg(made, {"lib/web.dll": EDITED} | same, version="1.10.0")
    make_nupkg(made, {"lib/net8.0/alone.dll": noise("alone", 90_000)}, id="Acme.Alone")
    return str(made)


def run_module(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", name, *words], capture_output=True, text=True, check=False)


def ours(content: int, overhead: int, chunks: int = 10, parts: int = 5) -> Ours:
    return Ours(content, overhead, content + overhead, chunks, parts, ())


def peers(bound: int | None = 10_000, rdiff: int | None = 50_000) -> Comparison:
    rows = (Sent("nupkg", "", 100_000), Sent("rdiff", "", rdiff), Sent(BOUND.name, "", bound))
    return Comparison("old", "new", 100_000, 300_000, rows)


# --- what is found


def test_versions_that_follow_each_other_are_pairs(folder: str) -> None:
    alone, both = find(folder)
    assert [str(one) for one in alone] == ["Acme.Alone 1.0.0"]
    assert [str(one) for one in both] == ["Acme.Web 1.9.0", "Acme.Web 1.10.0"], "not by their text"


def test_changed_chunks_and_parts_are_those_that_the_predecessor_has_not() -> None:
    files = {"a.bin": noise("a", 100_000), "b.bin": noise("b", 100_000), "empty": b""}
    old, new = cut_package(files).manifest, cut_package(files | {"b.bin": noise("c", 100_000)}).manifest
    chunks, parts = changed(new, old)
    assert chunks >= 1
    assert parts == 1
    assert changed(new, new) == (0, 0)
    assert changed(new, None) == (len(set(new.chunk_ids())), len(new.parts))


# --- what is promised


def test_a_new_version_within_every_bound_holds() -> None:
    checks = judge_next(ours(11_500 + 1024, 48 * 15 + 2048), peers())
    assert [(check.seen, check.most) for check in checks[:2]] == [(12_524, 12_524), (2768, 2768)]
    assert all(check.held for check in checks)


@pytest.mark.parametrize(
    ("sent", "broken"),
    [
        (ours(11_500 + 1025, 100), "content"),
        (ours(100, 48 * 15 + 2049), "manifest and headers"),
        (ours(12_000, 38_001, chunks=1000), "in all"),
    ],
)
def test_each_byte_above_a_bound_breaks_the_promise_that_it_belongs_to(sent: Ours, broken: str) -> None:
    assert [check.promise for check in judge_next(sent, peers()) if not check.held] == [broken]


def test_what_could_not_be_measured_is_not_held() -> None:
    (content, *others) = judge_next(ours(1, 1), peers(bound=None, rdiff=None))
    assert not content.held
    assert all(check.held for check in others)
    assert "-" in pairs.told(Report(peers(bound=None), ours(1, 1), (content,)))


def test_a_first_send_is_judged_on_a_thin_line_and_on_a_fast_one() -> None:
    held = judge_first(ours(10_000, 500), ours(91_000, 999), peers())
    assert [check.held for check in held] == [True, True]
    broken = judge_first(ours(10_000, 501), ours(91_000, 1000), peers())
    assert [check.held for check in broken] == [False, False], "below 0.92, not at it"


# --- sent, and counted


@pytest.fixture
def home(folder: str, tmp_path: Path) -> str:
    made = str(tmp_path / "home")
    add(made, *sorted(str(path) for path in Path(folder).iterdir()))
    return made


def test_a_new_version_is_counted_at_a_relay_that_holds_the_one_before(folder: str, home: str) -> None:
    _, (old, new) = find(folder)
    sent = pairs.sent_to_a_site(home, new, Way(THIN), old)
    assert 7 < sent.content < 2000, "the library is there but for seven bytes"
    assert sum(one.payload_bytes for one in sent.encodings) == sent.content
    assert 200 < sent.overhead < 10_000
    assert sent.parts == 1 + 1, "the library, and the nuspec with its version"


def test_a_first_send_carries_everything_whatever_the_line(folder: str, home: str) -> None:
    (alone,), _ = find(folder)
    for way in (Way(THIN), Way(THIN, is_known=False), Way(2_000_000.0, is_shaped=True)):
        assert 90_000 <= pairs.sent_to_a_site(home, alone, way).content < 92_000


def test_a_planned_limit_holds_no_sender_back() -> None:
    assert pairs.Planned(THIN).take(1 << 30) == 0.0


def test_the_command_judges_all_that_lies_in_a_folder(folder: str) -> None:
    pytest.importorskip("bsdiff4", reason="bsdiff4 missing")
    done = run_module("benchmarks.pairs", "--packages", folder, "--only", "nupkg", "--only", "bound", "--json")
    document = json.loads(done.stdout)
    names = [(one["comparison"]["old"], one["comparison"]["new"]) for one in document["reports"]]
    first = ("", "Acme.Alone.1.0.0.nupkg"), ("", "Acme.Web.1.10.0.nupkg")
    assert names == [("Acme.Web.1.9.0.nupkg", "Acme.Web.1.10.0.nupkg"), *first]
    assert document["held"] is all(check["held"] for one in document["reports"] for check in one["checks"])
    assert done.returncode == (0 if document["held"] else 1)
    # Noise does not compress: no first send of it is below 0.92 of a nupkg that only stores it.
    assert document["held"] is False
    assert "BROKEN  in all, 100 Mbit/s" in done.stderr


def test_a_folder_without_packages_is_said_to_be_one(tmp_path: Path) -> None:
    done = run_module("benchmarks.pairs", "--packages", str(tmp_path))
    assert done.returncode == 2
    assert "no nupkg lies in" in done.stderr


def test_the_summary_names_what_broke() -> None:
    held, broken = Check("content", 1, 2, ""), Check("in all", 3, 2, "")
    report = Report(peers(), ours(1, 2), (held, held, broken))
    assert pairs.summary([report]).splitlines()[-1].endswith("BROKEN: in all")


def test_the_summary_has_the_share_of_every_peer_and_a_dash_where_one_is_missing() -> None:
    held = Check("content", 1, 2, "")
    report = Report(peers(rdiff=None), ours(1000, 234), (held, held, held))
    head, row, *_ = pairs.summary([report]).splitlines()
    assert head.split()[-5:] == ["nupkg", "nupkg", "rdiff", "bound", "waystation"]
    assert row.split() == ["new", "100.000", "-", "10.000", "1.234"]


# --- an application


def test_the_best_framework_of_a_package_is_taken_once() -> None:
    names = [
        "lib/netstandard2.0/A.dll",
        "lib/net8.0/A.dll",
        "lib/net8.0/de/A.resources.dll",
        "lib/net462/A.dll",
        "a.txt",
    ]
    assert application.assemblies(names) == ["lib/net8.0/A.dll"]
    assert application.assemblies(["lib/net462/A.dll"]) == []


def test_an_application_is_laid_out_of_its_libraries(folder: str, tmp_path: Path) -> None:
    (alone,), (_, web) = find(folder)
    files = tmp_path / "publish"
    files.mkdir()
    used, count = application.publish([alone, web], str(files))
    assert (used, count) == ([alone], 1)
    assert (files / "alone.dll").read_bytes() == noise("alone", 90_000)
    assert (files / "Shop.Orders.dll").stat().st_size == application.OWN_BYTES
    assert list(json.loads((files / "Shop.Orders.deps.json").read_text())["libraries"]) == ["Acme.Alone/1.0.0"]


def test_an_application_crosses_without_the_libraries_that_the_relay_holds(tmp_path: Path) -> None:
    for number in range(3):
        content = {f"lib/net8.0/Library{number}.dll": noise(number, 2_000_000)}
        make_nupkg(tmp_path, content, id=f"Acme.Library{number}")
    result = application.measure([str(tmp_path)])
    assert (result.assemblies, result.packages) == (3, 3)
    assert result.nupkg > 6_000_000
    assert application.OWN_BYTES < result.ours.total < application.OWN_BYTES + 20_000
    assert result.check.held
    assert "held    at most 1 %" in application.told(result)


def test_an_application_of_nothing_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(make_nupkg(tmp_path, {"readme.txt": b"nothing"})) as archive:
        assert "readme.txt" in archive.namelist()
    assert run_module("benchmarks.application", "--packages", str(tmp_path)).returncode == 2
    with pytest.raises(ValueError, match=os.path.basename(tmp_path)):
        application.measure([str(tmp_path)])


def test_a_nupkg_is_named_by_its_nuspec_and_not_by_its_file(tmp_path: Path) -> None:
    make_nupkg(tmp_path / "whatever.nupkg", {"a.txt": b"a"}, version="2.0.0-beta.1")
    assert [str(one) for (one,) in find(str(tmp_path))] == ["Acme.Web 2.0.0-beta.1"]
    assert isinstance(find(str(tmp_path))[0][0], Packed)
