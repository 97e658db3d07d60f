"""Key making for `waystation trust init`: the package key, the order key, and `trust.json`, which agents pin."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from orchestrator.acts import KeysMade
from orchestrator.paths import operator
from relay.audit.event import tell
from relay.errors import NotFoundError, RefusedError
from relay.support.private_files import make_private_folder, read_signer, write_new_file, write_private_key
from relay.trust.keys import OrderKey, PublicKey, TrustPins, encode_pins, keyid_of, parse_pins

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from securesystemslib.signer import CryptoSigner

KeyRole = Literal["package", "order"]

PINS_FILE = "trust.json"
_FILES = ("package.key", "order.key", PINS_FILE)


def init_trust(folder: str) -> TrustPins:
    """Make both keys and `trust.json` in `folder`; nothing that exists is ever overwritten.

    `trust.json` is written last: where it stands, both keys stand.

    Raises:
        RefusedError: one of the files exists already, or `folder` is open to others.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    make_private_folder(folder)
    _refuse_existing(folder)
    package, order = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    package_public, order_public = _public_hex(package), _public_hex(order)
    pins = TrustPins(
        format=1,
        package=(PublicKey(keyid=keyid_of(package_public), public=package_public),),
        order=(OrderKey(keyid=keyid_of(order_public), public=order_public),),
    )
    write_private_key(os.path.join(folder, "package.key"), package)
    write_private_key(os.path.join(folder, "order.key"), order)
    write_new_file(os.path.join(folder, PINS_FILE), encode_pins(pins), mode=0o644)
    tell(KeysMade(operator(), folder, pins.package[0].keyid, pins.order[0].keyid))
    return pins


def load_signer(folder: str, role: KeyRole) -> CryptoSigner:
    """The private key of `role` in `folder`.

    Raises:
        NotFoundError: no such key.
        RefusedError: the key file is open to others.
        UsageError: the file holds no Ed25519 key.
    """
    path = os.path.join(folder, f"{role}.key")
    try:
        return read_signer(path)
    except NotFoundError as error:
        raise NotFoundError(f"there is no {role} key {path}", hint="'waystation trust init' makes it") from error


def load_pins(folder: str) -> TrustPins:
    """The keys whose signatures count, out of `trust.json` in `folder`. Raises `NotFoundError`, `SignatureError`."""
    path = os.path.join(folder, PINS_FILE)
    try:
        with open(path, "rb") as file:
            return parse_pins(file.read(1 << 20))
    except OSError as error:
        hint = "'waystation trust init' makes it; --trust names the folder where it stands"
        raise NotFoundError(f"{path}: {error.strerror}", hint=hint) from error


def _refuse_existing(folder: str) -> None:
    found = [name for name in _FILES if os.path.lexists(os.path.join(folder, name))]
    if not found:
        return
    if PINS_FILE in found:
        raise RefusedError(f"{folder} holds {', '.join(found)} already; keys are never overwritten")
    raise RefusedError(
        f"{folder} holds {', '.join(found)} but no {PINS_FILE}: an earlier 'trust init' was interrupted",
        hint="no agent can have pinned these keys yet; move them away and run it again",
    )


def _public_hex(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()
