"""What a relay shows and asks for that comes to an end: its certificate, and the tokens of its callers."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Final

from relay.config import Tls, TokenRecord
from relay.errors import UsageError
from relay.protocol.followed import Followed
from relay.protocol.messages import Ending

_WORDS: Final = {"KEY_VALUES_MISMATCH": "the key is not the certificate's", "NO_START_LINE": "one of them is no PEM"}
"""What OpenSSL means."""


@dataclass(frozen=True)
class Certificate:
    """What the relay shows to new connections, and when the first certificate of its chain ends."""

    context: ssl.SSLContext
    ends: datetime


def certificate_of(tls: Tls) -> Followed[Certificate]:
    """Of these files, followed: each new connection is shown what they hold now.

    Raises:
        UsageError: they cannot be used, or the key is not the certificate's.
    """
    return Followed(f"the certificate {tls.certificate!r}", (tls.certificate, tls.key), partial(_load, tls))


def _load(tls: Tls) -> Certificate:
    from cryptography.x509 import load_pem_x509_certificates

    # A context of its own: one that serves would be half changed by a key that does not fit.
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    certificate, _ = _read("certificate", tls.certificate), _read("key", tls.key)
    try:
        chain = load_pem_x509_certificates(certificate)
        context.load_cert_chain(tls.certificate, tls.key, password=_ask_nobody)
    except (OSError, ssl.SSLError, ValueError) as error:
        words = _WORDS.get(getattr(error, "reason", "") or "", str(error))
        raise UsageError(f"tls: {tls.certificate} and the key {tls.key} cannot be used: {words}") from error
    return Certificate(context, min(one.not_valid_after_utc for one in chain))


def _read(what: str, path: str) -> bytes:
    """Raises `UsageError`, which names the file: OpenSSL's own errors do not."""
    try:
        with open(path, "rb") as file:
            return file.read(1 << 20)
    except OSError as error:
        raise UsageError(f"tls: the {what} {path} cannot be read: {error.strerror}") from error


def _ask_nobody() -> str:
    """In place of OpenSSL's question at a terminal: a relay has none."""
    raise ValueError("the key is locked by a password, which a relay cannot ask for")


def endings(records: Iterable[TokenRecord], certificate: Certificate | None) -> tuple[Ending, ...]:
    """All that ends, whenever that is."""
    tokens = [Ending("token", each.id, each.name, each.expires.timestamp()) for each in records]
    return (*tokens, *(() if certificate is None else (Ending("certificate", ends=certificate.ends.timestamp()),)))
