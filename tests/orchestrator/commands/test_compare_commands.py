"""`waystation package diff` and `package lint` as somebody at a terminal, or a script, meets them."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

import pytest
from harness.builds import COMMIT, executable, write
from harness.packages import make_nupkg, noise
from harness.process import Done, run

from orchestrator.compare.measure import side_by_side

WEB = noise("web", 300_000)
BEFORE = {"lib/web.dll": WEB, "content/logo.png": noise("logo", 80_000), "content/a.txt": b"a" * 100}
AFTER = {"lib/web.dll": WEB[:1000] + b"!" + WEB[1001:], "images/logo.png": BEFORE["content/logo.png"], "b.txt": b"b"}
DIFF = ("package", "diff")
LINT = ("package", "lint")
ESCAPE = "\x1b"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    return make_nupkg(tmp_path, BEFORE, version="1.4.1"), make_nupkg(tmp_path, AFTER, version="1.4.2")


@pytest.fixture
def depot(tmp_path: Path, pair: tuple[str, str]) -> Path:
    """A home whose depot holds both."""
    home = tmp_path / "home"
    assert run(home, "trust", "init").code == 0
    assert run(home, "package", "add", *pair).code == 0
    return home


def check_told(done: Done, code: int, *words: str) -> None:
    assert done.code == code, done.err
    for word in words:
        assert word in done.err
    assert "Traceback" not in done.err
    assert ESCAPE not in done.err + done.out


# --- diff


def test_diff_tells_parts_chunks_and_bytes(tmp_path: Path, pair: tuple[str, str]) -> None:
    done = run(tmp_path, *DIFF, *pair)
    assert done.code == 0, done.err
    assert "Acme.Web 1.4.1" in done.out
    assert "1 added, 2 changed, 1 moved, 1 removed, 2 same" in done.out
    assert "images/logo.png  (was content/logo.png)" in done.out
    assert re.search(r"^removed\s+100\s+content/a.txt$", done.out, re.MULTILINE)
    for way in ("zstd:3", "zstd:19", "zstd-prefix:3", "hdiff:19", "rsync", "the whole nupkg"):
        assert way in done.out
    assert not done.err


def test_diff_in_json_adds_up(tmp_path: Path, pair: tuple[str, str]) -> None:
    told = run(tmp_path, *DIFF, *pair, "--parts", "--json").json
    assert (told["format"], told["old"]["version"], told["new"]["version"]) == (1, "1.4.1", "1.4.2")
    assert told["nupkg_bytes"] == os.path.getsize(pair[1]) == told["new"]["size"]
    assert told["parts"] == {"added": 1, "changed": 2, "moved": 1, "copied": 0, "removed": 1, "same": 2}
    assert told["chunks"]["kept_bytes"] + told["chunks"]["new_bytes"] == told["new"]["stream_bytes"]
    payloads = {each["encoding"]: each["payload_bytes"] for each in told["encodings"]}
    assert payloads["hdiff:19"] < payloads["zstd-prefix:3"] < payloads["zstd:19"] <= payloads["zstd:3"]
    sizes = [each["delta_bytes"] for each in told["changes"]]
    assert sizes == sorted(sizes, reverse=True), "the dearest part first"
    assert sizes[0] > 0
    assert {each["path"]: each["delta_bytes"] for each in told["changes"]}["images/logo.png"] == 0
    assert told["rsync_like_bytes"] > 300_000
    assert told["only_container"] is False


def test_diff_tries_the_encodings_that_are_named(tmp_path: Path, pair: tuple[str, str]) -> None:
    told = run(tmp_path, *DIFF, *pair, "--encodings", "raw,zstd:1", "--json").json
    raw, level1 = told["encodings"]
    assert (raw["encoding"], raw["payload_bytes"]) == ("raw", told["chunks"]["new_bytes"])
    assert level1["encoding"] == "zstd:1"
    assert all(each["delta_bytes"] is None for each in told["changes"])


def test_diff_of_the_depot_is_that_of_the_files(depot: Path, pair: tuple[str, str]) -> None:
    of_files = run(depot, *DIFF, *pair, "--json").json
    of_depot = run(depot, *DIFF, "acme.web", "1.4.1", "1.4.2", "--json").json
    assert of_depot["old"].pop("name") == "acme.web 1.4.1"
    for side in ("old", "new"):
        of_depot[side].pop("name", None)
        of_files[side].pop("name")
    assert of_depot == of_files
    show = run(depot, "package", "show", "Acme.Web", "1.4.2", "--json").json
    assert (show["chunks"], show["parts"]) == (of_depot["new"]["chunks"], of_depot["new"]["parts"])


def test_diff_says_when_only_the_container_changed(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{v}.nupkg", {"web.dll": WEB}, version=v) for v in ("1.0.0", "1.0.1")]
    assert "only the container changed" in run(tmp_path, *DIFF, *paths).out
    assert run(tmp_path, *DIFF, *paths, "--json").json["only_container"] is True


def test_diff_lists_the_largest_parts_and_says_how_to_see_all(tmp_path: Path) -> None:
    many = {f"content/{i:02}.txt": b"x" * (i + 1) for i in range(30)}
    paths = make_nupkg(tmp_path, {}, version="1.0.0"), make_nupkg(tmp_path, many, version="1.0.1")
    short, whole = run(tmp_path, *DIFF, *paths).out, run(tmp_path, *DIFF, *paths, "--parts").out
    assert "content/29.txt" in short
    assert "content/00.txt" not in short
    assert "and 11 more parts: --parts" in short
    assert all(path in whole for path in many)
    assert "difference" in whole


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("Acme.Web", "1.4.1", "1.4.2", "1.4.3"), ("4 names", "ID OLD NEW")),
        (("Acme.Web",), ("1 names", "ID OLD NEW")),
        (("nowhere.nupkg", "there.nupkg"), ("nowhere.nupkg is not a file", ".nupkg")),
        (("Acme.Web", "one", "two"), ("'one'", "version")),
    ],
)
def test_diff_refuses_other_names_with_an_example(
    tmp_path: Path, words: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    check_told(run(tmp_path, *DIFF, *words), 2, *expected)


@pytest.mark.parametrize("text", ["zstd:20", "gzip", "", "hdiff,hdiff:19"])
def test_diff_refuses_encodings_that_there_are_not(tmp_path: Path, pair: tuple[str, str], text: str) -> None:
    check_told(run(tmp_path, *DIFF, *pair, "--encodings", text), 2, "xpected", "zstd")


def test_diff_says_which_package_the_depot_lacks(depot: Path) -> None:
    check_told(run(depot, *DIFF, "Acme.Web", "1.4.1", "9.9.9"), 1, "9.9.9")


def test_diff_says_what_to_do_where_the_depot_lost_the_nupkg(depot: Path) -> None:
    shutil.rmtree(depot / "depot/blobs")
    check_told(run(depot, *DIFF, "Acme.Web", "1.4.1", "1.4.2"), 1, "Acme.Web 1.4.1", "gone", "Add it again")


def test_diff_refuses_what_is_no_package(tmp_path: Path, pair: tuple[str, str]) -> None:
    bad = tmp_path / "bad.nupkg"
    bad.write_bytes(b"PK, but no zip")
    check_told(run(tmp_path, *DIFF, pair[0], bad), 1, "not a zip")


def test_names_in_a_package_do_not_drive_the_terminal(tmp_path: Path) -> None:
    paths = make_nupkg(tmp_path, {}, version="1.0.0"), make_nupkg(tmp_path, {"\u202egpj.txt": b"x"}, version="1.0.1")
    done = run(tmp_path, *DIFF, *paths)
    assert done.code == 0, done.err
    assert "\u202e" not in done.out
    assert r"\u202egpj.txt" in done.out


def test_one_failed_encoder_ends_the_others_and_is_told() -> None:
    def fail() -> int:
        raise RuntimeError("broken")

    seen: list[tuple[int, int]] = []
    assert side_by_side([(2, lambda: 5), (3, lambda: 7)], lambda *at: seen.append(at)) == [5, 7]
    assert seen[-1] == (5, 5)
    ran: list[None] = []

    def work() -> int:
        time.sleep(0.005)
        ran.append(None)
        return 1

    with pytest.raises(RuntimeError, match="broken"):
        side_by_side([(1, fail), *[(1, work)] * 1000], lambda *_: None)
    assert len(ran) < 1000


# --- lint


@pytest.fixture
def builds(tmp_path: Path) -> tuple[str, str]:
    """Two builds of one source, made with everything left as it comes."""
    made = []
    for folder, letter, stamp in (("first", "a", 0x60000000), ("second", "b", 0x61000000)):
        (tmp_path / folder).mkdir()
        web = executable(deterministic=False, time=stamp, mvid=noise(letter, 16))
        path = tmp_path / folder / "Acme.Web.1.0.0.nupkg"
        packed = (2026, 1, 2, 3, 4, 6 + 2 * (letter == "b"))
        made.append(write(path, {"lib/Web.dll": web}, time=packed, psmdcp=letter * 32, commit=COMMIT))
    return made[0], made[1]


def test_lint_tells_what_to_mend_and_what_it_costs(tmp_path: Path, builds: tuple[str, str]) -> None:
    done = run(tmp_path, *LINT, builds[0])
    assert done.code == 0, done.err
    assert "Acme.Web 1.0.0: 3 to mend, 1 to note" in done.out
    for rule in ("random-part-name", "pack-time", "assembly-stamp"):
        assert re.search(rf"^mend  {rule}\s+\d+\s+\d+  ", done.out, re.MULTILINE), done.out
    assert re.search(r"^note  commit-stamp", done.out, re.MULTILINE)
    for cure in ("-Deterministic", "<DeterministicTimestamp>", "<Deterministic>true</Deterministic>"):
        assert cure in done.out
    assert "tried" in done.out


def test_lint_against_another_build_measures(tmp_path: Path, builds: tuple[str, str]) -> None:
    told = run(tmp_path, *LINT, builds[1], "--against", builds[0], "--json").json
    (package,) = told["packages"]
    assert (package["against"], package["other_parts"]) == (builds[0], 0)
    assert {each["rule"] for each in package["findings"]} == {"random-part-name", "pack-time", "assembly-stamp"}
    costs = {each["rule"]: (each["our_bytes"], each["zip_bytes"]) for each in package["findings"]}
    assert costs["pack-time"][0] == 0
    assert costs["assembly-stamp"][0] < 400 < costs["assembly-stamp"][1]
    assert "measured" in run(tmp_path, *LINT, builds[1], "--against", builds[0]).out


def test_lint_with_strict_fails_for_what_can_be_mended_only(tmp_path: Path, builds: tuple[str, str]) -> None:
    assert run(tmp_path, *LINT, builds[0]).code == 0
    assert run(tmp_path, *LINT, "--strict", builds[0]).code == 1
    noted = write(tmp_path / "noted.nupkg", {}, commit=COMMIT)
    done = run(tmp_path, *LINT, "--strict", noted)
    assert (done.code, "0 to mend, 1 to note" in done.out) == (0, True)


def test_lint_of_a_package_of_ours_finds_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "publish"
    folder.mkdir()
    (folder / "web.txt").write_text("web", encoding="utf-8")
    packed = tmp_path / "out.nupkg"
    assert run(tmp_path, "package", "pack", folder, "--id", "A", "--version", "1.0.0", "--output", packed).code == 0
    done = run(tmp_path, *LINT, "--strict", packed)
    assert (done.code, "nothing that differs from build to build" in done.out) == (0, True)


def test_lint_takes_several_files_and_a_package_of_the_depot(depot: Path, builds: tuple[str, str]) -> None:
    assert len(run(depot, *LINT, *builds, "--json").json["packages"]) == 2
    told = run(depot, *LINT, "acme.web", "1.4.2", "--against", "1.4.1", "--json").json["packages"]
    assert [(each["version"], each["against"]) for each in told] == [("1.4.2", "acme.web 1.4.1")]
    assert told[0]["other_parts"] == 4, "two changed, one added, one removed; one only moved"


def test_lint_of_the_depot_may_be_against_a_file(depot: Path, pair: tuple[str, str]) -> None:
    told = run(depot, *LINT, "acme.web", "1.4.2", "--against", pair[1], "--json").json["packages"]
    assert (told[0]["findings"], told[0]["other_parts"]) == ([], 0)


def test_lint_refuses_other_names_with_an_example(tmp_path: Path, builds: tuple[str, str]) -> None:
    check_told(run(tmp_path, *LINT, builds[0], "1.0.0"), 2, "'1.0.0' is no file", "lint Acme.Web 1.4.2")
    check_told(run(tmp_path, *LINT, "Acme.Web"), 2, "'Acme.Web' is no file", ".nupkg")
    check_told(run(tmp_path, *LINT, *builds, "--against", builds[0]), 2, "--against with 2 files")
    check_told(run(tmp_path, *LINT, builds[0], "--against", "1.0.0"), 2, "1.0.0 is not a file")


def test_nothing_is_left_in_the_temporary_folder(
    depot: Path, tmp_path: Path, pair: tuple[str, str], builds: tuple[str, str]
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    more = {"TMPDIR": str(temporary)}
    assert run(depot, *DIFF, "acme.web", "1.4.1", "1.4.2", **more).code == 0
    assert run(depot, *LINT, *builds, **more).code == 0
    assert run(depot, *DIFF, "acme.web", "1.4.1", "9.9.9", **more).code == 1
    assert list(temporary.iterdir()) == []
