"""Orders as they left: the same order after a crash is the same bytes.

Signing and sealing anew would make other bytes under the same name, which relays and agents must refuse.
Secrets in them are sealed to their agent and cannot be opened here. They stand in the journal; those of a deployment that
an older version began, in files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from agent.orders.operation_id import OperationId
from relay.errors import StoreError

if TYPE_CHECKING:
    from orchestrator.journal.events import Dispatched
    from orchestrator.journal.recorder import Recorder


class OrderBook:
    """The orders of one deployment, by operation."""

    def __init__(self, recorder: Recorder, folder: str) -> None:
        """Those that `recorder` keeps, and those in `folder` that an older version kept. Raises `StoreError`."""
        self._recorder = recorder
        self._folder = folder
        self._known = recorder.ordered()
        """Operations: what relays name without end must not be looked for in a file."""
        self._in_files = os.path.isdir(folder)
        self._leaving: dict[str, bytes] = {}

    def has(self, operation: OperationId) -> bool:
        """Whether one left, or was about to. Raises `StoreError`."""
        name = str(operation)
        return (
            name in self._leaving or name in self._known or (self._in_files and os.path.exists(self._path(operation)))
        )

    def find(self, operation: OperationId) -> bytes | None:
        """The envelope that left, or was about to. Raises `StoreError`."""
        if (envelope := self._leaving.get(str(operation))) is not None:
            return envelope
        if str(operation) in self._known:
            return self._recorder.order(operation)
        if not self._in_files:
            return None
        try:
            with open(self._path(operation), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"the order of {operation} cannot be read: {error.strerror}") from error

    async def dispatch(self, operation: OperationId, envelope: bytes, event: Dispatched) -> None:
        """Keep it, and that it is about to leave: durable on return. Raises `StoreError`."""
        with self._keeping(operation, envelope):
            await self._recorder.dispatch(event, envelope)

    async def keep(self, operation: OperationId, envelope: bytes) -> None:
        """Keep it: durable on return. Raises `StoreError`."""
        with self._keeping(operation, envelope):
            await self._recorder.keep_order(operation, envelope)

    @contextmanager
    def _keeping(self, operation: OperationId, envelope: bytes) -> Iterator[None]:
        """From here on it is this one, also where its caller is cancelled while it is written."""
        name = str(operation)
        self._leaving[name] = envelope
        yield
        self._known.add(name)
        del self._leaving[name]

    def _path(self, operation: OperationId) -> str:
        return os.path.join(self._folder, f"{operation.file_name}.json")
