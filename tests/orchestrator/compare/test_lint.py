"""What makes two builds of one source differ, and what that costs: the findings, without the command."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from pathlib import Path

import pytest
from harness.builds import COMMIT, FILES, OTHER_COMMIT, RANDOM, executable, opener, real, write
from harness.packages import noise

from orchestrator.compare import diff
from orchestrator.compare import lint as linting
from orchestrator.compare.read_package import zip_records


@pytest.fixture
def opened():
    with opener() as open_:
        yield open_


def rules(lint: linting.Lint) -> dict[linting.Rule, linting.Finding]:
    return {finding.rule: finding for finding in lint.findings}


# --- one package


def test_a_package_made_the_same_each_time_has_no_findings(tmp_path: Path, opened) -> None:
    path = write(tmp_path / "a.nupkg", FILES | {"lib/Web.dll": executable(version="1.0.0")}, psmdcp="nuget")
    assert linting.lint_alone(opened(path)[0]) == linting.Lint((), None)


def test_a_random_part_name_is_found_and_its_cost_tried(tmp_path: Path, opened) -> None:
    (package,) = opened(write(tmp_path / "a.nupkg", FILES, psmdcp="0123456789abcdef" * 2))
    lint = linting.lint_alone(package)
    (finding,) = lint.findings
    assert (finding.rule, finding.part, lint.can_be_mended) == (
        "random-part-name",
        RANDOM % ("0123456789abcdef" * 2),
        True,
    )
    assert finding.our_bytes is not None
    assert 0 < finding.our_bytes < 200
    assert "-Deterministic" in finding.mend


def test_times_of_packing_are_found_and_a_time_that_may_be_given_is_a_note(tmp_path: Path, opened) -> None:
    time = (2026, 1, 2, 3, 4, 6)
    first, second = opened(
        write(tmp_path / "a.nupkg", FILES, time=time, psmdcp="0" * 32),
        write(tmp_path / "b.nupkg", FILES, time=time, psmdcp="nuget"),
    )
    found = rules(linting.lint_alone(first))["pack-time"]
    assert not found.is_note
    assert "2026-01-02 03:04:06" in found.what
    assert found.zip_bytes == sum(part.records for part in first.zip_parts) > 7 * 80
    assert rules(linting.lint_alone(second))["pack-time"].is_note


def test_assemblies_that_are_not_deterministic_are_named_and_others_are_not(tmp_path: Path, opened) -> None:
    files = {
        "lib/a.dll": executable(deterministic=False, version="1.0.0"),
        "lib/b.dll": executable(version="1.0.0"),
        "native/c.dll": executable(deterministic=False, managed=False, version="1.0.0"),
        "lib/d.dll": b"MZ, but no assembly",
    }
    lint = linting.lint_alone(opened(write(tmp_path / "a.nupkg", files))[0])
    assert {(finding.rule, finding.part) for finding in lint.findings} == {
        ("assembly-stamp", "lib/a.dll"),
        ("assembly-stamp", "native/c.dll"),
    }
    for finding in lint.findings:
        assert finding.our_bytes is not None
        assert finding.zip_bytes is not None
        assert 0 < finding.our_bytes < 400 < finding.zip_bytes
        assert "2021-01-14" in finding.what


def test_what_may_be_so_by_purpose_is_a_note(tmp_path: Path, opened) -> None:
    files = {
        "lib/a.dll": executable(pdb="/home/ci/Web.pdb", certificate=noise("c", 5000)),
        "lib/b.dll": executable(version="1.0.0"),
        ".signature.p7s": noise("p7s", 9000),
    }
    (package,) = opened(write(tmp_path / "a.nupkg", files, commit=COMMIT))
    lint = linting.lint_alone(package)
    found = rules(lint)
    assert set(found) == {"build-path", "commit-stamp", "authenticode", "signature"}
    assert not lint.can_be_mended
    assert found["build-path"].part == found["authenticode"].part == "lib/a.dll"
    assert "lib/a.dll, Acme.Web.nuspec" in found["commit-stamp"].what
    assert 0 < (found["commit-stamp"].our_bytes or 0) < 600
    assert found["authenticode"].our_bytes is None, "only another build tells how much of a signature is new"
    assert found["signature"].zip_bytes == 9000


# --- two packages


def test_a_package_beside_itself_has_no_findings(tmp_path: Path, opened) -> None:
    path = write(tmp_path / "a.nupkg", FILES)
    assert linting.lint_pair(*opened(path, path)) == linting.Lint((), 0)


def test_two_builds_that_differ_only_in_their_stamps_are_explained(tmp_path: Path, opened) -> None:
    one = executable(deterministic=False, version="1.0.0")
    two = executable(deterministic=False, version="1.0.0", time=0x61111111, mvid=noise("m", 16))
    first = write(tmp_path / "a.nupkg", FILES | {"lib/Web.dll": one}, time=(2026, 1, 2, 3, 4, 6), psmdcp="a" * 32)
    second = write(tmp_path / "b.nupkg", FILES | {"lib/Web.dll": two}, time=(2026, 1, 2, 3, 5, 6), psmdcp="b" * 32)
    old, new = opened(first, second)
    lint = linting.lint_pair(old, new)
    found = rules(lint)
    assert set(found) == {"random-part-name", "pack-time", "assembly-stamp"}
    assert lint.other_parts == 0
    assert found["assembly-stamp"].our_bytes == diff.delta_bytes(one, two) > 0
    assert found["assembly-stamp"].zip_bytes == new.zip_part["lib/Web.dll"].compressed_size
    assert found["pack-time"].our_bytes == 0
    assert (found["random-part-name"].our_bytes or 0) > 0


def test_a_changed_source_is_no_finding(tmp_path: Path, opened) -> None:
    one, two = executable(b"code" * 5000, version="1.0.0"), executable(b"more" * 5000, version="1.0.0")
    old, new = opened(
        write(tmp_path / "a.nupkg", FILES | {"lib/Web.dll": one}),
        write(tmp_path / "b.nupkg", FILES | {"lib/Web.dll": two}),
    )
    assert linting.lint_pair(old, new) == linting.Lint((), 1)


def test_the_cost_of_a_stamp_is_not_told_where_the_code_changed_as_well(tmp_path: Path, opened) -> None:
    one = executable(b"code" * 5000, deterministic=False)
    two = executable(b"more" * 5000, deterministic=False, time=0x61111111, version=f"1.0.0+{OTHER_COMMIT}")
    old, new = opened(
        write(tmp_path / "a.nupkg", {"lib/Web.dll": one}), write(tmp_path / "b.nupkg", {"lib/Web.dll": two})
    )
    lint = linting.lint_pair(old, new)
    assert rules(lint)["assembly-stamp"].our_bytes is None
    assert rules(lint)["commit-stamp"].our_bytes is None
    assert lint.other_parts == 1


def test_another_deflate_costs_us_nothing_and_the_zip_every_byte(tmp_path: Path, opened) -> None:
    text = {f"content/{i}.txt": random.Random(i).choices(range(97, 110), k=20_000) for i in range(5)}
    files = {path: bytes(letters) for path, letters in text.items()}
    old, new = opened(write(tmp_path / "a.nupkg", files, level=6), write(tmp_path / "b.nupkg", files, level=1))
    lint = linting.lint_pair(old, new)
    (finding,) = lint.findings
    assert (finding.rule, finding.our_bytes, lint.other_parts) == ("encoder", 0, 0)
    assert finding.zip_bytes == diff.rsync_like_bytes(old, new) > 30_000
    assert "and" in finding.what


def test_another_order_is_found(tmp_path: Path, opened) -> None:
    turned = dict(reversed(list(FILES.items())))
    old, new = opened(write(tmp_path / "a.nupkg", FILES), write(tmp_path / "b.nupkg", turned))
    lint = linting.lint_pair(old, new)
    (finding,) = lint.findings
    assert (finding.rule, finding.our_bytes, lint.other_parts) == ("member-order", 0, 0)
    assert "content/drop.txt" in finding.what


def test_signatures_of_files_and_package_are_measured_between_two(tmp_path: Path, opened) -> None:
    shared = noise("chain", 4000)
    files = [
        {"lib/Web.dll": executable(certificate=shared + noise(i, 500)), ".signature.p7s": shared + noise(i + 9, 700)}
        for i in (1, 2)
    ]
    old, new = opened(write(tmp_path / "a.nupkg", files[0]), write(tmp_path / "b.nupkg", files[1]))
    lint = linting.lint_pair(old, new)
    found = rules(lint)
    assert set(found) == {"authenticode", "signature"}
    assert 500 <= (found["authenticode"].our_bytes or 0) < 700
    assert 700 <= (found["signature"].our_bytes or 0) < 900
    assert lint.other_parts == 0


def test_other_paths_and_commits_are_named(tmp_path: Path, opened) -> None:
    one = executable(pdb="/home/one/Web.pdb")
    two = executable(pdb="/home/two/Web.pdb", version=f"1.0.0+{OTHER_COMMIT}")
    old, new = opened(
        write(tmp_path / "a.nupkg", {"lib/Web.dll": one}, commit=COMMIT),
        write(tmp_path / "b.nupkg", {"lib/Web.dll": two}, commit=OTHER_COMMIT),
    )
    lint = linting.lint_pair(old, new)
    found = rules(lint)
    assert set(found) == {"build-path", "commit-stamp"}
    assert 0 < (found["build-path"].our_bytes or 0) < 400
    assert 0 < (found["commit-stamp"].our_bytes or 0) < 600
    assert lint.other_parts == 0


def test_a_real_pair_of_builds_is_explained_by_its_times(opened) -> None:
    lint = linting.lint_pair(*opened(real("Shop.Web.1.0.0"), real("Shop.Web.1.0.1")))
    assert set(rules(lint)) == {"pack-time"}
    assert lint.other_parts == 5, "one line of source, and the version"


def test_a_real_pair_tells_what_its_signatures_cost(opened) -> None:
    old, new = opened(*(real(f"microsoft.entityframeworkcore.10.0.{n}") for n in (14, 15)))
    found = rules(linting.lint_pair(old, new))
    assert {"authenticode", "signature", "pack-time"} <= set(found)
    assert 500 < (found["authenticode"].our_bytes or 0) < 20_000


def test_times_of_a_zip_that_another_reader_refuses_are_not_told(tmp_path: Path, opened) -> None:
    """`zipfile` is only asked for the times; what it cannot read is left out."""
    (package,) = opened(write(tmp_path / "a.nupkg", FILES, time=(2026, 1, 2, 3, 4, 6)))
    blind = replace(package, zip_parts=tuple(replace(part, stamped=()) for part in package.zip_parts))
    assert linting.lint_alone(blind) == linting.Lint((), None)
    assert zip_records(io.BytesIO(b"no zip")) == {}
