"""What changed between two packages, what it costs, and what made them differ: the deciders, without the commands."""

from __future__ import annotations

import io
import random
import struct
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import noise, nuspec

from orchestrator import comparing
from orchestrator.comparing import Package, Rule
from orchestrator.comparing_cli import _file_named, _opened
from relay.content.encodings import Coding, decoder_for, encode
from relay.content.ranges import indexes

REAL = Path(__file__).resolve().parents[3] / "shared/data/packages"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
RANDOM = "package/services/metadata/core-properties/%s.psmdcp"


def real(name: str) -> str:
    path = REAL / f"{name}.nupkg"
    if not path.exists():
        pytest.skip(f"no {name} in ../shared/data/packages")
    return str(path)


@pytest.fixture
def opened(tmp_path: Path):
    """A function that opens nupkgs as the commands do."""
    with ExitStack() as stack:

        def open_(*paths: str) -> list[Package]:
            return stack.enter_context(_opened([_file_named(path) for path in paths], None, lambda _: lambda *_: None))

        yield open_


def write(
    path: Path,
    files: Mapping[str, bytes],
    *,
    time: tuple[int, int, int, int, int, int] = (1980, 1, 1, 0, 0, 0),
    level: int = 6,
    version: str = "1.0.0",
    psmdcp: str = "",
    commit: str = "",
) -> str:
    """A nupkg with a container as NuGet makes it, in this order."""
    spec = nuspec("Acme.Web", version)
    if commit:
        spec = spec.replace(b"</metadata>", f'<repository type="git" commit="{commit}" /></metadata>'.encode())
    parts = {"_rels/.rels": f"<Relationships>/{RANDOM % psmdcp}</Relationships>".encode(), "Acme.Web.nuspec": spec}
    parts |= files
    if psmdcp:
        parts[RANDOM % psmdcp] = b"<coreProperties />" * 20
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            info = zipfile.ZipInfo(name, time)
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, data, compresslevel=level)
    return str(path)


def executable(
    code: bytes = b"",
    *,
    time: int = 0x60000000,
    mvid: bytes = bytes(range(16)),
    deterministic: bool = True,
    pdb: str = "/_/src/Web.pdb",
    version: str = f"1.0.0+{COMMIT}",
    certificate: bytes = b"",
    managed: bool = True,
) -> bytes:
    """A PE file with one section, laid out by "PE Format"; nothing runs it."""
    at, address = 512, 0x2000
    body = bytearray()

    def put(data: bytes) -> int:
        """Its address in the loaded image."""
        place = address + len(body)
        body.extend(data + bytes(-len(data) % 4))
        return place

    put(code or random.Random("code").randbytes(20_000))
    guids = b"BSJB" + struct.pack("<2H2I", 1, 1, 0, 12) + b"v4.0.30319\0\0" + struct.pack("<2H", 0, 1)
    guids += struct.pack("<2I", len(guids) + 16, 16) + b"#GUID\0\0\0" + mvid
    metadata = put(guids)
    cli = put(struct.pack("<I2H2I", 72, 2, 5, metadata, len(guids)) + bytes(56))
    view = b"RSDS" + mvid[::-1] + struct.pack("<I", 1) + pdb.encode() + b"\0"
    entries = [(2, len(view), put(view))] + ([(16, 0, 0)] if deterministic else [])
    debug = put(
        b"".join(
            struct.pack("<2I2H4I", 0, time, 0, 0, kind, size, rva, rva - address + at if rva else 0)
            for kind, size, rva in entries
        )
    )
    told = "ProductVersion\0".encode("utf-16-le") + b"\0\0" + f"{version}\0".encode("utf-16-le")
    resources = put(bytes(16) + told)
    body.extend(bytes(-len(body) % 512))
    directories = [(0, 0)] * 16
    directories[2] = (resources, 16 + len(told))
    directories[6] = (debug, 28 * len(entries))
    directories[14] = (cli, 72) if managed else (0, 0)
    directories[4] = (at + len(body), len(certificate)) if certificate else (0, 0)
    optional = struct.pack("<H", 0x10B) + bytes(90) + struct.pack("<I", 16)
    optional += b"".join(struct.pack("<2I", *each) for each in directories)
    head = b"MZ" + bytes(58) + struct.pack("<I", 64) + b"PE\0\0"
    head += struct.pack("<2H3I2H", 0x14C, 1, time, 0, 0, len(optional), 0x2102) + optional
    head += struct.pack("<8s4I", b".text", len(body), address, len(body), at) + bytes(16)
    return head.ljust(at, b"\0") + bytes(body) + certificate


def rules(lint: comparing.Lint) -> dict[Rule, comparing.Finding]:
    return {finding.rule: finding for finding in lint.findings}


# --- parts


FILES = {
    "lib/a/web.dll": noise("web", 300_000),
    "lib/a/10.0.13/old.dll": noise("old", 100_000),
    "content/logo.png": noise("logo", 80_000),
    "content/keep.txt": b"keep\n" * 1000,
    "content/drop.txt": b"drop\n" * 10,
}


def test_each_kind_of_change_is_told(tmp_path: Path, opened) -> None:
    after = dict(FILES)
    after["lib/a/web.dll"] = after["lib/a/web.dll"][:-1] + b"!"
    after["lib/a/10.0.14/old.dll"] = after.pop("lib/a/10.0.13/old.dll")[:-1] + b"!"
    after["images/logo.png"] = after.pop("content/logo.png")
    after["content/copy.txt"] = after["content/keep.txt"]
    after["content/new.txt"] = b"new"
    del after["content/drop.txt"]
    old, new = opened(write(tmp_path / "a.nupkg", FILES), write(tmp_path / "b.nupkg", after, version="1.0.1"))
    told = {(each.change, each.path, each.old_path) for each in comparing.compare_parts(old, new)}
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
    assert comparing.compare_parts(old, new) == []
    assert comparing.plan(old.manifest, new.manifest) == []
    assert comparing.manifest_bytes(old.manifest, new.manifest) == comparing.rsync_like_bytes(old, new) == 0
    assert comparing.lint_pair(old, new) == comparing.Lint((), 0)


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
    (change,) = comparing.compare_parts(old, new)
    assert (change.change, change.path, comparing.part_delta_bytes(old, new, change)) == ("changed", "run", 0)


def test_container_parts_with_random_names_are_one_part_that_changed(tmp_path: Path, opened) -> None:
    first, second = write(tmp_path / "a.nupkg", {}, psmdcp="a" * 32), write(tmp_path / "b.nupkg", {}, psmdcp="b" * 32)
    old, new = opened(first, second)
    changes = comparing.compare_parts(old, new)
    assert {(each.change, each.old_path) for each in changes if each.path == RANDOM % ("b" * 32)} == {
        ("moved", RANDOM % ("a" * 32))
    }
    assert all(each.container for each in changes)


# --- cost


def test_runs_hold_just_the_chunks_that_a_holder_of_the_old_one_lacks(tmp_path: Path, opened) -> None:
    after = FILES | {"lib/a/web.dll": noise("web", 300_000)[:-1] + b"!", "lib/a/more.dll": noise("more", 90_000)}
    old, new = opened(write(tmp_path / "a.nupkg", FILES), write(tmp_path / "b.nupkg", after))
    held = set(old.manifest.chunk_ids())
    runs = comparing.plan(old.manifest, new.manifest)
    sent = [new.manifest.chunk_id(index) for run in runs for index in run.chunks]
    assert set(sent) == set(new.manifest.chunk_ids()) - held
    assert len(sent) == len(set(sent))
    counted = comparing.count_chunks(old.manifest, new.manifest)
    assert (counted.new, counted.new_bytes) == (len(sent), sum(run.size for run in runs))
    assert counted.kept + counted.new == len(set(new.manifest.chunk_ids()))
    assert all(span.manifest_id == old.manifest.id for run in runs for span in run.bases)


def test_bytes_by_encoding_are_those_of_a_payload_that_decodes(tmp_path: Path, opened) -> None:
    web = bytearray(FILES["lib/a/web.dll"])
    web[1000:1010] = b"0123456789"
    after = FILES | {"lib/a/web.dll": bytes(web)}
    old, new = opened(write(tmp_path / "a.nupkg", FILES), write(tmp_path / "b.nupkg", after))
    (run,) = comparing.plan(old.manifest, new.manifest)
    base = b"".join(
        old.read(old.manifest.chunk_starts[i], old.manifest.chunks[i].size)
        for span in run.bases
        for i in indexes(span.ranges)
    )
    data = b"".join(new.read(new.manifest.chunk_starts[i], new.manifest.chunks[i].size) for i in run.chunks)
    sizes = {}
    for text in ("zstd:3", "zstd-prefix", "hdiff"):
        coding = Coding.parse(text)
        sizes[text] = comparing.payload_bytes(old, new, run, coding)
        payload = b"".join(encode(coding, data, base if coding.needs_bases else b""))
        decoder = decoder_for(coding.encoding, len(data), base if coding.needs_bases else b"")
        assert b"".join(bytes(piece) for piece in decoder.feed(memoryview(payload))) == data
        assert sizes[text] == len(payload)
    assert sizes["hdiff"] < 300
    assert sizes["zstd:3"] > 290_000
    assert sizes["zstd-prefix"] < 2000


def test_without_bases_a_delta_is_counted_as_the_plain_form(tmp_path: Path, opened) -> None:
    (new,) = opened(write(tmp_path / "a.nupkg", FILES))
    run = comparing.Run(tuple(range(len(new.manifest.chunks))), (), new.manifest.stream_size)
    assert comparing.payload_bytes(new, new, run, Coding.parse("zstd-prefix:3")) == comparing.payload_bytes(
        new, new, run, Coding.parse("zstd:3")
    )


def test_a_part_longer_than_a_run_is_measured_in_pieces(
    tmp_path: Path, opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "RUN_BYTES", 64 << 10)
    monkeypatch.setattr(comparing, "_AROUND", 32 << 10)
    web = bytearray(FILES["lib/a/web.dll"])
    web[200_000] ^= 1
    shifted = FILES | {"lib/a/web.dll": bytes(web), "lib/a/10.0.13/old.dll": b"x" + FILES["lib/a/10.0.13/old.dll"]}
    old, new = opened(write(tmp_path / "a.nupkg", FILES), write(tmp_path / "b.nupkg", shifted))
    sizes = {each.path: comparing.part_delta_bytes(old, new, each) for each in comparing.compare_parts(old, new)}
    assert 0 < sizes["lib/a/web.dll"] < 200, "only the piece with the change costs anything"
    assert 0 < sizes["lib/a/10.0.13/old.dll"] < 400, "a shift by one byte is found around the old place"


def test_rsync_like_counts_parts_whose_compressed_bytes_are_new(tmp_path: Path, opened) -> None:
    after = FILES | {"content/keep.txt": b"kept\n" * 1000}
    old, new = opened(write(tmp_path / "a.nupkg", FILES), write(tmp_path / "b.nupkg", after))
    assert comparing.rsync_like_bytes(old, new) == new.zip_part["content/keep.txt"].compressed_size


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [
        ("Shop.Web.1.0.0", "Shop.Web.1.0.1", 0.001),
        ("Shop.Web.1.0.1", "Shop.Web.1.1.0", 0.04),
        ("microsoft.entityframeworkcore.10.0.14", "microsoft.entityframeworkcore.10.0.15", 0.08),
    ],
)
def test_real_pairs_cost_a_small_share_as_deltas_and_most_of_the_changed_zip_otherwise(
    before: str, after: str, share: float, opened
) -> None:
    old, new = opened(real(before), real(after))
    runs = comparing.plan(old.manifest, new.manifest)
    payload = sum(comparing.payload_bytes(old, new, run, Coding.parse("hdiff")) for run in runs)
    assert payload < share * new.manifest.nupkg.size
    assert payload < comparing.rsync_like_bytes(old, new)
    changes = comparing.compare_parts(old, new)
    parts = [comparing.part_delta_bytes(old, new, each) for each in changes]
    assert all(parts)
    assert payload <= 1.2 * sum(parts), "a whole run finds at least what its parts find alone"


# --- assemblies


def test_an_assembly_tells_how_it_was_made() -> None:
    certificate = b"certificate" * 10
    found = comparing.read_assembly(executable(certificate=certificate))
    assert found is not None
    assert found.managed
    assert found.deterministic
    assert (found.pdb_path, found.builds_path_in) == ("/_/src/Web.pdb", False)
    assert (found.version, found.commit) == (f"1.0.0+{COMMIT}", COMMIT)
    assert found.signature_bytes == len(certificate)
    assert {stamp.kind for stamp in found.stamps} == {
        "time", "checksum", "pdb id", "pdb path", "mvid", "commit", "authenticode",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "leads_in"),
    [
        ("/home/ci/web/Web.pdb", True),
        ("C:\\Users\\me\\Web.pdb", True),
        ("D:/a/1/Web.pdb", True),
        ("\\\\build\\share\\Web.pdb", True),
        ("/_/src/Web.pdb", False),
        ("/_1/src/Web.pdb", False),
        ("Web.pdb", False),
        ("", False),
    ],
)
def test_a_path_of_the_build_machine_is_told_from_a_mapped_one(path: str, leads_in: bool) -> None:
    found = comparing.read_assembly(executable(pdb=path))
    assert found is not None
    assert found.builds_path_in is leads_in


@pytest.mark.parametrize(
    ("version", "commit"),
    [
        (f"1.0.0+{COMMIT}", COMMIT),
        (f"4.6 @Commit: {COMMIT}", COMMIT),
        ("1.1.118+g3c877565bc", "g3c877565bc"),
        ("2.14.1+3ebc38de58", "3ebc38de58"),
        ("10.0.14", ""),
        ("1.0.0-beta.2", ""),
        ("20260101", ""),
    ],
)
def test_a_commit_in_a_version_is_found(version: str, commit: str) -> None:
    found = comparing.read_assembly(executable(version=version))
    assert found is not None
    assert found.commit == commit


def test_only_what_says_reproducible_or_carries_no_time_is_deterministic() -> None:
    def is_deterministic(**more: object) -> bool:
        found = comparing.read_assembly(executable(**more))  # type: ignore[arg-type]
        assert found is not None
        return found.deterministic

    assert is_deterministic()
    assert not is_deterministic(deterministic=False)
    assert is_deterministic(deterministic=False, time=0)


def test_two_builds_of_one_code_are_equal_without_their_stamps() -> None:
    first = executable(certificate=b"1" * 100)
    second = executable(
        time=0x61111111, mvid=noise("mvid", 16), version=f"1.0.0+{OTHER_COMMIT}", certificate=b"2" * 100
    )
    third = executable(b"other code" * 2000)
    plain = []
    for data in (first, second, third):
        found = comparing.read_assembly(data)
        assert found is not None
        plain.append(comparing.without_stamps(data, found))
    assert first != second
    assert plain[0] == plain[1] != plain[2]


def test_another_build_is_made_of_other_stamps_alone() -> None:
    data = executable()
    assembly = comparing.read_assembly(data)
    assert assembly is not None
    other = comparing.rebuilt(data, assembly, {"time", "commit"})
    again = comparing.read_assembly(other)
    assert again is not None
    assert again.commit != assembly.commit
    assert len(again.commit) == 40, "a commit stays one"
    assert again.time != assembly.time
    assert comparing.without_stamps(other, again) == comparing.without_stamps(data, assembly)
    assert comparing.rebuilt(data, assembly, {"time", "commit"}) == other, "the same each time"


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_bytes_make_the_reader_of_assemblies_fail(data: st.DataObject) -> None:
    whole = bytearray(executable(certificate=b"c" * 64))
    for _ in range(data.draw(st.integers(0, 8))):
        place = data.draw(st.integers(0, len(whole) - 4) | st.integers(0, 400) | st.integers(20_500, 21_400))
        struct.pack_into("<I", whole, min(place, len(whole) - 4), data.draw(st.integers(0, 0xFFFFFFFF)))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))])
    assembly = comparing.read_assembly(cut)
    if assembly is not None:
        assert all(0 <= stamp.start < stamp.start + stamp.size <= len(cut) for stamp in assembly.stamps)
        assert len(comparing.without_stamps(cut, assembly)) == len(cut)
        kinds = {stamp.kind for stamp in assembly.stamps}
        assert len(comparing.rebuilt(cut, assembly, kinds)) == len(cut)


@given(st.binary(max_size=400))
def test_noise_is_no_assembly(data: bytes) -> None:
    assert comparing.read_assembly(data) is None
    comparing.read_assembly(b"MZ" + data)


def test_every_real_assembly_is_read() -> None:
    path = real("microsoft.aspnetcore.app.runtime.linux-x64.10.0.14")
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".dll")]
        found = [comparing.read_assembly(archive.read(name)) for name in names]
    assert len(found) > 100
    assert all(each and each.managed and each.deterministic and each.commit for each in found)


# --- lint, one package


def test_a_package_made_the_same_each_time_has_no_findings(tmp_path: Path, opened) -> None:
    path = write(tmp_path / "a.nupkg", FILES | {"lib/Web.dll": executable(version="1.0.0")}, psmdcp="nuget")
    assert comparing.lint_alone(opened(path)[0]) == comparing.Lint((), None)


def test_a_random_part_name_is_found_and_its_cost_tried(tmp_path: Path, opened) -> None:
    (package,) = opened(write(tmp_path / "a.nupkg", FILES, psmdcp="0123456789abcdef" * 2))
    lint = comparing.lint_alone(package)
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
    found = rules(comparing.lint_alone(first))["pack-time"]
    assert not found.is_note
    assert "2026-01-02 03:04:06" in found.what
    assert found.zip_bytes == sum(part.records for part in first.zip_parts) > 7 * 80
    assert rules(comparing.lint_alone(second))["pack-time"].is_note


def test_assemblies_that_are_not_deterministic_are_named_and_others_are_not(tmp_path: Path, opened) -> None:
    files = {
        "lib/a.dll": executable(deterministic=False, version="1.0.0"),
        "lib/b.dll": executable(version="1.0.0"),
        "native/c.dll": executable(deterministic=False, managed=False, version="1.0.0"),
        "lib/d.dll": b"MZ, but no assembly",
    }
    lint = comparing.lint_alone(opened(write(tmp_path / "a.nupkg", files))[0])
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
    lint = comparing.lint_alone(package)
    found = rules(lint)
    assert set(found) == {"build-path", "commit-stamp", "authenticode", "signature"}
    assert not lint.can_be_mended
    assert found["build-path"].part == found["authenticode"].part == "lib/a.dll"
    assert "lib/a.dll, Acme.Web.nuspec" in found["commit-stamp"].what
    assert 0 < (found["commit-stamp"].our_bytes or 0) < 600
    assert found["authenticode"].our_bytes is None, "only another build tells how much of a signature is new"
    assert found["signature"].zip_bytes == 9000


# --- lint, two packages


def test_two_builds_that_differ_only_in_their_stamps_are_explained(tmp_path: Path, opened) -> None:
    one = executable(deterministic=False, version="1.0.0")
    two = executable(deterministic=False, version="1.0.0", time=0x61111111, mvid=noise("m", 16))
    first = write(tmp_path / "a.nupkg", FILES | {"lib/Web.dll": one}, time=(2026, 1, 2, 3, 4, 6), psmdcp="a" * 32)
    second = write(tmp_path / "b.nupkg", FILES | {"lib/Web.dll": two}, time=(2026, 1, 2, 3, 5, 6), psmdcp="b" * 32)
    old, new = opened(first, second)
    lint = comparing.lint_pair(old, new)
    found = rules(lint)
    assert set(found) == {"random-part-name", "pack-time", "assembly-stamp"}
    assert lint.other_parts == 0
    assert found["assembly-stamp"].our_bytes == comparing.delta_bytes(one, two) > 0
    assert found["assembly-stamp"].zip_bytes == new.zip_part["lib/Web.dll"].compressed_size
    assert found["pack-time"].our_bytes == 0
    assert (found["random-part-name"].our_bytes or 0) > 0


def test_a_changed_source_is_no_finding(tmp_path: Path, opened) -> None:
    one, two = executable(b"code" * 5000, version="1.0.0"), executable(b"more" * 5000, version="1.0.0")
    old, new = opened(
        write(tmp_path / "a.nupkg", FILES | {"lib/Web.dll": one}),
        write(tmp_path / "b.nupkg", FILES | {"lib/Web.dll": two}),
    )
    assert comparing.lint_pair(old, new) == comparing.Lint((), 1)


def test_the_cost_of_a_stamp_is_not_told_where_the_code_changed_as_well(tmp_path: Path, opened) -> None:
    one = executable(b"code" * 5000, deterministic=False)
    two = executable(b"more" * 5000, deterministic=False, time=0x61111111, version=f"1.0.0+{OTHER_COMMIT}")
    old, new = opened(
        write(tmp_path / "a.nupkg", {"lib/Web.dll": one}), write(tmp_path / "b.nupkg", {"lib/Web.dll": two})
    )
    lint = comparing.lint_pair(old, new)
    assert rules(lint)["assembly-stamp"].our_bytes is None
    assert rules(lint)["commit-stamp"].our_bytes is None
    assert lint.other_parts == 1


def test_another_deflate_costs_us_nothing_and_the_zip_every_byte(tmp_path: Path, opened) -> None:
    text = {f"content/{i}.txt": random.Random(i).choices(range(97, 110), k=20_000) for i in range(5)}
    files = {path: bytes(letters) for path, letters in text.items()}
    old, new = opened(write(tmp_path / "a.nupkg", files, level=6), write(tmp_path / "b.nupkg", files, level=1))
    lint = comparing.lint_pair(old, new)
    (finding,) = lint.findings
    assert (finding.rule, finding.our_bytes, lint.other_parts) == ("encoder", 0, 0)
    assert finding.zip_bytes == comparing.rsync_like_bytes(old, new) > 30_000
    assert "and" in finding.what


def test_another_order_is_found(tmp_path: Path, opened) -> None:
    turned = dict(reversed(list(FILES.items())))
    old, new = opened(write(tmp_path / "a.nupkg", FILES), write(tmp_path / "b.nupkg", turned))
    lint = comparing.lint_pair(old, new)
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
    lint = comparing.lint_pair(old, new)
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
    lint = comparing.lint_pair(old, new)
    found = rules(lint)
    assert set(found) == {"build-path", "commit-stamp"}
    assert 0 < (found["build-path"].our_bytes or 0) < 400
    assert 0 < (found["commit-stamp"].our_bytes or 0) < 600
    assert lint.other_parts == 0


def test_a_real_pair_of_builds_is_explained_by_its_times(opened) -> None:
    lint = comparing.lint_pair(*opened(real("Shop.Web.1.0.0"), real("Shop.Web.1.0.1")))
    assert set(rules(lint)) == {"pack-time"}
    assert lint.other_parts == 5, "one line of source, and the version"


def test_a_real_pair_tells_what_its_signatures_cost(opened) -> None:
    old, new = opened(*(real(f"microsoft.entityframeworkcore.10.0.{n}") for n in (14, 15)))
    found = rules(comparing.lint_pair(old, new))
    assert {"authenticode", "signature", "pack-time"} <= set(found)
    assert 500 < (found["authenticode"].our_bytes or 0) < 20_000


def test_times_of_a_zip_that_another_reader_refuses_are_not_told(tmp_path: Path, opened) -> None:
    """`zipfile` is only asked for the times; what it cannot read is left out."""
    (package,) = opened(write(tmp_path / "a.nupkg", FILES, time=(2026, 1, 2, 3, 4, 6)))
    blind = replace(package, zip_parts=tuple(replace(part, stamped=()) for part in package.zip_parts))
    assert comparing.lint_alone(blind) == comparing.Lint((), None)
    from orchestrator.comparing_cli import _records

    assert _records(io.BytesIO(b"no zip")) == {}
