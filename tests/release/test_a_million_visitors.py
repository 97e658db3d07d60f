"""A million requests to a shop that gets one release after another, whose engines, agents and relays are killed: each of the
requests is answered.

All of it is the long run (`WAYSTATION_SOAK=1`).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.seed import SOAK, chance
from harness.shop import haproxy, shop_in

pytestmark = [
    pytest.mark.skipif(haproxy() is None, reason="haproxy is not installed: nothing is balanced"),
    pytest.mark.skipif(not SOAK, reason="the long run: WAYSTATION_SOAK=1"),
]

REQUESTS = 1_000_000
RATE = 400.0
"""Requests a second, as far as the machine can."""


def test_a_million_visitors_notice_nothing_of_releases_and_kills(tmp_path: Path) -> None:
    drawn = chance("a million")
    kills = 0
    folder = tmp_path / "shop"
    folder.mkdir()
    with shop_in(folder, rate=RATE, clients=32) as shop:
        while shop.load.requests < REQUESTS:
            release = shop.drawn(tmp_path, drawn)
            release.start()
            while (done := release.until_it_ends(drawn.uniform(1.0, 20.0))).code != 0:
                release.died_at(done)
                kills += 1
                if release.has_ended:
                    break
                release.start()
                drawn.choice([shop.agent_dies, shop.relay_dies])(drawn)
                kills += 1
            shop.check(release.label, release.version, agents_died=True)
            print(f"{release.label}: {shop.load.requests} requests, {kills} kills", flush=True)
    assert shop.load.requests >= REQUESTS
