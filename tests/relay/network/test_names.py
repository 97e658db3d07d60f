"""Where names lead: answers are kept for as long as they may be, and connections follow them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from aiohttp import web
from harness.relays import CLIENT_LIMITS, small_server

from relay.errors import UnreachableError
from relay.network.names import FAILED_SECONDS, LEAST_SECONDS, KeptNames
from relay.network.way import Way
from relay.protocol.client import RelayClient


class World:
    """A clock, and a name server whose answer can be changed."""

    def __init__(self) -> None:
        self.now = 100.0
        self.answer: tuple[Sequence[str], float] | None = (("10.0.0.1",), 30.0)
        self.asked = 0
        self.names = KeptNames(self.look_up, lambda: self.now)

    async def look_up(self, host: str) -> tuple[Sequence[str], float]:
        self.asked += 1
        await asyncio.sleep(0)
        if self.answer is None:
            raise UnreachableError("no server answers")
        return self.answer


async def test_an_answer_is_kept_for_its_time_and_no_longer() -> None:
    world = World()
    assert await world.names.addresses("a") == ("10.0.0.1",)
    world.answer = (("10.0.0.2",), 5.0)
    world.now += 29.9
    assert await world.names.addresses("a") == ("10.0.0.1",)
    world.now += 0.2
    assert await world.names.addresses("a") == ("10.0.0.2",)
    world.answer = (("10.0.0.3",), 0.0)
    world.now += 5.1
    assert await world.names.addresses("a") == ("10.0.0.3",)
    world.answer = (("10.0.0.4",), 0.0)
    world.now += LEAST_SECONDS
    assert await world.names.addresses("a") == ("10.0.0.4",)
    assert world.asked == 4


async def test_many_who_ask_at_once_ask_once() -> None:
    world = World()
    asking = [asyncio.create_task(world.names.addresses("a")) for _ in range(20)]
    await asyncio.sleep(0)
    asking[0].cancel()
    found = await asyncio.gather(*asking[1:])
    assert set(found) == {("10.0.0.1",)}
    assert world.asked == 1


async def test_dns_that_fails_changes_nothing_and_is_asked_again_soon() -> None:
    world = World()
    await world.names.addresses("a")
    world.answer = None
    world.now += 31
    assert await world.names.addresses("a") == ("10.0.0.1",)
    world.answer = (("10.0.0.2",), 30.0)
    assert await world.names.addresses("a") == ("10.0.0.1",)
    world.now += FAILED_SECONDS
    assert await world.names.addresses("a") == ("10.0.0.2",)


async def test_a_name_that_was_never_known_fails_and_one_that_is_remembered_does_not() -> None:
    world = World()
    world.answer = None
    with pytest.raises(UnreachableError):
        await world.names.addresses("a")
    world.names.remember("b", ("10.9.9.9",))
    world.names.remember("c", ())
    assert await world.names.addresses("b") == ("10.9.9.9",)
    with pytest.raises(UnreachableError):
        await world.names.addresses("c")


async def test_connections_are_left_only_where_the_name_leads_elsewhere() -> None:
    world = World()
    world.answer = (("10.0.0.1",), 0.0)
    way = Way("a", world.names)
    assert not await way.leads_elsewhere(), "nothing was connected yet"
    (found,) = await way.resolve("a", 80)
    assert (found["hostname"], found["host"]) == ("a", "10.0.0.1")
    for answer, elsewhere in (
        (("10.0.0.1", "10.0.0.9"), False),  # one more
        ((), False),  # it vanished: there is nowhere else to go
        (("10.0.0.2",), True),
    ):
        world.answer = (answer, 0.0)
        world.now += LEAST_SECONDS
        assert await way.leads_elsewhere() is elsewhere
    assert not await way.leads_elsewhere(), "told once"
    world.answer = ((), 0.0)
    world.now += LEAST_SECONDS
    with pytest.raises(OSError, match="no address"):
        await way.resolve("a", 80)


async def test_a_client_goes_where_the_name_leads_now_and_what_runs_is_not_cut() -> None:
    world, begun, may_end = World(), asyncio.Event(), asyncio.Event()

    async def slow(_request: web.Request) -> web.Response:
        begun.set()
        await may_end.wait()
        return web.json_response({"status": "ok", "versions": [1], "time": 1})

    async def quick(_request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "versions": [1], "time": 2})

    async with small_server([web.get("/v1/health", slow)]) as old:
        port = int(old.rpartition(":")[2])
        runner = web.AppRunner(app := web.Application())
        app.add_routes([web.get("/v1/health", quick)])
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.2", port).start()
        world.answer = (("127.0.0.1",), 0.0)
        try:
            async with RelayClient(f"http://relay.test:{port}", names=world.names, limits=CLIENT_LIMITS) as client:
                running = asyncio.create_task(client.health())
                await begun.wait()
                world.answer = (("127.0.0.2",), 0.0)
                world.now += LEAST_SECONDS
                assert (await client.health()).time == 2
                may_end.set()
                assert (await running).time == 1
                assert (await client.health()).time == 2
        finally:
            await runner.cleanup()
