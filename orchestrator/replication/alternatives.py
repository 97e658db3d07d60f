"""What sending a package in other ways would have cost. Told beside what it did cost; estimates are said to be such."""

from __future__ import annotations

import asyncio
import math
import tempfile
from dataclasses import dataclass
from typing import BinaryIO, Final, cast

from orchestrator.depot.cut_nupkg import compressed_digest
from orchestrator.depot.depot import Depot
from relay.errors import WaystationError
from relay.package.manifest import Manifest
from relay.package.zip_reader import walk

_SIGNATURE_BYTES: Final = 12
"""rsync's sums of one block: 4 bytes that roll, and some 8 of the strong one at this size (rsync 3.2, `sum_sizes_sqroot`)."""
_BLOCK_MIN: Final = 700


@dataclass(frozen=True, slots=True)
class Alternatives:
    """Bytes for one site.

    Attributes:
        whole_file: the nupkg.
        per_machine: the nupkg once for each machine, where machines are known.
        machines: how many.
        rsync_like: an estimate of what comparing the zips' own bytes would send; None where the depot has not both files.
    """

    whole_file: int
    per_machine: int | None
    machines: int
    rsync_like: int | None


async def alternatives(depot: Depot, manifest: Manifest, base: Manifest | None, machines: int = 0) -> Alternatives:
    """For `manifest`, where the site holds `base`."""
    size = manifest.nupkg.size
    return Alternatives(size, size * machines if machines else None, machines, await _rsync_like(depot, manifest, base))


async def _rsync_like(depot: Depot, manifest: Manifest, base: Manifest | None) -> int | None:
    """Compressed bytes of parts whose compressed bytes are not in the old file, and the sums of the old file's blocks."""
    if base is None:
        return manifest.nupkg.size
    with tempfile.TemporaryFile() as old, tempfile.TemporaryFile() as new:
        try:
            await _spool(depot, base, cast("BinaryIO", old))
            await _spool(depot, manifest, cast("BinaryIO", new))
            return await asyncio.to_thread(_compare, cast("BinaryIO", old), cast("BinaryIO", new), base.nupkg.size)
        except WaystationError:
            return None


async def _spool(depot: Depot, manifest: Manifest, file: BinaryIO) -> None:
    async for piece in depot.store.blobs.read(manifest.nupkg.sha256):
        file.write(piece)


def _compare(old: BinaryIO, new: BinaryIO, old_size: int) -> int:
    held = {compressed_digest(old, entry) for entry in walk(old)}
    literal = sum(entry.compressed_size for entry in walk(new) if compressed_digest(new, entry) not in held)
    block = max(_BLOCK_MIN, math.isqrt(old_size))
    return literal + math.ceil(old_size / block) * _SIGNATURE_BYTES
