"""Proxies of the environment, as a company's machine has them: for releases, relays' clients and agents alike."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from harness.farm import Farm
from harness.process import Done
from harness.proxy import forward_proxy, plain_answer

CLEAR = {f"{each}_proxy": "" for each in ("http", "https", "all", "no")}
"""What the tests' own environment says of proxies has no part in it."""


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    with Farm(tmp_path_factory.mktemp("farm")) as farm:
        farm.add_relay("fra")
        machine = farm.add_agent("web1")
        farm.add_package("Acme.Web", "1.0.0", {"a.txt": "x"})
        step = {"name": "web", "roles": ["web"], "deploy": "web", "to": str(machine.root), "strategy": "rolling"}
        farm.write_process(packages={"web": "Acme.Web"}, steps=[step])
        farm.write_environment()
        machine.start()
        yield farm


def proxied(**variables: str) -> dict[str, str]:
    """Lower case counts first: what is not given is empty."""
    given = {name.lower() for name in variables}
    return {name: value for name, value in CLEAR.items() if name not in given} | variables


async def deploy(farm: Farm, label: str, **variables: str) -> Done:
    return await asyncio.to_thread(farm.deploy, label, "--package", "web=1.0.0", **proxied(**variables))


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"http_proxy": "socks5://127.0.0.1:1080"}, "http_proxy names a proxy of the kind socks5://"),
        ({"http_proxy": "http://proxy:port"}, "http_proxy is not the URL of a proxy"),
        ({"http_proxy": "http://proxy:1", "no_proxy": "10.0.0.0/99"}, "no_proxy has an entry that cannot be read"),
    ],
)
async def test_a_deployment_with_a_variable_that_cannot_be_used_is_refused_before_it_begins(farm, variables, said):
    label = said.replace(" ", "-").replace("/", "").replace(":", "")
    done = await deploy(farm, label, **variables)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert "Traceback" not in done.err
    assert label not in farm.do("release", "history").out


async def test_an_agent_whose_relays_cannot_be_asked_for_a_variable_does_not_start(farm):
    home = farm.agents["web1"].home.with_name("web1-proxied")
    pins = farm.home / "trust" / "trust.json"
    farm.do("agent", "init", "--home", home, "--name", "m2", "--relay", farm.urls["fra"], "--trust", pins)
    done = await asyncio.to_thread(
        farm.call, "agent", "serve", "--home", home, **proxied(http_proxy="socks5://127.0.0.1:1080")
    )
    assert done.code == 2
    assert "http_proxy names a proxy of the kind socks5://" in done.err
    assert "Traceback" not in done.err


async def test_a_release_goes_through_the_proxy_and_past_it_where_no_proxy_says_so(farm):
    async with forward_proxy() as proxy:
        done = await deploy(farm, "through", http_proxy=proxy.url)
        assert done.code == 0, done
        assert {line.split("/v1/")[0] for line in proxy.asked} >= {f"GET {farm.urls['fra']}", f"PUT {farm.urls['fra']}"}
        before = len(proxy.asked)
        done = await deploy(farm, "past", http_proxy=proxy.url, no_proxy="example.test, 127.0.0.0/8")
        assert done.code == 0, done
        assert len(proxy.asked) == before


async def test_a_proxy_that_answers_in_place_of_the_relay_is_the_one_that_is_named(farm):
    async with forward_proxy(plain_answer(502)) as proxy:
        words = ("agent", "relays", "--home", farm.agents["web1"].home, "--json")
        done = await asyncio.to_thread(farm.do, *words, **proxied(http_proxy=proxy.url))
    [relay] = done.json["relays"]
    said = f"the proxy 127.0.0.1:{proxy.port} (of http_proxy) answers with status 502 in place of relay {relay['url']}"
    assert said in relay["error"]
