"""Output of operations as it comes through the relays: pieces by offset, out of order, twice, from several roads.

A log file grows only at its end, so it is always a true beginning of the output: who follows it never reads a hole, and
after a crash its length says what is still wanted. What came too early waits in memory. Relays are not believed: the
agent's signed final report says how long the whole is, and its hash.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from relay.errors import StoreError

LOG_MAX = 32 << 20
"""Bytes. An agent caps output far below it; more is a relay's invention."""
READ_BYTES = 1 << 20

LogState = Literal["whole", "missing", "differs"]


class LogFile:
    """The log of one operation."""

    def __init__(self, path: str) -> None:
        """Go on where `path` ends; no file is made before there is something to write. Raises `StoreError`."""
        self.path = path
        self._hash = hashlib.sha256()
        self.size = 0
        self._early: dict[int, bytes] = {}
        self._early_bytes = 0
        if os.path.exists(path):
            with self._told(), open(path, "rb") as file:
                while piece := file.read(READ_BYTES):
                    self._hash.update(piece)
                    self.size += len(piece)

    def take(self, offset: int, data: bytes) -> None:
        """A piece of output from byte `offset` on; what is there already is passed over. Raises `StoreError`."""
        if offset + len(data) > LOG_MAX:
            return
        if offset > self.size:
            self._keep_early(offset, data)
            return
        run = bytearray(data[self.size - offset :])
        end = self.size + len(run)
        for start in sorted(self._early):
            if start > end:
                break
            early = self._early.pop(start)
            self._early_bytes -= len(early)
            run += early[end - start :]
            end = self.size + len(run)
        if run:
            self._append(bytes(run))

    def compare(self, size: int, sha256: str) -> LogState:
        """Whether this is the output of which the agent says that it has `size` bytes and this hash."""
        if self.size < size:
            return "missing"
        return "whole" if self.size == size and (not size or self._hash.hexdigest() == sha256) else "differs"

    def make_durable(self) -> None:
        """Raises `StoreError`."""
        if self.size:
            with self._told(), open(self.path, "ab") as file:
                os.fsync(file.fileno())

    def _keep_early(self, offset: int, data: bytes) -> None:
        known = self._early.get(offset, b"")
        more = len(data) - len(known)
        if more > 0 and self._early_bytes + more <= LOG_MAX:
            self._early[offset] = data
            self._early_bytes += more

    def _append(self, data: bytes) -> None:
        # Not in append mode: what a full disk took of an earlier piece is written over.
        with self._told(), open(self.path, "wb", opener=_private) as file:
            file.seek(self.size)
            file.write(data)
        self._hash.update(data)
        self.size += len(data)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"the log {self.path} cannot be used: {error.strerror}") from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_TRUNC, 0o600)
