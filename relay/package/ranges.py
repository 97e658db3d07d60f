"""Index ranges: how a wire names chunks. `[[0, 5], [7, 9]]` are the indexes 0 to 4, 7 and 8 of one manifest's chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

from relay.errors import FrameError

Ranges = tuple[tuple[int, int], ...]
"""Half-open `(start, stop)` pairs. Canonical: ascending, not empty, not touching. A run may hold any order."""

RANGES_MAX = 100_000
"""Pairs in one list. A receiver refuses more before it walks them."""


def from_indexes(indexes: Iterable[int]) -> Ranges:
    """The canonical ranges that cover exactly `indexes`."""
    return in_order(sorted(set(indexes)))


def in_order(indexes: Iterable[int]) -> Ranges:
    """The shortest ranges that name `indexes` in just this order."""
    pairs: list[tuple[int, int]] = []
    for index in indexes:
        if pairs and pairs[-1][1] == index:
            pairs[-1] = (pairs[-1][0], index + 1)
        else:
            pairs.append((index, index + 1))
    return tuple(pairs)


def indexes(ranges: Ranges) -> Iterator[int]:
    for start, stop in ranges:
        yield from range(start, stop)


def count(ranges: Ranges) -> int:
    return sum(stop - start for start, stop in ranges)


def check(ranges: Ranges, limit: int) -> Ranges:
    """`ranges` as they came, if each lies in `0 … limit` and none is empty or named twice.

    Raises:
        FrameError: they do not.
    """
    if len(ranges) > RANGES_MAX:
        raise FrameError(f"more than {RANGES_MAX} ranges in one list")
    for start, stop in ranges:
        if not 0 <= start < stop <= limit:
            raise FrameError(f"range [{start}, {stop}] does not lie in 0 … {limit}")
    ordered = sorted(ranges)
    if any(before[1] > after[0] for before, after in pairwise(ordered)):
        raise FrameError("ranges overlap")
    return ranges
