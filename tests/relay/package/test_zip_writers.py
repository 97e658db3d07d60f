"""What real writers of zips make is taken, and laid down as NuGet lays it down."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path

import pytest
from harness.dotnet import needs_dotnet, restore
from harness.seed import SOAK
from harness.written_zips import ALL, REFUSED, TREE, WRITTEN

from relay.errors import ArchiveError
from relay.package.zip_reader import read_nuspec, read_part, walk


def contents(data: bytes) -> dict[str, bytes]:
    file = io.BytesIO(data)
    return {entry.path: b"".join(read_part(file, entry)) for entry in walk(file)}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_writer_makes_is_taken(name: str) -> None:
    found = contents(WRITTEN[name])
    assert {path: TREE[path] for path in found if path in TREE} == {path: found[path] for path in found if path in TREE}
    assert found.keys() - TREE.keys() <= {"META-INF/MANIFEST.MF"}
    file = io.BytesIO(WRITTEN[name])
    assert str(read_nuspec(file, walk(file)).id) == "Acme.Zip"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(ArchiveError) as caught:
        contents(ALL[name])
    assert REFUSED[name] in str(caught.value)


def test_the_writers_are_many() -> None:
    assert len(WRITTEN) > 100
    assert {"jar", "fastjar-stream", "infozip-pipe", "bsdtar-pipe", "go", "ruby-stream", "perl"} <= WRITTEN.keys()
    assert ALL.keys() - WRITTEN.keys() == REFUSED.keys()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    made = tmp_path / "tree"
    for path, content in TREE.items():
        (made / path).parent.mkdir(parents=True, exist_ok=True)
        (made / path).write_bytes(content)
    (made / "lib" / "empty").mkdir()
    return made


LIVE = {
    "zip": "zip -qr ../out.zip Acme.Zip.nuspec lib nothing",
    "zip to a pipe": "zip -qr - Acme.Zip.nuspec lib nothing | cat >../out.zip",
    "zip to a pipe, stored": "zip -qr0 - Acme.Zip.nuspec lib nothing | cat >../out.zip",
    "zip in zip64": "zip -qr -fz ../out.zip Acme.Zip.nuspec lib nothing",
    "7z": "7z a -tzip ../out.zip Acme.Zip.nuspec lib nothing >../7z.txt",
    "7z stored": "7z a -tzip -mm=Copy ../out.zip Acme.Zip.nuspec lib nothing >../7z.txt",
    "7z with times": "7z a -tzip -mtc=on -mcu=on ../out.zip Acme.Zip.nuspec lib nothing >../7z.txt",
    "jar": "jar cfM ../out.zip Acme.Zip.nuspec lib nothing",
    "bsdtar to a pipe": "bsdtar --format zip -cf - Acme.Zip.nuspec lib nothing | cat >../out.zip",
    "fastjar to a pipe": "fastjar cM Acme.Zip.nuspec lib nothing >../out.zip",
}


def write(tree: Path, command: str) -> bytes:
    program = command.split(maxsplit=1)[0]
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    subprocess.run(["sh", "-c", command], cwd=tree, check=True)
    return (tree.parent / "out.zip").read_bytes()


@pytest.mark.processes
@pytest.mark.parametrize("name", LIVE)
def test_what_the_writers_of_this_machine_make_is_taken(name: str, tree: Path) -> None:
    assert contents(write(tree, LIVE[name])) == TREE


@pytest.mark.processes
@pytest.mark.parametrize("method", ["Deflate64", "BZip2", "LZMA", "PPMd"])
def test_the_methods_of_7_zip_are_refused_by_their_names(method: str, tree: Path) -> None:
    data = write(tree, f"7z a -tzip -mm={method} ../out.zip Acme.Zip.nuspec lib nothing >../7z.txt")
    with pytest.raises(ArchiveError, match=rf"(?i)compressed by {method} \(method"):
        contents(data)


@pytest.mark.soak
@pytest.mark.processes
@pytest.mark.skipif(not SOAK, reason="NuGet is asked again in `make soak`")
@needs_dotnet
def test_nuget_lays_down_the_same(tmp_path: Path) -> None:
    """Which reads no zstd yet. It reads Deflate64, which we refuse."""
    zips = {name: data for name, data in WRITTEN.items() if "zstd" not in name}
    for name, files in restore(tmp_path, zips, "Acme.Zip", "1.0.0").items():
        assert files is not None, name
        ours = {path.lower(): content for path, content in contents(zips[name]).items()}
        assert {path.lower(): content for path, content in files.items()} == ours, name
