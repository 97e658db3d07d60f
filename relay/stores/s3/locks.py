"""What one process at a time may do with a bucket: an object that says who, renewed while it is held.

Whoever holds it writes it again every few seconds; one that was not renewed for a while is anybody's. Ages are told by the
server's own clock, so no machine's clock counts. Where the holder is a process of this machine that is gone, nobody waits.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Final

import msgspec

from relay.errors import LockedError, StoreError
from relay.stores.contract import LockName
from relay.stores.s3.bucket import Bucket, Found, TakenError
from relay.stores.s3.keys import Keys

RENEW_SECONDS: Final = 10.0
LOST_SECONDS: Final = 45.0
"""A lock that was not renewed for so long is free."""
_LOCK_MAX: Final = 4096


class Holder(msgspec.Struct, frozen=True):
    """Who holds a lock. `boot` is this start of its machine; `mark` is drawn anew for each time it is taken."""

    host: str
    boot: str
    pid: int
    since: str
    mark: str


class S3Locks:
    """The locks of a bucket. Where one that is held cannot be kept, the bucket is closed to writes."""

    def __init__(self, bucket: Bucket, keys: Keys, *, has_conditions: bool, seconds: float = RENEW_SECONDS) -> None:
        self._bucket, self._keys = bucket, keys
        self._has_conditions = has_conditions
        self.seconds = seconds

    @contextmanager
    def exclusive(self, name: LockName) -> Iterator[None]:
        """Hold the lock `name` until the context ends. Blocking.

        Raises:
            LockedError: on entering, if it is held; names the holder.
            StoreError: on entering, the bucket failed.
        """
        key = self._keys.lock(name)
        me = Holder(
            socket.gethostname(), _boot(), os.getpid(), f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", secrets.token_hex(8)
        )
        renewing = _Renewing(self, key, me, self._take(key, me, name))
        renewing.start()
        try:
            yield
        finally:
            renewing.end()

    def _take(self, key: str, me: Holder, name: str) -> str:
        """The ETag of our own. Raises as `exclusive`."""
        found = self._bucket.get(key, _LOCK_MAX)
        if found is not None and not _is_free(found, me):
            raise LockedError(f"{self._bucket.settings} is locked for {name} by {_named(found)}")
        try:
            return self.write(key, me, found.etag if found else "")
        except TakenError:
            now = self._bucket.get(key, _LOCK_MAX)
            if now is not None and _holder(now) == me:  # a first try was written, and its answer lost
                return now.etag
            raise LockedError(
                f"{self._bucket.settings} is locked for {name} by {_named(now) if now else 'another'}"
            ) from None

    def write(self, key: str, me: Holder, etag: str) -> str:
        """Raises as `Bucket.put`."""
        data = msgspec.json.encode(me)
        if not self._has_conditions:
            return self._bucket.put(key, data)
        return self._bucket.put(key, data, only_new=not etag, replaces=etag)

    def renew(self, key: str, me: Holder, etag: str) -> str:
        """Raises as `write`; `TakenError` also where another has it."""
        try:
            if not self._has_conditions and not self._is_ours(key, me):
                raise TakenError(key)
            return self.write(key, me, etag)
        except TakenError:
            found = self._bucket.get(key, _LOCK_MAX)
            if found is None or _holder(found) != me:
                raise
            return found.etag

    def give_back(self, key: str, me: Holder) -> None:
        """Where it is still ours."""
        if self._is_ours(key, me):
            self._bucket.delete(key)

    def _is_ours(self, key: str, me: Holder) -> bool:
        found = self._bucket.get(key, _LOCK_MAX)
        return found is not None and _holder(found) == me

    def say_lost(self, why: str) -> None:
        self._bucket.closed_to_writes = f"its lock was lost: {why}"


class _Renewing(threading.Thread):
    """Writes a lock again and again, until it is told to end."""

    def __init__(self, locks: S3Locks, key: str, me: Holder, etag: str) -> None:
        super().__init__(name="s3-lock", daemon=True)
        self._locks, self._key, self._me, self._etag = locks, key, me, etag
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(self._locks.seconds):
            try:
                self._etag = self._locks.renew(self._key, self._me, self._etag)
            except TakenError:
                self._locks.say_lost("another process has it")
                return
            except StoreError:
                # The bucket is away; nobody else can take it meanwhile either.
                continue

    def end(self) -> None:
        self._over.set()
        self.join()
        with suppress(StoreError):
            self._locks.give_back(self._key, self._me)


def _is_free(found: Found, me: Holder) -> bool:
    holder = _holder(found)
    if holder is None or found.age > LOST_SECONDS:
        return True
    is_here = (holder.host, holder.boot) == (me.host, me.boot)
    return is_here and holder.pid != me.pid and not _lives(holder.pid)


def _holder(found: Found) -> Holder | None:
    try:
        return msgspec.json.decode(found.data, type=Holder)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _named(found: Found) -> str:
    holder = _holder(found)
    return "another" if holder is None else f"pid {holder.pid} on {holder.host} since {holder.since}"


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _boot() -> str:
    """This start of this machine, where the system tells (Linux); in a container it is that of the machine around it."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
