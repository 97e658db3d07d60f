"""Presences as agents sign them, without an agent."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from securesystemslib.signer import CryptoSigner

from agent.orders.envelopes import sign_presence
from agent.orders.keys import fingerprint_of
from agent.orders.orders import Presence
from relay.trust.keys import public_key_of


@dataclass(frozen=True)
class Keys:
    """Of one agent."""

    signer: CryptoSigner = field(default_factory=CryptoSigner.generate_ed25519)
    opener: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)

    @property
    def signing(self) -> str:
        return public_key_of(self.signer).public

    @property
    def sealing(self) -> str:
        return self.opener.public_key().public_bytes_raw().hex()

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.signing, self.sealing)

    def presence(self, name: str = "web1", **said: Any) -> bytes:
        """Of an agent with this name and these keys."""
        facts = {"version": "1", "system": "linux", "site": "fra", "time": time.time()} | said
        presence = Presence(format=1, name=name, signing=self.signing, sealing=self.sealing, **facts)
        return sign_presence(presence, self.signer)


KEYS = Keys()
"""For presences of which the keys do not matter."""
