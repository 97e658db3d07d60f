"""Public keys, and which of them an agent pins: the contents of `trust.json`.

A key id is what TUF and securesystemslib compute for an Ed25519 key, so the same key has the same name in every tool:
https://theupdateframework.github.io/specification/latest/#role-keyid (SHA-256 of the key's canonical JSON).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from relay.errors import SignatureError, UsageError

if TYPE_CHECKING:
    from securesystemslib.signer import Signer, SSlibKey

PINS_MAX = 1 << 20
"""Bytes. A `trust.json` that is larger is refused before it is parsed."""

_KEYS_MAX = 256

# `\Z`, not `$`: the latter also matches before a last line feed.
_Hex = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
PERSON_NAME = r"\A[a-z][a-z0-9._-]{0,62}\Z"
"""Names of people. Lower-case, as they are names of files too."""

_PersonName = Annotated[str, msgspec.Meta(pattern=PERSON_NAME)]
_EnvironmentName = Annotated[str, msgspec.Meta(min_length=1, max_length=100)]


class PublicKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An Ed25519 key that may verify.

    Attributes:
        keyid: 64 lower-case hex digits, computed from `public` (see `keyid_of`).
        public: the 32 raw bytes of the key as lower-case hex.
    """

    keyid: _Hex
    public: _Hex

    @property
    def fingerprint(self) -> str:
        """`sha256:` and the key id: what people compare."""
        return f"sha256:{self.keyid}"


class OrderKey(PublicKey, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A key that may sign orders, in the named environments, or in all of them where none is named.

    `name`: the person whose key it is; empty: nobody's in particular. No two keys have the same.
    """

    environments: Annotated[tuple[_EnvironmentName, ...], msgspec.Meta(min_length=1)] | None = None
    name: _PersonName = ""


class TrustPins(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Contents of `trust.json`: who may say which bytes are packages, and who may say what runs.

    The two lists never share a key: what is stolen from an operator must not make packages.
    """

    format: Literal[1]
    package: Annotated[tuple[PublicKey, ...], msgspec.Meta(min_length=1, max_length=_KEYS_MAX)]
    order: Annotated[tuple[OrderKey, ...], msgspec.Meta(max_length=_KEYS_MAX)]

    def order_keys(self, environment: str) -> tuple[OrderKey, ...]:
        """The order keys whose scope covers `environment` (compared exactly)."""
        return tuple(key for key in self.order if key.environments is None or environment in key.environments)


def keyid_of(public: str) -> str:
    """The TUF key id of an Ed25519 key given as 64 hex digits."""
    # Written out: a canonical JSON of fixed keys needs no encoder, and the library that has one is slow to import.
    canonical = f'{{"keytype":"ed25519","keyval":{{"public":"{public}"}},"scheme":"ed25519"}}'
    return hashlib.sha256(canonical.encode()).hexdigest()


def public_key(public: str) -> PublicKey:
    """Name the key given as 64 lower-case hex digits."""
    return PublicKey(keyid=keyid_of(public), public=public)


def public_key_of(signer: Signer) -> PublicKey:
    """The public half of a signer.

    Raises:
        UsageError: not an Ed25519 key under its own TUF key id.
    """
    found = signer.public_key
    if found.keytype != "ed25519" or found.scheme != "ed25519":
        raise UsageError(f"cannot sign with a {found.keytype} key", hint="Waystation signs with Ed25519 keys")
    key = public_key(str(found.keyval["public"]))
    if key.keyid != found.keyid:
        raise UsageError(f"the signer calls its key {found.keyid!r}, but its key id is {key.keyid}")
    return key


def verifier(key: PublicKey) -> SSlibKey:
    """The key as securesystemslib takes it."""
    from securesystemslib.signer import SSlibKey

    return SSlibKey(key.keyid, "ed25519", "ed25519", {"public": key.public})


def parse_pins(data: bytes) -> TrustPins:
    """Read the contents of a `trust.json`.

    Raises:
        UsageError: larger than `PINS_MAX`, not the JSON that it must be, or a format that this version does not know.
        SignatureError: a key under another key's id, a key named twice, or one that has both roles.
    """
    if len(data) > PINS_MAX:
        raise UsageError(f"trust.json has {len(data)} bytes, at most {PINS_MAX} are read")
    try:
        pins = msgspec.json.decode(data, type=TrustPins)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"trust.json is not valid: {error}", hint="'waystation trust init' makes it") from error
    _check_names(pins)
    seen: set[str] = set()
    for key in (*pins.package, *pins.order):
        if key.keyid != keyid_of(key.public):
            raise SignatureError(f"trust.json names a key {key.keyid[:16]}… that has another id by its bytes")
        if key.keyid in seen:
            raise SignatureError(f"trust.json names the key {key.keyid[:16]}… twice; each key has one role")
        seen.add(key.keyid)
    return pins


def _check_names(pins: TrustPins) -> None:
    names = [key.name for key in pins.order if key.name]
    for name in names:
        if names.count(name) > 1:
            raise SignatureError(f"trust.json gives the name {name!r} to two keys; each person has one")


def encode_pins(pins: TrustPins) -> bytes:
    """`pins` as an indented JSON for people, ending with a line feed."""
    return msgspec.json.format(msgspec.json.encode(pins), indent=2) + b"\n"
