"""`waystation package …` and `waystation trust init` as somebody at a terminal, or a script, meets them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import pty
import re
import socket
import stat
import subprocess
import zipfile
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from harness.crafted import Member, craft
from harness.feed import body, running_feed
from harness.packages import deflated, make_nupkg, noise, nuspec
from harness.process import WAYSTATION, Done, environment, run
from harness.relays import RelayProcess

from relay.package.zip_reader import read_part, walk

FILES = {"lib/web.dll": noise("web", 300_000), "tools/run.sh": b"#!/bin/sh\n", "readme.txt": b"hello\n" * 100}
ESCAPE = "\x1b"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trust folder that all tests here only read."""
    home = tmp_path_factory.mktemp("keys")
    assert run(home, "trust", "init").code == 0
    return home / "trust"


@pytest.fixture
def home(tmp_path: Path, keys: Path) -> Path:
    """A home with keys and no depot yet."""
    made = tmp_path / "home"
    made.mkdir()
    (made / "trust").symlink_to(keys)
    return made


@pytest.fixture(scope="module")
def relays(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RelayProcess]]:
    folder = tmp_path_factory.mktemp("relays")
    with RelayProcess(folder / "fra") as fra, RelayProcess(folder / "iad") as iad:
        yield [fra, iad]


def add(home: Path, *nupkgs: str) -> list[dict[str, Any]]:
    added: list[dict[str, Any]] = run(home, "package", "add", *nupkgs, "--json").json["packages"]
    return added


def listed(home: Path) -> list[str]:
    packages = run(home, "package", "list", "--json").json["packages"]
    return [f"{package['id']} {package['version']}" for package in packages]


def check_told(done: Done, code: int, *words: str) -> None:
    """It ended with `code`, said each of the `words` on standard error, and showed no inside of the program."""
    assert done.code == code, done.err
    for word in words:
        assert word in done.err
    assert "Traceback" not in done.err
    assert ESCAPE not in done.err + done.out


# --- trust


def test_trust_init_makes_keys_that_only_their_owner_reads_and_says_what_is_next(tmp_path: Path) -> None:
    done = run(tmp_path, "trust", "init")
    assert done.code == 0
    assert re.search(r"^package key  sha256:[0-9a-f]{64}$", done.out, re.MULTILINE)
    assert "agent init --trust" in done.out
    for name in ("package.key", "order.key"):
        assert stat.S_IMODE((tmp_path / "trust" / name).stat().st_mode) == 0o600


def test_a_second_trust_init_refuses_and_keeps_the_keys(tmp_path: Path) -> None:
    assert run(tmp_path, "trust", "init").code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "trust").iterdir()}
    check_told(run(tmp_path, "trust", "init"), 1, str(tmp_path / "trust"), "never overwritten")
    assert {path.name: path.read_bytes() for path in (tmp_path / "trust").iterdir()} == before
    assert set(before) == {"package.key", "order.key", "trust.json"}


def test_a_key_that_others_may_read_signs_nothing(tmp_path: Path) -> None:
    assert run(tmp_path, "trust", "init").code == 0
    key = tmp_path / "trust/package.key"
    key.chmod(0o640)
    check_told(
        run(tmp_path, "package", "add", make_nupkg(tmp_path, FILES)), 1, str(key), "open to others (mode 0640)", "chmod"
    )
    assert listed(tmp_path) == []


def test_without_a_key_adding_says_how_to_make_one(tmp_path: Path) -> None:
    done = run(tmp_path, "package", "add", make_nupkg(tmp_path, FILES))
    check_told(done, 1, str(tmp_path / "trust/package.key"), "waystation trust init")
    assert not (tmp_path / "depot").exists()


def test_scenario_37_a_hostile_package_is_refused_and_writes_nothing_outside_the_depot(tmp_path: Path) -> None:
    home, outside = tmp_path / "home", tmp_path / "outside"
    outside.mkdir()
    assert run(home, "trust", "init").code == 0
    before = sorted(path for path in tmp_path.rglob("*") if home not in path.parents)
    link = Member("out", str(outside).encode(), made_by=3 << 8, attributes=(stat.S_IFLNK | 0o777) << 16)
    # Zeros by the megabyte, each deflated for itself, so that ten gigabytes are one piece ten thousand times.
    engine = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = engine.compress(bytes(1 << 20)) + engine.flush(zlib.Z_FULL_FLUSH)
    says = {"size": 3400 << 20}
    bomb = Member("zeros", raw=piece * 10_000 + b"\x03\x00", local={"size": 100}, central={"size": 100})
    honest = [Member(f"zeros-{n}", raw=piece * 3400 + b"\x03\x00", local=says, central=says) for n in range(3)]
    for members, why in (
        ([Member("../../etc/x", b"1")], "../../etc/x"),
        ([Member(f"/{outside}/x", b"1")], "outside/x"),
        ([link], "out"),
        ([bomb], "zeros"),
        (honest, "inflates to 10"),
    ):
        nupkg = tmp_path / "home" / "hostile.nupkg"
        nupkg.write_bytes(craft(*members))
        check_told(run(home, "package", "add", nupkg), 1, why)
        nupkg.unlink()
    assert listed(home) == []
    assert sorted(path for path in tmp_path.rglob("*") if home not in path.parents) == before
    assert sum(path.stat().st_size for path in home.rglob("*") if path.is_file()) < 1 << 20


# --- pack


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "publish"
    for name, data in FILES.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(data)
    (made / "tools/run.sh").chmod(0o755)
    return made


def pack(home: Path, folder: Path, output: Path, *more: str) -> Done:
    return run(
        home,
        "package",
        "pack",
        folder,
        "--id",
        "Acme.Web",
        "--version",
        "1.4.2",
        "--output",
        output,
        *more,
        TZ="Asia/Tokyo",
    )


def test_pack_gives_the_same_bytes_whenever_and_wherever(home: Path, folder: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.nupkg", tmp_path / "two.nupkg"
    document = pack(home, folder, one, "--json").json
    assert document == {"format": 1, "file": str(one), "size": one.stat().st_size}
    os.utime(folder / "readme.txt", (1, 1))
    moved = folder.rename(tmp_path / "elsewhere")
    assert pack(home, moved, two).code == 0
    assert one.read_bytes() == two.read_bytes()
    with one.open("rb") as file:
        packed = {entry.path: b"".join(read_part(file, entry)) for entry in walk(file)}
    assert {name: packed[name] for name in FILES} == FILES
    assert stat.S_IMODE(one.stat().st_mode) == 0o644


def test_what_was_packed_can_be_added(home: Path, folder: Path, tmp_path: Path) -> None:
    assert pack(home, folder, tmp_path / "x.nupkg").code == 0
    (added,) = add(home, str(tmp_path / "x.nupkg"))
    assert (added["id"], added["version"]) == ("Acme.Web", "1.4.2")
    shown = run(home, "package", "show", "acme.web", "1.4.2", "--json").json
    assert shown["executable"] == ["tools/run.sh"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--id", "a/b", "--version", "1.0.0"], ["'a/b' is not a valid package id"]),
        (["--id", "Acme.Web", "--version", "one"], ["'one' is not a valid version"]),
        (["--id", "Acme.Web"], ["--version"]),
    ],
)
def test_pack_refuses_a_name_that_is_none_and_writes_nothing(
    home: Path, folder: Path, tmp_path: Path, options: list[str], words: list[str]
) -> None:
    before = sorted(os.listdir(tmp_path))
    check_told(run(home, "package", "pack", folder, *options, "--output", tmp_path / "x.nupkg"), 2, *words)
    assert sorted(os.listdir(tmp_path)) == before


def test_pack_names_a_folder_that_is_missing(home: Path, tmp_path: Path) -> None:
    check_told(pack(home, tmp_path / "gone", tmp_path / "x.nupkg"), 2, "gone", "does not exist")
    assert not (tmp_path / "x.nupkg").exists()


def test_pack_refuses_a_link_and_leaves_no_file(home: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "link").symlink_to("/etc/passwd")
    before = sorted(os.listdir(tmp_path))
    check_told(pack(home, folder, tmp_path / "x.nupkg"), 2, "'link'", "a link or a special file")
    assert sorted(os.listdir(tmp_path)) == before


def test_pack_says_where_it_cannot_write(home: Path, folder: Path, tmp_path: Path) -> None:
    check_told(pack(home, folder, tmp_path / "gone/x.nupkg"), 2, str(tmp_path / "gone"), "No such file or directory")


# --- add


def test_several_files_are_added_and_shown(home: Path, tmp_path: Path) -> None:
    nupkgs = [make_nupkg(tmp_path, FILES, version=version) for version in ("1.0.0", "1.0.1")]
    done = run(home, "package", "add", *nupkgs)
    assert (done.code, done.err) == (0, "")
    assert re.findall(r"^added  (\S+ \S+)  sha256:[0-9a-f]{64}  ", done.out, re.MULTILINE) == [
        "Acme.Web 1.0.0",
        "Acme.Web 1.0.1",
    ]
    again = run(home, "package", "add", *nupkgs)
    assert again.out == done.out.replace("added  ", "was there  ")
    assert listed(home) == ["Acme.Web 1.0.0", "Acme.Web 1.0.1"]


def test_the_json_of_add_says_what_was_stored(home: Path, tmp_path: Path) -> None:
    nupkg = make_nupkg(tmp_path, FILES)
    first, again = add(home, nupkg)[0], add(home, nupkg)[0]
    assert first["nupkg_sha256"] == hashlib.sha256(Path(nupkg).read_bytes()).hexdigest()
    assert first["size"] == os.path.getsize(nupkg)
    assert first["provenance"] == {"how": "added", "source": "Acme.Web.1.0.0.nupkg", "verified_by": ""}
    assert (first["new"], again["new"]) == (True, False)
    assert (first["chunks_stored"], again["chunks_stored"]) == (first["chunks"], 0)


def test_what_trees_leave_out_is_told(home: Path, tmp_path: Path) -> None:
    psmdcp = "package/services/metadata/core-properties/0123.psmdcp"
    files = FILES | {
        "package/start.js": b"run()",
        "Package/help.txt": b"help",
        psmdcp: b"<x/>",
        "odd\u202egpj.exe": b"",
    }
    nupkg = make_nupkg(tmp_path, files)
    left_out = ["_rels/.rels", "[Content_Types].xml", psmdcp, "Acme.Web.nuspec"]
    told = re.search(r"^  not in trees: (.*)$", run(home, "package", "add", nupkg).out, re.MULTILINE)
    assert told is not None
    assert sorted(told[1].split(", ")) == sorted(left_out)
    assert sorted(add(home, nupkg)[0]["left_out"]) == sorted(left_out)
    shown = run(home, "package", "show", "Acme.Web", "1.0.0")
    assert re.search(rf"^  not in it +{re.escape(told[1])}$", shown.out, re.MULTILINE)
    document = run(home, "package", "show", "Acme.Web", "1.0.0", "--json").json
    assert sorted(document["left_out"]) == sorted(left_out)
    assert document["tree_bytes"] == sum(len(data) for path, data in files.items() if path != psmdcp)


def test_what_a_package_inflates_to_is_bounded_by_the_user(home: Path, tmp_path: Path) -> None:
    nupkg = deflated(tmp_path, {"template.mdf": bytes(3 << 20)})
    assert os.path.getsize(nupkg) < 10_000
    for most in ("1000", "3 MB", "3MB", "2.9MiB"):
        check_told(run(home, "package", "add", nupkg, "--max-inflated", most), 1, "refused archive, size: inflates to")
    assert listed(home) == []
    for wrong in ("", "x", "1x", "-1", "1e9", "1 KiBB", "nan"):
        check_told(run(home, "package", "add", nupkg, "--max-inflated", wrong), 2, "is not a size")
    for most in ("4MB", "3.1 MiB", "1GiB", "5TiB", "4000000", "4000000B"):
        assert run(home, "package", "add", nupkg, "--max-inflated", most).code == 0
    assert listed(home) == ["Acme.Web 1.0.0"]


def test_what_of_a_nuspec_cannot_be_read_is_told_by_add_and_show(home: Path, tmp_path: Path) -> None:
    inner = '<license>MIT</license><dependencies><dependency id="\x1b[2J"/></dependencies>'.replace(ESCAPE, "&#x9b;")
    text = nuspec().decode().replace("</metadata>", f"{inner}<title>Grüße</title></metadata>")
    nupkg = tmp_path / "odd.nupkg"
    with zipfile.ZipFile(nupkg, "w") as archive:
        archive.writestr("Acme.Web.nuspec", text.replace("utf-8", "utf-16").encode("utf-16"))
        archive.writestr("a.txt", b"a")
    told = [
        "<license> is of type '', neither 'expression' nor 'file'",
        "<dependency> is of '\\x9b[2J', which is no package's id",
    ]
    done = run(home, "package", "add", nupkg)
    check_told(done, 0)
    assert [line.split(": ", 1)[1] for line in done.out.splitlines() if "left out of its metadata" in line] == told
    assert add(home, str(nupkg))[0]["metadata_left_out"] == told
    shown = run(home, "package", "show", "Acme.Web", "1.0.0", "--json").json
    assert shown["metadata_left_out"] == told
    assert shown["metadata"]["title"] == "Grüße"
    assert all(line in run(home, "package", "show", "Acme.Web", "1.0.0").out for line in told)


def test_with_a_file_that_is_missing_nothing_is_added(home: Path, tmp_path: Path) -> None:
    done = run(home, "package", "add", make_nupkg(tmp_path, FILES), tmp_path / "gone.nupkg")
    check_told(done, 2, f"{tmp_path}/gone.nupkg is not a file", "Expected the path of a .nupkg file")
    assert listed(home) == []


def test_a_file_that_is_no_nupkg_is_named_and_the_others_are_added(home: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.nupkg"
    page.write_text("<html>Log in</html>")
    good = make_nupkg(tmp_path, FILES)
    done = run(home, "package", "add", page, good)
    check_told(done, 1, f"{page}: refused archive", "not a zip file")
    assert "added  Acme.Web 1.0.0" in done.out
    assert listed(home) == ["Acme.Web 1.0.0"]
    told = run(home, "package", "add", page, good, "--json")
    document = json.loads(told.out)
    assert told.code == 1
    assert [entry["file"] for entry in document["failed"]] == [str(page)]
    assert [entry["new"] for entry in document["packages"]] == [False]


def test_other_bytes_under_the_same_version_are_refused_with_the_next_step(home: Path, tmp_path: Path) -> None:
    add(home, make_nupkg(tmp_path, FILES))
    other = make_nupkg(tmp_path / "other.nupkg", FILES | {"readme.txt": b"bye"})
    check_told(run(home, "package", "add", other), 1, other, "Acme.Web 1.0.0", "give the new build a new version")


@pytest.mark.parametrize(
    "words", [[], ["--feed", "http://127.0.0.1:1/", "Acme.Web"], ["x.nupkg", "--sha512", "00"], ["--no-such-option"]]
)
def test_an_add_that_makes_no_sense_is_a_usage_error(home: Path, words: list[str]) -> None:
    done = run(home, "package", "add", *words)
    check_told(done, 2)
    assert done.err
    assert not (home / "depot").exists()


def test_what_a_file_is_called_never_drives_the_terminal(home: Path, tmp_path: Path) -> None:
    nupkg = make_nupkg(tmp_path / f"{ESCAPE}]0;owned\x07.nupkg", FILES)
    bad = tmp_path / f"{ESCAPE}[2J.nupkg"
    bad.write_text("no zip")
    for done in (run(home, "package", "add", nupkg, bad), run(home, "package", "list")):
        assert done.out
        assert ESCAPE not in done.out + done.err
        assert "\x07" not in done.out + done.err
    assert "owned" in done.out


def test_what_a_nuspec_says_never_drives_the_terminal(home: Path, tmp_path: Path) -> None:
    # XML forbids C0 controls, but not U+009B, which terminals take for an escape and a bracket.
    path = str(tmp_path / "x.nupkg")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("Acme.Web.nuspec", nuspec().replace(b"For tests", "\x9b2J red".encode()))
    add(home, path)
    done = run(home, "package", "show", "Acme.Web", "1.0.0")
    assert "2J red" in done.out
    assert "\x9b" not in done.out


# --- add --feed

FEED_ID, FEED_VERSION = "Shop.Web", "1.0.1-RC.1"
FEED_PATH = "/flat/shop.web/1.0.1-rc.1/shop.web.1.0.1-rc.1.nupkg"


@pytest.fixture
def offered(tmp_path: Path) -> bytes:
    return Path(make_nupkg(tmp_path / "offered.nupkg", FILES, id=FEED_ID, version=FEED_VERSION)).read_bytes()


@pytest.fixture
async def feed(offered: bytes) -> AsyncIterator[Any]:
    async with running_feed() as server:
        server.serve(FEED_PATH, body(offered))
        yield server


async def add_from(feed: Any, home: Path, *more: str) -> Done:
    words = ["package", "add", "--feed", feed.index, FEED_ID, FEED_VERSION, *more]
    return await asyncio.to_thread(run, home, *words)


def sha512(data: bytes) -> bytes:
    return hashlib.sha512(data).digest()


async def test_a_package_of_a_feed_is_held_against_the_hash_that_the_feed_states(
    feed: Any, home: Path, offered: bytes
) -> None:
    feed.serve_registration(packageHash=base64.b64encode(sha512(offered)).decode(), packageHashAlgorithm="SHA512")
    (added,) = (await add_from(feed, home, "--json")).json["packages"]
    assert added["verified_by"] == "feed"
    assert added["provenance"] == {"how": "added", "source": feed.base + FEED_PATH, "verified_by": "feed"}
    assert added["nupkg_sha256"] == hashlib.sha256(offered).hexdigest()


async def test_a_package_of_a_feed_with_another_hash_than_it_states_is_refused(feed: Any, home: Path) -> None:
    feed.serve_registration(packageHash=base64.b64encode(bytes(64)).decode(), packageHashAlgorithm="SHA512")
    check_told(await add_from(feed, home), 1, FEED_ID, "another SHA-512 than the feed states")
    assert FEED_PATH in feed.paths
    assert listed(home) == []


async def test_the_hash_that_is_given_is_held_against_a_package_of_a_feed(
    feed: Any, home: Path, offered: bytes
) -> None:
    check_told(await add_from(feed, home, "--sha512", bytes(64).hex()), 1, FEED_ID, "another SHA-512 than given")
    check_told(await add_from(feed, home, "--sha512", "beef"), 2, "SHA-512")
    assert listed(home) == []
    (added,) = (await add_from(feed, home, "--sha512", sha512(offered).hex(), "--json")).json["packages"]
    assert added["verified_by"] == "given"


async def test_a_package_that_nothing_but_the_connection_vouched_for_is_shown_as_such(feed: Any, home: Path) -> None:
    assert (await add_from(feed, home)).code == 0
    shown = await asyncio.to_thread(run, home, "package", "show", FEED_ID, FEED_VERSION)
    assert "transport" in shown.out
    assert feed.base + FEED_PATH in shown.out


async def test_a_feed_that_sends_another_package_is_refused(feed: Any, home: Path, tmp_path: Path) -> None:
    feed.serve(FEED_PATH, body(Path(make_nupkg(tmp_path / "x.nupkg", FILES)).read_bytes()))
    check_told(await add_from(feed, home), 1, "Acme.Web 1.0.0", f"where {FEED_ID} {FEED_VERSION} was expected")
    assert listed(home) == []


async def test_what_a_feed_does_not_have_is_told_by_its_name(feed: Any, home: Path) -> None:
    feed.serve(FEED_PATH, None)
    check_told(await add_from(feed, home), 1, f"{FEED_ID} {FEED_VERSION}", feed.base)


# --- list, show, remove


def test_an_empty_depot_says_how_to_fill_it(home: Path) -> None:
    done = run(home, "package", "list")
    assert (done.code, done.err) == (0, "")
    assert "waystation package add FILE" in done.out
    assert run(home, "package", "list", "--json").json == {"format": 1, "packages": []}


def test_packages_are_listed_by_id_and_then_by_version(home: Path, tmp_path: Path) -> None:
    add(home, *(make_nupkg(tmp_path, FILES, version=version) for version in ("1.10.0", "1.9.0")))
    add(home, make_nupkg(tmp_path, FILES, id="Acme.Api"))
    lines = run(home, "package", "list").out.splitlines()
    assert lines[0].split() == ["package", "version", "size", "since", "from"]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["Acme.Api", "1.0.0"],
        ["Acme.Web", "1.9.0"],
        ["Acme.Web", "1.10.0"],
    ]


def test_show_tells_what_a_package_is(home: Path, tmp_path: Path) -> None:
    nupkg = make_nupkg(tmp_path, FILES)
    added = add(home, nupkg)[0]
    shown = run(home, "package", "show", "ACME.WEB", "1.0").out
    for word in (added["manifest"], added["nupkg_sha256"], "Acme.Web 1.0.0", "added Acme.Web.1.0.0.nupkg", "For tests"):
        assert word in shown
    assert re.search(r"signed\s+yes", shown)
    document = run(home, "package", "show", "ACME.WEB", "1.0", "--json").json
    assert document["nupkg_sha512"] == base64.b64encode(sha512(Path(nupkg).read_bytes())).decode()
    assert document["tree_bytes"] == sum(map(len, FILES.values()))


def test_show_and_remove_name_the_versions_that_there_are(home: Path, tmp_path: Path) -> None:
    add(home, make_nupkg(tmp_path, FILES))
    for command in ("show", "remove"):
        check_told(
            run(home, "package", command, "Acme.Web", "2.0.0"), 1, "Acme.Web 2.0.0 is not here", "Here are: 1.0.0"
        )
        check_told(run(home, "package", command, "Acme.Web", "two"), 2, "'two' is not a valid version")
    assert listed(home) == ["Acme.Web 1.0.0"]


def test_a_removed_package_is_gone(home: Path, tmp_path: Path) -> None:
    add(home, make_nupkg(tmp_path, FILES), make_nupkg(tmp_path, FILES, version="1.0.1"))
    assert "removed Acme.Web 1.0.0" in run(home, "package", "remove", "Acme.Web", "1.0.0").out
    assert listed(home) == ["Acme.Web 1.0.1"]
    check_told(run(home, "package", "remove", "Acme.Web", "1.0.0"), 1, "Acme.Web 1.0.0 is not here")


def test_a_folder_that_is_no_depot_is_left_alone(home: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    check_told(run(home, "package", "list", "--depot", other), 2, str(other), "precious.txt", "name another folder")
    assert os.listdir(other) == ["precious.txt"]


# --- replicate


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def package(home: Path, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """The id of a package in the depot, that no other test knows."""
    id = f"Acme.{hashlib.sha256(request.node.name.encode()).hexdigest()[:8]}"
    add(home, make_nupkg(tmp_path, FILES | {"own.bin": noise(id, 200_000)}, id=id))
    return id


def held_by(home: Path, relay: RelayProcess) -> set[str]:
    return {entry["id"] for entry in run(home, "relay", "status", "--relay", relay.url, "--json").json["packages"]}


def test_a_package_goes_to_every_relay_and_again_sends_nothing(
    home: Path, package: str, relays: list[RelayProcess]
) -> None:
    to = [word for relay in relays for word in ("--relay", relay.url)]
    first = run(home, "package", "replicate", package, "1.0.0", *to, "--json").json
    assert (first["format"], first["id"], first["version"], first["failed"]) == (1, package, "1.0.0", [])
    assert [entry["relay"] for entry in first["relays"]] == [relay.url for relay in relays]
    for entry in first["relays"]:
        assert {"relay", "package_bytes", "chunks", "chunks_sent", "wire_bytes", "seconds"} <= set(entry)
        assert entry["wire_bytes"] > 200_000
        assert 0 < entry["chunks_sent"] <= entry["chunks"]
    again = run(home, "package", "replicate", package, "1.0.0", *to, "--json").json
    for entry in again["relays"]:
        assert (entry["chunks_sent"], entry["payload_bytes"]) == (0, 0)
        assert entry["wire_bytes"] < 10_000
    for relay in relays:
        assert package in held_by(home, relay)
    shown = run(home, "package", "replicate", package, "1.0.0", *to)
    assert [line.split()[0] for line in shown.out.splitlines()] == ["relay", *(relay.url for relay in relays)]
    assert shown.err == ""


# --- replicate: plans


def versions_of(home: Path, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """The id of a package with two versions in the depot, the second much like the first."""
    id = f"Acme.{hashlib.sha256(request.node.name.encode()).hexdigest()[:8]}"
    old = bytearray(noise(id, 600_000))
    add(home, make_nupkg(tmp_path, {"own.dll": bytes(old)}, id=id))
    old[300_000:300_100] = bytes(100)
    add(home, make_nupkg(tmp_path, {"own.dll": bytes(old)}, id=id, version="1.1.0"))
    return id


def test_a_dry_run_shows_the_arithmetic_and_sends_nothing(
    home: Path, tmp_path: Path, relays: list[RelayProcess], request: pytest.FixtureRequest
) -> None:
    id, relay = versions_of(home, tmp_path, request), relays[0]
    run(home, "package", "replicate", id, "1.0.0", "--relay", relay.url)
    # Without a limit, a loopback may be too fast for differences to be weighed up at all.
    words = ["package", "replicate", id, "1.1.0", "--relay", relay.url, "--dry-run", "--limit", "100Mbit"]
    shown = run(home, *words)
    assert shown.code == 0
    for word in (relay.url, "Mbit/s (", "building on 1.0.0", "chosen", "hdiff:19", "whole file", "rsync-like"):
        assert word in shown.out
    document = run(home, *words, "--json").json
    assert document["dry_run"] is True
    [one] = document["relays"]
    explained = one["explained"]
    assert explained["base"] == "1.0.0"
    assert explained["missing_bytes"] > 600_000
    rows = {row["encoding"]: row for row in explained["rows"]}
    assert {"raw", "zstd:3", "zstd:19", "zstd-prefix:3", "hdiff:19"} <= set(rows)
    [chosen] = [row for row in rows.values() if row["chosen"]]
    assert chosen["encoding"] == explained["encoding"]
    assert rows["zstd-prefix:3"]["payload_bytes"] < 2000 < rows["zstd:3"]["payload_bytes"]
    assert explained["alternatives"]["whole_file"] == one["package_bytes"]
    assert explained["alternatives"]["rsync_like_estimate"] > 600_000
    versions = run(home, "relay", "status", "--relay", relay.url, "--json").json["packages"]
    assert [entry["version"] for entry in versions if entry["id"] == id] == ["1.0.0"]


def test_a_forced_encoding_is_used_and_the_ledger_says_so(
    home: Path, tmp_path: Path, relays: list[RelayProcess], request: pytest.FixtureRequest
) -> None:
    id, relay = versions_of(home, tmp_path, request), relays[0]
    first = ["package", "replicate", id, "1.0.0", "--relay", relay.url, "--encoding", "hdiff", "--explain", "--json"]
    [one] = run(home, *first).json["relays"]
    assert "nothing to build on" in one["explained"]["note"]
    assert [entry["encoding"] for entry in one["encodings"]] == ["zstd"]
    next_one = ["package", "replicate", id, "1.1.0", "--relay", relay.url, "--encoding", "hdiff:9", "--json"]
    [one] = run(home, *next_one).json["relays"]
    assert "explained" not in one
    assert [entry["encoding"] for entry in one["encodings"]] == ["hdiff"]
    assert one["payload_bytes"] == sum(entry["payload_bytes"] for entry in one["encodings"]) < 1000
    assert one["wire_bytes"] == one["payload_bytes"] + one["overhead_bytes"]
    assert one["fallbacks"] == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--encoding", "gzip"], "'gzip' is no encoding"),
        (["--limit", "0"], "--limit"),
        (["--limit", "-1"], "--limit"),
        (["--limit", "2mbit"], "such as 50Mbit"),
        (["--patience", "nan"], "such as 90s"),
    ],
)
def test_an_encoding_or_limit_that_there_is_not_is_a_usage_error(home: Path, words: list[str], told: str) -> None:
    check_told(run(home, "package", "replicate", "Acme.Web", "1.0.0", "--relay", "http://127.0.0.1:1", *words), 2, told)


def test_a_relay_that_is_down_is_named_and_the_other_one_is_served(
    home: Path, package: str, relays: list[RelayProcess]
) -> None:
    down = f"http://127.0.0.1:{unused_port()}"
    to = ["--relay", down, "--relay", relays[0].url, "--patience", "0.2"]
    done = run(home, "package", "replicate", package, "1.0.0", *to, "--json")
    document = json.loads(done.out)
    assert done.code == 1
    assert [entry["relay"] for entry in document["relays"]] == [relays[0].url]
    assert [entry["relay"] for entry in document["failed"]] == [down]
    assert f"relay {down} cannot be reached: Connection refused" in document["failed"][0]["error"]
    assert package in held_by(home, relays[0])


def test_a_package_without_a_signature_is_not_sent(home: Path, package: str, relays: list[RelayProcess]) -> None:
    for path in (home / "depot/signatures").iterdir():
        path.unlink()
    done = run(home, "package", "replicate", package, "1.0.0", "--relay", relays[0].url)
    check_told(done, 1, f"{package} 1.0.0 is not signed", "Add its nupkg again")
    assert package not in held_by(home, relays[0])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["Acme.Web", "1.0.0"], "--relay"),
        (["Acme.Web", "1.0.0", "--relay", "ftp://x"], "'ftp://x' is not a relay's URL"),
        (["Acme.Web", "1.0.0", "--relay", "https://u:secret@x"], "no credentials"),
        (["Acme.Web", "1.0.0", "--relay", "http://h:1", "--relay", "http://h:1/"], "a relay is named twice"),
        (["Acme.Web", "1.0.0", "--relay", "http://h:1", "--token-file", "/gone"], "'/gone' cannot be read"),
        (["Acme.Web", "1.0.0", "--relay", "http://h:1", "--ca-file", "/gone"], "'/gone' cannot be used"),
        (["Acme Web", "1.0.0", "--relay", "http://127.0.0.1:1"], "'Acme Web' is not a valid package id"),
    ],
)
def test_a_replication_that_makes_no_sense_is_a_usage_error(home: Path, words: list[str], told: str) -> None:
    done = run(home, "package", "replicate", *words)
    check_told(done, 2, told)
    assert "secret" not in done.err


def test_a_package_that_is_not_in_the_depot_is_not_replicated(home: Path) -> None:
    done = run(home, "package", "replicate", "Acme.Gone", "1.0.0", "--relay", "http://127.0.0.1:1")
    check_told(done, 1, "Acme.Gone 1.0.0 is not here")


async def test_what_a_relay_says_never_drives_the_terminal(home: Path, package: str) -> None:
    async def hostile(request: Any) -> Any:
        problem = msgspec.json.encode({"code": f"{ESCAPE}[2J\x9b2Jred", "title": f"{ESCAPE}]0;x\x07"})
        return await body(problem, status=400, Content_Type="application/problem+json")(request)

    async def health(request: Any) -> Any:
        text = {"status": "ok", "versions": [1], "time": 0.0, "site": f"{ESCAPE}[2Jfra", "reason": "\x9b2Jbad"}
        return await body(msgspec.json.encode(text), Content_Type="application/json")(request)

    async with running_feed() as relay:
        relay.serve("/v1/health", health)
        relay.serve("/v1/packages", {"packages": []})
        relay.serve("/v1/missing", hostile)
        sent = await asyncio.to_thread(run, home, "package", "replicate", package, "1.0.0", "--relay", relay.base)
        status = await asyncio.to_thread(run, home, "relay", "status", "--relay", relay.base)
    assert sent.code == 1
    assert sent.err.startswith(f"{relay.base}: ")
    assert "red" in sent.err
    assert status.code == 0
    assert "fra" in status.out
    for done in (sent, status):
        assert not {ESCAPE, "\x9b", "\x07"} & set(done.out + done.err)


# --- terminals


def on_a_terminal(home: Path, *words: str, **more: str) -> tuple[int, str]:
    """Run with standard error (and nothing else) on a terminal of its own; the exit code and what the terminal got."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [WAYSTATION, *words],
        env=environment(home, TERM="xterm-256color", COLUMNS="100", **more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        got = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:
                # EIO: nobody has the other end open any more.
                break
            if not piece:
                break
            got += piece
    os.close(ours)
    return process.returncode, got.decode()


BAR = "━"


def test_a_progress_bar_is_drawn_on_a_terminal_and_nowhere_else(
    home: Path, tmp_path: Path, relays: list[RelayProcess]
) -> None:
    files = {f"lib/{n}.dll": noise(n, 1_000_000) for n in range(20)}
    nupkg = make_nupkg(tmp_path, files, id="Acme.Bar")
    code, seen = on_a_terminal(home, "package", "add", nupkg)
    assert code == 0
    assert BAR in seen
    assert "Acme.Bar.1.0.0.nupkg" in seen
    code, seen = on_a_terminal(home, "package", "replicate", "Acme.Bar", "1.0.0", "--relay", relays[0].url)
    assert code == 0
    assert BAR in seen
    done = run(home, "package", "replicate", "Acme.Bar", "1.0.0", "--relay", relays[1].url)
    assert done.code == 0
    assert done.err == ""
    assert not {ESCAPE, BAR} & set(done.out)


def test_the_names_beside_a_bar_are_neither_markup_nor_escapes(home: Path, tmp_path: Path) -> None:
    files = {f"lib/{n}.dll": noise(n, 1_000_000) for n in range(20)}
    nupkg = make_nupkg(tmp_path / f"[red]{ESCAPE}]0;owned[link=x].nupkg", files, id="Acme.Bar")
    code, seen = on_a_terminal(home, "package", "add", nupkg)
    assert code == 0
    assert "[red]" in seen
    assert f"{ESCAPE}]0" not in seen


def test_errors_have_a_colour_on_a_terminal_unless_no_color_is_set(home: Path) -> None:
    code, coloured = on_a_terminal(home, "package", "show", "Acme.Web", "1.0.0")
    assert code == 1
    assert f"{ESCAPE}[31m" in coloured
    code, plain = on_a_terminal(home, "package", "show", "Acme.Web", "1.0.0", NO_COLOR="1")
    assert code == 1
    assert ESCAPE not in plain
    assert "Acme.Web 1.0.0 is not here" in plain
    assert ESCAPE not in run(home, "package", "show", "Acme.Web", "1.0.0").err


def test_help_says_how_to_go_on(home: Path) -> None:
    for words, example in ((["package", "add"], "Examples: waystation package add"), (["trust", "init"], "Example: ")):
        done = run(home, *words, "--help")
        assert done.code == 0
        assert " ".join(words) in done.out.splitlines()[0]
        assert example in done.out
        assert ESCAPE not in done.out
