"""Orders as they left, kept as files: the same order after a crash is the same bytes.

Signing and sealing anew would make other bytes under the same name, which relays and agents must refuse.
Secrets in them are sealed to their agent and cannot be opened here.
"""

from __future__ import annotations

import asyncio
import os

from agent.orders.operation_id import OperationId
from relay.errors import StoreError
from relay.support.durable import write_durably
from relay.support.private_files import make_private_folder


class OrderBook:
    """The orders of one deployment, by operation."""

    def __init__(self, folder: str) -> None:
        """Keep them in `folder`, which is made (0700) where it is missing. Raises `RefusedError`: it is not private."""
        make_private_folder(folder)
        self._folder = folder

    def find(self, operation: OperationId) -> bytes | None:
        """The envelope that left, or was about to. Raises `StoreError`."""
        try:
            with open(self._path(operation), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"the order of {operation} cannot be read: {error.strerror}") from error

    async def keep(self, operation: OperationId, envelope: bytes) -> None:
        """Durable on return. Raises `StoreError`."""
        try:
            await asyncio.to_thread(write_durably, self._path(operation), envelope, mode=0o600)
        except OSError as error:
            raise StoreError(f"the order of {operation} cannot be written: {error.strerror}") from error

    def _path(self, operation: OperationId) -> str:
        return os.path.join(self._folder, f"{operation.file_name}.json")
