"""An envelope crosses the line as what the manifest does not say already."""

from __future__ import annotations

import contextlib

import pytest
from harness.origins import trust_keys
from harness.packages import cut_package
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import SignatureError
from relay.protocol.packed_envelope import pack_envelope, unpack_envelope
from relay.support.zstd import zstd
from relay.trust.envelopes import ENVELOPE_MAX, PackageStatement, check_manifest_signature, sign_package

MANIFEST = cut_package({"lib/web.dll": b"web" * 1000}).manifest
OTHER = cut_package({"lib/web.dll": b"other" * 1000}).manifest


def test_a_real_envelope_takes_little_more_than_its_signature_and_is_the_same_again(tmp_path) -> None:
    keys = trust_keys(tmp_path / "trust")
    statement = PackageStatement("Acme.Web", "1.0.0", MANIFEST.id, MANIFEST.nupkg.sha256)
    envelope = sign_package(statement, keys.signer)
    packed = pack_envelope(envelope, MANIFEST)
    assert len(packed) <= 176 <= len(envelope) / 4
    again = unpack_envelope(packed, MANIFEST)
    assert again == envelope
    check_manifest_signature(
        again,
        keys.pins,
        id_key="acme.web",
        version="1.0.0",
        manifest_id=MANIFEST.id,
        nupkg_sha256=MANIFEST.nupkg.sha256,
    )


@given(st.binary(min_size=1, max_size=2000))
def test_any_other_envelope_is_the_same_again_too(envelope: bytes) -> None:
    assert unpack_envelope(pack_envelope(envelope, MANIFEST), MANIFEST) == envelope


@given(st.binary(max_size=200))
def test_what_was_not_packed_is_refused_or_bounded(data: bytes) -> None:
    with contextlib.suppress(SignatureError):
        assert len(unpack_envelope(data, MANIFEST)) <= ENVELOPE_MAX


def test_an_envelope_that_swells_is_refused() -> None:
    with pytest.raises(SignatureError, match="more than"):
        unpack_envelope(zstd.compress(bytes(ENVELOPE_MAX + 1), 3), MANIFEST)


@pytest.mark.parametrize("change", [lambda packed: packed[:-1], lambda packed: packed + b"x", lambda _: b""])
def test_one_that_is_cut_off_or_followed_by_more_is_refused(change) -> None:
    packed = pack_envelope(b"envelope " * 50, MANIFEST)
    with pytest.raises(SignatureError):
        unpack_envelope(change(packed), MANIFEST)


def test_one_that_was_packed_beside_another_manifest_is_not_the_same(tmp_path) -> None:
    keys = trust_keys(tmp_path / "trust")
    envelope = sign_package(PackageStatement("Acme.Web", "1.0.0", MANIFEST.id, MANIFEST.nupkg.sha256), keys.signer)
    try:
        found = unpack_envelope(pack_envelope(envelope, MANIFEST), OTHER)
    except SignatureError:
        return
    assert found != envelope
