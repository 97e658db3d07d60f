"""From a location string to a stack of stores: the one place that knows every kind.

    disk:/var/lib/waystation   a folder, by its absolute path
    /var/lib/waystation        the same; a relative path is taken from the working directory
    s3://bucket/prefix?…       a bucket; its options are in `relay.stores.s3.settings`
    memory:                    gone when the process ends

Readers may be several with `|` between them: the first that has a chunk gives it.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

from relay.errors import UsageError
from relay.stores.contract import Blobs, ChunkReader, ChunkSweeper, Documents, LockName
from relay.stores.disk import DiskBlobs, DiskDocuments, DiskStore
from relay.stores.layers import Failover
from relay.stores.memory import MemoryBlobs, MemoryChunks, MemoryDocuments, MemoryLocks
from relay.stores.room import Room
from relay.stores.s3.settings import S3Settings, parse_settings
from relay.stores.volume import open_disk

_SCHEME: Final = re.compile(r"([a-z][a-z0-9+.-]*):(.*)", re.ASCII | re.DOTALL)
_EXPECTED: Final = "expected disk:/absolute/path, a path, s3://bucket/prefix, or memory:"


@dataclass(frozen=True, slots=True)
class Location:
    """A parsed location: its kind, the absolute path of a local folder where it has one, and the bucket of an `s3:` one."""

    kind: str
    path: str = ""
    bucket: S3Settings | None = None

    def __str__(self) -> str:
        return f"{self.kind}:{self.path}" if self.bucket is None else str(self.bucket)


@dataclass(frozen=True, slots=True)
class Store:
    """All that one location holds."""

    chunks: ChunkSweeper
    documents: Documents
    blobs: Blobs
    location: str
    exclusive: Callable[[LockName], AbstractContextManager[None]]
    """Hold this lock while the context lasts. Entering raises `LockedError`, which names the holder."""
    closed_to_writes: Callable[[], str] = lambda: ""
    """Why nothing can be written any more (after fsync failed, say); empty while all is well."""
    room: Callable[[], Room] | None = None
    """What is free where it lies; None where that has no bounds of its own. Raises `OSError`."""

    def own_folder(self, below: str) -> str | None:
        """A folder of the local file system for what is this process's alone; None where the location names none."""
        location = parse_location(self.location)
        return os.path.join(location.path, below) if location.path else None

    async def close(self) -> None:
        """Give back handles, threads and locks. Twice is once."""
        await self.chunks.close()


def parse_location(text: str) -> Location:
    """The location that `text` names.

    Raises:
        UsageError: it names none that this version knows.
    """
    if not text or "\0" in text:
        raise UsageError("a store location is empty or holds a NUL", hint=_EXPECTED)
    parsed = _SCHEME.fullmatch(text)
    if parsed is None:
        return Location("disk", os.path.abspath(os.path.expanduser(text)))
    match parsed.groups():
        case "disk", rest if rest.startswith("/"):
            return Location("disk", os.path.abspath(rest))
        case "memory", "":
            return Location("memory")
        case "s3", _:
            settings = parse_settings(text)
            return Location("s3", settings.state, settings)
        case _:
            raise UsageError(f"{text!r} is no store location", hint=_EXPECTED)


async def open_store(location: str, *, free_floor: int | None = None, read_only: bool = False) -> Store:
    """Open what `location` names, for reading, writing and sweeping; a folder that is not there yet is made.

    Args:
        location: See the head of this module.
        free_floor: Bytes of the file system that a disk store keeps free; by default the larger of 1 % and 1 GiB.
        read_only: Nothing is made, locked or moved, and the folder may appear later (a share that gets mounted).

    Raises:
        UsageError: no such kind, or the folder holds something else.
        StoreError: the medium failed.
    """
    parsed = parse_location(location)
    if parsed.kind == "memory":
        return Store(MemoryChunks(), MemoryDocuments(), MemoryBlobs(), str(parsed), MemoryLocks().exclusive)
    if parsed.bucket is not None:
        return await _open_bucket(parsed.bucket, read_only=read_only)
    volume = await open_disk(parsed.path, free_floor=free_floor, read_only=read_only)
    return Store(
        DiskStore(volume),
        DiskDocuments(volume),
        DiskBlobs(volume),
        str(parsed),
        volume.exclusive,
        volume.closed_to_writes,
        volume.room,
    )


async def _open_bucket(settings: S3Settings, *, read_only: bool) -> Store:
    try:
        # Imported here: boto3 takes its time, and who has no bucket need not have it.
        from relay.stores.s3.open_bucket import open_bucket
    except ImportError as error:
        raise UsageError("a store in a bucket needs boto3", hint="pip install 'waystation[s3]'") from error
    opened = await asyncio.to_thread(open_bucket, settings, read_only=read_only)
    return Store(opened.chunks, opened.documents, opened.blobs, str(settings), opened.exclusive, opened.closed)


async def open_reader(locations: str) -> ChunkReader:
    """The chunks of one location, or of several with `|` between them, for reading only: nothing is made or locked.

    Raises:
        UsageError: as `open_store`, and for an empty member.
        StoreError: the medium failed. A folder that is not there now fails each read until it is.
    """
    parsed = [parse_location(text) for text in locations.split("|")]
    readers = [(await open_store(str(location), read_only=True)).chunks for location in parsed]
    return readers[0] if len(readers) == 1 else Failover(readers)
