"""The identical nupkg as somebody at a terminal meets it: `package add`, `show`, `fetch` and `replicate --exact`."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness.crafted import Member, craft
from harness.engines import ENGINES, PACKAGES, needs_engines
from harness.machines import Machine
from harness.packages import deflated, nuspec, words
from harness.process import Process, run
from harness.relays import RelayProcess

from relay.support.zstd import zstd

PARTS = {"lib/a.dll": words(1, 400_000), "b.txt": words(2, 2_000)}
EF = PACKAGES / "microsoft.entityframeworkcore.10.0.14.nupkg"
NAME = ("Acme.Web", "1.0.0")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    made = tmp_path / "home"
    assert run(made, "trust", "init").code == 0
    return made


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[RelayProcess]:
    with RelayProcess(tmp_path / "relay") as running:
        yield running


def exact(home: Path, *name: str, **more: str) -> dict[str, Any]:
    found: dict[str, Any] = run(home, "package", "show", *name, "--json", **more).json["exact"]
    return found


# --- show


def test_show_says_what_each_encoder_makes(home: Path, tmp_path: Path) -> None:
    nupkg = deflated(tmp_path, PARTS)
    assert run(home, "package", "add", nupkg).code == 0
    told = exact(home, *NAME)
    assert told["records"] == "canonical"
    assert told["verbatim"] is None
    assert set(told["shares"]) == {"zlib", "stored"}
    assert told["shares"]["zlib"]["content_bytes"] == sum(map(len, PARTS.values()))
    assert 0 < told["shares"]["zlib"]["nupkg_bytes"] < Path(nupkg).stat().st_size
    assert 0 < told["recipe_bytes"] < 400
    shown = run(home, "package", "show", *NAME).out
    assert "made again   of its parts alone" in shown
    assert "zlib" in shown


def test_show_says_where_the_whole_file_is_verbatim(home: Path, tmp_path: Path) -> None:
    nupkg = deflated(tmp_path, PARTS, level=1)
    assert run(home, "package", "add", nupkg).code == 0
    told = exact(home, *NAME)
    assert told["whole_file"]
    assert told["verbatim"]["bytes"] == Path(nupkg).stat().st_size
    assert "relays take the whole file" in run(home, "package", "show", *NAME).out


@needs_engines
@pytest.mark.parametrize("by", ["show", "add"])
def test_engines_that_come_later_mend_the_recipe(by: str, home: Path) -> None:
    name = ("Microsoft.EntityFrameworkCore", "10.0.14")
    assert run(home, "package", "add", EF).code == 0
    assert exact(home, *name)["whole_file"]
    if by == "add":
        again = run(home, "package", "add", EF, "--json", WAYSTATION_ENGINES=str(ENGINES)).json
        assert not again["packages"][0]["new"]
    else:
        run(home, "package", "show", *name, WAYSTATION_ENGINES=str(ENGINES))
    # Without engines again: what was found is kept.
    told = exact(home, *name)
    assert set(told["shares"]) == {"dotnet-10", "stored"}
    assert told["verbatim"] is None


# --- zstd


def test_a_package_with_parts_in_zstd_goes_all_the_way(home: Path, tmp_path: Path, relay: RelayProcess) -> None:
    """Into the depot, to a relay, onto a machine, and out again as the identical nupkg."""
    frames = {"lib/c.dll": words(3, 300_000), "empty": b""}
    members = [Member(name, data, method=93, raw=zstd.compress(data)) for name, data in frames.items()]
    parts = [Member("A.nuspec", nuspec(*NAME)), *(Member(name, data) for name, data in PARTS.items()), *members]
    nupkg = tmp_path / "zstd.nupkg"
    nupkg.write_bytes(craft(*parts, nuspec=False))
    assert run(home, "package", "add", nupkg).code == 0
    told = exact(home, *NAME)
    assert told["verbatim"]["bytes"] == sum(len(member.compressed) for member in members)
    assert set(told["shares"]) == {"zlib", "verbatim"}

    sent = run(home, "package", "replicate", *NAME, "--relay", relay.url, "--exact", "--json").json
    assert sent["relays"][0]["exact_bytes"] == told["verbatim"]["bytes"]
    machine = Machine.made(tmp_path / "web1", home / "trust" / "trust.json")
    tree = Path(machine.pull(*NAME, relay.url)["tree"])
    assert {name: (tree / name).read_bytes() for name in (*PARTS, *frames)} == PARTS | frames
    assert machine.verified() == ["Acme.Web 1.0.0"]
    for number, source in enumerate([(), ("--relay", relay.url)]):
        out = tmp_path / f"{number}.nupkg"
        assert run(home, "package", "fetch", *NAME, *source, "--output", out).code == 0
        assert out.read_bytes() == nupkg.read_bytes()


# --- between publication and proof

engines_are_looked_for = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.uname().machine != "x86_64", reason="engines are for linux-x64"
)


@contextmanager
def killed_in_the_proof(home: Path, *nupkgs: str, **more: str) -> Iterator[str]:
    """What `package add` told, before it was killed over the proof: it waits for an engine that never can be read."""
    engines = home / "engines-that-wait"
    engines.mkdir()
    os.mkfifo(engines / "engine.so")
    with Process(home, "package", "add", *nupkgs, WAYSTATION_ENGINES=str(engines), **more) as adding:
        yield adding.wait_for_line("added")
        assert adding.kill().code == -signal.SIGKILL, "it had ended before the kill"


@engines_are_looked_for
def test_a_package_is_listed_fetched_and_replicated_while_its_proof_is_under_way(
    home: Path, tmp_path: Path, relay: RelayProcess
) -> None:
    nupkg = deflated(tmp_path, PARTS)
    out = tmp_path / "out.nupkg"
    with killed_in_the_proof(home, nupkg) as told:
        assert told.startswith("added  Acme.Web 1.0.0  sha256:")
        (listed,) = run(home, "package", "list", "--json").json["packages"]
        assert (listed["id"], listed["version"]) == NAME
        assert exact(home, *NAME) is None
        assert "not proved yet" in run(home, "package", "show", *NAME).out
        assert run(home, "package", "fetch", *NAME, "--output", out).code == 0
        sent = run(home, "package", "replicate", *NAME, "--relay", relay.url, "--json").json
        assert sent["failed"] == []
    assert out.read_bytes() == Path(nupkg).read_bytes()


@engines_are_looked_for
@pytest.mark.parametrize("by", ["add", "replicate --exact"])
def test_a_kill_between_publication_and_proof_leaves_a_package_that_is_proved_later(
    by: str, home: Path, tmp_path: Path, relay: RelayProcess
) -> None:
    nupkg = deflated(tmp_path, PARTS)
    with killed_in_the_proof(home, nupkg):
        pass
    assert exact(home, *NAME) is None, "the kill fell behind the proof"
    assert run(home, "package", "replicate", *NAME, "--relay", relay.url).code == 0
    if by == "add":
        again = run(home, "package", "add", nupkg, "--json").json["packages"][0]
        assert (again["new"], again["chunks_stored"]) == (False, 0)
        assert set(exact(home, *NAME)["shares"]) == {"zlib", "stored"}
    sent = run(home, "package", "replicate", *NAME, "--relay", relay.url, "--exact", "--json").json
    assert sent["relays"][0]["exact_bytes"] == 0, "the recipe is all that the relay needs"
    assert set(exact(home, *NAME)["shares"]) == {"zlib", "stored"}
    out = tmp_path / "out.nupkg"
    assert run(home, "package", "fetch", *NAME, "--relay", relay.url, "--output", out).code == 0
    assert out.read_bytes() == Path(nupkg).read_bytes()
    assert list((home / "depot" / "tmp").glob("*")) == []


def test_the_file_may_go_as_soon_as_it_is_told(home: Path, tmp_path: Path) -> None:
    nupkg = Path(deflated(tmp_path, PARTS | {"lib/large.dll": words(3, 20_000_000)}))
    with Process(home, "package", "add", nupkg) as adding:
        adding.wait_for_line("added  ")
        nupkg.unlink()
        assert adding.result().code == 0
    assert set(exact(home, *NAME)["shares"]) == {"zlib", "stored"}


# --- fetch


def test_fetch_gives_back_the_file_that_was_added(home: Path, tmp_path: Path) -> None:
    nupkg = deflated(tmp_path, PARTS)
    run(home, "package", "add", nupkg)
    out = tmp_path / "out.nupkg"
    told = run(home, "package", "fetch", *NAME, "--output", out, "--json").json
    assert out.read_bytes() == Path(nupkg).read_bytes()
    assert (told["file"], told["new"], told["size"]) == (str(out), True, out.stat().st_size)
    assert not run(home, "package", "fetch", *NAME, "--output", out, "--json").json["new"]


def test_fetch_makes_again_what_the_depot_lost(home: Path, tmp_path: Path) -> None:
    nupkg = deflated(tmp_path, PARTS)
    run(home, "package", "add", nupkg)
    (blob,) = (home / "depot" / "blobs").glob("*/*")
    blob.unlink()
    out = tmp_path / "out.nupkg"
    assert run(home, "package", "fetch", *NAME, "--output", out).code == 0
    assert out.read_bytes() == Path(nupkg).read_bytes()


def test_fetch_never_overwrites_another_file(home: Path, tmp_path: Path) -> None:
    run(home, "package", "add", deflated(tmp_path, PARTS))
    out = tmp_path / "out.nupkg"
    out.write_bytes(b"somebody's")
    done = run(home, "package", "fetch", *NAME, "--output", out)
    assert done.code == 1
    assert "another file" in done.err
    assert out.read_bytes() == b"somebody's"
    assert [path.name for path in tmp_path.glob("out.*")] == ["out.nupkg"]


@pytest.mark.parametrize("names", [(), ("tools//run.sh", "./a.txt", "/c.txt", "caf%E9.txt")], ids=["plain", "odd"])
def test_fetch_takes_it_from_a_relay_that_never_saw_the_file(
    home: Path, tmp_path: Path, relay: RelayProcess, names: tuple[str, ...]
) -> None:
    """Names that are laid down as others are kept in the recipe as they are."""
    nupkg = deflated(tmp_path, PARTS | dict.fromkeys(names, b"some text, some text"))
    run(home, "package", "add", nupkg)
    assert run(home, "package", "replicate", *NAME, "--relay", relay.url).code == 0
    out = tmp_path / "out.nupkg"
    assert run(home, "package", "fetch", *NAME, "--relay", relay.url, "--output", out).code == 0
    assert out.read_bytes() == Path(nupkg).read_bytes()


def test_fetch_believes_only_pinned_keys(home: Path, tmp_path: Path, relay: RelayProcess) -> None:
    run(home, "package", "add", deflated(tmp_path, PARTS))
    run(home, "package", "replicate", *NAME, "--relay", relay.url)
    stranger = tmp_path / "stranger"
    assert run(stranger, "trust", "init").code == 0
    out = tmp_path / "out.nupkg"
    done = run(stranger, "package", "fetch", *NAME, "--relay", relay.url, "--output", out)
    assert done.code == 1
    assert "signed" in done.err
    assert not out.exists()


def test_fetch_says_what_the_relay_lacks(home: Path, tmp_path: Path, relay: RelayProcess) -> None:
    nupkg = deflated(tmp_path, PARTS, level=1)
    run(home, "package", "add", nupkg)
    run(home, "package", "replicate", *NAME, "--relay", relay.url)
    out = tmp_path / "out.nupkg"
    done = run(home, "package", "fetch", *NAME, "--relay", relay.url, "--output", out)
    assert done.code == 1
    assert f"{Path(nupkg).stat().st_size:,} bytes that no encoder makes" in done.err
    assert "--exact" in done.err

    sent = run(home, "package", "replicate", *NAME, "--relay", relay.url, "--exact", "--json").json
    assert sent["relays"][0]["exact_bytes"] == Path(nupkg).stat().st_size
    assert run(home, "package", "fetch", *NAME, "--relay", relay.url, "--output", out).code == 0
    assert out.read_bytes() == Path(nupkg).read_bytes()


def test_fetch_refuses_options_that_do_not_go_together(home: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("x")
    assert run(home, "package", "fetch", *NAME, "--token-file", token).code == 2
    assert run(home, "package", "fetch", *NAME, "--relay", "http://127.0.0.1:1", "--depot", tmp_path).code == 2


# --- serve


def test_serve_takes_what_it_lacks_from_its_parent(home: Path, tmp_path: Path) -> None:
    nupkg = deflated(tmp_path, PARTS, level=1)
    run(home, "package", "add", nupkg)
    out = tmp_path / "out.nupkg"
    with (
        RelayProcess(tmp_path / "parent", "--store", home / "depot") as parent,
        RelayProcess(tmp_path / "child", "--parent", parent.url) as child,
    ):
        run(home, "package", "replicate", *NAME, "--relay", child.url)
        assert run(home, "package", "fetch", *NAME, "--relay", child.url, "--output", out).code == 0
    assert out.read_bytes() == Path(nupkg).read_bytes()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"path": "/x.so", "encoder": "dotnet-10"}, "sha256"),
        ({"path": "/x.so", "encoder": "zlib", "sha256": "a" * 64}, "no engine for the encoder 'zlib'"),
        ({"encoder": "dotnet-10"}, "path"),
    ],
)
def test_an_engine_that_cannot_be_is_told_at_start(entry: dict[str, str], words: str, tmp_path: Path) -> None:
    config = tmp_path / "relay.yaml"
    config.write_text(json.dumps({"listen": "127.0.0.1:0", "engines": [entry]}))
    done = run(tmp_path / "home", "relay", "serve", "--config", config)
    assert done.code == 2
    assert words in done.err
