"""Whose turn it is on a machine: nothing overlaps, and of two orchestrators one at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from harness.orders_kit import DEPLOYMENT, OTHER, Desk, desk_in

from agent.orders.orders import Order, Settle, Switch
from agent.orders.turns import Turns

HEX = "0" * 64
THEIRS = "f" * 32


@cache
def _desk() -> Desk:
    return desk_in(Path(mkdtemp()))


def order(deployment: str = DEPLOYMENT, *, settle: bool = False, **changes: str) -> Order:
    action = Settle("/srv", HEX, HEX) if settle else Switch("/srv", HEX)
    return _desk().order(action, deployment=deployment, operation=f"{deployment}/1/web1/x/1", project="shop", **changes)


class Machine:
    """Does what has its turn until it is told to end."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.runs: list[str] = []
        self.words: dict[str, str] = {}
        self.ends: dict[str, asyncio.Event] = {}

    def begin(self, name: str, given: Order) -> asyncio.Task[None]:
        self.ends[name] = asyncio.Event()
        return asyncio.create_task(self._do(name, given))

    async def _do(self, name: str, given: Order) -> None:
        async with self.turns.one(given, lambda words: self.words.update({name: words})):
            self.runs.append(name)
            assert len(self.runs) == 1
            await self.ends[name].wait()
            self.runs.remove(name)

    async def end(self, name: str) -> None:
        self.ends[name].set()
        await until(lambda: name not in self.runs)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.001)


@pytest.fixture
def machine() -> Machine:
    return Machine(Turns(silent_seconds=3600.0))


async def test_one_operation_at_a_time_in_the_order_in_which_they_came(machine: Machine) -> None:
    for name in ("first", "second", "third"):
        machine.begin(name, order())
        await asyncio.sleep(0)
    await until(lambda: machine.runs == ["first"] and len(machine.words) == 3)
    assert machine.words["second"] == f"it waits: switch of deployment {DEPLOYMENT} (shop in test) runs on this machine"
    for name, then in (("first", "second"), ("second", "third")):
        await machine.end(name)
        await until(lambda then=then: machine.runs == [then])
    assert machine.words["third"] == "", "it waits no more"
    await machine.end("third")


async def test_another_orchestrators_deployment_waits_until_the_turn_is_settled(machine: Machine) -> None:
    machine.begin("ours", order())
    await until(lambda: machine.runs == ["ours"])
    machine.begin("theirs", order(OTHER, journal=THEIRS))
    await machine.end("ours")
    # Between two operations of the turn.
    await until(lambda: "is turned by" in machine.words.get("theirs", ""))
    assert "of another orchestrator" in machine.words["theirs"]
    machine.begin("settle", order(settle=True))
    await until(lambda: machine.runs == ["settle"])
    await machine.end("settle")
    await until(lambda: machine.runs == ["theirs"])
    await machine.end("theirs")


async def test_deployments_of_one_journal_go_on_in_turn_as_they_lease_the_machine_there(machine: Machine) -> None:
    machine.begin("ours", order())
    await until(lambda: machine.runs == ["ours"])
    machine.begin("desk", order(OTHER))
    await machine.end("ours")
    await until(lambda: machine.runs == ["desk"])
    await machine.end("desk")


async def test_a_turn_ends_with_its_deployment(machine: Machine) -> None:
    machine.begin("ours", order())
    await until(lambda: machine.runs == ["ours"])
    machine.begin("theirs", order(OTHER, journal=THEIRS))
    await machine.end("ours")
    await machine.turns.end(OTHER)
    await asyncio.sleep(0)
    assert machine.runs == []
    await machine.turns.end(DEPLOYMENT)
    await until(lambda: machine.runs == ["theirs"])
    await machine.end("theirs")


async def test_a_turn_that_is_silent_keeps_nobody_for_ever_and_one_that_verifies_is_not_silent() -> None:
    machine = Machine(Turns(silent_seconds=0.0))
    machine.begin("ours", order())
    await until(lambda: machine.runs == ["ours"])
    machine.begin("theirs", order(OTHER, journal=THEIRS))
    async with machine.turns.beside(order()):
        await machine.end("ours")
        await asyncio.sleep(0.01)
        assert machine.runs == []
    await until(lambda: machine.runs == ["theirs"])
    await machine.end("theirs")


async def test_who_is_stopped_while_it_waits_keeps_nobody(machine: Machine) -> None:
    machine.begin("first", order())
    await until(lambda: machine.runs == ["first"])
    second, _ = machine.begin("second", order()), machine.begin("third", order())
    await until(lambda: len(machine.words) == 3)
    second.cancel()
    await asyncio.wait([second])
    await machine.end("first")
    await until(lambda: machine.runs == ["third"])
    await machine.end("third")
