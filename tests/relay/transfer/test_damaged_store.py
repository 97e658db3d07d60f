"""A relay whose disk damaged a chunk is made whole by replicating again."""

from __future__ import annotations

import os
from pathlib import Path

from harness.origins import depot_with
from harness.packages import make_nupkg, noise
from harness.relays import running_relay

from relay.encoding.bundle import NotSent
from relay.transfer.replicate import replicate


async def test_a_chunk_that_a_relay_put_aside_as_damaged_is_sent_again(tmp_path: Path) -> None:
    nupkg = make_nupkg(tmp_path, {"lib/a.dll": noise(1, 200_000), "lib/b.dll": noise(2, 200_000)})
    async with depot_with(tmp_path, nupkg) as origin, running_relay(tmp_path / "relay") as relay:
        manifest = origin.added[0].manifest
        signature = await origin.signature(manifest)
        chunks = origin.depot.store.chunks
        async with relay.client() as client:
            await replicate(manifest, signature, chunks, client)
            stored = tmp_path / "relay/chunks" / manifest.chunk_id(0)[:2] / manifest.chunk_id(0)
            data = bytearray(stored.read_bytes())
            data[-1] ^= 1
            os.chmod(stored, 0o644)
            stored.write_bytes(data)

            events = [event async for event in client.stream(manifest, [0])]
            assert any(isinstance(event, NotSent) for event in events), "the damage was not seen"

            again = await replicate(manifest, signature, chunks, client)
            assert again.chunks_sent == 1
            once_more = await replicate(manifest, signature, chunks, client)
            assert once_more.chunks_sent == 0
