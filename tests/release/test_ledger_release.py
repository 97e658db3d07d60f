"""A deployment tells every byte that it moved: over which line, in which encoding, and what that saved."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from harness.farm import Farm
from harness.packages import noise

STEP = {"name": "web", "roles": ["web"], "deploy": "web"}
FILES = {f"lib/{i}.dll": noise(i, 150_000).hex() for i in range(4)}


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    """`fra` passes on to `iad`, where two machines are."""
    with Farm(tmp_path) as farm:
        for site in ("fra", "iad"):
            farm.add_relay(site)
        for name in ("web1", "web2"):
            farm.add_agent(name, "iad").start()
        farm.write_process(packages={"web": "Acme.Web"}, steps=[STEP | {"to": f"{farm.folder}/srv/${{machine.name}}"}])
        relays = {site: {"url": url, "site": site} for site, url in farm.urls.items()}
        relays["iad"] |= {"from": "fra"}
        farm.write_environment(relays=relays)
        farm.add_package("Acme.Web", "1.0.0", FILES)
        farm.add_package("Acme.Web", "1.1.0", FILES | {"lib/0.dll": FILES["lib/0.dll"][:-9] + "different"})
        yield farm


def deployed(farm: Farm, version: str) -> dict:
    done = farm.deploy(version, "--package", f"web={version}")
    assert done.code == 0, done.out + done.err
    return json.loads(farm.call("release", "status", "--json").out)["ledger"]


def received(farm: Farm, site: str) -> float:
    """Payload bytes that this relay counted as they came in."""
    with urlopen(f"{farm.urls[site]}/metrics") as answer:
        told = re.findall(
            r'^waystation_payload_bytes_total\{direction="received",.*\} (\S+)$', answer.read().decode(), re.MULTILINE
        )
    return sum(map(float, told))


def test_scenario_07_the_ledger_of_a_cascade_agrees_with_what_the_relays_counted(farm: Farm) -> None:
    first = deployed(farm, "1.0.0")
    lines = {line["line"]: line for line in first["lines"]}
    assert set(lines) == {"origin → fra", "fra → iad", "iad → web1", "iad → web2"}
    for site, line in (("fra", "origin → fra"), ("iad", "fra → iad")):
        assert lines[line]["payload_bytes"] == received(farm, site) > 500_000
    assert first["from_origin_bytes"] == lines["origin → fra"]["wire_bytes"]
    assert first["sent"]["wire_bytes"] == sum(line["wire_bytes"] for line in first["lines"] if line["to"] == "relay")
    assert first["alternatives"]["machines"] == 2
    assert first["alternatives"]["whole_file"] == first["alternatives"]["per_machine"] > 1_000_000

    second = deployed(farm, "1.1.0")
    assert second["sent"]["wire_bytes"] < 0.05 * second["alternatives"]["whole_file"]
    assert second["saved"]["per_machine"] == second["alternatives"]["per_machine"] - second["sent"]["wire_bytes"]
    assert {one["encoding"] for one in second["sent"]["encodings"]} & {"hdiff", "zstd-prefix"}

    told = farm.call("release", "status", "--ledger").out
    assert re.search(r"to relays that is 9\d\.\d % less than the whole file to each relay", told)
    assert re.search(r"^iad → 2 machines +\S+ ", told, re.MULTILINE)
