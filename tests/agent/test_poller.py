"""Which relays an agent polls: one that answers at once, and brings nothing new, is rested from."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from harness.process import eventually

from agent.poller import FRUITLESS_BORNE, Cursors, FruitlessError, MailRelays, Poller
from relay.errors import UnreachableError, UntrustedError, WaystationError
from relay.protocol import messages
from relay.protocol.client import RelayClient
from relay.protocol.mail_client import REMEMBERED, Brought

Answer = Callable[[int, messages.PollRequest], messages.PollAnswer]


def order(envelope: bytes, number: int = 1) -> messages.NumberedOrder:
    return messages.NumberedOrder(number, "operation", envelope)


@dataclass
class World:
    """A poller beside relays that answer as functions say: (how often it was asked before, the request)."""

    poller: Poller
    polls: dict[str, int]
    failed: list[tuple[str, WaystationError]] = field(default_factory=list)
    taken: list[tuple[bytes, str]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    async def during(self, holds: Callable[[], bool]) -> None:
        task = asyncio.create_task(self.poller.run())
        try:
            await eventually(holds)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def world(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    def made(**answers: Answer) -> World:
        relays = {f"http://{name}.test": answer for name, answer in answers.items()}
        clients = [RelayClient(url) for url in relays]
        polls = dict.fromkeys(relays, 0)

        class Mail:
            def __init__(self, relay: RelayClient) -> None:
                self.relay = relay

            async def poll(self, _name: str, request: messages.PollRequest) -> messages.PollAnswer:
                url = self.relay.url
                polls[url] += 1
                await asyncio.sleep(0)
                answer = relays[url](polls[url] - 1, request)
                if not answer.orders and answer.epoch == "waits" and request.wait:
                    await asyncio.sleep(3600)
                return answer

        monkeypatch.setattr("agent.poller.MailClient", Mail)
        found: World
        sources = SimpleNamespace(in_order=lambda: clients, failed=lambda url, error: found.failed.append((url, error)))

        async def take(letter: messages.NumberedOrder, relay: str) -> bool:
            found.taken.append((letter.envelope, relay))
            return letter.envelope.startswith(b"good")

        reporter = SimpleNamespace(
            presence=lambda: b"presence",
            author=SimpleNamespace(name="web1"),
            outbox=SimpleNamespace(lost=lambda url: found.lost.append(url)),  # noqa: PLW0108 - `found` is made below
        )
        relays_of_mail = MailRelays(sources)  # type: ignore[arg-type]
        inbox: Any = SimpleNamespace(take=take)
        found = World(Poller(relays_of_mail, Cursors(os.fspath(tmp_path)), inbox, reporter, None), polls)  # type: ignore[arg-type]
        return found

    return made


HABITS: dict[str, Answer] = {
    "the same letter": lambda n, _: messages.PollAnswer("e", (order(b"good", n + 1),)),
    "another epoch each time": lambda n, _: messages.PollAnswer(f"e{n}"),
    "another epoch and the same letter": lambda n, _: messages.PollAnswer(f"e{n}", (order(b"good"),)),
    "the last of all numbers": lambda n, _: messages.PollAnswer("e", (order(b"bad", (1 << 53) - 1),)),
    "another forged letter each time": lambda n, _: messages.PollAnswer("e", (order(b"bad %d" % n, n),)),
    "nothing": lambda n, _: messages.PollAnswer("e"),
}


@pytest.mark.parametrize("habit", HABITS)
async def test_a_relay_that_answers_at_once_with_nothing_new_is_rested_from(
    world: Callable[..., World], habit: str
) -> None:
    at = world(evil=HABITS[habit])

    await at.during(lambda: len(at.failed) >= 2)

    # Each time: the first poll is to be answered at once, and one fruitless one after it is borne.
    assert at.polls["http://evil.test"] <= 4 * len(at.failed) + 2
    assert all(isinstance(error, FruitlessError) for _, error in at.failed)


async def test_letters_of_before_are_not_judged_again_unless_the_relay_lost_its_mail(
    world: Callable[..., World],
) -> None:
    same = world(evil=HABITS["the same letter"])
    await same.during(lambda: bool(same.failed))
    assert len(same.taken) == 1

    lost = world(evil=HABITS["another epoch and the same letter"])
    await lost.during(lambda: bool(lost.failed))
    assert len(lost.taken) == lost.polls["http://evil.test"] > 1
    assert lost.lost


async def test_a_relay_that_brings_something_new_each_time_is_polled_on(world: Callable[..., World]) -> None:
    at = world(good=lambda n, _: messages.PollAnswer("e", (order(b"good %d" % n, n + 1),)))

    await at.during(lambda: at.polls["http://good.test"] > 20)

    assert at.failed == []


async def test_the_same_letter_by_two_relays_is_news_of_both(world: Callable[..., World]) -> None:
    """Orders go to every relay of their machine."""

    def brings(number: int, _: messages.PollRequest) -> messages.PollAnswer:
        if number > 10:
            return messages.PollAnswer("waits")
        return messages.PollAnswer("e", (order(b"good %d" % number, number + 1),))

    at = world(one=brings, two=brings)
    await at.during(lambda: min(at.polls.values()) > 11)

    assert at.failed == []


async def test_an_answer_that_our_own_code_stumbles_over_ends_no_agent(world: Callable[..., World]) -> None:
    def stumbles(number: int, _: messages.PollRequest) -> messages.PollAnswer:
        raise KeyError("a name from outside")

    at = world(evil=stumbles, good=lambda n, _: messages.PollAnswer("waits"))
    await at.during(lambda: bool(at.failed) and at.polls["http://good.test"] > 1)

    assert isinstance(at.failed[0][1], UntrustedError)


def test_one_early_answer_is_borne_and_a_relay_that_serves_is_forgiven() -> None:
    relay = RelayClient("http://relay.test")
    relays = MailRelays(SimpleNamespace(failed=lambda *_: None))  # type: ignore[arg-type]
    for _ in range(2):
        for _ in range(FRUITLESS_BORNE):
            relays.was_fruitless(relay)
        relays.served(relay)
    relays.was_fruitless(relay)
    with pytest.raises(UnreachableError):
        relays.was_fruitless(relay)


def test_what_was_brought_is_remembered_within_bounds() -> None:
    brought = Brought()

    assert all(brought.is_news(b"%d" % n) for n in range(REMEMBERED + 1))
    assert not brought.is_news(b"%d" % REMEMBERED)
    assert brought.is_news(b"0")
    assert len(brought._letters) == REMEMBERED
