"""Files that a disk damaged under the depot and under a relay reach no machine, and stop nothing that can be mended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.farm import Farm

FILES = {"app.txt": "one\n" * 40_000, "data.txt": "two\n" * 40_000}
NEWER = FILES | {"app.txt": "One\n" + "one\n" * 40_000}


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    with Farm(tmp_path_factory.mktemp("stores")) as farm:
        farm.add_relay("fra")
        farm.add_agent("web1").start()
        farm.add_agent("web2").start()
        farm.add_package("Acme.App", "1.0.0", FILES)
        farm.add_package("Acme.App", "1.1.0", NEWER)
        yield farm


def files_of(store: Path, kind: str) -> list[Path]:
    return sorted(path for path in store.glob(f"**/{kind}/*/*") if path.is_file())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)


def tree_of(farm: Farm, machine: str) -> dict[str, str]:
    current = farm.agents[machine].root / "current"
    return {path.name: path.read_text() for path in current.iterdir()}


def write(farm: Farm, machine: str) -> None:
    """An environment of one machine, so that each is new to the package."""
    other = {"web1": "web2", "web2": "web1"}[machine]
    kept = farm.agents.pop(other)
    farm.write_environment()
    farm.agents[other] = kept
    step = {"name": "web", "roles": ["web"], "deploy": "app", "to": str(farm.agents[machine].root)}
    farm.write_process(packages={"app": "Acme.App"}, steps=[step])


def test_a_machine_gets_a_whole_package_from_stores_that_the_disk_damaged(farm: Farm) -> None:
    write(farm, "web1")
    depot, relay = farm.home / "depot", farm.folder / "relay-fra"
    done = farm.deploy("1.0.0", "--package", "app=1.0.0")
    assert done.code == 0, done.out + done.err
    farm.do("package", "replicate", "Acme.App", "1.1.0", "--relay", farm.urls["fra"])
    assert files_of(relay, "chunks")
    for chunk in files_of(relay, "chunks"):
        flip(chunk)
    flip(max(files_of(depot, "chunks"), key=lambda path: path.stat().st_mtime_ns))

    write(farm, "web2")
    done = farm.deploy("1.1.0", "--package", "app=1.1.0")

    assert done.code == 0, done.out + done.err
    assert "chunks of Acme.App 1.1.0 were damaged or gone in the depot: they were made again of its nupkg" in done.err
    assert tree_of(farm, "web2") == NEWER


def test_a_package_that_the_depot_cannot_mend_is_named_with_the_next_step_before_anything_begins(farm: Farm) -> None:
    write(farm, "web1")
    depot = farm.home / "depot"
    for path in files_of(depot, "chunks") + files_of(depot, "blobs"):
        flip(path)

    refused = farm.deploy("1.0.0", "--package", "app=1.0.0")

    assert refused.code == 1, refused.out
    assert "Acme.App 1.0.0 were damaged or gone in the depot, and so is its nupkg" in refused.err
    assert "waystation package add Acme.App.1.0.0.nupkg" in refused.err
    assert "deployment " not in refused.out
    farm.do("package", "add", farm.folder / "Acme.App.1.0.0.nupkg")
    done = farm.deploy("1.0.0", "--package", "app=1.0.0")
    assert done.code == 0, done.out + done.err
