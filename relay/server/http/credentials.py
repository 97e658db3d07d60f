"""What a relay shows and asks for that comes to an end: its certificate, and the tokens of its callers."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from relay.config import Tls
from relay.errors import UsageError
from relay.protocol.followed import Followed
from relay.protocol.messages import Ending
from relay.server.http.tokens import TokenRecord


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
    try:
        context.load_cert_chain(tls.certificate, tls.key)
        with open(tls.certificate, "rb") as file:
            chain = load_pem_x509_certificates(file.read(1 << 20))
    except (OSError, ssl.SSLError, ValueError) as error:
        raise UsageError(f"tls: certificate or key cannot be used: {error}") from error
    return Certificate(context, min(one.not_valid_after_utc for one in chain))


def endings(records: Iterable[TokenRecord], certificate: Certificate | None) -> tuple[Ending, ...]:
    """All that ends, whenever that is."""
    tokens = [Ending("token", each.id, each.name, each.expires.timestamp()) for each in records]
    return (*tokens, *(() if certificate is None else (Ending("certificate", ends=certificate.ends.timestamp()),)))
