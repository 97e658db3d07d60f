"""A deployment into a site whose relay fetches from another one, with that one well and with that one gone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from harness.farm import Farm

STEP = {"name": "web", "roles": ["web"], "deploy": "web"}


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    """`fra` has no machine of its own: it only passes on to `iad`."""
    with Farm(tmp_path) as farm:
        for site in ("fra", "iad"):
            farm.add_relay(site)
        farm.add_agent("web1", "iad").start()
        farm.write_process(packages={"web": "Acme.Web"}, steps=[STEP | {"to": str(farm.agents["web1"].root)}])
        relays = {site: {"url": url, "site": site} for site, url in farm.urls.items()}
        relays["iad"] |= {"from": "fra", "limit": "800Mbit"}
        farm.write_environment(relays=relays)
        farm.add_package("Acme.Web", "1.0.0", {"bin/web": "web " * 50_000, "data/a.txt": "a" * 300_000})
        yield farm


def sent_by(farm: Farm, site: str) -> float:
    """Bytes of bundles that this relay has sent."""
    with urlopen(f"{farm.urls[site]}/metrics") as answer:
        return float(re.findall(r"^waystation_sent_bytes_total (\S+)$", answer.read().decode(), re.MULTILINE)[0])


def test_a_site_gets_its_packages_through_another_one(farm: Farm) -> None:
    done = farm.deploy("1.0.0", "--package", "web=1.0.0")
    assert done.code == 0, done.out + done.err
    assert farm.current("web1").startswith("1.0.0-")
    assert sent_by(farm, "fra") > 0, "nobody asked fra, where nobody but iad has anything to ask for"


def test_a_relay_on_the_way_that_is_gone_costs_a_re_plan_and_no_failure(farm: Farm) -> None:
    farm.relays["fra"].kill()
    done = farm.deploy("1.0.0", "--package", "web=1.0.0")
    assert done.code == 0, done.out + done.err
    assert farm.current("web1").startswith("1.0.0-")
    assert "iad fetched from the origin in place of fra" in done.out + done.err
