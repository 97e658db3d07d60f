"""What ends before a deployment does: tokens and certificates of its relays, as the relays themselves tell it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from orchestrator.plan.plan import Plan, PlannedRelay
from orchestrator.replication.send import open_relay
from relay.errors import RefusedError, WaystationError
from relay.protocol.connection import TokenRefusedError
from relay.protocol.credentials import words_of
from relay.protocol.messages import Ending, HealthAnswer

PATIENCE: Final = 2.5
"""Seconds for a relay to answer. One that does not is not asked here: it may be reached after pre-acquisition."""


async def check_endings(plan: Plan) -> list[str]:
    """A sentence for each token or certificate that ends within two weeks, asked of all relays at once.

    Raises:
        RefusedError: one has ended, or ends before the deployment must be over (before acquisition must be, where it has
            no deadline).
    """
    now = datetime.now(UTC)
    over = now + timedelta(seconds=plan.deadline or plan.acquire.deadline)
    answers = zip(plan.relays, await asyncio.gather(*map(_ask, plan.relays)), strict=True)
    return judge(((relay.name, answer) for relay, answer in answers), now, over)


def judge(answers: Iterable[tuple[str, HealthAnswer | str | None]], now: datetime, over: datetime) -> list[str]:
    """By what relays answered (their health, why they refuse, or None for silence): pure. Raises as `check_endings`."""
    wrong: list[str] = []
    soon: list[str] = []
    for relay, answer in answers:
        if isinstance(answer, str):
            wrong.append(answer)
        elif answer is not None:
            own = [one for one in (answer.token, answer.certificate) if one is not None]
            wrong += [f"relay {relay}: {_end_of(one)}" for one in own if one.ends <= over.timestamp()]
            soon += [f"relay {relay}: {words}" for one in (*own, *_others(answer)) if (words := words_of(one, now))]
    if wrong:
        raise RefusedError(
            f"this deployment may last until {over:%Y-%m-%d %H:%M} UTC, and before that ends what it needs: "
            + "; ".join(wrong),
            hint="Replace it first: waystation relay token, or a new certificate",
        )
    return soon


def _others(answer: HealthAnswer) -> Sequence[Ending]:
    return [one for one in answer.endings if one not in {answer.token, answer.certificate}]


def _end_of(one: Ending) -> str:
    return f"its {one.what} {one.id}".rstrip() + f" at {datetime.fromtimestamp(one.ends, UTC):%Y-%m-%d %H:%M} UTC"


async def _ask(relay: PlannedRelay) -> HealthAnswer | str | None:
    try:
        async with asyncio.timeout(PATIENCE), open_relay(relay) as client:
            return await client.health(attempts=1, scope="order")
    except TokenRefusedError as error:
        return error.message
    except (TimeoutError, WaystationError):
        # Whatever else is wrong with it, it is only one of the relays.
        return None
