"""What one seed stands for: a plan, the machines as they are found, what people do, and how often anything fails."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Final, Literal

from agent.orders.orders import CommandCheck, HttpCheck, TimedCheck
from orchestrator.plan.plan import (
    AcquirePlan,
    AskStep,
    MachineStep,
    MachineTurn,
    OfflineRule,
    Plan,
    PlannedAsk,
    PlannedCheck,
    PlannedGate,
    PlannedMachine,
    PlannedPackage,
    PlannedPhase,
    PlannedStep,
    PreAcquire,
    RotationPlan,
    ScriptAction,
    ServerRun,
    ServerStep,
    ServiceAction,
    SwitchAction,
)

DEPLOYMENT: Final = "01JD0000000000000000000000"
EARLIER: Final = "01JD0000000000000000000009"
BEGINS: Final = 1_000_000.0
AUTHOR: Final = "clara"
PEOPLE: Final = ("anna", "ben", AUTHOR, "dora")
OLD: Final = "cd" * 32
NEW: Final = {"web": "ab" * 32, "api": "ef" * 32}
SCRIPTS: Final = "99" * 32

Weather = Literal["calm", "rough", "storm"]
_CHANCES: Final = {"calm": 0.0, "rough": 0.05, "storm": 0.2}


@dataclass(frozen=True)
class Scenario:
    """Everything that is decided before the first event; the rest is `fate`, by the name of what happens.

    Attributes:
        current: manifest under each (machine, root) that has one.
        settled: fingerprint of the same.
        offline: machines that no relay sees at the beginning.
        outside: machines that the balancer does not send anything to at the beginning.
        brackets: those of them whose bracket an earlier deployment left open.
        cancel: seconds after the beginning; None: nobody does. `kills`: with `--now`.
        pauses: seconds after the beginning, and how long.
        waits: whether the process waits for people.
    """

    seed: int
    weather: Weather
    plan: Plan
    current: dict[tuple[str, str], str]
    settled: dict[tuple[str, str], str]
    offline: frozenset[str]
    outside: frozenset[str]
    brackets: frozenset[str]
    cancel: float | None
    kills: bool
    pauses: tuple[tuple[float, float], ...]
    waits: bool

    def fate(self, *name: object) -> float:
        """From 0 to 1; the same for the same name, whoever asks and when."""
        digest = blake2b(f"{self.seed}{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / (1 << 64)

    def fails(self, *name: object) -> bool:
        """Whether something goes wrong."""
        return self.fate("fails", *name) < _CHANCES[self.weather]

    def one_of(self, options: tuple[str, ...], *name: object) -> str:
        return options[int(self.fate("one", *name) * len(options))]

    @property
    def is_timeless(self) -> bool:
        """Nothing depends on when it happens: a run that is broken off and taken up must end as one that is not."""
        return self.cancel is None and not self.plan.deadline

    @cached_property
    def machine_steps(self) -> tuple[MachineStep, ...]:
        return tuple(step for step in self.plan.steps if isinstance(step, MachineStep))


def scenario_of(seed: int) -> Scenario:
    """The scenario of this seed."""
    chance = random.Random(seed)
    weather: Weather = chance.choices(("calm", "rough", "storm"), (1, 5, 2))[0]
    names = [f"web{number}" for number in range(1, 1 + chance.choices((1, 2, 3, 4), (4, 6, 3, 1))[0])]
    beside = [f"web{number}" for number in range(7, 7 + chance.choices((0, 1, 2), (7, 2, 1))[0])]
    excluded = {name: "it is mended" for name in beside if chance.random() < 0.5}
    drawn = _Drawn(chance, names, beside)
    steps = drawn.steps()
    rule = OfflineRule(chance.randint(1, 2)) if chance.random() < 0.3 else None
    plan = Plan(
        format=1,
        project="shop",
        label="2.0",
        environment="prod",
        packages={name: PlannedPackage(f"Acme.{name}", "2.0", NEW[name], 1000, 400) for name in NEW},
        scripts=PlannedPackage("Waystation.Scripts.shop", "1.0.0", SCRIPTS, 5, 7),
        relays=(),
        feeds={},
        machines=tuple(_machine(name) for name in names),
        secrets={},
        machine_secrets=(),
        pre_acquire=drawn.pre_acquire(),
        acquire=AcquirePlan(deadline=120.0, stall=10.0, offline=rule),
        steps=steps,
        author=AUTHOR,
        deadline=chance.uniform(2, 15) if chance.random() < 0.06 else 0.0,
        excluded=excluded,
        force=chance.random() < 0.1,
    )
    roots = {
        (turn.machine, turn.root): turn.fingerprint
        for step in steps
        if isinstance(step, MachineStep)
        for turn in step.turns
    }
    current, settled = {}, {}
    for (name, root), fingerprint in roots.items():
        there = chance.choices(("old", "new", "settled", "nothing"), (12, 1, 1, 1))[0]
        if there != "nothing" and root:
            current[name, root] = OLD if there == "old" else NEW[root.rpartition("/")[2]]
        if there == "settled":
            settled[name, root] = fingerprint
    rotates = any(isinstance(step, MachineStep) and step.rotation for step in steps)
    outside = frozenset(name for name in (*names, *beside) if rotates and chance.random() < 0.08)
    is_left = chance.random() < 0.5
    return Scenario(
        seed=seed,
        weather=weather,
        plan=plan,
        current=current,
        settled=settled,
        offline=frozenset(name for name in names if weather != "calm" and chance.random() < 0.03),
        outside=outside,
        brackets=frozenset(name for name in outside if is_left or not drawn.probes),
        cancel=chance.uniform(0, 12) if chance.random() < 0.08 else None,
        kills=chance.random() < 0.5,
        pauses=((chance.uniform(1, 8), chance.uniform(0.5, 4)),) if chance.random() < 0.25 else (),
        waits=chance.random() < 0.8,
    )


def _machine(name: str) -> PlannedMachine:
    return PlannedMachine(name, f"10.0.0.{name[3:]}", "fra", f"sha256:{name}", ("web",), ("fra",))


@dataclass
class _Drawn:
    chance: random.Random
    names: list[str]
    beside: list[str]
    probes: bool = True
    """Every rotation has a probe, so that the engine can know what its own brackets do not tell."""

    def maybe(self, likely: float) -> bool:
        return self.chance.random() < likely

    def run(self, name: str, *, idempotent: bool = False) -> ServerRun:
        return ServerRun(
            name, commands=(("true",),), attempts=self.chance.choice((1, 1, 1, 2)), delay=0.5, idempotent=idempotent
        )

    def ask(self) -> PlannedAsk:
        approvers = self.chance.choice((("anna", "ben"), ("anna", "ben", "clara"), ()))
        return PlannedAsk(
            "Is it good?",
            approvers,
            minimum=self.chance.choice((1, 1, 2)),
            not_author=self.maybe(0.5),
            expires=self.chance.choice((0.0, 0.0, 6.0)),
            on_expiry=self.chance.choice(("pause", "stop", "proceed")),  # type: ignore[arg-type]
        )

    def pre_acquire(self) -> tuple[PreAcquire, ...]:
        return tuple(
            PreAcquire(
                self.run(name, idempotent=self.maybe(0.5)),
                self.run(f"{name} down") if self.maybe(0.8) else None,
                self.chance.choice(("finished", "acquired")),  # type: ignore[arg-type]
            )
            for name in ("vpn", "door")[: self.chance.choices((0, 1, 2), (6, 3, 1))[0]]
        )

    def steps(self) -> tuple[PlannedStep, ...]:
        made: list[PlannedStep] = []
        if self.maybe(0.3):
            made.append(
                ServerStep(1, "schema", self.run("schema", idempotent=self.maybe(0.3)), required=self.maybe(0.5))
            )
        for package in ("web", "api")[: self.chance.choices((1, 2), (5, 1))[0]]:
            made.append(self.machines(len(made) + 1, package))
        if self.maybe(0.15):
            made.append(AskStep(len(made) + 1, "sign off", self.ask()))
        if self.maybe(0.2):
            when = self.chance.choice(("success", "failure", "always"))
            made.append(ServerStep(len(made) + 1, "contract", self.run("contract"), when=when))  # type: ignore[arg-type]
        return tuple(made)

    def machines(self, number: int, package: str) -> MachineStep:
        count = len(self.names)
        rotates = self.maybe(0.8)
        rotation = None
        if rotates:
            probe = ServerRun("probe", commands=(("true",),)) if self.maybe(0.6) else None
            self.probes = self.probes and probe is not None
            rotation = RotationPlan(
                "web", self.run("before", idempotent=True), self.run("after", idempotent=True), probe
            )
        deploys = package if self.maybe(0.85) else ""
        actions, here, there = self.actions(deploys), self.maybe(0.7), self.maybe(0.3)
        turns = [
            MachineTurn(
                name,
                f"/srv/{deploys}" if deploys else "",
                actions,
                _checks(name, number, here=here, there=there),
                {"MACHINE": name},
                f"{number:064}",
            )
            for name in (*self.names, *self.beside)
        ]
        rolling = self.maybe(0.85)
        return MachineStep(
            number=number,
            name=f"farm {package}",
            turns=tuple(turns[:count]),
            strategy="rolling" if rolling else "parallel",
            phases=self.phases(count) if rolling else (),
            package=deploys,
            label="2.0",
            min_in_service=self.chance.randint(0, count - 1) if rotates else 0,
            max_failures=self.chance.choices((0, 1, count), (4, 2, 1))[0],
            unhealthy_first=self.maybe(0.7),
            rotation=rotation,
            on_failure=self.chance.choice(("stop", "ask", "rollback")),  # type: ignore[arg-type]
            when="always" if self.maybe(0.1) else "success",
            beside=tuple(turns[count:]),
        )

    def phases(self, count: int) -> tuple[PlannedPhase, ...]:
        made = []
        left = count
        while left > 1 and self.maybe(0.5):
            size = self.chance.randint(1, left - 1)
            made.append(
                PlannedPhase(size, self.chance.randint(1, size), self.gate(len(made)) if self.maybe(0.6) else None)
            )
            left -= size
        window = self.chance.randint(1, left)
        return (*made, PlannedPhase(0, window, self.gate(len(made)) if self.maybe(0.15) else None))

    def gate(self, phase: int) -> PlannedGate:
        check = self.run("look") if self.maybe(0.5) else None
        return PlannedGate(f"gate {phase + 1}", check, self.ask() if check is None or self.maybe(0.5) else None)

    def actions(self, package: str) -> tuple[ScriptAction | SwitchAction | ServiceAction, ...]:
        made: list[ScriptAction | SwitchAction | ServiceAction] = []
        if self.maybe(0.4):
            made.append(self.script("prepare"))
        if package:
            made.append(SwitchAction())
        if self.maybe(0.5):
            attempts, idempotent = self.chance.choice((1, 1, 2)), self.maybe(0.3)
            made.append(
                ServiceAction("restart web", "web", "restart", attempts=attempts, delay=0.5, idempotent=idempotent)
            )
        if self.maybe(0.2) or not made:
            made.append(self.script("warm"))
        return tuple(made)

    def script(self, name: str) -> ScriptAction:
        return ScriptAction(
            name, f"{name}.sh", attempts=self.chance.choice((1, 1, 2)), delay=0.5, idempotent=self.maybe(0.3)
        )


def _checks(machine: str, step: int, *, here: bool, there: bool) -> tuple[PlannedCheck, ...]:
    """`here`: one that the agent makes; `there`: one that the server makes."""
    command = TimedCheck(CommandCheck(("well",)))
    new, old = (TimedCheck(HttpCheck(f"http://{machine}/{step}/{version}")) for version in ("new", "old"))
    made = [PlannedCheck(command, command)] if here else []
    return (*made, PlannedCheck(new, old, on_server=True)) if there else tuple(made)
