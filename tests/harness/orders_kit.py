"""What tests of orders share: an agent's keys, an order key, and orders between them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from securesystemslib.signer import CryptoSigner

from agent.orders.envelopes import seal, secret_context, sign_order
from agent.orders.keys import AgentIdentity, load_sealing_key, make_agent_keys
from agent.orders.orders import Action, FenceSeen, Order, PackageTree, Survey
from harness.origins import Keys, trust_keys
from orchestrator.trust.keyring import load_signer
from relay.trust.keys import OrderKey, TrustPins, encode_pins

DEPLOYMENT = "01JD0000000000000000000000"
OTHER = "01JD0000000000000000000001"
JOURNAL = "0" * 32
SURVEY = Survey(())


@dataclass
class Desk:
    """Where orders are written: the order key, and the agent that they are for."""

    keys: Keys
    order_signer: CryptoSigner
    home: str
    identity: AgentIdentity
    name: str = "web1"
    environment: str = "test"
    fence: int = 1
    journal: str = JOURNAL
    relays: tuple[str, ...] = ()
    clock: float = field(default_factory=time.time)

    @property
    def pins(self) -> TrustPins:
        return self.keys.pins

    def order(
        self, action: Action = SURVEY, name: str = "survey", *, step: int = 0, attempt: int = 1, **changes
    ) -> Order:
        order = Order(
            format=1,
            operation=f"{DEPLOYMENT}/{step}/{self.name}/{name}/{attempt}",
            deployment=DEPLOYMENT,
            environment=self.environment,
            fence=self.fence,
            journal=self.journal,
            agent=self.name,
            key=self.identity.fingerprint,
            not_before=time.time(),
            not_after=time.time() + 3600,
            relays=self.relays,
            action=action,
        )
        return msgspec.structs.replace(order, **changes)

    def sign(self, order: Order) -> bytes:
        return sign_order(order, self.order_signer)

    def seal(self, operation: str, secrets: Mapping[str, str]) -> dict[str, bytes]:
        return {
            name: seal(value.encode(), self.identity.sealing_public, secret_context(operation, name))
            for name, value in secrets.items()
        }

    def sealing_key(self):
        return load_sealing_key(self.home)


def desk_in(folder: Path, name: str = "web1", keys: Keys | None = None) -> Desk:
    """Keys of an origin and of one agent in `folder`; agent.yaml and trust.json are there too."""
    keys = keys or trust_keys(folder / "trust")
    home = folder / "agent"
    identity = make_agent_keys(str(home))
    (home / "agent.yaml").write_text(f"name: {name}\n")
    (home / "trust.json").write_bytes(encode_pins(keys.pins))
    return Desk(keys, load_signer(keys.folder, "order"), str(home), identity, name)


def scoped(pins: TrustPins, *environments: str) -> TrustPins:
    """The same pins, with all order keys bound to these environments."""
    keys = tuple(OrderKey(keyid=key.keyid, public=key.public, environments=environments) for key in pins.order)
    return msgspec.structs.replace(pins, order=keys)


def new_signer() -> CryptoSigner:
    return CryptoSigner.generate_ed25519()


def fence_seen(fence: int, journal: str = JOURNAL, deployment: str = OTHER, *, open: bool = True) -> FenceSeen:
    return FenceSeen(fence, journal, deployment, open)


def tree(manifest: str, root: str = "", id: str = "Acme.Web", version: str = "1.0.0", label: str = "v1") -> PackageTree:
    return PackageTree(id, version, manifest, root, label)
