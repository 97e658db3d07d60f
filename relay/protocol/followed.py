"""A value that follows its files, for processes that live for months: read again whenever one of them has changed.

Tokens, authorities, certificates and pinned keys are replaced while their readers run. Whoever uses one asks this for
the value of now, at each use: that costs a stat of each file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from relay.audit.acts import NotReadAgain, ReadAgain
from relay.audit.event import tell
from relay.errors import WaystationError

T = TypeVar("T")

Current = Callable[[], T]
"""Gives the value of now."""

_SETTLED_SECONDS = 2.0
"""A change so young may be followed by another one under the same time stamp (FAT and some network shares: 2 s)."""

_Stamp = tuple[tuple[int, int, int, int] | None, ...]


class Followed(Generic[T]):
    """Call it for the value of now.

    A file that cannot be used for a while (gone, half written, damaged) changes nothing: the last good value stays in
    force, and the log tells why, once for each reason.
    """

    def __init__(self, what: str, files: Sequence[str], read: Callable[[], T]) -> None:
        """Read it for the first time.

        Args:
            what: it is, for the log.
            files: that it is made of; they need not be there.
            read: makes it. Raises `WaystationError` where the files cannot be used, here as well.
        """
        self._what = what
        self._files = tuple(files)
        self._read = read
        self._stamp = self._stamp_of_now()
        self._settled = _is_settled(self._stamp)
        self._value = read()
        self._trouble = ""

    def __call__(self) -> T:
        stamp = self._stamp_of_now()
        if stamp != self._stamp or not self._settled:
            self._take(stamp)
        return self._value

    def again(self) -> T:
        """The value of now, read from the files whatever their stamps say."""
        self._take(self._stamp_of_now())
        return self._value

    @property
    def trouble(self) -> str:
        """Why the files cannot be used now; empty where they can."""
        return self._trouble

    def _take(self, stamp: _Stamp) -> None:
        # The stamp is older than what is read: a change in between is seen by the next look.
        try:
            value = self._read()
        except WaystationError as error:
            if error.message != self._trouble:
                tell(NotReadAgain(self._what, error.message))
            self._trouble = error.message
            return
        if stamp != self._stamp or self._trouble:
            tell(ReadAgain(self._what))
        self._value, self._stamp, self._settled, self._trouble = value, stamp, _is_settled(stamp), ""

    def _stamp_of_now(self) -> _Stamp:
        return tuple(_stamp_of(file) for file in self._files)


def _stamp_of(file: str) -> tuple[int, int, int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    # ctime, too: no program can set it back.
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


def _is_settled(stamp: _Stamp) -> bool:
    youngest = max((each[1] for each in stamp if each), default=0)
    return not 0 <= time.time_ns() - youngest < _SETTLED_SECONDS * 1e9
