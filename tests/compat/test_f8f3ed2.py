"""Today's code reads what commit f8f3ed2 left on disk, and speaks with the relay and the agent of that commit.

What was left, and how, stands in tests/data/f8f3ed2/README.md.
"""

from __future__ import annotations

import base64
import filecmp
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.packages import make_nupkg
from harness.process import run
from harness.relays import RelayProcess
from old_commit import COMMIT, NotInHistoryError, take_out
from yesterday import Agent, Yesterday

FILES = ["Acme.Web.dll", "appsettings.json", "run.sh", "version.txt", "wwwroot/empty.css", "wwwroot/grüße.txt"]
"""Of each version of the application."""
DIFFERENCES = {"hdiff", "zstd-prefix"}
"""Which of the two is sent depends on how fast the line turns out to be."""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Yesterday:
    """A copy that is only read."""
    return Yesterday.unpacked(tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module")
def new_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    """A relay of today that has nothing yet."""
    with RelayProcess(tmp_path_factory.mktemp("new-relay"), "--store", "memory:") as relay:
        yield relay


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    """A relay of today over yesterday's store, with yesterday's mail in it."""
    folder = tmp_path_factory.mktemp("relay")
    with RelayProcess(folder, "--store", Yesterday.unpacked(folder).relay_store) as relay:
        yield relay


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, relay: RelayProcess, new_relay: RelayProcess
) -> Iterator[tuple[Yesterday, Agent, Agent]]:
    """A copy that goes on: web1 serves at an empty relay, web2, which is out, at the one with yesterday's store."""
    copy = Yesterday.unpacked(tmp_path_factory.mktemp("world"))
    web1, web2 = Agent("web1", new_relay), Agent("web2", relay)
    with copy.agents(web1, web2):
        yield copy, web1, web2


@pytest.fixture(scope="module")
def old_code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What makes `waystation` that of yesterday: its environment."""
    try:
        return take_out(tmp_path_factory.mktemp("old-code"))
    except NotInHistoryError as error:
        pytest.skip(f"{COMMIT} cannot be had, so that today's processes talk to its own is NOT tested: {error}")


@pytest.fixture(scope="module")
def old_relay(tmp_path_factory: pytest.TempPathFactory, old_code: dict[str, str]) -> Iterator[RelayProcess]:
    """A relay of yesterday that has nothing yet."""
    folder = tmp_path_factory.mktemp("old-relay")
    with RelayProcess(folder, "--store", f"disk:{folder / 'store'}", **old_code) as relay:
        yield relay


# --- the depot


def test_the_depot_lists_what_was_added_to_it(kept: Yesterday) -> None:
    packages = kept.json("package", "list")["packages"]
    assert {"Acme.Web 1.0.0", "Acme.Web 1.1.0", "Acme.Tools 2.0.0"} < {f"{p['id']} {p['version']}" for p in packages}


def test_the_depot_replicates_to_a_relay_of_today(kept: Yesterday, new_relay: RelayProcess) -> None:
    for version in ("1.0.0", "1.1.0"):
        kept.json("package", "replicate", "Acme.Web", version, "--relay", new_relay.url)
    assert _listed(kept, new_relay) >= {"Acme.Web 1.0.0", "Acme.Web 1.1.0"}


# --- a relay's store


def test_a_relay_lists_what_is_in_the_store(kept: Yesterday, relay: RelayProcess) -> None:
    assert {"Acme.Web 1.0.0", "Acme.Web 1.1.0", "Acme.Tools 2.0.0"} < _listed(kept, relay)


def test_a_new_machine_pulls_out_of_the_store_what_yesterdays_machines_have(
    kept: Yesterday, relay: RelayProcess, tmp_path: Path
) -> None:
    pulled = _pull(kept, _new_machine(kept, tmp_path), "1.1.0", relay)
    assert _same_files(pulled, kept.root("web1") / "current") == FILES
    assert (pulled / "run.sh").stat().st_mode & 0o111


@pytest.mark.parametrize(("id", "version"), [("Acme.Web", "1.0.0"), ("Acme.Web", "1.1.0"), ("Acme.Tools", "2.0.0")])
def test_a_relay_gives_the_identical_nupkg(
    kept: Yesterday, relay: RelayProcess, tmp_path: Path, id: str, version: str
) -> None:
    """One that was made again yesterday, one by its recipe, one by its recipe and bytes that no encoder makes."""
    given = kept.json("package", "fetch", id, version, "--relay", relay.url, "--output", tmp_path / "given.nupkg")
    assert given["sha256"] == kept.json("package", "show", id, version)["nupkg_sha256"]


# --- an agent's home


def test_an_agent_knows_what_it_was_ordered_and_what_became_of_it(kept: Yesterday) -> None:
    status = kept.json("agent", "status", "--home", kept.agent_home("web2"), "--limit", "100")
    assert status["fences"]["production"]["fence"] == 2
    ended = {(one["operation"].split("/")[3], one["state"], one["acknowledged"]) for one in status["operations"]}
    assert {("1-configure", "done", True), ("3-start", "done", True), ("3-start", "failed", True)} <= ended


@pytest.mark.parametrize("machine", ["web1", "web2"])
def test_an_agent_finds_its_trees_whole(kept: Yesterday, machine: str) -> None:
    trees = kept.json("agent", "verify", "--home", kept.agent_home(machine))["trees"]
    assert {tree["version"] for tree in trees if tree["package"] == "Acme.Web"} == {"1.0.0", "1.1.0"}
    assert [tree["differences"] for tree in trees] == [[], [], []]


# --- the journal


def test_history_lists_yesterdays_deployments(kept: Yesterday) -> None:
    deployments = kept.json("release", "history")["deployments"]
    assert [(one["label"], one["state"], one["operator"], one["fence"]) for one in deployments] == [
        ("1.1.0", "failed", "ann@ops1", 2),
        ("1.0.0", "succeeded", "ann@ops1", 1),
    ]


def test_status_tells_a_deployment_with_its_machines_and_its_bytes(kept: Yesterday) -> None:
    status = kept.json("release", "status")
    assert {turn["machine"]: turn["outcome"] for turn in status["steps"][0]["turns"]} == {
        "web1": "deployed",
        "web2": "left_out",
    }
    assert status["ledger"]["sent"]["encodings"][0]["encoding"] == "zstd-prefix"
    assert status["ledger"]["from_origin_bytes"] > 0
    assert [step["state"] for step in status["pre_acquire"]] == ["done"]


def test_the_open_bracket_is_listed(kept: Yesterday) -> None:
    [out] = kept.json("rotation", "list")["open"]
    assert (out["machine"], out["rotation"], out["label"], out["step"]) == ("web2", "web", "1.1.0", 1)


def test_what_scripts_printed_can_be_read(kept: Yesterday) -> None:
    lines = [json.loads(line) for line in kept.call("release", "log", "web1", "--json").out.splitlines()]
    assert "started 1.1.0 on web1" in [line["text"] for line in lines]


def test_the_machine_that_is_out_can_be_put_back(tmp_path: Path) -> None:
    copy = Yesterday.unpacked(tmp_path)
    (tmp_path / "balancer").mkdir()
    assert copy.json("rotation", "close", "web2", "--force", "-m", "its agent is gone")["closed"]
    assert (tmp_path / "balancer" / "web2").read_text() == "in put_back\n"
    assert copy.json("rotation", "list")["open"] == []


# --- machines and releases that go on


def test_an_agent_does_not_run_an_order_again(world: tuple[Yesterday, Agent, Agent], kept: Yesterday) -> None:
    """It answers with yesterday's report for as long as it keeps that, and refuses the order from then on."""
    copy, web1, _ = world
    # Those of another copy: an agent that serves forgets old orders.
    scripts, reports = _scripts_of(kept.agent_home("web1"))
    assert len(scripts) == 4
    started = copy.starts("web1")
    orders = [{"agent": "web1", "operation": name, "envelope": _text(order)} for name, order in scripts.items()]
    assert _ask(web1.relay, "/v1/orders", {"orders": orders}) == {"taken": 4, "known": 0}
    for name, answer in _answers(web1.relay, set(scripts)).items():
        assert answer == reports[name] or _payload(answer)["state"] == "refused"
    assert copy.starts("web1") == started


def test_the_next_release_goes_on_from_yesterdays_journal_depot_store_and_machines(
    world: tuple[Yesterday, Agent, Agent],
) -> None:
    copy, web1, web2 = world
    copy.build("1.2.0")
    # It is there before machines ask: of what still arrives, they take chunks as they are stored.
    (sent,) = copy.json("package", "replicate", "Acme.Web", "1.2.0", "--relay", web2.relay.url)["relays"]
    status = copy.release("1.2.0", web1, web2)
    assert (status["summary"]["state"], status["summary"]["fence"]) == ("succeeded", 3)
    assert [turn["machine"] for turn in status["steps"][0]["turns"]] == ["web2", "web1"], "who is out goes first"
    assert {copy.starts(machine)[-1] for machine in ("web1", "web2")} == {"1.2.0"}
    assert status["brackets"] == copy.json("rotation", "list")["open"] == []
    assert _encodings(sent) & DIFFERENCES, "it is built on what the store had"
    (line,) = (each for each in status["ledger"]["lines"] if each["line"] == "iad → web2")
    assert _encodings(line) & DIFFERENCES, "it is built on what the machine had"


# --- processes of that commit


def test_the_code_beside_todays_is_that_of_the_commit(old_code: dict[str, str]) -> None:
    words = [sys.executable, "-P", "-c", "import agent, orchestrator, relay; print(agent, orchestrator, relay)"]
    said = subprocess.run(words, env=old_code, capture_output=True, text=True, check=True).stdout
    assert said.count(old_code["PYTHONPATH"]) == 3


def test_a_package_that_yesterday_took_parts_of_for_the_container_is_the_same_today_and_comes_whole(
    new_relay: RelayProcess, old_code: dict[str, str], tmp_path: Path
) -> None:
    """Yesterday everything below package/ was left out of trees; its place in the manifest was settled by that."""
    copy = Yesterday.unpacked(tmp_path)
    files = {"package/start.js": b"run()", "Package/help.txt": b"help", "web.config": b"<c/>"}
    nupkg = make_nupkg(tmp_path, files, id="Acme.Folder")
    home = {"WAYSTATION_HOME": str(copy.home)}
    (taken,) = run(copy.home, "package", "add", nupkg, "--json", **home, **old_code).json["packages"]

    (again,) = copy.json("package", "add", nupkg)["packages"]

    assert (again["new"], again["manifest"]) == (False, taken["manifest"])
    copy.json("package", "replicate", "Acme.Folder", "1.0.0", "--relay", new_relay.url)
    machine, root = _new_machine(copy, tmp_path / "machine"), tmp_path / "machine" / "srv"
    words = ("agent", "pull", "Acme.Folder", "1.0.0", "--home", machine, "--root", root, "--relay", new_relay.url)
    tree = Path(copy.json(*words)["tree"])
    assert {str(f.relative_to(tree)): f.read_bytes() for f in tree.rglob("*") if f.is_file()} == files


def test_todays_sender_replicates_to_yesterdays_relay(kept: Yesterday, old_relay: RelayProcess) -> None:
    for version in ("1.0.0", "1.1.0"):
        kept.json("package", "replicate", "Acme.Web", version, "--relay", old_relay.url)
    kept.json("package", "replicate", "Acme.Tools", "2.0.0", "--relay", old_relay.url, "--exact")
    assert _listed(kept, old_relay) >= {"Acme.Web 1.0.0", "Acme.Web 1.1.0", "Acme.Tools 2.0.0"}


def test_todays_agent_pulls_from_yesterdays_relay(kept: Yesterday, old_relay: RelayProcess, tmp_path: Path) -> None:
    kept.json("package", "replicate", "Acme.Web", "1.1.0", "--relay", old_relay.url)
    pulled = _pull(kept, _new_machine(kept, tmp_path), "1.1.0", old_relay)
    assert _same_files(pulled, kept.root("web1") / "current") == FILES


def test_yesterdays_agent_pulls_from_todays_relay(
    kept: Yesterday, new_relay: RelayProcess, old_code: dict[str, str], tmp_path: Path
) -> None:
    kept.json("package", "replicate", "Acme.Web", "1.1.0", "--relay", new_relay.url)
    home = _new_machine(kept, tmp_path)
    words = ("agent", "pull", "Acme.Web", "1.1.0", "--home", home, "--root", tmp_path / "srv", "--relay", new_relay.url)
    pulled = Path(run(home, *words, "--json", **old_code).json["tree"])
    assert _same_files(pulled, kept.root("web1") / "current") == FILES


def test_todays_orders_reach_yesterdays_agent_and_go_through_yesterdays_relay(
    tmp_path_factory: pytest.TempPathFactory, new_relay: RelayProcess, old_relay: RelayProcess, old_code: dict[str, str]
) -> None:
    """web2's agent is yesterday's, at a relay of today; web1's is today's, at yesterday's relay."""
    copy = Yesterday.unpacked(tmp_path_factory.mktemp("mixed"))
    web1, web2 = Agent("web1", old_relay), Agent("web2", new_relay, old_code)
    with copy.agents(web1, web2):
        copy.build("1.3.0")
        status = copy.release("1.3.0", web1, web2)
    assert status["summary"]["state"] == "succeeded"
    assert {copy.starts(machine)[-1] for machine in ("web1", "web2")} == {"1.3.0"}
    for machine in ("web1", "web2"):
        assert (copy.root(machine) / "current" / "version.txt").read_text() == "1.3.0\n"


# --- helpers


def _listed(at: Yesterday, relay: RelayProcess) -> set[str]:
    return {f"{one['id']} {one['version']}" for one in at.json("relay", "status", "--relay", relay.url)["packages"]}


def _new_machine(at: Yesterday, folder: Path) -> Path:
    """The home of an agent that believes yesterday's keys."""
    home = folder / "agent"
    at.json("agent", "init", "--home", home, "--name", "web9", "--trust", at.home / "trust" / "trust.json")
    return home


def _pull(at: Yesterday, home: Path, version: str, relay: RelayProcess) -> Path:
    root = home.parent / "srv"
    words = ("agent", "pull", "Acme.Web", version, "--home", home, "--root", root, "--relay", relay.url)
    return Path(at.json(*words)["tree"])


def _same_files(one: Path, other: Path) -> list[str]:
    return filecmp.cmpfiles(one, other, FILES, shallow=False)[0]


def _encodings(crossed: Any) -> set[str]:
    return {one["encoding"] for one in crossed["encodings"]}


def _scripts_of(home: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Orders to run scripts that an agent has obeyed, and its reports, by operation."""
    orders, reports = {}, {}
    for path in home.glob("operations/*/order"):
        order = _payload(path.read_bytes())
        if order["action"]["type"] == "script":
            orders[order["operation"]] = path.read_bytes()
            reports[order["operation"]] = path.with_name("report").read_bytes()
    return orders, reports


def _payload(envelope: bytes) -> Any:
    return json.loads(base64.b64decode(json.loads(envelope)["payload"]))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _ask(relay: RelayProcess, path: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{relay.url}{path}", data, {"Content-Type": "application/json"} if data else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def _answers(relay: RelayProcess, operations: set[str]) -> dict[str, bytes]:
    """The first report of each operation, as it comes to a relay that had none of them."""
    found: dict[str, bytes] = {}
    deadline = time.monotonic() + 60
    while found.keys() != operations:
        assert time.monotonic() < deadline, f"no answer to {operations - found.keys()}"
        for deployment in sorted({operation.partition("/")[0] for operation in operations - found.keys()}):
            for report in _ask(relay, f"/v1/reports?deployment={deployment}")["reports"]:
                found.setdefault(report["operation"], base64.b64decode(report["envelope"]))
        time.sleep(0.02)
    return found
