"""What it takes to send one package to a holder of another: every way is really encoded. Pure, but for its threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from orchestrator.compare.diff import (
    Chunks,
    OpenedPackage,
    PartChange,
    compare_parts,
    count_chunks,
    manifest_bytes,
    part_delta_bytes,
    payload_bytes,
    plan,
    rsync_like_bytes,
)
from relay.encoding.codecs import Coding

if TYPE_CHECKING:
    from relay.support.progress import Progress

_ENCODERS: Final = 2
"""At a time: one takes up to some 300 MB."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two packages, compared. Sizes are bytes; `payloads` are those of the chunks by each encoding."""

    changes: tuple[PartChange, ...]
    chunks: Chunks
    payloads: Mapping[Coding, int]
    manifest_bytes: int
    rsync_like_bytes: int


def compare(
    old: OpenedPackage, new: OpenedPackage, codings: Sequence[Coding], progress: Progress, *, with_parts: bool
) -> Comparison:
    """Compare, and encode the chunks in each way. `with_parts`: measure the difference of each part too. Blocking."""
    changes = compare_parts(old, new)
    runs = plan(old.manifest, new.manifest)
    tasks = [(run.size, partial(payload_bytes, old, new, run, coding)) for coding in codings for run in runs]
    if with_parts:
        tasks += [(change.size, partial(part_delta_bytes, old, new, change)) for change in changes]
    sizes = iter(side_by_side(tasks, progress))
    payloads = {coding: sum(next(sizes) for _ in runs) for coding in codings}
    if with_parts:
        measured = [replace(change, delta_bytes=next(sizes)) for change in changes]
        changes = sorted(measured, key=lambda each: (-(each.delta_bytes or 0), -each.size, each.path))
    return Comparison(
        tuple(changes),
        count_chunks(old.manifest, new.manifest),
        payloads,
        manifest_bytes(old.manifest, new.manifest),
        rsync_like_bytes(old, new),
    )


def side_by_side(tasks: Sequence[tuple[int, Callable[[], int]]], progress: Progress) -> list[int]:
    """The answers of all tasks, in their order. Each is given with its weight; the encoders release the GIL."""
    whole, done = max(sum(weight for weight, _ in tasks), 1), 0
    pool = ThreadPoolExecutor(min(_ENCODERS, os.cpu_count() or 1))
    try:
        weights: dict[Future[int], int] = {pool.submit(task): weight for weight, task in tasks}
        for future in as_completed(weights):
            future.result()
            done += weights[future]
            progress(done, whole)
        return [future.result() for future in weights]
    finally:
        pool.shutdown(cancel_futures=True)
