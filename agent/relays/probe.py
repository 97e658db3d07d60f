"""Measure sources: each is asked whether it is well, and how soon it answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from agent.relays.candidates import Source
from agent.relays.dns import words_of
from agent.relays.health import ProbeResult
from relay.errors import RefusedError

Check = Callable[[Source], Awaitable[float]]
"""Connects to the source, asks whether it is well, and returns the seconds to the first byte; raises if it is not."""


async def probe(
    sources: Sequence[Source],
    check: Check,
    connect_timeout: float,
    *,
    stagger: float = 0.25,
) -> dict[str, ProbeResult]:
    """Check all sources, each starting `stagger` seconds after the one before it (RFC 8305), or at once when another
    has come to its end.

    Args:
        sources: the best in front.
        check: does the asking; its errors become results.
        connect_timeout: seconds for one check as a whole.
        stagger: seconds.

    Returns:
        Results by URL, in the order in which they came.
    """
    waiting = list(sources)
    running: dict[asyncio.Task[ProbeResult], str] = {}
    results: dict[str, ProbeResult] = {}
    try:
        while waiting or running:
            if waiting:
                source = waiting.pop(0)
                running[asyncio.create_task(_checked(source, check, connect_timeout))] = source.url
            timeout = stagger if waiting else None
            done, _ = await asyncio.wait(running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                results[running.pop(task)] = task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return results


async def _checked(source: Source, check: Check, connect_timeout: float) -> ProbeResult:
    try:
        async with asyncio.timeout(connect_timeout):
            return ProbeResult(first_byte=await check(source))
    except TimeoutError:
        return ProbeResult(None, f"no answer within {connect_timeout:g} s")
    # A check may die of anything: the source could not be used, and the reason is kept for people.
    except Exception as error:
        return ProbeResult(None, words_of(error), is_final=isinstance(error, RefusedError))
