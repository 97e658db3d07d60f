"""What executables say of their own making: the reader of PE files, whatever the bytes."""

from __future__ import annotations

import struct
import zipfile

import pytest
from harness.builds import COMMIT, OTHER_COMMIT, executable, real
from harness.packages import noise
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.compare import portable_executable


def test_an_assembly_tells_how_it_was_made() -> None:
    certificate = b"certificate" * 10
    found = portable_executable.read_assembly(executable(certificate=certificate))
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
    found = portable_executable.read_assembly(executable(pdb=path))
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
    found = portable_executable.read_assembly(executable(version=version))
    assert found is not None
    assert found.commit == commit


def test_only_what_says_reproducible_or_carries_no_time_is_deterministic() -> None:
    def is_deterministic(**more: object) -> bool:
        found = portable_executable.read_assembly(executable(**more))  # type: ignore[arg-type]
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
        found = portable_executable.read_assembly(data)
        assert found is not None
        plain.append(portable_executable.without_stamps(data, found))
    assert first != second
    assert plain[0] == plain[1] != plain[2]


def test_another_build_is_made_of_other_stamps_alone() -> None:
    data = executable()
    assembly = portable_executable.read_assembly(data)
    assert assembly is not None
    other = portable_executable.rebuilt(data, assembly, {"time", "commit"})
    again = portable_executable.read_assembly(other)
    assert again is not None
    assert again.commit != assembly.commit
    assert len(again.commit) == 40, "a commit stays one"
    assert again.time != assembly.time
    assert portable_executable.without_stamps(other, again) == portable_executable.without_stamps(data, assembly)
    assert portable_executable.rebuilt(data, assembly, {"time", "commit"}) == other, "the same each time"


@pytest.mark.long
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_bytes_make_the_reader_of_assemblies_fail(data: st.DataObject) -> None:
    whole = bytearray(executable(certificate=b"c" * 64))
    for _ in range(data.draw(st.integers(0, 8))):
        place = data.draw(st.integers(0, len(whole) - 4) | st.integers(0, 400) | st.integers(20_500, 21_400))
        struct.pack_into("<I", whole, min(place, len(whole) - 4), data.draw(st.integers(0, 0xFFFFFFFF)))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))])
    assembly = portable_executable.read_assembly(cut)
    if assembly is not None:
        assert all(0 <= stamp.start < stamp.start + stamp.size <= len(cut) for stamp in assembly.stamps)
        assert len(portable_executable.without_stamps(cut, assembly)) == len(cut)
        kinds = {stamp.kind for stamp in assembly.stamps}
        assert len(portable_executable.rebuilt(cut, assembly, kinds)) == len(cut)


@given(st.binary(max_size=400))
def test_noise_is_no_assembly(data: bytes) -> None:
    assert portable_executable.read_assembly(data) is None
    portable_executable.read_assembly(b"MZ" + data)


def test_every_real_assembly_is_read() -> None:
    path = real("microsoft.aspnetcore.app.runtime.linux-x64.10.0.14")
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".dll")]
        found = [portable_executable.read_assembly(archive.read(name)) for name in names]
    assert len(found) > 100
    assert all(each and each.managed and each.deterministic and each.commit for each in found)
