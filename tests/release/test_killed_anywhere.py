"""kill -9 of the engine at each point of a rolling release, under load: nothing is done twice, nothing is forgotten, and no
visitor notices.

One shop serves all of it, for as long as it takes. The short run draws a few points by the seed of the run; the long one
(`WAYSTATION_SOAK=1`) takes every point once. At any time instead of at a point: `test_killed_at_any_time`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from harness.kill_points import Point
from harness.seed import SEED, SOAK, chance
from harness.shop import Shop, haproxy, shop_in

pytestmark = pytest.mark.skipif(haproxy() is None, reason="haproxy is not installed: nothing is balanced")

DEATHS = 4
"""Of one engine after another in the short run."""
FURTHER = 80
"""Points that an engine comes to before it dies there, at most; a whole release has about 350."""
AT_ONCE = 12
"""Points of one deployment in the long run: each resume dies, too."""

soak = pytest.mark.skipif(not SOAK, reason="the long run: WAYSTATION_SOAK=1")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with shop_in(tmp_path_factory.mktemp("killed-anywhere")) as shop:
        yield shop


def test_scenarios_22_and_26_engines_agents_and_relays_that_die_at_drawn_points_do_nothing_twice(
    shop: Shop, tmp_path: Path
) -> None:
    drawn = chance("points")
    release = shop.drawn(tmp_path, drawn)
    for number in range(DEATHS):
        count = drawn.randint(1, FURTHER)
        release.start(count=count)
        if number % 2:
            shop.agent_dies(drawn)
        else:
            shop.relay_dies(drawn)
        print(f"died {' + '.join(release.died_at(release.until_it_ends()))}")
        assert release.came_to == count, "it died elsewhere"
    assert release.through(agents_died=True) == []


@soak
def test_scenarios_21_and_22_each_point_at_which_an_engine_can_die(shop: Shop, tmp_path: Path) -> None:
    drawn = chance("each point")
    whole = shop.drawn(tmp_path, drawn)
    assert whole.through() == []
    points = whole.passed
    names = list(chain.from_iterable(points))
    assert len(names) == len(set(names)) > 400
    (tmp_path / "points").write_text("\n".join(" + ".join(point) for point in points))
    print(f"{len(points)} points with {len(names)} names")
    share = -(-len(points) // AT_ONCE)
    left: list[str] = []
    for first in range(share):
        left += _die_at(points[first::share], shop, tmp_path, drawn)
    # What a death before them had changed; alone, each is on the way.
    for name in left:
        assert _die_at([(name,)], shop, tmp_path, drawn) == []


def _die_at(points: list[Point], shop: Shop, folder: Path, drawn: random.Random) -> list[str]:
    release, began = shop.drawn(folder, drawn), time.monotonic()
    try:
        left = release.through(*chain.from_iterable(points))
    except BaseException:
        print(f"WAYSTATION_SEED={SEED} {release}\n{release.said}")
        raise
    print(f"{release.label}: died at {len(release.deaths)} points, in {time.monotonic() - began:.1f} s", flush=True)
    return left
