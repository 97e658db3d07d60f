"""What NuGet's own client lays down of a nupkg, an agent lays down: a hundred inputs, and the client's answers.

The answers were taken from the client of .NET 10.0.401 on Linux (`tests/data/dotnet-10.0.401.json`), and `make soak` takes
them again where the client is at hand. WAYSTATION_RECORD=1 writes them anew.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Final

import pytest
from harness.crafted import Member, craft
from harness.dotnet_client import ARCHIVE, DotnetClient
from harness.paths import DATA
from harness.seed import SOAK

from agent import platform
from agent.trees.tree import IncomingTree
from orchestrator.depot.cut_nupkg import NupkgCutter, digests_of
from relay.errors import ArchiveError
from relay.package.identity import NuGetVersion, PackageId, PackageRef
from relay.package.manifest import Manifest, ManifestBuilder
from relay.package.zip_reader import walk

RECORDED = DATA / "dotnet-10.0.401.json"
OPC = "package/services/metadata/core-properties"
LONG = "n" * 60

INPUTS: Final[dict[str, list[str]]] = {
    # What belongs to the nupkg, and what has a name like it.
    "as-packed": ["[Content_Types].xml", "_rels/.rels", f"{OPC}/0123.psmdcp", "lib/net10.0/a.dll"],
    "package-folder": ["web.config", "package/start.js", "Package/help.txt", "sub/package/x.txt", "PACKAGE/x"],
    "package-file": ["package", "packages/a.txt"],
    "package-deep": ["package/a/b/c.txt", "package/package/x", "package/services/x", "package/services/metadatas/x"],
    "metadata-folder": ["package/services/metadata/readme.txt", f"{OPC}/readme.txt", "Package/Services/Metadata/x"],
    "psmdcp": ["a.psmdcp", "lib/b.psmdcp", "package/c.psmdcp", f"{OPC}/d.PSMDCP"],
    "rels-folder": ["_rels/readme.txt", "_rels/a.nuspec.rels", "_RELS/b", "lib/_rels/.rels", "lib/_rels/x.rels"],
    "rels-case": ["_RELS/.rels", "_rels/.RELS"],
    "rels-file": ["_rels"],
    "types-case": ["[content_types].xml"],
    "types-below": ["sub/[Content_Types].xml", "[Content_Types].xml.bak", "x[Content_Types].xml"],
    "types-escaped": ["%5BContent_Types%5D.xml"],
    "types-twice": ["%5BContent_Types%5D.xml", "[Content_Types].xml"],
    "hash-files": ["lib/a.nupkg.sha512", "lib/.nupkg.metadata", "b.nupkg.sha512"],
    "nupkgs": ["a.nupkg", "feed/b.nupkg", "feed/c.snupkg"],
    "nuspecs": ["sub/a.nuspec", "sub/A.nuspec.bak", "x.nuspec.txt"],
    "xml-docs": ["lib/net10.0/a.dll", "lib/net10.0/a.xml", "ref/net10.0/a.xml"],
    "empty-marks": ["lib/net10.0/_._", "tools/_._"],
    "tool": ["tools/net10.0/any/DotnetToolSettings.xml", "tools/net10.0/any/run.sh"],
    "dot-files": [".gitignore", ".config/a.json", "..a", "a..b", "...a", "a/.hidden/.x"],
    # Names as the SDK and others write them.
    "two-slashes": ["analyzers/dotnet/cs//A.dll", "tools/net10.0/any//run.sh"],
    "many-slashes": ["a///b////c.txt"],
    "dot-in-front": ["./lib/a.dll", "././b.txt"],
    "dot-inside": ["lib/./a.dll", "x/././y.txt"],
    "slash-in-front": ["/lib/a.dll"],
    "slash-and-dot": ["/./lib/a.dll", "/lib//b.dll"],
    "slashes-in-front": ["//lib/a.dll"],
    "escaped-slash-in-front": ["%2Flib/a.dll"],
    "slash-and-escaped-slash": ["/%2Flib/a.dll"],
    "escaped-slash": ["lib%2Fa.dll", "lib%2fb.dll"],
    "escaped-two-slashes": ["lib%2F%2Fa.dll"],
    "escaped-dot": ["lib/%2E/a.dll", "%2E/b.dll"],
    "escaped-dots-inside": ["lib/%2E%2E/a.dll"],
    "escaped-dots-out": ["%2E%2E/a.dll"],
    "dots-inside": ["lib/../a.dll"],
    "dots-out": ["../a.dll"],
    "folder-entries": ["lib/", "lib/net10.0/", "lib/net10.0/a.dll"],
    "root-entry": ["/", "a.txt"],
    "dot-entry": ["./", "a.txt"],
    "folder-of-dots": ["lib/./", "lib/a.txt"],
    "meet-slashes": ["a/b.txt", "a//b.txt"],
    "meet-dot": ["a/b.txt", "./a/b.txt"],
    "meet-slash": ["a/b.txt", "/a/b.txt"],
    "meet-escape": ["a b.txt", "a%20b.txt"],
    "file-and-folder": ["a", "a/b"],
    # Escapes.
    "plus": ["lib/portable-net45+win8/a.dll", "lib/portable-net45%2Bwin8/b.dll", "C++/x.h"],
    "spaces": ["a b.txt", "a%20c.txt", " a", "x/ y"],
    "percent": ["100%.txt", "50%25.txt", "C%23/a.txt", "%", "a%2", "a%zz", "%%41"],
    "escaped-twice": ["a%252Fb.txt", "a%2525.txt", "%2541"],
    "escaped-utf8": ["%C3%A9.txt", "%e2%82%ac.txt", "%F0%9F%98%80.txt"],
    "escaped-case": ["%c3%a9%C3%A9.txt"],
    "escaped-latin1": ["caf%E9.txt", "na%efve.txt", "%C3%A9%E9%C3%A9.txt", "%ff"],
    "escaped-cut": ["a%C3.txt", "b%E2%82.txt"],
    "escaped-surrogate": ["%ED%A0%80.txt"],
    "escaped-mark": ["a%E2%80%AEtxt.exe", "%EF%BB%BFa.txt"],
    "escaped-nothing": ["a%00b.txt"],
    "escaped-line": ["a%0Ab.txt"],
    "escaped-backslash": ["lib%5Ca.dll"],
    "escaped-colon": ["a%3Ab.txt"],
    "escaped-brackets": ["a%5B1%5D.txt", "b[2].txt", "%7Bx%7D"],
    "hash": ["a#b.txt", "C#/x.cs", "a%23c.txt"],
    "ampersand": ["a&b;c=d.txt", "a,b", "a!b", "a'b", "(c)", "a@b", "$x", "a^b", "a`b"],
    "tildes": ["README.md~", "~/x", "~$doc.docx", "a~1.txt"],
    # Unicode.
    "accents": ["café.txt", "naïve/à.txt", "grüße.txt"],
    "decomposed": ["cafe\u0301.txt", "u\u0308/a.txt"],
    "cyrillic": ["файл.txt", "Папка/файл.txt"],
    "chinese": ["文件.txt", "文件夹/文件.txt"],
    "hangul": ["\uac00.txt", "\ud55c\uae00/x"],
    "hangul-jamo": ["\u1100\u1161.txt"],
    "arabic": ["ملف.txt"],
    "emoji": ["\U0001f600.txt", "\U0001f469\u200d\U0001f4bb/a"],
    "byte-order-mark": ["\ufeffa.txt"],
    "direction-mark": ["a\u202etxt.exe", "b\u200f.txt"],
    "joiner": ["a\u200db.txt", "c\u200cd.txt"],
    "no-break-space": ["a\u00a0b.txt", "c\u2003d.txt"],
    "line-separator": ["a\u2028b.txt"],
    "private-use": ["\ue000.txt", "\U000f0000.txt"],
    "wide": ["\uff21\uff22.txt", "\uff0e.txt"],
    "eszett": ["straße.txt", "strasse.txt"],
    "ligature": ["\ufb01.txt", "fi.txt"],
    "dotless": ["\u0131.txt", "i.txt"],
    "digraph": ["\u01c6.txt", "dz.txt"],
    # Names that one file system or another takes for one.
    "case": ["a.txt", "A.txt"],
    "case-folders": ["lib/NET45/a", "lib/net45/b"],
    "case-accents": ["é.txt", "É.txt"],
    "sigma": ["\u03c3.txt", "\u03c2.txt"],
    "kelvin": ["\u212a.txt", "k.txt"],
    "turkish": ["I\u0307.txt", "i\u0307.txt"],
    "forms": ["caf\u00e9.txt", "cafe\u0301.txt"],
    "passed-over": ["a.txt", "a\u200d.txt"],
    "short-name": ["PROGRA~1/a", "Program Files/b"],
    # Names that Windows takes for something else.
    "backslash": ["lib\\net45\\A.dll"],
    "colon": ["man/Foo::Bar.3"],
    "question": ["wwwroot/app.js?v=1"],
    "star": ["a*.txt"],
    "quotes": ['a"b.txt', "a<b>.txt", "a|b"],
    "device": ["node_modules/x/aux.js"],
    "device-folder": ["con/x.txt"],
    "device-alike": ["auxiliary.js", "console.txt", "com10.dll", "nulls"],
    "dot-at-the-end": ["LICENSE."],
    "space-at-the-end": ["a ./x"],
    "control": ["a\x1b[31m.txt"],
    # Long names.
    "deep": ["d/" * 60 + "a.txt"],
    "long-path": ["/".join([LONG] * 5) + "/a.txt"],
    "long-name": ["c" * 255],
}

REFUSED: Final = {
    "name": {
        *("escaped-dots-inside", "escaped-dots-out", "dots-inside", "dots-out", "slashes-in-front"),
        *("escaped-slash-in-front", "slash-and-escaped-slash", "root-entry", "dot-entry"),
        *("escaped-nothing", "escaped-line", "escaped-backslash", "escaped-colon", "backslash", "colon", "question"),
        *("star", "quotes", "device", "device-folder", "dot-at-the-end", "space-at-the-end", "control"),
    },
    "duplicate": {"types-twice", "meet-slashes", "meet-dot", "meet-slash", "meet-escape"},
    "collision": {
        *(
            "file-and-folder",
            "case",
            "case-accents",
            "sigma",
            "kelvin",
            "turkish",
            "forms",
            "passed-over",
            "short-name",
        ),
        "rels-case",
    },
}
"""By rule: docs/decisions/0012 and 0052 say why, where the client takes them on Linux."""


def nupkg(case: str) -> bytes:
    id = f"Case.{case}"
    nuspec = (
        f"<package><metadata><id>{id}</id><version>1.0.0</version><authors>a</authors><description>d</description>"
        "</metadata></package>"
    )
    parts = [
        Member(name, b"" if name.endswith("/") else f"{number}".encode(), method=0)
        for number, name in enumerate(INPUTS[case])
    ]
    return craft(Member(f"{id}.nuspec", nuspec.encode()), *parts, nuspec=False)


def laid_down(data: bytes, root: Path) -> dict[str, str]:
    """The tree that an agent builds of a nupkg, by path."""
    manifest, chunks = _cut(data)
    tree = IncomingTree(str(root), manifest, "target")
    for chunk in chunks:
        if manifest.index_of[chunk.id] in tree.wanted:
            tree.write(chunk)
    path = Path(tree.finish())
    tree.clear()
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


def _cut(data: bytes):
    file = io.BytesIO(data)
    ref = PackageRef(PackageId.parse("Case"), NuGetVersion.parse("1.0.0"))
    cutter = NupkgCutter(file, list(walk(file)), ManifestBuilder(ref, digests_of(file), {}))
    chunks = []
    while batch := cutter.next_batch():
        chunks += batch
    manifest: Manifest = cutter.manifest()
    return manifest, chunks


def recorded() -> dict[str, dict[str, str] | None]:
    answers: dict[str, dict[str, str] | None] = json.loads(RECORDED.read_text())
    return answers


def is_left_out_by_nuget_alone(path: str) -> bool:
    """Files of an application that NuGet takes for its own, or for OPC's, wherever they lie."""
    name = path.rpartition("/")[2]
    return name in {".rels", "[Content_Types].xml"} or name.endswith((".psmdcp", ".nupkg"))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(platform, "sync_tree", lambda *_: None)
    return tmp_path


def test_an_agent_lays_down_what_dotnet_lays_down(root: Path) -> None:
    refusals = {case: rule for rule, cases in REFUSED.items() for case in cases}
    assert refusals.keys() <= INPUTS.keys() == recorded().keys()
    for number, (case, theirs) in enumerate(recorded().items()):
        if rule := refusals.get(case):
            with pytest.raises(ArchiveError, match=f", {rule}: "):
                laid_down(nupkg(case), root / str(number))
            continue
        ours = laid_down(nupkg(case), root / str(number))
        assert theirs is not None, f"{case}: dotnet refuses it"
        assert theirs.items() <= ours.items(), case
        assert all(map(is_left_out_by_nuget_alone, ours.keys() - theirs.keys())), case


@pytest.mark.processes
@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="the client itself is asked in `make soak CHAPTER=agent`")
@pytest.mark.skipif(not ARCHIVE.exists(), reason=f"{ARCHIVE} is not there: the record is NOT compared with the client")
def test_the_record_is_what_the_client_does(tmp_path: Path) -> None:
    client = DotnetClient(tmp_path)
    found = client.lay_down({f"Case.{case}": nupkg(case) for case in INPUTS})
    answers = {
        case: None
        if (files := found[f"Case.{case}"]) is None
        else {path: data.decode() for path, data in sorted(files.items())}
        for case in INPUTS
    }
    if os.environ.get("WAYSTATION_RECORD") == "1":
        RECORDED.write_text(json.dumps(answers, indent=1, ensure_ascii=True) + "\n")
    assert answers == recorded()
