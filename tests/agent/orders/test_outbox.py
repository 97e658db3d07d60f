"""What an agent has to say waits in its outbox; that relays get it, tests/agent/test_service.py shows."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from harness.orders_kit import DEPLOYMENT
from harness.process import eventually

from agent.orders.outbox import NOTES_MAX, Outbox
from relay.errors import ConflictError, UnreachableError
from relay.protocol import messages


@pytest.mark.parametrize("turns", range(6))
async def test_an_outbox_that_is_cancelled_in_the_moment_in_which_it_is_woken_ends(turns: int) -> None:
    """`asyncio.wait_for` would lose the cancellation (Python 3.11), and the agent would never end."""
    outbox = Outbox("web1", list)
    task = asyncio.create_task(outbox.run())
    for _ in range(10):
        await asyncio.sleep(0)
    outbox.lost("http://127.0.0.1:1")
    for _ in range(turns):
        await asyncio.sleep(0)

    task.cancel()

    done, _ = await asyncio.wait({task}, timeout=20)
    assert done == {task}


# --- relays that are not what they seem


@dataclass
class Box:
    """A relay as an outbox meets it: `habit` says what becomes of what is posted."""

    name: str
    habit: str = "takes"
    taken: list[str] = field(default_factory=list)
    posts: int = 0

    @property
    def url(self) -> str:
        return self.name


class Post:
    """In place of a mail client."""

    def __init__(self, box: Box) -> None:
        self.box = box

    async def post_reports(self, _name: str, request: messages.ReportsRequest) -> None:
        await self._post([f"{letter.operation[27:]} {letter.number}" for letter in request.reports])

    async def post_logs(self, _name: str, request: messages.LogsRequest) -> None:
        await self._post([f"{piece.operation[27:]} log" for piece in request.pieces])

    async def _post(self, what: list[str]) -> None:
        self.box.posts += 1
        await asyncio.sleep(0)
        if self.box.habit == "hangs":
            await asyncio.sleep(3600)
        if self.box.habit == "refuses":
            raise UnreachableError("no")
        if self.box.habit == "contradicts":
            raise ConflictError("another letter")
        self.box.taken += what


@pytest.fixture
def post(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.orders.outbox.MailClient", Post)
    monkeypatch.setattr("agent.orders.lanes.HANG_SECONDS", 0.05)


@asynccontextmanager
async def outbox_to(*boxes: Box) -> AsyncIterator[Outbox]:
    outbox = Outbox("web1", lambda: boxes)  # type: ignore[arg-type, return-value]
    task = asyncio.create_task(outbox.run())
    yield outbox
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def letter(name: str, number: int = 1) -> messages.ReportLetter:
    return messages.ReportLetter(f"{DEPLOYMENT}/{name}", number, b"signed")


def finish(outbox: Outbox, name: str) -> None:
    numbers = itertools.count(2)
    outbox.final(DEPLOYMENT, letter(name), lambda: letter(name, next(numbers)))


async def test_a_report_goes_to_two_relays_at_once_and_to_no_third(post: None) -> None:
    """One of them may keep it to itself."""
    boxes = Box("a"), Box("b"), Box("c")
    async with outbox_to(*boxes) as outbox:
        finish(outbox, "one")
        await eventually(lambda: boxes[0].taken == boxes[1].taken == ["one 1"])
        finish(outbox, "two")
        await eventually(lambda: "two 1" in boxes[0].taken and "two 1" in boxes[1].taken)

    assert boxes[2].posts == 0
    assert boxes[0].taken == ["one 1", "two 1"], "nothing is given twice"


async def test_a_relay_that_hangs_holds_up_no_report(post: None) -> None:
    boxes = Box("a", "hangs"), Box("b"), Box("c")
    async with outbox_to(*boxes) as outbox:
        for name in ("one", "two", "three"):
            finish(outbox, name)
            await eventually(lambda name=name: f"{name} 1" in boxes[1].taken)  # type: ignore[misc]
        await eventually(lambda: len(boxes[2].taken) == 3)

    assert boxes[0].posts == 1


async def test_a_relay_that_takes_nothing_is_replaced_by_the_next_and_left_alone_for_a_while(post: None) -> None:
    boxes = Box("a", "refuses"), Box("b"), Box("c")
    async with outbox_to(*boxes) as outbox:
        for name in ("one", "two", "three"):
            finish(outbox, name)
            await eventually(lambda name=name: f"{name} 1" in boxes[1].taken and f"{name} 1" in boxes[2].taken)  # type: ignore[misc]

    assert boxes[0].posts < 5


async def test_a_relay_that_contradicts_everything_is_not_asked_without_end(post: None) -> None:
    alone = Box("a", "contradicts")
    async with outbox_to(alone) as outbox:
        finish(outbox, "one")
        await eventually(lambda: alone.posts >= 2)

    assert alone.posts < 10


async def test_ends_go_before_notes(post: None) -> None:
    box = Box("a")
    outbox = Outbox("web1", lambda: (box,))  # type: ignore[arg-type, return-value]
    outbox.note(DEPLOYMENT, letter("again"), "again")
    finish(outbox, "end")
    task = asyncio.create_task(outbox.run())
    await eventually(lambda: len(box.taken) == 2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert box.taken == ["end 1", "again 1"]


async def test_what_is_sent_once_goes_to_as_many_relays_as_it_says(post: None) -> None:
    boxes = Box("a"), Box("b"), Box("c")
    async with outbox_to(*boxes) as outbox:
        outbox.note(DEPLOYMENT, letter("progress"), "progress", copies=1)
        outbox.note(DEPLOYMENT, letter("running"), "running")
        await eventually(lambda: boxes[0].taken == ["progress 1", "running 1"] and boxes[1].taken == ["running 1"])
        await outbox.flush(1.0)

    assert boxes[2].posts == 0


def test_the_same_is_not_said_again_and_again() -> None:
    outbox = Outbox("web1", list)

    assert outbox.may_say_again("operation")
    assert not outbox.may_say_again("operation")
    assert all(outbox.may_say_again(f"other {n}") for n in range(NOTES_MAX))
    assert len(outbox._said) == NOTES_MAX
