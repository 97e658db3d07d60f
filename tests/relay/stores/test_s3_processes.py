"""Processes over a bucket: a relay that takes a package in, gives it out and is killed, and a lock that its holder left."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.farm import Farm
from harness.process import run
from harness.relays import RelayProcess
from harness.s3 import SECRET, S3Server, s3_server

from relay.stores.open import open_store


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


async def test_the_lock_of_a_process_of_this_machine_that_was_killed_is_free_at_once(server: S3Server) -> None:
    bucket = server.make_bucket()
    location = server.location(bucket)
    code = (
        "import os, asyncio\n"
        "from relay.stores.open import open_store\n"
        f"store = asyncio.run(open_store({location!r}))\n"
        "lock = store.exclusive('serve'); lock.__enter__()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code], check=False)
    assert done.returncode == -9
    assert "lock-serve" in server.keys(bucket), "it was held when its holder died"
    store = await open_store(location)
    with store.exclusive("serve"):
        pass
    await store.close()


def test_a_relay_over_a_bucket_takes_a_package_in_gives_it_out_and_goes_on_after_a_kill(
    server: S3Server, tmp_path: Path
) -> None:
    bucket = server.make_bucket()
    with Farm(tmp_path) as farm:
        relay = farm.add_relay("fra", "--store", server.location(bucket, "relays/fra"))
        agent = farm.add_agent("web1")
        farm.add_package("Acme.Web", "1.0.0", {"version.txt": "1.0.0\n", "payload.txt": "payload " * 50_000})
        sent = farm.do("package", "replicate", "Acme.Web", "1.0.0", "--relay", relay.url, "--json").json
        assert sent["relays"][0]["payload_bytes"] > 0
        relay.kill()
        relay.start()
        again = farm.do("package", "replicate", "Acme.Web", "1.0.0", "--relay", relay.url, "--json").json
        assert again["relays"][0]["payload_bytes"] == 0, "what a bucket acknowledged is there after a kill"

        agent.start()
        farm.write_process(
            packages={"web": "Acme.Web"},
            steps=[{"name": "web", "roles": ["web"], "deploy": "web", "to": str(agent.root), "apply": ["switch"]}],
        )
        farm.write_environment()
        done = farm.deploy("1.0.0", "--package", "web=1.0.0")
        assert done.code == 0, done.out + done.err
        assert farm.current("web1").startswith("1.0.0-")
        told = relay.stop()
        assert SECRET not in f"{told.out}{told.err}"
    kinds = {key.split("/")[2] for key in server.keys(bucket)}
    assert {"format", "chunks", "manifests", "packages"} <= kinds
    assert "lock-serve" not in kinds
    assert list((tmp_path / "relay-fra" / "buckets").glob(f"{bucket}-*/mail/*")), "mail is on this machine's disk"


def test_a_second_relay_over_a_bucket_is_refused_and_hears_who_has_it(server: S3Server, tmp_path: Path) -> None:
    location = server.location(server.make_bucket())
    with RelayProcess(tmp_path / "one", "--store", location):
        second = run(tmp_path / "two", "relay", "serve", "--listen", "127.0.0.1:0", "--store", location)
    assert second.code == 4
    assert "is locked for serve by pid" in second.err
    assert socket.gethostname() in second.err


def test_a_bucket_that_cannot_be_used_is_told_before_a_relay_listens(server: S3Server, tmp_path: Path) -> None:
    refused = run(tmp_path, "relay", "serve", "--listen", "127.0.0.1:0", "--store", server.location("never-made"))
    assert refused.code == 1
    assert "there is no bucket never-made" in refused.err
    assert "make it first" in refused.err
