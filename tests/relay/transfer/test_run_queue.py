"""What is encoded ahead of the line keeps nothing waiting that could go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from harness.packages import cut_package, noise
from harness.short_runs import shorten_runs

from relay.encoding.choose_bases import Held
from relay.encoding.planner import Line
from relay.errors import StoreError
from relay.stores.memory import MemoryChunks
from relay.transfer.encoder_pool import Made, Payloads, PayloadSpec
from relay.transfer.link_history import Connections, Meter
from relay.transfer.run_queue import CutRun, RunQueue

LINE = Line(1.25e6, 0.05)
"""Of a class where each run that builds on bases is tried before it is planned."""
FILES = {f"lib/{i}.dll": noise(f"dll {i}", 100_000) for i in range(6)}
OLD = cut_package(FILES)
NEW = cut_package({path: data[:5000] + b"new" + data[5003:] for path, data in FILES.items()}, version="1.1.0")


@asynccontextmanager
async def queue_of(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[RunQueue, Payloads]]:
    """Of several runs, each of which builds on chunks of the old version."""
    shorten_runs(monkeypatch, 150_000)
    store = MemoryChunks()
    for cut in (OLD, NEW):
        for chunk in cut.chunks.values():
            await store.put(chunk)
    payloads = Payloads(store)
    queue = RunQueue(NEW.manifest, payloads, Meter(LINE), Connections(LINE))
    queue.begin(((0, len(NEW.manifest.chunks)),), [Held(OLD.manifest, ((0, len(OLD.manifest.chunks)),))])
    yield queue, payloads
    queue.close()
    await payloads.close()


async def all_of(queue: RunQueue) -> list[CutRun]:
    runs = []
    while (ahead := await queue.next()) is not None:
        runs.append(ahead.planned.run)
    return runs


async def test_the_first_run_goes_while_the_one_behind_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    trials, make = [], Payloads.make
    may_go_on = asyncio.Event()

    async def second_waits(payloads: Payloads, spec: PayloadSpec) -> Made:
        trials.append(spec)
        if len(trials) > 1:
            await may_go_on.wait()
        return await make(payloads, spec)

    monkeypatch.setattr(Payloads, "make", second_waits)
    async with queue_of(monkeypatch) as (queue, _):
        async with asyncio.timeout(30):
            first = await queue.next()
            assert first is not None
            while len(trials) < 2:
                await asyncio.sleep(0)
        assert queue.has_more
        may_go_on.set()
        runs = [first.planned.run, *await all_of(queue)]
        assert [index for run in runs for index in run.indexes] == list(NEW.indexes)
        assert all(run.bases for run in runs)
        assert len(trials) > 2


async def test_what_fails_while_runs_are_tried_ahead_is_raised_and_no_run_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trials, make = [], Payloads.make

    async def third_fails(payloads: Payloads, spec: PayloadSpec) -> Made:
        trials.append(spec)
        if len(trials) == 3:
            raise StoreError("a disk that broke")
        return await make(payloads, spec)

    monkeypatch.setattr(Payloads, "make", third_fails)
    async with queue_of(monkeypatch) as (queue, _):
        with pytest.raises(StoreError):
            await all_of(queue)
        assert queue.source_failed
