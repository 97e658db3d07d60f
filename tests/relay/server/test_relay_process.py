"""`waystation relay …` as an operator runs it: a process that starts, says what is wrong, drains, dies and comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness.origins import depot_with
from harness.packages import make_nupkg, noise
from harness.pages import DOCS
from harness.process import WAYSTATION, Done, Process, eventually, run
from harness.relays import RelayProcess
from harness.trail import names, troubles

from benchmarks.lines.network import Line, ThreadedProxy
from orchestrator.depot.depot import open_depot
from orchestrator.plan.plan import SecretSource
from orchestrator.trust.secrets import read_secret
from relay.encoding.bundle import BundleWriter, Received, Span, data_header
from relay.errors import UnreachableError
from relay.package.chunk import Chunk
from relay.package.identity import NuGetVersion, PackageId, PackageRef
from relay.package.manifest import Manifest
from relay.protocol import messages
from relay.protocol.client import RelayClient
from relay.protocol.connection import ClientLimits, LeaseLostError
from relay.transfer.replicate import replicate

FILES = {"lib/web.dll": noise("web", 300_000), "readme.txt": b"hello\n" * 100}
ID = "Acme.Web"


def ref(version: str) -> PackageRef:
    return PackageRef(PackageId.parse(ID), NuGetVersion.parse(version))


@dataclass(frozen=True)
class Origin:
    """A home with keys and packages."""

    home: Path

    def add(self, nupkg: str) -> None:
        assert run(self.home, "package", "add", nupkg).code == 0
        os.unlink(nupkg)

    def replicate(self, url: str, version: str = "1.0.0", *more: object, **environment: str) -> Done:
        return run(self.home, "package", "replicate", ID, version, "--relay", url, *more, **environment)

    def pull(self, url: str, root: Path, version: str = "1.0.0", *more: object) -> Done:
        return run(self.home, "agent", "pull", ID, version, "--root", root, "--relay", url, *more)


HEAVY = {f"lib/{n}.dll": noise(f"heavy {n}", 2_000_000) for n in range(8)}
"""16 MB: two bundles and two requests, so that all of it is under way at once."""
MIDDLE = {f"lib/{n}.dll": noise(f"middle {n}", 1_000_000) for n in range(6)}


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Origin]:
    """It holds 1.0.0 (small), 2.0.0 (6 MB) and 3.0.0, 3.1.0 (16 MB each); an agent beside it believes its key."""
    folder = tmp_path_factory.mktemp("origin")
    made = Origin(folder / "home")
    assert run(made.home, "trust", "init").code == 0
    made.add(make_nupkg(folder, FILES))
    made.add(make_nupkg(folder, MIDDLE, version="2.0.0"))
    made.add(make_nupkg(folder, HEAVY, version="3.0.0"))
    other = {name: noise(f"other {name}", len(data)) for name, data in HEAVY.items()}
    made.add(make_nupkg(folder, other, version="3.1.0"))
    assert run(made.home, "agent", "init", "--trust", made.home / "trust/trust.json").code == 0
    yield made
    shutil.rmtree(folder, ignore_errors=True)


def status(home: Path, url: str, *more: object) -> dict[str, Any]:
    document: dict[str, Any] = run(home, "relay", "status", "--relay", url, "--json", *more).json
    return document


def check_refused(done: Done, code: int, *words: str) -> None:
    """It ended with `code`, said each of the `words`, and never that it is ready."""
    assert done.code == code, done.err
    for word in words:
        assert word in done.err
    assert done.out == ""
    assert "Traceback" not in done.err


# --- starting


def test_a_relay_is_useful_without_configuration_and_prints_one_line(origin: Origin, tmp_path: Path) -> None:
    with RelayProcess(tmp_path) as relay:
        assert relay.said == f"relay ready at http://127.0.0.1:{relay.port}"
        assert (tmp_path / "relay/format").exists()
        assert status(tmp_path, relay.url)["packages"] == []
        assert origin.replicate(relay.url).code == 0
        assert origin.pull(relay.url, tmp_path / "root").code == 0
        done = relay.stop()
    assert (done.code, done.out, troubles(done.err)) == (0, f"{relay.said}\n", [])


def test_status_says_how_a_relay_is_and_what_it_holds(origin: Origin, tmp_path: Path) -> None:
    with RelayProcess(tmp_path, "--site", "fra") as relay:
        assert origin.replicate(relay.url).code == 0
        shown = run(tmp_path, "relay", "status", "--relay", relay.url)
        document = status(tmp_path, relay.url)
    assert shown.out.splitlines()[0] == f"{relay.url}: ok, site fra"
    assert "Acme.Web 1.0.0  " in shown.out
    assert (document["status"], document["reason"], document["site"]) == ("ok", "", "fra")
    assert [(entry["id"], entry["version"]) for entry in document["packages"]] == [(ID, "1.0.0")]
    gone = run(tmp_path, "relay", "status", "--relay", relay.url)
    assert gone.code == 1
    assert f"relay {relay.url} cannot be reached: Connection refused" in gone.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lisen: 127.0.0.1:0\n", ["relay.yaml:1: lisen: unknown key", "did you mean 'listen'?"]),
        ("\nlimits: {drian_seconds: 5}\n", ["relay.yaml:2: limits.drian_seconds", "drain_seconds"]),
        ("free_floor: -1\n", ["relay.yaml:1: free_floor: -1: expected a whole number from 0"]),
        ("store: ftp://x\n", ["'ftp://x' is no store location", "disk:/absolute/path"]),
        ("tokens: [{id: x}]\n", ["relay.yaml:1: tokens[0].id: 'x': expected 8 hex digits", "'scopes' is missing"]),
        ("site: fra\nsite: iad\n", ["relay.yaml:2: site: stands twice, first in line 1"]),
        (
            "tls: {certificate: /gone.pem, key: /gone.key}\n",
            ["relay.yaml:1: tls: the certificate /gone.pem cannot be read: No such file"],
        ),
        ("tls: {certificate: /etc/hostname, key: /gone.key}\n", ["the key /gone.key cannot be read: No such file"]),
        ("peers: [{url: nonsense}]\n", ["relay.yaml:1: peers: "]),
        (
            "listen: here\nsight: fra\nlimits: {a: 1}\n",
            ["relay.yaml:1: listen: 'here'", "relay.yaml:2: sight: unknown key", "relay.yaml:3: limits.a"],
        ),
        ("listen: [\n", ["relay.yaml:2: is not YAML"]),
    ],
)
def test_a_configuration_that_cannot_be_served_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    config = tmp_path / "relay.yaml"
    config.write_text(text)
    options = [] if text.startswith("listen") else ["--listen", "127.0.0.1:0"]
    check_refused(run(tmp_path, "relay", "serve", "--config", config, *options), 2, *words)


def test_a_configuration_that_is_not_there_is_named(tmp_path: Path) -> None:
    check_refused(run(tmp_path, "relay", "serve", "--config", tmp_path / "gone.yaml"), 2, "gone.yaml", "No such file")


def test_without_tokens_nothing_listens_beyond_loopback(tmp_path: Path) -> None:
    done = run(tmp_path, "relay", "serve", "--listen", "0.0.0.0:0")
    check_refused(done, 2, "beyond loopback", "waystation relay token")


def test_a_port_that_is_taken_is_told_and_is_no_mistake_of_usage(tmp_path: Path) -> None:
    """1, as an init system tries again then; the unit gives up at 2."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run(tmp_path, "relay", "serve", "--listen", f"127.0.0.1:{port}")
    check_refused(done, 1, f"cannot listen on 127.0.0.1:{port}", "in use")


def test_a_second_relay_on_one_store_ends_and_names_the_first(tmp_path: Path) -> None:
    with RelayProcess(tmp_path) as relay:
        done = run(tmp_path, "relay", "serve", "--listen", "127.0.0.1:0")
        check_refused(done, 4, str(tmp_path / "relay"), f"pid {relay.pid}")
        assert status(tmp_path, relay.url)["status"] == "ok"
    with RelayProcess(tmp_path):
        """The lock of a relay that was killed is free."""


# --- stopping


def refuses(port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


async def test_sigterm_lets_an_upload_and_a_download_end_and_nobody_new_in(origin: Origin, tmp_path: Path) -> None:
    slow = Line(rate=8_000_000)
    async with open_depot(f"disk:{origin.home / 'depot'}") as depot:
        held, coming = [await depot.manifest(depot.catalog.get(ref(version))) for version in ("3.0.0", "3.1.0")]
        signature = await depot.catalog.signature(coming.id)
        chunks = [await depot.store.chunks.get(id) for id in coming.chunk_ids()]
    with contextlib.ExitStack() as stack:
        relay = stack.enter_context(RelayProcess(tmp_path))
        port = relay.port
        assert origin.replicate(relay.url, "3.0.0").code == 0
        async with RelayClient(relay.url) as client:
            offer = await client.offer(coming, signature)
        sends = stack.enter_context(ThreadedProxy("127.0.0.1", port, up=slow))
        reads = stack.enter_context(ThreadedProxy("127.0.0.1", port, down=slow))
        uploading = asyncio.create_task(upload(url_of(sends), coming, chunks, offer.lease))
        downloading = asyncio.create_task(download(url_of(reads), held))
        await eventually(lambda: min(sends.counts.up, reads.counts.down) > 3_000_000)
        relay.terminate()
        await eventually(lambda: refuses(port))
        assert max(sends.counts.up, reads.counts.down) < 15_000_000, "the signal fell into both transfers"
        assert relay.is_alive
        assert await downloading == held.stream_size
        assert await uploading == len(set(coming.chunk_ids()) - set(held.chunk_ids()))
        done = await asyncio.to_thread(relay.end)
        assert (done.code, done.out, troubles(done.err)) == (0, f"{relay.said}\n", [])
        again = stack.enter_context(RelayProcess(tmp_path))
        (sent,) = origin.replicate(again.url, "3.1.0", "--json").json["relays"]
        assert sent["chunks_sent"] == 0, "what was answered is there"
    shutil.rmtree(tmp_path)


def url_of(line: ThreadedProxy) -> str:
    return f"http://127.0.0.1:{line.port}"


async def upload(url: str, manifest: Manifest, chunks: list[Chunk], lease: str) -> int:
    """The whole package in one bundle; how many of its chunks the relay stored."""

    async def bundle() -> AsyncIterator[bytes]:
        writer = BundleWriter()
        yield writer.start()
        for index, chunk in enumerate(chunks):
            yield writer.frame(data_header((Span.of(manifest.id, [index]),), "raw", chunk.data)) + chunk.data
        yield writer.end()

    async with RelayClient(url) as client:
        return (await client.put_bundle(lease, bundle())).stored


async def download(url: str, manifest: Manifest) -> int:
    """The whole package in one request; how many bytes of it came."""
    async with RelayClient(url) as client:
        events = [event async for event in client.stream(manifest, range(len(manifest.chunks)))]
    return sum(event.chunk.size for event in events if isinstance(event, Received))


def test_a_reader_that_takes_nothing_does_not_keep_a_relay_from_stopping(origin: Origin, tmp_path: Path) -> None:
    config = tmp_path / "relay.yaml"
    config.write_text("listen: 127.0.0.1:0\nlimits: {drain_seconds: 0.3}\n")
    with RelayProcess(tmp_path, "--config", config) as relay:
        assert origin.replicate(relay.url, "3.0.0").code == 0
        with ThreadedProxy("127.0.0.1", relay.port, down=Line(rate=8_000_000)) as line:
            words = ("agent", "pull", ID, "3.0.0", "--root", tmp_path / "root", "--relay", url_of(line))
            pulling = Process(origin.home, *words)
            line.wait_for(2_000_000, direction="down")
            line.pause()
            assert relay.stop().code == 0
            assert pulling.is_alive
            line.resume()
            assert pulling.result().code == 1, "its relay was gone"
    shutil.rmtree(tmp_path)


def test_ctrl_c_stops_a_relay_as_sigterm_does(tmp_path: Path) -> None:
    with RelayProcess(tmp_path) as relay:
        relay.process.send_signal(signal.SIGINT)
        done = relay.end()
    assert (done.code, done.out, names(done.err)[-2:]) == (0, f"{relay.said}\n", ["relay.draining", "relay.stopped"])


async def test_a_killed_relay_comes_back_with_its_packages_and_its_leases(tmp_path: Path) -> None:
    one = make_nupkg(tmp_path, FILES)
    two = make_nupkg(tmp_path, MIDDLE, version="2.0.0")
    async with depot_with(tmp_path / "origin", one, two) as origin:
        manifests = [added.manifest for added in origin.added]
        with RelayProcess(tmp_path / "relay") as relay:
            assert run(tmp_path / "origin", "package", "replicate", ID, "1.0.0", "--relay", relay.url).code == 0
            async with RelayClient(relay.url) as client:
                offer = await client.offer(manifests[1], await origin.signature(manifests[1]))
            relay.kill()
        with RelayProcess(tmp_path / "relay") as relay:
            async with RelayClient(relay.url) as client:
                assert [entry.manifest for entry in await client.packages()] == [manifests[0].id]
                whole = messages.ChunkRanges(manifest=manifests[0].id, ranges=((0, len(manifests[0].chunks)),))
                assert await client.missing((whole,)) == messages.MissingAnswer(())
                rest = messages.ChunkRanges(manifest=manifests[1].id, ranges=offer.missing)
                assert (await client.missing((rest,), lease=offer.lease)).missing == (rest,)
                with pytest.raises(LeaseLostError):
                    await client.missing((rest,), lease="0" * 32)


# --- tokens


@dataclass(frozen=True)
class Guarded:
    """A relay that asks for tokens, and files that hold some."""

    relay: RelayProcess
    read: Path
    write: Path
    wrong: Path


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    config = folder / "relay.yaml"
    config.write_text("# kept\nlisten: 127.0.0.1:0\n")
    files = []
    for scope in ("read", "write"):
        made = run(folder, "relay", "token", scope, "--config", config, "--name", f"{scope}er")
        assert made.code == 0
        assert len(made.out.split()) == 1
        files.append(folder / f"{scope}.token")
        files[-1].write_text(made.out)
    forgotten = run(folder, "relay", "token", "write")
    assert "put this into relay.yaml" in forgotten.err
    wrong = folder / "wrong.token"
    wrong.write_text(forgotten.out)
    with RelayProcess(folder, "--config", config) as relay:
        yield Guarded(relay, *files, wrong)


DOCUMENTED = re.findall(r"^waystation (relay token .*?)(?: +#.*)?$", (DOCS / "operations.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", [*dict.fromkeys(DOCUMENTED), "relay token write order --name releases > shell.token"])
def test_a_documented_command_makes_a_token_file_that_a_deployment_takes(tmp_path: Path, line: str) -> None:
    config = tmp_path / "relay.yaml"
    config.write_text("site: fra\n")
    config.chmod(0o640)
    words = line.replace("/etc/waystation/relay.yaml", str(config))
    made = subprocess.run(
        ["sh", "-c", f"umask 022; {WAYSTATION} {words}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    (file,) = tmp_path.glob("*.token")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert re.fullmatch("wst_[0-9a-z]{8}_.*", read_secret("relay", SecretSource(file=str(file))).reveal())
    assert stat.S_IMODE(config.stat().st_mode) == 0o640
    if "--config" in line:
        assert file.read_text().split("_")[1] in config.read_text()


def test_a_token_file_that_is_renewed_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "agent.token"
    file.write_text("old\n")
    file.chmod(0o640)
    done = run(tmp_path, "relay", "token", "agent", "--output", file)
    assert (done.code, done.out) == (0, "")
    assert file.read_text().startswith("wst_")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    nowhere = run(
        tmp_path, "relay", "token", "agent", "--config", tmp_path / "relay.yaml", "--output", tmp_path / "no/x"
    )
    check_refused(nowhere, 2, "no/x")
    assert not (tmp_path / "relay.yaml").exists()


def test_a_token_is_printed_once_and_the_file_keeps_a_hash(guarded: Guarded) -> None:
    config = (guarded.read.parent / "relay.yaml").read_text()
    assert config.startswith("# kept\n")
    assert config.count("sha256: ") == 2
    assert 'name: "reader"' in config
    for file in (guarded.read, guarded.write):
        _, id, secret = file.read_text().strip().rpartition("_")[0].split("_", 2)
        assert id in config
        assert len(secret) == 43
        assert secret not in config


def test_a_token_reaches_as_far_as_its_scope(origin: Origin, guarded: Guarded, tmp_path: Path) -> None:
    url = guarded.relay.url
    reading = origin.replicate(url, "1.0.0", "--token-file", guarded.read)
    assert reading.code == 1
    assert f"relay {url} refuses this token" in reading.err
    assert "--token-file" in reading.err
    assert status(origin.home, url, "--token-file", guarded.read)["packages"] == []
    assert origin.replicate(url, "1.0.0", "--token-file", guarded.write).code == 0
    pulled = origin.pull(url, tmp_path / "root", "1.0.0", "--token-file", guarded.read)
    assert pulled.code == 0, pulled.err
    assert origin.replicate(url, "2.0.0", WAYSTATION_TOKEN=guarded.write.read_text()).code == 0


@pytest.mark.parametrize("which", ["none", "wrong"])
def test_without_a_token_of_this_relay_nothing_moves(
    origin: Origin, guarded: Guarded, tmp_path: Path, which: str
) -> None:
    more = () if which == "none" else ("--token-file", guarded.wrong)
    sent = origin.replicate(guarded.relay.url, "3.0.0", *more)
    pulled = origin.pull(guarded.relay.url, tmp_path / "root", "1.0.0", *more)
    for done in (sent, pulled):
        assert done.code == 1
        assert f"relay {guarded.relay.url} {'wants a' if which == 'none' else 'refuses this'} token" in done.err
    assert not list(tmp_path.glob("root/releases/*"))


@pytest.mark.parametrize("words", [["reed"], ["read", "--days", "91"], []])
def test_a_token_that_cannot_be_is_not_made(tmp_path: Path, words: list[str]) -> None:
    config = tmp_path / "relay.yaml"
    done = run(tmp_path, "relay", "token", *words, "--config", config)
    assert done.code == 2
    assert done.out == ""
    assert not config.exists()


# --- a bad disk, a full disk


def failing_fsync(relay: RelayProcess, log: Path) -> subprocess.Popen[str]:
    """From now on, each fsync of `relay` fails with EIO; until the process that this gives is ended."""
    words = ["strace", "-f", "-p", str(relay.pid), "-o", str(log), "-e", "trace=fsync", "-e", "inject=fsync:error=EIO"]
    strace = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert strace.stderr is not None
    first = strace.stderr.readline()
    if "attached" not in first:
        strace.kill()
        strace.communicate()
        pytest.skip(f"strace may not attach to a process here: {first.strip()}")
    return strace


async def test_a_relay_whose_disk_fails_says_so_and_goes_on_serving(origin: Origin, tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("needs strace to make fsync fail: a failing disk under a whole relay is NOT tested")
    log = tmp_path / "strace.log"
    with RelayProcess(tmp_path) as relay:
        assert origin.replicate(relay.url).code == 0
        with failing_fsync(relay, log) as strace:
            with pytest.raises(UnreachableError, match="500 store_failed"):
                await send(origin, relay, "2.0.0")
            strace.terminate()
        assert "(INJECTED)" in log.read_text()
        # The disk is well again, but what it lost cannot be known.
        with pytest.raises(UnreachableError, match="500 store_failed"):
            await send(origin, relay, "2.0.0")
        shown = run(tmp_path, "relay", "status", "--relay", relay.url)
        assert shown.out.startswith(f"{relay.url}: read-only (fsync failed 2 times in a row (Input/output error)")
        assert status(tmp_path, relay.url)["status"] == "read-only"
        assert origin.pull(relay.url, tmp_path / "root").code == 0
        assert relay.stop().code == 0
    with RelayProcess(tmp_path) as relay:
        assert status(tmp_path, relay.url)["status"] == "ok"
        assert origin.replicate(relay.url, "2.0.0").code == 0


async def send(origin: Origin, relay: RelayProcess, version: str) -> None:
    """Replicate from this process, which has less patience than the command."""
    async with open_depot(f"disk:{origin.home / 'depot'}") as depot:
        manifest = await depot.manifest(depot.catalog.get(ref(version)))
        signature = await depot.catalog.signature(manifest.id)
        async with RelayClient(relay.url, limits=ClientLimits(attempts=1)) as client:
            await replicate(manifest, signature, depot.store.chunks, client, patience=0.1)


# In a mount namespace of its own, so that nothing stays behind whatever happens; then the relay takes its place.
ON_A_SMALL_DISK = """
import os, subprocess, sys
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", sys.argv[1]], check=True)
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_a_relay_without_room_says_so_serves_on_and_takes_more_when_there_is_room(
    origin: Origin, tmp_path: Path
) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare to mount a small tmpfs: a full disk under a whole relay is NOT tested")
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"cannot make a mount namespace here: {probe.stderr.strip()}")
    disk = tmp_path / "disk"
    disk.mkdir()
    config = tmp_path / "relay.yaml"
    config.write_text(f"listen: 127.0.0.1:0\nstore: disk:{disk}/relay\nfree_floor: {2 << 20}\n")
    under = ("unshare", "-m", sys.executable, "-c", ON_A_SMALL_DISK, disk)
    with RelayProcess(tmp_path, "--config", config, under=under) as relay:
        assert origin.replicate(relay.url).code == 0
        inside = Path(f"/proc/{relay.pid}/root{disk}")
        assert not (disk / "relay").exists(), "the small disk is the relay's alone"
        filler = inside / "filler"
        filler.write_bytes(bytes(18 << 20))
        refused = origin.replicate(relay.url, "2.0.0", "--patience", "0.2")
        assert refused.code == 1
        assert f"relay {relay.url} has no space left (507 store_full)" in refused.err
        seen = os.statvfs(inside)
        assert seen.f_bavail * seen.f_frsize >= 2 << 20, "the floor was kept"
        assert origin.pull(relay.url, tmp_path / "root").code == 0
        assert [entry["version"] for entry in status(tmp_path, relay.url)["packages"]] == ["1.0.0"]
        pid = relay.pid
        filler.unlink()
        assert json.loads(origin.replicate(relay.url, "2.0.0", "--json").out)["failed"] == []
        assert relay.pid == pid
        assert relay.is_alive
