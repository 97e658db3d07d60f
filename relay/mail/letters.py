"""What a letter is, what it counts for, and how much of it a relay keeps. Pure."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import msgspec

from relay.errors import StoreError

LETTER_CHARGE = 512
"""Bytes that each letter counts for beside its own: what remembering it costs."""
RETRY_SECONDS = 60.0
"""`Retry-After` where mail is full."""

Kind: TypeAlias = Literal["order", "report", "log"]
Box: TypeAlias = tuple[Kind, str]
"""What is read together: the orders for one agent, the reports or the logs of one deployment."""
Account: TypeAlias = tuple[str, str]
"""What is bounded: all bytes, all letters, the bytes of one agent, those of one deployment."""

SHARES: Final[Mapping[Kind, float]] = {"order": 1.0, "report": 7 / 8, "log": 3 / 4}
"""How full mail may become by letters of a kind: logs never take the room of reports, nor both that of orders."""


@dataclass(frozen=True)
class MailLimits:
    """How much mail a relay keeps. Bytes count `LETTER_CHARGE` for each letter."""

    bytes: int = 1 << 30
    letters: int = 500_000
    bytes_per_agent: int = 16 << 20
    """Of orders for one agent."""
    bytes_per_deployment: int = 512 << 20
    """Of reports and logs of one deployment."""

    def of(self, account: Account) -> int:
        """The bound of an account."""
        return {
            "bytes": self.bytes,
            "letters": self.letters,
            "agent": self.bytes_per_agent,
            "deployment": self.bytes_per_deployment,
        }[account[0]]


class Letter(msgspec.Struct, frozen=True, array_like=True):
    """One letter. Names of agents are lower-cased.

    Attributes:
        box: the agent that an order is for; else the deployment.
        agent: whom an order is for; else who wrote it.
        part: a report's number, a log's offset; 0 for orders.
    """

    kind: Kind
    box: str
    agent: str
    operation: str
    part: int
    data: bytes

    @property
    def key(self) -> bytes:
        """What may stand for one content only: an order's operation; the agent's report of a number; the agent's piece
        of a log by offset and length (an agent that sends again may have more to say by then, and cuts it elsewhere).
        """
        author = "" if self.kind == "order" else self.agent
        length = len(self.data) if self.kind == "log" else 0
        return hashlib.sha256(f"{self.kind}\0{author}\0{self.operation}\0{self.part}\0{length}".encode()).digest()

    @property
    def check(self) -> bytes:
        return hashlib.sha256(self.agent.encode() + b"\0" + self.data).digest()

    @property
    def charge(self) -> int:
        return len(self.data) + LETTER_CHARGE


class Numbered(msgspec.Struct, frozen=True, array_like=True):
    """A letter and its number at this relay."""

    number: int
    letter: Letter


def accounts(kind: Kind, box: str, charge: int, letters: int = 1) -> Counter[Account]:
    """What letters of one box count towards."""
    whose = "agent" if kind == "order" else "deployment"
    return Counter({("bytes", ""): charge, ("letters", ""): letters, (whose, box): charge})


def charges(letters: Iterable[Letter]) -> Counter[Account]:
    """What `letters` count towards together."""
    total: Counter[Account] = Counter()
    for letter in letters:
        total.update(accounts(letter.kind, letter.box, letter.charge))
    return total


def check_room(letters: Iterable[Letter], used: Callable[[Account], int], limits: MailLimits) -> None:
    """Whether `letters` fit beside what is `used`, where theirs is counted in already. Raises `StoreError` (`full`)."""
    for letter in letters:
        for account in accounts(letter.kind, letter.box, letter.charge):
            if used(account) > limits.of(account) * SHARES[letter.kind]:
                raise StoreError(
                    f"no room for more mail ({' '.join(account).strip()})", full=True, retry_after=RETRY_SECONDS
                )
