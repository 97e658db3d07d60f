"""May this order be obeyed? Pure: bytes, pins, clock and what is remembered go in, a verdict comes out, never an error.

The steps, in this order: who signed it, and may they order here; is it for this agent; does its name belong to its
deployment; was it seen before; is its sender still the one who leads; is it in time; can it be opened. Nothing is
believed of a relay, or of anything else that carries orders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from agent.orders.envelopes import ScopeError, open_order, order_digest, verify_order
from agent.orders.orders import SKEW_SECONDS, FenceSeen, Order, deployment_of
from relay.errors import SignatureError
from relay.trust.envelopes import MalformedError
from relay.trust.keys import TrustPins

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

Code = Literal[
    "malformed",
    "forged",
    "scope",
    "other_agent",
    "other_key",
    "operation",
    "altered",
    "fenced_off",
    "other_journal",
    "clock",
    "too_early",
    "expired",
    "sealed",
    "disk",
    "internal",
]
"""Why an order is refused, as a stable word."""


Fences = Mapping[tuple[str, str], FenceSeen]
"""By (environment, project). What was seen of no project, by orders of older orchestrators, is of all of them."""


@dataclass(frozen=True, slots=True)
class Me:
    """Who this agent is: its name, the fingerprint of its keys, and what opens that which is sealed to it."""

    name: str
    key: str
    sealing: X25519PrivateKey | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Memory:
    """What was accepted before.

    Attributes:
        known: digest of the order's envelope by operation id.
        fences: the highest by environment and project; that of an empty project is of all.
        newest: the newest `not_before` ever accepted, seconds since 1970.
        forgotten: the newest `not_after` among the orders that are no longer in `known`: what is not newer may be one
            of them.
    """

    known: Mapping[str, str] = field(default_factory=dict)
    fences: Fences = field(default_factory=dict)
    newest: float = 0.0
    forgotten: float = 0.0


@dataclass(frozen=True, slots=True)
class Accepted:
    """A new order, with its action in clear: write its envelope down, then act. `digest` is of that."""

    order: Order
    digest: str


@dataclass(frozen=True, slots=True)
class Known:
    """The same bytes were accepted before: answer with what became of it."""

    operation: str
    digest: str


@dataclass(frozen=True, slots=True)
class Refused:
    """`order` is there where its signature is good, so that what it says of itself can be believed."""

    code: Code
    text: str
    digest: str
    order: Order | None = None


Verdict = Accepted | Known | Refused


def judge(envelope: bytes, pins: TrustPins, me: Me, memory: Memory, now: float) -> Verdict:
    """What to do with `envelope`, which came from anywhere, at `now` (seconds since 1970)."""
    digest = order_digest(envelope)
    try:
        order = verify_order(envelope, pins)
    except ScopeError as error:
        return Refused("scope", error.message, digest)
    except MalformedError as error:
        return Refused("malformed", error.message, digest)
    except SignatureError as error:
        return Refused("forged", str(error), digest)
    return _judge_order(order, digest, me, memory, now)


def _judge_order(order: Order, digest: str, me: Me, memory: Memory, now: float) -> Verdict:
    refusal = _addressed_wrongly(order, me)
    if refusal is None:
        known = memory.known.get(order.operation)
        if known == digest:
            return Known(order.operation, digest)
        refusal = (
            ("altered", "another order under the same operation id was accepted before")
            if known is not None
            else fenced_off(order, memory.fences) or out_of_time(order, memory, now)
        )
    if refusal is not None:
        return Refused(*refusal, digest, order)
    try:
        return Accepted(open_order(order, me.sealing), digest)
    except MalformedError as error:
        return Refused("malformed", error.message, digest, order)
    except SignatureError as error:
        return Refused("sealed", error.message, digest, order)


def _addressed_wrongly(order: Order, me: Me) -> tuple[Code, str] | None:
    if order.agent.lower() != me.name.lower():
        return "other_agent", f"it is for {order.agent}, this is {me.name}"
    if order.key != me.key:
        return (
            "other_key",
            f"it is for an agent {order.agent} with the key {order.key[:23]}…, this one has {me.key[:23]}…",
        )
    if deployment_of(order.operation) != order.deployment:
        return "operation", f"the operation {order.operation} is not of the deployment {order.deployment}"
    return None


def why_barred(order: Order, envelope: bytes, pins: TrustPins, memory: Memory, now: float) -> str:
    """Why an order that was accepted before a restart must not begin any more; empty where it may."""
    try:
        verify_order(envelope, pins)
    except SignatureError as error:
        return f"its signature counts no more ({error.message})"
    found = out_of_time(order, memory, now) or fenced_off(order, memory.fences)
    return "" if found is None else found[1]


def fenced_off(order: Order, fences: Fences) -> tuple[Code, str] | None:
    """Why the order's deployment no longer leads where it orders; None where it does.

    Projects have fences of their own in an environment, and shut nobody out but their own. An order without a project
    speaks for the environment: it must be above the fences of all projects, and shuts out those that are below its own.

    Asked again when an order has waited for its turn: a newer deployment may have begun meanwhile.
    """
    for seen in _leaders(order, fences):
        if order.fence < seen.fence:
            where = f"{order.project} in {order.environment}" if order.project else order.environment
            return "fenced_off", f"its fence {order.fence} is behind: {seen.deployment} leads {where} with {seen.fence}"
        if order.fence == seen.fence and order.journal != seen.journal:
            return (
                "other_journal",
                f"another journal ({order.journal[:8]}…) claims the fence {order.fence} of {seen.journal[:8]}…",
            )
    return None


def highest(fences: Fences, environment: str) -> FenceSeen | None:
    """The highest fence of an environment, of whichever project; None where none was seen."""
    return max(
        (seen for (where, _), seen in fences.items() if where == environment), key=lambda seen: seen.fence, default=None
    )


def _leaders(order: Order, fences: Fences) -> list[FenceSeen]:
    if order.project:
        keys = ((order.environment, order.project), (order.environment, ""))
        return [fences[key] for key in keys if key in fences]
    found = highest(fences, order.environment)
    return [] if found is None else [found]


def out_of_time(order: Order, memory: Memory, now: float) -> tuple[Code, str] | None:
    """Why the order cannot be accepted at `now`; None where it can."""
    if now < memory.newest - SKEW_SECONDS:
        return "clock", f"this machine's clock is {memory.newest - now:.0f} s behind orders that it has already obeyed"
    if now < order.not_before - SKEW_SECONDS:
        return "too_early", f"it is from {order.not_before - now:.0f} s in the future, as this machine's clock says"
    if now > order.not_after + SKEW_SECONDS:
        return "expired", f"its time was over {now - order.not_after:.0f} s ago, as this machine's clock says"
    if order.not_after <= memory.forgotten:
        return "expired", "it is as old as orders that were obeyed and forgotten"
    return None
