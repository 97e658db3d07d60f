"""What every stage of a deployment works with: the plan, the record, the machines, the server's own scripts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agent.orders.operation_id import SERVER, OperationId
from orchestrator.journal.events import Goal, Left, UndoEnded, UndoStarted
from orchestrator.plan.leave_out import why_not_left_out, without
from orchestrator.plan.plan import Plan, PreAcquire
from relay.errors import WaystationError

if TYPE_CHECKING:
    from orchestrator.deployment.decisions import Desk, StopToken
    from orchestrator.deployment.notify import Notifier
    from orchestrator.deployment.server_runs import ServerRuns
    from orchestrator.depot.depot import Depot
    from orchestrator.fleet.fleet import Fleet
    from orchestrator.journal.recorder import Recorder
    from orchestrator.releases.packages import ServerTrees
    from orchestrator.replication.fill_relays import RelayFiller
    from orchestrator.rolling.history import History
    from orchestrator.trust.secrets import SecretStore
    from relay.support.progress import Bar


class DeploymentFailedError(WaystationError):
    """The deployment cannot go on, for a reason that people read."""


@dataclass
class DeploymentContext:
    """One deployment while it runs.

    Attributes:
        history: what an earlier process did of it.
        desk: where people's decisions come in.
        goal: what it is for: all of it, or all up to the barrier (`stage`).
        by_rule: machines that are left out because they cannot be reached, and why. They are in the plan no more.
        out: machines whose bracket is open.
        unsure: those of them whose `before` or `after` failed last.
        refused_before: what agents had refused, by their own word, before any order of this deployment left; None until
            all were met.
    """

    plan: Plan
    recorder: Recorder
    fleet: Fleet
    runs: ServerRuns
    secrets: SecretStore
    depot: Depot
    trees: ServerTrees
    notifier: Notifier
    filler: RelayFiller
    bar: Bar
    history: History
    desk: Desk
    stop: StopToken
    goal: Goal = "deploy"
    by_rule: dict[str, str] = field(default_factory=dict)
    out: set[str] = field(default_factory=set)
    unsure: set[str] = field(default_factory=set)
    refused_before: dict[str, tuple[str, ...]] | None = None

    def operation(self, step: int, who: str, action: str, attempt: int = 1) -> OperationId:
        return OperationId.of(self.recorder.deployment, step, who, action, attempt)

    async def leave_out(self, machine: str, why: str) -> str:
        """Go on without a machine that cannot be reached, where the plan's rule allows it; else, why it does not.

        Only before the barrier: no step has begun.
        """
        if refused := why_not_left_out(self.plan, machine, len(self.by_rule)):
            return refused
        self.by_rule[machine] = f"offline: {why}"
        self.plan = without(self.plan, machine, self.by_rule[machine])
        await self.recorder.record(Left(machine, self.by_rule[machine]))
        return ""


async def undo_step(
    step: PreAcquire, runs: ServerRuns, recorder: Recorder, begun: Collection[int] = (), why: str = ""
) -> bool:
    """Close what a step before acquisition opened, where it has an undo. Whether that went well.

    `begun`: as in `ServerRuns.run`. `why`: as in `UndoStarted`.
    """
    if step.undo is None:
        return True
    await recorder.record(UndoStarted(step.run.name, why))
    operation = OperationId.of(recorder.deployment, 0, SERVER, f"undo-{step.run.name}")
    result = await runs.run(step.undo, operation, {"UNDO": "1"}, begun=begun)
    await recorder.record(UndoEnded(step.run.name, ok=result.ok, reason=result.reason))
    return result.ok
