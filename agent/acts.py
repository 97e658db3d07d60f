"""Every event of an agent. The docstring of each says when it is told.

`operation` is the order's id: it begins with its deployment, and the orchestrator's journal and relays name it alike.
"""

from __future__ import annotations

import logging
from typing import ClassVar

from relay.audit.event import Event

# --- the process


class AgentStarted(Event, frozen=True, tag="agent.started"):
    """An agent begins: its name, and the fingerprint of its keys."""

    version: str
    pid: int
    name: str
    key: str
    home: str


class AgentReady(Event, frozen=True, tag="agent.ready"):
    """The first relay has answered it."""

    relay: str


class AgentStopped(Event, frozen=True, tag="agent.stopped"):
    """It ends. Scripts that run go on by themselves, and its next start collects their results."""

    under_way: int


class TendingFailed(Event, frozen=True, tag="agent.tending_failed"):
    """What is due now and then could not be done."""

    level: ClassVar[int] = logging.WARNING
    alike: ClassVar[tuple[str, ...]] = ("why",)
    why: str


# --- orders


class OrderAccepted(Event, frozen=True, tag="agent.order_accepted"):
    """An order is written down, and will be obeyed: signed by the order key `key`, brought by `relay`."""

    operation: str
    action: str
    environment: str
    fence: int
    key: str
    order: str
    relay: str


class OrderRefused(Event, frozen=True, tag="agent.order_refused"):
    """An order was not obeyed; `code` is a stable word, `order` the SHA-256 of what came."""

    level: ClassVar[int] = logging.WARNING
    alike: ClassVar[tuple[str, ...]] = ("code", "relay")
    operation: str
    code: str
    why: str
    order: str
    relay: str


class OperationEnded(Event, frozen=True, tag="agent.operation_ended"):
    """What was ordered has ended. What a check saw is in its report alone."""

    operation: str
    action: str
    state: str
    exit_status: int | None
    seconds: float
    why: str


class OperationBroke(Event, frozen=True, tag="agent.operation_broke"):
    """A mistake of the agent's own ended an operation."""

    level: ClassVar[int] = logging.ERROR
    operation: str
    why: str


class PollBroke(Event, frozen=True, tag="agent.poll_broke"):
    """What a relay answered to a poll made the agent itself fail, with the traceback; it goes on with the others."""

    level: ClassVar[int] = logging.ERROR
    alike: ClassVar[tuple[str, ...]] = ("relay",)
    relay: str
    why: str


class HomeDamaged(Event, frozen=True, tag="agent.home_damaged"):
    """Something in the agent's home cannot be read: `why` names it, and what mends it."""

    level: ClassVar[int] = logging.WARNING
    why: str


class OperationUnreadable(Event, frozen=True, tag="agent.operation_unreadable"):
    """An order that was accepted before a restart cannot be read any more: it is not gone on with."""

    level: ClassVar[int] = logging.ERROR
    operation: str
    why: str


class ReportNotKept(Event, frozen=True, tag="agent.report_not_kept"):
    """The end of an operation could not be written down; it was reported all the same."""

    level: ClassVar[int] = logging.ERROR
    operation: str
    why: str


class ReportNotTaken(Event, frozen=True, tag="agent.report_not_taken"):
    """A relay did not take a report or output; others are tried, and this one again."""

    level: ClassVar[int] = logging.WARNING
    alike: ClassVar[tuple[str, ...]] = ("relay", "what")
    relay: str
    what: str
    why: str


# --- what is done


class ScriptStarted(Event, frozen=True, tag="agent.script_started"):
    """A script of a signed package begins. `package` is the package's manifest."""

    operation: str
    package: str
    script: str


class ServiceControlled(Event, frozen=True, tag="agent.service_controlled"):
    """A service is about to be started, stopped or restarted."""

    operation: str
    service: str
    action: str


class ScriptEnded(Event, frozen=True, tag="agent.script_ended"):
    """The script, or the command that controls a service, has ended."""

    operation: str
    state: str
    exit_status: int | None
    seconds: float
    output_bytes: int


class PullBegun(Event, frozen=True, tag="agent.pull_begun"):
    """A package is to be brought onto this machine."""

    operation: str
    package: str
    version: str
    root: str


class PullEnded(Event, frozen=True, tag="agent.pull_ended"):
    """It is here, verified, in `tree`: `already`, or with bytes from this disk and from each relay."""

    operation: str
    package: str
    version: str
    tree: str
    already: bool
    bytes: int
    from_disk: int
    from_relays: tuple[str, ...]
    wire_bytes: int
    seconds: float


class PullFailed(Event, frozen=True, tag="agent.pull_failed"):
    """It could not be brought here. What came is kept for the next pull."""

    level: ClassVar[int] = logging.WARNING
    operation: str
    package: str
    version: str
    why: str


class PullWaits(Event, frozen=True, tag="agent.pull_waits"):
    """No relay can give it now: they are asked again."""

    level: ClassVar[int] = logging.WARNING
    alike: ClassVar[tuple[str, ...]] = ("operation",)
    operation: str
    why: str


class Switched(Event, frozen=True, tag="agent.switched"):
    """`current` of a root names another tree, or was asked to name the one that it names."""

    operation: str
    root: str
    before: str
    after: str


class Settled(Event, frozen=True, tag="agent.settled"):
    """A tree was found good, and is kept as that; older ones may be removed."""

    operation: str
    root: str
    tree: str


class TreeDamaged(Event, frozen=True, tag="agent.tree_damaged"):
    """An installed tree is not as it was signed. It does not count, and is not run."""

    level: ClassVar[int] = logging.WARNING
    tree: str
    why: str


# --- relays


class NoRelay(Event, frozen=True, tag="agent.no_relay"):
    """No relay that carries orders is known."""

    level: ClassVar[int] = logging.WARNING
    why: tuple[str, ...]


class RelayLeft(Event, frozen=True, tag="agent.relay_left"):
    """A relay that was asked for orders does not answer: another one is asked in its place."""

    level: ClassVar[int] = logging.WARNING
    relay: str
    why: str


class RelayBack(Event, frozen=True, tag="agent.relay_back"):
    """A relay that was left answers again."""

    relay: str


class RelayIll(Event, frozen=True, tag="agent.relay_ill"):
    """A relay counts as ill: others are asked before it."""

    level: ClassVar[int] = logging.WARNING
    relay: str
    fails: int
    why: str


class RelayWell(Event, frozen=True, tag="agent.relay_well"):
    """A relay that was ill, or not known, is well."""

    relay: str


class RelaysForgotten(Event, frozen=True, tag="agent.relays_forgotten"):
    """What was known of the relays cannot be read: it is learned again."""

    level: ClassVar[int] = logging.WARNING
    path: str
    why: str
