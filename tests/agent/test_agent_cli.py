"""`waystation agent …` as a person or a script meets it: shapes, exit codes, and errors that say what to do."""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self

import pytest
import yaml
from harness.origins import depot_with
from harness.packages import make_nupkg, noise
from harness.process import Done, run
from harness.relays import running_relay

from agent.trees.installed import AgentState

FILES = {"bin/app": b"#!/bin/sh\nexit 0\n", "lib.dll": noise("lib", 300_000), "empty": b""}
NEWER = {**FILES, "readme.txt": b"New."}
ULID = r"[0-9A-HJKMNP-TV-Z]{26}"


class World:
    """A relay that serves two versions, in a loop of its own, for all tests of this file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trust = folder / "origin" / "trust" / "trust.json"
        self.url = ""
        self.digest = ""
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        nupkgs = [make_nupkg(self.folder, FILES), make_nupkg(self.folder, NEWER, version="1.1.0-beta.2")]
        async with AsyncExitStack() as stack:
            origin = await stack.enter_async_context(depot_with(self.folder / "origin", *nupkgs))
            relay = await stack.enter_async_context(running_relay(self.folder / "origin" / "depot"))
            self.url, self.digest = relay.url, f"sha256:{origin.added[0].manifest.id}"
            self._ready.set()
            await self._stop.wait()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("world")) as world:
        yield world


class Agent:
    def __init__(self, folder: Path) -> None:
        self.home = folder / "home" / "agent"
        self.root = folder / "root"
        self._home = folder / "home"

    def __call__(self, *words: object) -> Done:
        return run(self._home, "agent", *words)

    def json(self, *words: str, code: int = 0) -> Any:
        done = self(*words, "--json")
        assert done.code == code, done.err
        return json.loads(done.out)

    def refused(self, *words: str, code: int = 1) -> str:
        """What it says on standard error: one sentence and a hint, never a traceback, and nothing on standard output."""
        done = self(*words)
        assert done.code == code, (done.code, done.out, done.err)
        assert "Traceback" not in done.err
        assert done.out == ""
        return done.err


@pytest.fixture
def agent(tmp_path: Path) -> Agent:
    return Agent(tmp_path)


@pytest.fixture
def ready(agent: Agent, world: World) -> Agent:
    """After `agent init`."""
    agent.json("init", "--trust", str(world.trust), "--name", "web7", "--scheme", "http", "--relay", world.url)
    return agent


# --- init


def test_init_makes_keys_and_configuration_and_prints_the_fingerprint(agent: Agent, world: World) -> None:
    done = agent(
        "init", "--trust", str(world.trust), "--name", "web7", "--site", "fra", "--domain", "example.net",
        "--resolver", "127.0.0.1:53", "--scheme", "http", "--relay", "http://10.0.0.1:7400", "--relay", "disk:/mnt/dfs",
    )  # fmt: skip

    assert done.code == 0, done.err
    assert re.search(r"^fingerprint sha256:[0-9a-f]{64}$", done.out, re.MULTILINE)
    assert yaml.safe_load((agent.home / "agent.yaml").read_text()) == {
        "name": "web7", "site": "fra", "domain": "example.net", "resolver": "127.0.0.1:53", "scheme": "http",
        "relays": ["http://10.0.0.1:7400", "disk:/mnt/dfs"],
    }  # fmt: skip
    assert (agent.home / "trust.json").read_bytes() == world.trust.read_bytes()
    assert stat.S_IMODE(agent.home.stat().st_mode) == 0o700


def test_inits_json_has_its_documented_shape(agent: Agent) -> None:
    found = agent.json("init")

    assert found.keys() == {"format", "name", "fingerprint", "home"}
    assert found["format"] == 1
    assert found["home"] == str(agent.home)
    assert found["name"]


def test_init_without_trust_says_what_is_missing(agent: Agent) -> None:
    done = agent("init")

    assert done.code == 0
    assert "trust.json" in done.err


def test_a_second_init_changes_nothing(ready: Agent) -> None:
    before = {p.name: p.read_bytes() for p in ready.home.iterdir()}

    said = ready.refused("init", "--name", "other")

    assert "never overwritten" in said
    assert {p.name: p.read_bytes() for p in ready.home.iterdir()} == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--trust", "nowhere.json"], "nowhere.json"),
        (["--trust", os.devnull], "waystation trust init"),
        (["--resolver", "name-server"], "IP:PORT"),
        (["--relay", "ftp://x"], "Expected http(s)://"),
        (["--relay", "https://user:secret@x"], "credentials"),
        (["--site", "a b", "--domain", "example.net"], "DNS name"),
        (["--scheme", "gopher"], "gopher"),
    ],
)
def test_a_wrong_setting_is_refused_before_any_key_is_made(agent: Agent, words: list[str], told: str) -> None:
    said = agent.refused("init", *words, code=2)

    assert told in said
    assert "secret" not in said
    assert not agent.home.exists()


# --- pull


def test_pull_tells_where_everything_came_from(ready: Agent, world: World) -> None:
    found = ready.json("pull", "acme.web", "1.0", "--root", str(ready.root), "--switch")

    assert found.keys() == {
        "format", "package", "version", "manifest", "tree", "already", "tree_bytes", "resumed_bytes", "from_disk_bytes",
        "from_relays", "encodings", "fallbacks", "wire_bytes", "failed", "switched", "seconds",
    }  # fmt: skip
    assert (found["format"], found["package"], found["version"]) == (1, "Acme.Web", "1.0.0")
    assert found["manifest"] == world.digest
    assert re.fullmatch(rf"{re.escape(str(ready.root))}/releases/1\.0\.0-{ULID}", found["tree"])
    assert found["from_relays"].keys() == {world.url}
    assert found["from_relays"][world.url].keys() == {"chunks", "bytes", "payload_bytes"}
    assert found["already"] is False
    assert found["switched"] is True
    assert found["wire_bytes"] > 300_000
    assert os.stat(os.path.join(found["tree"], "bin/app")).st_mode & stat.S_IXUSR


def test_the_same_pull_again_is_done_already(ready: Agent) -> None:
    words = ["pull", "Acme.Web", "1.0.0", "--root", str(ready.root), "--switch"]
    first = ready(*words)
    again = ready(*words)

    assert first.code == again.code == 0
    assert "is already at" in again.out
    assert "current names it now" in first.out
    assert "current named it already" in again.out
    assert len(os.listdir(ready.root / "releases")) == 1


def test_a_next_version_takes_from_the_disk_what_is_there(ready: Agent) -> None:
    ready.json("pull", "Acme.Web", "1.0.0", "--root", str(ready.root))

    done = ready("pull", "Acme.Web", "1.1.0-beta.2", "--root", str(ready.root))

    assert done.code == 0, done.err
    assert "from trees already here" in done.out
    assert re.search(rf"releases/1\.1\.0-beta\.2-{ULID}", done.out)


def test_a_digest_needs_no_trust(agent: Agent, world: World) -> None:
    found = agent.json(
        "pull", "Acme.Web", "1.0.0", "--root", str(agent.root), "--digest", world.digest, "--relay", world.url
    )

    assert found["tree_bytes"] == sum(map(len, FILES.values()))


def test_without_trust_and_digest_nothing_is_pulled(agent: Agent, world: World) -> None:
    said = agent.refused("pull", "Acme.Web", "1.0.0", "--root", str(agent.root), "--relay", world.url)

    assert "trust.json" in said
    assert "--digest" in said
    assert not agent.root.exists()


def test_a_package_that_no_relay_has_is_named_with_the_next_step(ready: Agent, world: World) -> None:
    said = ready.refused("pull", "Acme.Other", "1.0.0", "--root", str(ready.root))

    assert "Acme.Other 1.0.0" in said
    assert world.url in said
    assert "waystation package replicate" in said


def test_a_relay_that_is_not_there_is_named_with_the_next_step(ready: Agent) -> None:
    said = ready.refused("pull", "Acme.Web", "1.0.0", "--root", str(ready.root), "--relay", "http://127.0.0.1:1")

    assert "http://127.0.0.1:1" in said
    assert "unreachable" in said
    assert "waystation agent relays" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["not a name", "1.0"], "not a name"),
        (["Acme.Web", "one"], "one"),
        (["Acme.Web", "1.0", "--digest", "sha256:12"], "sha256:12"),
        (["Acme.Web", "1.0", "--relay", "ftp://x"], "ftp://x"),
        (["Acme.Web", "1.0", "--token-file", "no-such-token"], "no-such-token"),
    ],
)
def test_what_cannot_be_meant_is_told_with_what_is_expected(ready: Agent, words: list[str], told: str) -> None:
    done = ready("pull", *words, "--root", str(ready.root))

    assert done.code in {1, 2}
    assert told in done.err
    assert "Traceback" not in done.err
    assert not ready.root.exists()


def test_a_root_is_needed(ready: Agent) -> None:
    assert "--root" in ready.refused("pull", "Acme.Web", "1.0.0", code=2)


def test_a_root_that_is_a_file_is_told(ready: Agent, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")

    assert str(tmp_path / "file") in ready.refused("pull", "Acme.Web", "1.0.0", "--root", str(tmp_path / "file"))


def test_a_build_by_another_process_is_told_with_exit_code_4(ready: Agent, world: World) -> None:
    import fcntl

    folder = ready.root / "releases" / f".incoming-{world.digest.removeprefix('sha256:')}"
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = ready.refused("pull", "Acme.Web", "1.0.0", "--root", str(ready.root), code=4)

    assert "Acme.Web 1.0.0" in said
    assert "Wait" in said


def test_a_configuration_that_is_wrong_is_told_with_its_file(ready: Agent) -> None:
    (ready.home / "agent.yaml").write_text("sight: fra\n")

    said = ready.refused("pull", "Acme.Web", "1.0.0", "--root", str(ready.root), code=2)

    assert str(ready.home / "agent.yaml") in said
    assert "sight" in said


# --- relays


def test_relays_shows_the_ranking_in_its_documented_shape(ready: Agent, world: World) -> None:
    found = ready.json("relays")

    assert found.keys() == {"format", "notes", "warnings", "relays"}
    [relay] = found["relays"]
    assert relay.keys() == {
        "url", "found_by", "priority", "weight", "usable", "first_byte_seconds", "goodput_bytes_per_second", "why", "error",
    }  # fmt: skip
    assert (relay["url"], relay["found_by"], relay["usable"], relay["error"]) == (world.url, "static", True, "")
    assert relay["why"].startswith("static list")


def test_relays_shows_why_one_cannot_be_used(ready: Agent) -> None:
    done = ready("relays", "--relay", "http://127.0.0.1:1")

    assert done.code == 0
    assert "http://127.0.0.1:1" in done.out
    assert "cannot be reached" in done.out


def test_after_a_pull_the_relay_in_use_is_shown_with_its_goodput(ready: Agent) -> None:
    ready.json("pull", "Acme.Web", "1.0.0", "--root", str(ready.root))

    [relay] = ready.json("relays")["relays"]

    assert relay["goodput_bytes_per_second"] > 0
    assert "in use" in relay["why"]


# --- verify


def test_verify_reads_every_byte(ready: Agent) -> None:
    tree = ready.json("pull", "Acme.Web", "1.0.0", "--root", str(ready.root))["tree"]
    assert ready.json("verify") == {
        "format": 1,
        "trees": [{"package": "Acme.Web", "version": "1.0.0", "tree": tree, "differences": []}],
        "damaged": [],
    }
    with open(os.path.join(tree, "lib.dll"), "r+b") as file:
        file.seek(1000)
        file.write(b"!")
    Path(tree, "added\n\x1b[31m").write_text("x")

    found = ready.json("verify", code=1)
    text = ready("verify")

    assert {d["path"]: d["problem"] for d in found["trees"][0]["differences"]} == {
        "lib.dll": "other content",
        "added\n\x1b[31m": "not part of the package",
    }
    assert text.code == 1
    assert "differs" in text.out
    assert "lib.dll: other content" in text.out
    assert "\x1b" not in text.out, "a file's name drives the terminal"
    assert "Pull it again" in text.err


def test_what_verify_finds_a_pull_mends(ready: Agent) -> None:
    words = ["pull", "Acme.Web", "1.0.0", "--root", str(ready.root), "--switch"]
    damaged = ready.json(*words)["tree"]
    Path(damaged, "lib.dll").unlink()

    mended = ready.json(*words)

    assert mended["tree"] != damaged
    assert mended["switched"] is True
    assert os.path.samefile(ready.root / "current", mended["tree"])


def test_verify_looks_below_one_root_where_it_is_told_to(ready: Agent, tmp_path: Path) -> None:
    ready.json("pull", "Acme.Web", "1.0.0", "--root", str(ready.root))
    ready.json("pull", "Acme.Web", "1.0.0", "--root", str(tmp_path / "other"))

    assert len(ready.json("verify")["trees"]) == 2
    [tree] = ready.json("verify", "--root", str(tmp_path / "other"))["trees"]
    assert tree["tree"].startswith(str(tmp_path / "other"))


def test_verify_says_that_a_manifest_is_lost(ready: Agent, world: World) -> None:
    ready.json("pull", "Acme.Web", "1.0.0", "--root", str(ready.root))
    (ready.home / "manifests" / world.digest.removeprefix("sha256:")).write_text("{}")

    [tree] = ready.json("verify", code=1)["trees"]

    assert "manifest is lost" in tree["differences"][0]["problem"]


def test_verify_of_nothing_is_no_error(agent: Agent) -> None:
    done = agent("verify")

    assert done.code == 0
    assert "no tree is installed" in done.out


def test_every_command_has_a_help_with_an_example(tmp_path: Path) -> None:
    for command in ("init", "pull", "relays", "verify"):
        done = run(tmp_path, "agent", command, "--help")
        assert f"Example: waystation agent {command}" in done.out


def test_init_keeps_where_the_token_is_whatever_folder_it_was_called_in(tmp_path):
    (tmp_path / "token").write_text("wst_x\n")
    home = tmp_path / "home"
    words = ["agent", "init", "--home", str(home), "--token-file", "token", "--name", "web7"]
    done = run(tmp_path, *words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert AgentState(str(home)).config().token_file == str(tmp_path / "token")
    words[3] = str(tmp_path / "other")
    refused = run(tmp_path, *words, cwd="/")
    assert refused.code == 2
    assert not (tmp_path / "other").exists()


def test_init_keeps_which_token_goes_to_which_relay(tmp_path):
    for name in ("fra", "hq"):
        (tmp_path / name).write_text(f"wst_{name}\n")
    home = tmp_path / "home"
    words = ("agent", "init", "--home", home, "--token-file", "fra")
    named = ("--relay-token", "relay.hq.example=hq", "--plain-http", "10.1.0.7")
    assert run(tmp_path, *words, *named, cwd=tmp_path).code == 0
    config = AgentState(str(home)).config()
    assert config.tokens == {"relay.hq.example": str(tmp_path / "hq")}
    assert config.plain_http == ("10.1.0.7",)
    for wrong in ("relay.hq.example", "relay.hq.example=nowhere", "=hq", "disk:/mnt=hq"):
        refused = run(tmp_path, "agent", "init", "--home", tmp_path / "other", "--relay-token", wrong, cwd=tmp_path)
        assert refused.code == 2, wrong
    assert not (tmp_path / "other").exists()


# --- what is damaged on this machine


def test_damaged_files_of_the_home_are_told_with_what_mends_them(ready: Agent) -> None:
    ready.json("pull", "Acme.Web", "1.0.0", "--root", str(ready.root), "--switch")
    (record,) = (ready.home / "trees").iterdir()
    (ready.home / "settled").mkdir()
    damaged = {
        record: "pull its package again",
        ready.home / "settled" / "x.json": "until the next deployment writes it anew",
        ready.home / "cursors.json": "none is obeyed twice",
    }
    for path in damaged:
        path.write_text('{"torn')

    document = ready.json("verify", code=1)
    texts = [ready("status"), ready("verify"), ready("pull", "Acme.Web", "1.0.0", "--root", ready.root)]

    assert document["damaged"] == ready.json("status")["damaged"]
    for path, mends in damaged.items():
        assert any(str(path) in told and mends in told for told in document["damaged"]), path
        assert all(f"{path} is damaged" in text.err for text in texts), path
    record.unlink()
    assert len(ready.json("verify", code=1)["damaged"]) == 2
    assert len(ready.json("verify", code=1)["trees"]) == 1, "the pull did not mend it"


@pytest.mark.parametrize("text", ["", "\n", "# name: web7\n"])
def test_an_agent_yaml_that_says_nothing_is_refused(ready: Agent, text: str) -> None:
    (ready.home / "agent.yaml").write_text(text)

    assert "agent.yaml: says nothing" in ready.refused("serve", code=2)


def test_what_fails_on_this_machine_is_not_called_unreachable(ready: Agent) -> None:
    (ready.home / "journal.json").write_text("{")
    said = ready.refused("status")
    assert "error (this machine): " in said
    assert "journal.json is damaged" in said

    (ready.root / "current").mkdir(parents=True)
    done = ready("pull", "Acme.Web", "1.0.0", "--root", ready.root, "--switch")
    assert done.code == 1
    assert "error (refused): " in done.err
    assert "is no link" in done.err


def test_a_home_that_others_can_write_to_is_refused(ready: Agent) -> None:
    ready.home.parent.chmod(0o777)
    assert "chmod" in ready.refused("status")


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_umask_decides_neither_over_homes_nor_over_roots(agent: Agent, world: World, mask: int) -> None:
    before = os.umask(mask)
    try:
        words = ("--trust", str(world.trust), "--name", "web7", "--scheme", "http", "--relay", world.url)
        done = run(agent.home.parent, "agent", "init", *words, cold=True)
        assert done.code == 0, done.err
        words = ("pull", "Acme.Web", "1.0.0", "--root", str(agent.root / "app"), "--switch")
        done = run(agent.home.parent, "agent", *words, cold=True)
        assert done.code == 0, done.err
    finally:
        os.umask(before)

    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (agent.root, *agent.root.rglob("*"))}
    assert {oct(mode) for path, mode in modes.items() if path.is_dir()} == {"0o755"}
    assert stat.S_IMODE(agent.home.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(agent.home.stat().st_mode) == 0o700
