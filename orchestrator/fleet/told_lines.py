"""A file of lines that were told already, one JSON document a line: a follower that was killed goes on where it ends."""

from __future__ import annotations

import json
import os
from collections import Counter
from contextlib import suppress
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self

from relay.errors import StoreError, UsageError

if TYPE_CHECKING:
    from orchestrator.fleet.log_reader import LogLine


class ToldLines:
    """Use it as a context manager. `counts` says how many lines of each operation are in the file."""

    def __init__(self, path: str) -> None:
        """Read the file, which is made where it is not there; half a line at its end, as a kill leaves it, is removed.

        Raises:
            UsageError: the file holds something else.
            StoreError: it cannot be read or written.
        """
        self._path = path
        self.counts: Counter[str] = Counter()
        try:
            self._file: IO[bytes] = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")  # noqa: SIM115 - __exit__
            try:
                self._take_in()
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise StoreError(f"{path} cannot be used: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, line: LogLine) -> None:
        """One more line, with its end in one write. Raises `StoreError`."""
        try:
            self._file.write(line.as_json().encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise StoreError(f"{self._path} cannot be written: {error.strerror}") from error

    def _take_in(self) -> None:
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            operation = None
            with suppress(ValueError, TypeError, KeyError):
                operation = json.loads(line)["operation"]
            if not isinstance(operation, str):
                raise UsageError(f"{self._path} holds what no 'release log --to' wrote", hint="name another file")
            self.counts[operation] += 1
            end += len(line)
        self._file.seek(end)
        self._file.truncate()
