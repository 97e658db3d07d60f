from __future__ import annotations

import base64
import dataclasses
import json
import subprocess
import sys

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner, SSlibKey

from relay.errors import IdentityError, SignatureError, UsageError
from relay.package.identity import manifest_id
from relay.trust.envelopes import (
    ENVELOPE_MAX,
    PACKAGE_PREDICATE,
    STATEMENT_PAYLOAD,
    PackageStatement,
    check_manifest_signature,
    sign_document,
    sign_package,
    verify_document,
    verify_package,
)
from relay.trust.keys import (
    PINS_MAX,
    OrderKey,
    TrustPins,
    encode_pins,
    keyid_of,
    parse_pins,
    public_key,
    public_key_of,
)

PACKAGE = CryptoSigner.generate_ed25519()
ORDER = CryptoSigner.generate_ed25519()
STRANGER = CryptoSigner.generate_ed25519()
PINS = TrustPins(
    format=1,
    package=(public_key_of(PACKAGE),),
    order=(OrderKey(keyid=public_key_of(ORDER).keyid, public=public_key_of(ORDER).public),),
)
MANIFEST = manifest_id(b"{}")
NUPKG = "ab" * 32
STATEMENT = PackageStatement(id="Shop.Web", version="1.0.1-RC.1", manifest=MANIFEST, nupkg_sha256=NUPKG)
SIGNED = sign_package(STATEMENT, PACKAGE)


def resigned(change, *, signer=PACKAGE, payload_type=STATEMENT_PAYLOAD) -> bytes:
    """The statement after `change`, honestly signed: only the statement's own checks can refuse it."""
    document = json.loads(base64.b64decode(json.loads(SIGNED)["payload"]))
    change(document)
    return sign_document(json.dumps(document).encode(), payload_type, signer)


def tampered(change) -> bytes:
    """The envelope after `change`, with the signature left as it was."""
    envelope = json.loads(SIGNED)
    change(envelope)
    return json.dumps(envelope).encode()


def flip(text: str) -> str:
    raw = bytearray(base64.b64decode(text))
    raw[len(raw) // 2] ^= 1
    return base64.b64encode(raw).decode()


# --- what is signed is what is read


def test_a_signed_package_is_verified():
    assert verify_package(SIGNED, PINS) == STATEMENT


def test_the_statement_is_in_totos_so_that_other_tools_can_read_it():
    envelope = json.loads(SIGNED)
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    payload = base64.b64decode(envelope["payload"])
    assert json.loads(payload) == {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "Shop.Web.1.0.1-RC.1.nupkg", "digest": {"sha256": NUPKG}}],
        "predicateType": PACKAGE_PREDICATE,
        "predicate": {"id": "Shop.Web", "version": "1.0.1-RC.1", "manifest": {"sha256": MANIFEST}},
    }
    assert payload == json.dumps(json.loads(payload), sort_keys=True, separators=(",", ":")).encode()


def test_the_library_alone_verifies_our_envelope():
    Envelope.from_dict(json.loads(SIGNED)).verify([PACKAGE.public_key], threshold=1)


def test_our_key_ids_are_the_librarys():
    key = public_key_of(STRANGER)
    assert key.keyid == STRANGER.public_key.keyid == keyid_of(key.public)
    assert key.fingerprint == f"sha256:{key.keyid}"


def test_a_document_that_a_second_signer_signed_too_is_verified_by_either():
    envelope = Envelope.from_dict(json.loads(SIGNED))
    envelope.sign(STRANGER)
    both = msgspec.json.encode(envelope.to_dict())
    for signer in (PACKAGE, STRANGER):
        _, keyid = verify_document(both, [public_key_of(signer)], STATEMENT_PAYLOAD)
        assert keyid == signer.public_key.keyid


# --- who may sign


def test_an_order_key_does_not_make_packages():
    with pytest.raises(SignatureError, match="not signed by a trusted key"):
        verify_package(sign_package(STATEMENT, ORDER), PINS)


def test_a_foreign_key_is_refused():
    with pytest.raises(SignatureError, match="not signed by a trusted key"):
        verify_package(sign_package(STATEMENT, STRANGER), PINS)


def test_a_foreign_signature_under_a_pinned_key_id_is_refused():
    impostor = CryptoSigner(
        STRANGER._private_key,
        SSlibKey(PACKAGE.public_key.keyid, "ed25519", "ed25519", STRANGER.public_key.keyval),
    )
    envelope = Envelope(base64.b64decode(json.loads(SIGNED)["payload"]), STATEMENT_PAYLOAD, {})
    envelope.sign(impostor)
    with pytest.raises(SignatureError, match="not signed by a trusted key"):
        verify_package(msgspec.json.encode(envelope.to_dict()), PINS)


def test_a_document_is_verified_by_no_key_where_none_is_trusted():
    with pytest.raises(SignatureError, match="not signed"):
        verify_document(SIGNED, [], STATEMENT_PAYLOAD)


def test_a_signer_of_another_kind_is_refused():
    with pytest.raises(UsageError, match="Ed25519"):
        sign_package(STATEMENT, CryptoSigner.generate_ecdsa())


# --- altered envelopes


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.update(signatures=[]),
        lambda e: e.pop("signatures"),
        lambda e: e.update(payload=flip(e["payload"])),
        lambda e: e.update(payload=""),
        lambda e: e.update(payload=e["payload"] + "!"),
        lambda e: e.update(payloadType="application/vnd.waystation.order+json"),
        lambda e: e.update(payloadType="\ud800"),
        lambda e: e.update(extra=1),
        lambda e: e["signatures"][0].update(sig=flip(e["signatures"][0]["sig"])),
        lambda e: e["signatures"][0].update(sig=""),
        lambda e: e["signatures"][0].update(sig="é"),
        lambda e: e["signatures"][0].update(keyid=STRANGER.public_key.keyid),
        lambda e: e["signatures"][0].update(keyid=7),
        lambda e: e["signatures"].append(e["signatures"][0]),
        lambda e: e["signatures"].extend({"keyid": str(n), "sig": "AA=="} for n in range(16)),
    ],
)
def test_an_altered_envelope_is_refused(change):
    with pytest.raises(SignatureError):
        verify_package(tampered(change), PINS)


def test_two_signatures_under_one_key_id_are_refused_even_if_one_is_good():
    def add_bad(envelope):
        envelope["signatures"].append(dict(envelope["signatures"][0], sig=base64.b64encode(bytes(64)).decode()))

    with pytest.raises(SignatureError, match="two signatures under the same key id"):
        verify_package(tampered(add_bad), PINS)


def test_an_oversized_envelope_is_refused_before_it_is_parsed():
    padded = SIGNED + b" " * (ENVELOPE_MAX - len(SIGNED))
    assert verify_package(padded, PINS) == STATEMENT
    with pytest.raises(SignatureError, match="at most 65536"):
        verify_package(padded + b" ", PINS)


def test_an_oversized_document_is_not_signed():
    with pytest.raises(UsageError, match="too large"):
        sign_document(b"x" * ENVELOPE_MAX, "text/plain", PACKAGE)


@given(st.binary(max_size=2000) | st.text(max_size=500).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"")
@example(b"[" * ENVELOPE_MAX)
@example(b'{"payload":' * 5000)
@example(SIGNED[:-1])
@example(b"\xff\xfe" + SIGNED)
def test_arbitrary_bytes_are_refused_and_crash_nothing(data):
    with pytest.raises(SignatureError):
        verify_package(data, PINS)


@given(st.integers(0, len(SIGNED) - 1), st.integers(1, 255))
def test_one_changed_byte_never_changes_what_is_believed(position, mask):
    changed = bytearray(SIGNED)
    changed[position] ^= mask
    try:
        said = verify_package(bytes(changed), PINS)
    except SignatureError:
        return
    # A key id's case or the unused bits of base64 may change without changing what was signed.
    assert said == STATEMENT


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(_JSON | st.fixed_dictionaries({"_type": _JSON, "subject": _JSON, "predicateType": _JSON, "predicate": _JSON}))
def test_a_signed_document_of_any_other_shape_is_refused(document):
    with pytest.raises(SignatureError, match="no package statement"):
        verify_package(sign_document(json.dumps(document).encode(), STATEMENT_PAYLOAD, PACKAGE), PINS)


def test_a_deeply_nested_signed_payload_is_refused():
    payload = b'{"subject":' + b"[" * 40_000
    with pytest.raises(SignatureError, match="no package statement"):
        verify_package(sign_document(payload, STATEMENT_PAYLOAD, PACKAGE), PINS)


# --- signed, but not a statement about this package


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(_type="https://in-toto.io/Statement/v0.1"),
        lambda d: d.update(predicateType="https://slsa.dev/provenance/v1"),
        lambda d: d.update(subject=[]),
        lambda d: d["subject"].append(d["subject"][0]),
        lambda d: d["subject"][0].update(name="Shop.Web.1.0.2.nupkg"),
        lambda d: d["subject"][0]["digest"].update(sha512="00"),
        lambda d: d["subject"][0]["digest"].update(sha256="AB" * 32),
        lambda d: d["subject"][0]["digest"].update(sha256="sha256:" + "ab" * 32),
        lambda d: d["subject"][0]["digest"].update(sha256="ab" * 32 + "\n"),
        lambda d: d["predicate"].update(id="../x"),
        lambda d: d["predicate"].update(id="Shop.Web\n"),
        lambda d: d["predicate"].update(version="1.0/../.."),
        lambda d: d["predicate"].update(extra=True),
        lambda d: d.update(extra=True),
    ],
)
def test_a_signed_statement_that_is_not_exactly_ours_is_refused(change):
    with pytest.raises(SignatureError):
        verify_package(resigned(change), PINS)


def test_a_statement_signed_as_another_kind_of_document_is_refused():
    order_like = resigned(lambda _: None, payload_type="application/vnd.waystation.order+json")
    with pytest.raises(SignatureError, match="not a 'application/vnd"):
        verify_package(order_like, PINS)


@pytest.mark.parametrize(
    "values",
    [{"id": "a/b"}, {"id": "x" * 101}, {"id": ""}, {"version": "1"}, {"version": "1.0.0+meta"}, {"manifest": "00"}],
)
def test_a_statement_with_an_impossible_name_or_digest_cannot_be_made(values):
    with pytest.raises(IdentityError):
        dataclasses.replace(STATEMENT, **values)


ASKED = {"id_key": "shop.web", "version": "1.0.1-rc.1", "manifest_id": MANIFEST, "nupkg_sha256": NUPKG}


def test_the_signature_of_what_was_asked_for_is_accepted():
    assert check_manifest_signature(SIGNED, PINS, **ASKED) == STATEMENT


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"id_key": "shop.api"}, "shop.api 1.0.1-rc.1 was asked for"),
        ({"version": "1.0.0"}, "shop.web 1.0.0 was asked for"),
        ({"manifest_id": manifest_id(b"[]")}, "manifest"),
        ({"nupkg_sha256": "cd" * 32}, "nupkg"),
    ],
)
def test_a_good_signature_of_another_package_is_refused(other, told):
    with pytest.raises(SignatureError, match=told):
        check_manifest_signature(SIGNED, PINS, **(ASKED | other))


# --- trust.json


def pins_document(**changes) -> bytes:
    return json.dumps(json.loads(encode_pins(PINS)) | changes).encode()


def test_pins_survive_being_written_and_read():
    scoped = scoped_to(("production", "staging"))
    assert parse_pins(encode_pins(scoped)) == scoped


def scoped_to(environments):
    return msgspec.structs.replace(PINS, order=(msgspec.structs.replace(PINS.order[0], environments=environments),))


def test_an_order_key_counts_only_in_its_environments():
    scoped = scoped_to(("staging",))
    assert scoped.order_keys("staging") == scoped.order
    assert scoped.order_keys("production") == ()
    assert PINS.order_keys("production") == PINS.order


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        pins_document(format=2),
        pins_document(package=[]),
        pins_document(threshold=0),
        pins_document(package=[{"keyid": "00" * 32, "public": "zz" * 32}]),
        pins_document(package=[{"keyid": "00" * 32, "public": "00" * 32 + "\n"}]),
        pins_document(order=[{"keyid": "00" * 32, "public": "00" * 32, "environments": []}]),
        b" " * (PINS_MAX + 1),
    ],
)
def test_a_trust_file_of_another_shape_is_refused(data):
    with pytest.raises(UsageError, match=r"trust\.json"):
        parse_pins(data)


def test_a_key_under_another_keys_id_is_refused():
    wrong = {"keyid": public_key_of(PACKAGE).keyid, "public": public_key_of(STRANGER).public}
    with pytest.raises(SignatureError, match="another id"):
        parse_pins(pins_document(package=[wrong]))


def test_one_key_in_both_roles_is_refused():
    both = msgspec.to_builtins(PINS.package[0])
    with pytest.raises(SignatureError, match="one role"):
        parse_pins(pins_document(order=[both]))


def test_a_pinned_key_that_is_no_point_of_the_curve_verifies_nothing():
    broken = public_key("02" + "00" * 30 + "ff")
    envelope = tampered(lambda e: e["signatures"][0].update(keyid=broken.keyid))
    with pytest.raises(SignatureError, match="not signed by a trusted key"):
        verify_document(envelope, [broken], STATEMENT_PAYLOAD)


@pytest.mark.processes
def test_reading_the_module_loads_no_cryptography():
    probe = "import sys, relay.trust.envelopes; print(sorted(m for m in ('cryptography', 'securesystemslib') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
