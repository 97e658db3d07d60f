"""What a start costs: `waystation --help` and each house's command load nothing that they do not use.

Modules are counted, not milliseconds: a clock on a shared machine proves nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from relay.main import _COMMANDS

HEAVY = {
    "aiohttp", "boto3", "cryptography", "dns", "prometheus_client", "rich", "securesystemslib", "sqlalchemy", "uvloop",
    "yaml",
}  # fmt: skip
OURS = {"agent", "benchmarks", "orchestrator"}


def loaded_by(code: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter holds after `code`."""
    told = "import json, sys; print('\\n' + json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{told}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def help_of(*words: str) -> str:
    return f"from relay.main import waystation\nwaystation.main([*{words!r}, '--help'], standalone_mode=False)"


def test_the_scan_sees_what_is_loaded() -> None:
    assert "yaml" in loaded_by("import yaml")


def test_help_loads_nothing_heavy_and_no_command() -> None:
    loaded = loaded_by(help_of())
    assert "click" in loaded
    assert loaded & (HEAVY | OURS) == set()


@pytest.mark.parametrize("command", _COMMANDS)
def test_help_of_a_command_loads_nothing_heavy(command: str) -> None:
    assert loaded_by(help_of(command)) & HEAVY == set()


def test_the_agents_commands_do_not_load_the_orchestrator() -> None:
    loaded = loaded_by("import agent.cli")
    assert "agent" in loaded
    assert loaded & {"orchestrator", "benchmarks", "sqlalchemy"} == set()


def test_an_agent_that_serves_loads_neither_orchestrator_nor_server_nor_a_database() -> None:
    """All that it ever loads, also what it loads late: every module of the agent's."""
    code = (
        "import importlib, pkgutil, agent, sys\n"
        "for module in pkgutil.walk_packages(agent.__path__, 'agent.'):\n"
        "    importlib.import_module(module.name)\n"
        "assert 'agent.service' in sys.modules and 'relay.server' not in sys.modules"
    )
    loaded = loaded_by(code)
    assert "agent" in loaded
    assert loaded & {"orchestrator", "benchmarks", "prometheus_client", "sqlalchemy"} == set()


def test_an_agent_that_serves_has_loaded_what_its_first_order_needs() -> None:
    code = (
        "import sys, agent.service\n"
        "assert {'agent.checks.run_checks', 'agent.runs.runs', 'agent.runs.scripts', 'agent.trees.pull'} <= sys.modules.keys()"
    )
    assert "agent" in loaded_by(code)


def test_a_plan_needs_no_journal() -> None:
    """`release plan` contacts nothing and writes nothing: it opens no database either."""
    loaded = loaded_by("import orchestrator.plan.make_plan, orchestrator.plan.forecast")
    assert loaded & {"sqlalchemy", "aiohttp"} == set()


def test_an_agent_that_pulls_loads_neither_orchestrator_nor_server() -> None:
    """Its memory at rest is a promise; what it never calls should not be in it."""
    code = "import agent.trees.pull, agent.relays.sources, agent.relays.dns, agent.trees.tree, sys\nassert 'relay.server' not in sys.modules"
    loaded = loaded_by(code)
    assert loaded & {"orchestrator", "benchmarks", "prometheus_client"} == set()


def test_a_relay_loads_neither_agent_nor_orchestrator() -> None:
    loaded = loaded_by("import relay.cli, relay.server.app")
    assert "aiohttp" in loaded
    assert loaded & OURS == set()
