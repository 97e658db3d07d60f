"""What holds for every test: the head of a run, and which tests may start processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import hypothesis
import pytest
from harness import process
from harness.seed import SEED
from programs_met import programs_met

PROCESSES = (
    "agent/checks/test_run_checks.py",
    "agent/relays/test_addresses_tried.py",
    "agent/relays/test_dns.py",
    "agent/runs/",
    "agent/test_agent_cli.py",
    "agent/test_operations.py",
    "agent/test_platform.py",
    "agent/test_service.py",
    "benchmarks/",
    "compat/",
    "demo/test_balancer.py",
    "demo/test_demo.py",
    "docs/test_readme.py",
    "orchestrator/commands/",
    "orchestrator/depot/test_depot.py",
    "orchestrator/deployment/test_server_runs.py",
    "orchestrator/journal/test_journal.py",
    "orchestrator/locks/test_locks.py",
    "relay/engines/",
    "relay/rebuild/",
    "relay/server/test_nupkg_routes.py",
    "relay/server/test_relay_process.py",
    "relay/server/test_tls.py",
    "relay/stores/test_disk_faults.py",
    "relay/stores/test_s3_processes.py",
    "relay/terminal/test_screen.py",
    "release/",
    "road/",
    "test_examples.py",
    "test_programs_met.py",
    "test_startup.py",
)
"""Below tests/, what starts processes: folders and files as wholes. `make check` leaves it out."""
LONG = (
    "agent/trees/test_pull.py",
    "orchestrator/fleet/test_fleet.py",
    "orchestrator/replication/test_cascade.py",
    "relay/server/test_mail_routes.py",
    "relay/server/test_replications.py",
    "relay/server/test_routes.py",
    "relay/transfer/test_explain_agrees.py",
    "relay/transfer/test_replicate.py",
    "simulation/",
)
"""The same, of what takes five seconds of processor time or more: both ends of a transfer in one process."""
# Scripts that ask for `env python3` get the interpreter of this run. Where a version manager puts a shim in its place, each
# start takes ten times as long.
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
# A busy machine is no reason to fail: what must be fast is measured in benchmarks/.
hypothesis.settings.register_profile("steady", deadline=None)
hypothesis.settings.load_profile("steady")

_ID_BYTES = 60
_STARTS = frozenset({"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", process.AUDIT_EVENT})
_started: list[str] = []


def _audit(event: str, _arguments: tuple[object, ...]) -> None:
    if event in _STARTS:
        _started.append(event)


sys.addaudithook(_audit)


def pytest_report_header() -> list[str]:
    return [*programs_met(), f"WAYSTATION_SEED={SEED}"]


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name long bytes by their place: they may hold a token of this run, and all workers must collect the same names."""
    return argname if isinstance(val, bytes) and len(val) > _ID_BYTES else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        path = item.nodeid.removeprefix("tests/")
        if path.startswith(PROCESSES):
            item.add_marker(pytest.mark.processes)
        if path.startswith(LONG):
            item.add_marker(pytest.mark.long)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    _started.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    result = yield
    if item.get_closest_marker("processes") is None:
        assert not _started, f"a test that starts a process is marked `processes` (tests/conftest.py): {_started[0]}"
    return result
