"""What people and the clock decide while a deployment runs. Decisions are rows of the journal, written by any process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from relay.errors import StoreError

if TYPE_CHECKING:
    from orchestrator.deployment.context import StopToken
    from orchestrator.journal.recorder import Recorder

DECISIONS_SECONDS: Final = 0.5
"""Between two looks at what people decided."""
CANCEL: Final = "cancel"
"""Kind of the decision that ends a deployment: nothing new starts, what is in flight comes to its end."""


@asynccontextmanager
async def decisions_obeyed(recorder: Recorder, stop: StopToken, deadline: float) -> AsyncIterator[None]:
    """While the block runs, take up decisions as they are made, and stop after `deadline` seconds (0: never).

    Where the journal cannot be read, the deployment stops too: a cancel may stand in it.
    """
    watch = asyncio.create_task(_watch(recorder, stop))
    why = f"the deadline of {deadline:.0f} s is over"
    timer = asyncio.get_running_loop().call_later(deadline, stop.request, why) if deadline else None
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()
        watch.cancel()
        await asyncio.wait([watch])


async def obey(recorder: Recorder, stop: StopToken) -> None:
    """Take up what was decided by now. Raises `StoreError`."""
    for decision in await recorder.pending_decisions():
        # Obeyed, then taken: where none waits any more, all are obeyed.
        if decision.kind == CANCEL:
            stop.request(f"cancelled by {decision.operator}", by_person=True)
        await recorder.take(decision)


async def _watch(recorder: Recorder, stop: StopToken) -> None:
    try:
        while True:
            await obey(recorder, stop)
            await asyncio.sleep(DECISIONS_SECONDS)
    except Exception as error:  # what ends this task unheard must end the deployment
        why = error.message if isinstance(error, StoreError) else repr(error)
        stop.request(f"what people decide cannot be read: {why}")
