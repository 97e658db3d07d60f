"""How much room a store has left: a word for it, before there is none. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

SpaceState = Literal["enough", "low", "full"]
LOW_SHARE: Final = 2
"""Below so many times the floor, the store is low on space."""


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes of the file system.

    Attributes:
        free: to this user.
        floor: kept so.
        turned_away: of the last write that did not fit; 0 where one has fitted since.
    """

    free: int
    floor: int
    turned_away: int = 0

    def state(self, low: int | None = None) -> SpaceState:
        """`low`: bytes below which it is low on space, by default a multiple of the floor."""
        if self.free <= self.floor or self.free - self.turned_away < self.floor:
            return "full"
        return "low" if self.free < self.low_below(low) else "enough"

    def low_below(self, given: int | None = None) -> int:
        """The bytes below which the store is low on space; never below the floor."""
        return max(self.floor, self.floor * LOW_SHARE if given is None else given)
