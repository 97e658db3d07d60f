"""A relay that is lost at any stage of a release costs a warning, and no machine: what counts is what machines hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.farm import Farm
from harness.packages import noise
from harness.process import Done, Process, wait_for
from harness.relays import RelayProcess
from harness.seed import SOAK

from benchmarks.lines.network import Line, ThreadedProxy

SIZE = 2 << 20
SLOW = Line(rate=SIZE / 2)


class TwoSites:
    """Each has a relay and a machine, and each relay serves both. The way to each relay can be shaped."""

    def __init__(self, farm: Farm, folder: Path) -> None:
        self.farm = farm
        self.folder = folder
        self.lines: dict[str, ThreadedProxy] = {}
        self.version = 0

    def release(self, **acquire: object) -> Process:
        """A new version on its way; each step says aloud when it runs."""
        self.version += 1
        version = f"{self.version}.0.0"
        self.farm.add_package("Acme.Web", version, {"blob": noise(version, SIZE // 2).hex()})
        self.farm.write_script("turn.sh", "#!/bin/sh\nsleep 0.5\n")
        self.farm.write_process(
            packages={"web": "Acme.Web"},
            acquire={"deadline": "60s"} | acquire,
            steps=[
                {
                    "name": "web",
                    "roles": ["web"],
                    "deploy": "web",
                    "to": f"{self.folder}/srv/${{machine.name}}",
                    "strategy": "rolling",
                    "apply": ["switch", {"name": "turn", "script": "turn.sh"}],
                }
            ],
        )
        relays = {name: {"url": url, "site": name} for name, url in self.farm.urls.items()}
        for relay in relays.values():
            relay["generic"] = True
        self.farm.write_environment(relays=relays)
        return self.farm.start(
            *("release", "deploy", version, "--environment", "production", "--package", f"web={version}")
        )

    def is_everywhere(self) -> bool:
        return all(self.farm.current(name).startswith(f"{self.version}.0.0-") for name in self.farm.agents)


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[TwoSites]:
    with Farm(tmp_path) as farm:
        sites = TwoSites(farm, tmp_path)
        for name in ("fra", "iad"):
            relay = farm.add_relay(name)
            proxy = ThreadedProxy("127.0.0.1", relay.port)
            sites.lines[name] = farm.enter(proxy)
            farm.urls[name] = f"http://127.0.0.1:{proxy.port}"
        farm.add_agent("fra1", "fra", [farm.urls["fra"], farm.urls["iad"]]).start()
        farm.add_agent("iad1", "iad", [farm.urls["iad"], farm.urls["fra"]]).start()
        yield sites


def from_the_start(sites: TwoSites, deploying: Process) -> str:
    """It was killed before."""
    return "fra"


def in_mid_transfer(sites: TwoSites, deploying: Process) -> str:
    before = sites.lines["fra"].counts.up
    sites.lines["fra"].wait_for(before + SIZE // 4, direction="up")
    return "fra"


def in_mid_pull(sites: TwoSites, deploying: Process) -> str:
    """The one that a machine pulls from: which one is measured as closer is its own affair."""

    def pulled_from() -> list[str]:
        return [name for name, line in sites.lines.items() if line.counts.down > SIZE // 4]

    wait_for(pulled_from)
    return pulled_from()[0]


def in_a_turn(sites: TwoSites, deploying: Process) -> str:
    wait_for(lambda: "its turn begins" in deploying.out)
    return "fra"


STAGES: dict[Callable[[TwoSites, Process], str], tuple[dict[str, dict[str, Line]], dict[str, str]]] = {
    from_the_start: ({}, {}),
    in_mid_transfer: ({"fra": {"up": SLOW}}, {"stall": "8s"}),
    in_mid_pull: ({"fra": {"down": SLOW}, "iad": {"down": SLOW}}, {}),
    in_a_turn: ({}, {}),
}


@pytest.mark.parametrize("lost", STAGES if SOAK else [in_mid_transfer], ids=lambda stage: stage.__name__)
def test_scenario_08_a_relay_that_is_lost_stops_no_release_where_another_one_serves_its_machines(
    sites: TwoSites, lost: Callable[[TwoSites, Process], str]
) -> None:
    shapes, acquire = STAGES[lost]
    for name, shape in shapes.items():
        sites.lines[name].shape(**shape)
    if lost is from_the_start:
        sites.farm.relays["fra"].kill()
    deploying = sites.release(**acquire)
    sites.farm.relays[lost(sites, deploying)].kill()
    done = deploying.result()
    assert done.code == 0, done.out + done.err
    assert sites.is_everywhere()
    if lost in {from_the_start, in_mid_transfer}:
        _assert_told(sites, done)


def _assert_told(sites: TwoSites, done: Done) -> None:
    version = f"{sites.version}.0.0"
    assert f"warning: relay fra has not got Acme.Web {version}: " in done.out
    again = f"waystation package replicate Acme.Web {version} --environment production"
    assert again in done.err
    status = sites.farm.status()
    assert ("fra", version) in [(one["relay"], one["version"]) for one in status["behind"]]
    assert again in sites.farm.do("release", "status").out
    sites.farm.relays["fra"].start()
    sites.farm.do(*again.split()[1:])


def test_a_relay_without_room_is_behind_and_stops_no_release(sites: TwoSites, tmp_path: Path) -> None:
    full = sites.farm.relays["fra"]
    full.stop()
    config = tmp_path / "full.yaml"
    config.write_text(f"listen: 127.0.0.1:{full.port}\nstore: {full.store}\nsite: fra\nfree_floor: {1 << 60}\n")
    with RelayProcess(full.home, "--config", config):
        done = sites.release(stall="3s").result()
        assert done.code == 0, done.out + done.err
        assert sites.is_everywhere()
        (why,) = {one["reason"] for one in sites.farm.status()["behind"]}
        assert "no space left" in why or "took nothing" in why, why


def test_a_relay_that_comes_back_during_the_deployment_is_brought_up_to_date_by_it(sites: TwoSites) -> None:
    sites.farm.relays["fra"].kill()
    sites.lines["iad"].shape(up=Line(rate=SIZE / 4))
    deploying = sites.release()
    wait_for(lambda: "warning: relay fra has not got Acme.Web" in deploying.out)
    sites.farm.relays["fra"].start()
    done = deploying.result()
    assert done.code == 0, done.out + done.err
    assert sites.is_everywhere()
    assert "behind: " not in done.err
    assert sites.farm.status()["behind"] == []
    assert re.search(r"relay fra has Acme\.Web", done.out)


@pytest.mark.parametrize("direction", ["up", "down"] if SOAK else ["down"])
def test_machines_wait_for_relays_that_all_restart_in_mid_acquisition(sites: TwoSites, direction: str) -> None:
    for line in sites.lines.values():
        line.shape(**{direction: SLOW})
    deploying = sites.release()
    wait_for(lambda: any(getattr(line.counts, direction) > SIZE // 4 for line in sites.lines.values()))
    sites.farm.relays["iad"].kill()
    sites.farm.relays["fra"].kill()
    wait_for(lambda: not sites.farm.relays["iad"].is_alive)
    for name in ("fra", "iad"):
        sites.farm.relays[name].start()
    done = deploying.result()
    assert done.code == 0, done.out + done.err
    assert sites.is_everywhere()


def test_where_no_relay_comes_back_the_reason_is_one_sentence_with_its_cause(sites: TwoSites) -> None:
    for line in sites.lines.values():
        line.shape(down=SLOW)
    deploying = sites.release(stall="2s")
    in_mid_pull(sites, deploying)
    for relay in sites.farm.relays.values():
        relay.kill()
    done = deploying.result()
    assert done.code == 1, done.out + done.err
    reason = sites.farm.status()["summary"]["reason"]
    why = r"\w+: none of the relays of \w+ has answered for \d+ s"
    assert re.fullmatch(rf"not every machine has everything, so no step began: {why}(; {why})?", reason)
