"""What an agent has to say waits in its outbox; that relays get it, tests/agent/test_service.py shows."""

from __future__ import annotations

import asyncio

import pytest

from agent.orders.outbox import Outbox


@pytest.mark.parametrize("turns", range(6))
async def test_an_outbox_that_is_cancelled_in_the_moment_in_which_it_is_woken_ends(turns: int) -> None:
    """`asyncio.wait_for` would lose the cancellation (Python 3.11), and the agent would never end."""
    outbox = Outbox("web1", list)
    task = asyncio.create_task(outbox.run())
    for _ in range(10):
        await asyncio.sleep(0)
    outbox.lost("http://127.0.0.1:1")
    for _ in range(turns):
        await asyncio.sleep(0)

    task.cancel()

    done, _ = await asyncio.wait({task}, timeout=20)
    assert done == {task}
