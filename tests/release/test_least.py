"""The least process of the design, to the letter, and whole: its root, its service, its port, its check.

Each machine has a `/srv` and an address of its own, so that several of them are one computer: a mount namespace, and
127.0.0.x. That takes root.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from harness.farm import Farm

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "deploy" / "demo" / "webapp"))

import folder as webapp  # noqa: E402

LEAST = REPOSITORY / "tests" / "orchestrator" / "data" / "least.yaml"
ADDRESSES = {"web1": "127.0.0.2", "web2": "127.0.0.3"}


def _why_not() -> str:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return "needs root and unshare, for a /srv of each machine"
    if subprocess.run(["unshare", "-m", "mount", "--bind", "/tmp", "/srv"], capture_output=True).returncode:
        return "mount namespaces are not allowed here"
    for address in ADDRESSES.values():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, 8080))
            except OSError as error:
                return f"{address}:8080 cannot be had: {error}"
    return ""


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    why = _why_not()
    if why:
        pytest.skip(f"{why}: the least process is NOT run")
    with Farm(tmp_path) as farm:
        farm.add_relay("fra")
        for name, address in ADDRESSES.items():
            srv = tmp_path / f"srv-{name}"
            srv.mkdir()
            manager = tmp_path / f"service-{name}"
            manager.write_text(
                "#!/bin/sh\n"
                f'[ "$1 $2" = "restart webshop" ] || exit 64\n'
                f"ROOT=/srv/webshop ADDRESS={address} VAR_PORT=8080 MACHINE={name} exec {sys.executable} {webapp.RESTART}\n"
            )
            manager.chmod(0o755)
            agent = farm.add_agent(name, service_command=[str(manager), "{action}", "{service}"])
            agent.how["under"] = ("unshare", "-m", "sh", "-c", f'mount --bind {srv} /srv && exec "$@"', "sh")
            agent.start()
        try:
            yield farm
        finally:
            for name in ADDRESSES:
                with suppress(OSError, ValueError):
                    os.kill(int((tmp_path / f"srv-{name}" / "webshop/shared/webshop.pid").read_text()), signal.SIGKILL)


def test_the_least_process_releases_as_it_stands(farm: Farm) -> None:
    shutil.copy(LEAST, farm.project / "release.yaml")
    diary = farm.folder / "diary"
    for script in ("out", "in"):
        text = f'#!/bin/sh\necho "$MACHINE {script} $OUTCOME" >> {diary}\n'
        farm.write_script(f"environments/lb/{script}.sh", text)
    farm.write_environment(
        rotation={"web": {"before": "lb/out.sh", "after": "lb/in.sh"}},
        machines={name: {"address": address} for name, address in ADDRESSES.items()},
    )
    for version in ("1.0.0", "1.1.0"):
        nupkg = farm.folder / f"{webapp.ID}.{version}.nupkg"
        made = webapp.make(farm.folder / f"shop-{version}", version)
        farm.do("package", "pack", made, "--id", webapp.ID, "--version", version, "--output", nupkg)
        farm.do("package", "add", nupkg)

        done = farm.deploy(version, "--package", f"web={version}")

        assert done.code == 0, done.out + done.err
        for name in ADDRESSES:
            current = os.readlink(farm.folder / f"srv-{name}" / "webshop" / "current")
            assert current.startswith(f"releases/{version}-")
    turns = [f"{name} {what}".rstrip() for name in ADDRESSES for what in ("out", "in deployed")]
    assert [line.rstrip() for line in diary.read_text().splitlines()] == turns * 2, "one machine at a time, twice"
