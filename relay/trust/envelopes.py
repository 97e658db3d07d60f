"""Signed documents: DSSE envelopes, and the statement that says which bytes are a package.

Envelope: https://github.com/secure-systems-lab/dsse (v1). Statement: in-toto Statement v1,
https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md, so that cosign and SLSA tools can read it.

Everything here takes bytes and gives values or raises; files and sockets are the caller's. Whoever sent an envelope
learns nothing from us but `SignatureError`, whatever it holds.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeVar

import msgspec

from relay.errors import IdentityError, SignatureError, UsageError
from relay.package.identity import ManifestId, NuGetVersion, PackageId, parse_digest
from relay.trust.keys import PublicKey, TrustPins, public_key_of, verifier

if TYPE_CHECKING:
    from securesystemslib.signer import Signer

ENVELOPE_MAX = 64 << 10
"""Bytes. No envelope of ours is larger, and none is parsed that is."""

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
STATEMENT_PAYLOAD = "application/vnd.in-toto+json"
PACKAGE_PREDICATE: Final = "https://waystation.dev/package/v1"

T = TypeVar("T")

_SIGNATURES_MAX = 16
_SIGNATURE_BYTES = 64  # Ed25519, RFC 8032


class _Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keyid: Annotated[str, msgspec.Meta(max_length=256)]
    sig: Annotated[str, msgspec.Meta(max_length=256)]


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    payload: str
    payload_type: str = msgspec.field(name="payloadType")
    signatures: Annotated[tuple[_Signature, ...], msgspec.Meta(min_length=1, max_length=_SIGNATURES_MAX)]


class _Digest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sha256: str


class _Subject(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    digest: _Digest


class _Predicate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str
    version: str
    manifest: _Digest


class _Statement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["https://in-toto.io/Statement/v1"] = msgspec.field(name="_type")
    subject: Annotated[tuple[_Subject, ...], msgspec.Meta(min_length=1, max_length=1)]
    predicate_type: Literal["https://waystation.dev/package/v1"] = msgspec.field(name="predicateType")
    predicate: _Predicate


@dataclass(frozen=True, slots=True)
class PackageStatement:
    """What a package key says: this id and version are these bytes.

    Attributes:
        id: as the nuspec writes it.
        version: normalized (three or four numbers, no metadata), case kept.
        manifest: SHA-256 of the manifest's canonical bytes, hex.
        nupkg_sha256: SHA-256 of the nupkg, hex.

    Raises:
        IdentityError: one of them does not follow its grammar.
    """

    id: str
    version: str
    manifest: ManifestId
    nupkg_sha256: str

    def __post_init__(self) -> None:
        PackageId.parse(self.id)
        if NuGetVersion.parse(self.version).normalized != self.version:
            raise IdentityError("normalized version", self.version, "three numbers or four, without metadata")
        for digest in (self.manifest, self.nupkg_sha256):
            if parse_digest(digest) != digest:
                raise IdentityError("SHA-256 digest", digest, "64 lower-case hex digits and nothing before them")

    @property
    def name(self) -> str:
        """For people: id and version."""
        return f"{self.id} {self.version}"


class MalformedError(SignatureError):
    """Signed by the right key, but not a document that this version understands."""


# --- any document


class _Unopened(msgspec.Struct, frozen=True):
    payload: bytes


class _PlainSignature(msgspec.Struct, frozen=True):
    keyid: str
    sig: bytes


class _PlainEnvelope(msgspec.Struct, frozen=True):
    payload: bytes
    payload_type: str = msgspec.field(name="payloadType")
    signatures: Annotated[tuple[_PlainSignature, ...], msgspec.Meta(min_length=1, max_length=1)]


def unverified(envelope: bytes, type: type[T]) -> T:
    """What an envelope says, with nothing checked: for what names its own key, or was checked before it was kept.

    Raises:
        MalformedError: it is no such document.
    """
    if len(envelope) > ENVELOPE_MAX:
        raise MalformedError(f"an envelope of {len(envelope)} bytes is refused, at most {ENVELOPE_MAX} are read")
    return decode_document(decode_document(envelope, _Unopened).payload, type)


def decode_document(payload: bytes, type: type[T]) -> T:
    """JSON as a `type`. Raises `MalformedError`."""
    try:
        return msgspec.json.decode(payload, type=type)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise MalformedError(f"not an understood document: {error}") from error


def sign_document(payload: bytes, payload_type: str, signer: Signer) -> bytes:
    """A DSSE envelope around `payload` with one signature, as canonical JSON.

    Raises:
        UsageError: not an Ed25519 signer, or the envelope would be larger than `ENVELOPE_MAX`.
    """
    from securesystemslib.dsse import Envelope

    public_key_of(signer)
    envelope = Envelope(payload, payload_type, {})
    envelope.sign(signer)
    data = msgspec.json.encode(envelope.to_dict(), order="sorted")
    if len(data) > ENVELOPE_MAX:
        raise UsageError(f"a signed document of {len(data)} bytes is too large, at most {ENVELOPE_MAX} are read")
    return data


def check_form(envelope: bytes) -> str:
    """The key id of the one signature of an envelope in the one form that it can have: canonical JSON.

    Otherwise whoever carries it could give it other bytes that say the same, and so another digest.

    Raises:
        MalformedError: it has another form, or several signatures.
    """
    parsed = decode_document(envelope, _PlainEnvelope)
    if msgspec.json.encode(parsed, order="sorted") != envelope:
        raise MalformedError("the envelope is not in the one form that it can have")
    return parsed.signatures[0].keyid


def verify_document(envelope: bytes, keys: Sequence[PublicKey], payload_type: str) -> tuple[bytes, str]:
    """The payload, and the id of the key among `keys` that signed it.

    Signatures by other keys are passed over, so that a document may carry those of several signers.

    Raises:
        SignatureError: too large, malformed, of another payload type, two signatures under one key id, or none that
            one of `keys` made over exactly this payload and type.
    """
    parsed = _parse_envelope(envelope)
    if parsed.payload_type != payload_type:
        raise SignatureError(f"the signed document is a {parsed.payload_type[:80]!r}, not a {payload_type!r}")
    payload = _decode_base64(parsed.payload)
    signatures = {each.keyid: _decode_base64(each.sig) for each in parsed.signatures}
    if len(signatures) != len(parsed.signatures):
        raise SignatureError("the envelope carries two signatures under the same key id")
    for key in keys:
        signature = signatures.get(key.keyid)
        if signature is not None and _is_signed(payload, payload_type, signature, key):
            return payload, key.keyid
    raise SignatureError(
        "the document is not signed by a trusted key",
        hint=f"it names {', '.join(sorted(repr(keyid[:16]) for keyid in signatures))}",
    )


def _parse_envelope(data: bytes) -> _Envelope:
    if len(data) > ENVELOPE_MAX:
        raise SignatureError(f"an envelope of {len(data)} bytes is refused, at most {ENVELOPE_MAX} are read")
    try:
        return msgspec.json.decode(data, type=_Envelope)
    except (ValueError, RecursionError) as error:
        raise SignatureError(f"not a DSSE envelope: {error}") from error


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise SignatureError(f"the envelope's base64 is broken: {error}") from error


def _is_signed(payload: bytes, payload_type: str, signature: bytes, key: PublicKey) -> bool:
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
    from securesystemslib.signer import Signature

    if len(signature) != _SIGNATURE_BYTES:
        return False
    envelope = Envelope(payload, payload_type, {key.keyid: Signature(key.keyid, signature.hex())})
    try:
        envelope.verify([verifier(key)], threshold=1)
    except (UnverifiedSignatureError, VerificationError, ValueError):
        # Also a pinned key that is no point of the curve: it verifies nothing.
        return False
    return True


# --- packages


def sign_package(statement: PackageStatement, signer: Signer) -> bytes:
    """The envelope of `statement`: what stands as `signature` beside a published package.

    Raises:
        UsageError: not an Ed25519 signer.
    """
    return sign_document(package_payload(statement), STATEMENT_PAYLOAD, signer)


def package_payload(statement: PackageStatement) -> bytes:
    """What is signed: the canonical JSON of the in-toto statement."""
    document = _Statement(
        type=STATEMENT_TYPE,
        subject=(_Subject(_file_name(statement), _Digest(statement.nupkg_sha256)),),
        predicate_type=PACKAGE_PREDICATE,
        predicate=_Predicate(statement.id, statement.version, _Digest(statement.manifest)),
    )
    return msgspec.json.encode(document, order="sorted")


def verify_package(envelope: bytes, pins: TrustPins) -> PackageStatement:
    """What a pinned package key said. Order keys do not count.

    Raises:
        SignatureError: not signed by a pinned package key, or not a statement about exactly one package.
    """
    payload, _ = verify_document(envelope, pins.package, STATEMENT_PAYLOAD)
    try:
        document = msgspec.json.decode(payload, type=_Statement)
        said = document.predicate
        statement = PackageStatement(
            id=said.id,
            version=said.version,
            manifest=ManifestId(said.manifest.sha256),
            nupkg_sha256=document.subject[0].digest.sha256,
        )
    except (ValueError, RecursionError, IdentityError) as error:
        raise SignatureError(f"the signed document is no package statement: {error}") from error
    if document.subject[0].name != _file_name(statement):
        raise SignatureError(f"the signed statement is about {document.subject[0].name[:200]!r} and {statement.name}")
    return statement


def check_manifest_signature(
    envelope: bytes,
    pins: TrustPins,
    *,
    id_key: str,
    version: str,
    manifest_id: ManifestId,
    nupkg_sha256: str,
) -> PackageStatement:
    """Check that a pinned package key signed exactly what was asked for.

    Args:
        envelope: as stored beside the package.
        pins: whom to believe.
        id_key: the package id asked for, lower-case.
        version: the version asked for, normalized and lower-case.
        manifest_id: the SHA-256 of the manifest at hand.
        nupkg_sha256: the nupkg's SHA-256 as the manifest says it.

    Raises:
        SignatureError: not signed by a package key, or signed for another name, version, manifest or nupkg.
    """
    said = verify_package(envelope, pins)
    asked = f"{id_key} {version}"
    if said.name.lower() != asked.lower():
        raise SignatureError(f"the signature is for {said.name}, but {asked} was asked for")
    if said.manifest != manifest_id:
        raise SignatureError(f"{said.name} is signed with manifest {said.manifest[:16]}…, not {manifest_id[:16]}…")
    if said.nupkg_sha256 != nupkg_sha256:
        raise SignatureError(f"{said.name} is signed with nupkg {said.nupkg_sha256[:16]}…, not {nupkg_sha256[:16]}…")
    return said


def _file_name(statement: PackageStatement) -> str:
    return f"{statement.id}.{statement.version}.nupkg"
