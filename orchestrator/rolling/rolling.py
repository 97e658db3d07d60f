"""Which machines of a step start next. Pure: no clock, no socket; the same arguments always give the same answer.

A machine holds a slot of the window from the start of `before` to the confirmed end of `after`. Inside a phase the
window slides: the next machine starts when any ends. A phase ends when all its machines are through, and its gate, where
it has one, is passed. Which machines
a phase gets is decided as they start, so that one that is found out of service goes first, whatever the file says.

Who is in service is what the caller knows now (the rotation's probe, or our own brackets). `Roll` never counts a
machine in flight, whatever a probe says of it: its `before` may take it out the next moment. So the machines that are
known to be in service never become fewer than `min_in_service` by a start of ours.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate

from orchestrator.plan.forecast import counted
from orchestrator.plan.plan import MachineStep, PlannedPhase


@dataclass(frozen=True, slots=True)
class RotationState:
    """Which machines are in service and which are out. Of one in neither it is not known: it does not count as in
    service, and starting it may take it out. `held` must not start now, for a reason that stands elsewhere.
    """

    inside: frozenset[str]
    out: frozenset[str]
    held: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def by_brackets(
        cls, machines: Collection[str], out: Collection[str], unsure: Collection[str] = frozenset()
    ) -> RotationState:
        """What is known without a probe: a machine is out where a bracket of ours is open, else in service; of those whose
        `before` or `after` failed last (`unsure`) it is not known.
        """
        return cls(frozenset(machines) - frozenset(out), frozenset(out) - frozenset(unsure))


@dataclass(frozen=True, slots=True)
class Roll:
    """How far a step has come over its machines.

    Attributes:
        machines: all of the step, in their order.
        phases: each but the last has a count; a last one of 0 takes all that are left.
        max_failures: more failures than this stop the roll.
        started: in the order of their start, those in flight included.
        passed: through without a start, because nothing was to do.
        excluded: through, and left out by a person's word; no failures.
        gates: of so many phases, the first ones, the gate is passed.
        stopped: why no machine starts any more; empty while machines may start.
    """

    machines: tuple[str, ...]
    phases: tuple[PlannedPhase, ...]
    min_in_service: int = 0
    max_failures: int = 0
    unhealthy_first: bool = True
    started: tuple[str, ...] = ()
    in_flight: frozenset[str] = frozenset()
    passed: frozenset[str] = frozenset()
    failed: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    gates: int = 0
    stopped: str = ""

    @property
    def waiting(self) -> tuple[str, ...]:
        """Machines that did not start, in their order."""
        begun = self.passed.union(self.started)
        return tuple(machine for machine in self.machines if machine not in begun)

    @property
    def is_over(self) -> bool:
        """Nothing is in flight, nothing will start, and no gate is to be passed."""
        return not self.in_flight and (bool(self.stopped) or (not self.waiting and self.gate_due is None))

    @property
    def gate_due(self) -> int | None:
        """The phase, from 0, whose gate is to be passed now: its machines are through, and some of them had a turn."""
        if self.stopped or self.in_flight:
            return None
        ends = list(accumulate(phase.machines or len(self.machines) for phase in self.phases))
        for index, (phase, end) in enumerate(zip(self.phases, ends, strict=True)):
            first = ends[index - 1] if index else 0
            is_through = len(self.started) > first and (len(self.started) >= end or not self.waiting)
            if index >= self.gates and phase.gate is not None and is_through:
                return index
        return None

    def machines_of(self, phase: int) -> tuple[str, ...]:
        """Those that started in this phase, from 0."""
        ends = [0, *accumulate(each.machines or len(self.machines) for each in self.phases)]
        return self.started[ends[phase] : ends[phase + 1]]


def begin(step: MachineStep) -> Roll:
    """Before any machine started. `strategy: parallel` is one phase with a window of all."""
    machines = tuple(turn.machine for turn in step.turns)
    whole = (PlannedPhase(machines=0, window=max(1, len(machines))),)
    return Roll(
        machines=machines,
        phases=step.phases if step.strategy == "rolling" and step.phases else whole,
        min_in_service=step.min_in_service,
        max_failures=step.max_failures,
        unhealthy_first=step.unhealthy_first,
    )


def started(roll: Roll, machine: str) -> Roll:
    """Raises `ValueError`: not a machine that waits."""
    if machine not in roll.waiting:
        raise ValueError(f"{machine} does not wait to be started")
    return replace(roll, started=(*roll.started, machine), in_flight=roll.in_flight | {machine})


def passed_gate(roll: Roll) -> Roll:
    """The gate that is due is passed. Raises `ValueError`: none is."""
    if roll.gate_due is None:
        raise ValueError("no gate is due")
    return replace(roll, gates=roll.gate_due + 1)


def ended(
    roll: Roll, machine: str, *, failure: bool = False, stop_roll: bool = False, is_excluded: bool = False
) -> Roll:
    """The machine is through. `stop_roll` stops whatever `max_failures` allows.

    Raises:
        ValueError: not in flight.
    """
    if machine not in roll.in_flight:
        raise ValueError(f"{machine} is not in flight")
    roll = replace(roll, in_flight=roll.in_flight - {machine})
    if is_excluded:
        roll = replace(roll, excluded=(*roll.excluded, machine))
    if failure:
        roll = replace(roll, failed=(*roll.failed, machine))
    if stop_roll:
        return stop(roll, f"after {machine} the capacity is not known")
    if len(roll.failed) > roll.max_failures:
        return stop(
            roll, f"{counted(len(roll.failed), 'failure')} ({', '.join(roll.failed)}), {roll.max_failures} allowed"
        )
    return roll


def passed(roll: Roll, machine: str) -> Roll:
    """Nothing is to do on this machine: it takes no slot and no place in a phase. Raises `ValueError` as `started`."""
    if machine not in roll.waiting:
        raise ValueError(f"{machine} does not wait to be started")
    return replace(roll, passed=roll.passed | {machine})


def stop(roll: Roll, reason: str) -> Roll:
    """No machine starts any more; those in flight go to their end. The first reason stays."""
    return roll if roll.stopped else replace(roll, stopped=reason)


def why_waiting(roll: Roll, service: RotationState) -> str:
    """Why nothing can start; empty where something can, or where the roll is over."""
    if roll.is_over or next_start(roll, service) is not None:
        return ""
    if roll.stopped:
        return f"stopped: {roll.stopped}; {_names(roll.in_flight)} still in flight"
    return (_why_full(roll) if roll.in_flight else "") or _why_held(roll, service) or _why_too_few(roll, service)


# --- the rules


def next_start(roll: Roll, service: RotationState) -> str | None:
    """The first machine to start now; None where none may."""
    if roll.stopped or _why_full(roll):
        return None
    left = len(service.inside - roll.in_flight)
    candidates = (machine for machine in _in_order(roll, service) if _may_start(roll, service, machine, left))
    return next(candidates, None)


def _in_order(roll: Roll, service: RotationState) -> Iterator[str]:
    """Out of service first, then those of which it is not known, then the others; or as listed."""
    if not roll.unhealthy_first:
        yield from roll.waiting
        return
    yield from sorted(
        roll.waiting, key=lambda machine: 0 if machine in service.out else 2 if machine in service.inside else 1
    )


def _may_start(roll: Roll, service: RotationState, machine: str, left: int) -> bool:
    """Whether `min_in_service` are known to stay, of the `left` ones that are in service and not in flight."""
    if machine in service.held:
        return False
    if machine in service.out:
        return True
    return left - (machine in service.inside) >= roll.min_in_service


def _why_full(roll: Roll) -> str:
    """Why the phase takes no machine now; empty where it does."""
    if (due := roll.gate_due) is not None:
        gate = roll.phases[due].gate
        return f"the gate {gate.name!r} is to be passed" if gate else ""
    index, first = _phase(roll)
    phase = roll.phases[index]
    before = roll.in_flight.intersection(roll.started[:first])
    if before:
        return f"phase {index + 1} of {len(roll.phases)} starts when {_names(before)} is through"
    if len(roll.in_flight) >= phase.window:
        return f"{len(roll.in_flight)} of at most {phase.window} in flight: {_names(roll.in_flight)}"
    return ""


def _phase(roll: Roll) -> tuple[int, int]:
    """The phase that the next start belongs to, and how many starts belong to those before it."""
    counts = [phase.machines or len(roll.machines) for phase in roll.phases]
    firsts = [0, *accumulate(counts)]
    # Beyond the last phase's count the last window holds on: a plan whose counts are too small loses no machine.
    index = next((i for i, end in enumerate(firsts[1:]) if len(roll.started) < end), len(roll.phases) - 1)
    return index, firsts[index]


def _why_held(roll: Roll, service: RotationState) -> str:
    """Why the machines that wait are held; empty where one of them is not, and waits for something else."""
    if any(machine not in service.held for machine in roll.waiting):
        return ""
    return "; ".join(dict.fromkeys(service.held[machine] for machine in roll.waiting))


def _why_too_few(roll: Roll, service: RotationState) -> str:
    inside = service.inside - roll.in_flight
    unknown = set(roll.machines) - service.inside - service.out - roll.in_flight
    told = f"; of {_names(unknown)} nobody can tell" if unknown else ""
    return f"{len(inside)} in service{told}, and min_in_service: {roll.min_in_service} must stay while one is out"


def _names(machines: Collection[str]) -> str:
    return ", ".join(sorted(machines))
