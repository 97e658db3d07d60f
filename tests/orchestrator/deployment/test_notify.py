"""Receivers get signed CloudEvents; whatever they do, a deployment goes on, and a secret URL is shown nowhere."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pytest
from aiohttp import web
from harness.origins import Keys, trust_keys
from harness.proxy import forward_proxy, plain_answer
from harness.receiver import verify_notification
from harness.relays import small_server

from orchestrator.deployment import notify
from orchestrator.deployment.notify import (
    ATTEMPTS,
    SIGNATURE_HEADER,
    Notifier,
    cloud_event,
    target_of,
)
from orchestrator.plan.plan import NotifyPlan, SecretSource
from orchestrator.trust.keyring import load_signer
from orchestrator.trust.secrets import SecretStore
from relay.errors import SignatureError

EVENT = {
    "event": "finished",
    "project": "web shop",
    "environment": "production",
    "deployment": "01ARZ3NDEKTSV4RRFFQ69G5FAV",
    "label": "1.4.2",
    "machines": {"web1": "deployed"},
    "time": 1_700_000_000.25,
    "id": 17,
}
NOTHING = SecretStore({})


@dataclass
class Receiver:
    """Answers with `statuses` one after another, the last one for ever."""

    statuses: list[int] = field(default_factory=lambda: [204])
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    retry_after: str = ""

    async def handle(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.read())
        self.headers.append(dict(request.headers))
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        told = {"Retry-After": self.retry_after} if self.retry_after and status == 503 else {}
        return web.Response(status=status, headers={"Location": "/other"} if 300 <= status < 400 else told)

    @property
    def routes(self) -> list[web.RouteDef]:
        return [web.post("/{path:.*}", self.handle)]


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return trust_keys(tmp_path / "trust")


async def send(keys: Keys, *plans: NotifyPlan, secrets=NOTHING, event=EVENT, seconds: float = 5.0) -> list[str]:
    return await Notifier(plans, secrets, load_signer(keys.folder, "order"), seconds).notify(event)


async def test_a_receiver_gets_a_cloud_event_that_it_can_verify(keys: Keys) -> None:
    receiver = Receiver()
    async with small_server(receiver.routes) as url:
        assert await send(keys, NotifyPlan(("finished",), f"{url}/hook")) == []
    [body], [headers] = receiver.bodies, receiver.headers
    assert headers["Content-Type"] == "application/cloudevents+json; charset=utf-8"
    verify_notification(body, headers[SIGNATURE_HEADER], keys.pins.order)
    said = json.loads(body)
    assert datetime.fromisoformat(said.pop("time")).timestamp() == EVENT["time"]
    assert said == {
        "specversion": "1.0",
        "id": "01ARZ3NDEKTSV4RRFFQ69G5FAV/17",
        "source": "/waystation/web%20shop/production",
        "type": "dev.waystation.deployment.finished",
        "subject": "01ARZ3NDEKTSV4RRFFQ69G5FAV",
        "datacontenttype": "application/json",
        "data": EVENT,
    }


async def test_an_altered_or_foreign_notification_does_not_verify(keys: Keys, tmp_path: Path) -> None:
    receiver = Receiver()
    async with small_server(receiver.routes) as url:
        await send(keys, NotifyPlan(("finished",), url))
    body, header = receiver.bodies[0], receiver.headers[0][SIGNATURE_HEADER]
    for wrong_body, wrong_header, pinned in (
        (body.replace(b"1.4.2", b"1.4.3"), header, keys.pins.order),
        (body, header, trust_keys(tmp_path / "other").pins.order),
        (body, header, keys.pins.package),
        (body, "no base64!", keys.pins.order),
        (body, "", keys.pins.order),
    ):
        with pytest.raises(SignatureError):
            verify_notification(wrong_body, wrong_header, pinned)


async def test_only_who_asked_for_an_event_gets_it(keys: Keys) -> None:
    receiver = Receiver()
    async with small_server(receiver.routes) as url:
        plans = [NotifyPlan(("failed", "paused"), f"{url}/one"), NotifyPlan(("failed", "finished"), f"{url}/two")]
        assert await send(keys, *plans) == []
        assert len(receiver.bodies) == 1
        assert await send(keys, *plans, event={**EVENT, "event": "failed"}) == []
        assert len(receiver.bodies) == 3


async def test_a_receiver_with_trouble_is_asked_again_with_the_same_event(keys: Keys) -> None:
    receiver = Receiver([503, 429, 200])
    async with small_server(receiver.routes) as url:
        assert await send(keys, NotifyPlan(("finished",), url)) == []
    assert len(receiver.bodies) == ATTEMPTS == 3
    assert len(set(receiver.bodies)) == 1


async def test_a_receiver_that_asks_for_time_gets_it_up_to_a_bound(keys: Keys, monkeypatch) -> None:
    monkeypatch.setattr(notify, "LONGEST_ASKED", 0.7)
    receiver = Receiver([503, 200], retry_after="86400")
    began = asyncio.get_running_loop().time()
    async with small_server(receiver.routes) as url:
        assert await send(keys, NotifyPlan(("finished",), url)) == []
    assert asyncio.get_running_loop().time() - began >= 0.7


async def test_a_receiver_is_told_through_the_environments_proxy(keys: Keys, monkeypatch) -> None:
    receiver = Receiver()
    async with small_server(receiver.routes) as url, forward_proxy() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "")
        assert await send(keys, NotifyPlan(("finished",), f"{url}/hook")) == []
        assert proxy.asked == [f"POST {url}/hook HTTP/1.1"]
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert await send(keys, NotifyPlan(("finished",), f"{url}/hook")) == []
        assert (len(proxy.asked), len(receiver.bodies)) == (1, 2)


async def test_a_proxy_that_cannot_be_used_is_named_and_the_deployment_goes_on(keys: Keys, monkeypatch) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr(notify, "ATTEMPTS", 1)
    plan = NotifyPlan(("finished",), "http://hook.example/secret")
    async with forward_proxy(plain_answer(502)) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        [error] = await send(keys, plan)
    assert f"the proxy 127.0.0.1:{proxy.port} (of http_proxy) answers with status 502" in error
    assert "secret" not in error
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1080")
    [error] = await send(keys, plan)
    assert "http_proxy names a proxy of the kind socks5://" in error


@pytest.mark.parametrize(("status", "asked"), [(500, 3), (404, 1), (401, 1), (307, 1)])
async def test_what_a_receiver_refuses_is_told(keys: Keys, status: int, asked: int) -> None:
    receiver = Receiver([status])
    async with small_server(receiver.routes) as url:
        [error] = await send(keys, NotifyPlan(("finished",), f"{url}/hook?key=abc"))
    assert error == f"{url.removeprefix('http://')} could not be told: it answers with status {status}"
    assert len(receiver.bodies) == asked


async def test_a_receiver_that_hangs_and_one_that_is_gone_keep_nobody_from_being_told(keys: Keys) -> None:
    receiver, hung = Receiver(), []

    async def hang(request: web.Request) -> web.Response:
        hung.append(request.path)
        await asyncio.sleep(3600)
        return web.Response()

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        async with small_server([web.post("/hang", hang), *receiver.routes]) as url:
            plans = [NotifyPlan(("finished",), each) for each in (f"{url}/hang", gone, f"{url}/well")]
            errors = await send(keys, *plans, seconds=0.2)
    assert len(hung) == ATTEMPTS
    assert len(receiver.bodies) == 1
    assert len(errors) == 2
    assert "did not answer in time" in errors[0]
    assert "cannot be reached" in errors[1]


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:1/{s}", "http://no such host/{s}", "ftp://x/{s}", "{s}", "https://{s}.invalid/", "http://[/{s}"],
)
async def test_a_secret_url_is_shown_in_no_error_and_no_log(
    keys: Keys, monkeypatch, caplog: pytest.LogCaptureFixture, url: str
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("WS_TEST_HOOK", url.format(s="very-secret"))
    secrets = SecretStore({"chat_hook": SecretSource(env="WS_TEST_HOOK")})
    [error] = await send(keys, NotifyPlan(("finished",), url_secret="chat_hook"), secrets=secrets)
    assert error.startswith("the receiver in the secret 'chat_hook' could not be told")
    assert "very-secret" not in error
    assert "very-secret" not in caplog.text


async def test_a_secret_url_is_told(keys: Keys, monkeypatch) -> None:
    receiver = Receiver()
    secrets = SecretStore({"chat_hook": SecretSource(env="WS_TEST_HOOK")})
    async with small_server(receiver.routes) as url:
        monkeypatch.setenv("WS_TEST_HOOK", f"{url}/T0/B0/key")
        assert await send(keys, NotifyPlan(("finished",), url_secret="chat_hook"), secrets=secrets) == []
        monkeypatch.delenv("WS_TEST_HOOK")
        [error] = await send(keys, NotifyPlan(("finished",), url_secret="chat_hook"), secrets=secrets)
    assert "WS_TEST_HOOK is not set" in error
    assert len(receiver.bodies) == 1


async def test_an_event_that_cannot_be_said_is_an_error_text(keys: Keys) -> None:
    for event in ({"event": "finished"}, {**EVENT, "what": object()}, {**EVENT, "time": "noon"}):
        [error] = await send(keys, NotifyPlan(("finished",), "http://127.0.0.1:1/"), event=event)
        assert "no receiver was told of 'finished'" in error


def test_an_event_without_a_number_is_named_by_its_kind() -> None:
    event = {key: value for key, value in EVENT.items() if key not in {"id", "time"}}
    assert json.loads(cloud_event(event))["id"] == "01ARZ3NDEKTSV4RRFFQ69G5FAV/finished"


def test_a_target_is_told_without_its_path_and_user() -> None:
    assert target_of(NotifyPlan((), "https://user:pw@hooks.example:8443/T0/key?x=y")) == "hooks.example:8443"
