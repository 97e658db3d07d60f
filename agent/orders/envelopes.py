"""Envelopes between orchestrator and agents, signed and sealed: making and checking what `agent/orders/orders.py` describes.

Orders are signed by an order key, reports and presences by the agent that sends them. Secrets are sealed to one agent
for one place in one order: HPKE base mode, RFC 9180, with X25519, HKDF-SHA256 and ChaCha20-Poly1305.
https://www.rfc-editor.org/rfc/rfc9180
"""

from __future__ import annotations

import hashlib
import zlib
from typing import TYPE_CHECKING, TypeVar

import msgspec

from agent.orders.keys import AgentIdentity, fingerprint_of
from agent.orders.orders import (
    ORDER_TYPE,
    REPORT_TYPE,
    OpenAction,
    Order,
    Presence,
    Report,
    SealedAction,
    action_name,
)
from relay.errors import SignatureError, UsageError
from relay.protocol.messages import PRESENCE_TYPE
from relay.trust.envelopes import (
    MalformedError,
    check_form,
    decode_document,
    sign_document,
    unverified,
    verify_document,
)
from relay.trust.keys import TrustPins, public_key

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.hpke import Suite
    from securesystemslib.signer import Signer

T = TypeVar("T")


_ACTION_MAX = 1 << 20
"""Bytes of an action as JSON. What is signed and sealed is far below it; what inflates is bounded by it."""


class ScopeError(SignatureError):
    """The order is signed by a pinned key that has no say in its environment."""


# --- orders


def sign_order(order: Order, signer: Signer) -> bytes:
    """The order's envelope. Raises `UsageError` where it is larger than an envelope may be."""
    return sign_document(_encode(order), ORDER_TYPE, signer)


def order_digest(envelope: bytes) -> str:
    """SHA-256 of an order's envelope, hex: what a report names as the order that it answers."""
    return hashlib.sha256(envelope).hexdigest()


def verify_order(envelope: bytes, pins: TrustPins) -> Order:
    """The order that a pinned order key, whose scope covers the order's environment, signed.

    An order has one form: canonical JSON with one signature. Otherwise a relay could give it other bytes that say
    the same, and so another digest than the one that its sender waits for.

    Raises:
        SignatureError: no pinned order key signed it.
        ScopeError: one did, but not for this environment.
        MalformedError: it is no order as this version knows them.
    """
    payload, keyid = verify_document(envelope, pins.order, ORDER_TYPE)
    check_form(envelope)
    order = decode_document(payload, Order)
    if all(key.keyid != keyid for key in pins.order_keys(order.environment)):
        raise ScopeError(f"the key that signed it may not order in {order.environment[:100]!r}")
    return order


def signer_of(envelope: bytes) -> str:
    """The id of the key that signed an order, of an envelope that was verified."""
    return check_form(envelope)


# --- reports


def sign_report(report: Report, signer: Signer) -> bytes:
    """The report's envelope. Raises `UsageError` where it is larger than an envelope may be."""
    return sign_document(_encode(report), REPORT_TYPE, signer)


def verify_report(envelope: bytes, identity: AgentIdentity) -> Report:
    """A report by this agent. Which order it answers, the caller compares (`Report.order`, `order_digest`).

    Raises:
        SignatureError: the agent did not sign it, or it names another agent's key.
        MalformedError: it is no report as this version knows them.
    """
    payload, _ = verify_document(envelope, (public_key(identity.signing_public),), REPORT_TYPE)
    report = decode_document(payload, Report)
    if report.key != identity.fingerprint:
        raise SignatureError(f"the report names the key {report.key[:23]}…, not the one that signed it")
    return report


# --- presences


def sign_presence(presence: Presence, signer: Signer) -> bytes:
    """The presence's envelope."""
    return sign_document(_encode(presence), PRESENCE_TYPE, signer)


def verify_presence(envelope: bytes, fingerprint: str | None = None) -> Presence:
    """A presence that is signed by the key that it names; `fingerprint` is of the keys that are expected.

    Without `fingerprint`, it proves only that the sender has these keys: such a pair is easily made.

    Raises:
        SignatureError: not signed by the key that it names, or other keys than expected.
        MalformedError: it is no presence as this version knows them.
    """
    claimed = unverified(envelope, Presence)
    payload, _ = verify_document(envelope, (public_key(claimed.signing),), PRESENCE_TYPE)
    presence = decode_document(payload, Presence)
    found = fingerprint_of(presence.signing, presence.sealing)
    if fingerprint is not None and found != fingerprint:
        raise SignatureError(f"{presence.name} has the key {found[:23]}…, expected {fingerprint[:23]}…")
    return presence


# --- what is sealed


def action_context(operation: str) -> str:
    """What an action is sealed for: it opens in no other operation."""
    return f"waystation action/{operation}"


def seal_action(action: OpenAction, sealing_public: str, operation: str) -> SealedAction:
    """`action` for the one agent that holds the other half of `sealing_public`, and for `operation` alone.

    Its JSON is deflated first (RFC 1950), so that an order is no longer for being sealed. Raises `UsageError`: no such key.
    """
    plain = zlib.compress(_encode(action))
    return SealedAction(action_name(action), seal(plain, sealing_public, action_context(operation)))


def open_order(order: Order, key: X25519PrivateKey | None) -> Order:
    """`order` with its action in clear; as it is where nothing of it is sealed.

    Raises:
        SignatureError: it is sealed to other keys, or for another operation.
        MalformedError: what was sealed is no action as this version knows them.
    """
    if not isinstance(order.action, SealedAction):
        return order
    if key is None:
        raise SignatureError("it is sealed, and there is no key here that opens it")
    inflate = zlib.decompressobj()
    try:
        plain = inflate.decompress(open_sealed(order.action.box, key, action_context(order.operation)), _ACTION_MAX)
    except zlib.error as error:
        raise MalformedError(f"what is sealed in it cannot be inflated: {error}") from error
    if not inflate.eof:
        raise MalformedError("what is sealed in it breaks off, or is too large")
    action: OpenAction = decode_document(plain, OpenAction)  # type: ignore[arg-type]
    if action_name(action) != order.action.kind:
        raise MalformedError(f"what is sealed in it is no {order.action.kind!r}, but a {action_name(action)!r}")
    return msgspec.structs.replace(order, action=action)


def secret_context(operation: str, name: str) -> str:
    """What a secret is sealed for: it opens under no other name and in no other operation."""
    return f"waystation secret/{operation}/{name}"


def seal(value: bytes, sealing_public: str, context: str) -> bytes:
    """`value` so that only the holder of the private half of `sealing_public` (X25519, 64 hex digits) can read it, and
    only with the same `context`.

    Raises:
        UsageError: that is no such key.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

    try:
        key = X25519PublicKey.from_public_bytes(bytes.fromhex(sealing_public))
        return _suite().encrypt(value, key, info=context.encode())
    except ValueError as error:
        raise UsageError(f"{sealing_public[:80]!r} is no X25519 key to seal to") from error


def open_sealed(sealed: bytes, key: X25519PrivateKey, context: str) -> bytes:
    """What was sealed.

    Raises:
        SignatureError: it was altered, sealed to another key, or for another context.
    """
    from cryptography.exceptions import InvalidTag

    try:
        return _suite().decrypt(sealed, key, info=context.encode())
    except (InvalidTag, ValueError) as error:
        raise SignatureError("it is not sealed to this agent, for this operation and name") from error


def _suite() -> Suite:
    from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

    return Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


# --- JSON


def _encode(document: msgspec.Struct) -> bytes:
    """In canonical form."""
    return msgspec.json.encode(document, order="sorted")
