"""An envelope on its way to somebody who has the manifest: what the manifest says already is left out.

A package's envelope is some 700 bytes, of which all but the key's id and the signature follow from the manifest. So it
travels as one zstd frame with the envelope that is to be expected, unsigned, as prefix: some 120 bytes. Any other
envelope travels that way too, only not as short. Nothing is believed that was not believed before: what comes out is the
very envelope that was put in, and is verified as such by those who have a key.
"""

from __future__ import annotations

import base64
from typing import Final

import msgspec

from relay.errors import SignatureError
from relay.package.manifest import Manifest
from relay.support.zstd import FrameFault, inflate, prefix, zstd
from relay.trust.envelopes import ENVELOPE_MAX, STATEMENT_PAYLOAD, PackageStatement, package_payload

_WINDOW_LOG: Final = 18
"""Envelope and prefix together stay below 2^18 bytes."""


def pack_envelope(envelope: bytes, manifest: Manifest) -> bytes:
    """`envelope`, which stands beside `manifest`, for the wire."""
    options: dict[int, int] = {
        zstd.CompressionParameter.compression_level: 19,
        zstd.CompressionParameter.window_log: _WINDOW_LOG,
        zstd.CompressionParameter.content_size_flag: 0,
    }
    return zstd.compress(envelope, options=options, zstd_dict=prefix(_expected(manifest)))


def unpack_envelope(packed: bytes, manifest: Manifest) -> bytes:
    """The same bytes again, at most `ENVELOPE_MAX`. They are not verified by that.

    Raises:
        SignatureError: not one whole zstd frame within the bounds.
    """
    try:
        return inflate(packed, ENVELOPE_MAX, window_log=_WINDOW_LOG, base=_expected(manifest))
    except FrameFault as fault:
        raise SignatureError(f"an envelope {fault}") from fault


def _expected(manifest: Manifest) -> bytes:
    """The envelope that this manifest would have, but for key and signature."""
    statement = PackageStatement(
        id=str(manifest.package.id),
        version=manifest.package.version.normalized,
        manifest=manifest.id,
        nupkg_sha256=manifest.nupkg.sha256,
    )
    body = {
        "payload": base64.b64encode(package_payload(statement)).decode(),
        "payloadType": STATEMENT_PAYLOAD,
        "signatures": [{"keyid": "", "sig": ""}],
    }
    return msgspec.json.encode(body)
