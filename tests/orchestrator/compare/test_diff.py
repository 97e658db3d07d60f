"""What changed between two packages, and what it costs: the deciders, without the command."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from harness.builds import FILES, RANDOM, opener, real, write
from harness.packages import noise, nuspec
from harness.seed import SOAK

from orchestrator.compare import diff
from relay.encoding.codecs import Coding, decoder_for, encode
from relay.package.ranges import indexes


@pytest.fixture
def opened():
    with opener() as open_:
        yield open_


# --- parts


def test_each_kind_of_change_is_told(tmp_path: Path, opened) -> None:
    after = dict(FILES)
    after["lib/a/web.dll"] = after["lib/a/web.dll"][:-1] + b"!"
    after["lib/a/10.0.14/old.dll"] = after.pop("lib/a/10.0.13/old.dll")[:-1] + b"!"
    after["images/logo.png"] = after.pop("content/logo.png")
    after["content/copy.txt"] = after["content/keep.txt"]
    after["content/new.txt"] = b"new"
    del after["content/drop.txt"]
    old, new = opened(write(tmp_path / "a.nupkg", FILES), write(tmp_path / "b.nupkg", after, version="1.0.1"))
    told = {(each.change, each.path, each.old_path) for each in diff.compare_parts(old, new)}
    assert told == {
        ("changed", "lib/a/web.dll", "lib/a/web.dll"),
        ("changed", "lib/a/10.0.14/old.dll", "lib/a/10.0.13/old.dll"),
        ("moved", "images/logo.png", "content/logo.png"),
        ("copied", "content/copy.txt", "content/keep.txt"),
        ("added", "content/new.txt", ""),
        ("removed", "content/drop.txt", "content/drop.txt"),
        ("changed", "Acme.Web.nuspec", "Acme.Web.nuspec"),
    }


def test_a_package_beside_itself_has_no_changes_and_costs_nothing(tmp_path: Path, opened) -> None:
    path = write(tmp_path / "a.nupkg", FILES)
    old, new = opened(path, path)
    assert diff.compare_parts(old, new) == []
    assert diff.plan(old.manifest, new.manifest) == []
    assert diff.manifest_bytes(old.manifest, new.manifest) == diff.rsync_like_bytes(old, new) == 0


def test_an_executable_bit_is_a_change_that_costs_nothing(tmp_path: Path, opened) -> None:
    paths = []
    for name, mode in (("a", 0o644), ("b", 0o755)):
        path = tmp_path / f"{name}.nupkg"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("Acme.Web.nuspec", nuspec())
            info = zipfile.ZipInfo("run")
            info.external_attr = (0o100000 | mode) << 16
            archive.writestr(info, b"echo")
        paths.append(str(path))
    old, new = opened(*paths)
    (change,) = diff.compare_parts(old, new)
    assert (change.change, change.path, diff.part_delta_bytes(old, new, change)) == ("changed", "run", 0)


def test_container_parts_with_random_names_are_one_part_that_changed(tmp_path: Path, opened) -> None:
    first, second = write(tmp_path / "a.nupkg", {}, psmdcp="a" * 32), write(tmp_path / "b.nupkg", {}, psmdcp="b" * 32)
    old, new = opened(first, second)
    changes = diff.compare_parts(old, new)
    assert {(each.change, each.old_path) for each in changes if each.path == RANDOM % ("b" * 32)} == {
        ("moved", RANDOM % ("a" * 32))
    }
    assert all(each.container for each in changes)


# --- cost


def test_runs_hold_just_the_chunks_that_a_holder_of_the_old_one_lacks(tmp_path: Path, opened) -> None:
    after = FILES | {"lib/a/web.dll": noise("web", 300_000)[:-1] + b"!", "lib/a/more.dll": noise("more", 90_000)}
    old, new = opened(write(tmp_path / "a.nupkg", FILES), write(tmp_path / "b.nupkg", after))
    held = set(old.manifest.chunk_ids())
    runs = diff.plan(old.manifest, new.manifest)
    sent = [new.manifest.chunk_id(index) for run in runs for index in run.chunks]
    assert set(sent) == set(new.manifest.chunk_ids()) - held
    assert len(sent) == len(set(sent))
    counted = diff.count_chunks(old.manifest, new.manifest)
    assert (counted.new, counted.new_bytes) == (len(sent), sum(run.size for run in runs))
    assert counted.kept + counted.new == len(set(new.manifest.chunk_ids()))
    assert all(span.manifest_id == old.manifest.id for run in runs for span in run.bases)


def test_bytes_by_encoding_are_those_of_a_payload_that_decodes(tmp_path: Path, opened) -> None:
    web = bytearray(FILES["lib/a/web.dll"])
    web[1000:1010] = b"0123456789"
    after = FILES | {"lib/a/web.dll": bytes(web)}
    old, new = opened(write(tmp_path / "a.nupkg", FILES), write(tmp_path / "b.nupkg", after))
    (run,) = diff.plan(old.manifest, new.manifest)
    base = b"".join(
        old.read(old.manifest.chunk_starts[i], old.manifest.chunks[i].size)
        for span in run.bases
        for i in indexes(span.ranges)
    )
    data = b"".join(new.read(new.manifest.chunk_starts[i], new.manifest.chunks[i].size) for i in run.chunks)
    sizes = {}
    for text in ("zstd:3", "zstd-prefix", "hdiff"):
        coding = Coding.parse(text)
        sizes[text] = diff.payload_bytes(old, new, run, coding)
        payload = b"".join(encode(coding, data, base if coding.needs_bases else b""))
        decoder = decoder_for(coding.encoding, len(data), base if coding.needs_bases else b"")
        assert b"".join(bytes(piece) for piece in decoder.feed(memoryview(payload))) == data
        assert sizes[text] == len(payload)
    assert sizes["hdiff"] < 300
    assert sizes["zstd:3"] > 290_000
    assert sizes["zstd-prefix"] < 2000


def test_without_bases_a_delta_is_counted_as_the_plain_form(tmp_path: Path, opened) -> None:
    (new,) = opened(write(tmp_path / "a.nupkg", FILES))
    run = diff.BasedRun(tuple(range(len(new.manifest.chunks))), (), new.manifest.stream_size)
    assert diff.payload_bytes(new, new, run, Coding.parse("zstd-prefix:3")) == diff.payload_bytes(
        new, new, run, Coding.parse("zstd:3")
    )


def test_a_part_longer_than_a_run_is_measured_in_pieces(
    tmp_path: Path, opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diff, "RUN_BYTES", 64 << 10)
    monkeypatch.setattr(diff, "_AROUND", 32 << 10)
    web = bytearray(FILES["lib/a/web.dll"])
    web[200_000] ^= 1
    shifted = FILES | {"lib/a/web.dll": bytes(web), "lib/a/10.0.13/old.dll": b"x" + FILES["lib/a/10.0.13/old.dll"]}
    old, new = opened(write(tmp_path / "a.nupkg", FILES), write(tmp_path / "b.nupkg", shifted))
    sizes = {each.path: diff.part_delta_bytes(old, new, each) for each in diff.compare_parts(old, new)}
    assert 0 < sizes["lib/a/web.dll"] < 200, "only the piece with the change costs anything"
    assert 0 < sizes["lib/a/10.0.13/old.dll"] < 400, "a shift by one byte is found around the old place"


def test_rsync_like_counts_parts_whose_compressed_bytes_are_new(tmp_path: Path, opened) -> None:
    after = FILES | {"content/keep.txt": b"kept\n" * 1000}
    old, new = opened(write(tmp_path / "a.nupkg", FILES), write(tmp_path / "b.nupkg", after))
    assert diff.rsync_like_bytes(old, new) == new.zip_part["content/keep.txt"].compressed_size


soak = [pytest.mark.soak, pytest.mark.skipif(not SOAK, reason="the largest pair is compared in `make soak`")]


@pytest.mark.long
@pytest.mark.parametrize(
    ("before", "after", "share"),
    [
        ("Shop.Web.1.0.0", "Shop.Web.1.0.1", 0.001),
        pytest.param("Shop.Web.1.0.1", "Shop.Web.1.1.0", 0.04, marks=soak),
        ("microsoft.entityframeworkcore.10.0.14", "microsoft.entityframeworkcore.10.0.15", 0.08),
    ],
)
def test_real_pairs_cost_a_small_share_as_deltas_and_most_of_the_changed_zip_otherwise(
    before: str, after: str, share: float, opened
) -> None:
    old, new = opened(real(before), real(after))
    runs = diff.plan(old.manifest, new.manifest)
    payload = sum(diff.payload_bytes(old, new, run, Coding.parse("hdiff")) for run in runs)
    assert payload < share * new.manifest.nupkg.size
    assert payload < diff.rsync_like_bytes(old, new)
    changes = diff.compare_parts(old, new)
    parts = [diff.part_delta_bytes(old, new, each) for each in changes]
    assert all(parts)
    assert payload <= 1.2 * sum(parts), "a whole run finds at least what its parts find alone"
