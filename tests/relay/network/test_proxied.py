"""A relay behind a proxy: who is said to have failed, in plain requests and in tunnels."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import replace

import pytest
import trustme
from aiohttp import web
from harness.proxy import forward_proxy, plain_answer, without_proxies
from harness.relays import CLIENT_LIMITS, running_relay

from relay.errors import UnreachableError, UntrustedError
from relay.network.proxies import ProxyError
from relay.protocol import messages
from relay.protocol.client import RelayClient

ONCE = replace(CLIENT_LIMITS, attempts=1)
FAR = "http://relay.example:7443"
FAR_TLS = "https://relay.example:7443"


@pytest.fixture
def environment(monkeypatch):
    """Sets variables, all others about proxies being absent."""
    return without_proxies(monkeypatch)


async def failure(url, **options):
    async with RelayClient(url, limits=ONCE, **options) as client:
        with pytest.raises((UnreachableError, UntrustedError)) as caught:
            await client.health()
    return caught.value


@pytest.mark.parametrize("url", [FAR, FAR_TLS])
@pytest.mark.parametrize("status", [403, 429, 500, 502, 503, 504])
async def test_an_answer_of_the_proxys_own_is_the_proxys(environment, url, status):
    async with forward_proxy(plain_answer(status, Retry_After="7")) as proxy:
        environment("ALL_PROXY", proxy.url)
        error = await failure(url, token="secret")
    assert isinstance(error, ProxyError)
    told = f"the proxy 127.0.0.1:{proxy.port} (of ALL_PROXY) answers with status {status} in place of relay {url}"
    assert error.message == told
    assert "NO_PROXY" in error.hint
    assert error.retry_after == 7.0


@pytest.mark.parametrize("url", [FAR, FAR_TLS])
async def test_a_proxy_that_wants_credentials_says_where_they_go(environment, url):
    async with forward_proxy(plain_answer(407)) as proxy:
        environment("ALL_PROXY", proxy.url)
        error = await failure(url)
    assert "wants credentials" in error.message
    assert "ALL_PROXY" in error.hint


@pytest.mark.parametrize("url", [FAR, FAR_TLS])
@pytest.mark.parametrize(("where", "why"), [("127.0.0.1:1", "Connection refused"), ("proxy.invalid:3128", "")])
async def test_a_proxy_that_cannot_be_reached_is_named(environment, url, where, why):
    environment("ALL_PROXY", f"http://{where}")
    error = await failure(url)
    assert isinstance(error, ProxyError)
    assert error.message.startswith(f"the proxy {where} (of ALL_PROXY) cannot be reached: {why}")


@pytest.mark.parametrize("answer", [plain_answer(200), b"", b"nonsense\r\n\r\n"])
async def test_where_it_is_not_certain_who_failed_the_proxy_is_told_beside_the_relay(environment, answer):
    async with forward_proxy(answer or b" ") as proxy:
        environment("HTTP_PROXY", proxy.url)
        error = await failure(FAR)
    assert FAR in error.message
    assert f"the proxy 127.0.0.1:{proxy.port} (of HTTP_PROXY)" in error.hint


async def test_a_relays_own_word_through_a_proxy_stays_the_relays(environment, tmp_path):
    async with running_relay(tmp_path / "relay") as relay, forward_proxy() as proxy:
        environment("http_proxy", proxy.url)
        async with relay.client(limits=ONCE) as client:
            assert (await client.health()).status == "ok"
        assert proxy.asked == [f"GET {relay.url}{messages.HEALTH} HTTP/1.1"]


async def test_a_tunnel_leads_to_the_relays_own_certificate(environment):
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)

    async def busy(_request):
        return web.Response(status=502, text="<html>")

    app = web.Application()
    app.add_routes([web.get(messages.HEALTH, busy)])
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        url = f"https://127.0.0.1:{runner.addresses[0][1]}"
        async with forward_proxy() as proxy:
            environment("https_proxy", proxy.url.replace("//", "//me:pass@"))
            error = await failure(url, tls=lambda: trusted)
            assert not isinstance(error, ProxyError), "what stands in the tunnel is the relay's"
            assert error.message.startswith(f"relay {url}")
            assert "certificate" in (await failure(url)).message
        assert proxy.asked == [f"CONNECT {url.removeprefix('https://')} HTTP/1.1"] * 2
        assert set(proxy.credentials) == {"Basic bWU6cGFzcw=="}
    finally:
        await runner.cleanup()


async def test_a_proxy_that_is_silent_is_named(environment, monkeypatch):
    async def sock_connect(_sock, _address):
        await asyncio.sleep(3600)

    monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", sock_connect)
    environment("HTTPS_PROXY", "http://127.0.0.1:3128")
    async with RelayClient(FAR_TLS, limits=replace(ONCE, connect_seconds=0.05)) as client:
        with pytest.raises(ProxyError, match=r"^the proxy 127.0.0.1:3128 \(of HTTPS_PROXY\) does not answer in time"):
            await client.health()
