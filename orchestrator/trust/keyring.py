"""Key making for `waystation trust …`: the package key, order keys, people's among them, and `trust.json`, which agents pin."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Literal

import msgspec

from agent.platform import lock_file
from orchestrator.acts import KeysMade, PersonNamed
from orchestrator.paths import operator
from relay.audit.event import tell
from relay.errors import LockedError, NotFoundError, RefusedError, UsageError
from relay.support.durable import write_durably
from relay.support.private_files import make_private_folder, read_signer, write_new_file, write_private_key
from relay.trust.keys import PERSON_NAME, OrderKey, PublicKey, TrustPins, encode_pins, keyid_of, parse_pins

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from securesystemslib.signer import CryptoSigner

KeyRole = Literal["package", "order"]

PINS_FILE = "trust.json"
PEOPLE_FOLDER = "people"
"""In the trust folder: private keys of people."""
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


def person_key(folder: str, name: str, keys: str = "") -> str:
    """Path of a person's private key: in the folder `keys`, or in `people` of the trust folder."""
    return os.path.join(keys or os.path.join(folder, PEOPLE_FOLDER), f"{name}.key")


def make_person(folder: str, name: str, keys: str = "", environments: tuple[str, ...] = ()) -> tuple[OrderKey, str]:
    """Make a person's order key, and name it in `trust.json`, which is replaced as a whole. The key; where it lies.

    Args:
        folder: of trust.json.
        name: of the person.
        keys: where the private key is put; empty: beside the others.
        environments: where this person may order and decide; none named: everywhere.

    Raises:
        UsageError: no name that a person can have.
        RefusedError: trust.json knows somebody of this name, the key's file exists already, a folder is open to others,
            or a file cannot be written.
        LockedError: another process changes trust.json now.
        NotFoundError: there is no trust.json.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if not re.match(PERSON_NAME, name):
        raise UsageError(
            f"{name[:80]!r} is no name of a person",
            hint="Expected small letters, digits, '.', '_' and '-', a letter first, at most 63",
        )
    path, file = person_key(folder, name, keys), os.path.join(folder, PINS_FILE)
    with _pins_held(folder):
        pins = load_pins(folder)
        if name in {key.name for key in pins.order}:
            raise RefusedError(f"{file} has a key of {name} already; each person has one")
        _refuse_key(path, name)
        make_private_folder(os.path.dirname(path))
        private = Ed25519PrivateKey.generate()
        public = _public_hex(private)
        key = OrderKey(keyid=keyid_of(public), public=public, environments=environments or None, name=name)
        write_private_key(path, private)
        data = encode_pins(msgspec.structs.replace(pins, order=(*pins.order, key)))
        try:
            parse_pins(data)
            write_durably(file, data)
        except OSError as error:
            raise RefusedError(f"cannot write {file}: {error.strerror}", hint=f"Remove {path} first") from error
    tell(PersonNamed(operator(), folder, name, key.keyid, list(environments)))
    return key, path


def load_person_signer(folder: str, name: str, keys: str = "") -> CryptoSigner:
    """The key by which a person signs; without a name the plain order key. Raises as `load_signer`."""
    if not name:
        return load_signer(folder, "order")
    if not re.match(PERSON_NAME, name):
        raise UsageError(f"{name[:80]!r} is no name of a person")
    path = person_key(folder, name, keys)
    try:
        return read_signer(path)
    except NotFoundError as error:
        hint = f"'waystation trust person {name}' makes it; --keys names the folder where it is"
        raise NotFoundError(f"there is no key of {name}: {path}", hint=hint) from error


def people_in(folder: str, environment: str) -> frozenset[str]:
    """Names of those who may decide in an environment; of nobody where there is no trust.json. Raises `SignatureError`."""
    try:
        pins = load_pins(folder)
    except NotFoundError:
        return frozenset()
    return frozenset(key.name for key in pins.order_keys(environment) if key.name)


@contextmanager
def _pins_held(folder: str) -> Iterator[None]:
    """No other process changes trust.json meanwhile."""
    path = os.path.join(folder, f".{PINS_FILE}.lock")
    try:
        descriptor = lock_file(path)
    except OSError as error:
        raise NotFoundError(f"cannot change {PINS_FILE} in {folder}: {error.strerror}") from error
    if descriptor is None:
        raise LockedError(f"another process changes {PINS_FILE} in {folder} now", hint="Try again")
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(path)
        os.close(descriptor)


def _refuse_key(path: str, name: str) -> None:
    if os.path.lexists(path):
        raise RefusedError(
            f"{path} exists already, and {PINS_FILE} knows no {name}; keys are never overwritten",
            hint=f"where an earlier 'trust person {name}' was interrupted, move it away and run it again",
        )


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
