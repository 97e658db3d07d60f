"""What tests of decisions share: people with keys, and a deployment in a journal that waits for them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from harness.files import parse_environment, parse_process
from harness.paths import ROOT
from orchestrator.journal import events as ev
from orchestrator.journal.journal import Journal
from orchestrator.paths import Paths
from orchestrator.plan.make_plan import make_plan
from orchestrator.plan.plan import Plan, PlannedPackage
from orchestrator.trust.keyring import init_trust, load_pins, make_person
from relay.trust.keys import TrustPins

DEPLOYMENT = "01JD0000000000000000000000"
OTHER = "01JD0000000000000000000001"
PEOPLE = ("anna", "ben", "clara")
STAGING = (ROOT / "tests/orchestrator/data/staging.yaml").read_text(encoding="utf-8")
TEAMS = "teams: { shop: [anna, ben], business: [clara] }\n"
GATE = "2/canary looks good"
SIGN_OFF = "3/sign off"
PROCESS = """format: 1
project: webshop
packages: { web: Acme.Web }
steps:
  - { name: schema, run_on: server, commands: [ ["true"] ], on_rollback: skip }
  - name: web farm
    roles: [web]
    deploy: web
    to: /srv/webshop
    strategy:
      rolling:
        phases:
          - machines: 1
            gate:
              name: canary looks good
              check: ops/error-rate.sh
              ask: "Open https://${machine.address}/ of ${release.label}"
              approvers: [team:shop, clara]
              minimum: 2
              not_author: true
              expires: 4h
              on_expiry: stop
          - { window: 50% }
  - { name: sign off, ask: "Business owner agrees to ${release.label}" }
"""


class AnyScript:
    """A file system in which every script is there and git tracks nothing."""

    def script(self, folder: str, path: str) -> str:
        return "0" * 64

    def is_tracked(self, path: str) -> bool:
        return False


def planned(
    process: str = PROCESS,
    environment: str = STAGING + TEAMS,
    people: tuple[str, ...] = PEOPLE,
    author: str | None = "clara",
) -> Plan:
    """The plan of a process. Raises `PlanError`."""
    return make_plan(
        parse_process(process.encode(), "release.yaml", "/project"),
        parse_environment(environment.encode(), "staging.yaml", "/environments"),
        label="1.4.2",
        packages={"web": PlannedPackage("Acme.Web", "1.4.2", "ab" * 32, tree_bytes=1000, nupkg_bytes=400)},
        scripts=PlannedPackage("Waystation.Scripts.webshop", "1.0.0", "ef" * 32, 5, 7),
        prompts={},
        files=AnyScript(),
        people=people,
        author=author,
    )


class Office:
    """A home with keys of three people, a fourth for another environment, and a journal with deployments in it."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.home.mkdir(mode=0o700)
        trust = str(self.home / "trust")
        init_trust(trust)
        for name in PEOPLE:
            make_person(trust, name)
        make_person(trust, "dora", environments=("production",))
        self.plan = planned()
        self.journal = Journal.open(str(self.home / "journal.db"))
        self.begin(DEPLOYMENT, self.plan)

    def paths(self, person: str = "") -> Paths:
        return Paths(str(self.home), "memory:", str(self.home / "trust"), str(self.home / "journal.db"), person=person)

    @property
    def pins(self) -> TrustPins:
        return load_pins(str(self.home / "trust"))

    def begin(self, deployment: str, plan: Plan) -> None:
        self.journal.begin(deployment, msgspec.json.encode(plan), 1, "clara@host")

    def ask(self, ask: str = GATE, deployment: str = DEPLOYMENT, at: float = 0.0) -> None:
        step, _, name = ask.partition("/")
        self.journal.append(deployment, ev.AskOpened(ask, int(step), name, "Is it good?", at))
