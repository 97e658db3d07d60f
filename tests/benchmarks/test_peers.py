"""What peers send: each is really run, and what it made is the new file."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from pathlib import Path

import pytest
from harness.packages import make_nupkg, noise

from benchmarks import peers
from benchmarks.peers import BOUND, PEERS, Comparison, Sent, compare, text_of, tree_of, zstd19

_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"
EDITED = noise("lib", 200_000)[:100_000] + b"changed" + noise("lib", 200_000)[100_000:]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The old version and the new: one library of 200 kB has seven bytes more; nothing is deflated."""
    folder = tmp_path_factory.mktemp("pair")
    same = {"lib/other.dll": noise("other", 300_000)}
    old = make_nupkg(folder, {"lib/web.dll": noise("lib", 200_000)} | same, version="1.0.0")
    new = make_nupkg(folder, {"lib/web.dll": EDITED} | same, version="1.0.1")
    return old, new


def missing(peer: str) -> str:
    (found,) = [one for one in PEERS if one.name == peer]
    absent = [name for name in found.needs if shutil.which(name, path=_PATH) is None]
    return f"{' and '.join(absent)} missing" if absent else ""


@pytest.mark.parametrize(
    # casync's chunks are of 64 KiB on average.
    ("peer", "most"),
    [
        ("rdiff", 30_000),
        ("rsync", 30_000),
        ("casync", 450_000),
        ("zsync", 60_000),
        ("xdelta3", 2000),
        ("zstd", 2000),
        ("velopack", 3000),
    ],
)
def test_a_peer_sends_a_small_change_and_makes_the_new_file(pair: tuple[str, str], peer: str, most: int) -> None:
    """That what it made is the new file, `compare` checks itself: see below."""
    if reason := missing(peer):
        pytest.skip(reason)
    (row,) = compare(*pair, only=[peer]).rows
    assert row.why_not == ""
    assert row.bytes is not None
    assert 7 < row.bytes < most


def test_the_bound_of_a_small_change_is_small(pair: tuple[str, str]) -> None:
    pytest.importorskip("bsdiff4", reason="bsdiff4 missing")
    (row,) = compare(*pair, only=["bound"]).rows
    assert row.bytes is not None
    assert 7 < row.bytes < 1000


def test_a_peer_that_makes_something_else_has_no_figure(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(work: peers.Work) -> tuple[int, str]:
        with open(work.path("made"), "wb") as file:
            file.write(b"something else")
        return 1, work.path("made")

    monkeypatch.setattr(peers, "PEERS", (peers.Peer("liar", "", (), first=True, send=wrong),))
    with pytest.raises(RuntimeError, match="liar did not make"):
        compare(*pair)


def velopack_kinds(folder: Path, old: dict[str, bytes], new: dict[str, bytes]) -> dict[str, bytes]:
    """The entries of Velopack's package that stand for files below lib/."""
    if reason := missing("velopack"):
        pytest.skip(reason)
    work = peers.Work(str(folder), make_nupkg(folder / "old.nupkg", old), make_nupkg(folder / "new.nupkg", new))
    count, _ = peers._velopack(work)
    assert count == os.path.getsize(work.path("delta"))
    with zipfile.ZipFile(work.path("delta")) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name.startswith("lib/")}


def test_velopacks_way_says_of_each_file_whether_it_is_unchanged_changed_or_new(tmp_path: Path) -> None:
    old = {"lib/same.dll": b"same", "lib/web.dll": noise("lib", 200_000), "lib/gone.dll": b"gone"}
    found = velopack_kinds(tmp_path, old, {"lib/same.dll": b"same", "lib/web.dll": EDITED, "lib/new.dll": b"new"})
    patch = found.pop("lib/web.dll.zsdiff")
    assert patch.startswith(b"\x28\xb5\x2f\xfd"), "a frame of zstd"
    assert len(patch) < 200
    digest = hashlib.sha1(EDITED, usedforsecurity=False).hexdigest().upper()
    assert found == {
        "lib/same.dll.diff": b"",
        "lib/same.dll.shasum": b"",
        "lib/web.dll.shasum": f"\ufeff{digest} web.dll.shasum 200007".encode(),
        "lib/new.dll": b"new",
    }


def test_velopacks_way_survives_files_that_are_or_become_empty(tmp_path: Path) -> None:
    found = velopack_kinds(
        tmp_path, {"lib/a": b"", "lib/b": b"b", "lib/c": b""}, {"lib/a": b"a", "lib/b": b"", "lib/c": b""}
    )
    assert set(found) == {"lib/a.zsdiff", "lib/a.shasum", "lib/b", "lib/c.diff", "lib/c.shasum"}
    assert found["lib/b"] == b""


def test_a_patch_of_velopack_that_makes_other_files_has_no_figure(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := missing("velopack"):
        pytest.skip(reason)
    monkeypatch.setattr(
        peers, "_velopack_patch", lambda work, old, _new: peers._zstd_from(work, old, b"other", ["-19"])
    )
    with pytest.raises(RuntimeError, match="velopack did not make the files"):
        compare(*pair, only=["velopack"])


def test_what_speaks_over_a_network_is_counted_with_its_requests(pair: tuple[str, str]) -> None:
    """With nothing to keep, a peer cannot send less than the file: the proxy sees all of it."""
    if reason := missing("rsync"):
        pytest.skip(reason)
    old, new = pair
    stranger = os.path.join(os.path.dirname(old), "stranger")
    Path(stranger).write_bytes(noise("stranger", 500_000))
    # rsync does not look into what it is given.
    work = peers.Work(os.path.dirname(old), stranger, new)
    shutil.copyfile(new, os.path.join(work.folder, "new"))
    count, made = peers._rsync(work)
    assert Path(made).read_bytes() == Path(new).read_bytes()
    assert os.path.getsize(new) < count < 1.1 * os.path.getsize(new)


def test_a_tool_that_is_missing_is_said_to_be(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_PATH", "/nowhere")
    found = compare(*pair, only=["zsync", "nupkg"])
    assert found.of("nupkg").bytes == os.path.getsize(pair[1])
    assert found.of("zsync").bytes is None
    assert found.of("zsync").why_not == "zsync and zsyncmake and nginx missing"
    assert found.best.peer == "nupkg"
    assert "zsync and zsyncmake and nginx missing" in text_of(found)


def test_a_first_send_has_the_whole_and_the_bound_of_the_tree(pair: tuple[str, str]) -> None:
    found = compare(None, pair[1])
    assert [row.peer for row in found.rows] == ["nupkg", "bound"]
    assert found.of("bound").bytes == zstd19(tree_of(pair[1]))
    assert found.old == ""


def test_the_tree_holds_every_part_and_container_parts_stand_last(tmp_path: Path) -> None:
    nupkg = make_nupkg(tmp_path, {"lib/b.dll": b"B" * 10, "a.txt": b"A" * 10})
    tree = tree_of(nupkg)
    with zipfile.ZipFile(nupkg) as archive:
        assert len(tree) == sum(info.file_size for info in archive.infolist())
    assert tree.startswith(b"A" * 10 + b"B" * 10)


def test_the_best_peer_is_not_the_bound() -> None:
    found = Comparison("", "", 10, 10, (Sent("nupkg", "", 10), Sent("zstd", "", 5), Sent(BOUND.name, "", 1)))
    assert found.best.peer == "zstd"


def test_people_get_a_table(pair: tuple[str, str]) -> None:
    told = text_of(compare(*pair, only=["nupkg"]))
    assert "Acme.Web.1.0.0.nupkg to Acme.Web.1.0.1.nupkg" in told
    assert f"{os.path.getsize(pair[1]):,}" in told
