"""A relay that serves follows its configuration: tokens, peers and certificates, at SIGHUP or when files change."""

from __future__ import annotations

import asyncio
import signal
import ssl
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import trustme
import yaml
from harness.process import run, wait_for
from harness.relays import CLIENT_LIMITS, RelayProcess, token

from relay.config import Peer, PeerToken, RelayConfig, Tls, TokenRecord
from relay.errors import UsageError
from relay.protocol import messages
from relay.protocol.client import RelayClient
from relay.protocol.connection import Request, TokenRefusedError
from relay.protocol.credentials import tls_from
from relay.server.app import Live, changes_of
from relay.server.http.tokens import make_token

pytestmark = pytest.mark.processes

UNUSABLE = {
    "tokens: [": "is not YAML",
    "tokens: nonsense": "tokens",
    "tokens: [{id: zz}]": "tokens",
    "listens: x": "listens",
    "": "says nothing",
    "tls: {certificate: /nowhere, key: /nowhere}": "the certificate /nowhere cannot be read: No such file",
    "limits: {drain: 3}": "limits",
    "peers: [{url: nonsense}]": "is not a relay's URL",
}
RELOADED, REFUSED = "relay.reloaded", "relay.reload_refused"


class Served:
    """A relay process and its relay.yaml."""

    def __init__(self, folder: Path, **document: Any) -> None:
        self.config = folder / "relay.yaml"
        self.document = {"listen": "127.0.0.1:0"} | document
        self.write()
        self.relay = RelayProcess(folder / "relay", "--config", self.config)

    @property
    def log(self) -> str:
        assert self.relay.process is not None
        return self.relay.process.err

    def write(self, *records: TokenRecord, text: str | None = None) -> None:
        if records:
            self.document["tokens"] = [msgspec.to_builtins(each) for each in records]
        other = self.config.with_name("new.yaml")
        other.write_text(yaml.safe_dump(self.document) if text is None else text)
        other.rename(self.config)

    def hang_up(self, word: str = RELOADED) -> str:
        """SIGHUP; the line of the log that answers it."""
        before = self.log.count(word)
        assert self.relay.process is not None
        self.relay.process.send_signal(signal.SIGHUP)
        wait_for(lambda: self.log.count(word) > before or not self.relay.is_alive, 30.0)
        return [line for line in self.log.splitlines() if word in line][-1]

    def client(self, bearer: str, **how: Any) -> RelayClient:
        return RelayClient(self.relay.url, token=bearer, limits=CLIENT_LIMITS, **how)


OLD, NEW, KEPT = (make_token(["write"], datetime.now(UTC), name=name) for name in ("old", "new", "kept"))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path, tokens=[msgspec.to_builtins(each[1]) for each in (OLD, KEPT)], site="fra")
    with made.relay:
        yield made


async def test_scenario_38_a_revoked_token_stops_the_next_request_and_a_new_one_counts(served: Served) -> None:
    async with served.client(OLD[0]) as old, served.client(KEPT[0]) as kept, served.client(NEW[0]) as new:
        assert await old.packages() == []
        with pytest.raises(TokenRefusedError, match="unknown, revoked or has ended"):
            await new.packages()
        served.document["site"] = "iad"
        served.write(NEW[1], KEPT[1])
        told = served.hang_up()
        with pytest.raises(TokenRefusedError):
            await old.packages()  # over the connection that served it before
        assert await new.packages() == await kept.packages() == []
        assert (await kept.health()).site == "iad"
    assert f"token {NEW[1].id} (new) is new" in told
    assert f"token {OLD[1].id} (old) is revoked" in told
    assert "site differs" in told
    assert KEPT[1].id not in told
    assert "listen" not in told


async def test_what_cannot_be_used_is_refused_by_name_and_changes_nothing(served: Served) -> None:
    async with served.client(OLD[0]) as client:
        for text, why in UNUSABLE.items():
            served.write(text=text)
            told = served.hang_up(REFUSED)
            assert why in told, text
            assert await client.packages() == []
        served.config.unlink()
        assert "relay.yaml" in served.hang_up(REFUSED)
        assert await client.packages() == []
    served.write(NEW[1])
    assert "is revoked" in served.hang_up()


async def test_what_runs_is_not_touched_by_many_signals_and_not_by_its_tokens_end(served: Served) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"x" * 100_000
        served.write(NEW[1], KEPT[1])
        assert served.relay.process is not None
        for _ in range(5):
            served.relay.process.send_signal(signal.SIGHUP)
        await asyncio.to_thread(served.hang_up)
        yield b"x" * 100_000

    async with served.client(OLD[0]) as old:
        answer = await old.upload(
            Request("PUT", messages.LINE, content_type="application/octet-stream"), pieces(), messages.LineAnswer
        )
        assert answer.bytes == 200_000
        with pytest.raises(TokenRefusedError):
            await old.packages()
    assert "nothing differs" in served.hang_up()
    assert served.relay.stop().code == 0


async def test_a_relay_does_not_open_itself_and_begins_to_ask(tmp_path: Path) -> None:
    served = Served(tmp_path)
    with served.relay:
        async with RelayClient(served.relay.url, limits=CLIENT_LIMITS) as nobody:
            assert await nobody.packages() == []
            served.write(OLD[1])
            served.hang_up()
            with pytest.raises(TokenRefusedError):
                await nobody.packages()
            served.document["tokens"] = []
            served.write()
            assert "is revoked" in served.hang_up()
            with pytest.raises(TokenRefusedError):
                await nobody.packages()


# --- certificates


class Shown:
    """Certificate files of one authority."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(str(self.ca))
        self.tls = {"certificate": str(folder / "relay.crt"), "key": str(folder / "relay.key")}

    def issue(self, *names: str, certificate: bool = True, key: bool = True, **how: Any) -> None:
        made = self.authority.issue_cert(*names, **how)
        for wanted, path, pem in ((key, "key", made.private_key_pem), (certificate, "crt", made.cert_chain_pems[0])):
            if wanted:
                other = self.folder / "new"
                pem.write_to_path(str(other))
                other.rename(self.folder / f"relay.{path}")

    async def names(self, port: int) -> set[str]:
        """Those of the certificate that a new connection is shown."""
        context = ssl.create_default_context(cafile=self.ca)
        context.check_hostname = False
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        found = {name for _, name in writer.get_extra_info("peercert")["subjectAltName"]}
        writer.close()
        return found


async def test_a_certificate_that_is_replaced_is_shown_to_the_next_connection(tmp_path: Path) -> None:
    shown = Shown(tmp_path)
    shown.issue("127.0.0.1", "first.example")
    served = Served(tmp_path, tls=shown.tls, tokens=[msgspec.to_builtins(KEPT[1])])
    with served.relay:
        port = served.relay.port
        async with served.client(KEPT[0], tls=tls_from(str(shown.ca))) as client:
            await client.packages()
            shown.issue("127.0.0.1", "second.example", key=False)
            assert "first.example" in await shown.names(port), "a key that is not the certificate's was put to use"
            assert "file.not_read_again" in served.log
            assert "key" in served.log
            assert "first.example" in await shown.names(port)
            await client.packages()
            shown.issue("127.0.0.1", "third.example")
            assert "third.example" in await shown.names(port)
            await client.packages()  # over the connection that was shown the first
        (tmp_path / "other").mkdir()
        other = Shown(tmp_path / "other")
        other.issue("127.0.0.1", "fourth.example")
        served.document["tls"] = other.tls
        served.write()
        assert "tls differs" in served.hang_up()
        assert "fourth.example" in await other.names(port)


async def test_an_authority_that_is_replaced_is_trusted_and_the_former_no_longer(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    one, two = Shown(tmp_path), Shown(tmp_path / "two")
    one.issue("127.0.0.1")
    two.issue("127.0.0.1")
    served = Served(tmp_path, tls=two.tls)
    with served.relay:
        async with RelayClient(served.relay.url, tls=tls_from(str(one.ca)), limits=CLIENT_LIMITS) as client:
            with pytest.raises(Exception, match="not trusted"):
                await client.health()
            former = one.ca.read_bytes()
            one.ca.write_bytes(b"")
            with pytest.raises(Exception, match="not trusted"):
                await client.health()
            one.ca.write_bytes(two.ca.read_bytes())
            await client.health()
            one.ca.write_bytes(former)
            with pytest.raises(Exception, match="not trusted"):
                await client.health()


# --- what ends


async def test_what_ends_soon_or_has_ended_is_told_in_log_metrics_and_status(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    shown = Shown(tmp_path)
    shown.issue("127.0.0.1", not_after=now + timedelta(days=5, hours=1))
    far = make_token(["read"], now, days=20, name="far")
    near = make_token(["read"], now, days=3, name="near")
    ended = make_token(["read"], now - timedelta(days=10), days=3, name="ended")
    served = Served(tmp_path, tls=shown.tls, tokens=[msgspec.to_builtins(each[1]) for each in (far, near, ended)])
    with served.relay:
        wait_for(lambda: served.log.count("credential.") == 3, 30.0)
        words = ("run", served.relay.home, "relay", "status", "--relay", served.relay.url, "--ca-file", shown.ca)
        told = run(*words[1:], "--json", WAYSTATION_TOKEN=far[0]).json["warnings"]  # type: ignore[arg-type]
        async with served.client(far[0], tls=tls_from(str(shown.ca))) as client:
            metrics = (await client.fetch(Request("GET", messages.METRICS))).decode()
            health = await client.health()
        async with served.client("", tls=tls_from(str(shown.ca))) as stranger:
            assert (await stranger.health()).endings == ()
    assert len(told) == 3
    for text in (served.log, "\n".join(told)):
        assert f"token {near[1].id} (near) ends in 2 days" in text
        assert f"token {ended[1].id} (ended) has ended" in text
        assert "certificate ends in 5 days" in text
        assert far[1].id not in text
    assert f'waystation_ends_timestamp_seconds{{id="{near[1].id}",name="near",what="token"}}' in metrics
    assert 'waystation_ends_timestamp_seconds{id="",name="",what="certificate"}' in metrics
    assert health.token == messages.Ending("token", far[1].id, "far", far[1].expires.timestamp())


async def test_health_says_whether_a_token_is_good_for_a_scope(served: Served) -> None:
    reads, record = token("read")
    served.write(record, KEPT[1])
    served.hang_up()
    for bearer, scope, status in (
        (reads, "read", 200),
        (reads, "write", 403),
        (KEPT[0], "read", 200),
        (OLD[0], "read", 401),
        ("", "read", 401),
        ("", "", 200),
        (OLD[0], "", 200),
        (reads, "everything", 400),
    ):
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        query = f"?scope={scope}" if scope else ""
        async with (
            aiohttp.ClientSession(served.relay.url, headers=headers) as session,
            session.get(f"{messages.HEALTH}{query}") as answer,
        ):
            assert answer.status == status, (bearer[:8], scope)


# --- what a reload says


def test_what_waits_for_the_next_start_is_named() -> None:
    old = RelayConfig(parent=Peer("https://hq.example"), tls=None)
    new = RelayConfig(
        listen="127.0.0.1:1",
        free_floor=1,
        parent=Peer("https://other.example"),
        tls=Tls("a", "b"),
        peers=[Peer("https://p")],
    )
    assert changes_of(old, new) == (
        "peers differs",
        *(f"{name} differs, and waits for the next start" for name in ("listen", "free_floor", "tls", "parent")),
    )
    same_parent = msgspec.structs.replace(old, parent=Peer("https://hq.example", PeerToken(env="X")))
    assert changes_of(old, same_parent) == ("parent differs",)
    assert changes_of(old, old) == ()


def test_all_or_nothing_of_a_configuration_is_taken_over() -> None:
    live = Live(RelayConfig(tokens=[msgspec.to_builtins(OLD[1])]))
    with pytest.raises(UsageError):
        live.replace(RelayConfig(tokens=[msgspec.to_builtins(NEW[1])], peers=[Peer("nonsense")]))
    assert live.access.tokens.get(OLD[1].id)
    assert not live.access.tokens.get(NEW[1].id)
