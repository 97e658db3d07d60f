"""Environment files: the example of the documentation loads, and mistakes are named."""

from __future__ import annotations

import pytest
from harness.files import parse_environment
from harness.paths import ROOT

from orchestrator.files.environment import Machine, Token, json_schema, load_environment
from relay.written.yaml_positions import PlanError

DATA = ROOT / "tests/orchestrator/data"


def mistakes(text: str) -> list[str]:
    with pytest.raises(PlanError) as caught:
        parse_environment(text.encode(), "production.yaml", "/")
    return [str(mistake) for mistake in caught.value.mistakes]


def test_the_example_loads_with_every_key_in_its_place() -> None:
    environment = load_environment(str(DATA / "production.yaml")).value
    assert environment.requires is not None
    assert (environment.requires.environment, environment.requires.within) == ("staging", "7d")
    assert (environment.freeze[0].from_, environment.freeze[0].to) == ("2026-12-20", "2027-01-04")
    fra, iad = environment.relays["fra"], environment.relays["iad"]
    assert (fra.site, fra.generic, fra.token) == ("fra", False, Token(file="/etc/waystation/relay-fra.token"))
    assert (iad.generic, iad.from_, iad.limit) == (True, "fra", "50Mbit")
    assert environment.roles["web"].variables == {"threads": "8"}
    assert environment.rotation["web"].secrets == ("lb_token",)
    assert environment.secrets["corp_feed"].env == "CORP_FEED"
    assert environment.secrets["app_key"].command is not None
    web1 = environment.machines["web1"]
    assert isinstance(web1, Machine)
    assert (web1.address, web1.site, web1.roles) == ("10.1.0.11", "fra", ("web",))
    assert (web1.tags, web1.variables) == ({"rack": "r1"}, {"port": "8081"})


def test_machines_may_come_from_a_command() -> None:
    environment = load_environment(str(DATA / "inventory.yaml")).value
    assert environment.machines == {"from": ("inventory", "--format", "json")}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("relays: {}\n", "production.yaml:1: the key 'environment' is missing: expected a name"),
        ("environment: p\nmachines:\n  web1: { site: a }\n", "production.yaml:3: machines.web1: the key 'address' is missing"),
        ("environment: p\nmachines:\n  web 1: { address: a, site: a }\n", "machines['web 1']: 'web 1': expected a machine's name"),
        (
            "environment: p\nmachines:\n  a: { address: a, site: a, key: 'sha256:9f2c' }\n",
            "machines.a.key: 'sha256:9f2c': expected the fingerprint that 'waystation agent init' prints",
        ),
        ("environment: p\nsecrets: { a: { file: x, env: Y } }\n", "secrets.a: has file and env: expected exactly one of"),
        ("environment: p\nsecrets: { a: {} }\n", "secrets.a: says nothing of what it is: expected exactly one of the keys file"),
        ("environment: p\nsecrets: { a: hunter2 }\n", "secrets.a: 'hunter2': expected a mapping with file, env"),
        ("environment: p\nrelays: { a: { url: x, limit: fast } }\n", "relays.a.limit: 'fast': expected a rate such as 50Mbit"),
        ("environment: p\nrotation: { web: { before: x } }\n", "rotation.web: the key 'after' is missing"),
        ("environment: p\nfreeze: [ { from: yesterday, to: 2027-01-04, reason: r } ]\n", "freeze[0].from: 'yesterday': expected a date"),
        ("environment: 7\n", "production.yaml:1: environment: 7: expected a name"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_line_path_and_expectation(text: str, expected: str) -> None:
    assert any(expected in mistake for mistake in mistakes(text)), mistakes(text)


@pytest.mark.parametrize("name", ["production.yaml", "inventory.yaml", "staging.yaml"])
def test_the_examples_fit_the_schema(name: str) -> None:
    from harness.schema_check import misfits, plain_document

    assert misfits(plain_document(DATA / name), json_schema()) == []


def test_the_schema_refuses_an_unknown_key() -> None:
    from harness.schema_check import misfits

    assert misfits({"environment": "p", "relay": {}}, json_schema()) == ["$: unknown key relay"]
