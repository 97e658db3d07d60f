"""kill -9 at any time in rolling releases, of any process, under load: nothing is done twice, nothing is forgotten, and no
visitor notices.

All of it is the long run (`WAYSTATION_SOAK=1`), in one shop. The short run draws points at which an engine dies:
`test_killed_anywhere`; a shop with a million visitors is `test_a_million_visitors`.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.seed import SEED, SOAK, chance
from harness.shop import SECONDS, Rolling, Shop, haproxy, shop_in

pytestmark = [
    pytest.mark.skipif(haproxy() is None, reason="haproxy is not installed: nothing is balanced"),
    pytest.mark.skipif(not SOAK, reason="the long run: WAYSTATION_SOAK=1"),
]

ROUNDS = 100
"""Deployments of the long run whose engines die at any time."""
ALIVE = 5.0
"""Seconds that such an engine lives at most. The longer it takes, the more: that it converges is to be seen."""
KILLS = 50
"""Of agents, and of relays."""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with shop_in(tmp_path_factory.mktemp("at-any-time")) as shop:
        yield shop


def test_scenario_22_an_engine_that_dies_at_any_time_until_it_is_through(shop: Shop, tmp_path: Path) -> None:
    drawn = chance("any time")
    for _ in range(ROUNDS):
        release, began = shop.drawn(tmp_path, drawn), time.monotonic()
        release.start()
        while (done := release.until_it_ends(drawn.uniform(0.05, ALIVE + len(release.deaths) / 4))).code != 0:
            release.died_at(done)
            if release.has_ended:
                break
            release.start()
        shop.check(release.label, release.version)
        print(f"{release.label}: {len(release.deaths)} deaths, in {time.monotonic() - began:.1f} s", flush=True)


# --- agents and relays


def test_scenario_26_agents_that_die_in_the_middle_of_it_change_nothing(shop: Shop, tmp_path: Path) -> None:
    _while_they_die(shop, tmp_path, chance("agents"), Shop.agent_dies, agents_died=True)


def test_relays_that_die_in_the_middle_of_it_change_nothing(shop: Shop, tmp_path: Path) -> None:
    _while_they_die(shop, tmp_path, chance("relays"), Shop.relay_dies)


@pytest.mark.parametrize("seconds", [5.0, 60.0])
def test_scenario_27_a_network_that_is_gone_for_a_minute_fails_nothing(
    shop: Shop, tmp_path: Path, seconds: float
) -> None:
    """Relays that stand still are that: nothing comes through, and nobody is told so."""
    release = shop.drawn(tmp_path, chance("cut"))
    release.start()
    release.until_it_comes_to("after post 3/web2/3-restart/1")
    relays = [relay.pid for relay in shop.farm.relays.values()]
    try:
        for pid in relays:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        assert release.engine is not None
        assert release.engine.is_alive, release.engine.out
    finally:
        for pid in relays:
            os.kill(pid, signal.SIGCONT)
    done = release.until_it_ends()
    assert done.code == 0, done.out + done.err
    shop.check(release.label, release.version)


def _while_they_die(
    shop: Shop,
    folder: Path,
    drawn: random.Random,
    one_dies: Callable[[Shop, random.Random], None],
    *,
    agents_died: bool = False,
) -> None:
    """As many deployments as it takes for so many deaths; each comes through without a person's help."""
    kills = 0
    while kills < KILLS:
        release = shop.drawn(folder, drawn)
        release.start()
        assert release.engine is not None
        until = time.monotonic() + SECONDS
        while release.engine.is_alive and time.monotonic() < until:
            release.answer_what_is_asked()
            time.sleep(drawn.uniform(0.0, 1.0))
            if release.engine.is_alive and kills < KILLS:
                one_dies(shop, drawn)
                kills += 1
        done = release.until_it_ends()
        assert done.code == 0, f"WAYSTATION_SEED={SEED}, after {kills} kills\n{done.out}{done.err}"
        shop.check(release.label, release.version, agents_died=agents_died)


# --- left, not killed


def test_an_engine_whose_terminal_closes_leaves_things_as_they_are_and_the_next_goes_on(
    shop: Shop, tmp_path: Path
) -> None:
    release = _left_by(shop, tmp_path, signal.SIGHUP)
    assert release.through() == []


def test_an_engine_that_is_told_twice_to_end_leaves_things_as_they_are_and_the_next_brings_them_to_an_end(
    shop: Shop, tmp_path: Path
) -> None:
    release = _left_by(shop, tmp_path, signal.SIGTERM, signal.SIGINT)
    release.start()
    done = release.until_it_ends()
    assert done.code == 130, done.out + done.err
    shop.check_end(release.label, "cancelled")
    assert shop.runs_of(shop.deployment_of(release.label)) <= shop.once()


def _left_by(shop: Shop, folder: Path, *numbers: signal.Signals) -> Rolling:
    """A release whose engine was given these signals while two machines were in flight."""
    release = shop.drawn(folder, chance(*numbers))
    release.start()
    release.until_it_comes_to("after post 3/web2/3-restart/1")
    assert release.engine is not None
    for number in numbers:
        release.engine.send_signal(number)
        time.sleep(0.2)
    left = release.until_it_ends()
    assert left.code == 130, left.out + left.err
    assert "release resume" in left.err
    return release
