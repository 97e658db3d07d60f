"""An agent's two keys, made on its own machine: one signs its reports, one opens what is sealed to it.

They are two because a key that both signs and decrypts ties two protocols' safety together.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from relay.errors import NotFoundError, RefusedError
from relay.support.private_files import (
    make_private_folder,
    read_sealing_key,
    read_signer,
    read_signing_key,
    write_private_key,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from securesystemslib.signer import CryptoSigner

SIGNING_FILE = "signing.key"
SEALING_FILE = "sealing.key"


def fingerprint_of(signing: str, sealing: str) -> str:
    """`sha256:` + hex over both public keys (hex) of an agent as canonical JSON: what the environment file names."""
    both = {"sealing": sealing, "signing": signing}
    return f"sha256:{hashlib.sha256(msgspec.json.encode(both, order='sorted')).hexdigest()}"


@dataclass(frozen=True, slots=True)
class AgentIdentity:
    """The public side of an agent.

    Attributes:
        signing_public: Ed25519, 64 hex digits: verifies its reports.
        sealing_public: X25519, 64 hex digits: seals secrets to it.
    """

    signing_public: str
    sealing_public: str

    @property
    def fingerprint(self) -> str:
        """`sha256:` + hex over both keys as canonical JSON: what the environment file names."""
        return fingerprint_of(self.signing_public, self.sealing_public)


def make_agent_keys(folder: str) -> AgentIdentity:
    """Make both keys in `folder` (0700, files 0600); nothing that exists is ever overwritten.

    Raises:
        RefusedError: a key exists already, or `folder` is open to others.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    make_private_folder(folder)
    _refuse_existing(folder)
    write_private_key(os.path.join(folder, SIGNING_FILE), Ed25519PrivateKey.generate())
    write_private_key(os.path.join(folder, SEALING_FILE), X25519PrivateKey.generate())
    return load_agent_identity(folder)


def load_agent_identity(folder: str) -> AgentIdentity:
    """Who the agent with the keys in `folder` is.

    Raises:
        NotFoundError: a key is missing.
        RefusedError: a key file is open to others.
        UsageError: a file holds another kind of key.
    """
    return AgentIdentity(
        signing_public=read_signing_key(_existing(folder, SIGNING_FILE)).public_key().public_bytes_raw().hex(),
        sealing_public=read_sealing_key(_existing(folder, SEALING_FILE)).public_key().public_bytes_raw().hex(),
    )


def load_report_signer(folder: str) -> CryptoSigner:
    """The key that signs this agent's reports. Raises as `load_agent_identity` does."""
    return read_signer(_existing(folder, SIGNING_FILE))


def load_sealing_key(folder: str) -> X25519PrivateKey:
    """The key that opens what is sealed to this agent. Raises as `load_agent_identity` does."""
    return read_sealing_key(_existing(folder, SEALING_FILE))


def _existing(folder: str, name: str) -> str:
    path = os.path.join(folder, name)
    if not os.path.lexists(path):
        raise NotFoundError(f"this agent has no key {path}", hint="'waystation agent init' makes its keys")
    return path


def _refuse_existing(folder: str) -> None:
    found = [name for name in (SIGNING_FILE, SEALING_FILE) if os.path.lexists(os.path.join(folder, name))]
    if len(found) == 1:
        raise RefusedError(
            f"{folder} holds {found[0]} only: an earlier 'agent init' was interrupted",
            hint="the fingerprint was never shown; move the file away and run it again",
        )
    if found:
        raise RefusedError(f"{folder} holds this agent's keys already; they are never overwritten")
