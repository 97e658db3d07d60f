"""The layout of a bucket: which key holds what. Pure.

<prefix>/format                  "waystation-store 1", as on disk
<prefix>/chunks/ab/<sha256>      one chunk each, in the stored form; keys spread by the first byte of the hash
<prefix>/blobs/ab/<sha256>       whole files as they are
<prefix>/manifests/… packages/…  documents, under their own names
<prefix>/quarantine/<sha256>     damage that was put aside, the latest
<prefix>/lock-serve, lock-sweep  who holds them, and since when
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress

from relay.errors import IdentityError
from relay.package.identity import ChunkId, parse_digest
from relay.stores.contract import document_name


class Keys:
    """The keys below one prefix."""

    def __init__(self, prefix: str) -> None:
        self._prefix = f"{prefix}/" if prefix else ""

    @property
    def all(self) -> str:
        """What all of them begin with."""
        return self._prefix

    @property
    def format(self) -> str:
        return f"{self._prefix}format"

    def lock(self, name: str) -> str:
        return f"{self._prefix}lock-{name}"

    def chunk(self, id: str) -> str:
        """Raises `IdentityError` before a key is built."""
        return self._hashed("chunks", id)

    def blob(self, sha256: str) -> str:
        """Raises as `chunk`."""
        return self._hashed("blobs", sha256)

    def quarantine(self, digest: str) -> str:
        """Raises as `chunk`."""
        return f"{self._prefix}quarantine/{parse_digest(digest)}"

    def document(self, name: str) -> str:
        """Raises `ValueError`: no document can have this name."""
        return self._prefix + document_name(name)

    @property
    def chunks(self) -> str:
        return f"{self._prefix}chunks/"

    def chunks_in(self, keys: Iterable[str]) -> Iterator[ChunkId]:
        """The chunks that some of these keys hold; others are passed over."""
        for key in keys:
            fan, _, name = key.removeprefix(self.chunks).partition("/")
            with suppress(IdentityError):
                if parse_digest(name) == name and name.startswith(fan):
                    yield ChunkId(name)

    def documents_in(self, keys: Iterable[str]) -> Iterator[str]:
        """The documents that some of these keys hold; others are passed over."""
        for key in keys:
            with suppress(ValueError):
                yield document_name(key.removeprefix(self._prefix))

    def _hashed(self, kind: str, digest: str) -> str:
        name = parse_digest(digest)
        return f"{self._prefix}{kind}/{name[:2]}/{name}"
