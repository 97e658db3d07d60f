"""What a receiver of notifications does with one, by docs/release.md."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from typing import Literal

import msgspec

from orchestrator.deployment.notify import SIGNATURE_HEADER, SIGNATURE_TYPE
from relay.errors import SignatureError
from relay.trust.envelopes import verify_document
from relay.trust.keys import PublicKey


class Signed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: Literal[1]
    sha256: str


def verify_notification(body: bytes, header: str, keys: Sequence[PublicKey]) -> None:
    """Raises `SignatureError` where none of `keys` signed `body`, by the value of `Waystation-Signature`."""
    try:
        envelope = base64.b64decode(header, validate=True)
    except ValueError as error:
        raise SignatureError(f"{SIGNATURE_HEADER} is no base64: {error}") from error
    payload, _ = verify_document(envelope, keys, SIGNATURE_TYPE)
    try:
        signed = msgspec.json.decode(payload, type=Signed)
    except ValueError as error:
        raise SignatureError(f"{SIGNATURE_HEADER} signs something else: {error}") from error
    if signed.sha256 != hashlib.sha256(body).hexdigest():
        raise SignatureError("the notification is not the one that was signed")
