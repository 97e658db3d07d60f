from __future__ import annotations

import contextlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from harness.dotnet import needs_dotnet, restore
from harness.nupkgs import Raw, canonical_zip
from harness.nuspec_forms import FORMS, ID, NOT_RESTORED, VERSION
from harness.paths import DATA, SHARED
from harness.seed import SOAK
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import MetadataError
from relay.package.nuspec import DEPTH_MAX, ELEMENTS_MAX, NUSPEC_MAX, TEXT_MAX, parse_nuspec

NUPKGS = sorted(SHARED.glob("*/*.nupkg")) or sorted(DATA.rglob("*.nupkg"))
NS = 'xmlns="http://schemas.microsoft.com/packaging/2013/05/nuspec.xsd"'


def nuspec(inner: str = "", *, id: str = "A", version: str = "1.0", root: str = NS, attributes: str = "") -> bytes:
    text = (
        f"<package {root}><metadata {attributes}><id>{id}</id><version>{version}</version>{inner}</metadata></package>"
    )
    return text.encode()


def metadata(inner: str, **more: str) -> dict[str, Any]:
    return parse_nuspec(nuspec(inner, **more)).metadata


def test_everything_a_feed_shows_is_read() -> None:
    inner = """
      <title> T &amp; U </title><authors>Ann, Bob</authors><owners>Ann</owners><description>D</description>
      <summary>S</summary><releaseNotes>R</releaseNotes><copyright>C</copyright><language>en-US</language>
      <tags> one, two;three
      four </tags>
      <projectUrl>https://p.example/</projectUrl><iconUrl>https://i.example/</iconUrl><icon>images/i.png</icon>
      <licenseUrl>https://l.example/</licenseUrl><license type="expression">MIT OR Apache-2.0</license>
      <readme>docs/r.md</readme><requireLicenseAcceptance>True</requireLicenseAcceptance>
      <developmentDependency>false</developmentDependency><serviceable>1</serviceable>
      <packageTypes><packageType name="DotnetTool"/><packageType name="Mine" version="2.0"/></packageTypes>
      <repository type="git" url="https://g.example/r" branch="main" commit="abc"/>
      <dependencies>
        <group targetFramework="net8.0"><dependency id="B" version="[1.0, 2.0)" include="All" exclude="Build"/></group>
        <group targetFramework="net48"/>
        <group><dependency id="C.D"/></group>
      </dependencies>
      <frameworkAssemblies><frameworkAssembly assemblyName="System"/></frameworkAssemblies>
    """
    found = parse_nuspec(nuspec(inner, id="Shop.Web", version="1.2-RC+9", attributes='minClientVersion="2.12"'))
    assert (str(found.id), found.version.full) == ("Shop.Web", "1.2.0-RC+9")
    assert found.metadata == {
        "title": "T & U",
        "authors": "Ann, Bob",
        "owners": "Ann",
        "description": "D",
        "summary": "S",
        "releaseNotes": "R",
        "copyright": "C",
        "language": "en-US",
        "tags": ["one", "two", "three", "four"],
        "projectUrl": "https://p.example/",
        "iconUrl": "https://i.example/",
        "icon": "images/i.png",
        "licenseUrl": "https://l.example/",
        "license": {"type": "expression", "value": "MIT OR Apache-2.0"},
        "readme": "docs/r.md",
        "requireLicenseAcceptance": True,
        "developmentDependency": False,
        "serviceable": True,
        "packageTypes": [{"name": "DotnetTool"}, {"name": "Mine", "version": "2.0"}],
        "repository": {"type": "git", "url": "https://g.example/r", "branch": "main", "commit": "abc"},
        "minClientVersion": "2.12",
        "dependencyGroups": [
            {
                "targetFramework": "net8.0",
                "dependencies": [{"id": "B", "range": "[1.0, 2.0)", "include": "All", "exclude": "Build"}],
            },
            {"targetFramework": "net48", "dependencies": []},
            {"dependencies": [{"id": "C.D", "range": ""}]},
        ],
    }


def test_only_what_is_present_is_told() -> None:
    assert metadata("") == {}
    assert metadata("<title/><tags> </tags><repository/><dependencies/><packageTypes/>") == {}


def test_dependencies_without_groups_are_one_group_for_all_frameworks() -> None:
    inner = '<dependencies><dependency id="B" version="1.0"/><dependency id="C"/></dependencies>'
    assert metadata(inner)["dependencyGroups"] == [
        {"dependencies": [{"id": "B", "range": "1.0"}, {"id": "C", "range": ""}]},
    ]


@pytest.mark.parametrize("year", ["2010/07", "2011/08", "2011/10", "2012/06", "2013/01", "2013/05"])
def test_each_nuspec_namespace_is_read(year: str) -> None:
    root = f'xmlns="http://schemas.microsoft.com/packaging/{year}/nuspec.xsd"'
    assert metadata("<title>T</title>", root=root) == {"title": "T"}


def test_a_nuspec_without_namespace_or_with_one_only_inside_is_read() -> None:
    assert metadata("<title>T</title>", root="") == {"title": "T"}
    assert metadata("<title>T</title>", root="", attributes=NS) == {"title": "T"}


def test_elements_of_other_namespaces_say_nothing() -> None:
    assert metadata('<x:title xmlns:x="urn:x">T</x:title><x:id xmlns:x="urn:x">Evil</x:id>') == {}


def test_a_byte_order_mark_and_a_declaration_are_read() -> None:
    for encoding in ("utf-8", "UTF-8", "us-ascii", "utf-16"):
        data = f'<?xml version="1.0" encoding="{encoding}"?>\n'.encode() + nuspec()
        assert str(parse_nuspec(b"\xef\xbb\xbf" + data).id) == "A"


BOMB = '<!DOCTYPE p [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;">]>'
QUADRATIC = f'<!DOCTYPE p [<!ENTITY a "{"a" * 50_000}">]>'
EXTERNAL = '<!DOCTYPE p [<!ENTITY e SYSTEM "file:///etc/passwd">]>'

BAD_XML: dict[str, bytes] = {
    "billion-laughs": BOMB.encode() + nuspec("<title>&c;</title>"),
    "quadratic-blow-up": QUADRATIC.encode() + nuspec("<title>" + "&a;" * 1000 + "</title>"),
    "external-entity": EXTERNAL.encode() + nuspec("<title>&e;</title>"),
    "external-document-type": b'<!DOCTYPE p SYSTEM "http://127.0.0.1/x.dtd">' + nuspec(),
    "document-type-only": b"<!DOCTYPE package>" + nuspec(),
    "undefined-entity": nuspec("<title>&nope;</title>"),
    "utf-16-cut": nuspec().decode().encode("utf-16")[:-1],
    "utf-7": b'<?xml version="1.0" encoding="utf-7"?>' + nuspec("<title>+ADw-x+AD4-</title>"),
    "unknown-encoding": b'<?xml version="1.0" encoding="klingon"?>' + nuspec(),
    "not-shift-jis": b'<?xml version="1.0" encoding="shift_jis"?>' + nuspec("<title>\x81</title>"),
    "undefined-byte-in-the-id": b'<?xml version="1.0" encoding="windows-1252"?>' + nuspec(id="A\x81"),
    "not-utf-8": nuspec().replace(b"</id>", b"\xff</id>"),
    "deep": nuspec("<a>" * 1000 + "</a>" * 1000),
    "very-deep": b"<a>" * 150_000 + b"</a>" * 140_000,
    "attributes": nuspec("<title " + " ".join(f'a{n}=""' for n in range(100_000)) + "/>"),
    "elements": nuspec("<files>" + "<f/>" * ELEMENTS_MAX + "</files>"),
    "long-id": nuspec(id="A" * (TEXT_MAX + 1)),
    "long-version": nuspec(version="1" * (TEXT_MAX + 1)),
    "too-large": nuspec("<title>" + " " * NUSPEC_MAX + "</title>"),
    "empty": b"",
    "not-xml": b"PK\x03\x04",
    "cut-off": nuspec()[:-5],
    "more-after-the-end": nuspec() + b"<package/>",
    "nul": nuspec("<title>\0</title>"),
    "nul-by-reference": nuspec("<title>&#0;</title>"),
    "two-ids": nuspec("<id>B</id>"),
    "two-versions": nuspec("<version>2.0</version>"),
    "two-metadata": b"<package><metadata/><metadata/></package>",
    "no-metadata": b"<package/>",
    "no-id": b"<package><metadata><version>1</version></metadata></package>",
    "no-version": b"<package><metadata><id>A</id></metadata></package>",
    "id-of-others-only": b'<package><metadata><x:id xmlns:x="urn:x">A</x:id><version>1</version></metadata></package>',
    "prefixed": b'<n:package xmlns:n="urn:x"><n:metadata><n:id>A</n:id><n:version>1</n:version></n:metadata></n:package>',
    "bad-id": nuspec(id="../x"),
    "spaced-id": nuspec(id=" A "),
    "bad-version": nuspec(version="1.0.0-01"),
    "path-as-version": nuspec(version="1.0.0/../../x"),
}


LEFT_OUT: dict[str, tuple[str, dict[str, Any], str]] = {
    "flag": ("<serviceable>perhaps</serviceable>", {}, "<serviceable> is 'perhaps', neither true nor false"),
    "license": ("<license>MIT</license>", {}, "<license> is of type '', neither 'expression' nor 'file'"),
    "text": (f"<title>{'x' * (TEXT_MAX + 1)}</title>", {}, "<title> has a text of 65537 characters, more than 65536"),
    "attribute": (
        f'<repository type="git" url="{"x" * (TEXT_MAX + 1)}"/>',
        {"repository": {"type": "git"}},
        "<repository> has url of 65537 characters, more than 65536",
    ),
    "type": (
        '<packageTypes><packageType/><packageType name="Mine"/></packageTypes>',
        {"packageTypes": [{"name": "Mine"}]},
        "<packageType> has no name",
    ),
    "nameless dependency": (
        '<dependencies><dependency/><dependency id="B"/></dependencies>',
        {"dependencyGroups": [{"dependencies": [{"id": "B", "range": ""}]}]},
        "<dependency> has no id",
    ),
    "dependency": (
        '<dependencies><group><dependency id=".."/></group></dependencies>',
        {"dependencyGroups": [{"dependencies": []}]},
        "<dependency> is of '..', which is no package's id",
    ),
    "loose dependency": (
        '<dependencies><group targetFramework="net8.0"/><dependency id="B"/></dependencies>',
        {"dependencyGroups": [{"targetFramework": "net8.0", "dependencies": []}]},
        "<dependencies> has 1 beside its groups: the groups count",
    ),
    "second title": (
        "<title>a</title><title>b</title>",
        {"title": "a"},
        "<title> stands 2 times: the first one counts",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_does_not_read_is_left_out_and_named_and_the_rest_stays(name: str) -> None:
    inner, kept, told = LEFT_OUT[name]
    found = parse_nuspec(nuspec(f"<owners>Ann</owners>{inner}<summary>S</summary>"))
    assert found.left_out == (told,)
    assert found.metadata == {"owners": "Ann", "summary": "S", **kept}


def test_however_much_does_not_read_a_few_lines_say_it() -> None:
    found = parse_nuspec(nuspec("<dependencies>" + "<dependency/>" * 1000 + "</dependencies>"))
    assert found.left_out == ("<dependency> has no id",) * 50 + ("950 more",)
    assert found.metadata == {}


AMBIGUOUS = {"id twice", "version twice", "metadata twice"}
"""What NuGet restores, by the first of several, and we refuse: who an archive is, is said once."""


@pytest.mark.parametrize("name", sorted(FORMS.keys() - NOT_RESTORED - AMBIGUOUS))
def test_what_nuget_restores_is_taken(name: str) -> None:
    found = parse_nuspec(FORMS[name])
    assert (found.id.key, str(found.version)) == (ID.lower(), VERSION)
    assert json.loads(json.dumps(found.metadata)) == found.metadata


def test_each_encoding_gives_the_same_text() -> None:
    names = [name for name in FORMS if "utf" in name or "windows-1252" in name or "iso-8859-1" in name]
    told = {name: parse_nuspec(FORMS[name]).metadata for name in set(names) - {"utf-7"} - NOT_RESTORED}
    assert {metadata["description"] for metadata in told.values()} == {"Grüße"}
    assert parse_nuspec(FORMS["shift_jis"]).metadata["title"] == "日本"
    assert parse_nuspec(FORMS["gb18030"]).metadata["title"] == "中文"
    assert parse_nuspec(FORMS["koi8-r"]).metadata["title"] == "Привет"


@pytest.mark.soak
@pytest.mark.processes
@pytest.mark.skipif(not SOAK, reason="NuGet is asked again in `make soak`")
@needs_dotnet
def test_nuget_restores_the_same_today(tmp_path: Path) -> None:
    nupkgs = {
        name: canonical_zip(Raw(f"{ID}.nuspec", data), Raw("content/a.txt", b"a")) for name, data in FORMS.items()
    }
    laid = restore(tmp_path, nupkgs, ID, VERSION)
    assert {name for name, files in laid.items() if files is None} == NOT_RESTORED
    assert all(files["content/a.txt"] == b"a" for files in laid.values() if files)


@pytest.mark.parametrize("name", BAD_XML)
def test_a_bad_nuspec_is_refused(name: str) -> None:
    with pytest.raises(MetadataError):
        parse_nuspec(BAD_XML[name])


def test_the_bounds_are_reached_by_honest_texts() -> None:
    assert metadata("<releaseNotes>" + "x" * TEXT_MAX + "</releaseNotes>")["releaseNotes"] == "x" * TEXT_MAX
    depth = DEPTH_MAX - 2
    assert metadata("<files>" + "<a>" * (depth - 1) + "</a>" * (depth - 1) + "</files>") == {}


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_nuspec_is_read_or_refused(data: st.DataObject) -> None:
    good = bytearray(nuspec('<title>T</title><dependencies><group><dependency id="B"/></group></dependencies>'))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MetadataError):
        assert json.dumps(parse_nuspec(bytes(good)).metadata)


@pytest.mark.skipif(not NUPKGS, reason="no real packages in ../shared/data or tests/data")
@pytest.mark.parametrize("path", NUPKGS, ids=lambda path: path.stem)
def test_a_real_nuspec_is_read(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if "/" not in name and name.endswith(".nuspec")]
        found = parse_nuspec(archive.read(name))
    assert path.name.lower() == f"{found.id.key}.{found.version.url}.nupkg"
    assert found.metadata["authors"]
    assert found.metadata["description"]
    assert json.loads(json.dumps(found.metadata)) == found.metadata
